//! What the host's network looks like, and the facts that decisions depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};

use super::address::{self, Address};
use super::link::{self, Link};
use super::netlink::Socket;
use super::route::{self, PROTOCOL, Route, Target};
use crate::host::{DefaultRoute, Device, DeviceAddress, DeviceKind, HostFacts};
use crate::model::Family;

/// Kinds of devices whose ports have no packets of their own. A VRF's ports do.
const COLLECTORS: [&str; 4] = ["bridge", "bond", "team", "openvswitch"];
/// Kind of devices that only hold addresses.
const DUMMY: &str = "dummy";

/// What the host looks like.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// All interfaces.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<Address>,
    /// All routes of the main table.
    pub routes: Vec<Route>,
}

impl Host {
    /// Looks.
    pub fn observe(socket: &mut Socket) -> Result<Self> {
        Ok(Self { links: link::list(socket)?, addresses: address::list(socket)?, routes: route::list(socket)? })
    }

    /// What decisions depend on.
    pub fn facts(&self) -> HostFacts {
        let mut defaults: Vec<_> = self.routes.iter().filter(|route| route.dst.prefix_len() == 0).collect();
        // The last resort of IPv6 is no way out.
        defaults.retain(|route| !route.target.devices().is_empty());
        let hops = |route: &&Route| {
            let (family, metric) = (Family::of(route.dst.addr()), route.metric);
            let hop = move |device| DefaultRoute { family, metric, device };
            route.target.devices().into_iter().map(hop).collect::<Vec<_>>()
        };
        let mut defaults: Vec<_> = defaults.iter().flat_map(hops).collect();
        defaults.sort_unstable();
        defaults.dedup();
        // Pods come and go; their veths decide nothing, unless a delegated IPAM has its gateway there.
        let mut on_link = self.prefixes_on_links();
        let devices = self.links.iter().map(|link| self.device(link, on_link.remove(&link.index).unwrap_or_default()));
        let devices =
            devices.filter(|it| it.kind != DeviceKind::Internal || it.addresses.iter().any(|it| it.is_usable));
        HostFacts { devices: devices.collect(), defaults }
    }

    /// The prefixes of routes without router, by device: those of neighbours. Default routes, multicast and our own are not. Hosts
    /// with a million routes exist: each is looked at once.
    fn prefixes_on_links(&self) -> BTreeMap<u32, BTreeSet<IpNet>> {
        let mut found: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
        let is_of_neighbours = |it: &&Route| it.protocol != PROTOCOL && it.dst.prefix_len() > 0 && is_unicast(&it.dst);
        for route in self.routes.iter().filter(is_of_neighbours) {
            if let Target::Via { oif, gateway: None } = route.target {
                found.entry(oif).or_default().insert(route.dst);
            }
        }
        found
    }

    fn device(&self, link: &Link, mut on_link: BTreeSet<IpNet>) -> Device {
        let own: Vec<_> = self.addresses.iter().filter(|it| it.ifindex == link.index).collect();
        let kind = self.kind(link);
        if kind != DeviceKind::Ethernet {
            on_link.clear();
        }
        for address in &own {
            on_link.remove(&address.net.trunc());
        }
        Device {
            index: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            kind,
            addresses: own.into_iter().map(device_address).collect(),
            on_link: on_link.into_iter().collect(),
        }
    }

    fn kind(&self, link: &Link) -> DeviceKind {
        let master = link.master.and_then(|index| self.links.iter().find(|it| it.index == index));
        if link.name == OVERLAY_DEV || link.name.starts_with(VETH_PREFIX) {
            DeviceKind::Internal
        } else if link.flags & libc::IFF_LOOPBACK as u32 != 0 || link.kind == DUMMY {
            DeviceKind::Local
        } else if master.is_some_and(|it| COLLECTORS.contains(&it.kind.as_str())) {
            DeviceKind::Member
        } else if link.is_ethernet() {
            DeviceKind::Ethernet
        } else {
            DeviceKind::LayerThree
        }
    }
}

fn is_unicast(net: &IpNet) -> bool {
    match net.addr() {
        IpAddr::V4(ip) => !ip.is_multicast() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_multicast() && !ip.is_unicast_link_local(),
    }
}

fn device_address(address: &Address) -> DeviceAddress {
    const OPTIMISTIC: u32 = libc::IFA_F_OPTIMISTIC;
    let is_global = address.scope == libc::RT_SCOPE_UNIVERSE && !address.net.addr().is_loopback();
    // Optimistic addresses are tentative ones that the kernel uses already (RFC 4429).
    let is_unproven = address.flags & libc::IFA_F_TENTATIVE != 0 && address.flags & OPTIMISTIC == 0;
    let is_usable = is_global && !is_unproven && address.flags & libc::IFA_F_DADFAILED == 0;
    DeviceAddress { net: address.net, is_usable, is_preferred: is_usable && address.is_usable() }
}

/// The prefixes of all addresses.
pub fn networks(host: &Host) -> Vec<IpNet> {
    host.addresses.iter().map(|it| it.net).collect()
}

#[cfg(test)]
mod tests {
    use super::super::route::Hop;
    use super::{Address, Host, IpNet, Link, PROTOCOL, Route};
    use crate::host::DefaultRoute;
    use crate::host::DeviceKind::{Ethernet, Internal, LayerThree, Local, Member};
    use crate::model::Family;
    use crate::net::route::Target;

