//! Lowering of statements to the expressions of nf_tables, which are data here: [`super::sys`]
//! hands them to libnftnl.
//!
//! Registers: 0 is the verdict; the sixteen 32-bit registers (NFT_REG32_00 to 15) are 8 to 23
//! (linux/netfilter/nf_tables.h). A field takes as many as its length needs, rounded up.

use super::field::{Field, Type, Value};
use super::model::{Queues, Statement, Verdict, Write};
use crate::mark;
use nftnl::nftnl_sys as sys;

/// An expression: its kind and its attributes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Expr {
    pub kind: &'static str,
    pub attributes: Vec<(u32, Attribute)>,
}

/// The value of an attribute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Attribute {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Text(String),
    /// At most 64 bytes.
    Bytes(Vec<u8>),
    /// Bytes in memory that libnftnl takes over and frees.
    Owned(Vec<u8>),
}

use Attribute::{Bytes, Owned, Text, U8, U16, U32, U64};

const VERDICT: u32 = 0;
const R0: u32 = 8;
/// The register behind the longest key, of 13 registers.
const SAVED_MARK: u32 = R0 + 13;

const LINK: u32 = 0;
const NETWORK: u32 = 1;
const TRANSPORT: u32 = 2;

const META_PROTOCOL: u32 = 1;
const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_L4PROTO: u32 = 16;

const CMP_EQ: u32 = 0;
const CMP_NEQ: u32 = 1;
const CMP_LTE: u32 = 3;
const CMP_GTE: u32 = 5;

const DYNSET_ADD: u32 = 0;
const DYNSET_UPDATE: u32 = 1;
const DYNSET_DELETE: u32 = 2;

fn expr(kind: &'static str, attributes: Vec<(u32, Attribute)>) -> Expr {
    Expr { kind, attributes }
}

fn meta(key: u32, register: u32) -> Expr {
    expr(
        "meta",
        vec![(sys::NFTNL_EXPR_META_KEY, U32(key)), (sys::NFTNL_EXPR_META_DREG, U32(register))],
    )
}

fn set_mark(register: u32) -> Expr {
    expr(
        "meta",
        vec![
            (sys::NFTNL_EXPR_META_KEY, U32(META_MARK)),
            (sys::NFTNL_EXPR_META_SREG, U32(register)),
        ],
    )
}

fn payload(base: u32, offset: u32, len: u32, register: u32) -> Expr {
    expr(
        "payload",
        vec![
            (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(base)),
            (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(offset)),
            (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(len)),
            (sys::NFTNL_EXPR_PAYLOAD_DREG, U32(register)),
        ],
    )
}

fn compare(operator: u32, register: u32, bytes: Vec<u8>) -> Expr {
    expr(
        "cmp",
        vec![
            (sys::NFTNL_EXPR_CMP_SREG, U32(register)),
            (sys::NFTNL_EXPR_CMP_OP, U32(operator)),
            (sys::NFTNL_EXPR_CMP_DATA, Bytes(bytes)),
        ],
    )
}

/// `register = (register & mask) ^ xor`.
fn bitwise(register: u32, mask: &[u8], xor: &[u8]) -> Expr {
    expr(
        "bitwise",
        vec![
            (sys::NFTNL_EXPR_BITWISE_SREG, U32(register)),
            (sys::NFTNL_EXPR_BITWISE_DREG, U32(register)),
            (sys::NFTNL_EXPR_BITWISE_LEN, U32(mask.len() as u32)),
            (sys::NFTNL_EXPR_BITWISE_MASK, Bytes(mask.to_vec())),
            (sys::NFTNL_EXPR_BITWISE_XOR, Bytes(xor.to_vec())),
        ],
    )
}

fn lookup(set: &str, from: u32, to: Option<u32>) -> Expr {
    let mut attributes = vec![
        (sys::NFTNL_EXPR_LOOKUP_SREG, U32(from)),
        (sys::NFTNL_EXPR_LOOKUP_SET, Text(set.to_string())),
    ];
    attributes.extend(to.map(|to| (sys::NFTNL_EXPR_LOOKUP_DREG, U32(to))));
    expr("lookup", attributes)
}

