//! Races of statements on a real server, thousands of times each, closer together than the public API can bring them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex};
use std::thread;

use postgres::types::ToSql;
use postgres::{Client, Config, NoTls};

use super::*;

fn dsn() -> String {
    std::env::var("STORAGE_LOCK_POSTGRESQL_DSN")
        .expect("STORAGE_LOCK_POSTGRESQL_DSN is not set: run scripts/with-postgres.sh cargo test")
}

/// A table of the test's own.
pub(super) struct Table {
    pub(super) sql: Sql,
}

impl Table {
    pub(super) fn new() -> Table {
        let name = format!("race_{}", Uuid::new_v4().simple());
        let sql = Sql::new("public", &name);
        client().batch_execute(&sql.create_table).unwrap();
        Table { sql }
    }

    fn count(&self, condition: &str) -> i64 {
        client().query_one(&format!("SELECT count(*) FROM {} WHERE {condition}", self.sql.table), &[]).unwrap().get(0)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        client().batch_execute(&format!("DROP TABLE {}", self.sql.table)).ok();
    }
}

pub(super) fn client() -> Client {
    Client::connect(&dsn(), NoTls).unwrap()
}

pub(super) fn session() -> Session {
    let mut config: Config = dsn().parse().unwrap();
    config.options(sql::SESSION_OPTIONS);
    Session::new(Link::Own(config.connect(NoTls).unwrap()), true, Arc::default(), 0).unwrap()
}

fn claim(lock_id: &str, lease: Duration) -> Claim {
    Claim {
        lock_id: lock_id.to_owned(),
        owner_id: "owner".to_owned(),
        lease_id: Uuid::new_v4(),
        lease,
        expires: Instant::now() + LONG,
    }
}

/// Two threads meet here again and again. Unlike at a `Barrier`, a thread whose partner has panicked doesn't wait
/// forever.
#[derive(Default)]
struct Meeting {
    arrivals: Mutex<u64>,
    arrived: Condvar,
}

impl Meeting {
    fn meet(&self) {
        let mut arrivals = self.arrivals.lock().unwrap();
        *arrivals += 1;
        let complete = arrivals.next_multiple_of(2);
        self.arrived.notify_all();
        let waiting =
            self.arrived.wait_timeout_while(arrivals, Duration::from_secs(20), |arrivals| *arrivals < complete);
        assert!(*waiting.unwrap().0 >= complete, "the other thread didn't come");
    }
}

const LONG: Duration = Duration::from_secs(60);

fn row_waiter(waiter: Uuid) -> Option<RowWaiter> {
    Some(RowWaiter { id: waiter, notified_version: None })
}

fn acquire_or_create(session: &mut Session, sql: &Sql, claim: &Claim) -> Acquired {
    match session.acquire(sql, claim, None).unwrap() {
        Acquired::Absent => session.create(sql, claim).unwrap(),
        outcome => outcome,
    }
}

fn take(session: &mut Session, sql: &Sql, claim: &Claim) -> Option<Granted> {
    match acquire_or_create(session, sql, claim) {
        Acquired::Taken { granted, .. } => Some(granted),
        _ => None,
    }
}

fn release(session: &mut Session, sql: &Sql, claim: &Claim, version: Option<i64>) -> bool {
    session.release(sql, claim, version, None, false).unwrap().is_some()
}

#[test]
fn of_two_creators_of_a_lock_one_has_its_first_hold() {
    const ROUNDS: usize = 3_000;
    let table = Table::new();
    let meeting = Meeting::default();
    let creator = || {
        let mut session = session();
        (0..ROUNDS)
            .map(|round| {
                let claim = claim(&format!("l{round}"), LONG);
                meeting.meet();
                take(&mut session, &table.sql, &claim).inspect(|granted| assert_eq!(granted.version, 1)).is_some()
            })
            .collect::<Vec<bool>>()
    };
    let (one, other) = thread::scope(|scope| {
        let (one, other) = (scope.spawn(creator), scope.spawn(creator));
        (one.join().unwrap(), other.join().unwrap())
    });
    assert!(one.iter().zip(&other).all(|(one, other)| one != other), "both, or none, created a lock");
    assert_eq!(table.count("true"), ROUNDS as i64, "one row a lock");
    println!("{} rounds: the first creator won {}", ROUNDS, one.iter().filter(|won| **won).count());
}

#[test]
fn a_creator_that_stalled_before_it_locked_creates_nothing() {
    let table = Table::new();
    let (mut stalled, mut other) = (session(), session());
    for round in 0..200 {
        let lock_id = format!("l{round}");
        let stale = claim(&lock_id, LONG);
        assert!(matches!(stalled.acquire(&table.sql, &stale, None).unwrap(), Acquired::Absent));
        // While that creator stalls, others create the lock, release it, and move on.
        for _ in 0..3 {
            let claim = claim(&lock_id, LONG);
            assert!(take(&mut other, &table.sql, &claim).is_some());
            assert!(release(&mut other, &table.sql, &claim, None));
        }
        assert!(matches!(stalled.create(&table.sql, &stale).unwrap(), Acquired::Missed));
    }
    assert_eq!(table.count("version = 1"), 0, "the first version was made again");
    assert_eq!(table.count("version = 3"), 200);
}

