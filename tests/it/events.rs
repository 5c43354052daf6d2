//! What `on_event` is told: everything, once, and true; and whatever it does harms nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use storage_lock::{Error, Event, LockOptions, PostgresStorage, PostgresStorageOptions, StorageLock};

use crate::pooler::Pgbouncer;
use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::{
    Table, chain, end_listener, eventually, is_refreshed, ms, short_lock, takes_at_most, waiting_thread, within,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Acquired,
    Busy,
    Refreshed,
    RefreshFailed,
    Lost,
    Released,
    Reconnected,
}

/// An event that is kept.
#[derive(Clone, Debug)]
struct Told {
    at: Instant,
    what: What,
    lock_id: String,
    owner_id: String,
    version: Option<i64>,
    /// How long it waited, was held, or took.
    time: Duration,
    /// Whether it is a takeover, or confirmed.
    is_so: bool,
    error: String,
}

impl Told {
    fn new(event: &Event<'_>) -> Told {
        let (none, zero) = (("", "", None), Duration::ZERO);
        let (what, (lock_id, owner_id, version), time, is_so, error) = match event {
            Event::Acquired { lock_id, owner_id, version, waited, is_takeover, .. } => {
                (What::Acquired, (*lock_id, *owner_id, Some(*version)), *waited, *is_takeover, String::new())
            }
            Event::Busy { lock_id, owner_id, version, .. } => {
                (What::Busy, (*lock_id, *owner_id, *version), zero, false, String::new())
            }
            Event::Refreshed { lock_id, owner_id, version, latency, .. } => {
                (What::Refreshed, (*lock_id, *owner_id, Some(*version)), *latency, false, String::new())
            }
            Event::RefreshFailed { lock_id, owner_id, version, error, .. } => {
                let after = if let Error::Timeout { after, .. } = error { *after } else { zero };
                (What::RefreshFailed, (*lock_id, *owner_id, Some(*version)), after, false, chain(error))
            }
            Event::Lost { lock_id, owner_id, version, .. } => {
                (What::Lost, (*lock_id, *owner_id, Some(*version)), zero, false, String::new())
            }
            Event::Released { lock_id, owner_id, version, held, is_confirmed, .. } => {
                (What::Released, (*lock_id, *owner_id, Some(*version)), *held, *is_confirmed, String::new())
            }
            Event::Reconnected { .. } => (What::Reconnected, none, zero, false, String::new()),
            other => panic!("an event that this test doesn't know: {other:?}"),
        };
        let (lock_id, owner_id) = (lock_id.to_owned(), owner_id.to_owned());
        Told { at: Instant::now(), what, lock_id, owner_id, version, time, is_so, error }
    }

    fn names(&self) -> (&str, &str, Option<i64>) {
        (&self.lock_id, &self.owner_id, self.version)
    }
}

/// All that was told, in its order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Told>>>);

impl Log {
    fn add(&self, event: &Event<'_>) {
        self.0.lock().unwrap().push(Told::new(event));
    }

    fn all(&self) -> Vec<Told> {
        self.0.lock().unwrap().clone()
    }

    fn of(&self, what: What) -> Vec<Told> {
        self.all().into_iter().filter(|told| told.what == what).collect()
    }

    fn count(&self, what: What) -> usize {
        self.of(what).len()
    }

    /// What was told, but for refreshes.
    fn whats(&self) -> Vec<What> {
        self.all().into_iter().map(|told| told.what).filter(|what| *what != What::Refreshed).collect()
    }

    fn forget(&self) {
        self.0.lock().unwrap().clear();
    }
}

/// A storage that tells, and what it told.
fn telling(table: &Table) -> (PostgresStorage, Log) {
    telling_with(table.options())
}

fn telling_with(options: PostgresStorageOptions) -> (PostgresStorage, Log) {
    let log = Log::default();
    let kept = log.clone();
    (PostgresStorage::new(options.on_event(move |event| kept.add(event))).unwrap(), log)
}

fn lock(storage: &PostgresStorage, lock_id: &str) -> StorageLock {
    StorageLock::new(storage, lock_id).unwrap()
}

