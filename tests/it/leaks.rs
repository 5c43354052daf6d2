//! Nothing that a cycle or a failed connect takes stays taken. Each test measures a child process of its own, against
//! a server of its own.
//!
//! Live allocations are counted one by one, by the allocator of this binary: the resident memory of a process, which
//! is looked at too, would show no leak of less than a few dozen bytes a cycle.

use std::alloc::System;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use postgres::Client;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use storage_lock::{Error, PostgresStorage, StorageLock};
use uuid::Uuid;

use crate::support::child::{Process, say, wait_for_parent};
use crate::support::server::Server;
use crate::support::{Table, eventually, ms, short_lock};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CYCLES: usize = 100_000;
const FAILED_CONNECTS: usize = 10_000;

/// What this process has taken.
#[derive(Clone, Copy, Debug)]
struct Taken {
    allocations: usize,
    heap_bytes: usize,
    resident_kb: usize,
    threads: usize,
    descriptors: usize,
}

impl Taken {
    fn now() -> Taken {
        let heap = HEAP.stats();
        let entries = |folder: &str| std::fs::read_dir(folder).expect(folder).count();
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        Taken {
            allocations: heap.allocations - heap.deallocations,
            heap_bytes: heap.bytes_allocated - heap.bytes_deallocated,
            resident_kb: resident.trim().trim_end_matches(" kB").parse().expect("a number"),
            threads: entries("/proc/self/task"),
            descriptors: entries("/proc/self/fd"),
        }
    }

    /// Once no thread is left but those that there were at first.
    fn at_rest(threads: usize) -> Taken {
        eventually("only our own threads are left", || Taken::now().threads == threads);
        Taken::now()
    }

    fn is_at_most(&self, before: &Taken, more: &Taken) -> bool {
        self.allocations <= before.allocations + more.allocations
            && self.heap_bytes <= before.heap_bytes + more.heap_bytes
            && self.resident_kb <= before.resident_kb + more.resident_kb
            && self.threads <= before.threads + more.threads
            && self.descriptors <= before.descriptors + more.descriptors
    }
}

/// What the allocator and the standard library keep for themselves.
const NOTHING: Taken =
    Taken { allocations: 100, heap_bytes: 16 << 10, resident_kb: 4 << 10, threads: 0, descriptors: 0 };

/// What threads took may be given back a moment later.
#[track_caller]
fn no_more_than(before: &Taken, more: &Taken, what: &str) {
    let (start, mut now) = (Instant::now(), Taken::now());
    while !now.is_at_most(before, more) {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}\nbefore: {before:?}\nafter:  {now:?}");
        thread::sleep(ms(20));
        now = Taken::now();
    }
}

fn connections(client: &mut Client, table: &Table) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    client.query_one(sql, &[&table.name]).expect("read the sessions").get(0)
}

/// The table of a server, with a name by which its connections are known.
fn named(server: &Server) -> Table {
    let table = Table::on(&server.dsn);
    Table::of(&format!("{} application_name={}", server.dsn, table.name), &table.name)
}

#[test]
fn after_100_000_cycles_memory_threads_descriptors_and_connections_are_what_they_were() {
    let server = Server::start_with(&["--fast"]);
    let mut child = Process::start("cycles", &named(&server), &[]);
    // Far more than it takes, also beside other work.
    assert_eq!(child.next_line(Duration::from_secs(1_800)).as_deref(), Some("as expected"));
}

pub fn cycles(table: &Table) {
    let own = Table::of(table.dsn.split(" application_name=").next().unwrap(), &table.name);
    let mut client = own.client();
    let storages = || [table.storage(), table.storage()];
    let threads = Taken::now().threads;
    run_cycles(&own, &storages(), 2_000);
    let at_first = Taken::at_rest(threads);

    let open = storages();
    run_cycles(&own, &open, 5_000);
    let before = Taken::now();
    run_cycles(&own, &open, CYCLES);
    // How many of the five connections of each storage are open now, and of their threads, is chance.
    let more =
        Taken { allocations: CYCLES / 50, heap_bytes: 1 << 20, resident_kb: 4 << 10, threads: 10, descriptors: 40 };
    no_more_than(&before, &more, "while the storages are open");
    assert!(connections(&mut client, table) <= 10);
    drop(open);
    no_more_than(&at_first, &NOTHING, "after the storages");
    eventually("all connections are closed", || connections(&mut client, table) == 0);
    say("as expected");
}

#[test]
fn after_10_000_failed_connects_memory_threads_descriptors_and_connections_are_what_they_were() {
    let mut server = Server::start_with(&["--fast"]);
    let table = named(&server);
    let port = server.dsn.parse::<postgres::Config>().unwrap().get_ports()[0];
    let closing = Closing::on(0);
    let mut child = Process::start("failed connects", &table, &[&closing.port.to_string()]);
    let expect = |child: &mut Process, what| {
        assert_eq!(child.next_line(Duration::from_secs(600)).as_deref(), Some(what));
    };
    expect(&mut child, "storages failed to open");
    drop(closing);
    expect(&mut child, "opened");
    server.ctl(&["stop", "-m", "immediate"]);
    child.go_on();
    expect(&mut child, "calls were refused");
    let closing = Closing::on(port);
    child.go_on();
    expect(&mut child, "calls were cut off");
    drop(closing);
    server.ctl(&["start"]);
    child.go_on();
    expect(&mut child, "as expected");
    eventually("all connections are closed", || connections(&mut server.client(), &table) == 0);
}

