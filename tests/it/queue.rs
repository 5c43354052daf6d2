//! Threads of one process that wait for one lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use storage_lock::{Error, PostgresStorage, StorageLock};

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, eventually, ms, short_lock, takes_at_most, waiting_thread, waits_for, within};

/// A storage whose round trips are counted, and a lock in it.
fn counted(table: &Table) -> (Proxy, PostgresStorage, StorageLock) {
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    (proxy, storage, lock)
}

#[test]
fn threads_get_the_lock_in_the_order_in_which_they_came() {
    let table = Table::new();
    let lock = table.lock("l");
    let guard = lock.lock("first").unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    let waiters: Vec<_> = (0..20)
        .map(|number| {
            let (lock, order) = (lock.clone(), Arc::clone(&order));
            waiting_thread(move || {
                let guard = lock.lock("waiter").unwrap();
                order.lock().unwrap().push((number, guard.version()));
            })
        })
        .collect();
    drop(guard);
    waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
    assert_eq!(*order.lock().unwrap(), (0..20).map(|number| (number, number + 2)).collect::<Vec<_>>());
}

#[test]
fn a_hand_over_to_a_thread_of_the_same_process_is_one_statement() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    // What ten waiters after one hold cost: the first time it includes what is prepared.
    let [_, second] = [0, 1].map(|_| {
        let guard = lock.lock("first").unwrap();
        let waiters: Vec<_> = (0..10)
            .map(|_| {
                let lock = lock.clone();
                waiting_thread(move || lock.lock("waiter").unwrap().unlock().unwrap())
            })
            .collect();
        let requests = proxy.requests();
        guard.unlock().unwrap();
        waiters.into_iter().for_each(|waiter| waiter.join().unwrap());
        proxy.requests() - requests
    });
    assert_eq!(second, 11, "ten are handed over, one is released");
}

#[test]
fn threads_that_wait_for_their_own_process_cost_no_statement_and_no_connection() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    let guard = lock.lock("holder").unwrap();
    // Its statements have been prepared.
    proxy.becomes_quiet();
    let before = (proxy.requests(), proxy.connections());
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| assert!(lock.try_lock_for("waiter", ms(400)).unwrap().is_none()));
        }
    });
    assert_eq!((proxy.requests(), proxy.connections()), before);
    guard.unlock().unwrap();
    assert!(lock.try_lock("somebody").unwrap().is_some());
}

#[test]
fn timeouts_of_every_waiter_at_once_leave_nothing_behind() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    let holder = table.lock("l").lock("holder").unwrap();
    let requests = proxy.requests();
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let wait = || lock.try_lock_for("waiter", ms(1_000)).unwrap().is_none();
                assert!(takes_at_most(ms(2_500), "the wait", wait));
            });
        }
        table.hears("l", 1);
    });
    eventually("the row says that nobody waits", || table.waiters("l").is_empty());
    // A busy one, one to listen with the check of its session, one that stands in line and one that leaves it; and at
    // the end, when not even one a thread, what the first of them still asks.
    assert!(proxy.requests() - requests <= 12, "{} statements", proxy.requests() - requests);
    holder.unlock().unwrap();
    assert_eq!(lock.try_lock("somebody").unwrap().expect("free").version(), 2);
}

#[test]
fn a_head_that_gives_up_makes_way_for_the_next() {
    let table = Table::new();
    let lock = table.lock("l");
    let holder = table.lock("l").lock("holder").unwrap();
    thread::scope(|scope| {
        let head = scope.spawn(|| lock.try_lock_for("head", ms(700)).unwrap().is_none());
        table.hears("l", 1);
        let next = scope.spawn(|| lock.lock("next").unwrap().version());
        assert!(head.join().unwrap());
        assert_eq!(table.waiters("l").len(), 1, "the process still waits");
        holder.unlock().unwrap();
        assert_eq!(takes_at_most(ms(2_000), "the next one's turn", || next.join().unwrap()), 2);
    });
}

