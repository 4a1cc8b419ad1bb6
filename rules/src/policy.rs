//! The policy: which middleboxes are registered, with which rules and balanced addresses.
//!
//! A command gives a new state or a refusal, never half of it.

use crate::classifier::Classifier;
use crate::filter::{Conditions, Rule};
use crate::packet::Packet;
use crate::service::{Backend, MAX_BACKENDS, Service};
use imbl::OrdMap;
use nfqd_shmctl::{
    Action, BackendName, Command, CommandError, Edit, ErrorCode, MacAddr, Method, RuleId, Services, Vip,
};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

/// Most rules that one middlebox may have; it is bounded because guests ask for them.
pub const MAX_RULES: usize = 1024;
/// Most balanced services that one middlebox may have.
pub const MAX_SERVICES: usize = 16;

/// Everything that is registered. A clone costs nothing, whatever is registered: both share it until one changes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    middleboxes: OrdMap<MacAddr, Arc<Middlebox>>,
}

/// One middlebox and its services.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Middlebox {
    firewall: Option<Firewall>,
    /// By what clients use.
    services: BTreeMap<Vip, Service>,
}

/// Firewall service: rules that allow, then rules that deny, then the default.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Firewall {
    ip: IpAddr,
    default: Action,
    rules: BTreeMap<RuleId, Rule>,
    /// The same rules, once they are made ready for packets.
    ready: Ready,
}

/// Made of the rules when the first packet asks: where the kernel filters, none does.
#[derive(Clone, Debug, Default)]
struct Ready(OnceLock<Classifier>);

/// It follows from the rules.
impl PartialEq for Ready {
    fn eq(&self, _: &Ready) -> bool {
        true
    }
}

impl Eq for Ready {}

/// What a firewall says of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Filtered {
    /// What happens to it.
    pub action: Action,
    /// The rule that says so; none when none matches and the default says it.
    pub rule: Option<RuleId>,
}

impl Firewall {
    fn new(ip: IpAddr, default: Action) -> Firewall {
        Firewall { ip, default, rules: BTreeMap::new(), ready: Ready::default() }
    }

    /// The registered address.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// What happens to packets that no rule matches.
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// The rules, in the order they are looked at.
    pub fn rules(&self) -> &BTreeMap<RuleId, Rule> {
        &self.rules
    }

    /// What the rules that can match ask for, in the order they are looked at. `mac` is the middlebox'.
    pub fn conditions(&self, mac: MacAddr) -> impl Iterator<Item = (RuleId, Conditions)> {
        self.rules.iter().filter_map(move |(&id, rule)| Some((id, rule.conditions(mac, self.ip)?)))
    }

    /// Whether a rule looks at VLAN tags. `mac` is the middlebox'.
    pub fn looks_at_tags(&self, mac: MacAddr) -> bool {
        self.classifier(mac).looks_at_tags()
    }

    fn classifier(&self, mac: MacAddr) -> &Classifier {
        self.ready.0.get_or_init(|| Classifier::new(&self.conditions(mac).collect::<Vec<_>>()))
    }

    /// What happens to a packet for this firewall's middlebox. A packet whose transport header nftables cannot tell is
    /// dropped where a rule looks at such headers, unless a rule that does not allows it.
    pub fn filter(&self, packet: &Packet) -> Filtered {
        let classifier = self.classifier(packet.link.destination);
        let mut packet = *packet;
        let hidden = packet.ip.as_mut().filter(|ip| ip.hides_transport && classifier.looks_at_transport());
        let default = match hidden {
            Some(ip) => {
                ip.hide_transport();
                Action::Deny
            }
            None => self.default,
        };
        let whole = |id: RuleId| {
            let rule = self.rules.get(&id);
            let wanted = rule.and_then(|rule| rule.conditions(packet.link.destination, self.ip));
            wanted.is_some_and(|wanted| wanted.match_packet(&packet))
        };
        let rule = classifier.find(&packet, whole);
        Filtered { action: rule.map_or(default, |rule| rule.action), rule }
    }

