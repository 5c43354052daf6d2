//! Connections that break, and answers that get lost.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use storage_lock::{Error, PostgresStorage, StorageLock};

use crate::support::proxy::Proxy;
use crate::support::{Table, chain, dsn, eventually, is_refreshed, ms, short_lock, takes_at_most, within};

/// A table, a proxy before its server, and a storage that goes through the proxy.
fn proxied() -> (Table, Proxy, PostgresStorage) {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    (table, proxy, storage)
}

#[test]
fn an_acquire_whose_answer_was_lost_is_undone_and_repeated_at_once() {
    let (table, proxy, storage) = proxied();
    let lock = StorageLock::new(&storage, "l").unwrap();
    // The first hold of a lock, and a later one.
    for (lost, owner, version) in [(1, "first-owner", 1), (2, "second-owner", 3)] {
        proxy.lose_answer_to(owner.as_bytes());
        let start = Instant::now();
        let guard = lock.try_lock(owner).unwrap().expect("free: our own hold was released");
        assert!(start.elapsed() < ms(5_000));
        assert_eq!(proxy.lost_answers(), lost, "the answer was not lost");
        // The first answer to be lost says that there is no row yet.
        assert_eq!(guard.version(), version, "the hold whose answer was lost is another one");
        assert!(guard.is_held());
        guard.unlock().unwrap();
    }
    assert!(table.lock("l").try_lock("other").unwrap().is_some());
}

/// Whoever else may be at it too, it isn't kept out by itself.
#[test]
fn the_next_try_releases_what_the_one_before_may_have_taken() {
    let (_table, proxy, storage) = proxied();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    for lost in 1..=20 {
        proxy.lose_answer_to(b" acquire \"");
        let guard = lock.try_lock("worker").unwrap().expect("free: our own hold was released");
        assert_eq!(proxy.lost_answers(), lost);
        guard.unlock().unwrap();
    }
}

/// The server has done it, and the connection stays open, so that the call is stuck. Who gave it up undoes it.
#[test]
fn an_acquire_that_is_given_up_without_an_answer_is_followed_up() {
    let (table, proxy, storage) = proxied();
    let lock = short_lock(&storage, "l", ms(90_000), ms(30_000));
    drop(lock.lock("warm-up").unwrap());
    proxy.swallow_answers_after(b" acquire \"");
    let result = takes_at_most(ms(1_500), "try_lock_for", || lock.try_lock_for("gave-up", ms(300)));
    assert!(matches!(result, Err(Error::Timeout { .. })) && proxy.has_swallowed(), "{result:?}");
    // Not for the lease, and not for as long as the stuck call takes to hear that its connection is dead.
    let theirs = table.lock("l");
    within(Duration::from_secs(8), "the lock is free", || theirs.try_lock("other").unwrap().map(drop));
}

/// The request is swallowed, and the connection stays open.
#[test]
fn a_release_that_the_server_never_got_is_repeated_on_another_connection() {
    let (table, proxy, storage) = proxied();
    let guard = short_lock(&storage, "l", ms(90_000), ms(30_000)).lock("worker").unwrap();
    // Its statements have been prepared.
    proxy.becomes_quiet();
    proxy.swallow_open_connections();
    takes_at_most(ms(2_500), "unlock", || guard.unlock()).unwrap();
    assert!(table.lock("l").try_lock("other").unwrap().is_some());
}

#[test]
fn a_release_whose_answer_was_lost_is_not_taken_for_a_lost_lease() {
    let (table, proxy, storage) = proxied();
    let guard = StorageLock::new(&storage, "some-lock").unwrap().lock("worker").unwrap();
    proxy.lose_answer_to(b"some-lock");
    guard.unlock().unwrap();
    assert_eq!(proxy.lost_answers(), 1);
    assert!(table.lock("some-lock").try_lock("other").unwrap().is_some());
}

#[test]
fn a_refresh_whose_answer_was_lost_is_repeated() {
    let (_table, proxy, storage) = proxied();
    let guard = short_lock(&storage, "some-lock", ms(2_000), ms(100)).lock("worker").unwrap();
    for lost in 1..=3 {
        proxy.lose_answer_to(b"some-lock");
        eventually("an answer is lost", || proxy.lost_answers() == lost);
        is_refreshed(&guard);
        assert!(guard.is_held());
    }
    guard.unlock().unwrap();
}

