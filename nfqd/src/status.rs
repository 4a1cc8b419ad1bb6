//! What `nfqd status` shows: asked over a Unix socket, as JSON.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The state of a daemon.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// nfqd's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// `native` or `br-netfilter`.
    pub steer: String,
    /// `full` or `off`.
    pub fast_path: String,
    /// `open` or `closed`.
    pub fail: String,
    /// The queues.
    pub queues: Vec<QueueStatus>,
    /// The middleboxes.
    pub middleboxes: Vec<MiddleboxStatus>,
    /// The shared memory regions.
    pub channels: Vec<ChannelStatus>,
    /// Flows that the engine remembers.
    pub flows: FlowsStatus,
    /// Times that our tables were found changed by somebody else, and repaired.
    pub repairs: u64,
    /// Why our tables are not as they should be at the moment.
    pub repair_error: Option<String>,
    /// The file of registrations.
    pub state: String,
    /// Why registrations are not kept at the moment.
    pub state_error: Option<String>,
}

/// The flow table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FlowsStatus {
    /// Flows in it.
    pub count: usize,
    /// Flows that it has room for.
    pub capacity: usize,
    /// Flows that were given up for others because it was full.
    pub given_up: u64,
    /// Of these, established ones.
    pub given_up_established: u64,
    /// Packets whose flows the kernel could not remember, by the maps that were full; their flows go through the engine.
    pub not_cached: BTreeMap<String, u64>,
}

/// One queue.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Its number.
    pub queue: u16,
    /// Whether its thread serves.
    pub alive: bool,
    /// Packets taken.
    pub packets: u64,
    /// Packets dropped, by filters or for want of a backend.
    pub dropped: u64,
    /// Of the latter, packets whose senders were told so.
    pub refused: u64,
    /// Packets sent to a backend.
    pub redirected: u64,
    /// Packets translated on the way back.
    pub replies: u64,
    /// Times that the kernel lost messages because the receive buffer was full.
    pub overruns: u64,
}

/// One middlebox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MiddleboxStatus {
    /// Its MAC.
    pub mac: String,
    /// The address of its firewall service.
    pub firewall: Option<String>,
    /// Packets to it.
    pub packets: u64,
    /// Bytes to it, from the IP header on.
    pub bytes: u64,
    /// Its registration as commands.
    pub commands: Vec<String>,
    /// Its rules in the order they are looked at, and its default when that denies.
    pub rules: Vec<RuleStatus>,
    /// Its services.
    pub services: Vec<ServiceStatus>,
}

/// One rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RuleStatus {
    /// Its name: `#1` denies, `+1` allows, `default` is what no rule matches.
    pub rule: String,
    /// Packets that it has matched.
    pub packets: u64,
    /// Bytes that it has matched, from the IP header on.
    pub bytes: u64,
    /// Why the kernel looks at it by itself, instead of in a set with others of its shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_by_one: Option<String>,
}

/// One service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// What clients use: an address, or one port of it.
    pub vip: String,
    /// How it chooses, as in commands.
    pub method: String,
    /// Its backends.
    pub backends: Vec<BackendStatus>,
}

/// One backend of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Its address, and its port if the service has one.
    pub backend: String,
    /// Its MAC, once it is known.
    pub mac: Option<String>,
    /// Whether it gets flows.
    pub state: BackendState,
    /// Its share of new flows beside the others'.
    pub weight: u16,
    /// Live flows.
    pub flows: u32,
    /// Packets to it.
    pub packets: u64,
    /// Bytes to it, from the IP header on.
    pub bytes: u64,
    /// Packets from it, as answers.
    pub reply_packets: u64,
    /// Bytes of these.
    pub reply_bytes: u64,
    /// Why the host cannot check whether it is alive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unchecked: Option<String>,
}

/// Whether a backend gets flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// It does.
    Up,
    /// It keeps those it has.
    Draining,
    /// Checks say that it is dead.
    Dead,
    /// Its MAC is not known.
    Unresolved,
}

impl BackendState {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            BackendState::Up => "up",
            BackendState::Draining => "draining",
            BackendState::Dead => "dead",
            BackendState::Unresolved => "unresolved",
        }
    }
}

/// One shared memory region.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChannelStatus {
    /// Its path.
    pub path: String,
    /// The MACs that may be spoken for; none means every one.
    pub macs: Vec<String>,
    /// Why it is not read any more.
    pub error: Option<String>,
}