/// Accepts and closes what connects.
struct Closing {
    port: u16,
    has_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Closing {
    fn on(port: u16) -> Closing {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("listen");
        let port = listener.local_addr().expect("address").port();
        let has_ended = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&has_ended);
        let thread = thread::spawn(move || {
            listener.incoming().take_while(|_| !is_over.load(Ordering::SeqCst)).for_each(drop);
        });
        Closing { port, has_ended, thread: Some(thread) }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        self.thread.take().map(JoinHandle::join);
    }
}

pub fn failed_connects(table: &Table, closing: u16) {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let fail_to_open = |times: usize| {
        for port in [nobody, closing] {
            let dsn = format!("host=127.0.0.1 port={port} user=u password=p");
            for _ in 0..times / 2 {
                let result = PostgresStorage::connect(&dsn);
                assert!(matches!(result, Err(Error::Connect { .. })), "{result:?}");
            }
        }
    };
    let threads = Taken::now().threads;
    fail_to_open(200);
    let before = Taken::at_rest(threads);
    fail_to_open(FAILED_CONNECTS);
    no_more_than(&before, &NOTHING, "after storages that failed to open");
    say("storages failed to open");

    let open = table.storage();
    let lock = short_lock(&open, "l", ms(1_000), ms(300));
    lock.lock("worker").unwrap().unlock().unwrap();
    let before_calls = Taken::now();
    say("opened");
    let fail_to_call = |times: usize| {
        for _ in 0..times / 2 {
            for failed in [lock.lock("worker").map(drop), open.get("l").map(drop)] {
                assert!(matches!(failed, Err(Error::Connect { .. })), "{failed:?}");
            }
        }
    };
    for said in ["calls were refused", "calls were cut off"] {
        wait_for_parent();
        // The first one finds the connection that there was broken.
        drop(open.get("l"));
        fail_to_call(FAILED_CONNECTS / 2);
        // The connection that there was has gone, too.
        no_more_than(&before_calls, &NOTHING, "after calls that found no server");
        say(said);
    }
    wait_for_parent();
    lock.lock("worker").expect("the storage is as good as ever").unlock().unwrap();
    drop((lock, open));
    no_more_than(&before, &NOTHING, "after the storage");
    say("as expected");
}

/// Takes and releases locks in every way, from four threads: 1,000 locks again and again, and others once only.
fn run_cycles(table: &Table, storages: &[PostgresStorage; 2], cycles: usize) {
    const THREADS: usize = 4;
    let [ours, theirs] = storages;
    thread::scope(|scope| {
        for number in 0..THREADS {
            scope.spawn(move || {
                let owner = format!("worker-{number}");
                let lock = |storage: &PostgresStorage, id: &str| StorageLock::new(storage, id).unwrap();
                for cycle in 0..cycles / THREADS {
                    let own = format!("{number}-{}", cycle % 250);
                    // What is kept for each lock shows only if there are ever more of them.
                    let new = format!("{number}-{}", Uuid::new_v4());
                    match cycle % 100 {
                        // One lock for all threads, which hand it to each other.
                        0..20 => lock(ours, "shared").lock(&owner).unwrap().unlock().unwrap(),
                        // One lock for two storages, as of two processes, which notify each other.
                        20..23 => lock(&storages[number % 2], "between").lock(&owner).unwrap().unlock().unwrap(),
                        23..40 => lock(ours, &own).try_lock(&owner).unwrap().expect("free").unlock().unwrap(),
                        40..50 => lock(ours, &new).lock(&owner).unwrap().unlock().unwrap(),
                        // Again by the same owner, and in vain by others.
                        50..60 => {
                            let lock_ = lock(ours, &own);
                            let guard = lock_.lock(&owner).unwrap();
                            drop(lock_.lock(&owner).unwrap());
                            assert!(lock(theirs, &own).try_lock("other").unwrap().is_none());
                            drop(guard);
                        }
                        // A waiter that gives up.
                        60 => {
                            let guard = lock(ours, &own).lock(&owner).unwrap();
                            for storage in storages {
                                assert!(lock(storage, &own).try_lock_for("late", ms(1)).unwrap().is_none());
                            }
                            guard.unlock().unwrap();
                        }
                        // A hold that is lost.
                        61 if cycle % 1_000 == 61 => {
                            let guard = lock(ours, &own).lock(&owner).unwrap();
                            table.expire(&own);
                            drop(lock(theirs, &own).lock("other").unwrap());
                            assert!(guard.unlock().is_err());
                        }
                        // A hold that is refreshed.
                        62 if cycle % 1_000 == 62 => {
                            let guard = short_lock(ours, &own, ms(1_000), ms(10)).lock(&owner).unwrap();
                            crate::support::is_refreshed(&guard);
                            guard.unlock().unwrap();
                        }
                        _ => lock(ours, &own).lock(&owner).unwrap().unlock().unwrap(),
                    }
                }
            });
        }
    });
}
