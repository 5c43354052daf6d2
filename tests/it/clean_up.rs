//! What is left where a request comes late, or its answer never: no hold and no place in the row stay there for nobody.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{Error, LockGuard, LockOptions, PostgresStorage, StorageLock};

use crate::free::{hold_of_the_dead, side_by_side, stands_in_the_row};
use crate::queue::hang_durable_commits;
use crate::settings::Role;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, eventually, is_refreshed, ms, short_lock, takes_at_most, waiting_thread, within};

/// The last parameter of each of our statements names it, and its first text does.
const ACQUIRE: &[u8] = b" acquire \"";
const HAND_OVER: &[u8] = b" hand over \"";
const REFRESH: &[u8] = b" refresh \"";
const RELEASE: &[u8] = b" release \"";

/// How long what nobody wants may stay in the row.
const SOON: Duration = Duration::from_secs(3);

/// A storage behind a proxy of its own, and lock "l" in it with a lease that outlives every test.
struct Behind {
    proxy: Proxy,
    storage: PostgresStorage,
    lock: StorageLock,
}

impl Behind {
    fn proxy(table: &Table) -> Behind {
        let proxy = Proxy::to(&table.dsn);
        let storage = Table::of(&proxy.dsn, &table.name).storage();
        let lock = long_lock(&storage);
        Behind { proxy, storage, lock }
    }

    /// The same, with its statements prepared.
    fn warm(table: &Table) -> Behind {
        let behind = Behind::proxy(table);
        drop(behind.lock.lock("warm-up").unwrap());
        behind
    }
}

fn long_lock(storage: &PostgresStorage) -> StorageLock {
    StorageLock::with_options(storage, LockOptions::new("l").lease_expire_after(Duration::from_secs(600))).unwrap()
}

/// Lets what was kept come at `late` after it was sent, and checks that nobody's hold stays in the row.
#[track_caller]
fn comes_late(table: &Table, proxy: &Proxy, sent: Instant, late: Duration) {
    let theirs = table.lock("l");
    thread::sleep(late.saturating_sub(sent.elapsed()));
    let before = theirs.info().unwrap();
    assert!(!before.as_ref().is_some_and(|row| row.is_held), "{before:?}");
    proxy.deliver();
    let start = Instant::now();
    let is_held = || theirs.info().unwrap().is_some_and(|row| row.is_held);
    // From the first look at which it is free on it stays free: looks for longer than the copy needs to come.
    let (mut free_since, mut seen) = (None, false);
    while free_since.is_none_or(|since: Instant| since.elapsed() < ms(1_500)) {
        if is_held() {
            (free_since, seen) = (None, true);
        } else {
            free_since.get_or_insert_with(Instant::now);
        }
        assert!(free_since.is_some() || start.elapsed() < SOON, "{late:?} late: held for nobody");
        thread::sleep(ms(10));
    }
    if late > Duration::from_secs(32) {
        let version = |row: Option<storage_lock::LockInformation>| row.map(|row| row.version);
        assert_eq!(version(theirs.info().unwrap()), version(before), "so late it does nothing");
    }
    println!("{late:?} late, it took the lock: {seen}");
    assert!(theirs.try_lock("other").unwrap().is_some());
}

/// Half a minute after it was sent a statement does nothing. Before that whoever gave it up looks for what it did.
const LATE: [Duration; 5] =
    [ms(100), Duration::from_secs(3), Duration::from_secs(12), Duration::from_secs(25), Duration::from_secs(33)];

/// The same where that is not the question.
const SOME: [Duration; 3] = [ms(100), Duration::from_secs(3), Duration::from_secs(33)];

#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// The repetition had the lock, and released it.
    Repeated,
    /// After that another process had it too.
    Other,
    /// The repetition found it busy, and the caller gave up.
    GaveUp,
    /// The same of one that waits for a while.
    WaitedInVain,
}

