//! The crates `nfq` and `rustables` beside the modules that nfqd uses instead, so that anyone can
//! repeat the measurements of docs/DEPENDENCIES.md.

use crate::print;
use nfqd::packet_path::queue::{Inbox, Queue, VerdictBatch};
use nfqd_rules::mark::Operation;
use nfqd_rules::nft::build::build;
use nfqd_rules::nft::field::{Type, Value};
use nfqd_rules::nft::kernel::Kernel;
use nfqd_rules::nft::model::{Element, Family, Queues, Set, Statement, Table};
use nfqd_rules::nft::options::{FastPath, QueuePath, RulesetOptions};
use nfqd_rules::slots::{Slots, Unobserved};
use nfqd_rules::{Desired, Policy};
use nfqd_shmctl::MacAddr;
use nfqd_tests::netns::{in_netns, run as shell};
use nfqd_tests::tap::Tap;
use nix::poll::PollTimeout;
use nix::sys::eventfd::EventFd;
use rustables::set::SetBuilder;
use rustables::{Batch, MsgType, ProtocolFamily};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const ROUNDS: usize = 21;
const SETTLE_TIME: Duration = Duration::from_millis(60);
/// Packets that wait before they are drained: as many as fit into the receive buffer of a socket
/// that does not ask for more, as that of `nfq`.
const BURST: usize = 128;
const BURSTS: usize = 40;
const QUEUES: Queues = Queues { first: 0, count: 1, bypass: true };
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A bridge whose frames for a middlebox all go to the queue.
struct QueueBridge {
    uplink: Tap,
    _middlebox: Tap,
}

impl QueueBridge {
    fn new() -> QueueBridge {
        shell("ip link add br0 type bridge mcast_snooping 0");
        shell("ip link set br0 up");
        let uplink = Tap::on_bridge("br0", "uplink", &[]);
        let middlebox = Tap::on_bridge("br0", "middlebox", &["02:00:00:00:00:01"]);
        let lines = ["R F 2:0:0:0:0:1 10.0.0.1", "A 2:0:0:0:0:1 T 2 d 9"];
        let policy = Policy::from_lines(&lines).expect("commands");
        let mut slots = Slots::default();
        slots.sync_all(&policy, &Unobserved, Instant::now());
        let mut kernel = Kernel::open().expect("nf_tables");
        let native = kernel.supports(Family::Bridge, &Statement::Queue(QUEUES)).expect("a probe");
        let queue_path = if native { QueuePath::Native } else { QueuePath::BrNetfilter };
        if !native {
            shell("sysctl -qw net.bridge.bridge-nf-call-iptables=1");
        }
        let options = RulesetOptions { queue_path, fast_path: FastPath::Off, queues: QUEUES };
        let desired = Desired { policy, slots, ..Desired::default() };
        kernel.load(&build(&desired, &options)).expect("the ruleset");
        QueueBridge { uplink, _middlebox: middlebox }
    }

    /// Sends bursts, and drains each; returns microseconds a packet of the draining.
    fn cost(&self, mut drain: impl FnMut()) -> f64 {
        let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2, 8, 0]].concat();
        frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 9, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
        // The IP header's checksum, which br_netfilter checks.
        frame[24..26].copy_from_slice(&0x9dce_u16.to_be_bytes());
        frame.extend([0; 20]);
        let mut spent = 0.0;
        for _ in 0..BURSTS {
            for _ in 0..BURST {
                self.uplink.send(&frame);
            }
            let start = Instant::now();
            drain();
            spent += start.elapsed().as_secs_f64();
        }
        spent * 1e6 / (BURST * BURSTS) as f64
    }
}

fn by_nfqd(bridge: &QueueBridge) -> f64 {
    let mut queue = Queue::open(0, true).expect("queue 0");
    let (mut inbox, mut verdicts) = (Inbox::default(), VerdictBatch::new(0));
    let stop = EventFd::new().expect("an event");
    bridge.cost(|| {
        let mut left = BURST;
        while left > 0 {
            queue.wait(&stop, PollTimeout::from(2000_u16)).expect("packets");
            queue.receive(&mut inbox).expect("packets");
            assert!(inbox.packets().next().is_some(), "{left} packets did not arrive");
            for packet in inbox.packets() {
                verdicts.accept(packet.id, Operation::Reply as u32);
                left -= 1;
            }
            queue.send(&verdicts).expect("verdicts");
            verdicts.clear();
        }
    })
}

