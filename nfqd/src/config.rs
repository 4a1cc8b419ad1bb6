//! What the daemon is told: flags, and a file of the same names which flags win over.

use clap::Args;
use nfqd_rules::nft::ruleset::FastPath;
use nfqd_shmctl::{AddressRange, MacAddr};
use serde::Deserialize;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The daemon's flags. Each may stand in the file of `--config` under the same name.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Options {
    /// NFQUEUE numbers, a thread each: N or N-M [default: 0-3]
    #[arg(long, value_name = "N|N-M")]
    pub queue: Option<QueueRange>,

    /// An ivshmem-plain region, made (1 MiB) when it is not there; repeatable, one a VM. mac= (repeatable) binds it to
    /// the MACs it may speak for, to= (repeatable) to the addresses it may redirect to
    #[arg(long, value_name = "PATH[,mac=MAC]...[,to=ADDRESS[/LENGTH]]...")]
    #[serde(default)]
    pub shm: Vec<ShmSpec>,

    /// Commands to apply at start, one a line, # comments
    #[arg(long, value_name = "FILE")]
    pub commands: Option<PathBuf>,

    /// Where registrations are kept [default: /var/lib/nfqd]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// What the kernel does without the engine [default: full]. With off, a full queue lets through what --fail open says,
    /// filters included: it is for comparing the two
    #[arg(long, value_name = "full|off")]
    pub fast_path: Option<FastPathChoice>,

    /// How frames get into the queue [default: auto]
    #[arg(long, value_name = "auto|native|br-netfilter")]
    pub steer: Option<SteerChoice>,

    /// What happens to queued traffic when nfqd is not there [default: open]
    #[arg(long, value_name = "open|closed")]
    pub fail: Option<FailChoice>,

    /// Where 'nfqd status' finds the daemon [default: /run/nfqd.sock]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// A TOML file with the same names; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// Where `nfqd status` finds the daemon.
pub const DEFAULT_CONTROL: &str = "/run/nfqd.sock";
const DEFAULT_STATE: &str = "/var/lib/nfqd";

/// `--fast-path`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FastPathChoice {
    /// The kernel does everything it can.
    Full,
    /// Every frame to a middlebox goes to the engine.
    Off,
}

/// `--steer`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SteerChoice {
    /// Native where the kernel can, br-netfilter otherwise.
    Auto,
    /// The nft queue expression.
    Native,
    /// By br_netfilter and the xt target NFQUEUE.
    BrNetfilter,
}

/// `--fail`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FailChoice {
    /// It goes on, as if there were no nfqd; what the fast path knows still holds.
    Open,
    /// It is dropped.
    Closed,
}

/// `--queue`: at most 64 numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct QueueRange {
    /// The first number.
    pub first: u16,
    /// How many.
    pub count: u16,
}

impl FromStr for QueueRange {
    type Err = String;

    fn from_str(text: &str) -> Result<QueueRange, String> {
        let wrong =
            || format!("'{text}' is no range of queues; write N or N-M, like 0-3, with at most 64 numbers");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| -> Result<u16, String> {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse().map_err(|_| wrong()) } else { Err(wrong()) }
        };
        let (first, last) = (number(first)?, number(last)?);
        let count = last.checked_sub(first).and_then(|n| n.checked_add(1)).filter(|n| *n <= 64);
        Ok(QueueRange { first, count: count.ok_or_else(wrong)? })
    }
}

impl TryFrom<String> for QueueRange {
    type Error = String;

    fn try_from(text: String) -> Result<QueueRange, String> {
        text.parse()
    }
}

/// `--shm`: a region, the MACs that may be spoken for there, and the addresses that may be redirected to. None of a
/// kind means every one.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct ShmSpec {
    /// The region.
    pub path: PathBuf,
    /// The MACs.
    pub macs: Vec<MacAddr>,
    /// The addresses.
    pub to: Vec<AddressRange>,
}

impl ShmSpec {
    /// Whether the channel's `to=` has this address; without any it has all.
    pub fn may_redirect_to(&self, ip: IpAddr) -> bool {
        self.to.is_empty() || self.to.iter().any(|range| range.contains(ip))
    }
}

impl FromStr for ShmSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<ShmSpec, String> {
        let mut parts = text.split(',');
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or("there is no path; write PATH[,mac=MAC]...[,to=ADDRESS]...")?;
        let mut spec = ShmSpec { path: PathBuf::from(path), macs: Vec::new(), to: Vec::new() };
        for part in parts {
            let wrong = || format!("'{part}' behind the path is neither mac=MAC nor to=ADDRESS[/LENGTH]");
            match part.split_once('=') {
                Some(("mac", mac)) => spec.macs.push(mac.parse().map_err(|()| wrong())?),
                Some(("to", to)) => spec.to.push(to.parse().map_err(|()| wrong())?),
                _ => return Err(wrong()),
            }
        }
        Ok(spec)
    }
}

