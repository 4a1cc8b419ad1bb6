//! Hands rulesets to libnftnl and reads the kernel's answers with it. The safe crate `nftnl` has no maps, element
//! data, dynamic sets, payload writes or dumps, so its re-exported C interface is used here and nowhere else.
//!
//! Everything that crosses is data of [`super::model`] and [`super::lower`]; no pointer leaves this module.
#![allow(unsafe_code)]

use super::field::{Type, Value};
use super::lower::{Attribute, Expr, counter, key_bytes, key_len, key_type, lower, verdict_number};
use super::model::{
    Chain, Data, Element, ElementData, Family, Rule, Set, TABLE_COMMENT, TABLE_NAME, Verdict,
};
use nftnl::nftnl_sys as sys;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Message types of nf_tables (linux/netfilter/nf_tables.h).
mod message {
    pub const NEWTABLE: u16 = 0;
    pub const GETTABLE: u16 = 1;
    pub const DELTABLE: u16 = 2;
    pub const NEWCHAIN: u16 = 3;
    pub const GETCHAIN: u16 = 4;
    pub const DELCHAIN: u16 = 5;
    pub const NEWRULE: u16 = 6;
    pub const GETRULE: u16 = 7;
    pub const DELRULE: u16 = 8;
    pub const NEWSET: u16 = 9;
    pub const GETSET: u16 = 10;
    pub const DELSET: u16 = 11;
    pub const NEWSETELEM: u16 = 12;
    pub const GETSETELEM: u16 = 13;
    pub const DELSETELEM: u16 = 14;
}

const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
/// nft's number for verdicts as data.
const DATA_VERDICT: u32 = 0xffff_ff00;
/// libnftnl copies data of any length into buffers of this size (NFT_DATA_VALUE_MAXLEN).
const MAX_DATA: usize = 64;
/// A message of elements stays well below the 64 KiB at which a nested attribute silently loses what it holds.
const ELEMENTS_A_MESSAGE: usize = 200;
/// One message of any kind that is built here is smaller.
const SCRATCH: usize = 1 << 17;

fn number(family: Family) -> u16 {
    match family {
        Family::Ip => 2,
        Family::Bridge => 7,
        Family::Ip6 => 10,
    }
}

fn c_string(text: &str) -> CString {
    // Names and comments are made by this crate, without NUL bytes; one would end the text early.
    let text: Vec<u8> = text.bytes().filter(|&byte| byte != 0).collect();
    CString::new(text).unwrap_or_default()
}

