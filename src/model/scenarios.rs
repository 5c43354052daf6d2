//! The library's threads under a model checker: guards, refresh threads, the wait queue, and the workers behind them.
//!
//! This is the library itself, not a copy of it. Under `--cfg shuttle` three of its modules are replaced.
//! [`crate::sync`] has threads, mutexes, condition variables and time of the checker. [`crate::db::connections`] and
//! [`crate::db::session`] are a model server: one row behind a network that may be slow or lossy. The row answers as
//! the real one does, which a test shows (`the_model_answers_as_the_server_does`). `scripts/model.sh` runs the
//! scenarios.
//!
//! The checker is `shuttle`. It runs one thread at a time, and chooses at each step which one. It chooses at random:
//! uniformly, or by PCT, which changes threads seldom, at the worst moments.
//!
//! `loom` would try all orders, and so promise more, but of much less. It bounds a model to five threads, where one
//! contended lock here takes eight threads and thousands of steps. Its `Condvar` never times out. And it has to replace
//! `Arc`, whose `self: &Arc<Self>` and unsized uses the library has.
//!
//! Neither of them knows time. Here time is a number that a thread of the model moves, see [`crate::sync`]:
//!
//! - Lazily: the clock then shows whether a thread waits longer than it has to.
//! - Eagerly, as if threads were stopped at any point for any time. Then a scenario checks only what must always be
//!   true.
//!
//! What is checked of each execution:
//!
//! - Whenever the server has run a statement, no hold is trusted that isn't the row's ([`check`]). A hold that isn't
//!   trusted never is again.
//! - No thread hangs. `shuttle` finds a deadlock, and [`settle`] a thread of the library that doesn't end.
//! - With a lazy clock, nobody waits for longer than the scenario says, and each hold is ended once.
//!
//! Bugs planted by hand. Each was found within seconds. Where several scenarios found a bug, the list names the one
//! that is about it:
//!
//! - `a_line_of_threads_passes_the_lock_on_without_a_pause`
//!   - `WaitQueues::hand` doesn't wake the waiter
//!   - `end_hold` doesn't wake the head
//!   - `Hold::leave` doesn't notify the refresh thread
//! - `processes_hear_of_each_others_releases`
//!   - a notification that comes while the head asks is forgotten
//! - `who_stands_behind_a_head_that_gives_up_asks_in_its_place`
//!   - `Ticket::leave` doesn't wake the next head
//! - `what_was_taken_too_late_or_by_a_lost_answer_is_given_back`
//!   - `Ticket::leave` reads `handed` before it takes the mutex
//!   - a lock that was taken too late for its caller is not released
//! - `who_gives_up_as_the_lock_comes_neither_keeps_it_nor_leaks_it`
//!   - `WaitQueues::hand` leaves a hold that nobody took up open to re-entry
//!   - the waiter forgets that a guard has its hold (`has_hold`)
//! - `a_hold_is_entered_again_or_released_and_never_both`
//!   - a hold without guards may be entered again
//! - `a_hold_whose_refreshes_are_never_answered_is_over_at_its_deadline`
//!   - the refresh loop doesn't look at the deadline
//! - `a_hold_that_the_server_does_not_know_is_over_with_the_next_refresh`
//!   - `Hold::refreshed` doesn't notify
//!   - a loss doesn't wake the wait queue
//! - `what_a_guard_says_is_true_when_threads_are_stopped`
//!   - a deadline counts from the answer
//! - `what_a_guard_says_is_true_whatever_gets_lost_or_late`
//!   - `Lease::extend` revives a hold that is over
//! - `a_process_of_which_nobody_waits_any_more_stands_in_no_row`
//!   - after the last waiter gave up, the process is not withdrawn from the row
//! - `a_hold_that_a_transaction_releases_is_over_with_its_commit_and_goes_on_with_its_rollback`
//!   - a commit that releases the hold doesn't wake the wait queue
//!   - the hold is trusted until that commit
//!   - an answer from before that commit is a loss
//! - `of_a_transaction_that_ends_as_the_lease_does_nobody_says_what_is_not_known`
//!   - a hold that is gone at the end of the lease is taken for committed, by its caller or by a refresh
//!   - `unlock` says that the hold is lost, and its signal doesn't
//!   - a commit that a refresh has found out doesn't wake the wait queue

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::env;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, Runner};
use uuid::Uuid;

