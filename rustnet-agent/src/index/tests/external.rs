//! Services for clients outside.

use super::{VIP4, VIP6, desired, gone, index, key, problems};
use crate::config::{Forwarding, NodePortAddresses, Routing};
use crate::host::build::{device, host};
use crate::index::{Index, Settings, VipKey, WithoutLocalEndpoints};
use crate::model::build::{endpoint, ip, node, service, slice};
use crate::model::{EndpointSlice, Family, Service};
use crate::source::Kind;
use rustnet_common::service::flags::{DIRECT, OWN_PORT, SHARED, SOURCE_RANGES, VIP};
use rustnet_common::service::scope;
use rustnet_common::tuple::proto::TCP;
use std::collections::BTreeSet;

fn outside(key: VipKey) -> VipKey {
    VipKey { scope: scope::EXTERNAL, ..key }
}

/// An index of node n1 with one address, and a Service with an endpoint here and one elsewhere.
fn published(service: Service) -> Index {
    let mut it = index([service.apply()]);
    let slice = slice("web-1", "web", Family::V4).tcp(8080);
    it.handle(slice.endpoint(endpoint("10.244.1.5").on("n1")).endpoint(endpoint("10.244.2.5").on("n2")).apply());
    it
}

const BALANCER: &str = "203.0.113.7";

/// Backends of other nodes answer directly only where these nodes find what this one has chosen: not by hints, which they read
/// otherwise, nor at node ports that they may not have.
#[test]
fn direct_answers_where_all_nodes_choose_alike() {
    let zones =
        || slice("web-1", "web", Family::V4).tcp(8080).endpoint(endpoint("10.244.2.5").on("n2").hints(&[], &["z1"]));
    let plain = || slice("web-1", "web", Family::V4).tcp(8080).endpoint(endpoint("10.244.2.5").on("n2"));
    let range = || NodePortAddresses::In("172.18.0.0/24".parse().unwrap());
    for (node_ports, slice, want) in [
        (vec![], plain(), [DIRECT; 2]),
        (vec![NodePortAddresses::Primary], plain(), [DIRECT; 2]),
        (vec![range()], plain(), [0, DIRECT]),
        (vec![range(), NodePortAddresses::Primary], plain(), [DIRECT; 2]),
        (vec![], zones(), [0; 2]),
    ] {
        let settings = Settings { node_ports, forwarding: Forwarding::Dsr, ..Settings::new("n1", Routing::Vxlan) };
        let mut it = Index::new(settings);
        it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
        it.handle(service("web", &[VIP4]).tcp(80).node_port(30_080).external(&[BALANCER]).apply());
        it.handle(slice.apply());
        let flags = [("172.18.0.11", 30_080), (BALANCER, 80)]
            .map(|(at, port)| desired(&it, &outside(key(at, port, TCP))).expect("an entry").1);
        assert_eq!(flags, want);
    }
    // The header is from this node, and others know it by the address that its object names.
    let mut it = Index::new(Settings { forwarding: Forwarding::Dsr, ..Settings::new("n1", Routing::Vxlan) });
    it.handle(service("web", &[VIP4, VIP6]).tcp(80).external(&[BALANCER, "2001:db8:7::7"]).apply());
    let flags =
        |it: &Index| [BALANCER, "2001:db8:7::7"].map(|at| desired(it, &outside(key(at, 80, TCP))).expect("an entry").1);
    assert_eq!(flags(&it), [DIRECT; 2]);
    it.take_dirty_services();
    it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
    assert_eq!(flags(&it), [DIRECT, 0]);
    assert!(it.take_dirty_services().contains(&outside(key("2001:db8:7::7", 80, TCP))));
}

