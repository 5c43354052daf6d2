//! The worker processes of a run: started, told, hurt, started again, and seen to end.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::history::{Life, LifeEnd, now};
use crate::support::ms;
use crate::workload::{ABANDONED, IN_A_WRITE, PREFIX, Setting, WORKER};

pub struct Workers {
    /// Of each worker; the number of the process is filled in.
    settings: Vec<Setting>,
    folder: PathBuf,
    /// What moves a worker's wall clock, and by which file it is told: see [`wall_clock`].
    clock: Option<(usize, PathBuf, PathBuf)>,
    slots: Vec<Mutex<Slot>>,
    lives: Mutex<Vec<Life>>,
    /// What processes have said: that a thread has taken every lock after the last fault, that all have given
    /// everything back.
    said: Arc<Mutex<HashSet<(usize, String)>>>,
    is_calm: Mutex<bool>,
}

/// The process that a worker is now, if there is one.
#[derive(Default)]
struct Slot(Option<(usize, Child)>);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The library that moves a process's wall clock, where it is installed.
pub fn wall_clock() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path()).chain(["/usr/lib".into()]);
    folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1")).find(|library| library.exists())
}

/// Where a process writes its history.
pub fn history_of(folder: &Path, process: usize) -> PathBuf {
    folder.join(format!("p{process}.jsonl"))
}

impl Workers {
    pub fn start(settings: Vec<Setting>, folder: &Path, clock: Option<(usize, PathBuf, PathBuf)>) -> Workers {
        let workers = Workers {
            slots: settings.iter().map(|_| Mutex::default()).collect(),
            settings,
            folder: folder.to_owned(),
            clock,
            lives: Mutex::default(),
            said: Arc::default(),
            is_calm: Mutex::default(),
        };
        for worker in 0..workers.slots.len() {
            workers.start_again(worker);
        }
        workers
    }

    fn stderr(&self, process: usize) -> PathBuf {
        self.folder.join(format!("p{process}.stderr"))
    }