use crate::db::answer::LONGEST_SLEEP;
use crate::db::session::{NetworkFaults, check, end_transaction, release_in_transaction, server, start_server};
use crate::db::sql::{GRACE, STEP};
use crate::hold::Unlocking;
use crate::model::row::Row;
use crate::sync::{CLOCK_TASK, Instant, Pace, live_threads, random, start_clock, stop_clock, thread};
use crate::{Error, LockGuard, LockOptions, PostgresStorage, PostgresStorageOptions, Result, StorageLock};

const MS: Duration = Duration::from_millis(1);
const LEASE: Duration = Duration::from_secs(2);
const LONG_LEASE: Duration = Duration::from_secs(30);
const CALM: NetworkFaults = NetworkFaults {
    delay: Duration::ZERO,
    losses: 0,
    lost_refreshes: 0,
    lost_notifications: 0,
    drops_notifications: false,
};
const WITHOUT_NOTIFICATIONS: NetworkFaults = NetworkFaults { drops_notifications: true, ..CALM };

/// A scheduler that runs the clock's thread only when no other thread can run; or, if time passes eagerly, now and
/// then.
struct Timed<S> {
    inner: S,
    pace: Pace,
    random: u64,
}

impl<S: Scheduler> Timed<S> {
    /// An eager clock runs once in so many steps.
    const EAGERNESS: u64 = 64;

    fn new(inner: S, pace: Pace) -> Timed<S> {
        Timed { inner, pace, random: 0 }
    }

    /// Draws from random numbers of its own, because those of `inner` are recorded with the schedule.
    fn is_time(&mut self) -> bool {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.pace == Pace::Eager && (self.random >> 33).is_multiple_of(Self::EAGERNESS)
    }
}

impl<S: Scheduler> Scheduler for Timed<S> {
    fn new_execution(&mut self) -> Option<Schedule> {
        let schedule = self.inner.new_execution()?;
        self.random = schedule.seed;
        Some(schedule)
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        let is_clock = |task: &&Task| usize::from(task.id()) == CLOCK_TASK;
        let others: Vec<&Task> = runnable.iter().copied().filter(|task| !is_clock(task)).collect();
        match runnable.iter().find(|task| is_clock(task)) {
            Some(clock) if others.is_empty() || self.is_time() => Some(clock.id()),
            _ => self.inner.next_task(&others, current, is_yielding),
        }
    }

    fn next_u64(&mut self) -> u64 {
        self.inner.next_u64()
    }
}

/// Runs a scenario under as many schedules as fit into the time, half of it at random, half by PCT; or replays a
/// schedule.
fn explore(pace: Pace, faults: NetworkFaults, scenario: fn()) {
    let run = move || {
        start_server(faults);
        start_clock(pace);
        scenario();
        stop_clock();
    };
    let seconds = env::var("STORAGE_LOCK_MODEL_SECONDS").map_or(2.0, |seconds| seconds.parse().unwrap());
    let mut config = Config::new();
    config.stack_size = 256 * 1024;
    config.max_time = Some(Duration::from_secs_f64(seconds / 2.0));
    config.failure_persistence = env::var_os("STORAGE_LOCK_MODEL_FAILURES")
        .map_or(FailurePersistence::Print, |folder| FailurePersistence::File(Some(folder.into())));
    if let Some(schedule) = env::var_os("STORAGE_LOCK_MODEL_REPLAY") {
        config.max_time = None;
        Runner::new(ReplayScheduler::new_from_file(schedule).expect("a schedule"), config).run(run);
        return;
    }
    let at_random = Timed::new(RandomScheduler::new(usize::MAX), pace);
    let at_random = Runner::new(at_random, config.clone()).run(run);
    let by_pct = Runner::new(Timed::new(PctScheduler::new(4, usize::MAX), pace), config).run(run);
    // Writes past the capture of a test's output, so that every run shows how many schedules it tried.
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    writeln!(io::stdout(), "{name}: {at_random} schedules at random, {by_pct} by PCT").expect("a terminal");
}

/// One of the processes that share the server.
fn process() -> PostgresStorage {
    loop {
        // The faults may hit this, too.
        if let Ok(storage) = PostgresStorage::new(PostgresStorageOptions::from_dsn("host=model")) {
            return storage;
        }
    }
}

