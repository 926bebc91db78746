//! Sizes of packets: what the uplinks carry, what the overlay takes of it, what the pods have, and what is left on the way.

use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::Result;
use rustnet_common::names::VETH_PREFIX;

use super::finding::{Finding, Level, split_remedy};
use super::nodes::KnownNode;
use crate::config::Config;
use crate::net::host::Host;
use crate::net::overlay::overhead;
use crate::reconcile::node;
use crate::ways::Ways;

/// What IPv6 needs (RFC 8200, section 5).
const SMALLEST: u32 = 1280;

/// What was found.
pub struct Facts {
    /// Name and MTU of each uplink.
    pub uplinks: Vec<(String, u32)>,
    /// What the overlay adds to a packet; 0 without overlay.
    pub overhead: u32,
    /// What the pods will have, of what fits.
    pub pods: Result<u32>,
    /// Name and MTU of each pod's interface on this side.
    pub veths: Vec<(String, u32)>,
    /// What the kernel has learnt of the way to other nodes: name, address, octets.
    pub paths: Vec<(String, IpAddr, u32)>,
}

/// Looks.
pub fn gather(config: &Config, host: &Host, ways: &Ways, nodes: &[KnownNode]) -> Facts {
    let place = &ways.place;
    let overhead = if config.routing.has_overlay() { overhead(ways.overlay_family()) } else { 0 };
    let veths = host.links.iter().filter(|link| link.name.starts_with(VETH_PREFIX));
    let others = nodes.iter().filter(|it| it.node.name.as_str() != config.node_name);
    let paths = others.filter_map(|it| {
        let ip = it.node.address(place.overlay_family)?;
        Some((it.node.name.as_str().to_owned(), ip, path_mtu(ip)?))
    });
    Facts {
        overhead,
        pods: node::mtu(config, place.mtu.saturating_sub(overhead)),
        veths: veths.map(|link| (link.name.clone(), link.mtu)).collect(),
        paths: paths.collect(),
        uplinks: place.uplinks.iter().map(|it| (it.name.clone(), it.mtu)).collect(),
    }
}

/// The path MTU that the kernel has for an address: the route's, or the one that a router reported.
/// Nothing is sent.
fn path_mtu(ip: IpAddr) -> Option<u32> {
    /// Of `linux/in6.h`.
    const IPV6_MTU: i32 = 24;
    const DISCARD: u16 = 9;
    let (local, level, option) = match ip {
        IpAddr::V4(_) => ("0.0.0.0:0", libc::IPPROTO_IP, libc::IP_MTU),
        IpAddr::V6(_) => ("[::]:0", libc::IPPROTO_IPV6, IPV6_MTU),
    };
    let socket = UdpSocket::bind(local).ok()?;
    // For UDP, connecting only chooses the route.
    socket.connect((ip, DISCARD)).ok()?;
    let mut value: i32 = 0;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option gives an int, whose address and size are given.
    let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    u32::try_from(value).ok().filter(|_| done == 0)
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let uplinks = &facts.uplinks;
    if uplinks.is_empty() {
        // The group of the host's network says why.
        return Vec::new();
    }
    let list =
        |all: &[(String, u32)]| all.iter().map(|(name, mtu)| format!("{name} {mtu}")).collect::<Vec<_>>().join(", ");
    let mut found = Vec::new();
    if uplinks.iter().any(|(_, mtu)| *mtu != uplinks[0].1) {
        found.push(
            Finding::new(
                Level::Warning,
                "uplinks",
                format!("of different size: {}; those towards other nodes count", list(uplinks)),
            )
            .hint("give them one MTU (`ip link set DEV mtu N`), on all nodes"),
        );
    } else {
        found.push(Finding::ok("uplinks", list(uplinks)));
    }
    let pods = match &facts.pods {
        Ok(mtu) => *mtu,
        Err(error) => {
            let text = format!("{error:#}");
            let (detail, hint) = split_remedy(&text);
            found.push(Finding::new(Level::Fault, "pods", detail).hint(hint));
            return found;
        }
    };
    if pods < SMALLEST {
        found.push(
            Finding::new(Level::Fault, "pods", format!("{pods} octets are too few for IPv6, which needs {SMALLEST}"))
                .hint(format!("give the uplinks an MTU of {} or more", SMALLEST + facts.overhead)),
        );
    } else {
        found.push(Finding::ok("pods", format!("{pods} octets; the overlay takes {}", facts.overhead)));
    }
    let large: Vec<_> = facts.veths.iter().filter(|(_, mtu)| *mtu > pods).cloned().collect();
    if !large.is_empty() {
        found.push(
            Finding::new(Level::Warning, "pods' interfaces", format!("larger than {pods}: {}", list(&large)))
                .hint("they are from before the MTU changed: restart these pods (`rustnetctl endpoints` names them)"),
        );
    }
    found.extend(paths(facts, pods));
    found
}