/// The insert of a first hold needs a snapshot that is younger than the advisory lock, whatever the default level is.
#[test]
fn a_first_hold_is_created_under_read_committed_whatever_the_default_is() {
    let table = Table::new();
    let see = "CREATE TABLE $T_seen (level text);
        CREATE FUNCTION $T_see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO $T_seen VALUES (current_setting('transaction_isolation')); RETURN new; END $$;
        CREATE TRIGGER see BEFORE INSERT ON $T FOR EACH ROW EXECUTE FUNCTION $T_see()";
    let name = table.sql.table.replace("\"public\".", "").replace('"', "");
    client().batch_execute(&see.replace("$T", &name)).unwrap();
    for level in ["repeatable\\ read", "serializable"] {
        let mut config: Config = dsn().parse().unwrap();
        config.options(&format!("-c default_transaction_isolation={level} -c default_transaction_read_only=on"));
        let mut creator = Session::new(Link::Own(config.connect(NoTls).unwrap()), false, Arc::default(), 0).unwrap();
        assert!(matches!(creator.create(&table.sql, &claim(level, LONG)).unwrap(), Acquired::Taken { .. }));
    }
    let seen: Vec<String> = client()
        .query(&format!("DELETE FROM {name}_seen RETURNING level"), &[])
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(seen, ["read committed", "read committed"]);
    client().batch_execute(&"DROP TABLE $T_seen; DROP FUNCTION $T_see CASCADE".replace("$T", &name)).unwrap();
}

#[test]
fn a_creator_that_stalls_inside_its_transaction_is_ended_by_the_server() {
    let table = Table::new();
    let claim = claim("l", LONG);
    let mut stalled = client();
    let mut transaction = stalled.transaction().unwrap();
    transaction.query_typed(&table.sql.lock_creation, &[(&claim.lock_id, Type::TEXT)]).unwrap();
    let mut session = session();
    let start = Instant::now();
    assert!(matches!(session.create(&table.sql, &claim).unwrap(), Acquired::Missed));
    assert!(start.elapsed() < Duration::from_secs(1), "it waited for the stalled one");
    while !matches!(session.create(&table.sql, &claim).unwrap(), Acquired::Taken { .. }) {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(50));
    }
    assert!(transaction.commit().is_err());
}

#[test]
fn a_takeover_and_a_refresh_at_the_moment_of_expiry_never_both_succeed() {
    const ROUNDS: u32 = 3_000;
    let table = Table::new();
    let meeting = Meeting::default();
    let lease = Duration::from_millis(4);
    let held = Mutex::new(None);
    let (refreshed, taken) = thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let mut session = session();
            let mut refreshed = Vec::new();
            for round in 0..ROUNDS {
                // On a busy machine the answer may take longer than so short a lease.
                let (short, version, sent) = loop {
                    let short = claim("l", lease);
                    if let Some(granted) = take(&mut session, &table.sql, &short) {
                        break (short, granted.version, granted.sent);
                    }
                };
                *held.lock().unwrap() = Some(sent);
                meeting.meet();
                // Refreshes around the end of the lease, a little earlier or later each time.
                while sent.elapsed()
                    < lease - Duration::from_micros(400) + Duration::from_micros(u64::from(round % 7) * 100)
                {
                }
                // A successful refresh holds the lock for long: a takeover after it is wrong.
                let long = Claim { lease: LONG, ..short };
                let is_refreshed = session.refresh(&table.sql, &long, version).unwrap().is_some();
                refreshed.push(is_refreshed);
                meeting.meet();
                if is_refreshed {
                    assert!(release(&mut session, &table.sql, &long, Some(version)));
                }
                meeting.meet();
            }
            refreshed
        });
        let contender = scope.spawn(|| {
            let mut session = session();
            let mut taken = Vec::new();
            for round in 0..ROUNDS {
                meeting.meet();
                let sent = held.lock().unwrap().unwrap();
                while sent.elapsed()
                    < lease - Duration::from_micros(400) + Duration::from_micros(u64::from(round % 5) * 150)
                {
                }
                let claim = claim("l", LONG);
                let is_taken = matches!(session.acquire(&table.sql, &claim, None).unwrap(), Acquired::Taken { .. });
                taken.push(is_taken);
                meeting.meet();
                if is_taken {
                    assert!(release(&mut session, &table.sql, &claim, None));
                }
                meeting.meet();
            }
            taken
        });
        (holder.join().unwrap(), contender.join().unwrap())
    });
    let count = |outcomes: &[bool]| outcomes.iter().filter(|outcome| **outcome).count();
    println!("{ROUNDS} rounds: {} refreshed, {} taken over", count(&refreshed), count(&taken));
    assert!(refreshed.iter().zip(&taken).all(|(refreshed, taken)| !(*refreshed && *taken)), "two holds at once");
    assert!(count(&refreshed) > 50 && count(&taken) > 50, "the race was not one");
}

/// Every committed hold has a version of its own, however the acquirers interfere with each other.
#[test]
fn acquirers_that_race_get_different_versions() {
    const ROUNDS: usize = 1_500;
    let table = Table::new();
    let acquirer = || {
        let mut session = session();
        let mut versions = Vec::new();
        for _ in 0..ROUNDS {
            let claim = claim("l", LONG);
            if let Some(Granted { version, .. }) = take(&mut session, &table.sql, &claim) {
                versions.push(version);
                assert!(release(&mut session, &table.sql, &claim, Some(version)));
            }
        }
        versions
    };
    let versions: Vec<Vec<i64>> = thread::scope(|scope| {
        let acquirers: Vec<_> = (0..4).map(|_| scope.spawn(acquirer)).collect();
        acquirers.into_iter().map(|acquirer| acquirer.join().unwrap()).collect()
    });
    let all: Vec<i64> = versions.concat();
    assert!(versions.iter().all(|versions| versions.is_sorted()));
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len(), "a version was given twice");
    assert_eq!(all.iter().max().copied(), i64::try_from(all.len()).ok(), "a version was left out");
}

