use super::guest::{counters, is_there, send_locked};
use super::host::HostRing;
use super::*;
use crate::language::reply::Reply;
use crate::language::value::MacAddr;
use crate::region::Region;
use crate::region_file::{Ownership, RegionFile};
use crate::sender::{Patience, SendError, lock};
use proptest::prelude::*;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

fn region() -> (tempfile::TempDir, PathBuf, RegionFile) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    let host = RegionFile::open_or_create(&path, Ownership::default()).unwrap();
    (dir, path, host)
}

/// The host's part: each command is answered by `answer`.
fn serve(ring: &mut HostRing, region: &RegionFile, answer: impl Fn(&str) -> Reply) -> usize {
    ring.follow(region, Instant::now()).unwrap();
    let requests = ring.take(region).unwrap();
    let replies: Vec<Reply> = requests
        .iter()
        .map(|request| match &request.text {
            Ok(text) => answer(text),
            Err(error) => Reply::error(crate::ErrorCode::Syntax, &error.to_string()),
        })
        .collect();
    ring.reply(region, requests.iter().zip(&replies)).unwrap();
    requests.len()
}

fn echo(text: &str) -> Reply {
    Reply::ok(text)
}

/// A host that answers in a thread until the value is dropped.
struct Host {
    stop: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Host {
    /// Starts a host that is restarted, with nothing but the region, after each `lifetime` polls.
    fn start(
        path: PathBuf,
        lifetime: usize,
        answer: impl Fn(&str) -> Reply + Send + 'static,
    ) -> Host {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let region = RegionFile::open(&path).unwrap();
                let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
                for _ in 0..lifetime {
                    serve(&mut ring, &region, &answer);
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    std::thread::yield_now();
                }
            }
        });
        Host { stop, thread: Some(thread) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

fn send(guest: &Region, commands: &[String], timeout: Duration) -> Result<Vec<Reply>, SendError> {
    let lock = lock(guest, timeout).unwrap();
    let mut replies = Vec::new();
    send_locked(guest, &lock, commands, timeout, &mut replies)?;
    Ok(replies)
}

fn texts(numbers: std::ops::Range<usize>) -> Vec<String> {
    numbers.map(|number| format!("X {number}")).collect()
}

#[test]
fn each_of_many_commands_is_acknowledged_once_and_in_order_over_restarts() {
    let (_dir, path, region) = region();
    drop(HostRing::open(&region, 0).unwrap());
    let _host = Host::start(path.clone(), 7, echo);
    let guest = Region::open(&path).unwrap();
    for (from, to) in [(0, 1), (1, 17), (17, 50), (50, 5000)] {
        let replies = send(&guest, &texts(from..to), PATIENCE).unwrap();
        let expected: Vec<Reply> = texts(from..to).iter().map(|text| Reply::ok(text)).collect();
        assert!(replies == expected, "{from} to {to}");
    }
}

#[test]
fn a_long_reply_arrives_whole() {
    let (_dir, path, region) = region();
    drop(HostRing::open(&region, 0).unwrap());
    let long = "rule ".repeat(200_000);
    let reply = Reply::ok(&long);
    let _host = Host::start(path.clone(), usize::MAX, {
        let reply = reply.clone();
        move |text| if text == "Q" { reply.clone() } else { echo(text) }
    });
    let guest = Region::open(&path).unwrap();
    let commands = ["X 1", "Q", "Q", "X 2"].map(str::to_string);
    let replies = send(&guest, &commands, PATIENCE).unwrap();
    assert!(replies == [Reply::ok("X 1"), reply.clone(), reply, Reply::ok("X 2")]);
}

#[test]
fn a_long_reply_begins_again_after_a_restart_in_its_middle() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    let epoch = guest.load_u64(PROGRESS);
    let sender = std::thread::spawn(move || send(&guest, &["Q".to_string()], PATIENCE));
    let long = Reply::ok(&"x".repeat(SLOT_TEXT * 40));
    while serve(&mut ring, &region, |_| long.clone()) == 0 {}
    let guest = Region::open(&path).unwrap();
    while guest.load_u64(CONSUMED) < epoch + 3 {}
    drop(ring);
    let _host = Host::start(path, usize::MAX, {
        let long = long.clone();
        move |_| long.clone()
    });
    assert!(sender.join().unwrap() == Ok(vec![long]));
}