#[test]
fn a_late_copy_of_an_acquire_leaves_no_lock_behind() {
    let all = [Meanwhile::Repeated, Meanwhile::GaveUp, Meanwhile::WaitedInVain];
    let some = all.into_iter().flat_map(|meanwhile| SOME.map(|late| (meanwhile, late)));
    let cases: Vec<_> = some.chain(LATE.map(|late| (Meanwhile::Other, late))).collect();
    side_by_side(&cases, |&(meanwhile, late)| {
        let table = Table::new();
        let (ours, theirs) = (Behind::warm(&table), long_lock(&table.storage()));
        let busy = matches!(meanwhile, Meanwhile::GaveUp | Meanwhile::WaitedInVain);
        let other = busy.then(|| theirs.lock("other").unwrap());
        ours.proxy.keep_request(ACQUIRE);
        let sent = Instant::now();
        match meanwhile {
            Meanwhile::Repeated | Meanwhile::Other => ours.lock.lock("ours").unwrap().unlock().unwrap(),
            Meanwhile::GaveUp => assert!(ours.lock.try_lock("ours").unwrap().is_none()),
            Meanwhile::WaitedInVain => {
                assert!(!matches!(ours.lock.try_lock_for("ours", ms(300)), Ok(Some(_))));
            }
        }
        if matches!(meanwhile, Meanwhile::Other) {
            theirs.lock("other").unwrap().unlock().unwrap();
        }
        drop(other);
        assert_eq!(ours.proxy.kept_requests(), 1, "nothing was kept");
        comes_late(&table, &ours.proxy, sent, late);
    });
}

/// A hold that follows another one in the same process.
#[test]
fn a_late_copy_of_a_hand_over_leaves_no_lock_behind() {
    side_by_side(&SOME, |&late| {
        let table = Table::new();
        let ours = Behind::warm(&table);
        let pair = || {
            let guard = ours.lock.lock("first").unwrap();
            let lock = ours.lock.clone();
            (guard, waiting_thread(move || lock.lock("second").unwrap().unlock().unwrap()))
        };
        // The statement is prepared.
        let (guard, second) = pair();
        guard.unlock().unwrap();
        second.join().unwrap();
        let (guard, second) = pair();
        ours.proxy.keep_request(HAND_OVER);
        let sent = Instant::now();
        guard.unlock().unwrap();
        let is_over = || second.is_finished().then_some(());
        within(Duration::from_secs(4), "the second one's turn", is_over);
        second.join().unwrap();
        assert_eq!(ours.proxy.kept_requests(), 1, "nothing was kept");
        comes_late(&table, &ours.proxy, sent, late);
    });
}

/// Whatever of it is late: where it is more than one request, some of them may never be sent.
#[test]
fn a_late_copy_of_the_first_acquire_of_a_lock_leaves_no_lock_behind() {
    let requests = ["pg_try_advisory_xact_lock", "INSERT INTO", "COMMIT\0", " acquire \""];
    let cases: Vec<_> = requests.into_iter().flat_map(|request| SOME.map(|late| (request, late))).collect();
    side_by_side(&cases, |&(request, late)| {
        let table = Table::new();
        let ours = Behind::proxy(&table);
        // The statements are prepared, and not only their texts are kept or answered.
        drop(StorageLock::new(&ours.storage, "another").unwrap().lock("warm-up").unwrap());
        ours.proxy.keep_request(request.as_bytes());
        let sent = Instant::now();
        match ours.lock.try_lock_for("ours", ms(500)) {
            Ok(guard) => drop(guard),
            Err(error) => assert!(matches!(error, Error::Timeout { .. } | Error::Connect { .. }), "{error:?}"),
        }
        // Another one has it between, unless the server has the transaction open.
        if let Some(guard) = table.lock("l").try_lock("other").unwrap() {
            guard.unlock().unwrap();
        }
        if ours.proxy.kept_requests() == 1 {
            comes_late(&table, &ours.proxy, sent, late);
        } else {
            // It is not sent any more.
            assert_ne!(request.as_bytes(), ACQUIRE, "nothing was kept");
        }
    });
}

/// It would put a process that waits no more into the row.
#[test]
fn a_late_copy_of_a_waiters_acquire_leaves_no_place_behind() {
    side_by_side(&[ms(100), Duration::from_secs(3)], |&late| {
        let table = Table::new();
        let ours = Behind::warm(&table);
        let _guard = long_lock(&table.storage()).lock("holder").unwrap();
        ours.proxy.keep_request(ACQUIRE);
        let sent = Instant::now();
        assert!(!matches!(ours.lock.try_lock_for("ours", ms(300)), Ok(Some(_))));
        assert_eq!(ours.proxy.kept_requests(), 1, "nothing was kept");
        thread::sleep(late.saturating_sub(sent.elapsed()));
        ours.proxy.deliver();
        thread::sleep(ms(500));
        nobody_waits(&table);
    });
}

