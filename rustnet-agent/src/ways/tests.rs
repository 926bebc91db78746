//! Odd hosts, and what follows for this node's place and the ways to others.

use proptest::prelude::*;

use super::*;
use crate::host::build::{default, device, host};
use crate::host::{Device, DeviceKind};
use crate::model::ObjectName;
use crate::model::build::node;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn own() -> Node {
    node("n1", &["172.18.0.11", "fd00:18::11"], &["10.244.1.0/24", "fd00:244:1::/64"])
}

fn other() -> Node {
    node("n2", &["172.18.0.12", "fd00:18::12"], &["10.244.2.0/24", "fd00:244:2::/64"])
}

/// The device with the node's addresses.
fn cluster(index: u32, name: &str) -> Device {
    device(index, name, &["172.18.0.11/24", "fd00:18::11/64"])
}

fn ways_of(settings: &Settings, host: &HostFacts, nodes: &[Node]) -> Ways {
    Ways::new(settings, nodes.iter(), host)
}

fn ways(routing: Routing, host: &HostFacts) -> Ways {
    ways_of(&Settings::new("n1", routing), host, &[own(), other()])
}

fn names(place: &Place) -> Vec<&str> {
    place.uplinks.iter().map(|it| it.name.as_str()).collect()
}

fn with_kind(kind: DeviceKind, device: Device) -> Device {
    Device { kind, ..device }
}

#[test]
fn one_device() {
    let it = ways(Routing::Vxlan, &host([cluster(2, "eth0")])).place;
    assert_eq!((names(&it), it.mtu), (vec!["eth0"], 1500));
    assert_eq!((it.addresses.v4, it.addresses.v6), (Some(ip("172.18.0.11")), Some(ip("fd00:18::11"))));
    assert_eq!(it.problems, [""; 0]);
}

/// Vagrant, and every private network next to a public one: the default route leads elsewhere than to the nodes.
#[test]
fn the_default_route_by_another_device() {
    let mut facts = host([device(2, "eth0", &["10.0.2.15/24"]), Device { mtu: 1400, ..cluster(3, "eth1") }]);
    facts.defaults = vec![default(Family::V4, 100, 2)];
    for routing in Routing::ALL {
        let it = ways(routing, &facts);
        assert_eq!((names(&it.place), it.place.mtu), (vec!["eth1", "eth0"], 1400));
        assert_eq!(it.place.addresses.v4, Some(ip("172.18.0.11")));
        assert_eq!(
            it.place.sources[&2].v4,
            Some(ip("10.0.2.15")),
            "packets to the world get the address of their device"
        );
        assert_eq!(it.place.sources[&3].v4, Some(ip("172.18.0.11")));
        let way = it.entries[&"10.244.2.0/24".parse().unwrap()].way;
        let want = match routing {
            Routing::Vxlan => Way::Tunnel { far_end: ip("172.18.0.12") },
            Routing::Native | Routing::DirectAndVxlan => Way::Direct { gateway: ip("172.18.0.12"), device: 3 },
        };
        assert_eq!(way, want);
    }
}

#[test]
fn no_default_route() {
    let facts = HostFacts { defaults: Vec::new(), ..host([cluster(2, "eth0")]) };
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((names(&it), &*it.problems), (vec!["eth0"], &[] as &[String]));
}

/// Before the node's own object is known, the segment of another node says it.
#[test]
fn no_default_route_and_no_own_node() {
    let facts = HostFacts { defaults: Vec::new(), ..host([device(2, "eth0", &["192.0.2.1/24"]), cluster(3, "eth1")]) };
    let it = ways_of(&Settings::new("n1", Routing::Vxlan), &facts, &[other()]).place;
    assert_eq!(names(&it), ["eth1"]);
}

#[test]
fn nothing_leads_anywhere() {
    let facts = HostFacts { defaults: Vec::new(), ..host([device(2, "eth0", &[])]) };
    let it = ways(Routing::Vxlan, &facts).place;
    assert!(it.uplinks.is_empty() && it.mtu == 0);
    assert!(it.problems.iter().any(|it| it.contains("no device leads to other nodes")), "{:?}", it.problems);
}