fn lock_of(storage: &PostgresStorage, lease: Duration) -> StorageLock {
    let options = LockOptions::new("l").lease_expire_after(lease).lease_refresh_interval(lease / 4);
    StorageLock::with_options(storage, options).expect("a lock")
}

fn start<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> shuttle::thread::JoinHandle<T> {
    shuttle::thread::spawn(run)
}

/// A guard whose word is checked at every statement, until it is released.
struct Counted(LockGuard);

impl Counted {
    fn on(guard: LockGuard) -> Counted {
        server(|server| server.watch(&guard.hold));
        check();
        Counted(guard)
    }

    fn unlock(self) -> Result<()> {
        check();
        server(|server| server.unwatch(&self.0.hold));
        self.0.unlock()
    }
}

/// Waits until no thread of the library is left. Checks that the queues of `storages` are empty, and that nobody
/// holds the lock.
fn settle(storages: &[&PostgresStorage]) {
    let start = Instant::now();
    while !live_threads().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(3_600), "still run: {:?}", live_threads());
        thread::sleep(20_000 * MS);
    }
    for storage in storages {
        assert!(storage.queues().is_empty(), "a queue is left behind");
    }
    let now = Instant::now();
    server(|server| {
        let is_left = |row: &Row| row.released_at.is_none() && row.lease_end > now;
        assert!(!server.row.as_ref().is_some_and(is_left), "held for nobody: {:?}", server.row);
    });
}

/// Without faults there is no reason to end a hold twice.
fn assert_each_hold_was_ended_once() {
    server(|server| assert!(server.ends.values().all(|ends| *ends == 1), "ended so often: {:?}", server.ends));
}

/// A hold's refresh thread ends with the hold, immediately.
fn assert_no_refresh_thread() {
    thread::sleep(Duration::from_nanos(1));
    assert!(!live_threads().contains_key("lock-refresh"), "{:?}", live_threads());
}

fn whatever_happens() {
    let storages = [process(), process()];
    let users: Vec<_> = [0, 0, 1]
        .into_iter()
        .map(|process| {
            let lock = lock_of(&storages[process], LEASE);
            start(move || {
                for _ in 0..2 {
                    let guard = match random() % 4 {
                        0 => lock.try_lock("o"),
                        1 => lock.try_lock_for("o", 300 * MS),
                        2 => lock.try_lock_for("o", 2 * LEASE),
                        _ => lock.lock("o").map(Some),
                    };
                    let Ok(Some(guard)) = guard else { continue };
                    let guard = Counted::on(guard);
                    let again = if random().is_multiple_of(4) { lock.try_lock("o") } else { Ok(None) };
                    let again = again.ok().flatten().map(Counted::on);
                    thread::sleep(LEASE / 2 * (random() % 4));
                    drop(again.map(Counted::unlock));
                    drop(guard.unlock());
                }
            })
        })
        .collect();
    for user in users {
        user.join().unwrap();
    }
    settle(&[&storages[0], &storages[1]]);
}

#[test]
fn what_a_guard_says_is_true_whatever_gets_lost_or_late() {
    let faults = NetworkFaults { delay: LEASE / 2, losses: 10, lost_refreshes: 4, ..CALM };
    explore(Pace::Eager, faults, whatever_happens);
}

#[test]
fn what_a_guard_says_is_true_when_threads_are_stopped() {
    explore(Pace::Eager, CALM, whatever_happens);
}

#[test]
fn what_a_guard_says_is_true_when_all_refreshes_are_lost() {
    explore(
        Pace::Lazy,
        NetworkFaults { delay: 3 * LEASE, lost_refreshes: 2, ..WITHOUT_NOTIFICATIONS },
        whatever_happens,
    );
}

#[test]
fn a_line_of_threads_passes_the_lock_on_without_a_pause() {
    explore(Pace::Lazy, CALM, || {
        let storage = process();
        let began = Instant::now();
        let users: Vec<_> = (0..3)
            .map(|user| {
                let lock = lock_of(&storage, LONG_LEASE);
                start(move || {
                    for _ in 0..2 {
                        let guard = Counted::on(lock.lock(&format!("o{user}")).expect("the lock"));
                        guard.unlock().expect("held");
                    }
                })
            })
            .collect();
        for user in users {
            user.join().unwrap();
        }
        assert_eq!(began.elapsed(), Duration::ZERO, "somebody waited for nothing");
        assert_no_refresh_thread();
        assert_each_hold_was_ended_once();
        settle(&[&storage]);
    });
}