/// A lock that is refreshed too rarely to hear of anything in a test.
fn unaware(storage: &PostgresStorage, lock_id: &str) -> StorageLock {
    short_lock(storage, lock_id, ms(90_000), ms(30_000))
}

/// Ends the sessions of this application name, and says how many there were.
fn end_sessions(client: &mut Client, name: &str) -> i64 {
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
    client.query_one(sql, &[&name]).unwrap().get(0)
}

fn sessions(client: &mut Client, name: &str) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    client.query_one(sql, &[&name]).unwrap().get(0)
}

/// The table, for connections that are known by its name.
fn named(table: &Table) -> Table {
    Table::of(&format!("{} application_name={}", table.dsn, table.name), &table.name)
}

/// Somewhere to wait until the test goes on.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        let bound = Duration::from_secs(30);
        drop(self.1.wait_timeout_while(self.0.lock().unwrap(), bound, |is_open| !*is_open).unwrap());
    }
}

#[test]
fn an_acquire_is_told_with_how_long_it_waited() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let ours = lock(&storage, "l");
    let holder = table.lock("l").lock("holder").unwrap();
    let began = Instant::now();
    let waiting = waiting_thread(move || drop(ours.lock("waiter").unwrap()));
    let asked = Instant::now();
    table.hears("l", 1);
    thread::sleep(ms(300));
    let held_since = asked.elapsed();
    holder.unlock().unwrap();
    waiting.join().unwrap();
    let acquired = log.of(What::Acquired);
    assert_eq!(acquired.len(), 1, "{acquired:?}");
    assert_eq!(acquired[0].names(), ("l", "waiter", Some(2)));
    assert!(acquired[0].time >= held_since, "{acquired:?}, and it was held for {held_since:?}");
    assert!(acquired[0].time <= began.elapsed(), "{acquired:?}");
    assert!(!acquired[0].is_so, "it was released");
    let busy = log.of(What::Busy);
    assert!(!busy.is_empty() && busy.iter().all(|busy| busy.names() == ("l", "waiter", Some(1))), "{busy:?}");
    // One that is free is not waited for, and one that is entered again is not acquired.
    log.forget();
    let ours = lock(&storage, "l");
    let outer = ours.lock("worker").unwrap();
    drop((ours.lock("worker").unwrap(), ours.try_lock("worker").unwrap()));
    outer.unlock().unwrap();
    let told = log.all();
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    assert!(told[0].time < ms(1_000) && told[0].names() == told[1].names(), "{told:?}");
}

#[test]
fn a_takeover_is_told_as_one_and_nothing_else_is() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let (waits, tries) = (lock(&storage, "l"), lock(&storage, "l"));
    let theirs = unaware(&table.storage(), "l");
    let is_takeover = || log.of(What::Acquired).last().unwrap().is_so;
    drop(waits.lock("worker").unwrap());
    assert!(!is_takeover(), "the first hold");
    drop(tries.try_lock("worker").unwrap().unwrap());
    assert!(!is_takeover(), "after a release");
    for waits_for_it in [true, false] {
        let expired = theirs.lock("other").unwrap();
        table.expire("l");
        drop(if waits_for_it { waits.lock("worker").unwrap() } else { tries.try_lock("worker").unwrap().unwrap() });
        assert!(is_takeover(), "the lease had run out");
        drop(expired);
    }
    drop(waits.lock("worker").unwrap());
    assert!(!is_takeover(), "after a release");
}

#[test]
fn each_busy_attempt_is_told_once_with_the_version_in_the_way() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let ours = lock(&storage, "l");
    for version in 1..=3 {
        let _holder = table.lock("l").lock("holder").unwrap();
        assert!(ours.try_lock("worker").unwrap().is_none());
        assert!(ours.try_lock_for("worker", Duration::ZERO).unwrap().is_none());
        let told = log.all();
        assert_eq!(log.whats(), [What::Busy; 2], "{told:?}");
        assert!(told.iter().all(|busy| busy.names() == ("l", "worker", Some(version))), "{told:?}");
        log.forget();
    }
}

