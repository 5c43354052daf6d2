//! A primary and its standby: the primary dies, the standby is promoted. Each test has a pair of its own.
//!
//! With a synchronous standby nothing is lost that was granted. With one that is not, commits may be lost: the tests
//! show what that does to holds and versions, and what to do about it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use storage_lock::{Error, LockGuard, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::fence::{LEVELS, begin};
use crate::support::server::Pair;
use crate::support::{Table, chain, eventually, is_refreshed, ms, short_lock, waits_for, within};

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The version and the lease of the newest hold.
fn hold(client: &mut Client, table: &Table, lock_id: &str) -> (i64, Uuid) {
    let sql = format!("SELECT version, lease_id FROM {} WHERE lock_id = $1", table.name);
    let row = client.query_one(&sql, &[&lock_id]).unwrap();
    (row.get(0), row.get(1))
}

/// Waits until so many commits wait for the standby.
#[track_caller]
fn waits_for_the_standby(client: &mut Client, commits: i64) {
    let sql =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'storage_lock'";
    eventually("a commit waits for the standby", || client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == commits);
}

/// Another process, with what it knows of a lock only from the server.
fn try_lock(table: &Table, lock_id: &str) -> Option<LockGuard> {
    table.lock(lock_id).try_lock("another").unwrap()
}

#[test]
fn a_hold_outlives_its_primary() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let guard = table.short_lock("l", s(30), ms(200)).lock("worker").unwrap();
    let (free, theirs) = (table.lock("free"), table.lock("l"));
    drop(free.lock("worker").unwrap());
    let before = hold(&mut pair.primary.client(), &table, "l");
    let waiter = waits_for(&theirs);

    // A release may be lost, see below.
    pair.catches_up();
    pair.primary.kill();
    pair.promote();
    assert_eq!(hold(&mut pair.standby.client(), &table, "l"), before, "the same version, and the same lease");
    is_refreshed(&guard);
    assert!(guard.is_held());
    assert!(try_lock(&table, "l").is_none() && !waiter.is_finished());
    guard.unlock().unwrap();
    assert_eq!(waiter.join().unwrap(), 2);
    assert_eq!(free.lock("worker").unwrap().version(), 2);

    // The old primary comes back alone, and does not know that it isn't the primary any more.
    pair.primary.ctl(&["start"]);
    let old = StorageLock::new(&Table::of(&pair.primary.dsn, &table.name).storage(), "free").unwrap();
    let result = old.try_lock_for("late", ms(500));
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
    pair.primary.ctl(&["stop", "-m", "immediate"]);
}

#[test]
fn a_standby_is_not_used_before_it_is_promoted() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    drop(table.lock("l").lock("worker").unwrap());
    pair.catches_up();
    let reversed = with_its_hosts_reversed(&pair.dsn);
    let options = |dsn: &str| PostgresStorageOptions::from_dsn(dsn).table_name(&table.name);
    // The first host is the standby: it is passed over, whether or not the DSN asks for that.
    for dsn in [reversed.clone(), reversed.replace("target_session_attrs=read-write", "")] {
        let storage = PostgresStorage::new(options(&dsn)).unwrap();
        let lock = StorageLock::new(&storage, "l").unwrap();
        assert!(storage.server_time().is_ok() && lock.lock("worker").unwrap().version() > 1);
    }
    // Where it is the only one, that is said, and nothing is asked of it.
    let error = PostgresStorage::new(options(&pair.standby.dsn)).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(chain(&error).contains("this server is a standby"), "{}", chain(&error));
    pair.catches_up();
    pair.primary.kill();
    pair.promote();
    let storage = PostgresStorage::new(options(&pair.standby.dsn)).expect("the standby is promoted");
    assert_eq!(StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap().version(), 4);
}

