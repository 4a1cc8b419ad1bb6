//! The link of a VM that sends its commands through vsock (vsock(7)): a line is a command, a line is its
//! reply. The VM is known by its CID, which it cannot forge.

use super::message::{LineRequest, Message};
use super::resources::{ChannelEvent, ChannelId, ChannelResources};
use crate::reactor::Readiness;
use nfqd_shmctl::mailbox::MAX_MESSAGES;
use nfqd_shmctl::ring::{RequestError, command_text};
use nfqd_shmctl::{ErrorCode, MAX_COMMAND, Reply};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, VsockAddr, getpeername, send};
use nix::unistd::read;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

/// The most connections of a VM.
const MAX_CONNECTIONS: usize = 8;
/// The first port that any user of a VM may connect from (vsock's `LAST_RESERVED_PORT`).
const FIRST_USER_PORT: u32 = 1024;
/// The longest line that is read to its end, in bytes.
const MAX_LINE: usize = 1 << 18;
/// Bytes that are read at once.
const READ_SIZE: usize = 8192;

/// The connections of one VM.
pub(super) struct VsockLink {
    id: ChannelId,
    resources: Rc<ChannelResources>,
    connections: BTreeMap<u32, Connection>,
    last_connection: u32,
}

struct Connection {
    stream: OwnedFd,
    /// The last line, which has no end yet; of one that is too long, no more than its beginning.
    line: Vec<u8>,
    /// The length of the last line.
    length: usize,
    /// Complete lines.
    lines: VecDeque<Result<String, RequestError>>,
    output: Vec<u8>,
    /// Bytes of the output that have been sent.
    sent: usize,
    /// Lines whose replies are not written yet.
    unanswered: usize,
    /// Whether the VM sends no more.
    is_finished: bool,
    /// The readiness that the reactor waits for.
    readiness: Readiness,
}

/// A VM that has connected.
pub struct VsockClient {
    stream: OwnedFd,
    /// The CID of the VM.
    pub cid: u32,
    port: u32,
}

impl VsockClient {
    /// The VM behind a connection.
    ///
    /// # Errors
    /// If it is gone.
    pub fn new(stream: OwnedFd) -> Result<VsockClient, Errno> {
        let peer: VsockAddr = getpeername(stream.as_raw_fd())?;
        Ok(VsockClient { stream, cid: peer.cid(), port: peer.port() })
    }

    /// Whether it has come from a port that only root of the VM may use.
    pub(super) fn is_root(&self) -> bool {
        self.port < FIRST_USER_PORT
    }

    /// Refuses it: sends the reason and closes the connection.
    pub fn refuse(self, code: ErrorCode, reason: &str) {
        let line = format!("{}\n", Reply::error(code, reason));
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        // If it does not take it, it is closed without.
        let _ = send(self.stream.as_raw_fd(), line.as_bytes(), flags);
    }
}

impl VsockLink {
    /// A link that waits for its VM.
    pub(super) fn open(id: ChannelId, resources: Rc<ChannelResources>) -> VsockLink {
        resources.listen_by_vsock();
        VsockLink { id, resources, connections: BTreeMap::new(), last_connection: 0 }
    }

    /// Does what is due once a second.
    pub(super) fn follow(&self) {
        self.resources.listen_by_vsock();
    }

    /// Returns why VMs cannot connect.
    pub(super) fn error(&self) -> Option<Errno> {
        self.resources.vsock_error()
    }

    /// Whether the VM has a connection.
    pub(super) fn is_connected(&self) -> bool {
        !self.connections.is_empty()
    }

    fn event(&self, connection: u32) -> ChannelEvent {
        ChannelEvent { channel: self.id, source: connection }
    }

    /// Takes a connection of the VM.
    pub(super) fn accept(&mut self, client: VsockClient) {
        if self.connections.len() >= MAX_CONNECTIONS {
            let reason = format!("more than {MAX_CONNECTIONS} connections; close one");
            client.refuse(ErrorCode::Quota, &reason);
            return;
        }
        self.last_connection = self.last_connection.wrapping_add(1);
        let event = self.event(self.last_connection);
        let readiness = Readiness::ReadableOnce;
        if let Err(errno) = self.resources.add(client.stream.as_fd(), readiness, event) {
            log::debug!("vsock: {errno}");
            return;
        }
        let connection = Connection {
            stream: client.stream,
            line: Vec::new(),
            length: 0,
            lines: VecDeque::new(),
            output: Vec::new(),
            sent: 0,
            unanswered: 0,
            is_finished: false,
            readiness,
        };
        self.connections.insert(self.last_connection, connection);
    }

