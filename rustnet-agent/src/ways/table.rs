//! The table of prefixes: who owns each, and how packets get there.
//!
//! Of two nodes with one address or overlapping ranges, the older one has it; what this host really has comes first.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::place::Place;
use super::ranges::Ranges;
use super::{Entry, Owner, Settings, Way, Ways};
use crate::config::Routing;
use crate::host::HostFacts;
use crate::model::{Family, Node, Problem};

/// Builds the table.
pub fn build<'a>(
    settings: &Settings,
    own: Option<&Node>,
    nodes: impl Iterator<Item = &'a Node>,
    host: &HostFacts,
    place: Place,
) -> Ways {
    let mut table = Table {
        settings,
        own,
        ways: Ways { place, ..Ways::default() },
        address_owner: BTreeMap::new(),
        ranges: Ranges::default(),
    };
    for ip in host.own_addresses() {
        table.add_address(&settings.node_name, "this node's interfaces", ip, entry(Owner::Host, Way::Here));
    }
    let mut by_age: Vec<&Node> = nodes.collect();
    by_age.sort_by_key(|node| (node.created, &node.name));
    for node in by_age {
        if settings.is_own(node) { table.add_own(node) } else { table.add_other(node) }
    }
    if own.is_none() {
        for cidr in &settings.pod_cidrs {
            table.add_range(&settings.node_name, *cidr, entry(Owner::OwnPods, Way::Here));
        }
    }
    table.add_unmasqueraded();
    table.ways
}

/// The table while it is being built.
struct Table<'a> {
    settings: &'a Settings,
    own: Option<&'a Node>,
    ways: Ways,
    address_owner: BTreeMap<IpAddr, Arc<str>>,
    ranges: Ranges,
}

