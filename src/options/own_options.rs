//! The options of a DSN that the driver doesn't know: those of TLS, and those that are refused by name. Uses `db::tls`.

use std::path::PathBuf;

use super::dsn::READ_WRITE;
use crate::db::tls::{RootCertificates, TlsMode, TlsOptions};

/// The options of TLS that this library reads itself.
const TLS: [&str; 5] = ["sslmode", "sslrootcert", "sslcert", "sslkey", "sslsni"];

/// What an option needs that this library was built without.
pub(super) const NO_TLS: &str = "no TLS: this library was built without its feature `tls` (cargo add storage-lock \
                                 --features tls); or a connector of your own: `PostgresStorageOptions::from_config`";

/// Options of libpq and of JDBC that neither the driver nor this library knows, and what to do instead.
const REFUSED: [(&str, &str); 27] = [
    ("service", "write the service's options into the DSN"),
    ("servicefile", "write the service's options into the DSN"),
    ("passfile", "put the password into the DSN, or use `from_config_with`"),
    ("gssencmode", "GSSAPI is not supported"),
    ("krbsrvname", "GSSAPI is not supported"),
    ("gsslib", "GSSAPI is not supported"),
    ("gssdelegation", "GSSAPI is not supported"),
    ("client_encoding", "the encoding is always UTF8"),
    ("schema", "set `PostgresStorageOptions::schema`"),
    ("currentSchema", "set `PostgresStorageOptions::schema`"),
    ("search_path", "set `PostgresStorageOptions::schema`"),
    ("ssl", "use sslmode=require or sslmode=verify-full"),
    ("requiressl", "use sslmode=require"),
    ("sslcrl", "revocation lists are not supported; a connector of your own can have them: `from_config`"),
    ("sslcrldir", "revocation lists are not supported; a connector of your own can have them: `from_config`"),
    ("sslpassword", "use a key without a password, or a connector of your own: `from_config`"),
    ("sslcertmode", "leave sslcert out where no certificate is to be sent"),
    ("sslcompression", "TLS is not compressed"),
    ("sslkeylogfile", "use a connector of your own: `from_config`"),
    ("ssl_min_protocol_version", "use a connector of your own: `from_config`"),
    ("ssl_max_protocol_version", "use a connector of your own: `from_config`"),
    ("min_protocol_version", "the driver's protocol is 3.0"),
    ("max_protocol_version", "the driver's protocol is 3.0"),
    ("requirepeer", "it is not supported"),
    ("require_auth", "use channel_binding=require"),
    ("fallback_application_name", "use application_name"),
    ("replication", "a lock needs an ordinary connection"),
];

/// A DSN in two parts.
pub(super) struct Split {
    /// The options that the driver doesn't get, with their values.
    pub(super) own: Vec<(String, String)>,
    /// The DSN without them.
    pub(super) rest: String,
}

pub(super) fn is_url(dsn: &str) -> bool {
    dsn.starts_with("postgresql://") || dsn.starts_with("postgres://")
}

/// Splits a DSN as the driver does; none where they might read different things.
pub(super) fn split(dsn: &str) -> Option<Split> {
    let split = if is_url(dsn) { split_url(dsn) } else { split_words(dsn) }?;
    Some(if split.own.is_empty() { Split { own: split.own, rest: dsn.to_owned() } } else { split })
}

/// What to do instead of using an option, if it is refused. Only known names are shown: any other one may be a part of
/// a password.
pub(super) fn instead_of(name: &str) -> Option<String> {
    if name == "target_session_attrs" {
        return Some(READ_WRITE.to_owned());
    }
    REFUSED.iter().find(|(refused, _)| *refused == name).map(|(refused, instead)| format!("no `{refused}`: {instead}"))
}

/// Whether an option of this name may be one that the driver doesn't get.
fn is_known(name: &str) -> bool {
    TLS.contains(&name) || instead_of(name).is_some()
}

fn is_own(name: &str, value: &str) -> bool {
    let is_known = name == "target_session_attrs" && ["any", "read-write", "read-only"].contains(&value);
    TLS.contains(&name) || !is_known && instead_of(name).is_some()
}

/// `name=value` pairs, as libpq has them.
fn split_words(dsn: &str) -> Option<Split> {
    let (mut own, mut rest) = (Vec::new(), String::new());
    let mut left = dsn.trim_start();
    while !left.is_empty() {
        let end = left.find(|c: char| c.is_whitespace() || c == '=')?;
        let (name, after) = left.split_at(end);
        if name.is_empty() {
            return None;
        }
        let after = after.trim_start().strip_prefix('=')?.trim_start();
        let (value, after) = word(after)?;
        if is_own(name, &value) {
            own.push((name.to_owned(), value));
        } else {
            rest += &format!("{name}='{}' ", value.replace('\\', "\\\\").replace('\'', "\\'"));
        }
        left = after.trim_start();
    }
    Some(Split { own, rest })
}

