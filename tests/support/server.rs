//! A throwaway server of the test's own, to be hurt.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postgres::{Client, NoTls};

use super::within;

pub struct Server {
    pub dsn: String,
    ctl: String,
    script: Child,
    postmaster: i32,
    is_frozen: bool,
}

impl Server {
    pub fn start() -> Server {
        Server::start_with(&[])
    }

    /// With options of `scripts/with-postgres.sh`.
    pub fn start_with(options: &[&str]) -> Server {
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/with-postgres.sh"))
            .args(options)
            .args(["sh", "-c", r#"echo "$STORAGE_LOCK_POSTGRESQL_DSN"; echo "$STORAGE_LOCK_POSTGRESQL_CTL"; exec cat"#])
            .env_remove("STORAGE_LOCK_POSTGRESQL_DSN")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run scripts/with-postgres.sh");
        let mut lines = BufReader::new(script.stdout.take().unwrap()).lines();
        let mut line = || lines.next().expect("the throwaway server did not start").expect("a line");
        let (dsn, ctl) = (line(), line());
        let mut server = Server { dsn, ctl, script, postmaster: 0, is_frozen: false };
        server.postmaster = server.find_postmaster();
        server
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.dsn, NoTls).expect("connect to the throwaway server")
    }

    /// Stops the server's processes where they are. Its kernel goes on acknowledging.
    pub fn freeze(&mut self) {
        self.signal_all(Signal::SIGSTOP);
        self.is_frozen = true;
    }

    pub fn thaw(&mut self) {
        self.signal_all(Signal::SIGCONT);
        self.is_frozen = false;
    }

    /// Runs `pg_ctl`.
    pub fn ctl(&mut self, arguments: &[&str]) {
        let status = Command::new(&self.ctl)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("run pg_ctl");
        assert!(status.success(), "pg_ctl {arguments:?}: {status}");
        if arguments.first() != Some(&"stop") {
            self.postmaster = self.find_postmaster();
        }
    }

    fn find_postmaster(&self) -> i32 {
        let folder: String = self.client().query_one("SHOW data_directory", &[]).unwrap().get(0);
        let file = fs::read_to_string(format!("{folder}/postmaster.pid")).expect("postmaster.pid");
        file.lines().next().and_then(|pid| pid.parse().ok()).expect("a pid")
    }

    fn signal_all(&self, signal: Signal) {
        kill(Pid::from_raw(self.postmaster), signal).expect("signal the postmaster");
        // A backend may be born while this runs: the postmaster is stopped first.
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            // pid (comm) state ppid
            let parent =
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<i32>().ok());
            if parent == Some(self.postmaster)
                && let Ok(pid) = entry.file_name().to_string_lossy().parse()
            {
                kill(Pid::from_raw(pid), signal).ok();
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.is_frozen {
            self.thaw();
        }
        // Its command ends with its standard input, and the script with its command.
        drop(self.script.stdin.take());
        within(std::time::Duration::from_secs(30), "the throwaway server is gone", || {
            self.script.try_wait().expect("wait for the script")
        });
    }
}