    /// Makes the rules ready for packets, which costs more than the packets should.
    pub fn prepare(&self, mac: MacAddr) {
        self.classifier(mac);
    }

    /// Refuses a rule that is one too many.
    fn room_for(&self, id: RuleId) -> Result<(), Refusal> {
        if self.rules.len() < MAX_RULES || self.rules.contains_key(&id) {
            return Ok(());
        }
        let expected = format!("one more than the {MAX_RULES} rules that a middlebox may have");
        refuse(2, ErrorCode::Quota, expected)
    }

    fn set_rule(&mut self, id: RuleId, rule: Option<Rule>) {
        match rule {
            Some(rule) => self.rules.insert(id, rule),
            None => self.rules.remove(&id),
        };
        self.ready = Ready::default();
    }
}

impl Middlebox {
    /// The firewall service, if it is registered.
    pub fn firewall(&self) -> Option<&Firewall> {
        self.firewall.as_ref()
    }

    /// The balanced services.
    pub fn services(&self) -> &BTreeMap<Vip, Service> {
        &self.services
    }

    /// The commands that make this middlebox, whose MAC is `mac`.
    pub fn commands(&self, mac: MacAddr) -> Vec<Command> {
        let mut out = Vec::new();
        if let Some(firewall) = &self.firewall {
            out.push(Command::RegisterFirewall { mac, ip: firewall.ip, default: firewall.default });
            out.extend(firewall.rules.iter().flat_map(|(&id, rule)| rule.commands(mac, id)));
        }
        out.extend(self.services.iter().flat_map(|(&vip, service)| service.commands(mac, vip)));
        out
    }

    /// An address to call it by.
    pub fn ip(&self) -> Option<IpAddr> {
        self.firewall
            .as_ref()
            .map(|firewall| firewall.ip)
            .or_else(|| self.services.keys().next().map(|vip| vip.ip))
    }

    /// The addresses that it has registered, for its filters and its services.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ip().into_iter().chain(self.services.keys().map(|vip| vip.ip))
    }
}

/// The service that a change of backends names. A port without a protocol may stand for the one service that has both.
fn named_service(services: &BTreeMap<Vip, Service>, vip: Vip) -> Result<(Vip, &Service), String> {
    if let Some(service) = services.get(&vip) {
        return Ok((vip, service));
    }
    match of_port(services, vip)[..] {
        [found] => services.get(&found).map(|service| (found, service)).ok_or_else(|| NO_SERVICE.to_string()),
        [] => Err(NO_SERVICE.to_string()),
        [tcp, udp, ..] => Err(format!("two services have this port; name {tcp} or {udp}")),
    }
}

const NO_SERVICE: &str = "no service of this middlebox; Q shows them";

/// The services with the same port, whatever the protocol.
fn of_port(services: &BTreeMap<Vip, Service>, vip: Vip) -> Vec<Vip> {
    services.keys().copied().filter(|other| Vip { protocol: None, ..*other } == vip).collect()
}

/// Most backends that one service, and all services of a middlebox together, may have.
const TOO_MANY: &str = "too many backends: a service may have 255, all services of a middlebox together 512";
/// Most backends that all services of one middlebox may have together.
pub const MAX_MIDDLEBOX_BACKENDS: usize = 512;

/// The index of the first backend that is one too many.
fn too_many(others: usize, backends: usize) -> Option<usize> {
    let most = MAX_BACKENDS.min(MAX_MIDDLEBOX_BACKENDS.saturating_sub(others));
    (backends > most).then_some(most)
}

/// Stands for the index of the bit value, which is one further behind a rule number.
const BITS: usize = usize::MAX;

/// A refusal, with the index of the word it is about.
struct Refusal {
    word: usize,
    code: ErrorCode,
    expected: String,
}

