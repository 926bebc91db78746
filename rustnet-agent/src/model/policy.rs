//! Network policies: which flows the pods that they select may open and get.

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

/// A rule: it allows flows of one of its peers to one of its ports.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyRule {
    /// The other side; `None`: any address. An empty list allows nothing: all of it was wrong.
    pub peers: Option<Box<[PolicyPeer]>>,
    /// The server's ports; `None`: any protocol and port. An empty list allows nothing: all of it was wrong.
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
