//! Quotas: how much a channel may have registered.

use crate::config::{ChannelSpec, Quotas};
use nfqd_rules::policy::Middlebox;
use nfqd_rules::{MiddleboxKey, NetworkId, Policy};
use nfqd_shmctl::{CommandError, ErrorCode, MacAddr, ParsedCommand, Place};

/// The number of things that a channel has registered.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Usage {
    middleboxes: usize,
    services: usize,
    backends: usize,
    rules: usize,
}

impl Usage {
    /// The usage of the middleboxes that a channel may speak for.
    fn of(spec: &ChannelSpec, network: NetworkId, policy: &Policy) -> Usage {
        let here = |mac: &MacAddr| policy.get(MiddleboxKey { network, mac: *mac });
        let all = || {
            let all = policy.middleboxes().iter();
            all.filter(|(key, _)| key.network == network).map(|(_, middlebox)| middlebox.as_ref())
        };
        let own: Vec<&Middlebox> = match spec.macs.as_slice() {
            [] => all().collect(),
            macs => macs.iter().filter_map(here).collect(),
        };
        let mut out = Usage { middleboxes: own.len(), ..Usage::default() };
        for middlebox in own {
            out.services += middlebox.services().len();
            let backends = middlebox.services().values().map(|service| service.backends().len());
            out.backends += backends.sum::<usize>();
            out.rules += middlebox.firewall().map_or(0, |firewall| firewall.rules().len());
        }
        out
    }
}

/// Checks that a channel has not more than its quotas after a command. What it had before, when its quotas
/// may have been larger, may stay.
///
/// # Errors
/// The word that asks for too much.
pub(super) fn check_quotas(
    spec: &ChannelSpec,
    network: NetworkId,
    (before, after): (&Policy, &Policy),
    parsed: &ParsedCommand<'_>,
) -> Result<(), CommandError> {
    let Quotas { middleboxes, services, backends, rules, rate: _ } = spec.quotas;
    if [middleboxes, services, backends, rules].iter().all(Option::is_none) {
        return Ok(());
    }
    let had = Usage::of(spec, network, before);
    let has = Usage::of(spec, network, after);
    for (quota, had, has, what, place) in [
        (middleboxes, had.middleboxes, has.middleboxes, "middleboxes", Place::Mac),
        (services, had.services, has.services, "services", Place::Frontend),
        (backends, had.backends, has.backends, "backends", Place::Backend(0)),
        (rules, had.rules, has.rules, "rules", Place::Rule),
    ] {
        if let Some(quota) = quota
            && has > had
            && has > quota as usize
        {
            let expected = format!("this channel may have {quota} {what}; delete some first");
            return Err(parsed.error(place, ErrorCode::Quota, &expected));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_has_its_quotas_and_others_do_not_count() {
        let spec =
            "/vm,mac=2:0:0:0:0:1,mac=2:0:0:0:0:2,middleboxes=1,services=2,backends=3,rules=1";
        let spec = ChannelSpec::shm(spec).unwrap();
        let mut policy = Policy::default();
        policy.apply_line("R F 2:0:0:0:0:9 10.0.0.9").unwrap();
        let mut command = |line: &str| {
            let before = policy.clone();
            policy.apply_line(line).unwrap();
            let parsed = ParsedCommand::parse(line).unwrap();
            check_quotas(&spec, NetworkId::ANY, (&before, &policy), &parsed)
                .map_err(|error| (error.column, error.message))
                .inspect_err(|_| policy = before)
        };
        for (line, refused) in [
            ("R F 2:0:0:0:0:1 10.0.0.1", None),
            ("A 2:0:0:0:0:1 #2 I 1 s 10.1.0.0/16", None),
            ("A 2:0:0:0:0:1 #3 I 1 s 10.1.0.0/16", Some((15, "may have 1 rules"))),
            ("A 2:0:0:0:0:1 #2 I 1 s 10.2.0.0/16", None),
            ("R L 2:0:0:0:0:1 10.0.0.1:80 rr 10.0.0.3 10.0.0.4", None),
            ("B 2:0:0:0:0:1 10.0.0.1:80 + 10.0.0.5 10.0.0.6", Some((29, "may have 3 backends"))),
            ("R L 2:0:0:0:0:1 10.0.0.1:81 rr 10.0.0.3", None),
            ("R L 2:0:0:0:0:1 10.0.0.1:82 rr 10.0.0.3", Some((17, "may have 2 services"))),
            ("R F 2:0:0:0:0:2 10.0.0.2", Some((5, "may have 1 middleboxes"))),
            ("X 2:0:0:0:0:1", None),
            ("R F 2:0:0:0:0:2 10.0.0.2", None),
        ] {
            let expected = refused.map(|(column, _)| column);
            match command(line) {
                Ok(()) => assert_eq!(expected, None, "{line}"),
                Err((column, message)) => {
                    assert_eq!(expected, Some(column), "{line}: {message}");
                    assert!(message.contains(refused.unwrap().1), "{message}");
                }
            }
        }
    }
}
