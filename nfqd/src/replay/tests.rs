use super::*;
use etherparse::PacketBuilder;

fn frames() -> Vec<Vec<u8>> {
    let (vm, client, backend) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 3]);
    let tcp = |from, to, source: u8, destination: u8, sport, dport| {
        let mut out = Vec::new();
        PacketBuilder::ethernet2(from, to)
            .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
            .tcp(sport, dport, 1, 2)
            .write(&mut out, b"hello")
            .unwrap();
        out
    };
    vec![
        tcp(client, vm, 1, 2, 1000, 81),
        tcp(client, vm, 1, 2, 1000, 80),
        tcp(backend, client, 3, 1, 80, 1000),
        tcp(client, backend, 1, 3, 7, 8),
        vec![1, 2, 3],
    ]
}

fn policy() -> Policy {
    let lines = [
        "R F 2:0:0:0:0:2 10.0.0.2",
        "A 2:0:0:0:0:2 #4 T 2 d 81",
        "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
    ];
    Policy::from_lines(&lines).unwrap()
}

/// A pcap file with this link type, in microseconds.
fn pcap_of(link: u32, frames: &[Vec<u8>]) -> Vec<u8> {
    let mut out = words(&[0xa1b2_c3d4, 2 | 4 << 16, 0, 0, 65_535, link]);
    for frame in frames {
        let length = frame.len() as u32;
        out.extend(words(&[9, 123_456, length, length]));
        out.extend(frame);
    }
    out
}

fn write_pcap(path: &Path) {
    std::fs::write(path, pcap_of(1, &frames())).unwrap();
}

/// A pcapng block.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    body.resize(body.len().next_multiple_of(4), 0);
    let length = body.len() as u32 + 12;
    [words(&[kind, length]), body, words(&[length])].concat()
}

