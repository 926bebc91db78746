//! Nodes, and the peers table made of them.

use super::Settings;
use crate::config::Routing;
use crate::model::{Family, Node, ObjectName, Problem};
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags, identity};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// All nodes. A change of one rebuilds the table: that is rare, and takes a few milliseconds for
/// thousands.
#[derive(Debug, Default)]
pub struct Nodes {
    nodes: BTreeMap<ObjectName, Arc<Node>>,
    dirty: bool,
}

impl Nodes {
    pub fn apply(&mut self, node: Arc<Node>) {
        // Every node's status is written every few minutes; most of that says nothing to us.
        if self.nodes.get(&node.name) != Some(&node) {
            self.nodes.insert(node.name.clone(), node);
            self.dirty = true;
        }
    }

    pub fn delete(&mut self, name: &ObjectName) {
        self.dirty |= self.nodes.remove(name).is_some();
    }

    pub fn get(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(|node| &**node)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().map(|node| &**node)
    }

    pub fn set_dirty(&mut self) {
        self.dirty = true;
    }

    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    pub fn peers(&self, settings: &Settings) -> BTreeMap<IpNet, Peer> {
        self.table(settings).peers
    }

    pub fn conflicts(&self, settings: &Settings) -> Vec<Problem> {
        self.table(settings).problems
    }

    /// Those of other nodes with this one: each of the two may hold the other for the wrong one, and both have to tell.
    pub fn conflicts_with_own(&self, settings: &Settings) -> Vec<Problem> {
        self.table(settings).with_own
    }

    fn table(&self, settings: &Settings) -> Table {
        let mut table = Table { own: Arc::clone(&settings.node_name), ..Table::default() };
        let is_own = |node: &Node| node.name.as_str() == &*settings.node_name;
        // What this machine really has comes first, whatever a Node object says.
        for ip in &settings.own_addresses {
            table.add_address(&settings.node_name, "this node's interfaces", *ip, host());
        }
        let mut by_age: Vec<&Node> = self.iter().collect();
        by_age.sort_by_key(|node| (node.created, &node.name));
        for node in by_age {
            if is_own(node) {
                for ip in &node.addresses {
                    table.add_address(&settings.node_name, "status.addresses", *ip, host());
                }
                for cidr in &node.pod_cidrs {
                    table.add_range(node, *cidr, peer(None, identity::POD, flags::LOCAL_PODS));
                }
            } else {
                table.add_other(node, settings);
            }
        }
        for cidr in &settings.no_masquerade {
            // A range inside a pod range would hide the pods behind it, and pods keep their address among themselves anyway.
            if table.ranges.overlapping(cidr).is_none_or(|(range, _)| !range.contains(cidr)) {
                table.peers.entry(*cidr).or_insert_with(|| peer(None, identity::WORLD, flags::NO_MASQ));
            }
        }
        table
    }
}

/// The peers table while it is being made.
#[derive(Default)]
struct Table {
    /// Name of this node.
    own: Arc<str>,
    peers: BTreeMap<IpNet, Peer>,
    address_owner: BTreeMap<IpAddr, Arc<str>>,
    ranges: Ranges,
    problems: Vec<Problem>,
    /// Those of other nodes that are at odds with this one.
    with_own: Vec<Problem>,
}

