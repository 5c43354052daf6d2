//! What is accepted, what is refused, and what the errors show.

use std::time::Duration;

use proptest::prelude::*;

use super::dsn::{DEFAULT_CONNECT_TIMEOUT, DEFAULT_KEEPALIVES_IDLE, DEFAULT_TCP_USER_TIMEOUT};
use super::lock::{MAX_LEASE, MIN_LEASE, MIN_REFRESH_INTERVAL};
use super::*;
use crate::error::Error;
use crate::hold::lease::{Lease, retry_time, safety_margin};
use crate::sync::Instant;

fn refused(result: Result<()>) -> (&'static str, String, String) {
    match result {
        Err(Error::InvalidOption { option, value, expected }) => (option, value, expected),
        other => panic!("not refused: {other:?}"),
    }
}

fn lock(lease: Duration, refresh: Duration) -> Result<()> {
    LockOptions::new("l").lease_expire_after(lease).lease_refresh_interval(refresh).check()
}

fn storage(options: PostgresStorageOptions) -> Result<()> {
    options.checked_config().map(|_| ())
}

#[test]
fn ids_have_1_to_255_bytes_without_nul() {
    for id in ["a", "'; DROP TABLE x; --", "a\\b%c\nd", "🔒", &"x".repeat(255)] {
        LockOptions::new(id).check().expect(id);
    }
    for id in ["", "a\0b", &"x".repeat(256), &"🔒".repeat(64)] {
        let (option, value, expected) = refused(LockOptions::new(id).check());
        assert_eq!((option, value), ("lock_id", format!("{id:?}")));
        assert!(expected.starts_with("1 to 255 bytes"), "{expected}");
    }
}

#[test]
fn a_lease_has_at_least_a_second() {
    assert_eq!(
        refused(LockOptions::new("l").lease_expire_after(Duration::from_millis(999)).check()).0,
        "lease_expire_after"
    );
    assert_eq!(refused(LockOptions::new("l").lease_expire_after(Duration::MAX).check()).0, "lease_expire_after");
    assert_eq!(refused(LockOptions::new("l").lease_expire_after(Duration::ZERO).check()).0, "lease_expire_after");
    LockOptions::new("l").lease_expire_after(Duration::from_secs(1)).check().expect("1 s is enough");
}

#[test]
fn a_refresh_interval_leaves_time_to_repeat_it() {
    let (s, ms) = (Duration::from_secs, Duration::from_millis);
    for (lease, refresh) in [(s(30), s(20)), (s(30), s(5)), (s(1), ms(666)), (s(3), s(2)), (s(1), ms(10))] {
        lock(lease, refresh).unwrap_or_else(|error| panic!("{lease:?} {refresh:?}: {error}"));
    }
    for (lease, refresh) in
        [(s(30), s(30)), (s(30), ms(20_001)), (s(1), ms(701)), (s(30), s(0)), (s(30), Duration::MAX)]
    {
        let (option, value, expected) = refused(lock(lease, refresh));
        assert_eq!((option, value), ("lease_refresh_interval", format!("{refresh:?}")));
        assert!(expected.contains("10ms to "), "{expected}");
    }
}

#[test]
fn the_default_refresh_interval_fits_a_short_lease() {
    assert_eq!(LockOptions::new("l").refresh_interval(), Duration::from_secs(5));
    let short = LockOptions::new("l").lease_expire_after(Duration::from_secs(3));
    assert_eq!(short.refresh_interval(), Duration::from_secs(1));
    short.check().expect("the default fits");
}

#[test]
fn identifiers_have_1_to_63_bytes() {
    let options = || PostgresStorageOptions::from_dsn("host=h");
    storage(options().schema("My \"Schema\"").table_name("weird; name")).expect("quotes are fine");
    assert_eq!(refused(storage(options().schema(""))).0, "schema");
    assert_eq!(refused(storage(options().table_name("x".repeat(64)))).0, "table_name");
    assert_eq!(refused(storage(options().table_name("a\0"))).0, "table_name");
    assert_eq!(refused(storage(options().max_connections(0))).0, "max_connections");
}

