//! The chains `learn` and `verdicts` and those that they lead to: the engine's verdict, in the mark, is carried out
//! here, and the flow is cached.

use super::own::dhcp_rules;
use super::reply::mark_reply;
use super::steer::from_backend;
use super::{BaseTable, SYN};
use crate::mark::{ID, OPERATION, OWN, Operation, PORT};
use crate::nft::dsl::{accept, clear_mark, commented, goto, jump, rule, verdict};
use crate::nft::family::{
    CACHED_PROTOCOLS, CachedProtocol, FAMILIES, IpFamily, PORT_REWRITES, PortRewrite, TCP,
    cached_flows, flow_key, reply_key, reply_key_of_request,
};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Chain, Rule, Statement, Verdict};
use crate::nft::names::CACHE_FULL;
use crate::nft::options::FastPath;
use crate::timeouts::CLOSE_TIMEOUT;

/// The chain that carries out each operation, for ports that are kept.
pub(super) const OPERATIONS: [(Operation, &str); 12] = [
    (Operation::Redirect, "redirected"),
    (Operation::RedirectInvalidate, "redirected_new"),
    (Operation::RedirectInstall, "learn_flow"),
    (Operation::RedirectExpire, "close_flow"),
    (Operation::TrackedRedirect, "redirected"),
    (Operation::TrackedRedirectInvalidate, "redirected_new"),
    (Operation::TrackedRedirectInstall, "learn_flow"),
    (Operation::TrackedRedirectExpire, "close_flow"),
    (Operation::Reply, "replied"),
    (Operation::ReplyInstall, "learn_reply"),
    (Operation::ReplyExpire, "close_reply"),
    (Operation::Local, "local_flow"),
];

/// The key of a flow in packets that a chain sees.
type Key = fn(IpFamily) -> Vec<Field>;