impl Status {
    /// The status for people.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "nfqd {} (pid {}): steer {}, fast path {}, fail {}, {} flows",
            self.version, self.pid, self.steer, self.fast_path, self.fail, self.flows.count
        );
        self.flows.warn(&mut out);
        for queue in &self.queues {
            let _ = writeln!(
                out,
                "queue {}: {} packets, {} dropped ({} refused), {} redirected, {} replies, {} overruns{}",
                queue.queue,
                queue.packets,
                queue.dropped,
                queue.refused,
                queue.redirected,
                queue.replies,
                queue.overruns,
                if queue.alive { "" } else { " - NOT SERVED: its thread ended, see the log" }
            );
        }
        for channel in &self.channels {
            let macs =
                if channel.macs.is_empty() { "every MAC".to_string() } else { channel.macs.join(", ") };
            let error =
                channel.error.as_ref().map(|error| format!(" - NOT READ: {error}")).unwrap_or_default();
            let _ = writeln!(out, "channel {}: may speak for {macs}{error}", channel.path);
        }
        for middlebox in &self.middleboxes {
            let _ = writeln!(
                out,
                "middlebox {}: {} packets, {} bytes to it",
                middlebox.mac, middlebox.packets, middlebox.bytes
            );
            for command in &middlebox.commands {
                let _ = writeln!(out, "    {command}");
            }
            for RuleStatus { rule, packets, bytes, one_by_one } in &middlebox.rules {
                let did = if rule.starts_with('+') { "allowed" } else { "dropped" };
                let why = one_by_one
                    .as_ref()
                    .map(|why| format!(" - looked at by itself: {why}"))
                    .unwrap_or_default();
                let _ = writeln!(out, "    rule {rule} has {did} {packets} packets, {bytes} bytes{why}");
            }
            for service in &middlebox.services {
                for backend in &service.backends {
                    let _ = writeln!(out, "    {}", backend.text(&service.vip));
                }
            }
        }
        if self.repairs != 0 {
            let _ = writeln!(
                out,
                "our tables were changed by another program and repaired {} times",
                self.repairs
            );
        }
        if let Some(error) = &self.repair_error {
            let _ = writeln!(out, "NOT ENFORCED: {error}");
        }
        let error =
            self.state_error.as_ref().map(|error| format!(" - NOT SAVED: {error}")).unwrap_or_default();
        let _ = writeln!(out, "registrations in {}{error}", self.state);
        out
    }
}

impl FlowsStatus {
    fn warn(&self, out: &mut String) {
        if self.given_up != 0 {
            let _ = writeln!(
                out,
                "FLOW TABLE FULL: {} of {} flows; {} were given up for others, {} of them established",
                self.count, self.capacity, self.given_up, self.given_up_established
            );
        }
        for (map, packets) in &self.not_cached {
            let _ = writeln!(
                out,
                "KERNEL MAP FULL: {packets} packets found no room in one of {map}; their flows go through the engine"
            );
        }
    }
}

impl BackendStatus {
    fn text(&self, vip: &str) -> String {
        let mac = self.mac.as_ref().map(|mac| format!(" at {mac}")).unwrap_or_default();
        let state = match self.state {
            BackendState::Up => "up",
            BackendState::Draining => "DRAINING: gets no new flows",
            BackendState::Dead => "DEAD: does not answer checks",
            BackendState::Unresolved => {
                "MAC UNKNOWN: not redirected until it answers on a bridge, or the command has ip@mac"
            }
        };
        let unchecked =
            self.unchecked.as_ref().map(|why| format!(" - NOT CHECKED: {why}")).unwrap_or_default();
        format!(
            "{vip} -> {}{mac} {state}, weight {}, {} flows, {} packets {} bytes there, {} packets {} bytes back{unchecked}",
            self.backend,
            self.weight,
            self.flows,
            self.packets,
            self.bytes,
            self.reply_packets,
            self.reply_bytes
        )
    }
}

/// Where the daemon is asked. Only its user may.
pub struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// A client that does not read its answer holds the daemon up no longer than this.
const PATIENCE: Duration = Duration::from_millis(200);

impl Control {
    /// Listens at a path; a socket that nobody listens at is replaced.
    ///
    /// # Errors
    /// When a daemon answers there, or the path cannot be used.
    pub fn listen(path: &Path) -> io::Result<Control> {
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another nfqd answers here"));
        }
        let stale = std::fs::symlink_metadata(path)
            .is_ok_and(|about| std::os::unix::fs::FileTypeExt::is_socket(&about.file_type()));
        if stale {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Control { listener, path: path.to_path_buf() })
    }

    /// The next who has connected.
    pub fn accept(&self) -> Option<Asker> {
        self.listener.accept().ok().map(|(stream, _)| Asker { stream })
    }
}

/// Somebody who waits for the status.
pub struct Asker {
    stream: UnixStream,
}

impl Asker {
    /// Answers; a client that does not read is given up.
    pub fn answer(mut self, status: &Status) {
        let answer = serde_json::to_vec(status).unwrap_or_default();
        let sent =
            self.stream.set_write_timeout(Some(PATIENCE)).and_then(|()| self.stream.write_all(&answer));
        if let Err(error) = sent {
            log::debug!("status: {error}");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Asks a running daemon.
///
/// # Errors
/// When none answers.
pub fn ask(path: &Path) -> io::Result<Status> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    serde_json::from_slice(&answer).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_answers_and_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        drop(UnixListener::bind(&path).unwrap());
        assert!(ask(&path).is_err());
        let control = Control::listen(&path).unwrap();
        assert!(Control::listen(&path).is_err());
        let status = Status { pid: 7, state_error: Some("disk full".to_string()), ..Status::default() };
        let asked = std::thread::scope(|scope| {
            let client = scope.spawn(|| ask(&path).unwrap());
            while !client.is_finished() {
                control.accept().into_iter().for_each(|asker| asker.answer(&status));
            }
            client.join().unwrap()
        });
        assert_eq!(asked, status);
        assert!(asked.text().contains("NOT SAVED: disk full"));
        drop(control);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(Control::listen(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }
}
