//! Which routes and neighbours there should be, and what leads there from what is. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use rustnet_common::names::VETH_PREFIX;

use super::endpoints::parse_mac;
use super::link::Link;
use super::neighbour::Neighbour;
use super::route::{LAST_METRIC, PROTOCOL, Route, Target};
use super::uplink::{Host, Uplink};
use crate::config::Routing;
use crate::model::{Family, Node};
use rustnet_common::files::EndpointFile;

/// All that routes follow from.
pub struct Facts<'a> {
    /// This node's own object, once known.
    pub own: Option<&'a Node>,
    /// Ranges that this node's pods come from.
    pub own_pod_cidrs: &'a [IpNet],
    /// The other nodes.
    pub peers: Vec<&'a Node>,
    /// How pods of other nodes are reached.
    pub routing: Routing,
    /// Index of the overlay device; `None` in native routing.
    pub overlay: Option<u32>,
    /// The devices towards the other nodes.
    pub uplinks: &'a [Uplink],
    /// The pods' interfaces.
    pub endpoints: &'a [EndpointFile],
}

/// What there should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Routes that are ours.
    pub routes: Vec<Route>,
    /// Destinations of pods and their veths: any direct route will do, whoever made it.
    pub pod_routes: Vec<(IpAddr, u32)>,
    /// Permanent neighbours of pods.
    pub neighbours: Vec<Neighbour>,
    /// What cannot be reached, and why.
    pub problems: Vec<String>,
}

/// What leads from what there is to what there should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Routes to add; true where one of ours is in the place.
    pub add: Vec<(Route, bool)>,
    /// Routes of ours that nobody needs.
    pub delete: Vec<Route>,
    /// Neighbours to add.
    pub neighbours: Vec<Neighbour>,
}

impl Changes {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.delete.is_empty() && self.neighbours.is_empty()
    }
}

impl Facts<'_> {
    /// What there should be, given the interfaces that exist.
    pub fn desired(&self, links: &[Link]) -> Desired {
        let mut desired = Desired::default();
        for cidr in self.own_pod_cidrs {
            desired.routes.push(ours(*cidr, Target::Unreachable, None, LAST_METRIC));
        }
        for peer in &self.peers {
            for cidr in peer.pod_cidrs.iter().filter(|cidr| !self.is_own(cidr)) {
                match self.target(peer, *cidr) {
                    Some(target) => desired.routes.push(ours(*cidr, target, self.source(*cidr), 0)),
                    None => desired.problems.push(format!(
                        "node {}: none of its addresses is on a link of this node's uplinks, so no route to its pods {cidr} is \
                         made: let the routers between the nodes know the range, or use --routing vxlan or direct-and-vxlan",
                        peer.name
                    )),
                }
            }
        }
        self.add_pods(&mut desired, links);
        // Two nodes with one range is the index's problem to report; one route is all the kernel takes.
        let mut seen = BTreeSet::new();
        desired.routes.retain(|route| seen.insert(route.key()));
        desired
    }

    fn is_own(&self, cidr: &IpNet) -> bool {
        self.own_pod_cidrs.iter().any(|own| own.contains(cidr) || cidr.contains(own))
    }

    /// The node's own address of the family: what pods see when the host talks to them.
    fn source(&self, cidr: IpNet) -> Option<IpAddr> {
        let same = |ip: &IpAddr| ip.is_ipv4() == cidr.addr().is_ipv4();
        let local: BTreeSet<IpAddr> = self.uplinks.iter().flat_map(|u| &u.addresses).map(IpNet::addr).collect();
        let named = self.own.into_iter().flat_map(|own| own.addresses.iter().copied());
        // The kernel refuses a source that no interface has.
        named
            .filter(|ip| local.contains(ip))
            .find(same)
            .or_else(|| self.uplinks.iter().flat_map(|u| &u.addresses).map(IpNet::addr).find(same))
    }

    /// Where packets for a range of another node's pods go.
    fn target(&self, peer: &Node, cidr: IpNet) -> Option<Target> {
        let direct = || {
            let family = Family::of(cidr.addr());
            self.uplinks.iter().find_map(|uplink| {
                let gateway = peer.on_link(family, &uplink.addresses)?;
                Some(Target::Via { oif: uplink.ifindex, gateway: Some(gateway) })
            })
        };
        let tunnel = || self.overlay.map(|oif| Target::Via { oif, gateway: None });
        match self.routing {
            Routing::Vxlan => tunnel(),
            Routing::Native => direct(),
            Routing::DirectAndVxlan => direct().or_else(tunnel),
        }
    }

    fn add_pods(&self, desired: &mut Desired, links: &[Link]) {
        for endpoint in self.endpoints {
            // By name as well: an index may have been given to another device since. The kernel takes no route for a device
            // that is down, as a pod's is while it comes or goes.
            let usable =
                |link: &Link| link.index == endpoint.ifindex && link.name == endpoint.host_ifname && link.is_up();
            if !links.iter().any(usable) {
                continue;
            }
            let Some(mac) = parse_mac(&endpoint.mac) else {
                desired
                    .problems
                    .push(format!("the record of {} has no MAC but {:?}", endpoint.host_ifname, endpoint.mac));
                continue;
            };
            for ip in &endpoint.addresses {
                desired.pod_routes.push((*ip, endpoint.ifindex));
                desired.neighbours.push(Neighbour { ifindex: endpoint.ifindex, ip: *ip, mac });
            }
        }
    }
}

fn ours(dst: IpNet, target: Target, source: Option<IpAddr>, metric: u32) -> Route {
    Route { dst: dst.trunc(), target, source, metric, protocol: PROTOCOL }
}

impl Desired {
    /// What leads from `host` to this.
    pub fn changes(&self, host: &Host, neighbours: &[Neighbour]) -> Changes {
        let there: BTreeMap<_, &Route> =
            host.routes.iter().filter(|r| r.protocol == PROTOCOL).map(|r| (r.key(), r)).collect();
        let mut changes = Changes::default();
        for route in &self.routes {
            match there.get(&route.key()) {
                Some(same) if *same == route => {}
                // The kernel takes no second one, and it does what ours would: a network of before, or routes made by hand.
                None if host.routes.iter().any(|r| r.key() == route.key() && r.target == route.target) => {}
                other => changes.add.push((route.clone(), other.is_some())),
            }
        }
        for (ip, ifindex) in &self.pod_routes {
            let direct = Target::Via { oif: *ifindex, gateway: None };
            if !host.routes.iter().any(|r| r.dst == IpNet::from(*ip) && r.target == direct) {
                changes.add.push((ours((*ip).into(), direct, None, 0), false));
            }
        }
        changes.delete = self.superfluous(host);
        let known: BTreeSet<_> = neighbours.iter().collect();
        changes.neighbours = self.neighbours.iter().filter(|n| !known.contains(n)).copied().collect();
        changes
    }

    /// Our routes that should not be. Those of pods' veths go with the veth: the record of a new one may not be written yet.
    fn superfluous(&self, host: &Host) -> Vec<Route> {
        let wanted: BTreeSet<_> = self.routes.iter().map(Route::key).collect();
        let veths: BTreeSet<u32> =
            host.links.iter().filter(|link| link.name.starts_with(VETH_PREFIX)).map(|link| link.index).collect();
        let on_veth = |r: &&Route| matches!(r.target, Target::Via { oif, .. } if veths.contains(&oif));
        let ours = host.routes.iter().filter(|r| r.protocol == PROTOCOL && !on_veth(r));
        ours.filter(|r| !wanted.contains(&r.key())).cloned().collect()
    }
}

#[cfg(test)]
mod tests;
