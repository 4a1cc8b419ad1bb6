//! The configuration: flags, and a file with the same names; flags take precedence.

use clap::Args;
use nfqd_rules::Network;
use nfqd_rules::nft::options::FastPath;
use nfqd_shmctl::{AddressRange, MacAddr, Ownership};
use nix::unistd::{Group, User};
use serde::de::Error;
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The flags of the daemon. Each may be in the file of `--config` under the same name.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DaemonArgs {
    /// NFQUEUE numbers, with a thread each: N or N-M [default: 0-3]
    #[arg(long, value_name = "N|N-M")]
    pub queue: Option<QueueRange>,

    /// An ivshmem-plain region, created (1 MiB) if it does not exist; repeatable, one per VM. mac=
    /// (repeatable) binds it to the MACs it may speak for, ip= (repeatable) to the addresses it may
    /// register, to= (repeatable) to those it may redirect to, bridge= and vlan= to the network it is
    /// on. mac=any says that it may speak for all. owner=, group= and mode= are those of
    /// a region that nfqd creates [default: nfqd's own, and 0600]. middleboxes=, services=, backends=
    /// and rules= limit what may be registered, rate= the commands per second
    #[arg(
        long,
        value_name = "PATH[,mac=MAC]...[,ip=ADDRESS[/LENGTH]]...[,to=ADDRESS[/LENGTH]]...[,bridge=NAME[,vlan=ID]][,KEY=VALUE]...",
        value_parser = ChannelSpec::shm
    )]
    #[serde(default, deserialize_with = "shm")]
    pub shm: Vec<ChannelSpec>,

    /// The socket at which nfqd is the server of one VM's ivshmem-doorbell device; repeatable. The keys
    /// are those of --shm; owner=, group= and mode= are those of the socket
    #[arg(long, value_name = "PATH[,KEY=VALUE]...", value_parser = ChannelSpec::doorbell)]
    #[serde(default, deserialize_with = "doorbell")]
    pub doorbell: Vec<ChannelSpec>,

    /// A VM that sends its commands through vsock, by its CID; repeatable. The keys are those of --shm,
    /// without owner=, group= and mode=
    #[arg(long, value_name = "CID[,KEY=VALUE]...", value_parser = ChannelSpec::vsock)]
    #[serde(default, deserialize_with = "vsock")]
    pub vsock: Vec<ChannelSpec>,

    /// Commands to apply at start, one a line, # comments
    #[arg(long, value_name = "FILE")]
    pub commands: Option<PathBuf>,

    /// The directory of registrations [default: /var/lib/nfqd]
    #[arg(long, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// The share of the work that the kernel does without the engine [default: full]. Off is for
    /// comparison only: with --fail open, a full queue then bypasses the filters as well
    #[arg(long, value_name = "full|off")]
    pub fast_path: Option<FastPathChoice>,

    /// The path of frames into the queues [default: auto]
    #[arg(long, value_name = "auto|native|br-netfilter")]
    pub steer: Option<SteerChoice>,

    /// Treatment of packets that the engine cannot take: nfqd is not running, or a queue is full
    /// [default: open]
    #[arg(long, value_name = "open|closed")]
    pub fail: Option<FailChoice>,

    /// The socket for every request [default: /run/nfqd/control]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// The socket for requests that change nothing [default: observe, beside --control]
    #[arg(long, value_name = "PATH")]
    pub observe: Option<PathBuf>,

    /// Serve this bridge only; repeatable [default: all bridges]
    #[arg(long, value_name = "NAME")]
    #[serde(default)]
    pub bridge: Vec<String>,

    /// A TOML file with the same names; flags take precedence
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// The default path of the control socket.
pub const DEFAULT_CONTROL: &str = "/run/nfqd/control";
/// The default path of the observation socket.
pub const DEFAULT_OBSERVE: &str = "/run/nfqd/observe";
/// The path of the control socket in earlier versions.
pub const LEGACY_CONTROL: &str = "/run/nfqd.sock";
const DEFAULT_STATE: &str = "/var/lib/nfqd";

/// The value of `--fast-path`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FastPathChoice {
    /// The kernel does everything it can.
    Full,
    /// Every frame to a middlebox goes to the engine.
    Off,
}

/// The value of `--steer`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SteerChoice {
    /// Native if the kernel supports it, br-netfilter otherwise.
    Auto,
    /// The nft queue expression.
    Native,
    /// br_netfilter and the xt target NFQUEUE.
    BrNetfilter,
}

