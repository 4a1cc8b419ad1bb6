//! Finds out how frames can get from a bridge into NFQUEUE on this kernel.

use crate::config::SteerChoice;
use crate::daemon::StartError;
use nfqd_rules::nft::kernel::Kernel;
use nfqd_rules::nft::model::{Family, Queues, Statement};
use nfqd_rules::nft::ruleset::Steer;

const NO_NATIVE: &str = "this kernel has no nft queue expression for bridges (CONFIG_NFT_QUEUE; module nft_queue); use \
                         --steer br-netfilter, or --steer auto";
const NO_BR_NETFILTER: &str = "this kernel cannot queue by br_netfilter (CONFIG_BRIDGE_NETFILTER, CONFIG_NFT_COMPAT and \
                               CONFIG_NETFILTER_XT_TARGET_NFQUEUE; modules br_netfilter, nft_compat, xt_NFQUEUE); use \
                               --steer native, or --steer auto";
const NO_WAY: &str = "this kernel has no way into NFQUEUE from a bridge: neither the nft queue expression (module \
                      nft_queue) nor br_netfilter with the xt target NFQUEUE (modules br_netfilter, nft_compat, \
                      xt_NFQUEUE); load one of them, 'br-netfilter.sh up' tries both";
const NOT_CALLED: &str = "br_netfilter is not told to hand bridged packets to nftables: net.bridge.bridge-nf-call-iptables \
                          is not 1 (or the module br_netfilter is not loaded); run 'br-netfilter.sh up'";

/// The way into the queues that was asked for, or the best there is.
///
/// # Errors
/// When the kernel has none, or not that; the message says what to do.
pub fn steer(kernel: &mut Kernel, choice: SteerChoice, queues: Queues) -> Result<Steer, StartError> {
    let native =
        choice != SteerChoice::BrNetfilter && kernel.knows(Family::Bridge, &Statement::Queue(queues))?;
    if native {
        return Ok(Steer::Native);
    }
    if choice == SteerChoice::Native {
        return Err(StartError::Steer(NO_NATIVE));
    }
    if !kernel.knows(Family::Ip, &Statement::XtQueue(queues))? {
        let reason = if choice == SteerChoice::Auto { NO_WAY } else { NO_BR_NETFILTER };
        return Err(StartError::Steer(reason));
    }
    for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        let value = std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}")).unwrap_or_default();
        if value.trim() != "1" {
            return Err(StartError::Steer(NOT_CALLED));
        }
    }
    let tagged =
        std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-filter-vlan-tagged").unwrap_or_default();
    if tagged.trim() != "1" {
        log::warn!(
            "net.bridge.bridge-nf-filter-vlan-tagged is not 1: VLAN-tagged frames do not reach the engine; \
             'br-netfilter.sh up' sets it"
        );
    }
    Ok(Steer::BrNetfilter)
}
