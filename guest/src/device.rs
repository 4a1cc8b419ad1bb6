//! The ivshmem device of this VM, without any driver: sysfs maps its memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Red Hat's ivshmem device (QEMU docs/specs/ivshmem-spec).
const VENDOR: &str = "0x1af4";
const DEVICE: &str = "0x1110";
const DEVICES: &str = "/sys/bus/pci/devices";

/// The value of `--device`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Device {
    /// The first ivshmem device.
    Auto,
    /// The one at this PCI address.
    At(String),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Device, String> {
        if text == "auto" {
            return Ok(Device::Auto);
        }
        let address =
            text.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'));
        if text.is_empty() || !address {
            return Err(format!(
                "'{text}' is not a PCI address; write auto, or one like 0000:00:04.0 (lspci -D shows them)"
            ));
        }
        // The domain may be left out, as lspci does by default.
        let domain = if text.matches(':').count() == 1 { "0000:" } else { "" };
        Ok(Device::At(format!("{domain}{text}")))
    }
}

/// The reason there is no device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// There is none in this VM.
    #[error(
        "no ivshmem device in this VM; give it '-object memory-backend-file,id=nfqd,share=on,mem-path=PATH,size=1M -device \
         ivshmem-plain,memdev=nfqd', with PATH as --shm of nfqd on the host; or a vsock device, with its CID as --vsock"
    )]
    None,
    /// There is none at this address.
    #[error(
        "{0} is not an ivshmem device (vendor {VENDOR}, device {DEVICE}); --device auto looks for one"
    )]
    Other(String),
    /// The device cannot be switched on.
    #[error("{path}: {source}; run as root")]
    Enable {
        /// The file that switches it on.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A device that was found.
#[derive(Debug)]
pub(crate) struct Found {
    /// The PCI address.
    pub address: String,
    /// The file that maps its shared memory (BAR 2).
    pub memory: PathBuf,
    /// The addresses of other ivshmem devices, if this one was not asked for by its own.
    pub others: Vec<String>,
    /// The file of its registers.
    pub registers: PathBuf,
}

/// Switches the device on.
///
/// # Errors
/// If there is no such device, or it cannot be switched on.
pub(crate) fn memory(device: &Device) -> Result<Found, DeviceError> {
    find(Path::new(DEVICES), device)
}

fn find(devices: &Path, device: &Device) -> Result<Found, DeviceError> {
    let is_ivshmem = |path: &Path| {
        let id =
            |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default().trim().to_string();
        id("vendor") == VENDOR && id("device") == DEVICE
    };
    let mut others = Vec::new();
    let path = match device {
        Device::At(address) => {
            let path = devices.join(address);
            if !is_ivshmem(&path) {
                return Err(DeviceError::Other(address.clone()));
            }
            path
        }
        Device::Auto => {
            let mut all: Vec<PathBuf> = fs::read_dir(devices)
                .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
                .unwrap_or_default();
            all.sort();
            let mut found = all.into_iter().filter(|path| is_ivshmem(path));
            let first = found.next().ok_or(DeviceError::None)?;
            others.extend(found.map(|path| name_of(&path)));
            first
        }
    };
    let enable = path.join("enable");
    fs::write(&enable, "1").map_err(|source| DeviceError::Enable { path: enable, source })?;
    let (memory, registers) = (path.join("resource2"), path.join("resource0"));
    Ok(Found { address: name_of(&path), memory, others, registers })
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ivshmem_device_is_found_and_switched_on() {
        let dir = tempfile::tempdir().unwrap();
        for (address, device) in
            [("0000:00:01.0", "0x1000"), ("0000:00:05.0", DEVICE), ("0000:00:04.0", DEVICE)]
        {
            let path = dir.path().join(address);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("vendor"), "0x1af4\n").unwrap();
            fs::write(path.join("device"), format!("{device}\n")).unwrap();
            fs::write(path.join("enable"), "0\n").unwrap();
        }
        let first = dir.path().join("0000:00:04.0");
        let found = find(dir.path(), &Device::Auto).unwrap();
        assert_eq!(found.memory, first.join("resource2"));
        // The old behaviour: the other one was not mentioned.
        assert_eq!(
            (found.address.as_str(), found.others),
            ("0000:00:04.0", vec!["0000:00:05.0".to_string()])
        );
        assert_eq!(fs::read_to_string(first.join("enable")).unwrap(), "1");
        let named = "00:05.0".parse().unwrap();
        let found = find(dir.path(), &named).unwrap();
        assert_eq!(found.memory, dir.path().join("0000:00:05.0/resource2"));
        assert!(found.others.is_empty());
        assert!(matches!(
            find(dir.path(), &"00:01.0".parse().unwrap()),
            Err(DeviceError::Other(_))
        ));
        assert!(matches!(find(Path::new("/nowhere"), &Device::Auto), Err(DeviceError::None)));
        assert!("../../etc".parse::<Device>().is_err());
    }
}
