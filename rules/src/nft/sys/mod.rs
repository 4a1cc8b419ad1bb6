//! The interface to libnftnl: sends rulesets and parses the kernel's answers. The safe crate
//! `nftnl` has no maps, element data, dynamic sets, payload writes or dumps, so its re-exported C
//! interface is used here and nowhere else.
//!
//! `batch` builds transactions, `dump` sends requests and parses answers. Everything that crosses
//! the interface is data of [`super::model`] and [`super::lower`]; no pointer leaves this module.
#![allow(unsafe_code)]

mod batch;
mod dump;

pub(super) use batch::Batch;
pub(super) use dump::{DumpReply, DumpRequest, FoundSet};
pub(super) use dump::{FoundElement, SetFill};

use super::model::{Family, TABLE_NAME};
use nftnl::nftnl_sys as sys;
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Message types of nf_tables (linux/netfilter/nf_tables.h).
mod message {
    pub(super) const NEWTABLE: u16 = 0;
    pub(super) const GETTABLE: u16 = 1;
    pub(super) const DELTABLE: u16 = 2;
    pub(super) const NEWCHAIN: u16 = 3;
    pub(super) const GETCHAIN: u16 = 4;
    pub(super) const DELCHAIN: u16 = 5;
    pub(super) const NEWRULE: u16 = 6;
    pub(super) const GETRULE: u16 = 7;
    pub(super) const DELRULE: u16 = 8;
    pub(super) const NEWSET: u16 = 9;
    pub(super) const GETSET: u16 = 10;
    pub(super) const DELSET: u16 = 11;
    pub(super) const NEWSETELEM: u16 = 12;
    pub(super) const GETSETELEM: u16 = 13;
    pub(super) const DELSETELEM: u16 = 14;
}

/// The flags of a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct TableFlags(u32);

impl TableFlags {
    /// Anybody may change the table.
    pub(super) const NONE: TableFlags = TableFlags(0);
    /// Nobody but the socket that made the table may change it, nor does `flush ruleset`; it outlives
    /// the socket, and another one may take it over then (NFT_TABLE_F_OWNER and
    /// NFT_TABLE_F_PERSIST, Linux 6.9).
    pub(super) const OWNED: TableFlags = TableFlags(0x2 | 0x4);

    /// Whether the table outlives the socket of its owner.
    pub(super) fn is_persistent(self) -> bool {
        self.0 & 0x4 != 0
    }
}

const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
/// nft's number of the verdict type.
const DATA_VERDICT: u32 = 0xffff_ff00;
/// libnftnl copies data of any length into buffers of this size (NFT_DATA_VALUE_MAXLEN).
const MAX_DATA: usize = 64;
/// The largest message of elements: well below 64 KiB, at which a nested attribute silently loses
/// its contents.
const ELEMENTS_A_MESSAGE: usize = 200;
/// The largest size of any other message.
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

/// Returns the socket's descriptor, for the socket's lifetime.
pub(super) fn fd(socket: &mnl::Socket) -> BorrowedFd<'_> {
    // SAFETY: needed because mnl gives the number only; the socket is open as long as the borrow.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

/// An item of user data as nft writes it: type, length, bytes.
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
    fn new(
        alloc: unsafe extern "C" fn() -> *mut T,
        free: unsafe extern "C" fn(*const T),
    ) -> Object<T> {
        // SAFETY: needed to make the object; the allocators take no argument, and null is checked
        // below.
        let pointer = unsafe { alloc() };
        assert!(!pointer.is_null(), "out of memory");
        Object { pointer, free }
    }
}

impl<T> Drop for Object<T> {
    fn drop(&mut self) {
        // SAFETY: needed to give the memory back; the pointer came from the matching allocator and
        // is freed once.
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
                unsafe {
                    $data(
                        self.0.pointer,
                        attribute as u16,
                        bytes.as_ptr().cast(),
                        bytes.len() as u32,
                    )
                };
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
