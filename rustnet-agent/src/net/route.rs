//! Routes of the main table. Those with [`PROTOCOL`] are ours.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::address::{family, from_octets, octets};
use super::netlink::{CREATE, Message, REPLACE, Socket, attributes, number, unless};

/// Our number in the protocol field of routes (`ip route show proto 114`).
pub const PROTOCOL: u8 = b'r';
/// Metric of the routes that refuse what no pod has: any other route comes first.
pub const LAST_METRIC: u32 = 4_278_198_272;

/// `RTA_*`.
mod attr {
    pub(super) const DST: u16 = 1;
    pub(super) const OIF: u16 = 4;
    pub(super) const GATEWAY: u16 = 5;
    pub(super) const PRIORITY: u16 = 6;
    pub(super) const PREFSRC: u16 = 7;
    pub(super) const MULTIPATH: u16 = 9;
    pub(super) const TABLE: u16 = 15;
    pub(super) const VIA: u16 = 18;
}

/// `RTM_F_CLONED`: a cache entry, not a route.
const CLONED: u32 = 0x200;
/// What IPv6 makes of no metric.
const IP6_METRIC: u32 = 1024;

/// A way out of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hop {
    /// The interface.
    pub oif: u32,
    /// The next router; `None`: the destination is on the link.
    pub gateway: Option<IpAddr>,
}

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
            Self::Unreachable | Self::Other(_) => Vec::new(),
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

/// `struct rtmsg`.
fn rtmsg(family: u8, dst_len: u8, protocol: u8, scope: u8, kind: u8) -> [u8; 12] {
    [family, dst_len, 0, 0, libc::RT_TABLE_MAIN, protocol, scope, kind, 0, 0, 0, 0]
}

/// All routes of the main table, both families.
pub fn list(socket: &mut Socket) -> Result<Vec<Route>> {
    let mut routes = Vec::new();
    for any in [IpAddr::from([0_u8; 4]), IpAddr::from([0_u16; 8])] {
        let dump = Message::new(libc::RTM_GETROUTE, 0, &rtmsg(family(any), 0, 0, 0, 0));
        let replies = socket.dump(dump).context("listing routes")?;
        routes.extend(replies.iter().filter_map(|reply| parse(&reply.body)));
    }
    Ok(routes)
}

fn parse(body: &[u8]) -> Option<Route> {
    let (head, rest) = body.split_at_checked(12)?;
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, v)| v);
    let table = find(attr::TABLE).and_then(number).unwrap_or(u32::from(head[4]));
    if table != u32::from(libc::RT_TABLE_MAIN) || number(&head[8..])? & CLONED != 0 {
        return None;
    }
    let v6 = i32::from(head[0]) == libc::AF_INET6;
    let any = if v6 { IpAddr::from([0_u16; 8]) } else { IpAddr::from([0_u8; 4]) };
    let dst = IpNet::new(find(attr::DST).map_or(Some(any), from_octets)?, head[1]).ok()?;
    let metric = find(attr::PRIORITY).and_then(number).unwrap_or(0);
    let target = match head[7] {
        libc::RTN_UNREACHABLE => Target::Unreachable,
        libc::RTN_UNICAST => match (find(attr::OIF).and_then(number), find(attr::MULTIPATH)) {
            (Some(oif), _) => Target::Via { oif, gateway: gateway(rest) },
            (None, Some(hops)) => Target::Multi(parse_hops(hops).collect()),
            (None, None) => Target::Other(head[7]),
        },
        other => Target::Other(other),
    };
    Some(Route {
        dst,
        target,
        source: find(attr::PREFSRC).and_then(from_octets),
        metric: if v6 && metric == IP6_METRIC { 0 } else { metric },
        protocol: head[5],
    })
}

/// The router in a route's or a hop's attributes. `RTA_VIA` has one of the other family behind its `sa_family_t`.
fn gateway(attrs: &[u8]) -> Option<IpAddr> {
    attributes(attrs).find_map(|(kind, value)| match kind {
        attr::GATEWAY => from_octets(value),
        attr::VIA => from_octets(value.get(2..)?),
        _ => None,
    })
}

/// `struct rtnexthop`, each with attributes.
fn parse_hops(mut bytes: &[u8]) -> impl Iterator<Item = Hop> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]));
        let hop = bytes.get(..length).filter(|hop| hop.len() >= 8)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Hop { oif: number(&hop[4..])?, gateway: gateway(&hop[8..]) })
    })
}

