//! A model of the table's row: what the statements of [`crate::db::sql`] do to it.
//!
//! One statement at a time, in memory, and by a clock that the caller gives. Test
//! `the_model_answers_as_the_server_does` (in `db/session/tests/conformance.rs`) compares it with the real
//! statements.

use std::time::Duration;

use uuid::Uuid;

use crate::db::answer::{AcquireRow, Claim, RowWaiter};
use crate::db::sql::{GRACE, LONGEST_STEPS, MAX_WAITERS, STEP};
use crate::sync::Instant;

/// A notification: to which waiter, after which delay to look, and in which version the lock may be taken then, or 0.
pub(crate) type Notified = (Uuid, Duration, i64);

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) version: i64,
    pub(crate) owner_id: String,
    pub(crate) lease_id: Uuid,
    pub(crate) lease_end: Instant,
    pub(crate) released_at: Option<Instant>,
    pub(crate) waiters: Vec<Uuid>,
}

/// A hold that a hand-over granted: its version, what is left of its lease, and whether others wait.
pub(crate) type HandedOver = (i64, Duration, bool);

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

    /// Since when the lock is free, if it is.
    fn free_since(&self, now: Instant) -> Option<Instant> {
        let since = self.released_at.map_or(self.lease_end, |at| at.min(self.lease_end));
        (self.released_at.is_some() || self.lease_end <= now).then_some(since)
    }

    /// Whether the lock is free, and promised to nobody any more.
    fn is_lapsed(&self, now: Instant) -> bool {
        self.free_since(now).is_some_and(|since| since + GRACE <= now || since > now)
    }

    fn may_take(&self, row_waiter: Option<RowWaiter>, now: Instant) -> bool {
        let is_for = |row_waiter: RowWaiter| {
            self.waiters.first().is_none_or(|first| *first == row_waiter.id)
                || row_waiter.notified_version == Some(self.version) && self.is_lapsed(now)
        };
        self.free_since(now).is_some() && row_waiter.is_none_or(is_for)
    }

    fn position_of(&self, waiter: Uuid) -> Option<usize> {
        self.waiters.iter().position(|other| *other == waiter)
    }

    /// Notifications to the first two waiters, and to the last one.
    fn notified(&self, notified_version: i64) -> Vec<Notified> {
        let last = self.waiters.len().saturating_sub(1);
        let chosen = self.waiters.iter().enumerate().filter(|(position, _)| *position < 2 || *position == last);
        chosen
            .map(|(position, waiter)| match position {
                0 => (*waiter, Duration::ZERO, notified_version),
                1 => (*waiter, GRACE, notified_version),
                _ => (*waiter, GRACE + (STEP * (position as u32 - 1)).min(LONGEST_STEPS), 0),
            })
            .collect()
    }

    fn begin_hold(&mut self, claim: &Claim, now: Instant) {
        self.version += 1;
        self.owner_id.clone_from(&claim.owner_id);
        self.lease_id = claim.lease_id;
        self.lease_end = now + claim.lease;
        self.released_at = None;
    }

    /// Returns the answer, and the notifications.
    pub(crate) fn acquire(
        &mut self,
        claim: &Claim,
        row_waiter: Option<RowWaiter>,
        now: Instant,
    ) -> (AcquireRow, Vec<Notified>) {
        let before = self.clone();
        let waiter = row_waiter.map(|row_waiter| row_waiter.id);
        let taken = self.may_take(row_waiter, now);
        if taken {
            let removed = match waiter {
                Some(waiter) => self.position_of(waiter).map_or(self.waiters.len(), |position| position + 1),
                None => usize::from(self.is_lapsed(now)),
            };
            self.waiters = self.waiters.iter().skip(removed).copied().collect();
            self.begin_hold(claim, now);
        } else if let Some(waiter) = waiter.filter(|waiter| self.position_of(*waiter).is_none())
            && self.waiters.len() < MAX_WAITERS as usize
        {
            self.waiters.push(waiter);
        }
        let seen = if taken { &before } else { &*self };
        let position = waiter.and_then(|waiter| seen.position_of(waiter));
        let mut notified = Vec::new();
        if !taken && row_waiter.is_some() && seen.is_lapsed(now) {
            let earlier = (0_u32..).zip(seen.waiters.iter().take(position.unwrap_or(seen.waiters.len())));
            notified.extend(
                earlier.map(|(position, waiter)| (*waiter, (STEP * position).min(LONGEST_STEPS), seen.version)),
            );
        }
        let free_since = seen.free_since(now);
        let end = match free_since {
            _ if taken => self.lease_end,
            Some(since) => since + GRACE,
            None => seen.lease_end,
        };
        let row = AcquireRow {
            taken: taken.then_some(self.version),
            left: end.saturating_duration_since(now),
            is_wanted: taken && !self.waiters.is_empty(),
            version: seen.version,
            owner_id: seen.owner_id.clone(),
            is_released: seen.released_at.is_some(),
            is_free: free_since.is_some(),
            may_take: seen.may_take(row_waiter, now),
            has_notified: !taken && row_waiter.is_some() && seen.is_lapsed(now),
            waits: row_waiter.is_some(),
            position: position.map(|position| position as u32 + 1),
            waiters: seen.waiters.len() as u32,
        };
        (row, notified)
    }

    /// Returns whether others wait. None if the hold is gone.
    pub(crate) fn refresh(&mut self, claim: &Claim, version: i64, now: Instant) -> Option<bool> {
        if self.version != version || !self.is_held_by(claim, now) {
            return None;
        }
        self.lease_end = now + claim.lease;
        Some(!self.waiters.is_empty())
    }

    /// Returns how many wait, and the notifications. None if there was nothing to release.
    pub(crate) fn release(
        &mut self,
        claim: &Claim,
        version: Option<i64>,
        waiter: Option<Uuid>,
        waits_again: bool,
        now: Instant,
    ) -> Option<(u32, Vec<Notified>)> {
        if version.is_some_and(|version| version != self.version) || self.lease_id != claim.lease_id {
            return None;
        }
        self.released_at = self.released_at.or(Some(now));
        let is_awaited = self.waiters.iter().any(|other| Some(*other) != waiter);
        self.waiters.retain(|other| Some(*other) != waiter);
        if is_awaited && waits_again {
            self.waiters.extend(waiter);
        }
        Some((self.waiters.len() as u32, self.notified(self.version)))
    }

    /// Returns the next claim's hold, and the notifications. None if there was no hold to hand over.
    pub(crate) fn hand_over(
        &mut self,
        claim: &Claim,
        version: i64,
        next: &Claim,
        now: Instant,
    ) -> Option<(HandedOver, Vec<Notified>)> {
        if self.version != version || !self.is_held_by(claim, now) {
            return None;
        }
        let end = self.lease_end;
        self.begin_hold(next, now);
        let handed = (self.version, self.lease_end.saturating_duration_since(now), !self.waiters.is_empty());
        Some((handed, if self.lease_end < end { self.notified(0) } else { Vec::new() }))
    }

    /// Returns the notifications.
    pub(crate) fn withdraw(&mut self, waiter: Uuid, now: Instant) -> Vec<Notified> {
        let before = self.waiters.len();
        self.waiters.retain(|other| *other != waiter);
        let is_news = self.waiters.len() < before && self.free_since(now).is_some();
        if is_news { self.notified(self.version) } else { Vec::new() }
    }
}
