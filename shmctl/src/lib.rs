//! The interface between a middlebox VM and its host: what crosses shared memory.
//!
//! * [`language`]: the command language. [`Command::parse`] parses one line of it, [`Display`]
//!   writes the canonical form back.
//! * [`Region`]: the guest's side of an ivshmem region, a mapping. It is the only module with
//!   `unsafe`: bytes are copied out once and no Rust reference into the region ever exists.
//! * [`RegionFile`]: the host's side, which reads and writes the file.
//! * [`mailbox`]: the protocol at offset 0, both ends of it.
//! * [`ring`]: numbered requests and replies behind it, both ends, and a page of counters.
//! * [`doorbell`]: the host as the server of a device with a doorbell.
//! * [`vsock`]: the same requests and replies as lines, where there is no shared memory.
//! * [`sender`]: the parts that a guest's senders share.
//!
//! # Layout of the region
//!
//! All offsets and sizes are in bytes from the start of the region.
//!
//! | offset | size | what | written by |
//! |---|---|---|---|
//! | 0 | 2048 | commands: `@…@` messages of ASCII text; NUL bytes inside are skipped | the guest; the host replaces both `@` of a message by `$` when it has taken it |
//! | 2048 | 2048 | reply: text ended by a NUL, one line a message | the host |
//! | 4096 | … | rings, see [`ring`] | the host and the guest, a section each |
//!
//! Messages follow each other from the start, with NULs or blanks between them; any other byte in
//! front of a message leaves it unread. A write should have at most sixteen messages: further ones
//! are answered over the reply to the first.
//!
//! The mailbox has a depth of one: a writer writes the body and the closing `@`, the opening `@`
//! last, waits until the opening byte is `$`, and then reads the reply. The host writes the reply
//! before it writes `$`.
//!
//! [`Display`]: std::fmt::Display

pub mod doorbell;
pub mod language;
pub mod mailbox;
mod region;
mod region_file;
pub mod ring;
pub mod sender;
pub mod vsock;

pub use language::command::{
    Action, Command, FilterRemoval, FilterUpdate, RuleId, RuleNumber, UnregisterScope,
};
pub use language::field::{Class, Field, FieldValue};
pub use language::parse::error::{CommandError, ErrorCode};
pub use language::parse::{MAX_COMMAND, ParsedCommand, Place, split_lines};
pub use language::reply::{Rejection, Reply};
pub use language::service::{
    BackendChange, BackendName, Check, CheckPace, DEFAULT_AFFINITY, Destination, Drain, Frontend,
    MAX_CHECK_INTERVAL, MAX_DRAIN, MAX_TIMEOUT, MAX_WEIGHT, Method, OnDead, OnEmpty,
    ServiceOptions, ServiceSpec,
};
pub use language::value::{
    AddressRange, EtherType, Fragment, FragmentMatch, MacAddr, MacMask, NumberRange,
    ParseValueError, Protocol, TcpFlags,
};
pub use region::{DEFAULT_SIZE, Region, RegionError, RegionLock, Register};
pub use region_file::{Ownership, RegionFile};