fn by_nfq(bridge: &QueueBridge) -> f64 {
    let mut queue = nfq::Queue::open().expect("a socket");
    queue.bind(0).expect("queue 0");
    queue.set_queue_max_len(0, 4096).expect("a length");
    queue.set_recv_gso(0, true).expect("GSO");
    queue.set_fail_open(0, true).expect("fail open");
    let cost = bridge.cost(|| {
        for _ in 0..BURST {
            let mut message = queue.recv().expect("a packet");
            message.set_nfmark(Operation::Reply as u32);
            message.set_verdict(nfq::Verdict::Accept);
            queue.verdict(message).expect("a verdict");
        }
    });
    queue.unbind(0).expect("unbind");
    cost
}

fn mac(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [2, 0, a, b, c, d]
}

/// Loads a table with a set of MACs, and returns the microseconds that it took.
fn load_by_nfqd(kernel: &mut Kernel, count: u32) -> f64 {
    let mut table = Table::new(Family::Bridge);
    let key = |number: u32| vec![Value::Mac(MacAddr(mac(number)))];
    let elements = (0..count).map(|number| (key(number), Element::default())).collect();
    let set = Set { key: vec![Type::Mac], elements, ..Set::default() };
    table.sets.insert("macs".to_string(), set);
    let ruleset = BTreeMap::from([(Family::Bridge, table)]);
    let start = Instant::now();
    kernel.load(&ruleset).expect("nf_tables");
    let spent = start.elapsed().as_secs_f64() * 1e6;
    kernel.remove().expect("nf_tables");
    spent
}

fn load_by_rustables(count: u32) -> f64 {
    let start = Instant::now();
    let table = rustables::Table::new(ProtocolFamily::Bridge).with_name("bench");
    let mut builder = SetBuilder::<[u8; 6]>::new("macs", &table).expect("a set");
    for number in 0..count {
        builder.add(&mac(number));
    }
    let (mut set, elements) = builder.finish();
    // The builder leaves both out, and the kernel rejects a set without.
    set.family = ProtocolFamily::Bridge;
    set.set_id(1_u32);
    let mut batch = Batch::new();
    batch.add(&table, MsgType::Add);
    batch.add(&set, MsgType::Add);
    batch.add(&elements, MsgType::Add);
    batch.send().expect("nf_tables");
    let spent = start.elapsed().as_secs_f64() * 1e6;
    let mut batch = Batch::new();
    batch.add(&table, MsgType::Del);
    batch.send().expect("nf_tables");
    spent
}

/// Measures two contestants in pairs of which the first changes.
fn pairs(
    names: [&str; 2],
    unit: &str,
    mut ours: impl FnMut() -> f64,
    mut theirs: impl FnMut() -> f64,
) {
    // The kernel's destruction of deleted objects, in the background, is over by then.
    let mut ours = || {
        std::thread::sleep(SETTLE_TIME);
        ours()
    };
    let mut theirs = || {
        std::thread::sleep(SETTLE_TIME);
        theirs()
    };
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for pair in 0..ROUNDS {
        if pair % 2 == 0 {
            left.push(ours());
            right.push(theirs());
        } else {
            right.push(theirs());
            left.push(ours());
        }
    }
    let ratios: Vec<f64> = right.iter().zip(&left).map(|(theirs, ours)| theirs / ours).collect();
    print(names[0], &left, unit);
    print(names[1], &right, unit);
    print("    ratio of a pair", &ratios, "");
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    in_netns(|| {
        let bridge = QueueBridge::new();
        pairs(
            ["queue: nfqd's module", "queue: nfq"],
            "us/pkt",
            || by_nfqd(&bridge),
            || by_nfq(&bridge),
        );
        for count in [1, 100] {
            let mut kernel = Kernel::open().expect("nf_tables");
            kernel.remove().expect("nf_tables");
            pairs(
                [&format!("set of {count}: nfqd's module"), &format!("set of {count}: rustables")],
                "us",
                || load_by_nfqd(&mut kernel, count),
                || load_by_rustables(count),
            );
        }
    });
}