/// Soon the row says that nobody waits.
#[track_caller]
fn nobody_waits(table: &Table) {
    let theirs = table.lock("l");
    let is_so = || (theirs.info().unwrap().unwrap().waiters == 0).then_some(());
    within(Duration::from_secs(15), "the row says that nobody waits", is_so);
}

/// Who gave up has left nothing: somebody else has the lock soon.
#[track_caller]
fn is_free_soon(table: &Table, case: &str, gave_up: Instant) {
    let theirs = table.lock("l");
    while theirs.try_lock("other").unwrap().is_none() {
        assert!(gave_up.elapsed() < Duration::from_secs(20), "{case}: still held after {:?}", gave_up.elapsed());
        thread::sleep(ms(20));
    }
    assert!(gave_up.elapsed() <= Duration::from_secs(5), "{case}: held for nobody for {:?}", gave_up.elapsed());
}

fn is_timeout(result: storage_lock::Result<Option<LockGuard>>) -> bool {
    match result {
        Ok(guard) => guard.is_none(),
        Err(error) => matches!(error, Error::Timeout { .. } | Error::Connect { .. }),
    }
}

/// The server has done it, its kernel and the network are well, and no answer ever comes.
#[test]
fn an_acquire_whose_answer_is_swallowed_ends_in_time_and_leaves_no_lock_behind() {
    side_by_side(&["try_lock_for", "try_lock_for, in a hurry", "try_lock", "lock"], |&case| {
        let table = Table::new();
        let ours = Behind::warm(&table);
        ours.proxy.swallow_answers_after(ACQUIRE);
        let lock = &ours.lock;
        match case {
            "try_lock_for" => {
                let attempt = || lock.try_lock_for("ours", ms(1_000));
                assert!(is_timeout(takes_at_most(ms(2_000), case, attempt)));
            }
            "try_lock_for, in a hurry" => {
                let attempt = || lock.try_lock_for("ours", ms(20));
                assert!(is_timeout(takes_at_most(ms(1_000), case, attempt)));
            }
            // With time for another connection they have it.
            "try_lock" => assert!(takes_at_most(ms(6_000), case, || lock.try_lock("ours")).unwrap().is_some()),
            _ => drop(takes_at_most(ms(6_000), case, || lock.lock("ours")).unwrap()),
        }
        assert!(ours.proxy.has_swallowed());
        is_free_soon(&table, case, Instant::now());
        eventually("the same storage works", || lock.try_lock("ours").is_ok_and(|guard| guard.is_some()));
    });
}

#[test]
fn a_first_acquire_whose_answer_is_swallowed_leaves_no_lock_behind() {
    let requests = ["pg_try_advisory_xact_lock", "INSERT INTO", "COMMIT\0", " acquire \""];
    side_by_side(&requests, |&case| {
        let table = Table::new();
        let ours = Behind::proxy(&table);
        // The statements are prepared, and not only their texts are kept or answered.
        drop(StorageLock::new(&ours.storage, "another").unwrap().lock("warm-up").unwrap());
        ours.proxy.swallow_answers_after(case.as_bytes());
        let attempt = || ours.lock.try_lock_for("ours", ms(1_000));
        let guard = takes_at_most(ms(2_000), case, attempt);
        // Otherwise it isn't sent any more.
        if ours.proxy.has_swallowed() {
            assert!(is_timeout(guard), "{case}");
        }
        is_free_soon(&table, case, Instant::now());
    });
}

