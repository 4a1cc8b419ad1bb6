//! The fixture of the labs: a topology with a running daemon.

use crate::daemon::Daemon;
use crate::netns::{in_netns, run};
use crate::topology::{Server, Topology, VM, wait_for, who};
use nfqd_rules::nft::model::TABLE_COMMENT;

/// The redirect of all IP traffic, as in the documented examples.
pub const STATIC: &str = "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17";

/// Real hosts on a bridge, with a daemon and servers on the middlebox and the backend.
pub struct Fixture {
    /// The bridge and the hosts.
    pub topology: Topology,
    /// The daemon.
    pub daemon: Daemon,
    /// The server on the backend.
    pub backend: Server,
    _vm: Server,
}

impl Fixture {
    /// Makes the hosts and starts the daemon with these arguments.
    ///
    /// # Panics
    /// If anything does not start.
    pub fn new(arguments: &[&str]) -> Fixture {
        let topology = Topology::new(true);
        let daemon = Daemon::start(arguments);
        let vm = Server::start(topology.vm.as_ref().unwrap(), "vm", 80);
        let backend = Server::start(&topology.backend, "backend", 80);
        Fixture { topology, daemon, backend, _vm: vm }
    }

    /// Makes the hosts and starts the daemon on a table that other programs can change, as on a kernel
    /// before Linux 6.9.
    ///
    /// # Panics
    /// If anything does not start.
    pub fn unprotected() -> Fixture {
        let script = tempfile::NamedTempFile::new().expect("script");
        let text = format!("table bridge nfqd {{ comment \"{TABLE_COMMENT}\"; }}\n");
        std::fs::write(script.path(), text).expect("script");
        run(&format!("nft -f {}", script.path().display()));
        Fixture::new(&[])
    }

    /// Returns the host that answers the client at the middlebox' address.
    pub fn at_vm(&self) -> Option<String> {
        who(&self.topology.client, VM, self.backend.port())
    }

    /// Redirects the middlebox' traffic, and waits until the backend's MAC is found.
    ///
    /// # Panics
    /// If it is not found.
    pub fn redirect(&self) {
        self.daemon.must(STATIC);
        wait_for("the backend's MAC", || {
            self.daemon.status().middleboxes[0].services[0].backends[0].mac.is_some()
        });
    }
}

/// Runs a test with and without the fast path.
pub fn in_both_modes(test: fn(&Fixture)) {
    for mode in ["full", "off"] {
        in_netns(move || test(&Fixture::new(&["--fast-path", mode])));
    }
}
