//! A network of a host with several: a client, a middlebox and two backends, with the same addresses
//! on each network.

use crate::daemon::Daemon;
use crate::netns::{Host, run};
use crate::topology::{BACKEND, BACKEND_MAC, CLIENT_MAC, Server, VM, VM_MAC, wait_for, who};
use nfqd::api::MiddleboxStatus;
use nfqd_shmctl::mailbox::guest::send_command;
use nfqd_shmctl::{Region, Reply};
use std::path::PathBuf;
use std::time::Duration;

/// The port of the servers.
pub const PORT: u16 = 80;

/// The hosts on one network.
pub struct Segment {
    /// The host that talks to the middlebox.
    pub client: Host,
    /// The middlebox.
    pub vm: Host,
    /// The backend at [`BACKEND`].
    pub backend: Host,
    name: &'static str,
    servers: Vec<Server>,
}

impl Segment {
    /// Makes the hosts with ports that are not on a bridge yet: `cNAME`, `mNAME` and `bNAME`. The
    /// servers answer with their port's name.
    ///
    /// # Panics
    /// If they cannot be made.
    pub fn new(name: &'static str, names: [&'static str; 2]) -> Segment {
        let host = |kind: &str, mac: &str, last: u8| {
            Host::linked(&format!("{kind}{name}"), mac, &[&format!("10.129.126.{last}/24")])
        };
        let client = host("c", CLIENT_MAC, 1);
        let vm = host("m", VM_MAC, 15);
        let backend = host("b", BACKEND_MAC, 17);
        let servers =
            vec![Server::start(&vm, names[0], PORT), Server::start(&backend, names[1], PORT)];
        Segment { client, vm, backend, name, servers }
    }

    /// Returns the names of the ports: the client's, the middlebox' and the backend's.
    pub fn ports(&self) -> [String; 3] {
        ["c", "m", "b"].map(|kind| format!("{kind}{}", self.name))
    }

    /// Puts the ports on a bridge.
    ///
    /// # Panics
    /// If that fails.
    pub fn plug(&self, bridge: &str) {
        for port in self.ports() {
            run(&format!("ip link set {port} master {bridge}"));
        }
        // Each is known to the bridge.
        self.client.run(&format!("ping -q -c 1 -W 5 {VM}"));
        self.client.run(&format!("ping -q -c 1 -W 5 {BACKEND}"));
    }

    /// Returns who answers at the middlebox' address.
    pub fn at_vm(&self) -> Option<String> {
        who(&self.client, VM, PORT)
    }

    /// Returns the number of servers, which keeps them running.
    pub fn servers(&self) -> usize {
        self.servers.len()
    }
}

/// A guest's channel of its own.
pub struct Guest(pub PathBuf);

impl Guest {
    /// Sends a command, and returns the reply as text.
    ///
    /// # Panics
    /// If nobody takes it.
    pub fn tell(&self, command: &str) -> String {
        let region = Region::open(&self.0).expect("region");
        let replies = send_command(&region, command, Duration::from_secs(10)).expect("a reply");
        replies.iter().map(Reply::to_string).collect::<Vec<_>>().join("\n")
    }

    /// Sends a command that must be accepted.
    ///
    /// # Panics
    /// If it is not.
    pub fn must(&self, command: &str) {
        let reply = self.tell(command);
        assert!(reply.starts_with("OK"), "{command}: {reply}");
    }
}

/// Returns the status of the middlebox on a network.
///
/// # Panics
/// If there is none.
pub fn middlebox_on(daemon: &Daemon, network: &str) -> MiddleboxStatus {
    let all = daemon.status().middleboxes;
    let found = all.iter().find(|one| one.network.as_deref() == Some(network));
    found.unwrap_or_else(|| panic!("nothing on {network}: {all:?}\n{}", daemon.log())).clone()
}

/// Waits until every backend on a network has a MAC.
///
/// # Panics
/// If that takes too long.
pub fn wait_for_backends(daemon: &Daemon, network: &str) {
    wait_for("the backends' MACs", || {
        let middlebox = middlebox_on(daemon, network);
        middlebox.services.iter().flat_map(|s| &s.backends).all(|backend| backend.mac.is_some())
    });
}
