//! Hooks of programs that start VMs: they attach and detach channels. A hook prints nothing and never
//! fails; what goes wrong is in the system's log.

pub mod libvirt;
pub mod proxmox;

use crate::api::client::ask;
use crate::api::{Answer, Request};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Asks the daemon for a change on behalf of a VM.
fn change(socket: &Path, vm: &str, request: &Request) {
    match ask(socket, request) {
        Ok(Answer::Error(error)) => complain(vm, &error.to_string()),
        Ok(_) => {}
        Err(error) => complain(vm, &format!("{}: {error}", socket.display())),
    }
}

/// Writes a warning to the system's log (RFC 3164: facility daemon, severity warning).
fn complain(vm: &str, text: &str) {
    let line = format!("<28>nfqd-hook: {vm}: {text}");
    // Without a log there is nobody to tell.
    let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(line.as_bytes(), "/dev/log"));
}

/// Whether a character separates the keys of a channel, or the words of a line.
fn is_separator(c: char) -> bool {
    c == ',' || c.is_whitespace()
}
