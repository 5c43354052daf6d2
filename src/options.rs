//! What a caller can set, and the check of it. Everything is checked here, before anything touches the network.

use std::fmt;
use std::time::Duration;

use postgres::Config;
use postgres::config::{Host, SslMode};

use crate::error::{Result, invalid};
use crate::events::{Event, Events};
use crate::loss::{LostSignal, OnLost};
use crate::term::retry_time;

/// Lock ids and owner ids, in bytes.
const MAX_ID_BYTES: usize = 255;
/// PostgreSQL cuts a longer identifier off without an error (`NAMEDATALEN` is 64), and two tables would be one.
const MAX_IDENTIFIER_BYTES: usize = 63;
const MAX_CONNECTIONS: u32 = 1_000;

const MIN_LEASE: Duration = Duration::from_secs(1);
const MAX_LEASE: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const MIN_REFRESH_INTERVAL: Duration = Duration::from_millis(10);

const MAX_CONNECT_TIMEOUT: Duration = Duration::from_secs(60 * 60);
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After this long without an acknowledgement the kernel gives a connection up, which ends a call that is stuck in it.
const DEFAULT_TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
const DEFAULT_KEEPALIVES_IDLE: Duration = Duration::from_secs(15);
const DEFAULT_KEEPALIVES_INTERVAL: Duration = Duration::from_secs(5);
const DEFAULT_KEEPALIVES_RETRIES: u32 = 3;
/// What `postgres::Config` has when nobody set it.
const CLIENT_KEEPALIVES_IDLE: Duration = Duration::from_secs(2 * 60 * 60);
/// What is wrong with most URLs that are misread.
const ENCODED: &str = "names of hosts; in a URL, `@` and `/` in a user or password are written %40 and %2F";
/// How much of a text that can't be used is shown.
const SHOWN_CHARS: usize = 300;
/// What is shown of a DSN.
const HIDDEN: &str = "(hidden: it may hold a password)";

/// Where and how locks are kept: the server, the table, the connections.
///
/// Nothing is checked or opened before [`PostgresStorage::new`](crate::PostgresStorage::new).
#[derive(Clone)]
pub struct PostgresStorageOptions {
    /// The parsed DSN, or what would have been a right one.
    config: Result<Config, String>,
    pub(crate) schema: String,
    pub(crate) table_name: String,
    pub(crate) create_table: bool,
    pub(crate) max_connections: u32,
    pub(crate) events: Events,
}

impl PostgresStorageOptions {
    /// The server, as anything that [`postgres::Config`] parses: `host=db user=app password=secret dbname=app` or
    /// `postgresql://app:secret@db/app`, also with several hosts.
    ///
    /// Where the DSN is silent, `connect_timeout` is 5 s an address, `tcp_user_timeout` 15 s, and keep-alives start
    /// after 15 s, so that a connection whose other side has gone is given up. TLS is not supported yet: `sslmode` must
    /// not be `require`.
    pub fn from_dsn(dsn: &str) -> Self {
        PostgresStorageOptions {
            config: match dsn.parse::<Config>() {
                Ok(_) if has_loose_at(dsn) => Err(ENCODED.to_owned()),
                parsed => parsed.map_err(|error| expected_dsn(&error)),
            },
            schema: "public".to_owned(),
            table_name: "storage_lock".to_owned(),
            create_table: true,
            max_connections: 4,
            events: Events::default(),
        }
    }

    /// The schema of the table. Default `public`. It must exist; 1 to 63 bytes, any characters but NUL.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// The table. Default `storage_lock`. 1 to 63 bytes, any characters but NUL.
    #[must_use]
    pub fn table_name(mut self, table_name: impl Into<String>) -> Self {
        self.table_name = table_name.into();
        self
    }

    /// Whether to create the table if it is missing. Default true. With false no DDL is run, and
    /// [`PostgresStorage::table_ddl`](crate::PostgresStorage::table_ddl) is for a migration.
    #[must_use]
    pub fn create_table(mut self, create_table: bool) -> Self {
        self.create_table = create_table;
        self
    }

