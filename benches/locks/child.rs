//! Other processes: this binary runs itself again, in a role.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::server::Table;

/// Role, DSN, table and arguments, a line each.
const ROLE: &str = "STORAGE_LOCK_BENCH_ROLE";
/// No child takes this long over anything that it was asked for.
const BOUND: Duration = Duration::from_secs(300);

/// What a child does that is given a table and arguments.
pub type Run = fn(&Table, &[&str]);

/// Does what a child is to do, if this process is one. Each role has a name.
pub fn run(roles: &[(&str, Run)]) -> bool {
    let Ok(value) = std::env::var(ROLE) else { return false };
    let lines: Vec<&str> = value.split('\n').collect();
    let [role, dsn, table, arguments @ ..] = lines.as_slice() else { panic!("{ROLE} says too little") };
    let table = Table::of(dsn, table);
    let Some((_, run)) = roles.iter().find(|(name, _)| name == role) else { panic!("{ROLE}: unknown role {role:?}") };
    run(&table, arguments);
    true
}

/// In a child: tells the parent something.
pub fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// In a child: what the parent tells it; none if the parent has gone.
pub fn hear() -> Option<String> {
    std::io::stdin().lock().lines().next()?.ok()
}

/// A process in a role. Killed when dropped.
pub struct Process {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Process {
    pub fn start(role: &str, dsn: &str, table: &Table, arguments: &[String]) -> Process {
        let lines: Vec<&str> =
            [role, dsn, &table.name].into_iter().chain(arguments.iter().map(String::as_str)).collect();
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .env(ROLE, lines.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a process");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let stdin = child.stdin.take().expect("piped");
        Process { child, stdin, lines }
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("talk to the child");
    }

    /// The next line that it says; none if it has ended.
    pub fn next_line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(BOUND) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the child said nothing for {BOUND:?}"),
        }
    }

    pub fn expect_line(&mut self) -> String {
        self.next_line().expect("the child has ended too early")
    }

    /// Whether it goes on, and has said nothing since it was last asked.
    pub fn is_silent(&mut self) -> bool {
        self.lines.try_recv().is_err() && self.child.try_wait().expect("look at the child").is_none()
    }

    /// Waits for its end, which has to be a good one.
    pub fn finish(mut self) {
        let status = self.child.wait().expect("wait for the child");
        assert!(status.success(), "a child failed: {status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