#[test]
fn replies_that_are_none_end_the_exchange_and_withdraw_the_rest() {
    for (request, text) in [(1, &b"nonsense"[..]), (2, &b"OK"[..])] {
        let (_dir, path, region) = region();
        drop(HostRing::open(&region, 0).unwrap());
        let guest = Region::open(&path).unwrap();
        let (epoch, reset) = (guest.load_u64(PROGRESS), guest.load_u64(GUEST));
        let sender = std::thread::spawn(move || send(&guest, &texts(0..3), PATIENCE));
        let guest = Region::open(&path).unwrap();
        while guest.load_u64(SENT) != epoch + 3 {}
        // A host that is out of order.
        let (number, length) = (epoch + 1, text.len() as u32);
        let header = SlotHeader { number, length, flags: FIRST, request: epoch + request };
        guest.write(slot(REPLIES, epoch, number), &header.with_text(text));
        guest.store_u64(PROGRESS + 16, number);
        let error = sender.join().unwrap().unwrap_err();
        assert!(matches!(error, SendError::NotAReply(_)), "{error}");
        assert_ne!(guest.load_u64(GUEST), reset, "withdrawn");
    }
}

#[test]
fn what_nobody_takes_is_withdrawn() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    let error = send(&guest, &texts(0..3), Duration::from_millis(20)).unwrap_err();
    assert_eq!(error, SendError::Unanswered);
    let interrupted = AtomicBool::new(true);
    let patience = Patience { timeout: PATIENCE, interrupted: Some(&interrupted) };
    let held = lock(&guest, PATIENCE).unwrap();
    let result = send_locked(&guest, &held, &texts(3..4), patience, &mut Vec::new());
    assert_eq!(
        result,
        Err(SendError::Interrupted),
        "not even sent: the withdrawal is not followed yet"
    );
    drop(held);
    // The host comes back: nothing of it is carried out, now or after a restart.
    for _ in 0..3 {
        assert_eq!(serve(&mut ring, &region, |text| panic!("{text} was withdrawn")), 0);
        ring = HostRing::open(&region, 0).unwrap().unwrap();
    }
    let _host = Host::start(path, usize::MAX, echo);
    assert_eq!(send(&guest, &texts(9..10), PATIENCE).unwrap(), [Reply::ok("X 9")]);
}

#[test]
fn what_the_host_has_begun_is_answered_before_a_withdrawal_is_followed() {
    let (_dir, path, region) = region();
    drop(HostRing::open(&region, 0).unwrap());
    let slow = |text: &str| {
        std::thread::sleep(Duration::from_millis(300));
        Reply::ok(text)
    };
    let _host = Host::start(path.clone(), usize::MAX, slow);
    let guest = Region::open(&path).unwrap();
    // Its time is over while the host is busy.
    let replies = send(&guest, &texts(1..2), Duration::from_millis(150));
    assert_eq!(replies, Ok(vec![Reply::ok("X 1")]));
    assert_eq!(send(&guest, &texts(2..3), PATIENCE), Ok(vec![Reply::ok("X 2")]));
}

#[test]
fn rings_that_were_removed_are_not_there() {
    let (_dir, path, region) = region();
    let ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    assert!(is_there(&guest));
    ring.remove(&region).unwrap();
    assert!(!is_there(&guest));
}

#[test]
fn a_sender_that_died_in_the_middle_does_not_disturb_the_next() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    let epoch = guest.load_u64(PROGRESS);
    // The sender had written slots, then `sent`: each a moment to die.
    let fill = |number: u64| {
        let header = SlotHeader { number, length: 3, flags: 0, request: 0 };
        guest.write(slot(REQUESTS, epoch, number), &header.with_text(b"X 1"));
    };
    guest.store_u64(CONSUMED, epoch);
    guest.store_u64(SENT, epoch);
    fill(epoch + 1);
    assert_eq!(serve(&mut ring, &region, echo), 0, "not before it is counted");
    guest.store_u64(SENT, epoch + 1);
    assert_eq!(serve(&mut ring, &region, echo), 1);
    let _host = Host::start(path.clone(), 3, echo);
    assert_eq!(send(&guest, &texts(5..7), PATIENCE).unwrap(), [Reply::ok("X 5"), Reply::ok("X 6")]);
}

