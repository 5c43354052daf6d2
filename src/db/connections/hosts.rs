//! The hosts of a configuration, and their addresses. Uses no other module.

use std::fmt;
use std::net::IpAddr;

use postgres::Config;
use postgres::config::Host;

/// Where a server may be: a host, and one of its addresses if the name has been looked up.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) host: Option<Host>,
    pub(super) ip: Option<IpAddr>,
    pub(super) port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.ip) {
            (Some(Host::Tcp(name)), Some(ip)) if *name != ip.to_string() => write!(f, "{name} ({ip})")?,
            (Some(Host::Tcp(name)), _) => write!(f, "{name}")?,
            #[cfg(unix)]
            (Some(Host::Unix(folder)), _) => write!(f, "{}", folder.display())?,
            (None, Some(ip)) => write!(f, "{ip}")?,
            (None, None) => {}
        }
        write!(f, ", port {}", self.port)
    }
}

/// The hosts of a configuration, with their ports.
pub(super) fn hosts(config: &Config) -> Vec<Address> {
    let (hosts, ips, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let port = |at| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
    (0..hosts.len().max(ips.len()))
        .map(|at| Address { host: hosts.get(at).cloned(), ip: ips.get(at).copied(), port: port(at) })
        .collect()
}

/// The configuration for one address of one host.
pub(super) fn config_for(config: &Config, address: &Address) -> Config {
    let mut config = without_hosts(config);
    config.port(address.port);
    match (&address.host, address.ip) {
        (Some(Host::Tcp(name)), ip) if !name.is_empty() || ip.is_none() => _ = config.host(name),
        #[cfg(unix)]
        (Some(Host::Unix(folder)), None) => _ = config.host_path(folder),
        // TLS needs a name. An address goes before a folder, as in libpq.
        (_, Some(ip)) => _ = config.host(&ip.to_string()),
        (_, None) => {}
    }
    if let Some(ip) = address.ip {
        config.hostaddr(ip);
    }
    config
}

/// Copies everything of a configuration but its hosts, and what is looked for after connecting.
fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    copy.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .channel_binding(config.get_channel_binding());
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(dbname) = config.get_dbname() {
        copy.dbname(dbname);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy
}