/// The next thread doesn't wait for what was handed to itself.
#[test]
fn a_hand_over_whose_answer_is_swallowed_leaves_no_lock_behind_and_the_next_thread_has_it() {
    side_by_side(&[true, false], |&is_waited_for| {
        let table = Table::new();
        let ours = Behind::warm(&table);
        let lock = |guard: LockGuard| {
            let lock = ours.lock.clone();
            let second = waiting_thread(move || lock.lock("second").unwrap().unlock().unwrap());
            let gives_up = {
                let lock = ours.lock.clone();
                waiting_thread(move || lock.try_lock_for("third", ms(300)).is_ok())
            };
            (guard, second, gives_up)
        };
        // The statements are prepared.
        let (guard, second, gives_up) = lock(ours.lock.lock("first").unwrap());
        guard.unlock().unwrap();
        second.join().unwrap();
        assert!(gives_up.join().unwrap());
        let guard = ours.lock.lock("first").unwrap();
        let (guard, second, gives_up) = lock(guard);
        ours.proxy.swallow_answers_after(HAND_OVER);
        let other = is_waited_for.then(|| table.lock("l"));
        let others = other.map(|other| thread::spawn(move || drop(other.lock("other").unwrap())));
        takes_at_most(ms(2_700), "unlock", || guard.unlock()).ok();
        assert!(ours.proxy.has_swallowed());
        let start = Instant::now();
        let ends = |what: &str, thread: thread::JoinHandle<()>| {
            within(Duration::from_secs(5), what, || thread.is_finished().then_some(()));
            thread.join().unwrap();
        };
        ends("the next thread's turn", second);
        assert!(gives_up.join().unwrap());
        others.into_iter().for_each(|others| ends("the other process's turn", others));
        is_free_soon(&table, "hand-over", start);
    });
}

#[test]
fn a_refresh_or_a_release_whose_answer_is_swallowed_leaves_no_lock_behind() {
    side_by_side(&["refresh", "release", "drop"], |&case| {
        let table = Table::new();
        let proxy = Proxy::to(&table.dsn);
        let storage = Table::of(&proxy.dsn, &table.name).storage();
        let options = LockOptions::new("l").lease_expire_after(Duration::from_secs(60)).lease_refresh_interval(ms(200));
        let lock = StorageLock::with_options(&storage, options).unwrap();
        drop(lock.lock("warm-up").unwrap());
        let guard = lock.lock("ours").unwrap();
        is_refreshed(&guard);
        proxy.swallow_answers_after(if case == "refresh" { REFRESH } else { RELEASE });
        if case == "refresh" {
            eventually("it is swallowed", || proxy.has_swallowed());
            thread::sleep(ms(500));
            assert!(guard.is_held());
        }
        takes_at_most(ms(2_700), case, || if case == "drop" { drop(guard) } else { guard.unlock().ok().unwrap_or(()) });
        assert!(proxy.has_swallowed());
        is_free_soon(&table, case, Instant::now());
        eventually("the same storage works", || lock.try_lock("ours").is_ok_and(|guard| guard.is_some()));
    });
}

/// What it hears no more is that it stands in the row, or that it has the lock.
#[test]
fn a_waiter_whose_answer_is_swallowed_leaves_nothing_behind() {
    side_by_side(&["gives up", "the first answer", "a later answer"], |&case| {
        let table = Table::new();
        let ours = Behind::warm(&table);
        let holder = long_lock(&table.storage());
        let guard = holder.lock("holder").unwrap();
        let lock = ours.lock.clone();
        if case == "gives up" {
            ours.proxy.swallow_answers_after(ACQUIRE);
            assert!(is_timeout(takes_at_most(ms(2_000), case, || lock.try_lock_for("ours", ms(1_000)))));
            assert!(ours.proxy.has_swallowed());
            nobody_waits(&table);
            guard.unlock().unwrap();
        } else {
            let is_first = case == "the first answer";
            if is_first {
                ours.proxy.swallow_answers_after(ACQUIRE);
            }
            let waiting = waiting_thread(move || lock.try_lock_for("ours", Duration::from_secs(40)));
            if is_first {
                eventually("it is swallowed", || ours.proxy.has_swallowed());
            } else {
                table.hears("l", 1);
                // What it asked when it began to listen.
                thread::sleep(ms(300));
                ours.proxy.swallow_answers_after(ACQUIRE);
            }
            guard.unlock().unwrap();
            let is_over = || waiting.is_finished().then_some(());
            // An answer is given up after the connect timeout and 5 s.
            within(Duration::from_secs(14), "the end of the wait", is_over);
            assert!(ours.proxy.has_swallowed());
            match waiting.join().unwrap() {
                Ok(guard) => guard.expect("the lock").unlock().unwrap(),
                // An error of the very first attempt ends the wait.
                Err(error) => assert!(is_first && is_timeout(Err(error))),
            }
            nobody_waits(&table);
        }
        is_free_soon(&table, case, Instant::now());
    });
}