/// The element lives for `timeout` seconds, or as long as the set says.
fn dynset(operation: u32, set: &str, data: Option<u32>, timeout: Option<u32>) -> Expr {
    let mut attributes = vec![
        (sys::NFTNL_EXPR_DYNSET_SET_NAME, Text(set.to_string())),
        (sys::NFTNL_EXPR_DYNSET_OP, U32(operation)),
        (sys::NFTNL_EXPR_DYNSET_SREG_KEY, U32(R0)),
    ];
    attributes.extend(data.map(|data| (sys::NFTNL_EXPR_DYNSET_SREG_DATA, U32(data))));
    let milliseconds = timeout.map(|seconds| U64(u64::from(seconds) * 1000));
    attributes.extend(milliseconds.map(|timeout| (sys::NFTNL_EXPR_DYNSET_TIMEOUT, timeout)));
    expr("dynset", attributes)
}

/// The numbers of verdicts (NF_DROP, NF_ACCEPT, NFT_JUMP, NFT_GOTO, NFT_RETURN) and the chain they
/// name.
pub(super) fn verdict_number(verdict: &Verdict) -> (i32, Option<&str>) {
    match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    }
}

/// Loads from the first fragment header of IPv6.
fn fragment_header(register: u32, offset: u32, len: u32, flags: u32) -> Expr {
    const FRAGMENT_HEADER: u8 = 44;
    expr(
        "exthdr",
        vec![
            (sys::NFTNL_EXPR_EXTHDR_DREG, U32(register)),
            (sys::NFTNL_EXPR_EXTHDR_TYPE, U8(FRAGMENT_HEADER)),
            (sys::NFTNL_EXPR_EXTHDR_OFFSET, U32(offset)),
            (sys::NFTNL_EXPR_EXTHDR_LEN, U32(len)),
            (sys::NFTNL_EXPR_EXTHDR_FLAGS, U32(flags)),
        ],
    )
}

/// Loads a field into a register and those behind it.
fn load(field: Field, register: u32) -> Vec<Expr> {
    let len = field.len() as u32;
    let masked = |base: u32, offset: u32, mask: u16| {
        vec![payload(base, offset, len, register), bitwise(register, &mask.to_be_bytes(), &[0; 2])]
    };
    match field {
        Field::EtherDestination => vec![payload(LINK, 0, len, register)],
        Field::EtherSource => vec![payload(LINK, 6, len, register)],
        Field::OuterType => vec![payload(LINK, 12, len, register)],
        Field::VlanId => masked(LINK, 14, 0x0fff),
        Field::EtherType => vec![meta(META_PROTOCOL, register)],
        Field::L4Protocol => vec![meta(META_L4PROTO, register)],
        Field::InputInterface => vec![meta(META_IIF, register)],
        Field::OutputInterface => vec![meta(META_OIF, register)],
        Field::Mark(u32::MAX) => vec![meta(META_MARK, register)],
        Field::Mark(mask) => {
            vec![meta(META_MARK, register), bitwise(register, &mask.to_ne_bytes(), &[0; 4])]
        }
        Field::ArpSenderMac => vec![payload(NETWORK, 8, len, register)],
        Field::ArpSenderIp => vec![payload(NETWORK, 14, len, register)],
        Field::AdvertisedIp6 => vec![payload(TRANSPORT, 8, len, register)],
        Field::Ip4Tos => vec![payload(NETWORK, 1, len, register)],
        Field::Ip4FragmentOffset(mask) => masked(NETWORK, 6, mask),
        Field::Ip4Source => vec![payload(NETWORK, 12, len, register)],
        Field::Ip4Destination => vec![payload(NETWORK, 16, len, register)],
        Field::Ip6TrafficClass => masked(NETWORK, 0, 0x0ff0),
        Field::Ip6NextHeader => vec![payload(NETWORK, 6, len, register)],
        Field::Ip6HopLimit => vec![payload(NETWORK, 7, len, register)],
        Field::Ip6Source => vec![payload(NETWORK, 8, len, register)],
        Field::Ip6Destination => vec![payload(NETWORK, 24, len, register)],
        Field::SourcePort => vec![payload(TRANSPORT, 0, len, register)],
        Field::DestinationPort => vec![payload(TRANSPORT, 2, len, register)],
        Field::Ip6FragmentOffset => {
            vec![
                fragment_header(register, 2, len, 0),
                bitwise(register, &0xfff8_u16.to_be_bytes(), &[0; 2]),
            ]
        }
        Field::Ip6FragmentNext => vec![fragment_header(register, 0, len, 0)],
        Field::Ip6FragmentHeader => {
            const PRESENT: u32 = 1;
            vec![fragment_header(register, 0, len, PRESENT)]
        }
        Field::Ip4Length => vec![payload(NETWORK, 2, len, register)],
        Field::Ip6Length => vec![payload(NETWORK, 4, len, register)],
        Field::TcpFlags => vec![payload(TRANSPORT, 13, len, register)],
        Field::IcmpType | Field::Icmp6Type => vec![payload(TRANSPORT, 0, len, register)],
        Field::IcmpCode | Field::Icmp6Code => vec![payload(TRANSPORT, 1, len, register)],
        // Behind the ICMP header of 8 bytes, at the offset of the address in IPv4 and IPv6 headers.
        Field::QuotedIp4Destination => vec![payload(TRANSPORT, 8 + 16, len, register)],
        Field::QuotedIp6Destination => vec![payload(TRANSPORT, 8 + 24, len, register)],
        Field::UdpChecksum => vec![payload(TRANSPORT, 6, len, register)],
        Field::TcpChecksum => vec![payload(TRANSPORT, 16, len, register)],
    }
}

