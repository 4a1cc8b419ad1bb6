//! Channels that were attached to the running daemon, beside those of its configuration. They are kept
//! in a file beside the registrations, one a line as `attach` names them, so that they outlive a restart.

use crate::config::{ChannelSpec, ConfigError, Transport};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The directory of channels whose names are no paths.
const SHARED_MEMORY: &str = "/dev/shm";

/// The attached channels, by the ways by which they arrive.
#[derive(Debug)]
pub struct AttachedChannels {
    file: PathBuf,
    specs: BTreeMap<Transport, (String, ChannelSpec)>,
    /// Lines that are not valid, at the moment or in this version. They are kept.
    invalid: Vec<String>,
    /// Whether the file could not be read, so that it must not be replaced.
    is_unread: bool,
}

/// The reason a channel cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The specification is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is a channel of the same name.
    #[error("{0} is a channel already, with other keys; detach it first")]
    Taken(Transport),
    /// There is no such channel.
    #[error("{0} is not an attached channel; 'nfqd status' shows the channels")]
    Unknown(Transport),
    /// The channel has other keys than the request.
    #[error("{0} is attached with other keys; it stays")]
    OtherKeys(Transport),
    /// The region cannot be used.
    #[error("{0}")]
    Region(String),
    /// The file of attached channels cannot be written.
    #[error("{path}: {source}; the channel is not attached")]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Returns the path of a region: the name itself if it is a path, or else a file in /dev/shm.
pub fn path_of(name: &str) -> PathBuf {
    if name.contains('/') { PathBuf::from(name) } else { Path::new(SHARED_MEMORY).join(name) }
}