fn with_its_hosts_reversed(dsn: &str) -> String {
    let reversed = |part: &str| match part.split_once('=') {
        Some(("port", ports)) => format!("port={}", ports.rsplit(',').collect::<Vec<_>>().join(",")),
        _ => part.to_owned(),
    };
    dsn.split(' ').map(reversed).collect::<Vec<_>>().join(" ")
}

/// Neither of these acquires was answered when the primary died, but the standby has them.
#[test]
fn acquires_that_were_not_answered_when_the_primary_died_are_settled() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let storage = table.storage();
    let [broken, given_up] = ["broken", "given up"].map(|lock_id| StorageLock::new(&storage, lock_id).unwrap());
    drop((broken.lock("warm-up").unwrap(), given_up.lock("warm-up").unwrap()));
    let mut client = pair.primary.client();
    pair.catches_up();
    pair.standby.freeze();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| broken.lock("worker").unwrap_err());
        let result = given_up.try_lock_for("worker", ms(500));
        assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        waits_for_the_standby(&mut client, 2);
        let sql = "SELECT sent_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication";
        eventually("the commits are on their way", || client.query_one(sql, &[]).unwrap().get(0));
        pair.primary.kill();
        pair.standby.thaw();
        let error = acquiring.join().unwrap();
        assert!(matches!(error, Error::Connect { .. }), "{}", chain(&error));
    });
    pair.promote();
    let (start, mut new) = (Instant::now(), pair.standby.client());
    for lock_id in ["broken", "given up"] {
        assert_eq!(hold(&mut new, &table, lock_id).0, 2, "the hold is there");
        assert_eq!(table.lock(lock_id).lock("another").unwrap().version(), 3);
    }
    assert!(start.elapsed() < s(25), "a lease of 30 s was waited for");
}

/// The sessions that took these holds were ended while they waited for the standby: their rows are there, but not on
/// the standby. They are released, and what is granted instead waits for the standby.
#[test]
fn a_hold_whose_answer_was_lost_is_not_granted_without_the_standby() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let storage = table.storage();
    let [acquired, handed_over] =
        ["acquired", "handed over"].map(|lock_id| StorageLock::new(&storage, lock_id).unwrap());
    drop(acquired.lock("warm-up").unwrap());
    let guard = handed_over.lock("worker").unwrap();
    let waiter = waits_for(&handed_over);
    let mut client = pair.primary.client();
    let end = |client: &mut Client| {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE wait_event = 'SyncRep' AND application_name = 'storage_lock'";
        eventually("a commit waits for the standby", || client.query_one(sql, &[]).unwrap().get::<_, i64>(0) > 0);
    };
    pair.catches_up();
    pair.standby.freeze();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| acquired.lock("worker").unwrap());
        end(&mut client);
        waits_for_the_standby(&mut client, 1);
        assert!(!acquiring.is_finished(), "granted without the standby");
        pair.standby.thaw();
        assert_eq!(acquiring.join().unwrap().version(), 3);

        pair.catches_up();
        pair.standby.freeze();
        let unlocking = scope.spawn(|| guard.unlock());
        end(&mut client);
        waits_for_the_standby(&mut client, 1);
        assert!(!waiter.is_finished(), "handed over without the standby");
        pair.standby.thaw();
        drop(unlocking.join().unwrap());
        assert_eq!(waiter.join().unwrap(), 3);
    });
}

/// One hold of a lock, while it was trusted.
#[derive(Debug)]
struct Trusted {
    version: i64,
    from: Instant,
    until: Instant,
}

