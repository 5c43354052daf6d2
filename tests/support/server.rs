//! A throwaway server of the test's own, or a pair of them, to be hurt.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postgres::error::SqlState;
use postgres::{Client, Config, NoTls};

use super::{eventually, within};

pub struct Server {
    pub dsn: String,
    ctl: String,
    data_folder: String,
    postmaster: i32,
    is_frozen: bool,
    /// Dropped last: a server that is frozen doesn't hear of its end.
    _script: Arc<Script>,
}

impl Server {
    pub fn start() -> Server {
        Server::start_with(&[])
    }

    /// One with options of `scripts/with-postgres.sh`.
    pub fn start_with(options: &[&str]) -> Server {
        let (script, [dsn, ctl]) = Script::start(options, ["DSN", "CTL"]);
        Server::running(dsn, ctl, &Arc::new(script))
    }

    fn running(dsn: String, ctl: String, script: &Arc<Script>) -> Server {
        let data_folder = String::new();
        let mut server = Server { dsn, ctl, data_folder, postmaster: 0, is_frozen: false, _script: Arc::clone(script) };
        server.data_folder = server.client().query_one("SHOW data_directory", &[]).unwrap().get(0);
        server.postmaster = server.find_postmaster();
        server
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.dsn, NoTls).expect("connect to the throwaway server")
    }

    /// Stops the server's processes where they are. Its kernel goes on acknowledging.
    pub fn freeze(&mut self) {
        // A backend may be born meanwhile: the postmaster is stopped before they are counted.
        self.signal(Signal::SIGSTOP);
        self.signal_backends(Signal::SIGSTOP);
        self.is_frozen = true;
    }

    pub fn thaw(&mut self) {
        self.signal(Signal::SIGCONT);
        self.signal_backends(Signal::SIGCONT);
        self.is_frozen = false;
    }

    /// Ends the server where it is, as a machine that loses its power: nobody writes or says anything more. All that
    /// the kernel does is to close the sockets.
    pub fn kill(&mut self) {
        self.freeze();
        self.signal_backends(Signal::SIGKILL);
        // It is left to tidy up the shared memory, and hears of this before it hears that they have died.
        self.signal(Signal::SIGQUIT);
        self.signal(Signal::SIGCONT);
        self.is_frozen = false;
        let stat = format!("/proc/{}/stat", self.postmaster);
        // Nobody may be there yet to hear of its end: a zombie is gone, too.
        eventually("the server is gone", || fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z ")));
    }

    /// Sets a parameter, and doesn't wait until everybody knows.
    pub fn set(&self, name: &str, value: &str) {
        let mut client = self.client();
        client.batch_execute(&format!("ALTER SYSTEM SET {name} = '{value}'")).expect("set a parameter");
        client.batch_execute("SELECT pg_reload_conf()").expect("reload the settings");
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
        let file = fs::read_to_string(format!("{}/postmaster.pid", self.data_folder)).expect("postmaster.pid");
        file.lines().next().and_then(|pid| pid.parse().ok()).expect("a pid")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.postmaster), signal).expect("signal the postmaster");
    }

    fn signal_backends(&self, signal: Signal) {
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
    }
}

/// A primary and a standby that follows it. The DSN names both, and asks for the one that can be written to.
pub struct Pair {
    pub dsn: String,
    pub primary: Server,
    pub standby: Server,
}

impl Pair {
    /// A commit waits until the standby has it on its disk.
    pub fn synchronous() -> Pair {
        Pair::start("sync")
    }

    /// A commit doesn't wait for the standby.
    pub fn asynchronous() -> Pair {
        Pair::start("async")
    }