fn refuse<T>(word: usize, code: ErrorCode, expected: impl ToString) -> Result<T, Refusal> {
    Err(Refusal { word, code, expected: expected.to_string() })
}

impl Policy {
    /// The middleboxes, by MAC.
    pub fn middleboxes(&self) -> &OrdMap<MacAddr, Arc<Middlebox>> {
        &self.middleboxes
    }

    /// The MACs whose middleboxes differ between two policies; found without looking at what both share.
    pub fn changed(&self, before: &Policy) -> Vec<MacAddr> {
        use imbl::ordmap::DiffItem::{Add, Remove, Update};
        let item = |item| match item {
            Add(&mac, _) | Remove(&mac, _) | Update { new: (&mac, _), .. } => mac,
        };
        before.middleboxes.diff(&self.middleboxes).map(item).collect()
    }

    /// The middlebox of this MAC.
    pub fn get(&self, mac: MacAddr) -> Option<&Middlebox> {
        self.middleboxes.get(&mac).map(Arc::as_ref)
    }

    /// Every backend of every service.
    pub fn backends(&self) -> impl Iterator<Item = (MacAddr, &Vip, &Service, &BackendName, &Backend)> {
        self.middleboxes.iter().flat_map(|(&mac, middlebox)| {
            middlebox.services.iter().flat_map(move |(vip, service)| {
                service.backends().iter().map(move |(name, backend)| (mac, vip, service, name, backend))
            })
        })
    }

    /// Reads and applies one command.
    ///
    /// # Errors
    /// When the text is no command or the policy refuses it; nothing has changed then.
    pub fn apply_line(&mut self, line: &str) -> Result<Command, CommandError> {
        let command = Command::parse(line)?;
        self.obey(&command, line)?;
        Ok(command)
    }

    /// Applies one command, which was read from `line`.
    ///
    /// # Errors
    /// When the policy refuses it; nothing has changed then.
    pub fn obey(&mut self, command: &Command, line: &str) -> Result<(), CommandError> {
        self.apply(command).map_err(|refusal| {
            let has_number =
                line.split_ascii_whitespace().nth(2).is_some_and(|word| word.starts_with(['#', '+']));
            let word = match refusal.word {
                BITS if has_number => 4,
                BITS => 3,
                word => word,
            };
            CommandError::at_word(line, word, refusal.code, refusal.expected)
        })
    }

    fn apply(&mut self, command: &Command) -> Result<(), Refusal> {
        match command {
            Command::RegisterFirewall { mac, ip, default } => {
                self.edit(*mac).firewall = Some(Firewall::new(*ip, *default));
                Ok(())
            }
            Command::RegisterBalance { mac, vip, balance } => {
                let services = self.get(*mac).map(Middlebox::services);
                let full = services.is_some_and(|s| s.len() >= MAX_SERVICES && !s.contains_key(vip));
                if full {
                    let expected = format!(
                        "one more than the {MAX_SERVICES} services that a middlebox may have; end one first, by X"
                    );
                    return refuse(3, ErrorCode::Quota, expected);
                }
                let others = self.backends_of(*mac, vip);
                if let Some(at) = too_many(others, balance.destinations.len()) {
                    let source = usize::from(matches!(balance.method, Method::Source(_)));
                    return refuse(5 + source + at, ErrorCode::Quota, TOO_MANY);
                }
                self.edit(*mac).services.insert(*vip, Service::new(*vip, balance));
                Ok(())
            }
            Command::EditBackends { mac, vip, edit } => self.edit_backends(*mac, *vip, edit),
            Command::Add { mac, rule: number, set } => {
                let firewall = self.firewall(*mac)?;
                firewall.room_for(*number)?;
                let old = firewall.rules.get(number).cloned().unwrap_or_default();
                let new = old.with(set, firewall.ip).or_else(|e| refuse(BITS, ErrorCode::Value, e))?;
                self.set_rule(*mac, *number, Some(new));
                Ok(())
            }
            Command::Delete { mac, rule: number, clear } => {
                let firewall = self.firewall(*mac)?;
                // Rule #1 always exists, as the original's one rule did.
                let old = match firewall.rules.get(number) {
                    Some(old) => old.clone(),
                    None if *number == RuleId::FIRST => Rule::default(),
                    None => return refuse(2, ErrorCode::Value, "no such rule; A makes one"),
                };
                firewall.room_for(*number)?;
                let new = old.without(clear, firewall.ip).or_else(|e| refuse(BITS, ErrorCode::Value, e))?;
                self.set_rule(*mac, *number, Some(new));
                Ok(())
            }
            Command::DeleteRule { mac, rule: number } => {
                if !self.firewall(*mac)?.rules.contains_key(number) {
                    return refuse(2, ErrorCode::Value, "no such rule");
                }
                self.set_rule(*mac, *number, None);
                Ok(())
            }
            Command::Unregister { mac, services } => self.unregister(*mac, *services),
            Command::Query { mac: Some(mac) } if self.get(*mac).is_none() => {
                refuse(1, ErrorCode::UnknownMac, "not registered")
            }
            Command::Query { .. } => Ok(()),
        }
    }