#[test]
fn release_and_refresh_are_idempotent() {
    let table = Table::new();
    let mut session = session();
    let mine = claim("l", LONG);
    let Granted { version, .. } = take(&mut session, &table.sql, &mine).unwrap();
    assert!(session.refresh(&table.sql, &mine, version).unwrap().is_some());
    assert!(session.refresh(&table.sql, &mine, version).unwrap().is_some());
    assert!(release(&mut session, &table.sql, &mine, Some(version)));
    let released = session.get(&table.sql, "l").unwrap().unwrap();
    assert!(release(&mut session, &table.sql, &mine, Some(version)), "a repetition is no loss");
    assert_eq!(session.get(&table.sql, "l").unwrap().unwrap(), released, "and changes nothing");
    assert!(session.refresh(&table.sql, &mine, version).unwrap().is_none(), "what is released is not refreshed");
    // A hold with another lease id, or another version, is another hold.
    assert!(!release(&mut session, &table.sql, &claim("l", LONG), Some(version)));
    assert!(!release(&mut session, &table.sql, &mine, Some(version + 1)));
}

/// The owner's name is no part of that: another hold has the same one.
#[test]
fn release_and_refresh_name_one_hold() {
    let table = Table::new();
    let mut session = session();
    let [old, new] = [0; 2].map(|_| claim("l", LONG));
    let version = take(&mut session, &table.sql, &old).unwrap().version;
    client().batch_execute(&format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table)).unwrap();
    assert_eq!(take(&mut session, &table.sql, &new).unwrap().version, version + 1);
    let row = session.get(&table.sql, "l").unwrap().unwrap();
    assert!(session.refresh(&table.sql, &old, version).unwrap().is_none());
    for version in [Some(version), Some(version + 1), None] {
        assert!(!release(&mut session, &table.sql, &old, version));
    }
    assert_eq!(session.get(&table.sql, "l").unwrap().unwrap(), row, "it is another one's");
    assert!(session.refresh(&table.sql, &new, version + 1).unwrap().is_some());
}

/// A contender judges neither by its own lease nor by what it read before.
#[test]
fn a_contender_judges_a_lease_by_the_row_each_time() {
    let table = Table::new();
    let (mut holder, mut contender) = (session(), session());
    let (lease, begin) = (Duration::from_secs(1), Instant::now());
    let mine = claim("l", lease);
    let version = take(&mut holder, &table.sql, &mine).unwrap().version;
    while begin.elapsed() < 2 * lease {
        for lease in [LONG, Duration::from_millis(1)] {
            let acquired = contender.acquire(&table.sql, &claim("l", lease), None).unwrap();
            assert!(matches!(acquired, Acquired::Busy(_)), "{acquired:?} after {:?}", begin.elapsed());
        }
        assert!(holder.refresh(&table.sql, &mine, version).unwrap().is_some());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_fence_is_for_its_own_hold_and_keeps_others_from_the_lock() {
    let table = Table::new();
    let (mut session, mut fencing) = (session(), client());
    let [old, new] = [0; 2].map(|_| claim("l", LONG));
    let fence = |transaction: &mut postgres::Transaction<'_>, claim: &Claim, version: i64| {
        let lease_id = claim.lease_id.to_string();
        transaction.query(&table.sql.fence, &[&"l", &version, &lease_id]).unwrap().len()
    };
    let expire = format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table);
    take(&mut session, &table.sql, &old).unwrap();
    let mut transaction = fencing.transaction().unwrap();
    assert_eq!(fence(&mut transaction, &old, 1), 1);
    client().batch_execute(&expire).unwrap();
    assert!(take(&mut session, &table.sql, &new).is_none(), "the transaction is open");
    transaction.commit().unwrap();
    assert_eq!(take(&mut session, &table.sql, &new).unwrap().version, 2);
    let mut transaction = fencing.transaction().unwrap();
    for (claim, version, rows) in [(&old, 1, 0), (&old, 2, 0), (&new, 1, 0), (&new, 2, 1)] {
        assert_eq!(fence(&mut transaction, claim, version), rows, "version {version}");
    }
    transaction.commit().unwrap();
    assert!(release(&mut session, &table.sql, &new, Some(2)));
    assert_eq!(fence(&mut fencing.transaction().unwrap(), &new, 2), 0, "it is released");
}

/// The late holder is stopped in the transaction that would have released the lock.
#[test]
fn a_release_that_has_waited_for_a_takeover_leaves_the_next_owners_row_to_be_refreshed() {
    let table = Table::new();
    let (mut session, mut taker, mut zombie) = (session(), client(), client());
    let (old, new) = (claim("l", LONG), claim("l", LONG));
    assert!(take(&mut session, &table.sql, &old).is_some());
    let mut takeover = taker.transaction().unwrap();
    let sql = format!("UPDATE {} SET version = version + 1, lease_id = $1", table.sql.table);
    takeover.execute(&sql, &[&new.lease_id]).unwrap();
    let mut stopped = zombie.transaction().unwrap();
    let backend: i32 = stopped.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let lease_id = old.lease_id.to_string();
    let mut transaction = thread::scope(|scope| {
        let unlocking = scope.spawn(|| {
            let row = stopped.query_one(&table.sql.unlock_in, &[&"l", &1_i64, &lease_id]).unwrap();
            assert_eq!(row.get::<_, Option<bool>>(0), None, "released its successor's hold");
            stopped
        });
        let waits = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND NOT granted";
        while client().query_one(waits, &[&backend]).unwrap().get::<_, i64>(0) == 0 {}
        takeover.commit().unwrap();
        unlocking.join().unwrap()
    });
    transaction.query_one("SELECT 1", &[]).expect("it is open");
    assert!(session.refresh(&table.sql, &new, 2).unwrap().is_some());
}