/// The value of `--fail`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FailChoice {
    /// Packets pass, as if there were no nfqd; the fast path still works.
    Open,
    /// Packets are dropped.
    Closed,
}

/// The value of `--queue`: at most 64 numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct QueueRange {
    /// The first number.
    pub first: u16,
    /// The number of queues.
    pub count: u16,
}

/// The reason a configuration is not valid. The text names the file and the line, if there are any.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// The value of `--queue`.
    #[error("'{0}' is not a range of queues; write N or N-M, like 0-3, with at most 64 numbers")]
    Queues(String),
    /// A channel without a path.
    #[error(
        "there is no path; write PATH[,mac=MAC]...[,ip=ADDRESS]...[,to=ADDRESS]...[,bridge=NAME[,vlan=ID]]"
    )]
    NoPath,
    /// The path of a doorbell's socket.
    #[error(
        "'{0}' is not a path for a socket; write at most 100 ASCII letters, digits and any of / . _ -"
    )]
    SocketPath(String),
    /// The number of a VM.
    #[error(
        "'{0}' is not the CID of a VM; write a number from 3 to 4294967294, or 1 for this host"
    )]
    Cid(String),
    /// A word behind the name of a channel.
    #[error(
        "'{0}' is not a valid key or value of a channel; write mac=MAC, ip=ADDRESS[/LENGTH], \
         to=ADDRESS[/LENGTH], bridge=NAME, vlan=ID from 1 to 4094, middleboxes=, services=, backends=, rules= \
         or rate=NUMBER, and for a region or a socket owner=USER, group=GROUP or mode=MODE such as 0660"
    )]
    Binding(String),
    /// An owner that does not exist on this host.
    #[error("there is no {what} '{name}' on this host; write another name, or a number")]
    Unknown {
        /// The kind of name: user or group.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A binding to every MAC and to one.
    #[error("'mac=any' beside another mac=; write one or the other")]
    AnyAndOne,
    /// A VLAN without its bridge.
    #[error("'vlan={0}' without a bridge; write bridge=NAME as well")]
    VlanWithoutBridge(u16),
    /// The file of `--config`.
    #[error("{path}: {message}")]
    File {
        /// The path of the file.
        path: PathBuf,
        /// The message.
        message: String,
    },
}

impl FromStr for QueueRange {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<QueueRange, ConfigError> {
        let wrong = || ConfigError::Queues(text.to_string());
        let number = |text| number(text).and_then(|number| u16::try_from(number).ok());
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = number(first).zip(number(last)).ok_or_else(wrong)?;
        let count = last.checked_sub(first).and_then(|n| n.checked_add(1)).filter(|n| *n <= 64);
        Ok(QueueRange { first, count: count.ok_or_else(wrong)? })
    }
}

impl TryFrom<String> for QueueRange {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<QueueRange, ConfigError> {
        text.parse()
    }
}

/// The way by which a guest's commands arrive.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Transport {
    /// The region of an ivshmem-plain device, a file.
    Shm(PathBuf),
    /// An ivshmem-doorbell device, whose server listens at this path.
    Doorbell(PathBuf),
    /// vsock, by the VM's CID.
    Vsock(u32),
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Transport::Shm(path) | Transport::Doorbell(path) => path.display().fmt(f),
            Transport::Vsock(cid) => write!(f, "vsock {cid}"),
        }
    }
}

/// The limits of a channel: what it may have registered, and how often it may send. Without a limit of its own, that of the
/// host applies.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Quotas {
    /// Middleboxes.
    pub middleboxes: Option<u32>,
    /// Services of all its middleboxes.
    pub services: Option<u32>,
    /// Backends of all its services.
    pub backends: Option<u32>,
    /// Filter rules of all its middleboxes.
    pub rules: Option<u32>,
    /// Commands a second in the long run.
    pub rate: Option<u32>,
}

/// A channel: how it arrives, and the binding of its guest. Without MACs the guest may speak
/// for every one, without addresses it may redirect to every one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChannelSpec {
    /// The way by which its commands arrive.
    pub transport: Transport,
    /// The MACs that the guest may speak for.
    pub macs: Vec<MacAddr>,
    /// Whether the operator has said that it may speak for every MAC.
    pub any_mac: bool,
    /// The addresses that it may register; all if there are none.
    pub ips: Vec<AddressRange>,
    /// The addresses that it may redirect to.
    pub to: Vec<AddressRange>,
    /// The network that it is on; wherever its MACs are seen if there is none.
    pub network: Option<Network>,
    /// The owner and the mode of a region or a socket that nfqd makes.
    pub ownership: Ownership,
    /// Its quotas.
    pub quotas: Quotas,
}