    fn edit(&mut self, mac: MacAddr) -> &mut Middlebox {
        Arc::make_mut(self.middleboxes.entry(mac).or_default())
    }

    fn firewall(&self, mac: MacAddr) -> Result<&Firewall, Refusal> {
        match self.get(mac).map(Middlebox::firewall) {
            Some(Some(firewall)) => Ok(firewall),
            Some(None) => refuse(
                1,
                ErrorCode::UnknownMac,
                format!("not registered for firewall service; write R F {mac} IP first"),
            ),
            None => refuse(1, ErrorCode::UnknownMac, format!("not registered; write R F {mac} IP first")),
        }
    }

    fn set_rule(&mut self, mac: MacAddr, number: RuleId, rule: Option<Rule>) {
        if let Some(firewall) = &mut self.edit(mac).firewall {
            firewall.set_rule(number, rule);
        }
    }

    /// How many backends the middlebox has in services other than this one.
    fn backends_of(&self, mac: MacAddr, but: &Vip) -> usize {
        let services = self.get(mac).into_iter().flat_map(Middlebox::services);
        services.filter(|(vip, _)| *vip != but).map(|(_, service)| service.backends().len()).sum()
    }

    fn edit_backends(&mut self, mac: MacAddr, named: Option<Vip>, edit: &Edit) -> Result<(), Refusal> {
        let services = self.get(mac).map(Middlebox::services).filter(|services| !services.is_empty());
        let Some(services) = services else {
            let expected = "not registered for load balancing; write R L first, or Q to see what is";
            return refuse(1, ErrorCode::UnknownMac, expected);
        };
        let (vip, service) = match (named, services.first_key_value()) {
            (Some(vip), _) => {
                named_service(services, vip).or_else(|expected| refuse(2, ErrorCode::Value, expected))?
            }
            (None, Some((vip, service))) if services.len() == 1 => (*vip, service),
            _ => {
                let all: Vec<String> = services.keys().map(Vip::to_string).collect();
                let expected = format!("has several services; name one before the sign: {}", all.join(", "));
                return refuse(1, ErrorCode::Value, expected);
            }
        };
        if !service.method().is_pool() {
            let expected =
                "registered with type static or source, which have one destination; register it anew";
            return refuse(if named.is_some() { 2 } else { 1 }, ErrorCode::Value, expected);
        }
        let mut changed = service.clone();
        let others = self.backends_of(mac, &vip);
        let first = if named.is_some() { 4 } else { 3 };
        changed
            .edit(vip, edit)
            .or_else(|refused| refuse(first + refused.at, refused.code, refused.expected))?;
        if too_many(others, changed.backends().len()).is_some() {
            return refuse(first, ErrorCode::Quota, TOO_MANY);
        }
        self.edit(mac).services.insert(vip, changed);
        Ok(())
    }