/// Behind a pooler, a prepared name may mean another statement, or the same statement for another table.
#[test]
fn a_statement_in_another_place_does_nothing() {
    let (table, other) = (Table::new(), Table::new());
    let mut session = session();
    let mine = claim("l", LONG);
    let Granted { version, .. } = take(&mut session, &table.sql, &mine).unwrap();
    let wrong_table = Some(format!("{} {}", session.backend.unwrap(), other.sql.refresh.name));
    let wrong_backend = Some(format!("{} {}", session.backend.unwrap() + 1, table.sql.refresh.name));
    let before = session.get(&table.sql, "l").unwrap();
    for check in [wrong_table, wrong_backend] {
        let row = session.client.query_one(&table.sql.refresh.text, &[&"l", &version, &mine.lease_id, &1_i64, &check]);
        let row = row.unwrap();
        assert!(!row.get::<_, bool>(0) && !row.get::<_, bool>(1));
        let row = session
            .client
            .query_one(&table.sql.release.text, &[&"l", &version, &mine.lease_id, &check, &None::<Uuid>, &false])
            .unwrap();
        assert!(!row.get::<_, bool>(0) && row.get::<_, Option<i32>>(1).is_none());
    }
    assert_eq!(session.get(&table.sql, "l").unwrap(), before);
    session.backend = session.backend.map(|backend| backend + 1);
    assert!(matches!(session.release(&table.sql, &mine, None, None, false), Err(Fault::Pooled)));
    assert!(session.route.is_pooled.load(Ordering::Relaxed) && !session.is_usable());
}

/// Runs two closures on two threads, round by round. In each round both begin at the same moment. Returns pairs of
/// results.
fn race<A: Send, B: Send>(
    rounds: usize,
    mut one: impl FnMut(usize) -> A + Send,
    mut other: impl FnMut(usize) -> B + Send,
) -> Vec<(A, B)> {
    let meeting = &Meeting::default();
    thread::scope(|scope| {
        let one = scope.spawn(move || (0..rounds).map(|round| (meeting.meet(), one(round)).1).collect::<Vec<A>>());
        let other = scope.spawn(move || (0..rounds).map(|round| (meeting.meet(), other(round)).1).collect::<Vec<B>>());
        one.join().unwrap().into_iter().zip(other.join().unwrap()).collect()
    })
}

/// Waits for a time that depends on the round, so that the statements of a race meet in every order.
fn delay(steps: usize) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_micros(40) * u32::try_from(steps).unwrap() {}
}

#[test]
fn a_release_and_a_busy_acquire_at_once_never_miss_each_other() {
    const ROUNDS: usize = 2_000;
    let table = Table::new();
    let claims: Vec<Claim> = (0..ROUNDS).map(|round| claim(&format!("l{round}"), LONG)).collect();
    let mut holder = session();
    claims.iter().for_each(|claim| assert!(take(&mut holder, &table.sql, claim).is_some()));
    let (waiter, mut waiting) = (Uuid::new_v4(), session());
    let outcomes = race(
        ROUNDS,
        |round| {
            delay(round % 11);
            holder.release(&table.sql, &claims[round], Some(1), None, false).unwrap().expect("held")
        },
        |round| {
            delay(round % 13);
            let acquired =
                waiting.acquire(&table.sql, &claim(&claims[round].lock_id, LONG), row_waiter(waiter)).unwrap();
            match acquired {
                Acquired::Busy(ref busy) => assert_eq!(busy.position, Some(1)),
                Acquired::Taken { .. } | Acquired::Missed => {}
                ref acquired => panic!("{acquired:?}: it is there, and nobody keeps it"),
            }
            matches!(acquired, Acquired::Busy(_))
        },
    );
    let waits = outcomes.iter().filter(|(_, waits)| *waits).count();
    println!("{ROUNDS} rounds: {waits} wait");
    assert!(outcomes.iter().all(|(waiters, waits)| *waiters == u32::from(*waits)), "told or not, without reason");
    assert!(waits > 50 && waits < ROUNDS - 50, "the race was not one: {waits}");
}

/// The registration has seen the lock held, and waits for the row until the release is committed.
#[test]
fn who_registers_while_the_lock_is_released_hears_that_it_is_free() {
    let table = Table::new();
    let (mut waiting, mut releasing, mut looking) = (session(), client(), client());
    take(&mut session(), &table.sql, &claim("l", LONG)).unwrap();
    let backend = waiting.backend.unwrap();
    let held = format!("UPDATE {} SET released_at = NULL, waiters = ARRAY[gen_random_uuid()]", table.sql.table);
    let release = format!("UPDATE {} SET released_at = clock_timestamp()", table.sql.table);
    let is_waiting = "SELECT count(*) FROM pg_locks WHERE pid = $1 AND NOT granted";
    // A registration waits only a moment for the row. On a busy machine the release may come too late.
    let registered = (0..50).find_map(|_| {
        releasing.batch_execute(&held).unwrap();
        let mut transaction = releasing.transaction().unwrap();
        transaction.batch_execute(&release).unwrap();
        let acquired = thread::scope(|scope| {
            let acquiring = scope.spawn(|| waiting.acquire(&table.sql, &claim("l", LONG), row_waiter(Uuid::new_v4())));
            while !acquiring.is_finished() && looking.query_one(is_waiting, &[&backend]).unwrap().get::<_, i64>(0) == 0
            {
            }
            transaction.commit().unwrap();
            acquiring.join().unwrap().unwrap()
        });
        match acquired {
            Acquired::Busy(busy) => Some(busy),
            Acquired::Locked => None,
            acquired => panic!("{acquired:?}: it is there, and promised to another one"),
        }
    });
    let busy = registered.expect("in time");
    assert!(busy.is_free && busy.left <= sql::GRACE && busy.position == Some(2), "{busy:?}");
}