/// Each process first has to begin to listen.
#[test]
fn processes_hear_of_each_others_releases() {
    explore(Pace::Lazy, NetworkFaults { delay: 16 * MS, ..CALM }, || {
        let storages = [process(), process()];
        let began = Instant::now();
        let users: Vec<_> = [0, 0, 1, 1]
            .into_iter()
            .map(|process| {
                let lock = lock_of(&storages[process], LONG_LEASE);
                start(move || {
                    let guard = Counted::on(lock.lock("o").expect("the lock"));
                    thread::sleep([0, 1, 16][random() as usize % 3] * MS);
                    guard.unlock().expect("held");
                })
            })
            .collect();
        for user in users {
            user.join().unwrap();
        }
        assert!(began.elapsed() < 2_000 * MS, "took {:?}", began.elapsed());
        assert_each_hold_was_ended_once();
        settle(&[&storages[0], &storages[1]]);
    });
}

/// The first process holds the lock, and a thread of each other process waits for it.
fn held_and_waited_for(storages: &[PostgresStorage; 3]) -> (Counted, Vec<shuttle::thread::JoinHandle<()>>) {
    let [holder, others @ ..] = storages.each_ref().map(|storage| lock_of(storage, LONG_LEASE));
    let guard = Counted::on(holder.lock("o").expect("the lock"));
    let wait = |lock: StorageLock| {
        start(move || {
            Counted::on(lock.lock("o").expect("the lock")).unlock().expect("held");
        })
    };
    (guard, others.into_iter().map(wait).collect())
}

/// Dead processes are in the row, before, between and behind the live ones.
#[test]
fn dead_processes_in_the_row_cost_those_who_live_a_look() {
    explore(Pace::Lazy, CALM, || {
        let storages = [process(), process(), process()];
        let (guard, waiting) = held_and_waited_for(&storages);
        for _ in 0..1 + random() % 6 {
            thread::sleep([0, 1, 16][random() as usize % 3] * MS);
            server(|server| {
                let waiters = &mut server.row.as_mut().expect("a row").waiters;
                waiters.insert(random() as usize % (waiters.len() + 1), Uuid::from_u128(u128::from(random())));
            });
        }
        let released = Instant::now();
        guard.unlock().expect("held");
        waiting.into_iter().for_each(|thread| thread.join().unwrap());
        // If the first two and the last are dead, no live process is notified. Then one of them looks by itself. Each
        // of the two live ones may have dead ones before it.
        let most = LONGEST_SLEEP + 2 * (GRACE + 50 * MS + 6 * STEP);
        assert!(released.elapsed() <= most, "free beside them: {:?}", released.elapsed());
        settle(&storages.each_ref());
    });
}

/// Any notification may be lost. Whoever frees a lock by hand sends none.
#[test]
fn a_lock_is_found_free_by_whoever_looks_although_nobody_is_notified() {
    explore(Pace::Lazy, NetworkFaults { lost_notifications: 2, ..CALM }, || {
        let storages = [process(), process(), process()];
        let (guard, waiting) = held_and_waited_for(&storages);
        thread::sleep([0, 1, 3_000][random() as usize % 3] * MS);
        let freed = Instant::now();
        if random().is_multiple_of(2) {
            guard.unlock().expect("held");
        } else {
            server(|server| {
                server.is_tampered = true;
                server.unwatch(&guard.0.hold);
                let row = server.row.as_mut().expect("a row");
                row.version += 1;
                row.released_at = Some(freed);
            });
            drop(guard.0);
        }
        waiting.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(freed.elapsed() <= 2 * LONGEST_SLEEP + 2 * GRACE, "free beside them: {:?}", freed.elapsed());
        settle(&storages.each_ref());
    });
}

