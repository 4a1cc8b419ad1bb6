//! What crosses shared memory between a middlebox VM and its host.
//!
//! * [`Command`] is the command language; [`Command::parse`] reads one line of it and [`Display`] writes the
//!   canonical form back.
//! * [`Region`] maps an ivshmem region. It is the only module with `unsafe`: bytes are copied out once and no Rust
//!   reference into the region ever exists.
//! * [`mailbox`] is the protocol at offset 0, both ends of it.
//!
//! # Layout of the region
//!
//! All offsets and sizes are in bytes from the start of the region.
//!
//! | offset | size | what | written by |
//! |---|---|---|---|
//! | 0 | 2048 | commands: `@…@` frames of ASCII text; NUL bytes inside are skipped | the guest; the host replaces both `@` of a frame by `$` when it has taken it |
//! | 2048 | 2048 | reply: text ended by a NUL, one line a frame | the host |
//! | 4096 | … | left for the ring layout | nobody yet |
//!
//! Frames stand one behind the other from the start, with NULs or blanks between them; what stands before a frame and is
//! neither, nor a taken frame, leaves it unread. A write should have at most sixteen frames: further ones are answered
//! over the reply to the first.
//!
//! A writer keeps the mailbox' depth of one: it writes the body and the closing `@`, the opening `@` last, waits
//! until the opening byte has become `$`, and then reads the reply. The host writes the reply before it writes `$`.
//!
//! [`Display`]: std::fmt::Display

pub mod language;
pub mod mailbox;
mod region;

pub use language::command::{
    Action, Command, FilterRemoval, FilterUpdate, RuleId, RuleNumber, UnregisterScope,
};
pub use language::field::{Class, Field, FieldValue};
pub use language::parse::error::{CommandError, ErrorCode};
pub use language::parse::{MAX_COMMAND, ParsedCommand, Place, split_lines};
pub use language::reply::{Rejection, Reply};
pub use language::service::{
    BackendChange, BackendName, Check, Destination, Frontend, MAX_WEIGHT, Method, OnDead, OnEmpty,
    ServiceOptions, ServiceSpec,
};
pub use language::value::{
    AddressRange, EtherType, Fragment, FragmentMatch, MacAddr, MacMask, NumberRange,
    ParseValueError, Protocol, TcpFlags,
};
pub use region::{DEFAULT_SIZE, Region, RegionError};
