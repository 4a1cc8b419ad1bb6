//! Dump requests to the kernel, and their answers.
#![allow(unsafe_code)]

use super::super::lower::{key_len, key_type};
use super::super::model::{Data, Family, Set, TABLE_NAME};
use super::TableFlags;
use super::{
    ChainObject, DATA_VERDICT, RuleObject, SET_EVAL, SET_INTERVAL, SET_MAP, SET_TIMEOUT, SetObject,
    TableObject, message, named_set, named_table, number,
};
use crate::counter::Counter;
use crate::netlink::{HEADER, attributes};
use nftnl::nftnl_sys as sys;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_void};

/// A request to the kernel: the message to send, and how to parse the answers.
pub(in crate::nft) enum DumpRequest {
    /// The comment of our table.
    Table(Family),
    /// The chains of all tables of the family.
    Chains(Family),
    /// Our sets.
    Sets(Family),
    /// The elements of one of our sets.
    Elements(Family, String),
    /// The rules of our table, or of one chain.
    Rules(Family, Option<String>),
}

/// The counter of a rule in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::nft) struct FoundRule {
    /// The kernel's number of the rule.
    pub handle: u64,
    pub chain: String,
    pub comment: Option<String>,
    pub counter: Option<Counter>,
}

/// An element in the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoundElement {
    /// The key's bytes.
    pub key: Vec<u8>,
    /// The data's bytes; empty for sets and verdicts.
    pub data: Vec<u8>,
    /// The comment.
    pub comment: Option<String>,
    /// The counter, if elements of the set count.
    pub counter: Option<Counter>,
    /// The lifetime in milliseconds, if it differs from the set's.
    pub timeout_ms: Option<u64>,
    /// The rest of the lifetime in milliseconds, if elements of the set expire.
    pub expires_ms: Option<u64>,
}

/// The kind of a set in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::nft) struct FoundSet {
    pub key: u32,
    pub key_len: u32,
    pub flags: u32,
    pub data: u32,
    /// The fill, if the kernel tells it.
    pub fill: Option<SetFill>,
}

/// The number of elements of a set, and the number that it has room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SetFill {
    /// The number of elements, those included that have expired and are not removed yet.
    pub count: u32,
    /// The room.
    pub size: u32,
}

/// Returns the fill of a set from a message about it: from Linux 6.17 on (`NFTA_SET_COUNT` in
/// uapi/linux/netfilter/nf_tables.h). libnftnl does not know the attribute yet.
fn fill(message: &[u8]) -> Option<SetFill> {
    const FAMILY_HEADER: usize = 4;
    const DESC: u16 = 9;
    const DESC_SIZE: u16 = 1;
    const COUNT: u16 = 20;
    /// The bits of a type that are no flags.
    const TYPE: u16 = 0x3fff;
    let body = message.get(HEADER + FAMILY_HEADER..)?;
    let find = |bytes, kind| attributes(bytes).find(|(found, _)| found & TYPE == kind);
    let number = |(_, value): (u16, &[u8])| Some(u32::from_be_bytes(*value.first_chunk()?));
    let count = find(body, COUNT).and_then(number)?;
    let size = find(find(body, DESC)?.1, DESC_SIZE).and_then(number)?;
    Some(SetFill { count, size })
}

impl FoundSet {
    /// Whether the kernel's set serves as `set`.
    pub(in crate::nft) fn is_compatible(self, set: &Set) -> bool {
        let data = match set.data {
            None => 0,
            Some(Data::Verdict) => DATA_VERDICT,
            Some(Data::Value(data)) => data.number(),
        };
        let wanted = (SET_MAP * u32::from(set.data.is_some()))
            | ((SET_EVAL | SET_TIMEOUT) * u32::from(set.dynamic.is_some()))
            | (SET_INTERVAL * u32::from(set.interval));
        self.key == key_type(&set.key)
            && self.key_len == key_len(&set.key)
            && self.data == data
            && self.flags & (SET_MAP | SET_EVAL | SET_TIMEOUT | SET_INTERVAL) == wanted
    }
}

