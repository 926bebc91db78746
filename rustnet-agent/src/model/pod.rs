//! A pod: who owns an address, and what policies may ask of it.

use super::{Labels, ObjectName, Problem};
use std::net::IpAddr;
use std::sync::Arc;

/// A Pod. The datapath knows the pods of this node from the CNI binary; this one gives them names, says whose sockets ask for Services
/// by themselves, and has the labels that policies select on all nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: ObjectName,
    /// Its UID as the runtime has it, which tells it from an earlier pod of the same name; empty: not known.
    pub uid: Arc<str>,
    /// The node it runs on; empty before it has one.
    pub node: Arc<str>,
    /// Its addresses; those of the node when it uses the host's network; none once it has finished.
    pub addresses: Box<[IpAddr]>,
    /// It uses the host's network.
    pub host_network: bool,
    /// A container of it asks for a port of the host.
    pub host_ports: bool,
    /// Its annotation for socket load-balancing: whether its sockets ask for Services by themselves; `None`: as the setting says.
    pub socket_lb: Option<bool>,
    /// Its labels.
    pub labels: Labels,
    /// The named ports of its containers. Of several with one name and protocol the first counts.
    pub ports: Box<[NamedPort]>,
    /// What is wrong with it.
    pub problems: Box<[Problem]>,
}

/// A port that a container declares with a name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NamedPort {
    /// Its name.
    pub name: Arc<str>,
    /// IP protocol number.
    pub proto: u8,
    /// Its number.
    pub port: u16,
}

impl Pod {
    /// The number of a named port.
    pub fn port(&self, name: &str, proto: u8) -> Option<u16> {
        let is_asked = |port: &&NamedPort| *port.name == *name && port.proto == proto;
        self.ports.iter().find(is_asked).map(|port| port.port)
    }
}
