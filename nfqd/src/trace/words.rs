//! Packets in words, `tcp 10.0.0.9:40000 > 10.129.126.15:80 syn to 12:13:14:15:16:17 vlan 100`, as frames.

use etherparse::{EtherType, IpNumber, PacketBuilder, PacketBuilderStep, VlanId};
use nfqd_shmctl::{BackendName, MacAddr, Protocol};
use std::net::IpAddr;

/// A packet in words: its frame, and the network that it is on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WordedPacket {
    /// The frame.
    pub frame: Vec<u8>,
    /// The network, if the words name one: `BRIDGE`.
    pub network: Option<String>,
}

/// The reason words are no packet.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WordsError {
    /// A word that cannot be there.
    #[error("'{word}': {expected}")]
    Word {
        /// The word.
        word: String,
        /// The expected form, and what to write.
        expected: &'static str,
    },
    /// The words end too early.
    #[error("the packet ends here; {0}")]
    End(&'static str),
    /// The two addresses are of two families.
    #[error("{0} and {1} are not of one family")]
    Families(IpAddr, IpAddr),
    /// The addresses have no ports, or have some that the protocol has not.
    #[error("{0} packets {1}")]
    Ports(Protocol, &'static str),
}

const FORM: &str = "write one like tcp 10.0.0.9:40000 > 10.129.126.15:80 syn to 12:13:14:15:16:17";
const PROTOCOL: &str = "not a protocol; write tcp, udp, icmp, icmp6, or a number from 0 to 255";
const ADDRESS: &str =
    "not an address; write one like 10.0.0.9, 10.0.0.9:80, 2001:db8::9 or [2001:db8::9]:80";
const REST: &str = "not expected here; behind the addresses are TCP flags (syn, ack, fin, rst, psh, urg), an ICMP \
                    type and code (type 3 code 1), to MAC, from MAC, vlan ID, on BRIDGE, and length N";

/// The source MAC of a packet whose words name none.
const DEFAULT_SOURCE: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfe]);

/// The words after the addresses.
struct Rest {
    flags: Vec<&'static str>,
    icmp: (u8, u8),
    to: Option<MacAddr>,
    from: MacAddr,
    vlan: Option<VlanId>,
    network: Option<String>,
    payload: usize,
}

/// Returns the packet that the words describe.
///
/// # Errors
/// See [`WordsError`].
pub fn parse(text: &str) -> Result<WordedPacket, WordsError> {
    let mut words = text.split_whitespace();
    let wrong = |word: &str, expected| WordsError::Word { word: word.to_string(), expected };
    let word = words.next().ok_or(WordsError::End(FORM))?;
    let protocol: Protocol =
        word.to_ascii_lowercase().parse().map_err(|_| wrong(word, PROTOCOL))?;
    let mut address = || -> Result<BackendName, WordsError> {
        let word = words.next().ok_or(WordsError::End(FORM))?;
        word.parse().map_err(|_| wrong(word, ADDRESS))
    };
    let source = address()?;
    match words.next() {
        Some(">") => {}
        Some(word) => return Err(wrong(word, "write > between source and destination")),
        None => return Err(WordsError::End(FORM)),
    }
    let mut address = || -> Result<BackendName, WordsError> {
        let word = words.next().ok_or(WordsError::End(FORM))?;
        word.parse().map_err(|_| wrong(word, ADDRESS))
    };
    let destination = address()?;
    let rest = rest(words, protocol)?;
    let to = rest.to.ok_or(WordsError::End(
        "write the MAC that the frame is sent to, like: to 12:13:14:15:16:17",
    ))?;
    let link = PacketBuilder::ethernet2(rest.from.0, to.0);
    let frame = match (source.ip, destination.ip, rest.vlan) {
        (IpAddr::V4(from), IpAddr::V4(to), Some(vlan)) => transport(
            link.single_vlan(vlan).ipv4(from.octets(), to.octets(), TTL),
            protocol,
            source,
            destination,
            &rest,
        ),
        (IpAddr::V4(from), IpAddr::V4(to), None) => {
            let step = link.ipv4(from.octets(), to.octets(), TTL);
            transport(step, protocol, source, destination, &rest)
        }
        (IpAddr::V6(from), IpAddr::V6(to), Some(vlan)) => transport(
            link.single_vlan(vlan).ipv6(from.octets(), to.octets(), TTL),
            protocol,
            source,
            destination,
            &rest,
        ),
        (IpAddr::V6(from), IpAddr::V6(to), None) => {
            let step = link.ipv6(from.octets(), to.octets(), TTL);
            transport(step, protocol, source, destination, &rest)
        }
        (from, to, _) => Err(WordsError::Families(from, to)),
    }?;
    Ok(WordedPacket { frame, network: rest.network })
}