/// The answers to a [`DumpRequest`].
#[derive(Default)]
pub(in crate::nft) struct DumpReply {
    pub table_comment: Option<Option<String>>,
    pub table_flags: TableFlags,
    /// The chains: name, and whether it is a base chain.
    pub chains: BTreeMap<String, bool>,
    pub sets: BTreeMap<String, FoundSet>,
    pub elements: Vec<FoundElement>,
    pub rules: Vec<FoundRule>,
}

impl DumpRequest {
    /// Returns the request as a message with this number.
    pub(in crate::nft) fn message(&self, sequence: u32) -> Vec<u8> {
        let mut scratch = vec![0_u32; 1024];
        let dump = libc::NLM_F_DUMP as u16;
        let header = |kind: u16, family: Family, flags: u16, buffer: *mut u32| {
            let family = number(family);
            // SAFETY: needed for a message's header; the buffer is aligned and larger than a
            // header.
            unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast(), kind, family, flags, sequence) }
        };
        let buffer = scratch.as_mut_ptr();
        let header = match self {
            DumpRequest::Table(family) => {
                let (table, header) =
                    (named_table(*family), header(message::GETTABLE, *family, 0, buffer));
                // SAFETY: needed to name the table in the message; both are alive.
                unsafe { sys::nftnl_table_nlmsg_build_payload(header, table.0.pointer) };
                header
            }
            DumpRequest::Chains(family) => header(message::GETCHAIN, *family, dump, buffer),
            DumpRequest::Sets(family) => {
                let set = SetObject::new();
                set.str(sys::NFTNL_SET_TABLE, TABLE_NAME);
                let header = header(message::GETSET, *family, dump, buffer);
                // SAFETY: needed to name the table in the message; both are alive.
                unsafe { sys::nftnl_set_nlmsg_build_payload(header, set.0.pointer) };
                header
            }
            DumpRequest::Rules(family, chain) => {
                let rule = RuleObject::new();
                rule.str(sys::NFTNL_RULE_TABLE, TABLE_NAME);
                if let Some(chain) = chain {
                    rule.str(sys::NFTNL_RULE_CHAIN, chain);
                }
                let header = header(message::GETRULE, *family, dump, buffer);
                // SAFETY: needed to name the table in the message; both are alive.
                unsafe { sys::nftnl_rule_nlmsg_build_payload(header, rule.0.pointer) };
                header
            }
            DumpRequest::Elements(family, name) => {
                let (set, header) =
                    (named_set(name), header(message::GETSETELEM, *family, dump, buffer));
                // SAFETY: needed to name the set in the message; both are alive.
                unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header, set.0.pointer) };
                header
            }
        };
        // SAFETY: needed to learn the length that libnftnl has written; the header is the start of
        // the scratch buffer.
        let len = unsafe { (*header).nlmsg_len } as usize;
        scratch.iter().flat_map(|word| word.to_ne_bytes()).take(len).collect()
    }

    /// Parses one message of the kernel's answer, header included.
    pub(in crate::nft) fn read(&self, bytes: &[u8], answers: &mut DumpReply) {
        // libnftnl needs the message aligned.
        let mut words: Vec<u32> = vec![0; bytes.len().div_ceil(4)];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(4)) {
            let mut four = [0; 4];
            four[..chunk.len()].copy_from_slice(chunk);
            *word = u32::from_ne_bytes(four);
        }
        let header: *const libc::nlmsghdr = words.as_ptr().cast();
        match self {
            DumpRequest::Table(_) => {
                let table = TableObject::new();
                // SAFETY: needed to read the message, whose length the caller has checked against
                // its header.
                if unsafe { sys::nftnl_table_nlmsg_parse(header, table.0.pointer) } == 0 {
                    let mut len = 0;
                    let kind = sys::NFTNL_TABLE_USERDATA as u16;
                    // SAFETY: needed to get the comment; what comes back lives as long as the
                    // table.
                    let data = unsafe {
                        slice(sys::nftnl_table_get_data(table.0.pointer, kind, &mut len), len)
                    };
                    answers.table_comment = Some(comment_of(data, 0));
                    let kind = sys::NFTNL_TABLE_FLAGS as u16;
                    // SAFETY: as above; a table without flags gives 0.
                    let flags = unsafe { sys::nftnl_table_get_u32(table.0.pointer, kind) };
                    answers.table_flags = TableFlags(flags);
                }
            }
            DumpRequest::Chains(_) => {
                let chain = ChainObject::new();
                // SAFETY: as above.
                unsafe {
                    if sys::nftnl_chain_nlmsg_parse(header, chain.0.pointer) == 0 {
                        let get = |kind: u32| {
                            text(sys::nftnl_chain_get_str(chain.0.pointer, kind as u16))
                        };
                        let base = sys::nftnl_chain_is_set(
                            chain.0.pointer,
                            sys::NFTNL_CHAIN_HOOKNUM as u16,
                        );
                        if get(sys::NFTNL_CHAIN_TABLE).as_deref() == Some(TABLE_NAME) {
                            answers
                                .chains
                                .extend(get(sys::NFTNL_CHAIN_NAME).map(|name| (name, base)));
                        }
                    }
                }
            }
            DumpRequest::Sets(_) => {
                let set = SetObject::new();
                // SAFETY: as above.
                unsafe {
                    if sys::nftnl_set_nlmsg_parse(header, set.0.pointer) == 0 {
                        let get = |kind: u32| sys::nftnl_set_get_u32(set.0.pointer, kind as u16);
                        let has_data =
                            sys::nftnl_set_is_set(set.0.pointer, sys::NFTNL_SET_DATA_TYPE as u16);
                        let found = FoundSet {
                            key: get(sys::NFTNL_SET_KEY_TYPE),
                            key_len: get(sys::NFTNL_SET_KEY_LEN),
                            flags: get(sys::NFTNL_SET_FLAGS),
                            data: if has_data { get(sys::NFTNL_SET_DATA_TYPE) } else { 0 },
                            fill: fill(bytes),
                        };
                        let name =
                            text(sys::nftnl_set_get_str(set.0.pointer, sys::NFTNL_SET_NAME as u16));
                        answers.sets.extend(name.map(|name| (name, found)));
                    }
                }
            }
            DumpRequest::Rules(..) => {
                let rule = RuleObject::new();
                let mut counter: Option<Counter> = None;
                let mut len = 0;
                let counter_out: *mut Option<Counter> = &mut counter;
                // SAFETY: as above; the callback gets a pointer to `counter`, which outlives the
                // call.
                unsafe {
                    if sys::nftnl_rule_nlmsg_parse(header, rule.0.pointer) != 0 {
                        return;
                    }
                    sys::nftnl_expr_foreach(
                        rule.0.pointer,
                        Some(on_expression),
                        counter_out.cast(),
                    );
                    let get =
                        |kind: u32| text(sys::nftnl_rule_get_str(rule.0.pointer, kind as u16));
                    let kind = sys::NFTNL_RULE_USERDATA as u16;
                    let data = slice(sys::nftnl_rule_get_data(rule.0.pointer, kind, &mut len), len);
                    if get(sys::NFTNL_RULE_TABLE).as_deref() == Some(TABLE_NAME)
                        && let Some(chain) = get(sys::NFTNL_RULE_CHAIN)
                    {
                        let kind = sys::NFTNL_RULE_HANDLE as u16;
                        answers.rules.push(FoundRule {
                            handle: sys::nftnl_rule_get_u64(rule.0.pointer, kind),
                            chain,
                            comment: comment_of(data, 0),
                            counter,
                        });
                    }
                }
            }
            DumpRequest::Elements(..) => {
                let set = SetObject::new();
                // SAFETY: as above; the callback gets a pointer to `answers.elements`, which
                // outlives the call.
                unsafe {
                    if sys::nftnl_set_elems_nlmsg_parse(header, set.0.pointer) == 0 {
                        let out: *mut Vec<FoundElement> = &mut answers.elements;
                        sys::nftnl_set_elem_foreach(set.0.pointer, Some(on_element), out.cast());
                    }
                }
            }
        }
    }
}