/// The socket's descriptor, as long as the socket lives.
pub(super) fn fd(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: needed because mnl gives the number only; the socket is open as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// A piece of user data as nft writes it: type, length, bytes.
fn user_data(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let bytes = bytes.get(..bytes.len().min(250)).unwrap_or_default();
    [&[kind, bytes.len() as u8], bytes].concat()
}

fn comment(kind: u8, text: &str) -> Vec<u8> {
    let end = (0..=text.len().min(120)).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    user_data(kind, c_string(text.get(..end).unwrap_or_default()).as_bytes_with_nul())
}

/// A libnftnl object that is freed when it goes out of scope.
struct Object<T> {
    pointer: *mut T,
    free: unsafe extern "C" fn(*const T),
}

impl<T> Object<T> {
    fn new(alloc: unsafe extern "C" fn() -> *mut T, free: unsafe extern "C" fn(*const T)) -> Object<T> {
        // SAFETY: needed to make the object; the allocators take no argument, and null is checked below.
        let pointer = unsafe { alloc() };
        assert!(!pointer.is_null(), "out of memory");
        Object { pointer, free }
    }
}

impl<T> Drop for Object<T> {
    fn drop(&mut self) {
        // SAFETY: needed to give the memory back; the pointer came from the matching allocator and is freed once.
        unsafe { (self.free)(self.pointer) };
    }
}

/// Sets string, number and data attributes of one kind of object; not every kind needs all three.
macro_rules! setters {
    ($name:ident, $object:ty, $alloc:path, $free:path, $str:path, $u32:path, $data:path) => {
        struct $name(Object<$object>);

        #[allow(dead_code)]
        impl $name {
            fn new() -> $name {
                $name(Object::new($alloc, $free))
            }

            fn str(&self, attribute: u32, text: &str) {
                let text = c_string(text);
                // SAFETY: needed to fill the object; it is alive, and the string is copied.
                unsafe { $str(self.0.pointer, attribute as u16, text.as_ptr()) };
            }

            fn u32(&self, attribute: u32, value: u32) {
                // SAFETY: needed to fill the object; it is alive.
                unsafe { $u32(self.0.pointer, attribute as u16, value) };
            }

            fn data(&self, attribute: u32, bytes: &[u8]) {
                // SAFETY: needed to fill the object; it is alive, and the bytes are copied.
                unsafe { $data(self.0.pointer, attribute as u16, bytes.as_ptr().cast(), bytes.len() as u32) };
            }
        }
    };
}

setters!(
    TableObject,
    sys::nftnl_table,
    sys::nftnl_table_alloc,
    sys::nftnl_table_free,
    sys::nftnl_table_set_str,
    sys::nftnl_table_set_u32,
    sys::nftnl_table_set_data
);
setters!(
    ChainObject,
    sys::nftnl_chain,
    sys::nftnl_chain_alloc,
    sys::nftnl_chain_free,
    sys::nftnl_chain_set_str,
    sys::nftnl_chain_set_u32,
    sys::nftnl_chain_set_data
);
setters!(
    RuleObject,
    sys::nftnl_rule,
    sys::nftnl_rule_alloc,
    sys::nftnl_rule_free,
    sys::nftnl_rule_set_str,
    sys::nftnl_rule_set_u32,
    sys::nftnl_rule_set_data
);
setters!(
    SetObject,
    sys::nftnl_set,
    sys::nftnl_set_alloc,
    sys::nftnl_set_free,
    sys::nftnl_set_set_str,
    sys::nftnl_set_set_u32,
    sys::nftnl_set_set_data
);

/// An expression of libnftnl, which the object it is added to will free.
fn expression(expr: &Expr) -> *mut sys::nftnl_expr {
    let kind = c_string(expr.kind);
    // SAFETY: needed to make the expression; the name is a live string, and null (an unknown name) is checked below.
    let pointer = unsafe { sys::nftnl_expr_alloc(kind.as_ptr()) };
    assert!(!pointer.is_null(), "libnftnl does not know the expression {}", expr.kind);
    for (attribute, value) in &expr.attributes {
        let attribute = *attribute as u16;
        match value {
            Attribute::U8(value) => {
                // SAFETY: needed to fill the expression, which is alive.
                unsafe { sys::nftnl_expr_set_u8(pointer, attribute, *value) };
            }
            Attribute::U16(value) => {
                // SAFETY: needed to fill the expression, which is alive.
                unsafe { sys::nftnl_expr_set_u16(pointer, attribute, *value) };
            }
            Attribute::U32(value) => {
                // SAFETY: as above.
                unsafe { sys::nftnl_expr_set_u32(pointer, attribute, *value) };
            }
            Attribute::Text(text) => {
                let text = c_string(text);
                // SAFETY: as above; the string is copied.
                unsafe { sys::nftnl_expr_set_str(pointer, attribute, text.as_ptr()) };
            }
            Attribute::Bytes(bytes) => {
                assert!(bytes.len() <= MAX_DATA, "{} bytes of data", bytes.len());
                // SAFETY: as above; the bytes are copied and fit libnftnl's buffer, which it does not check itself.
                unsafe { sys::nftnl_expr_set(pointer, attribute, bytes.as_ptr().cast(), bytes.len() as u32) };
            }
            Attribute::Owned(bytes) => {
                // SAFETY: needed because libnftnl frees this memory itself: it must come from malloc, is large enough
                // for the copy, and is not used here again.
                unsafe {
                    let copy = libc::malloc(bytes.len());
                    assert!(!copy.is_null(), "out of memory");
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.cast(), bytes.len());
                    sys::nftnl_expr_set(pointer, attribute, copy, bytes.len() as u32);
                }
            }
        }
    }
    pointer
}