#[test]
fn an_unusable_dsn_is_refused_without_showing_its_password() {
    for dsn in [
        "",
        "nonsense",
        "host=h password=hidden secret",
        "host=h password=s3cret s3cret=1",
        "postgresql://u:s3cret@host/db?s3cret=1",
        "postgresql://u:s3cret@h:port/db",
        "host=h port=s3cret",
        "host=h password=s3cret sslmode=require",
        "host=a,b port=1,2,3 password=s3cret",
        "user=u password=s3cret",
        "host=h password=s3cret connect_timeout=9223372036854775807",
        "host=a,b hostaddr=127.0.0.1 password=s3cret",
        // The parser ends the password at the first `@`, or takes it for a part of another value.
        "postgresql://u:pa@s3cret@h/db",
        "postgresql://u:p@h s3cret/db",
        "host=h;user=u;password=s3cret",
        "user=u;password=s3cret host=h",
        "postgresql://u@h/db&Password=s3cret",
        // In the protocol a NUL ends a value.
        "host=h user=u\0 password=s3cret",
        "host=h password=s3cret\0",
        "postgresql://u%00:s3cret@h",
        "postgresql://u:s3cret@%2Frun%00",
        "postgresql://u:s3cret@h\0",
        "host='' password=s3cret",
        "host=a,,b password=s3cret",
    ] {
        let options = PostgresStorageOptions::from_dsn(dsn);
        let (debug, error) = (format!("{options:?}"), options.checked_config().expect_err(dsn));
        assert!(matches!(error, Error::InvalidOption { option: "dsn", .. }), "{dsn}: {error:?}");
        for shown in [debug, format!("{error}"), format!("{error:?}")] {
            assert!(!shown.contains("s3cret"), "{dsn} shows {shown}");
        }
    }
    let text = PostgresStorageOptions::from_dsn("host=h port=x").checked_config().expect_err("port").to_string();
    assert!(text.contains("`port`"), "{text}");
}

#[test]
fn a_dsn_gets_timeouts_only_where_it_has_none() {
    let config = PostgresStorageOptions::from_dsn("host=h").checked_config().expect("valid");
    assert_eq!(config.get_connect_timeout(), Some(&DEFAULT_CONNECT_TIMEOUT));
    assert_eq!(config.get_tcp_user_timeout(), Some(&DEFAULT_TCP_USER_TIMEOUT));
    assert_eq!(config.get_keepalives_idle(), DEFAULT_KEEPALIVES_IDLE);
    let dsn = "postgresql://u@a,b/d?connect_timeout=7&tcp_user_timeout=8&keepalives_idle=9";
    let config = PostgresStorageOptions::from_dsn(dsn).checked_config().expect("valid");
    assert_eq!(config.get_hosts().len(), 2);
    assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(7)));
    assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(8)));
    assert_eq!(config.get_keepalives_idle(), Duration::from_secs(9));
}

fn any_duration() -> impl Strategy<Value = Duration> {
    let any = (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos));
    let usual = (0..100_000_000_u64).prop_map(Duration::from_micros);
    prop_oneof![1 => Just(Duration::ZERO), 1 => Just(Duration::MAX), 1 => any, 6 => usual]
}

proptest! {
    /// Accepted times leave room for three attempts of a refresh: the first begins in time, and two may get stuck.
    #[test]
    fn accepted_times_let_a_refresh_fail_twice(
        lease in any_duration(),
        refresh in proptest::option::of(any_duration()),
    ) {
        let mut options = LockOptions::new("l").lease_expire_after(lease);
        options.lease_refresh_interval = refresh;
        if options.check().is_err() {
            let longest = lease.saturating_sub(retry_time(lease));
            let fits = refresh.is_none_or(|refresh| (MIN_REFRESH_INTERVAL..=longest).contains(&refresh));
            prop_assert!(!(MIN_LEASE..=MAX_LEASE).contains(&lease) || !fits, "refused");
            return Ok(());
        }
        let (start, interval) = (Instant::now(), options.refresh_interval());
        let held = Lease::new(start, lease, lease);
        prop_assert_eq!(held.next_refresh(interval), start + interval, "later than it could be repeated");
        prop_assert!(interval + retry_time(lease) <= lease && safety_margin(lease) < retry_time(lease));
        let mut now = start + interval;
        for attempt in 1..=3 {
            prop_assert!(held.is_held(now), "no time for attempt {}", attempt);
            now += held.attempt_time(now);
        }
    }
}
