//! Ranges of Services in the peers table.

use super::{HostFacts, Index, gone, problems, settings};
use crate::config::Routing;
use crate::host::build::{device, host};
use crate::model::build::{node, service_cidr, slice};
use crate::model::{Family, ObjectName};
use crate::source::{Event, Kind, ObjectRef};
use crate::ways::Settings;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags, identity};

fn index(configured: &[&str], host: HostFacts, events: impl IntoIterator<Item = Event>) -> Index {
    let service_cidrs = configured.iter().map(|cidr| cidr.parse().unwrap()).collect();
    let mut index = Index::new(Settings { service_cidrs, ..settings(Routing::Vxlan) });
    index.set_host(host);
    index.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
    for event in events {
        index.handle(event);
    }
    index
}

fn synced(index: &mut Index) {
    for kind in Kind::ALL {
        index.handle(Event::Synced(kind));
    }
}

/// The ranges of Services that the table has.
fn ranges(index: &Index) -> Vec<String> {
    let peers = index.desired_peers();
    peers.iter().filter(|(_, peer)| super::super::is_service_range(peer)).map(|(cidr, _)| cidr.to_string()).collect()
}

fn deleted(name: &str) -> Event {
    Event::Delete(ObjectRef { kind: Kind::ServiceCidr, name: ObjectName::cluster(name) })
}

#[test]
fn the_ranges_of_objects_and_of_the_setting_count() {
    let first = service_cidr("kubernetes", &["10.96.0.0/16", "fd00:96::/112"]);
    let mut it = index(&["10.96.0.0/16", "10.98.0.0/16"], HostFacts::default(), [first.apply()]);
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.98.0.0/16", "fd00:96::/112"]);
    let peer = Peer { node: Addr::UNSPECIFIED, identity: identity::WORLD, flags: flags::SERVICES, pad: 0 };
    assert_eq!(it.desired_peers()[&"10.96.0.0/16".parse().unwrap()], peer);
    // They come and go, and each time the table is to be planned again.
    it.take_peers_dirty();
    it.handle(service_cidr("second", &["10.97.0.0/24"]).apply());
    assert!(it.take_peers_dirty());
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.97.0.0/24", "10.98.0.0/16", "fd00:96::/112"]);
    it.handle(service_cidr("second", &["10.97.1.0/24"]).apply());
    it.handle(deleted("kubernetes"));
    assert!(it.take_peers_dirty());
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.97.1.0/24", "10.98.0.0/16"]);
    // What a fresh list does not name is gone.
    it.handle(Event::Restart(Kind::ServiceCidr));
    it.handle(Event::Synced(Kind::ServiceCidr));
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.98.0.0/16"]);
    assert_eq!(problems(&it), [""; 0]);
}

/// A Service that is not known yet must not look like none.
#[test]
fn there_is_no_range_before_services_are_known() {
    let mut it =
        index(&["10.98.0.0/16"], HostFacts::default(), [service_cidr("kubernetes", &["10.96.0.0/16"]).apply()]);
    for (kind, want) in [
        (Kind::ServiceCidr, &[][..]),
        (Kind::Node, &[]),
        (Kind::Service, &[]),
        (Kind::Slice, &["10.96.0.0/16", "10.98.0.0/16"]),
    ] {
        assert!(!it.knows_service_ranges());
        it.take_peers_dirty();
        it.handle(Event::Synced(kind));
        assert!(it.take_peers_dirty());
        assert_eq!(ranges(&it), want, "{kind}");
    }
    assert!(it.knows_service_ranges());
    // They do not wait for objects that may not come.
    let mut it = index(&["10.98.0.0/16"], HostFacts::default(), []);
    for kind in Kind::REQUIRED {
        it.handle(Event::Synced(kind));
    }
    assert!(it.synced() && !it.knows_service_ranges());
    assert_eq!(ranges(&it), ["10.98.0.0/16"]);
}

#[test]
fn nodes_and_pods_keep_their_addresses() {
    let mut it = index(
        &[],
        HostFacts::default(),
        [
            node("n2", &["10.96.0.12"], &["10.96.2.0/24"]).apply(),
            node("n3", &["172.18.0.13"], &["10.97.0.0/16"]).apply(),
            service_cidr("kubernetes", &["10.96.0.0/16", "10.97.3.0/24", "10.97.0.0/16", "10.96.0.12/32"]).apply(),
        ],
    );
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.96.0.0/16"]);
    let peers = it.desired_peers();
    for (prefix, flag) in [("10.96.0.12/32", flags::NODE), ("10.96.2.0/24", flags::POD), ("10.97.0.0/16", flags::POD)] {
        assert_eq!(peers[&prefix.parse().unwrap()].flags, flag | flags::TUNNEL, "{prefix}");
    }
    let problems = problems(&it);
    for part in [
        "ServiceCIDR kubernetes: 10.96.0.0/16 has the pod range 10.96.2.0/24 in it",
        "ServiceCIDR kubernetes: 10.97.0.0/16 overlaps the pod range 10.97.0.0/16",
        "ServiceCIDR kubernetes: 10.97.3.0/24 overlaps the pod range 10.97.0.0/16",
    ] {
        assert!(problems.iter().any(|it| it.starts_with(part)), "{part}: {problems:?}");
    }
    // The range's place is free again.
    it.handle(gone(Kind::Node, "n9"));
    it.handle(Event::Delete(ObjectRef { kind: Kind::Node, name: ObjectName::cluster("n3") }));
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.97.0.0/16", "10.97.3.0/24"]);
}

