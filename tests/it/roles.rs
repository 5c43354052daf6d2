//! What child processes do.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{LockGuard, LockOptions, PostgresStorage, Result, StorageLock};

use crate::doors;
use crate::fence::{LEVELS, begin, set};
use crate::fork;
use crate::leaks;
use crate::networks;
use crate::support::child::{role, say, wait_for_parent};
use crate::support::{Table, chain, eventually, is_refreshed, ms, short_lock, takes_at_most, waiting_thread, within};

/// Not a test of its own: the body of every child process.
#[test]
fn child_process() {
    let Some((role, table, arguments)) = role() else { return };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match (role.as_str(), arguments.as_slice()) {
        ("hold", [lock_id, owner_id, lease, refresh]) => hold(&table, lock_id, owner_id, lease, refresh),
        ("count", [target, seed]) => count(&table, target.parse().unwrap(), seed.parse().unwrap()),
        ("write", [lock_id, level, moment]) => write(&table, lock_id, level, moment),
        ("open", []) => open(&table),
        ("poll", []) => poll(&table),
        ("lose locks", []) => lose_locks(&table),
        ("panic at events", []) => panic_at_events(&table),
        ("healthy run", []) => healthy_run(&table),
        ("threads", []) => threads(&table),
        ("slow logger", []) => slow_logger(&table),
        ("wait", [lock_id]) => wait(&table, lock_id),
        ("panic", []) => log_to_a_logger_that_panics(&table),
        ("hand to a shorter lease", [lock_id]) => hand_to_a_shorter_lease(&table, lock_id),
        ("take with a shorter lease", [lock_id, how]) => take_with_a_shorter_lease(&table, lock_id, how),
        ("panic within the driver", []) => panic_within_the_driver(&table),
        ("log slowly", []) => log_slowly(&table),
        ("panic at every line", []) => panic_at_every_line(&table),
        ("fork", []) => fork::fork(&table),
        ("connect without a user", []) => doors::connect_without_a_user(&table),
        ("connect to a name", [port]) => networks::connect_to_a_name(&table, port.parse().unwrap()),
        ("no descriptor", []) => networks::no_descriptor(&table),
        ("hold twenty", []) => networks::hold_twenty(&table),
        ("cycles", []) => leaks::cycles(&table),
        ("failed connects", [closing]) => leaks::failed_connects(&table, closing.parse().unwrap()),
        ("take turns", [threads, seconds]) => {
            take_turns(&table, threads.parse().unwrap(), Duration::from_secs(seconds.parse().unwrap()));
        }
        other => panic!("no such role: {other:?}"),
    }
    std::process::exit(0);
}

/// Holds a lock until it may go on; then says whether it is still held, at once, and what unlock says.
fn hold(table: &Table, lock_id: &str, owner_id: &str, lease: &str, refresh: &str) {
    let lock = table.short_lock(lock_id, ms(lease.parse().unwrap()), ms(refresh.parse().unwrap()));
    let guard = lock.lock(owner_id).expect("lock");
    // From before the parent hears of the hold, and may stop us.
    let mut before = Instant::now();
    say(guard.version());
    // Watches the hold all the time: stopped and woken, the first thing that it does is to look again.
    let has_to_go_on = AtomicBool::new(false);
    let held = thread::scope(|scope| {
        scope.spawn(|| {
            wait_for_parent();
            has_to_go_on.store(true, Ordering::SeqCst);
        });
        while !has_to_go_on.load(Ordering::SeqCst) {
            let now = Instant::now();
            let is_held = guard.is_held();
            if now - before > ms(500) {
                say(format!("woken, is_held {is_held}"));
            }
            before = now;
            thread::sleep(ms(5));
        }
        guard.is_held()
    });
    say(format!("is_held {held}"));
    say(describe(guard.unlock()));
}

fn describe(result: Result<()>) -> String {
    match result {
        Ok(()) => "unlocked".to_owned(),
        Err(error) if error.is_lease_lost() => "lost".to_owned(),
        Err(error) => chain(&error),
    }
}

