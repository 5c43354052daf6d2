//! Many locks at once.

use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use storage_lock::{LockGuard, PostgresStorage, StorageLock};

use crate::free::side_by_side;
use crate::support::proxy::Proxy;
use crate::support::{Table, eventually, ms, short_lock, takes_at_most, within};

#[test]
fn five_hundred_locks_are_held_for_three_leases_with_four_connections() {
    let table = Table::new();
    let dsn = format!("{} application_name={}", table.dsn, table.name);
    let storage =
        storage_lock::PostgresStorage::new(Table::of(&dsn, &table.name).options().max_connections(4)).unwrap();
    let lease = ms(8_000);
    let guards: Vec<LockGuard> =
        (0..500).map(|n| short_lock(&storage, &format!("l{n}"), lease, ms(2_000)).lock("worker").unwrap()).collect();
    let mut client = table.client();
    let end = Instant::now() + 3 * lease;
    let mut seen = Vec::new();
    while Instant::now() < end {
        let lost: Vec<&str> = guards.iter().filter(|guard| !guard.is_held()).map(|guard| guard.lock_id()).collect();
        assert!(lost.is_empty(), "lost {lost:?}");
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        let connections: i64 = client.query_one(sql, &[&table.name]).unwrap().get(0);
        seen.push(connections);
        thread::sleep(ms(50));
    }
    seen.sort_unstable();
    // On a machine that is busy elsewhere a call may overrun, and its connection is replaced.
    assert!(seen[seen.len() / 2] <= 4 && seen[seen.len() - 1] <= 4 + 8, "{seen:?} connections");
    assert_eq!(storage.list().unwrap().len(), 500);
    for guard in guards {
        guard.unlock().unwrap();
    }
    assert_eq!(storage.list().unwrap().len(), 0);
}

#[test]
fn a_burst_of_calls_opens_no_more_connections_than_allowed() {
    let table = Table::new();
    let mut client = table.client();
    for round in 0..30 {
        let name = format!("{}_{round}", table.name);
        let dsn = format!("{} application_name={name}", table.dsn);
        let storage =
            storage_lock::PostgresStorage::new(Table::of(&dsn, &table.name).options().max_connections(4)).unwrap();
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| assert!((0..10).all(|_| storage.server_time().is_ok())));
            }
        });
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        let connections: i64 = client.query_one(sql, &[&name]).unwrap().get(0);
        assert!((1..=4).contains(&connections), "{connections} connections");
    }
}

#[test]
fn refreshes_are_not_starved_by_acquires() {
    let table = Table::new();
    for max_connections in [1, 2] {
        let dsn = format!("{} application_name={}_{max_connections}", table.dsn, table.name);
        let options = Table::of(&dsn, &table.name).options().max_connections(max_connections);
        let storage = storage_lock::PostgresStorage::new(options).unwrap();
        let guard = short_lock(&storage, "held", ms(5_000), ms(200)).lock("worker").unwrap();
        let end = Instant::now() + Duration::from_secs(7);
        thread::scope(|scope| {
            for _ in 0..40 {
                let (storage, guard) = (&storage, &guard);
                scope.spawn(move || {
                    let lock = short_lock(storage, "held", ms(5_000), ms(200));
                    while Instant::now() < end {
                        assert!(lock.try_lock("busy").unwrap().is_none());
                        assert!(guard.remaining() > ms(500), "{:?} left", guard.remaining());
                    }
                });
            }
        });
        guard.unlock().unwrap();
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        let name = format!("{}_{max_connections}", table.name);
        let connections: i64 = table.client().query_one(sql, &[&name]).unwrap().get(0);
        assert!(connections <= i64::from(max_connections), "{connections} connections, not {max_connections}");
    }
}

/// Somebody locks rows by hand, and the releases of these locks get stuck in the server.
#[test]
fn releases_that_are_stuck_do_not_starve_the_refreshes_of_other_locks() {
    let table = Table::new();
    let storage = table.storage();
    let keep = short_lock(&storage, "keep", ms(4_000), ms(500)).lock("worker").unwrap();
    let stuck: Vec<LockGuard> =
        (0..8).map(|n| short_lock(&storage, &format!("r{n}"), ms(30_000), ms(5_000)).lock("worker").unwrap()).collect();
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.execute(&format!("SELECT FROM {} WHERE lock_id LIKE 'r%' FOR UPDATE", table.name), &[]).unwrap();
    let end = Instant::now() + Duration::from_secs(9);
    thread::scope(|scope| {
        for guard in stuck {
            scope.spawn(|| takes_at_most(ms(2_500), "drop", || drop(guard)));
        }
        while Instant::now() < end {
            assert!(keep.is_held(), "an unrelated lock was lost");
            thread::sleep(ms(20));
        }
    });
    transaction.rollback().unwrap();
    // The stuck releases come through, or are repeated.
    crate::support::eventually("all but one are free", || storage.list().unwrap().len() == 1);
    keep.unlock().unwrap();
}