#[test]
fn each_refresh_is_told_once_with_its_latency() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options().max_connections(1));
    let guard = short_lock(&storage, "l", ms(4_000), ms(100)).lock("worker").unwrap();
    // The connection has prepared everything.
    is_refreshed(&guard);
    eventually("it is told", || log.count(What::Refreshed) > 0);
    assert_eq!(log.of(What::Refreshed)[0].names(), ("l", "worker", Some(1)));
    let delay = ms(250);
    proxy.delay_answers(delay);
    // The next ones were sent before that, or when nothing was in the queue.
    let before = log.count(What::Refreshed);
    eventually("refreshes", || log.count(What::Refreshed) >= before + 5);
    for refreshed in &log.of(What::Refreshed)[before + 2..] {
        assert!((delay..ms(2_000)).contains(&refreshed.time), "{refreshed:?}");
    }
    // As many as there were requests, when none is under way.
    proxy.delay_answers(Duration::ZERO);
    let before = log.count(What::Refreshed);
    eventually("a fast one", || log.count(What::Refreshed) > before + 2);
    let (requests, refreshed) = (proxy.requests(), log.count(What::Refreshed));
    eventually("as many are told as were sent", || {
        let (now, told) = (proxy.requests() - requests, log.count(What::Refreshed) - refreshed);
        told >= 10 && now == told
    });
    assert!(log.of(What::Refreshed).last().unwrap().time < delay);
    guard.unlock().unwrap();
    assert_eq!(log.count(What::RefreshFailed), 0);
}

#[test]
fn each_failed_refresh_is_told_with_its_error_and_then_that_it_works_again() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let guard = short_lock(&storage, "l", ms(5_000), ms(50)).lock("worker").unwrap();
    table.execute("ALTER TABLE $T RENAME TO $T_away");
    eventually("failures", || log.count(What::RefreshFailed) >= 3);
    table.execute("ALTER TABLE $T_away RENAME TO $T");
    is_refreshed(&guard);
    let failed = log.of(What::RefreshFailed);
    for told in &failed {
        assert_eq!(told.names(), ("l", "worker", Some(1)));
        assert!(told.error.contains("does not exist"), "{told:?}");
    }
    eventually("a success afterwards", || log.all().last().unwrap().what == What::Refreshed);
    guard.unlock().unwrap();
    assert_eq!(log.count(What::Lost), 0);
    assert!(log.all().iter().all(|told| told.what != What::Busy && told.what != What::Reconnected));
}

/// Nothing gets through, so that a refresh ends with its time, and so does its attempt to connect at the same moment.
#[test]
fn a_refresh_that_gets_no_answer_is_told_as_failed_once() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options());
    let guards: Vec<_> =
        (0..8).map(|n| short_lock(&storage, &format!("l{n}"), ms(6_000), ms(100)).lock("worker").unwrap()).collect();
    guards.iter().for_each(is_refreshed);
    proxy.swallow();
    eventually("they are lost", || log.count(What::Lost) == 8);
    for n in 0..8 {
        let failed: Vec<Told> =
            log.of(What::RefreshFailed).into_iter().filter(|told| told.lock_id == format!("l{n}")).collect();
        assert!(failed.len() >= 2, "{failed:?}");
        for pair in failed.windows(2) {
            let gap = pair[1].at - pair[0].at;
            // Each begins when the one before has ended.
            assert!(gap + ms(20) >= pair[1].time, "two within {gap:?} for one attempt: {pair:?}");
        }
    }
    drop(guards);
    assert_eq!((log.count(What::Lost), log.count(What::Released)), (8, 0));
}

/// It waits in the server, for the transaction that would release the hold.
#[test]
fn a_refresh_that_waits_for_a_transaction_that_releases_the_lock_has_not_failed() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options());
    let (mut client, mut observer) = (table.client(), table.client());
    let guard = short_lock(&storage, "l", ms(6_000), ms(100)).lock("worker").unwrap();
    is_refreshed(&guard);
    proxy.stall(true, false);
    // Long enough for the next one to be on its way: that can't be seen.
    thread::sleep(ms(500));
    let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    proxy.stall(false, false);
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'";
    eventually("it waits", || observer.query_one(waits, &[&table.name]).unwrap().get::<_, i64>(0) > 0);
    // Until there would have been another one.
    thread::sleep(ms(3_500));
    transaction.rollback().unwrap();
    is_refreshed(&guard);
    guard.unlock().unwrap();
    assert_eq!(log.whats(), [What::Acquired, What::Released], "{:?}", log.all());
}