#[test]
fn no_two_own_a_lock_while_the_primary_dies_under_load() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let (is_over, holds, errors) = (AtomicBool::new(false), Mutex::new(Vec::<Trusted>::new()), AtomicUsize::new(0));
    let (storages, lease) = ([table.storage(), table.storage()], s(3));
    let load = |lock: StorageLock, owner_id: String| {
        while !is_over.load(Ordering::Relaxed) {
            match lock.try_lock_for(&owner_id, s(5)) {
                Ok(None) => {}
                Ok(Some(guard)) => {
                    let from = Instant::now();
                    thread::sleep(ms(1));
                    let until = Instant::now();
                    if guard.is_held() {
                        holds.lock().unwrap().push(Trusted { version: guard.version(), from, until });
                    }
                }
                Err(_) => {
                    errors.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(ms(20));
                }
            }
        }
    };
    let count = || holds.lock().unwrap().len();
    let (killed, promoted) = thread::scope(|scope| {
        for (index, storage) in storages.iter().enumerate() {
            for thread in 0..3 {
                let lock = short_lock(storage, "l", lease, ms(500));
                scope.spawn(move || load(lock, format!("worker-{index}-{thread}")));
            }
        }
        eventually("they are at it", || count() > 100);
        let killed = Instant::now();
        pair.primary.kill();
        let before = count();
        pair.promote();
        let promoted = Instant::now();
        within(s(60), "they are at it again", || (count() > before + 100).then_some(()));
        is_over.store(true, Ordering::Relaxed);
        (killed, promoted)
    });
    let mut holds = holds.into_inner().unwrap();
    holds.sort_by_key(|hold| hold.from);
    for (one, next) in holds.iter().zip(holds.iter().skip(1)) {
        assert!(one.until <= next.from && one.version < next.version, "{one:?} and {next:?}");
    }
    // An answer that was under way when the primary died counts for it.
    let first = holds.iter().find(|hold| hold.from >= promoted - (promoted - killed) / 2).unwrap();
    println!(
        "{} holds; nobody could lock for {:?}, which includes a promotion that was over after {:?}; {} errors",
        holds.len(),
        first.from - killed,
        promoted - killed,
        errors.load(Ordering::Relaxed)
    );
}

/// A release doesn't wait for the standby.
#[test]
fn a_release_that_the_standby_had_not_got_is_lost_and_the_lease_runs_out() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let guard = table.short_lock("l", s(4), s(1)).lock("worker").unwrap();
    pair.cut_off_standby();
    guard.unlock().unwrap();
    assert!(table.storage().get("l").unwrap().unwrap().released_at.is_some());
    pair.primary.kill();
    pair.promote();
    let storage = table.storage();
    let row = storage.get("l").unwrap().unwrap();
    assert!(row.version == 1 && row.released_at.is_none(), "{row:?}");
    let guard = table.lock("l").lock("another").unwrap();
    assert_eq!(guard.version(), 2);
    assert!(storage.get("l").unwrap().unwrap().lock_begin_time >= row.lease_expire_time);
}

/// Data outside of the database, which takes no write with a smaller number than the greatest that it has seen.
#[derive(Default)]
struct Register(i64);

impl Register {
    fn accepts(&mut self, version: i64) -> bool {
        self.0 = self.0.max(version);
        version == self.0
    }
}

/// Data in the database, written to in one transaction with a check of the hold: by its lease too, or by the version
/// alone.
fn writes(client: &mut Client, table: &Table, owner: &str, version: i64) -> bool {
    let sql = format!(
        "INSERT INTO data SELECT $1 FROM (SELECT FROM {} WHERE lock_id = 'l' AND version = $2 FOR KEY SHARE) AS held",
        table.name
    );
    client.execute(&sql, &[&owner, &version]).unwrap() == 1
}

