//! Hooks of programs that start VMs: they attach and detach channels. A hook prints nothing and never
//! fails; what goes wrong is in the system's log.

pub mod libvirt;
pub mod proxmox;

use crate::api::client::ask;
use crate::api::{Answer, Request};
use std::fmt::Display;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// The keys of a channel that a VM's definition may give.
const METADATA_KEYS: [&str; 7] =
    ["ip", "to", "middleboxes", "services", "backends", "rules", "rate"];

/// The moment of a VM's life at which a hook is called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Start,
    End,
}

/// Attaches or detaches the channel that a VM asks for, if it asks for one.
fn follow(socket: &Path, vm: &str, moment: Moment, channel: Result<Option<String>, impl Display>) {
    let channel = match channel {
        Ok(Some(channel)) => channel,
        Ok(None) => return,
        Err(error) => return complain(vm, &error.to_string()),
    };
    let request = match moment {
        Moment::Start => Request::Attach { channel },
        // With its keys: the memory may be that of another VM by now.
        Moment::End => Request::Detach { name: channel },
    };
    match ask(socket, &request) {
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
