//! Money moves under a fence: `scripts/with-postgres.sh cargo run --example transfer`
//!
//! A process takes the lock, reads two accounts, and is stopped for longer than its lease. Another one takes the lock
//! over and transfers. When the first one wakes up it still believes in what it read; its transaction is refused, and
//! nothing of it is committed. Without the fence, money would be made from nothing.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use postgres::{Client, NoTls};
use storage_lock::{LockGuard, LockOptions, PostgresStorage, StorageLock};

mod support;

fn main() -> ExitCode {
    let is_zombie = std::env::args().nth(1).as_deref() == Some("zombie");
    support::exit_code(if is_zombie { zombie() } else { run() })
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut client = Client::connect(&support::dsn()?, NoTls)?;
    client.batch_execute(
        "DROP TABLE IF EXISTS transfer_example;
         CREATE TABLE transfer_example (owner text PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO transfer_example VALUES ('alice', 100), ('bob', 0)",
    )?;

    let zombie =
        Command::new(std::env::current_exe()?).arg("zombie").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut zombie = Killed(zombie);
    let zombie = &mut zombie.0;
    let pid = Pid::from_raw(i32::try_from(zombie.id())?);
    let (mut wake, lines) = (zombie.stdin.take().ok_or("no stdin")?, zombie.stdout.take().ok_or("no stdout")?);
    let mut lines = BufReader::new(lines).lines();
    println!("{}", lines.next().ok_or("the other process ended")??);
    kill(pid, Signal::SIGSTOP)?;

    let waiting = Instant::now();
    let guard = accounts_lock()?.lock("successor")?;
    println!(
        "successor: took the lock over after {:.1} s, as version {}",
        waiting.elapsed().as_secs_f64(),
        guard.version()
    );
    transfer(&guard, &mut client, 70, || ())?;
    println!("successor: moved 70");

    kill(pid, Signal::SIGCONT)?;
    writeln!(wake)?;
    for line in lines {
        println!("{}", line?);
    }
    if !zombie.wait()?.success() {
        return Err("the other process failed".into());
    }
    guard.unlock()?;
    for row in client.query("SELECT owner, balance FROM transfer_example ORDER BY owner", &[])? {
        println!("{}: {}", row.get::<_, String>(0), row.get::<_, i64>(1));
    }
    Ok(())
}

/// A process that doesn't stay behind, stopped, if something fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The process that is stopped between its reading and its writing.
fn zombie() -> Result<(), Box<dyn Error>> {
    let mut client = Client::connect(&support::dsn()?, NoTls)?;
    let guard = accounts_lock()?.lock("zombie")?;
    let result = transfer(&guard, &mut client, 50, || {
        println!("zombie: has the lock as version {}, has read the accounts, and is stopped", guard.version());
        std::io::stdin().lock().read_line(&mut String::new()).ok();
    });
    match result {
        Ok(()) => Err("a late transfer was committed".into()),
        Err(error) if error.downcast_ref::<storage_lock::Error>().is_some_and(storage_lock::Error::is_lease_lost) => {
            println!("zombie: refused: {error}");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn accounts_lock() -> Result<StorageLock, Box<dyn Error>> {
    let storage = PostgresStorage::connect(&support::dsn()?)?;
    let options = LockOptions::new("accounts")
        .lease_expire_after(Duration::from_secs(1))
        .lease_refresh_interval(Duration::from_millis(200));
    Ok(StorageLock::with_options(&storage, options)?)
}

/// Moves money from alice to bob, as far as the lock is held when it is committed. It writes what it computed from
/// what it read: that is what the lock is for.
fn transfer(guard: &LockGuard, client: &mut Client, amount: i64, pause: impl FnOnce()) -> Result<(), Box<dyn Error>> {
    guard.transaction(client, |transaction| {
        let mut balance = |owner: &str| -> Result<i64, postgres::Error> {
            Ok(transaction.query_one("SELECT balance FROM transfer_example WHERE owner = $1", &[&owner])?.get(0))
        };
        let (alice, bob) = (balance("alice")?, balance("bob")?);
        if alice < amount {
            return Err("alice has not got that much".into());
        }
        pause();
        for (owner, balance) in [("alice", alice - amount), ("bob", bob + amount)] {
            transaction.execute("UPDATE transfer_example SET balance = $2 WHERE owner = $1", &[&owner, &balance])?;
        }
        Ok(())
    })
}
