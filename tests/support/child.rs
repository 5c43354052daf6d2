//! Other processes: this test binary runs itself again, as one of the roles in [`crate::roles`].

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Table;

const ROLE: &str = "STORAGE_LOCK_TEST_ROLE";
const PREFIX: &str = "child: ";

/// A process in a role. Killed when dropped.
pub struct Process {
    child: Child,
    lines: Receiver<String>,
    stdin: Option<ChildStdin>,
}

impl Process {
    pub fn start(role: &str, table: &Table, arguments: &[&str]) -> Process {
        Process::start_with_stderr(role, table, arguments, Stdio::inherit())
    }

    pub fn start_with_stderr(role: &str, table: &Table, arguments: &[&str], stderr: Stdio) -> Process {
        Process::start_by(Command::new(std::env::current_exe().expect("this binary")), role, table, arguments, stderr)
    }

    /// Where other names are known to it, if such a process can be started here.
    pub fn start_with_hosts(hosts: &Path, role: &str, table: &Table, arguments: &[&str]) -> Option<Process> {
        let unshare = |command: &str| {
            let mut unshare = Command::new("unshare");
            unshare.args(["--map-root-user", "--mount", "sh", "-c"]);
            unshare.arg(format!("mount --bind \"$0\" /etc/hosts && {command}")).arg(hosts);
            unshare
        };
        if !unshare("true").stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return None;
        }
        let mut command = unshare("exec \"$@\"");
        command.arg(std::env::current_exe().expect("this binary"));
        Some(Process::start_by(command, role, table, arguments, Stdio::inherit()))
    }

    /// As a user without a name, if such a process can be started here.
    pub fn start_nameless(role: &str, table: &Table, arguments: &[&str]) -> Option<Process> {
        let unshare = |program: &std::ffi::OsStr| {
            let mut unshare = Command::new("unshare");
            unshare.args(["--user", "--map-user=12345"]).arg(program);
            unshare
        };
        if !unshare("true".as_ref()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return None;
        }
        let command = unshare(std::env::current_exe().expect("this binary").as_ref());
        Some(Process::start_by(command, role, table, arguments, Stdio::inherit()))
    }

    fn start_by(mut command: Command, role: &str, table: &Table, arguments: &[&str], stderr: Stdio) -> Process {
        let mut child = command
            .args(["--exact", "roles::child_process", "--nocapture", "--test-threads=1"])
            .env(
                ROLE,
                [role, &table.dsn, &table.name]
                    .into_iter()
                    .chain(arguments.iter().copied())
                    .collect::<Vec<_>>()
                    .join("\n"),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("start a process");
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            let said = stdout.lines().map_while(Result::ok);
            said.filter_map(|line| Some(line.split_once(PREFIX)?.1.to_owned())).try_for_each(|line| sender.send(line))
        });
        let stdin = child.stdin.take();
        Process { child, lines, stdin }
    }

    /// The next line that the child says within `bound`; none if it has ended.
    #[track_caller]
    pub fn next_line(&mut self, bound: Duration) -> Option<String> {
        match self.lines.recv_timeout(bound) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the child said nothing for {bound:?}"),
        }
    }

    #[track_caller]
    pub fn expect_line(&mut self) -> String {
        self.next_line(Duration::from_secs(60)).expect("the child said nothing more")
    }

    /// Lets the child go on after `wait_for_parent`.
    pub fn go_on(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"go on\n").expect("talk to the child");
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).expect("signal the child");
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        self.child.wait().expect("wait for the child")
    }

    pub fn stderr(&mut self) -> String {
        std::io::read_to_string(self.child.stderr.take().expect("piped")).expect("stderr")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// In a child: its role, its table, and its arguments.
pub fn role() -> Option<(String, Table, Vec<String>)> {
    let value = std::env::var(ROLE).ok()?;
    let mut lines = value.split('\n').map(str::to_owned);
    let (role, dsn, name) = (lines.next()?, lines.next()?, lines.next()?);
    Some((role, Table::of(&dsn, &name), lines.collect()))
}

/// In a child: tells the parent something.
pub fn say(line: impl std::fmt::Display) {
    println!("{PREFIX}{line}");
}

/// In a child: waits for `go_on`; false if the parent has gone.
pub fn wait_for_parent() -> bool {
    std::io::stdin().lock().lines().next().is_some_and(|line| line.is_ok())
}
