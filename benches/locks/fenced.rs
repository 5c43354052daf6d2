//! B9: what a fence costs a transaction that writes one row, and what somebody who waits for the lock costs that one.

use std::error::Error;
use std::thread;
use std::time::Duration;

use postgres::{Client, Statement, Transaction};
use storage_lock::{LockGuard, StorageLock};

use crate::child::{Process, hear, say};
use crate::context::{Context, chain};
use crate::figures::{Figure, Section};
use crate::measure::{SLICE_HEADER, Slice, Spread, interleave, slice_row};
use crate::server::Table;

pub const ROLE: &str = "ask";

/// The same transaction in six ways.
const SIDES: [&str; 6] = [
    "plain",
    "with a round trip",
    "fenced, nobody waits",
    "fenced, a process waits",
    "fenced after the lease, nobody waits",
    "fenced after the lease, a process asks",
];
const PLAIN: usize = 0;
const ROUND_TRIP: usize = 1;
const FENCED: usize = 2;
const WAITED_FOR: usize = 3;
const EXPIRED: usize = 4;
const DUE: usize = 5;

type Outcome = Result<(), Box<dyn Error>>;

pub fn run(context: &Context) -> Section {
    let (rounds, length) = context.pick((20, Duration::from_millis(1500)), (3, Duration::from_millis(300)));
    let (table, data) = (Table::new(context), Table::new(context));
    let storage = table.storage();
    let lock = |lock_id: &str| StorageLock::new(&storage, lock_id).expect("make a lock");
    let hold = |lock_id: &str| lock(lock_id).lock("holder").expect("lock");
    let (alone, waited_for, expired, due) = (hold("alone"), hold("waited for"), hold("expired"), hold("due"));

    // These two leases run out, and nothing keeps the locks but the fences of a transaction that stays open.
    let mut keeper = table.client();
    let mut kept = keeper.transaction().expect("begin");
    for guard in [&expired, &due] {
        guard.fence(&mut kept).expect("fence");
        let sql = format!("UPDATE {} SET lease_expire_time = clock_timestamp() WHERE lock_id = $1", table.name);
        table.client().execute(&sql, &[&guard.lock_id()]).expect("end a lease");
    }
    let mut waiting =
        Process::start(ROLE, &table.dsn, &table, &[waited_for.lock_id(), due.lock_id()].map(str::to_owned));
    assert_eq!(waiting.expect_line(), "ready");
    // By now they have asked, and listen.
    thread::sleep(Duration::from_millis(500));

    let mut writer = Writer::new(&data);
    let mut failed = None;
    let slices = interleave::<6>(rounds, length, |side| {
        let outcome = match side {
            PLAIN => writer.write(|_| Ok(())),
            ROUND_TRIP => writer.write(|transaction| {
                transaction.query_typed("SELECT 1", &[])?;
                Ok(())
            }),
            FENCED => writer.write_under(&alone),
            WAITED_FOR => writer.write_under(&waited_for),
            // `LockGuard::transaction` would not even begin.
            EXPIRED => writer.write(|transaction| Ok(expired.fence_past_deadline(transaction)?)),
            DUE => writer.write(|transaction| Ok(due.fence_past_deadline(transaction)?)),
            other => panic!("there is no side {other}"),
        };
        if let Err(error) = outcome {
            failed.get_or_insert_with(|| format!("{}: a transaction failed: {}", SIDES[side], chain(&*error)));
        }
    });
    let waiters = lock("waited for").info().expect("look at a lock").map_or(0, |row| row.waiters);
    let no_wait = (!waiting.is_silent() || waiters != 1).then(|| "a waiter came back, or none was there".to_owned());
    drop(waiting);
    let lost = [alone, waited_for].map(LockGuard::unlock).into_iter().find_map(Result::err);
    context.write_csv("b9.csv", &SLICE_HEADER, rows(&slices));

    let p50 = |side: usize| slices.iter().map(move |slices| slices[side].p50());
    let compared = |measure: &str, ours: usize, yardstick: usize| {
        let ratio = Spread::of(p50(ours).zip(p50(yardstick)).map(|(ours, yardstick)| ours / yardstick));
        let figure = Figure::new(format!("{measure}: p50, ms"), Spread::of(p50(ours)));
        (figure.yardstick(Spread::of(p50(yardstick))), ratio)
    };
    let added = |side: usize| Spread::of(p50(side).zip(p50(PLAIN)).map(|(p50, plain)| (p50 - plain) * 1000.0));
    let (to_round_trip, round_trip_ratio) = compared("fenced, to a round trip more", FENCED, ROUND_TRIP);
    let (to_plain, plain_ratio) = compared("fenced, to a plain one", FENCED, PLAIN);
    let (waiter, waiter_ratio) = compared("fenced and waited for, to nobody waits", WAITED_FOR, FENCED);
    let (takeover, takeover_ratio) = compared("the same after the lease", DUE, EXPIRED);
    Section {
        figures: vec![
            to_round_trip.ratio_at_most(round_trip_ratio, 1.15, 1.05),
            to_plain.ratio(plain_ratio),
            Figure::new("added by the fence, to a round trip: p50, µs", added(FENCED)).yardstick(added(ROUND_TRIP)),
            waiter.ratio_at_most(waiter_ratio, 1.1, 1.02),
            takeover.ratio_at_most(takeover_ratio, 1.1, 1.02),
        ],
        notes: vec![
            "The round trip is SELECT 1 in the place of the fence.".to_owned(),
            "After the lease, the fence of a further transaction, which stays open, keeps the lock from a process \
             that asks for it."
                .to_owned(),
        ],
        wrong: failed.or(no_wait).or(lost.map(|error| format!("a hold was lost: {}", chain(&error)))),
    }
}

/// The process that waits for two locks, until it is killed or its parent is gone.
pub fn child(table: &Table, lock_ids: &[&str]) {
    let storage = table.storage();
    let locks: Vec<_> = lock_ids.iter().map(|id| StorageLock::new(&storage, *id).expect("make a lock")).collect();
    say("ready");
    for lock in locks {
        thread::spawn(move || say(format_args!("{:?}", lock.lock("waiter"))));
    }
    hear();
}

/// A client that updates one row in a transaction.
struct Writer {
    client: Client,
    update: Statement,
}

impl Writer {
    fn new(data: &Table) -> Writer {
        let (mut client, name) = (data.client(), &data.name);
        let create = format!("CREATE TABLE {name} (id int PRIMARY KEY, n bigint); INSERT INTO {name} VALUES (1, 0)");
        client.batch_execute(&create).expect("create a table");
        let update = client.prepare(&format!("UPDATE {name} SET n = n + 1 WHERE id = 1")).expect("prepare");
        Writer { client, update }
    }

    /// As [`LockGuard::transaction`] does it, with `last` in the place of the fence.
    fn write(&mut self, last: impl FnOnce(&mut Transaction<'_>) -> Outcome) -> Outcome {
        let mut transaction = self.client.transaction()?;
        transaction.execute(&self.update, &[])?;
        last(&mut transaction)?;
        transaction.commit()?;
        Ok(())
    }

    fn write_under(&mut self, guard: &LockGuard) -> Outcome {
        guard.transaction(&mut self.client, |transaction| {
            transaction.execute(&self.update, &[])?;
            Ok(())
        })
    }
}

fn rows(rounds: &[[Slice; SIDES.len()]]) -> impl Iterator<Item = Vec<String>> {
    rounds
        .iter()
        .zip(1..)
        .flat_map(|(slices, round)| slices.iter().zip(SIDES).map(move |(slice, side)| slice_row(round, side, slice)))
}