#[test]
fn a_row_that_somebody_keeps_locked_is_told_as_locked() {
    let table = Table::new();
    let (mut session, mut locking) = (session(), client());
    take(&mut session, &table.sql, &claim("l", LONG)).unwrap();
    let mut transaction = locking.transaction().unwrap();
    transaction.batch_execute(&format!("SELECT FROM {} FOR UPDATE", table.sql.table)).unwrap();
    let mut acquire = |row_waiter| session.acquire(&table.sql, &claim("l", LONG), row_waiter).expect("no error");
    assert!(matches!(acquire(row_waiter(Uuid::new_v4())), Acquired::Locked));
    // An acquire without a waiter has no need to write to the row.
    assert!(matches!(acquire(None), Acquired::Busy { .. }));
}

#[test]
fn whoever_stands_in_the_row_stays_there_while_the_lock_is_handed_over() {
    const ROUNDS: usize = 2_000;
    let table = Table::new();
    let mut holder = session();
    let mut mine = claim("l", LONG);
    let mut version = take(&mut holder, &table.sql, &mine).unwrap().version;
    let mut waiting = session();
    let (mut missed, mut in_row) = (0, 0);
    for (handed, waiter) in race(
        ROUNDS,
        |round| {
            delay(round % 7);
            let next = claim("l", LONG);
            // A registration that is under way has the row locked: then the lock isn't handed over.
            let handed = holder.hand_over(&table.sql, &mine, version, &next).unwrap();
            if let Some(granted) = handed {
                assert_eq!(granted.version, version + 1);
                (mine, version) = (next, granted.version);
            }
            handed.is_some()
        },
        |round| {
            delay(round % 9);
            let waiter = Uuid::new_v4();
            let acquired = waiting.acquire(&table.sql, &claim("l", LONG), row_waiter(waiter)).unwrap();
            // On a busy machine the row may stay locked for longer than a registration waits.
            let is_asked_again = matches!(acquired, Acquired::Missed | Acquired::Locked);
            let is_queued = matches!(&acquired, Acquired::Busy(busy) if busy.position == Some(1));
            assert!(is_asked_again || is_queued, "{acquired:?}");
            let is_there = table.count(&format!("'{waiter}' = ANY (waiters)")) == 1;
            waiting.withdraw(&table.sql, "l", waiter).unwrap();
            assert_eq!(table.count(&format!("'{waiter}' = ANY (waiters)")), 0);
            (matches!(acquired, Acquired::Busy(_)), is_there)
        },
    ) {
        missed += usize::from(!handed);
        in_row += usize::from(waiter.0);
        assert_eq!(waiter.0, waiter.1, "the answer and the row differ");
    }
    println!("{ROUNDS} rounds: {missed} not handed over, {in_row} in the row");
    assert!(in_row > ROUNDS * 9 / 10 && missed < ROUNDS / 2, "{in_row} in the row, {missed} not handed over");
}

#[test]
fn a_hand_over_happens_once_and_names_the_hold() {
    let table = Table::new();
    let mut session = session();
    let [mine, next, another] = [0; 3].map(|_| claim("l", LONG));
    let version = take(&mut session, &table.sql, &mine).unwrap().version;
    let mut hand_over = |from: &Claim, version: i64, to: &Claim| {
        session.hand_over(&table.sql, from, version, to).unwrap().map(|granted| granted.version)
    };
    assert_eq!(hand_over(&another, version, &next), None, "another lease is another hold");
    assert_eq!(hand_over(&mine, version + 1, &next), None);
    assert_eq!(hand_over(&mine, version, &next), Some(version + 1));
    assert_eq!(hand_over(&mine, version, &next), None, "a copy of it does nothing");
    assert_eq!(hand_over(&mine, version, &another), None, "it was handed over already");
    assert_eq!(hand_over(&next, version + 1, &another), Some(version + 2));
    assert_eq!(hand_over(&mine, version, &next), None, "and has gone on since");
    assert_eq!(table.count(&format!("version = {} AND released_at IS NULL", version + 2)), 1);
    client().batch_execute(&format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table)).unwrap();
    assert_eq!(hand_over(&another, version + 2, &claim("l", LONG)), None, "what has expired is not handed over");
}

/// The payloads of the notifications for these waiters that come within half a second. Others, of other tests, may have
/// the same channel.
fn heard(listening: &mut Client, waiters: &[Uuid]) -> Vec<String> {
    let mut notifications = listening.notifications();
    let heard = notifications.timeout_iter(Duration::from_millis(500));
    let heard: Vec<String> = heard.map(|notification| Ok(notification.payload().to_owned())).collect().unwrap();
    let is_for_them = |payload: &String| waiters.iter().any(|waiter| payload.starts_with(&waiter.to_string()));
    heard.into_iter().filter(is_for_them).collect()
}

/// Waiters sleep by the longer lease, and so must look again.
#[test]
fn a_hand_over_to_a_shorter_lease_notifies_who_waits() {
    let table = Table::new();
    let (mut session, mut listening) = (session(), client());
    let waiters = [0; 2].map(|_| Uuid::new_v4());
    let [mine, longer, shorter] = [LONG, 2 * LONG, LONG].map(|lease| claim("l", lease));
    take(&mut session, &table.sql, &mine).unwrap();
    for waiter in waiters {
        listening.batch_execute(&sql::listen(waiter)).unwrap();
        let acquired = session.acquire(&table.sql, &claim("l", LONG), row_waiter(waiter)).unwrap();
        assert!(matches!(acquired, Acquired::Busy(_)));
    }
    session.hand_over(&table.sql, &mine, 1, &longer).unwrap().expect("held");
    assert!(heard(&mut listening, &waiters).is_empty(), "it is looked at in time");
    session.hand_over(&table.sql, &longer, 2, &shorter).unwrap().expect("held");
    let [first, second] = waiters;
    assert_eq!(heard(&mut listening, &waiters), [format!("{first} 0 0 l"), format!("{second} 100 0 l")]);
}

