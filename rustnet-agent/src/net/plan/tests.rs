//! Tests of [`super`]: from facts to routes, and from what is to what should be.

use super::{Desired, Facts, Host, LAST_METRIC, Link, Neighbour, PROTOCOL, Route, Target};
use crate::config::Routing;
use crate::host::build::{device, host};
use crate::model::{Node, ObjectName};
use crate::ways::{Settings, Ways};
use ipnet::IpNet;
use rustnet_common::files::{Bandwidth, EndpointFile};
use std::net::IpAddr;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn node(name: &str, addresses: &[&str], pod_cidrs: &[&str]) -> Node {
    Node {
        name: ObjectName::cluster(name),
        created: 0,
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        pod_cidrs: pod_cidrs.iter().map(|c| net(c)).collect(),
        zone: "".into(),
        is_leaving: false,
        other_addresses: Box::default(),
        labels: crate::model::Labels::default(),
        problems: Box::default(),
    }
}

fn endpoint() -> EndpointFile {
    EndpointFile {
        container_id: "c".into(),
        ifname: "eth0".into(),
        netns: "/n".into(),
        netns_cookie: None,
        network: "rustnet".into(),
        host_ifname: "rnv1".into(),
        ifindex: 7,
        mac: "02:00:00:00:00:07".into(),
        addresses: vec!["10.1.1.5".parse().unwrap()],
        pod_namespace: String::new(),
        pod_name: String::new(),
        pod_uid: String::new(),
        bandwidth: Bandwidth::default(),
        host_ports: Vec::new(),
        has_routes: false,
    }
}

fn veth() -> Link {
    Link { index: 7, name: "rnv1".into(), flags: libc::IFF_UP as u32, ..Link::default() }
}

fn ways(routing: Routing, peers: &[Node]) -> (Node, Ways) {
    let own = node("n1", &["192.0.2.1", "2001:db8::1"], &["10.1.1.0/24"]);
    let host = host([device(2, "eth0", &["192.0.2.1/24", "2001:db8::1/64"])]);
    let ways = Ways::new(&Settings::new("n1", routing), peers.iter().chain([&own]), &host);
    (own, ways)
}

fn desired(routing: Routing, peer: &Node) -> Desired {
    let (own, ways) = ways(routing, std::slice::from_ref(peer));
    let facts = Facts {
        ways: &ways,
        own_pod_cidrs: &own.pod_cidrs,
        is_complete: true,
        overlay: routing.has_overlay().then_some(9),
        service_cidrs: &[],
        endpoints: &[endpoint()],
    };
    facts.desired(&[veth()])
}

fn via(dst: &str, oif: u32, gateway: Option<&str>, source: &str) -> Route {
    let target = Target::Via { oif, gateway: gateway.map(|g| g.parse().unwrap()) };
    Route { dst: net(dst), target, source: Some(source.parse().unwrap()), metric: 0, protocol: PROTOCOL }
}

fn unreachable() -> Route {
    Route {
        dst: net("10.1.1.0/24"),
        target: Target::Unreachable,
        source: None,
        metric: LAST_METRIC,
        protocol: PROTOCOL,
    }
}

#[test]
fn vxlan_routes_lead_to_the_overlay_with_the_nodes_address_as_source() {
    let peer = node("n2", &["198.51.100.2"], &["10.1.2.0/24", "fd00:2::/64"]);
    let want = [unreachable(), via("10.1.2.0/24", 9, None, "192.0.2.1"), via("fd00:2::/64", 9, None, "2001:db8::1")];
    assert_eq!(desired(Routing::Vxlan, &peer).routes, want);
}

#[test]
fn native_routes_lead_to_the_node_on_the_link() {
    let peer = node("n2", &["198.51.100.2", "192.0.2.2", "2001:db8::2"], &["10.1.2.0/24", "fd00:2::/64"]);
    let want = [
        unreachable(),
        via("10.1.2.0/24", 2, Some("192.0.2.2"), "192.0.2.1"),
        via("fd00:2::/64", 2, Some("2001:db8::2"), "2001:db8::1"),
    ];
    assert_eq!(desired(Routing::Native, &peer).routes, want);
}

#[test]
fn native_routing_makes_no_route_to_nodes_that_are_not_on_the_link() {
    let desired = desired(Routing::Native, &node("n2", &["198.51.100.2"], &["10.1.2.0/24"]));
    assert_eq!(desired.routes, [unreachable()]);
}

#[test]
fn routes_to_nodes_wait_until_all_are_known() {
    let (own, ways) = ways(Routing::Vxlan, &[node("n2", &["192.0.2.2"], &["10.1.2.0/24"])]);
    let facts = Facts {
        ways: &ways,
        own_pod_cidrs: &own.pod_cidrs,
        is_complete: false,
        overlay: Some(9),
        service_cidrs: &[],
        endpoints: &[endpoint()],
    };
    let desired = facts.desired(&[veth()]);
    assert_eq!((desired.routes, desired.pod_routes.len()), (vec![unreachable()], 1));
}