/// One thread leaves the row for its process, which takes a while, and another one has come meanwhile.
#[test]
fn who_joins_while_the_process_leaves_the_row_is_told_all_the_same() {
    let table = Table::new();
    let lock = table.lock("l");
    let holder = table.lock("l").lock("holder").unwrap();
    let mut client = table.client();
    thread::scope(|scope| {
        let first = scope.spawn(|| lock.try_lock_for("first", ms(500)).unwrap().is_none());
        table.hears("l", 1);
        // Whoever changes the row has to wait.
        let mut transaction = client.transaction().unwrap();
        transaction.execute(&format!("SELECT FROM {} FOR UPDATE", table.name), &[]).unwrap();
        assert!(first.join().unwrap());
        let leaving = || -> i64 {
            let sql = "SELECT count(*) FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND query LIKE '%gone AS%' AND query LIKE '%' || $1 || '%'";
            table.client().query_one(sql, &[&table.name]).unwrap().get(0)
        };
        eventually("the process is leaving", || leaving() == 1);
        let second = waits_for(&lock);
        // It finds its process in the row.
        thread::sleep(ms(300));
        transaction.commit().unwrap();
        eventually("the process has left", || leaving() == 0);
        table.hears("l", 1);
        holder.unlock().unwrap();
        assert_eq!(takes_at_most(ms(3_000), "the second one's turn", || second.join().unwrap()), 2);
    });
}

/// It came while the release was on its way, behind which it doesn't stand in the row: it has to ask.
#[test]
fn who_joins_while_the_lock_is_released_asks_at_once() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    // It listens already.
    let holder = table.lock("l").lock("holder").unwrap();
    let waited = waits_for(&lock);
    table.hears("l", 1);
    holder.unlock().unwrap();
    let version = waited.join().unwrap();
    let guard = lock.lock("first").unwrap();
    // Eight processes that don't come.
    table.execute("UPDATE $T SET waiters = ARRAY(SELECT gen_random_uuid() FROM generate_series(1, 8))");
    proxy.delay_answers(ms(300));
    thread::scope(|scope| {
        let release = scope.spawn(|| guard.unlock().unwrap());
        thread::sleep(ms(50));
        let second = waits_for(&lock);
        proxy.delay_answers(Duration::ZERO);
        release.join().unwrap();
        // For as long as the lock is promised to the first of the eight, and not for all of them.
        assert_eq!(takes_at_most(ms(600), "the second one's turn", || second.join().unwrap()), version + 2);
    });
}

/// The holder is dead, and nobody will tell.
#[test]
fn who_follows_a_head_that_gave_up_wakes_for_the_end_of_the_lease() {
    let table = Table::new();
    let lock = table.lock("l");
    std::mem::forget(table.short_lock("l", ms(30_000), ms(20_000)).lock("holder").unwrap());
    table.execute("UPDATE $T SET lease_expire_time = clock_timestamp() + interval '1500 ms'");
    thread::scope(|scope| {
        let head = scope.spawn(|| lock.try_lock_for("head", ms(700)).unwrap().is_none());
        table.hears("l", 1);
        let next = scope.spawn(|| lock.lock("next").unwrap().version());
        assert!(head.join().unwrap());
        assert_eq!(takes_at_most(ms(3_000), "the takeover", || next.join().unwrap()), 2);
    });
}

#[test]
fn a_logger_that_panics_keeps_nobody_from_the_lock() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("panic", &table, &[], std::process::Stdio::piped());
    assert_eq!(child.expect_line(), "as expected", "{}", child.stderr());
}

/// Whether a waiter gets the lock, and releases it. On a machine that is busy it may also hear nothing in time.
fn gets(lock: &StorageLock, patience: Duration) -> bool {
    match lock.try_lock_for("waiter", patience) {
        Err(Error::Timeout { .. }) => false,
        result => result.unwrap().is_some(),
    }
}

/// A release at about the time at which the only waiter gives up: it gets the lock, or nobody has it.
#[test]
fn a_hand_over_to_a_waiter_that_gives_up_leaves_no_lock_behind() {
    let table = Table::new();
    let (lock, theirs) = (table.lock("l"), table.lock("l"));
    let waits = &lock;
    let (mut got, mut gave_up) = (0, 0);
    for round in 0..400 {
        let guard = lock.lock("holder").unwrap();
        thread::scope(|scope| {
            // In a hurry, or less so, on a machine that is busy or isn't.
            let patience = Duration::from_micros(1_000 + 400 * (round % 40));
            let waiting = scope.spawn(move || gets(waits, patience));
            thread::sleep(Duration::from_micros(1_000 + 37 * (round % 41)));
            guard.unlock().unwrap();
            *(if waiting.join().unwrap() { &mut got } else { &mut gave_up }) += 1;
        });
        assert!(theirs.try_lock("somebody").unwrap().is_some(), "left behind in round {round}");
    }
    println!("{got} got it, {gave_up} gave up");
    assert!(got > 20 && gave_up > 20, "the race was not one: {got} got it, {gave_up} gave up");
}