impl Table<'_> {
    fn add_own(&mut self, node: &Node) {
        let settings = self.settings;
        for ip in &node.addresses {
            self.add_address(&settings.node_name, "status.addresses", *ip, entry(Owner::Host, Way::Here));
        }
        for cidr in settings.own_pod_cidrs(Some(node)) {
            self.add_range(&settings.node_name, *cidr, entry(Owner::OwnPods, Way::Here));
        }
    }

    fn add_other(&mut self, node: &Node) {
        let name: Arc<str> = node.name.as_str().into();
        let far_end = self.far_end(node);
        let has_overlay = self.settings.routing.has_overlay();
        let is_tunnelled = || node.pod_cidrs.iter().any(|cidr| self.direct(node, Family::of(cidr.addr())).is_none());
        if has_overlay && far_end.is_none() && !node.addresses.is_empty() && is_tunnelled() {
            let message = match self.settings.overlay_family {
                Some(family) => format!(
                    "it and this node need {family} InternalIPs for the overlay (--overlay-family), and one of them has none, so that \
                     its pods cannot be reached; give it one, or choose the other family"
                ),
                None => "no InternalIP of a family that this node has one of, too, so that its pods cannot be reached through the \
                         overlay; give both nodes one of the same family"
                    .to_owned(),
            };
            self.problem(&name, "status.addresses", message);
        }
        for ip in &node.addresses {
            let is_unmasqueraded = self.settings.no_masquerade.iter().any(|cidr| cidr.contains(ip));
            let way = match (self.direct(node, Family::of(*ip)), far_end) {
                (None, Some(far_end)) => Way::Tunnel { far_end },
                _ => Way::Routed { node: Some(*ip) },
            };
            self.add_address(&name, "status.addresses", *ip, Entry { owner: Owner::Node, way, is_unmasqueraded });
        }
        for cidr in &node.pod_cidrs {
            let family = Family::of(cidr.addr());
            if let Some(way) = self.direct(node, family).or(far_end.map(|far_end| Way::Tunnel { far_end })) {
                let is_ours = self.add_range(&name, *cidr, entry(Owner::Pods, way));
                if let (true, Way::Routed { .. }) = (is_ours, way) {
                    let message = format!(
                        "none of its addresses is on a link of this node's uplinks, so no route to its pods {cidr} is made: let the \
                         routers between the nodes know the range, or use --routing vxlan or direct-and-vxlan"
                    );
                    let subject = format!("Node {name}").into();
                    self.ways.unrouted.push(Problem::new(&subject, "", message));
                }
            } else if !has_overlay && !node.addresses.is_empty() {
                let message =
                    format!("no {family} InternalIP to route {cidr} to; give it one, or no {family} pod range");
                self.problem(&name, "status.addresses", message);
            }
        }
    }

    /// The way without overlay to what a node has of a family, if there is one.
    fn direct(&self, node: &Node, family: Family) -> Option<Way> {
        let on_link = || {
            self.ways.place.uplinks.iter().find_map(|uplink| {
                let gateway = node.on_link(family, &uplink.prefixes)?;
                Some(Way::Direct { gateway, device: uplink.ifindex })
            })
        };
        match self.settings.routing {
            Routing::Vxlan => None,
            Routing::Native => on_link().or_else(|| node.address(family).map(|ip| Way::Routed { node: Some(ip) })),
            Routing::DirectAndVxlan => on_link(),
        }
    }

    /// The node's end of the overlay between it and this node. Both decide alike: the family of their first addresses if it is
    /// the same, else the first one that both have.
    fn far_end(&self, node: &Node) -> Option<IpAddr> {
        if !self.settings.routing.has_overlay() {
            return None;
        }
        let Some(own) = self.own.filter(|own| !own.addresses.is_empty()) else {
            return self.settings.overlay_family.map_or(node.addresses.first().copied(), |family| node.address(family));
        };
        let have_both = |family: &Family| own.address(*family).is_some() && node.address(*family).is_some();
        let first = |node: &Node| node.addresses.first().map(|ip| Family::of(*ip));
        let family = match self.settings.overlay_family {
            Some(family) => Some(family).filter(have_both),
            None if first(own) == first(node) => first(own),
            None => [Family::V4, Family::V6].into_iter().find(have_both),
        };
        node.address(family?)
    }

    fn add_unmasqueraded(&mut self) {
        for cidr in &self.settings.no_masquerade {
            // A range inside a pod range would hide the pods behind it, and pods keep their address among themselves anyway.
            if self.ranges.overlapping(cidr).is_none_or(|(range, _)| !range.contains(cidr)) {
                let outside = Entry { owner: Owner::Outside, way: Way::Routed { node: None }, is_unmasqueraded: true };
                self.ways.entries.entry(*cidr).or_insert(outside);
            }
        }
    }

    fn add_address(&mut self, name: &Arc<str>, field: &str, ip: IpAddr, entry: Entry) {
        match self.address_owner.get(&ip) {
            Some(owner) if owner == name => {}
            Some(owner) => {
                let message = format!("{ip} belongs to node {owner}; give each node addresses of its own");
                let with_own = *owner == self.settings.node_name;
                self.conflict(name, field, message, with_own);
            }
            None => {
                self.address_owner.insert(ip, Arc::clone(name));
                self.ways.entries.insert(ip.into(), entry);
            }
        }
    }

    /// Returns false where another node has the range.
    fn add_range(&mut self, name: &Arc<str>, cidr: IpNet, entry: Entry) -> bool {
        if let Some((range, owner)) = self.ranges.overlapping(&cidr) {
            let message =
                format!("{cidr} overlaps {range} of node {owner}, it is left out; give each node a range of its own");
            self.conflict(name, "spec.podCIDRs", message, owner == self.settings.node_name);
            return false;
        }
        self.ranges.insert(cidr, Arc::clone(name));
        // A single-address range cannot displace a node's own address.
        self.ways.entries.entry(cidr).or_insert(entry);
        true
    }

    fn conflict(&mut self, node: &str, field: &str, message: String, with_own: bool) {
        self.problem(node, field, message);
        if with_own {
            self.ways.with_own.extend(self.ways.problems.last().cloned());
        }
    }

    fn problem(&mut self, node: &str, field: &str, message: impl Into<Box<str>>) {
        self.ways.problems.push(Problem::new(&format!("Node {node}").into(), field, message));
    }
}

fn entry(owner: Owner, way: Way) -> Entry {
    Entry { owner, way, is_unmasqueraded: false }
}
