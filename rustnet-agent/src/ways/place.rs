//! This node's place: its addresses, the devices towards the cluster and the world, and the address of each device.
//!
//! It begins with the addresses that the Node names, as other nodes know no others. Default routes add the devices towards the
//! world; a VPN that takes them over changes nothing of the cluster's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Settings;
use crate::host::{Device, DeviceKind, HostFacts};
use crate::model::{Family, Node};

/// A device towards other nodes or the world, with the programs `uplink_in` and `uplink_out`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Prefixes on its link: those of its usable addresses, in the kernel's order, and those that routes tell.
    pub prefixes: Vec<IpNet>,
}

/// Addresses of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// IPv4.
    pub v4: Option<IpAddr>,
    /// IPv6.
    pub v6: Option<IpAddr>,
}

impl Sources {
    /// That of a family.
    pub fn of(&self, family: Family) -> Option<IpAddr> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }
}

/// This node's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node's address of each family: near end of the overlay, source of the host's packets to pods of other nodes, of
    /// hairpin and of ICMP errors.
    pub addresses: Sources,
    /// The devices with our programs, the one with the node's address first.
    pub uplinks: Vec<Uplink>,
    /// Other devices with addresses, by index: answers to masqueraded packets come in by them, too.
    pub side_devices: Vec<Uplink>,
    /// By device index: what masqueraded packets that leave by it get.
    pub sources: BTreeMap<u32, Sources>,
    /// MTU of the way to other nodes; 0 without uplink.
    pub mtu: u32,
    /// The Node names addresses, and the host has none of them at the moment.
    pub is_nameless: bool,
    /// Family of the overlay's outer packets, as far as this node has a say.
    pub overlay_family: Family,
    /// What does not work on this host, and the remedy.
    pub problems: Vec<String>,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            addresses: Sources::default(),
            uplinks: Vec::new(),
            side_devices: Vec::new(),
            sources: BTreeMap::new(),
            mtu: 0,
            is_nameless: false,
            overlay_family: Family::V4,
            problems: Vec::new(),
        }
    }
}

/// Finds this node's place. `others`: the other nodes, which tell the right device where no address and no route does.
pub fn place<'a>(
    settings: &Settings,
    own: Option<&Node>,
    others: impl Iterator<Item = &'a Node>,
    host: &HostFacts,
) -> Place {
    let named = own.map(|node| &*node.addresses).unwrap_or_default();
    let mut problems = Vec::new();
    let uplinks = if settings.uplinks.is_empty() {
        chosen(named, others, host, &mut problems)
    } else {
        configured(&settings.uplinks, host, &mut problems)
    };
    let sources: BTreeMap<u32, Sources> = host
        .devices
        .iter()
        .filter(|device| matches!(device.kind, DeviceKind::Ethernet | DeviceKind::LayerThree))
        .map(|device| (device.index, sources_of(device, named)))
        .filter(|(_, sources)| *sources != Sources::default())
        .collect();
    let address = |family| {
        let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
        let by_name = named.iter().filter(of_family).find(|ip| host.has(**ip)).copied();
        let by_uplink = || uplinks.iter().find_map(|it| sources.get(&it.index)?.of(family));
        by_name.or_else(by_uplink).or_else(|| sources.values().find_map(|it| it.of(family)))
    };
    let addresses = Sources { v4: address(Family::V4), v6: address(Family::V6) };
    let absent: Vec<_> = named.iter().filter(|ip| !host.has(**ip)).map(ToString::to_string).collect();
    if let (Some(own), false) = (own, absent.is_empty()) {
        problems.push(format!(
            "Node {}: this host has no usable {}, which its Node names, and other nodes accept no other sender; check --node-name, \
             and give the kubelet --node-ip with an address of this host",
            own.name,
            absent.join(", ")
        ));
    }
    let by_node = named.first().map(|ip| Family::of(*ip));
    let overlay_family = settings.overlay_family.or(by_node).unwrap_or(match addresses.v4 {
        None if addresses.v6.is_some() => Family::V6,
        _ => Family::V4,
    });
    let is_side = |device: &&Device| {
        device.kind == DeviceKind::Ethernet
            && sources.contains_key(&device.index)
            && !uplinks.iter().any(|uplink| uplink.index == device.index)
    };
    Place {
        addresses,
        mtu: mtu(settings, named, &uplinks, host),
        is_nameless: !named.is_empty() && absent.len() == named.len(),
        side_devices: host.devices.iter().filter(is_side).map(uplink).collect(),
        uplinks: uplinks.into_iter().map(uplink).collect(),
        sources,
        overlay_family,
        problems,
    }
}

/// The addresses of a device: those that the Node names, if they are there, else its own choice.
fn sources_of(device: &Device, named: &[IpAddr]) -> Sources {
    let of = |family| {
        let by_name = named.iter().copied().find(|ip| Family::of(*ip) == family && device.has(*ip));
        by_name.or_else(|| device.source(family))
    };
    Sources { v4: of(Family::V4), v6: of(Family::V6) }
}

