//! What may fail, and what holds then.
//!
//! # The failure model
//!
//! Any of these may happen at any time, several at once:
//!
//! - a process or a thread is killed, stopped for any time, or slow; its wall clock jumps;
//! - a connection breaks, is slow, or swallows what is sent in one or both directions; a request or an answer comes late, or is lost;
//! - the server crashes, restarts, freezes, ends any session, lets nobody in; somebody's transaction keeps old rows or locks ours.
//!
//! Four things are assumed. What is said below holds as long as they do:
//!
//! - the database keeps what it has committed (no `fsync = off`, no restore, no failover that loses commits);
//! - its clock doesn't jump, and within a lease parts from ours by less than the safety margin (see [the crate](crate#how-the-lease-works));
//! - the machine of a holder isn't suspended (on Linux, `Instant` stands still meanwhile);
//! - nobody else writes to the table.
//!
//! # What holds, whatever fails
//!
//! - **One owner.** No hold is trusted ([`is_held`](crate::LockGuard::is_held)) while, or after, a newer one of its lock is.
//! - **The version tells the order.** [`version`](crate::LockGuard::version) grows with every hold, and belongs to one hold.
//! - **Everybody goes on.** When the faults are over, whoever waits gets the lock, within the lease of whoever died holding it. Nothing is left over: no
//!   hold, connection, thread or place in a row.
//! - **Every call comes back** in the time that its documentation says; and nothing panics.
//! - **Nothing is lost for nothing.** A hold whose refreshes get through is not lost, and a lock that nobody wants is not refused.
//!
//! Test `whatever_is_hurt_the_verdict_holds` hurts worker processes, their network and their server in all of these ways, drawn from a seed,
//! records what every thread saw, and has it judged by rules that know nothing of how the lock is made. `scripts/planted-bugs.sh`
//! breaks the lock on purpose in fifteen ways, each of which these rules find.
//!
//! # What if …
//!
//! | | then | shown by |
//! | --- | --- | --- |
//! | a holder is killed | the lock is free when its lease has run out, and taken within half a second by who waits | test `a_killed_holders_lock_is_free_a_second_after_its_lease_at_the_latest`, test `a_dead_holders_lock_is_taken_within_half_a_second_of_its_expiry` |
//! | a holder is stopped, or its machine is slow, for longer than its lease | somebody else may have the lock; the first thing that it sees when it looks is that it doesn't. What it does without looking is done all the same | test `a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes` |
//! | a holder panics | the guard releases | test `a_panic_releases_the_lock` |
//! | the network is slow | trust counts from the request: a late answer extends nothing | test `trust_counts_from_the_request_however_slow_the_answer` |
//! | the network swallows packets, or the server freezes | the hold is lost at its deadline, before its lease ends; calls come back | test `with_all_packets_swallowed_every_call_comes_back`, test `with_every_process_of_the_server_stopped_every_call_comes_back` |
//! | an answer is lost | an acquire recognises its own hold, a release is not taken for a lost lease | test `an_acquire_whose_answer_was_lost_recognises_its_own_hold`, test `a_release_whose_answer_was_lost_is_not_taken_for_a_lost_lease` |
//! | a caller gives up, and what it asked for happens later | it is undone | test `a_waiter_that_gave_up_leaves_no_lock_behind`, test `an_acquire_that_commits_after_its_repetition_leaves_no_lock_behind` |
//! | the server restarts or crashes | a hold survives if that is over before its lease is. A *release* of the last 0.6 s may be undone: then the lease has to run out | test `a_hold_survives_a_restart_and_a_crash_of_the_server`, test `granted_leases_are_durable_whatever_the_roles_default_is_and_releases_need_not_be` |
//! | somebody's transaction locks the row | it is busy, and not waited for in the server; refreshes wait, and the hold may be lost | test `a_locked_row_is_busy_and_not_waited_for`, test `a_wait_behind_a_row_lock_ends_in_time_and_the_refresh_comes_through_afterwards` |
//! | the primary dies, and its synchronous standby is promoted | as a crash | test `the_primary_dies_under_load_and_the_verdict_holds`, test `a_hold_outlives_its_primary` |
//! | commits are lost: an asynchronous standby, a restore from a backup | two may own the lock for a while, and **a version may come twice**: see below | test `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary` |
//!
//! # What nothing here gives
//!
//! That a holder *acts* only while it holds. It can be paused between looking and writing, for as long as one likes: the harness above
//! counts such writes, and finds some. Where that must not happen, let what is written carry the version, and refuse one that is smaller
//! than the greatest that was seen.
//!
//! # A primary and a standby
//!
//! Name both hosts, and ask for the one that can be written to:
//!
//! ```text
//! host=db1,db2 port=5432,5432 user=app password=secret dbname=app target_session_attrs=read-write
//! ```
//!
//! Without `target_session_attrs=read-write` a standby that answers first is used, refuses every attempt, and grants nothing
//! (test `a_standby_is_not_used_before_it_is_promoted`). Take care that the old primary is dead, or can't be reached, before the standby is
//! promoted: one whose processes hang, and whose kernel accepts connections, is asked first and answers nothing.
//!
//! ## A synchronous standby
//!
//! It is in `synchronous_standby_names`, and no other one is promoted. An acquire or a refresh is acknowledged when the standby has it on its disk, so
//! that everything above holds across the death of the primary (test `no_two_own_a_lock_while_the_primary_dies_under_load`, test
//! `a_hold_that_is_recognised_waits_for_the_standby_too`, test `acquires_that_were_not_answered_when_the_primary_died_are_settled`). Its limits:
//!
//! - *A release doesn't wait for the standby*, nor for the disk. One that was acknowledged just before the primary died may be undone, and then its lease
//!   has to run out (test `a_release_that_the_standby_had_not_got_is_lost_and_the_lease_runs_out`). For a lock that changes hands all the
//!   time that is likely. All other locks can be had as soon as the standby is promoted. Choose the lease accordingly.
//! - *Without its standby a primary grants nothing*: commits wait, acquires time out, and holds are lost at their deadlines (test
//!   `a_refresh_that_commits_after_the_hold_was_lost_keeps_nothing`). Two standbys and `ANY 1 (…)` avoid that.
//! - *`synchronous_commit`* of the role must be `on` or stronger. `off` is turned into `on`; with `local` the standby isn't waited for.
//! - *`pg_cancel_backend`* on a commit that waits for the standby makes PostgreSQL acknowledge it, with no more than a warning: such a hold is lost
//!   with the primary, and two can own the lock. The library cancels nothing, and its `statement_timeout` doesn't end that wait (test
//!   `only_a_cancel_by_hand_acknowledges_a_hold_that_the_standby_has_not_got`). Use `pg_terminate_backend`, which acknowledges nothing.
//!
//! ## An asynchronous standby, or a backup
//!
//! It may lack the last commits. For a lock whose last acquire is among them (test
//! `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary`):
//!
//! - *Not one owner.* The new primary gives the lock to the next one at once. The first holder trusts its hold until its next refresh, which
//!   says that it is lost, or, if that doesn't get through, until its deadline.
//! - *Guaranteed: it hears of it* by that refresh, and touches its successor's row no more: a hold is lock, version and lease id.
//! - *A version may come twice*: the next holder gets the lost one again. Data elsewhere that only compares numbers takes a late write of the
//!   first holder for one of the second.
//! - *Data in the same database* goes back together with the lock: what was written under the lost hold is lost with it. A check of the hold
//!   in the same transaction must compare its `lease_id`, and not the version alone.
//!
//! What to do, before clients are let in again, and with the old primary dead for certain; with the longest lease that any client uses instead
//! of the 30 s:
//!
//! ```sql
//! UPDATE storage_lock SET version = version + 1000000000, owner_id = 'failover',
//!     lease_id = '00000000-0000-0000-0000-000000000000', lock_begin_time = clock_timestamp(),
//!     lease_expire_time = clock_timestamp() + interval '30 seconds', released_at = NULL;
//! ```
//!
//! It raises every version above all that were given, ends every hold from before, and keeps everybody off for a lease: by then who held a
//! lock has lost its trust, whether or not it heard of the failover (test
//! `versions_raised_before_clients_are_let_in_keep_one_owner_after_a_loss`). A lock whose very first hold was lost has no row: insert one, with
//! such a version and lease, where its version matters. For one owner alone it is enough to keep clients out for the longest lease.