    fn link(index: u32, name: &str, kind: &str, master: Option<u32>) -> Link {
        Link { index, name: name.into(), kind: kind.into(), master, hardware: libc::ARPHRD_ETHER, ..Link::default() }
    }

    fn route(dst: &str, target: Target, metric: u32) -> Route {
        Route { dst: dst.parse().unwrap(), target, source: None, metric, protocol: 3 }
    }

    #[test]
    fn kinds_follow_from_what_leaves_by_a_device() {
        let lo = Link { flags: libc::IFF_LOOPBACK as u32, hardware: libc::ARPHRD_LOOPBACK, ..link(1, "lo", "", None) };
        let wg = Link { hardware: libc::ARPHRD_NONE, ..link(9, "wg0", "wireguard", None) };
        let links = vec![
            lo,
            link(2, "eth0", "", Some(3)),
            link(3, "bond0", "bond", None),
            link(4, "bond0.7", "vlan", None),
            link(5, "red", "vrf", None),
            link(6, "eth1", "", Some(5)),
            link(7, "kube-ipvs0", "dummy", None),
            link(8, "rnv1", "veth", None),
            wg,
            link(10, "eth2", "veth", None),
            link(11, "rn_vxlan", "vxlan", None),
        ];
        let gateway = Address { ifindex: 8, net: "10.1.1.1/32".parse().unwrap(), scope: 0, flags: 0 };
        let facts = Host { links, addresses: vec![gateway], ..Host::default() }.facts();
        let kinds: Vec<_> = facts.devices.iter().map(|it| (it.name.as_str(), it.kind)).collect();
        let want = [
            ("lo", Local),
            ("eth0", Member),
            ("bond0", Ethernet),
            ("bond0.7", Ethernet),
            ("red", Ethernet),
            ("eth1", Ethernet),
            ("kube-ipvs0", Local),
            ("rnv1", Internal),
            ("wg0", LayerThree),
            ("eth2", Ethernet),
        ];
        assert_eq!(kinds, want);
    }

    #[test]
    fn prefixes_on_the_link_are_those_that_routes_without_router_tell() {
        let direct = Target::Via { oif: 2, gateway: None };
        let ours = Route { protocol: PROTOCOL, ..route("2001:db8:7::/64", direct.clone(), 0) };
        let by_router = Target::Via { oif: 2, gateway: Some("192.0.2.9".parse().unwrap()) };
        let routes = vec![
            route("192.0.2.0/24", direct.clone(), 0),
            route("2001:db8::/64", direct.clone(), 100),
            route("2001:db8::/64", direct.clone(), 200),
            route("fe80::/64", direct.clone(), 256),
            route("0.0.0.0/0", direct, 0),
            route("10.0.0.0/8", by_router, 0),
            route("10.9.0.0/16", Target::Via { oif: 3, gateway: None }, 0),
            ours,
        ];
        let address = Address { ifindex: 2, net: "192.0.2.1/24".parse().unwrap(), scope: 0, flags: 0 };
        let host = Host { links: vec![link(2, "eth0", "", None)], addresses: vec![address], routes };
        let facts = host.facts();
        assert_eq!(facts.devices[0].on_link, ["2001:db8::/64".parse::<IpNet>().unwrap()]);
    }

    #[test]
    fn every_next_hop_of_every_default_route_counts() {
        let hop = |oif| Hop { oif, gateway: None };
        let routes = vec![
            route("0.0.0.0/0", Target::Via { oif: 2, gateway: None }, 100),
            route("0.0.0.0/0", Target::Multi(vec![hop(4), hop(3)]), 0),
            route("::/0", Target::Unreachable, 4_294_967_295),
            route("::/0", Target::Via { oif: 3, gateway: None }, 0),
            route("10.0.0.0/8", Target::Via { oif: 9, gateway: None }, 0),
        ];
        let default = |family, metric, device| DefaultRoute { family, metric, device };
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(
            Host { routes, ..Host::default() }.facts().defaults,
            [default(v4, 0, 3), default(v4, 0, 4), default(v4, 100, 2), default(v6, 0, 3)]
        );
    }

    #[test]
    fn addresses_that_are_not_proven_or_on_their_way_out_count_less() {
        let address = |net: &str, scope, flags| Address { ifindex: 2, net: net.parse().unwrap(), scope, flags };
        let addresses = vec![
            address("192.0.2.1/24", 0, 0),
            address("2001:db8::1/64", 0, libc::IFA_F_TENTATIVE),
            address("2001:db8::2/64", 0, libc::IFA_F_TENTATIVE | libc::IFA_F_OPTIMISTIC),
            address("2001:db8::3/64", 0, libc::IFA_F_DADFAILED),
            address("2001:db8::4/64", 0, libc::IFA_F_DEPRECATED),
            address("2001:db8::5/64", 0, libc::IFA_F_TEMPORARY),
            address("fe80::1/64", libc::RT_SCOPE_LINK, 0),
        ];
        let host = Host { links: vec![link(2, "eth0", "", None)], addresses, ..Host::default() };
        let states: Vec<_> =
            host.facts().devices[0].addresses.iter().map(|it| (it.is_usable, it.is_preferred)).collect();
        let (preferred, usable, neither) = ((true, true), (true, false), (false, false));
        assert_eq!(states, [preferred, neither, usable, neither, usable, usable, neither]);
    }
}
