//! Timeouts of the flow caches in the kernel, in seconds.
//!
//! The kernel's maps are a cache of the engine's flow table. The quarantine of [`crate::slots`]
//! follows from the longest of these.

/// Lifetime of a cached flow towards its backend. It is not refreshed, so a live flow passes the
/// engine once in this time, which renews the entry with the same backend.
pub const FLOW_TIMEOUT: u32 = 60;
/// Lifetime of the cached reply direction of a TCP flow: as long as an established connection may
/// be silent (RFC 5382, REQ-5), so that an engine that starts anew recovers every one.
pub const TCP_REPLY_TIMEOUT: u32 = 7440;
/// Lifetime of the cached reply direction of a UDP flow: shorter than the engine keeps the flow, so
/// that replies alone keep it alive.
pub const UDP_REPLY_TIMEOUT: u32 = 120;
/// Lifetime of the entry that marks a flow of a backend as its own.
pub const BYPASS_TIMEOUT: u32 = 90;
/// Lifetime of the note of a TCP connection that opens, by which its answer is known without the
/// engine: as long as a SYN is sent again (tcp_syn_retries of 6: 63 s).
pub const OPENING_TIMEOUT: u32 = 63;
/// Lifetime of a cached flow that is closing; the engine keeps it longer.
pub const CLOSE_TIMEOUT: u32 = 5;
/// Lifetime of a TCP conversation that a middlebox itself has begun: as of a redirected one.
pub const OWN_TCP_TIMEOUT: u32 = TCP_REPLY_TIMEOUT;
/// Lifetime of a TCP conversation that a middlebox itself has begun, from its SYN to its next packet
/// and after its FIN or RST: as in connection tracking (nf_conntrack_proto_tcp.c, SYN_SENT and
/// TIME_WAIT).
pub const OWN_TCP_SHORT_TIMEOUT: u32 = 120;
/// Lifetime of a UDP conversation that a middlebox itself has begun (RFC 4787, REQ-5).
pub const OWN_UDP_TIMEOUT: u32 = 300;
/// Lifetime of the note of a backend's own ARP packet or neighbour advertisement: longer than nfqd
/// reads them.
pub const NEIGHBOUR_TIMEOUT: u32 = 120;
/// The longest lifetime of a cache entry.
pub const LONGEST_TIMEOUT: u32 = TCP_REPLY_TIMEOUT;
