//! A pool's network: a client, a middlebox, and backends.

use crate::daemon::Daemon;
use crate::netns::{Host, run};
use crate::topology::{CLIENT_MAC, VM_MAC, ip6};
use nfqd::api::BackendStatus;
use std::collections::HashMap;
use std::net::Ipv4Addr;

/// The address of backend `n`.
pub fn backend_ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 129, 126, 100 + n)
}

/// The MAC of backend `n`.
pub fn backend_mac(n: u8) -> String {
    format!("02:00:00:00:01:{n:02x}")
}

/// A client, a middlebox, and backends, on bridge `br0`.
pub struct Fixture {
    /// The client.
    pub client: Host,
    /// The middlebox.
    pub vm: Host,
    /// The backends.
    pub backends: Vec<Host>,
}

impl Fixture {
    /// A bridge with so many backends on it.
    pub fn new(backends: u8) -> Fixture {
        run("ip link add br0 type bridge mcast_snooping 0");
        // The host has an address for its checks.
        run("ip link set br0 up");
        run("ip addr add 10.129.126.254/24 dev br0");
        Fixture {
            client: Host::attach(
                "br0",
                "client",
                CLIENT_MAC,
                &["10.129.126.1/24", "2001:db8::1/64 nodad"],
            ),
            vm: Host::attach("br0", "vm", VM_MAC, &["10.129.126.15/24", "2001:db8::f/64 nodad"]),
            backends: (0..backends).map(attach).collect(),
        }
    }
}

/// Attaches backend `n`.
pub fn attach(n: u8) -> Host {
    let (ip, mac) = (backend_ip(n), backend_mac(n));
    Host::attach(
        "br0",
        &format!("b{n}"),
        &mac,
        &[&format!("{ip}/24"), &format!("{}/64 nodad", ip6(ip))],
    )
}

/// A backend as a command names it.
pub fn to(n: u8) -> String {
    format!("{}@{}", backend_ip(n), backend_mac(n))
}

/// Registers a service of the middlebox.
pub fn register(daemon: &Daemon, rest: &str) {
    daemon.must(&format!("R L {VM_MAC} {rest}"));
}

/// Returns the backends of the only middlebox, by their names.
pub fn backends(daemon: &Daemon) -> HashMap<String, BackendStatus> {
    let services = daemon.status().middleboxes.remove(0).services;
    services
        .into_iter()
        .flat_map(|service| service.backends)
        .map(|b| (b.backend.clone(), b))
        .collect()
}