#[test]
fn a_node_port_is_at_the_nodes_addresses() {
    let mut it = published(service("web", &[VIP4]).tcp(80).node_port(30_080));
    let at_node = key("172.18.0.11", 30_080, TCP);
    for key in [at_node, outside(at_node)] {
        assert_eq!(desired(&it, &key).expect("an entry").0.len(), 2, "{key}");
    }
    assert!(it.has_external());
    assert_eq!(desired(&it, &VipKey::wildcard(ip("172.18.0.11"))), None, "the other ports are the host's");
    assert_eq!(desired(&it, &outside(key(VIP4, 80, TCP))), None, "a cluster address is not for clients outside");
    it.take_dirty_services();
    // Another address takes the place of the first.
    it.handle(node("n1", &["172.18.0.12"], &["10.244.1.0/24"]).apply());
    let dirty: BTreeSet<_> = it.take_dirty_services().into_iter().collect();
    let moved = key("172.18.0.12", 30_080, TCP);
    assert!(dirty.is_superset(&[at_node, outside(at_node), moved, outside(moved)].into()), "{dirty:?}");
    assert!(desired(&it, &at_node).is_none() && desired(&it, &outside(moved)).is_some());
    it.handle(gone(Kind::Service, "web"));
    assert!(!it.has_external() && desired(&it, &outside(moved)).is_none());
}

/// Clients outside get the endpoints of this node alone, those inside all (kube-proxy's short-circuit).
#[test]
fn an_external_policy_of_local_is_for_clients_outside() {
    let web = service("web", &[VIP4]).tcp(80).node_port(30_080).external(&[BALANCER]);
    let it = published(Service { external_local: true, ..web });
    for (at, port) in [("172.18.0.11", 30_080), (BALANCER, 80)] {
        let inside = key(at, port, TCP);
        assert_eq!(desired(&it, &inside).expect("an entry").0.len(), 2, "{inside}");
        assert_eq!(desired(&it, &outside(inside)).expect("an entry").0.len(), 1, "{inside}");
    }
}

#[test]
fn a_load_balancers_address_has_wildcards_of_its_own() {
    let it = published(service("web", &[VIP4]).tcp(80).external(&[BALANCER]));
    let whole = VipKey::wildcard(ip(BALANCER));
    assert_eq!(desired(&it, &whole), Some((Vec::new(), VIP | SHARED)));
    assert_eq!(desired(&it, &outside(whole)), Some((Vec::new(), VIP)));
    assert_eq!(desired(&it, &VipKey::wildcard(ip(VIP4))), Some((Vec::new(), VIP)));
    assert_eq!(desired(&it, &outside(VipKey::wildcard(ip(VIP4)))), None);
    // One that is a cluster address of another Service: no machine outside has it.
    let mut it = published(service("web", &[VIP4]).tcp(80).external(&[VIP_OF_TWO]));
    it.handle(service("other", &[VIP_OF_TWO]).tcp(81).apply());
    assert_eq!(desired(&it, &VipKey::wildcard(ip(VIP_OF_TWO))), Some((Vec::new(), VIP)));
}

const VIP_OF_TWO: &str = "10.96.0.99";

/// `externalIPs` that name this node: its other ports stay the host's.
#[test]
fn an_external_ip_of_the_node() {
    let it = published(service("web", &[VIP4]).tcp(80).external(&["172.18.0.11"]));
    let at_node = key("172.18.0.11", 80, TCP);
    assert!(desired(&it, &at_node).is_some() && desired(&it, &outside(at_node)).is_some());
    let whole = VipKey::wildcard(ip("172.18.0.11"));
    assert!(desired(&it, &whole).is_none() && desired(&it, &outside(whole)).is_none());
}

#[test]
fn only_some_addresses_of_the_node_have_node_ports() {
    let in_range = || NodePortAddresses::In("192.0.2.0/24".parse().unwrap());
    for (node_ports, want) in [
        (vec![], ["172.18.0.11", "192.0.2.1", "198.51.100.1"].as_slice()),
        (vec![NodePortAddresses::Primary], &["172.18.0.11"]),
        (vec![in_range()], &["192.0.2.1"]),
        (vec![in_range(), NodePortAddresses::Primary], &["172.18.0.11", "192.0.2.1"]),
    ] {
        let mut it = Index::new(Settings { node_ports, ..Settings::new("n1", Routing::Vxlan) });
        it.set_host(host([
            device(1, "eth0", &["172.18.0.11/24", "192.0.2.1/24"]),
            device(2, "br0", &["198.51.100.1/24"]),
        ]));
        it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
        it.handle(service("web", &[VIP4]).tcp(80).node_port(30_080).apply());
        let mut at: Vec<_> =
            it.service_keys().filter(|key| key.port == 30_080 && key.scope == scope::EXTERNAL).collect();
        at.sort_unstable();
        let want: Vec<_> = want.iter().map(|address| outside(key(address, 30_080, TCP))).collect();
        assert_eq!(at, want);
    }
}

