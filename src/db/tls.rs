//! TLS as libpq has it: what the options of a DSN that begin with `ssl` mean.
//!
//! With the feature `tls`, OpenSSL verifies certificates and host names, as it does for libpq. This file decides only
//! *whether* they are verified, and by which certificates. Certificates and keys are read for each connection, so they
//! may be replaced while a storage is open. Uses `db::server` and `error`.

use std::path::PathBuf;
use std::sync::Arc;

use postgres::config::SslMode;
use postgres::{Client, Config, NoTls};

use crate::db::server::{Connect, connect_with, is_local};
use crate::error::{Cause, Encryption, wants_encryption};

/// `sslmode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TlsMode {
    Disable,
    /// Without TLS, and with it if the server doesn't let us in.
    Allow,
    /// With TLS, and without it if the server has none, or doesn't let us in.
    #[default]
    Prefer,
    /// With TLS, whoever the server is. If there is a root certificate, the server's certificate is verified by it.
    Require,
    /// The server's certificate is verified.
    VerifyCa,
    /// So is the host's name.
    VerifyFull,
}

/// `sslrootcert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RootCertificates {
    /// Those that this machine trusts.
    System,
    File(PathBuf),
}

/// The options of a DSN that begin with `ssl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsOptions {
    pub(crate) mode: TlsMode,
    pub(crate) root: Option<RootCertificates>,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    /// Whether the server is told the host's name.
    pub(crate) sends_name: bool,
}

impl Default for TlsOptions {
    fn default() -> TlsOptions {
        TlsOptions { mode: TlsMode::default(), root: None, certificate: None, key: None, sends_name: true }
    }
}

/// Makes connections as these options say.
pub(crate) fn connect_as(options: TlsOptions) -> Connect {
    Arc::new(move |config| {
        // As libpq, which has no TLS on the sockets of a machine.
        if is_local(config) {
            return plain(config);
        }
        let connected = connect(&options, config);
        connected.map_err(|cause| match wants_encryption(cause.as_ref()) {
            true if cfg!(feature = "tls") => Encryption { hint: "sslmode=require", source: cause }.into(),
            true => Encryption { hint: "the feature `tls` of this library", source: cause }.into(),
            false => cause,
        })
    })
}

fn plain(config: &Config) -> Result<Client, Cause> {
    connect_with(NoTls)(config.clone().ssl_mode(SslMode::Disable))
}

#[cfg(not(feature = "tls"))]
fn connect(_: &TlsOptions, config: &Config) -> Result<Client, Cause> {
    plain(config)
}

#[cfg(feature = "tls")]
fn connect(options: &TlsOptions, config: &Config) -> Result<Client, Cause> {
    let with = |mode| {
        let connector = openssl::connector(options)?;
        connect_with(connector)(config.clone().ssl_mode(mode))
    };
    match options.mode {
        TlsMode::Disable => plain(config),
        TlsMode::Allow => {
            plain(config).or_else(|cause| if is_of_server(&cause) { with(SslMode::Require) } else { Err(cause) })
        }
        TlsMode::Prefer => with(SslMode::Prefer).or_else(|cause| {
            // A connection that could not be made at all can't be made without TLS either.
            if is_unreachable(&cause) { Err(cause) } else { plain(config).map_err(|_| cause) }
        }),
        TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => with(SslMode::Require),
    }
}

/// Whether the server said this.
#[cfg(feature = "tls")]
fn is_of_server(cause: &Cause) -> bool {
    cause.downcast_ref::<postgres::Error>().is_some_and(|error| error.code().is_some())
}

/// Whether the socket failed.
#[cfg(feature = "tls")]
fn is_unreachable(cause: &Cause) -> bool {
    let error = cause.downcast_ref::<postgres::Error>();
    error.and_then(std::error::Error::source).is_some_and(|source| source.is::<std::io::Error>())
}

#[cfg(feature = "tls")]
mod openssl {
    use std::fs;
    use std::path::{Path, PathBuf};

