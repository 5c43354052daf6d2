//! The model of the row does what the statements do on a real server. Other checks rely on that.

use std::cell::RefCell;

use postgres::Client;
use proptest::prelude::*;

use super::races::{Table, client, session};
use super::*;
use crate::db::answer::Busy;
use crate::db::answer::tests::properties::{Step, new_claim, steps};
use crate::model::row;

/// A time so far away that the duration of a step makes no difference.
const FAR: Duration = Duration::from_secs(3_600);

/// The part of an answer to compare: all but its times.
fn gist(answer: &Acquired) -> (&'static str, i64, Option<&str>, bool, bool) {
    match answer {
        Acquired::Taken { granted, taken_over_from } => {
            ("taken", granted.version, taken_over_from.as_deref(), granted.is_wanted, false)
        }
        Acquired::Busy(Busy { version, owner_id, is_free, has_notified, position, waiters, .. }) => {
            let in_row = position.map_or(-1, i64::from) * 10_000 + i64::from(*waiters);
            ("busy", version * 1_000_000 + in_row, Some(owner_id), *is_free, *has_notified)
        }
        Acquired::Locked => ("locked", 0, None, false, false),
        Acquired::Missed => ("missed", 0, None, false, false),
        Acquired::Absent => ("absent", 0, None, false, false),
        Acquired::TooLate => ("too late", 0, None, false, false),
    }
}

/// A row without its times.
type State = (i64, String, Uuid, bool, bool, Vec<Uuid>);

fn state_of(row: &row::Row, now: Instant) -> State {
    let is_over = row.lease_end <= now;
    (row.version, row.owner_id.clone(), row.lease_id, row.released_at.is_some(), is_over, row.waiters.clone())
}

/// One table, with a lock for each case.
struct Server {
    table: Table,
    session: Session,
    client: Client,
}

impl Server {
    fn set(&mut self, lock_id: &str, change: &str) {
        let sql = format!("UPDATE {} SET {change} WHERE lock_id = $1", self.table.sql.table);
        self.client.execute(&sql, &[&lock_id]).unwrap();
    }

    fn state(&mut self, lock_id: &str) -> State {
        let sql = format!(
            "SELECT version, owner_id, lease_id, released_at IS NOT NULL, lease_expire_time <= clock_timestamp(),
                    coalesce(waiters, '{{}}') FROM {} WHERE lock_id = $1",
            self.table.sql.table
        );
        let row = self.client.query_one(&sql, &[&lock_id]).unwrap();
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4), row.get(5))
    }

    /// Does the steps on the server and on the model. Compares every answer, and the row after each step.
    fn compare(&mut self, steps: &[Step]) {
        let now = Instant::now();
        let lock_id = Uuid::new_v4().to_string();
        let claim = || Claim { lock_id: lock_id.clone(), lease: FAR, expires: now + FAR, ..new_claim() };
        let (waiters, mut notified_versions) = ([0, 1, 2].map(|_| Uuid::new_v4()), [None; 3]);
        let first = claim();
        let mut row = row::Row::create(&first, now);
        let created = self.session.create(&self.table.sql, &first).unwrap();
        let mut held = [Some((first, 1)), None, None];
        assert!(matches!(created, Acquired::Taken { .. }));
        for step in steps {
            let (session, sql) = (&mut self.session, &self.table.sql);
            match *step {
                Step::Acquire { .. } | Step::AcquireNotified { .. } => {
                    let (who, waits, notified_version) = match *step {
                        Step::AcquireNotified { who } => (who, true, notified_versions[who]),
                        Step::Acquire { who, waits } => (who, waits, None),
                        _ => unreachable!("another step"),
                    };
                    let (claim, row_waiter) =
                        (claim(), waits.then_some(RowWaiter { id: waiters[who], notified_version }));
                    let answered = session.acquire(sql, &claim, row_waiter).unwrap();
                    let modelled = row.acquire(&claim, row_waiter, now).0.meaning(now);
                    assert_eq!(gist(&answered), gist(&modelled), "{step:?}");
                    notified_versions[who] = None;
                    match answered {
                        Acquired::Taken { granted, .. } => held[who] = Some((claim, granted.version)),
                        Acquired::Busy(busy) => notified_versions[who] = busy.notified_version(),
                        _ => {}
                    }
                }
                Step::Refresh { who } => {
                    let Some((claim, version)) = &held[who] else { continue };
                    let answered = session.refresh(sql, claim, *version).unwrap();
                    assert_eq!(answered, row.refresh(claim, *version, now), "{step:?}");
                }
                Step::Release { who, waits_again } => {
                    let Some((claim, version)) = &held[who] else { continue };
                    let waiter = Some(waiters[who]);
                    let was_released = row.released_at;
                    let answered = session.release(sql, claim, Some(*version), waiter, waits_again).unwrap();
                    let modelled = row.release(claim, Some(*version), waiter, waits_again, now);
                    assert_eq!(answered, modelled.map(|(waiters, _)| waiters), "{step:?}");
                    if row.released_at != was_released {
                        // The promise lasts until a step ends it.
                        row.released_at = Some(now + FAR);
                        self.set(&lock_id, "released_at = clock_timestamp() + interval '1 hour'");
                    }
                }
                Step::HandOver { who } => {
                    let (next, Some((claim, version))) = (claim(), &held[who]) else { continue };
                    let answered = session.hand_over(sql, claim, *version, &next).unwrap();
                    let answered = answered.map(|granted| (granted.version, granted.is_wanted));
                    let modelled = row.hand_over(claim, *version, &next, now);
                    assert_eq!(answered, modelled.map(|((version, _, is_wanted), _)| (version, is_wanted)), "{step:?}");
                    held[who] = answered.map(|(version, _)| (next, version)).or(held[who].take());
                }
                Step::Withdraw { who } => {
                    session.withdraw(sql, &lock_id, waiters[who]).unwrap();
                    row.withdraw(waiters[who], now);
                }
                Step::Pass(5_000..) => {
                    row.lease_end = now - Duration::from_secs(1);
                    self.set(&lock_id, "lease_expire_time = clock_timestamp() - interval '1 second'");
                }
                Step::Pass(50..) if row.released_at.is_some() => {
                    row.released_at = Some(now - Duration::from_secs(1));
                    self.set(&lock_id, "released_at = clock_timestamp() - interval '1 second'");
                }
                Step::Pass(_) => {}
            }
            assert_eq!(self.state(&lock_id), state_of(&row, now), "after {step:?}");
        }
    }
}

#[test]
fn the_model_answers_as_the_server_does() {
    let server = RefCell::new(Server { table: Table::new(), session: session(), client: client() });
    let config = ProptestConfig { cases: 100, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| server.borrow_mut().compare(&steps));
}