#[test]
fn a_connection_that_was_ended_under_a_held_lock_is_replaced() {
    let table = Table::new();
    let dsn = format!("{} application_name={}", table.dsn, table.name);
    let storage = Table::of(&dsn, &table.name).storage();
    let guard = short_lock(&storage, "l", ms(2_000), ms(100)).lock("worker").unwrap();
    let mut client = table.client();
    for _ in 0..10 {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
        let ended: i64 = client.query_one(sql, &[&table.name]).unwrap().get(0);
        is_refreshed(&guard);
        assert!(guard.is_held() && ended <= 4, "{ended} connections");
    }
    client
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", &[&table.name])
        .unwrap();
    guard.unlock().unwrap();
    assert!(table.lock("l").try_lock("other").unwrap().is_some());
}

#[test]
fn a_log_in_that_is_swallowed_costs_neither_the_hold_nor_other_calls() {
    let (_table, proxy, storage) = proxied();
    let guard = short_lock(&storage, "l", ms(5_000), ms(500)).lock("worker").unwrap();
    is_refreshed(&guard);
    for _ in 0..2 {
        proxy.swallow_next_connection();
        proxy.cut();
        // A refresh meets the silent connection, and tries another one.
        is_refreshed(&guard);
        assert!(guard.is_held());
        takes_at_most(ms(2_000), "another call", || storage.get("l").unwrap());
    }
    takes_at_most(ms(1_000), "unlock", || guard.unlock().unwrap());
}

#[test]
fn a_connection_that_went_silent_costs_neither_the_hold_nor_other_calls() {
    let (_table, proxy, storage) = proxied();
    let guard = short_lock(&storage, "l", ms(5_000), ms(500)).lock("worker").unwrap();
    for _ in 0..2 {
        is_refreshed(&guard);
        proxy.swallow_open_connections();
        // A refresh is stuck, and is given up in time to be repeated on another connection.
        is_refreshed(&guard);
        assert!(guard.is_held());
    }
    takes_at_most(ms(1_000), "unlock", || guard.unlock().unwrap());
}

/// An attempt to connect that was left behind, and the one beside it: one is enough.
#[test]
fn an_attempt_that_was_left_behind_is_no_further_connection() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let storage = Table::of(&format!("{} application_name={}", proxy.dsn, table.name), &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    thread::scope(|scope| {
        // The connection that there is gets busy, and another one takes long to open.
        let requests = proxy.requests();
        let occupier = scope.spawn(|| lock.try_lock_for("occupier", ms(4_000)));
        eventually("the connection is busy", || proxy.requests() > requests);
        proxy.delay_answers(ms(300));
        let before = proxy.connections();
        lock.try_lock_for("late", Duration::ZERO).unwrap_err();
        assert_eq!(proxy.connections(), before + 1, "an attempt is left behind");
        storage.server_time().unwrap();
        proxy.delay_answers(Duration::ZERO);
        transaction.commit().unwrap();
        occupier.join().unwrap().unwrap().expect("the lock was free").unlock().unwrap();
    });
    let open = || -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        table.client().query_one(sql, &[&table.name]).unwrap().get(0)
    };
    // Whatever is still being opened is opened soon, and closed again.
    thread::sleep(ms(1_500));
    eventually("two connections for two calls at once", || open() <= 2);
}

/// Tasks whose callers gave up while one worker was busy.
#[test]
fn tasks_that_expired_in_the_queue_cost_no_connection() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let options = Table::of(&proxy.dsn, &table.name).options().max_connections(1);
    let storage = PostgresStorage::new(options).unwrap();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    // Its statements have been prepared.
    proxy.becomes_quiet();
    let before = proxy.connections();
    proxy.delay_answers(ms(1_000));
    thread::scope(|scope| {
        let slow = scope.spawn(|| storage.server_time().unwrap());
        let requests = proxy.requests();
        eventually("the request is on its way", || proxy.requests() > requests || slow.is_finished());
        for _ in 0..10 {
            scope.spawn(|| lock.try_lock_for("late", Duration::ZERO).unwrap_err());
        }
    });
    proxy.delay_answers(Duration::ZERO);
    drop(lock.lock("worker").unwrap());
    assert_eq!(proxy.connections(), before, "a good connection was given up");
}