impl ChannelSpec {
    /// Parses the value of `--shm`.
    ///
    /// # Errors
    /// If a part is not valid.
    pub fn shm(text: &str) -> Result<ChannelSpec, ConfigError> {
        ChannelSpec::parse(text, |path| {
            Some(path).filter(|path| !path.is_empty()).ok_or(ConfigError::NoPath)?;
            Ok(Transport::Shm(PathBuf::from(path)))
        })
    }

    /// Parses the value of `--doorbell`.
    ///
    /// # Errors
    /// If a part is not valid.
    pub fn doorbell(text: &str) -> Result<ChannelSpec, ConfigError> {
        // The path is part of the names under which its descriptors are kept.
        let may = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
        ChannelSpec::parse(text, |path| match path {
            "" => Err(ConfigError::NoPath),
            path if path.len() <= 100 && path.bytes().all(may) => {
                // One path has one spelling here.
                Ok(Transport::Doorbell(Path::new(path).components().collect()))
            }
            path => Err(ConfigError::SocketPath(path.to_string())),
        })
    }

    /// Parses the value of `--vsock`.
    ///
    /// # Errors
    /// If a part is not valid.
    pub fn vsock(text: &str) -> Result<ChannelSpec, ConfigError> {
        ChannelSpec::parse(text, |cid| {
            let wrong = || ConfigError::Cid(cid.to_string());
            let number = number(cid).ok_or_else(wrong)?;
            // 0 is the hypervisor, 2 the host, the last one any (vsock(7)).
            let is_vm = !matches!(number, 0 | 2 | u32::MAX);
            if is_vm { Ok(Transport::Vsock(number)) } else { Err(wrong()) }
        })
    }

    /// Parses a channel as it is named to the running daemon: a path, or `doorbell:PATH` or `vsock:CID`,
    /// with its keys.
    ///
    /// # Errors
    /// If a part is not valid.
    pub fn named(text: &str) -> Result<ChannelSpec, ConfigError> {
        match text.split_once(':') {
            Some(("doorbell", rest)) => ChannelSpec::doorbell(rest),
            Some(("vsock", rest)) => ChannelSpec::vsock(rest),
            _ => ChannelSpec::shm(text),
        }
    }

    /// Whether the guest may register an address.
    pub fn may_register(&self, ip: IpAddr) -> bool {
        self.ips.is_empty() || self.ips.iter().any(|range| range.contains(ip))
    }

    /// Whether the guest may redirect to an address.
    pub fn may_redirect_to(&self, ip: IpAddr) -> bool {
        self.to.is_empty() || self.to.iter().any(|range| range.contains(ip))
    }

    fn parse(
        text: &str,
        transport: impl FnOnce(&str) -> Result<Transport, ConfigError>,
    ) -> Result<ChannelSpec, ConfigError> {
        let mut parts = text.split(',');
        let mut spec = ChannelSpec {
            transport: transport(parts.next().unwrap_or_default())?,
            macs: vec![],
            any_mac: false,
            ips: vec![],
            to: vec![],
            network: None,
            ownership: Ownership::default(),
            quotas: Quotas::default(),
        };
        let has_file = !matches!(spec.transport, Transport::Vsock(_));
        let (mut bridge, mut vlan) = (None, None);
        for part in parts {
            let wrong = || ConfigError::Binding(part.to_string());
            let (key, value) = part.split_once('=').ok_or_else(wrong)?;
            match key {
                "mac" if value == "any" => spec.any_mac = true,
                "mac" => spec.macs.push(value.parse().map_err(|_| wrong())?),
                "ip" => spec.ips.push(value.parse().map_err(|_| wrong())?),
                "to" => spec.to.push(value.parse().map_err(|_| wrong())?),
                "bridge" if bridge.is_none() => {
                    bridge = Some(bridge_name(value).ok_or_else(wrong)?);
                }
                "vlan" if vlan.is_none() => vlan = Some(vlan_id(value).ok_or_else(wrong)?),
                "owner" if has_file => spec.ownership.owner = Some(user_id(value)?),
                "group" if has_file => spec.ownership.group = Some(group_id(value)?),
                "mode" if has_file => {
                    spec.ownership.mode = permissions(value).ok_or_else(wrong)?;
                }
                key => {
                    let quota = spec.quotas.get_mut(key).filter(|quota| quota.is_none());
                    *quota.ok_or_else(wrong)? = Some(number(value).ok_or_else(wrong)?);
                }
            }
        }
        if spec.quotas.rate == Some(0) {
            return Err(ConfigError::Binding("rate=0".to_string()));
        }
        if spec.any_mac && !spec.macs.is_empty() {
            return Err(ConfigError::AnyAndOne);
        }
        spec.network = match (bridge, vlan) {
            (Some(bridge), vlan) => Some(Network { vlan, ..bridge }),
            (None, Some(vlan)) => return Err(ConfigError::VlanWithoutBridge(vlan)),
            (None, None) => None,
        };
        Ok(spec)
    }
}

