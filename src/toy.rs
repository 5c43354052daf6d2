//! A toy of the table's row: what the statements of [`crate::sql`] do to it, one at a time, in memory and by a clock
//! that is given. Test `the_toy_answers_as_the_server_does` (in `session/likeness.rs`) holds it to the real ones.

use std::time::Duration;

use uuid::Uuid;

use crate::answer::{AcquireRow, Claim};
use crate::sql::GRACE;
use crate::sync::Instant;

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) version: i64,
    pub(crate) owner_id: String,
    pub(crate) lease_id: Uuid,
    pub(crate) lease_end: Instant,
    pub(crate) released_at: Option<Instant>,
    pub(crate) waiters: Vec<Uuid>,
}

/// A hold as a hand-over or a creation gives it: its version, what is left of its lease, and whether others wait.
pub(crate) type Given = (i64, Duration, bool);

impl Row {
    /// The first hold of a lock.
    pub(crate) fn create(claim: &Claim, now: Instant) -> Row {
        Row {
            version: 1,
            owner_id: claim.owner_id.clone(),
            lease_id: claim.lease_id,
            lease_end: now + claim.lease,
            released_at: None,
            waiters: Vec::new(),
        }
    }

    /// Whether this claim holds the lock.
    pub(crate) fn is_held_by(&self, claim: &Claim, now: Instant) -> bool {
        self.lease_id == claim.lease_id && self.released_at.is_none() && self.lease_end > now
    }

    fn is_free(&self, waiter: Option<Uuid>, now: Instant) -> bool {
        let is_for = |first: &Uuid| waiter.is_none_or(|waiter| waiter == *first);
        self.lease_end <= now
            || self.released_at.is_some_and(|at| self.waiters.first().is_none_or(is_for) || at + GRACE <= now)
    }

    fn begin_hold(&mut self, claim: &Claim, now: Instant) {
        self.version += 1;
        self.owner_id.clone_from(&claim.owner_id);
        self.lease_id = claim.lease_id;
        self.lease_end = now + claim.lease;
        self.released_at = None;
    }

    pub(crate) fn acquire(&mut self, claim: &Claim, waiter: Option<Uuid>, now: Instant) -> AcquireRow {
        let cur = self.clone();
        let is_mine = cur.lease_id == claim.lease_id;
        let place = waiter.and_then(|waiter| cur.waiters.iter().position(|other| *other == waiter));
        let is_taken = !is_mine && cur.is_free(waiter, now);
        let mut is_queued = false;
        if is_taken {
            if cur.released_at.is_some() {
                // Whoever stood before it was told, and didn't come.
                self.waiters = cur.waiters.iter().skip(place.unwrap_or(0) + 1).copied().collect();
            }
            self.waiters.retain(|other| Some(*other) != waiter);
            self.begin_hold(claim, now);
        } else if !is_mine && place.is_none() {
            self.waiters.extend(waiter);
            is_queued = waiter.is_some();
        }
        let end = match cur.released_at {
            _ if is_taken => self.lease_end,
            None => cur.lease_end,
            Some(at) => cur.lease_end.min(at + GRACE),
        };
        let stands = place.is_some_and(|place| cur.released_at.is_none() || place > 0);
        AcquireRow {
            taken: is_taken.then_some(self.version),
            newest: cur.version,
            owner_id: cur.owner_id,
            is_mine,
            is_released: cur.released_at.is_some(),
            left: end.saturating_duration_since(now),
            is_wanted: is_taken && !self.waiters.is_empty(),
            is_queued: waiter.map(|_| is_queued || stands),
        }
    }

    /// Whether others wait; none if the hold is not there any more.
    pub(crate) fn refresh(&mut self, claim: &Claim, version: i64, now: Instant) -> Option<bool> {
        if self.version != version || !self.is_held_by(claim, now) {
            return None;
        }
        self.lease_end = now + claim.lease;
        Some(!self.waiters.is_empty())
    }

    /// Who is told, in the order of their places; none if there was nothing to release.
    pub(crate) fn release(
        &mut self,
        claim: &Claim,
        version: Option<i64>,
        waiter: Option<Uuid>,
        waits_again: bool,
        now: Instant,
    ) -> Option<Vec<Uuid>> {
        if version.is_some_and(|version| version != self.version) || self.lease_id != claim.lease_id {
            return None;
        }
        self.released_at = self.released_at.or(Some(now));
        let is_awaited = self.waiters.iter().any(|other| Some(*other) != waiter);
        self.waiters.retain(|other| Some(*other) != waiter);
        if is_awaited && waits_again {
            self.waiters.extend(waiter);
        }
        Some(self.waiters.clone())
    }

    /// The next claim's hold, also if this was asked before; none if there was none to hand over.
    pub(crate) fn hand_over(&mut self, claim: &Claim, version: i64, next: &Claim, now: Instant) -> Option<Given> {
        if self.version == version && self.is_held_by(claim, now) {
            self.begin_hold(next, now);
        } else if self.lease_id != next.lease_id {
            return None;
        }
        Some((self.version, self.lease_end.saturating_duration_since(now), !self.waiters.is_empty()))
    }

    /// Who is told.
    pub(crate) fn withdraw(&mut self, waiter: Uuid) -> Vec<Uuid> {
        let before = self.waiters.len();
        self.waiters.retain(|other| *other != waiter);
        let is_news = self.waiters.len() < before && self.released_at.is_some();
        if is_news { self.waiters.clone() } else { Vec::new() }
    }
}