/// Loads the parts of a key one behind the other from `R0`; returns the register behind them.
fn load_key(fields: &[Field]) -> (Vec<Expr>, u32) {
    let mut register = R0;
    let mut out = Vec::new();
    for &field in fields {
        out.extend(load(field, register));
        register += field.registers();
    }
    (out, register)
}

fn value_bytes(field: Field, value: Value) -> Vec<u8> {
    match (field, value) {
        (Field::Ip6TrafficClass, Value::Tos(tos)) => (u16::from(tos) << 4).to_be_bytes().to_vec(),
        _ => value.bytes(),
    }
}

/// Writes a register into an address or port. The kernel updates the IPv4 header's checksum (at
/// byte 10) and, by NFT_PAYLOAD_L4CSUM_PSEUDOHDR, that of TCP, UDP and ICMPv6: for ports, too,
/// because the flag leaves an absent checksum alone.
fn write(field: Field, register: u32) -> Expr {
    let (base, offset, checksum) = match field {
        Field::Ip4Source => (NETWORK, 12, Some(Some(10))),
        Field::Ip4Destination => (NETWORK, 16, Some(Some(10))),
        Field::Ip6Source => (NETWORK, 8, Some(None)),
        Field::Ip6Destination => (NETWORK, 24, Some(None)),
        Field::SourcePort => (TRANSPORT, 0, Some(None)),
        Field::DestinationPort => (TRANSPORT, 2, Some(None)),
        Field::EtherSource => (LINK, 6, None),
        _ => (LINK, 0, None),
    };
    let mut attributes = vec![
        (sys::NFTNL_EXPR_PAYLOAD_SREG, U32(register)),
        (sys::NFTNL_EXPR_PAYLOAD_BASE, U32(base)),
        (sys::NFTNL_EXPR_PAYLOAD_OFFSET, U32(offset)),
        (sys::NFTNL_EXPR_PAYLOAD_LEN, U32(field.len() as u32)),
    ];
    if let Some(header) = checksum {
        const INET: u32 = 1;
        const PSEUDO_HEADER: u32 = 1;
        attributes.push((
            sys::NFTNL_EXPR_PAYLOAD_CSUM_TYPE,
            U32(if header.is_some() { INET } else { 0 }),
        ));
        attributes.push((sys::NFTNL_EXPR_PAYLOAD_CSUM_OFFSET, U32(header.unwrap_or(0))));
        attributes.push((sys::NFTNL_EXPR_PAYLOAD_FLAGS, U32(PSEUDO_HEADER)));
    }
    expr("payload", attributes)
}

