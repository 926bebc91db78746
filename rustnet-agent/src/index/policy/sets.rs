//! Sets: what all policies that select a pod say of one direction.

use super::desired::PortPrefix;
use super::groups::{GroupKey, Namespaces, PodPeer};
use super::ids::ContentHash;
use super::spans::{Block, Span};
use crate::model::{
    Action, ClusterNetworkPolicy, ClusterRule, NetworkPolicy, ObjectName, PolicyPeer, PolicyPort, PolicyRule, Ports,
    Tier,
};
use std::fmt;
use std::sync::Arc;

/// Which end of a flow the pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The server.
    Ingress,
    /// The client.
    Egress,
}

impl Direction {
    /// The rules of a policy for it; `None`: the policy says nothing of it.
    pub fn rules(self, policy: &NetworkPolicy) -> Option<&[PolicyRule]> {
        match self {
            Self::Ingress => policy.ingress.as_deref(),
            Self::Egress => policy.egress.as_deref(),
        }
    }

    /// The same of a policy of the cluster, which says nothing of a direction without rules.
    fn cluster_rules(self, policy: &ClusterNetworkPolicy) -> &[ClusterRule] {
        match self {
            Self::Ingress => &policy.ingress,
            Self::Egress => &policy.egress,
        }
    }
}

/// The policies that select pods of one group.
#[derive(Debug, Default)]
pub struct Selecting<'a> {
    /// NetworkPolicies.
    pub namespaced: Vec<&'a NetworkPolicy>,
    /// Policies of the cluster, in order of precedence: those of the Admin tier come first.
    pub cluster: Vec<&'a ClusterNetworkPolicy>,
    /// The Admin tier alone denies anything: what the others would deny is reported.
    pub is_audited: bool,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// What stands in place of a namespace in the names of policies of the cluster. No namespace has such a name.
pub const CLUSTER_KIND: &str = "ClusterNetworkPolicy";

/// A set. Pods with equal sets share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    direction: Direction,
    /// The policies, in order of precedence. Those of the cluster have their kind in place of a namespace.
    pub policies: Box<[ObjectName]>,
    /// Their rules, in order of precedence.
    pub rules: Vec<SetRule>,
    /// A NetworkPolicy is among them: what they do not allow is denied, else allowed.
    pub is_isolated: bool,
    /// See [`Selecting::is_audited`].
    pub is_audited: bool,
}

/// One rule of a set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SetRule {
    /// What people call it.
    pub name: Arc<str>,
    /// Where its policy counts.
    pub tier: Tier,
    /// What becomes of flows that match.
    pub action: Action,
    /// The other side; `None`: any address.
    pub sides: Option<Vec<Side>>,
    /// The server's ports.
    pub ports: Vec<SetPort>,
}

/// One of the other sides of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Pods.
    Pods(PodPeer),
    /// Addresses.
    Span(Span),
}

/// Ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SetPort {
    /// By number.
    Prefix(PortPrefix),
    /// By a name that each server gives another number, with the protocol.
    Named(Arc<str>, u8),
}

impl Set {
    /// What these policies say of one direction for pods of a group. `None`: none of them says anything of it.
    pub fn new(direction: Direction, policies: &Selecting<'_>, group: &GroupKey) -> Option<Self> {
        let mut it = Self {
            direction,
            policies: Box::default(),
            rules: Vec::new(),
            is_isolated: false,
            is_audited: policies.is_audited,
        };
        let mut names = Vec::new();
        let (admin, baseline): (Vec<_>, Vec<_>) =
            policies.cluster.iter().partition(|policy| policy.tier == Tier::Admin);
        it.add_cluster(&admin, group, &mut names);
        for policy in &policies.namespaced {
            let Some(given) = direction.rules(policy) else { continue };
            it.is_isolated = true;
            names.push(policy.name.clone());
            let name = |i| format!("{} {direction}[{i}]", policy.name);
            let rule = |(i, rule)| SetRule::new(name(i), (Tier::Namespaced, Action::Accept), rule, direction, group);
            it.rules.extend(given.iter().enumerate().map(rule));
        }
        it.add_cluster(&baseline, group, &mut names);
        it.policies = names.into();
        (!it.policies.is_empty()).then_some(it)
    }