#[test]
fn with_all_packets_swallowed_every_call_comes_back() {
    let (table, proxy, storage) = proxied();
    let lock = short_lock(&storage, "l", ms(3_000), ms(500));
    let free = StorageLock::new(&storage, "free").unwrap();
    let guard = lock.lock("worker").unwrap();
    proxy.swallow();
    let start = Instant::now();
    // A held lock, while the network is gone: the drop is bounded, and the hold ends by itself.
    thread::scope(|scope| {
        let dropped = scope.spawn(|| takes_at_most(ms(2_500), "drop", || drop(guard)));
        for _ in 0..20 {
            scope.spawn(|| {
                let result = takes_at_most(ms(2_000), "try_lock_for", || free.try_lock_for("worker", ms(1_000)));
                assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
            });
        }
        dropped.join().unwrap();
    });
    let error = takes_at_most(ms(11_000), "try_lock", || free.try_lock("worker")).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. } | Error::Connect { .. }), "{error:?}");
    assert!(start.elapsed() < Duration::from_secs(20));
    eventually("the lock is free", || table.lock("l").try_lock("other").unwrap().is_some());
    takes_at_most(ms(500), "closing", || drop((lock, free, storage)));
}

/// An acquire that the server carries out after its caller has gone.
#[test]
fn a_waiter_that_gave_up_leaves_no_lock_behind() {
    let table = Table::new();
    let storage = table.storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    let mut client = table.client();
    let mut asked = 0;
    for _ in 0..5 {
        // Nobody reads or writes the table for a while.
        let mut transaction = client.transaction().unwrap();
        transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
        let sql = format!("SELECT max(version) FROM {}", table.name);
        let version: i64 = transaction.query_one(&sql, &[]).unwrap().get(0);
        let result = takes_at_most(ms(1_500), "try_lock_for", || lock.try_lock_for("gave-up", ms(300)));
        let Err(Error::Timeout { waiting_for, .. }) = result else { panic!("{result:?}") };
        transaction.commit().unwrap();
        // Where the connection was busy until then, being prepared, nothing was asked.
        if waiting_for != "an answer" {
            continue;
        }
        asked += 1;
        eventually("the late hold is given back", || {
            let now = storage.get("l").unwrap().unwrap();
            now.version > version && !now.is_held
        });
    }
    assert!(asked > 0);
    eventually("it is free", || lock.try_lock("worker").unwrap().is_some());
}

/// The connection breaks while the server works on the acquire. The repetition finds the row locked, and so busy;
/// then the first one commits.
#[test]
fn an_acquire_that_commits_after_its_repetition_leaves_no_lock_behind() {
    let (table, proxy, storage) = proxied();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    table
        .client()
        .batch_execute(
            &"CREATE FUNCTION $T_slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                  IF new.owner_id = 'slow' AND new.version <> old.version THEN PERFORM pg_sleep(1); END IF; RETURN \
                  new; END $$;
              CREATE TRIGGER slow BEFORE UPDATE ON $T FOR EACH ROW EXECUTE FUNCTION $T_slow()"
                .replace("$T", &table.name),
        )
        .unwrap();
    for version in [2, 3] {
        thread::scope(|scope| {
            let before = proxy.requests();
            let attempt = scope.spawn(|| lock.try_lock_for("slow", ms(200)));
            eventually("the request is on its way", || proxy.requests() > before);
            proxy.cut();
            let result = attempt.join().unwrap();
            assert!(matches!(result, Ok(None) | Err(Error::Timeout { .. })), "{result:?}");
        });
        eventually("the stray acquire comes through", || table.lock("l").info().unwrap().unwrap().version == version);
        eventually("and is released", || !storage.get("l").unwrap().unwrap().is_held);
    }
    drop((lock, storage));
    table.client().batch_execute(&"DROP FUNCTION $T_slow CASCADE".replace("$T", &table.name)).unwrap();
}

#[test]
fn a_release_whose_answer_was_lost_is_a_release_even_if_another_has_the_lock_by_then() {
    let (table, proxy, storage) = proxied();
    let lock = StorageLock::new(&storage, "some-lock").unwrap();
    let theirs = table.lock("some-lock");
    for _ in 0..10 {
        let guard = lock.lock("worker").unwrap();
        let lost = proxy.lost_answers();
        proxy.lose_answer_to(b"some-lock");
        thread::scope(|scope| {
            // Takes the lock as soon as it is released, which is before the release is repeated on a new connection.
            let other = scope.spawn(|| {
                loop {
                    if let Some(guard) = theirs.try_lock("other").unwrap() {
                        break guard;
                    }
                }
            });
            guard.unlock().unwrap();
            assert_eq!(proxy.lost_answers(), lost + 1);
            other.join().unwrap().unlock().unwrap();
        });
    }
}

