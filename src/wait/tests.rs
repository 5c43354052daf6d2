//! What the head of a queue does next, as time passes and events come.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::limit::WaitLimit;
use super::queue::{LOCAL_HAND_OVER_TIME, Successor, WaitQueues, claim};
use super::ticket::{NextStep, Ticket};
use crate::db::answer::{Busy, Granted};
use crate::db::sql::GRACE;
use crate::db::workers::Failed;
use crate::error::Error;
use crate::hold::Hold;
use crate::options::LockOptions;
use crate::sync::{Instant, thread};

const LONG: Duration = Duration::from_secs(30);
const BUSY: Busy = Busy {
    version: 1,
    owner_id: String::new(),
    is_free: false,
    left: LONG,
    has_notified: false,
    position: Some(1),
    waiters: 1,
};

fn options() -> Arc<LockOptions> {
    Arc::new(LockOptions::new("l"))
}

fn granted(version: i64) -> Granted {
    Granted { version, sent: Instant::now(), left: LONG, is_wanted: false }
}

fn take(ticket: &Ticket<'_>, version: i64) -> Arc<Hold> {
    assert!(matches!(ticket.next_step(&WaitLimit::Forever), NextStep::Ask(_)));
    let hold = ticket.waiter().hold(ticket.waiter().claim(Instant::now()), granted(version), None);
    ticket.acquired(&hold);
    hold
}

fn soon() -> WaitLimit {
    WaitLimit::Until(Instant::now() + Duration::from_millis(20))
}

#[test]
fn only_the_head_asks_and_only_while_the_lock_is_not_ours() {
    let queues = WaitQueues::default();
    let [head, next] = [0, 1].map(|_| queues.join(&options(), "o"));
    let hold = take(&head, 1);
    // While this process holds the lock, nobody asks, and the lock is known to be busy.
    assert!(matches!(next.next_step(&soon()), NextStep::GiveUp(None)));
    assert!(!queues.release_hold(&hold, Instant::now(), false));
    assert!(matches!(next.next_step(&soon()), NextStep::Ask(_)));
    let last = queues.join(&options(), "o");
    assert!(matches!(last.next_step(&soon()), NextStep::GiveUp(_)));
}

#[test]
fn what_is_told_while_the_head_asks_is_kept_until_it_has_its_answer() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    queues.notified("l", Duration::ZERO, None);
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    // A notification for the last in the row doesn't undo one for the first.
    queues.notified("l", Duration::ZERO, None);
    queues.notified("l", 7 * GRACE, None);
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    assert!(matches!(ticket.next_step(&soon()), NextStep::GiveUp(None)));
    // A release of another lock changes nothing.
    queues.notified("l2", Duration::ZERO, None);
    assert!(matches!(ticket.next_step(&soon()), NextStep::GiveUp(None)));
}

#[test]
fn those_who_are_told_later_ask_later() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    let notified_at = Instant::now();
    queues.notified("l", 2 * GRACE, None);
    assert!(matches!(ticket.next_step(&WaitLimit::Forever), NextStep::Ask(_)));
    assert!(notified_at.elapsed() >= 2 * GRACE, "{:?}", notified_at.elapsed());
}

#[test]
fn a_notification_only_makes_a_waiter_look_sooner() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    for is_asking in [false, true] {
        assert!(matches!(ticket.next_step(&WaitLimit::Until(Instant::now() + LONG)), NextStep::Ask(_)));
        let busy = || ticket.busy(Some(&Busy { left: GRACE, ..BUSY.clone() }), true, &WaitLimit::Forever);
        let notified = || [LONG, 100 * LONG].map(|delay| queues.notified("l", delay, Some(1)));
        if is_asking {
            notified();
            busy();
        } else {
            busy();
            notified();
        }
        let start = Instant::now();
        assert!(matches!(ticket.next_step(&WaitLimit::Until(start + LONG / 3)), NextStep::Ask(None)), "not in time");
    }
}