/// Runs the statements of waiting one after the other.
#[test]
fn a_released_lock_is_promised_to_the_first_in_the_row_for_a_while() {
    let table = Table::new();
    let mut session = session();
    let waiters = [0; 3].map(|_| Uuid::new_v4());
    let [first, second, third] = waiters;
    let row = || -> Vec<Uuid> {
        let sql = format!("SELECT coalesce(waiters, '{{}}') FROM {}", table.sql.table);
        client().query_one(&sql, &[]).unwrap().get(0)
    };
    let mine = claim("l", LONG);
    take(&mut session, &table.sql, &mine).unwrap();
    let mut acquire = |claim: &Claim, waiter: Uuid, notified_version: Option<i64>| match session
        .acquire(&table.sql, claim, Some(RowWaiter { id: waiter, notified_version }))
        .unwrap()
    {
        Acquired::Taken { granted, .. } => Ok((granted.version, granted.is_wanted)),
        Acquired::Busy(busy) => Err(busy),
        acquired => panic!("{acquired:?}"),
    };
    for (waiter, position) in [(first, 1), (second, 2), (first, 1), (third, 3)] {
        let busy = acquire(&claim("l", LONG), waiter, None).unwrap_err();
        assert!(busy.position == Some(position) && !busy.is_free && !busy.has_notified, "{busy:?}");
    }
    assert_eq!(row(), waiters, "each stands there once");
    let mut releasing = self::session();
    let mut release = |claim: &Claim, version, waiter, waits_again| {
        releasing.release(&table.sql, claim, Some(version), waiter, waits_again).unwrap().expect("held")
    };
    assert_eq!(release(&mine, 1, None, false), 3);
    // The second waiter has to wait for the first, but not for long.
    let busy = acquire(&claim("l", LONG), second, None).unwrap_err();
    assert!(busy.is_free && !busy.has_notified && busy.left <= sql::GRACE && busy.position == Some(2), "{busy:?}");
    let mine = claim("l", LONG);
    assert_eq!(acquire(&mine, first, None), Ok((2, true)));
    assert_eq!(row(), [second, third]);
    // A holder that waits again is put behind the others.
    assert_eq!(release(&mine, 2, Some(first), true), 3);
    assert_eq!(row(), [second, third, first]);
    // The second waiter doesn't come. The third notifies it. When the third takes the lock, the second leaves the row.
    thread::sleep(sql::GRACE);
    let mut listening = client();
    let mut listen = |waiter| listening.batch_execute(&sql::listen(waiter)).unwrap();
    listen(second);
    let busy = acquire(&claim("l", LONG), third, None).unwrap_err();
    assert!(busy.is_free && busy.has_notified && busy.notified_version() == Some(2), "{busy:?}");
    let mine = claim("l", LONG);
    assert!(acquire(&mine, third, Some(1)).is_err(), "of another version");
    assert_eq!(acquire(&mine, third, Some(2)), Ok((3, true)));
    assert_eq!(row(), [first]);
    assert!(heard(&mut listening, &waiters).contains(&format!("{second} 0 2 l")));
    // The end of a lease is the same: a newcomer is put behind those who wait.
    let expire = format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table);
    client().batch_execute(&expire).unwrap();
    let mine = claim("l", LONG);
    let busy = acquire(&mine, third, None).unwrap_err();
    assert!(busy.is_free && busy.position == Some(2) && row() == [first, third], "{busy:?}");
    assert_eq!(acquire(&mine, first, None), Ok((4, true)));
    assert_eq!(row(), [third]);
    // The first of two withdraws while the lock is promised to it: the other one is notified.
    acquire(&claim("l", LONG), second, None).unwrap_err();
    assert_eq!(release(&mine, 4, None, false), 2);
    heard(&mut listening, &waiters);
    session.withdraw(&table.sql, "l", third).unwrap();
    assert_eq!(heard(&mut listening, &waiters), [format!("{second} 0 4 l")]);
    // With nobody else in the row, a holder that waits again needn't be there.
    let mine = claim("l", LONG);
    let acquired = session.acquire(&table.sql, &mine, row_waiter(second)).unwrap();
    assert!(matches!(acquired, Acquired::Taken { .. }));
    assert_eq!(session.release(&table.sql, &mine, None, Some(first), true).unwrap(), Some(0));
    assert!(row().is_empty());
}

/// A late copy of a claim's statement does nothing, whoever sends it, and puts nobody into the row.
#[test]
fn what_comes_after_a_claims_time_takes_nothing_and_stands_nowhere() {
    let table = Table::new();
    let mut session = session();
    let mine = claim("l", LONG);
    let version = take(&mut session, &table.sql, &mine).unwrap().version;
    // Puts the session's idea of the server's clock back.
    let late = |session: &mut Session| session.clock.0 -= 2 * LONG;
    late(&mut session);
    assert!(session.hand_over(&table.sql, &mine, version, &claim("l", LONG)).unwrap().is_none());
    // The last answer has corrected the clock.
    assert!(session.hand_over(&table.sql, &mine, version, &claim("l", LONG)).unwrap().is_some());
    client().batch_execute(&format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table)).unwrap();
    for waits in [None, row_waiter(Uuid::new_v4())] {
        late(&mut session);
        assert!(matches!(session.try_to_acquire(&table.sql, &claim("l", LONG), waits).unwrap(), Acquired::TooLate));
    }
    late(&mut session);
    assert!(matches!(session.create(&table.sql, &claim("new", LONG)).unwrap(), Acquired::Missed));
    assert_eq!(table.count("lock_id = 'new' OR waiters IS NOT NULL"), 0);
    // A process that was suspended asks again, and acquires the lock.
    late(&mut session);
    assert!(matches!(session.acquire(&table.sql, &claim("l", LONG), None).unwrap(), Acquired::Taken { .. }));
}