/// Stands before a proxy. While it is closed, what connects is cut at once.
struct Gate {
    dsn: String,
    is_closed: Arc<AtomicBool>,
}

impl Gate {
    fn before(proxy: &Proxy) -> Gate {
        let port = |dsn: &str| dsn.parse::<postgres::Config>().unwrap().get_ports()[0];
        let (inner, listener) = (port(&proxy.dsn), TcpListener::bind("127.0.0.1:0").unwrap());
        let outer = listener.local_addr().unwrap().port();
        let is_closed = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&is_closed);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", inner)) else { return };
                if asked.load(Ordering::SeqCst) {
                    continue;
                }
                for (mut from, mut to) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server.try_clone().unwrap(), client.try_clone().unwrap()),
                ] {
                    thread::spawn(move || {
                        std::io::copy(&mut from, &mut to).ok();
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                    });
                }
            }
        });
        Gate { dsn: proxy.dsn.replace(&format!("port={inner}"), &format!("port={outer}")), is_closed }
    }

    fn close(&self, is_closed: bool) {
        self.is_closed.store(is_closed, Ordering::SeqCst);
    }
}

/// How a waiter came to be cut off from its place in the row.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// The answer that it stands there is lost with its connection.
    Answer,
    /// It knows that it stands there.
    All,
}

/// Nothing can be opened when it gives up, nor for a while after that.
#[test]
fn a_wait_that_ends_while_nothing_can_be_opened_leaves_no_place_behind() {
    let cases: Vec<_> =
        [Cut::Answer, Cut::All].into_iter().flat_map(|cut| [0, 3, 9].map(|seconds| (cut, seconds))).collect();
    side_by_side(&cases, |&(cut, seconds)| {
        let table = Table::new();
        let _guard = long_lock(&table.storage()).lock("holder").unwrap();
        let proxy = Proxy::to(&table.dsn);
        let gate = Gate::before(&proxy);
        let storage = Table::of(&gate.dsn, &table.name).storage();
        drop(StorageLock::new(&storage, "another").unwrap().lock("warm-up").unwrap());
        let lock = StorageLock::new(&storage, "l").unwrap();
        thread::scope(|scope| {
            if matches!(cut, Cut::Answer) {
                proxy.lose_answer_to(ACQUIRE);
                gate.close(true);
            }
            let waiting = scope.spawn(|| is_timeout(lock.try_lock_for("ours", ms(1_500))));
            if matches!(cut, Cut::All) {
                table.hears("l", 1);
                gate.close(true);
                proxy.cut();
            }
            assert!(takes_at_most(ms(3_000), "the wait", || waiting.join().unwrap()));
        });
        assert_eq!(table.waiters("l").len(), 1, "it was never there");
        thread::sleep(Duration::from_secs(seconds));
        gate.close(false);
        nobody_waits(&table);
    });
}

/// While its process goes on waiting: then the place is its own.
#[test]
fn a_thread_that_goes_on_waiting_keeps_its_place_when_another_gives_up_without_an_answer() {
    let table = Table::new();
    let guard = long_lock(&table.storage()).lock("holder").unwrap();
    let ours = crate::free::Listening::on(&table);
    let lock = ours.lock();
    thread::scope(|scope| {
        let patient = scope.spawn(|| lock.lock("patient").unwrap().unlock());
        stands_in_the_row(&table, ours.waiter);
        assert!(is_timeout(lock.try_lock_for("hurried", ms(100))));
        thread::sleep(ms(500));
        stands_in_the_row(&table, ours.waiter);
        guard.unlock().unwrap();
        takes_at_most(ms(2_000), "the patient one's turn", || patient.join().unwrap()).unwrap();
    });
}

/// What a server says that is out of disk, of memory, of room for something, or whose disk fails.
const PASSING: [&str; 4] = ["53100", "53200", "54000", "58030"];