fn giving_up_when_it_comes() {
    let storage = process();
    let lock = lock_of(&storage, LONG_LEASE);
    let began = Instant::now();
    let guard = Counted::on(lock.lock("o").expect("the lock"));
    let timed = lock.clone();
    let timed = start(move || {
        let mut guard = timed.try_lock_for("o", 1_000 * MS).expect("no error");
        for _ in 0..4 {
            // A hold that it didn't take up is not its own, even while that hold is being ended.
            guard = if guard.is_some() { guard } else { timed.try_lock("o").expect("no error") };
        }
        if let Some(guard) = guard {
            Counted::on(guard).unlock().expect("held");
        }
    });
    let untimed = lock.clone();
    let untimed = start(move || {
        Counted::on(untimed.lock("o").expect("the lock")).unlock().expect("held");
    });
    // The answer to the hand-over comes at the moment at which the timeout ends, or nearly then.
    thread::sleep(1_000 * MS - [0, 1, 16][random() as usize % 3] * MS);
    guard.unlock().expect("held");
    timed.join().unwrap();
    untimed.join().unwrap();
    assert!(began.elapsed() <= 1_300 * MS, "the one without a timeout waited for {:?}", began.elapsed());
    assert_no_refresh_thread();
    assert_each_hold_was_ended_once();
    settle(&[&storage]);
}

#[test]
fn who_gives_up_as_the_lock_comes_neither_keeps_it_nor_leaks_it() {
    explore(Pace::Lazy, NetworkFaults { delay: 16 * MS, ..CALM }, giving_up_when_it_comes);
}

#[test]
fn who_stands_behind_a_head_that_gives_up_asks_in_its_place() {
    explore(Pace::Lazy, WITHOUT_NOTIFICATIONS, || {
        let (here, there) = (process(), process());
        let guard = Counted::on(lock_of(&there, LONG_LEASE).lock("o").expect("the lock"));
        let began = Instant::now();
        let (timed, untimed) = (lock_of(&here, LONG_LEASE), lock_of(&here, LONG_LEASE));
        let timed = start(move || timed.try_lock_for("o", 1_000 * MS).expect("no error").is_none());
        let untimed = start(move || {
            Counted::on(untimed.lock("o").expect("the lock")).unlock().expect("held");
        });
        thread::sleep(2_000 * MS);
        guard.unlock().expect("held");
        assert!(timed.join().unwrap(), "it got the lock");
        untimed.join().unwrap();
        // Without notifications it asks once a second.
        assert!(began.elapsed() <= 3_000 * MS, "the one without a timeout waited for {:?}", began.elapsed());
        assert_each_hold_was_ended_once();
        settle(&[&here, &there]);
    });
}

#[test]
fn a_hold_is_entered_again_or_released_and_never_both() {
    explore(Pace::Lazy, CALM, || {
        let storage = process();
        let lock = lock_of(&storage, LONG_LEASE);
        let guard = Counted::on(lock.lock("o").expect("the lock"));
        let version = guard.0.version();
        let waiter = lock.clone();
        let waiter = start(move || {
            Counted::on(waiter.lock("o").expect("the lock")).unlock().expect("held");
        });
        // The guard goes to another thread, which releases it while this one enters again.
        let leaver = start(move || guard.unlock().expect("held"));
        if let Some(again) = lock.try_lock("o").expect("no error") {
            let again = Counted::on(again);
            assert!(again.0.is_held() && (again.0.version() == version || again.0.version() > version));
            leaver.join().unwrap();
            again.unlock().expect("held");
        } else {
            leaver.join().unwrap();
        }
        waiter.join().unwrap();
        assert_no_refresh_thread();
        assert_each_hold_was_ended_once();
        settle(&[&storage]);
    });
}

#[test]
fn a_hold_whose_refreshes_are_never_answered_is_over_at_its_deadline() {
    explore(Pace::Lazy, NetworkFaults { lost_refreshes: 1, ..CALM }, || {
        let storage = process();
        let lock = lock_of(&storage, LEASE);
        let guard = Counted::on(lock.lock("o").expect("the lock"));
        let (began, waiter) = (Instant::now(), lock.clone());
        let waiter = start(move || {
            let guard = Counted::on(waiter.lock("o").expect("the lock"));
            let waited = began.elapsed();
            drop(guard.unlock());
            waited
        });
        thread::sleep(guard.0.remaining());
        assert!(!guard.0.is_held());
        // The refresh thread has ended, although the guard is still there.
        assert_no_refresh_thread();
        // The server may have run a refresh whose answer was lost.
        let waited = waiter.join().unwrap();
        assert!(waited <= 2 * LEASE + 1_000 * MS, "waited for {waited:?}");
        assert!(guard.unlock().is_err_and(|error| error.is_lease_lost()));
        settle(&[&storage]);
    });
}

