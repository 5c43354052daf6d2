//! A lock that is free is taken by who waits for it: however it came to be free, and whatever stands in its row.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use postgres::Client;
use storage_lock::{LockGuard, PostgresStorage, StorageLock};
use uuid::Uuid;

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, eventually, is_refreshed, ms, short_lock, takes_at_most, waits_for};

/// Nobody waits for so long where one of the first is alive, and nothing else is hurt. What is promised is less.
const SOON: Duration = Duration::from_secs(2);
/// A look every 5 s, and what follows it.
const LOOK: Duration = Duration::from_secs(7);
/// Far more patience than any of these bounds: its end is one more look.
const PATIENCE: Duration = Duration::from_secs(14);

/// How many cases run at the same time, of all tests: each has some connections.
static ROOM: (Mutex<usize>, Condvar) = (Mutex::new(40), Condvar::new());

/// Runs cases at the same time: most of their time they wait.
#[track_caller]
pub fn side_by_side<C: Sync + Debug>(cases: &[C], run: impl Fn(&C) + Sync) {
    let (room, is_left) = &ROOM;
    let failed: Vec<&C> = thread::scope(|scope| {
        let run = |case| {
            *is_left.wait_while(room.lock().unwrap(), |room| *room == 0).unwrap() -= 1;
            let result = catch_unwind(AssertUnwindSafe(|| run(case)));
            *room.lock().unwrap() += 1;
            is_left.notify_one();
            result.is_ok()
        };
        let threads: Vec<_> = cases.iter().map(|case| (case, scope.spawn(move || run(case)))).collect();
        threads.into_iter().filter_map(|(case, thread)| (!thread.join().unwrap()).then_some(case)).collect()
    });
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// A process that listens already, because one of its threads waits for a lock of its own.
pub struct Listening {
    pub storage: PostgresStorage,
    pub waiter: Uuid,
    _elsewhere: LockGuard,
}

impl Listening {
    pub fn on(table: &Table) -> Listening {
        Listening::through(table, table)
    }

    /// One that connects another way to the same table.
    pub fn through(way: &Table, table: &Table) -> Listening {
        let elsewhere = format!("elsewhere {}", Uuid::new_v4());
        let holder = table.lock(&elsewhere).lock("holder").unwrap();
        let storage = way.storage();
        let lock = StorageLock::new(&storage, &elsewhere).unwrap();
        thread::spawn(move || lock.lock("waiter").map(drop));
        let waiter = table.hears(&elsewhere, 1)[0];
        Listening { storage, waiter, _elsewhere: holder }
    }

    pub fn lock(&self) -> StorageLock {
        StorageLock::new(&self.storage, "l").unwrap()
    }
}

/// A thread that waits for a lock with a lot of patience, and says when that ended.
type Waiting = thread::JoinHandle<WaitEnd>;
type WaitEnd = (Instant, Option<LockGuard>);

fn waits(lock: &StorageLock) -> Waiting {
    let lock = lock.clone();
    thread::spawn(move || {
        let guard = lock.try_lock_for("waiter", PATIENCE).expect("no error");
        (Instant::now(), guard)
    })
}

/// The guard of who waited for a lock that was free from an instant on, and had it in time.
#[track_caller]
fn has_it_within(bound: Duration, free: Instant, (end, guard): WaitEnd, case: impl Debug) -> LockGuard {
    let late = end.saturating_duration_since(free);
    let is_soon = late <= bound && guard.is_some();
    assert!(is_soon, "{case:?}: it stood {late:?} beside a free lock, and had it then: {}", guard.is_some());
    guard.expect("the lock")
}

/// Waits until a storage stands in the row of lock "l".
#[track_caller]
pub fn stands_in_the_row(table: &Table, waiter: Uuid) {
    let mut client = table.client();
    let sql = format!("SELECT count(*) FROM {} WHERE lock_id = 'l' AND $1 = ANY (waiters)", table.name);
    eventually("it stands in the row", || client.query_one(&sql, &[&waiter]).unwrap().get::<_, i64>(0) == 1);
}

/// A hold of lock "l" by a process that is not there any more, for so long yet.
pub fn hold_of_the_dead(table: &Table, lease: Duration) {
    let sql = "INSERT INTO $T VALUES ('l', 1, 'dead', gen_random_uuid(), clock_timestamp(),
                                      clock_timestamp() + interval '1 millisecond' * $MS)";
    assert_eq!(table.execute(&sql.replace("$MS", &lease.as_millis().to_string())), 1);
}