/// Makes each change of lock "l" by `owner`, or of any, fail until it is told to stop; counts them in a sequence.
fn break_updates(table: &Table, code: &str, condition: &str) {
    let sql = "CREATE SEQUENCE $T_failures;
        CREATE FUNCTION $T_fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_catalog.nextval('public.$T_failures');
            RAISE EXCEPTION 'no room' USING ERRCODE = '$CODE'; END $$;
        CREATE TRIGGER fail BEFORE UPDATE ON $T FOR EACH ROW WHEN ($IF) EXECUTE FUNCTION $T_fail()";
    let sql = sql.replace("$T", &table.name).replace("$CODE", code).replace("$IF", condition);
    table.impatient_client().batch_execute(&sql).unwrap();
}

/// Waits until something has failed so often.
#[track_caller]
fn has_failed(table: &Table, times: i64) {
    let sql = format!("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {}_failures", table.name);
    let mut client = table.client();
    eventually("it fails", || client.query_one(&sql, &[]).unwrap().get::<_, i64>(0) >= times);
}

fn mend_updates(table: &Table) {
    let sql = "DROP FUNCTION $T_fail CASCADE; DROP SEQUENCE $T_failures".replace("$T", &table.name);
    table.impatient_client().batch_execute(&sql).unwrap();
}

#[test]
fn a_release_that_fails_for_a_moment_is_repeated_and_succeeds() {
    side_by_side(&PASSING, |&code| {
        let table = Table::new();
        let guard = long_lock(&table.storage()).lock("ours").unwrap();
        break_updates(&table, code, "true");
        thread::scope(|scope| {
            let unlocking = scope.spawn(|| takes_at_most(ms(2_700), "unlock", || guard.unlock()));
            has_failed(&table, 2);
            mend_updates(&table);
            unlocking.join().unwrap().unwrap_or_else(|error| panic!("{code}: {error:?}"));
        });
        assert!(table.lock("l").try_lock("other").unwrap().is_some());
    });
}

/// Also for reasons that don't pass by themselves, but that somebody sees to.
#[test]
fn a_release_that_failed_is_made_when_it_can_be() {
    const RENAMED: &str = "renamed";
    const NO_LOGIN: &str = "no login";
    let cases: Vec<&str> = PASSING.into_iter().chain(["P0001", RENAMED, NO_LOGIN]).collect();
    side_by_side(&cases, |&case| {
        let role = (case == NO_LOGIN).then(|| Role::with(&[]));
        let theirs = Table::new();
        let table = match &role {
            Some(role) => Table::of(&role.table.dsn, &theirs.name),
            None => Table::of(&theirs.dsn, &theirs.name),
        };
        drop(theirs.storage());
        let guard = long_lock(&table.storage()).lock("ours").unwrap();
        match &role {
            _ if case == RENAMED => _ = theirs.execute("ALTER TABLE $T RENAME TO $T_away"),
            Some(Role { name, .. }) => {
                theirs.execute(&format!("ALTER ROLE {name} NOLOGIN"));
                let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '$R'";
                theirs.execute(&sql.replace("$R", name));
            }
            None => break_updates(&theirs, case, "true"),
        }
        takes_at_most(ms(2_700), "unlock", || guard.unlock()).expect_err(case);
        thread::sleep(ms(300));
        match &role {
            _ if case == RENAMED => _ = theirs.execute("ALTER TABLE $T_away RENAME TO $T"),
            Some(Role { name, .. }) => _ = theirs.execute(&format!("ALTER ROLE {name} LOGIN")),
            None => mend_updates(&theirs),
        }
        let other = theirs.lock("l");
        within(Duration::from_secs(8), case, || other.try_lock("other").unwrap().map(drop));
    });
}

#[test]
fn a_wait_without_an_end_goes_on_while_the_server_is_out_of_room() {
    side_by_side(&PASSING, |&code| {
        let table = Table::new();
        let guard = long_lock(&table.storage()).lock("holder").unwrap();
        let ours = table.lock("l");
        let waiting = waiting_thread(move || ours.lock("waiter").map(|guard| guard.version()));
        table.hears("l", 1);
        break_updates(&table, code, "new.owner_id = 'waiter'");
        guard.unlock().unwrap();
        has_failed(&table, 2);
        mend_updates(&table);
        let version = takes_at_most(Duration::from_secs(9), "the wait", || waiting.join().unwrap());
        assert_eq!(version.unwrap_or_else(|error| panic!("{code}: {error:?}")), 2);
    });
}