fn uplink(device: &Device) -> Uplink {
    Uplink { name: device.name.clone(), ifindex: device.index, mtu: device.mtu, prefixes: device.link_prefixes() }
}

/// The smallest MTU of the devices that lead to other nodes. A VPN does where the Node's address is its own: no program is on its
/// device, but tunnel packets leave by it.
fn mtu(settings: &Settings, named: &[IpAddr], uplinks: &[&Device], host: &HostFacts) -> u32 {
    let is_named = |it: &Device| named.iter().any(|ip| it.has(*ip));
    let vpns = host.devices.iter().filter(|it| it.kind == DeviceKind::LayerThree && is_named(it));
    let is_chosen = !settings.uplinks.is_empty();
    let of_cluster = uplinks.iter().copied().filter(|it| is_chosen || is_named(it)).chain(vpns).map(|it| it.mtu).min();
    let all = uplinks.iter().map(|it| it.mtu).min();
    all.map_or(0, |all| of_cluster.unwrap_or(all))
}

/// The devices of these names, each once.
fn configured<'a>(names: &[String], host: &'a HostFacts, problems: &mut Vec<String>) -> Vec<&'a Device> {
    let mut found: Vec<&Device> = Vec::new();
    for name in names {
        match host.devices.iter().find(|device| device.name == *name) {
            None => {
                let there: Vec<_> = host.devices.iter().map(|it| it.name.as_str()).collect();
                problems.push(format!(
                    "--uplink {name}: there is no such device here; name one of those that there are: {}",
                    there.join(", ")
                ));
            }
            Some(device) => match unfit(device) {
                Some((why, remedy)) => problems.push(format!("--uplink {name}: {why}; {remedy}")),
                // A device takes a program once.
                None if found.iter().any(|it| it.index == device.index) => {}
                None => found.push(device),
            },
        }
    }
    found
}

/// Why a device cannot be an uplink, and the remedy.
fn unfit(device: &Device) -> Option<(&'static str, &'static str)> {
    const OTHER: &str = "name the device that leads to other nodes";
    match device.kind {
        DeviceKind::Ethernet => None,
        DeviceKind::LayerThree => {
            Some(("its packets have no Ethernet header, which the programs read", "name the device below it"))
        }
        DeviceKind::Local => Some(("no packet leaves the host by it", OTHER)),
        DeviceKind::Member => Some(("it is part of a bond or a bridge", "name that")),
        DeviceKind::Internal => Some(("it is one of rustnet's own", OTHER)),
    }
}

/// The devices with the node's addresses, then those of the default routes; else one on the segment of another node.
fn chosen<'a, 'b>(
    named: &[IpAddr],
    others: impl Iterator<Item = &'b Node>,
    host: &'a HostFacts,
    problems: &mut Vec<String>,
) -> Vec<&'a Device> {
    let mut found: Vec<&Device> = Vec::new();
    let mut add = |device: &'a Device| {
        if device.kind == DeviceKind::Ethernet && !found.iter().any(|it| it.index == device.index) {
            found.push(device);
        }
    };
    // Of several devices with one address (anycast on loopback), each counts.
    let with_named = || named.iter().flat_map(|ip| host.devices_with(*ip).map(move |device| (ip, device)));
    with_named().for_each(|(_, device)| add(device));
    let ways_out = || host.defaults.iter().filter_map(|it| Some((it, host.device(it.device)?)));
    ways_out().for_each(|(_, device)| add(device));
    if let Some((route, device)) = ways_out().find(|(_, device)| device.kind == DeviceKind::LayerThree) {
        problems.push(format!(
            "the {} default route leads through {}, whose packets have no Ethernet header: pods reach nothing behind it; exclude the \
             pods' ranges from the VPN, or route the pods' destinations by another device",
            route.family, device.name
        ));
    }
    if found.is_empty() {
        let addresses: Vec<_> = others.flat_map(|node| node.addresses.iter().copied()).collect();
        let on_segment = |device: &&Device| {
            device.kind == DeviceKind::Ethernet
                && device.link_prefixes().iter().any(|net| addresses.iter().any(|ip| net.contains(ip)))
        };
        found.extend(host.devices.iter().find(on_segment));
    }
    if found.is_empty() {
        let unfit: Vec<_> =
            with_named().filter_map(|(ip, it)| Some(format!("{ip} is on {} ({})", it.name, unfit(it)?.0))).collect();
        let why = if unfit.is_empty() { "none has an address of this Node".to_owned() } else { unfit.join(", ") };
        problems.push(format!(
            "no device leads to other nodes: {why}, and there is no default route; give the device its address, or name it with \
             --uplink DEV"
        ));
    } else if let Some((ip, device)) = with_named().find(|(_, device)| device.kind == DeviceKind::Member) {
        problems.push(format!(
            "{ip}, which this Node names, is on {}, and that is part of a bond or a bridge: no program sees what other nodes send; \
             move the address to the bond or bridge",
            device.name
        ));
    }
    found
}