/// Each notification makes the waiter ask, and notify the processes before it again.
#[test]
fn a_flood_of_notifications_does_not_put_a_turn_off() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    let busy = Busy { is_free: true, has_notified: true, position: Some(2), waiters: 2, ..BUSY.clone() };
    let start = Instant::now();
    loop {
        match ticket.next_step(&WaitLimit::Until(start + LONG)) {
            NextStep::Ask(Some(version)) => {
                assert_eq!(version, busy.version);
                break;
            }
            NextStep::Ask(None) => ticket.busy(Some(&busy), true, &WaitLimit::Forever),
            _ => panic!("it doesn't ask"),
        }
        queues.notified("l", Duration::ZERO, None);
        assert!(start.elapsed() < LONG / 10, "its turn doesn't come");
        thread::sleep(Duration::from_millis(1));
    }
    // A time for another version doesn't count for this one.
    let next = Busy { version: 2, ..busy };
    ticket.busy(Some(&next), true, &WaitLimit::Forever);
    queues.notified("l", Duration::ZERO, None);
    assert!(matches!(ticket.next_step(&WaitLimit::Until(start + LONG)), NextStep::Ask(None)), "of the version before");
}

/// The notifications of the waiters behind it make it ask again and again.
#[test]
fn whoever_has_notified_those_before_it_has_its_turn_in_time_however_often_it_looks() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    let free =
        Busy { version: 7, is_free: true, has_notified: true, position: Some(200), waiters: 200, ..BUSY.clone() };
    let (start, longest) = (Instant::now(), free.sleep(1.0));
    while let NextStep::Ask(may_take) = ticket.next_step(&WaitLimit::Until(start + LONG)) {
        if may_take == Some(7) {
            break;
        }
        assert!(start.elapsed() < 5 * longest, "no turn after {:?}", start.elapsed());
        ticket.busy(Some(&free), true, &WaitLimit::Forever);
        queues.notified("l", Duration::from_millis(5), None);
    }
    assert!(start.elapsed() >= longest / 2, "the others had no time to come: {:?}", start.elapsed());
}

#[test]
fn a_release_of_our_own_postpones_no_look() {
    let queues = WaitQueues::default();
    let [first, second] = [0, 1].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    assert!(matches!(queues.successor(&hold), Successor::Waiter(_)));
    // The notification comes while the release is under way.
    queues.notified("l", Duration::ZERO, None);
    assert!(!queues.release_hold(&hold, Instant::now() + LONG, true));
    assert!(matches!(second.next_step(&soon()), NextStep::Ask(_)), "it waits for what the release says");
}

#[test]
fn a_head_that_ends_while_it_asks_leaves_the_asking_to_the_next() {
    let queues = WaitQueues::default();
    let [head, next] = [0, 1].map(|_| queues.join(&options(), "o"));
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    head.leave(false);
    assert!(matches!(next.next_step(&soon()), NextStep::Ask(_)));
}

#[test]
fn the_next_head_goes_on_with_what_is_known_and_the_last_one_withdraws() {
    let queues = WaitQueues::default();
    let [head, next] = [0, 1].map(|_| queues.join(&options(), "o"));
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    head.busy(Some(&BUSY), true, &WaitLimit::Forever);
    assert!(!head.leave(false).is_in_row);
    assert!(matches!(next.next_step(&soon()), NextStep::GiveUp(None)), "it asks what is known");
    assert!(next.leave(false).is_in_row);
    assert!(queues.is_empty());
}

#[test]
fn a_hold_goes_to_the_head_or_comes_back() {
    let queues = WaitQueues::default();
    let [first, second, third] = [0, 1, 2].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    let Successor::Waiter(head) = queues.successor(&hold) else { panic!("nobody") };
    assert!(Arc::ptr_eq(&head, &second.waiter));
    let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
    // The second waiter gives up before the hold reaches it. The third gives up after.
    second.leave(false);
    assert!(!queues.hand(&head, &handed));
    let Successor::Waiter(head) = queues.successor(&handed) else { panic!("nobody") };
    let again = head.hold(head.claim(Instant::now()), granted(3), Some(&handed));
    assert!(queues.hand(&head, &again));
    assert!(matches!(third.next_step(&soon()), NextStep::Handed(_)));
    let left = third.leave(false).hold.expect("a hold that was not taken up");
    assert_eq!(left.version, 3);
}