/// Changes who waits for lock "l". In SQL, $D stands for a dead process, $D(n) for n of them, $B for a live one.
fn set_waiters(table: &Table, waiters: &str, live: Uuid) {
    let mut sql = waiters.replace("$B", &format!("'{live}'::uuid"));
    while let Some((before, rest)) = sql.split_once("$D(") {
        let (n, after) = rest.split_once(')').expect("a number");
        sql = format!("{before}ARRAY(SELECT gen_random_uuid() FROM generate_series(1, {n})){after}");
    }
    let sql = sql.replace("$D", "gen_random_uuid()");
    assert_eq!(table.execute(&format!("UPDATE $T SET waiters = ({sql})::uuid[] WHERE lock_id = 'l'")), 1);
}

/// How many sessions wait for something, according to the server, on behalf of a table.
fn sessions_that_wait(client: &mut Client, table: &Table, what: &str) -> i64 {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity
         WHERE {what} AND query LIKE '%' || $1 || '%' AND pid <> pg_backend_pid()"
    );
    client.query_one(&sql, &[&table.name]).expect("read the sessions").get(0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Drop,
    Unlock,
    UnlockIn,
    /// The turn of the holder's process is over, and one of its threads waits again.
    TurnOver,
    /// By hand, and nobody is told.
    Update,
    /// It is free already, and the first of those who wait leaves.
    Leave,
}

/// Makes each change by which a lock gets free take 60 ms, during which its row is locked.
fn slow_down_releases(table: &Table) {
    table
        .client()
        .batch_execute(
            &"CREATE FUNCTION $T_slow() RETURNS trigger LANGUAGE plpgsql
                  AS 'BEGIN PERFORM pg_catalog.pg_sleep(0.06); RETURN NULL; END';
              CREATE TRIGGER slow AFTER UPDATE ON $T FOR EACH ROW
                  WHEN (NEW.released_at IS NOT NULL AND OLD.released_at IS NULL) EXECUTE FUNCTION $T_slow()"
                .replace("$T", &table.name),
        )
        .unwrap();
}

/// It registers when the row is about to change, and so has seen the lock held, and stands in the row of a free one.
#[test]
fn who_registers_while_a_release_commits_has_the_lock_soon() {
    let ends = [End::Drop, End::Unlock, End::UnlockIn, End::TurnOver, End::Update, End::Leave];
    let cases: Vec<(End, u32)> = ends.into_iter().flat_map(|end| [0, 1, 3].map(|dead| (end, dead))).collect();
    side_by_side(&cases, |&(end, dead)| {
        let table = Table::new();
        let storage = table.storage();
        let ours = short_lock(&storage, "l", ms(60_000), ms(100));
        let theirs = Listening::on(&table);
        slow_down_releases(&table);
        let (mut client, mut looking) = (table.client(), table.client());
        for round in 0..2 {
            let guard = ours.lock("holder").unwrap();
            let again = (end == End::TurnOver).then(|| waits_for(&ours));
            let waiters = if end == End::Leave { format!("$D || $D({dead})") } else { format!("$D({dead})") };
            set_waiters(&table, &waiters, theirs.waiter);
            if end == End::TurnOver {
                // Hears that others wait.
                is_refreshed(&guard);
                is_refreshed(&guard);
            }
            let mut at_once = |guard: LockGuard| {
                thread::scope(|scope| {
                    let release = scope.spawn(|| if end == End::Drop { drop(guard) } else { guard.unlock().unwrap() });
                    eventually("the release is under way", || {
                        release.is_finished() || sessions_that_wait(&mut looking, &table, "wait_event = 'PgSleep'") > 0
                    });
                    let waiting = waits(&theirs.lock());
                    release.join().unwrap();
                    (Instant::now(), waiting)
                })
            };
            let (released, waiting) = match end {
                End::Drop | End::Unlock | End::TurnOver => at_once(guard),
                End::UnlockIn => {
                    let unlocked = guard.unlock_in(client.transaction().unwrap()).unwrap();
                    let waiting = waits(&theirs.lock());
                    eventually("it registers", || {
                        sessions_that_wait(&mut looking, &table, "wait_event_type = 'Lock'") > 0
                    });
                    unlocked.commit().unwrap();
                    (Instant::now(), waiting)
                }
                End::Update | End::Leave => {
                    let change = if end == End::Update {
                        "released_at = clock_timestamp()"
                    } else {
                        table.execute("UPDATE $T SET released_at = clock_timestamp() WHERE lock_id = 'l'");
                        "waiters = nullif(waiters[2:], '{}')"
                    };
                    let mut transaction = client.transaction().unwrap();
                    let sql = format!("UPDATE {} SET {change} WHERE lock_id = 'l'", table.name);
                    assert_eq!(transaction.execute(&sql, &[]).unwrap(), 1);
                    let (waiting, asked) = (waits(&theirs.lock()), Instant::now());
                    // Where it comes too late for that, it skips the locked row.
                    eventually("it registers", || {
                        sessions_that_wait(&mut looking, &table, "wait_event_type = 'Lock'") > 0
                            || asked.elapsed() > ms(300)
                    });
                    transaction.commit().unwrap();
                    (Instant::now(), waiting)
                }
            };
            has_it_within(SOON, released, waiting.join().unwrap(), (end, dead, round)).unlock().unwrap();
            if let Some(again) = again {
                takes_at_most(LOOK, "the other thread's turn", || again.join().unwrap());
            }
        }
        table.client().batch_execute(&format!("DROP FUNCTION {}_slow CASCADE", table.name)).unwrap();
    });
}