    /// Handles an event: reads and writes what can be.
    pub(super) fn handle(&mut self, event: ChannelEvent) {
        let Some(connection) = self.connections.get_mut(&event.source) else { return };
        connection.readiness = Readiness::Paused;
        if connection.flush().and_then(|()| connection.receive()).is_err() {
            self.connections.remove(&event.source);
        }
    }

    /// Returns commands that have been read, of each connection in turn.
    pub(super) fn take(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        // The reply to a query may be long: a connection has one at a time.
        let mut querying = BTreeSet::new();
        loop {
            let before = messages.len();
            for (number, connection) in &mut self.connections {
                // Replies take memory until the VM has read them.
                let is_busy = !connection.output.is_empty() || querying.contains(number);
                if is_busy || messages.len() >= MAX_MESSAGES {
                    continue;
                }
                let Some(text) = connection.lines.pop_front() else { continue };
                connection.unanswered += 1;
                let is_query = |text: &String| text.trim_start().starts_with(['q', 'Q']);
                if text.as_ref().is_ok_and(is_query) {
                    querying.insert(*number);
                }
                messages.push(Message::Line(LineRequest { text, connection: *number }));
            }
            if messages.len() == before {
                return messages;
            }
        }
    }

    /// Sends the replies to commands.
    pub(super) fn reply(&mut self, answered: Vec<(Message, Reply)>) {
        for (message, reply) in answered {
            let Message::Line(request) = message else { continue };
            let Some(connection) = self.connections.get_mut(&request.connection) else { continue };
            connection.unanswered = connection.unanswered.saturating_sub(1);
            connection.output.extend(reply.to_string().bytes());
            connection.output.push(b'\n');
        }
        self.connections.retain(|_, connection| connection.flush().is_ok());
    }

    /// Waits until connections can be written to, and, if they may send more, until they have. Closes those that
    /// are finished.
    pub(super) fn arm(&mut self, may_send: bool) {
        self.connections.retain(|_, connection| !connection.is_over());
        for (number, connection) in &mut self.connections {
            let wanted = connection.wants();
            let is_due = match wanted {
                // Replies do not wait for the budget.
                Readiness::WritableOnce => true,
                // An event pauses a connection by itself.
                Readiness::Paused => false,
                _ => may_send,
            };
            if wanted != connection.readiness && is_due {
                let event = ChannelEvent { channel: self.id, source: *number };
                // A connection that cannot be waited for is closed with the VM's end.
                if self.resources.modify(connection.stream.as_fd(), wanted, event).is_ok() {
                    connection.readiness = wanted;
                }
            }
        }
    }

    /// Whether a connection waits for the next poll: to be waited for again, or for its commands to be taken.
    pub(super) fn is_waiting(&self) -> bool {
        self.connections.values().any(|connection| connection.readiness == Readiness::Paused)
    }
}

