//! What the programs make of a new flow, by the maps alone: what `step/policy` of the kernel side does, with the reasons. Pure.

use super::{PolicySnapshot, PortPrefix, RuleKey};
use ipnet::IpNet;
use rustnet_common::policy::{ALLOW, ANY_CLASS, AUDIT, OPEN, PolicyRule, flags};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A new flow, after its translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Who opens it.
    pub client: IpAddr,
    /// Who gets it.
    pub server: IpAddr,
    /// IP protocol number.
    pub proto: u8,
    /// The server's port; 0 for a protocol without ports.
    pub port: u16,
}

/// What the programs look at besides the maps of policies.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Interfaces of this node's pods: `rn_endpoints`.
    pub endpoints: BTreeMap<IpAddr, u32>,
    /// Addresses of this node.
    pub host: BTreeSet<IpAddr>,
}

/// Which flows no policy judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exemption {
    /// Policies are not enforced.
    NotEnforced,
    /// The node itself is the client.
    FromNode,
    /// A pod is both ends.
    ToItself,
}

/// What one end of a flow means for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// It is no pod of this node.
    NotHere,
    /// A pod that the agent has not decided.
    Undecided,
    /// No policy selects the pod.
    Open,
    /// Policies select it.
    Judged {
        /// Number of their set.
        set: u32,
        /// Class of the other end.
        class: u32,
        /// The entry that counts; without one the flow is denied.
        hit: Option<Hit>,
    },
}

/// An entry of `rn_policy_rules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Its key.
    pub key: RuleKey,
    /// Its value.
    pub rule: PolicyRule,
}

impl Half {
    /// True if this end denies the flow: the rules do, or none allows it.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Judged { hit, .. } if hit.is_none_or(|hit| hit.rule.flags & ALLOW == 0))
    }

    /// True if this end would deny the flow, and its namespace is audited.
    pub fn is_audited(&self) -> bool {
        matches!(self, Self::Judged { hit: Some(hit), .. } if hit.rule.flags & AUDIT != 0)
    }
}

/// What both ends mean for a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// Why nothing else counts, if so.
    pub exemption: Option<Exemption>,
    /// The client's end.
    pub egress: Half,
    /// The server's end.
    pub ingress: Half,
}

impl Judgement {
    /// The verdict of this node's programs.
    pub fn verdict(&self) -> Verdict {
        let halves = [self.egress, self.ingress];
        if self.exemption.is_some() {
            Verdict::Allowed
        } else if halves.contains(&Half::Undecided) {
            Verdict::Undecided
        } else if halves.iter().any(Half::is_denied) {
            Verdict::Denied
        } else if halves.iter().any(Half::is_audited) {
            Verdict::Audited
        } else {
            Verdict::Allowed
        }
    }
}

/// The verdict of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The flow may be opened.
    Allowed,
    /// The flow may be opened, and is reported as `policy_audited`.
    Audited,
    /// Dropped as `policy_denied`.
    Denied,
    /// Dropped as `policy_undecided`.
    Undecided,
}

/// Judges a flow.
pub fn judge(maps: &PolicySnapshot, around: &Surroundings, flow: &Flow) -> Judgement {
    let exemption = if maps.state.flags & flags::ENFORCED == 0 {
        Some(Exemption::NotEnforced)
    } else if flow.client == flow.server {
        Some(Exemption::ToItself)
    } else if around.host.contains(&flow.client) {
        Some(Exemption::FromNode)
    } else {
        None
    };
    let (client, server) = (side(maps, around, flow.client), side(maps, around, flow.server));
    let half = |own: &Side, set: u32, other: &Side| match own {
        Side { is_here: false, .. } => Half::NotHere,
        // Before the state says that policies are enforced, nobody asks.
        _ if exemption == Some(Exemption::NotEnforced) => Half::Open,
        Side { is_decided: false, .. } => Half::Undecided,
        _ if set == OPEN => Half::Open,
        _ => Half::Judged { set, class: other.class, hit: find_rule(maps, set, other.class, flow) },
    };
    Judgement {
        exemption,
        egress: half(&client, client.egress, &server),
        ingress: half(&server, server.ingress, &client),
    }
}

/// What the maps say of one end.
struct Side {
    class: u32,
    ingress: u32,
    egress: u32,
    is_here: bool,
    is_decided: bool,
}