/// A claim's time is that of its call, and not of its statement, even if the session's idea of the clock is right.
#[test]
fn a_claim_whose_time_is_over_when_it_is_sent_takes_nothing_and_stands_nowhere() {
    let table = Table::new();
    let mut session = session();
    let mine = claim("l", LONG);
    let version = take(&mut session, &table.sql, &mine).unwrap().version;
    let over = |lock_id: &str| Claim { expires: Instant::now() - Duration::from_secs(1), ..claim(lock_id, LONG) };
    assert!(session.hand_over(&table.sql, &mine, version, &over("l")).unwrap().is_none());
    client().batch_execute(&format!("UPDATE {} SET lease_expire_time = clock_timestamp()", table.sql.table)).unwrap();
    for waits in [None, row_waiter(Uuid::new_v4())] {
        assert!(matches!(session.acquire(&table.sql, &over("l"), waits).unwrap(), Acquired::TooLate));
    }
    assert!(matches!(session.create(&table.sql, &over("new")).unwrap(), Acquired::Missed));
    assert_eq!(table.count("lock_id = 'new' OR waiters IS NOT NULL"), 0);
    assert!(matches!(session.acquire(&table.sql, &claim("l", LONG), None).unwrap(), Acquired::Taken { .. }));
}

/// A release doesn't see an acquire that it may have to undo before that acquire is committed.
#[test]
fn an_acquire_that_is_about_to_commit_is_not_settled() {
    let table = Table::new();
    let (mut acquiring, mut undoing) = (session(), session());
    let first = claim("l", LONG);
    assert!(undoing.is_settled(&table.sql, "l").unwrap(), "nobody has ever held it");
    // The first hold of a lock, in the steps of `create`.
    let mut transaction = acquiring.client.transaction().unwrap();
    transaction.query_typed(&table.sql.lock_creation, &[(&first.lock_id, Type::TEXT)]).unwrap();
    assert!(!undoing.is_settled(&table.sql, "l").unwrap(), "it is going to be made");
    // By the server's clock.
    let ends = undoing.clock.0 + LONG;
    let parameters: [(&(dyn ToSql + Sync), Type); 5] = [
        (&first.lock_id, Type::TEXT),
        (&first.owner_id, Type::TEXT),
        (&first.lease_id, Type::UUID),
        (&micros(LONG), Type::INT8),
        (&ends, Type::TIMESTAMPTZ),
    ];
    assert_eq!(transaction.query_typed(&table.sql.create, &parameters).unwrap().len(), 1);
    assert!(!release(&mut undoing, &table.sql, &first, None), "it is not committed");
    assert!(!undoing.is_settled(&table.sql, "l").unwrap(), "it may be");
    transaction.commit().unwrap();
    assert!(undoing.is_settled(&table.sql, "l").unwrap());
    assert!(release(&mut undoing, &table.sql, &first, None));
    // Each further hold.
    let next = claim("l", LONG);
    acquiring.client.batch_execute("BEGIN").unwrap();
    assert!(matches!(acquiring.acquire(&table.sql, &next, None).unwrap(), Acquired::Taken { .. }));
    assert!(!release(&mut undoing, &table.sql, &next, None), "it is not committed");
    assert!(!undoing.is_settled(&table.sql, "l").unwrap(), "it may be");
    acquiring.client.batch_execute("COMMIT").unwrap();
    assert!(undoing.is_settled(&table.sql, "l").unwrap());
    assert!(release(&mut undoing, &table.sql, &next, None));
}

/// A statement that waits in the server keeps its connection from other calls.
#[test]
fn nothing_waits_long_in_the_server_for_a_row_that_somebody_keeps_locked() {
    let table = Table::new();
    let (mut session, mut locking) = (session(), client());
    let (mine, waiter) = (claim("l", LONG), Uuid::new_v4());
    let version = take(&mut session, &table.sql, &mine).unwrap().version;
    assert!(matches!(session.acquire(&table.sql, &claim("l", LONG), row_waiter(waiter)).unwrap(), Acquired::Busy(_)));
    let mut transaction = locking.transaction().unwrap();
    transaction.batch_execute(&format!("SELECT FROM {} FOR UPDATE", table.sql.table)).unwrap();
    let mut is_kept_waiting = |what: &str, call: &dyn Fn(&mut Session) -> Option<Fault>| {
        let start = Instant::now();
        let Some(Fault::Postgres(error)) = call(&mut session) else { panic!("{what}: it is locked") };
        assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE), "{what}: {error}");
        assert!(start.elapsed() < Duration::from_secs(1), "{what} has waited for {:?}", start.elapsed());
    };
    is_kept_waiting("a refresh", &|session| session.refresh(&table.sql, &mine, version).err());
    is_kept_waiting("a release", &|session| session.release(&table.sql, &mine, Some(version), None, false).err());
    is_kept_waiting("a withdrawal", &|session| session.withdraw(&table.sql, "l", waiter).err());
    transaction.commit().unwrap();
    assert!(session.refresh(&table.sql, &mine, version).unwrap().is_some());
}