impl Connection {
    /// Reads what has come, unless there are commands or replies already.
    fn receive(&mut self) -> Result<(), Errno> {
        if self.is_finished || !self.lines.is_empty() || !self.output.is_empty() {
            return Ok(());
        }
        let mut bytes = [0; READ_SIZE];
        match read(&self.stream, &mut bytes) {
            Ok(0) => self.is_finished = true,
            Ok(length) => self.push(bytes.get(..length).unwrap_or_default()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        // A line without an end is no command.
        if self.length > MAX_LINE { Err(Errno::EMSGSIZE) } else { Ok(()) }
    }

    /// Adds bytes to the last line, and begins others.
    fn push(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let text = part.strip_suffix(b"\n").unwrap_or(part);
            // With the CR of a line that ends by CR LF.
            let room = (MAX_COMMAND + 1).saturating_sub(self.line.len());
            self.line.extend(text.iter().take(room));
            self.length += text.len();
            if text.len() < part.len() {
                let line = self.complete();
                self.lines.push_back(line);
            }
        }
    }

    /// Ends the last line.
    fn complete(&mut self) -> Result<String, RequestError> {
        let line = std::mem::take(&mut self.line);
        let length = std::mem::take(&mut self.length);
        let is_whole = line.len() == length;
        let text = line.strip_suffix(b"\r").filter(|_| is_whole).unwrap_or(&line);
        if !is_whole || text.len() > MAX_COMMAND {
            return Err(RequestError::Length(length as u32));
        }
        command_text(text)
    }

    /// Sends as much of the output as the VM takes.
    fn flush(&mut self) -> Result<(), Errno> {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match send(self.stream.as_raw_fd(), rest, flags) {
                Ok(length) => self.sent += length,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// Returns what the reactor is to wait for.
    fn wants(&self) -> Readiness {
        match () {
            () if !self.output.is_empty() => Readiness::WritableOnce,
            // More is read when these commands have been taken.
            () if !self.lines.is_empty() || self.is_finished => Readiness::Paused,
            () => Readiness::ReadableOnce,
        }
    }

    fn is_over(&self) -> bool {
        let is_idle = self.output.is_empty() && self.unanswered == 0 && self.lines.is_empty();
        self.is_finished && is_idle
    }
}

#[cfg(test)]
mod tests {
    use super::super::Channel;
    use super::*;
    use crate::config::ChannelSpec;
    use crate::descriptor_store::DescriptorStore;
    use std::io::{ErrorKind, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    /// A channel, and the VM's end of a connection. A Unix socket stands for vsock, which not every kernel
    /// has.
    struct Fixture {
        resources: Rc<ChannelResources>,
        channel: Channel,
        now: Instant,
        /// The time that passes in a step.
        pace: Duration,
    }

    impl Fixture {
        fn new(keys: &str) -> Fixture {
            let resources = Rc::new(ChannelResources::new(DescriptorStore::none()).unwrap());
            let spec = ChannelSpec::vsock(&format!("3{keys}")).unwrap();
            let channel = Channel::open(&spec, &resources);
            let pace = Duration::from_millis(1);
            Fixture { resources, channel, now: Instant::now(), pace }
        }

        fn connect_from(&mut self, port: u32) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.set_nonblocking(true).unwrap();
            self.channel.accept(VsockClient { stream: ours.into(), cid: 3, port }, self.now);
            theirs
        }

        fn connect(&mut self) -> UnixStream {
            self.connect_from(1000)
        }

        /// Lets some time pass; answers each command with itself, and a query with `query`.
        fn step(&mut self, query: &str) -> Vec<Result<String, String>> {
            self.now += self.pace;
            let listener = |event: &ChannelEvent| !event.is_vsock_connection();
            for event in self.resources.events().unwrap().into_iter().filter(listener) {
                self.channel.handle(event, self.now);
            }
            if self.channel.next_poll().is_none_or(|next| next > self.now) {
                return Vec::new();
            }
            let messages = self.channel.poll(self.now);
            let text = |message: &Message| {
                message.text().map(str::to_string).map_err(|error| error.to_string())
            };
            let texts: Vec<_> = messages.iter().map(text).collect();
            let answer = |message: Message| {
                let reply = Reply::ok(match message.text() {
                    Ok("Q") => query,
                    other => other.unwrap_or("bad"),
                });
                (message, reply)
            };
            // As the control plane does: nothing is replied to nothing.
            if !messages.is_empty() {
                self.channel.reply(messages.into_iter().map(answer).collect());
            }
            texts
        }

        fn steps(&mut self, count: u32) -> Vec<Result<String, String>> {
            (0..count).flat_map(|_| self.step("")).collect()
        }
    }

    fn read(vm: &mut UnixStream) -> String {
        let mut bytes = Vec::new();
        match vm.read_to_end(&mut bytes) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            Ok(_) => bytes.extend(b"<end>"),
        }
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_in_pieces_and_of_any_length_are_commands_or_errors() {
        let mut fixture = Fixture::new("");
        let mut vm = fixture.connect();
        vm.write_all(b"X 1:2:3").unwrap();
        assert_eq!(fixture.steps(20), []);
        vm.write_all(b":4:5:6\r\n\nX \xc3\xa9\n").unwrap();
        let bad = "byte 0xc3 at 2 is not printable ASCII; commands are ASCII text".to_string();
        let expected = [Ok("X 1:2:3:4:5:6".to_string()), Ok(String::new()), Err(bad)];
        assert_eq!(fixture.steps(20), expected);
        assert_eq!(read(&mut vm), "OK X 1:2:3:4:5:6\nOK\nOK bad\n");
        // Two that are too long, each with its own length, and one with a CR where it is cut.
        let longest = "x".repeat(MAX_COMMAND);
        for (line, length) in [
            (format!("{longest}\n"), None),
            (format!("{longest}\r\n"), None),
            (format!("{longest}y\n"), Some(2047)),
            (format!("{longest}{longest}\n"), Some(4092)),
            (format!("{longest}\ry\n"), Some(2048)),
        ] {
            vm.write_all(line.as_bytes()).unwrap();
            let texts = fixture.steps(20);
            let error = length.map(|n| format!("{n} bytes long; a command has at most 2046"));
            assert_eq!(texts, [error.map_or(Ok(longest.clone()), Err)], "{}", line.len());
        }
        // What the VM has sent before it shuts its side is answered.
        read(&mut vm);
        vm.write_all(b"Q\nX").unwrap();
        vm.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(fixture.steps(40), [Ok("Q".to_string())]);
        assert_eq!(read(&mut vm), "OK\n<end>");
        assert_eq!(fixture.channel.is_connected(), Some(false));
    }

    #[test]
    fn a_line_without_an_end_costs_a_read_a_millisecond_and_ends_the_connection() {
        let mut fixture = Fixture::new("");
        fixture.pace = Duration::from_micros(10);
        let mut vm = fixture.connect();
        let mut sent = 0;
        let mut steps = 0;
        while fixture.channel.is_connected() == Some(true) {
            sent += vm.write(&[b'x'; 100_000]).unwrap_or(0);
            fixture.step("");
            steps += 1;
            assert!(steps < 100_000, "{sent} bytes");
        }
        // 8 KiB at once, and then a pause of almost a millisecond at least.
        assert!(steps >= MAX_LINE / READ_SIZE * 50, "{steps} steps for {sent} bytes");
    }

    #[test]
    fn a_connection_has_the_reply_to_one_query_in_memory_and_gets_it_without_a_budget() {
        let mut fixture = Fixture::new(",rate=1");
        let mut vm = fixture.connect();
        vm.write_all(&b"Q\n".repeat(10)).unwrap();
        let long = "y".repeat(1 << 20);
        // Its CPU time uses up all that the channel may send.
        let texts: Vec<_> = (0..5).flat_map(|_| fixture.step(&long)).collect();
        assert_eq!(texts, [Ok("Q".to_string())]);
        (0..40).for_each(|_| fixture.channel.charge(1, Duration::from_secs(3600)));
        let mut got = 0;
        for _ in 0..200 {
            assert_eq!(fixture.step(&long), []);
            got += read(&mut vm).len();
        }
        assert_eq!(got, "OK \n".len() + long.len());
    }

    #[test]
    fn others_than_root_cost_nothing_and_connections_are_bounded() {
        let mut fixture = Fixture::new("");
        for _ in 0..1000 {
            let mut stranger = fixture.connect_from(1024);
            assert!(read(&mut stranger).starts_with("ERR denied connect from a port below 1024"));
        }
        let mut vms: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| fixture.connect()).collect();
        let mut more = fixture.connect();
        assert!(read(&mut more).starts_with("ERR quota more than 8 connections"));
        vms[7].write_all(b"Q\n").unwrap();
        assert_eq!(fixture.steps(20), [Ok("Q".to_string())]);
        // Connecting again and again is bounded like commands.
        drop(vms);
        fixture.steps(40);
        let refused =
            (0..1000).filter(|_| read(&mut fixture.connect()).starts_with("ERR quota too")).count();
        assert!(refused > 400, "{refused}");
    }
}