/// Where sockets of this host ask for Services, they do so at loopback addresses, too, and nobody outside does.
#[test]
fn node_ports_at_loopback_addresses() {
    let in_range = || NodePortAddresses::In("127.0.0.0/8".parse().unwrap());
    for (has_host_sockets, node_ports, want) in [
        (false, vec![], ["172.18.0.11"].as_slice()),
        (true, vec![], &["127.0.0.1", "172.18.0.11"]),
        (true, vec![NodePortAddresses::Primary], &["172.18.0.11"]),
        (true, vec![in_range()], &["127.0.0.1"]),
    ] {
        let settings = Settings { node_ports, has_host_sockets, ..Settings::new("n1", Routing::Vxlan) };
        let mut it = Index::new(settings);
        it.set_host(host([device(1, "eth0", &["172.18.0.11/24"])]));
        it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
        it.handle(service("web", &[VIP4]).tcp(80).node_port(30_080).apply());
        let mut at: Vec<_> = it.service_keys().filter(|key| key.port == 30_080).collect();
        at.sort_unstable();
        let cluster = want.iter().map(|address| key(address, 30_080, TCP));
        let external = cluster.clone().filter(|key| !key.ip.is_loopback()).map(outside);
        let mut want: Vec<_> = cluster.chain(external).collect();
        want.sort_unstable();
        assert_eq!(at, want);
    }
}

/// An external IP that is the cluster address of the same Service: one claim, and nothing is left of it.
#[test]
fn an_address_that_a_service_names_twice() {
    let web = || service("web", &[VIP4]).tcp(80).external(&[VIP4]);
    let mut it = published(web());
    let at_vip = key(VIP4, 80, TCP);
    assert!(it.problems().is_empty(), "{:?}", it.problems());
    assert!(desired(&it, &at_vip).is_some() && desired(&it, &outside(at_vip)).is_some());
    it.handle(gone(Kind::Service, "web"));
    it.handle(service("other", &[VIP4]).tcp(80).apply());
    assert_eq!(it.owner(&at_vip).expect("an owner").0.to_string(), "default/other");
    assert!(it.problems().is_empty() && desired(&it, &outside(at_vip)).is_none());
}

#[test]
fn services_without_an_endpoint_here_are_counted_by_policy() {
    let count = |service: Service, slice: EndpointSlice| {
        let it = index([service.apply(), slice.apply()]);
        let WithoutLocalEndpoints { internal, external } = it.count_without_local_endpoints();
        [internal, external]
    };
    let elsewhere = slice("web-1", "web", Family::V4).tcp(8080).endpoint(endpoint("10.244.2.5").on("n2"));
    let here = elsewhere.clone().endpoint(endpoint("10.244.1.5").on("n1").draining());
    let web = service("web", &[VIP4]).tcp(80);
    let external = Service { external_local: true, ..web.clone().node_port(30_080) };
    let internal = Service { internal_local: true, ..web.clone() };
    let hidden = Service { external_local: true, ..web };
    for (service, slice, want) in [
        (&external, &elsewhere, [0, 1]),
        (&internal, &elsewhere, [1, 0]),
        (&Service { internal_local: true, ..external.clone() }, &elsewhere, [1, 1]),
        (&external, &here, [0, 0]),
        (&internal, &slice("web-1", "web", Family::V4).tcp(8080), [0, 0]),
        (&hidden, &elsewhere, [0, 0]),
    ] {
        assert_eq!(count(service.clone(), slice.clone()), want, "{service:?}");
    }
}