/// A VPN that takes the default route changes nothing of the cluster's, and is reported.
#[test]
fn a_vpn_takes_the_default_route() {
    let tun = with_kind(DeviceKind::LayerThree, Device { mtu: 1400, ..device(5, "tun0", &["10.8.0.2/24"]) });
    let mut facts = host([cluster(2, "eth0"), tun]);
    facts.defaults.insert(0, default(Family::V4, 0, 5));
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((names(&it), it.mtu), (vec!["eth0"], 1500));
    assert_eq!((it.addresses.v4, it.sources[&5].v4), (Some(ip("172.18.0.11")), Some(ip("10.8.0.2"))));
    assert!(it.problems[0].contains("tun0"), "{:?}", it.problems);
}

/// Nodes that meet in a VPN: tunnel packets leave by a device without Ethernet headers, and have to fit there.
#[test]
fn an_internal_address_of_a_vpn_device() {
    let wg = with_kind(
        DeviceKind::LayerThree,
        Device { mtu: 1420, ..device(5, "wg0", &["172.18.0.11/24", "fd00:18::11/64"]) },
    );
    let facts = host([device(2, "eth0", &["192.0.2.1/24"]), wg]);
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((names(&it), it.mtu), (vec!["eth0"], 1420));
    let settings = Settings { uplinks: vec!["eth0".into()], ..Settings::new("n1", Routing::Vxlan) };
    assert_eq!(ways_of(&settings, &facts, &[own(), other()]).place.mtu, 1420);
}

/// Anycast, BGP and direct server return: the node's address is on loopback, too.
#[test]
fn an_internal_address_of_two_devices() {
    let lo = with_kind(DeviceKind::Local, device(1, "lo", &["172.18.0.11/32", "fd00:18::11/128"]));
    let mut facts = host([device(2, "eth1", &["192.0.2.1/24"]), lo, Device { mtu: 1400, ..cluster(3, "eth0") }]);
    for defaults in [facts.defaults.clone(), Vec::new()] {
        facts.defaults = defaults;
        for routing in Routing::ALL {
            let it = ways(routing, &facts);
            assert_eq!((names(&it.place)[0], it.place.mtu), ("eth0", 1400));
            assert_eq!(it.place.addresses.v4, Some(ip("172.18.0.11")));
            assert_eq!(it.place.problems, [""; 0]);
        }
    }
}

/// What is said of an address that is on a device which is no uplink names that device.
#[test]
fn an_internal_address_of_a_device_that_cannot_be_an_uplink_is_reported() {
    let bridge = device(3, "br0", &[]);
    let port = || with_kind(DeviceKind::Member, cluster(2, "eth0"));
    // The default route leads through another device, and nothing is attached where nodes send to.
    let mut facts = host([device(4, "eth1", &["192.0.2.1/24"]), bridge.clone(), port()]);
    let why = ways(Routing::Vxlan, &facts).place.problems.join("; ");
    assert!(why.contains("172.18.0.11") && why.contains("eth0") && why.contains("part of a bond or a bridge"), "{why}");
    // No default route at all.
    facts.defaults.clear();
    for kind in [DeviceKind::Member, DeviceKind::Local, DeviceKind::LayerThree] {
        let facts = HostFacts { defaults: Vec::new(), ..host([with_kind(kind, cluster(2, "dev7"))]) };
        let why = ways(Routing::Vxlan, &facts).place.problems.join("; ");
        assert!(!why.contains("none has an address of this Node"), "{kind:?}: {why}");
        assert!(why.contains("dev7") && why.contains("--uplink"), "{kind:?}: {why}");
    }
}

#[test]
fn a_second_lease_with_a_smaller_metric() {
    let mut facts = host([cluster(2, "eth0"), device(3, "wlan0", &["192.168.1.7/24"])]);
    facts.defaults = vec![default(Family::V4, 50, 3), default(Family::V4, 100, 2)];
    assert_eq!(names(&ways(Routing::Vxlan, &facts).place), ["eth0", "wlan0"]);
}