impl Quotas {
    fn get_mut(&mut self, key: &str) -> Option<&mut Option<u32>> {
        match key {
            "middleboxes" => Some(&mut self.middleboxes),
            "services" => Some(&mut self.services),
            "backends" => Some(&mut self.backends),
            "rules" => Some(&mut self.rules),
            "rate" => Some(&mut self.rate),
            _ => None,
        }
    }
}

type Parser = fn(&str) -> Result<ChannelSpec, ConfigError>;

fn list<'de, D: Deserializer<'de>>(file: D, parse: Parser) -> Result<Vec<ChannelSpec>, D::Error> {
    let texts = Vec::<String>::deserialize(file)?;
    texts.iter().map(|text| parse(text).map_err(D::Error::custom)).collect()
}

fn shm<'de, D: Deserializer<'de>>(file: D) -> Result<Vec<ChannelSpec>, D::Error> {
    list(file, ChannelSpec::shm)
}

fn doorbell<'de, D: Deserializer<'de>>(file: D) -> Result<Vec<ChannelSpec>, D::Error> {
    list(file, ChannelSpec::doorbell)
}

fn vsock<'de, D: Deserializer<'de>>(file: D) -> Result<Vec<ChannelSpec>, D::Error> {
    list(file, ChannelSpec::vsock)
}

/// Parses a number of decimal digits.
fn number(text: &str) -> Option<u32> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

/// Parses the name of a bridge.
fn bridge_name(name: &str) -> Option<Network> {
    let network: Network = name.parse().ok()?;
    Some(network).filter(|network| network.vlan.is_none())
}

/// Parses the id of a VLAN, from 1 to 4094.
fn vlan_id(text: &str) -> Option<u16> {
    number(text).and_then(|id| u16::try_from(id).ok()).filter(|id| (1..=4094).contains(id))
}

/// Returns the number of a user, by name or number.
fn user_id(name: &str) -> Result<u32, ConfigError> {
    let found = || User::from_name(name).ok().flatten().map(|user| user.uid.as_raw());
    let id = name.parse().ok().or_else(found);
    id.ok_or_else(|| ConfigError::Unknown { what: "user", name: name.to_string() })
}

/// Returns the number of a group, by name or number.
fn group_id(name: &str) -> Result<u32, ConfigError> {
    let found = || Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw());
    let id = name.parse().ok().or_else(found);
    id.ok_or_else(|| ConfigError::Unknown { what: "group", name: name.to_string() })
}

/// Parses permissions: three or four octal digits.
fn permissions(text: &str) -> Option<u32> {
    let is_octal = matches!(text.len(), 3 | 4) && text.bytes().all(|byte| byte.is_ascii_digit());
    let mode = if is_octal { u32::from_str_radix(text, 8).ok() } else { None };
    mode.filter(|mode| *mode <= 0o777)
}

/// The paths of the sockets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SocketPaths {
    /// The directory to create if it does not exist: that of the default paths.
    pub directory: Option<PathBuf>,
    /// The socket for every request.
    pub control: PathBuf,
    /// The socket for requests that change nothing.
    pub observe: PathBuf,
    /// The socket of earlier versions, if there is one.
    pub legacy: Option<PathBuf>,
}

