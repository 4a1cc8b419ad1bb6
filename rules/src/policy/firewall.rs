//! The firewall service of a middlebox: allow rules, then deny rules, then the default.

use crate::filter::classifier::Classifier;
use crate::filter::{Conditions, FilterRule};
use crate::packet::Packet;
use nfqd_shmctl::{Action, MacAddr, RuleId};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::OnceLock;

/// The firewall service of a middlebox.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Firewall {
    ip: IpAddr,
    default: Action,
    rules: BTreeMap<RuleId, FilterRule>,
    classifier: LazyClassifier,
}

/// A classifier that is built from the rules when the first packet needs it: where the kernel
/// filters, none does.
#[derive(Clone, Debug, Default)]
struct LazyClassifier(OnceLock<Classifier>);

/// The classifier is a function of the rules, which are compared themselves.
impl PartialEq for LazyClassifier {
    fn eq(&self, _: &LazyClassifier) -> bool {
        true
    }
}

impl Eq for LazyClassifier {}

/// The decision of the filters of a middlebox on a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FilterDecision {
    /// The action on the packet.
    pub action: Action,
    /// The rule that matched; `None` if the default decided.
    pub rule: Option<RuleId>,
}

impl FilterDecision {
    /// The decision where there are no filters.
    pub const ALLOW: FilterDecision = FilterDecision { action: Action::Allow, rule: None };
}

impl Firewall {
    pub(super) fn new(ip: IpAddr, default: Action) -> Firewall {
        Firewall { ip, default, rules: BTreeMap::new(), classifier: LazyClassifier::default() }
    }

    /// Returns the registered address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// Returns what happens to packets that no rule matches.
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// Returns the rules in the order of evaluation.
    pub fn rules(&self) -> &BTreeMap<RuleId, FilterRule> {
        &self.rules
    }

    /// Returns the conditions of the rules that can match, in the order of evaluation. `mac` is the
    /// middlebox'.
    pub fn conditions(&self, mac: MacAddr) -> impl Iterator<Item = (RuleId, Conditions)> {
        let rules = self.rules.iter();
        rules.filter_map(move |(&id, rule)| Some((id, rule.conditions(mac, self.ip)?)))
    }

    /// Whether a rule depends on VLAN tags. `mac` is the middlebox'.
    pub fn depends_on_tags(&self, mac: MacAddr) -> bool {
        self.classifier(mac).depends_on_tags()
    }

    /// Builds the classifier of the rules, which costs more than a packet should pay. `mac` is the
    /// middlebox'.
    pub fn prepare(&self, mac: MacAddr) {
        self.classifier(mac);
    }

    fn classifier(&self, mac: MacAddr) -> &Classifier {
        self.classifier.0.get_or_init(|| Classifier::new(&self.conditions(mac).collect::<Vec<_>>()))
    }

    /// Decides on a packet for this firewall's middlebox. If nftables cannot tell where the
    /// packet's transport header is, it is dropped where a rule depends on such headers, unless a
    /// rule that does not allows it.
    pub fn decide(&self, packet: &Packet) -> FilterDecision {
        let classifier = self.classifier(packet.link.destination);
        let mut packet = *packet;
        let hidden = packet.ip.as_mut().filter(|ip| ip.hides_transport);
        let default = match hidden.filter(|_| classifier.depends_on_transport()) {
            Some(ip) => {
                ip.hide_transport();
                Action::Deny
            }
            None => self.default,
        };
        let matches_exactly = |id: RuleId| {
            let rule = self.rules.get(&id);
            let wanted = rule.and_then(|rule| rule.conditions(packet.link.destination, self.ip));
            wanted.is_some_and(|wanted| wanted.match_packet(&packet))
        };
        let rule = classifier.find(&packet, matches_exactly);
        FilterDecision { action: rule.map_or(default, |rule| rule.action), rule }
    }

    pub(super) fn set_rule(&mut self, id: RuleId, rule: FilterRule) {
        self.rules.insert(id, rule);
        self.classifier = LazyClassifier::default();
    }

    pub(super) fn remove_rule(&mut self, id: RuleId) {
        self.rules.remove(&id);
        self.classifier = LazyClassifier::default();
    }
}
