//! Which routes and neighbours there should be, and what leads there from what is. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use rustnet_common::names::{SERVICE_HOP4, SERVICE_HOP6, VETH_PREFIX};

use super::endpoints::parse_mac;
use super::host::Host;
use super::link::Link;
use super::neighbour::Neighbour;
use super::route::{LAST_METRIC, PROTOCOL, Route, Target};
use crate::model::Family;
use crate::ways::{Owner, Way, Ways};
use rustnet_common::files::EndpointFile;

/// All that routes follow from.
pub struct Facts<'a> {
    /// The ways to the other nodes.
    pub ways: &'a Ways,
    /// Ranges that this node's pods come from.
    pub own_pod_cidrs: &'a [IpNet],
    /// All nodes are known. Before, routes to other nodes stay as an earlier agent made them.
    pub is_complete: bool,
    /// Index of the overlay device; `None` in native routing.
    pub overlay: Option<u32>,
    /// The ranges that Services' addresses come from, as far as they are configured.
    pub service_cidrs: &'a [IpNet],
    /// The pods' interfaces.
    pub endpoints: &'a [EndpointFile],
}

/// Next hop of the host's routes to Services.
pub fn service_hop(family: Family) -> IpAddr {
    match family {
        Family::V4 => SERVICE_HOP4.into(),
        Family::V6 => SERVICE_HOP6.into(),
    }
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
        let known = self.ways.entries.iter().filter(|_| self.is_complete);
        for (cidr, entry) in known.filter(|(cidr, it)| it.owner == Owner::Pods && !self.is_own(cidr)) {
            let target = match entry.way {
                Way::Direct { gateway, device } => Some(Target::Via { oif: device, gateway: Some(gateway) }),
                Way::Tunnel { .. } => self.overlay.map(|oif| Target::Via { oif, gateway: None }),
                Way::Here | Way::Routed { .. } => None,
            };
            // What pods see when the host talks to them: the address by which their node knows this one.
            let source = self.ways.place.addresses.of(Family::of(cidr.addr()));
            desired.routes.extend(target.map(|target| ours(*cidr, target, source, 0)));
        }
        self.add_services(&mut desired, links);
        self.add_pods(&mut desired, links);
        desired
    }

    /// What the host asks of a Service has to leave by an uplink, whose program translates it: whether there is a default route or
    /// not, and wherever that leads. The next hop is nobody's, for no packet gets there.
    fn add_services(&self, desired: &mut Desired, links: &[Link]) {
        let uplink = self.ways.place.uplinks.first();
        let link = uplink.and_then(|uplink| links.iter().find(|link| link.index == uplink.ifindex));
        let Some((oif, mac)) = link.and_then(|link| Some((link.index, link.mac.as_slice().try_into().ok()?))) else {
            return;
        };
        for cidr in self.service_cidrs.iter().filter(|_| self.is_complete) {
            let family = Family::of(cidr.addr());
            let Some(source) = self.ways.place.addresses.of(family) else { continue };
            let gateway = service_hop(family);
            desired.routes.push(ours(*cidr, Target::Via { oif, gateway: Some(gateway) }, Some(source), 0));
            desired.neighbours.push(Neighbour { ifindex: oif, ip: gateway, mac });
        }
    }

    fn is_own(&self, cidr: &IpNet) -> bool {
        self.own_pod_cidrs.iter().any(|own| own.contains(cidr) || cidr.contains(own))
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
        // Hosts with a million routes exist, and so do nodes with hundreds of pods: each route is looked at once.
        let pods = self.pod_routes.iter().map(|(ip, _)| IpNet::from(*ip));
        let destinations: BTreeSet<IpNet> = self.routes.iter().map(|r| r.dst).chain(pods).collect();
        let mut there: BTreeMap<IpNet, Vec<&Route>> = BTreeMap::new();
        for route in host.routes.iter().filter(|route| destinations.contains(&route.dst)) {
            there.entry(route.dst).or_default().push(route);
        }
        let to = |dst: &IpNet| there.get(dst).map(Vec::as_slice).unwrap_or_default();
        let mut changes = Changes::default();
        for route in &self.routes {
            let same_key = || to(&route.dst).iter().filter(|there| there.key() == route.key());
            match same_key().find(|there| there.protocol == PROTOCOL) {
                Some(same) if *same == route => {}
                // The kernel takes no second one, and it does what ours would: a network of before, or routes made by hand.
                None if same_key().any(|there| there.target == route.target) => {}
                other => changes.add.push((route.clone(), other.is_some())),
            }
        }
        for (ip, ifindex) in &self.pod_routes {
            let direct = Target::Via { oif: *ifindex, gateway: None };
            if !to(&IpNet::from(*ip)).iter().any(|there| there.target == direct) {
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