#[test]
fn a_loss_is_told_once_whoever_finds_out() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let theirs = table.storage();
    let told_once = |what: &str| {
        assert_eq!(log.whats(), [What::Acquired, What::Lost], "{what}: {:?}", log.all());
        let told = log.all();
        assert_eq!(told[0].names(), told.iter().find(|told| told.what == What::Lost).unwrap().names(), "{what}");
        log.forget();
    };
    // A refresh that finds nothing.
    let guard = short_lock(&storage, "l", ms(10_000), ms(50)).lock("worker").unwrap();
    table.execute("DELETE FROM $T");
    eventually("it is told", || log.count(What::Lost) == 1);
    guard.unlock().unwrap_err();
    told_once("a refresh, and then unlock");
    // Its deadline, while the table is away.
    let guard = short_lock(&storage, "l", ms(1_000), ms(500)).lock("worker").unwrap();
    let (inner, deadline) = (lock(&storage, "l").lock("worker").unwrap(), Instant::now() + guard.remaining());
    table.execute("ALTER TABLE $T RENAME TO $T_away");
    eventually("it is told", || log.count(What::Lost) == 1);
    assert!(log.of(What::Lost)[0].at < deadline + ms(300) && !guard.is_held());
    table.execute("ALTER TABLE $T_away RENAME TO $T");
    drop(guard);
    inner.unlock().unwrap_err();
    log.0.lock().unwrap().retain(|told| told.what != What::RefreshFailed);
    told_once("the deadline, and then drop and unlock");
    // Those who end it, where nobody had noticed.
    for unlocks in [true, false] {
        let guard = unaware(&storage, "m").lock("worker").unwrap();
        table.expire("m");
        drop(lock(&theirs, "m").lock("other").unwrap());
        if unlocks {
            assert!(guard.unlock().unwrap_err().is_lease_lost())
        } else {
            drop(guard)
        }
        told_once("its last guard");
    }
}

/// The refresh thread is the one that calls `on_lost`. Here it is late, and an inner guard finds the loss first.
#[test]
fn an_inner_guard_that_finds_the_loss_leaves_it_to_the_hold_to_tell() {
    let table = Table::new();
    let (log, gate, is_late) = (Log::default(), Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let (kept, passed, late) = (log.clone(), Arc::clone(&gate), Arc::clone(&is_late));
    let storage = PostgresStorage::new(table.options().on_event(move |event| {
        kept.add(event);
        if matches!(event, Event::Refreshed { .. }) {
            late.store(true, Ordering::SeqCst);
            passed.pass();
        }
    }))
    .unwrap();
    let (sender, lost) = channel();
    let sender = Mutex::new(sender);
    let options = LockOptions::new("l")
        .lease_expire_after(ms(1_000))
        .lease_refresh_interval(ms(100))
        .on_lost(move |signal| sender.lock().unwrap().send(signal.version()).unwrap());
    let lock = StorageLock::with_options(&storage, options).unwrap();
    let [outer, unlocked, dropped] = [0, 1, 2].map(|_| lock.lock("worker").unwrap());
    eventually("the refresh thread is in the callback", || is_late.load(Ordering::SeqCst));
    eventually("the deadline is over", || !outer.is_held());
    assert!(unlocked.unlock().unwrap_err().is_lease_lost());
    drop(dropped);
    assert_eq!(log.count(What::Lost), 0, "the hold has a guard still");
    gate.open();
    assert_eq!(lost.recv_timeout(ms(5_000)), Ok(outer.version()), "on_lost is called");
    eventually("it is told", || log.count(What::Lost) == 1);
    outer.unlock().unwrap_err();
    assert_eq!((log.count(What::Lost), log.count(What::Released)), (1, 0));
}

#[test]
fn each_release_is_told_once_with_how_long_it_was_held() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let lock = lock(&storage, "l");
    let told_once = |version: i64, held: Duration| {
        assert_eq!(log.whats(), [What::Acquired, What::Released]);
        let released = log.of(What::Released).remove(0);
        assert_eq!(released.names(), ("l", "worker", Some(version)));
        assert!(released.is_so && released.time >= held && released.time < held + ms(5_000), "{released:?}");
        log.forget();
    };
    for (version, unlocks) in [(1, true), (2, false)] {
        let guard = lock.lock("worker").unwrap();
        let since = Instant::now();
        thread::sleep(ms(50));
        let held = since.elapsed();
        if unlocks {
            guard.unlock().unwrap()
        } else {
            drop(guard)
        }
        told_once(version, held);
    }
    // From another thread, and from one that unwinds.
    let guard = lock.lock("worker").unwrap();
    thread::spawn(move || drop(guard)).join().unwrap();
    told_once(3, Duration::ZERO);
    let guard = lock.lock("worker").unwrap();
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _guard = guard;
        panic!("on purpose, while holding");
    }));
    assert!(unwound.is_err());
    told_once(4, Duration::ZERO);
    // Handed over.
    let guard = lock.lock("worker").unwrap();
    let waiting = waiting_thread(move || drop(lock.lock("waiter").unwrap()));
    guard.unlock().unwrap();
    waiting.join().unwrap();
    for (owner_id, version) in [("worker", Some(5)), ("waiter", Some(6))] {
        let of_hold: Vec<What> =
            log.all().iter().filter(|told| told.names() == ("l", owner_id, version)).map(|told| told.what).collect();
        assert_eq!(of_hold, [What::Acquired, What::Released], "{owner_id}");
    }
    assert_eq!(log.whats().len(), 4);
    assert!(log.of(What::Acquired).iter().all(|told| !told.is_so), "a hand-over is no takeover");
}

