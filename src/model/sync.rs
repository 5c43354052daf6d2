//! Mutexes, condition variables, threads, time and random numbers of the model checker.
//!
//! Time is a number. Only the [`clock`](run_clock), a thread of the model, moves it: from the end of one timed wait
//! to the end of the next. So a wait of half a minute takes no time, and things that may happen at the same moment
//! do. The scheduler decides how soon the clock moves: see [`Pace`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, AddAssign, Sub};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use shuttle::rand::{RngCore, thread_rng};
pub(crate) use shuttle::sync::{Mutex, MutexGuard};

/// An instant of the model's time, which begins anew with each execution. It has those methods of the real one that the
/// library uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    /// Late enough to have instants before it.
    const START: Instant = Instant(Duration::from_secs(1_000_000));

    /// Time may pass right after this reads it: the scheduler may let another thread run here.
    pub fn now() -> Instant {
        shuttle::thread::sleep(Duration::ZERO);
        CLOCK.with_borrow(|clock| clock.now)
    }

    pub fn elapsed(&self) -> Duration {
        Instant::now().duration_since(*self)
    }

    pub fn duration_since(&self, earlier: Instant) -> Duration {
        self.saturating_duration_since(earlier)
    }

    pub fn saturating_duration_since(&self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub fn checked_add(&self, duration: Duration) -> Option<Instant> {
        self.0.checked_add(duration).map(Instant)
    }

    pub fn checked_sub(&self, duration: Duration) -> Option<Instant> {
        self.0.checked_sub(duration).map(Instant)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0 + duration)
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, duration: Duration) -> Instant {
        Instant(self.0 - duration)
    }
}

impl Sub<Instant> for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.duration_since(earlier)
    }
}

/// A random number.
pub(crate) fn random() -> u32 {
    thread_rng().next_u32()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The checker's condition variable, shared with the clock. The clock ends timed waits by a notification of its own.
#[derive(Clone, Debug)]
pub(crate) struct Condvar(Arc<shuttle::sync::Condvar>);

impl Condvar {
    pub(crate) fn new() -> Condvar {
        Condvar(Arc::new(shuttle::sync::Condvar::new()))
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

impl Default for Condvar {
    fn default() -> Condvar {
        Condvar::new()
    }
}

pub(crate) fn wait_until<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, until: Instant) -> MutexGuard<'a, T> {
    let Some(timer) = CLOCK.with_borrow_mut(|clock| clock.start(condvar, until)) else { return guard };
    wake_clock();
    let guard = condvar.0.wait(guard).unwrap_or_else(PoisonError::into_inner);
    CLOCK.with_borrow_mut(|clock| clock.timers.remove(&timer));
    guard
}

/// How soon time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Time passes only when all threads wait. So all time that passes is time that somebody waited for.
    Lazy,
    /// Time passes even while threads could run, as if those threads were stopped for long.
    Eager,
}

thread_local! {
    /// The clock of the current execution, all of whose threads run on one thread of the system.
    static CLOCK: RefCell<Clock> = RefCell::new(Clock::new(Pace::Lazy));
}

struct Clock {
    now: Instant,
    pace: Pace,
    /// The timed waits, by their end. A wait removes itself.
    timers: BTreeMap<(Instant, u64), Condvar>,
    next_timer: u64,
    thread: Option<shuttle::thread::Thread>,
    /// How many threads of the library run, by name.
    live: BTreeMap<String, usize>,
    is_over: bool,
}

impl Clock {
    fn new(pace: Pace) -> Clock {
        Clock {
            now: Instant::START,
            pace,
            timers: BTreeMap::new(),
            next_timer: 0,
            thread: None,
            live: BTreeMap::new(),
            is_over: false,
        }
    }

    fn start(&mut self, condvar: &Condvar, until: Instant) -> Option<(Instant, u64)> {
        if until <= self.now {
            return None;
        }
        let timer = (until, self.next_timer);
        self.next_timer += 1;
        self.timers.insert(timer, condvar.clone());
        Some(timer)
    }