#[test]
fn direct_and_vxlan_leads_to_the_node_on_the_link_and_to_others_through_the_overlay() {
    let peer = node("n2", &["198.51.100.2", "2001:db8::2"], &["10.1.2.0/24", "fd00:2::/64"]);
    let want = [
        unreachable(),
        via("10.1.2.0/24", 9, None, "192.0.2.1"),
        via("fd00:2::/64", 2, Some("2001:db8::2"), "2001:db8::1"),
    ];
    let desired = desired(Routing::DirectAndVxlan, &peer);
    assert_eq!(desired.routes, want);
    assert!(desired.problems.is_empty(), "{desired:?}");
}

#[test]
fn a_range_that_is_also_ours_gets_no_route() {
    // Whichever of the two nodes has it: the first one of that age, or this one.
    for name in ["n0", "n2"] {
        let desired = desired(Routing::Vxlan, &node(name, &["192.0.2.2"], &["10.1.0.0/16"]));
        assert_eq!(desired.routes, [unreachable()], "{name}");
    }
}

#[test]
fn pods_without_their_veth_get_nothing() {
    let ways = Ways::default();
    let facts = Facts {
        ways: &ways,
        own_pod_cidrs: &[],
        is_complete: true,
        overlay: None,
        service_cidrs: &[],
        endpoints: &[endpoint()],
    };
    let renamed = Link { name: "other".into(), ..veth() };
    assert_eq!(facts.desired(&[renamed]), Desired::default());
    assert_eq!(facts.desired(&[Link { flags: 0, ..veth() }]), Desired::default());
    assert_eq!(facts.desired(&[veth()]).neighbours.len(), 1);
}

#[test]
fn changes_add_what_is_missing_and_touch_only_what_is_ours() {
    let desired = desired(Routing::Vxlan, &node("n2", &["192.0.2.2"], &["10.1.2.0/24"]));
    let ip: IpAddr = "10.1.1.5".parse().unwrap();
    let pod_route = Route { source: None, ..via("10.1.1.5/32", 7, None, "192.0.2.1") };
    let neighbour = Neighbour { ifindex: 7, ip, mac: [2, 0, 0, 0, 0, 7] };

    let mut host = Host { links: vec![veth()], ..Host::default() };
    let changes = desired.changes(&host, &[]);
    assert_eq!(changes.add, [(unreachable(), false), (desired.routes[1].clone(), false), (pod_route.clone(), false)]);
    assert_eq!(changes.neighbours, [neighbour]);

    let stale = via("10.1.3.0/24", 9, None, "192.0.2.1");
    let foreign = Route { protocol: 4, ..stale.clone() };
    let starting_pod = Route { source: None, ..via("10.1.1.6/32", 7, None, "192.0.2.1") };
    let moved = via("10.1.2.0/24", 8, None, "192.0.2.1");
    // The CNI binary's own route for the pod counts, whatever its protocol.
    let by_cni = Route { protocol: 4, ..pod_route.clone() };
    host.routes = vec![unreachable(), moved, by_cni, stale.clone(), foreign, starting_pod];
    let changes = desired.changes(&host, &[neighbour]);
    assert_eq!(changes.add, [(desired.routes[1].clone(), true)]);
    assert_eq!(changes.delete, [stale]);
    assert!(changes.neighbours.is_empty());

    host.routes = vec![unreachable(), desired.routes[1].clone(), pod_route];
    assert!(desired.changes(&host, &[neighbour]).is_empty());
}

#[test]
fn anothers_route_that_leads_the_same_way_is_left_to_do_its_work() {
    let desired = desired(Routing::Native, &node("n2", &["192.0.2.2"], &["10.1.2.0/24"]));
    let missing = |route: Route| {
        let host = Host { routes: vec![unreachable(), route], ..Host::default() };
        desired.changes(&host, &[]).add.iter().any(|(add, _)| *add == desired.routes[1])
    };
    let theirs = Route { protocol: 4, source: None, ..desired.routes[1].clone() };
    assert!(!missing(theirs.clone()));
    // Ours fits next to one of a higher metric, and comes first.
    assert!(missing(Route { metric: 100, ..theirs.clone() }));
    assert!(missing(Route { target: Target::Via { oif: 2, gateway: Some([192, 0, 2, 3].into()) }, ..theirs }));
}

/// The host's requests to Services leave by the uplink with the node's address, wherever the default route leads.
#[test]
fn configured_service_ranges_lead_out_of_the_uplink() {
    let (own, ways) = ways(Routing::Vxlan, &[]);
    let services = [net("10.96.0.0/12"), net("fd00:96::/108")];
    let desired = |is_complete| {
        let facts = Facts {
            ways: &ways,
            own_pod_cidrs: &own.pod_cidrs,
            is_complete,
            service_cidrs: &services,
            overlay: Some(9),
            endpoints: &[],
        };
        let eth0 = Link { index: 2, name: "eth0".into(), mac: vec![2, 0, 0, 0, 0, 2], ..Link::default() };
        facts.desired(&[eth0])
    };
    let it = desired(true);
    let want = [
        unreachable(),
        via("10.96.0.0/12", 2, Some("169.254.1.2"), "192.0.2.1"),
        via("fd00:96::/108", 2, Some("fe80::726e"), "2001:db8::1"),
    ];
    assert_eq!(it.routes, want);
    let hop = |ip: &str| Neighbour { ifindex: 2, ip: ip.parse().unwrap(), mac: [2, 0, 0, 0, 0, 2] };
    assert_eq!(it.neighbours, [hop("169.254.1.2"), hop("fe80::726e")]);
    assert_eq!(desired(false).routes, [unreachable()]);
}
