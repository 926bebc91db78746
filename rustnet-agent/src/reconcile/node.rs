//! Makes the settings of this node's programs and CNI binary from configuration, cluster and host.
//! Pure.

use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::config::{NodeConfig, flags};
use rustnet_common::files::{EndpointFile, NodeFile};

use crate::config::{Config, DenyResponse, NODE_PORTS, OverlayFamily, OverlayPath, Role, SocketLb};
use crate::model::{Family, Node};
use crate::net::repair::OverlayDevice;
use crate::ways::{Place, Settings, Ways};

/// Seed of the flow hash: the same in the whole cluster, so that all nodes choose alike.
const SEED: u32 = 0x7275_7374;
/// First port that is not reserved for servers (RFC 6335).
const FIRST_PORT: u16 = 1024;
/// Ports that masquerade gets at least, for each server and protocol.
pub const SNAT_PORTS: u32 = 8192;
/// What to do where the host leaves fewer.
pub const PORT_RANGE_REMEDY: &str = "sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"";

/// The settings that the ways to other nodes depend on.
pub fn settings(config: &Config) -> Settings {
    Settings {
        node_name: config.node_name.as_str().into(),
        routing: config.routing,
        uplinks: config.uplinks.clone(),
        overlay_family: match config.overlay_family {
            OverlayFamily::Auto => None,
            OverlayFamily::Ipv4 => Some(Family::V4),
            OverlayFamily::Ipv6 => Some(Family::V6),
        },
        pod_cidrs: config.pod_cidrs.clone(),
        no_masquerade: config.non_masquerade_cidrs.clone(),
        service_cidrs: config.service_cidrs.clone(),
        node_ports: config.node_port_addresses.clone(),
        has_host_sockets: config.socket_lb != SocketLb::Off,
        lb_algorithm: config.lb_algorithm,
        maglev_table_size: config.maglev_table_size,
        forwarding: config.forwarding,
    }
}

/// Ports that masquerade may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnatPorts {
    /// First port.
    pub first: u16,
    /// Last port.
    pub last: u16,
    /// How many of them the host's own connections use, too.
    pub shared: u32,
}

impl SnatPorts {
    /// How many there are.
    pub fn count(self) -> u32 {
        u32::from(self.last) - u32::from(self.first) + 1
    }
}

/// Chooses ports for masquerade: outside the node ports, and outside the host's own ports `local` if that leaves
/// [`SNAT_PORTS`]. Else the range has [`SNAT_PORTS`] ports and shares as few as possible with the host. Programs skip the
/// overlay's port, wherever it lies.
pub fn snat_ports(local: (u16, u16)) -> SnatPorts {
    // Without what follows, a host that uses nearly all ports would leave one for all connections of all pods to a server.
    let sections = [(FIRST_PORT, NODE_PORTS.0 - 1), (NODE_PORTS.1 + 1, u16::MAX)];
    let choices = sections.into_iter().flat_map(|section| [below(section, local), above(section, local)]);
    let best = choices.max_by_key(|it| (std::cmp::Reverse(it.shared), it.count()));
    best.unwrap_or(SnatPorts { first: FIRST_PORT, last: NODE_PORTS.0 - 1, shared: 0 })
}

/// Ports of a section below the host's, and as many of the host's as it takes.
fn below((first, end): (u16, u16), local: (u16, u16)) -> SnatPorts {
    let free = u32::from(local.0.clamp(first, end) - first) + u32::from(local.0 > end);
    let count = free.max(SNAT_PORTS);
    SnatPorts { first, last: (u32::from(first) + count - 1) as u16, shared: count - free }
}

/// Ports of a section above the host's, and as many of the host's as it takes.
fn above((start, last): (u16, u16), local: (u16, u16)) -> SnatPorts {
    let free = u32::from(last - local.1.clamp(start, last)) + u32::from(local.1 < start);
    let count = free.max(SNAT_PORTS);
    SnatPorts { first: (u32::from(last) + 1 - count) as u16, last, shared: count - free }
}

/// What to say if masquerade has to share ports with the host.
pub fn shared_ports(config: &Config, local: (u16, u16)) -> Option<String> {
    let SnatPorts { first, last, shared } = snat_ports(local);
    let is_chosen = config.masquerade && config.snat_ports.is_none();
    (is_chosen && shared > 0).then(|| {
        format!(
            "masquerade uses ports {first}-{last}, and {shared} of them are the host's own, too: net.ipv4.ip_local_port_range is \
             {}-{}, which leaves fewer than {SNAT_PORTS}. Connections of pods and of the host to the same server can get the same \
             port; {PORT_RANGE_REMEDY}",
            local.0, local.1
        )
    })
}

/// Parses `/proc/sys/net/ipv4/ip_local_port_range`.
pub fn parse_port_range(text: &str) -> Result<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last)), None) if first <= last => Ok((first, last)),
        _ => Err(anyhow::anyhow!("ip_local_port_range holds {text:?}")),
    }
}

