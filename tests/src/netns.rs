//! Network namespaces without names: a thread has one, its children inherit it, and it ends with
//! them.

use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::process::{Child, Command, Stdio};

/// Runs a test on a thread with a fresh network namespace.
///
/// # Panics
/// If the test does, or without the privilege: tests that use it are ignored unless they are asked
/// for.
pub fn in_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; run as root");
        run("ip link set lo up");
        // The kernel's own IPv6 packets would be taken for frames of the test.
        for which in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
            std::fs::write(path, "1").expect("sysctl");
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command line, words split at blanks, in the namespace of this thread; returns its output.
///
/// # Panics
/// If it fails.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().expect("a command")).args(words).output().expect(line);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {}\n{errors}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A further network namespace, held by a process that ends with this value or after half an hour.
pub struct Host {
    holder: Child,
}

impl Host {
    /// Makes one, with its loopback device up, and a veth pair into it: `port` here, on bridge
    /// `bridge`, and `eth0` of this MAC and address there.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn attach(bridge: &str, port: &str, mac: &str, addresses: &[&str]) -> Host {
        let host = Host::linked(port, mac, addresses);
        run(&format!("ip link set {port} master {bridge}"));
        host
    }

    /// Makes one whose port is not on a bridge.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn linked(port: &str, mac: &str, addresses: &[&str]) -> Host {
        let before = std::fs::read_link("/proc/thread-self/ns/net").expect("ns");
        let holder = Command::new("unshare")
            .args(["--net", "sleep", "1800"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare");
        let path = format!("/proc/{}/ns/net", holder.id());
        while std::fs::read_link(&path).is_ok_and(|ns| ns == before) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let host = Host { holder };
        run(&format!(
            "ip link add {port} type veth peer name eth0 address {mac} netns {}",
            host.holder.id()
        ));
        run(&format!("ip link set {port} up"));
        for which in ["all", "default", "eth0"] {
            host.run(&format!("sysctl -qw net.ipv6.conf.{which}.disable_ipv6=0"));
        }
        host.run("ip link set lo up");
        host.run("ip link set eth0 up");
        for address in addresses {
            host.run(&format!("ip addr add {address} dev eth0"));
        }
        host
    }

    /// A command that runs there.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.holder.id().to_string(), "--net", program]);
        command
    }

    /// Runs a command line there; its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn run(&self, line: &str) -> String {
        run(&format!("nsenter -t {} --net {line}", self.holder.id()))
    }

    /// Runs code there, on a thread of its own, and returns what it returns.
    ///
    /// # Panics
    /// If the namespace cannot be entered, or the code panics.
    pub fn enter<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/proc/{}/ns/net", self.holder.id())).expect("ns");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(namespace, CloneFlags::CLONE_NEWNET).expect("setns");
                code()
            });
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
