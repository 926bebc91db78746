//! What this node's programs and its CNI binary are told, made from configuration, cluster and host. Pure.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::config::{NodeConfig, flags};
use rustnet_common::files::{EndpointFile, NodeFile};

use crate::config::{Config, Role};
use crate::index::Settings;
use crate::model::{Family, Node};
use crate::net::repair::{State, underlay};
use crate::net::uplink::{Host, Uplink, networks};

/// Seed of the flow hash: the same in the whole cluster, so that all nodes choose alike.
const SEED: u32 = 0x7275_7374;
/// First port that is not reserved for servers (RFC 6335).
const FIRST_PORT: u16 = 1024;
/// Kubernetes' node ports, as by default.
pub const NODE_PORTS: (u16, u16) = (30_000, 32_767);

/// What the index is told of this host.
pub fn index_settings(config: &Config, host: &Host, uplinks: &[Uplink]) -> Settings {
    Settings {
        node_name: config.node_name.as_str().into(),
        routing: config.routing,
        tunnel_family: underlay(uplinks),
        no_masquerade: config.non_masquerade_cidrs.clone(),
        own_addresses: host.own_addresses(),
        links: networks(uplinks),
    }
}

/// The larger free part of the ports outside of those that the host's own connections use and of the node ports: there, the
/// masquerade collides with nothing.
pub fn snat_ports(local: (u16, u16)) -> (u16, u16) {
    let mut taken = [local, NODE_PORTS];
    taken.sort_unstable();
    let mut best = (FIRST_PORT, FIRST_PORT);
    let mut next = u32::from(FIRST_PORT);
    for (first, last) in taken.into_iter().chain([(u16::MAX, u16::MAX)]) {
        // The end of the ports is free itself; the others are not.
        let end = if first == u16::MAX { u32::from(u16::MAX) + 1 } else { u32::from(first) };
        if end > next && end - next > u32::from(best.1 - best.0) + 1 {
            best = (next as u16, (end - 1) as u16);
        }
        next = next.max(u32::from(last) + 1);
    }
    best
}

/// Parses `/proc/sys/net/ipv4/ip_local_port_range`.
pub fn parse_port_range(text: &str) -> Result<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last)), None) if first <= last => Ok((first, last)),
        _ => Err(anyhow::anyhow!("ip_local_port_range holds {text:?}")),
    }
}

/// This host's address of a family that packets to the outside get: the node's own if the host has it, else the uplink's.
pub fn node_address(state: &State, own: Option<&Node>, family: Family) -> Option<IpAddr> {
    let mut local = state.uplinks.iter().flat_map(|u| &u.addresses).map(IpNet::addr);
    let everywhere = state.host.own_addresses();
    let named = own.into_iter().flat_map(|node| node.addresses.iter().copied());
    let is_family = |ip: &IpAddr| Family::of(*ip) == family;
    named.filter(|ip| everywhere.contains(ip)).find(is_family).or_else(|| local.find(is_family))
}

/// What the programs must know.
pub fn config(config: &Config, state: &State, own: Option<&Node>, hz: u32, local_ports: (u16, u16)) -> NodeConfig {
    let uplink_mtu = state.uplink_mtu();
    let (overlay, overlay_mtu) = state.overlay.unwrap_or((0, uplink_mtu));
    let (snat_min, snat_max) = config.snat_ports.unwrap_or_else(|| snat_ports(local_ports));
    let address = |family| node_address(state, own, family).map(Addr::from);
    NodeConfig {
        node4: address(Family::V4).map_or(Ip4::UNSPECIFIED, Ip4::from_addr),
        node6: address(Family::V6).map_or(Ip6::UNSPECIFIED, Ip6::from_addr),
        tunnel_src: address(underlay(&state.uplinks)).unwrap_or(Addr::UNSPECIFIED),
        uplink: state.uplinks.first().map_or(0, |u| u.ifindex),
        overlay,
        uplink_mtu,
        overlay_mtu,
        overlay_port: config.overlay_port,
        snat_min,
        snat_max,
        flags: if config.masquerade { flags::MASQUERADE } else { 0 }
            | if config.flow_events { flags::FLOW_EVENTS } else { 0 },
        vni: config.vni,
        hz,
        seed: SEED,
    }
}

/// Keeps the addresses that an earlier agent has set, while this host has them and this node's own object is not known yet:
/// else masquerade would change its source for a moment at every restart.
pub fn keep_addresses(config: &mut NodeConfig, before: &NodeConfig, own: &[IpAddr]) {
    let is_own = |address: Addr| own.contains(&IpAddr::from(address));
    if is_own(before.node4.to_addr()) {
        config.node4 = before.node4;
    }
    if is_own(before.node6) {
        config.node6 = before.node6;
    }
    if is_own(before.tunnel_src) {
        config.tunnel_src = before.tunnel_src;
    }
}

/// The ranges that this node's pods come from: configured, or its Node object's.
pub fn pod_cidrs(config: &Config, own: Option<&Node>) -> Vec<IpNet> {
    if config.pod_cidrs.is_empty() {
        own.map(|node| node.pod_cidrs.to_vec()).unwrap_or_default()
    } else {
        config.pod_cidrs.clone()
    }
}