    /// Moves the time, and returns whom to wake. A wait whose end has come is woken again and again, because its
    /// thread may have been just about to wait. A lazy clock stands still until all of those have woken.
    fn tick(&mut self) -> Vec<Condvar> {
        let is_due = |(until, _): &(Instant, u64)| *until <= self.now;
        let is_anybody_due = self.timers.keys().next().is_some_and(is_due);
        if !is_anybody_due || self.pace == Pace::Eager {
            let next = self.timers.keys().map(|(until, _)| *until).find(|until| *until > self.now);
            self.now = next.unwrap_or(self.now);
        }
        self.timers.range(..=(self.now, u64::MAX)).map(|(_, condvar)| condvar.clone()).collect()
    }
}

/// Starts the clock of an execution. It has to be the first thread that the execution starts: see [`CLOCK_TASK`].
pub(crate) fn start_clock(pace: Pace) {
    CLOCK.set(Clock::new(pace));
    let clock = shuttle::thread::spawn(run_clock);
    CLOCK.with_borrow_mut(|current| current.thread = Some(clock.thread().clone()));
}

/// The number of the clock's task: the second one, after that of the test.
pub(crate) const CLOCK_TASK: usize = 1;

fn run_clock() {
    loop {
        let (is_idle, is_over) =
            CLOCK.with_borrow(|clock| (clock.timers.is_empty(), clock.is_over && clock.live.is_empty()));
        if is_over {
            return;
        }
        if is_idle {
            // If all other threads wait, too, and without a timeout, the checker reports a deadlock.
            shuttle::thread::park();
        } else {
            CLOCK.with_borrow_mut(Clock::tick).iter().for_each(Condvar::notify_all);
            shuttle::thread::yield_now();
        }
    }
}

fn wake_clock() {
    if let Some(clock) = CLOCK.with_borrow(|clock| clock.thread.clone()) {
        clock.unpark();
    }
}

/// Lets the clock end, as soon as the library's threads have ended.
pub(crate) fn stop_clock() {
    CLOCK.with_borrow_mut(|clock| clock.is_over = true);
    wake_clock();
}

/// How many threads of the library run, by name.
pub(crate) fn live_threads() -> BTreeMap<String, usize> {
    CLOCK.with_borrow(|clock| clock.live.clone())
}

pub(crate) mod thread {
    use std::io;

    pub(crate) use shuttle::thread::{JoinHandle, ThreadId, current, panicking, scope};

    use super::*;

    pub(crate) fn sleep(duration: Duration) {
        let (nobody, until) = (Condvar::new(), Instant::now() + duration);
        let nothing = Mutex::new(());
        let mut guard = lock(&nothing);
        while Instant::now() < until {
            guard = wait_until(&nobody, guard, until);
        }
    }

    /// Starts threads, and counts those that run.
    #[derive(Default)]
    pub(crate) struct Builder {
        name: String,
    }

    impl Builder {
        pub(crate) fn new() -> Builder {
            Builder::default()
        }

        pub(crate) fn name(self, name: String) -> Builder {
            Builder { name }
        }

        /// Does nothing: all stacks of the checker have one size.
        pub(crate) fn stack_size(self, _: usize) -> Builder {
            self
        }

        pub(crate) fn spawn<T: Send + 'static>(
            self,
            run: impl FnOnce() -> T + Send + 'static,
        ) -> io::Result<JoinHandle<T>> {
            let live = Live::new(&self.name);
            shuttle::thread::Builder::new().name(self.name).spawn(move || {
                let value = run();
                drop(live);
                value
            })
        }
    }

    struct Live(String);

    impl Live {
        fn new(name: &str) -> Live {
            CLOCK.with_borrow_mut(|clock| *clock.live.entry(name.to_owned()).or_default() += 1);
            Live(name.to_owned())
        }
    }

    impl Drop for Live {
        fn drop(&mut self) {
            CLOCK.with_borrow_mut(|clock| {
                let count = clock.live.entry(std::mem::take(&mut self.0)).or_default();
                *count -= 1;
                clock.live.retain(|_, count| *count > 0);
            });
            wake_clock();
        }
    }
}
