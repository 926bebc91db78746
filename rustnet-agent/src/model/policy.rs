//! Policies: which flows the pods that they select may open and get.

use super::{ObjectName, Problem, Selector};
use ipnet::IpNet;
use std::sync::Arc;

/// A NetworkPolicy. What could not be understood of it allows nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkPolicy {
    /// Its name.
    pub name: ObjectName,
    /// The pods of its namespace that it is for.
    pub selector: Selector,
    /// What may come to them; `None`: it says nothing of that direction.
    pub ingress: Option<Box<[PolicyRule]>>,
    /// Where they may go; `None`: it says nothing of that direction.
    pub egress: Option<Box<[PolicyRule]>>,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

impl NetworkPolicy {
    /// One that selects all pods of its namespace, and allows them nothing.
    pub fn closing(name: ObjectName) -> Self {
        let nothing = || Some(Box::default());
        Self { name, selector: Selector::default(), ingress: nothing(), egress: nothing(), problems: Box::default() }
    }
}

/// A ClusterNetworkPolicy (`policy.networking.k8s.io`). What could not be understood of it fails closed, rule by rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterNetworkPolicy {
    /// Its name.
    pub name: ObjectName,
    /// Whether it counts before NetworkPolicies or behind them.
    pub tier: Tier,
    /// Its place within the tier: the lower one counts first, and of two alike that with the lower name.
    pub priority: i32,
    /// The pods that it is for; `None`: it could not be understood, and is for none.
    pub subject: Option<Subject>,
    /// What may come to them, in order of precedence.
    pub ingress: Box<[ClusterRule]>,
    /// Where they may go, in order of precedence.
    pub egress: Box<[ClusterRule]>,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}

/// Tiers of policies, in the order in which they count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// ClusterNetworkPolicies that nothing overrides.
    Admin,
    /// NetworkPolicies.
    Namespaced,
    /// ClusterNetworkPolicies for flows that nothing else decides.
    Baseline,
}

/// Pods that a ClusterNetworkPolicy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Their namespaces.
    pub namespaces: Selector,
    /// Their labels.
    pub pods: Selector,
}

/// A rule of a ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRule {
    /// The name that it has in the object, if any.
    pub name: Option<Box<str>>,
    /// What becomes of flows that match.
    pub action: Action,
    /// The flows that match.
    pub matches: PolicyRule,
}

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// It may be opened.
    Accept,
    /// It may not.
    Deny,
    /// The next tier decides.
    Pass,
}

/// What a rule matches: flows of one of its peers to one of its ports. Those of NetworkPolicies are allowed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyRule {
    /// The other side; `None`: any address. An empty list matches nothing: all of it was wrong.
    pub peers: Option<Box<[PolicyPeer]>>,
    /// The server's ports; `None`: any protocol and port. An empty list matches nothing: all of it was wrong.
    pub ports: Option<Box<[PolicyPort]>>,
}

/// One of the other sides of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyPeer {
    /// Pods.
    Pods {
        /// Their namespaces; `None`: that of the policy.
        namespaces: Option<Selector>,
        /// Their labels. The empty selector has them all.
        pods: Selector,
    },
    /// A range of addresses.
    Block {
        /// The range, host bits cleared.
        cidr: IpNet,
        /// Ranges inside of it that do not count, host bits cleared, in order.
        except: Box<[IpNet]>,
    },
    /// The addresses of the Nodes with such labels.
    Nodes(Selector),
}

/// Ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyPort {
    /// IP protocol number.
    pub proto: u8,
    /// Which of its ports.
    pub ports: Ports,
}

/// Some ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ports {
    /// All.
    Any,
    /// From the first to the last, both included.
    Range(u16, u16),
    /// The port of this name that a container of the server's pod declares for the protocol.
    Named(Arc<str>),
}