/// Eight threads add to a counter under the lock until it has reached `target`: read, then write.
fn count(table: &Table, target: i64, seed: i64) {
    let lock = table.short_lock("counter", ms(1_000), ms(300));
    let add = |thread: i64| {
        let mut client = table.client();
        let (counter, log) = (format!("{}_counter", table.name), format!("{}_log", table.name));
        loop {
            let guard: LockGuard = lock.lock(&format!("adder-{thread}")).expect("lock");
            let n: i64 = client.query_one(&format!("SELECT n FROM {counter}"), &[]).unwrap().get(0);
            if n >= target {
                return;
            }
            if (n + seed) % 400 == 399 {
                // Gone without a word: the lease has to run out.
                std::process::exit(0);
            }
            let mut transaction = client.transaction().unwrap();
            transaction.execute(&format!("UPDATE {counter} SET n = $1"), &[&(n + 1)]).unwrap();
            transaction.execute(&format!("INSERT INTO {log} VALUES ($1, $2)"), &[&guard.version(), &(n + 1)]).unwrap();
            transaction.commit().unwrap();
        }
    };
    thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || add(thread));
        }
    });
    say("done");
}

/// Writes its version under a fence; it may go on, and its parent may stop it, at one moment.
fn write(table: &Table, lock_id: &str, level: &str, moment: &str) {
    let level = LEVELS.into_iter().find(|known| format!("{known:?}") == level).expect("a level");
    let guard = table.short_lock(lock_id, ms(1_000), ms(300)).lock("worker-1").expect("lock");
    let mut client = table.client();
    let mut transaction = begin(&mut client, level);
    set(&mut transaction, table, guard.version()).expect("write");
    if moment == "stopped after its fence" {
        guard.fence(&mut transaction).expect("fence");
        say(guard.version());
        say("fenced");
        wait_for_parent();
        transaction.commit().expect("commit");
        say("committed");
        return;
    }
    // The new owner has to be able to write.
    transaction.rollback().expect("roll back");
    let mut transaction = begin(&mut client, level);
    transaction.query_one("SELECT 1", &[]).expect("a snapshot");
    say(guard.version());
    wait_for_parent();
    let fenced = describe(guard.fence(&mut transaction));
    drop(transaction);
    let mut transaction = begin(&mut client, level);
    let past_deadline = describe(guard.fence_past_deadline(&mut transaction));
    say(format!("fence: {fenced}, past its deadline: {past_deadline}"));
}

fn open(table: &Table) {
    say("ready");
    wait_for_parent();
    match storage_lock::PostgresStorage::new(table.options()) {
        Ok(_) => say("opened"),
        Err(error) => say(chain(&error)),
    }
}

/// Looks at a signal all the time.
fn poll(table: &Table) {
    let guard = table.short_lock("l", ms(1_000), ms(300)).lock("worker-1").expect("lock");
    let lost = guard.lost();
    say("polling");
    // Stopped and woken, the first look is the one that tells.
    let mut before = Instant::now();
    loop {
        let (now, is_lost) = (Instant::now(), lost.is_lost());
        if now - before > ms(500) || is_lost {
            say(if is_lost { "lost" } else { "held" });
            return;
        }
        before = now;
        thread::sleep(ms(1));
    }
}

