//! The threads' protocol under a model checker: guards, refresh threads, the line of those who wait, the workers behind them.
//!
//! This is the library itself, not a copy of it. Under `--cfg shuttle` three of its modules are others: [`crate::sync`]
//! gives threads, mutexes, condition variables and the time of the checker, [`crate::connections`] and [`crate::session`] are
//! a toy server, one row behind a network that may be slow or lossy. The row answers as the real one
//! does, which is tested (`the_toy_answers_as_the_server_does`). `scripts/model.sh` runs it.
//!
//! The checker is `shuttle`, which runs one thread at a time and chooses, at random (uniformly, or by PCT: few changes between threads
//! at the worst moments), who goes on at each step. `loom` would try all orders, and so promise more, but of much less: it bounds a model
//! to five threads, where one contended lock here takes eight and thousands of steps; its `Condvar` never times out; and it
//! has to replace `Arc` too, whose `self: &Arc<Self>` and unsized uses the library has.
//!
//! Neither knows time. Here it is a number that a thread of the model moves, see [`crate::sync`]: lazily, so that whoever
//! waits longer than it has to is found out by the clock; or eagerly, as if threads were stopped at any point for any time,
//! where only what must always be true is asked.
//!
//! What the checks ask of each execution:
//! - Whenever a statement was served, no hold is trusted that isn't the row's ([`check`]); what was not trusted never is again.
//! - No thread hangs: `shuttle` finds a deadlock, and [`settle`] a thread of the library that doesn't end.
//! - With a lazy clock: nobody waits for longer than the scenario says. Each hold is ended once.
//!
//! Bugs planted by hand, each found within seconds, and by whom; where several found it, the one that it is the matter of:
//!
//! | bug | found by |
//! | --- | --- |
//! | `Lines::hand` doesn't wake the waiter; `end_hold` doesn't tell the head | `a_line_of_threads_passes_the_lock_on_without_a_pause` |
//! | `Hold::leave` doesn't notify the refresh thread | `a_line_of_threads_passes_the_lock_on_without_a_pause` |
//! | what the head is told while it asks is forgotten | `processes_hear_of_each_others_releases` |
//! | `Place::leave` doesn't wake the next head | `who_stands_behind_a_head_that_gives_up_asks_in_its_place` |
//! | `Place::leave` reads `handed` before it takes the mutex | `what_was_taken_too_late_or_by_a_lost_answer_is_given_back` |
//! | `Lines::hand` leaves a hold that nobody took up open to re-entry | `who_gives_up_as_the_lock_comes_neither_keeps_it_nor_leaks_it` |
//! | the waiter forgets that a guard has its hold (`has_hold`) | `who_gives_up_as_the_lock_comes_neither_keeps_it_nor_leaks_it` |
//! | a hold without guards may be entered again | `a_hold_is_entered_again_or_released_and_never_both` |
//! | the refresh loop doesn't look at the deadline | `a_hold_whose_refreshes_are_never_answered_is_over_at_its_deadline` |
//! | `Hold::refreshed` doesn't notify; a loss is not told to the line | `a_hold_that_the_server_does_not_know_is_over_with_the_next_refresh` |
//! | a deadline counts from the answer | `what_a_guard_says_is_true_when_threads_are_stopped` |
//! | `Term::extend` revives a hold that is over | `what_a_guard_says_is_true_whatever_gets_lost_or_late` |
//! | who left the line is not withdrawn from the row | `a_process_of_which_nobody_waits_any_more_stands_in_no_row` |
//! | a commit that releases the hold doesn't tell the line; the hold is trusted until then; an answer from before it is a loss | `a_hold_that_a_transaction_releases_is_over_with_its_commit_and_goes_on_with_its_rollback` |
//! | what isn't there any more at the end of the lease is taken for committed, by who asks or by a refresh; what `unlock` says is lost, its signal doesn't; a commit that a refresh has found out is not told to the line | `of_a_transaction_that_ends_as_the_lease_does_nobody_says_what_is_not_known` |
//! | a lock that was taken too late for its caller is not undone | `what_was_taken_too_late_or_by_a_lost_answer_is_given_back` |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::env;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, Runner};
use uuid::Uuid;