#[test]
fn a_hold_that_the_server_does_not_know_is_over_with_the_next_refresh() {
    explore(Pace::Lazy, CALM, || {
        let storage = process();
        let lock = lock_of(&storage, LEASE);
        let guard = lock.lock("o").expect("the lock");
        let (began, waiter) = (Instant::now(), lock.clone());
        let waiter = start(move || {
            waiter.lock("o").expect("the lock").unlock().expect("held");
            began.elapsed()
        });
        server(|server| {
            server.is_tampered = true;
            let row = server.row.as_mut().expect("a row");
            (row.version, row.lease_id, row.lease_end) = (row.version + 1, Uuid::nil(), began + LEASE / 4 + 100 * MS);
        });
        thread::sleep(LEASE / 4);
        assert_no_refresh_thread();
        assert!(!guard.is_held());
        let waited = waiter.join().unwrap();
        // The waiter hears of the loss, and asks when that other lease is over.
        assert!(waited <= LEASE / 4 + 200 * MS, "waited for {waited:?}");
        assert!(matches!(guard.unlock(), Err(Error::LeaseLost { .. })));
        settle(&[&storage]);
    });
}

#[test]
fn a_process_of_which_nobody_waits_any_more_stands_in_no_row() {
    explore(Pace::Lazy, NetworkFaults { delay: 16 * MS, ..CALM }, || {
        let (here, there) = (process(), process());
        let guard = Counted::on(lock_of(&there, LONG_LEASE).lock("o").expect("the lock"));
        let timed: Vec<_> = (0..2)
            .map(|_| {
                let lock = lock_of(&here, LONG_LEASE);
                start(move || {
                    let timeout = [1, 100, 900, 1_000][random() as usize % 4] * MS;
                    if let Some(guard) = lock.try_lock_for("o", timeout).expect("no error") {
                        Counted::on(guard).unlock().expect("held");
                    }
                })
            })
            .collect();
        thread::sleep(1_000 * MS - [0, 1, 2, 16, 17, 32].map(|early| early * MS)[random() as usize % 6]);
        guard.unlock().expect("held");
        for timed in timed {
            timed.join().unwrap();
        }
        settle(&[&here, &there]);
        assert_each_hold_was_ended_once();
        server(|server| assert!(server.row.as_ref().is_some_and(|row| row.waiters.is_empty()), "{:?}", server.row));
    });
}

