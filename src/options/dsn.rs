//! The check of a DSN, and the defaults for what it leaves out.
//!
//! Invariant: a DSN may hold a password, so no error shows a part of it that could be the password. Imports: `error`
//! alone.

use std::time::Duration;

use postgres::Config;
use postgres::config::{ChannelBinding, Host, SslMode, SslNegotiation, TargetSessionAttrs};

use super::own_options::{NO_TLS, Split, instead_of, is_url, split, tls_options};
use crate::db::tls::{TlsMode, TlsOptions};
use crate::error::{Result, invalid};

const MAX_CONNECT_TIMEOUT: Duration = Duration::from_secs(60 * 60);
pub(super) const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// After this long without an acknowledgement the kernel closes a connection, which ends a call that is stuck in it.
pub(super) const DEFAULT_TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const DEFAULT_KEEPALIVES_IDLE: Duration = Duration::from_secs(15);
const DEFAULT_KEEPALIVES_INTERVAL: Duration = Duration::from_secs(5);
const DEFAULT_KEEPALIVES_RETRIES: u32 = 3;
/// The value that `postgres::Config` has if the DSN doesn't set one.
const CLIENT_KEEPALIVES_IDLE: Duration = Duration::from_secs(2 * 60 * 60);
/// The usual mistake in a URL that is misread.
const ENCODED: &str = "names of hosts; in a URL, `@` and `/` in a user or password are written %40 and %2F";
/// Every storage needs a server that it can write to.
pub(super) const READ_WRITE: &str = "target_session_attrs=read-write, or none: a lock needs the server that can be \
                                     written to, and of several hosts that one is found in any case";
/// The usual mistake in a list of options.
const NAMELESS: &str = "options that each have a name and a value";
/// Shown in the place of a DSN.
pub(super) const HIDDEN: &str = "(hidden: it may hold a password)";

/// A DSN that could be parsed.
#[derive(Clone)]
pub(super) struct Dsn {
    pub(super) config: Config,
    pub(super) tls: TlsOptions,
}

/// Parses a DSN. The error says what a valid one looks like.
pub(super) fn parse(dsn: &str) -> Result<Dsn, String> {
    if dsn.starts_with("jdbc:") {
        return Err("a URL without `jdbc:`, which names user and password: `postgresql://app:secret@db/app`".to_owned());
    }
    if is_url(dsn) && dsn.trim_end() != dsn {
        return Err("a URL without a line break or blanks at its end".to_owned());
    }
    if has_loose_at(dsn) {
        return Err(ENCODED.to_owned());
    }
    let Some(Split { own, rest }) = split(dsn) else {
        // The driver's words, if it has any.
        return Err(dsn.parse::<Config>().err().map_or_else(|| NAMELESS.to_owned(), |error| expected_dsn(&error)));
    };
    if let Some(expected) = own.iter().find_map(|(name, _)| instead_of(name)) {
        return Err(expected);
    }
    let tls = tls_options(&own)?;
    let config = rest.parse::<Config>().map_err(|error| expected_dsn(&error))?;
    if config.get_ssl_mode() != SslMode::Prefer {
        // Everything that speaks of TLS has been taken out of it.
        return Err(NAMELESS.to_owned());
    }
    if config.get_ssl_negotiation() == SslNegotiation::Direct && tls.mode < TlsMode::Require {
        return Err("sslmode=require, verify-ca or verify-full where sslnegotiation is direct".to_owned());
    }
    let needs_tls = config.get_channel_binding() == ChannelBinding::Require
        || config.get_ssl_negotiation() == SslNegotiation::Direct;
    if needs_tls && !cfg!(feature = "tls") {
        return Err(NO_TLS.to_owned());
    }
    Ok(Dsn { config, tls })
}

/// Checks a configuration, and fills the defaults in.
pub(super) fn checked(option: &'static str, mut config: Config) -> Result<Config> {
    check(option, &config)?;
    fill_in_defaults(&mut config);
    Ok(config)
}

fn check(option: &'static str, config: &Config) -> Result<()> {
    let (names, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    let hosts = names.max(addresses);
    if hosts == 0 {
        return Err(invalid(option, "(no host)", "a host: `host=localhost`, or the folder of a Unix socket"));
    }
    if names > 0 && addresses > 0 && names != addresses {
        return Err(invalid(
            option,
            format!("({names} in host, {addresses} in hostaddr)"),
            "as many in hostaddr as in host, or one of the two",
        ));
    }
    if let Some(expected) = misread(config) {
        return Err(invalid(option, HIDDEN, expected));
    }
    let ports = config.get_ports().len();
    if ports > 1 && ports != hosts {
        return Err(invalid(option, format!("({ports} ports)"), format!("one port, or one for each of {hosts} hosts")));
    }
    if config.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
        return Err(invalid(option, "target_session_attrs=read-only", READ_WRITE));
    }
    if let Some(timeout) = config.get_connect_timeout().filter(|timeout| **timeout > MAX_CONNECT_TIMEOUT) {
        return Err(invalid(
            option,
            format!("connect_timeout={}", timeout.as_secs()),
            "a connect_timeout of 1 h at most",
        ));
    }
    Ok(())
}

fn fill_in_defaults(config: &mut Config) {
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
}

/// What is wrong with a DSN that can be parsed, but was probably meant differently, or can't be sent to a server.
///
/// The server would show a password that landed in another value: in its errors and in its log.
fn misread(config: &Config) -> Option<&'static str> {
    let texts = [config.get_user(), config.get_dbname(), config.get_options(), config.get_application_name()];
    let mut texts = texts.into_iter().flatten();
    if texts.clone().any(|text| text.contains('\0')) || config.get_password().is_some_and(|p| p.contains(&0)) {
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
        Host::Unix(folder) => {
            let folder = folder.to_string_lossy();
            !folder.contains('\0') && !folder.to_ascii_lowercase().contains("password=")
        }
    };
    let are_hosts = config.get_hosts().iter().all(is_host);
    (!are_hosts).then_some(ENCODED)
}

/// Whether a URL has another `@` before its options than the one that ends the password, or only one among them.
///
/// The parser ends the password at the first `@`, wherever that is. It would take what follows for the host and the
/// database, or what comes before for the user, which the server's errors and logs show.
fn has_loose_at(dsn: &str) -> bool {
    if !is_url(dsn) {
        return false;
    }
    let (before_options, options) = dsn.split_once('?').unwrap_or((dsn, ""));
    match before_options.matches('@').count() {
        0 => options.contains('@'),
        count => count > 1,
    }
}

/// What a valid DSN looks like.
///
/// The parser's own text is added only where it can't hold a part of the DSN. For `postgresql://u:a?secret=b@host` the
/// parser says "unknown option `secret`", which would show a part of the password.
fn expected_dsn(error: &postgres::Error) -> String {
    const FORMS: &str = "`host=db user=app password='it\\'s'` or `postgresql://app:it%27s@db/app` with options that \
                         this library knows";
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
