//! TLS as libpq has it: what the options of a DSN that begin with `ssl` mean.
//!
//! With the feature `tls`, OpenSSL verifies certificates and host names, as it does for libpq. This file decides only
//! *whether* they are verified, and by which certificates. Certificates and keys are read for each connection, so they
//! may be replaced while a storage is open. Uses `db::server` and `error`.
//!
//! Why OpenSSL, by `postgres-openssl`:
//! - libpq's modes are OpenSSL's switches: verify or not, the name or not, these certificates or those. With rustls,
//!   `require` and `verify-ca` would take verifiers of our own, which is where such libraries go wrong.
//! - Names are matched by the code that libpq uses.
//! - The driver's own authors keep it, with channel binding.
//! - It costs a package with headers, or, with `tls-vendored`, a C compiler and Perl. `native-tls` needs the same on
//!   Linux, and has less of libpq's options.

use std::path::PathBuf;
use std::sync::Arc;

#[cfg(feature = "tls")]
use postgres::config::Host;
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
    if options.mode == TlsMode::Disable {
        return plain(config);
    }
    if options.mode == TlsMode::VerifyFull {
        check_name(config)?;
    }
    // What is wrong with our own files is no reason to go on without TLS.
    let connector = openssl::connector(options)?;
    let with = |mode| connect_with(connector.clone())(config.clone().ssl_mode(mode));
    match options.mode {
        TlsMode::Disable | TlsMode::Allow => {
            plain(config).or_else(|cause| if is_of_server(&cause) { with(SslMode::Require) } else { Err(cause) })
        }
        TlsMode::Prefer => with(SslMode::Prefer).or_else(|cause| {
            // A connection that could not be made at all can't be made without TLS either.
            if is_unreachable(&cause) { Err(cause) } else { plain(config).map_err(|_| cause) }
        }),
        TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => with(SslMode::Require),
    }
}

/// Refuses what OpenSSL takes for any name, or for any name that ends so.
#[cfg(feature = "tls")]
fn check_name(config: &Config) -> Result<(), Cause> {
    let is_name = |host: &Host| matches!(host, Host::Tcp(name) if !name.is_empty() && !name.starts_with('.'));
    let are_names = !config.get_hosts().is_empty() && config.get_hosts().iter().all(is_name);
    if are_names { Ok(()) } else { Err("sslmode=verify-full needs the host's name or address".into()) }
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
    use std::fs::{self, File};
    use std::io::Read;
    use std::path::{Path, PathBuf};

    use openssl::pkey::{PKey, Private};
    use openssl::ssl::{SslConnector, SslMethod, SslVerifyMode, SslVersion};
    use openssl::x509::X509;
    use openssl::x509::store::{X509Store, X509StoreBuilder};
    use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};

    use super::{RootCertificates, TlsMode, TlsOptions};
    use crate::error::Cause;

    /// More than any file of certificates has.
    const MAX_FILE_BYTES: u64 = 16 << 20;

    pub(super) fn connector(options: &TlsOptions) -> Result<MakeTlsConnector, Cause> {
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        // As libpq.
        builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
        set_postgresql_alpn(&mut builder)?;
        match root_certificates(options)? {
            Some(RootCertificates::File(file)) => builder.set_cert_store(store_of(&file)?),
            // The builder has those of this machine.
            Some(RootCertificates::System) => {}
            None => builder.set_verify(SslVerifyMode::NONE),
        }
        if let Some((certificate, key)) = client_certificate(options) {
            let mut chain = certificates("sslcert", &certificate)?.into_iter();
            if let Some(own) = chain.next() {
                builder.set_certificate(&own)?;
            }
            for next in chain {
                builder.add_extra_chain_cert(next)?;
            }
            let set = builder.set_private_key(&*private_key(&key)?);
            set.map_err(|_| unusable("sslkey", "it is not the key of the certificate"))?;
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

    fn store_of(file: &Path) -> Result<X509Store, Cause> {
        if in_home("root.crl").is_some_and(|file| file.exists()) {
            return Err("revocation lists are not supported, and there is one: ~/.postgresql/root.crl".into());
        }
        let mut store = X509StoreBuilder::new()?;
        for certificate in certificates("sslrootcert", file)? {
            store.add_cert(certificate)?;
        }
        Ok(store.build())
    }

    fn certificates(option: &str, file: &Path) -> Result<Vec<X509>, Cause> {
        let certificates = X509::stack_from_pem(&read(option, file)?);
        let certificates = certificates.map_err(|_| unusable(option, "it is not made of certificates in PEM"))?;
        if certificates.is_empty() {
            return Err(unusable(option, "there is no certificate in it"));
        }
        Ok(certificates)
    }

    fn private_key(file: &Path) -> Result<PKey<Private>, Cause> {
        let pem = read("sslkey", file)?;
        let mut is_asked = false;
        // OpenSSL would ask for the password on the terminal, or on the program's standard input.
        let key = PKey::private_key_from_pem_callback(&pem, |_| {
            is_asked = true;
            Ok(0)
        });
        let why = if is_asked { "it has a password, which is not supported" } else { "it is not a key in PEM" };
        key.map_err(|_| unusable("sslkey", why))
    }

    /// Reads a file, of which a key has to be its owner's alone.
    fn read(option: &str, file: &Path) -> Result<Vec<u8>, Cause> {
        let metadata = fs::metadata(file).map_err(|error| unusable(option, error))?;
        // Others, such as a pipe, may have no end.
        if !metadata.is_file() {
            return Err(unusable(option, "it is not a file"));
        }
        if option == "sslkey" {
            check_permissions(&metadata)?;
        }
        let mut content = Vec::new();
        let read = File::open(file).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut content));
        read.map_err(|error| unusable(option, error))?;
        Ok(content)
    }

    /// Refuses a key that others can read, by libpq's rule: nobody but its owner; or, of a key that root owns, its
    /// group too.
    #[cfg(unix)]
    fn check_permissions(key: &fs::Metadata) -> Result<(), Cause> {
        use std::os::unix::fs::MetadataExt;
        let forbidden = if key.uid() == 0 { 0o037 } else { 0o077 };
        if key.mode() & forbidden == 0 {
            return Ok(());
        }
        Err(unusable("sslkey", "others can read it: its permissions have to be 0600 or less (0640 if root owns it)"))
    }

    #[cfg(not(unix))]
    fn check_permissions(_: &fs::Metadata) -> Result<(), Cause> {
        Ok(())
    }

    /// The file is not named: what stands in the option may be something else, such as a password.
    fn unusable(option: &str, why: impl std::fmt::Display) -> Cause {
        format!("cannot use the file of {option}: {why}").into()
    }
}