/// Nodes' addresses are often external IPs, and those of load balancers: their other ports are the nodes' on all nodes.
#[test]
fn an_external_ip_of_another_node() {
    let (of_two, moved) = ("172.18.0.12", "172.18.0.13");
    let mut it = published(service("web", &[VIP4]).tcp(80).external(&[of_two, moved]));
    let wildcards = |of: &str| [VipKey::wildcard(ip(of)), outside(VipKey::wildcard(ip(of)))];
    let is_served = |it: &Index, of: &str| wildcards(of).map(|key| desired(it, &key).is_some());
    assert_eq!(is_served(&it, of_two), [true, true], "no node has it yet");
    it.take_dirty_services();
    it.handle(node("n2", &[of_two], &["10.244.2.0/24"]).apply());
    let dirty: BTreeSet<_> = it.take_dirty_services().into_iter().collect();
    assert!(dirty.is_superset(&wildcards(of_two).into()), "{dirty:?}");
    assert_eq!((is_served(&it, of_two), is_served(&it, moved)), ([false, false], [true, true]));
    assert!(desired(&it, &key(of_two, 80, TCP)).is_some() && desired(&it, &outside(key(of_two, 80, TCP))).is_some());
    assert!(!it.service_keys().any(|key| wildcards(of_two).contains(&key)));
    // Another node claims it, too; then the first has another, then none.
    it.handle(node("n3", &[of_two], &["10.244.3.0/24"]).apply());
    it.handle(node("n2", &[moved], &["10.244.2.0/24"]).apply());
    assert_eq!((is_served(&it, of_two), is_served(&it, moved)), ([false, false], [false, false]));
    it.take_dirty_services();
    it.handle(gone(Kind::Node, "n2"));
    it.handle(gone(Kind::Node, "n3"));
    let dirty: BTreeSet<_> = it.take_dirty_services().into_iter().collect();
    assert!(dirty.is_superset(&wildcards(moved).into()) && dirty.is_superset(&wildcards(of_two).into()), "{dirty:?}");
    assert_eq!((is_served(&it, of_two), is_served(&it, moved)), ([true, true], [true, true]));
}

/// An external IP that is the Service's own cluster address, and a node port that is its port at an external IP of the node: one
/// entry each, wanted twice.
#[test]
fn an_entry_that_a_service_wants_twice() {
    let own = "172.18.0.11";
    let twice = || service("web", &[VIP4]).tcp(30_080).node_port(30_080).external(&[VIP4, own]);
    let keys = [key(VIP4, 30_080, TCP), key(own, 30_080, TCP), outside(key(own, 30_080, TCP))];
    let mut it = published(twice());
    for key in &keys {
        assert_eq!(desired(&it, key).map(|it| it.0.len()), Some(2), "{key}");
    }
    // The younger one gets what the first leaves.
    it.handle(service("other", &["10.96.0.99"]).created(9).tcp(30_080).external(&[VIP4, own]).apply());
    it.handle(gone(Kind::Service, "web"));
    for key in &keys {
        assert_eq!(it.owner(key).map(|it| it.0.to_string()), Some("default/other".to_owned()), "{key}");
    }
    assert!(problems(&it).is_empty(), "{:?}", problems(&it));
    it.handle(gone(Kind::Service, "other"));
    assert!(keys.iter().all(|key| desired(&it, key).is_none()) && !it.has_external());
}

/// The ranges of each entry, by its text.
fn ranges(it: &Index) -> Vec<(String, Vec<String>)> {
    let entries = it.desired_ranges().into_iter().flat_map(|of| of.entries);
    entries.map(|(key, all)| (key.to_string(), all.iter().map(ToString::to_string).collect())).collect()
}

