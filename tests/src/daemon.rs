//! The real daemon, run by a test in the network namespace of its thread.

use nfqd::api::Status;
use nfqd::api::client::status;
use nfqd_shmctl::mailbox::guest::send_command;
use nfqd_shmctl::{Region, Reply};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Returns the queue path to test: what the daemon detects, or `NFQD_TESTS_STEER`.
pub fn steer() -> String {
    std::env::var("NFQD_TESTS_STEER").unwrap_or_else(|_| "auto".to_string())
}

/// The name of the program that is nfqd, built with this package.
pub const NFQD: &str = "nfqd-under-test";

/// The name of the program that is nfqd-guest, built with this package.
pub const NFQD_GUEST: &str = "nfqd-guest-under-test";

/// Returns a program of this package, which is built with the tests, one folder above them.
///
/// # Panics
/// If it is not there.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("exe");
    let mut folders = test.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    let found = folders.find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not built beside {}", test.display()))
}

/// A running nfqd with a directory of its own.
pub struct Daemon {
    child: Child,
    directory: TempDir,
    arguments: Vec<String>,
}

impl Daemon {
    /// Starts one with these arguments, a region, a state directory and a control socket of its
    /// own, and waits until it is ready.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(arguments: &[&str]) -> Daemon {
        Daemon::start_bound(arguments, "")
    }

    /// Starts one whose region is bound to a MAC.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start_bound(arguments: &[&str], mac: &str) -> Daemon {
        let mut daemon = Daemon::spawn(arguments, mac);
        daemon.wait_ready();
        daemon
    }

    /// Starts one without waiting until it is ready.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn spawn(arguments: &[&str], mac: &str) -> Daemon {
        let directory = tempfile::tempdir().expect("directory");
        let bound = if mac.is_empty() { String::new() } else { format!(",mac={mac}") };
        let shm = format!("{}{bound}", directory.path().join("shm").display());
        let arguments: Vec<String> = ["--shm", &shm]
            .into_iter()
            .chain(arguments.iter().copied())
            .map(str::to_string)
            .collect();
        // br_netfilter is on in every new namespace. If it is not the queue path it only changes
        // the bridge, and truncated ARP frames are dropped for the sake of a table that does not
        // exist here.
        let by_br_netfilter = if steer() == "native" { "0" } else { "1" };
        for (name, value) in [
            ("call-iptables", by_br_netfilter),
            ("call-ip6tables", by_br_netfilter),
            ("filter-vlan-tagged", by_br_netfilter),
            ("call-arptables", "0"),
        ] {
            let path = PathBuf::from(format!("/proc/sys/net/bridge/bridge-nf-{name}"));
            if path.exists() {
                std::fs::write(path, value).expect("sysctl");
            }
        }
        let child = spawn(directory.path(), &arguments);
        Daemon { child, directory, arguments }
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.try_status().is_none() {
            if let Some(status) = self.child.try_wait().expect("wait") {
                panic!("nfqd ended: {status}\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "nfqd is not ready\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns the log.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// The path of its region.
    pub fn region(&self) -> PathBuf {
        self.directory.path().join("shm")
    }

    /// Returns the directory of its registrations.
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Returns the path of its control socket.
    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Returns its status, if it answers.
    pub fn try_status(&self) -> Option<Status> {
        status(&self.control()).ok()
    }

    /// Returns the status.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn status(&self) -> Status {
        self.try_status().unwrap_or_else(|| panic!("no status\n{}", self.log()))
    }

    /// Returns the number of packets that its engine has decided on.
    pub fn queued_packets(&self) -> u64 {
        self.status().queues.iter().map(|queue| queue.packets).sum()
    }

    /// Sends a command through shared memory, and returns the reply as text.
    ///
    /// # Panics
    /// If nobody takes it.
    pub fn tell(&self, command: &str) -> String {
        self.replies(command).iter().map(Reply::to_string).collect::<Vec<_>>().join("\n")
    }

    fn replies(&self, command: &str) -> Vec<Reply> {
        let region = Region::open(&self.region()).expect("region");
        send_command(&region, command, Duration::from_secs(10))
            .unwrap_or_else(|error| panic!("{command}: {error}\n{}", self.log()))
    }

    /// Sends a command that must be accepted.
    ///
    /// # Panics
    /// If it is not.
    pub fn must(&self, command: &str) {
        let replies = self.replies(command);
        assert!(replies.iter().all(Reply::is_ok), "{command}: {replies:?}\n{}", self.log());
    }

    /// Kills it, as a crash would (SIGKILL).
    ///
    /// # Panics
    /// If it cannot be ended.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Ends it, as an administrator would (SIGTERM).
    ///
    /// # Panics
    /// If it does not end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.child.wait().expect("wait")
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is not there.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("pid"));
        nix::sys::signal::kill(pid, signal).expect("signal");
    }

    /// Sets the arguments for the next start, besides its region.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        const REGION: usize = 2;
        self.arguments.truncate(REGION);
        self.arguments.extend(arguments.iter().map(ToString::to_string));
    }

    /// Starts it again, with the same directory.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.child = spawn(self.directory.path(), &self.arguments);
        self.wait_ready();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(directory: &Path, arguments: &[String]) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("log"))
        .expect("log");
    Command::new(program(NFQD))
        .args(["--steer", &steer(), "--state"])
        .arg(directory.join("state"))
        .arg("--control")
        .arg(directory.join("control"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("nfqd")
}

/// A process that ends with its value.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