#[test]
fn a_release_in_a_transaction_is_told_once_and_so_is_a_loss_in_one() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let lock = short_lock(&storage, "l", ms(1_500), ms(100));
    let mut client = table.client();
    // Told with the commit, and not again with the drop.
    let guard = lock.lock("worker").unwrap();
    guard.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    drop(guard);
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    assert!(log.of(What::Released)[0].is_so);
    log.forget();
    // Rolled back, and released otherwise.
    let guard = lock.lock("worker").unwrap();
    guard.unlock_in(client.transaction().unwrap()).unwrap().rollback().unwrap();
    assert_eq!(log.count(What::Released), 0);
    guard.unlock().unwrap();
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    assert!(log.of(What::Released)[0].is_so);
    log.forget();
    // Open for longer than the lease.
    let guard = lock.lock("worker").unwrap();
    let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    eventually("it is told", || log.count(What::Lost) == 1);
    transaction.commit().unwrap();
    drop(guard);
    assert_eq!((log.count(What::Acquired), log.count(What::Lost), log.count(What::Released)), (1, 1, 0));
}

#[test]
fn a_release_that_cannot_be_confirmed_is_told_as_such() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options());
    let guard = unaware(&storage, "l").lock("worker").unwrap();
    proxy.swallow();
    assert!(!takes_at_most(ms(2_500), "unlock", || guard.unlock()).unwrap_err().is_lease_lost());
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    assert!(!log.of(What::Released)[0].is_so);
}

#[test]
fn a_broken_connection_that_is_opened_again_is_told() {
    let table = Table::new();
    let (storage, log) = telling_with(named(&table).options().max_connections(1));
    let mut client = table.client();
    let lock = short_lock(&storage, "l", ms(20_000), ms(5_000));
    drop(lock.lock("worker").unwrap());
    assert_eq!(log.count(What::Reconnected), 0, "the first one");
    for round in 1..=3 {
        assert_eq!(end_sessions(&mut client, &table.name), 1);
        drop(lock.lock("worker").unwrap());
        eventually("it is told", || log.count(What::Reconnected) == round);
    }
    drop(lock.lock("worker").unwrap());
    assert_eq!(log.count(What::Reconnected), 3);
    // While there is nothing to connect to, nothing was opened.
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options());
    proxy.swallow_next_connection();
    proxy.cut();
    storage.server_time().ok();
    storage.server_time().unwrap();
    eventually("it is told", || log.count(What::Reconnected) == 1);
}