/// What to say of pods that have been given addresses before the ranges became others; `leased` tells whether we gave one.
pub fn outsiders(
    node: &str,
    endpoints: &[EndpointFile],
    ranges: &[IpNet],
    leased: impl Fn(&IpAddr) -> bool,
) -> Option<String> {
    let is_outside = |ip: &&IpAddr| !ranges.iter().any(|range| range.contains(*ip)) && leased(ip);
    let known = !ranges.is_empty() && endpoints.iter().flat_map(|it| &it.addresses).any(|ip| is_outside(&ip));
    let ranges = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    // The same while one pod after the other goes, so that it is told once.
    known.then(|| {
        format!(
            "Node {node}: pods have addresses outside of its pod ranges ({ranges}), other nodes do not find them; delete those \
             that `rustnet endpoints` shows with others, so that they are made anew"
        )
    })
}

/// MTU of the pods' interfaces, where packets to other nodes can have `room` octets.
pub fn mtu(config: &Config, room: u32) -> Result<u32> {
    let mtu = config.mtu.unwrap_or(room);
    anyhow::ensure!(
        mtu <= room,
        "mtu {mtu} does not fit: packets to other nodes can have {room} octets; set mtu to that or less, or to auto"
    );
    Ok(mtu)
}

/// What the CNI binary must know, or why pods cannot be connected.
pub fn file(config: &Config, state: &State, own: Option<&Node>) -> Result<NodeFile> {
    let pod_cidrs = pod_cidrs(config, own);
    let name = &config.node_name;
    anyhow::ensure!(
        !pod_cidrs.is_empty(),
        "node {name} has no pod range: let the controller manager give it one (--allocate-node-cidrs), or set pod-cidrs"
    );
    for cidr in &pod_cidrs {
        if let Some(conflict) = config.conflict(Role::Pods, &format!("the pod range of node {name}"), *cidr) {
            anyhow::bail!(conflict);
        }
    }
    let mtu = mtu(config, state.overlay.map_or_else(|| state.uplink_mtu(), |(_, mtu)| mtu))?;
    Ok(NodeFile { version: NodeFile::VERSION, node_name: name.clone(), pod_cidrs, mtu, not_ready: None })
}

/// Reads the ports that the host's own connections use.
pub fn local_ports() -> Result<(u16, u16)> {
    const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    parse_port_range(&std::fs::read_to_string(FILE).with_context(|| format!("reading {FILE}"))?)
}

#[cfg(test)]
mod tests {
    use super::{Address, Ip4, IpAddr, NodeConfig, keep_addresses, outsiders, parse_port_range, snat_ports};
    use bytemuck::Zeroable;

    #[test]
    fn the_larger_free_part_is_taken() {
        assert_eq!(snat_ports((32_768, 60_999)), (1024, 29_999));
        assert_eq!(snat_ports((1024, 29_999)), (32_768, 65_535));
        assert_eq!(snat_ports((1024, 60_999)), (61_000, 65_535));
        assert_eq!(snat_ports((2000, 65_535)), (1024, 1999));
        assert_eq!(snat_ports((10_000, 20_000)), (32_768, 65_535));
    }

    #[test]
    fn a_host_that_uses_all_ports_leaves_one() {
        assert_eq!(snat_ports((1024, 65_535)), (1024, 1024));
    }

    #[test]
    fn addresses_in_use_are_kept_while_the_host_has_them() {
        let (one, two): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let with =
            |ip: IpAddr| NodeConfig { node4: Ip4::from_addr(ip.into()), tunnel_src: ip.into(), ..NodeConfig::zeroed() };
        let mut config = with(one);
        keep_addresses(&mut config, &with(two), &[one, two]);
        assert!(config == with(two));
        let mut config = with(one);
        keep_addresses(&mut config, &with(two), &[one]);
        assert!(config == with(one));
        keep_addresses(&mut config, &NodeConfig::zeroed(), &[one]);
        assert!(config == with(one), "a new map holds zeros");
    }

    #[test]
    fn only_addresses_that_we_gave_can_be_outside() {
        let pod = serde_json::from_value(serde_json::json!({
            "containerId": "c", "ifname": "eth0", "netns": "", "network": "n", "hostIfname": "rnv1", "ifindex": 1,
            "mac": "", "addresses": ["10.244.1.2", "fd00::2"],
        }));
        let pods = [pod.expect("a record")];
        let told = |ranges: &[&str], leased| {
            let ranges: Vec<_> = ranges.iter().map(|range| range.parse().expect("a range")).collect();
            outsiders("n1", &pods, &ranges, |_| leased)
        };
        assert_eq!(told(&["10.244.1.0/24", "fd00::/64"], true), None);
        assert_eq!(told(&["10.244.7.0/24"], false), None, "another IPAM's");
        assert_eq!(told(&[], true), None, "nothing is known");
        assert!(told(&["10.244.7.0/24"], true).expect("outside").contains("(10.244.7.0/24)"));
    }

    #[test]
    fn port_ranges() {
        assert_eq!(parse_port_range("32768\t60999\n").unwrap(), (32_768, 60_999));
        for bad in ["", "1", "2 1", "a b", "1 2 3", "1 70000"] {
            assert!(parse_port_range(bad).is_err(), "{bad}");
        }
    }
}