#[test]
fn an_answer_to_one_that_was_handed_a_hold_meanwhile_changes_nothing() {
    let queues = WaitQueues::default();
    let [first, second, third] = [0, 1, 2].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    // The second waiter asks while this process gets the lock, by a call that doesn't wait.
    queues.lose_hold(&hold);
    assert!(matches!(second.next_step(&soon()), NextStep::Ask(_)));
    queues.begin_hold(&hold);
    let Successor::Waiter(head) = queues.successor(&hold) else { panic!("nobody") };
    let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
    assert!(queues.hand(&head, &handed));
    assert!(!queues.release_hold(&handed, Instant::now(), false));
    assert!(matches!(third.next_step(&soon()), NextStep::Ask(_)));
    queues.notified("l", Duration::ZERO, None);
    second.busy(Some(&BUSY), true, &WaitLimit::Forever);
    third.busy(Some(&BUSY), true, &WaitLimit::Forever);
    assert!(matches!(third.next_step(&soon()), NextStep::Ask(_)), "what it was told is lost");
}

#[test]
fn a_turn_ends_when_others_wait() {
    let queues = WaitQueues::default();
    let [first, _second] = [0, 1].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    assert!(matches!(queues.successor(&hold), Successor::Waiter(_)));
    hold.state().is_wanted = true;
    assert!(matches!(queues.successor(&hold), Successor::Waiter(_)), "not at once");
    thread::sleep(LOCAL_HAND_OVER_TIME);
    assert!(matches!(queues.successor(&hold), Successor::Others));
    hold.state().is_wanted = false;
    assert!(matches!(queues.successor(&hold), Successor::Waiter(_)), "nobody else waits");
    assert!(!queues.release_hold(&hold, Instant::now(), false));
    assert!(matches!(queues.successor(&hold), Successor::Unknown));
}

#[test]
fn who_joins_where_the_first_attempt_fails_tries_for_itself() {
    let queues = WaitQueues::default();
    let [head, next] = [0, 1].map(|_| queues.join(&options(), "o"));
    let error = || Failed::with(Error::Timeout { action: "ask".to_owned(), waiting_for: "an answer", after: LONG });
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    assert!(head.failed(error(), Instant::now(), &WaitLimit::Forever).is_err());
    head.leave(false);
    let start = Instant::now();
    assert!(matches!(next.next_step(&WaitLimit::Forever), NextStep::Ask(_)));
    assert!(start.elapsed() < Duration::from_millis(50), "it waits for {:?}", start.elapsed());
    // Once the lock was seen to be busy, a failed attempt doesn't end the wait.
    next.busy(Some(&Busy { left: Duration::ZERO, ..BUSY.clone() }), false, &WaitLimit::Forever);
    assert!(matches!(next.next_step(&WaitLimit::Forever), NextStep::Ask(_)));
    assert!(next.failed(error(), Instant::now(), &WaitLimit::Forever).is_ok());
    // It goes on for as long as a lease.
    assert!(next.failed(error(), Instant::now(), &soon()).is_ok());
    queues.by_lock.lock().unwrap().get_mut("l").unwrap().unreachable_since = Instant::now().checked_sub(2 * LONG);
    assert!(next.failed(error(), Instant::now(), &WaitLimit::Forever).is_ok(), "it hasn't waited for so long itself");
}

#[test]
fn a_listener_that_comes_or_goes_makes_heads_ask() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    assert!(queues.any_waits());
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    queues.listening_changed();
    assert!(matches!(ticket.next_step(&soon()), NextStep::Ask(_)));
    ticket.busy(Some(&BUSY), true, &WaitLimit::Forever);
    queues.left_row("l");
    let hold = take(&ticket, 1);
    assert!(!queues.any_waits(), "one that waits for its own process doesn't count");
    assert!(!queues.release_hold(&hold, Instant::now(), false));
    assert!(!queues.any_waits() && queues.is_empty());
}

fn hold(version: i64, left: Duration) -> Arc<Hold> {
    let granted = Granted { left, ..granted(version) };
    Arc::new(Hold::new(
        claim(&options(), "o", Instant::now()),
        granted,
        options().refresh_interval(),
        options().on_lost.clone(),
        thread::current().id(),
        granted.sent,
    ))
}