/// Acquires that take long, more of them than connections.
#[test]
fn one_connection_is_kept_for_refreshes_and_releases() {
    let table = Table::new();
    let storage = storage_lock::PostgresStorage::new(table.options().max_connections(2)).unwrap();
    let lock = |name: &str| short_lock(&storage, name, ms(2_000), ms(300));
    for n in 0..3 {
        drop(lock(&format!("slow-{n}")).lock("warm-up").unwrap());
    }
    table
        .client()
        .batch_execute(
            &"CREATE FUNCTION $T_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                  IF new.owner_id = 'slow' AND new.version <> old.version THEN PERFORM pg_sleep(2.5); END IF; RETURN \
                  new; END $$;
              CREATE TRIGGER slow BEFORE UPDATE ON $T FOR EACH ROW EXECUTE FUNCTION $T_slow()"
                .replace("$T", &table.name),
        )
        .unwrap();
    let keep = lock("keep").lock("worker").unwrap();
    thread::scope(|scope| {
        for n in 0..3 {
            let slow = lock(&format!("slow-{n}"));
            scope.spawn(move || slow.try_lock("slow").map(drop));
        }
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            assert!(keep.is_held(), "a refresh waited behind acquires");
            thread::sleep(ms(5));
        }
        takes_at_most(ms(1_000), "unlock", || keep.unlock().unwrap());
    });
    drop(storage);
    table.client().batch_execute(&"DROP FUNCTION $T_slow CASCADE".replace("$T", &table.name)).unwrap();
}

/// Rows that somebody's transactions keep locked: of holds, and of places in which nobody waits any more.
struct Locked {
    clients: Vec<Client>,
}

impl Locked {
    /// One transaction a row. It ends when this is dropped.
    fn rows(table: &Table, lock_ids: &[String]) -> Locked {
        let lock = |lock_id: &String| {
            let mut client = table.impatient_client();
            client.batch_execute("BEGIN").unwrap();
            let sql = format!("SELECT FROM {} WHERE lock_id = $1 FOR UPDATE", table.name);
            assert_eq!(client.execute(&sql, &[lock_id]).unwrap(), 1);
            client
        };
        Locked { clients: lock_ids.iter().map(lock).collect() }
    }

    fn end(self) {
        self.clients.into_iter().for_each(|mut client| client.batch_execute("ROLLBACK").unwrap());
    }
}

fn names(what: &str, number: usize) -> Vec<String> {
    (0..number).map(|n| format!("{what}-{n}")).collect()
}

/// Holds of a process that is not there any more, for ten minutes.
fn held_by_the_dead(table: &Table, lock_ids: &[String]) {
    let sql = format!(
        "INSERT INTO {} SELECT name, 1, 'dead', gen_random_uuid(), clock_timestamp(), clock_timestamp() + interval \
         '600 s'
         FROM unnest($1::text[]) AS name",
        table.name
    );
    table.client().execute(&sql, &[&lock_ids]).unwrap();
}

/// In how many rows somebody stands.
fn rows_with_waiters(table: &Table) -> i64 {
    let sql = format!("SELECT count(*) FROM {} WHERE waiters IS NOT NULL", table.name);
    table.client().query_one(&sql, &[]).unwrap().get(0)
}

/// Threads that wait for a lock each, until one deadline, in vain.
fn wait_in_vain(storage: &PostgresStorage, lock_ids: &[String], patience: Duration) {
    let deadline = Instant::now() + patience;
    thread::scope(|scope| {
        for lock_id in lock_ids {
            scope.spawn(move || {
                let lock = StorageLock::new(storage, lock_id).unwrap();
                // Where so many begin at once, not all of them come to ask.
                assert!(!matches!(lock.try_lock_until("waiter", deadline), Ok(Some(_))));
            });
        }
    });
}