/// The same, as it happens.
#[test]
fn of_hundreds_who_register_at_the_time_of_a_release_each_has_the_lock_soon() {
    let streams: Vec<u32> = (0..6).collect();
    side_by_side(&streams, |&stream| {
        let table = Table::new();
        let (ours, theirs) = (table.lock("l"), Listening::on(&table));
        let lock = theirs.lock();
        let mut client = table.client();
        for round in 0..40 {
            let guard = ours.lock("holder").unwrap();
            set_waiters(&table, &format!("$D({})", stream % 3 + 1), theirs.waiter);
            let late = thread::scope(|scope| {
                let waiting = scope.spawn(|| {
                    thread::sleep(Duration::from_micros(round % 20 * 150));
                    let guard = lock.lock("waiter").unwrap();
                    (Instant::now(), guard.unlock())
                });
                if stream < 3 {
                    drop(guard);
                } else {
                    guard.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
                }
                let released = Instant::now();
                let (had, unlocked) = waiting.join().unwrap();
                unlocked.unwrap();
                had.saturating_duration_since(released)
            });
            assert!(late <= SOON, "stream {stream}, round {round}: {late:?} beside a free lock");
        }
    });
}

/// What stands in the row, and when: before the live one comes, or after it has.
#[derive(Debug)]
enum Row {
    Before(&'static str),
    After(&'static str),
}

#[test]
fn whatever_stands_in_the_row_its_lock_is_taken_and_it_is_tidied_up() {
    let cases = [
        Row::Before("$D(10)"),
        Row::Before("$D(300)"),
        Row::Before("$D(1000)"),
        Row::Before("$D(1500)"),
        Row::Before("ARRAY[NULL, $D, NULL]"),
        Row::Before("ARRAY[NULL, NULL]::uuid[]"),
        Row::Before("'{}'"),
        Row::Before("array_fill($D, ARRAY[40])"),
        Row::Before("ARRAY[$D, $B, $D, $B] || $D(3)"),
        Row::After("$D(10) || waiters || $D(10)"),
        Row::After("waiters || $D(300)"),
        Row::After("$D(300) || waiters || waiters"),
        Row::After("ARRAY[NULL, $D] || waiters || ARRAY[NULL, $D]"),
    ];
    side_by_side(&cases, |case| {
        let table = Table::new();
        let (ours, theirs) = (table.lock("l"), Listening::on(&table));
        let guard = ours.lock("holder").unwrap();
        let waiting = match case {
            Row::Before(waiters) => {
                set_waiters(&table, waiters, theirs.waiter);
                let waiting = waits(&theirs.lock());
                // In a full row it doesn't come to stand.
                if !matches!(*waiters, "$D(1000)" | "$D(1500)") {
                    stands_in_the_row(&table, theirs.waiter);
                }
                waiting
            }
            Row::After(waiters) => {
                let waiting = waits(&theirs.lock());
                stands_in_the_row(&table, theirs.waiter);
                set_waiters(&table, waiters, theirs.waiter);
                waiting
            }
        };
        thread::sleep(ms(300));
        guard.unlock().unwrap();
        let released = Instant::now();
        has_it_within(Duration::from_secs(8), released, waiting.join().unwrap(), case).unlock().unwrap();
        // Those who stood behind it go with the next one that stands in line.
        let guard = takes_at_most(Duration::from_secs(8), "the next one's turn", || ours.lock("next").unwrap());
        assert_eq!(ours.info().unwrap().unwrap().waiters, 0, "{case:?}: the dead are still there");
        guard.unlock().unwrap();
    });
}

/// One that comes back again and again, soon, and goes to the end of the line each time.
#[track_caller]
fn is_overtaken_at_most_twice(table: &Table, theirs: &Listening, before: &str, behind: &str) {
    let newcomer = table.lock("l");
    let guard = newcomer.lock("newcomer").unwrap();
    let first = guard.version();
    let waiting = waits(&theirs.lock());
    stands_in_the_row(table, theirs.waiter);
    set_waiters(table, &format!("{before} || waiters || {behind}"), theirs.waiter);
    thread::sleep(ms(300));
    guard.unlock().unwrap();
    let released = Instant::now();
    while !waiting.is_finished() {
        thread::sleep(ms(150));
        if let Some(guard) = newcomer.try_lock_for("newcomer", ms(5_000)).unwrap() {
            thread::sleep(ms(300));
            guard.unlock().unwrap();
        }
    }
    let guard = has_it_within(PATIENCE, released, waiting.join().unwrap(), (before, behind));
    let overtaken = guard.version() - first - 1;
    assert!(overtaken <= 2, "{before} and {behind}: overtaken {overtaken} times");
    guard.unlock().unwrap();
}

#[test]
fn who_waits_among_the_dead_is_not_overtaken_for_ever() {
    let cases =
        [("$D(1)", "$D(0)"), ("$D(10)", "$D(0)"), ("$D(10)", "$D(10)"), ("$D(0)", "$D(10)"), ("$D(30)", "$D(2)")];
    side_by_side(&cases, |(before, behind)| {
        let table = Table::new();
        is_overtaken_at_most_twice(&table, &Listening::on(&table), before, behind);
    });
}

/// The same with processes that were there.
#[test]
fn who_waits_behind_processes_that_were_killed_is_not_overtaken_for_ever() {
    let table = Table::new();
    let theirs = Listening::on(&table);
    let guard = table.lock("l").lock("holder").unwrap();
    let mut killed: Vec<Process> = (0..10).map(|_| Process::start("wait", &table, &["l"])).collect();
    table.hears("l", killed.len());
    killed.iter_mut().for_each(|process| {
        process.signal(Signal::SIGKILL);
        process.wait();
    });
    let waiters: Vec<String> = table.waiters("l").iter().map(|waiter| format!("'{waiter}'")).collect();
    table.execute("UPDATE $T SET waiters = NULL WHERE lock_id = 'l'");
    guard.unlock().unwrap();
    is_overtaken_at_most_twice(&table, &theirs, &format!("ARRAY[{}]::uuid[]", waiters.join(", ")), "$D(0)");
}

/// A lock that is made free by somebody who knows nothing of notifications.
#[test]
fn a_lock_that_is_freed_by_hand_is_taken_after_a_look() {
    const FREED: [&str; 14] = [
        "UPDATE $T SET version = version + 1, lease_id = gen_random_uuid(), released_at = clock_timestamp()",
        "UPDATE $T SET version = version + 1000, lease_id = gen_random_uuid(),
             released_at = clock_timestamp(), waiters = NULL",
        "UPDATE $T SET released_at = clock_timestamp()",
        "UPDATE $T SET released_at = clock_timestamp() - interval '1 day'",
        "UPDATE $T SET lease_expire_time = clock_timestamp()",
        "UPDATE $T SET lease_expire_time = '-infinity'",
        "UPDATE $T SET waiters = NULL, released_at = clock_timestamp()",
        "UPDATE $T SET waiters = '{}', lease_expire_time = clock_timestamp()",
        "UPDATE $T SET waiters = gen_random_uuid() || waiters, lease_expire_time = clock_timestamp()",
        "UPDATE $T SET waiters = gen_random_uuid() || waiters || gen_random_uuid(), released_at = clock_timestamp()",
        "UPDATE $T SET released_at = 'infinity'",
        "UPDATE $T SET waiters = gen_random_uuid() || waiters, released_at = '2099-01-01'",
        "DELETE FROM $T",
        "WITH gone AS (DELETE FROM $T RETURNING *) INSERT INTO $T
         SELECT lock_id, version + 1, owner_id, gen_random_uuid(), lock_begin_time, lease_expire_time, clock_timestamp()
         FROM gone",
    ];
    // With what may have been told before, by nobody knows whom.
    let misled = [FREED[0], FREED[2], FREED[4], FREED[9]].map(|sql| (sql, true));
    let cases: Vec<(&str, bool)> = FREED.into_iter().map(|sql| (sql, false)).chain(misled).collect();
    side_by_side(&cases, |&(sql, is_misled)| {
        let table = Table::new();
        let theirs = Listening::on(&table);
        hold_of_the_dead(&table, ms(600_000));
        let waiting = waits(&theirs.lock());
        stands_in_the_row(&table, theirs.waiter);
        thread::sleep(ms(300));
        if is_misled {
            mislead(&mut table.client(), theirs.waiter);
            thread::sleep(ms(100));
        }
        // Its own lock is in the same table.
        let only = if sql.starts_with("WITH") {
            sql.replace("RETURNING", "WHERE lock_id = 'l' RETURNING")
        } else {
            format!("{sql} WHERE lock_id = 'l'")
        };
        assert_eq!(table.execute(&only), 1);
        let freed = Instant::now();
        let guard = has_it_within(LOOK, freed, waiting.join().unwrap(), (sql, is_misled));
        // What was put there by hand is gone, and the hold is one like any other.
        assert!(theirs.lock().info().unwrap().unwrap().is_held);
        guard.unlock().unwrap();
    });
}

/// The channels on which a waiter may listen.
fn channels(waiter: Uuid) -> [String; 2] {
    let name = waiter.to_string();
    [format!("storage_lock_{name}"), format!("storage_lock_{}", &name[name.len() - 1..])]
}

/// Everything that could be told to a process that waits for lock "l", most of it nonsense.
fn rogue_payloads(waiter: Uuid) -> Vec<String> {
    let name = waiter.to_string();
    let names = [&name, &name.to_uppercase(), &Uuid::nil().to_string(), &Uuid::new_v4().to_string(), "x", ""];
    let numbers = [
        "0",
        "1",
        "2",
        "-1",
        "-0",
        "+5",
        "99999",
        "4000000000",
        "9223372036854775807",
        "-9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "1e9",
        "NaN",
        "0x10",
        "",
        "x",
    ];
    let locks = ["l", "", " l", "l ", "unknown", "l l"];
    let mut payloads: Vec<String> = ["", " ", "  ", "   ", "l", "\n", "💥", "1", "0 0 0 0"].map(str::to_owned).into();
    for number in numbers {
        payloads.extend(locks.map(|lock| format!("{number} {lock}")));
        for name in names {
            payloads.push(format!("{name} {number}"));
            payloads.push(format!("{name} {number} {number}"));
            for turn in ["0", number, "1", "9223372036854775807"] {
                payloads.extend(locks.map(|lock| format!("{name} {number} {turn} {lock}")));
            }
        }
    }
    payloads.push("l ".repeat(3_900));
    payloads
}

/// Tells it all of that, and then to wait.
fn mislead(client: &mut Client, waiter: Uuid) {
    notify(client, waiter, &rogue_payloads(waiter));
    notify(client, waiter, &["4000000000 l".to_owned(), format!("{waiter} 4000000000 0 l")]);
}

fn notify(client: &mut Client, waiter: Uuid, payloads: &[String]) {
    let sql = "SELECT pg_notify(channel, payload) FROM unnest($1::text[]) AS channel, unnest($2::text[]) AS payload";
    client.execute(sql, &[&channels(waiter).as_slice(), &payloads]).unwrap();
}

#[derive(Clone, Copy, Debug)]
enum Rogue {
    Once,
    /// All the time, until the lock is taken.
    Flood(&'static [&'static str]),
}

/// In a payload $B stands for the waiter.
const FLOODS: [&[&str]; 5] = [
    &["2 l", "10 l"],
    &["4000000000 l"],
    &["9 l", "18446744073709551615 l"],
    &["$B 60000 0 l", "$B 4000000000 0 l", "$B 9223372036854775807 1 l", "$B -1 9 l"],
    &["$B 100 0 l", "$B 100 1 l", "$B 0 0 l", "1 l", "$B 0 2 l"],
];

#[test]
fn no_notification_keeps_a_free_lock_from_being_taken() {
    let rogues = FLOODS.map(Rogue::Flood).into_iter().chain([Rogue::Once]);
    let cases: Vec<(Rogue, bool)> = rogues.flat_map(|rogue| [(rogue, false), (rogue, true)]).collect();
    side_by_side(&cases, |&(rogue, is_released)| {
        let table = Table::new();
        let theirs = Listening::on(&table);
        let guard = is_released.then(|| table.lock("l").lock("holder").unwrap());
        if !is_released {
            hold_of_the_dead(&table, ms(2_000));
        }
        let waiting = waits(&theirs.lock());
        stands_in_the_row(&table, theirs.waiter);
        let mut client = table.client();
        let tell = |client: &mut Client| match rogue {
            Rogue::Once => mislead(client, theirs.waiter),
            Rogue::Flood(payloads) => {
                let name = theirs.waiter.to_string();
                let payloads: Vec<String> = payloads.iter().map(|payload| payload.replace("$B", &name)).collect();
                notify(client, theirs.waiter, &payloads);
            }
        };
        // What it was told when it came is over.
        thread::sleep(ms(200));
        tell(&mut client);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            if matches!(rogue, Rogue::Flood(_)) {
                scope.spawn(|| {
                    let mut client = table.client();
                    while !is_over.load(Ordering::SeqCst) {
                        tell(&mut client);
                        thread::sleep(ms(5));
                    }
                });
            }
            if let Some(guard) = guard {
                thread::sleep(ms(500));
                guard.unlock().unwrap();
            } else {
                let is_over = "SELECT count(*) FROM $T WHERE lock_id = 'l' AND lease_expire_time > clock_timestamp()";
                let sql = is_over.replace("$T", &table.name);
                eventually("the lease runs out", || {
                    client.query_one(&sql, &[]).unwrap().get::<_, i64>(0) == 0 || waiting.is_finished()
                });
            }
            let free = Instant::now();
            let end = waiting.join();
            is_over.store(true, Ordering::SeqCst);
            has_it_within(2 * SOON, free, end.unwrap(), (rogue, is_released)).unlock().unwrap();
        });
    });
}