use crate::answer::LOOK;
use crate::hold::Unlocking;
use crate::session::{Weather, check, end_transaction, release_in_transaction, server, start_server};
use crate::sql::{GRACE, STEP};
use crate::sync::{CLOCK_TASK, Instant, Pace, live_threads, random, start_clock, stop_clock, thread};
use crate::toy::Row;
use crate::{Error, LockGuard, LockOptions, PostgresStorage, PostgresStorageOptions, Result, StorageLock};

const MS: Duration = Duration::from_millis(1);
const LEASE: Duration = Duration::from_secs(2);
const LONG_LEASE: Duration = Duration::from_secs(30);
const CALM: Weather =
    Weather { delay: Duration::ZERO, losses: 0, lost_refreshes: 0, lost_notifications: 0, is_deaf: false };
const DEAF: Weather = Weather { is_deaf: true, ..CALM };

/// A scheduler that keeps the clock's thread for when no other one can go on, or, if time passes eagerly, now and then.
struct Timed<S> {
    inner: S,
    pace: Pace,
    random: u64,
}

impl<S: Scheduler> Timed<S> {
    /// Where time passes eagerly, once in so many steps.
    const EAGERNESS: u64 = 64;

    fn new(inner: S, pace: Pace) -> Timed<S> {
        Timed { inner, pace, random: 0 }
    }