#[test]
fn when_all_connections_are_busy_the_error_names_the_option() {
    let table = Table::new();
    let storage = PostgresStorage::new(table.options().max_connections(1)).unwrap();
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("worker").unwrap());
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    thread::scope(|scope| {
        let occupier = scope.spawn(|| lock.try_lock_for("occupier", ms(3_000)));
        eventually("the connection is busy", || {
            let sql =
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'";
            table.client().query_one(sql, &[&table.name]).unwrap().get::<_, i64>(0) == 1
        });
        let other = StorageLock::new(&storage, "other").unwrap();
        let error = other.try_lock_for("late", ms(100)).unwrap_err();
        assert!(error.to_string().contains("max_connections"), "{error}");
        transaction.commit().unwrap();
        occupier.join().unwrap().unwrap().expect("the lock was free").unlock().unwrap();
    });
}

#[test]
fn a_dsn_to_an_address_that_answers_nothing_fails_within_the_connect_timeout() {
    // Accepts, by its kernel, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    // Doesn't even accept: its queue is full, and the kernel drops what asks for more.
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    full.listen(0).unwrap();
    let full_address = full.local_addr().unwrap();
    let queued: Vec<Socket> = (0..8)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(&full_address).ok();
            socket
        })
        .collect();
    for port in [silent.local_addr().unwrap().port(), full_address.as_socket().unwrap().port()] {
        let start = Instant::now();
        let dsn = format!("host=127.0.0.1 port={port} user=u connect_timeout=1");
        let error = StorageLock::connect("l", &dsn).unwrap_err();
        assert!((ms(900)..ms(2_000)).contains(&start.elapsed()), "{:?}", start.elapsed());
        assert!(matches!(error, Error::Timeout { .. } | Error::Connect { .. }), "{}", chain(&error));
        let start = Instant::now();
        StorageLock::connect("l", &format!("host=127.0.0.1 port={port} user=u")).unwrap_err();
        assert!((ms(4_500)..ms(7_000)).contains(&start.elapsed()), "the default: {:?}", start.elapsed());
    }
    drop(queued);
}

#[test]
fn of_several_hosts_the_first_that_answers_is_used() {
    let table = Table::new();
    let config: postgres::Config = dsn().parse().unwrap();
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port = config.get_ports()[0];
    let several = dsn()
        .replace("host=127.0.0.1", "host=127.0.0.1,127.0.0.1")
        .replace(&format!("port={port}"), &format!("port={dead},{port}"));
    assert_ne!(several, dsn(), "the test needs host and port in the DSN");
    drop(Table::of(&several, &table.name).lock("l").lock("worker").unwrap());
}

#[test]
fn a_url_is_a_dsn_too() {
    let table = Table::new();
    let config: postgres::Config = dsn().parse().unwrap();
    let url = format!(
        "postgresql://{}:{}@127.0.0.1:{}/{}?connect_timeout=3",
        config.get_user().unwrap(),
        String::from_utf8_lossy(config.get_password().unwrap()),
        config.get_ports()[0],
        config.get_dbname().unwrap()
    );
    drop(Table::of(&url, &table.name).lock("l").lock("worker").unwrap());
}

#[test]
fn an_exhausted_server_is_an_error_that_says_so_and_not_for_ever() {
    let table = Table::new();
    let role = format!("it_role_{}", uuid::Uuid::new_v4().simple());
    table.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT 1"));
    table.storage();
    table.execute(&format!("GRANT SELECT, INSERT, UPDATE ON $T TO {role}"));
    let config: postgres::Config = dsn().parse().unwrap();
    let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
    let few = dsn().replace(config.get_user().unwrap(), &role).replace(&password, "few");
    let occupier = postgres::Client::connect(&few, postgres::NoTls).unwrap();
    let error = StorageLock::connect("l", &few).unwrap_err();
    assert!(chain(&error).contains("too many connections"), "{}", chain(&error));
    drop(occupier);
    let lock = crate::support::within(Duration::from_secs(10), "a place", || {
        Some(StorageLock::new(&PostgresStorage::new(Table::of(&few, &table.name).options()).ok()?, "l").unwrap())
    });
    drop(lock.lock("worker").unwrap());
    drop(lock);
    eventually("the role is free", || {
        table.client().batch_execute(&format!("REVOKE ALL ON {} FROM {role}; DROP ROLE {role}", table.name)).is_ok()
    });
}

/// The server ends a session that is silent within a transaction for 5 s; the first hold of a lock is made in one.
#[test]
fn the_first_hold_is_made_anew_when_the_server_ended_its_slow_transaction() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let lock = StorageLock::new(&Table::of(&proxy.dsn, &table.name).storage(), "l").unwrap();
    proxy.hold_back_answer_to(b"pg_try_advisory", ms(5_500));
    let guard = lock.lock("worker").expect("tried again on another connection");
    assert_eq!(guard.version(), 1);
    guard.unlock().unwrap();
}