/// A session that listens somewhere, and reads nothing, fills the queue. The server says so when a statement commits.
#[test]
fn a_full_queue_of_notifications_keeps_nobody_from_the_lock() {
    let table = Table::new();
    let name = table.sql.table.replace("\"public\".", "").replace('"', "");
    let full = "CREATE FUNCTION $T_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF TG_WHEN = 'BEFORE' THEN
                PERFORM set_config('race.notifies', (current_query() LIKE '%pg_notify(%')::text, true);
                RETURN new;
            ELSIF current_setting('race.notifies') = 'true' THEN
                RAISE 'the queue is full' USING ERRCODE = '54000';
            END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER see BEFORE UPDATE ON $T FOR EACH ROW EXECUTE FUNCTION $T_full();
        CREATE CONSTRAINT TRIGGER commit AFTER UPDATE ON $T DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION $T_full()";
    client().batch_execute(&full.replace("$T", &name)).unwrap();
    let mut session = session();
    let [mine, next] = [0; 2].map(|_| claim("l", LONG));
    let [first, second] = [0; 2].map(|_| Uuid::new_v4());
    take(&mut session, &table.sql, &mine).unwrap();
    for waiter in [first, second] {
        let acquired = session.acquire(&table.sql, &claim("l", LONG), row_waiter(waiter)).unwrap();
        assert!(matches!(acquired, Acquired::Busy(_)), "{acquired:?}");
    }
    let shorter = Claim { lease: LONG / 2, ..next };
    assert_eq!(session.hand_over(&table.sql, &mine, 1, &shorter).unwrap().expect("held").version, 2);
    assert_eq!(session.release(&table.sql, &shorter, Some(2), None, false).unwrap(), Some(2));
    session.withdraw(&table.sql, "l", first).unwrap();
    let acquired = session.acquire(&table.sql, &claim("l", LONG), row_waiter(second)).unwrap();
    assert!(matches!(acquired, Acquired::Taken { .. }), "{acquired:?}");
    client().batch_execute(&format!("DROP FUNCTION {name}_full CASCADE")).unwrap();
}

#[test]
fn a_takeover_and_a_hand_over_at_the_moment_of_expiry_never_both_succeed() {
    const ROUNDS: usize = 1_000;
    let table = Table::new();
    let (mut holder, mut contender) = (session(), session());
    let lease = Duration::from_millis(4);
    let locks: Vec<String> = (0..ROUNDS).map(|round| format!("l{round}")).collect();
    let held = Mutex::new(None);
    let started = Meeting::default();
    let outcomes = race(
        ROUNDS,
        |round| {
            // On a busy machine the answer may take longer than so short a lease.
            let (short, granted) = loop {
                let short = claim(&locks[round], lease);
                if let Some(granted) = take(&mut holder, &table.sql, &short) {
                    break (short, granted);
                }
            };
            *held.lock().unwrap() = Some(granted.sent);
            started.meet();
            while granted.sent.elapsed() < lease - Duration::from_micros(400) {}
            delay(round % 17);
            let next = claim(&locks[round], LONG);
            holder.hand_over(&table.sql, &short, granted.version, &next).unwrap().is_some()
        },
        |round| {
            started.meet();
            let sent = held.lock().unwrap().unwrap();
            while sent.elapsed() < lease - Duration::from_micros(400) {}
            delay(round % 19);
            take(&mut contender, &table.sql, &claim(&locks[round], LONG)).is_some()
        },
    );
    let (handed, taken): (Vec<bool>, Vec<bool>) = outcomes.into_iter().unzip();
    let count = |outcomes: &[bool]| outcomes.iter().filter(|outcome| **outcome).count();
    println!("{ROUNDS} rounds: {} handed over, {} taken over", count(&handed), count(&taken));
    assert!(handed.iter().zip(&taken).all(|(handed, taken)| !(*handed && *taken)), "two holds at once");
    assert!(count(&handed) > 20 && count(&taken) > 20, "the race was not one");
}

/// The claim's caller has given up. Its statement is sent after that, by a session that knows the right time.
#[test]
fn a_claim_whose_time_is_over_takes_nothing_and_stands_nowhere_also_if_it_is_sent_then() {
    let second = Duration::from_secs(1);
    let over = |lock_id: &str| Claim { expires: Instant::now().checked_sub(second).unwrap(), ..claim(lock_id, LONG) };
    let pooled = || Session::new(Link::Own(client()), false, Arc::default(), 0).unwrap();
    for mut session in [session(), pooled()] {
        let table = Table::new();
        let too_late = |acquired: Result<Acquired, Fault>| assert!(matches!(acquired.unwrap(), Acquired::TooLate));
        too_late(session.acquire(&table.sql, &over("l"), None));
        assert!(matches!(session.create(&table.sql, &over("l")).unwrap(), Acquired::Missed));
        assert_eq!(table.count("true"), 0);
        let mine = claim("l", LONG);
        let version = take(&mut session, &table.sql, &mine).unwrap().version;
        // The lock is held, then expired, then released.
        for _ in 0..3 {
            for row_waiter in [None, row_waiter(Uuid::new_v4())] {
                too_late(session.acquire(&table.sql, &over("l"), row_waiter));
            }
            assert!(session.hand_over(&table.sql, &mine, version, &over("l")).unwrap().is_none());
            let mut client = client();
            if table.count("lease_expire_time > clock_timestamp()") == 1 {
                let expire = "lease_expire_time = clock_timestamp()";
                client.batch_execute(&format!("UPDATE {} SET {expire}", table.sql.table)).unwrap();
            } else {
                assert!(release(&mut session, &table.sql, &mine, Some(version)));
            }
        }
        assert_eq!(table.count(&format!("version = {version} AND waiters IS NULL")), 1);
        // A claim in time takes the lock.
        assert!(take(&mut session, &table.sql, &claim("l", LONG)).is_some());
    }
}

/// Where commits wait for a standby that isn't there, that look would wait, too.
#[test]
fn who_looks_whether_a_claim_is_settled_commits_without_waiting() {
    let table = Table::new();
    let mut session = session();
    take(&mut session, &table.sql, &claim("l", LONG)).unwrap();
    session.client.batch_execute("BEGIN").unwrap();
    assert!(session.is_settled(&table.sql, "l").unwrap());
    let row = session.client.query_one("SELECT current_setting('synchronous_commit'), txid_current_if_assigned()", &[]);
    let row = row.unwrap();
    assert!(row.get::<_, Option<i64>>(1).is_some(), "there is nothing to commit");
    assert_eq!(row.get::<_, String>(0), "off");
    session.client.batch_execute("ROLLBACK").unwrap();
}