    fn unregister(&mut self, mac: MacAddr, services: Services) -> Result<(), Refusal> {
        let Some(middlebox) = self.get(mac) else {
            return refuse(1, ErrorCode::UnknownMac, "not registered; Q shows what is");
        };
        let (firewall, balance) = match services {
            Services::Firewall => (true, false),
            Services::Balance | Services::One(_) => (false, true),
            Services::All => (true, true),
        };
        let one = match services {
            // Said again, it must not end another one.
            Services::One(vip) if !middlebox.services.contains_key(&vip) => {
                let expected = match of_port(&middlebox.services, vip)[..] {
                    [other, ..] => format!("no service of this middlebox; there is {other}"),
                    [] => NO_SERVICE.to_string(),
                };
                return refuse(3, ErrorCode::Value, expected);
            }
            Services::One(vip) => Some(vip),
            _ => None,
        };
        let has = (middlebox.firewall.is_some(), !middlebox.services.is_empty());
        if !(firewall && has.0 || balance && has.1) {
            let service = if firewall { "firewall service" } else { "load balancing" };
            return refuse(
                1,
                ErrorCode::UnknownMac,
                format!("not registered for {service}; Q shows what is"),
            );
        }
        let edited = self.edit(mac);
        if firewall {
            edited.firewall = None;
        }
        match one {
            Some(vip) => drop(edited.services.remove(&vip)),
            None if balance => edited.services.clear(),
            None => {}
        }
        if edited.firewall.is_none() && edited.services.is_empty() {
            self.middleboxes.remove(&mac);
        }
        Ok(())
    }