/// The complete configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// NFQUEUE numbers.
    pub queues: QueueRange,
    /// The channels of the guests.
    pub channels: Vec<ChannelSpec>,
    /// The file of commands to apply at start.
    pub commands: Option<PathBuf>,
    /// The directory of registrations.
    pub state: PathBuf,
    /// The share of the work that the kernel does.
    pub fast_path: FastPath,
    /// The path of frames into the queues.
    pub steer: SteerChoice,
    /// The treatment of queued packets without nfqd.
    pub fail: FailChoice,
    /// The bridges to serve; all if there are none.
    pub bridges: Vec<String>,
    /// The paths of the sockets.
    pub sockets: SocketPaths,
}

impl DaemonArgs {
    /// Returns the configuration of these flags, of the file that they name, and of the defaults.
    ///
    /// # Errors
    /// If the file cannot be read or is not valid; the text names the line.
    pub fn resolve(&self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            Some(path) => DaemonArgs::read(path)?,
            None => DaemonArgs::default(),
        };
        let channels = channels(self, &file);
        let fast_path = match self.fast_path.or(file.fast_path) {
            Some(FastPathChoice::Off) => FastPath::Off,
            _ => FastPath::Full,
        };
        let state = self.state.clone().or(file.state);
        let control = self.control.clone().or(file.control);
        let observe = self.observe.clone().or(file.observe);
        Ok(Config {
            queues: self.queue.or(file.queue).unwrap_or(QueueRange { first: 0, count: 4 }),
            channels,
            commands: self.commands.clone().or(file.commands),
            state: state.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE)),
            fast_path,
            steer: self.steer.or(file.steer).unwrap_or(SteerChoice::Auto),
            fail: self.fail.or(file.fail).unwrap_or(FailChoice::Open),
            bridges: if self.bridge.is_empty() { file.bridge } else { self.bridge.clone() },
            sockets: socket_paths(control, observe),
        })
    }

    fn read(path: &Path) -> Result<DaemonArgs, ConfigError> {
        let error = |message| ConfigError::File { path: path.to_path_buf(), message };
        let text = std::fs::read_to_string(path).map_err(|source| error(source.to_string()))?;
        toml::from_str(&text).map_err(|source| error(source.to_string()))
    }
}

/// Returns the channels of the flags and of the file; flags of a kind replace those of the file. Of two
/// with the same name, the first one counts.
fn channels(flags: &DaemonArgs, file: &DaemonArgs) -> Vec<ChannelSpec> {
    let kinds =
        [(&flags.shm, &file.shm), (&flags.doorbell, &file.doorbell), (&flags.vsock, &file.vsock)];
    let mut out: Vec<ChannelSpec> = Vec::new();
    let of_kind = |(flags, file)| if Vec::is_empty(flags) { file } else { flags };
    for spec in kinds.into_iter().flat_map(of_kind) {
        if out.iter().any(|its| its.transport == spec.transport) {
            log::warn!("{} is given twice; the first one counts", spec.transport);
        } else {
            out.push(spec.clone());
        }
    }
    out
}