fn side(maps: &PolicySnapshot, around: &Surroundings, ip: IpAddr) -> Side {
    let ifindex = around.endpoints.get(&ip).copied().unwrap_or_default();
    let is_here = ifindex != 0;
    if let Some(pod) = maps.pods.get(&ip).filter(|pod| pod.ifindex == ifindex) {
        return Side { class: pod.class, ingress: pod.ingress, egress: pod.egress, is_here, is_decided: true };
    }
    let class = if is_here { ANY_CLASS } else { class_of_range(&maps.cidrs, ip) };
    Side { class, ingress: OPEN, egress: OPEN, is_here, is_decided: !is_here }
}

/// The class of an address that no pod has: that of its longest prefix. The trie holds IPv4 as mapped, within ranges of IPv6.
fn class_of_range(cidrs: &BTreeMap<IpNet, u32>, ip: IpAddr) -> u32 {
    let find = |ip: IpAddr, longest: u8| {
        let range = |len| IpNet::new(ip, len).ok().map(|range| range.trunc());
        (0..=longest).rev().find_map(|len| cidrs.get(&range(len)?).copied())
    };
    let class = match ip {
        IpAddr::V4(v4) => find(ip, 32).or_else(|| find(v4.to_ipv6_mapped().into(), 95)),
        IpAddr::V6(_) => find(ip, 128),
    };
    class.unwrap_or(ANY_CLASS)
}