#[test]
fn one_whose_patience_is_over_asks_once_more_and_no_more() {
    let queues = WaitQueues::default();
    let ticket = queues.join(&options(), "o");
    let limit = soon();
    let mut asked_late = 0;
    while matches!(ticket.next_step(&limit), NextStep::Ask(_)) {
        asked_late += usize::from(limit.is_over(Instant::now()));
        thread::sleep(Duration::from_millis(5));
        queues.notified("l", Duration::ZERO, None);
        ticket.busy(Some(&BUSY), true, &limit);
    }
    assert!(asked_late <= 1, "asked {asked_late} times");
}

#[test]
fn the_end_of_a_hold_wakes_the_head_also_if_nobody_says_so() {
    let queues = WaitQueues::default();
    queues.begin_hold(&hold(1, Duration::from_secs(3) + Duration::from_millis(50)));
    let ticket = queues.join(&options(), "o");
    let start = Instant::now();
    assert!(matches!(ticket.next_step(&WaitLimit::Until(start + LONG)), NextStep::Ask(_)));
    assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
}

#[test]
fn an_older_hold_does_not_hide_a_newer_one() {
    let queues = WaitQueues::default();
    let (old, new) = (hold(5, LONG), hold(7, LONG));
    queues.begin_hold(&new);
    queues.begin_hold(&old);
    assert_eq!(queues.reenter("l", "o").expect("the newer one is entered again").version, 7);
}

#[test]
fn a_hold_that_nobody_took_up_is_not_entered_again() {
    let queues = WaitQueues::default();
    let [first, second] = [0, 1].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    let Successor::Waiter(head) = queues.successor(&hold) else { panic!("nobody") };
    let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
    second.leave(false);
    assert!(!queues.hand(&head, &handed));
    // This is the thread and the owner for which the hold was meant.
    assert!(queues.reenter("l", "o").is_none());
}

#[test]
fn a_place_in_the_row_for_nobody_is_given_up() {
    let queues = WaitQueues::default();
    let [first, second] = [0, 1].map(|_| queues.join(&options(), "o"));
    let hold = take(&first, 1);
    // The release puts this process into the row for the second waiter, which leaves before it asks.
    assert!(!queues.release_hold(&hold, Instant::now() + LONG, true));
    assert!(second.leave(false).is_in_row);
    // The same, but the waiter has left before the release.
    let hold = take(&queues.join(&options(), "o"), 2);
    assert!(queues.release_hold(&hold, Instant::now() + LONG, true));
}

#[test]
fn who_waits_behind_a_patient_head_gives_up_after_a_lease_without_the_database() {
    let queues = WaitQueues::default();
    let [head, next] = [0, 1].map(|_| queues.join(&Arc::new(LockOptions::new("l").lease_expire_after(GRACE)), "o"));
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    head.busy(Some(&BUSY), true, &WaitLimit::Forever);
    let error = Failed::with(Error::Timeout { action: "ask".to_owned(), waiting_for: "an answer", after: LONG });
    queues.listening_changed();
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    head.failed(error, Instant::now(), &WaitLimit::Until(Instant::now() + LONG)).expect("patient");
    let start = Instant::now();
    let NextStep::GiveUp(Some(unreachable)) = next.next_step(&WaitLimit::Forever) else { panic!("it goes on") };
    assert!(unreachable >= GRACE && start.elapsed() < LONG / 2, "{unreachable:?}");
}

#[test]
fn one_in_a_hurry_waits_for_the_first_answer() {
    let queues = WaitQueues::default();
    let [head, hurried] = [0, 1].map(|_| queues.join(&options(), "o"));
    assert!(matches!(head.next_step(&soon()), NextStep::Ask(_)));
    let limit = WaitLimit::Until(Instant::now());
    thread::scope(|scope| {
        // The same ticket, in another thread.
        let (queues, waiter) = (&queues, Arc::clone(&hurried.waiter));
        let next_step = scope.spawn(move || Ticket { queues, waiter, last_asked: Cell::new(None) }.next_step(&limit));
        thread::sleep(Duration::from_millis(20));
        head.busy(Some(&BUSY), true, &WaitLimit::Forever);
        // The answer is that the lock is busy, which is no error.
        assert!(matches!(next_step.join().unwrap(), NextStep::GiveUp(None)));
    });
}
