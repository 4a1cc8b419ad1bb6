//! Limits on what guests may register, so that one of them cannot fill the host.

/// The most rules of one middlebox.
pub const MAX_RULES: usize = 1024;
/// The most services of one middlebox.
pub const MAX_SERVICES: usize = 16;
/// The most backends of one service: the table of consistent hashing has a byte for each place.
pub const MAX_BACKENDS: usize = 255;
/// The most backends of all services of one middlebox together.
pub const MAX_MIDDLEBOX_BACKENDS: usize = 512;

/// The rejection of a command that would exceed one of the two limits on backends.
pub(super) const TOO_MANY_BACKENDS: &str =
    "too many backends: a service may have 255, all services of a middlebox together 512";

/// Returns the index of the first backend that is over a limit, if a service gets `backends` of
/// them and the other services of the middlebox have `others`.
pub(super) fn first_backend_over_limit(others: usize, backends: usize) -> Option<usize> {
    let most = MAX_BACKENDS.min(MAX_MIDDLEBOX_BACKENDS.saturating_sub(others));
    (backends > most).then_some(most)
}

/// The most middleboxes of one network: the kernel's set of them has a fixed size.
pub const MIDDLEBOXES_OF_NETWORK: u32 = 1 << 14;
/// The most addresses of backends, of one family, on one network.
pub const BACKENDS_OF_NETWORK: u32 = 1 << 13;