/// What our sessions do whose commits wait for a standby that isn't there.
fn hanging_commits(server: &Server) -> Vec<String> {
    let sql = "SELECT query FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'storage_lock'";
    server.client().query(sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
}

/// Whoever gave it up can't see it before that, and nobody can undo it.
#[test]
fn a_claim_that_is_stuck_in_its_commit_for_longer_than_it_lives_leaves_no_lock_behind() {
    let server = Server::start();
    let tables = [0; 4].map(|_| Table::on(&server.dsn));
    let [acquired, created, handed, registered] = &tables;
    let [acquiring, creating, handing] = [acquired, created, handed].map(Behind::proxy);
    drop(acquiring.lock.lock("warm-up").unwrap());
    drop(StorageLock::new(&creating.storage, "another").unwrap().lock("warm-up").unwrap());
    // Its statements are prepared: only its own can be lost.
    let registering = Behind::warm(registered);
    // Refreshed so rarely that no refresh hangs.
    let _holder = short_lock(&registered.storage(), "l", ms(600_000), ms(200_000)).lock("holder").unwrap();
    let guard = handing.lock.lock("first").unwrap();
    let second = {
        let lock = handing.lock.clone();
        waiting_thread(move || lock.try_lock_for("second", ms(4_000)))
    };
    hang_durable_commits(&server);
    thread::scope(|scope| {
        for behind in [&acquiring, &creating] {
            scope.spawn(|| assert!(is_timeout(behind.lock.try_lock_for("ours", ms(300)))));
        }
        scope.spawn(|| takes_at_most(ms(2_700), "unlock", || guard.unlock()).ok());
        scope.spawn(|| {
            // It comes to stand in the row, and doesn't hear of it.
            registering.proxy.lose_answer_to(ACQUIRE);
            assert!(!matches!(registering.lock.try_lock_for("ours", ms(500)), Ok(Some(_))));
            assert_eq!(registering.proxy.lost_answers(), 1);
        });
        eventually("three commits hang", || hanging_commits(&server).len() == 3);
    });
    let gave_up = Instant::now();
    assert!(!matches!(second.join().unwrap(), Ok(Some(_))));
    [&acquiring, &creating, &handing].into_iter().for_each(|behind| behind.proxy.cut());
    // A claim lives for 20 s, and for a second more as far as is known; and is looked for every 2 s.
    thread::sleep(Duration::from_secs(24).saturating_sub(gave_up.elapsed()));
    let hanging = hanging_commits(&server);
    assert_eq!(hanging.len(), 3, "what is followed up doesn't wait for the standby: {hanging:#?}");
    server.set("synchronous_standby_names", "");
    eventually("they come through", || hanging_commits(&server).is_empty());
    side_by_side(&[0, 1, 2], |&case| {
        is_free_soon(&tables[case], ["acquire", "first hold", "hand-over"][case], Instant::now());
    });
}

/// Each answer comes too late for whoever releases, also the one that opens a connection.
#[test]
fn an_acquire_that_is_given_up_is_undone_where_all_answers_are_slow() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = short_lock(&storage, "l", ms(60_000), ms(20_000));
    drop(lock.lock("warm-up").unwrap());
    // It has several connections.
    thread::scope(|scope| {
        for n in 0..3 {
            let other = StorageLock::new(&storage, format!("other {n}")).unwrap();
            scope.spawn(move || (0..20).for_each(|_| drop(other.lock("worker").unwrap())));
        }
    });
    proxy.swallow_answers_after(ACQUIRE);
    assert!(is_timeout(lock.try_lock_for("ours", ms(500))));
    assert!(proxy.has_swallowed());
    proxy.delay_answers(ms(2_200));
    let other = table.lock("l");
    within(Duration::from_secs(25), "the lock is free", || other.try_lock("other").unwrap().map(drop));
}

