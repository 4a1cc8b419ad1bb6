//! Detection of the path of frames from a bridge into NFQUEUE on this kernel.

use crate::config::SteerChoice;
use nfqd_rules::nft::kernel::{Kernel, KernelError};
use nfqd_rules::nft::model::{Family, Queues, Statement};
use nfqd_rules::nft::options::QueuePath;

/// The reason there is no path, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum QueuePathError {
    /// The nft queue expression is missing.
    #[error(
        "this kernel has no nft queue expression for bridges (CONFIG_NFT_QUEUE; module nft_queue); use \
         --steer br-netfilter, or --steer auto"
    )]
    NoNative,
    /// br_netfilter or the xt target is missing.
    #[error(
        "this kernel cannot queue through br_netfilter (CONFIG_BRIDGE_NETFILTER, CONFIG_NFT_COMPAT and \
         CONFIG_NETFILTER_XT_TARGET_NFQUEUE; modules br_netfilter, nft_compat, xt_NFQUEUE); use \
         --steer native, or --steer auto"
    )]
    NoBrNetfilter,
    /// Both are missing.
    #[error(
        "this kernel has no path into NFQUEUE from a bridge: neither the nft queue expression (module \
         nft_queue) nor br_netfilter with the xt target NFQUEUE (modules br_netfilter, nft_compat, \
         xt_NFQUEUE); load either; 'br-netfilter.sh up' tries both"
    )]
    None,
    /// br_netfilter does not pass bridged packets on.
    #[error(
        "br_netfilter does not pass bridged packets to nftables: net.bridge.bridge-nf-call-iptables is \
         not 1 (or the module br_netfilter is not loaded); run 'br-netfilter.sh up'"
    )]
    NotCalled,
    /// The kernel cannot be probed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Returns the path that was asked for, or the best one this kernel has.
///
/// # Errors
/// If the kernel has none, or not that one; the message says what to do.
pub fn detect_queue_path(
    kernel: &mut Kernel,
    choice: SteerChoice,
    queues: Queues,
) -> Result<QueuePath, QueuePathError> {
    let native = Statement::Queue(queues);
    if choice != SteerChoice::BrNetfilter && kernel.supports(Family::Bridge, &native)? {
        return Ok(QueuePath::Native);
    }
    if choice == SteerChoice::Native {
        return Err(QueuePathError::NoNative);
    }
    if !kernel.supports(Family::Ip, &Statement::XtQueue(queues))? {
        return Err(match choice {
            SteerChoice::Auto => QueuePathError::None,
            _ => QueuePathError::NoBrNetfilter,
        });
    }
    if !CALLS.into_iter().all(is_set) {
        return Err(QueuePathError::NotCalled);
    }
    if !is_set(CALL_TAGGED) {
        log::warn!(
            "net.bridge.{CALL_TAGGED} is not 1: VLAN-tagged frames do not reach the engine, and \
             --fail closed drops them; 'br-netfilter.sh up' sets it"
        );
    }
    Ok(QueuePath::BrNetfilter)
}

/// The sysctls without which br_netfilter passes no bridged packet to the queues.
pub const CALLS: [&str; 2] = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];

/// The sysctl without which it passes no tagged packet.
pub const CALL_TAGGED: &str = "bridge-nf-filter-vlan-tagged";

/// Whether tagged packets reach the queues.
pub(super) fn calls_tagged() -> bool {
    is_set(CALL_TAGGED)
}

/// Returns the path of a sysctl of br_netfilter.
fn path_of(name: &str) -> String {
    format!("/proc/sys/net/bridge/{name}")
}

/// Whether a sysctl of br_netfilter is 1.
pub fn is_set(name: &str) -> bool {
    std::fs::read_to_string(path_of(name)).is_ok_and(|value| value.trim() == "1")
}

/// Restores the br_netfilter sysctls that the queue path needs, if another program (libvirt, or a
/// sysctl.d file that is applied again) has changed them; with `tagged`, also the one for tagged
/// packets. Returns the reason if a sysctl cannot be set.
pub(super) fn restore_calls(tagged: bool) -> Option<String> {
    let mut reason = None;
    let names = CALLS.into_iter().chain(tagged.then_some(CALL_TAGGED));
    for name in names.filter(|name| !is_set(name)) {
        match std::fs::write(path_of(name), "1") {
            Ok(()) => {
                log::warn!("another program changed net.bridge.{name}; it is 1 again");
            }
            Err(error) => {
                reason = Some(format!(
                    "net.bridge.{name} is not 1, so br_netfilter passes no packet to the queues, \
                     and it cannot be set: {error}; run 'br-netfilter.sh up'"
                ));
            }
        }
    }
    reason
}