/// The time to live, which nothing depends on.
const TTL: u8 = 64;

fn rest<'a>(
    mut words: impl Iterator<Item = &'a str>,
    protocol: Protocol,
) -> Result<Rest, WordsError> {
    let mut rest = Rest {
        flags: Vec::new(),
        icmp: (if protocol == Protocol::ICMPV6 { 128 } else { 8 }, 0),
        to: None,
        from: DEFAULT_SOURCE,
        vlan: None,
        network: None,
        payload: 0,
    };
    while let Some(word) = words.next() {
        let wrong = |word: &str, expected| WordsError::Word { word: word.to_string(), expected };
        let mut value = |expected| words.next().ok_or(WordsError::End(expected));
        let mac = |word: &str| word.parse().map_err(|_| wrong(word, "not a MAC address"));
        match word {
            "to" => rest.to = Some(mac(value("write a MAC behind 'to'")?)?),
            "from" => rest.from = mac(value("write a MAC behind 'from'")?)?,
            "on" => rest.network = Some(value("write a bridge behind 'on'")?.to_string()),
            "vlan" => {
                let word = value("write an id behind 'vlan'")?;
                let id = word.parse::<u16>().ok().and_then(|id| VlanId::try_new(id).ok());
                rest.vlan = Some(id.ok_or_else(|| wrong(word, "not a VLAN id"))?);
            }
            "type" | "code" => {
                let text = value("write a number behind 'type' and 'code'")?;
                let number = text.parse().map_err(|_| wrong(text, "not a number from 0 to 255"))?;
                if word == "type" {
                    rest.icmp.0 = number;
                } else {
                    rest.icmp.1 = number;
                }
            }
            "length" => {
                let word = value("write the bytes of payload behind 'length'")?;
                let length = word.parse().ok().filter(|length| *length <= MAX_PAYLOAD);
                rest.payload = length.ok_or_else(|| wrong(word, "not a length up to 1400"))?;
            }
            flags => {
                for flag in flags.split(',') {
                    let known = FLAGS.into_iter().find(|name| *name == flag);
                    let known = known.filter(|_| protocol == Protocol::TCP);
                    rest.flags.push(known.ok_or_else(|| wrong(word, REST))?);
                }
            }
        }
    }
    Ok(rest)
}

const FLAGS: [&str; 6] = ["syn", "ack", "fin", "rst", "psh", "urg"];
/// The longest payload: a request fits into one line.
const MAX_PAYLOAD: usize = 1400;

fn transport(
    step: PacketBuilderStep<etherparse::IpHeaders>,
    protocol: Protocol,
    source: BackendName,
    destination: BackendName,
    rest: &Rest,
) -> Result<Vec<u8>, WordsError> {
    let ports = source.port.zip(destination.port);
    let has_port = source.port.is_some() || destination.port.is_some();
    let need_ports =
        || ports.ok_or(WordsError::Ports(protocol, "need both ports, like 10.0.0.9:80"));
    let payload = vec![0; rest.payload];
    let mut frame = Vec::new();
    let written = match protocol {
        Protocol::TCP => {
            let (from, to) = need_ports()?;
            let mut tcp = step.tcp(from, to, 1, 65535);
            for flag in &rest.flags {
                tcp = match *flag {
                    "syn" => tcp.syn(),
                    "ack" => tcp.ack(1),
                    "fin" => tcp.fin(),
                    "rst" => tcp.rst(),
                    "psh" => tcp.psh(),
                    _ => tcp.urg(0),
                };
            }
            tcp.write(&mut frame, &payload)
        }
        Protocol::UDP => {
            let (from, to) = need_ports()?;
            step.udp(from, to).write(&mut frame, &payload)
        }
        _ if has_port => return Err(WordsError::Ports(protocol, "have no ports")),
        Protocol::ICMP => {
            step.icmpv4_raw(rest.icmp.0, rest.icmp.1, [0; 4]).write(&mut frame, &payload)
        }
        Protocol::ICMPV6 => {
            step.icmpv6_raw(rest.icmp.0, rest.icmp.1, [0; 4]).write(&mut frame, &payload)
        }
        Protocol(number) => step.write(&mut frame, IpNumber(number), &payload),
    };
    // Writing into a vector does not fail, and the payload is short.
    written.map(|()| frame).map_err(|_| WordsError::End(FORM))
}