    fn add_cluster(&mut self, policies: &[&ClusterNetworkPolicy], group: &GroupKey, names: &mut Vec<ObjectName>) {
        let direction = self.direction;
        for policy in policies {
            let given = direction.cluster_rules(policy);
            if given.is_empty() {
                continue;
            }
            let subject = ObjectName::namespaced(CLUSTER_KIND, policy.name.as_str());
            let name = |i, rule: &ClusterRule| {
                let own = rule.name.as_ref().map_or_else(String::new, |own| format!(" {own}"));
                format!("{subject} {direction}[{i}]{own}")
            };
            let rule = |(i, rule): (usize, &ClusterRule)| {
                SetRule::new(name(i, rule), (policy.tier, rule.action), &rule.matches, direction, group)
            };
            self.rules.extend(given.iter().enumerate().map(rule));
            names.push(subject);
        }
    }

    /// True if a rule denies or passes flows by the pod at their other side. An address of which nothing is known yet may be that
    /// pod's.
    pub fn has_doubts(&self) -> bool {
        let is_pods = |side: &Side| matches!(side, Side::Pods(_));
        self.rules.iter().any(|rule| rule.action != Action::Accept && rule.sides.iter().flatten().any(is_pods))
    }

    /// The hash of its content.
    pub fn hash(&self) -> u64 {
        let mut hash = ContentHash::EMPTY.add(self.direction.to_string().as_bytes());
        if self.is_audited {
            hash = hash.add(b"audited\0");
        }
        for policy in &self.policies {
            hash = hash.add(policy.as_str().as_bytes()).add(b"\0");
        }
        for SetRule { name, tier, action, sides, ports } in &self.rules {
            hash = hash.add(name.as_bytes()).add(if sides.is_some() { b"\0from" } else { b"\0any " });
            if *tier != Tier::Namespaced {
                hash = hash.add(format!("\0{tier:?} {action:?}").as_bytes());
            }
            for side in sides.iter().flatten() {
                let side = match side {
                    Side::Pods(peer) => peer.hash(),
                    Side::Span(span) => span.hash(),
                };
                hash = hash.add(&side.to_be_bytes());
            }
            for port in ports {
                hash = hash.add(b"\0").add(format!("{port:?}").as_bytes());
            }
        }
        hash.value()
    }
}

impl SetRule {
    fn new(
        name: String,
        (tier, action): (Tier, Action),
        rule: &PolicyRule,
        direction: Direction,
        group: &GroupKey,
    ) -> Self {
        let sides = rule.peers.as_deref();
        let sides = sides.map(|peers| peers.iter().map(|peer| side(peer, &group.namespace)).collect());
        Self { name: name.into(), tier, action, sides, ports: ports(rule.ports.as_deref(), direction, group) }
    }
}

fn side(peer: &PolicyPeer, namespace: &Arc<str>) -> Side {
    match peer {
        PolicyPeer::Block { cidr, except } => Side::Span(Span::Block(Block { cidr: *cidr, except: except.clone() })),
        PolicyPeer::Nodes(selector) => Side::Span(Span::Nodes(selector.clone())),
        PolicyPeer::Pods { namespaces, pods } => {
            let own = || Namespaces::Own(Arc::clone(namespace));
            let namespaces = namespaces.clone().map_or_else(own, Namespaces::Selected);
            Side::Pods(PodPeer { namespaces, pods: pods.clone() })
        }
    }
}

/// The ports of a rule, as servers of this group resolve names if they are the selected ones.
fn ports(given: Option<&[PolicyPort]>, direction: Direction, group: &GroupKey) -> Vec<SetPort> {
    let Some(given) = given else { return vec![SetPort::Prefix(PortPrefix::ANY)] };
    let mut ports = Vec::new();
    for PolicyPort { proto, ports: which } in given {
        match which {
            Ports::Any => ports.push(SetPort::Prefix(PortPrefix::new(*proto, 0, 0))),
            Ports::Range(first, last) => {
                ports.extend(PortPrefix::of_range(*proto, *first, *last).into_iter().map(SetPort::Prefix));
            }
            Ports::Named(name) if direction == Direction::Egress => {
                ports.push(SetPort::Named(Arc::clone(name), *proto));
            }
            Ports::Named(name) => {
                let port = group.port(name, *proto);
                ports.extend(port.map(|port| SetPort::Prefix(PortPrefix::new(*proto, port, 16))));
            }
        }
    }
    ports
}