fn paths(facts: &Facts, pods: u32) -> Option<Finding> {
    let need = pods + facts.overhead;
    let narrow = facts.paths.iter().filter(|(_, _, mtu)| *mtu < need);
    let narrow: Vec<_> = narrow.map(|(name, ip, mtu)| format!("{name} ({ip}) {mtu}")).collect();
    if facts.paths.is_empty() {
        return None;
    }
    if narrow.is_empty() {
        return Some(Finding::ok(
            "ways to other nodes",
            format!("{need} octets or more to {} nodes", facts.paths.len()),
        ));
    }
    let smallest = facts.paths.iter().map(|(_, _, mtu)| *mtu).min().unwrap_or_default();
    let detail = format!(
        "{need} octets do not fit through to {}: large packets go in fragments, or are refused",
        narrow.join(", ")
    );
    Some(
        Finding::new(Level::Fault, "ways to other nodes", detail).hint(format!(
            "widen the link, or give all agents --mtu {} or less",
            smallest.saturating_sub(facts.overhead)
        )),
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts() -> Facts {
        Facts {
            uplinks: vec![("eth0".into(), 1500)],
            overhead: 50,
            pods: Ok(1450),
            veths: vec![("rnv1".into(), 1450)],
            paths: vec![("n2".into(), "192.0.2.2".parse().expect("ip"), 1500)],
        }
    }

    #[test]
    fn what_fits_is_well() {
        assert_well(&check(&facts()));
        assert_well(&check(&Facts { pods: Ok(1400), veths: Vec::new(), paths: Vec::new(), ..facts() }));
    }

    #[test]
    fn one_fault_at_a_time() {
        let unequal = vec![("eth0".into(), 9000), ("eth1".into(), 1500)];
        let narrow = vec![("n2".into(), "192.0.2.2".parse().expect("ip"), 1400)];
        for (facts, level, detail, hint) in [
            (Facts { uplinks: unequal, ..facts() }, Level::Warning, "eth0 9000, eth1 1500", "ip link set"),
            (
                Facts { pods: Err(anyhow::anyhow!("mtu 1500 does not fit; set mtu")), ..facts() },
                Level::Fault,
                "1500",
                "set mtu",
            ),
            (Facts { pods: Ok(1200), veths: Vec::new(), ..facts() }, Level::Fault, "1280", "1330"),
            (Facts { veths: vec![("rnv1".into(), 1500)], ..facts() }, Level::Warning, "rnv1 1500", "restart"),
            (Facts { paths: narrow, ..facts() }, Level::Fault, "n2 (192.0.2.2) 1400", "--mtu 1350"),
        ] {
            assert_only(&check(&facts), level, detail, hint);
        }
    }

    #[test]
    fn the_loopback_device_is_the_way_to_itself() {
        assert!(path_mtu("127.0.0.1".parse().expect("ip")) >= Some(65_535));
    }
}