impl Table {
    fn add_other(&mut self, node: &Node, settings: &Settings) {
        let name: Arc<str> = node.name.as_str().into();
        let overlay = settings.routing.has_overlay();
        let far_end = node.address(settings.tunnel_family).filter(|_| overlay);
        let direct = |family| match settings.routing {
            Routing::Vxlan => None,
            Routing::Native => node.address(family),
            Routing::DirectAndVxlan => node.on_link(family, &settings.links),
        };
        let tunnelled = || node.pod_cidrs.iter().any(|cidr| direct(Family::of(cidr.addr())).is_none());
        if overlay && far_end.is_none() && !node.addresses.is_empty() && tunnelled() {
            self.problem(&name, "status.addresses", format!(
                "no {} InternalIP, between which the overlay is spanned, so that its pods cannot be reached; give it one, or \
                 choose the other family for the overlay",
                settings.tunnel_family
            ));
        }
        for ip in &node.addresses {
            let covered = settings.no_masquerade.iter().any(|cidr| cidr.contains(ip));
            let no_masq = if covered { flags::NO_MASQ } else { 0 };
            let (node, tunnel) = match far_end.filter(|_| direct(Family::of(*ip)).is_none()) {
                Some(far_end) => (far_end, flags::TUNNEL),
                None => (*ip, 0),
            };
            let peer = peer(Some(node), identity::NODE, flags::NODE | tunnel | no_masq);
            self.add_address(&name, "status.addresses", *ip, peer);
        }
        for cidr in &node.pod_cidrs {
            let family = Family::of(cidr.addr());
            let way = direct(family).map(|ip| (ip, 0)).or_else(|| far_end.map(|ip| (ip, flags::TUNNEL)));
            if let Some((ip, tunnel)) = way {
                self.add_range(node, *cidr, peer(Some(ip), identity::POD, flags::POD | tunnel));
            } else if settings.routing == Routing::Native && !node.addresses.is_empty() {
                let message =
                    format!("no {family} InternalIP to route {cidr} to; give it one, or no {family} pod range");
                self.problem(&name, "status.addresses", message);
            }
        }
    }

    fn add_address(&mut self, name: &Arc<str>, field: &str, ip: IpAddr, peer: Peer) {
        match self.address_owner.get(&ip) {
            Some(owner) if owner == name => {}
            Some(owner) => {
                let message = format!("{ip} belongs to node {owner}; give each node addresses of its own");
                let with_own = *owner == self.own;
                self.conflict(name, field, message, with_own);
            }
            None => {
                self.address_owner.insert(ip, Arc::clone(name));
                self.peers.insert(ip.into(), peer);
            }
        }
    }

    fn add_range(&mut self, node: &Node, cidr: IpNet, peer: Peer) {
        let name: Arc<str> = node.name.as_str().into();
        if let Some((range, owner)) = self.ranges.overlapping(&cidr) {
            let message =
                format!("{cidr} overlaps {range} of node {owner}, it is left out; give each node a range of its own");
            self.conflict(&name, "spec.podCIDRs", message, owner == self.own);
        } else {
            self.ranges.insert(cidr, name);
            // A single-address range cannot displace a node's own address.
            self.peers.entry(cidr).or_insert(peer);
        }
    }

    fn conflict(&mut self, node: &str, field: &str, message: String, with_own: bool) {
        self.problem(node, field, message);
        if with_own {
            self.with_own.extend(self.problems.last().cloned());
        }
    }

    fn problem(&mut self, node: &str, field: &str, message: impl Into<Box<str>>) {
        self.problems.push(Problem::new(&format!("Node {node}").into(), field, message));
    }
}

/// Ranges that do not overlap one another, with their owners.
#[derive(Default)]
struct Ranges(BTreeMap<IpAddr, (IpNet, Arc<str>)>);

impl Ranges {
    /// A range that shares an address with this one. As none overlaps another, only two neighbours can.
    fn overlapping(&self, cidr: &IpNet) -> Option<(IpNet, Arc<str>)> {
        let before = self.0.range(..=cidr.network()).next_back();
        let after = self.0.range(cidr.network()..).next();
        let overlaps = |other: &IpNet| other.contains(cidr) || cidr.contains(other);
        before.into_iter().chain(after).map(|(_, found)| found).find(|(other, _)| overlaps(other)).cloned()
    }

    fn insert(&mut self, cidr: IpNet, owner: Arc<str>) {
        self.0.insert(cidr.network(), (cidr, owner));
    }
}

fn peer(node: Option<IpAddr>, identity: u32, flags: u16) -> Peer {
    Peer { node: node.map_or(Addr::UNSPECIFIED, Addr::from), identity, flags, pad: 0 }
}

fn host() -> Peer {
    peer(None, identity::HOST, flags::HOST)
}