impl TryFrom<String> for ShmSpec {
    type Error = String;

    fn try_from(text: String) -> Result<ShmSpec, String> {
        text.parse()
    }
}

/// The configuration, complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// NFQUEUE numbers.
    pub queues: QueueRange,
    /// Regions.
    pub shm: Vec<ShmSpec>,
    /// Commands to apply at start.
    pub commands: Option<PathBuf>,
    /// Where registrations are kept.
    pub state: PathBuf,
    /// What the kernel does alone.
    pub fast_path: FastPath,
    /// How frames get into the queue.
    pub steer: SteerChoice,
    /// What happens without nfqd.
    pub fail: FailChoice,
    /// Where `nfqd status` asks.
    pub control: PathBuf,
}

impl Options {
    /// The configuration of these flags, of the file they name, and of the defaults.
    ///
    /// # Errors
    /// When the file cannot be read or says what it must not; the text names the line.
    pub fn resolve(&self) -> Result<Config, String> {
        let file = match &self.config {
            Some(path) => Options::read(path)?,
            None => Options::default(),
        };
        let fast_path = match self.fast_path.or(file.fast_path) {
            Some(FastPathChoice::Off) => FastPath::Off,
            _ => FastPath::Full,
        };
        let path = |flag: &Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            flag.clone().or(file).unwrap_or_else(|| PathBuf::from(default))
        };
        Ok(Config {
            queues: self.queue.or(file.queue).unwrap_or(QueueRange { first: 0, count: 4 }),
            shm: if self.shm.is_empty() { file.shm } else { self.shm.clone() },
            commands: self.commands.clone().or(file.commands),
            state: path(&self.state, file.state, DEFAULT_STATE),
            fast_path,
            steer: self.steer.or(file.steer).unwrap_or(SteerChoice::Auto),
            fail: self.fail.or(file.fail).unwrap_or(FailChoice::Open),
            control: path(&self.control, file.control, DEFAULT_CONTROL),
        })
    }

    fn read(path: &Path) -> Result<Options, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_queues() {
        assert_eq!("0-3".parse(), Ok(QueueRange { first: 0, count: 4 }));
        assert_eq!("7".parse(), Ok(QueueRange { first: 7, count: 1 }));
        assert_eq!("65535".parse(), Ok(QueueRange { first: 65535, count: 1 }));
        for bad in ["", "-", "3-0", "0-64", "a", "0-", "+1", "65536", "0-3-5", "0-65535"] {
            let error = bad.parse::<QueueRange>().unwrap_err();
            assert!(error.contains(&format!("'{bad}'")), "{error}");
        }
    }

    #[test]
    fn regions_with_their_macs() {
        let spec: ShmSpec = "/dev/shm/vm1,mac=2:0:0:0:0:1,mac=2:0:0:0:0:2".parse().unwrap();
        assert_eq!((spec.path, spec.macs.len()), (PathBuf::from("/dev/shm/vm1"), 2));
        let spec: ShmSpec = "/x,to=10.0.0.0/8,to=2001:db8::1".parse().unwrap();
        let may = |ip: &str| spec.to.iter().any(|to| to.contains(ip.parse().unwrap()));
        assert!(
            may("10.255.0.1") && may("2001:db8::1") && !may("11.0.0.0") && !may("2001:db8::2") && !may("::1")
        );
        for bad in [
            "/x,to=10.0.0.0/33",
            "/x,to=",
            "/x,to=a",
            "",
            ",mac=2:0:0:0:0:1",
            "/x,mac=",
            "/x,2:0:0:0:0:1",
            "/x,mac=2:0:0:0:0",
        ] {
            assert!(bad.parse::<ShmSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_names_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nfqd.toml");
        std::fs::write(
            &path,
            "queue = \"4-5\"\nshm = [\"/x,mac=2:0:0:0:0:1\"]\nfast-path = \"off\"\nfail = \"closed\"\n",
        )
        .unwrap();
        let flags =
            Options { config: Some(path.clone()), fail: Some(FailChoice::Open), ..Options::default() };
        let config = flags.resolve().unwrap();
        assert_eq!((config.queues.first, config.queues.count, config.fast_path), (4, 2, FastPath::Off));
        assert_eq!((config.fail, config.shm.len()), (FailChoice::Open, 1));
        std::fs::write(&path, "queue = \"0-3\"\nfastpath = \"off\"\n").unwrap();
        let error = flags.resolve().unwrap_err();
        assert!(error.contains("fastpath") && error.contains("line 2"), "{error}");
    }
}