#[test]
fn a_hold_that_the_standby_had_not_got_is_lost_with_the_primary() {
    let mut pair = Pair::asynchronous();
    let table = Table::on(&pair.dsn);
    let storage = table.storage();
    // One holder asks for the first time in 20 s, the other one in 5 s.
    let (rare, often) = (short_lock(&storage, "l", s(40), s(20)), short_lock(&storage, "often", s(40), s(5)));
    drop((rare.lock("a").unwrap(), often.lock("a").unwrap()));
    let mut old = pair.primary.client();
    old.batch_execute("CREATE TABLE data (owner text)").unwrap();
    let mut elsewhere = Register::default();
    pair.cut_off_standby();

    let (a, a_often) = (rare.lock("a").unwrap(), often.lock("a").unwrap());
    let start = Instant::now();
    let (version, lease_id) = hold(&mut old, &table, "l");
    assert!(version == 2 && a.version() == 2 && elsewhere.accepts(2));
    assert!(writes(&mut old, &table, "a, in time", 2));
    pair.primary.kill();
    pair.promote();

    // The new primary knows nothing of these holds: it gives the same versions again, while their holders trust them.
    let (b, b_often) = (table.lock("l").lock("b").unwrap(), table.lock("often").lock("b").unwrap());
    assert_eq!((b.version(), b_often.version()), (2, 2));
    assert!(a.is_held() && b.is_held(), "two owners, for as long as nobody has told the first one");
    // A holder hears of it at its next refresh, long before its lease would have ended.
    eventually("the holder that asks hears of it", || !a_often.is_held());
    assert!(start.elapsed() < s(30) && b_often.is_held());

    // What was written under the lost hold is lost with it, and nothing is written under it any more where the lease is
    // checked. The version alone doesn't do: not here, and not elsewhere.
    let mut new = pair.standby.client();
    assert_eq!(new.query_one("SELECT count(*) FROM data", &[]).unwrap().get::<_, i64>(0), 0);
    let b_lease_id = hold(&mut new, &table, "l").1;
    assert_ne!(lease_id, b_lease_id);
    b.fence(&mut new.transaction().unwrap()).unwrap();
    for level in LEVELS {
        assert!(a.fence(&mut begin(&mut new, level)).unwrap_err().is_lease_lost(), "{level:?}");
    }
    assert!(writes(&mut new, &table, "a, late", 2));
    assert!(elsewhere.accepts(b.version()) && elsewhere.accepts(a.version()));

    let before = hold(&mut new, &table, "l");
    assert!(a.unlock().unwrap_err().is_lease_lost());
    assert_eq!(hold(&mut new, &table, "l"), before);
    assert!(b.is_held());
    b.unlock().unwrap();
}

/// What is to be run after a loss, before clients are let in: with the longest lease of any lock. Under this lease id
/// who held a lock holds it no more, and nobody else gets it before the last of them has lost its trust.
const RAISE: &str = "
    UPDATE $T SET version = version + 1000000000, owner_id = 'failover',
        lease_id = '00000000-0000-0000-0000-000000000000', lock_begin_time = clock_timestamp(),
        lease_expire_time = clock_timestamp() + interval '8 seconds', released_at = NULL";
/// The same for a lock whose row is lost.
const RAISE_LOST: &str = "
    INSERT INTO $T (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time)
    SELECT 'new', 1000000000, 'failover', '00000000-0000-0000-0000-000000000000', clock_timestamp(),
        clock_timestamp() + interval '8 seconds'
    WHERE NOT EXISTS (SELECT FROM $T WHERE lock_id = 'new')";

