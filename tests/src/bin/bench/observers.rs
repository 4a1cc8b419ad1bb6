//! Commands of a guest while others observe a daemon with ten thousand middleboxes of ten rules each, and the
//! time and size of what the observers get.

use crate::control::{Peer, RING, in_bridge_netns, latencies, print_percentiles};
use crate::scale::{MIDDLEBOXES, RULES, commands};
use nfqd_tests::daemon::{NFQD, program};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The commands under each observer.
const COMMANDS: usize = 400;
/// The pause between commands: their work stays below the tenth of a core that a channel has.
const PAUSE: Duration = Duration::from_millis(30);
/// The interval at which an observer asks.
const INTERVAL: Duration = Duration::from_secs(1);
/// The address of `nfqd serve`, in the network namespace of the benchmark.
const LISTEN: &str = "127.0.0.1:9477";

/// An observer: asks once, and returns the bytes that it got.
type Observer<'a> = &'a (dyn Fn() -> usize + Sync);

/// Runs it and prints what came out.
pub(crate) fn run() {
    in_bridge_netns(measure);
}

fn measure() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("commands");
    std::fs::write(&file, commands(MIDDLEBOXES, RULES, 2)).expect("commands");
    println!("-- {MIDDLEBOXES} middleboxes with {RULES} rules each, a command every {PAUSE:?}");
    let peer = Peer::start(&program(NFQD), 1, 0, &["--commands", file.to_str().expect("a path")]);
    let socket = peer.directory().join("observe");
    let _serve = Serve::start(&socket);
    let nfqd = |arguments: &[&str]| {
        let mut command = Command::new(program(NFQD));
        command.args(arguments).arg("--socket").arg(&socket).stderr(Stdio::null());
        command.output().expect("nfqd").stdout.len()
    };
    let status = || nfqd(&["status", "--json"]);
    let top = || nfqd(&["top", "--once"]);
    let metrics = || get("/metrics");
    let rules = || get("/metrics?scope=rules");
    let observers: [(&str, Option<Observer<'_>>); 6] = [
        ("nobody observes", None),
        ("nfqd status --json", Some(&status)),
        ("nfqd top --once", Some(&top)),
        ("/metrics", Some(&metrics)),
        ("/metrics?scope=rules", Some(&rules)),
        ("nobody observes, again", None),
    ];
    let guest = peer.region(0);
    for (name, observer) in observers {
        let is_over = AtomicBool::new(false);
        let (mut times, answers) = std::thread::scope(|scope| {
            let observing = observer.map(|observer| scope.spawn(|| observe(observer, &is_over)));
            let times = latencies(&guest, RING, 1, COMMANDS, PAUSE);
            is_over.store(true, Ordering::Relaxed);
            (times, observing.map(|observing| observing.join().expect("an observer")))
        });
        print_percentiles(name, &mut times);
        if let Some((mut seconds, bytes)) = answers {
            seconds.sort_by(f64::total_cmp);
            let median = seconds[seconds.len() / 2];
            println!(
                "    an answer: {:.1} MB in {median:.2} s, {} answers",
                bytes as f64 / 1e6,
                seconds.len()
            );
        }
    }
}

/// Asks again and again; returns the seconds that each answer took, and the bytes of the last.
fn observe(observer: Observer<'_>, is_over: &AtomicBool) -> (Vec<f64>, usize) {
    let (mut seconds, mut bytes) = (Vec::new(), 0);
    while !is_over.load(Ordering::Relaxed) {
        let start = Instant::now();
        bytes = observer();
        seconds.push(start.elapsed().as_secs_f64());
        std::thread::sleep(INTERVAL.saturating_sub(start.elapsed()));
    }
    (seconds, bytes)
}

/// A running `nfqd serve`.
struct Serve(Child);

impl Serve {
    fn start(socket: &Path) -> Serve {
        let mut command = Command::new(program(NFQD));
        command.args(["serve", "--listen", LISTEN, "--socket"]).arg(socket);
        let serve = Serve(command.stderr(Stdio::null()).spawn().expect("nfqd serve"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(LISTEN).is_err() {
            assert!(Instant::now() < deadline, "nfqd serve does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        serve
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the bytes of a page.
fn get(path: &str) -> usize {
    let mut stream = TcpStream::connect(LISTEN).expect("nfqd serve");
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {LISTEN}\r\n\r\n").expect("a request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    assert!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer[..100.min(answer.len())])
    );
    answer.len()
}