/// Lives through one of each event with a callback that panics, and says how often it was told something.
fn panic_at_events(table: &Table) {
    env_logger::Builder::new().filter_module("storage_lock", log::LevelFilter::Warn).init();
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    let storage = PostgresStorage::new(table.options().on_event(move |event| {
        count.fetch_add(1, Ordering::SeqCst);
        panic!("told of {event:?}");
    }))
    .expect("open the storage");
    let lock = short_lock(&storage, "l", ms(2_000), ms(50));
    let guard = lock.lock("worker").expect("lock");
    is_refreshed(&guard);
    assert!(lock.try_lock("other").expect("try_lock").is_none());
    table.execute("ALTER TABLE $T RENAME TO $T_away");
    let before = guard.remaining();
    eventually("a refresh fails", || guard.remaining() < before.saturating_sub(ms(500)));
    table.execute("ALTER TABLE $T_away RENAME TO $T");
    is_refreshed(&guard);
    // The connection breaks.
    table.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%$T%' AND pid <> pg_backend_pid()",
    );
    is_refreshed(&guard);
    // While it unwinds, and while another thread waits for the hand-over.
    let waiter = {
        let lock = lock.clone();
        waiting_thread(move || lock.lock("waiter").expect("lock").unlock().expect("unlock"))
    };
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _guard = guard;
        panic!("on purpose, while holding");
    }));
    assert!(unwound.is_err());
    takes_at_most(ms(5_000), "the hand-over", || waiter.join().expect("a waiter"));
    let guard = lock.lock("worker").expect("lock");
    table.execute("UPDATE $T SET version = version + 1");
    eventually("it is lost", || !guard.is_held());
    assert!(guard.unlock().expect_err("lost").is_lease_lost());
    // What the refresh thread still has to say: nothing is told from here on.
    let mut before = 0;
    eventually("all is told", || {
        std::thread::sleep(ms(200));
        std::mem::replace(&mut before, told.load(Ordering::SeqCst)) == told.load(Ordering::SeqCst)
    });
    say(before);
}

/// Loses a lock that it hears of, one that it doesn't before the drop, and one that it unlocks; with all logs on
/// standard error.
fn lose_locks(table: &Table) {
    env_logger::Builder::new().filter_module("storage_lock", log::LevelFilter::Trace).init();
    let storage = table.storage();
    let noticed = short_lock(&storage, "noticed", ms(1_000), ms(50)).lock("worker").expect("lock");
    let unnoticed = short_lock(&storage, "unnoticed", ms(90_000), ms(30_000)).lock("worker").expect("lock");
    let unlocked = short_lock(&storage, "unlocked", ms(90_000), ms(30_000)).lock("worker").expect("lock");
    table.execute("UPDATE $T SET version = version + 1");
    eventually("it is lost", || !noticed.is_held());
    drop(noticed);
    drop(unnoticed);
    assert!(unlocked.unlock().expect_err("lost").is_lease_lost());
}

/// Everything that goes well, with all logs on standard error.
fn healthy_run(table: &Table) {
    env_logger::Builder::new().filter_module("storage_lock", log::LevelFilter::Trace).init();
    let storage = table.storage();
    let lock = short_lock(&storage, "healthy", ms(1_000), ms(100));
    let guard = lock.lock("worker-1").expect("lock");
    let version = guard.version();
    assert!(thread::scope(|scope| scope.spawn(|| lock.try_lock("worker-2").unwrap().is_none()).join().unwrap()));
    let inner = lock.lock("worker-1").expect("again");
    // When the second one is sent, the first one has been answered, and logged.
    let mut leases = HashSet::new();
    eventually("two refreshes", || {
        leases.insert(storage.get("healthy").unwrap().unwrap().lease_expire_time);
        leases.len() == 3
    });
    drop(inner);
    assert_eq!(guard.version(), version);
    guard.unlock().expect("unlock");
    drop(lock.lock("worker-2").expect("lock"));
    // A holder of the past that left its row behind.
    let forgotten = table.lock("healthy").lock("worker-3").expect("lock");
    table.expire("healthy");
    drop(lock.lock("worker-4").expect("takeover"));
    std::mem::forget(forgotten);
}