    fn start(standby: &str) -> Pair {
        let (script, [dsn, ctl, standby_ctl]) = Script::start(&["--standby", standby], ["DSN", "CTL", "STANDBY_CTL"]);
        let script = Arc::new(script);
        let [primary, standby] = [(0, ctl), (1, standby_ctl)].map(|(index, ctl)| {
            let its_own = |part: &str| match part.split_once('=') {
                Some((name @ ("host" | "port"), values)) => {
                    Some(format!("{name}={}", values.split(',').nth(index).expect("two values")))
                }
                Some(("target_session_attrs", _)) => None,
                _ => Some(part.to_owned()),
            };
            Server::running(dsn.split(' ').filter_map(its_own).collect::<Vec<_>>().join(" "), ctl, &script)
        });
        let pair = Pair { dsn, primary, standby };
        let mut client = pair.primary.client();
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'standby' AND state = 'streaming'";
        eventually("the standby follows", || client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 1);
        pair
    }

    /// The standby has, and shows, all that has happened on the primary.
    #[track_caller]
    pub fn catches_up(&self) {
        let mut client = self.primary.client();
        let sql = "SELECT replay_lsn >= pg_current_wal_insert_lsn() FROM pg_stat_replication";
        eventually("the standby catches up", || {
            client.query_one(sql, &[]).unwrap().get::<_, Option<bool>>(0) == Some(true)
        });
    }

    /// From here on nothing that happens on the primary comes to the standby, not even what it has written already.
    #[track_caller]
    pub fn cut_off_standby(&self) {
        self.catches_up();
        self.standby.set("primary_conninfo", "");
        let mut client = self.primary.client();
        let sql = "SELECT count(*) FROM pg_stat_replication";
        eventually("the standby is cut off", || client.query_one(sql, &[]).unwrap().get::<_, i64>(0) == 0);
    }

    /// From here on the standby lets a role in no more.
    #[track_caller]
    pub fn shut_out(&self, role: &str) {
        self.set_rules(|rules| format!("host all {role} all reject\n{rules}"));
        eventually("it is shut out", || self.is_shut_out(role));
    }

    #[track_caller]
    pub fn let_in(&self, role: &str) {
        self.set_rules(|rules| rules.replace(&format!("host all {role} all reject\n"), ""));
        eventually("it is let in", || !self.is_shut_out(role));
    }

    fn set_rules(&self, change: impl Fn(&str) -> String) {
        let mut client = self.standby.client();
        let file: String = client.query_one("SHOW hba_file", &[]).unwrap().get(0);
        fs::write(&file, change(&fs::read_to_string(&file).expect("pg_hba.conf"))).expect("pg_hba.conf");
        client.batch_execute("SELECT pg_reload_conf()").expect("reload the rules");
    }

    fn is_shut_out(&self, role: &str) -> bool {
        let mut config: Config = self.standby.dsn.parse().expect("a DSN");
        let error = config.user(role).password("wrong").connect(NoTls).err().expect("the password is wrong");
        error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)
    }

    /// The standby is the primary from now on.
    pub fn promote(&mut self) {
        self.standby.ctl(&["promote"]);
    }
}

/// `scripts/with-postgres.sh`: what it started goes when this is dropped.
struct Script(Child);

impl Script {
    /// Starts servers, and returns what the script exports.
    fn start<const N: usize>(options: &[&str], variables: [&str; N]) -> (Script, [String; N]) {
        let say: String = variables.iter().map(|name| format!("echo \"$STORAGE_LOCK_POSTGRESQL_{name}\"; ")).collect();
        let mut script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/with-postgres.sh"))
            .args(options)
            .args(["sh", "-c", &format!("{say} exec cat")])
            .env_remove("STORAGE_LOCK_POSTGRESQL_DSN")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("run scripts/with-postgres.sh");
        let mut lines = BufReader::new(script.stdout.take().unwrap()).lines();
        let values = variables.map(|_| lines.next().expect("the throwaway server did not start").expect("a line"));
        (Script(script), values)
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // Its command ends with its standard input, and the script with its command.
        drop(self.0.stdin.take());
        within(Duration::from_secs(30), "the throwaway server is gone", || {
            self.0.try_wait().expect("wait for the script")
        });
    }
}
