//! What threads share, time, and chance, as the model checker has them.
//!
//! Time is a number that only the [`clock`](run_clock) moves, a thread of the model: from one end of a timed wait to the next.
//! So a wait of half a minute takes nothing, and what may happen "at the same moment" does. How soon the clock moves is the
//! scheduler's to say, see [`Pace`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, AddAssign, Sub};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use shuttle::rand::{RngCore, thread_rng};
pub(crate) use shuttle::sync::{Mutex, MutexGuard};

/// An instant of the model's time, which begins anew with each execution; with what the library uses of the real one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    /// So that there is a time before.
    const START: Instant = Instant(Duration::from_secs(1_000_000));

    /// Time may pass right after it was read: the scheduler may let another thread go on here.
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

/// Any number.
pub(crate) fn random() -> u32 {
    thread_rng().next_u32()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The checker's, shared with the clock, which ends timed waits by a notification of its own.
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
    /// Only when all threads wait: what takes time has waited for it.
    Lazy,
    /// Also while threads could go on, which is what happens to threads that are stopped for long.
    Eager,
}

thread_local! {
    /// Of the execution that runs; all its threads are on one of the system's.
    static CLOCK: RefCell<Clock> = RefCell::new(Clock::new(Pace::Lazy));
}

struct Clock {
    now: Instant,
    pace: Pace,
    /// The timed waits, by when they end; a wait takes itself out.
    timers: BTreeMap<(Instant, u64), Condvar>,
    next_timer: u64,
    thread: Option<shuttle::thread::Thread>,
    /// The threads of the library, by name.
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

    /// Moves on, and says who is to be woken. One whose time has come is woken again and again, because it may have been
    /// just about to wait; a lazy clock stands still until all of them have woken.
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

/// Starts the time of an execution. The clock has to be the first thread that it starts: see [`CLOCK_TASK`].
pub(crate) fn start_clock(pace: Pace) {
    CLOCK.set(Clock::new(pace));
    let clock = shuttle::thread::spawn(run_clock);
    CLOCK.with_borrow_mut(|of| of.thread = Some(clock.thread().clone()));
}

/// The clock's task: the second one, after that of the test.
pub(crate) const CLOCK_TASK: usize = 1;

fn run_clock() {
    loop {
        let (is_idle, is_over) =
            CLOCK.with_borrow(|clock| (clock.timers.is_empty(), clock.is_over && clock.live.is_empty()));
        if is_over {
            return;
        }
        if is_idle {
            // Where all others wait too, and not for a time, the checker calls it a deadlock.
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

/// The test is over when the library's threads are.
pub(crate) fn stop_clock() {
    CLOCK.with_borrow_mut(|clock| clock.is_over = true);
    wake_clock();
}

/// The library's threads that run.
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

    /// Counts the threads that it starts.
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

        /// The checker's stacks are all alike.
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