/// It gave up while the hold was on its way to it, and comes back while that is being given back.
#[test]
fn a_waiter_that_gave_up_and_comes_back_does_not_enter_what_was_handed_to_it() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    let theirs = table.lock("l");
    for _ in 0..3 {
        let guard = lock.lock("first").unwrap();
        proxy.delay_answers(ms(200));
        let comes_back = {
            let lock = lock.clone();
            waiting_thread(move || {
                // Some attempts take too long for their time.
                std::iter::repeat_with(|| lock.try_lock_for("second", ms(20)).ok()?).flatten().next().unwrap()
            })
        };
        guard.unlock().unwrap();
        let second = comes_back.join().unwrap();
        proxy.delay_answers(Duration::ZERO);
        let row = theirs.info().unwrap().unwrap();
        assert!(second.is_held() && row.is_held && row.version == second.version(), "{second:?} {row:?}");
        assert!(theirs.try_lock("somebody").unwrap().is_none());
        second.unlock().unwrap();
    }
}

#[test]
fn short_timeouts_behind_each_other_find_the_lock_busy_and_nothing_wrong() {
    let table = Table::new();
    let lock = table.lock("l");
    let _holder = table.lock("l").lock("holder").unwrap();
    assert!(lock.try_lock("warm-up").unwrap().is_none());
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                (0..50).for_each(|_| assert!(lock.try_lock_for("hurried", ms(1)).expect("no error").is_none()));
            });
        }
    });
}

/// Lets durable commits hang from now on. That a setting was reloaded says little: all sessions hear of this one from
/// the checkpointer, when it comes to it. So something is committed until a commit hangs.
pub fn hang_durable_commits(server: &Server) {
    server.set("synchronous_standby_names", "nobody");
    let (mut probe, mut client) = (server.client(), server.client());
    let pid: i32 = probe.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0);
    let is_over = Arc::new(AtomicBool::new(false));
    let commits = {
        let is_over = Arc::clone(&is_over);
        thread::spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                probe.execute("SELECT pg_logical_emit_message(true, 'probe', '')", &[]).unwrap();
            }
        })
    };
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND pid = $1";
    eventually("a commit hangs", || client.query_one(sql, &[&pid]).unwrap().get::<_, i64>(0) == 1);
    is_over.store(true, Ordering::SeqCst);
    // It is committed here, and waits for the standby no longer.
    client.execute("SELECT pg_cancel_backend($1)", &[&pid]).unwrap();
    commits.join().unwrap();
}

/// The answer to the hand-over is lost while the server is still at it.
#[test]
fn a_hand_over_that_comes_through_after_its_repetition_leaves_no_lock_behind() {
    let server = Server::start();
    let table = Table::on(&server.dsn);
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    // Refreshed so rarely that no refresh hangs in its place.
    let lock = short_lock(&storage, "l", ms(90_000), ms(30_000));
    let guard = lock.lock("first").unwrap();
    let second = waits_for(&lock);
    hang_durable_commits(&server);
    thread::scope(|scope| {
        let release = scope.spawn(|| takes_at_most(ms(2_500), "unlock", || guard.unlock()));
        let sql =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'storage_lock'";
        let mut looking = server.client();
        eventually("the hand-over hangs", || looking.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1);
        proxy.cut();
        let result = release.join().unwrap();
        assert!(!result.is_err_and(|error| error.is_lease_lost()), "nobody took it away");
    });
    server.set("synchronous_standby_names", "");
    // Not for the lease of 90 s.
    takes_at_most(Duration::from_secs(10), "the second one's turn", || second.join().unwrap());
}

/// The same between processes.
#[test]
fn a_notified_waiter_that_gives_up_leaves_no_lock_behind() {
    let table = Table::new();
    let (ours, waiting, theirs) = (table.lock("l"), table.lock("l"), table.lock("l"));
    for round in 0..200 {
        let guard = ours.lock("holder").unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| gets(&waiting, ms(5)));
            thread::sleep(Duration::from_micros(3_000 + 97 * (round % 40)));
            guard.unlock().unwrap();
            waiter.join().unwrap();
        });
        let is_free = || theirs.try_lock("somebody").unwrap().map(drop);
        within(Duration::from_secs(5), "the lock is free", is_free);
    }
    eventually("nobody waits", || table.waiters("l").is_empty());
}