/// What the programs must know. `path`: who writes and takes off the overlay's headers at this moment.
pub fn config(
    config: &Config,
    place: &Place,
    overlay: Option<OverlayDevice>,
    path: OverlayPath,
    hz: u32,
    local_ports: (u16, u16),
    has_external: bool,
) -> NodeConfig {
    let chosen = snat_ports(local_ports);
    let (snat_min, snat_max) = config.snat_ports.unwrap_or((chosen.first, chosen.last));
    let address = |family| place.addresses.of(family).map(Addr::from);
    let (overlay, overlay_mtu) = overlay.map_or((0, place.mtu), |device| (device.index, device.mtu));
    NodeConfig {
        node4: address(Family::V4).map_or(Ip4::UNSPECIFIED, Ip4::from_addr),
        node6: address(Family::V6).map_or(Ip6::UNSPECIFIED, Ip6::from_addr),
        tunnel_src: address(place.overlay_family).unwrap_or(Addr::UNSPECIFIED),
        mark_mask: config.packet_mark.mask,
        overlay,
        mark: config.packet_mark.value,
        overlay_mtu,
        overlay_port: config.overlay_port,
        snat_min,
        snat_max,
        flags: if config.masquerade { flags::MASQUERADE } else { 0 }
            | if has_external { flags::EXTERNAL } else { 0 }
            | if config.flow_events { flags::FLOW_EVENTS } else { 0 }
            | if path == OverlayPath::Programs { flags::ENCAPSULATE } else { 0 }
            | if config.policy_deny_response == DenyResponse::Icmp { flags::ANSWER_DENIED } else { 0 },
        vni: config.vni,
        hz,
        seed: SEED,
    }
}

/// Goes on with the translation of what this host answers to clients outside, once there was reason for it: their connections outlive
/// their Service, and an agent that begins knows of none yet.
pub fn keep_external(config: &mut NodeConfig, before: &NodeConfig) {
    config.flags |= before.flags & flags::EXTERNAL;
}

/// Keeps the addresses that an earlier agent has set, while this host has them and this node's own object is not known yet:
/// else masquerade would change its source for a moment at every restart.
pub fn keep_addresses(config: &mut NodeConfig, before: &NodeConfig, own: &[IpAddr], is_node_known: bool) {
    if is_node_known {
        return;
    }
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
    // The text stays the same while one pod after the other goes, so that it is reported once.
    known.then(|| {
        format!(
            "Node {node}: pods have addresses outside of its pod ranges ({ranges}), other nodes do not find them; delete those \
             that `rustnetctl endpoints` shows with others, so that new ones replace them"
        )
    })
}