#[test]
fn versions_raised_before_clients_are_let_in_keep_one_owner_after_a_loss() {
    let mut pair = Pair::asynchronous();
    // Clients come as a role of their own, which can be shut out.
    pair.primary
        .client()
        .batch_execute("CREATE ROLE app LOGIN PASSWORD 'app'; CREATE SCHEMA AUTHORIZATION app")
        .unwrap();
    let as_app = |part: &str| match part.split_once('=') {
        Some((name @ ("user" | "password"), _)) => format!("{name}=app"),
        _ => part.to_owned(),
    };
    let table = Table::on(&pair.dsn.split(' ').map(as_app).collect::<Vec<_>>().join(" "));
    let storage = || PostgresStorage::new(table.options().schema("app")).unwrap();
    let ours = storage();
    // Its holder doesn't hear of the loss before its lease is over.
    let [l, new] = ["l", "new"].map(|lock_id| short_lock(&ours, lock_id, s(8), ms(5_300)));
    drop(l.lock("a").unwrap());
    let kept = short_lock(&ours, "kept", s(8), ms(5_300)).lock("a").unwrap();
    let mut elsewhere = [Register::default(), Register::default()];
    pair.cut_off_standby();
    let lost = [l.lock("a").unwrap(), new.lock("a").unwrap()];
    assert!(elsewhere[0].accepts(lost[0].version()) && elsewhere[1].accepts(lost[1].version()));

    pair.primary.kill();
    pair.shut_out("app");
    pair.promote();
    let mut admin = pair.standby.client();
    admin.batch_execute("SET search_path = app").unwrap();
    assert_eq!(admin.execute(&RAISE.replace("$T", &table.name), &[]).unwrap(), 2);
    assert_eq!(admin.execute(&RAISE_LOST.replace("$T", &table.name), &[]).unwrap(), 1);
    pair.let_in("app");

    let theirs = storage();
    let taken = thread::scope(|scope| {
        let taking = ["l", "new"].map(|lock_id| {
            let lock = short_lock(&theirs, lock_id, s(8), s(1));
            scope.spawn(move || (lock.lock("b").unwrap(), Instant::now()))
        });
        let trusted = lost.each_ref().map(|guard| {
            scope.spawn(|| {
                let mut last = Instant::now();
                within(s(20), "the lost hold is known to be lost", || {
                    let now = Instant::now();
                    if guard.is_held() {
                        last = now;
                    }
                    (!guard.is_held()).then_some(last)
                })
            })
        });
        let trusted = trusted.map(|thread| thread.join().unwrap());
        let taken = taking.map(|thread| thread.join().unwrap());
        assert!(trusted.iter().zip(&taken).all(|(last, (_, taken))| last < taken), "two owners");
        taken.map(|(guard, _)| guard)
    });
    for ((lost, taken), elsewhere) in lost.iter().zip(&taken).zip(&mut elsewhere) {
        assert!(taken.is_held() && taken.version() > 1_000_000_000, "{}", taken.version());
        assert!(elsewhere.accepts(taken.version()) && !elsewhere.accepts(lost.version()));
    }
    // Also a hold that the standby had.
    eventually("it hears of it", || !kept.is_held());
    let mut client = table.client();
    for old in lost.iter().chain([&kept]) {
        assert!(old.fence_past_deadline(&mut client.transaction().unwrap()).unwrap_err().is_lease_lost());
    }
}

/// The limit of a synchronous standby: PostgreSQL acknowledges a commit whose wait somebody cancels. The library never
/// does, and its statement timeout of 5 s ends before the wait begins.
#[test]
fn only_a_cancel_by_hand_acknowledges_a_hold_that_the_standby_has_not_got() {
    let mut pair = Pair::synchronous();
    let table = Table::on(&pair.dsn);
    let (lock, mut client) = (table.short_lock("l", s(40), s(25)), pair.primary.client());
    drop(lock.lock("worker").unwrap());
    pair.cut_off_standby();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| lock.lock("worker").unwrap());
        waits_for_the_standby(&mut client, 1);
        let sql =
            "SELECT now() - query_start > interval '5.5 seconds' FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        eventually("longer than the statement timeout", || client.query_one(sql, &[]).unwrap().get(0));
        assert!(!acquiring.is_finished());
        // The first attempt has been given up by now, and is undone; so are others, until one of them is in time.
        while !acquiring.is_finished() {
            let sql = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
            client.execute(sql, &[]).unwrap();
            thread::sleep(ms(50));
        }
        let guard = acquiring.join().unwrap();
        pair.primary.kill();
        pair.promote();
        let theirs = table.lock("l").lock("another").unwrap();
        assert_eq!(theirs.version(), 2, "the version after the last that the standby has got");
        assert!(guard.is_held() && theirs.is_held(), "two owners");
    });
}