/// Names and counts the library's threads over the life of holds and storages.
fn threads(table: &Table) {
    let count = |name: &str| {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        tasks
            .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name))
            .count()
    };
    let storage = table.storage();
    let lock = |name: &str| short_lock(&storage, name, ms(1_000), ms(100));
    assert_eq!(count("lock-refresh"), 0);
    let first = lock("first").lock("worker").expect("lock");
    let again = lock("first").lock("worker").expect("again");
    let second = lock("second").lock("worker").expect("lock");
    eventually("one refresh thread a hold", || count("lock-refresh") == 2);
    drop(again);
    drop(second);
    eventually("the second hold's thread has ended", || count("lock-refresh") == 1);
    // The lease was taken over: its refresh thread ends, and the new hold has one.
    table.expire("first");
    let taken = table.lock("first").lock("other").expect("takeover");
    eventually("the lost hold's thread has ended", || !first.is_held() && count("lock-refresh") == 1);
    drop((first, taken));
    eventually("no hold, no refresh thread", || count("lock-refresh") == 0);
    // What the server refused hasn't happened: nothing to follow up.
    table.execute("ALTER TABLE $T RENAME TO $T_away");
    assert!(lock("third").try_lock("worker").is_err());
    table.execute("ALTER TABLE $T_away RENAME TO $T");
    assert_eq!(count("lock-clean-up"), 0);
    drop(storage);
    eventually("no storage, no threads", || {
        [
            "lock-worker",
            "lock-refresh",
            "lock-connect",
            "lock-close",
            "lock-open",
            "lock-clean-up",
            "lock-listen",
            "r2d2-worker-0",
        ]
        .iter()
        .all(|name| count(name) == 0)
    });
    say("as expected");
}

/// A logger that takes its time, and asks the guard.
fn slow_logger(table: &Table) {
    static GUARD: OnceLock<LockGuard> = OnceLock::new();
    struct Slow;
    impl log::Log for Slow {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            if record.level() == log::Level::Warn {
                assert!(!GUARD.get().unwrap().is_held());
                say("logging");
                thread::sleep(Duration::from_secs(5));
            }
        }
        fn flush(&self) {}
    }
    log::set_logger(&Slow).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let guard = GUARD.get_or_init(|| table.short_lock("l", ms(1_000), ms(20)).lock("worker").expect("lock"));
    table.expire("l");
    let start = Instant::now();
    while start.elapsed() < ms(2_000) {
        takes_at_most(ms(500), "is_held", || guard.is_held());
        thread::sleep(ms(1));
    }
    assert!(!guard.is_held());
    say("done");
}

/// Waits for a lock, with all warnings on standard error, and says when it has it.
fn wait(table: &Table, lock_id: &str) {
    env_logger::Builder::new().filter_module("storage_lock", log::LevelFilter::Info).init();
    let lock = table.lock(lock_id);
    say("waiting");
    let guard = lock.lock("child").expect("lock");
    say(guard.version());
    drop(guard);
}

/// Holds a lock for a minute at a time until it may go on; then a thread with a lease of a second has it.
fn hand_to_a_shorter_lease(table: &Table, lock_id: &str) {
    let storage = table.storage();
    let long = short_lock(&storage, lock_id, ms(60_000), ms(20_000));
    let short = short_lock(&storage, lock_id, ms(3_000), ms(1_000));
    let guard = long.lock("long").expect("lock");
    let handed = waiting_thread(move || {
        let guard = short.lock("short").expect("lock");
        say("handed");
        guard
    });
    say("held");
    wait_for_parent();
    drop(guard);
    let _guard = handed.join().expect("a thread");
    wait_for_parent();
}

/// Takes a lock with a lease of three seconds as soon as it can.
fn take_with_a_shorter_lease(table: &Table, lock_id: &str, how: &str) {
    let lock = table.short_lock(lock_id, ms(3_000), ms(1_000));
    assert!(lock.try_lock("short").expect("try_lock").is_none());
    say("ready");
    let _guard = if how == "lock" {
        lock.lock("short").expect("lock")
    } else {
        within(Duration::from_secs(60), "it is free", || lock.try_lock("short").expect("try_lock"))
    };
    say("taken");
    wait_for_parent();
}

