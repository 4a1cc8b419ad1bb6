//! Rule lists: the rules of a middlebox as the kernel compares them.

use crate::filter::Conditions;
use crate::policy::Middlebox;
use nfqd_shmctl::{Action, MacAddr, RuleId};

/// A rule that can match.
pub(super) type Matching = (RuleId, Conditions);

/// The rules of one middlebox that can match, in order, and its default.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(in crate::nft) struct RuleList {
    pub rules: Vec<Matching>,
    /// Whether packets that no rule matches are dropped.
    pub closed: bool,
    /// Rules that move between a set and the chain: they are linear meanwhile, in the set or not.
    pub(super) relocating: Vec<(Matching, Relocation)>,
}

/// The place of a rule while it moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Relocation {
    /// In the set and in the chain.
    Both,
    /// In the chain alone, although a set could hold it.
    Chain,
}

impl RuleList {
    /// Returns the rule list of the middlebox `mac`.
    pub(in crate::nft) fn new(mac: MacAddr, middlebox: &Middlebox) -> RuleList {
        middlebox.firewall().map_or_else(RuleList::default, |firewall| RuleList {
            rules: firewall.conditions(mac).collect(),
            closed: firewall.default_action() == Action::Deny,
            relocating: Vec::new(),
        })
    }

    pub(super) fn of(&self, action: Action) -> impl Iterator<Item = &(RuleId, Conditions)> {
        self.rules.iter().filter(move |(id, _)| id.action == action)
    }

    /// Whether a rule compares VLAN tags.
    pub(in crate::nft) fn depends_on_tags(&self) -> bool {
        self.rules.iter().any(|(_, wanted)| wanted.vlan.is_some())
    }
}