    /// How many connections there may be, each opened when it is first needed, and closed when its thread had nothing
    /// to do for a minute. Default 4, from 1 to 1,000. With two or more, one is kept free for refreshes and releases.
    /// While threads wait for other processes there is one more, which listens for releases; and one while
    /// [`list`](crate::PostgresStorage::list) reads.
    ///
    /// Where the server lets fewer in, those that there are do the work, and a warning says so. A connection whose
    /// call gets no answer in time no longer counts, and is replaced: up to eight times without any answer in
    /// between, and then once in half a minute, up to 64 times; beyond 64 in all, once in half a minute. If it answers after all, it is used again.
    #[must_use]
    pub fn max_connections(mut self, max_connections: u32) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// What to call when something happens to a lock of this storage: see [`Event`]. Default: nothing, at no cost.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use storage_lock::{Event, PostgresStorageOptions};
    ///
    /// let takeovers = Arc::new(AtomicU64::new(0));
    /// let counter = Arc::clone(&takeovers);
    /// let options = PostgresStorageOptions::from_dsn("host=db user=app").on_event(move |event| match event {
    ///     Event::Acquired { is_takeover: true, .. } => drop(counter.fetch_add(1, Ordering::Relaxed)),
    ///     Event::Lost { lock_id, version, .. } => eprintln!("lost {lock_id} as version {version}"),
    ///     _ => {}
    /// });
    /// ```
    ///
    /// Example `prometheus` turns all of them into metrics.
    ///
    /// It is called on the thread to which it happens, and on several threads simultaneously: a caller's, before its
    /// call returns; one that refreshes a lease; or one that has opened a connection. So it has to be quick: count, or
    /// send the event elsewhere. A slow one delays that thread, and the threads of the process that wait for the same
    /// lock. If it delays a refresh for too long, the hold is lost. No mutex is held, and it may use the storage. It
    /// must not wait for a lock, because its thread may be the one to release that lock. What it does to locks causes
    /// events, too. If it
    /// panics, a warning is logged, and everything goes on. If it keeps a clone of the storage, or a lock or guard of it, the storage
    /// is never closed.
    #[must_use]
    pub fn on_event(mut self, on_event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        self.events = Events::to(on_event);
        self
    }

    /// Checks every option and returns where to connect, defaults filled in.
    pub(crate) fn checked_config(&self) -> Result<Config> {
        check_identifier("schema", &self.schema)?;
        check_identifier("table_name", &self.table_name)?;
        if !(1..=MAX_CONNECTIONS).contains(&self.max_connections) {
            return Err(invalid("max_connections", self.max_connections, format!("1 to {MAX_CONNECTIONS}")));
        }
        let mut config = match &self.config {
            Ok(config) => config.clone(),
            Err(expected) => return Err(invalid("dsn", HIDDEN, expected)),
        };
        let (names, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
        let hosts = names.max(addresses);
        if hosts == 0 {
            return Err(invalid("dsn", "(no host)", "a host: `host=localhost`, or the folder of a Unix socket"));
        }
        if names > 0 && addresses > 0 && names != addresses {
            return Err(invalid(
                "dsn",
                format!("({names} in host, {addresses} in hostaddr)"),
                "as many in hostaddr as in host, or one of the two",
            ));
        }
        if let Some(expected) = misread(&config) {
            return Err(invalid("dsn", HIDDEN, expected));
        }
        let ports = config.get_ports().len();
        if ports > 1 && ports != hosts {
            return Err(invalid(
                "dsn",
                format!("({ports} ports)"),
                format!("one port, or one for each of {hosts} hosts"),
            ));
        }
        if matches!(config.get_ssl_mode(), SslMode::Require) {
            return Err(invalid("dsn", "sslmode=require", "sslmode=prefer or disable: TLS is not supported yet"));
        }
        if let Some(timeout) = config.get_connect_timeout().filter(|timeout| **timeout > MAX_CONNECT_TIMEOUT) {
            return Err(invalid(
                "dsn",
                format!("connect_timeout={}", timeout.as_secs()),
                "a connect_timeout of 1 h at most",
            ));
        }
        if config.get_application_name().is_none() {
            config.application_name("storage_lock");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(DEFAULT_CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(DEFAULT_TCP_USER_TIMEOUT);
        }
        if config.get_keepalives_idle() == CLIENT_KEEPALIVES_IDLE {
            config.keepalives_idle(DEFAULT_KEEPALIVES_IDLE);
        }
        if config.get_keepalives_interval().is_none() {
            config.keepalives_interval(DEFAULT_KEEPALIVES_INTERVAL);
        }
        if config.get_keepalives_retries().is_none() {
            config.keepalives_retries(DEFAULT_KEEPALIVES_RETRIES);
        }
        Ok(config)
    }
}

impl fmt::Debug for PostgresStorageOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `postgres::Config` hides its password, but not one that a slip in the DSN put into another place.
        f.debug_struct("PostgresStorageOptions")
            .field("dsn", &format_args!("{HIDDEN}"))
            .field("schema", &self.schema)
            .field("table_name", &self.table_name)
            .field("create_table", &self.create_table)
            .field("max_connections", &self.max_connections)
            .field("on_event", &self.events)
            .finish()
    }
}