/// Returns the paths of the sockets. The old path is used beside the default one, and is what
/// `--control /run/nfqd.sock` means.
fn socket_paths(control: Option<PathBuf>, observe: Option<PathBuf>) -> SocketPaths {
    let is_legacy = |path: &PathBuf| path == Path::new(LEGACY_CONTROL);
    let control =
        control.filter(|path| !is_legacy(path)).unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL));
    let is_default = control == Path::new(DEFAULT_CONTROL);
    let beside = match control.file_name().and_then(|name| name.to_str()) {
        Some("control") | None => control.with_file_name("observe"),
        Some(name) => control.with_file_name(format!("{name}.observe")),
    };
    let directory = control.parent().filter(|_| is_default).map(Path::to_path_buf);
    SocketPaths {
        directory,
        observe: observe.unwrap_or(beside),
        control,
        legacy: is_default.then(|| PathBuf::from(LEGACY_CONTROL)),
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
            let error = bad.parse::<QueueRange>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{bad}'")), "{error}");
        }
    }

    #[test]
    fn regions_with_their_macs() {
        let spec = ChannelSpec::shm("/dev/shm/vm1,mac=2:0:0:0:0:1,mac=2:0:0:0:0:2").unwrap();
        assert_eq!((spec.transport.to_string().as_str(), spec.macs.len()), ("/dev/shm/vm1", 2));
        let spec = ChannelSpec::shm("/x,to=10.0.0.0/8,to=2001:db8::1").unwrap();
        let may = |ip: &str| spec.to.iter().any(|to| to.contains(ip.parse().unwrap()));
        assert!(
            may("10.255.0.1")
                && may("2001:db8::1")
                && !may("11.0.0.0")
                && !may("2001:db8::2")
                && !may("::1")
        );
        let network = |text| ChannelSpec::shm(text).unwrap().network.map(|n| n.to_string());
        assert_eq!(network("/x,vlan=100,bridge=br0").as_deref(), Some("br0 vlan 100"));
        assert_eq!((network("/x,bridge=br0").as_deref(), network("/x")), (Some("br0"), None));
        for bad in [
            "/x,to=10.0.0.0/33",
            "/x,to=",
            "/x,to=a",
            "",
            ",mac=2:0:0:0:0:1",
            "/x,mac=",
            "/x,2:0:0:0:0:1",
            "/x,mac=2:0:0:0:0",
            "/x,vlan=7",
            "/x,bridge=a/b",
            "/x,bridge=br0,vlan=0",
            "/x,bridge=br0,vlan=4095",
            "/x,bridge=br0,bridge=br1",
            "/x,rules=1,rules=2",
            "/x,rules=-1",
            "/x,rate=0",
            "/x,colour=1",
        ] {
            assert!(ChannelSpec::shm(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn doorbells_and_vsock_have_the_keys_of_regions() {
        let spec =
            ChannelSpec::doorbell("/run/vm1.sock,mac=2:0:0:0:0:1,mode=0660,rules=7").unwrap();
        assert_eq!((spec.ownership.mode, spec.quotas.rules), (0o660, Some(7)));
        let spec = ChannelSpec::vsock("42,ip=10.0.0.1,rate=9").unwrap();
        assert_eq!((spec.transport, spec.quotas.rate), (Transport::Vsock(42), Some(9)));
        for bad in ["", "0", "2", "4294967295", "+3", "a", "3,mode=0660", "3,owner=0"] {
            assert!(ChannelSpec::vsock(bad).is_err(), "{bad}");
        }
        for bad in ["", "/run/a b", "/run/a:b", &format!("/{}", "a".repeat(100))] {
            assert!(ChannelSpec::doorbell(bad).is_err(), "{bad}");
        }
        let named = |text| ChannelSpec::named(text).unwrap().transport;
        assert_eq!(named("vsock:3,rate=1"), Transport::Vsock(3));
        assert_eq!(named("doorbell:/a"), Transport::Doorbell(PathBuf::from("/a")));
        assert_eq!(named("/vsock:3"), Transport::Shm(PathBuf::from("/vsock:3")));
        let flags = DaemonArgs {
            shm: vec![ChannelSpec::shm("/a").unwrap(), ChannelSpec::shm("/a,rate=1").unwrap()],
            ..DaemonArgs::default()
        };
        assert_eq!(flags.resolve().unwrap().channels, flags.shm[..1]);
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
        let flags = DaemonArgs {
            config: Some(path.clone()),
            fail: Some(FailChoice::Open),
            ..DaemonArgs::default()
        };
        let config = flags.resolve().unwrap();
        assert_eq!(
            (config.queues.first, config.queues.count, config.fast_path),
            (4, 2, FastPath::Off)
        );
        assert_eq!((config.fail, config.channels.len()), (FailChoice::Open, 1));
        std::fs::write(&path, "queue = \"0-3\"\nfastpath = \"off\"\n").unwrap();
        let error = flags.resolve().unwrap_err().to_string();
        assert!(error.contains("fastpath") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn the_sockets_are_side_by_side_and_the_old_path_is_understood() {
        let paths = |control: Option<&str>| {
            let control = control.map(PathBuf::from);
            let args = DaemonArgs { control, ..DaemonArgs::default() };
            args.resolve().unwrap().sockets
        };
        let default = paths(None);
        assert_eq!(default.control, Path::new("/run/nfqd/control"));
        assert_eq!(default.observe, Path::new("/run/nfqd/observe"));
        assert_eq!(default.legacy.as_deref(), Some(Path::new("/run/nfqd.sock")));
        assert_eq!(paths(Some("/run/nfqd.sock")), default);
        assert_eq!(paths(Some("/run/nfqd/control")), default);
        let other = paths(Some("/tmp/a.sock"));
        assert_eq!(
            (other.directory, other.observe, other.legacy),
            (None, PathBuf::from("/tmp/a.sock.observe"), None)
        );
    }
}