/// Only the load balancer's addresses, for clients in the cluster and outside.
#[test]
fn source_ranges_are_of_the_load_balancers_entries() {
    const BALANCER6: &str = "2001:db8:7::7";
    let web = || service("web", &[VIP4, VIP6]).tcp(80).node_port(30_080).external(&["198.51.100.7"]);
    let balanced = || web().balanced(&[BALANCER, BALANCER6]);
    let mut it = published(balanced().source_ranges(&["192.0.2.0/24", "198.51.100.0/24"]));
    let at = key(BALANCER, 80, TCP);
    let flags = |it: &Index, key: VipKey| desired(it, &key).expect("an entry").1;
    assert_eq!(flags(&it, outside(at)), SOURCE_RANGES);
    assert_eq!(flags(&it, at), SOURCE_RANGES);
    for open in [key(VIP4, 80, TCP), key("198.51.100.7", 80, TCP), key("172.18.0.11", 30_080, TCP)] {
        assert_eq!(flags(&it, open), 0, "{open}");
    }
    for open in [key("198.51.100.7", 80, TCP), key("172.18.0.11", 30_080, TCP)] {
        assert_eq!(flags(&it, outside(open)), 0, "{open}");
    }
    let both = vec!["192.0.2.0/24".to_owned(), "198.51.100.0/24".to_owned()];
    let (four, six) = (outside(at).to_string(), outside(key(BALANCER6, 80, TCP)).to_string());
    assert_eq!(ranges(&it), [(four.clone(), both), (six.clone(), Vec::new())]);
    assert!(it.take_ranges_dirty() && !it.take_ranges_dirty());
    // Of one family: the other is closed.
    it.handle(balanced().source_ranges(&["2001:db8::/32"]).apply());
    assert!(it.take_ranges_dirty());
    assert_eq!(ranges(&it), [(four.clone(), Vec::new()), (six, vec!["2001:db8::/32".to_owned()])]);
    assert_eq!(flags(&it, outside(at)), SOURCE_RANGES);
    // Another Service has the entry.
    let older = service("older", &["10.96.0.99"]).tcp(80).balanced(&[BALANCER]).created(-1);
    it.handle(older.apply());
    assert!(it.take_ranges_dirty());
    assert_eq!((ranges(&it).len(), flags(&it, outside(at))), (1, 0));
    it.handle(gone(Kind::Service, "older"));
    assert!(it.take_ranges_dirty() && ranges(&it).iter().any(|(key, _)| *key == four));
    it.handle(balanced().apply());
    assert!(it.take_ranges_dirty() && ranges(&it).is_empty());
    assert_eq!(flags(&it, outside(at)), 0);
    // Nobody has ranges any more.
    it.handle(web().apply());
    assert!(!it.take_ranges_dirty());
}

/// The oldest Service comes first: what does not fit is of the youngest.
#[test]
fn source_ranges_of_the_oldest_service_first() {
    let named = |name, at, created| service(name, &[]).tcp(80).balanced(&[at]).created(created).source_ranges(&[]);
    let mut it = index([named("a", "203.0.113.1", 3).apply(), named("b", "203.0.113.2", 1).apply()]);
    it.handle(named("c", "203.0.113.3", 2).apply());
    let names: Vec<_> = it.desired_ranges().into_iter().map(|of| of.service.to_string()).collect();
    assert_eq!(names, ["default/b", "default/c", "default/a"]);
}

/// A server that is its Service's backend at the very node port may bind that port.
#[test]
fn a_backend_of_this_node_at_the_node_port_is_marked() {
    let settings = Settings { has_host_sockets: true, ..Settings::new("n1", Routing::Vxlan) };
    for (port, addr, marked) in [(30_080, "172.18.0.11", OWN_PORT), (8080, "172.18.0.11", 0), (30_080, "10.244.1.5", 0)]
    {
        let mut it = Index::new(settings.clone());
        it.set_host(host([device(2, "eth0", &["172.18.0.11/24"])]));
        it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
        it.handle(service("web", &[VIP4]).tcp(80).node_port(30_080).apply());
        it.handle(slice("web-1", "web", Family::V4).tcp(port).ready(&[addr]).apply());
        let flags = |at: &str| desired(&it, &key(at, 30_080, TCP)).expect("an entry").1;
        assert_eq!((flags("127.0.0.1"), flags("172.18.0.11")), (marked, 0), "{addr}:{port}");
    }
}