#[test]
fn a_default_route_of_two_next_hops() {
    let mut facts = host([device(2, "eth0", &["192.0.2.1/24"]), device(3, "eth1", &["198.51.100.1/24"])]);
    facts.devices.push(device(1, "lo", &["172.18.0.11/32", "fd00:18::11/128"]));
    facts.devices[2].kind = DeviceKind::Local;
    facts.defaults = vec![default(Family::V4, 0, 2), default(Family::V4, 0, 3)];
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((names(&it.clone()), it.problems.len()), (vec!["eth0", "eth1"], 0));
    assert_eq!(it.addresses.v4, Some(ip("172.18.0.11")), "the node's address is on lo, as with BGP on the host");
    assert_eq!(it.sources[&3].v4, Some(ip("198.51.100.1")));
}

#[test]
fn an_internal_address_that_is_the_second_of_its_device() {
    let it = ways(Routing::Vxlan, &host([device(2, "eth0", &["172.18.0.99/24", "172.18.0.11/24"])])).place;
    assert_eq!((it.addresses.v4, it.sources[&2].v4), (Some(ip("172.18.0.11")), Some(ip("172.18.0.11"))));
}

#[test]
fn an_address_that_is_late() {
    let mut facts = host([cluster(2, "eth0")]);
    let late = &mut facts.devices[0].addresses[1];
    (late.is_usable, late.is_preferred) = (false, false);
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((names(&it), it.addresses.v6), (vec!["eth0"], None));
    assert!(it.problems[0].contains("no usable fd00:18::11"), "{:?}", it.problems);
    assert!(!it.is_nameless, "one of the two is there");
    facts.devices[0].addresses[0].is_usable = false;
    assert!(ways(Routing::Vxlan, &facts).place.is_nameless);
}

/// The MTU of pods is that of the way to other nodes, however small packets to the world have to be.
#[test]
fn the_mtu_is_that_of_the_nodes_device() {
    let mut facts = host([Device { mtu: 1280, ..device(2, "eth0", &["10.0.2.15/24"]) }, cluster(3, "eth1")]);
    facts.defaults = vec![default(Family::V4, 100, 2)];
    assert_eq!(ways(Routing::Vxlan, &facts).place.mtu, 1500);
    // Of devices that are named, any may lead to other nodes.
    let settings = Settings { uplinks: vec!["eth1".into(), "eth0".into()], ..Settings::new("n1", Routing::Vxlan) };
    assert_eq!(ways_of(&settings, &facts, &[own(), other()]).place.mtu, 1280);
}

#[test]
fn an_internal_address_that_is_deprecated_still_counts() {
    let mut facts = host([device(2, "eth0", &["fd00:18::99/64", "fd00:18::11/64", "172.18.0.11/24"])]);
    facts.devices[0].addresses[1].is_preferred = false;
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!((it.addresses.v6, it.problems.len()), (Some(ip("fd00:18::11")), 0));
}

#[test]
fn a_bond_a_vlan_device_and_a_bridge() {
    for name in ["bond0", "bond0.7", "br0"] {
        let port = with_kind(DeviceKind::Member, device(2, "eth0", &[]));
        let mut facts = host([port, cluster(3, name)]);
        facts.defaults = vec![default(Family::V4, 0, 3)];
        assert_eq!(names(&ways(Routing::Native, &facts).place), [name]);
    }
}

#[test]
fn bridges_of_containers_and_machines() {
    let facts = host([
        cluster(2, "eth0"),
        device(3, "docker0", &["172.17.0.1/16"]),
        device(4, "virbr0", &["192.168.122.1/24"]),
        with_kind(DeviceKind::Member, device(5, "vnet0", &[])),
        with_kind(DeviceKind::Local, device(6, "nodelocaldns", &["169.254.20.10/32"])),
        with_kind(DeviceKind::Internal, device(7, "rnv1", &["10.244.1.1/32"])),
    ]);
    let it = ways(Routing::Vxlan, &facts).place;
    assert_eq!(names(&it), ["eth0"]);
    let sides: Vec<_> = it.side_devices.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(sides, ["docker0", "virbr0"]);
    assert_eq!(it.sources.keys().copied().collect::<Vec<_>>(), [2, 3, 4]);
}

