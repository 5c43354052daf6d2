//! A toy of the table's row: what the statements of [`crate::sql`] do to it, one at a time, in memory and by a clock
//! that is given. Test `the_toy_answers_as_the_server_does` (in `session/likeness.rs`) holds it to the real ones.

use std::time::Duration;

use uuid::Uuid;

use crate::answer::{AcquireRow, Claim, Ticket};
use crate::sql::{GRACE, LONGEST_STEPS, MAX_WAITERS, STEP};
use crate::sync::Instant;

/// Whom a statement notifies, when to look, and in which version the lock may be taken then, or 0.
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

    /// Since when it is free, if it is.
    fn free_since(&self, now: Instant) -> Option<Instant> {
        let since = self.released_at.map_or(self.lease_end, |at| at.min(self.lease_end));
        (self.released_at.is_some() || self.lease_end <= now).then_some(since)
    }

    /// Whether it is promised to nobody any more.
    fn is_lapsed(&self, now: Instant) -> bool {
        self.free_since(now).is_some_and(|since| since + GRACE <= now || since > now)
    }

    fn may_take(&self, ticket: Option<Ticket>, now: Instant) -> bool {
        let is_for = |ticket: Ticket| {
            self.waiters.first().is_none_or(|first| *first == ticket.waiter)
                || ticket.turn == Some(self.version) && self.is_lapsed(now)
        };
        self.free_since(now).is_some() && ticket.is_none_or(is_for)
    }

    fn place_of(&self, waiter: Uuid) -> Option<usize> {
        self.waiters.iter().position(|other| *other == waiter)
    }

    /// The first two, and the last.
    fn told(&self, turn: i64) -> Vec<Notified> {
        let last = self.waiters.len().saturating_sub(1);
        let told = self.waiters.iter().enumerate().filter(|(place, _)| *place < 2 || *place == last);
        told.map(|(place, waiter)| match place {
            0 => (*waiter, Duration::ZERO, turn),
            1 => (*waiter, GRACE, turn),
            _ => (*waiter, GRACE + (STEP * (place as u32 - 1)).min(LONGEST_STEPS), 0),
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

    /// The answer, and who is notified.
    pub(crate) fn acquire(
        &mut self,
        claim: &Claim,
        ticket: Option<Ticket>,
        now: Instant,
    ) -> (AcquireRow, Vec<Notified>) {
        let before = self.clone();
        let waiter = ticket.map(|ticket| ticket.waiter);
        let taken = self.may_take(ticket, now);
        if taken {
            let sent_away = match waiter {
                Some(waiter) => self.place_of(waiter).map_or(self.waiters.len(), |place| place + 1),
                None => usize::from(self.is_lapsed(now)),
            };
            self.waiters = self.waiters.iter().skip(sent_away).copied().collect();
            self.begin_hold(claim, now);
        } else if let Some(waiter) = waiter.filter(|waiter| self.place_of(*waiter).is_none())
            && self.waiters.len() < MAX_WAITERS as usize
        {
            self.waiters.push(waiter);
        }
        let seen = if taken { &before } else { &*self };
        let place = waiter.and_then(|waiter| seen.place_of(waiter));
        let mut notified = Vec::new();
        if !taken && ticket.is_some() && seen.is_lapsed(now) {
            let earlier = (0_u32..).zip(seen.waiters.iter().take(place.unwrap_or(seen.waiters.len())));
            notified.extend(earlier.map(|(place, waiter)| (*waiter, (STEP * place).min(LONGEST_STEPS), seen.version)));
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
            may_take: seen.may_take(ticket, now),
            has_notified: !taken && ticket.is_some() && seen.is_lapsed(now),
            waits: ticket.is_some(),
            place: place.map(|place| place as u32 + 1),
            waiters: seen.waiters.len() as u32,
        };
        (row, notified)
    }

    /// Whether others wait; none if the hold is not there any more.
    pub(crate) fn refresh(&mut self, claim: &Claim, version: i64, now: Instant) -> Option<bool> {
        if self.version != version || !self.is_held_by(claim, now) {
            return None;
        }
        self.lease_end = now + claim.lease;
        Some(!self.waiters.is_empty())
    }

    /// How many wait, and who is notified; none if there was nothing to release.
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
        Some((self.waiters.len() as u32, self.told(self.version)))
    }

    /// The next claim's hold, and who is notified; none if there was none to hand over.
    pub(crate) fn hand_over(
        &mut self,
        claim: &Claim,
        version: i64,
        next: &Claim,
        now: Instant,
    ) -> Option<(Given, Vec<Notified>)> {
        if self.version != version || !self.is_held_by(claim, now) {
            return None;
        }
        let end = self.lease_end;
        self.begin_hold(next, now);
        let given = (self.version, self.lease_end.saturating_duration_since(now), !self.waiters.is_empty());
        Some((given, if self.lease_end < end { self.told(0) } else { Vec::new() }))
    }

    /// Who is notified.
    pub(crate) fn withdraw(&mut self, waiter: Uuid, now: Instant) -> Vec<Notified> {
        let before = self.waiters.len();
        self.waiters.retain(|other| *other != waiter);
        let is_news = self.waiters.len() < before && self.free_since(now).is_some();
        if is_news { self.told(self.version) } else { Vec::new() }
    }
}
