use super::*;
use etherparse::PacketBuilder;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
use std::borrow::Cow;

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

fn write_pcap(path: &Path) {
    let mut writer = PcapWriter::new(File::create(path).unwrap()).unwrap();
    for frame in frames() {
        writer
            .write_packet(&PcapPacket::new(
                Duration::new(9, 123_456_000),
                frame.len() as u32,
                &frame,
            ))
            .unwrap();
    }
}

fn write_pcapng(path: &Path) {
    let mut writer = PcapNgWriter::new(File::create(path).unwrap()).unwrap();
    let interface =
        InterfaceDescriptionBlock { linktype: DataLink::ETHERNET, snaplen: 0, options: vec![] };
    writer.write_pcapng_block(interface).unwrap();
    for frame in frames() {
        let packet = EnhancedPacketBlock {
            interface_id: 0,
            // The crate writes nanoseconds as they are; the interface's unit is a microsecond.
            timestamp: Duration::from_nanos(9_123_456),
            original_len: frame.len() as u32,
            data: Cow::Owned(frame),
            options: vec![],
        };
        writer.write_pcapng_block(packet).unwrap();
    }
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
    let (line, _) = Replay::new(&policy()).truncated_frame(&frame[..40], frame.len(), 0).remove(0);
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
