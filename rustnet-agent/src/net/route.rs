//! Routes of the main table. Those with [`PROTOCOL`] are ours.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use netlink_packet_core::{Emitable, ParseableParametrized};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteLwEnCapType, RouteMessage, RouteNextHop, RouteScope,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{MulticastGroup, RouteMessageBuilder};
use rustnet_common::names;

use super::netlink::{CHANGE, CREATE, Changes, Error, REPLACE, Socket, attributes, unless};
use super::nexthop;
pub use super::nexthop::Hop;

/// Our number in the protocol field of routes (`ip route show proto 114`).
pub const PROTOCOL: u8 = b'r';
/// Metric of the routes that refuse what no pod has: any other route comes first.
pub const LAST_METRIC: u32 = 4_278_198_272;

/// How many lists of IPv6 routes make a whole one on a host where they change all the time.
const LISTS: usize = 3;
/// What IPv6 makes of no metric.
const IP6_METRIC: u32 = 1024;

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Out of an interface, to a neighbour or to everything there.
    Via {
        /// The interface.
        oif: u32,
        /// The next hop; `None`: the destination is on the link.
        gateway: Option<IpAddr>,
    },
    /// Over several next hops, which share the flows.
    Multi(Vec<Hop>),
    /// Where a nexthop object leads that the kernel does not list.
    Object(u32),
    /// Nowhere: the sender receives an error.
    Unreachable,
    /// A type that we never make (`RTN_*`): `blackhole`, `prohibit`, `throw`.
    Other(u8),
}

impl Target {
    /// The interfaces that packets leave by.
    pub fn devices(&self) -> Vec<u32> {
        match self {
            Self::Via { oif, .. } => vec![*oif],
            Self::Multi(hops) => hops.iter().map(|hop| hop.oif).collect(),
            Self::Object(_) | Self::Unreachable | Self::Other(_) => Vec::new(),
        }
    }

    fn resolve(&mut self, objects: &BTreeMap<u32, Vec<Hop>>) {
        let Self::Object(id) = self else { return };
        match objects.get(id).map(Vec::as_slice) {
            None => {}
            Some([]) => *self = Self::Other(libc::RTN_BLACKHOLE),
            Some([Hop { oif, gateway }]) => *self = Self::Via { oif: *oif, gateway: *gateway },
            Some(hops) => *self = Self::Multi(hops.to_vec()),
        }
    }
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Where to.
    pub target: Target,
    /// Source address that the host's own packets get.
    pub source: Option<IpAddr>,
    /// Metric as asked for: 0 is the family's default.
    pub metric: u32,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
}

impl Route {
    /// What the kernel tells routes apart by.
    pub fn key(&self) -> (IpNet, u32) {
        (self.dst, self.metric)
    }
}

/// All routes of the main table, both families.
pub fn list(socket: &mut Socket) -> Result<Vec<Route>> {
    let mut routes = list_of(socket, AddressFamily::Inet).context("listing IPv4 routes")?;
    routes.extend(list_v6(socket).context("listing IPv6 routes")?);
    if routes.iter().any(|route| matches!(route.target, Target::Object(_))) {
        let objects = nexthop::list(socket).context("listing nexthop objects")?;
        for route in &mut routes {
            route.target.resolve(&objects);
        }
    }
    Ok(routes)
}

/// The kernel sends a long list in parts. When IPv6 routes come or go in between, it leaves out as many places as it has
/// sent (`fib6_dump_table`), live routes among them, and does not say so. Several lists together have them all. One that went
/// meanwhile may be among them; its own message leads to the next look.
fn list_v6(socket: &mut Socket) -> Result<Vec<Route>, Error> {
    let mut routes: Vec<Route> = Vec::new();
    for _ in 0..LISTS {
        let changes = Changes::watch(MulticastGroup::Ipv6Route)?;
        let mut now = list_of(socket, AddressFamily::Inet6)?;
        if !routes.is_empty() {
            let known: HashSet<_> = now.iter().map(Route::key).collect();
            routes.retain(|route| !known.contains(&route.key()));
            now.append(&mut routes);
        }
        routes = now;
        if !changes.is_heard()? {
            break;
        }
    }
    Ok(routes)
}

fn list_of(socket: &mut Socket, family: AddressFamily) -> Result<Vec<Route>, Error> {
    let mut all = RouteMessage::default();
    all.header = RouteHeader { address_family: family, table: libc::RT_TABLE_MAIN, ..all.header };
    match socket.dump(&RouteNetlinkMessage::GetRoute(all), parse) {
        // The table is made with its first route.
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
        done => done,
    }
}

