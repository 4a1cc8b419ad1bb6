//! The limits of the process: what is too low is said at the start, by its name, and not by whatever
//! fails first.

use crate::config::{ChannelSpec, Transport};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors that the daemon needs beside those of queues and channels; 40 of them are for clients of
/// the control sockets.
const FILES: u64 = 64;
/// Descriptors of a queue with its worker.
const FILES_OF_QUEUE: u64 = 4;
/// Address space in bytes, most of it for the flow table.
const MEMORY: u64 = 160 << 20;
/// Address space of a queue with its worker, in bytes.
const MEMORY_OF_QUEUE: u64 = 8 << 20;

/// A limit that is too low.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LimitError {
    /// Descriptors.
    #[error(
        "this process may have {limit} open files, and needs {needed}; raise the limit with 'ulimit -n', or \
         LimitNOFILE= in a systemd unit"
    )]
    Files {
        /// The limit.
        limit: u64,
        /// The number needed.
        needed: u64,
    },
    /// Address space.
    #[error(
        "this process may use {} MiB of address space, and needs {}; raise the limit with 'ulimit -v', or \
         LimitAS= in a systemd unit",
        limit >> 20,
        needed >> 20
    )]
    Memory {
        /// The limit in bytes.
        limit: u64,
        /// The bytes needed.
        needed: u64,
    },
}

/// Raises the limits of this process as far as it may, and checks that they are enough.
///
/// # Errors
/// If one is not.
pub fn check<'a>(
    queues: u16,
    channels: impl Iterator<Item = &'a ChannelSpec>,
) -> Result<(), LimitError> {
    let of = |resource: Resource| {
        let Ok((soft, hard)) = getrlimit(resource) else { return u64::MAX };
        // A process may always raise its soft limit to the hard one.
        if setrlimit(resource, hard, hard).is_ok() { hard } else { soft }
    };
    let files = channels.map(|spec| files_of(&spec.transport)).sum();
    suffice(of(Resource::RLIMIT_NOFILE), of(Resource::RLIMIT_AS), queues, files)
}

/// Returns the descriptors of a channel.
fn files_of(transport: &Transport) -> u64 {
    match transport {
        Transport::Shm(_) => 1,
        // The socket, the connection, the memory, two bells.
        Transport::Doorbell(_) => 5,
        // The connections.
        Transport::Vsock(_) => 8,
    }
}

fn suffice(files: u64, memory: u64, queues: u16, of_channels: u64) -> Result<(), LimitError> {
    let needed = FILES + FILES_OF_QUEUE * u64::from(queues) + of_channels;
    if files < needed {
        return Err(LimitError::Files { limit: files, needed });
    }
    let needed = MEMORY + MEMORY_OF_QUEUE * u64::from(queues);
    if memory < needed {
        return Err(LimitError::Memory { limit: memory, needed });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_low_is_named() {
        assert_eq!(suffice(1024, u64::MAX, 4, 10), Ok(()));
        assert_eq!(suffice(1024, 200 << 20, 4, 10), Ok(()));
        let error = suffice(20, u64::MAX, 4, 10).unwrap_err();
        assert!(error.to_string().contains("20 open files, and needs 90;"), "{error}");
        assert!(suffice(1024, u64::MAX, 4, 1000).is_err(), "a region has a descriptor");
        let error = suffice(1024, 100 << 20, 4, 0).unwrap_err();
        assert!(error.to_string().contains("100 MiB of address space, and needs 192;"), "{error}");
    }
}