    use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslVerifyMode};
    use openssl::x509::X509;
    use openssl::x509::store::X509StoreBuilder;
    use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};

    use super::{RootCertificates, TlsMode, TlsOptions};
    use crate::error::Cause;

    pub(super) fn connector(options: &TlsOptions) -> Result<MakeTlsConnector, Cause> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        set_postgresql_alpn(&mut builder)?;
        let root = root_certificates(options)?;
        match &root {
            Some(RootCertificates::File(file)) => builder.set_cert_store(store_of(file)?),
            // The builder has those of this machine.
            Some(RootCertificates::System) => {}
            None => builder.set_verify(SslVerifyMode::NONE),
        }
        if let Some((certificate, key)) = client_certificate(options) {
            builder
                .set_certificate_chain_file(&certificate)
                .map_err(|error| unusable("sslcert", &certificate, error))?;
            check_permissions(&key)?;
            builder.set_private_key_file(&key, SslFiletype::PEM).map_err(|error| unusable("sslkey", &key, error))?;
            builder.check_private_key().map_err(|error| unusable("sslkey", &key, error))?;
        }
        let (is_named, sends_name) = (options.mode == TlsMode::VerifyFull, options.sends_name);
        let mut connector = MakeTlsConnector::new(builder.build());
        connector.set_callback(move |connection, _| {
            connection.set_verify_hostname(is_named);
            connection.set_use_server_name_indication(sends_name);
            Ok(())
        });
        Ok(connector)
    }

    /// By which certificates the server's is verified; none if it is not.
    fn root_certificates(options: &TlsOptions) -> Result<Option<RootCertificates>, Cause> {
        if options.root.is_some() && options.mode >= TlsMode::Require {
            return Ok(options.root.clone());
        }
        let default = in_home("root.crt").filter(|file| file.exists());
        match options.mode {
            TlsMode::Disable | TlsMode::Allow | TlsMode::Prefer => Ok(None),
            TlsMode::Require => Ok(default.map(RootCertificates::File)),
            TlsMode::VerifyCa | TlsMode::VerifyFull => match default {
                Some(file) => Ok(Some(RootCertificates::File(file))),
                None => {
                    Err("there is no root certificate to verify the server's by: name a file in sslrootcert, or set \
                             it to `system` for those that this machine trusts"
                        .into())
                }
            },
        }
    }

    /// The certificate and its key, where libpq looks for them.
    fn client_certificate(options: &TlsOptions) -> Option<(PathBuf, PathBuf)> {
        let certificate = match &options.certificate {
            Some(file) => file.clone(),
            None => in_home("postgresql.crt").filter(|file| file.exists())?,
        };
        let key = options.key.clone().or_else(|| in_home("postgresql.key"))?;
        Some((certificate, key))
    }

    fn in_home(name: &str) -> Option<PathBuf> {
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty())?;
        Some(Path::new(&home).join(".postgresql").join(name))
    }

    fn store_of(file: &Path) -> Result<openssl::x509::store::X509Store, Cause> {
        let pem = fs::read(file).map_err(|error| unusable("sslrootcert", file, error))?;
        let certificates = X509::stack_from_pem(&pem).map_err(|error| unusable("sslrootcert", file, error))?;
        if certificates.is_empty() {
            return Err(unusable("sslrootcert", file, "there is no certificate in it"));
        }
        let mut store = X509StoreBuilder::new()?;
        for certificate in certificates {
            store.add_cert(certificate)?;
        }
        Ok(store.build())
    }

    /// Refuses a key that others can read, by libpq's rule: nobody but its owner; or, of a key that root owns, its
    /// group too.
    #[cfg(unix)]
    fn check_permissions(key: &Path) -> Result<(), Cause> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(key).map_err(|error| unusable("sslkey", key, error))?;
        let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
        if !metadata.is_file() {
            return Err(unusable("sslkey", key, "it is not a file"));
        }
        if metadata.mode() & forbidden != 0 {
            return Err(unusable(
                "sslkey",
                key,
                "others can read it: its permissions have to be 0600 or less (0640 if root owns it)",
            ));
        }
        Ok(())
    }

    #[cfg(not(unix))]
    fn check_permissions(_: &Path) -> Result<(), Cause> {
        Ok(())
    }

    fn unusable(option: &str, file: &Path, why: impl std::fmt::Display) -> Cause {
        format!("cannot use the file {} of {option}: {why}", file.display()).into()
    }
}