/// Machines there that are no nodes: the router, a server of names.
#[test]
fn a_network_of_this_host_keeps_its_addresses() {
    let eth0 = device(2, "eth0", &["10.96.7.11/24", "172.18.0.11/24"]);
    // As a cache on the node has a Service's address.
    let cache = device(3, "nodelocaldns", &["10.98.0.10/32"]);
    let mut it = index(&["10.98.0.0/16"], host([eth0, cache]), [service_cidr("kubernetes", &["10.96.0.0/16"]).apply()]);
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.98.0.0/16"]);
    assert_eq!(
        problems(&it),
        [
            "ServiceCIDR kubernetes: 10.96.0.0/16 overlaps the network of this host 10.96.7.0/24: its addresses that no Service has \
             are not refused; give them ranges apart"
        ]
    );
}

/// That pods keep their address does not say that somebody is there.
#[test]
fn a_range_without_masquerade_hides_no_range_of_services() {
    let no_masquerade = ["10.0.0.0/8", "10.96.0.0/16"].map(|cidr| cidr.parse().unwrap()).into();
    let service_cidrs = vec!["10.96.0.0/16".parse().unwrap()];
    let mut it = Index::new(Settings { no_masquerade, service_cidrs, ..settings(Routing::Vxlan) });
    it.set_host(HostFacts::default());
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.96.0.0/16"]);
}

/// The API server's endpoint above all: who drops what goes there hears of no correction.
#[test]
fn a_range_with_other_machines_in_it_is_left_out() {
    let kubernetes = slice("kubernetes-1", "kubernetes", Family::V4).tcp(6443).ready(&["10.96.200.5"]);
    let pods = slice("web-1", "web", Family::V4).tcp(80).ready(&["10.97.2.9"]);
    let n2 = node("n2", &["172.18.0.12"], &["10.97.2.0/24"]).apply();
    let both = service_cidr("kubernetes", &["10.96.0.0/16", "10.97.0.0/16", "10.98.0.0/16"]).apply();
    let mut it = index(&[], HostFacts::default(), [both, pods.apply(), n2]);
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.96.0.0/16", "10.97.0.0/16", "10.98.0.0/16"]);
    it.take_peers_dirty();
    it.handle(kubernetes.apply());
    assert!(it.take_peers_dirty());
    assert_eq!(ranges(&it), ["10.97.0.0/16", "10.98.0.0/16"]);
    let problem = "ServiceCIDR kubernetes: 10.96.0.0/16 has 10.96.200.5 in it, which is no Service but an endpoint";
    assert!(problems(&it).iter().any(|it| it.starts_with(problem)), "{:?}", problems(&it));
}

/// Nothing else need happen before the range counts again.
#[test]
fn a_range_comes_back_with_the_last_machine_in_it() {
    let inside = slice("kubernetes-1", "kubernetes", Family::V4).tcp(6443).ready(&["10.96.200.5"]);
    let outside = slice("kubernetes-1", "kubernetes", Family::V4).tcp(6443).ready(&["172.18.0.5"]);
    let cidr = service_cidr("kubernetes", &["10.96.0.0/16"]).apply();
    let mut it = index(&[], HostFacts::default(), [cidr]);
    synced(&mut it);
    for leaves in [outside.apply(), gone(Kind::Slice, "kubernetes-1")] {
        it.handle(inside.clone().apply());
        assert_eq!(ranges(&it), [""; 0]);
        it.take_peers_dirty();
        it.handle(leaves);
        assert!(it.take_peers_dirty());
        assert_eq!(ranges(&it), ["10.96.0.0/16"]);
    }
}

#[test]
fn a_range_that_is_wider_than_any_of_services_is_left_out() {
    let wide = service_cidr("wide", &["10.0.0.0/8", "fd00::/16", "10.96.0.0/12", "fd00:96::/48"]).apply();
    let mut it = index(&[], HostFacts::default(), [wide]);
    synced(&mut it);
    assert_eq!(ranges(&it), ["10.96.0.0/12", "fd00:96::/48"]);
    for range in ["10.0.0.0/8", "fd00::/16"] {
        let problem = format!("ServiceCIDR wide: {range} is too wide for a range of Services");
        assert!(problems(&it).iter().any(|it| it.starts_with(&problem)), "{:?}", problems(&it));
    }
}