#[test]
fn named_devices() {
    let facts = host([
        cluster(2, "eth0"),
        device(3, "eth1", &["192.0.2.1/24"]),
        with_kind(DeviceKind::LayerThree, device(4, "wg0", &[])),
    ]);
    let settings = |names: &[&str]| Settings {
        uplinks: names.iter().map(ToString::to_string).collect(),
        ..Settings::new("n1", Routing::Vxlan)
    };
    let place = |names: &[&str]| ways_of(&settings(names), &facts, &[own(), other()]).place;
    assert_eq!(names(&place(&["eth1", "eth0", "eth1"])), ["eth1", "eth0"]);
    // One that is away is reported, and the others go on.
    let it = place(&["eth0", "eth7"]);
    assert_eq!(names(&it), ["eth0"]);
    assert!(it.problems[0].contains("eth7") && it.problems[0].contains("eth0, eth1, wg0"), "{:?}", it.problems);
    assert!(place(&["wg0"]).problems[0].contains("no Ethernet header"));
}

/// The hosts of nearly all IPv6 clusters have IPv4, too.
#[test]
fn an_ipv6_cluster_on_hosts_of_both_families() {
    let facts = host([device(2, "eth0", &["192.0.2.1/24", "fd00:18::11/64"])]);
    let nodes =
        [node("n1", &["fd00:18::11"], &["fd00:244:1::/64"]), node("n2", &["fd00:18::12"], &["fd00:244:2::/64"])];
    let it = ways_of(&Settings::new("n1", Routing::Vxlan), &facts, &nodes);
    assert_eq!(it.entries[&"fd00:244:2::/64".parse().unwrap()].way, Way::Tunnel { far_end: ip("fd00:18::12") });
    assert_eq!((it.overlay_family(), it.place.overlay_family), (Family::V6, Family::V6));
    assert_eq!(it.place.addresses.v4, Some(ip("192.0.2.1")), "pods may have IPv4 all the same");
}

#[test]
fn the_overlay_takes_the_family_of_the_first_addresses_or_the_one_of_both() {
    let far_end = |own: &[&str], other: &[&str], family| {
        let settings = Settings { overlay_family: family, ..Settings::new("n1", Routing::Vxlan) };
        let nodes = [node("n1", own, &["10.244.1.0/24"]), node("n2", other, &["10.244.2.0/24"])];
        let it = ways_of(&settings, &host([cluster(2, "eth0")]), &nodes);
        match it.entries.get(&"10.244.2.0/24".parse().unwrap()).map(|entry| entry.way) {
            Some(Way::Tunnel { far_end }) => Ok(far_end.to_string()),
            _ => Err(it.problems[0].to_string()),
        }
    };
    let (v4, v6) = ("172.18.0.12", "fd00:18::12");
    let both = ["172.18.0.11", "fd00:18::11"];
    let six_first = ["fd00:18::11", "172.18.0.11"];
    assert_eq!(far_end(&both, &[v4, v6], None), Ok(v4.into()));
    assert_eq!(far_end(&six_first, &[v6, v4], None), Ok(v6.into()));
    assert_eq!(far_end(&six_first, &[v4, v6], None), Ok(v4.into()), "both nodes decide alike");
    assert_eq!(far_end(&both, &[v6], None), Ok(v6.into()));
    assert_eq!(far_end(&both, &[v4, v6], Some(Family::V6)), Ok(v6.into()));
    let why = far_end(&["172.18.0.11"], &[v6], None).expect_err("no common family");
    assert!(why.contains("Node n2: status.addresses: no InternalIP of a family"), "{why}");
    let why = far_end(&both, &[v4], Some(Family::V6)).expect_err("none of that family");
    assert!(why.contains("need IPv6 InternalIPs") && why.contains("--overlay-family"), "{why}");
    // What is asked for counts before there is another node, too.
    let settings = Settings { overlay_family: Some(Family::V6), ..Settings::new("n1", Routing::Vxlan) };
    assert_eq!(ways_of(&settings, &host([cluster(2, "eth0")]), &[own()]).overlay_family(), Family::V6);
}