impl AttachedChannels {
    /// Reads the channels that were attached before. Lines that are not valid are logged, and kept in the
    /// file.
    pub fn load(state: &Path) -> AttachedChannels {
        let file = state.join("channels");
        let (mut specs, mut invalid) = (BTreeMap::new(), Vec::new());
        let text = fs::read_to_string(&file);
        let is_unread = text.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::NotFound);
        if let Err(error) = text.as_ref().map_err(ToString::to_string)
            && is_unread
        {
            log::error!("{}: {error}; attached channels are not read", file.display());
        }
        for line in text.unwrap_or_default().lines().filter(|line| !line.is_empty()) {
            match ChannelSpec::named(line) {
                Ok(spec) => drop(specs.insert(spec.transport.clone(), (line.to_string(), spec))),
                Err(error) => {
                    log::error!("{}: {line}: {error}; not attached", file.display());
                    invalid.push(line.to_string());
                }
            }
        }
        AttachedChannels { file, specs, invalid, is_unread }
    }

    /// Whether all that was attached is known: the file was read, and every line is valid.
    pub fn is_complete(&self) -> bool {
        !self.is_unread && self.invalid.is_empty()
    }

    /// Returns the specifications.
    pub fn specs(&self) -> impl Iterator<Item = &ChannelSpec> {
        self.specs.values().map(|(_, spec)| spec)
    }

    /// Whether there is an attached channel of this name.
    pub fn contains(&self, transport: &Transport) -> bool {
        self.specs.contains_key(transport)
    }

    /// Parses a channel as `attach` names it: `NAME[,KEY=VALUE]…`, where the name is that of a region, or
    /// `doorbell:PATH` or `vsock:CID`. Returns the text by which it is kept as well.
    ///
    /// # Errors
    /// If it is not valid.
    pub fn parse(text: &str) -> Result<(String, ChannelSpec), AttachError> {
        let (name, keys) = text.split_once(',').map_or((text, None), |(a, b)| (a, Some(b)));
        let name = match name.split_once(':') {
            Some(("doorbell" | "vsock", _)) => name.to_string(),
            _ => path_of(name).display().to_string(),
        };
        let text = keys.map_or(name.clone(), |keys| format!("{name},{keys}"));
        let spec = ChannelSpec::named(&text)?;
        Ok((text, spec))
    }

    /// Adds a channel.
    ///
    /// # Errors
    /// If it cannot be saved; it is not added then.
    pub fn add(&mut self, text: String, spec: ChannelSpec) -> Result<(), AttachError> {
        let transport = spec.transport.clone();
        let before = self.specs.insert(transport.clone(), (text, spec));
        self.save().inspect_err(|_| {
            self.specs.remove(&transport);
            self.specs.extend(before.map(|before| (transport.clone(), before)));
        })
    }

    /// Removes a channel.
    ///
    /// # Errors
    /// If there is none, or that cannot be saved; it stays then.
    pub fn remove(&mut self, transport: &Transport) -> Result<(), AttachError> {
        let unknown = || AttachError::Unknown(transport.clone());
        let before = self.specs.remove(transport).ok_or_else(unknown)?;
        self.save().inspect_err(|_| drop(self.specs.insert(transport.clone(), before.clone())))
    }

    /// Writes the file anew, so that it is whole at any time.
    fn save(&self) -> Result<(), AttachError> {
        let lines = self.specs.values().map(|(text, _)| text).chain(&self.invalid);
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        let new = self.file.with_extension("new");
        let write = || -> io::Result<()> {
            if self.is_unread {
                return Err(io::Error::other(
                    "could not be read at the start, and is not replaced",
                ));
            }
            let mut file = File::create(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, &self.file)
        };
        write().map_err(|source| AttachError::Io { path: self.file.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attached_channels_outlive_a_restart() {
        let shm = |path: &str| Transport::Shm(PathBuf::from(path));
        let dir = tempfile::tempdir().unwrap();
        let mut channels = AttachedChannels::load(dir.path());
        let (text, spec) = AttachedChannels::parse("vm1,mac=2:0:0:0:0:1").unwrap();
        assert_eq!((&spec.transport, spec.macs.len()), (&shm("/dev/shm/vm1"), 1));
        channels.add(text, spec.clone()).unwrap();
        let (text, other) = AttachedChannels::parse("/run/vm2").unwrap();
        channels.add(text, other.clone()).unwrap();
        let (text, vsock) = AttachedChannels::parse("vsock:3,mac=2:0:0:0:0:3").unwrap();
        channels.add(text, vsock.clone()).unwrap();
        let mut again = AttachedChannels::load(dir.path());
        assert_eq!(again.specs().collect::<Vec<_>>(), [&spec, &other, &vsock]);
        again.remove(&Transport::Vsock(3)).unwrap();
        again.remove(&shm("/dev/shm/vm1")).unwrap();
        assert!(matches!(again.remove(&shm("/dev/shm/vm1")), Err(AttachError::Unknown(_))));
        assert!(AttachedChannels::load(dir.path()).contains(&shm("/run/vm2")));
        assert!(AttachedChannels::parse("vm1,mac=x").is_err());
        // An invalid line is kept, and a file that cannot be read is not replaced.
        let file = dir.path().join("channels");
        let odd = "/run/vm3,owner=nobody-of-this-name";
        fs::write(&file, format!("{odd}\n/run/vm2\n")).unwrap();
        let mut again = AttachedChannels::load(dir.path());
        again.remove(&shm("/run/vm2")).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{odd}\n"));
        fs::write(&file, b"/run/vm2\n\xff").unwrap();
        let mut unread = AttachedChannels::load(dir.path());
        let (text, spec) = AttachedChannels::parse("/run/vm4").unwrap();
        assert!(unread.add(text, spec).is_err() && fs::read(&file).unwrap().ends_with(b"\xff"));
        fs::write(&file, "/run/vm2\n").unwrap();
        let mut again = AttachedChannels::load(dir.path());
        // Nothing is half done if it cannot be saved.
        drop(dir);
        assert!(again.remove(&shm("/run/vm2")).is_err() && again.contains(&shm("/run/vm2")));
    }
}