/// Threads of one process that take one lock as often as they can. Says how often each had it.
fn take_turns(table: &Table, threads: usize, time: Duration) {
    let lock = table.lock("l");
    say("ready");
    wait_for_parent();
    let end = Instant::now() + time;
    let holds: Vec<String> = thread::scope(|scope| {
        let take = || {
            let mut holds = 0_u64;
            while Instant::now() < end {
                drop(lock.lock("worker").expect("lock"));
                holds += 1;
            }
            holds.to_string()
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    say(holds.join(" "));
}

/// What panics when it is dropped, as what a panic was raised with and as what a callback owns.
pub struct PanicsInItsDrop;

impl Drop for PanicsInItsDrop {
    fn drop(&mut self) {
        panic!("in a drop");
    }
}

/// A logger that panics now and then at what the driver writes while it runs a statement.
fn panic_within_the_driver(table: &Table) {
    struct Panicking;
    static IS_DUE: AtomicBool = AtomicBool::new(false);
    impl log::Log for Panicking {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            if record.target().starts_with("tokio_postgres") && IS_DUE.swap(false, Ordering::SeqCst) {
                std::panic::panic_any(PanicsInItsDrop);
            }
        }
        fn flush(&self) {}
    }
    log::set_logger(&Panicking).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let lock = table.short_lock("l", ms(3_000), ms(50));
    let guard = lock.lock("worker").unwrap();
    for _ in 0..5 {
        IS_DUE.store(true, Ordering::SeqCst);
        eventually("it panicked", || !IS_DUE.load(Ordering::SeqCst));
        is_refreshed(&guard);
        assert!(guard.is_held());
    }
    // A call of its caller's, in which the hold ends; it is made again.
    IS_DUE.store(true, Ordering::SeqCst);
    guard.unlock().unwrap();
    // Where a connection is opened, and where the one that listens is.
    let guard = table.lock("l").lock("other").unwrap();
    table.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%$T%' AND pid <> pg_backend_pid()",
    );
    for _ in 0..5 {
        let storage = table.storage();
        let lock = storage_lock::StorageLock::new(&storage, "l").unwrap();
        // At its end it may have no answer.
        let waiting = waiting_thread(move || drop(lock.try_lock_for("waiter", ms(700))));
        IS_DUE.store(true, Ordering::SeqCst);
        eventually("it panicked", || !IS_DUE.load(Ordering::SeqCst));
        waiting.join().unwrap();
        IS_DUE.store(true, Ordering::SeqCst);
        drop(PostgresStorage::new(table.options()));
        IS_DUE.store(false, Ordering::SeqCst);
    }
    guard.unlock().unwrap();
    IS_DUE.store(true, Ordering::SeqCst);
    // It is made again, on another connection.
    let information = takes_at_most(ms(4_000), "a call", || lock.info()).unwrap();
    assert!(!information.unwrap().is_held && !IS_DUE.load(Ordering::SeqCst));
    say("as expected");
}

/// A logger that panics at every line of the library's, as one does that prints to a closed pipe; and callbacks that
/// do so too.
fn panic_at_every_line(table: &Table) {
    struct Panicking;
    static LINES: AtomicUsize = AtomicUsize::new(0);
    impl log::Log for Panicking {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            if record.target() == "storage_lock" {
                LINES.fetch_add(1, Ordering::SeqCst);
                std::panic::panic_any(PanicsInItsDrop);
            }
        }
        fn flush(&self) {}
    }
    log::set_logger(&Panicking).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let losses = Arc::new(AtomicUsize::new(0));
    let storage =
        PostgresStorage::new(table.options().on_event(|_| std::panic::panic_any(PanicsInItsDrop))).expect("open");
    let (counted, owned) = (Arc::clone(&losses), PanicsInItsDrop);
    let options =
        LockOptions::new("l").lease_expire_after(ms(3_000)).lease_refresh_interval(ms(50)).on_lost(move |_| {
            _ = &owned;
            counted.fetch_add(1, Ordering::SeqCst);
            std::panic::panic_any(PanicsInItsDrop);
        });
    let lock = StorageLock::with_options(&storage, options).expect("make a lock");
    let (guard, mut client) = (lock.lock("worker").expect("lock"), table.client());
    // For longer than its lease.
    let end = Instant::now() + ms(4_000);
    while Instant::now() < end {
        table.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%$T%' AND pid <> \
             pg_backend_pid()",
        );
        is_refreshed(&guard);
        assert!(guard.is_held());
    }
    assert!(LINES.load(Ordering::SeqCst) > 0, "nothing was logged");
    // Handed over, taken again, rolled back and released, by calls that don't panic.
    let waiter = {
        let lock = lock.clone();
        waiting_thread(move || lock.lock("waiter").expect("lock").unlock().expect("unlock"))
    };
    guard.unlock().expect("unlock");
    takes_at_most(ms(5_000), "the hand-over", || waiter.join().expect("a waiter"));
    let guard = lock.lock("worker").expect("lock");
    guard.unlock_in(client.transaction().unwrap()).expect("unlock_in").rollback().expect("roll back");
    drop(guard.unlock_in(client.transaction().unwrap()).expect("unlock_in"));
    guard.unlock_in(client.transaction().unwrap()).expect("unlock_in").commit().expect("commit");
    drop(guard);
    assert!(lock.try_lock_for("worker", ms(500)).expect("try_lock_for").is_some());
    assert_eq!(losses.load(Ordering::SeqCst), 0);
    // Lost, and found out by the refresh thread; and by the drop.
    let guard = lock.lock("worker").expect("lock");
    let waiter = {
        let lock = lock.clone();
        waiting_thread(move || drop(lock.lock("waiter").expect("lock")))
    };
    table.execute("UPDATE $T SET version = version + 1, released_at = clock_timestamp()");
    eventually("on_lost is called", || losses.load(Ordering::SeqCst) == 1);
    assert!(!guard.is_held());
    takes_at_most(ms(5_000), "the next one", || waiter.join().expect("a waiter"));
    drop(guard);
    let guard = short_lock(&storage, "m", ms(90_000), ms(30_000)).lock("worker").expect("lock");
    table.execute("UPDATE $T SET version = version + 1");
    drop(guard);
    // With what the callback owns, wherever the last one goes.
    drop((lock, storage));
    say("as expected");
}