/// More of them than a storage has connections, by far.
#[test]
fn unlocks_of_many_holds_while_the_table_is_locked_leave_nothing_held() {
    let table = Table::new();
    let storage = table.storage();
    let lock = |n: usize| short_lock(&storage, &format!("l{n}"), ms(600_000), ms(200_000));
    let guards: Vec<LockGuard> = (0..150).map(|n| lock(n).lock("ours").unwrap()).collect();
    let mut locking = table.client();
    let mut transaction = locking.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    thread::scope(|scope| {
        for guard in guards {
            scope.spawn(|| takes_at_most(ms(3_500), "unlock", || guard.unlock()).expect_err("the table is locked"));
        }
    });
    // Some of what follows them up fails too: no statement waits for so long.
    thread::sleep(ms(5_500));
    transaction.rollback().unwrap();
    let theirs = table.storage();
    within(Duration::from_secs(15), "all are free", || theirs.list().unwrap().is_empty().then_some(()));
}

/// The queue of notifications is full, because some session reads none: whatever notifies would fail.
#[test]
fn where_the_server_takes_no_notifications_locks_are_released_handed_over_and_waited_for() {
    let database = format!("it_{}", uuid::Uuid::new_v4().simple());
    let mut client = crate::support::client();
    client.batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    let dsn = crate::support::dsn();
    let own = dsn.replace(&format!("dbname={}", dsn.parse::<postgres::Config>().unwrap().get_dbname().unwrap()), "");
    let table = Table::on(&format!("{own} dbname={database}"));
    let sql = "ALTER FUNCTION pg_catalog.pg_notify(text, text) RENAME TO old_notify;
        CREATE SEQUENCE public.refusals;
        CREATE FUNCTION pg_catalog.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_catalog.nextval('public.refusals');
            RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000'; END $$";
    table.client().batch_execute(sql).unwrap();
    let refusals = || -> i64 {
        let sql = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM public.refusals";
        table.client().query_one(sql, &[]).unwrap().get(0)
    };
    // A release for which another process waits.
    let (ours, theirs) = (table.storage(), table.storage());
    let (long, short) = (long_lock(&ours), short_lock(&ours, "l", ms(20_000), ms(5_000)));
    let guard = long.lock("ours").unwrap();
    let waiting = {
        let lock = long_lock(&theirs);
        waiting_thread(move || lock.lock("theirs").map(|guard| guard.unlock()))
    };
    table.hears("l", 1);
    takes_at_most(ms(1_000), "unlock", || guard.unlock()).unwrap();
    let before = refusals();
    assert!(before > 0, "nobody was notified");
    takes_at_most(Duration::from_secs(8), "the wait", || waiting.join().unwrap()).unwrap().unwrap();
    // A hand-over to a shorter lease, which tells others.
    let guard = long.lock("ours").unwrap();
    let waiting = {
        let lock = long_lock(&theirs);
        waiting_thread(move || lock.lock("theirs").map(|guard| guard.unlock()))
    };
    table.hears("l", 1);
    let next = waiting_thread(move || short.lock("next").map(|guard| guard.unlock()));
    takes_at_most(ms(1_000), "unlock", || guard.unlock()).unwrap();
    takes_at_most(Duration::from_secs(8), "the next thread's turn", || next.join().unwrap()).unwrap().unwrap();
    takes_at_most(Duration::from_secs(8), "the wait", || waiting.join().unwrap()).unwrap().unwrap();
    assert!(refusals() > before, "nobody was notified");
    // One behind dead processes, which it notifies.
    table.execute("UPDATE $T SET version = version + 1 WHERE lock_id = 'l'");
    table.execute("DELETE FROM $T");
    hold_of_the_dead(&table, ms(1_500));
    table.execute("UPDATE $T SET waiters = ARRAY[gen_random_uuid(), gen_random_uuid()]");
    let before = refusals();
    let lock = long_lock(&theirs);
    takes_at_most(Duration::from_secs(10), "the wait", || lock.lock("theirs")).unwrap().unlock().unwrap();
    assert!(refusals() > before, "nobody was notified");
    drop((ours, theirs, long, lock));
    drop(table);
    within(Duration::from_secs(20), "its sessions have ended", || {
        client.batch_execute(&format!("DROP DATABASE {database}")).ok()
    });
}