/// What to say where packets to other nodes can have `room` octets, and IPv6 needs more (RFC 8200, section 5). The kernel takes
/// IPv6 off devices that are smaller.
pub fn too_small(config: &Config, room: u32, ways: &Ways) -> Option<String> {
    const SMALLEST: u32 = 1280;
    ((1..SMALLEST).contains(&room) && ways.has_pods(Family::V6)).then(|| {
        format!(
            "Node {}: packets to other nodes can have {room} octets, and IPv6 needs {SMALLEST}: its pods have none; give the uplinks \
             an MTU that is larger by {}, on all nodes",
            config.node_name,
            SMALLEST - room
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

/// What the CNI binary must know, or why pods cannot be connected. `room`: octets of packets to other nodes.
pub fn file(config: &Config, room: u32, own: Option<&Node>) -> Result<NodeFile> {
    let pod_cidrs = settings(config).own_pod_cidrs(own).to_vec();
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
    let mtu = mtu(config, room)?;
    Ok(NodeFile { version: NodeFile::VERSION, node_name: name.clone(), pod_cidrs, mtu, not_ready: None })
}

/// Reads the ports that the host's own connections use.
pub fn local_ports() -> Result<(u16, u16)> {
    const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    parse_port_range(&std::fs::read_to_string(FILE).with_context(|| format!("reading {FILE}"))?)
}

#[cfg(test)]
mod tests {
    use super::{
        Address, Config, Ip4, IpAddr, NODE_PORTS, NodeConfig, SNAT_PORTS, SnatPorts, keep_addresses, outsiders,
        parse_port_range, shared_ports, snat_ports,
    };
    use bytemuck::Zeroable;

    fn ports(local: (u16, u16)) -> (u16, u16, u32) {
        let SnatPorts { first, last, shared } = snat_ports(local);
        (first, last, shared)
    }

    #[test]
    fn the_largest_free_part_is_taken() {
        assert_eq!(ports((32_768, 60_999)), (1024, 29_999, 0));
        assert_eq!(ports((1024, 29_999)), (32_768, 65_535, 0));
        assert_eq!(ports((10_000, 20_000)), (32_768, 65_535, 0));
        assert_eq!(ports((1024, 57_343)), (57_344, 65_535, 0));
    }

    #[test]
    fn a_host_that_leaves_too_few_ports_shares_as_few_as_possible() {
        assert_eq!(ports((1024, 65_535)), (57_344, 65_535, 8192));
        assert_eq!(ports((1024, 60_999)), (57_344, 65_535, 3656));
        assert_eq!(ports((2000, 65_535)), (1024, 9215, 7216));
    }

    #[test]
    fn no_choice_of_the_host_leaves_too_few_ports_or_takes_node_ports() {
        let ends = (0..=65_535_u16).step_by(1111).chain([1023, 1024, 29_999, 30_000, 32_767, 32_768, 65_535]);
        let ends: Vec<u16> = ends.collect();
        let all = ends.iter().flat_map(|first| ends.iter().map(|last| (*first, *last))).filter(|(a, b)| a <= b);
        for local in all {
            let it = snat_ports(local);
            let inside = |port: &u16| (local.0..=local.1).contains(port);
            let overlap = |(first, last): (u16, u16)| (first..=last).filter(inside).count() as u32;
            assert!(it.first >= 1024 && it.count() >= SNAT_PORTS, "{local:?} {it:?}");
            assert!(it.last < NODE_PORTS.0 || it.first > NODE_PORTS.1, "{local:?} {it:?}");
            assert_eq!(overlap((it.first, it.last)), it.shared, "{local:?} {it:?}");
            if it.shared > 0 {
                let windows = [(1024, 29_999), (32_768, 65_535)].into_iter().flat_map(|(first, last): (u16, u16)| {
                    let width = (SNAT_PORTS - 1) as u16;
                    (first..=last - width).step_by(512).chain([last - width]).map(move |port| (port, port + width))
                });
                let least = windows.map(overlap).min();
                assert_eq!(least, Some(it.shared), "{local:?} {it:?}");
            }
        }
    }

    #[test]
    fn shared_ports_are_a_problem_unless_a_setting_names_ports() {
        let load = |args: &[&str]| {
            let all = ["rustnet-agent", "--node-name=n1", "--manifests=/m"].iter().chain(args).copied();
            Config::load(all, &|_| None).expect("a configuration")
        };
        let problem = shared_ports(&load(&[]), (1024, 65_535)).expect("a problem");
        for part in ["net.ipv4.ip_local_port_range is 1024-65535", "ports 57344-65535", "; sysctl -w"] {
            assert!(problem.contains(part), "{part:?} is not in {problem}");
        }
        assert_eq!(shared_ports(&load(&[]), (32_768, 60_999)), None);
        assert_eq!(shared_ports(&load(&["--snat-ports=20000-29999"]), (1024, 65_535)), None);
        assert_eq!(shared_ports(&load(&["--masquerade=false"]), (1024, 65_535)), None);
    }

    /// A flow that a node has forgotten gets the backend and the port that it had, on whichever node, and after each restart.
    #[test]
    fn all_nodes_hash_alike() {
        let args = ["rustnet-agent", "--node-name=n1", "--manifests=/m"];
        let settings = Config::load(args, &|_| None).expect("a configuration");
        let place = crate::ways::Place::default();
        let config = super::config(&settings, &place, None, super::OverlayPath::Device, 250, (32_768, 60_999), false);
        assert_eq!(config.seed, 0x7275_7374);
    }

    #[test]
    fn addresses_in_use_are_kept_while_the_host_has_them() {
        let (one, two): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let with =
            |ip: IpAddr| NodeConfig { node4: Ip4::from_addr(ip.into()), tunnel_src: ip.into(), ..NodeConfig::zeroed() };
        let mut config = with(one);
        keep_addresses(&mut config, &with(two), &[one, two], false);
        assert!(config == with(two));
        // Once the Node is known, its address counts, although the host has the one of before.
        let mut config = with(one);
        keep_addresses(&mut config, &with(two), &[one, two], true);
        assert!(config == with(one));
        let mut config = with(one);
        keep_addresses(&mut config, &with(two), &[one], false);
        assert!(config == with(one));
        keep_addresses(&mut config, &NodeConfig::zeroed(), &[one], false);
        assert!(config == with(one), "a new map holds zeros");
    }

    #[test]
    fn only_addresses_that_we_gave_can_be_outside() {
        let pod = serde_json::from_value(serde_json::json!({
            "containerId": "c", "ifname": "eth0", "netns": "", "network": "n", "hostIfname": "rnv1", "ifindex": 1,
            "mac": "", "addresses": ["10.244.1.2", "fd00::2"],
        }));
        let pods = [pod.expect("a record")];
        let reported = |ranges: &[&str], leased| {
            let ranges: Vec<_> = ranges.iter().map(|range| range.parse().expect("a range")).collect();
            outsiders("n1", &pods, &ranges, |_| leased)
        };
        assert_eq!(reported(&["10.244.1.0/24", "fd00::/64"], true), None);
        assert_eq!(reported(&["10.244.7.0/24"], false), None, "another IPAM's");
        assert_eq!(reported(&[], true), None, "nothing is known");
        assert!(reported(&["10.244.7.0/24"], true).expect("outside").contains("(10.244.7.0/24)"));
    }

    #[test]
    fn port_ranges() {
        assert_eq!(parse_port_range("32768\t60999\n").unwrap(), (32_768, 60_999));
        for bad in ["", "1", "2 1", "a b", "1 2 3", "1 70000"] {
            assert!(parse_port_range(bad).is_err(), "{bad}");
        }
    }
}