/// It stands behind a dead process. Each of them makes it look, and tell the dead one again that it is its turn.
#[test]
fn no_flood_of_notifications_puts_off_the_turn_of_who_waits_behind_the_dead() {
    let table = Table::new();
    let theirs = Listening::on(&table);
    hold_of_the_dead(&table, ms(600_000));
    set_waiters(&table, "ARRAY[$D]", theirs.waiter);
    let waiting = waits(&theirs.lock());
    stands_in_the_row(&table, theirs.waiter);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = table.client();
            while !is_over.load(Ordering::SeqCst) {
                notify(&mut client, theirs.waiter, &[format!("{} 0 0 l", theirs.waiter)]);
                thread::sleep(ms(5));
            }
        });
        thread::sleep(ms(500));
        table.execute("UPDATE $T SET released_at = clock_timestamp() WHERE lock_id = 'l'");
        let free = Instant::now();
        let end = waiting.join();
        is_over.store(true, Ordering::SeqCst);
        has_it_within(2 * SOON, free, end.unwrap(), "a flood").unlock().unwrap();
    });
}

/// How long after the end of the lease of version `dead` the next hold began, by the database's clock.
fn took_over_after(table: &Table, dead: &Dead, waiting: Waiting, case: &str) -> Duration {
    let guard = has_it_within(PATIENCE, Instant::now(), waiting.join().unwrap(), case);
    let row = table.lock("l").info().unwrap().unwrap();
    assert_eq!((guard.version(), row.version), (dead.version + 1, dead.version + 1));
    guard.unlock().unwrap();
    row.lock_begin_time.duration_since(dead.expiry).expect("not before the expiry")
}