/// A range of one address takes that address from nobody.
#[test]
fn an_address_stays_its_nodes_whatever_range_claims_it() {
    for (range, want) in [("172.18.0.11/32", Owner::Host), ("172.18.0.12/32", Owner::Node)] {
        let nodes = [own(), other(), node("n3", &["172.18.0.13"], &[range])];
        let it = ways_of(&Settings::new("n1", Routing::Vxlan), &host([cluster(2, "eth0")]), &nodes);
        assert_eq!(it.entries[&range.parse().unwrap()].owner, want);
    }
}

#[test]
fn native_routes_that_others_have_to_make_are_reported() {
    let far = node("n3", &["198.51.100.3"], &["10.244.3.0/24"]);
    let it = ways_of(&Settings::new("n1", Routing::Native), &host([cluster(2, "eth0")]), &[own(), far]);
    assert_eq!(it.entries[&"10.244.3.0/24".parse().unwrap()].way, Way::Routed { node: Some(ip("198.51.100.3")) });
    assert!(it.unrouted[0].to_string().contains("Node n3: none of its addresses is on a link"), "{:?}", it.unrouted);
}

#[test]
fn configured_pod_ranges_take_the_place_of_the_nodes() {
    let settings = Settings { pod_cidrs: vec!["10.9.0.0/24".parse().unwrap()], ..Settings::new("n1", Routing::Vxlan) };
    for nodes in [vec![own(), other()], vec![other()]] {
        let it = ways_of(&settings, &host([cluster(2, "eth0")]), &nodes);
        let owned: Vec<_> = it.entries.iter().filter(|(_, entry)| entry.owner == Owner::OwnPods).collect();
        assert_eq!(owned.iter().map(|(prefix, _)| prefix.to_string()).collect::<Vec<_>>(), ["10.9.0.0/24"]);
    }
}

fn any_addresses() -> impl Strategy<Value = Vec<IpAddr>> {
    let pair = [ip("172.18.0.1"), ip("fd00:18::1"), ip("198.51.100.1"), ip("2001:db8::1")];
    proptest::sample::subsequence(pair.to_vec(), 0..=4).prop_shuffle()
}

fn shifted(addresses: &[IpAddr], by: u8) -> Vec<IpAddr> {
    let shift = |address: &IpAddr| match address {
        IpAddr::V4(it) => IpAddr::from(u32::from(*it).wrapping_add(by.into()).to_be_bytes()),
        IpAddr::V6(it) => IpAddr::from(u128::from(*it).wrapping_add(by.into()).to_be_bytes()),
    };
    addresses.iter().map(shift).collect()
}

proptest! {
    /// Two nodes choose one family for the overlay between them, whatever addresses they have, and in whatever order.
    #[test]
    fn both_ends_of_the_overlay_have_one_family(a in any_addresses(), b in any_addresses(), family in 0..3) {
        let family = [None, Some(Family::V4), Some(Family::V6)][usize::try_from(family).unwrap()];
        let make = |name: &str, addresses: Vec<IpAddr>, cidr: &str| Node {
            name: ObjectName::cluster(name),
            created: 0,
            addresses: addresses.into(),
            pod_cidrs: [cidr.parse().unwrap()].into(),
            zone: "".into(),
            is_leaving: false,
            other_addresses: Box::default(),
            labels: crate::model::Labels::default(),
            problems: Box::default(),
        };
        let nodes = [make("n1", shifted(&a, 10), "10.244.1.0/24"), make("n2", shifted(&b, 20), "10.244.2.0/24")];
        let far_end = |own: &str, cidr: &str| {
            let settings = Settings { overlay_family: family, ..Settings::new(own, Routing::Vxlan) };
            let it = ways_of(&settings, &host([device(2, "eth0", &[])]), &nodes);
            match it.entries.get(&cidr.parse().unwrap()).map(|entry| entry.way) {
                Some(Way::Tunnel { far_end }) => Some(far_end),
                _ => None,
            }
        };
        let (to_second, to_first) = (far_end("n1", "10.244.2.0/24"), far_end("n2", "10.244.1.0/24"));
        if !a.is_empty() && !b.is_empty() {
            prop_assert_eq!(to_second.map(Family::of), to_first.map(Family::of));
        }
        // The far end is an address of that node.
        prop_assert!(to_second.is_none_or(|it| nodes[1].addresses.contains(&it)));
    }
}