impl BaseTable<'_> {
    pub(super) fn verdict_chains(&mut self) {
        let operation = Statement::Vmap(vec![Field::Mark(OPERATION)], "operations".to_string());
        let unanswered = vec![goto("unanswered")];
        self.chain(
            "verdicts",
            vec![
                rule(vec![operation]),
                commented(unanswered, "no verdict: no engine, or its queue was full"),
            ],
        );
        for ports in PORT_REWRITES {
            self.redirect_chains(ports);
            self.reply_operation_chains(ports);
        }
        self.local_chains();
        self.unanswered_chain();
    }

    /// Chains of the verdicts that send a packet to its backend.
    fn redirect_chains(&mut self, ports: PortRewrite) {
        let name = |chain: &str| ports.chain(chain);
        self.chain(&name("to_backend"), rewriting(ports, IpFamily::redirect_writes));
        let to_backend = vec![rule(vec![jump(&name("to_backend"))])];
        let finish = vec![rule(vec![goto("finish")])];
        // A flow to a backend is not one of the backend itself.
        let no_bypass = each_protocol(|ip, protocol| Statement::Forget {
            key: reply_key_of_request(ip),
            set: protocol.name("bypass", ip),
        });

        // The cached entry with these addresses and ports is of an earlier flow, even if this one
        // is not cached yet.
        let flows = PORT_REWRITES.map(|ports| forget(flow_key, "flows", ports)).concat();
        let replies =
            PORT_REWRITES.map(|ports| forget(reply_key_of_request, "replies", ports)).concat();
        let connecting = FAMILIES.map(|ip| {
            let (key, set) = (flow_key(ip), TCP.name("connecting", ip));
            let remember = Statement::Remember { key, set, timeout: None };
            rule([TCP.is(ip), vec![remember]].concat())
        });
        let opening = note_opening(ports);
        let first = [flows, connecting.to_vec()].concat();
        let rules = [first, to_backend.clone(), no_bypass.clone(), replies, opening];
        self.chain(&name("redirected_new"), rules.concat());

        let rules = [to_backend.clone(), no_bypass.clone(), finish].concat();
        self.chain(&name("redirected"), rules);

        // A flow has one kind of ports: a rule that finds it in the maps of the other kind would
        // write only half of the rewrite.
        let other = ports.other();
        let learned = name("learned_flow");
        let rules =
            [forget(flow_key, "flows", other), install(flow_key, "flows", ports, None, &learned)];
        self.chain(&name("learn_flow"), rules.concat());
        let rules = [
            to_backend.clone(),
            no_bypass.clone(),
            forget(reply_key_of_request, "replies", other),
            install(reply_key_of_request, "replies", ports, None, "finish"),
        ];
        self.chain(&learned, rules.concat());

        let (closed, soon) = (name("closed_flow"), Some(CLOSE_TIMEOUT));
        self.chain(&name("close_flow"), install(flow_key, "flows", ports, soon, &closed));
        let replies = install(reply_key_of_request, "replies", ports, soon, "finish");
        let opening = forget_opening(reply_key_of_request, ports);
        self.chain(&closed, [to_backend, no_bypass, opening, replies].concat());
    }

    /// Chains of the verdicts on a reply, which keeps its mark: it is translated where it leaves.
    fn reply_operation_chains(&mut self, ports: PortRewrite) {
        let name = |chain: &str| ports.chain(chain);
        let replied = name("replied");
        self.chain(&replied, vec![rule(vec![accept()])]);

        let mut rules = Vec::new();
        if ports == PortRewrite::Kept {
            let no_slot = Statement::Is(Field::Mark(ID), Value::Mark(0));
            rules.push(rule(vec![no_slot, goto("learn_bypass")]));
        }
        rules.extend(forget(reply_key, "replies", ports.other()));
        rules.extend(install(reply_key, "replies", ports, None, &replied));
        self.chain(&name("learn_reply"), rules);

        let end = vec![rule(vec![goto(&replied)])];
        let rules = [forget(reply_key, "replies", ports), forget_opening(reply_key, ports), end];
        self.chain(&name("close_reply"), rules.concat());
    }

    /// Chains of the verdicts that cache a flow without rewriting it: of a backend itself, or of
    /// the middlebox itself.
    fn local_chains(&mut self) {
        let bypass = |ip: IpFamily, protocol: CachedProtocol| Statement::Remember {
            key: reply_key(ip),
            set: protocol.name("bypass", ip),
            timeout: None,
        };
        // A cached reply with these addresses and ports is of a flow that has ended.
        let ended = PORT_REWRITES.map(|ports| forget(reply_key, "replies", ports)).concat();
        self.chain("learn_bypass", [ended, each_or_full("bypass", "finish", bypass)].concat());
        let rules = install(flow_key, "flows", PortRewrite::Kept, Some(CLOSE_TIMEOUT), "finish");
        self.chain("local_flow", rules);
    }

    /// Returns the rule for packets that only the engine could decide on.
    fn undecided(&self) -> Rule {
        if self.options.queues.bypass {
            return rule(vec![goto("finish")]);
        }
        commented(vec![verdict(Verdict::Drop)], "fail closed")
    }

    /// Packets that came back without a verdict. Cached replies and static redirects work without
    /// the engine, for whole TCP and UDP packets: the rest depends on the engine's state.
    fn unanswered_chain(&mut self) {
        // Without the fast path only the engine filters, so nothing else may let a packet pass.
        if self.options.fast_path == FastPath::Off && !self.options.queues.bypass {
            for chain in ["unanswered", "unanswered_pool"] {
                self.chain(chain, vec![self.undecided()]);
            }
            return;
        }
        let mut rules = Vec::new();
        // Replies that begin or end a connection went to the engine although they are cached.
        for ip in FAMILIES {
            for ports in PORT_REWRITES {
                for map in ["replies", "opening"] {
                    let mark = mark_reply(ip, TCP.map(map, ports, ip), ports).to_vec();
                    rules.push(rule([TCP.is_whole(ip), mark, vec![accept()]].concat()));
                }
            }
        }
        let own = Statement::Is(
            Field::Mark(OPERATION & !PORT),
            Value::Mark(Operation::Upcall as u32 | OWN),
        );
        rules.push(commented(vec![own, goto("finish")], "the middlebox has begun it"));
        rules.extend(dhcp_rules(&goto("finish")));
        if self.options.queues.bypass {
            for (ip, protocol) in cached_flows() {
                let redirects =
                    Statement::Vmap(vec![Field::EtherDestination], "static_redirects".to_string());
                rules.push(rule([protocol.is_whole(ip), vec![redirects]].concat()));
            }
        } else {
            rules.extend(FAMILIES.into_iter().flat_map(of_no_service));
        }
        rules.push(self.undecided());
        self.chain("unanswered", rules);

        // The middlebox would reset a connection that it does not know, and answer one that a backend
        // has been sent. Their senders send again.
        let is_within = |ip: IpFamily| {
            let no_syn = Statement::Masked(Field::TcpFlags, Value::Flags(SYN), Value::Flags(0));
            rule([TCP.is_whole(ip), vec![no_syn, verdict(Verdict::Drop)]].concat())
        };
        let is_connecting = |ip: IpFamily| {
            let known = Statement::In(flow_key(ip), TCP.name("connecting", ip));
            rule([TCP.is_whole(ip), vec![known, verdict(Verdict::Drop)]].concat())
        };
        let mut rules = FAMILIES.map(is_within).to_vec();
        rules[0].comment = Some("of a connection whose backend only the engine knows".to_string());
        rules.extend(FAMILIES.map(is_connecting));
        rules.push(self.undecided());
        self.chain("unanswered_pool", rules);
    }
}

/// Returns the rules for frames that the engine has not seen, or has nothing to do for. Most have no
/// mark at all, which is tested first.
pub(super) fn nothing_to_do() -> [Rule; 3] {
    let nothing = vec![Statement::Is(Field::Mark(OPERATION), Value::Mark(0)), accept()];
    let unmarked = vec![Statement::Is(Field::Mark(u32::MAX), Value::Mark(0)), accept()];
    // The port's bit does not matter.
    let reply = Value::Mark(Operation::Reply as u32);
    let is_reply = Statement::Is(Field::Mark(OPERATION & !PORT), reply);
    [
        rule(unmarked),
        commented(nothing, "not from the engine, or nothing to do"),
        commented(vec![is_reply, accept()], "a reply, which is translated where it leaves"),
    ]
}