/// A hold whose holder was killed.
struct Dead {
    version: i64,
    expiry: std::time::SystemTime,
}

/// Kills the holder of lock "l".
fn kill_holder(table: &Table, holder: &mut Process) -> Dead {
    holder.signal(Signal::SIGKILL);
    holder.wait();
    // What it has sent arrives.
    thread::sleep(ms(200));
    let row = table.lock("l").info().unwrap().unwrap();
    assert_eq!(row.owner_id, "short");
    Dead { version: row.version, expiry: row.lease_expire_time }
}

/// A hold of a minute is followed by one of three seconds, whose holder dies.
#[test]
fn a_hold_with_a_shorter_lease_is_taken_over_when_that_has_run_out() {
    // Who stands in the row, and how late the live one may be.
    let cases = [
        ("waiters", SOON),
        ("$D(1) || waiters", SOON),
        ("waiters || $D(3)", SOON),
        ("$D(3) || waiters || $D(3)", LOOK),
        ("$D(3) || waiters", SOON),
    ];
    side_by_side(&cases, |&(case, bound)| {
        let table = Table::new();
        let theirs = Listening::on(&table);
        let mut holder = Process::start("hand to a shorter lease", &table, &["l"]);
        assert_eq!(holder.expect_line(), "held");
        let waiting = waits(&theirs.lock());
        stands_in_the_row(&table, theirs.waiter);
        set_waiters(&table, case, theirs.waiter);
        thread::sleep(ms(300));
        holder.go_on();
        assert_eq!(holder.expect_line(), "handed");
        let dead = kill_holder(&table, &mut holder);
        let late = took_over_after(&table, &dead, waiting, case);
        assert!(late <= bound, "{case}: {late:?} beside a free lock");
    });
}