/// Looks up every address of the slot in `slot` before the first is written, so that a missing one
/// writes none.
fn look_up_then_write(writes: &[Write], slot: Field, between: Option<Expr>) -> Vec<Expr> {
    let mut out = load(slot, R0);
    let mut register = R0 + 1;
    let mut last = Vec::new();
    for Write { field, map } in writes {
        out.push(lookup(map, R0, Some(register)));
        last.push(write(*field, register));
        register += field.registers();
    }
    out.extend(between);
    out.extend(last);
    out
}

fn queue_bits(queues: Queues) -> u16 {
    u16::from(queues.bypass)
}

/// Returns the expressions of a statement.
pub(super) fn lower(statement: &Statement) -> Vec<Expr> {
    match statement {
        Statement::Is(field, value) => {
            [load(*field, R0), vec![compare(CMP_EQ, R0, value_bytes(*field, *value))]].concat()
        }
        Statement::IsNot(field, value) => {
            [load(*field, R0), vec![compare(CMP_NEQ, R0, value_bytes(*field, *value))]].concat()
        }
        Statement::Between(field, first, last) => [
            load(*field, R0),
            vec![compare(CMP_GTE, R0, first.bytes()), compare(CMP_LTE, R0, last.bytes())],
        ]
        .concat(),
        Statement::Masked(field, mask, bits) => {
            let (mask, bits) = (mask.bytes(), bits.bytes());
            let zero = vec![0; mask.len()];
            [load(*field, R0), vec![bitwise(R0, &mask, &zero), compare(CMP_EQ, R0, bits)]].concat()
        }
        Statement::Present(field) => {
            [load(*field, R0), vec![compare(CMP_GTE, R0, vec![0; field.len()])]].concat()
        }
        Statement::In(key, set) => [load_key(key).0, vec![lookup(set, R0, None)]].concat(),
        Statement::Vmap(key, map) => {
            [load_key(key).0, vec![lookup(map, R0, Some(VERDICT))]].concat()
        }
        Statement::SetMark { keep, set } => {
            let change = bitwise(R0, &keep.to_ne_bytes(), &set.to_ne_bytes());
            vec![meta(META_MARK, R0), change, set_mark(R0)]
        }
        Statement::Rewrite(writes) => look_up_then_write(writes, Field::Mark(mark::ID), None),
        Statement::RewriteBy { key, write: Write { field, map } } => {
            [load(*key, R0), vec![lookup(map, R0, Some(R0)), write(*field, R0)]].concat()
        }
        Statement::RewriteFlow { key, flows, writes } => {
            // nft of Debian 12 aborts on a look-up whose key is another look-up's result, so the
            // slot goes through the mark and the mark's own value through a register.
            let (mut out, _) = load_key(key);
            out.insert(0, meta(META_MARK, SAVED_MARK));
            out.push(lookup(flows, R0, Some(R0)));
            out.push(set_mark(R0));
            out.extend(look_up_then_write(
                writes,
                Field::Mark(u32::MAX),
                Some(set_mark(SAVED_MARK)),
            ));
            out
        }
        Statement::MarkFlow { key, flows, slots, operation } => {
            let (mut out, _) = load_key(key);
            out.extend([lookup(flows, R0, Some(R0)), set_mark(R0)]);
            out.extend(load(Field::Mark(u32::MAX), R0));
            out.push(lookup(slots, R0, Some(R0 + 1)));
            let change = bitwise(R0, &(!operation).to_ne_bytes(), &operation.to_ne_bytes());
            out.extend([meta(META_MARK, R0), change, set_mark(R0)]);
            out
        }
        Statement::Learn { key, map, timeout } => {
            let (mut out, data) = load_key(key);
            out.extend(load(Field::Mark(mark::ID), data));
            out.push(dynset(DYNSET_DELETE, map, Some(data), None));
            out.push(dynset(DYNSET_ADD, map, Some(data), *timeout));
            out
        }
        Statement::Note { key, data, map } => {
            let (mut out, register) = load_key(&[*key]);
            out.extend(load(*data, register));
            out.push(dynset(DYNSET_DELETE, map, Some(register), None));
            out.push(dynset(DYNSET_ADD, map, Some(register), None));
            out
        }
        Statement::Remember { key, set, timeout } => {
            [load_key(key).0, vec![dynset(DYNSET_UPDATE, set, None, *timeout)]].concat()
        }
        Statement::Forget { key, set } => {
            [load_key(key).0, vec![dynset(DYNSET_DELETE, set, None, None)]].concat()
        }
        // Deleting from a map needs data, of which only the key is used.
        Statement::ForgetFlow { key, map } => {
            let (mut out, data) = load_key(key);
            out.extend(load(Field::Mark(mark::ID), data));
            out.push(dynset(DYNSET_DELETE, map, Some(data), None));
            out
        }
        Statement::Queue(queues) => {
            const SYMMETRIC: u32 = 1;
            let hash = vec![
                (sys::NFTNL_EXPR_HASH_TYPE, U32(SYMMETRIC)),
                (sys::NFTNL_EXPR_HASH_DREG, U32(R0)),
                (sys::NFTNL_EXPR_HASH_MODULUS, U32(u32::from(queues.count))),
                (sys::NFTNL_EXPR_HASH_OFFSET, U32(u32::from(queues.first))),
            ];
            let queue = vec![
                (sys::NFTNL_EXPR_QUEUE_SREG_QNUM, U32(R0)),
                (sys::NFTNL_EXPR_QUEUE_FLAGS, U16(queue_bits(*queues))),
            ];
            vec![expr("hash", hash), expr("queue", queue)]
        }
        Statement::XtQueue(queues) => {
            // struct xt_NFQ_info_v3: first queue, number of queues, flags.
            let info: Vec<u8> = [queues.first, queues.count, queue_bits(*queues)]
                .into_iter()
                .flat_map(u16::to_ne_bytes)
                .collect();
            vec![expr(
                "target",
                vec![
                    (sys::NFTNL_EXPR_TG_NAME, Text("NFQUEUE".to_string())),
                    (sys::NFTNL_EXPR_TG_REV, U32(3)),
                    (sys::NFTNL_EXPR_TG_INFO, Owned(info)),
                ],
            )]
        }
        Statement::Counter => vec![counter()],
        Statement::Verdict(verdict) => {
            let (number, chain) = verdict_number(verdict);
            let mut attributes = vec![
                (sys::NFTNL_EXPR_IMM_DREG, U32(VERDICT)),
                (sys::NFTNL_EXPR_IMM_VERDICT, U32(number as u32)),
            ];
            attributes
                .extend(chain.map(|chain| (sys::NFTNL_EXPR_IMM_CHAIN, Text(chain.to_string()))));
            vec![expr("immediate", attributes)]
        }
    }
}

/// Returns the expression that counts packets and bytes.
pub(super) fn counter() -> Expr {
    expr("counter", Vec::new())
}

/// Returns nft's number for a key of several parts: six bits each.
pub(super) fn key_type(parts: &[Type]) -> u32 {
    parts.iter().fold(0, |number, part| number << 6 | part.number())
}

/// Returns the length of a key in bytes: several parts are padded to four each.
pub(super) fn key_len(parts: &[Type]) -> u32 {
    match parts {
        [one] => one.len() as u32,
        _ => parts.iter().map(|part| part.len().next_multiple_of(4) as u32).sum(),
    }
}

/// Returns the bytes of a key.
pub(super) fn key_bytes(parts: &[Value]) -> Vec<u8> {
    match parts {
        [one] => one.bytes(),
        _ => {
            let mut out = Vec::new();
            for part in parts {
                out.extend(part.bytes());
                out.resize(out.len().next_multiple_of(4), 0);
            }
            out
        }
    }
}
