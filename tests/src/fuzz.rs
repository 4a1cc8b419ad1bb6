//! The bodies of the fuzz targets, which plain tests run over the corpus as well.

use nfqd_rules::packet::{Packet, l3_offset};
use nfqd_rules::rewrite::{Side, set_destination_mac, translate, translate_quoted};
use nfqd_rules::{MiddleboxKey, NetworkId, Policy};
use nfqd_shmctl::ring::host::HostRing;
use nfqd_shmctl::{
    Action, MAX_COMMAND, MacAddr, Ownership, ParsedCommand, RegionFile, Reply, split_lines,
};
use std::net::IpAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Parses text as commands, one a line, and applies them.
///
/// # Panics
/// If a parsed command does not print and parse back as itself, an error does not name a place in
/// the line, or the policy is not restored by its own commands.
pub fn command(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut policy = Policy::default();
    for (_, line) in split_lines(&text) {
        match ParsedCommand::parse(line) {
            Ok(parsed) => {
                let printed = parsed.command.to_string();
                let again = ParsedCommand::parse(&printed).map(|parsed| parsed.command);
                assert_eq!(again.as_ref(), Ok(&parsed.command), "{printed}");
                if let Err(error) = policy.apply(NetworkId::ANY, &parsed.command) {
                    let error = error.locate(&parsed);
                    assert!(error.column >= 1 && error.column <= line.len() + 1, "{line}: {error}");
                    assert!(Reply::from(error).to_string().parse::<Reply>().is_ok(), "{line}");
                }
            }
            Err(error) => {
                assert!(error.column >= 1 && error.column <= line.len() + 1, "{line}: {error}");
                assert!(!error.message.contains(char::is_control), "{line}: {error}");
            }
        }
    }
    let mut again = Policy::default();
    for (_, command) in policy.commands() {
        let line = command.to_string();
        assert!(again.apply_line(&line).is_ok(), "{line}");
    }
    assert_eq!(again, policy);
}

/// A policy with every class of rules for the MACs of the world in [`crate::frames`].
fn rules() -> &'static Policy {
    static POLICY: OnceLock<Policy> = OnceLock::new();
    POLICY.get_or_init(|| {
        let mut policy = Policy::default();
        let texts = [
            include_str!("../captures/filters.commands"),
            include_str!("../captures/balanced.commands"),
            "R F 02:00:00:00:00:02 10.0.0.2 deny\nA 02:00:00:00:00:02 +1 M 1 s 2:0:0:0:0:0/ff:0:0:0:0:1",
        ];
        for (_, line) in texts.iter().flat_map(|text| split_lines(text)) {
            policy.apply_line(line).expect("a command");
        }
        policy
    })
}

/// Parses a frame, truncated to a length from the first bytes, filters it and rewrites it.
///
/// # Panics
/// If the classifier finds another rule than a linear scan, or a rewrite makes the frame unparsable
/// or changes its length.
pub fn packet(data: &[u8]) {
    let Some((&[cut, last], frame)) = data.split_first_chunk() else { return };
    let length = frame.len() + usize::from(cut);
    let Some(mut packet) = Packet::from_cut_frame(frame, length) else { return };
    let policy = rules();
    packet.link.destination = MacAddr([2, 0, 0, 0, 0, 1 + last % 3]);
    let middlebox = policy.get(MiddleboxKey::anywhere(packet.link.destination));
    let _ = middlebox.and_then(|middlebox| middlebox.service_for(&packet));
    let firewall = middlebox.and_then(|middlebox| middlebox.firewall());
    if let Some(firewall) = firewall {
        let all: Vec<_> = firewall.conditions(packet.link.destination).collect();
        // A packet whose transport header is hidden matches no rule that compares one, and is
        // denied by default.
        let hidden = packet.ip.is_some_and(|ip| ip.hides_transport)
            && all.iter().any(|(_, wanted)| wanted.need_transport());
        let may = all.iter().filter(|(_, wanted)| !(hidden && wanted.need_transport()));
        let expected =
            may.clone().find(|(_, wanted)| wanted.match_packet(&packet)).map(|(rule, _)| *rule);
        let default = if hidden { Action::Deny } else { firewall.default_action() };
        let filtered = firewall.decide(&packet);
        assert_eq!(filtered.rule, expected, "{packet:?}");
        assert_eq!(filtered.action, expected.map_or(default, |rule| rule.action), "{packet:?}");
    }
    let Some(ip) = packet.ip else { return };
    let mut out = frame.to_vec();
    let new =
        if ip.source.is_ipv4() { IpAddr::from([10, 0, 0, last]) } else { IpAddr::from([0x20; 16]) };
    set_destination_mac(&mut out, MacAddr([2; 6]));
    if translate(&mut out, &packet, Side::Destination, new, Some(last.into())) {
        assert_eq!(out.len(), frame.len());
        let again = Packet::from_cut_frame(&out, length).and_then(|packet| packet.ip);
        assert_eq!(again.map(|again| again.destination), Some(new));
        let port = again.and_then(|again| again.ports).map(|ports| ports.destination);
        assert_eq!(port, ip.ports.map(|_| last.into()));
    }
    let l3 = l3_offset(frame);
    if translate_quoted(
        out.get_mut(l3..).unwrap_or_default(),
        &ip,
        Side::Source,
        new,
        Some(last.into()),
    ) {
        assert_eq!(out.len(), frame.len());
        let again = Packet::from_cut_frame(&out, length).and_then(|packet| packet.ip?.quoted);
        assert_eq!(again.map(|again| again.source), Some(new));
    }
    let _ = nfqd::packet_path::reject::answer(&packet, frame.get(l3..).unwrap_or_default());
}

