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
    pub(super) const TABLE: u16 = 15;
}

/// `RTM_F_CLONED`: a cache entry, not a route.
const CLONED: u32 = 0x200;
/// What IPv6 makes of no metric.
const IP6_METRIC: u32 = 1024;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Out of an interface, to a neighbour or to everything there.
    Via {
        /// The interface.
        oif: u32,
        /// The next hop; `None`: the destination is on the link.
        gateway: Option<IpAddr>,
    },
    /// Nowhere: the sender receives an error.
    Unreachable,
    /// A kind that we never make.
    Other,
}

/// A route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
        libc::RTN_UNICAST => match find(attr::OIF).and_then(number) {
            Some(oif) => Target::Via { oif, gateway: find(attr::GATEWAY).and_then(from_octets) },
            None => Target::Other,
        },
        _ => Target::Other,
    };
    Some(Route {
        dst,
        target,
        source: find(attr::PREFSRC).and_then(from_octets),
        metric: if v6 && metric == IP6_METRIC { 0 } else { metric },
        protocol: head[5],
    })
}

fn message(kind: u16, flags: u16, route: &Route) -> Message {
    let (scope, target) = match route.target {
        Target::Via { gateway: None, .. } => (libc::RT_SCOPE_LINK, libc::RTN_UNICAST),
        Target::Via { .. } | Target::Other => (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST),
        Target::Unreachable => (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNREACHABLE),
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
    use super::{PROTOCOL, Route, Target, message, parse};

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
}