#[test]
fn a_reset_by_the_host_is_noticed() {
    let (_dir, path, region) = region();
    drop(HostRing::open(&region, 0).unwrap());
    let guest = Region::open(&path).unwrap();
    let sender = std::thread::spawn(move || send(&guest, &texts(0..1), PATIENCE));
    let other = Region::open(&path).unwrap();
    while other.load_u64(SENT) == 0 {
        std::thread::yield_now();
    }
    // The guest's own other program changes `reset`.
    other.store_u64(GUEST, 77);
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    serve(&mut ring, &region, echo);
    assert_eq!(sender.join().unwrap(), Err(SendError::Reset));
}

/// A hostile guest: what it does to the region, and what the host must do then.
#[test]
fn a_hostile_guest_gets_errors_or_nothing() {
    const NOTHING: &[&str] = &[];
    type Attack = fn(&Region, u64);
    fn request(guest: &Region, epoch: u64, number: u64, length: u32, text: &[u8]) {
        let header = SlotHeader { number, length, flags: 0, request: 0 };
        guest.write(slot(REQUESTS, epoch, number), &header.with_text(text));
        guest.store_u64(SENT, number);
    }
    let cases: &[(&str, Attack, &[&str])] = &[
        (
            "sent counts a slot that is empty",
            |guest, epoch| guest.store_u64(SENT, epoch + 1),
            &["has the number 0"],
        ),
        (
            "sent leaps by more than the ring",
            |guest, epoch| guest.store_u64(SENT, epoch + 17),
            NOTHING,
        ),
        ("sent leaps to the end", |guest, _| guest.store_u64(SENT, u64::MAX), NOTHING),
        ("sent runs backwards", |guest, epoch| guest.store_u64(SENT, epoch - 1), NOTHING),
        ("sent is zero", |guest, _| guest.store_u64(SENT, 0), NOTHING),
        (
            "a slot has the number of another",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 1, b"Q");
                guest.write(slot(REQUESTS, epoch, epoch + 1), &(epoch + 2).to_le_bytes());
            },
            &["fill it before"],
        ),
        (
            "a length beyond a command",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 2047, b"Q");
            },
            &["2047 bytes long"],
        ),
        (
            "a length beyond the region",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, u32::MAX, b"Q");
            },
            &["4294967295 bytes long"],
        ),
        (
            "no text",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 0, b"");
            },
            &["OK"],
        ),
        (
            "bytes that are not text",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 3, b"X\xff1");
            },
            &["byte 0xff at 1"],
        ),
        (
            "a line end",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 3, b"X\n1");
            },
            &["byte 0x0a at 1"],
        ),
        (
            "flags and a request number that mean nothing",
            |guest, epoch| {
                let header =
                    SlotHeader { number: epoch + 1, length: 1, flags: u32::MAX, request: 9 };
                guest.write(slot(REQUESTS, epoch, epoch + 1), &header.with_text(b"X"));
                guest.store_u64(SENT, epoch + 1);
            },
            &["OK X"],
        ),
        (
            "consumed runs ahead",
            |guest, epoch| {
                guest.store_u64(CONSUMED, epoch + 1000);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "consumed runs backwards",
            |guest, epoch| {
                guest.store_u64(CONSUMED, 0);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the header's offsets overwritten",
            |guest, epoch| {
                guest.write(HEADER, &[0xff; 40]);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the header's counters overwritten",
            |guest, epoch| {
                guest.write(PROGRESS, &[0xff; 32]);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the reply slot overwritten",
            |guest, epoch| {
                guest.write(REPLIES, &[0xff; SLOT_SIZE]);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the counters overwritten",
            |guest, epoch| {
                guest.write(COUNTERS, &[0xff; COUNTERS_SIZE]);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "a whole ring at once",
            |guest, epoch| {
                for number in epoch + 1..=epoch + SLOTS {
                    request(guest, epoch, number, 1, b"X");
                }
            },
            &["OK X"; SLOTS as usize],
        ),
        ("the guest's section all ones", |guest, _| guest.write(GUEST, &[0xff; 24]), NOTHING),
        ("the guest's section all zeros", |guest, _| guest.write(GUEST, &[0; 32]), NOTHING),
        ("sent is what was answered already", |guest, epoch| guest.store_u64(SENT, epoch), NOTHING),
        (
            "sent counts a full ring with one request in it",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 1, b"X");
                guest.store_u64(SENT, epoch + SLOTS);
            },
            &[
                "OK X", "number 0", "number 0", "number 0", "number 0", "number 0", "number 0",
                "number 0", "number 0", "number 0", "number 0", "number 0", "number 0", "number 0",
                "number 0", "number 0",
            ],
        ),
        (
            "a request in the slot of the next",
            |guest, epoch| {
                request(guest, epoch, epoch + 2, 1, b"X");
                guest.store_u64(SENT, epoch + 1);
            },
            &["has the number 0"],
        ),
        (
            "a request with the number of an earlier epoch",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 1, b"X");
                guest.write(slot(REQUESTS, epoch, epoch + 1), &(epoch - 1000).to_le_bytes());
            },
            &["fill it before"],
        ),
        (
            "the longest command",
            |guest, epoch| request(guest, epoch, epoch + 1, 2046, &[b'x'; 2046]),
            &["OK xxxx"],
        ),
        (
            "a length of less than the text",
            |guest, epoch| request(guest, epoch, epoch + 1, 1, b"X 1:2:3:4:5:6"),
            &["OK X"],
        ),
        (
            "a length of more than the text",
            |guest, epoch| request(guest, epoch, epoch + 1, 5, b"X"),
            &["byte 0x00 at 1"],
        ),
        (
            "a NUL in the text",
            |guest, epoch| request(guest, epoch, epoch + 1, 3, b"X\0Y"),
            &["byte 0x00 at 1"],
        ),
        (
            "a DEL in the text",
            |guest, epoch| request(guest, epoch, epoch + 1, 2, b"X\x7f"),
            &["byte 0x7f at 1"],
        ),
        (
            "an escape sequence",
            |guest, epoch| request(guest, epoch, epoch + 1, 4, b"\x1b[2J"),
            &["byte 0x1b at 0"],
        ),
        (
            "marks of the mailbox",
            |guest, epoch| request(guest, epoch, epoch + 1, 4, b"@X@$"),
            &["OK @X@$"],
        ),
        ("blanks alone", |guest, epoch| request(guest, epoch, epoch + 1, 3, b" \t "), &["OK"]),
        (
            "the magic overwritten",
            |guest, epoch| {
                guest.write(HEADER, b"QFNDRING");
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the epoch overwritten",
            |guest, epoch| {
                guest.store_u64(PROGRESS, epoch + 3);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "taken runs ahead",
            |guest, epoch| {
                guest.store_u64(PROGRESS + 8, epoch + 1);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "written runs backwards",
            |guest, epoch| {
                guest.store_u64(PROGRESS + 16, epoch - 9);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the host's reset overwritten",
            |guest, epoch| {
                guest.store_u64(PROGRESS + 24, 99);
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "the counters watched without end",
            |guest, epoch| {
                (0..1000).for_each(|at| guest.store_u64(WATCHED, at));
                request(guest, epoch, epoch + 1, 1, b"X");
            },
            &["OK X"],
        ),
        (
            "a reset with a request",
            |guest, epoch| {
                request(guest, epoch, epoch + 1, 1, b"X");
                guest.store_u64(GUEST, 5);
            },
            NOTHING,
        ),
    ];
    assert_eq!(cases.len(), 40);
    for (name, attack, expected) in cases {
        let (_dir, path, region) = region();
        let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
        let guest = Region::open(&path).unwrap();
        let epoch = guest.load_u64(PROGRESS);
        guest.store_u64(CONSUMED, epoch);
        guest.store_u64(SENT, epoch);
        attack(&guest, epoch);
        assert_eq!(serve(&mut ring, &region, echo), expected.len(), "{name}");
        for (number, expected) in (epoch + 1..).zip(*expected) {
            let mut copy = [0; SLOT_SIZE];
            guest.read(slot(REPLIES, epoch, number), &mut copy);
            let header = SlotHeader::parse(&copy);
            assert_eq!((header.number, header.request), (number, number), "{name}");
            let text = String::from_utf8_lossy(&copy[SLOT_HEADER..][..header.length as usize]);
            assert!(text.contains(expected), "{name}: {text}");
        }
        // The guest can always start anew, and a restarted host takes the region as it is.
        ring.repair(&region).unwrap();
        assert!(is_there(&guest), "{name}");
        drop(ring);
        let _host = Host::start(path, 5, echo);
        assert_eq!(send(&guest, &texts(1..2), PATIENCE).unwrap(), [Reply::ok("X 1")], "{name}");
    }
}

/// Writes anything into the guest's part, all the time and without a lock, as one of several writers.
fn scribble(guest: &Region, stop: &AtomicBool, mut state: u64) {
    let mut random = |below: usize| {
        // Numerical Recipes' linear congruential generator; its high bits are good enough.
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    while !stop.load(Ordering::Relaxed) {
        let near = guest.load_u64(PROGRESS).wrapping_add(random(20) as u64);
        match random(5) {
            0 => guest.store_u64(GUEST + 8 * random(4), near),
            1 => guest.write(REQUESTS + random(60_000), &[random(256) as u8; 8]),
            2 => guest.write(HEADER + random(72), &[random(256) as u8]),
            _ => {
                let header =
                    SlotHeader { number: near, length: random(40) as u32, flags: 0, request: 0 };
                let text = vec![b'a' + random(26) as u8; random(40)];
                guest.write(REQUESTS + SLOT_SIZE * random(16), &header.with_text(&text));
            }
        }
    }
}

#[test]
fn two_writers_that_rewrite_all_while_it_is_read_stop_only_their_own_channel() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let stop = AtomicBool::new(false);
    let guests = [Region::open(&path).unwrap(), Region::open(&path).unwrap()];
    let mut taken = 0;
    std::thread::scope(|scope| {
        for (seed, guest) in (1..).zip(&guests) {
            let stop = &stop;
            scope.spawn(move || scribble(guest, stop, seed));
        }
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(500) {
            ring.follow(&region, Instant::now()).unwrap();
            let requests = ring.take(&region).unwrap();
            assert!(requests.len() <= SLOTS as usize);
            for text in requests.iter().filter_map(|request| request.text.as_deref().ok()) {
                assert!(text.len() <= MAX_COMMAND && text.is_ascii());
            }
            let replies: Vec<Reply> = requests.iter().map(|_| echo("taken")).collect();
            ring.reply(&region, requests.iter().zip(&replies)).unwrap();
            ring.repair(&region).unwrap();
            taken += requests.len();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(taken > 0, "the writers have reached the host");
    drop(ring);
    let _host = Host::start(path, 5, echo);
    assert_eq!(send(&guests[0], &texts(1..2), PATIENCE).unwrap(), [Reply::ok("X 1")]);
}

#[test]
fn a_guest_that_never_reads_costs_one_long_reply() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    let epoch = guest.load_u64(PROGRESS);
    for number in epoch + 1..=epoch + SLOTS {
        let header = SlotHeader { number, length: 1, flags: 0, request: 0 };
        guest.write(slot(REQUESTS, epoch, number), &header.with_text(b"Q"));
    }
    guest.store_u64(CONSUMED, epoch);
    guest.store_u64(SENT, epoch + SLOTS);
    let long = Reply::ok(&"x".repeat(SLOT_TEXT * 40));
    assert_eq!(serve(&mut ring, &region, |_| long.clone()), 1, "one query at a time");
    for _ in 0..10 {
        assert_eq!(serve(&mut ring, &region, |_| long.clone()), 0, "the ring is full");
    }
    assert_eq!(guest.load_u64(PROGRESS + 16), epoch + SLOTS);
    assert_eq!(guest.load_u64(PROGRESS + 8), epoch, "not answered yet");
    guest.store_u64(CONSUMED, epoch + 10);
    assert_eq!(serve(&mut ring, &region, |_| long.clone()), 0);
    assert_eq!(guest.load_u64(PROGRESS + 16), epoch + SLOTS + 10);
}

#[test]
fn a_small_region_has_no_rings_and_a_cut_one_is_an_error() {
    let (_dir, path, region) = region();
    let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(SIZE - 1).unwrap();
    let smaller = RegionFile::open(&path).unwrap();
    assert!(HostRing::open(&smaller, 0).unwrap().is_none());
    assert!(!is_there(&Region::open(&path).unwrap()));
    file.set_len(GUEST as u64 + 5).unwrap();
    assert!(ring.follow(&region, Instant::now()).is_err());
    file.set_len(4096).unwrap();
    assert!(ring.follow(&region, Instant::now()).is_err() && ring.repair(&region).is_err());
    assert!(HostRing::open(&region, 0).is_err());
}

#[test]
fn the_counters_are_read_without_asking() {
    let (_dir, path, region) = region();
    let ring = HostRing::open(&region, 0).unwrap().unwrap();
    let guest = Region::open(&path).unwrap();
    let middlebox = |last| MiddleboxCounters {
        mac: MacAddr([2, 0, 0, 0, 0, last]),
        has_firewall: true,
        has_services: last % 2 == 1,
        packets: 1 << 40,
        bytes: 1500,
        denied: 3,
        redirected: 4,
        backends: 5,
        dead: 6,
    };
    let page = CounterPage { time: 12345, middleboxes: (1..=70).map(middlebox).collect() };
    ring.write_counters(&region, &page).unwrap();
    ring.write_counters(&region, &page).unwrap();
    let found = counters(&guest).unwrap();
    assert_eq!((found.time, found.middleboxes.len()), (12345, CounterPage::MOST));
    assert_eq!(found.middleboxes, page.middleboxes[..CounterPage::MOST]);
    let mut left_out = [0; 4];
    guest.read(COUNTERS + 20, &mut left_out);
    assert_eq!(u32::from_le_bytes(left_out), 70 - CounterPage::MOST as u32);
    // The host is told that somebody looks, for a minute.
    let mut ring = ring;
    let now = Instant::now();
    ring.follow(&region, now).unwrap();
    assert!(ring.is_watched(now) && !ring.is_watched(now + Duration::from_secs(61)));
    let mut again = HostRing::open(&region, 0).unwrap().unwrap();
    again.follow(&region, now).unwrap();
    assert!(!again.is_watched(now));
    assert_eq!(counters(&guest).map(|page| (page.time, page.middleboxes)), Some((0, Vec::new())));
    // A page that is being written is not taken for one.
    guest.store_u64(COUNTERS, 7);
    assert_eq!(counters(&guest), None);
}

proptest! {
    #[test]
    fn any_bytes_are_survived(
        writes in prop::collection::vec(
            (prop_oneof![HEADER..HEADER + 80, GUEST..GUEST + 32, REQUESTS..REQUESTS + 64], prop::collection::vec(any::<u8>(), 1..24)),
            0..40
        ),
        small in prop::collection::vec((0..3_usize, 0..40_u64), 0..20),
    ) {
        let (_dir, path, region) = region();
        let guest = Region::open(&path).unwrap();
        let mut ring = HostRing::open(&region, 0).unwrap().unwrap();
        let epoch = guest.load_u64(PROGRESS);
        for (at, bytes) in &writes {
            guest.write(*at, bytes);
            prop_assert!(serve(&mut ring, &region, echo) <= SLOTS as usize);
        }
        // Numbers near those that are expected go further.
        for (field, ahead) in small {
            guest.store_u64(GUEST + 8 * field, epoch.wrapping_add(ahead).wrapping_sub(8));
            prop_assert!(serve(&mut ring, &region, echo) <= SLOTS as usize);
        }
        let mut again = HostRing::open(&region, 0).unwrap().unwrap();
        prop_assert!(serve(&mut again, &region, echo) <= SLOTS as usize);
    }
}

#[test]
fn a_guest_whose_withdrawal_is_being_followed_knows_that_it_was_withdrawn() {
    let (_dir, path, region) = region();
    drop(HostRing::open(&region, 0).unwrap());
    let (guest, host) = (Region::open(&path).unwrap(), Region::open(&path).unwrap());
    let reset = guest.load_u64(GUEST);
    std::thread::scope(|scope| {
        // The host writes the new epoch, and is slow to write that it has followed.
        scope.spawn(|| {
            while host.load_u64(GUEST) == reset {
                std::thread::sleep(Duration::from_millis(1));
            }
            host.store_u64(PROGRESS, host.load_u64(PROGRESS) + 1000);
            std::thread::sleep(Duration::from_millis(100));
            host.store_u64(PROGRESS + 24, host.load_u64(GUEST));
        });
        let timeout = Duration::from_millis(50);
        assert_eq!(send(&guest, &texts(0..2), timeout), Err(SendError::Timeout(timeout)));
    });
}