/// What is wrong with a DSN that could be read, but hardly as it was meant; or that no server could be sent.
///
/// A password that lands in another value would be shown by the server's errors, and be in its log.
fn misread(config: &Config) -> Option<&'static str> {
    let texts = [config.get_user(), config.get_dbname(), config.get_options(), config.get_application_name()];
    let mut texts = texts.into_iter().flatten();
    if texts.clone().any(|text| text.contains('\0')) || config.get_password().is_some_and(|it| it.contains(&0)) {
        return Some("values without NUL");
    }
    if texts.any(|text| text.to_ascii_lowercase().contains("password=")) {
        return Some(
            "no `password=` inside another value: options are separated by spaces, those of a URL by ? and then &",
        );
    }
    let has_addresses = !config.get_hostaddrs().is_empty();
    let is_host = |host: &Host| match host {
        Host::Tcp(name) if name.is_empty() => has_addresses,
        // `%` is for the zone of an IPv6 address.
        Host::Tcp(name) => name.chars().all(|c| c.is_alphanumeric() || "-._:%".contains(c)),
        #[cfg(unix)]
        Host::Unix(folder) => !folder.as_os_str().as_encoded_bytes().contains(&0),
    };
    let are_hosts = config.get_hosts().iter().all(is_host);
    (!are_hosts).then_some(ENCODED)
}

/// Whether a URL has more than the one `@` that ends the password. The parser ends it at the first: what follows would be
/// taken for the host, and for the database, which the server's errors and logs show.
fn has_loose_at(dsn: &str) -> bool {
    let url = ["postgresql://", "postgres://"].iter().find_map(|scheme| dsn.strip_prefix(scheme));
    let before_options = url.and_then(|url| url.split('?').next()).unwrap_or_default();
    before_options.matches('@').count() > 1
}

/// What would have been a right DSN. The parser's words are passed on only where they can't hold a part of the DSN: of
/// `postgresql://u:a?secret=b@host` it says "unknown option `secret`".
fn expected_dsn(error: &postgres::Error) -> String {
    const FORMS: &str = "`host=db user=app password='it''s'` or `postgresql://app:it%27s@db/app` with options that \
                         postgres::Config knows";
    const CHECKED_OPTIONS: [&str; 14] = [
        "sslmode",
        "sslnegotiation",
        "host",
        "hostaddr",
        "port",
        "connect_timeout",
        "tcp_user_timeout",
        "keepalives",
        "keepalives_idle",
        "keepalives_interval",
        "keepalives_retries",
        "target_session_attrs",
        "channel_binding",
        "load_balance_hosts",
    ];
    let said = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let known = CHECKED_OPTIONS.iter().map(|option| format!("invalid value for option `{option}`"));
    match known.into_iter().find(|known| *known == said) {
        Some(known) => format!("{FORMS} ({known})"),
        None => FORMS.to_owned(),
    }
}

/// One lock's settings.
///
/// Nothing is checked before [`StorageLock::with_options`](crate::StorageLock::with_options).
#[derive(Clone, Debug)]
pub struct LockOptions {
    pub(crate) lock_id: String,
    pub(crate) lease_expire_after: Duration,
    lease_refresh_interval: Option<Duration>,
    pub(crate) version_miss_retry_times: u32,
    pub(crate) on_lost: OnLost,
}

impl LockOptions {
    /// The lock of this name, with the defaults. A lock id is 1 to 255 bytes of text without NUL.
    pub fn new(lock_id: impl Into<String>) -> Self {
        LockOptions {
            lock_id: lock_id.into(),
            lease_expire_after: Duration::from_secs(30),
            lease_refresh_interval: None,
            version_miss_retry_times: 3,
            on_lost: OnLost::default(),
        }
    }

    /// How long a hold lasts unless it is refreshed: what others wait at most for a holder that died. Default 30 s, from
    /// 1 s to 365 days.
    #[must_use]
    pub fn lease_expire_after(mut self, lease_expire_after: Duration) -> Self {
        self.lease_expire_after = lease_expire_after;
        self
    }

    /// How often the lease is refreshed while the lock is held. Default 5 s, or a third of the lease if that is less. At
    /// least 10 ms, and it must leave a third of the lease, and 300 ms, for repeating a refresh that failed.
    #[must_use]
    pub fn lease_refresh_interval(mut self, lease_refresh_interval: Duration) -> Self {
        self.lease_refresh_interval = Some(lease_refresh_interval);
        self
    }

    /// How often an acquire is repeated at once when the lock changed hands, or the database asked for a repetition
    /// (SQLSTATE 40001, 40P01), while it ran. After that the lock counts as busy. Default 3.
    #[must_use]
    pub fn version_miss_retry_times(mut self, version_miss_retry_times: u32) -> Self {
        self.version_miss_retry_times = version_miss_retry_times;
        self
    }