    pub fn start_again(&self, worker: usize) {
        let mut slot = locked(&self.slots[worker]);
        if slot.0.is_some() {
            return;
        }
        let mut setting = self.settings[worker].clone();
        let process = {
            let mut lives = locked(&self.lives);
            // Those that only wait have nothing to recover.
            let (begin, threads) = (now(), if setting.only_waits { 0 } else { setting.threads });
            lives.push(Life { worker, begin, end: None, ending: None, threads, left: None, said: String::new() });
            lives.len() - 1
        };
        setting.process = process;
        setting.history = history_of(&self.folder, process);
        let mut command = Command::new(std::env::current_exe().expect("this binary"));
        command
            .args(["--exact", "workload::worker_process", "--nocapture", "--test-threads=1"])
            .env(WORKER, serde_json::to_string(&setting).expect("a setting"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(self.stderr(process)).expect("create a file"));
        if let Some((_, library, file)) = self.clock.as_ref().filter(|(moved, ..)| *moved == worker) {
            command
                .env("LD_PRELOAD", library)
                .env("FAKETIME_TIMESTAMP_FILE", file)
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        let mut child = command.spawn().expect("start a worker");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let all_said = Arc::clone(&self.said);
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some((_, said)) = line.split_once(PREFIX) {
                    locked(&all_said).insert((process, said.to_owned()));
                }
            }
        });
        if *locked(&self.is_calm) {
            say(&mut child, "calm");
        }
        slot.0 = Some((process, child));
    }

    /// Kills workers at the same moment.
    pub fn kill(&self, workers: &[usize]) {
        let mut slots: Vec<_> = workers.iter().map(|worker| locked(&self.slots[*worker])).collect();
        slots.iter_mut().for_each(|slot| {
            self.see_end(slot);
        });
        let mut killed: Vec<(usize, Child)> = slots.iter_mut().filter_map(|slot| slot.0.take()).collect();
        let before = now();
        for (_, child) in &mut killed {
            child.kill().expect("kill a worker");
        }
        for (process, child) in &mut killed {
            child.wait().expect("wait for a worker");
            let mut lives = locked(&self.lives);
            (lives[*process].end, lives[*process].ending) = (Some(before), Some(LifeEnd::Killed));
        }
    }

    /// The workers that only wait, or the others.
    pub fn which(&self, only_wait: bool) -> Vec<usize> {
        (0..self.settings.len()).filter(|worker| self.settings[*worker].only_waits == only_wait).collect()
    }

    pub fn signal(&self, worker: usize, signal: Signal) {
        if let Some((_, child)) = &locked(&self.slots[worker]).0 {
            kill(Pid::from_raw(child.id().cast_signed()), signal).ok();
        }
    }

    pub fn tell(&self, worker: usize, line: &str) {
        if let Some((_, child)) = &mut locked(&self.slots[worker]).0 {
            say(child, line);
        }
    }

    /// Waits until a thread of a worker has written and not committed yet, until `bound` is over.
    pub fn wait_for_a_write(&self, worker: usize, bound: Duration) {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let line = format!("{IN_A_WRITE}{}", NUMBERS.fetch_add(1, Ordering::SeqCst));
        self.tell(worker, &line);
        let start = Instant::now();
        while start.elapsed() < bound && !locked(&self.said).iter().any(|(_, said)| *said == line) {
            thread::sleep(ms(2));
        }
    }

    /// Starts those again that ended by themselves.
    pub fn look_after(&self) {
        for worker in 0..self.slots.len() {
            let has_ended = self.see_end(&mut locked(&self.slots[worker]));
            if has_ended {
                self.start_again(worker);
            }
        }
    }

    /// Whether it was there, and has ended by itself.
    fn see_end(&self, slot: &mut Slot) -> bool {
        let Some((process, child)) = &mut slot.0 else { return false };
        let Some(status) = child.try_wait().expect("look after a worker") else { return false };
        let mut lives = locked(&self.lives);
        lives[*process].end = Some(now());
        lives[*process].ending = Some(match status.code() {
            Some(0) => LifeEnd::Stopped,
            Some(ABANDONED) => LifeEnd::Abandoned,
            code => LifeEnd::Other(code.unwrap_or(-1)),
        });
        slot.0 = None;
        true
    }

    /// There are no more faults: waits until each thread has taken every lock, until `bound` is over.
    pub fn calm_down(&self, bound: Duration) {
        *locked(&self.is_calm) = true;
        for worker in 0..self.slots.len() {
            self.tell(worker, "calm");
        }
        self.wait(bound, |worker| {
            self.look_after();
            (1..=self.settings[worker].threads).map(|thread| format!("calm {thread}")).collect()
        });
    }

    /// Tells all to stop, and waits until they have given everything back, until `bound` is over.
    pub fn stop(&self, bound: Duration) {
        for worker in 0..self.slots.len() {
            self.tell(worker, "stop");
        }
        self.wait(bound, |_| vec!["quiet".to_owned()]);
    }

    /// Waits until each worker that is there has said all that is expected of it.
    fn wait(&self, bound: Duration, expected: impl Fn(usize) -> Vec<String>) {
        let start = Instant::now();
        let has_said = |worker: usize| {
            let expected = expected(worker);
            let process = locked(&self.slots[worker]).0.as_ref().map(|(process, _)| *process);
            let said = locked(&self.said);
            process.is_none_or(|process| expected.into_iter().all(|line| said.contains(&(process, line))))
        };
        while start.elapsed() < bound && !(0..self.slots.len()).all(has_said) {
            thread::sleep(ms(10));
        }
    }

    /// Waits for all to end, kills those who don't, and returns the lives of all.
    pub fn end(self, bound: Duration) -> Vec<Life> {
        let start = Instant::now();
        let has_ended = |workers: &Workers| {
            workers.slots.iter().for_each(|slot| {
                workers.see_end(&mut locked(slot));
            });
            workers.slots.iter().all(|slot| locked(slot).0.is_none())
        };
        while !has_ended(&self) && start.elapsed() < bound {
            thread::sleep(ms(10));
        }
        let mut lives = locked(&self.lives).clone();
        for slot in &self.slots {
            if let Some((process, _)) = &locked(slot).0 {
                lives[*process].ending = Some(LifeEnd::Other(-1));
            }
        }
        for (process, life) in lives.iter_mut().enumerate() {
            life.said = std::fs::read_to_string(self.stderr(process)).unwrap_or_default();
        }
        lives
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Some((_, mut child)) = locked(slot).0.take() {
                child.kill().ok();
                child.wait().ok();
            }
        }
    }
}

fn say(child: &mut Child, line: &str) {
    // One that has just ended hears nothing.
    let stdin = child.stdin.as_mut().expect("piped");
    stdin.write_all(format!("{line}\n").as_bytes()).ok();
}