/// Netlink messages of one transaction, built one behind the other.
pub(super) struct Batch {
    /// The messages; each begins at a multiple of four.
    bytes: Vec<u8>,
    /// What the messages do, by sequence number from `first`, for error messages.
    labels: Vec<String>,
    first: u32,
    /// Where the last message begins that is not the end of the batch.
    last: usize,
    scratch: Vec<u32>,
}

impl Batch {
    /// A transaction whose messages are numbered from `first` on.
    pub(super) fn new(first: u32) -> Batch {
        let mut batch =
            Batch { bytes: Vec::new(), labels: Vec::new(), first, last: 0, scratch: vec![0; SCRATCH / 4] };
        batch.frame(|buffer, sequence| {
            // SAFETY: needed for the message that opens a batch; the buffer is aligned and larger than a header.
            unsafe { sys::nftnl_batch_begin(buffer, sequence) }
        });
        batch.labels.push("open the transaction".to_string());
        batch
    }

    /// How many messages there are, the opening one not counted.
    pub(super) fn len(&self) -> usize {
        self.labels.len() - 1
    }

    /// What the message of this number does.
    pub(super) fn label(&self, sequence: u32) -> &str {
        let index = sequence.wrapping_sub(self.first) as usize;
        self.labels.get(index).map_or("the transaction", String::as_str)
    }

