//! A bridge with real hosts: a client, a second client, a middlebox, a backend, each in a network
//! namespace.

use crate::netns::{Host, run};
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The middlebox' MAC, as in the original's examples.
pub const VM_MAC: &str = "12:13:14:15:16:17";
/// The middlebox' address, as in the original's examples.
pub const VM: Ipv4Addr = Ipv4Addr::new(10, 129, 126, 15);
/// The backend's MAC.
pub const BACKEND_MAC: &str = "02:00:00:00:00:17";
/// The backend's address, as in the original's examples.
pub const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 129, 126, 17);
/// The client's MAC.
pub const CLIENT_MAC: &str = "02:00:00:00:00:01";
/// The client's address.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 129, 126, 1);

/// The hosts' IPv6 addresses; the last number is that of the IPv4 address.
pub fn ip6(ip: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(ip.octets()[3]))
}

/// The hosts, on bridge `br0` of the namespace of this thread.
pub struct Topology {
    /// The host that talks to the middlebox.
    pub client: Host,
    /// A second client, with another MAC.
    pub other: Host,
    /// The backend of redirects.
    pub backend: Host,
    /// The middlebox, unless it is a virtual machine.
    pub vm: Option<Host>,
}

impl Topology {
    /// Makes the bridge and the hosts; with `with_vm`, a host stands for the middlebox as well.
    pub fn new(with_vm: bool) -> Topology {
        run("ip link add br0 type bridge mcast_snooping 0");
        run("ip link set br0 up");
        let topology = Topology {
            client: Host::attach(
                "br0",
                "client",
                CLIENT_MAC,
                &["10.129.126.1/24", "2001:db8::1/64 nodad"],
            ),
            other: Host::attach(
                "br0",
                "other",
                "02:00:00:00:00:02",
                &["10.129.126.2/24", "2001:db8::2/64 nodad"],
            ),
            backend: Host::attach(
                "br0",
                "backend",
                BACKEND_MAC,
                &["10.129.126.17/24", "2001:db8::11/64 nodad"],
            ),
            vm: with_vm.then(|| {
                Host::attach("br0", "vm", VM_MAC, &["10.129.126.15/24", "2001:db8::f/64 nodad"])
            }),
        };
        topology.client.run("ping -q -c 1 -W 5 10.129.126.17");
        topology
    }
}

/// A TCP server that greets with its name, reads to the end, and answers with the length and the
/// hash of what it has read. One with the name [`SINK`] does not hash, which would be the slowest
/// part of a benchmark.
pub struct Server {
    stop: Arc<AtomicBool>,
    address: SocketAddr,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts one on a host.
    ///
    /// # Panics
    /// If the port is taken.
    pub fn start(host: &Host, name: &'static str, port: u16) -> Server {
        let listener =
            host.enter(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("bind"));
        listener.set_nonblocking(true).expect("nonblocking");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let address = listener.local_addr().expect("address");
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream, name))),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Server { stop, address, thread: Some(thread) }
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

fn serve(mut stream: TcpStream, name: &str) {
    let mut hash = DefaultHasher::new();
    let mut total = 0_u64;
    let mut buffer = vec![0; 1 << 20];
    let served = (|| {
        stream.set_nonblocking(false)?;
        stream.write_all(format!("{name}\n").as_bytes())?;
        loop {
            let len = stream.read(&mut buffer)?;
            if len == 0 {
                break;
            }
            if name != SINK {
                hash.write(&buffer[..len]);
            }
            total += len as u64;
        }
        writeln!(stream, "{total} {:016x}", hash.finish())
    })();
    // Some tests cut a client off on purpose.
    let _: std::io::Result<()> = served;
}

/// The name of a server that counts only.
pub const SINK: &str = "sink";

/// A connection from a host, whose greeting has been read.
pub struct Connection {
    stream: TcpStream,
    /// The server that answered.
    pub server: String,
}

/// Connects to an address from a host; `None` if no server answers in time.
pub fn connect(host: &Host, to: impl Into<IpAddr>, port: u16) -> Option<Connection> {
    let address = SocketAddr::new(to.into(), port);
    let mut stream =
        host.enter(|| TcpStream::connect_timeout(&address, Duration::from_millis(1500))).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
    let mut server = String::new();
    let mut byte = [0];
    while stream.read(&mut byte).ok()? == 1 && byte != *b"\n" {
        server.push(char::from(byte[0]));
    }
    Some(Connection { stream, server })
}

/// Whether a server accepts a connection.
pub fn connect_plain(host: &Host, to: IpAddr, port: u16) -> bool {
    let address = SocketAddr::new(to, port);
    host.enter(|| TcpStream::connect_timeout(&address, Duration::from_millis(1500))).is_ok()
}

/// Returns the name of the server that answers at an address.
pub fn who(host: &Host, to: impl Into<IpAddr>, port: u16) -> Option<String> {
    connect(host, to, port).map(|connection| connection.server)
}

impl Connection {
    /// Sends a chunk.
    ///
    /// # Panics
    /// If it cannot be sent.
    pub fn send(&mut self, chunk: &[u8]) {
        self.stream.write_all(chunk).expect("send");
    }

    /// Sends until the connection reports its end.
    ///
    /// # Errors
    /// Asserts that it has, within a second.
    pub fn try_send(&mut self, chunk: &[u8]) -> std::io::Result<()> {
        for _ in 0..20 {
            self.stream.write_all(chunk)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Sends `total` bytes in large writes and checks the server's count and hash.
    ///
    /// # Panics
    /// If a byte is lost or wrong.
    pub fn transfer(mut self, total: u64) {
        let chunk: Vec<u8> =
            (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
        let mut hash = DefaultHasher::new();
        let chunks = total.div_ceil(chunk.len() as u64);
        for _ in 0..chunks {
            hash.write(&chunk);
            self.send(&chunk);
        }
        let expected = format!("{} {:016x}", chunks * chunk.len() as u64, hash.finish());
        assert_eq!(self.finish(), expected, "bytes and their hash");
    }

    /// Sends `total` bytes to a [`SINK`] as fast as possible; returns bits per second.
    ///
    /// # Panics
    /// If a byte is lost.
    pub fn pour(mut self, total: u64) -> f64 {
        let chunk = vec![7; 1 << 20];
        let start = Instant::now();
        (0..total >> 20).for_each(|_| self.send(&chunk));
        let answer = self.finish();
        assert!(answer.starts_with(&format!("{total} ")), "{answer}");
        (total * 8) as f64 / start.elapsed().as_secs_f64()
    }

    /// Ends sending; returns the server's answer.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn finish(mut self) -> String {
        self.stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
        let mut answer = String::new();
        self.stream.read_to_string(&mut answer).expect("answer");
        answer.trim_end().to_string()
    }
}

/// Waits until a condition holds.
///
/// # Panics
/// If it does not within twenty seconds.
pub fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a ping is answered within a second.
pub fn pings(host: &Host, to: Ipv4Addr) -> bool {
    let ping = host.command("ping").args(["-q", "-c", "1", "-W", "1", &to.to_string()]).output();
    ping.expect("ping").status.success()
}