/// Returns the chain that ends the way of a frame with a mark of nfqd's.
pub(super) fn finish_chain() -> Chain {
    let rules = vec![commented(vec![clear_mark(), accept()], "clear nfqd's mark bits")];
    Chain { base: None, rules }
}

/// Returns the rules that write addresses, and ports where they are translated.
pub(super) fn rewriting(
    ports: PortRewrite,
    writes: fn(IpFamily, PortRewrite) -> Vec<crate::nft::model::Write>,
) -> Vec<Rule> {
    let rewrite = |ip: IpFamily| Statement::Rewrite(writes(ip, ports));
    match ports {
        PortRewrite::Kept => FAMILIES.map(|ip| rule(vec![ip.is(), rewrite(ip)])).to_vec(),
        PortRewrite::Translated => each_protocol(|ip, _| rewrite(ip)),
    }
}

/// Returns the rules for `--fail closed` without an engine: packets that a service takes are dropped;
/// whole TCP and UDP packets from a backend, and ICMP to a middlebox, pass.
fn of_no_service(ip: IpFamily) -> Vec<Rule> {
    let finish = || goto("finish");
    let is_taken = |key: Vec<Field>, set: &str| {
        vec![ip.is(), Statement::In(key, ip.name(set)), verdict(Verdict::Drop)]
    };
    let mac = vec![Field::EtherDestination];
    let address = [mac.clone(), vec![ip.destination]].concat();
    let port = [address.clone(), vec![Field::DestinationPort]].concat();
    let mut out = vec![commented(is_taken(mac, "service_all"), "a service takes it")];
    for protocol in CACHED_PROTOCOLS {
        let whole = protocol.is_whole(ip);
        out.push(rule([whole.clone(), is_taken(address.clone(), "service_addresses")].concat()));
        out.push(rule([whole.clone(), is_taken(port.clone(), "service_ports")].concat()));
        out.push(rule([whole, from_backend(ip), vec![finish()]].concat()));
    }
    out.push(rule([ip.is_icmp(), vec![finish()]].concat()));
    out
}

/// Returns a rule for each cached protocol.
fn each_protocol(statement: impl Fn(IpFamily, CachedProtocol) -> Statement) -> Vec<Rule> {
    let one = |(ip, protocol): (IpFamily, CachedProtocol)| {
        rule([protocol.is(ip), vec![statement(ip, protocol)]].concat())
    };
    cached_flows().map(one).collect()
}

/// Returns the rules that note a TCP connection which opens: the engine has not seen its answer yet,
/// and may be away when it comes.
fn note_opening(ports: PortRewrite) -> Vec<Rule> {
    let finish = || goto("finish");
    let note = |ip: IpFamily| {
        let (key, map) = (reply_key_of_request(ip), TCP.map("opening", ports, ip));
        let learn = Statement::Learn { key, map, timeout: None };
        rule([TCP.is(ip), vec![learn, finish()]].concat())
    };
    let full = format!("{CACHE_FULL}{}", ports.chain("opening"));
    let full = commented(vec![Statement::Counter, finish()], &full);
    let forget = forget_opening(reply_key_of_request, ports.other());
    [forget, FAMILIES.map(note).to_vec(), vec![full]].concat()
}

/// Returns the rules that remove the note of a connection's opening, which outlives a connection that ends
/// soon: a restarted engine would take it for one that still opens.
fn forget_opening(key: Key, ports: PortRewrite) -> Vec<Rule> {
    let forget = |ip: IpFamily| {
        let map = TCP.map("opening", ports, ip);
        rule([TCP.is(ip), vec![Statement::ForgetFlow { key: key(ip), map }]].concat())
    };
    FAMILIES.map(forget).to_vec()
}

/// Returns the rules that remove a packet's flow from a map.
fn forget(key: Key, map: &'static str, ports: PortRewrite) -> Vec<Rule> {
    each_protocol(|ip, protocol| Statement::ForgetFlow {
        key: key(ip),
        map: protocol.map(map, ports, ip),
    })
}

/// Returns the rules that cache a packet's flow in a map and go on in the chain `then`.
fn install(key: Key, map: &str, ports: PortRewrite, timeout: Option<u32>, then: &str) -> Vec<Rule> {
    each_or_full(&ports.chain(map), then, |ip, protocol| Statement::Learn {
        key: key(ip),
        map: protocol.map(map, ports, ip),
        timeout,
    })
}

/// Returns a rule for each cached protocol that goes on in the chain `then`. A statement that
/// caches ends its rule if its map is full; the last rule counts those packets.
fn each_or_full(
    map: &str,
    then: &str,
    statement: impl Fn(IpFamily, CachedProtocol) -> Statement,
) -> Vec<Rule> {
    let one = |(ip, protocol): (IpFamily, CachedProtocol)| {
        rule([protocol.is(ip), vec![statement(ip, protocol), goto(then)]].concat())
    };
    let full = commented(vec![Statement::Counter, goto(then)], &format!("{CACHE_FULL}{map}"));
    cached_flows().map(one).chain([full]).collect()
}