/// A logger that panics in the thread that has just got the lock.
fn log_to_a_logger_that_panics(table: &Table) {
    struct Panicking;
    impl log::Log for Panicking {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            let text = record.args().to_string();
            assert!(!text.contains("\"unlucky\" acquired"), "as planned");
        }
        fn flush(&self) {}
    }
    log::set_logger(&Panicking).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let storage = table.storage();
    let lock = storage_lock::StorageLock::new(&storage, "l").unwrap();
    let guard = lock.lock("first").unwrap();
    let [unlucky, next] = ["unlucky", "next"].map(|owner_id| {
        let lock = lock.clone();
        waiting_thread(move || lock.lock(owner_id).map(|guard| guard.version()))
    });
    drop(guard);
    assert_eq!(unlucky.join().expect("no panic").unwrap(), 2);
    assert_eq!(takes_at_most(Duration::from_secs(5), "the next one's turn", || next.join().unwrap().unwrap()), 3);
    say("as expected");
}

/// A logger that takes a second for each line of the library's. Says what thread wrote which.
fn log_slowly(table: &Table) {
    struct Slow;
    impl log::Log for Slow {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            let text = record.args().to_string();
            if record.target() == "storage_lock" && (text.contains("taken over") || text.contains("is busy")) {
                say(format!("{} {text}", thread::current().name().unwrap_or_default()));
                thread::sleep(Duration::from_secs(1));
            }
        }
        fn flush(&self) {}
    }
    let lock = table.short_lock("l", ms(5_000), ms(1_000));
    drop(lock.lock("worker").expect("lock"));
    let forgotten = table.lock("l").lock("dead").expect("lock");
    log::set_logger(&Slow).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    let caller = |run: Box<dyn FnOnce() + Send>| {
        let thread = thread::Builder::new().name("caller".to_owned()).spawn(run).expect("a thread");
        thread.join().expect("no panic");
    };
    let (busy, expired) = (lock.clone(), lock);
    caller(Box::new(move || assert!(busy.try_lock_for("worker", ms(300)).expect("in time").is_none())));
    table.expire("l");
    caller(Box::new(move || {
        let guard = expired.try_lock_for("worker", ms(300)).expect("in time").expect("it has expired");
        assert!(guard.is_held());
    }));
    std::mem::forget(forgotten);
    say("as expected");
}