#[test]
fn a_broken_listening_connection_that_is_opened_again_is_told() {
    let table = Table::new();
    let (storage, log) = telling(&table);
    let (ours, mut client) = (lock(&storage, "l"), table.client());
    let holder = table.lock("l").lock("holder").unwrap();
    let waiting = waiting_thread(move || drop(ours.lock("waiter").unwrap()));
    for round in 1..=2 {
        let waiter = table.hears("l", 1)[0];
        assert_eq!(log.count(What::Reconnected), round - 1, "opened for the first time");
        end_listener(&mut client, waiter);
        eventually("it is told", || log.count(What::Reconnected) == round);
    }
    holder.unlock().unwrap();
    waiting.join().unwrap();
    assert_eq!(log.count(What::Reconnected), 2);
}

#[test]
fn behind_a_pooler_the_same_is_told_and_nothing_of_a_reconnect() {
    for settings in ["", "ignore_startup_parameters = options"] {
        let Some(pgbouncer) = Pgbouncer::start(settings) else { return };
        let table = Table::new();
        let (storage, log) = telling_with(Table::of(&pgbouncer.dsn, &table.name).options());
        let ours = short_lock(&storage, "l", ms(5_000), ms(50));
        let holder = table.lock("l").lock("holder").unwrap();
        assert!(ours.try_lock("worker").unwrap().is_none());
        let heard = log.clone();
        let waiting = waiting_thread(move || {
            let guard = ours.lock("worker").unwrap();
            // One that is answered while its hold ends is not told.
            eventually("a refresh is told", || heard.count(What::Refreshed) >= 1);
            guard.unlock().unwrap();
        });
        holder.unlock().unwrap();
        waiting.join().unwrap();
        let whats = log.whats();
        let busy = whats.iter().take_while(|what| **what == What::Busy).count();
        assert!(busy >= 1, "{whats:?}");
        assert_eq!(whats[busy..], [What::Acquired, What::Released]);
    }
}

/// The thread for which it was meant gives up while it is handed over.
#[test]
fn a_hold_that_nobody_got_is_not_told_of() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let (storage, log) = telling_with(Table::of(&proxy.dsn, &table.name).options());
    let lock = unaware(&storage, "some-lock");
    let guard = lock.lock("worker").unwrap();
    let ours = lock.clone();
    let waiting = waiting_thread(move || ours.try_lock_for("hurried", ms(500)).unwrap().is_none());
    proxy.hold_back_answer_to(b"some-lock", ms(1_000));
    guard.unlock().unwrap();
    assert!(waiting.join().unwrap(), "it gave up");
    assert_eq!(log.whats(), [What::Acquired, What::Released]);
    assert!(log.all().iter().all(|told| told.version == Some(1)));
    assert_eq!(lock.info().unwrap().map(|info| (info.version, info.is_held)), Some((2, false)));
}