/// By hand; or by transactions that release a lock each, whose connections break on the caller's side only, so that the
/// server has them open.
#[test]
fn holds_whose_rows_stay_locked_cost_no_other_hold() {
    side_by_side(&["by hand", "unlock_in"], |&how| {
        let table = Table::new();
        let storage = table.storage();
        let take = |what: &str, lease: Duration| -> Vec<LockGuard> {
            let lock = |name: &String| short_lock(&storage, name, lease, lease / 5).lock("worker").unwrap();
            names(what, 4).iter().map(lock).collect()
        };
        let (theirs, keep) = (take("locked", ms(10_000)), take("keep", ms(3_000)));
        let proxies: Vec<Proxy> = theirs.iter().map(|_| Proxy::to(&table.dsn)).collect();
        let by_hand = (how == "by hand").then(|| Locked::rows(&table, &names("locked", 4)));
        let end = Instant::now() + ms(7_000);
        thread::scope(|scope| {
            for (guard, proxy) in theirs.iter().zip(&proxies).filter(|_| how == "unlock_in") {
                let mut client = Table::of(&proxy.dsn, &table.name).client();
                scope.spawn(move || {
                    let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
                    proxy.keep_request(b"COMMIT");
                    assert!(transaction.commit().is_err());
                    assert_eq!(proxy.kept_requests(), 1);
                });
            }
            while Instant::now() < end {
                let lost: Vec<&str> = keep.iter().filter(|guard| !guard.is_held()).map(LockGuard::lock_id).collect();
                assert!(lost.is_empty(), "{how}: lost {lost:?}");
                thread::sleep(ms(10));
            }
        });
        by_hand.into_iter().for_each(Locked::end);
        proxies.iter().for_each(Proxy::deliver);
        keep.into_iter().for_each(|guard| guard.unlock().unwrap());
    });
}

#[test]
fn hundreds_of_waits_that_end_at_one_deadline_leave_no_place_behind() {
    let table = Table::new();
    let storage = table.storage();
    let locks = names("l", 300);
    held_by_the_dead(&table, &locks);
    thread::scope(|scope| {
        scope.spawn(|| wait_in_vain(&storage, &locks, ms(3_000)));
        eventually("most of them stand in their rows", || rows_with_waiters(&table) > 250);
    });
    within(Duration::from_secs(15), "nobody stands in any row", || (rows_with_waiters(&table) == 0).then_some(()));
}

/// They are tried again and again, and the release has failed too.
#[test]
fn places_in_locked_rows_keep_no_release_waiting() {
    let table = Table::new();
    let storage = table.storage();
    let locks = names("l", 12);
    held_by_the_dead(&table, &locks);
    let guard = short_lock(&storage, "keep", ms(300_000), ms(60_000)).lock("worker").unwrap();
    let places = thread::scope(|scope| {
        scope.spawn(|| wait_in_vain(&storage, &locks, ms(1_500)));
        eventually("all of them stand in their rows", || rows_with_waiters(&table) == 12);
        Locked::rows(&table, &locks)
    });
    let row = Locked::rows(&table, &["keep".to_owned()]);
    takes_at_most(ms(2_700), "unlock", || guard.unlock()).unwrap_err();
    thread::sleep(ms(3_000));
    assert_eq!(rows_with_waiters(&table), 12, "the rows weren't locked");
    row.end();
    let theirs = table.lock("keep");
    within(ms(5_000), "the lock is free", || theirs.try_lock("other").unwrap().map(drop));
    places.end();
    within(Duration::from_secs(15), "nobody stands in any row", || (rows_with_waiters(&table) == 0).then_some(()));
}

/// A storage with two connections, of which one is for refreshes and releases.
#[test]
fn a_place_in_a_locked_row_keeps_no_other_call_waiting() {
    let table = Table::new();
    let storage = PostgresStorage::new(table.options().max_connections(2)).unwrap();
    held_by_the_dead(&table, &names("l", 1));
    let place = thread::scope(|scope| {
        scope.spawn(|| wait_in_vain(&storage, &names("l", 1), ms(700)));
        eventually("it stands in the row", || rows_with_waiters(&table) == 1);
        Locked::rows(&table, &names("l", 1))
    });
    let keep = short_lock(&storage, "keep", ms(3_000), ms(500)).lock("worker").unwrap();
    let end = Instant::now() + ms(5_000);
    while Instant::now() < end {
        let other = StorageLock::new(&storage, "other").unwrap();
        // Far more than a statement takes, and less than a row is waited for elsewhere.
        let guard = other.try_lock_for("worker", ms(1_500)).expect("in time").expect("it is free");
        guard.unlock().unwrap();
        assert!(keep.is_held());
        thread::sleep(ms(20));
    }
    assert_eq!(rows_with_waiters(&table), 1, "the row wasn't locked");
    place.end();
    within(Duration::from_secs(15), "nobody stands in any row", || (rows_with_waiters(&table) == 0).then_some(()));
}