/// The first value of a text, which may be quoted, and what follows it.
fn word(text: &str) -> Option<(String, &str)> {
    let (quoted, text) = text.strip_prefix('\'').map_or((false, text), |text| (true, text));
    let (mut value, mut chars) = (String::new(), text.char_indices());
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            '\'' if quoted => return Some((value, text.get(at + 1..)?)),
            c if !quoted && c.is_whitespace() => return Some((value, text.get(at..)?)),
            c => value.push(c),
        }
    }
    (!quoted && !value.is_empty()).then_some((value, ""))
}

/// The options after the `?` of a URL.
fn split_url(dsn: &str) -> Option<Split> {
    let (base, options) = dsn.split_once('?').unwrap_or((dsn, ""));
    let (mut own, mut rest) = (Vec::new(), Vec::new());
    // One `&` may end them.
    for option in options.strip_suffix('&').unwrap_or(options).split('&').filter(|_| !options.is_empty()) {
        let (name, value) = option.split_once('=')?;
        let name = decoded(name)?;
        // Other values may be any bytes, such as those of a folder.
        let is_own = is_known(&name) && is_own(&name, &decoded(value)?);
        if is_own { own.push((name, decoded(value)?)) } else { rest.push(option) }
    }
    let separator = if rest.is_empty() { "" } else { "?" };
    Some(Split { own, rest: format!("{base}{separator}{}", rest.join("&")) })
}

/// A text without its percent-encoding.
fn decoded(text: &str) -> Option<String> {
    let (mut bytes, mut left) = (Vec::new(), text.as_bytes());
    while let [first, after @ ..] = left {
        let digits = after.get(..2).filter(|hex| *first == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
        let hex = digits.and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                left = after.get(2..)?;
            }
            None => {
                bytes.push(*first);
                left = after;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// What the options of TLS say; or what they should have said.
pub(super) fn tls_options(own: &[(String, String)]) -> Result<TlsOptions, String> {
    let mut tls = TlsOptions::default();
    for (name, value) in own {
        if value.to_ascii_lowercase().contains("password=") || value.contains(['\n', '\0']) {
            return Err(format!("a file in {name}: its value has another option in it, or is no path"));
        }
        match (name.as_str(), value.as_str()) {
            // As libpq: not set.
            ("sslrootcert" | "sslcert" | "sslkey", "") => {}
            ("sslmode", mode) => tls.mode = mode_of(mode)?,
            ("sslrootcert", "system") => tls.root = Some(RootCertificates::System),
            ("sslrootcert", file) => tls.root = Some(RootCertificates::File(PathBuf::from(file))),
            ("sslcert", file) => tls.certificate = Some(PathBuf::from(file)),
            ("sslkey", file) => tls.key = Some(PathBuf::from(file)),
            ("sslsni", "0") => tls.sends_name = false,
            ("sslsni", "1") => tls.sends_name = true,
            ("sslsni", _) => return Err("sslsni=1, or sslsni=0".to_owned()),
            _ => {}
        }
    }
    if tls.root == Some(RootCertificates::System) && tls.mode != TlsMode::VerifyFull {
        // Anybody can have a certificate of those that sign for everybody: it says something with its name only.
        return Err("sslmode=verify-full where sslrootcert is `system`".to_owned());
    }
    let is_needed =
        tls.mode >= TlsMode::Require || tls.root.is_some() || tls.certificate.is_some() || tls.key.is_some();
    if is_needed && !cfg!(feature = "tls") {
        return Err(
            "no TLS: this library was built without its feature `tls` (cargo add storage-lock --features tls); \
                    or a connector of your own: `PostgresStorageOptions::from_config`"
                .to_owned(),
        );
    }
    Ok(tls)
}

fn mode_of(value: &str) -> Result<TlsMode, String> {
    Ok(match value {
        "disable" => TlsMode::Disable,
        "allow" => TlsMode::Allow,
        "prefer" => TlsMode::Prefer,
        "require" => TlsMode::Require,
        "verify-ca" => TlsMode::VerifyCa,
        "verify-full" => TlsMode::VerifyFull,
        _ => return Err("sslmode=disable, allow, prefer, require, verify-ca or verify-full".to_owned()),
    })
}
