//! Transactions: netlink messages in one buffer.
#![allow(unsafe_code)]

use super::super::field::{Type, Value};
use super::super::lower::{
    Attribute, Expr, counter, key_bytes, key_len, key_type, lower, verdict_number,
};
use super::super::model::{
    Base, Chain, Data, Element, ElementData, Family, Rule, Set, TABLE_COMMENT, TABLE_NAME, Verdict,
};
use super::TableFlags;
use super::{
    DATA_VERDICT, ELEMENTS_A_MESSAGE, MAX_DATA, RuleObject, SCRATCH, SET_CONCAT, SET_EVAL,
    SET_INTERVAL, SET_MAP, SET_TIMEOUT, SetObject, c_string, comment, message, named_chain,
    named_set, named_table, number, user_data,
};
use nftnl::nftnl_sys as sys;
use std::ffi::c_char;

/// A libnftnl expression, which the object it is added to will free.
fn expression(expr: &Expr) -> *mut sys::nftnl_expr {
    let kind = c_string(expr.kind);
    // SAFETY: needed to make the expression; the name is a live string, and null (an unknown name)
    // is checked below.
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
            Attribute::U64(value) => {
                // SAFETY: as above.
                unsafe { sys::nftnl_expr_set_u64(pointer, attribute, *value) };
            }
            Attribute::Text(text) => {
                let text = c_string(text);
                // SAFETY: as above; the string is copied.
                unsafe { sys::nftnl_expr_set_str(pointer, attribute, text.as_ptr()) };
            }
            Attribute::Bytes(bytes) => {
                assert!(bytes.len() <= MAX_DATA, "{} bytes of data", bytes.len());
                // SAFETY: as above; the bytes are copied and fit libnftnl's buffer, which it does
                // not check itself.
                unsafe {
                    sys::nftnl_expr_set(
                        pointer,
                        attribute,
                        bytes.as_ptr().cast(),
                        bytes.len() as u32,
                    )
                };
            }
            Attribute::Owned(bytes) => {
                // SAFETY: needed because libnftnl frees this memory itself: it must come from
                // malloc, is large enough for the copy, and is not used here again.
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

/// The netlink messages of one transaction.
pub(in crate::nft) struct Batch {
    /// The messages; each begins at a multiple of four.
    bytes: Vec<u8>,
    /// The purpose of each message, by sequence number from `first`, for error messages.
    labels: Vec<String>,
    first: u32,
    /// The offset of the last message before the end of the batch.
    last: usize,
    scratch: Vec<u32>,
}

impl Batch {
    /// Returns an empty transaction whose messages are numbered from `first`.
    pub(in crate::nft) fn new(first: u32) -> Batch {
        let mut batch = Batch {
            bytes: Vec::new(),
            labels: Vec::new(),
            first,
            last: 0,
            scratch: vec![0; SCRATCH / 4],
        };
        batch.frame(|buffer, sequence| {
            // SAFETY: needed for the message that opens a batch; the buffer is aligned and larger
            // than a header.
            unsafe { sys::nftnl_batch_begin(buffer, sequence) }
        });
        batch.labels.push("open the transaction".to_string());
        batch
    }

    /// Returns the number of messages, without the opening one.
    pub(in crate::nft) fn len(&self) -> usize {
        self.labels.len() - 1
    }

    /// Returns the purpose of the message with this number.
    pub(in crate::nft) fn label(&self, sequence: u32) -> &str {
        let index = sequence.wrapping_sub(self.first) as usize;
        self.labels.get(index).map_or("the transaction", String::as_str)
    }

    /// Ends the batch, and returns the number of the last message. Only that one asks for an
    /// acknowledgement: kernels before 6.10 give none for the end of a batch, and one for each
    /// message would overrun the receive buffer.
    pub(in crate::nft) fn finish(mut self) -> (Vec<u8>, u32, Batch) {
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
        // SAFETY: needed to learn the length that libnftnl has written; the header is the start of
        // the scratch buffer.
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
            // SAFETY: needed for a message's header; the buffer is aligned and larger than a
            // header.
            let header =
                unsafe { sys::nftnl_nlmsg_build_hdr(buffer, kind, family, flags as u16, sequence) };
            fill(header);
            header
        });
        self.labels.push(label);
    }

    /// Adds our table with these flags; one that is there stays.
    pub(in crate::nft) fn add_table(&mut self, family: Family, flags: TableFlags) {
        let table = named_table(family);
        if flags != TableFlags::NONE {
            table.u32(sys::NFTNL_TABLE_FLAGS, flags.0);
        }
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
    pub(in crate::nft) fn delete_table(&mut self, family: Family) {
        let table = named_table(family);
        self.message(message::DELTABLE, family, 0, format!("delete table {family}"), |header| {
            // SAFETY: as in `add_table`.
            unsafe { sys::nftnl_table_nlmsg_build_payload(header, table.0.pointer) };
        });
    }

    /// Adds a chain; one that is there stays.
    pub(in crate::nft) fn add_chain(&mut self, family: Family, name: &str, chain: &Chain) {
        let object = named_chain(name);
        if let Some(Base { hook, priority }) = chain.base {
            const ACCEPT: u32 = 1;
            object.u32(sys::NFTNL_CHAIN_HOOKNUM, hook.number());
            object.u32(sys::NFTNL_CHAIN_POLICY, ACCEPT);
            object.str(sys::NFTNL_CHAIN_TYPE, "filter");
            // SAFETY: needed because a priority is signed; the object is alive.
            unsafe {
                sys::nftnl_chain_set_s32(object.0.pointer, sys::NFTNL_CHAIN_PRIO as u16, priority);
            }
        }
        self.message(
            message::NEWCHAIN,
            family,
            libc::NLM_F_CREATE,
            format!("add chain {name}"),
            |header| {
                // SAFETY: needed to write the chain into the message; both are alive.
                unsafe { sys::nftnl_chain_nlmsg_build_payload(header, object.0.pointer) };
            },
        );
    }

    /// Deletes a chain, which must be empty and in no rule.
    pub(in crate::nft) fn delete_chain(&mut self, family: Family, name: &str) {
        let object = named_chain(name);
        self.message(message::DELCHAIN, family, 0, format!("delete chain {name}"), |header| {
            // SAFETY: as in `add_chain`.
            unsafe { sys::nftnl_chain_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes all rules of a chain, or of our table.
    pub(in crate::nft) fn flush_rules(&mut self, family: Family, chain: Option<&str>) {
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
    pub(in crate::nft) fn add_rule(&mut self, family: Family, chain: &str, rule: &Rule) {
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
        self.message(
            message::NEWRULE,
            family,
            flags,
            format!("add rule {chain}: {rule}"),
            |header| {
                // SAFETY: as in `flush_rules`.
                unsafe { sys::nftnl_rule_nlmsg_build_payload(header, object.0.pointer) };
            },
        );
    }

    /// Adds a set without its elements; one of the same kind that is there stays.
    pub(in crate::nft) fn add_set(&mut self, family: Family, name: &str, set: &Set) {
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
                sys::nftnl_set_set_u64(
                    object.0.pointer,
                    sys::NFTNL_SET_TIMEOUT as u16,
                    milliseconds,
                );
            }
        }
        if let Some(size) = set.size {
            object.u32(sys::NFTNL_SET_DESC_SIZE, size);
        }
        if set.interval {
            flags |= SET_INTERVAL | SET_CONCAT;
            let lengths: Vec<u8> = set.key.iter().map(|part| part.len() as u8).collect();
            object.data(sys::NFTNL_SET_DESC_CONCAT, &lengths);
        }
        object.u32(sys::NFTNL_SET_FLAGS, flags);
        if set.counter {
            // SAFETY: needed for a counter in every element; the set is alive and frees the
            // expression.
            unsafe { sys::nftnl_set_add_expr(object.0.pointer, expression(&counter())) };
        }
        object.data(sys::NFTNL_SET_USERDATA, &set_user_data(set));
        self.message(
            message::NEWSET,
            family,
            libc::NLM_F_CREATE,
            format!("add set {name}"),
            |header| {
                // SAFETY: needed to write the set into the message; both are alive.
                unsafe { sys::nftnl_set_nlmsg_build_payload(header, object.0.pointer) };
            },
        );
    }

    /// Deletes a set, which must be in no rule.
    pub(in crate::nft) fn delete_set(&mut self, family: Family, name: &str) {
        let object = named_set(name);
        self.message(message::DELSET, family, 0, format!("delete set {name}"), |header| {
            // SAFETY: as in `add_set`.
            unsafe { sys::nftnl_set_nlmsg_build_payload(header, object.0.pointer) };
        });
    }

    /// Deletes all elements of a set.
    pub(in crate::nft) fn flush_set(&mut self, family: Family, name: &str) {
        self.elements(message::DELSETELEM, family, name, &[], 0, format!("flush set {name}"));
    }

    /// Adds elements to a set.
    pub(in crate::nft) fn add_elements<'a>(
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
    pub(in crate::nft) fn delete_elements<'a>(
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
            // SAFETY: needed to write the elements into the message; both are alive, and there are
            // few enough.
            unsafe { sys::nftnl_set_elems_nlmsg_build_payload(header, object.0.pointer) };
        });
    }
}

/// Returns the byte orders and the comment, as nft itself stores them. Without the orders, nft shows
/// wrong marks and interfaces.
fn set_user_data(set: &Set) -> Vec<u8> {
    const KEY_ORDER: u8 = 0;
    const DATA_ORDER: u8 = 1;
    const COMMENT: u8 = 7;
    let order = |kind: u8, of: Type| {
        let host_or_big: u32 = if matches!(of, Type::Mark | Type::Interface) { 1 } else { 2 };
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
            sys::nftnl_set_elem_set(
                pointer,
                attribute as u16,
                bytes.as_ptr().cast(),
                bytes.len() as u32,
            )
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
            sys::nftnl_set_elem_set_str(
                pointer,
                sys::NFTNL_SET_ELEM_CHAIN as u16,
                c_string(chain).as_ptr(),
            );
        }
    }
}