/// Threads of two processes' worth of storages, which hand over, give up, enter again, take over and lose.
#[test]
fn what_was_acquired_was_released_or_lost_or_is_held() {
    let table = Table::new();
    let storages = [telling(&table), telling(&table)];
    let got: Mutex<BTreeSet<(String, i64)>> = Mutex::default();
    let end = Instant::now() + Duration::from_secs(6);
    thread::scope(|scope| {
        for (n, (storage, _)) in storages.iter().enumerate() {
            for thread in 0..5 {
                let got = &got;
                scope.spawn(move || {
                    let owner_id = format!("worker-{n}-{thread}");
                    let mut random = u64::try_from(n * 5 + thread).unwrap();
                    while Instant::now() < end {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let draw = random >> 33;
                        let lock_id = format!("l{}", draw % 2);
                        let lock = short_lock(storage, &lock_id, ms(1_500), ms(20));
                        let guard = match draw % 7 {
                            0 => lock.try_lock(&owner_id).unwrap(),
                            // On a machine that is busy it may hear nothing in time.
                            1..=4 => match lock.try_lock_for(&owner_id, Duration::from_micros(draw % 6_000)) {
                                Err(storage_lock::Error::Timeout { .. }) => None,
                                guard => guard.unwrap(),
                            },
                            _ => Some(lock.lock(&owner_id).unwrap()),
                        };
                        let Some(guard) = guard else { continue };
                        got.lock().unwrap().insert((lock_id, guard.version()));
                        let inner = (draw % 3 == 0).then(|| lock.lock(&owner_id).unwrap());
                        thread::sleep(Duration::from_micros(draw % 3_000));
                        drop(inner);
                        if draw % 2 == 0 { drop(guard) } else { drop(guard.unlock()) }
                    }
                });
            }
        }
        let mut client = table.client();
        while Instant::now() < end {
            let sql =
                format!("UPDATE {} SET lease_expire_time = clock_timestamp() WHERE released_at IS NULL", table.name);
            client.execute(&sql, &[]).unwrap();
            thread::sleep(ms(30));
        }
    });
    let kept = lock(&storages[0].0, "kept").lock("keeper").unwrap();
    got.lock().unwrap().insert(("kept".to_owned(), kept.version()));
    let mut holds: BTreeMap<(String, i64), Vec<What>> = BTreeMap::new();
    let (mut takeovers, mut unconfirmed) = (0, 0);
    for (_, log) in &storages {
        for told in log.all() {
            takeovers += usize::from(told.what == What::Acquired && told.is_so);
            unconfirmed += usize::from(told.what == What::Released && !told.is_so);
            if !matches!(told.what, What::Busy | What::Reconnected) {
                holds.entry((told.lock_id, told.version.unwrap())).or_default().push(told.what);
            }
        }
    }
    let count = |what| holds.values().flatten().filter(|told| **told == what).count();
    let [acquired, released, lost] = [What::Acquired, What::Released, What::Lost].map(count);
    println!("{acquired} acquired ({takeovers} takeovers), {released} released, {lost} lost");
    assert!(takeovers > 3 && lost > 3 && released > 50, "too little happened");
    assert_eq!(unconfirmed, 0);
    for (hold, told) in &holds {
        assert_eq!(told[0], What::Acquired, "{hold:?}: {told:?}");
        assert_eq!(told.iter().filter(|what| **what == What::Acquired).count(), 1, "{hold:?}: {told:?}");
        let ends = told.iter().filter(|what| matches!(what, What::Released | What::Lost)).count();
        assert_eq!(ends, usize::from(hold.0 != "kept"), "{hold:?}: {told:?}");
    }
    assert_eq!(acquired, released + lost + 1);
    // A thread that comes to what it was handed too late takes its place again, and is told of both.
    let got = got.into_inner().unwrap();
    assert!(got.iter().all(|hold| holds.contains_key(hold)), "a hold was not told of");
    drop(kept);
}

#[test]
fn a_callback_that_panics_harms_nothing_and_is_logged() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("panic at events", &table, &[], Stdio::piped());
    let said = child.next_line(Duration::from_secs(60));
    let log = child.stderr();
    assert!(child.wait().success(), "{log}");
    let told: usize = said.expect("how often it was told").parse().unwrap();
    let warnings = log.lines().filter(|line| line.contains("WARN") && line.contains("on_event panicked")).count();
    assert!(told >= 8 && warnings == told, "told {told} times, and {warnings} warnings: {log}");
}