    /// Ends the batch. An acknowledgement is asked for the last message only: kernels before 6.10 do not give one for
    /// the end of a batch, and one for each message would overrun the receive buffer. Its number comes back too.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32, Batch) {
        let awaited = self.first + self.labels.len() as u32 - 1;
        if let Some(flags) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let old = u16::from_ne_bytes([flags[0], flags[1]]);
            flags.copy_from_slice(&(old | libc::NLM_F_ACK as u16).to_ne_bytes());
        }
        self.frame(|buffer, sequence| {
            // SAFETY: needed for the message that ends a batch; as for the one that opens it.
            unsafe { sys::nftnl_batch_end(buffer, sequence) }
        });
        (std::mem::take(&mut self.bytes), awaited, self)
    }

    /// Builds one message in the scratch buffer and appends it.
    fn frame(&mut self, build: impl FnOnce(*mut c_char, u32) -> *mut libc::nlmsghdr) {
        let sequence = self.first + self.labels.len() as u32;
        let header = build(self.scratch.as_mut_ptr().cast(), sequence);
        // SAFETY: needed to learn the length that libnftnl has written; the header is the start of the scratch buffer.
        let len = unsafe { (*header).nlmsg_len } as usize;
        assert!(len <= SCRATCH, "a message of {len} bytes");
        let padded = len.next_multiple_of(4);
        self.last = self.bytes.len();
        self.bytes.extend(self.scratch.iter().flat_map(|word| word.to_ne_bytes()).take(padded));
    }

    fn message(
        &mut self,
        kind: u16,
        family: Family,
        flags: i32,
        label: String,
        fill: impl FnOnce(*mut libc::nlmsghdr),
    ) {
        self.frame(|buffer, sequence| {
            let family = number(family);
            // SAFETY: needed for a message's header; the buffer is aligned and larger than a header.
            let header = unsafe { sys::nftnl_nlmsg_build_hdr(buffer, kind, family, flags as u16, sequence) };
            fill(header);
            header
        });
        self.labels.push(label);
    }

    /// Adds our table; one that is there stays.
    pub(super) fn add_table(&mut self, family: Family) {
        let table = named_table(family);
        table.data(sys::NFTNL_TABLE_USERDATA, &comment(0, TABLE_COMMENT));
        self.message(
            message::NEWTABLE,
            family,
            libc::NLM_F_CREATE,
            format!("add table {family}"),
            |header| {
                // SAFETY: needed to write the table into the message; both are alive.
                unsafe { sys::nftnl_table_nlmsg_build_payload(header, table.0.pointer) };
            },
        );
    }

    /// Deletes our table with everything in it.
    pub(super) fn delete_table(&mut self, family: Family) {
        let table = named_table(family);
        self.message(message::DELTABLE, family, 0, format!("delete table {family}"), |header| {
            // SAFETY: as in `add_table`.
            unsafe { sys::nftnl_table_nlmsg_build_payload(header, table.0.pointer) };
        });
    }

    /// Adds a chain; one that is there stays.
    pub(super) fn add_chain(&mut self, family: Family, name: &str, chain: &Chain) {
        let object = named_chain(name);
        if let Some(priority) = chain.priority {
            const PREROUTING: u32 = 0;
            const ACCEPT: u32 = 1;
            object.u32(sys::NFTNL_CHAIN_HOOKNUM, PREROUTING);
            object.u32(sys::NFTNL_CHAIN_POLICY, ACCEPT);
            object.str(sys::NFTNL_CHAIN_TYPE, "filter");
            // SAFETY: needed because a priority is signed; the object is alive.
            unsafe {
                sys::nftnl_chain_set_s32(object.0.pointer, sys::NFTNL_CHAIN_PRIO as u16, priority);
            }
        }
        self.message(message::NEWCHAIN, family, libc::NLM_F_CREATE, format!("add chain {name}"), |header| {
            // SAFETY: needed to write the chain into the message; both are alive.
            unsafe { sys::nftnl_chain_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes a chain, which must be empty and in no rule.
    pub(super) fn delete_chain(&mut self, family: Family, name: &str) {
        let object = named_chain(name);
        self.message(message::DELCHAIN, family, 0, format!("delete chain {name}"), |header| {
            // SAFETY: as in `add_chain`.
            unsafe { sys::nftnl_chain_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes all rules of a chain, or of our table.
    pub(super) fn flush_rules(&mut self, family: Family, chain: Option<&str>) {
        let object = RuleObject::new();
        object.str(sys::NFTNL_RULE_TABLE, TABLE_NAME);
        if let Some(chain) = chain {
            object.str(sys::NFTNL_RULE_CHAIN, chain);
        }
        let label = format!("flush {}", chain.unwrap_or("all chains"));
        self.message(message::DELRULE, family, 0, label, |header| {
            // SAFETY: needed to write the rule's place into the message; both are alive.
            unsafe { sys::nftnl_rule_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Appends a rule.
    pub(super) fn add_rule(&mut self, family: Family, chain: &str, rule: &Rule) {
        let object = RuleObject::new();
        object.str(sys::NFTNL_RULE_TABLE, TABLE_NAME);
        object.str(sys::NFTNL_RULE_CHAIN, chain);
        if let Some(text) = &rule.comment {
            object.data(sys::NFTNL_RULE_USERDATA, &comment(0, text));
        }
        for expr in rule.statements.iter().flat_map(lower) {
            // SAFETY: needed to put the expression into the rule, which frees it; both are alive.
            unsafe { sys::nftnl_rule_add_expr(object.0.pointer, expression(&expr)) };
        }
        let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
        self.message(message::NEWRULE, family, flags, format!("add rule {chain}: {rule}"), |header| {
            // SAFETY: as in `flush_rules`.
            unsafe { sys::nftnl_rule_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Adds a set without its elements; one of the same kind that is there stays.
    pub(super) fn add_set(&mut self, family: Family, name: &str, set: &Set) {
        let object = named_set(name);
        object.u32(sys::NFTNL_SET_FAMILY, u32::from(number(family)));
        object.u32(sys::NFTNL_SET_ID, self.labels.len() as u32);
        object.u32(sys::NFTNL_SET_KEY_TYPE, key_type(&set.key));
        object.u32(sys::NFTNL_SET_KEY_LEN, key_len(&set.key));
        let mut flags = 0;
        match set.data {
            Some(Data::Verdict) => {
                flags |= SET_MAP;
                object.u32(sys::NFTNL_SET_DATA_TYPE, DATA_VERDICT);
                object.u32(sys::NFTNL_SET_DATA_LEN, 16);
            }
            Some(Data::Value(data)) => {
                flags |= SET_MAP;
                object.u32(sys::NFTNL_SET_DATA_TYPE, data.number());
                object.u32(sys::NFTNL_SET_DATA_LEN, data.len() as u32);
            }
            None => {}
        }
        if let Some(dynamic) = set.dynamic {
            flags |= SET_EVAL | SET_TIMEOUT;
            object.u32(sys::NFTNL_SET_DESC_SIZE, dynamic.size);
            let milliseconds = u64::from(dynamic.timeout) * 1000;
            // SAFETY: needed because a timeout has 64 bits; the object is alive.
            unsafe {
                sys::nftnl_set_set_u64(object.0.pointer, sys::NFTNL_SET_TIMEOUT as u16, milliseconds);
            }
        }
        if set.interval {
            flags |= SET_INTERVAL | SET_CONCAT;
            let lengths: Vec<u8> = set.key.iter().map(|part| part.len() as u8).collect();
            object.data(sys::NFTNL_SET_DESC_CONCAT, &lengths);
        }
        object.u32(sys::NFTNL_SET_FLAGS, flags);
        if set.counter {
            // SAFETY: needed for a counter in every element; the set is alive and frees the expression.
            unsafe { sys::nftnl_set_add_expr(object.0.pointer, expression(&counter())) };
        }
        object.data(sys::NFTNL_SET_USERDATA, &set_user_data(set));
        self.message(message::NEWSET, family, libc::NLM_F_CREATE, format!("add set {name}"), |header| {
            // SAFETY: needed to write the set into the message; both are alive.
            unsafe { sys::nftnl_set_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes a set, which must be in no rule.
    pub(super) fn delete_set(&mut self, family: Family, name: &str) {
        let object = named_set(name);
        self.message(message::DELSET, family, 0, format!("delete set {name}"), |header| {
            // SAFETY: as in `add_set`.
            unsafe { sys::nftnl_set_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes all elements of a set.
    pub(super) fn flush_set(&mut self, family: Family, name: &str) {
        self.elements(message::DELSETELEM, family, name, &[], 0, format!("flush set {name}"));
    }

    /// Adds elements to a set.
    pub(super) fn add_elements<'a>(
        &mut self,
        family: Family,
        name: &str,
        elements: impl IntoIterator<Item = (&'a Vec<Value>, &'a Element)>,
    ) {
        let elements: Vec<_> = elements.into_iter().collect();
        for chunk in elements.chunks(ELEMENTS_A_MESSAGE) {
            let label = format!("add {} elements to {name}", chunk.len());
            self.elements(message::NEWSETELEM, family, name, chunk, libc::NLM_F_CREATE, label);
        }
    }

    /// Deletes elements of a set, which must be there.
    pub(super) fn delete_elements<'a>(
        &mut self,
        family: Family,
        name: &str,
        elements: impl IntoIterator<Item = (&'a Vec<Value>, &'a Element)>,
    ) {
        let bare = |(key, element): (&'a Vec<Value>, &'a Element)| {
            (key, Element { last: element.last.clone(), ..Element::default() })
        };
        let owned: Vec<_> = elements.into_iter().map(bare).collect();
        let elements: Vec<_> = owned.iter().map(|(key, element)| (*key, element)).collect();
        for chunk in elements.chunks(ELEMENTS_A_MESSAGE) {
            let label = format!("delete {} elements of {name}", chunk.len());
            self.elements(message::DELSETELEM, family, name, chunk, 0, label);
        }
    }

    fn elements(
        &mut self,
        kind: u16,
        family: Family,
        name: &str,
        elements: &[(&Vec<Value>, &Element)],
        flags: i32,
        label: String,
    ) {
        let object = named_set(name);
        for (key, element) in elements {
            add_element(&object, key, element);
        }
        self.message(kind, family, flags, label, |header| {
            // SAFETY: needed to write the elements into the message; both are alive, and there are few enough.
            unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header, object.0.pointer) };
        });
    }
}

fn named_table(family: Family) -> TableObject {
    let table = TableObject::new();
    table.u32(sys::NFTNL_TABLE_FAMILY, u32::from(number(family)));
    table.str(sys::NFTNL_TABLE_NAME, TABLE_NAME);
    table
}

fn named_chain(name: &str) -> ChainObject {
    let chain = ChainObject::new();
    chain.str(sys::NFTNL_CHAIN_TABLE, TABLE_NAME);
    chain.str(sys::NFTNL_CHAIN_NAME, name);
    chain
}

fn named_set(name: &str) -> SetObject {
    let set = SetObject::new();
    set.str(sys::NFTNL_SET_TABLE, TABLE_NAME);
    set.str(sys::NFTNL_SET_NAME, name);
    set
}

/// Byte orders (nft guesses wrong for marks otherwise) and the comment, as nft itself stores them.
fn set_user_data(set: &Set) -> Vec<u8> {
    const KEY_ORDER: u8 = 0;
    const DATA_ORDER: u8 = 1;
    const COMMENT: u8 = 7;
    let order = |kind: u8, of: Type| {
        let host_or_big: u32 = if of == Type::Mark { 1 } else { 2 };
        user_data(kind, &host_or_big.to_ne_bytes())
    };
    let mut out = Vec::new();
    if let [one] = set.key.as_slice() {
        out.extend(order(KEY_ORDER, *one));
    }
    if let Some(Data::Value(data)) = set.data {
        out.extend(order(DATA_ORDER, data));
    }
    if let Some(text) = &set.comment {
        out.extend(comment(COMMENT, text));
    }
    out
}

fn add_element(set: &SetObject, key: &[Value], element: &Element) {
    // SAFETY: needed to make the element; null is checked.
    let pointer = unsafe { sys::nftnl_set_elem_alloc() };
    assert!(!pointer.is_null(), "out of memory");
    let data = |attribute: u32, bytes: &[u8]| {
        let limit = if attribute == sys::NFTNL_SET_ELEM_USERDATA { 256 } else { MAX_DATA };
        assert!(bytes.len() <= limit, "{} bytes of element data", bytes.len());
        // SAFETY: needed to fill the element, which is alive; the bytes are copied and fit.
        unsafe {
            sys::nftnl_set_elem_set(pointer, attribute as u16, bytes.as_ptr().cast(), bytes.len() as u32)
        };
    };
    data(sys::NFTNL_SET_ELEM_KEY, &key_bytes(key));
    if let Some(last) = &element.last {
        data(sys::NFTNL_SET_ELEM_KEY_END, &key_bytes(last));
    }
    match &element.data {
        None => {}
        Some(ElementData::Value(value)) => data(sys::NFTNL_SET_ELEM_DATA, &value.bytes()),
        Some(ElementData::Verdict(verdict)) => set_verdict(pointer, verdict),
    }
    if let Some(text) = &element.comment {
        data(sys::NFTNL_SET_ELEM_USERDATA, &comment(0, text));
    }
    // SAFETY: needed to put the element into the set, which frees it; both are alive.
    unsafe { sys::nftnl_set_elem_add(set.0.pointer, pointer) };
}

fn set_verdict(pointer: *mut sys::nftnl_set_elem, verdict: &Verdict) {
    let (number, chain) = verdict_number(verdict);
    // SAFETY: needed to fill the element, which is alive; the string is copied.
    unsafe {
        sys::nftnl_set_elem_set_u32(pointer, sys::NFTNL_SET_ELEM_VERDICT as u16, number as u32);
        if let Some(chain) = chain {
            sys::nftnl_set_elem_set_str(pointer, sys::NFTNL_SET_ELEM_CHAIN as u16, c_string(chain).as_ptr());
        }
    }
}

/// A question to the kernel: the message to send, and how to read each answer.
pub(super) enum Question {
    /// Our table's comment.
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

/// What a rule in the kernel has counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct FoundRule {
    pub chain: String,
    pub comment: Option<String>,
    pub counted: Option<(u64, u64)>,
}

/// What an element in the kernel holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FoundElement {
    /// The key's bytes.
    pub key: Vec<u8>,
    /// The data's bytes; empty for sets and verdicts.
    pub data: Vec<u8>,
    /// The comment.
    pub comment: Option<String>,
    /// Packets and bytes, where elements count.
    pub counted: Option<(u64, u64)>,
}

/// How a set in the kernel is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FoundSet {
    pub key: u32,
    pub key_len: u32,
    pub flags: u32,
    pub data: u32,
}

impl FoundSet {
    /// Whether the kernel's set serves as `set`.
    pub(super) fn serves(self, set: &Set) -> bool {
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

/// The answers to a [`Question`].
#[derive(Default)]
pub(super) struct Answers {
    pub table_comment: Option<Option<String>>,
    /// Name, and whether it is a base chain.
    pub chains: BTreeMap<String, bool>,
    pub sets: BTreeMap<String, FoundSet>,
    pub elements: Vec<FoundElement>,
    pub rules: Vec<FoundRule>,
}

impl Question {
    /// The message to send, under this number.
    pub(super) fn message(&self, sequence: u32) -> Vec<u8> {
        let mut scratch = vec![0_u32; 1024];
        let dump = libc::NLM_F_DUMP as u16;
        let header = |kind: u16, family: Family, flags: u16, buffer: *mut u32| {
            let family = number(family);
            // SAFETY: needed for a message's header; the buffer is aligned and larger than a header.
            unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast(), kind, family, flags, sequence) }
        };
        let buffer = scratch.as_mut_ptr();
        let header = match self {
            Question::Table(family) => {
                let (table, header) = (named_table(*family), header(message::GETTABLE, *family, 0, buffer));
                // SAFETY: needed to name the table in the message; both are alive.
                unsafe { sys::nftnl_table_nlmsg_build_payload(header, table.0.pointer) };
                header
            }
            Question::Chains(family) => header(message::GETCHAIN, *family, dump, buffer),
            Question::Sets(family) => {
                let set = SetObject::new();
                set.str(sys::NFTNL_SET_TABLE, TABLE_NAME);
                let header = header(message::GETSET, *family, dump, buffer);
                // SAFETY: needed to name the table in the message; both are alive.
                unsafe { sys::nftnl_set_nlmsg_build_payload(header, set.0.pointer) };
                header
            }
            Question::Rules(family, chain) => {
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
            Question::Elements(family, name) => {
                let (set, header) = (named_set(name), header(message::GETSETELEM, *family, dump, buffer));
                // SAFETY: needed to name the set in the message; both are alive.
                unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header, set.0.pointer) };
                header
            }
        };
        // SAFETY: needed to learn the length that libnftnl has written; the header is the start of the scratch buffer.
        let len = unsafe { (*header).nlmsg_len } as usize;
        scratch.iter().flat_map(|word| word.to_ne_bytes()).take(len).collect()
    }

    /// Reads one message of the kernel's answer, header included.
    pub(super) fn read(&self, bytes: &[u8], answers: &mut Answers) {
        // libnftnl wants the message aligned.
        let mut words: Vec<u32> = vec![0; bytes.len().div_ceil(4)];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(4)) {
            let mut four = [0; 4];
            four[..chunk.len()].copy_from_slice(chunk);
            *word = u32::from_ne_bytes(four);
        }
        let header: *const libc::nlmsghdr = words.as_ptr().cast();
        match self {
            Question::Table(_) => {
                let table = TableObject::new();
                // SAFETY: needed to read the message, whose length the caller has checked against its header.
                if unsafe { sys::nftnl_table_nlmsg_parse(header, table.0.pointer) } == 0 {
                    let mut len = 0;
                    let kind = sys::NFTNL_TABLE_USERDATA as u16;
                    // SAFETY: needed to get the comment; what comes back lives as long as the table.
                    let data =
                        unsafe { slice(sys::nftnl_table_get_data(table.0.pointer, kind, &mut len), len) };
                    answers.table_comment = Some(comment_of(data, 0));
                }
            }
            Question::Chains(_) => {
                let chain = ChainObject::new();
                // SAFETY: as above.
                unsafe {
                    if sys::nftnl_chain_nlmsg_parse(header, chain.0.pointer) == 0 {
                        let get = |kind: u32| text(sys::nftnl_chain_get_str(chain.0.pointer, kind as u16));
                        let base = sys::nftnl_chain_is_set(chain.0.pointer, sys::NFTNL_CHAIN_HOOKNUM as u16);
                        if get(sys::NFTNL_CHAIN_TABLE).as_deref() == Some(TABLE_NAME) {
                            answers.chains.extend(get(sys::NFTNL_CHAIN_NAME).map(|name| (name, base)));
                        }
                    }
                }
            }
            Question::Sets(_) => {
                let set = SetObject::new();
                // SAFETY: as above.
                unsafe {
                    if sys::nftnl_set_nlmsg_parse(header, set.0.pointer) == 0 {
                        let get = |kind: u32| sys::nftnl_set_get_u32(set.0.pointer, kind as u16);
                        let has_data = sys::nftnl_set_is_set(set.0.pointer, sys::NFTNL_SET_DATA_TYPE as u16);
                        let found = FoundSet {
                            key: get(sys::NFTNL_SET_KEY_TYPE),
                            key_len: get(sys::NFTNL_SET_KEY_LEN),
                            flags: get(sys::NFTNL_SET_FLAGS),
                            data: if has_data { get(sys::NFTNL_SET_DATA_TYPE) } else { 0 },
                        };
                        let name = text(sys::nftnl_set_get_str(set.0.pointer, sys::NFTNL_SET_NAME as u16));
                        answers.sets.extend(name.map(|name| (name, found)));
                    }
                }
            }
            Question::Rules(..) => {
                let rule = RuleObject::new();
                let mut counted: Option<(u64, u64)> = None;
                let mut len = 0;
                let counted_out: *mut Option<(u64, u64)> = &mut counted;
                // SAFETY: as above; the callback gets a pointer to `counted`, which outlives the call.
                unsafe {
                    if sys::nftnl_rule_nlmsg_parse(header, rule.0.pointer) != 0 {
                        return;
                    }
                    sys::nftnl_expr_foreach(rule.0.pointer, Some(on_expression), counted_out.cast());
                    let get = |kind: u32| text(sys::nftnl_rule_get_str(rule.0.pointer, kind as u16));
                    let kind = sys::NFTNL_RULE_USERDATA as u16;
                    let data = slice(sys::nftnl_rule_get_data(rule.0.pointer, kind, &mut len), len);
                    if get(sys::NFTNL_RULE_TABLE).as_deref() == Some(TABLE_NAME)
                        && let Some(chain) = get(sys::NFTNL_RULE_CHAIN)
                    {
                        answers.rules.push(FoundRule { chain, comment: comment_of(data, 0), counted });
                    }
                }
            }
            Question::Elements(..) => {
                let set = SetObject::new();
                // SAFETY: as above; the callback gets a pointer to `answers.elements`, which outlives the call.
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

/// The comment among pieces of user data.
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
    let data =
        if has(sys::NFTNL_SET_ELEM_DATA) { get(sys::NFTNL_SET_ELEM_DATA).to_vec() } else { Vec::new() };
    let comment = if has(sys::NFTNL_SET_ELEM_USERDATA) {
        comment_of(get(sys::NFTNL_SET_ELEM_USERDATA), 0)
    } else {
        None
    };
    let mut counted: Option<(u64, u64)> = None;
    let counted_out: *mut Option<(u64, u64)> = &mut counted;
    // SAFETY: needed to reach the counter; the element and `counted` are alive during the call.
    unsafe { sys::nftnl_set_elem_expr_foreach(pointer, Some(on_expression), counted_out.cast()) };
    let found = FoundElement { key: get(sys::NFTNL_SET_ELEM_KEY).to_vec(), data, comment, counted };
    // SAFETY: needed to hand the element out; by the contract of this function nobody else uses the vector now.
    unsafe { (*out.cast::<Vec<FoundElement>>()).push(found) };
    0
}

/// # Safety
/// Called by libnftnl with a live expression and the pointer to an `Option<(u64, u64)>` that it was given.
unsafe extern "C" fn on_expression(pointer: *mut sys::nftnl_expr, out: *mut c_void) -> i32 {
    // SAFETY: needed to read a counter; the expression is alive, and `out` is what `on_element` gave.
    unsafe {
        let name = text(sys::nftnl_expr_get_str(pointer, sys::NFTNL_EXPR_NAME as u16));
        if name.as_deref() == Some("counter") {
            let get = |kind: u32| sys::nftnl_expr_get_u64(pointer, kind as u16);
            *out.cast::<Option<(u64, u64)>>() =
                Some((get(sys::NFTNL_EXPR_CTR_PACKETS), get(sys::NFTNL_EXPR_CTR_BYTES)));
        }
    }
    0
}