    /// Numbers of its own: those of `inner` are recorded with the schedule.
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

/// Runs a scenario for a while under as many schedules as that makes, half of them at random, or replays one.
fn explore(pace: Pace, weather: Weather, scenario: fn()) {
    let run = move || {
        start_server(weather);
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
    // Past the capture of what a test prints: a run shows how much it has seen.
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    writeln!(io::stdout(), "{name}: {at_random} schedules at random, {by_pct} by PCT").expect("a terminal");
}

/// One of the processes that share the server.
fn process() -> PostgresStorage {
    loop {
        // Nobody is spared by the weather.
        if let Ok(storage) = PostgresStorage::new(PostgresStorageOptions::from_dsn("host=toy")) {
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

/// A guard that somebody counts on: until it is given back, what it says is checked at every statement.
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

/// Waits until no thread of the library is left. That the lines are empty, too, is asked of storages that are kept.
fn settle(storages: &[&PostgresStorage]) {
    let start = Instant::now();
    while !live_threads().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(3_600), "still run: {:?}", live_threads());
        thread::sleep(20_000 * MS);
    }
    for storage in storages {
        assert!(storage.lines().is_empty(), "a line is left behind");
    }
    let now = Instant::now();
    server(|server| {
        let is_left = |row: &Row| row.released_at.is_none() && row.lease_end > now;
        assert!(!server.row.as_ref().is_some_and(is_left), "held for nobody: {:?}", server.row);
    });
}

/// In a calm there is no reason to end a hold twice.
fn assert_each_hold_was_ended_once() {
    server(|server| assert!(server.ends.values().all(|ends| *ends == 1), "ended so often: {:?}", server.ends));
}

/// Nothing keeps a hold's thread for longer than this moment.
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
    let weather = Weather { delay: LEASE / 2, losses: 10, lost_refreshes: 4, ..CALM };
    explore(Pace::Eager, weather, whatever_happens);
}

#[test]
fn what_a_guard_says_is_true_when_threads_are_stopped() {
    explore(Pace::Eager, CALM, whatever_happens);
}

#[test]
fn what_a_guard_says_is_true_when_all_refreshes_are_lost() {
    explore(Pace::Lazy, Weather { delay: 3 * LEASE, lost_refreshes: 2, ..DEAF }, whatever_happens);
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

/// It first has to begin to listen.
#[test]
fn processes_hear_of_each_others_releases() {
    explore(Pace::Lazy, Weather { delay: 16 * MS, ..CALM }, || {
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

/// The lock is the first process's, and a thread of each other one waits for it.
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

/// Dead processes stand in the row, before, between and behind those who live.
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
        // Where the first two and the last are dead, nobody is notified who lives: then somebody looks. Each of the two who live may have
        // dead ones before it.
        let most = LOOK + 2 * (GRACE + 50 * MS + 6 * STEP);
        assert!(released.elapsed() <= most, "free beside them: {:?}", released.elapsed());
        settle(&storages.each_ref());
    });
}

/// No notification can be relied on, and who frees a lock by hand sends none.
#[test]
fn a_lock_is_found_free_by_whoever_looks_although_nobody_is_notified() {
    explore(Pace::Lazy, Weather { lost_notifications: 2, ..CALM }, || {
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
        assert!(freed.elapsed() <= 2 * LOOK + 2 * GRACE, "free beside them: {:?}", freed.elapsed());
        settle(&storages.each_ref());
    });
}

fn giving_up_when_it_comes() {
    let storage = process();
    let lock = lock_of(&storage, LONG_LEASE);
    let began = Instant::now();
    let guard = Counted::on(lock.lock("o").expect("the lock"));
    let hurried = lock.clone();
    let hurried = start(move || {
        let mut guard = hurried.try_lock_for("o", 1_000 * MS).expect("no error");
        for _ in 0..4 {
            // What it didn't take up is not its own, also while it is being ended.
            guard = if guard.is_some() { guard } else { hurried.try_lock("o").expect("no error") };
        }
        if let Some(guard) = guard {
            Counted::on(guard).unlock().expect("held");
        }
    });
    let patient = lock.clone();
    let patient = start(move || {
        Counted::on(patient.lock("o").expect("the lock")).unlock().expect("held");
    });
    // The answer to the hand-over comes at the very moment at which the patience ends, or nearly so.
    thread::sleep(1_000 * MS - [0, 1, 16][random() as usize % 3] * MS);
    guard.unlock().expect("held");
    hurried.join().unwrap();
    patient.join().unwrap();
    assert!(began.elapsed() <= 1_300 * MS, "the patient one waited for {:?}", began.elapsed());
    assert_no_refresh_thread();
    assert_each_hold_was_ended_once();
    settle(&[&storage]);
}

#[test]
fn who_gives_up_as_the_lock_comes_neither_keeps_it_nor_leaks_it() {
    explore(Pace::Lazy, Weather { delay: 16 * MS, ..CALM }, giving_up_when_it_comes);
}

#[test]
fn who_stands_behind_a_head_that_gives_up_asks_in_its_place() {
    explore(Pace::Lazy, DEAF, || {
        let (here, there) = (process(), process());
        let guard = Counted::on(lock_of(&there, LONG_LEASE).lock("o").expect("the lock"));
        let began = Instant::now();
        let (hurried, patient) = (lock_of(&here, LONG_LEASE), lock_of(&here, LONG_LEASE));
        let hurried = start(move || hurried.try_lock_for("o", 1_000 * MS).expect("no error").is_none());
        let patient = start(move || {
            Counted::on(patient.lock("o").expect("the lock")).unlock().expect("held");
        });
        thread::sleep(2_000 * MS);
        guard.unlock().expect("held");
        assert!(hurried.join().unwrap(), "it got the lock");
        patient.join().unwrap();
        // Nobody tells, so it asks once a second.
        assert!(began.elapsed() <= 3_000 * MS, "the patient one waited for {:?}", began.elapsed());
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
        // The guard goes to another thread, which gives it back while this one enters again.
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
    explore(Pace::Lazy, Weather { lost_refreshes: 1, ..CALM }, || {
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
        // Although the guard is still there.
        assert_no_refresh_thread();
        // A refresh whose answer was lost may have been served.
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
        // It hears of the loss, and asks when that other lease is over.
        assert!(waited <= LEASE / 4 + 200 * MS, "waited for {waited:?}");
        assert!(matches!(guard.unlock(), Err(Error::LeaseLost { .. })));
        settle(&[&storage]);
    });
}

#[test]
fn a_process_of_which_nobody_waits_any_more_stands_in_no_row() {
    explore(Pace::Lazy, Weather { delay: 16 * MS, ..CALM }, || {
        let (here, there) = (process(), process());
        let guard = Counted::on(lock_of(&there, LONG_LEASE).lock("o").expect("the lock"));
        let hurried: Vec<_> = (0..2)
            .map(|_| {
                let lock = lock_of(&here, LONG_LEASE);
                start(move || {
                    let patience = [1, 100, 900, 1_000][random() as usize % 4] * MS;
                    if let Some(guard) = lock.try_lock_for("o", patience).expect("no error") {
                        Counted::on(guard).unlock().expect("held");
                    }
                })
            })
            .collect();
        thread::sleep(1_000 * MS - [0, 1, 2, 16, 17, 32].map(|early| early * MS)[random() as usize % 6]);
        guard.unlock().expect("held");
        for hurried in hurried {
            hurried.join().unwrap();
        }
        settle(&[&here, &there]);
        assert_each_hold_was_ended_once();
        server(|server| assert!(server.row.as_ref().is_some_and(|row| row.waiters.is_empty()), "{:?}", server.row));
    });
}

/// A hold is released by a transaction that is committed or rolled back, early or late, while others wait; its guard is kept, or goes.
fn released_in_a_transaction() {
    let (here, there) = (process(), process());
    let (losses, began) = (Arc::new(AtomicUsize::new(0)), Instant::now());
    let counted = Arc::clone(&losses);
    // Refreshed so often that a refresh is under way whatever happens.
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
    // Some of them are rolled back before one is committed, or the guard released.
    let (commits, mut longest) = (random().is_multiple_of(2), 5_000 * MS);
    for turn in (0..random() % 3).rev() {
        let is_last = turn == 0;
        guard.hold.begin_unlocking().expect("one guard, and nobody else");
        thread::sleep([0, 1][random() as usize % 2] * MS);
        assert!(release_in_transaction(&guard.hold.claim) && !guard.is_held());
        thread::sleep([0, 1, 50, 200][random() as usize % 4] * MS);
        // Prepared, it is open after its end.
        let (is_prepared, is_answered) = (random().is_multiple_of(4), random().is_multiple_of(2));
        if is_prepared {
            // That, and until it is found out.
            longest += 4_000 * MS;
            assert!(guard.settle(true).is_none() && !guard.is_held(), "not known, and trusted");
        }
        end_transaction(&guard.hold.claim, commits && is_last);
        match commits && is_last {
            // The refresh thread finds out.
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
        // Who isn't told asks once a second.
        let waited = waiter.join().unwrap();
        assert!(waited <= longest, "waited for {waited:?}");
    }
    assert!(losses.load(Ordering::SeqCst) == 0 && !signal.is_lost(), "told of a loss");
    settle(&[&here, &there]);
}

#[test]
fn a_hold_that_a_transaction_releases_is_over_with_its_commit_and_goes_on_with_its_rollback() {
    explore(Pace::Lazy, Weather { delay: 16 * MS, ..CALM }, released_in_a_transaction);
}

/// The transaction ends as the lease does, and the answer to its commit is lost.
fn released_in_a_transaction_as_the_lease_ends() {
    let storage = process();
    let losses = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&losses);
    let options =
        LockOptions::new("l").lease_expire_after(LEASE).lease_refresh_interval(LEASE / 4).on_lost(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
    // Time may pass at any moment, also until it gives up.
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

/// With a lease that nobody would like to wait for.
#[test]
fn what_was_taken_too_late_or_by_a_lost_answer_is_given_back() {
    explore(Pace::Lazy, Weather { delay: 2_000 * MS, losses: 6, ..CALM }, || {
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