/// The ranges of a region that a guest owns, by the layout's documentation: its section, and the request ring.
const GUEST_OWNED: [(usize, usize); 2] = [(8192, 32), (12288, 65536)];

/// Plays a guest that writes whatever the input says, and the host beside it, which is restarted at
/// any time.
///
/// # Panics
/// If the host takes more than a ring of requests or one that is not text, leaves a header that is not sound,
/// writes into what the guest owns, or fails.
pub fn ring(data: &[u8]) {
    static REGION: Mutex<Option<(tempfile::TempDir, RegionFile)>> = Mutex::new(None);
    let mut guard = REGION.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, region) = guard.get_or_insert_with(|| {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("region");
        let region = RegionFile::open_or_create(&path, Ownership::default()).expect("region");
        (directory, region)
    });
    region.write(0, &vec![0; 147_456]).expect("write");
    let open = || HostRing::open(region, 0).expect("read").expect("room");
    let mut host = open();
    let number = |offset: usize| {
        let mut bytes = [0; 8];
        region.read(offset, &mut bytes).expect("read");
        u64::from_le_bytes(bytes)
    };
    let owned = || {
        GUEST_OWNED.map(|(at, length)| {
            let mut bytes = vec![0; length];
            region.read(at, &mut bytes).expect("read");
            bytes
        })
    };
    let mut rest = data;
    while let Some((&[step, at, value], after)) = rest.split_first_chunk() {
        rest = after;
        let near = number(4136).wrapping_add(value.into()).wrapping_sub(2);
        match step % 8 {
            0 | 1 => {
                let field = 8192 + 8 * usize::from(at % 4);
                region.write(field, &near.to_le_bytes()).expect("write");
            }
            2 | 3 => {
                // A slot, mostly a right one.
                let length = usize::from(at).min(rest.len());
                let (text, after) = rest.split_at(length);
                rest = after;
                let slot = 12288 + 4096 * usize::from(value.wrapping_sub(3) % 16);
                let claimed = if step < 250 { length as u32 } else { u32::from(at) << (step % 32) };
                let mut bytes = near.to_le_bytes().to_vec();
                bytes.extend(claimed.to_le_bytes());
                bytes.extend([0; 12]);
                bytes.extend(text);
                region.write(slot, &bytes).expect("write");
            }
            4 => {
                let anywhere = (usize::from(at) << 8 | usize::from(value)) * 2 + 4096;
                let (bytes, after) = rest.split_at(rest.len().min(8));
                rest = after;
                region.write(anywhere, bytes).expect("write");
            }
            5 => host = open(),
            _ => {
                let before = owned();
                host.follow(region, Instant::now()).expect("read");
                let requests = host.take(region).expect("read");
                assert!(requests.len() <= 16);
                for text in requests.iter().filter_map(|request| request.text.as_ref().ok()) {
                    assert!(
                        text.len() <= MAX_COMMAND
                            && !text.contains(|c: char| c != '\t' && c.is_control())
                    );
                }
                let reply = Reply::ok(&"x".repeat(usize::from(at) * usize::from(value)));
                let replies = requests.iter().map(|request| (request, &reply));
                host.reply(region, replies).expect("write");
                host.repair(region).expect("write");
                let [epoch, taken, written] = [4136, 4144, 4152].map(number);
                assert!(epoch <= taken && epoch <= written, "{epoch} {taken} {written}");
                assert!(before == owned(), "the host wrote into what the guest owns");
            }
        }
    }
}