/// A transaction releases a hold, and is committed or rolled back, early or late, while others wait.
fn released_in_a_transaction() {
    let (here, there) = (process(), process());
    let (losses, began) = (Arc::new(AtomicUsize::new(0)), Instant::now());
    let counted = Arc::clone(&losses);
    // Refreshes so often that one is under way whatever happens.
    let options =
        LockOptions::new("l").lease_expire_after(LONG_LEASE).lease_refresh_interval(20 * MS).on_lost(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
    let guard = StorageLock::with_options(&here, options).expect("a lock").lock("o").expect("the lock");
    let waiters: Vec<_> = [&here, &there]
        .into_iter()
        .map(|storage| {
            let lock = lock_of(storage, LONG_LEASE);
            start(move || {
                Counted::on(lock.lock("o").expect("the lock")).unlock().expect("held");
                began.elapsed()
            })
        })
        .collect();
    thread::sleep([0, 1, 16, 1_000][random() as usize % 4] * MS);
    // Some transactions are rolled back before one is committed, or before the guard is released.
    let (commits, mut longest) = (random().is_multiple_of(2), 5_000 * MS);
    for round in (0..random() % 3).rev() {
        let is_last = round == 0;
        guard.hold.begin_unlocking().expect("one guard, and nobody else");
        thread::sleep([0, 1][random() as usize % 2] * MS);
        assert!(release_in_transaction(&guard.hold.claim) && !guard.is_held());
        thread::sleep([0, 1, 50, 200][random() as usize % 4] * MS);
        // A prepared transaction stays open after its end.
        let (is_prepared, is_answered) = (random().is_multiple_of(4), random().is_multiple_of(2));
        if is_prepared {
            // The time that it is open, and the time until the refresh thread finds out.
            longest += 4_000 * MS;
            assert!(guard.settle(true).is_none() && !guard.is_held(), "not known, and trusted");
        }
        end_transaction(&guard.hold.claim, commits && is_last);
        match commits && is_last {
            // The refresh thread finds the outcome.
            is_committed if is_prepared => {
                let since = Instant::now();
                let outcome = if is_committed { Unlocking::Done } else { Unlocking::No };
                while guard.hold.state().unlocking != outcome {
                    assert!(since.elapsed() < 10_000 * MS, "not found");
                    thread::sleep(20 * MS);
                }
            }
            true if is_answered => guard.unlocked(),
            is_committed => assert_eq!(guard.settle(true), Some(!is_committed), "it finds out"),
        }
        if commits && is_last {
            for _ in 0..random() % 3 {
                assert!(!guard.is_held(), "held after the commit");
                thread::sleep([0, 1, 50, 100][random() as usize % 4] * MS);
            }
        } else {
            assert!(guard.is_held(), "not held again after the rollback");
        }
    }
    let signal = guard.lost();
    guard.unlock().expect("no loss");
    for waiter in waiters {
        // A waiter that isn't notified asks once a second.
        let waited = waiter.join().unwrap();
        assert!(waited <= longest, "waited for {waited:?}");
    }
    assert!(losses.load(Ordering::SeqCst) == 0 && !signal.is_lost(), "told of a loss");
    settle(&[&here, &there]);
}

#[test]
fn a_hold_that_a_transaction_releases_is_over_with_its_commit_and_goes_on_with_its_rollback() {
    explore(Pace::Lazy, NetworkFaults { delay: 16 * MS, ..CALM }, released_in_a_transaction);
}

/// The transaction ends when the lease does, and the answer to its commit is lost.
fn released_in_a_transaction_as_the_lease_ends() {
    let storage = process();
    let losses = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&losses);
    let options =
        LockOptions::new("l").lease_expire_after(LEASE).lease_refresh_interval(LEASE / 4).on_lost(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
    // Time may pass at any moment, even so much that this gives up.
    let Ok(guard) = StorageLock::with_options(&storage, options).expect("a lock").lock("o") else { return };
    guard.hold.begin_unlocking().expect("one guard, and nobody else");
    assert!(release_in_transaction(&guard.hold.claim));
    thread::sleep(LEASE - [400, 200, 50, 0][random() as usize % 4] * MS);
    let is_committed = random().is_multiple_of(2);
    end_transaction(&guard.hold.claim, is_committed);
    assert!(guard.settle(true) != Some(false) || is_committed, "said to be committed");
    thread::sleep(LEASE * (random() % 2));
    let signal = guard.lost();
    match guard.unlock() {
        Ok(()) => assert!(is_committed || !signal.is_lost(), "lost, and said to be released"),
        Err(error) => assert!(!error.is_lease_lost() || signal.is_lost(), "lost, and its signal doesn't know"),
    }
    settle(&[&storage]);
    assert!(losses.load(Ordering::SeqCst) <= 1, "told twice");
}

#[test]
fn of_a_transaction_that_ends_as_the_lease_does_nobody_says_what_is_not_known() {
    explore(Pace::Eager, CALM, released_in_a_transaction_as_the_lease_ends);
}

/// The lease is so long that nobody could wait for its end.
#[test]
fn what_was_taken_too_late_or_by_a_lost_answer_is_given_back() {
    explore(Pace::Lazy, NetworkFaults { delay: 2_000 * MS, losses: 6, ..CALM }, || {
        let storage = process();
        let users: Vec<_> = (0..2)
            .map(|_| {
                let lock = lock_of(&storage, Duration::from_secs(24 * 60 * 60));
                start(move || {
                    for _ in 0..2 {
                        let guard = lock.try_lock_for("o", 100 * MS);
                        drop(guard.ok().flatten().map(|guard| Counted::on(guard).unlock()));
                    }
                })
            })
            .collect();
        for user in users {
            user.join().unwrap();
        }
        settle(&[&storage]);
    });
}
