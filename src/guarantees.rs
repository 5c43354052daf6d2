//! What this lock guarantees: what holds always, what holds while clocks and the database behave, what only the fence gives, and what
//! nothing gives.
//!
//! Each sentence that promises something names the test that shows it.
//!
//! # In short
//!
//! - A hold has a *lease*. A process that holds a lock and doesn't refresh it any more, because it died, is stopped, or can't reach the
//!   database, loses it. A thread that hangs in a process that lives keeps it.
//! - The holder knows: [`is_held`](crate::LockGuard::is_held) turns false before anybody else can have the lock, and
//!   [`on_lost`](crate::LockOptions::on_lost) is called by then, unless the process is stopped. But it may be stopped between looking and
//!   acting, and then acts late.
//! - A late write to the same database is refused by a [`fence`](crate::LockGuard::fence). A late write elsewhere is refused if
//!   the place compares [`version`](crate::LockGuard::version)s, and has seen the newer one. Nothing else refuses it.
//!
//! # Which to use when
//!
//! Ask what happens if two do the work at once, for once.
//!
//! - *It is a waste* (a report is sent twice, a cache is filled twice): the lock is there for **efficiency**. The guard is enough; look at
//!   `is_held` between the steps of a long job.
//! - *It is wrong* (money moves twice, an older state replaces a newer one): the lock is there for **correctness**. Then every write has to be
//!   fenced:
//!
//! | what is written to | how |
//! | --- | --- |
//! | the database that keeps the lock | [`LockGuard::transaction`](crate::LockGuard::transaction), or [`fence`](crate::LockGuard::fence) in a transaction of yours (example `transfer`) |
//! | the same, by another driver | [`fence_statement`](crate::LockGuard::fence_statement) |
//! | the same, and the lock is to be free from that moment on | [`unlock_in`](crate::LockGuard::unlock_in) |
//! | another PostgreSQL database | its tables refuse an older version by a trigger: [`version_check_ddl`](crate::PostgresStorage::version_check_ddl) |
//! | an object store, or anything that writes on a condition | refuse a version that is smaller than the one that is there (example `object_store`) |
//! | anything else: a mail, a payment, a device | nothing helps but to make it harmless when it happens twice |
//!
//! The distinction is Martin Kleppmann's, in "How to do distributed locking" (2016); so is the term *fencing token* for such a version.
//!
//! # The failure model
//!
//! Any of these may happen at any time, several at once:
//!
//! - a process or a thread is killed, stopped for any time, or slow; its wall clock jumps;
//! - a connection breaks, is slow, or swallows what is sent in one or both directions; a request or an answer comes late, or is lost;
//! - the server crashes, restarts, freezes, ends any session, lets nobody in; somebody's transaction keeps old rows or locks ours.
//!
//! # What holds always
//!
//! Whatever of that happens, and whatever any clock says:
//!
//! - **What is committed under a fence is committed while the lock is nobody else's**, and before anything that a later owner does in the database
//!   (test `nobody_acquires_the_lock_before_a_fenced_transaction_ends`, test
//!   `of_a_takeover_and_a_fenced_commit_at_the_same_time_the_order_is_that_of_the_versions`).
//! - **The version tells the order.** It grows with every hold, and belongs to one hold (test `the_version_grows_with_every_hold`), as long as
//!   the database keeps what it has committed, and nobody deletes rows.
//! - **A guard touches its own hold only** (test `a_hold_that_was_taken_over_is_lost_and_touches_its_successor_no_more`).
//! - **Every call comes back** in the time that its documentation says (test `with_all_packets_swallowed_every_call_comes_back`), and nothing
//!   panics in the caller's thread (test `called_from_a_thread_of_an_async_runtime_it_blocks_and_does_not_panic`). Not so what runs on a
//!   connection of yours, as a fence does: it takes as long as that connection lets it (set `tcp_user_timeout` and `lock_timeout`), and
//!   `postgres` panics on a thread of an async runtime.
//!
//! # What holds while clocks and the database behave
//!
//! Four things are assumed here:
//!
//! - the database keeps what it has committed (no `fsync = off`, no restore, no failover that loses commits);
//! - its clock doesn't jump, and within a lease parts from ours by less than the safety margin (see [the crate](crate#how-the-lease-works));
//! - the machine of a holder isn't suspended (on Linux, `Instant` stands still meanwhile);
//! - nobody else writes to the table.
//!
//! Then:
//!
//! - **One owner.** No hold is trusted ([`is_held`](crate::LockGuard::is_held)) while, or after, a newer one of its lock is.
//! - **A loss is told in time.** Before anybody else can own the lock, `is_held` is false, [`on_lost`](crate::LockOptions::on_lost) is called, and
//!   [`lost`](crate::LockGuard::lost) wakes who waits for it (test `a_loss_is_told_by_the_deadline_while_the_network_swallows_packets`, test
//!   `a_loss_is_told_by_the_deadline_while_the_server_is_frozen`). In a process that was stopped, `is_held` is false when it
//!   wakes, and the rest comes after that (test `a_signal_tells_of_the_deadline_also_to_a_process_that_was_stopped`).
//! - **Everybody goes on.** When the faults are over, one of those who wait gets the lock: within a look (5 s, or 15 s
//!   where more than 50 wait) and two seconds. That time begins when the lease of a dead holder is over, and its fenced
//!   transaction has ended. Nothing is left over: no hold, connection, thread or place in a row.
//! - **While refreshes succeed, the lock stays held.** What an acquire took whose answer was lost is released, while
//!   its process lives.
//!
//! Test `whatever_is_hurt_the_verdict_holds` hurts worker processes, their network and their server in all of these ways, drawn from a seed,
//! records what every thread saw, and has it judged by rules that know nothing of how the lock is made. Its workers write through fences, and no
//! write of an older hold may ever be committed after one of a newer. `scripts/planted-bugs.sh` breaks the lock on purpose in many ways, each
//! of which these rules find.
//!
//! # What only the fence gives
//!
//! - **A late write is refused**, however late it is, and whether or not its writer knows that it is late (test
//!   `the_commit_of_a_zombie_is_refused_at_every_isolation_level`, test
//!   `the_transaction_of_a_hold_that_was_taken_over_is_refused_at_every_isolation_level`).
//! - **What was read is still true at the commit**, as far as only owners of the lock change it: if there has been another one since, the
//!   fence refuses (test `of_a_takeover_and_a_fenced_commit_at_the_same_time_the_order_is_that_of_the_versions`).
//! - **The next owner waits** for a transaction that was fenced already, also when its holder is stopped, its lease is over, or its guard was
//!   dropped (test `who_would_take_over_from_a_zombie_with_a_fence_waits_until_it_ends`, test
//!   `a_transaction_that_was_fenced_before_its_guard_was_dropped_commits_before_anybody_has_the_lock`). So fence late, and let the server end
//!   sessions that stop in a transaction (`idle_in_transaction_session_timeout`, test
//!   `a_fence_of_a_session_that_idles_for_too_long_is_ended_by_the_server`): else a process that is stopped, or can't be reached any
//!   more, keeps the lock for as long as that lasts.
//! - **Holds of one version are told apart**, where commits were lost (test
//!   `after_a_restore_from_a_backup_the_holders_of_lost_holds_are_refused_and_hear_of_it`).
//!
//! The check by version, for data elsewhere, gives the first of these from the moment at which the place has seen the newer version, and not before (test
//! `of_1_000_interleaved_writers_none_commits_after_a_newer_one`, test `a_holder_that_lost_its_lock_cannot_write_after_its_successor_has`).
//!
//! # What nothing gives
//!
//! - That a holder *acts* only while it holds. It can be stopped between looking and acting, for as long as one likes.
//! - That what is outside of the fenced transaction, and not compared by version, is done by one at a time.
//! - That two transactions, or two threads, under *one* hold are kept apart.
//! - One owner across lost commits, a jump of the database's clock, or a suspend of the holder's machine. Fences hold across all three, if the
//!   old primary is dead: they look at no clock, and what was fenced is lost together with its hold.
//!
//! # What happens when …
//!
//! | | then | shown by |
//! | --- | --- | --- |
//! | a holder crashes or is killed | the lock is free when its lease has run out, and taken within half a second by a process that waits. A transaction of it that wasn't committed is rolled back; if it had been fenced, the lock is free when the server has ended it: at once when the process dies; when its machine or the network does, after `idle_in_transaction_session_timeout`, or hours (`tcp_keepalives_idle`) | test `a_killed_holders_lock_is_free_a_second_after_its_lease_at_the_latest`, test `a_dead_holders_lock_is_taken_within_half_a_second_of_its_expiry`, test `a_fence_of_a_session_that_idles_for_too_long_is_ended_by_the_server` |
//! | a holder's thread hangs, or its guard is forgotten, and the process lives | the lock is kept: refreshes go on | test `a_forgotten_guard_keeps_the_lock` |
//! | a holder is paused (stopped, swapped out, in a long garbage collection) for longer than its lease | somebody else may have the lock; the first thing that it sees when it looks is that it doesn't. What it does without looking is done all the same, unless it is fenced | test `a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes`, test `the_commit_of_a_zombie_is_refused_at_every_isolation_level` |
//! | the same, and nobody else took the lock | `fence`, `transaction` and `unlock_in` refuse, because the hold is past its deadline; `fence_past_deadline` and `fence_statement` don't | test `a_hold_past_its_deadline_is_refused_and_can_be_fenced_on_request_until_it_is_taken_over` |
//! | a holder panics | the guard releases, and a transaction is rolled back; with `panic = "abort"`, as a crash | test `a_panic_releases_the_lock`, test `a_transaction_commits_what_was_done_under_the_lock_and_nothing_else` |
//! | the network is slow | trust counts from the request: a late answer extends nothing | test `trust_counts_from_the_request_however_slow_the_answer`, test `slow_refresh_does_not_extend_the_deadline` |
//! | the network swallows packets, or the server freezes | the hold is lost at its deadline, before its lease ends; calls come back | test `a_loss_is_told_by_the_deadline_while_the_network_swallows_packets`, test `a_loss_is_told_by_the_deadline_while_the_server_is_frozen`, test `with_all_packets_swallowed_every_call_comes_back`, test `with_every_process_of_the_server_stopped_every_call_comes_back` |
//! | the answer to an acquire or a release is lost | what the acquire took is released, and it is repeated; a release is not taken for a lost lease | test `an_acquire_whose_answer_was_lost_is_undone_and_repeated_at_once`, test `a_release_whose_answer_was_lost_is_not_taken_for_a_lost_lease` |
//! | the answer to the commit of a fenced transaction is lost | it may have been committed, and then before anybody else had the lock. To know, drop the guard, take the lock again, and look: nobody gets it before that transaction is over | test `of_a_commit_without_an_answer_it_is_only_known_that_it_came_in_time_if_it_did`, test `a_transaction_that_was_fenced_before_its_guard_was_dropped_commits_before_anybody_has_the_lock` |
//! | the same, and it releases the lock (`unlock_in`) | the library finds out by the lock whether it was committed, if it hears so before the hold's deadline; else it says that it doesn't know. Until it has found the hold, `is_held` is false | test `a_commit_without_an_answer_is_settled`, test `an_end_that_comes_late_counts_when_it_has_come`, test `a_commit_that_was_undone_is_not_taken_for_one_where_the_lease_has_run_out` |
//! | such a transaction is committed, rolled back or prepared by a statement, forgotten (`mem::forget`), or its connection breaks | after the end the database is asked, and the hold is trusted again only if it is found. A prepared or forgotten transaction counts as open: the hold is lost at its deadline | test `a_release_that_was_committed_as_text_is_never_taken_for_one_that_was_rolled_back`, test `a_prepared_transaction_is_open_until_it_is_ended`, test `a_transaction_that_is_forgotten_is_open_and_loses_the_hold_at_its_deadline`, test `a_rollback_whose_connection_broke_keeps_the_lock` |
//! | `unlock_in` is given a transaction within another one, or one in which another one was rolled back, or the lock was taken more than once | it refuses, rolls back, and the lock is held | test `a_transaction_within_another_one_and_one_with_a_savepoint_are_refused_and_the_lock_is_held`, test `the_guards_of_a_lock_that_was_taken_twice_are_refused_and_the_last_one_is_not` |
//! | the search path of the caller's session has functions, operators or types of PostgreSQL's names | fences and `unlock_in` use PostgreSQL's own | test `nothing_in_the_callers_search_path_changes_what_a_release_or_a_fence_does` |
//! | a caller gives up, and its acquire, or a copy of it, takes effect later | the process undoes it. From 20 s after the call's deadline an acquire takes no effect; one that hangs in its commit is followed up for longer. If the process dies before that, the lease has to run out | test `a_waiter_that_gave_up_leaves_no_lock_behind`, test `an_acquire_that_commits_after_its_repetition_leaves_no_lock_behind`, test `an_acquire_whose_answer_is_swallowed_ends_in_time_and_leaves_no_lock_behind`, test `a_late_copy_of_an_acquire_leaves_no_lock_behind` |
//! | a process that waits dies | those behind it wait for a tenth of a second, and a hundredth for each further one, once; for up to a look (5 s, or 15 s where more than 50 wait) where the first two in the row and the last have died | test `a_waiting_process_that_is_killed_or_stopped_costs_the_next_one_a_moment`, test `whatever_stands_in_the_row_its_lock_is_taken_and_it_is_tidied_up` |
//! | a notification is lost, late or false | a waiter looks within 5 s (15 s where more than 50 processes wait), and takes the lock within two seconds after that | test `no_notification_keeps_a_free_lock_from_being_taken`, test `whatever_is_hurt_the_verdict_holds` |
//! | somebody frees the row by hand, or changes who waits in it | the same | test `a_lock_that_is_freed_by_hand_is_taken_after_a_look`, test `whatever_stands_in_the_row_its_lock_is_taken_and_it_is_tidied_up` |
//! | somebody locks the table (`VACUUM FULL`, `ALTER TABLE`) | waiting goes on until the caller's limit; refreshes wait, and the hold may be lost | test `who_waits_while_the_table_is_locked_gets_the_lock_when_it_is_not` |
//! | a callback or the logger panics | nothing; where the driver logs a line within a call (at `debug`), the connection is given up, and the call made again | test `a_callback_that_panics_harms_nothing`, test `a_logger_that_panics_keeps_nobody_from_the_lock`, test `a_logger_that_panics_at_a_line_of_the_driver_costs_a_connection_and_no_hold` |
//! | a callback or the logger takes long | it delays the thread that it is called on: one that refreshes a lease, whose hold may be lost, and told late; or one that waits, and those of its process that wait for the same lock | – |
//! | the server restarts or crashes | a hold survives if that is over before its lease is. Open transactions are rolled back, fences with them. A *release* of the last 0.6 s (three times `wal_writer_delay`) may be undone: then the lease has to run out | test `a_hold_survives_a_restart_and_a_crash_of_the_server`, test `granted_leases_are_durable_whatever_the_roles_default_is_and_releases_need_not_be` |
//! | a transaction is fenced for longer than the lease | refreshes go on, and the hold with them; who waits is busy, not stuck in the server | test `refreshes_go_on_under_a_fence_that_is_open_for_longer_than_the_lease`, test `who_waits_behind_a_fenced_transaction_does_not_hang_in_the_server_and_gives_up_in_time` |
//! | the same with `unlock_in` | nothing is refreshed, and `is_held` is false: at its deadline the hold is lost, though nobody has the lock before the transaction ends | test `a_transaction_that_stays_open_for_longer_than_the_lease_loses_the_hold_and_releases_the_lock_all_the_same` |
//! | somebody's transaction locks the row by hand | it is busy, and not waited for in the server; refreshes wait, and the hold may be lost | test `a_locked_row_is_busy_and_not_waited_for`, test `a_wait_behind_a_row_lock_ends_in_time_and_the_refresh_comes_through_afterwards` |
//! | somebody deletes the row | fences refuse, and the hold is lost with its next refresh; until then two may own the lock. Versions begin anew, so that places that have seen greater ones refuse them | test `a_row_that_was_purged_is_a_lost_lease` |
//! | failover: the primary dies, and its synchronous standby is promoted | as a crash | test `the_primary_dies_under_load_and_the_verdict_holds`, test `a_hold_outlives_its_primary` |
//! | failover that loses commits: an asynchronous standby | two may own the lock for a while, and **a version may come twice**. Fences tell them apart: see below | test `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary` |
//! | a restore from a backup | the same. Data in the same database goes back together with the lock, and no fence of a hold from after the backup holds any more | test `after_a_restore_from_a_backup_the_holders_of_lost_holds_are_refused_and_hear_of_it` |
//! | the database's clock jumps | forward, leases end early, and two may own a lock until the first one's next refresh; backward, a dead holder keeps its lock for longer. Fences don't mind | test `nobody_acquires_the_lock_before_a_fenced_transaction_ends` (of a lease that ends early) |
//! | a holder's wall clock jumps | nothing: nobody looks at it | test `whatever_is_hurt_the_verdict_holds` (where `libfaketime` is installed) |
//! | a holder's machine is suspended | `is_held` may be true for too long, by the time of the suspend at most; fences refuse once somebody else has had the lock | the parts: test `a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes`, test `the_transaction_of_a_hold_that_was_taken_over_is_refused_at_every_isolation_level` |
//!
//! # Slow, half dead, limited
//!
//! For how long a hold, a wait and a call outlive trouble with the network, the server or the host. A wait is `lock`
//! or `try_lock_for` once it has had an answer; a call is anything else, and the first attempt of a wait. *Its time*
//! is the limit that its caller gave it, or what its documentation says.
//!
//! | trouble | a hold | a wait | a call | shown by |
//! | --- | --- | --- | --- | --- |
//! | each answer is late, by less than two fifths of the lease | is kept | goes on | takes that much longer; a release has 2 s | test `a_network_with_slow_answers_costs_no_hold_and_no_connection`, test `an_unlock_whose_answer_takes_more_than_a_second_is_a_release`, test `answers_that_come_too_late_for_their_callers_cost_no_connection`, test `answers_of_three_seconds_are_waited_for` |
//! | by more than about that | is lost at its deadline | goes on, and takes nothing | an acquire says so, after two tries | test `a_lease_too_short_for_the_network_is_an_error_that_says_so`, test `what_is_taken_is_kept_however_late_the_answers_are` |
//! | a connection breaks, or a thousand do | is kept, if one refresh gets through before its deadline | goes on | is made again, three times in all (but `list`) | test `a_connection_that_was_ended_under_a_held_lock_is_replaced`, test `a_connection_that_breaks_takes_none_of_the_others_with_it`, test `a_wait_goes_on_while_connections_break` |
//! | a connection says nothing any more, while something acknowledges what is sent on it | is kept: the next refresh goes out on another one, after half of what is left, at most 5 s, or one and a half times as long as answers take | goes on: an acquire that is silent for 2 s (longer where answers take long) is given up when another connection answers, and tried again | is made on another one too, after the same time, or half of its own | test `a_connection_that_went_silent_costs_neither_the_hold_nor_other_calls`, test `one_swallowed_acquire_fails_no_waiter_of_its_lock`, test `a_swallowed_release_or_hand_over_is_made_on_another_connection`, test `connections_that_go_silent_together_cost_no_hold_and_no_call` |
//! | that, again and again | is kept | goes on | works: only what is stuck since the last answer counts | test `connections_that_are_swallowed_now_and_then_stop_nothing` |
//! | the whole server is frozen, or out of reach | is kept until its deadline | goes on for a lease, then ends with an error | waits for its time | test `with_every_process_of_the_server_stopped_every_call_comes_back`, test `a_call_right_after_a_freeze_waits_for_the_server` |
//! | the server, the role or a pooler lets no further connection in | is kept by the one that works, if there is one | goes on | waits for that one, behind refreshes and releases; without one it fails with the cause | test `a_limit_of_connections_costs_no_hold_and_fails_no_call`, test `an_exhausted_server_is_an_error_that_says_so_and_not_for_ever`, test `callers_of_a_server_that_lets_nobody_in_hear_the_cause_at_once` |
//! | one of several hosts or addresses is dead | is kept, if a connection can be opened in time | goes on | each address has the whole connect timeout; those that were silent come last for a minute | test `each_of_several_hosts_has_its_time_and_its_cause`, test `a_name_with_dead_addresses_is_connected_to` |
//! | the process has no descriptor left, or no thread can be started | is kept on the connections that there are | the same | fails with the cause, where it needs a new one | test `without_a_free_descriptor_a_call_fails_with_the_cause_and_the_next_one_works` |
//! | a connection is closed because it was idle | is kept | goes on | opens another one, and nobody is told | test `a_connection_that_is_closed_while_it_is_idle_troubles_nobody` |
//! | the process forks | is the parent's | is the parent's | fails at once in the child, but for a `LostSignal`: open a storage of its own there | test `in_a_fork_the_old_storage_fails_at_once_and_a_new_one_works` |
//!
//! What is stuck costs a thread and a socket. The kernel ends that when nothing was acknowledged for 15 s
//! (`tcp_user_timeout`), or no keep-alive was answered for 30 s; the library puts another connection in its place, at
//! once up to eight times without an answer in between, and then once in half a minute, up to 64 times; and with
//! answers in between, beyond 64 in all, once in half a minute without an end. It sends no cancel requests: one that
//! comes late would hit the next statement. The server itself ends a statement after 5 s (a list after 60 s; never a
//! commit that waits for a standby), and a wait for a table after 1.5 s, but not behind a pooler, which our settings
//! don't pass.
//!
//! Refreshes that fail are told once: a warning when that begins, and a line when they succeed again, with how many
//! had failed (test `a_server_that_goes_away_is_told_once_and_so_is_its_return`).
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
//! promoted: one that lives on grants locks beside the new one to whoever reaches it, unless it waits for a synchronous standby; one whose
//! processes hang, and whose kernel accepts connections, is asked first and answers nothing.
//!
//! ## A synchronous standby
//!
//! It is the only one in `synchronous_standby_names`, and no other one is promoted. An acquire or a refresh is acknowledged when the standby has it on its disk, so
//! that everything above holds across the death of the primary (test `no_two_own_a_lock_while_the_primary_dies_under_load`, test
//! `a_hold_whose_answer_was_lost_is_not_granted_without_the_standby`, test `acquires_that_were_not_answered_when_the_primary_died_are_settled`). Its limits:
//!
//! - *A release doesn't wait for the standby*, nor for the disk. One that was acknowledged just before the primary died may be undone, and then its lease
//!   has to run out (test `a_release_that_the_standby_had_not_got_is_lost_and_the_lease_runs_out`). For a lock that changes hands all the
//!   time that is likely. All others that are free can be had as soon as the standby is promoted. Choose the lease accordingly.
//! - *Without its standby a primary grants nothing*: commits wait, acquires time out, and holds are lost at their deadlines (test
//!   `a_refresh_that_commits_after_the_hold_was_lost_keeps_nothing`). Two standbys and `ANY 1 (…)` avoid that. But then a commit is on one
//!   of them, perhaps not on the other: promote the one that has received more (`pg_last_wal_receive_lsn()`, when neither receives any more).
//!   That is PostgreSQL's own rule, and not tested here.
//! - *`synchronous_commit`* of the role must be `on` or stronger. `off` is turned into `on`; with `local` the standby isn't waited for.
//! - *`pg_cancel_backend`* on a commit that waits for the standby makes PostgreSQL acknowledge it, with no more than a warning: such a hold is lost
//!   with the primary, and two can own the lock. The library cancels nothing, and its `statement_timeout` doesn't end that wait (test
//!   `only_a_cancel_by_hand_acknowledges_a_hold_that_the_standby_has_not_got`). Use `pg_terminate_backend`, which acknowledges nothing.
//!
//! ## An asynchronous standby, or a backup
//!
//! It may lack the last commits. If a *release* is among them, its lease has to run out. If a *refresh* is, the lease ends earlier than its
//! holder believes, and somebody else may own the lock, as a greater version, until the holder hears of it. For a lock whose
//! last *acquire* is among them (test `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary`):
//!
//! - *Not one owner.* The new primary gives the lock to the next one at once. The first holder trusts its hold until its next refresh, which
//!   says that it is lost, or, if that doesn't get through, until its deadline.
//! - *Guaranteed: it hears of it* by that refresh, and touches its successor's row no more: a hold is lock, version and lease id.
//! - *A version may come twice*: the next holder gets the lost one again. Data elsewhere that only compares numbers takes a late write of the
//!   first holder for one of the second.
//! - *Data in the same database* goes back together with the lock: what was written under the lost hold is lost with it. A fence compares the
//!   `lease_id`, and not the version alone, so that the first holder's transactions are refused.
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
//! `versions_raised_before_clients_are_let_in_keep_one_owner_after_a_loss`). A lock whose very first hold was lost has no row; where its version matters, insert one:
//!
//! ```sql
//! INSERT INTO storage_lock (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time)
//! SELECT 'its id', 1000000000, 'failover', '00000000-0000-0000-0000-000000000000', clock_timestamp(),
//!     clock_timestamp() + interval '30 seconds'
//! WHERE NOT EXISTS (SELECT FROM storage_lock WHERE lock_id = 'its id');
//! ```
//!
//! For one owner alone it is enough to keep clients out for the longest lease.