/// The same where another process takes it between: by the way of all, or by the one that needs no place in the line.
#[test]
fn another_process_with_a_shorter_lease_comes_between_and_dies() {
    side_by_side(&["lock", "try_lock"], |&case| {
        let table = Table::new();
        let proxy = Proxy::to(&table.dsn);
        let theirs = Listening::through(&Table::of(&proxy.dsn, &table.name), &table);
        let ours = table.short_lock("l", ms(60_000), ms(20_000));
        let guard = ours.lock("holder").unwrap();
        let mut holder = Process::start("take with a shorter lease", &table, &["l", case]);
        assert_eq!(holder.expect_line(), "ready");
        if case == "lock" {
            // It is the first.
            table.hears("l", 1);
        }
        let waiting = waits(&theirs.lock());
        stands_in_the_row(&table, theirs.waiter);
        thread::sleep(ms(300));
        // It hears late of the release.
        proxy.delay_answers(ms(300));
        guard.unlock().unwrap();
        assert_eq!(holder.expect_line(), "taken");
        proxy.delay_answers(Duration::ZERO);
        let dead = kill_holder(&table, &mut holder);
        let late = took_over_after(&table, &dead, waiting, case);
        assert!(late <= SOON, "{case}: {late:?} beside a free lock");
    });
}