/// With one connection: whoever is told of a reconnect must not keep those waiting who wait for that connection.
#[test]
fn a_callback_may_use_the_storage() {
    let table = Table::new();
    static STORAGE: OnceLock<PostgresStorage> = OnceLock::new();
    let log = Log::default();
    let kept = log.clone();
    let options = named(&table).options().max_connections(1).on_event(move |event| {
        let Some(storage) = STORAGE.get() else { return };
        takes_at_most(ms(3_000), "the call in the callback", || storage.list()).unwrap();
        kept.add(event);
    });
    let storage = STORAGE.get_or_init(|| PostgresStorage::new(options).unwrap());
    let lock = short_lock(storage, "l", ms(10_000), ms(100));
    let guard = lock.lock("worker").unwrap();
    assert!(lock.try_lock("other").unwrap().is_none());
    is_refreshed(&guard);
    end_sessions(&mut table.client(), &table.name);
    takes_at_most(ms(2_000), "the call that opens a connection", || lock.info()).unwrap();
    takes_at_most(ms(2_000), "unlock", || guard.unlock()).unwrap();
    let guard = lock.lock("worker").unwrap();
    table.execute("UPDATE $T SET version = version + 1");
    eventually("it is lost", || log.count(What::Lost) == 1);
    drop(guard);
    eventually("all is told", || log.count(What::Reconnected) == 1);
    let whats = log.whats();
    let holds: Vec<What> = whats.into_iter().filter(|what| *what != What::Reconnected).collect();
    // Nothing failed in a callback: one that panics keeps nothing.
    let expected = [What::Acquired, What::Busy, What::Released, What::Acquired, What::Lost];
    assert_eq!(holds.iter().filter(|what| **what != What::RefreshFailed).copied().collect::<Vec<_>>(), expected);
}

#[test]
fn a_callback_may_drop_the_last_of_the_storage_and_nothing_is_left() {
    let table = Table::new();
    let mut client = table.client();
    for what in [What::Acquired, What::Refreshed, What::Released, What::Reconnected] {
        let last: Arc<Mutex<Option<StorageLock>>> = Arc::default();
        let (kept, calls) = (Arc::clone(&last), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&calls);
        let storage = PostgresStorage::new(named(&table).options().on_event(move |event| {
            if Told::new(event).what == what {
                counted.fetch_add(1, Ordering::SeqCst);
                drop(kept.lock().unwrap().take());
            }
        }))
        .unwrap();
        let lock = short_lock(&storage, "l", ms(10_000), ms(50));
        if what == What::Reconnected {
            end_sessions(&mut client, &table.name);
        }
        *last.lock().unwrap() = Some(lock.clone());
        drop(storage);
        let guard = lock.lock("worker").unwrap();
        drop(lock);
        if matches!(what, What::Refreshed | What::Reconnected) {
            eventually("it is told", || calls.load(Ordering::SeqCst) > 0);
        }
        guard.unlock().unwrap();
        assert!(calls.load(Ordering::SeqCst) > 0 && last.lock().unwrap().is_none(), "{what:?}");
        // An acquire whose connection was broken is followed up for as long as it may yet come through.
        within(ms(45_000), "no connection is left", || (sessions(&mut client, &table.name) == 0).then_some(()));
        eventually("nor the callback", || Arc::strong_count(&calls) == 1);
    }
}

/// Whoever is told of a busy lock is the head of the line. Those behind it don't take that for a database that is
/// silent.
#[test]
fn a_callback_that_takes_long_makes_nobody_give_up() {
    let table = Table::new();
    let (gate, is_told) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let (passed, told) = (Arc::clone(&gate), Arc::clone(&is_told));
    let storage = PostgresStorage::new(table.options().on_event(move |event| {
        if matches!(event, Event::Busy { owner_id: "head", .. }) {
            told.store(true, Ordering::SeqCst);
            passed.pass();
        }
    }))
    .unwrap();
    let ours = short_lock(&storage, "l", ms(1_000), ms(300));
    let holder = table.lock("l").lock("holder").unwrap();
    let wait = |owner_id: &'static str| {
        let ours = ours.clone();
        waiting_thread(move || ours.lock(owner_id).map(drop))
    };
    let head = wait("head");
    eventually("it is told", || is_told.load(Ordering::SeqCst));
    let next = wait("next");
    // For longer than a lease, after which a silent database is given up.
    thread::sleep(ms(1_500));
    assert!(!next.is_finished(), "{:?}", next.join());
    gate.open();
    holder.unlock().unwrap();
    head.join().unwrap().unwrap();
    next.join().unwrap().unwrap();
}

#[test]
fn whether_anybody_is_told_is_seen_in_the_options() {
    let options = PostgresStorageOptions::from_dsn("host=h");
    assert!(format!("{options:?}").contains("on_event: (not set)"), "{options:?}");
    let options = options.on_event(|_| ());
    assert!(format!("{options:?}").contains("on_event: (set)"), "{options:?}");
}