/// # Safety
/// `pointer` is null or points to `len` bytes that live as long as `'a`.
unsafe fn slice<'a>(pointer: *const c_void, len: u32) -> &'a [u8] {
    if pointer.is_null() {
        return &[];
    }
    // SAFETY: needed to read what libnftnl points to; by the contract of this function.
    unsafe { std::slice::from_raw_parts(pointer.cast(), len as usize) }
}

/// # Safety
/// `pointer` is null or points to a string that ends with NUL.
unsafe fn text(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: needed to read what libnftnl points to; by the contract of this function.
    Some(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
}

/// Returns the comment in a list of user data.
fn comment_of(mut data: &[u8], kind: u8) -> Option<String> {
    while let [found, len, rest @ ..] = data {
        let (bytes, after) = rest.split_at_checked(usize::from(*len))?;
        if *found == kind {
            let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        data = after;
    }
    None
}

/// # Safety
/// Called by libnftnl with a live element and the pointer to a `Vec<FoundElement>` that it was given.
unsafe extern "C" fn on_element(pointer: *mut sys::nftnl_set_elem, out: *mut c_void) -> i32 {
    let get = |kind: u32| {
        let mut len = 0;
        // SAFETY: needed to read the element, which is alive; what comes back lives as long as it.
        unsafe { slice(sys::nftnl_set_elem_get(pointer, kind as u16, &mut len), len) }
    };
    // SAFETY: as above.
    let has = |kind: u32| unsafe { sys::nftnl_set_elem_is_set(pointer, kind as u16) };
    let data = if has(sys::NFTNL_SET_ELEM_DATA) {
        get(sys::NFTNL_SET_ELEM_DATA).to_vec()
    } else {
        Vec::new()
    };
    let comment = if has(sys::NFTNL_SET_ELEM_USERDATA) {
        comment_of(get(sys::NFTNL_SET_ELEM_USERDATA), 0)
    } else {
        None
    };
    let mut counter: Option<Counter> = None;
    let counter_out: *mut Option<Counter> = &mut counter;
    // SAFETY: needed to reach the counter; the element and `counter` are alive during the call.
    unsafe { sys::nftnl_set_elem_expr_foreach(pointer, Some(on_expression), counter_out.cast()) };
    let milliseconds = |kind: u32| -> Option<u64> {
        let bytes = if has(kind) { get(kind).try_into().ok() } else { None };
        bytes.map(u64::from_ne_bytes)
    };
    let timeout_ms = milliseconds(sys::NFTNL_SET_ELEM_TIMEOUT);
    let expires_ms = milliseconds(sys::NFTNL_SET_ELEM_EXPIRATION);
    let found = FoundElement {
        key: get(sys::NFTNL_SET_ELEM_KEY).to_vec(),
        data,
        comment,
        counter,
        timeout_ms,
        expires_ms,
    };
    // SAFETY: needed to hand the element out; by the contract of this function nobody else uses the
    // vector now.
    unsafe { (*out.cast::<Vec<FoundElement>>()).push(found) };
    0
}

/// # Safety
/// Called by libnftnl with a live expression and the pointer to an `Option<Counter>` that it was given.
unsafe extern "C" fn on_expression(pointer: *mut sys::nftnl_expr, out: *mut c_void) -> i32 {
    // SAFETY: needed to read a counter; the expression is alive, and `out` is what `on_element`
    // gave.
    unsafe {
        let name = text(sys::nftnl_expr_get_str(pointer, sys::NFTNL_EXPR_NAME as u16));
        if name.as_deref() == Some("counter") {
            let get = |kind: u32| sys::nftnl_expr_get_u64(pointer, kind as u16);
            *out.cast::<Option<Counter>>() = Some(Counter {
                packets: get(sys::NFTNL_EXPR_CTR_PACKETS),
                bytes: get(sys::NFTNL_EXPR_CTR_BYTES),
            });
        }
    }
    0
}