/// Parses a frame in hexadecimal digits; blanks, colons and dashes between them do not count.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace() && !b":-".contains(byte))
        .map(|byte| char::from(byte).to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    Some(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// Returns a frame in hexadecimal digits.
pub fn to_hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The EtherType of a frame without an IP packet, for its description.
pub(super) fn ether_type_name(number: u16) -> String {
    match EtherType(number) {
        EtherType::ARP => "ARP".to_string(),
        _ => format!("EtherType 0x{number:04x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::packet::Packet;

    #[test]
    fn words_become_the_packet_that_they_describe() {
        let text =
            "tcp 10.0.0.9:40000 > 10.129.126.15:80 syn,ack to 12:13:14:15:16:17 vlan 100 on br0";
        let worded = parse(text).unwrap();
        let packet = Packet::from_frame(&worded.frame).unwrap();
        let ip = packet.ip.unwrap();
        assert_eq!(worded.network.as_deref(), Some("br0"));
        assert_eq!(packet.link.destination.to_string(), "12:13:14:15:16:17");
        assert_eq!((packet.link.vlan_id(), ip.tcp_flags), (Some(100), Some(0x12)));
        assert_eq!(ip.ports.map(|ports| (ports.source, ports.destination)), Some((40000, 80)));
        let udp = parse("UDP [2001:db8::9]:1 > [2001:db8::15]:53 to 2:0:0:0:0:1 length 9").unwrap();
        let ip = Packet::from_frame(&udp.frame).unwrap().ip.unwrap();
        assert_eq!((ip.protocol, ip.length), (Protocol::UDP, 40 + 8 + 9));
        let icmp = parse("icmp 10.0.0.1 > 10.0.0.2 type 3 code 1 to 2:0:0:0:0:1").unwrap();
        let ip = Packet::from_frame(&icmp.frame).unwrap().ip.unwrap();
        assert_eq!((ip.icmp_type, ip.icmp_code), (Some(3), Some(1)));
        let gre = parse("47 10.0.0.1 > 10.0.0.2 to 2:0:0:0:0:1 from 2:0:0:0:0:2").unwrap();
        let packet = Packet::from_frame(&gre.frame).unwrap();
        assert_eq!(packet.ip.unwrap().protocol, Protocol(47));
        assert_eq!(packet.link.source.to_string(), "02:00:00:00:00:02");
    }

    #[test]
    fn what_is_no_packet_is_named() {
        for (text, expected) in [
            ("", "write one like tcp"),
            ("tpc 10.0.0.1:1 > 10.0.0.2:2 to 2:0:0:0:0:1", "'tpc': not a protocol"),
            ("tcp 10.0.0.1:1 < 10.0.0.2:2", "'<': write >"),
            ("tcp 10.0.0.1:1 > 10.0.0.2:2 syn", "write the MAC"),
            ("tcp 10.0.0.1 > 10.0.0.2:2 to 2:0:0:0:0:1", "need both ports"),
            ("icmp 10.0.0.1:1 > 10.0.0.2 to 2:0:0:0:0:1", "have no ports"),
            ("udp 10.0.0.1:1 > [::1]:2 to 2:0:0:0:0:1", "not of one family"),
            ("udp 10.0.0.1:1 > 10.0.0.2:2 syn to 2:0:0:0:0:1", "'syn': not expected"),
            ("tcp 10.0.0.1:1 > 10.0.0.2:2 to here", "'here': not a MAC"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn hexadecimal_digits_are_read_with_blanks_and_colons() {
        assert_eq!(from_hex("02:00 0a-ff"), Some(vec![2, 0, 10, 255]));
        assert_eq!(from_hex(&to_hex(&[1, 0xab])), Some(vec![1, 0xab]));
        assert_eq!((from_hex("123"), from_hex("0g")), (None, None));
    }
}