fn message(kind: u16, flags: u16, route: &Route) -> Message {
    let (scope, target) = match &route.target {
        Target::Via { gateway: None, .. } => (libc::RT_SCOPE_LINK, libc::RTN_UNICAST),
        Target::Via { .. } | Target::Multi(_) => (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST),
        Target::Unreachable => (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNREACHABLE),
        Target::Other(kind) => (libc::RT_SCOPE_UNIVERSE, *kind),
    };
    let ip = route.dst.network();
    let mut message =
        Message::new(kind, flags, &rtmsg(family(ip), route.dst.prefix_len(), route.protocol, scope, target))
            .attr(attr::DST, &octets(ip));
    if let Target::Via { oif, gateway } = route.target {
        message = message.u32(attr::OIF, oif);
        if let Some(gateway) = gateway {
            message = message.attr(attr::GATEWAY, &octets(gateway));
        }
    }
    if let Some(source) = route.source {
        message = message.attr(attr::PREFSRC, &octets(source));
    }
    if route.metric != 0 { message.u32(attr::PRIORITY, route.metric) } else { message }
}

/// Adds a route. `replace`: one of ours with the same destination and metric is there and gives way.
pub fn add(socket: &mut Socket, route: &Route, replace: bool) -> Result<()> {
    let flags = if replace { REPLACE } else { CREATE };
    match socket.request(message(libc::RTM_NEWROUTE, flags, route)) {
        Ok(_) => Ok(()),
        Err(e) if e.errno() == Some(libc::EEXIST) => Err(e).with_context(|| {
            format!(
                "route to {}: another program's route is in its place (`ip route show {}`): remove it or choose other ranges",
                route.dst, route.dst
            )
        }),
        Err(e) => Err(e).with_context(|| format!("adding the route to {}", route.dst)),
    }
}

/// Deletes a route; false when it was gone.
pub fn delete(socket: &mut Socket, route: &Route) -> Result<bool> {
    unless(socket.request(message(libc::RTM_DELROUTE, 0, route)), &[libc::ESRCH, libc::ENODEV])
        .with_context(|| format!("deleting the route to {}", route.dst))
}

#[cfg(test)]
mod tests {
    use super::{Hop, Message, PROTOCOL, Route, Target, message, parse};

    #[test]
    fn routes_survive_the_way_to_the_kernel_and_back() {
        for (dst, target, source, metric) in [
            ("10.1.0.0/24", Target::Via { oif: 7, gateway: None }, Some([192, 0, 2, 1].into()), 0),
            ("fd00:1::/64", Target::Via { oif: 7, gateway: Some("fd00::2".parse().unwrap()) }, None, 0),
            ("10.2.0.0/24", Target::Unreachable, None, super::LAST_METRIC),
        ] {
            let route = Route { dst: dst.parse().unwrap(), target, source, metric, protocol: PROTOCOL };
            let bytes = message(24, 0, &route).into_body();
            assert_eq!(parse(&bytes), Some(route));
        }
    }

    /// As `ip route add 10.3.0.0/24 nexthop via 192.0.2.7 dev eth0 nexthop via inet6 2001:db8::7 dev eth1` comes back.
    #[test]
    fn all_devices_of_a_route_with_several_hops_are_found() {
        let hop = |oif: u32, fill: fn(Message) -> Message| {
            let attributes = fill(Message::new(0, 0, &[])).into_body();
            let mut hop = vec![0; 8];
            hop[..2].copy_from_slice(&(8 + attributes.len() as u16).to_ne_bytes());
            hop[4..].copy_from_slice(&oif.to_ne_bytes());
            [hop, attributes].concat()
        };
        let by_address = |message: Message| message.attr(super::attr::GATEWAY, &[192, 0, 2, 7]);
        let by_other_family = |message: Message| {
            let router: std::net::Ipv6Addr = "2001:db8::7".parse().unwrap();
            let family = (libc::AF_INET6 as u16).to_ne_bytes();
            message.attr(super::attr::VIA, &[&family[..], &router.octets()].concat())
        };
        let hops = [hop(2, by_address), hop(3, by_other_family), hop(4, |message| message)].concat();
        let header = super::rtmsg(libc::AF_INET as u8, 24, 4, 0, libc::RTN_UNICAST);
        let message = Message::new(24, 0, &header).attr(super::attr::DST, &[10, 3, 0, 0]);
        let route = parse(&message.attr(super::attr::MULTIPATH, &hops).into_body()).unwrap();
        let gateways = [Some("192.0.2.7".parse().unwrap()), Some("2001:db8::7".parse().unwrap()), None];
        let expected = [2, 3, 4].into_iter().zip(gateways).map(|(oif, gateway)| Hop { oif, gateway });
        assert_eq!(route.target, Target::Multi(expected.collect()));
        assert_eq!(route.target.devices(), [2, 3, 4]);
    }
}