fn pcapng_option(code: u16, value: &[u8]) -> Vec<u8> {
    let mut out = [code.to_ne_bytes(), (value.len() as u16).to_ne_bytes()].concat();
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn section() -> Vec<u8> {
    block(0x0a0d_0d0a, &words(&[0x1a2b_3c4d, 1, u32::MAX, u32::MAX]))
}

fn interface(link: u16, options: &[u8]) -> Vec<u8> {
    block(1, &[words(&[u32::from(link), 0]), options.to_vec()].concat())
}

fn enhanced(interface: u32, ticks: u64, frame: &[u8]) -> Vec<u8> {
    let length = frame.len() as u32;
    let mut body = words(&[interface, (ticks >> 32) as u32, ticks as u32, length, length]);
    body.extend(frame);
    block(6, &body)
}

fn write_pcapng(path: &Path) {
    let mut out = [section(), interface(1, &[])].concat();
    for frame in frames() {
        out.extend(enhanced(0, 9_123_456, &frame));
    }
    std::fs::write(path, out).unwrap();
}

/// Returns the lines of a replay of a file with this content, and the frames that leave.
fn replayed(content: &[u8]) -> (Vec<String>, Vec<(Duration, Vec<u8>)>) {
    let dir = tempfile::tempdir().unwrap();
    let (capture, written) = (dir.path().join("capture"), dir.path().join("written"));
    std::fs::write(&capture, content).unwrap();
    let mut text = Vec::new();
    replay(&capture, &policy(), false, Some(&written), &mut text).unwrap();
    let mut out = Vec::new();
    read_capture(&written, |captured| {
        out.push((captured.time, captured.frame.to_vec()));
        Ok(())
    })
    .unwrap();
    let lines = String::from_utf8(text).unwrap();
    (lines.lines().map(str::to_string).collect(), out)
}

#[test]
fn the_checksum_of_frames_is_taken_off_where_it_is_there() {
    let plain = replayed(&pcap_of(1, &frames()));
    let with_checksum: Vec<Vec<u8>> =
        frames().into_iter().map(|frame| [frame, vec![0xfc; 4]].concat()).collect();
    assert_eq!(replayed(&pcap_of(0x2400_0001, &with_checksum)), plain);
    // The bits tell no length, or that nothing is known about it.
    for link in [0x3000_0001, 0x0400_0001] {
        assert_eq!(replayed(&pcap_of(link, &frames())), plain, "{link:#x}");
    }
    // In pcapng, bits or bytes.
    for length in [4_u8, 32] {
        let mut capture = [section(), interface(1, &pcapng_option(13, &[length]))].concat();
        for frame in &with_checksum {
            capture.extend(enhanced(0, 9_123_456, frame));
        }
        assert_eq!(replayed(&capture), plain, "{length}");
    }
}

#[test]
fn options_blocks_and_interfaces_of_other_kinds_do_not_matter() {
    let all = frames();
    let mut capture = section();
    // An option that nobody knows, nanoseconds, an offset; then one that is not Ethernet.
    let options = [
        pcapng_option(4242, b"who knows"),
        pcapng_option(9, &[9]),
        pcapng_option(14, &5_i64.to_ne_bytes()),
    ];
    capture.extend(interface(1, &options.concat()));
    capture.extend(interface(113, &[]));
    capture.extend(block(0x0bad_0bad, b"a block of somebody's own"));
    capture.extend(enhanced(0, 7_000_000_001, &all[0]));
    capture.extend(enhanced(1, 1, &all[1]));
    capture.extend(enhanced(0, 7_000_000_002, &all[1]));
    let (lines, out) = replayed(&capture);
    assert_eq!(lines.len(), 3);
    assert!(lines[0].contains("drop") && lines[2].contains("redirect"), "{lines:?}");
    assert!(lines[1].contains("link type 113, not Ethernet"), "{lines:?}");
    assert_eq!(out.len(), 1);
    assert_eq!(out[0].0, Duration::new(12, 2));
}

#[test]
fn packet_blocks_of_old_programs_are_read_in_both_byte_orders() {
    let big = |kind: u32, body: &[u8]| {
        let length = (body.len() as u32 + 12).to_be_bytes();
        [&kind.to_be_bytes()[..], &length, body, &length].concat()
    };
    let all = frames();
    let mut little = [section(), interface(1, &[])].concat();
    let mut other = [
        big(
            0x0a0d_0d0a,
            &[0x1a, 0x2b, 0x3c, 0x4d, 0, 1, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255],
        ),
        big(1, &[0, 1, 0, 0, 0, 0, 0, 0]),
    ]
    .concat();
    for frame in &all {
        let length = frame.len() as u32;
        // Interface 0, and 7 packets that were lost before.
        let mut body = words(&[7 << 16, 0, 9_123_456, length, length]);
        body.extend(frame);
        little.extend(block(2, &body));
        let numbers = [7, 0, 9_123_456, length, length].map(u32::to_be_bytes);
        let mut body = numbers.concat();
        body.extend(frame);
        body.resize(body.len().next_multiple_of(4), 0);
        other.extend(big(2, &body));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("enhanced");
    write_pcapng(&path);
    let enhanced = replayed(&std::fs::read(&path).unwrap());
    assert_eq!(replayed(&little), enhanced);
    assert_eq!(replayed(&other), enhanced);
    // One that is longer than its block.
    let long = words(&[0, 0, 0, 1000, 1000]);
    std::fs::write(&path, [section(), interface(1, &[]), block(2, &long)].concat()).unwrap();
    let error = replay(&path, &policy(), false, None, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("packet 1: it ends in the middle"), "{error}");
}

#[test]
fn whatever_is_read_can_be_written() {
    // A packet that is longer than any frame, after the end of the format's time.
    let mut long = frames()[3].clone();
    long.resize(300_000, 7);
    let ticks = 5_000_000_000_000_000_u64;
    let capture = [section(), interface(1, &[]), enhanced(0, ticks, &long)].concat();
    let (lines, out) = replayed(&capture);
    assert_eq!((lines.len(), out.len()), (1, 1), "{lines:?}");
    assert_eq!((out[0].0.as_secs(), out[0].1.len()), (u64::from(u32::MAX), LONGEST_FRAME));
}

#[test]
fn compressed_captures_are_read() {
    use flate2::Compression;
    use flate2::write::GzEncoder;
    let plain = pcap_of(1, &frames());
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&plain).unwrap();
    let mut compressed = encoder.finish().unwrap();
    assert_eq!(replayed(&compressed), replayed(&plain));
    compressed.truncate(compressed.len() / 2);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("half.gz");
    std::fs::write(&path, compressed).unwrap();
    let error = replay(&path, &policy(), false, None, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("half.gz: packet"), "{error}");
}

#[test]
fn a_packet_from_before_segmentation_has_the_length_of_its_frame() {
    let mut frame = frames()[0].clone();
    // The total length, and the checksum of the header.
    frame[16..18].copy_from_slice(&[0, 0]);
    let (lines, _) = replayed(&pcap_of(1, &[frame]));
    assert!(lines[0].contains("deny rule 4 matches"), "{lines:?}");
}

/// A later piece whose first one comes after it, and is denied by its ports: nothing says where it
/// goes.
#[test]
fn every_packet_has_its_line() {
    let mut policy = Policy::default();
    for line in [
        "R L 2:0:0:0:0:2 10.0.0.2:53 rr 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4",
        "R F 2:0:0:0:0:2 10.0.0.2",
        "A 2:0:0:0:0:2 U 1 s 99",
    ] {
        policy.apply_line(line).unwrap();
    }
    let fragment = |id: u16, first: bool, sport: u8| {
        let mut ip = etherparse::Ipv4Header::new(
            16,
            9,
            etherparse::IpNumber::UDP,
            [10, 0, 0, 1],
            [10, 0, 0, 2],
        )
        .unwrap();
        ip.identification = id;
        ip.more_fragments = first;
        ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
        let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        ip.write(&mut out).unwrap();
        out.extend([0, sport, 0, 53, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        out
    };
    let mut replay = Replay::new(&policy);
    let seen = |outcomes: Vec<Outcome>| -> Vec<(u64, &str)> {
        outcomes.iter().map(|(line, _)| (line.packet, line.verdict)).collect()
    };
    assert_eq!(seen(replay.frame(&fragment(1, false, 98), 0)), []);
    assert_eq!(seen(replay.frame(&fragment(1, true, 98), 0)), [(2, "redirect"), (1, "redirect")]);
    assert_eq!(seen(replay.frame(&fragment(2, false, 99), 0)), []);
    assert_eq!(seen(replay.frame(&fragment(2, true, 99), 0)), [(4, "drop"), (3, "drop")]);
    assert_eq!(seen(replay.frame(&fragment(3, false, 98), 0)), []);
    assert_eq!(
        seen(replay.frame(&fragment(4, false, 98), 9)),
        [(5, "drop")],
        "it has waited long enough"
    );
    assert_eq!(seen(replay.finish()), [(6, "drop")]);
}

#[test]
fn text_and_json_have_the_documented_lines_and_frames() {
    let dir = tempfile::tempdir().unwrap();
    let (pcap, pcapng, written) =
        (dir.path().join("a"), dir.path().join("b"), dir.path().join("out"));
    write_pcap(&pcap);
    write_pcapng(&pcapng);
    for capture in [pcap, pcapng] {
        let mut out = Vec::new();
        replay(&capture, &policy(), true, Some(&written), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                r#"{"packet":1,"verdict":"drop","reason":"deny rule 4 matches","middlebox":"02:00:00:00:00:02","rule":4,"to":null}"#,
                r#"{"packet":2,"verdict":"redirect","reason":"service 10.0.0.2","middlebox":"02:00:00:00:00:02","rule":null,"to":{"mac":"02:00:00:00:00:03","ip":"10.0.0.3","port":null}}"#,
                r#"{"packet":3,"verdict":"accept","reason":"reply of service 10.0.0.2","middlebox":null,"rule":null,"to":null,"from":"10.0.0.2"}"#,
                r#"{"packet":4,"verdict":"accept","reason":"not for a middlebox","middlebox":null,"rule":null,"to":null}"#,
                r#"{"packet":5,"verdict":"accept","reason":"no Ethernet header","middlebox":null,"rule":null,"to":null}"#,
            ]
        );
        let mut leaving = Vec::new();
        read_capture(&written, |captured| {
            assert_eq!(captured.time, Duration::new(9, 123_456_000));
            leaving.push(captured.frame.to_vec());
            Ok(())
        })
        .unwrap();
        assert_eq!(leaving.len(), 4);
        assert_eq!(
            (&leaving[0][..6], &leaving[0][30..34]),
            (&[2, 0, 0, 0, 0, 3][..], &[10, 0, 0, 3][..])
        );
        assert_eq!(&leaving[1][26..30], &[10, 0, 0, 2]);
        assert_eq!(leaving[2..], frames()[3..]);
    }
}

#[test]
fn the_capture_is_not_written_over_and_a_truncated_packet_is_decided() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    write_pcap(&path);
    let before = std::fs::read(&path).unwrap();
    let error = replay(&path, &policy(), false, Some(&path), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("is the capture itself"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let frame = &frames()[0];
    let captured =
        Captured { time: Duration::ZERO, frame: &frame[..40], length: frame.len(), link: ETHERNET };
    let (line, _) = Replay::new(&policy()).captured(&captured, 0).remove(0);
    assert_eq!((line.verdict, line.rule), ("drop", Some(4)));
}

#[test]
fn files_that_are_not_captures_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    for content in [&b""[..], b"GIF89a", &[0x0a, 0x0d, 0x0d, 0x0a, 1, 2]] {
        std::fs::write(&path, content).unwrap();
        let error = replay(&path, &policy(), false, None, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("pcap or pcapng"), "{error}");
    }
    assert!(replay(&dir.path().join("none"), &policy(), false, None, &mut Vec::new()).is_err());
}
