//! This node's place in the cluster, and the way to each other node and its pods. Pure: from Nodes, host and settings.
//!
//! This is decided here and nowhere else: the peers table ([`crate::index`]), the kernel's routes ([`crate::net::plan`]), the
//! programs' settings and `rustnetctl doctor` format the result.

mod place;
mod ranges;
mod table;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use self::place::{Place, Sources, Uplink, place};
use crate::config::{Algorithm, Forwarding, NodePortAddresses, Routing};
use crate::host::HostFacts;
use crate::model::{Family, Node, Problem};

/// Settings that the ways, and the tables of Services and peers, depend on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node_name: Arc<str>,
    /// How packets get to other nodes.
    pub routing: Routing,
    /// Names of the uplinks; empty: they follow from addresses and default routes.
    pub uplinks: Vec<String>,
    /// Family of the overlay's outer packets; `None`: it follows from the Nodes.
    pub overlay_family: Option<Family>,
    /// This node's pod ranges, in place of its Node's; empty: those of the Node.
    pub pod_cidrs: Vec<IpNet>,
    /// Ranges beyond pods and nodes to which pods keep their address.
    pub no_masquerade: Vec<IpNet>,
    /// Ranges of Services, beyond those of objects.
    pub service_cidrs: Vec<IpNet>,
    /// Addresses of this node that have node ports; empty: all.
    pub node_ports: Vec<NodePortAddresses>,
    /// Sockets of this host ask for Services by themselves, and reach node ports at loopback addresses.
    pub has_host_sockets: bool,
    /// How flows of Services are spread that do not say.
    pub lb_algorithm: Algorithm,
    /// Places of a Maglev table.
    pub maglev_table_size: u32,
    /// How clients outside get the answers of backends on other nodes, of Services that do not say.
    pub forwarding: Forwarding,
}

impl Settings {
    /// True if an address of this node has node ports; `is_primary`: its Node object has it.
    pub fn has_node_ports(&self, ip: IpAddr, is_primary: bool) -> bool {
        let is_named = |it: &NodePortAddresses| match it {
            NodePortAddresses::Primary => is_primary,
            NodePortAddresses::In(range) => range.contains(&ip),
        };
        self.node_ports.is_empty() || self.node_ports.iter().any(is_named)
    }

    /// Those of a node without any preference.
    pub fn new(node_name: &str, routing: Routing) -> Self {
        Self {
            node_name: node_name.into(),
            routing,
            uplinks: Vec::new(),
            overlay_family: None,
            pod_cidrs: Vec::new(),
            no_masquerade: Vec::new(),
            service_cidrs: Vec::new(),
            node_ports: Vec::new(),
            has_host_sockets: false,
            lb_algorithm: Algorithm::Random,
            maglev_table_size: 251,
            forwarding: Forwarding::Snat,
        }
    }

    /// True for this node's own object.
    pub fn is_own(&self, node: &Node) -> bool {
        node.name.as_str() == &*self.node_name
    }

    /// The ranges that this node's pods come from.
    pub fn own_pod_cidrs<'a>(&'a self, own: Option<&'a Node>) -> &'a [IpNet] {
        if self.pod_cidrs.is_empty() { own.map(|node| &*node.pod_cidrs).unwrap_or_default() } else { &self.pod_cidrs }
    }
}

/// How packets get to a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It is this host.
    Here,
    /// By a route to a neighbour on the segment of an uplink, which is ours.
    Direct {
        /// The next hop: an address of the node.
        gateway: IpAddr,
        /// Index of the uplink.
        device: u32,
    },
    /// By routes that others have made.
    Routed {
        /// An address of the node; `None` where no node is behind the prefix.
        node: Option<IpAddr>,
    },
    /// Through the overlay.
    Tunnel {
        /// Address of the node, which it also sends from.
        far_end: IpAddr,
    },
}

/// Whose a prefix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The host's own stack.
    Host,
    /// The pods of this node.
    OwnPods,
    /// Another node.
    Node,
    /// The pods of another node.
    Pods,
    /// Somebody outside of the cluster, who sees the pods' addresses.
    Outside,
}

/// What is known of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Whose it is.
    pub owner: Owner,
    /// How packets get there.
    pub way: Way,
    /// Pods keep their address although it is no pod.
    pub is_unmasqueraded: bool,
}

/// All ways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// This node's place.
    pub place: Place,
    /// What lies behind each prefix that is not the world's.
    pub entries: BTreeMap<IpNet, Entry>,
    /// Nodes that cannot be reached, or not as their objects say.
    pub problems: Vec<Problem>,
    /// Those of these that are at odds with this node: each of the two may hold the other for the wrong one.
    pub with_own: Vec<Problem>,
    /// What no route of ours leads to, though packets go there by routes.
    pub unrouted: Vec<Problem>,
}

impl Ways {
    /// Decides all ways.
    pub fn new<'a>(settings: &Settings, nodes: impl Iterator<Item = &'a Node> + Clone, host: &HostFacts) -> Self {
        let own = nodes.clone().find(|node| settings.is_own(node));
        let others = nodes.clone().filter(|node| !settings.is_own(node));
        let place = place(settings, own, others, host);
        table::build(settings, own, nodes, host, place)
    }

    /// True if there are ranges of a family for pods, here or elsewhere.
    pub fn has_pods(&self, family: Family) -> bool {
        let is_pods = |entry: &Entry| matches!(entry.owner, Owner::OwnPods | Owner::Pods);
        self.entries.iter().any(|(prefix, entry)| is_pods(entry) && Family::of(prefix.addr()) == family)
    }

    /// The larger one of the families that the overlay's outer packets have here: its headers count for the MTU.
    pub fn overlay_family(&self) -> Family {
        let tunnels = self.entries.values().filter_map(|entry| match entry.way {
            Way::Tunnel { far_end } => Some(Family::of(far_end)),
            _ => None,
        });
        tunnels.max().unwrap_or(self.place.overlay_family)
    }
}