    /// The commands that make this policy of an empty one.
    pub fn commands(&self) -> impl Iterator<Item = Command> {
        self.middleboxes.iter().flat_map(|(&mac, middlebox)| middlebox.commands(mac))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: &str = "12:13:14:15:16:17";

    fn policy(lines: &[&str]) -> Policy {
        let mut policy = Policy::default();
        for line in lines {
            policy.apply_line(&line.replace("MB", MAC)).unwrap();
        }
        policy
    }

    fn printed(policy: &Policy) -> Vec<String> {
        policy.commands().map(|command| command.to_string().replace(MAC, "MB")).collect()
    }

    #[test]
    fn the_documented_examples_in_order() {
        let mut policy = policy(&[
            "R L MB 10.129.126.15 0 10.129.126.17",
            "R F MB 10.129.126.15",
            "A MB M 5 s 1:2:3:4:5:6 p 8",
        ]);
        assert_eq!(
            printed(&policy),
            [
                "R F MB 10.129.126.15",
                "A MB M 5 s 01:02:03:04:05:06 p 0x0800",
                "R L MB 10.129.126.15 0 10.129.126.17"
            ]
        );
        policy.apply_line("D 12:13:14:15:16:17 M 4 s").unwrap();
        assert_eq!(printed(&policy)[1], "A MB M 4 p 0x0800");
        policy.apply_line("X 12:13:14:15:16:17 F").unwrap();
        assert_eq!(printed(&policy), ["R L MB 10.129.126.15 0 10.129.126.17"]);
        policy.apply_line("X 12:13:14:15:16:17").unwrap();
        assert_eq!(policy, Policy::default());
    }

    #[test]
    fn add_ors_and_delete_ands() {
        let p = policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "A MB I 10 p tcp d", "A MB T 2 d 80"]);
        assert_eq!(printed(&p)[1..], ["A MB I 11 s 10.0.0.1 d p tcp", "A MB T 2 d 80"]);
        let p = policy(&["R F MB 10.0.0.9", "A MB I 9 s 10.0.0.1 p 17", "D MB I 3"]);
        assert_eq!(printed(&p)[1], "A MB I 1 s 10.0.0.1 p udp", "the value of an unused bit stays stored");
        let p = policy(&["R F MB 10.0.0.9", "A MB #3 I 1 s 10.0.0.1", "D MB #3 I 0"]);
        assert_eq!(printed(&p)[1], "A MB #3 I 0 s 10.0.0.1");
    }

    #[test]
    fn registering_again_replaces() {
        let p = policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "R F MB 10.0.0.8"]);
        assert_eq!(printed(&p), ["R F MB 10.0.0.8"]);
        let p = policy(&[
            "R L MB 10.0.0.9 0 10.0.0.1",
            "R L MB 10.0.0.9 1 10.0.0.5 10.0.0.2",
            "R L MB 10.0.0.8 0 10.0.0.3",
        ]);
        assert_eq!(printed(&p), ["R L MB 10.0.0.8 0 10.0.0.3", "R L MB 10.0.0.9 1 10.0.0.5 10.0.0.2"]);
    }

    fn assert_refused(before: &Policy, line: &str, place: (ErrorCode, usize), words: &str) {
        let mut after = before.clone();
        let error = after.apply_line(&line.replace("MB", MAC)).expect_err(line);
        assert_eq!((error.code, error.column), place, "{line}: {error}");
        assert!(error.message.contains(words), "{line}: {error}");
        assert_eq!(&after, before, "{line}");
    }

    #[test]
    fn a_refused_command_changes_nothing() {
        let before =
            policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "R L 2:0:0:0:0:1 10.0.0.7 0 10.0.0.1"]);
        for (line, code, column, words) in [
            ("A MB I 4", ErrorCode::Value, 23, "t never got a value"),
            ("A MB I 3 d 2001:db8::1", ErrorCode::Value, 23, "not of one family"),
            ("A MB T 2 s 5", ErrorCode::Value, 23, "d never got a value"),
            ("A MB #2 M 4", ErrorCode::Value, 26, "p never got a value"),
            ("A MB #1 I 4", ErrorCode::Value, 26, "t never got a value"),
            ("D MB #2 M 4", ErrorCode::Value, 21, "no such rule"),
            ("D MB #2", ErrorCode::Value, 21, "no such rule"),
            ("X MB L", ErrorCode::UnknownMac, 3, "not registered for load balancing"),
            ("X 2:0:0:0:0:1 F", ErrorCode::UnknownMac, 3, "not registered for firewall"),
            ("X 2:0:0:0:0:9", ErrorCode::UnknownMac, 3, "'2:0:0:0:0:9': not registered"),
            ("A 2:0:0:0:0:1 I 2", ErrorCode::UnknownMac, 3, "R F 02:00:00:00:00:01 IP first"),
            ("A 2:0:0:0:0:9 I 2", ErrorCode::UnknownMac, 3, "R F 02:00:00:00:00:09 IP first"),
        ] {
            assert_refused(&before, line, (code, column), words);
        }
    }

    #[test]
    fn guests_cannot_fill_the_host() {
        let mut p = policy(&["R F MB 10.0.0.9"]);
        for n in 1..=MAX_RULES {
            p.apply_line(&format!("A {MAC} #{n} I 2")).unwrap();
        }
        let error = p.apply_line(&format!("A {MAC} #{} I 2", MAX_RULES + 1)).unwrap_err();
        assert_eq!(error.code, ErrorCode::Quota);
        p.apply_line(&format!("A {MAC} #1 T 2 d 80")).unwrap();
        p.apply_line(&format!("D {MAC} #1")).unwrap();
        p.apply_line(&format!("A {MAC} #2000 I 2")).unwrap();
        let error = p.apply_line(&format!("D {MAC} I 0")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Quota, "rule 1 would be one more");
    }

    const POOL: &str = "R L MB 10.0.0.9:80/tcp rr 10.0.0.1 10.0.0.2:8080*3 affinity";

    #[test]
    fn backends_come_and_go() {
        let mut p = policy(&[POOL]);
        for (line, now) in [
            ("B MB + 10.0.0.3@2:0:0:0:0:3", "10.0.0.1 10.0.0.2:8080*3 10.0.0.3@02:00:00:00:00:03"),
            ("B MB 10.0.0.9:80 + 10.0.0.1*7", "10.0.0.1*7 10.0.0.2:8080*3 10.0.0.3@02:00:00:00:00:03"),
            ("B MB 10.0.0.9:80/tcp - 10.0.0.3:80 10.0.0.1", "10.0.0.2:8080*3"),
        ] {
            p.apply_line(&line.replace("MB", MAC)).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(printed(&p), [format!("R L MB 10.0.0.9:80/tcp rr {now} affinity")]);
        }
        p.apply_line(&format!("B {MAC} = 10.0.0.2:8080 drain")).unwrap();
        p.apply_line(&format!("B {MAC} + 10.0.0.2:8080")).unwrap();
        assert_eq!(
            printed(&p)[1..],
            ["B MB 10.0.0.9:80/tcp = 10.0.0.2:8080 drain"],
            "a new weight leaves it so"
        );
        p.apply_line(&format!("B {MAC} = 10.0.0.2:8080 up")).unwrap();
        assert_eq!(printed(&p), ["R L MB 10.0.0.9:80/tcp rr 10.0.0.2:8080 affinity"]);
        p.apply_line(&format!("X {MAC} L 10.0.0.9:80/tcp")).unwrap();
        assert_eq!(p, Policy::default());
    }

    #[test]
    fn a_refused_change_of_backends_changes_nothing() {
        let before = policy(&[
            POOL,
            "R L MB 10.0.0.8 hash 10.0.0.1",
            "R L 2:0:0:0:0:1 10.0.0.7 0 10.0.0.1",
            "R L 2:0:0:0:0:2 10.0.0.7:80 hash 10.0.0.1 10.0.0.2 dsr",
            "R L 2:0:0:0:0:3 10.0.0.7:53/tcp rr 10.0.0.1",
            "R L 2:0:0:0:0:3 10.0.0.7:53/udp rr 10.0.0.1",
        ]);
        for (line, code, column, words) in [
            ("B MB + 10.0.0.3", ErrorCode::Value, 3, "name one before the sign: 10.0.0.8, 10.0.0.9:80/tcp"),
            ("B MB 10.0.0.7 + 10.0.0.3", ErrorCode::Value, 21, "no service of this middlebox"),
            ("B MB 10.0.0.9:80 - 10.0.0.1 10.0.0.5", ErrorCode::UnknownBackend, 44, "not a backend"),
            ("B MB 10.0.0.9:80 - 10.0.0.1 10.0.0.2:8080", ErrorCode::Value, 44, "the last backend"),
            ("B MB 10.0.0.9:80 = 10.0.0.2 drain", ErrorCode::UnknownBackend, 35, "not a backend"),
            ("B MB 10.0.0.8 - 10.0.0.1:80", ErrorCode::Value, 32, "the registered address has none"),
            ("B 2:0:0:0:0:1 + 10.0.0.3", ErrorCode::Value, 3, "which have one destination"),
            ("B 2:0:0:0:0:2 + 10.0.0.7", ErrorCode::Value, 17, "own address"),
            ("B 2:0:0:0:0:2 + 10.0.0.3 10.0.0.4:81", ErrorCode::Value, 26, "nothing but the MAC"),
            ("B 2:0:0:0:0:2 + 2001:db8::1", ErrorCode::Value, 17, "not of the family"),
            ("B 2:0:0:0:0:2 - 10.0.0.1:81", ErrorCode::UnknownBackend, 17, "not a backend"),
            ("B 2:0:0:0:0:9 + 10.0.0.3", ErrorCode::UnknownMac, 3, "not registered for load balancing"),
            ("X MB L 10.0.0.7", ErrorCode::Value, 23, "no service of this middlebox; Q shows them"),
            ("X MB L 10.0.0.9:80", ErrorCode::Value, 23, "there is 10.0.0.9:80/tcp"),
            (
                "B 2:0:0:0:0:3 10.0.0.7:53 + 10.0.0.9",
                ErrorCode::Value,
                15,
                "10.0.0.7:53/tcp or 10.0.0.7:53/udp",
            ),
        ] {
            assert_refused(&before, line, (code, column), words);
        }
    }

    #[test]
    fn guests_cannot_have_backends_without_end() {
        let mut p = Policy::default();
        let all = |from: u32, count: u32| -> String {
            (from..from + count).map(|n| format!(" 10.1.{}.{}", n / 256, n % 256)).collect()
        };
        p.apply_line(&format!("R L {MAC} 10.0.0.1 rr{}", all(0, 150))).unwrap();
        p.apply_line(&format!("B {MAC} +{}", all(150, 105))).unwrap();
        let error = p.apply_line(&format!("B {MAC} + 10.2.0.0")).unwrap_err();
        assert_eq!(error.code, ErrorCode::Quota, "{error}");
        p.apply_line(&format!("R L {MAC} 10.0.0.2 rr{}", all(0, 150))).unwrap();
        let error = p.apply_line(&format!("R L {MAC} 10.0.0.3 rr{}", all(0, 150))).unwrap_err();
        assert_eq!(error.code, ErrorCode::Quota, "{error}");
        assert!(error.message.starts_with("'10.1.0.107'"), "the first that is too many: {error}");
        let mut again = Policy::default();
        for command in p.commands() {
            again.apply_line(&command.to_string()).unwrap();
        }
        assert_eq!(again, p);
    }

    #[test]
    fn what_is_blanked_may_not_leave_a_contradiction() {
        let mut p = policy(&["R F MB 10.0.0.9", "A MB I 3 s 2001:db8::1 d 2001:db8::2"]);
        let error = p.apply_line(&format!("D {MAC} I 3 d")).unwrap_err();
        assert!(error.message.contains("not of one family"), "{error}");
    }

    proptest::proptest! {
        /// What the state file holds must be taken back, whatever guests have written.
        #[test]
        fn any_accepted_commands_are_taken_back(
            lines in proptest::collection::vec("(R F|A|D|X|R L) MB( #[1-3])?( [IMT] [0-9]{1,2}| 10.0.0.[1-3]| 2001:db8::[12])( 0 10.0.0.[1-5]| s 10.0.0.1| d 2001:db8::2| d 10.0.0.2| s 2001:db8::1| s 80| d 80| d| s| t 1| p 6){0,4}", 1..24)
        ) {
            let mut p = policy(&["R F MB 10.0.0.9"]);
            for line in lines {
                let _ = p.apply_line(&line.replace("MB", MAC));
            }
            let mut again = Policy::default();
            for command in p.commands() {
                proptest::prop_assert!(again.apply_line(&command.to_string()).is_ok(), "{}", command);
            }
            proptest::prop_assert_eq!(again, p);
        }
    }

    #[test]
    fn the_printed_policy_makes_the_same_policy() {
        let p = policy(&[
            "R F MB 10.0.0.9",
            "A MB I 15 s 10.0.0.1 t 16 p 6",
            "A MB M 7 s 2:2:2:2:2:2 d p ip",
            "A MB #9 T 3 s 5 d 6",
            "A MB #10 M 0",
            "R L MB 2001:db8::9 1 2001:db8::8 2001:db8::7@2:0:0:0:0:7",
        ]);
        let mut again = Policy::default();
        for command in p.commands() {
            again.apply_line(&command.to_string()).unwrap();
        }
        assert_eq!(again, p);
    }
}