/// The entry of a set that counts: that of the class, else that of any.
fn find_rule(maps: &PolicySnapshot, set: u32, class: u32, flow: &Flow) -> Option<Hit> {
    let ports = PortPrefix::new(flow.proto, flow.port, 16);
    let find = |class| {
        let mut keys = ports.longest_first().map(|ports| RuleKey { set, class, ports });
        keys.find_map(|key| maps.rules.get(&key).map(|rule| Hit { key, rule: *rule }))
    };
    find(class).or_else(|| find(ANY_CLASS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::policy::world::{self, NODE, Random, World, passes};
    use crate::index::{DesiredPolicies, policy::Policies as Index};
    use rustnet_common::policy::{Policies, PolicyPod};

    fn snapshot(desired: &DesiredPolicies) -> PolicySnapshot {
        let DesiredPolicies { pods, cidrs, rules, is_enforced, .. } = desired.clone();
        let flags = if is_enforced { flags::ENFORCED } else { 0 };
        PolicySnapshot { state: Policies { generation: 1, flags }, pods, cidrs, rules }
    }

    fn check(seed: u64, world: &World, desired: &DesiredPolicies) {
        let maps = snapshot(desired);
        let around = Surroundings { endpoints: world.interfaces.clone(), host: BTreeSet::new() };
        for flow in world.flows(world) {
            let world::Flow { client, server, proto, port } = flow;
            let found = judge(&maps, &around, &Flow { client, server, proto, port });
            let passes = passes(desired, &world.interfaces, &flow);
            let is_forwarded = matches!(found.verdict(), Verdict::Allowed | Verdict::Audited);
            assert_eq!(is_forwarded, passes, "seed {seed}: {flow:?}: {found:?}");
            for half in [found.egress, found.ingress] {
                let Half::Judged { hit: Some(hit), .. } = half else { continue };
                // What no rule decides has none: without a NetworkPolicy it is allowed.
                let has_name = hit.rule.rule == 0 || desired.rule_names.contains_key(&hit.rule.rule);
                assert!(has_name, "seed {seed}: {hit:?} has a name");
            }
        }
    }

    #[test]
    fn it_says_what_the_programs_do() {
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let world = random.whole_world();
            check(seed, &world, &world.desired());
            // Of two states in a row, numbers follow from content, and interfaces may be ahead of them.
            let mut it = Index::new(NODE.into());
            let next = random.change(&world);
            next.lead(&mut it);
            check(seed, &next, &it.desired());
        }
    }

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 1, 1, n])
    }

    /// Pods 1 and 2 are here: the first isolated for ingress, the second open.
    fn maps(rules: &[(u32, PortPrefix, u32)]) -> (PolicySnapshot, Surroundings) {
        let pod = |ingress, ifindex| PolicyPod { class: 5, ingress, egress: OPEN, ifindex };
        let rule = |(class, ports, rule): &(u32, PortPrefix, u32)| {
            (RuleKey { set: 7, class: *class, ports: *ports }, PolicyRule { flags: *rule & ALLOW, rule: *rule })
        };
        let maps = PolicySnapshot {
            state: Policies { generation: 1, flags: flags::ENFORCED },
            pods: [(ip(1), pod(7, 11)), (ip(2), pod(OPEN, 12))].into(),
            cidrs: [("10.1.0.0/16", 6), ("10.1.1.9/32", 8), ("::/0", 9)]
                .map(|(range, class)| (range.parse().unwrap(), class))
                .into(),
            rules: rules.iter().map(rule).collect(),
        };
        let endpoints = [(ip(1), 11), (ip(2), 12), (ip(3), 13)].into();
        (maps, Surroundings { endpoints, host: [ip(100)].into() })
    }

    fn flow(client: IpAddr, server: IpAddr) -> Flow {
        Flow { client, server, proto: 6, port: 80 }
    }

    fn rule_of(half: Half) -> Option<u32> {
        let Half::Judged { hit, .. } = half else { panic!("{half:?}") };
        hit.map(|hit| hit.rule.rule)
    }

    #[test]
    fn the_class_counts_before_any_and_within_it_the_longest_prefix() {
        let (one, tcp) = (PortPrefix::new(6, 80, 16), PortPrefix::new(6, 0, 0));
        for (rules, want, is_denied) in [
            (&[][..], None, true),
            (&[(5, tcp, 3)], Some(3), false),
            (&[(5, PortPrefix::new(17, 0, 0), 3)], None, true),
            (&[(5, tcp, 3), (5, one, 4)], Some(4), true),
            (&[(5, tcp, 3), (ANY_CLASS, one, 2)], Some(3), false),
            (&[(5, one, 4), (ANY_CLASS, PortPrefix::ANY, 3)], Some(4), true),
            (&[(5, PortPrefix::new(17, 0, 0), 4), (ANY_CLASS, PortPrefix::ANY, 3)], Some(3), false),
            (&[(6, PortPrefix::ANY, 3)], None, true),
        ] {
            let (maps, around) = maps(rules);
            let found = judge(&maps, &around, &flow(ip(2), ip(1)));
            assert_eq!((rule_of(found.ingress), found.ingress.is_denied()), (want, is_denied), "{rules:?}");
            assert_eq!(found.egress, Half::Open);
            assert_eq!(found.verdict(), if is_denied { Verdict::Denied } else { Verdict::Allowed });
        }
    }

    #[test]
    fn ends_are_pods_of_this_node_ranges_or_nothing() {
        let (mut maps, around) = maps(&[]);
        let class =
            |maps: &PolicySnapshot, client: &str| match judge(maps, &around, &flow(client.parse().unwrap(), ip(1)))
                .ingress
            {
                Half::Judged { class, .. } => class,
                other => panic!("{client}: {other:?}"),
            };
        for (client, want) in [("10.1.9.9", 6), ("10.1.1.9", 8), ("192.0.2.1", 9), ("fd00::1", 9)] {
            assert_eq!(class(&maps, client), want, "{client}");
        }
        maps.cidrs.clear();
        assert_eq!(class(&maps, "10.1.9.9"), ANY_CLASS);
        // An entry of this node's pod whose interface is gone says nothing.
        maps.pods.insert(ip(50), PolicyPod { class: 1, ingress: 7, egress: 7, ifindex: 50 });
        let found = judge(&maps, &around, &flow(ip(50), ip(2)));
        assert_eq!((found.egress, found.ingress, found.verdict()), (Half::NotHere, Half::Open, Verdict::Allowed));
        let found = judge(&maps, &around, &flow(ip(2), ip(3)));
        assert_eq!((found.egress, found.ingress, found.verdict()), (Half::Open, Half::Undecided, Verdict::Undecided));
        let found = judge(&maps, &around, &flow(ip(3), ip(1)));
        assert_eq!(found.verdict(), Verdict::Undecided, "which counts before a denial, as in the programs");
    }

    #[test]
    fn some_flows_are_not_judged() {
        let (mut maps, around) = maps(&[]);
        let exemption = |maps: &PolicySnapshot, client, server| {
            let found = judge(maps, &around, &flow(client, server));
            (found.exemption, found.verdict())
        };
        assert_eq!(exemption(&maps, ip(100), ip(1)), (Some(Exemption::FromNode), Verdict::Allowed));
        assert_eq!(exemption(&maps, ip(1), ip(1)), (Some(Exemption::ToItself), Verdict::Allowed));
        assert_eq!(exemption(&maps, ip(2), ip(1)), (None, Verdict::Denied));
        maps.state.flags = 0;
        assert_eq!(exemption(&maps, ip(2), ip(1)), (Some(Exemption::NotEnforced), Verdict::Allowed));
        assert_eq!(judge(&maps, &around, &flow(ip(2), ip(3))).ingress, Half::Open, "nobody is undecided");
    }
}