fn parse(body: &[u8]) -> Option<Route> {
    let header = RouteHeader::parse(body).ok()?;
    if header.table != libc::RT_TABLE_MAIN || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let v6 = header.address_family == AddressFamily::Inet6;
    let mut dst = if v6 { IpAddr::from([0_u16; 8]) } else { IpAddr::from([0_u8; 4]) };
    let (mut source, mut metric, mut oif, mut gateway, mut hops, mut object) = (None, 0, None, None, None, None);
    let kind = (header.address_family, header.kind, RouteLwEnCapType::None);
    for attribute in attributes(&body[header.buffer_len()..]) {
        match RouteAttribute::parse_with_param(&attribute, kind) {
            Ok(RouteAttribute::Destination(address)) => dst = ip(&address)?,
            Ok(RouteAttribute::PrefSource(address)) => source = ip(&address),
            Ok(RouteAttribute::Priority(value)) => metric = value,
            Ok(RouteAttribute::Oif(value)) => oif = Some(value),
            Ok(RouteAttribute::MultiPath(all)) => hops = Some(all),
            Ok(RouteAttribute::NhId(id)) => object = Some(id),
            Ok(other) => gateway = gateway.or(router(&other)),
            Err(_) => {}
        }
    }
    let target = match (header.kind, oif, hops, object) {
        (RouteType::Unreachable, ..) => Target::Unreachable,
        (RouteType::Unicast, Some(oif), ..) => Target::Via { oif, gateway },
        (RouteType::Unicast, None, Some(hops), _) => {
            let hop =
                |hop: &RouteNextHop| Hop { oif: hop.interface_index, gateway: hop.attributes.iter().find_map(router) };
            Target::Multi(hops.iter().map(hop).collect())
        }
        (RouteType::Unicast, None, None, Some(id)) => Target::Object(id),
        (other, ..) => Target::Other(other.into()),
    };
    Some(Route {
        dst: IpNet::new(dst, header.destination_prefix_length).ok()?,
        target,
        source,
        metric: if v6 && metric == IP6_METRIC { 0 } else { metric },
        protocol: header.protocol.into(),
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// The next router, if the attribute has one. `Via` is one of the other family.
fn router(attribute: &RouteAttribute) -> Option<IpAddr> {
    match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Via(RouteVia::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn message(route: &Route) -> Result<RouteMessage> {
    let kind = match &route.target {
        Target::Via { .. } | Target::Multi(_) | Target::Object(_) => RouteType::Unicast,
        Target::Unreachable => RouteType::Unreachable,
        Target::Other(kind) => (*kind).into(),
    };
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(route.dst.network(), route.dst.prefix_len())?
        .protocol(route.protocol.into())
        .kind(kind);
    if let Target::Via { oif, gateway } = route.target {
        message = message.output_interface(oif);
        message = match gateway {
            // The device has no address in its network.
            Some(gateway) if is_service_hop(gateway) => message.gateway(gateway)?.onlink(),
            Some(gateway) => message.gateway(gateway)?,
            None => message.scope(RouteScope::Link),
        };
    }
    if let Some(source) = route.source {
        message = message.pref_source(source)?;
    }
    Ok(if route.metric == 0 { message.build() } else { message.priority(route.metric).build() })
}

/// True for the next hop of the host's routes to Services.
pub fn is_service_hop(ip: IpAddr) -> bool {
    [IpAddr::from(names::SERVICE_HOP4), names::SERVICE_HOP6.into()].contains(&ip)
}

/// Adds a route. `replace`: one of ours with the same destination and metric is there and gives way.
pub fn add(socket: &mut Socket, route: &Route, replace: bool) -> Result<()> {
    let flags = if replace { REPLACE } else { CREATE };
    match socket.request(&RouteNetlinkMessage::NewRoute(message(route)?), flags) {
        Ok(()) => Ok(()),
        Err(e) if e.errno() == Some(libc::EEXIST) && is_there(socket, route)? => Ok(()),
        Err(e) if e.errno() == Some(libc::EEXIST) => Err(e).with_context(|| {
            format!(
                "route to {}: another program's route is in its place (`ip route show {}`): remove it or choose other ranges",
                route.dst, route.dst
            )
        }),
        Err(e) => Err(e).with_context(|| format!("adding the route to {}", route.dst)),
    }
}

/// True if a route to the same destination leads the same way: somebody was faster, the CNI binary for one.
fn is_there(socket: &mut Socket, route: &Route) -> Result<bool> {
    let lookup = lookup(route.dst.network(), RouteFlags::FibMatch)?;
    match socket.get(&RouteNetlinkMessage::GetRoute(lookup), parse) {
        Ok(found) => Ok(found.is_some_and(|found| found.key() == route.key() && found.target == route.target)),
        Err(Error::Refused(_)) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Index of the interface that the host's packets to an address leave by, after all rules of the routing policy; `None`: they go
/// nowhere.
pub fn device_to(socket: &mut Socket, ip: IpAddr) -> Result<Option<u32>> {
    let oif = |body: &[u8]| {
        let header = RouteHeader::parse(body).ok().filter(|header| header.kind == RouteType::Unicast)?;
        let kind = (header.address_family, header.kind, RouteLwEnCapType::None);
        let mut all = attributes(&body[header.buffer_len()..]);
        all.find_map(|attribute| match RouteAttribute::parse_with_param(&attribute, kind) {
            Ok(RouteAttribute::Oif(value)) => Some(value),
            _ => None,
        })
    };
    match socket.get(&RouteNetlinkMessage::GetRoute(lookup(ip, RouteFlags::empty())?), oif) {
        Ok(found) => Ok(found),
        // Unreachable, prohibited, a black hole: the kernel answers with the error that a sender gets.
        Err(Error::Refused(_)) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("asking for the route to {ip}")),
    }
}

/// The question for the route to an address.
fn lookup(ip: IpAddr, flags: RouteFlags) -> Result<RouteMessage> {
    let length = IpNet::from(ip).prefix_len();
    let mut lookup = RouteMessageBuilder::<IpAddr>::new().destination_prefix(ip, length)?.build();
    let address_family = lookup.header.address_family;
    lookup.header = RouteHeader { address_family, destination_prefix_length: length, flags, ..RouteHeader::default() };
    Ok(lookup)
}

/// Deletes a route; false when it was gone.
pub fn delete(socket: &mut Socket, route: &Route) -> Result<bool> {
    unless(socket.request(&RouteNetlinkMessage::DelRoute(message(route)?), CHANGE), &[libc::ESRCH, libc::ENODEV])
        .with_context(|| format!("deleting the route to {}", route.dst))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(message: &RouteMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn routes_survive_the_way_to_the_kernel_and_back() {
        for (dst, target, source, metric) in [
            ("10.1.0.0/24", Target::Via { oif: 7, gateway: None }, Some([192, 0, 2, 1].into()), 0),
            ("fd00:1::/64", Target::Via { oif: 7, gateway: Some("fd00::2".parse().unwrap()) }, None, 0),
            ("10.2.0.0/24", Target::Unreachable, None, LAST_METRIC),
        ] {
            let route = Route { dst: dst.parse().unwrap(), target, source, metric, protocol: PROTOCOL };
            assert_eq!(parse(&bytes(&message(&route).unwrap())), Some(route));
        }
    }

    #[test]
    fn an_attribute_that_cannot_be_read_does_not_hide_the_route() {
        let target = Target::Via { oif: 7, gateway: None };
        let dst = "10.1.0.0/24".parse().unwrap();
        let route = Route { dst, target, source: None, metric: 5, protocol: PROTOCOL };
        // `RTA_CACHEINFO` of one octet.
        let odd = [&bytes(&message(&route).unwrap())[..], &[5, 0, 12, 0, 1, 0, 0, 0]].concat();
        assert_eq!(parse(&odd), Some(route));
    }

    /// As `ip route add 10.3.0.0/24 nexthop via 192.0.2.7 dev eth0 nexthop via inet6 2001:db8::7 dev eth1` comes back.
    #[test]
    fn all_devices_of_a_route_with_several_hops_are_found() {
        let gateways: [Option<IpAddr>; 3] =
            [Some("192.0.2.7".parse().unwrap()), Some("2001:db8::7".parse().unwrap()), None];
        let hop = |(oif, gateway): (u32, Option<IpAddr>)| {
            let hop = rtnetlink::RouteNextHopBuilder::new_ipv4().interface(oif);
            gateway.map_or(Ok(hop.clone()), |gateway| hop.via(gateway)).unwrap().build()
        };
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix([10, 3, 0, 0].into(), 24)
            .unwrap()
            .multipath((2..).zip(gateways).map(hop).collect())
            .build();
        let route = parse(&bytes(&message)).unwrap();
        let expected = (2..).zip(gateways).map(|(oif, gateway)| Hop { oif, gateway });
        assert_eq!(route.target, Target::Multi(expected.collect()));
        assert_eq!(route.target.devices(), [2, 3, 4]);
    }
}
