//! What this lock guarantees, and what it doesn't.
//!
//! Some promises hold always, and some only while clocks and the database behave. Some come only from the fence. Some
//! things nothing can promise. Each sentence that promises something names the test that shows it.
//!
//! # In short
//!
//! - A hold has a *lease*. A process loses its lock when it stops refreshing the lease: because it died, is stopped, or
//!   can't reach the database. A thread that hangs in a live process keeps its lock.
//! - The holder knows. [`is_held`](crate::LockGuard::is_held) turns false before anybody else can have the lock.
//!   [`on_lost`](crate::LockOptions::on_lost) is called by then, unless the process is stopped. But a process may be
//!   stopped between looking and acting, and then it acts late.
//! - A [`fence`](crate::LockGuard::fence) refuses a late write to the same database. A late write elsewhere is refused
//!   if the place compares [`version`](crate::LockGuard::version)s, and has seen the newer one. Nothing else refuses
//!   it.
//!
//! # Which to use when
//!
//! Ask what happens if two holders do the work at the same time, once.
//!
//! - *It is a waste* (a report is sent twice, a cache is filled twice): the lock is there for **efficiency**. The guard
//!   is enough. Look at `is_held` between the steps of a long job.
//! - *It is wrong* (money moves twice, an older state replaces a newer one): the lock is there for **correctness**.
//!   Then every write must be fenced.
//!
//! How to fence depends on what is written to:
//!
//! - *The database that keeps the lock*: use [`LockGuard::transaction`](crate::LockGuard::transaction), or
//!   [`fence`](crate::LockGuard::fence) in a transaction of yours (example `transfer`).
//! - *The same database, by another driver*: use [`fence_statement`](crate::LockGuard::fence_statement).
//! - *The same database, and the lock must be free from that moment on*: use
//!   [`unlock_in`](crate::LockGuard::unlock_in).
//! - *Another PostgreSQL database*: a trigger on its tables refuses an older version, see
//!   [`version_check_ddl`](crate::PostgresStorage::version_check_ddl).
//! - *An object store, or anything that writes on a condition*: refuse a version that is smaller than the one that is
//!   there (example `object_store`).
//! - *Anything else, such as a mail, a payment, a device*: nothing helps, except to make the work harmless when it
//!   happens twice.
//!
//! Martin Kleppmann drew this distinction in "How to do distributed locking" (2016). The term *fencing token* for such
//! a version is his, too.
//!
//! # The failure model
//!
//! Any of these may happen at any time, and several of them simultaneously:
//!
//! - A process or a thread is killed, stopped for any time, or slow. Its wall clock jumps.
//! - A connection breaks, is slow, or swallows what is sent in one or both directions. A request or an answer comes
//!   late, or is lost.
//! - The server crashes, restarts, freezes, ends any session, or lets nobody in. Another transaction keeps old rows, or
//!   locks ours.
//!
//! # What holds always
//!
//! Whatever of this happens, and whatever any clock says:
//!
//! - **What is committed under a fence is committed while nobody else has the lock**, and before anything that a later
//!   owner does in the database (test `nobody_acquires_the_lock_before_a_fenced_transaction_ends`,
//!   test `of_a_takeover_and_a_fenced_commit_at_the_same_time_the_order_is_that_of_the_versions`).
//! - **The version gives the order.** It grows with every hold, and belongs to one hold
//!   (test `the_version_grows_with_every_hold`). This needs a database that keeps what it has committed, and nobody who
//!   deletes rows.
//! - **A guard touches only its own hold**
//!   (test `a_hold_that_was_taken_over_is_lost_and_touches_its_successor_no_more`).
//! - **Every call comes back** in the time that its documentation says
//!   (test `with_all_packets_swallowed_every_call_comes_back`). Nothing panics in the caller's thread
//!   (test `called_from_a_thread_of_an_async_runtime_it_blocks_and_does_not_panic`). The exception is what runs on a
//!   connection of yours, such as a fence. It takes as long as that connection lets it: set `tcp_user_timeout` and
//!   `lock_timeout`. On a thread of an async runtime, `postgres` panics.
//!
//! # What holds while clocks and the database behave
//!
//! Four things are assumed here:
//!
//! - The database keeps what it has committed (no `fsync = off`, no restore, no failover that loses commits).
//! - Its clock doesn't jump. Within a lease, it drifts from ours by less than the safety margin (see [the
//!   crate](crate#how-the-lease-works)).
//! - The machine of a holder isn't suspended (on Linux, `Instant` stands still during a suspend).
//! - Nobody else writes to the table.
//!
//! Then:
//!
//! - **One owner.** No hold is trusted ([`is_held`](crate::LockGuard::is_held)) while a newer hold of its lock is, or
//!   after one was.
//! - **A holder learns of its loss in time.** Before anybody else can own the lock, `is_held` is false,
//!   [`on_lost`](crate::LockOptions::on_lost) is called, and [`lost`](crate::LockGuard::lost) wakes those that wait for
//!   it (test `a_loss_is_told_by_the_deadline_while_the_network_swallows_packets`,
//!   test `a_loss_is_told_by_the_deadline_while_the_server_is_frozen`). In a process that was stopped, `is_held` is
//!   false when the process wakes, and the rest comes after that
//!   (test `a_signal_tells_of_the_deadline_also_to_a_process_that_was_stopped`).
//! - **Waiters go on.** When the faults are over, one of the waiters acquires the lock: within one poll interval (5 s,
//!   or 15 s where more than 50 processes wait) and two seconds. That time begins when the lease of a dead holder is
//!   over, and its fenced transaction has ended. Nothing is left over: no hold, connection, thread, or entry in a row's
//!   wait queue.
//! - **While refreshes succeed, the lock stays held.**
//! - **A lost answer to an acquire leaves no hold behind.** While the process lives, it releases what such an acquire
//!   took.
//!
//! Test `whatever_is_hurt_the_verdict_holds` hurts worker processes, their network and their server in all of these
//! ways, drawn from a seed. It records what every thread saw. Rules that know nothing of how the lock is made judge
//! that record. The workers write through fences, and no write of an older hold may ever be committed after one of a
//! newer hold. `scripts/planted-bugs.sh` breaks the lock on purpose in many ways, and these rules, or a test that it
//! names, find each of them.
//!
//! # What only the fence gives
//!
//! - **A late write is refused**, however late it is, and whether or not its writer knows that it is late
//!   (test `the_commit_of_a_zombie_is_refused_at_every_isolation_level`,
//!   test `the_transaction_of_a_hold_that_was_taken_over_is_refused_at_every_isolation_level`).
//! - **What was read is still true at the commit**, as far as only owners of the lock change it. If there has been
//!   another owner since, the fence refuses
//!   (test `of_a_takeover_and_a_fenced_commit_at_the_same_time_the_order_is_that_of_the_versions`).
//! - **The next owner waits** for a transaction that is already fenced. That holds even when its holder is stopped, its
//!   lease is over, or its guard was dropped
//!   (test `who_would_take_over_from_a_zombie_with_a_fence_waits_until_it_ends`,
//!   test `a_transaction_that_was_fenced_before_its_guard_was_dropped_commits_before_anybody_has_the_lock`). So a
//!   process that is stopped, or can't be reached any more, keeps the lock for as long as its fenced transaction stays
//!   open. Therefore fence late, and let the server end sessions that stop in a transaction
//!   (`idle_in_transaction_session_timeout`,
//!   test `a_fence_of_a_session_that_idles_for_too_long_is_ended_by_the_server`).
//! - **Holds of one version are told apart**, where commits were lost
//!   (test `after_a_restore_from_a_backup_the_holders_of_lost_holds_are_refused_and_hear_of_it`).
//!
//! For data elsewhere, the check by version gives the first of these only from the moment at which the place has seen
//! the newer version (test `of_1_000_interleaved_writers_none_commits_after_a_newer_one`,
//! test `a_holder_that_lost_its_lock_cannot_write_after_its_successor_has`).
//!
//! # What nothing gives
//!
//! - That a holder *acts* only while it holds. It can be stopped between looking and acting, for any length of time.
//! - That only one at a time does what is outside of the fenced transaction, and not compared by version.
//! - That two transactions, or two threads, under *one* hold are kept apart.
//! - One owner across lost commits, a jump of the database's clock, or a suspend of the holder's machine. Fences hold
//!   across all three, if the old primary is dead: they look at no clock, and what was fenced is lost together with its
//!   hold.
//!
//! # What happens when …
//!
//! ## The holder
//!
//! - **A holder crashes or is killed.** The lock is free when its lease has run out, and a waiting process acquires it
//!   within half a second. The server rolls back a transaction of the holder that wasn't committed. If that transaction
//!   was fenced, the server must also have ended it. It does so immediately when the process dies. When its machine or
//!   the network dies, it does so after `idle_in_transaction_session_timeout`, or hours (`tcp_keepalives_idle`). Shown
//!   by test `a_killed_holders_lock_is_free_a_second_after_its_lease_at_the_latest`,
//!   test `a_dead_holders_lock_is_taken_within_half_a_second_of_its_expiry`,
//!   test `a_fence_of_a_session_that_idles_for_too_long_is_ended_by_the_server`.
//! - **A holder's thread hangs, or its guard is forgotten, and the process lives.** The lock is kept: refreshes go on.
//!   Shown by test `a_forgotten_guard_keeps_the_lock`.
//! - **A holder is paused (stopped, swapped out, in a long garbage collection) for longer than its lease.** Somebody
//!   else may have the lock. When the holder looks, the first thing that it sees is that it doesn't hold the lock. What
//!   it does without looking is done all the same, unless it is fenced. Shown by
//!   test `a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes`,
//!   test `the_commit_of_a_zombie_is_refused_at_every_isolation_level`.
//! - **The same, and nobody else acquired the lock.** `fence`, `transaction` and `unlock_in` refuse, because the hold
//!   is past its deadline. `fence_past_deadline` and `fence_statement` don't refuse. Shown by
//!   test `a_hold_past_its_deadline_is_refused_and_can_be_fenced_on_request_until_it_is_taken_over`.
//! - **A holder panics.** The guard releases, and a transaction is rolled back. With `panic = "abort"`, it is like a
//!   crash. Shown by test `a_panic_releases_the_lock`,
//!   test `a_transaction_commits_what_was_done_under_the_lock_and_nothing_else`.
//!
//! ## Callbacks and the logger
//!
//! - **A callback or the logger panics.** Nothing happens. But if the driver logs the line within a call (at `debug`),
//!   the connection is given up, and the call is made again. Shown by test `a_callback_that_panics_harms_nothing`,
//!   test `a_logger_that_panics_keeps_nobody_from_the_lock`,
//!   test `a_logger_that_panics_at_a_line_of_the_driver_costs_a_connection_and_no_hold`.
//! - **A callback or the logger takes long.** It delays the thread that it is called on. That may be a thread that
//!   refreshes a lease: its hold may be lost, and the loss reported late. Or it may be a waiting thread: then the other
//!   threads of its process that wait for the same lock are delayed too. No test shows this.
//!
//! ## The network or an answer fails
//!
//! - **The network is slow.** Trust counts from the request: a late answer extends nothing. Shown by
//!   test `trust_counts_from_the_request_however_slow_the_answer`, test `slow_refresh_does_not_extend_the_deadline`.
//! - **The network swallows packets, or the server freezes.** The hold is lost at its deadline, before its lease ends.
//!   Calls come back. Shown by test `a_loss_is_told_by_the_deadline_while_the_network_swallows_packets`,
//!   test `a_loss_is_told_by_the_deadline_while_the_server_is_frozen`,
//!   test `with_all_packets_swallowed_every_call_comes_back`,
//!   test `with_every_process_of_the_server_stopped_every_call_comes_back`.
//! - **The answer to an acquire or a release is lost.** The library releases what the acquire took, and repeats the
//!   acquire. A lost answer to a release is not taken for a lost lease. Shown by
//!   test `an_acquire_whose_answer_was_lost_is_undone_and_repeated_at_once`,
//!   test `a_release_whose_answer_was_lost_is_not_taken_for_a_lost_lease`.
//! - **The answer to the commit of a fenced transaction is lost.** The transaction may have been committed, and if so
//!   before anybody else had the lock. To know, drop the guard, acquire the lock again, and look: nobody gets the lock
//!   before that transaction is over. Shown by
//!   test `of_a_commit_without_an_answer_it_is_only_known_that_it_came_in_time_if_it_did`,
//!   test `a_transaction_that_was_fenced_before_its_guard_was_dropped_commits_before_anybody_has_the_lock`.
//! - **A caller gives up, and its acquire, or a copy of it, takes effect later.** The process undoes it. From 20 s
//!   after the call's deadline an acquire takes no effect. The clean-up of an acquire that hangs in its commit goes on
//!   for longer. If the process dies before the clean-up is done, the lease has to run out. Shown by
//!   test `a_waiter_that_gave_up_leaves_no_lock_behind`,
//!   test `an_acquire_that_commits_after_its_repetition_leaves_no_lock_behind`,
//!   test `an_acquire_whose_answer_is_swallowed_ends_in_time_and_leaves_no_lock_behind`,
//!   test `a_late_copy_of_an_acquire_leaves_no_lock_behind`.
//!
//! ## A transaction of `unlock_in` ends unusually
//!
//! - **The answer to its commit is lost.** The library finds out by the lock whether the transaction was committed, if
//!   the answer to that comes before the hold's deadline. Otherwise it says that it doesn't know. Until it has found
//!   the hold, `is_held` is false. Shown by test `a_commit_without_an_answer_is_settled`,
//!   test `an_end_that_comes_late_counts_when_it_has_come`,
//!   test `a_commit_that_was_undone_is_not_taken_for_one_where_the_lease_has_run_out`.
//! - **A statement commits, rolls back or prepares it, or it is forgotten (`mem::forget`), or its connection breaks.**
//!   After the end the library asks the database, and trusts the hold again only if it is found. A prepared or
//!   forgotten transaction counts as open: the hold is lost at its deadline. Shown by
//!   test `a_release_that_was_committed_as_text_is_never_taken_for_one_that_was_rolled_back`,
//!   test `a_prepared_transaction_is_open_until_it_is_ended`,
//!   test `a_transaction_that_is_forgotten_is_open_and_loses_the_hold_at_its_deadline`,
//!   test `a_rollback_whose_connection_broke_keeps_the_lock`.
//! - **`unlock_in` is given a transaction within another one, or one in which another one was rolled back, or the lock
//!   was taken more than once.** It refuses, rolls back, and the lock is held. Shown by
//!   test `a_transaction_within_another_one_and_one_with_a_savepoint_are_refused_and_the_lock_is_held`,
//!   test `the_guards_of_a_lock_that_was_taken_twice_are_refused_and_the_last_one_is_not`.
//! - **It stays open for longer than the lease.** Nothing is refreshed, and `is_held` is false. At its deadline the
//!   hold is lost, though nobody has the lock before the transaction ends. Shown by
//!   test `a_transaction_that_stays_open_for_longer_than_the_lease_loses_the_hold_and_releases_the_lock_all_the_same`.
//!
//! ## Waiting
//!
//! - **A process that waits dies.** Those behind it wait once for a tenth of a second more, and a hundredth for each
//!   further dead process. If the first two in the row's queue and the last have died, they wait for up to one poll
//!   interval (5 s, or 15 s where more than 50 processes wait). Shown by
//!   test `a_waiting_process_that_is_killed_or_stopped_costs_the_next_one_a_moment`,
//!   test `whatever_stands_in_the_row_its_lock_is_taken_and_it_is_tidied_up`.
//! - **A notification is lost, late or false.** A waiter polls within 5 s (15 s where more than 50 processes wait), and
//!   acquires the lock within two seconds after that. Shown by
//!   test `no_notification_keeps_a_free_lock_from_being_taken`, test `whatever_is_hurt_the_verdict_holds`.
//! - **Somebody frees the row by hand, or changes who waits in it.** A waiter polls and acquires the lock within the
//!   same times. Shown by test `a_lock_that_is_freed_by_hand_is_taken_after_a_look`,
//!   test `whatever_stands_in_the_row_its_lock_is_taken_and_it_is_tidied_up`.
//!
//! ## The server and other sessions
//!
//! - **The server restarts or crashes.** A hold survives if that is over before its lease is. Open transactions are
//!   rolled back, and their fences with them. A *release* of the last 0.6 s (three times `wal_writer_delay`) may be
//!   undone: then the lease has to run out. Shown by test `a_hold_survives_a_restart_and_a_crash_of_the_server`,
//!   test `granted_leases_are_durable_whatever_the_roles_default_is_and_releases_need_not_be`.
//! - **A transaction is fenced for longer than the lease.** Refreshes go on, and the hold with them. For a waiter the
//!   lock is busy, and the waiter isn't stuck in the server. Shown by
//!   test `refreshes_go_on_under_a_fence_that_is_open_for_longer_than_the_lease`,
//!   test `who_waits_behind_a_fenced_transaction_does_not_hang_in_the_server_and_gives_up_in_time`.
//! - **Somebody locks the table (`VACUUM FULL`, `ALTER TABLE`).** Waiting goes on until the caller's limit. Refreshes
//!   wait, and the hold may be lost. Shown by test `who_waits_while_the_table_is_locked_gets_the_lock_when_it_is_not`.
//! - **Somebody's transaction locks the row by hand.** The lock is busy, and nobody waits for it in the server.
//!   Refreshes wait, and the hold may be lost. Shown by test `a_locked_row_is_busy_and_not_waited_for`,
//!   test `a_wait_behind_a_row_lock_ends_in_time_and_the_refresh_comes_through_afterwards`.
//! - **Somebody deletes the row.** Fences refuse, and the next refresh finds that the hold is lost. Until then two may
//!   own the lock. Versions begin anew, so that places that have seen greater ones refuse them. Shown by
//!   test `a_row_that_was_purged_is_a_lost_lease`.
//! - **The search path of the caller's session has functions, operators or types with PostgreSQL's names.** Fences and
//!   `unlock_in` use PostgreSQL's own. Shown by
//!   test `nothing_in_the_callers_search_path_changes_what_a_release_or_a_fence_does`.
//!
//! ## Failover, restore, clocks
//!
//! - **The primary dies, and its synchronous standby is promoted.** It is like a crash. Shown by
//!   test `the_primary_dies_under_load_and_the_verdict_holds`, test `a_hold_outlives_its_primary`.
//! - **A failover loses commits: an asynchronous standby.** Two may own the lock for a while, and **a version may come
//!   twice**. Fences tell the two holds apart: see below. Shown by
//!   test `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary`.
//! - **The database is restored from a backup.** The same happens. Data in the same database goes back together with
//!   the lock, and no fence of a hold from after the backup is accepted any more. Shown by
//!   test `after_a_restore_from_a_backup_the_holders_of_lost_holds_are_refused_and_hear_of_it`.
//! - **The database's clock jumps.** Forward, leases end early, and two may own a lock until the first one's next
//!   refresh. Backward, a dead holder keeps its lock for longer. Fences don't depend on the clock. Shown by
//!   test `nobody_acquires_the_lock_before_a_fenced_transaction_ends` (of a lease that ends early).
//! - **A holder's wall clock jumps.** Nothing happens: nobody looks at it. Shown by
//!   test `whatever_is_hurt_the_verdict_holds` (where `libfaketime` is installed).
//! - **A holder's machine is suspended.** `is_held` may be true for too long, by the time of the suspend at most.
//!   Fences refuse once somebody else has had the lock. The parts are shown by
//!   test `a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes`,
//!   test `the_transaction_of_a_hold_that_was_taken_over_is_refused_at_every_isolation_level`.
//!
//! # Slow, half dead, limited
//!
//! This section says for how long a hold, a wait and a call survive a bad network, server or host. A *wait* is `lock`
//! or `try_lock_for` once it has had an answer. A *call* is anything else, and the first attempt of a wait. *Its time*
//! is the limit that its caller gave it, or what its documentation says.
//!
//! - **Each answer is late, by less than two fifths of the lease.**
//!   - A hold is kept.
//!   - A wait goes on.
//!   - A call takes that much longer. A release has 2 s.
//!   - Shown by test `a_network_with_slow_answers_costs_no_hold_and_no_connection`,
//!     test `an_unlock_whose_answer_takes_more_than_a_second_is_a_release`,
//!     test `answers_that_come_too_late_for_their_callers_cost_no_connection`,
//!     test `answers_of_three_seconds_are_waited_for`.
//! - **Each answer is late, by more than about that.**
//!   - A hold is lost at its deadline.
//!   - A wait goes on, and acquires nothing.
//!   - A call: an acquire says so, after two tries.
//!   - Shown by test `a_lease_too_short_for_the_network_is_an_error_that_says_so`,
//!     test `what_is_taken_is_kept_however_late_the_answers_are`.
//! - **A connection breaks, or a thousand do.**
//!   - A hold is kept, if one refresh succeeds before its deadline.
//!   - A wait goes on.
//!   - A call is made again, three times in all (except `list`).
//!   - Shown by test `a_connection_that_was_ended_under_a_held_lock_is_replaced`,
//!     test `a_connection_that_breaks_takes_none_of_the_others_with_it`, test `a_wait_goes_on_while_connections_break`.
//! - **A connection goes silent, while something acknowledges what is sent on it.**
//!   - A hold is kept. The next refresh goes out on another connection: after half of the time that is left, at most
//!     5 s, or after one and a half times as long as answers take.
//!   - A wait goes on. An acquire that is silent for 2 s (longer where answers take long) is given up when another
//!     connection answers, and tried again.
//!   - A call is made on another connection too, after the same time, or half of its own.
//!   - Shown by test `a_connection_that_went_silent_costs_neither_the_hold_nor_other_calls`,
//!     test `one_swallowed_acquire_fails_no_waiter_of_its_lock`,
//!     test `a_swallowed_release_or_hand_over_is_made_on_another_connection`,
//!     test `connections_that_go_silent_together_cost_no_hold_and_no_call`.
//! - **Connections go silent again and again.**
//!   - A hold is kept.
//!   - A wait goes on.
//!   - A call works: only connections that got stuck since the last answer count.
//!   - Shown by test `connections_that_are_swallowed_now_and_then_stop_nothing`.
//! - **The whole server is frozen, or out of reach.**
//!   - A hold is kept until its deadline.
//!   - A wait goes on for a lease, then ends with an error.
//!   - A call waits for its time.
//!   - Shown by test `with_every_process_of_the_server_stopped_every_call_comes_back`,
//!     test `a_call_right_after_a_freeze_waits_for_the_server`.
//! - **The server, the role or a pooler lets no further connection in.**
//!   - A hold is kept by the connection that works, if there is one.
//!   - A wait goes on.
//!   - A call waits for that connection, behind refreshes and releases. Without one it fails with the cause.
//!   - Shown by test `a_limit_of_connections_costs_no_hold_and_fails_no_call`,
//!     test `an_exhausted_server_is_an_error_that_says_so_and_not_for_ever`,
//!     test `callers_of_a_server_that_lets_nobody_in_hear_the_cause_at_once`.
//! - **One of several hosts or addresses is dead.**
//!   - A hold is kept, if a connection can be opened in time.
//!   - A wait goes on.
//!   - A call: each address has the whole connect timeout. Addresses that were silent come last for a minute.
//!   - Shown by test `each_of_several_hosts_has_its_time_and_its_cause`,
//!     test `a_name_with_dead_addresses_is_connected_to`.
//! - **The process has no descriptor left, or can't start a thread.**
//!   - A hold is kept on the connections that there are.
//!   - A wait goes on, on the connections that there are.
//!   - A call fails with the cause, where it needs a new connection.
//!   - Shown by test `without_a_free_descriptor_a_call_fails_with_the_cause_and_the_next_one_works`.
//! - **A connection is closed because it was idle.**
//!   - A hold is kept.
//!   - A wait goes on.
//!   - A call opens another connection, and nobody notices.
//!   - Shown by test `a_connection_that_is_closed_while_it_is_idle_troubles_nobody`.
//! - **The process forks.**
//!   - A hold stays with the parent.
//!   - A wait stays with the parent.
//!   - A call fails immediately in the child, except on a `LostSignal`. Open a storage of its own in the child.
//!   - Shown by test `in_a_fork_the_old_storage_fails_at_once_and_a_new_one_works`.
//!
//! A stuck connection costs a thread and a socket. The kernel ends it when nothing was acknowledged for 15 s
//! (`tcp_user_timeout`), or no keep-alive was answered for 30 s.
//!
//! The library puts another connection in its place. Without an answer in between, it does so up to eight times
//! immediately, and then once in half a minute, up to 64 times. With answers in between, beyond 64 in all, it does so
//! once in half a minute without an end.
//!
//! The library sends no cancel requests: one that comes late would hit the next statement. The server itself ends a
//! statement after 5 s (a list after 60 s; never a commit that waits for a standby), and a wait for a table after
//! 1.5 s. It doesn't do so behind a pooler, which doesn't pass our settings.
//!
//! Failing refreshes are logged once: a warning when they begin to fail, and a line when they succeed again, with the
//! number of failures (test `a_server_that_goes_away_is_told_once_and_so_is_its_return`).
//!
//! # A primary and a standby
//!
//! Name both hosts, and ask for the one that accepts writes:
//!
//! ```text
//! host=db1,db2 port=5432,5432 user=app password=secret dbname=app target_session_attrs=read-write
//! ```
//!
//! The library passes over a standby that answers first, whether or not the DSN says `target_session_attrs=read-write`
//! (test `a_standby_is_not_used_before_it_is_promoted`).
//!
//! Before the standby is promoted, make sure that the old primary is dead, or can't be reached. An old primary that is
//! still running also grants locks, to every client that reaches it (split brain), unless it waits for a synchronous
//! standby. If its processes hang, and its kernel accepts connections, it is asked first and answers nothing.
//!
//! ## A synchronous standby
//!
//! It is the only standby in `synchronous_standby_names`, and no other one is promoted. An acquire or a refresh is
//! acknowledged when the standby has it on its disk. So everything above holds across the death of the primary
//! (test `no_two_own_a_lock_while_the_primary_dies_under_load`,
//! test `a_hold_whose_answer_was_lost_is_not_granted_without_the_standby`,
//! test `acquires_that_were_not_answered_when_the_primary_died_are_settled`). Its limits:
//!
//! - *A release doesn't wait for the standby*, nor for the disk. A release that was acknowledged just before the
//!   primary died may be undone. Then its lease has to run out
//!   (test `a_release_that_the_standby_had_not_got_is_lost_and_the_lease_runs_out`). That is likely for a lock that
//!   changes hands all the time. All other free locks can be acquired as soon as the standby is promoted. Choose the
//!   lease accordingly.
//! - *Without its standby a primary grants nothing*: commits wait, acquires time out, and holds are lost at their
//!   deadlines (test `a_refresh_that_commits_after_the_hold_was_lost_keeps_nothing`). Two standbys and `ANY 1 (…)`
//!   avoid that. But then a commit is on one of them, perhaps not on the other. Promote the one that has received more
//!   (`pg_last_wal_receive_lsn()`, when neither receives any more). That is PostgreSQL's own rule, and not tested here.
//! - *`synchronous_commit`* of the role must be `on` or stronger. The library turns `off` into `on`. With `local`
//!   nobody waits for the standby.
//! - *`pg_cancel_backend`* on a commit that waits for the standby makes PostgreSQL acknowledge the commit, with only a
//!   warning. Such a hold is lost with the primary, and two can own the lock. The library cancels nothing, and its
//!   `statement_timeout` doesn't end that wait
//!   (test `only_a_cancel_by_hand_acknowledges_a_hold_that_the_standby_has_not_got`). Use `pg_terminate_backend`, which
//!   acknowledges nothing.
//!
//! ## An asynchronous standby, or a backup
//!
//! It may lack the last commits. If a *release* is among them, its lease has to run out. If a *refresh* is among them,
//! the lease ends earlier than its holder believes. Then somebody else may own the lock, with a greater version, until
//! the holder learns of it. For a lock whose last *acquire* is among them
//! (test `a_hold_that_the_standby_had_not_got_is_lost_with_the_primary`):
//!
//! - *Not one owner.* The new primary grants the lock to the next caller immediately. The first holder trusts its hold
//!   until its next refresh, which says that it is lost, or, if no refresh succeeds, until its deadline.
//! - *Guaranteed: the first holder learns of its loss* by that refresh, and doesn't touch its successor's row any more:
//!   a hold is lock, version and lease id.
//! - *A version may come twice*: the next holder gets the lost one again. Data elsewhere that only compares numbers
//!   takes a late write of the first holder for one of the second.
//! - *Data in the same database* goes back together with the lock: what was written under the lost hold is lost with
//!   it. A fence compares the `lease_id`, and not the version alone, so it refuses the first holder's transactions.
//!
//! Run this before clients are let in again, and when the old primary is certainly dead. Replace the 30 s by the
//! longest lease that any client uses:
//!
//! ```sql
//! UPDATE storage_lock SET version = version + 1000000000, owner_id = 'failover',
//!     lease_id = '00000000-0000-0000-0000-000000000000', lock_begin_time = clock_timestamp(),
//!     lease_expire_time = clock_timestamp() + interval '30 seconds', released_at = NULL;
//! ```
//!
//! It raises every version above all that were granted, ends every hold from before, and lets nobody acquire a lock for
//! the time of a lease. By then every earlier holder has stopped trusting its hold, whether or not it learned of the
//! failover (test `versions_raised_before_clients_are_let_in_keep_one_owner_after_a_loss`). A lock whose very first
//! hold was lost has no row. Where its version matters, insert one:
//!
//! ```sql
//! INSERT INTO storage_lock (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time)
//! SELECT 'its id', 1000000000, 'failover', '00000000-0000-0000-0000-000000000000', clock_timestamp(),
//!     clock_timestamp() + interval '30 seconds'
//! WHERE NOT EXISTS (SELECT FROM storage_lock WHERE lock_id = 'its id');
//! ```
//!
//! For one owner alone it is enough to keep clients out for the longest lease.