    /// What to call when a hold of this lock is lost: once, on a thread of the library's, as soon as the database says so, and else just
    /// before the hold's deadline, so before anybody else can own the lock, also while the server is frozen or the network swallows packets.
    /// From then on [`is_held`](crate::LockGuard::is_held) is false. Default: nothing.
    ///
    /// The call comes late while the process is stopped, or while [`on_event`](PostgresStorageOptions::on_event) or a
    /// logger blocks the thread. The library logs the loss, and sends its event, after the callback has returned. A
    /// callback that ends the process has to log by itself.
    ///
    /// Not called for a hold whose guards had gone before it was found to be lost: `unlock` said so, or drop logged it. An inner guard of a lock
    /// that was taken more than once shares the hold, and what the first one set. If it panics, a warning is logged, and nothing else
    /// happens.
    #[must_use]
    pub fn on_lost(mut self, on_lost: impl Fn(&LostSignal) + Send + Sync + 'static) -> Self {
        self.on_lost = OnLost::calling(on_lost);
        self
    }

    pub(crate) fn refresh_interval(&self) -> Duration {
        self.lease_refresh_interval.unwrap_or_else(|| Duration::from_secs(5).min(self.lease_expire_after / 3))
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_id("lock_id", &self.lock_id)?;
        let lease = self.lease_expire_after;
        if !(MIN_LEASE..=MAX_LEASE).contains(&lease) {
            return Err(invalid("lease_expire_after", format!("{lease:?}"), "1 s to 365 days"));
        }
        let longest = lease - retry_time(lease);
        if !(MIN_REFRESH_INTERVAL..=longest).contains(&self.refresh_interval()) {
            return Err(invalid(
                "lease_refresh_interval",
                format!("{:?}", self.refresh_interval()),
                format!(
                    "{MIN_REFRESH_INTERVAL:?} to {longest:?}, which leaves {:?} of the lease of {lease:?} for \
                     repeating a refresh that failed",
                    retry_time(lease)
                ),
            ));
        }
        Ok(())
    }
}

/// Checks a lock id or an owner id.
pub(crate) fn check_id(option: &'static str, id: &str) -> Result<()> {
    check_text(option, id, MAX_ID_BYTES)
}

fn check_identifier(option: &'static str, identifier: &str) -> Result<()> {
    check_text(option, identifier, MAX_IDENTIFIER_BYTES)
}

fn check_text(option: &'static str, text: &str, max_bytes: usize) -> Result<()> {
    if text.is_empty() || text.len() > max_bytes || text.contains('\0') {
        let expected = format!("1 to {max_bytes} bytes of text without NUL, not {} bytes", text.len());
        let shown: String = text.chars().take(SHOWN_CHARS).collect();
        let rest = if shown.len() < text.len() { "…" } else { "" };
        return Err(invalid(option, format!("{shown:?}{rest}"), expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::sync::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;
    use crate::term::{Term, safety_margin};

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
            // As it is read, the password ends at the first `@`, or is part of another value.
            "postgresql://u:pa@s3cret@h/db",
            "postgresql://u:p@h s3cret/db",
            "host=h;user=u;password=s3cret",
            "user=u;password=s3cret host=h",
            "postgresql://u@h/db&Password=s3cret",
            // The protocol ends a value at NUL.
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
        /// A setting that is accepted leaves time for three attempts: it is asked for in time, and may get stuck twice.
        #[test]
        fn accepted_times_let_a_refresh_fail_twice(lease in any_duration(), refresh in proptest::option::of(any_duration())) {
            let mut options = LockOptions::new("l").lease_expire_after(lease);
            options.lease_refresh_interval = refresh;
            if options.check().is_err() {
                let longest = lease.saturating_sub(retry_time(lease));
                let fits = refresh.is_none_or(|refresh| (MIN_REFRESH_INTERVAL..=longest).contains(&refresh));
                prop_assert!(!(MIN_LEASE..=MAX_LEASE).contains(&lease) || !fits, "refused");
                return Ok(());
            }
            let (start, interval) = (Instant::now(), options.refresh_interval());
            let term = Term::new(start, lease, lease);
            prop_assert_eq!(term.next_refresh(interval), start + interval, "later than it could be repeated");
            prop_assert!(interval + retry_time(lease) <= lease && safety_margin(lease) < retry_time(lease));
            let mut now = start + interval;
            for attempt in 1..=3 {
                prop_assert!(term.is_held(now), "no time for attempt {}", attempt);
                now += term.attempt_time(now);
            }
        }
    }
}