#[test]
fn a_hand_over_whose_answer_was_lost_is_undone_and_the_next_thread_asks() {
    let table = Table::new();
    let (proxy, _storage, lock) = counted(&table);
    for round in 0..2 {
        let guard = lock.lock("first").unwrap();
        let version = guard.version();
        let waiting = {
            let lock = lock.clone();
            waiting_thread(move || lock.lock("second").unwrap())
        };
        if round == 1 {
            // The parameter that names the statement, which is prepared already.
            proxy.lose_answer_to(b" hand over \"");
        }
        guard.unlock().unwrap();
        let second = waiting.join().unwrap();
        assert_eq!((second.version(), second.is_held()), (version + 1 + round, true));
        second.unlock().unwrap();
    }
    assert_eq!(proxy.lost_answers(), 1);
}

#[test]
fn a_hand_over_that_is_stuck_ends_in_time_and_leaves_no_lock_behind() {
    let table = Table::new();
    let lock = table.lock("l");
    let guard = lock.lock("first").unwrap();
    let waiting = waits_for(&lock);
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    let error = takes_at_most(ms(2_500), "unlock", || guard.unlock()).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    transaction.commit().unwrap();
    // Not for the lease of 30 s.
    takes_at_most(Duration::from_secs(10), "the second one's turn", || waiting.join().unwrap());
    let theirs = table.lock("l");
    within(Duration::from_secs(10), "the lock is free", || theirs.try_lock("somebody").unwrap().map(drop));
}

/// The server has done it, and the connection stays open, so that the call is stuck. Who gave it up undoes it.
#[test]
fn a_hand_over_that_is_given_up_without_an_answer_is_followed_up() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = short_lock(&storage, "l", ms(90_000), ms(30_000));
    for is_swallowed in [false, true] {
        let guard = lock.lock("first").unwrap();
        let second = {
            let lock = lock.clone();
            waiting_thread(move || lock.try_lock_for("second", ms(8_000)).unwrap().is_some())
        };
        if is_swallowed {
            // The statement is prepared by now.
            proxy.swallow_answers_after(b" hand over \"");
        }
        takes_at_most(ms(2_500), "unlock", || drop(guard));
        assert!(second.join().unwrap(), "it waits for what was handed to itself");
    }
    assert!(proxy.has_swallowed());
}

/// What a fence is: the lock can be released, but nobody takes it until that transaction ends.
#[test]
fn a_release_is_not_held_up_by_a_locked_row_and_the_waiter_is() {
    let table = Table::new();
    let lock = table.lock("l");
    let guard = lock.lock("first").unwrap();
    let waiting = waits_for(&lock);
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.execute(&format!("SELECT FROM {} FOR KEY SHARE", table.name), &[]).unwrap();
    takes_at_most(ms(1_000), "unlock", || guard.unlock().unwrap());
    thread::sleep(ms(300));
    assert!(!waiting.is_finished());
    assert!(table.lock("l").info().unwrap().unwrap().released_at.is_some());
    transaction.commit().unwrap();
    assert_eq!(takes_at_most(ms(3_000), "the second one's turn", || waiting.join().unwrap()), 2);
}

#[test]
fn only_the_last_guard_of_a_hold_hands_over() {
    let table = Table::new();
    let lock = table.lock("l");
    let outer = lock.lock("worker").unwrap();
    let inner = lock.lock("worker").unwrap();
    let waiting = waits_for(&lock);
    inner.unlock().unwrap();
    let again = lock.lock("worker").unwrap();
    outer.unlock().unwrap();
    assert!(!waiting.is_finished());
    assert_eq!(again.version(), 1);
    again.unlock().unwrap();
    assert_eq!(waiting.join().unwrap(), 2);
}

#[test]
fn a_waiter_behind_a_hold_that_is_lost_goes_on_waiting_for_the_next_holder() {
    let table = Table::new();
    let (proxy, storage, _) = counted(&table);
    let lock = short_lock(&storage, "l", ms(1_500), ms(100));
    let lost = lock.lock("first").unwrap();
    let waiting = waits_for(&lock);
    // Its process hears of nothing, and can't take the lock itself, until somebody else has.
    proxy.stall(true, true);
    table.expire("l");
    let taken = table.lock("l").lock("other").unwrap();
    proxy.stall(false, false);
    eventually("the loss is noticed", || !lost.is_held());
    // The guard of the lost hold is still there.
    table.hears("l", 1);
    taken.unlock().unwrap();
    assert_eq!(takes_at_most(ms(2_000), "the second one's turn", || waiting.join().unwrap()), 3);
    assert!(lost.unlock().unwrap_err().is_lease_lost());
}
