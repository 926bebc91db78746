//! Sets: what all policies that select a pod say of one direction.

use super::blocks::Block;
use super::desired::PortPrefix;
use super::groups::{GroupKey, Namespaces, PodPeer};
use super::ids::ContentHash;
use crate::model::{NetworkPolicy, ObjectName, PolicyPeer, PolicyPort, PolicyRule, Ports};
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
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A set. Pods with equal sets share one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Set {
    direction: Direction,
    /// The policies, in order.
    pub policies: Box<[ObjectName]>,
    /// Their rules, in order.
    pub rules: Vec<SetRule>,
}

/// One rule of a set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SetRule {
    /// What people call it.
    pub name: Arc<str>,
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
    Block(Block),
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
    /// What these policies of a namespace say of one direction for pods of a group. `None`: none of them says anything of it.
    pub fn new(direction: Direction, policies: &[&NetworkPolicy], group: &GroupKey) -> Option<Self> {
        let mut names = Vec::new();
        let mut rules = Vec::new();
        for policy in policies {
            let Some(given) = direction.rules(policy) else { continue };
            names.push(policy.name.clone());
            rules.extend(given.iter().enumerate().map(|(i, rule)| SetRule {
                name: format!("{} {direction}[{i}]", policy.name).into(),
                sides:
                    rule.peers.as_deref().map(|peers| peers.iter().map(|peer| side(peer, &group.namespace)).collect()),
                ports: ports(rule.ports.as_deref(), direction, group),
            }));
        }
        (!names.is_empty()).then(|| Self { direction, policies: names.into(), rules })
    }

    /// The hash of its content.
    pub fn hash(&self) -> u64 {
        let mut hash = ContentHash::EMPTY.add(self.direction.to_string().as_bytes());
        for policy in &self.policies {
            hash = hash.add(policy.as_str().as_bytes()).add(b"\0");
        }
        for SetRule { name, sides, ports } in &self.rules {
            hash = hash.add(name.as_bytes()).add(if sides.is_some() { b"\0from" } else { b"\0any " });
            for side in sides.iter().flatten() {
                let side = match side {
                    Side::Pods(peer) => peer.hash(),
                    Side::Block(block) => block.hash(),
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

fn side(peer: &PolicyPeer, namespace: &Arc<str>) -> Side {
    match peer {
        PolicyPeer::Block { cidr, except } => Side::Block(Block { cidr: *cidr, except: except.clone() }),
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