/// A statement's text counts in `pg_stat_statements` as one of a few thousand, and drives others out.
#[test]
fn processes_that_wait_for_a_moment_leave_few_statements_in_the_statistics() {
    let is_available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_stat_statements'";
    if Table::new().client().query_one(is_available, &[]).unwrap().get::<_, i64>(0) == 0 {
        println!("skipped: the server has no pg_stat_statements");
        return;
    }
    let server = Server::start_with(&["--fast", "-c", "shared_preload_libraries=pg_stat_statements"]);
    let table = Table::on(&server.dsn);
    let mut client = server.client();
    client.batch_execute("CREATE EXTENSION pg_stat_statements").unwrap();
    let guard = table.lock("l").lock("holder").unwrap();
    let locks: Vec<StorageLock> = (0..30).map(|_| table.lock("l")).collect();
    let waiting: Vec<_> = locks.iter().map(waits_for).collect();
    table.hears("l", locks.len());
    guard.unlock().unwrap();
    waiting.into_iter().for_each(|waiting| assert!(waiting.join().is_ok()));
    let count = |client: &mut Client, like: &str| -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_statements WHERE query LIKE $1";
        client.query_one(sql, &[&like]).unwrap().get(0)
    };
    let (listens, waits) = (count(&mut client, "LISTEN %"), count(&mut client, "%waiter %"));
    assert!(listens <= 16 + 2, "{listens} statements to listen");
    assert!(waits <= 16 + 8, "{waits} statements with a waiter's name");
}
