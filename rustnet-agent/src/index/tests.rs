//! Events in, desired entries and peers out.

mod external;
mod health_checks;
mod service_cidrs;

use super::VipKey;
use super::{Choice, DesiredBackend, Gate, Index};
use crate::config::Routing;
use crate::host::HostFacts;
use crate::host::build::{device, host};
use crate::model::build::{endpoint, ip, node, service, slice};
use crate::model::{Condition, EndpointSlice, Family, ObjectName, Pod, Problem};
use crate::source::{Event, Kind, Object, ObjectRef, Origin};
use crate::ways::Settings;
use rustnet_common::backend::flags::{LOCAL, TERMINATING};
use rustnet_common::peer::{Peer, flags as peer, identity};
use rustnet_common::service::flags::{DROP_EMPTY, VIP};
use rustnet_common::tuple::proto::{TCP, UDP};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

const VIP4: &str = "10.96.0.10";
const VIP6: &str = "fd00:96::10";

fn settings(routing: Routing) -> Settings {
    Settings::new("n1", routing)
}

fn index(events: impl IntoIterator<Item = Event>) -> Index {
    let mut index = Index::new(settings(Routing::Vxlan));
    index.set_host(HostFacts::default());
    index.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).zone("z1").apply());
    for event in events {
        index.handle(event);
    }
    index
}

fn key(vip: &str, port: u16, proto: u8) -> VipKey {
    VipKey { ip: ip(vip), port, proto, scope: 0 }
}

/// Addresses and ports as text, with the flags of the backends and of the service.
fn desired(index: &Index, key: &VipKey) -> Option<(Vec<(String, u16)>, u16)> {
    let mut choice = Choice::default();
    let service = index.desired_service(key, &mut choice)?;
    let text = |b: &DesiredBackend| (format!("{} {}", b.addr, b.port), b.flags);
    Some((choice.backends.iter().map(text).collect(), service.flags))
}

#[track_caller]
fn expect(index: &Index, key: &VipKey, backends: &[(&str, u16)], flags: u16) {
    let want = backends.iter().map(|(text, flags)| ((*text).to_owned(), *flags)).collect();
    assert_eq!(desired(index, key), Some((want, flags)));
}

fn problems(index: &Index) -> Vec<String> {
    index.problems().iter().map(ToString::to_string).collect()
}

fn gone(kind: Kind, name: &str) -> Event {
    let name = if kind == Kind::Node { ObjectName::cluster(name) } else { ObjectName::namespaced("default", name) };
    Event::Delete(ObjectRef { kind, name })
}

#[test]
fn slices_are_united_sorted_and_deduplicated() {
    let it = index([
        slice("b", "web", Family::V4).tcp(8080).ready(&["10.244.2.3", "10.244.1.2"]).apply(),
        service("web", &[VIP4]).tcp(80).apply(),
        slice("a", "web", Family::V4).tcp(8080).ready(&["10.244.2.3", "10.244.2.2"]).apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 8080", 0), ("10.244.2.2 8080", 0), ("10.244.2.3 8080", 0)], 0);
    assert_eq!(desired(&it, &VipKey::wildcard(ip(VIP4))), Some((Vec::new(), VIP)));
    assert_eq!(desired(&it, &key(VIP4, 81, TCP)), None);
    assert_eq!(desired(&it, &key(VIP4, 80, UDP)), None);
}

#[test]
fn each_family_has_its_own_slices() {
    let it = index([
        service("web", &[VIP4, VIP6]).tcp(80).apply(),
        slice("a", "web", Family::V4).tcp(8080).ready(&["10.244.1.2"]).apply(),
        slice("b", "web", Family::V6).tcp(8081).ready(&["fd00:244::2"]).apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 8080", 0)], 0);
    expect(&it, &key(VIP6, 80, TCP), &[("fd00:244::2 8081", 0)], 0);
}

#[test]
fn a_named_port_may_have_another_number_in_each_slice() {
    let it = index([
        service("web", &[VIP4]).port("http", 80, TCP).port("dns", 53, UDP).port("dns-tcp", 53, TCP).apply(),
        slice("a", "web", Family::V4).port("http", 8080, TCP).port("dns", 5353, UDP).ready(&["10.244.1.2"]).apply(),
        slice("b", "web", Family::V4).port("http", 9090, TCP).port("dns", 53, TCP).ready(&["10.244.2.2"]).apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 8080", 0), ("10.244.2.2 9090", 0)], 0);
    // The name alone is not enough: the protocol must match too.
    expect(&it, &key(VIP4, 53, UDP), &[("10.244.1.2 5353", 0)], 0);
    expect(&it, &key(VIP4, 53, TCP), &[], 0);
}

#[test]
fn draining_endpoints_serve_only_when_none_is_ready() {
    let draining = slice("a", "web", Family::V4)
        .tcp(80)
        .endpoint(endpoint("10.244.1.2").on("n1").draining())
        .endpoint(endpoint("10.244.2.2").on("n2").draining())
        .endpoint(endpoint("10.244.2.3").on("n2").unusable());
    let mut it = index([service("web", &[VIP4]).tcp(80).apply(), draining.apply()]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", LOCAL | TERMINATING), ("10.244.2.2 80", TERMINATING)], 0);
    it.handle(slice("b", "web", Family::V4).tcp(80).ready(&["10.244.2.9"]).apply());
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.2.9 80", 0)], 0);
}

#[test]
fn what_still_serves_but_gets_no_new_flows_is_distinguished() {
    let it = index([
        service("web", &[VIP4]).tcp(80).apply(),
        slice("a", "web", Family::V4)
            .tcp(80)
            .endpoint(endpoint("10.244.1.1").draining())
            .endpoint(endpoint("10.244.1.2"))
            .endpoint(crate::model::Endpoint { condition: Condition::Holding, ..endpoint("10.244.1.3") })
            .endpoint(endpoint("10.244.1.4").unusable())
            .apply(),
    ]);
    let mut choice = Choice::default();
    it.desired_service(&key(VIP4, 80, TCP), &mut choice).unwrap();
    assert_eq!(choice.backends.iter().map(|b| b.addr).collect::<Vec<_>>(), [ip("10.244.1.2")]);
    assert_eq!(choice.serving, [(ip("10.244.1.1"), 80), (ip("10.244.1.3"), 80)]);
}

#[test]
fn internal_policy_local_takes_local_ones_or_drops() {
    let local_only = || crate::model::Service { internal_local: true, ..service("web", &[VIP4]).tcp(80) };
    let mut it = index([local_only().apply()]);
    // Nothing anywhere: refuse. Something elsewhere: drop.
    expect(&it, &key(VIP4, 80, TCP), &[], 0);
    let elsewhere = || slice("a", "web", Family::V4).tcp(80).endpoint(endpoint("10.244.2.2").on("n2"));
    it.handle(elsewhere().apply());
    expect(&it, &key(VIP4, 80, TCP), &[], DROP_EMPTY);
    // The local set falls back to draining ones by itself, though another node has a ready one.
    it.handle(elsewhere().endpoint(endpoint("10.244.1.2").on("n1").draining()).apply());
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", LOCAL | TERMINATING)], 0);
    it.handle(elsewhere().endpoint(endpoint("10.244.1.3").on("n1")).apply());
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.3 80", LOCAL)], 0);
    // Topology hints are nothing to it.
    it.handle(elsewhere().endpoint(endpoint("10.244.1.3").on("n1").hints(&["n2"], &["z2"])).apply());
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.3 80", LOCAL)], 0);
}

#[test]
fn hints_narrow_only_if_all_ready_endpoints_have_them_and_one_is_mine() {
    let with = |endpoints: Vec<crate::model::Endpoint>| {
        let slice = endpoints.into_iter().fold(slice("a", "web", Family::V4).tcp(80), EndpointSlice::endpoint);
        let it = index([service("web", &[VIP4]).tcp(80).apply(), slice.apply()]);
        let (backends, _) = desired(&it, &key(VIP4, 80, TCP)).unwrap();
        backends.into_iter().map(|(text, _)| text).collect::<Vec<_>>().join(", ")
    };
    let (a, b) = (|| endpoint("10.244.1.2"), || endpoint("10.244.2.2"));
    let both = "10.244.1.2 80, 10.244.2.2 80";
    assert_eq!(with(vec![a().hints(&["n1"], &[]), b().hints(&["n2"], &[])]), "10.244.1.2 80");
    assert_eq!(with(vec![a().hints(&[], &["z2"]), b().hints(&[], &["z1", "z3"])]), "10.244.2.2 80");
    // Nodes go before zones.
    assert_eq!(with(vec![a().hints(&["n1"], &["z2"]), b().hints(&["n2"], &["z1"])]), "10.244.1.2 80");
    // No node hint names me: the zone decides.
    assert_eq!(with(vec![a().hints(&["n3"], &["z2"]), b().hints(&["n2"], &["z1"])]), "10.244.2.2 80");
    // One without hints, or none for me: all.
    assert_eq!(with(vec![a().hints(&["n1"], &["z1"]), b()]), both);
    assert_eq!(with(vec![a().hints(&["n3"], &["z3"]), b().hints(&["n2"], &["z2"])]), both);
    // Those that are not ready have no say.
    assert_eq!(with(vec![a().hints(&["n1"], &[]), b().draining(), endpoint("10.244.3.2").unusable()]), "10.244.1.2 80");
    // Nor do hints matter among draining ones.
    assert_eq!(with(vec![a().hints(&["n1"], &[]).draining(), b().hints(&["n2"], &[]).draining()]), both);
}

#[test]
fn zone_hints_without_a_zone_mean_all() {
    let mut it = index([
        service("web", &[VIP4]).tcp(80).apply(),
        slice("a", "web", Family::V4)
            .tcp(80)
            .endpoint(endpoint("10.244.1.2").hints(&[], &["z1"]))
            .endpoint(endpoint("10.244.2.2").hints(&[], &["z2"]))
            .apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", 0)], 0);
    it.take_dirty_services();
    it.handle(node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply());
    assert!(it.take_dirty_services().contains(&key(VIP4, 80, TCP)));
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", 0), ("10.244.2.2 80", 0)], 0);
}

#[test]
fn of_two_copies_of_an_endpoint_the_better_one_counts() {
    let it = index([
        service("web", &[VIP4]).tcp(80).apply(),
        slice("a", "web", Family::V4).tcp(80).endpoint(endpoint("10.244.1.2").unusable()).apply(),
        slice("b", "web", Family::V4).tcp(80).endpoint(endpoint("10.244.1.2").draining()).apply(),
        slice("c", "web", Family::V4).tcp(80).ready(&["10.244.1.2"]).apply(),
        slice("d", "web", Family::V4).tcp(80).endpoint(endpoint("10.244.1.2").on("n1").draining()).apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", LOCAL)], 0);
}

#[test]
fn one_change_touches_one_service() {
    let mut it = index([
        service("web", &[VIP4, VIP6]).tcp(80).port("alt", 81, TCP).apply(),
        service("other", &["10.96.0.11"]).tcp(80).apply(),
    ]);
    it.take_dirty_services();
    let web = || slice("a", "web", Family::V4).tcp(8080).ready(&["10.244.1.2"]);
    it.handle(web().apply());
    let mut dirty = it.take_dirty_services();
    dirty.sort();
    assert_eq!(dirty, [key(VIP4, 80, TCP), key(VIP4, 81, TCP), key(VIP6, 80, TCP), key(VIP6, 81, TCP)]);
    // The same again, and things of services that nobody knows, touch nothing.
    it.handle(web().apply());
    it.handle(service("other", &["10.96.0.11"]).tcp(80).apply());
    it.handle(slice("x", "unknown", Family::V4).tcp(1).ready(&["10.244.1.9"]).apply());
    it.handle(gone(Kind::Slice, "x"));
    it.handle(gone(Kind::Service, "never-was"));
    assert_eq!(it.take_dirty_services(), []);
}

#[test]
fn a_slice_can_change_its_service() {
    let mut it = index([
        service("web", &[VIP4]).tcp(80).apply(),
        service("other", &["10.96.0.11"]).tcp(80).apply(),
        slice("a", "web", Family::V4).tcp(80).ready(&["10.244.1.2"]).apply(),
    ]);
    it.handle(slice("a", "other", Family::V4).tcp(80).ready(&["10.244.1.2"]).apply());
    expect(&it, &key(VIP4, 80, TCP), &[], 0);
    expect(&it, &key("10.96.0.11", 80, TCP), &[("10.244.1.2 80", 0)], 0);
    it.handle(gone(Kind::Slice, "a"));
    expect(&it, &key("10.96.0.11", 80, TCP), &[], 0);
}

#[test]
fn the_older_service_has_the_address() {
    let mut it = index([
        slice("y", "young", Family::V4).tcp(1).ready(&["10.244.1.1"]).apply(),
        slice("o", "old", Family::V4).tcp(2).ready(&["10.244.1.2"]).apply(),
        slice("z", "zold", Family::V4).tcp(3).ready(&["10.244.1.3"]).apply(),
        service("young", &[VIP4]).tcp(80).port("b", 81, TCP).created(20).apply(),
        service("zold", &[VIP4]).tcp(80).created(10).apply(),
        service("old", &[VIP4]).tcp(80).created(10).apply(),
    ]);
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 2", 0)], 0);
    assert_eq!(it.owner(&key(VIP4, 80, TCP)).unwrap().0.as_str(), "default/old");
    let remedy = "10.96.0.10:80/TCP belongs to the older Service default/old; give one of them another address or port";
    assert_eq!(
        problems(&it),
        [
            format!("Service default/zold: spec.clusterIPs: {remedy}"),
            format!("Service default/young: spec.clusterIPs: {remedy}"),
        ]
    );
    // Another port of the same address is nobody's harm.
    assert_eq!(it.owner(&key(VIP4, 81, TCP)).unwrap().0.as_str(), "default/young");
    it.handle(gone(Kind::Service, "old"));
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.3 3", 0)], 0);
    it.handle(gone(Kind::Service, "zold"));
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.1 1", 0)], 0);
    assert_eq!(problems(&it), [""; 0]);
    it.handle(gone(Kind::Service, "young"));
    assert_eq!(desired(&it, &key(VIP4, 80, TCP)), None);
    assert_eq!(desired(&it, &VipKey::wildcard(ip(VIP4))), None);
    assert_eq!(it.service_keys().count(), 0);
}

#[test]
fn an_address_of_this_node_is_never_claimed() {
    let mut it =
        index([service("web", &["172.18.0.11"]).tcp(80).apply(), service("b", &["172.18.0.99"]).tcp(80).apply()]);
    assert_eq!(desired(&it, &key("172.18.0.11", 80, TCP)), None);
    assert_eq!(desired(&it, &VipKey::wildcard(ip("172.18.0.11"))), None);
    assert_eq!(it.service_keys().count(), 2);
    let texts = problems(&it);
    assert_eq!(texts.len(), 1);
    assert!(
        texts[0].starts_with("Service default/web: spec.clusterIPs: 172.18.0.11 is an address of node n1"),
        "{texts:?}"
    );
    // It comes and goes with the address.
    it.take_dirty_services();
    it.set_host(host([device(2, "eth0", &["172.18.0.99/24"])]));
    let mut dirty = it.take_dirty_services();
    dirty.sort();
    assert_eq!(dirty, [VipKey::wildcard(ip("172.18.0.99")), key("172.18.0.99", 80, TCP)]);
    assert_eq!(desired(&it, &key("172.18.0.99", 80, TCP)), None);
    it.handle(node("n1", &["172.18.0.12"], &["10.244.1.0/24"]).apply());
    expect(&it, &key("172.18.0.11", 80, TCP), &[], 0);
}

#[test]
fn what_a_fresh_list_does_not_name_is_gone() {
    let mut it = index([
        service("web", &[VIP4]).tcp(80).apply(),
        service("gone", &["10.96.0.11"]).tcp(80).apply(),
        slice("a", "web", Family::V4).tcp(80).ready(&["10.244.1.2"]).apply(),
        Event::Synced(Kind::Service),
        Event::Restart(Kind::Service),
        service("web", &[VIP4]).tcp(80).apply(),
    ]);
    assert!(desired(&it, &key("10.96.0.11", 80, TCP)).is_some());
    it.handle(Event::Synced(Kind::Service));
    assert_eq!(desired(&it, &key("10.96.0.11", 80, TCP)), None);
    // Other kinds are untouched, and a list that began again counts from its last beginning.
    expect(&it, &key(VIP4, 80, TCP), &[("10.244.1.2 80", 0)], 0);
    it.handle(Event::Restart(Kind::Slice));
    it.handle(slice("a", "web", Family::V4).tcp(80).ready(&["10.244.1.2"]).apply());
    it.handle(Event::Restart(Kind::Slice));
    it.handle(Event::Synced(Kind::Slice));
    expect(&it, &key(VIP4, 80, TCP), &[], 0);
}

/// The same name on another node is another pod, whose addresses are none of this node's.
#[test]
fn a_pod_that_is_elsewhere_now_is_forgotten() {
    let pod = |node: &str| {
        let (name, addresses) = (ObjectName::namespaced("shop", "db-0"), ["10.244.1.5".parse().unwrap()].into());
        let pod = Pod {
            name,
            uid: "u".into(),
            node: node.into(),
            addresses,
            host_network: false,
            host_ports: false,
            socket_lb: None,
            labels: crate::model::Labels::default(),
            ports: Box::default(),
            problems: Box::default(),
        };
        Event::Apply(Object::Pod(Arc::new(pod)))
    };
    let mut it = index([pod("n1")]);
    assert_eq!(it.pods().count(), 1);
    it.handle(pod("n2"));
    assert_eq!(it.pods().count(), 0);
}

/// Nobody else watches them.
#[test]
fn what_is_wrong_with_a_pod_is_reported_by_its_node() {
    let pod = |node: &str| {
        let name = ObjectName::namespaced("shop", "db-0");
        let problems = [Problem::new(&"Pod shop/db-0".into(), "metadata", "bad")].into();
        let addresses = Box::default();
        let (host_network, host_ports, socket_lb) = (false, false, None);
        let (labels, ports) = (crate::model::Labels::default(), Box::default());
        let (uid, node) = ("u".into(), node.into());
        let pod = Pod { name, uid, node, addresses, host_network, host_ports, socket_lb, labels, ports, problems };
        Event::Apply(Object::Pod(Arc::new(pod)))
    };
    let of_node = |index: &Index| {
        let own = index.problems_of_this_node("API server");
        own.iter().map(ToString::to_string).filter(|text| text.contains("shop")).collect::<Vec<_>>()
    };
    let mut it = index([pod("n1")]);
    assert_eq!((of_node(&it), problems(&it).len()), (vec!["Pod shop/db-0: metadata: bad".to_owned()], 1));
    it.handle(pod("n2"));
    assert_eq!((of_node(&it), problems(&it).len()), (Vec::new(), 0));
}

#[test]
fn synced_means_all_required_kinds() {
    let mut it = index([Event::Synced(Kind::Service), Event::Synced(Kind::Slice)]);
    assert!(!it.synced());
    it.handle(Event::Synced(Kind::Node));
    assert!(it.synced());
    it.handle(Event::Restart(Kind::Node));
    assert!(it.synced(), "a relist must not stop anything");
}

#[test]
fn a_kind_that_cannot_be_had_holds_up_only_what_follows_from_it() {
    let it = index([Event::Synced(Kind::Node)]);
    assert!(it.is_open(Gate::Peers) && !it.is_open(Gate::Services));
    let mut it = Index::new(settings(Routing::Vxlan));
    it.handle(Event::Synced(Kind::Node));
    assert!(!it.is_open(Gate::Peers), "without the host no node has a way");

    let mut it = index([Event::Synced(Kind::Service), Event::Synced(Kind::Slice)]);
    let of_gates = |it: &Index| Gate::ALL.map(|gate| it.is_open(gate));
    assert_eq!(of_gates(&it), [false, false, false], "this node's zone may come any moment");
    let refused = |kind| {
        let problem = Problem::new(&"watch".into(), "", "refused");
        Event::Report { origin: Origin::Watch(kind), problems: [problem].into() }
    };
    it.handle(refused(Kind::Pod));
    assert_eq!(of_gates(&it), [false, false, false], "nothing is wrong with Nodes");
    it.handle(refused(Kind::Node));
    assert_eq!(of_gates(&it), [true, false, false]);
    for (kind, is_open) in
        [(Kind::Namespace, false), (Kind::NetworkPolicy, false), (Kind::Pod, false), (Kind::ClusterNetworkPolicy, true)]
    {
        it.handle(Event::Synced(kind));
        assert_eq!(it.is_open(Gate::Policies), is_open, "{kind}");
    }
    assert!(!it.synced(), "the node is not ready");
}

/// What was known of it goes on; its deletion is one.
#[test]
fn an_object_that_cannot_be_read_stays_as_it_was() {
    let reference = ObjectRef { kind: Kind::Service, name: ObjectName::namespaced("default", "web") };
    let mut it = index([]);
    it.handle(service("web", &[VIP4]).tcp(80).apply());
    let known = it.known(Kind::Service).len();
    let bad = Problem::new(&"Service default/web".into(), "", "cannot be read");
    it.handle(Event::Restart(Kind::Service));
    it.handle(Event::Unreadable(reference.clone(), [bad.clone()].into()));
    it.handle(Event::Synced(Kind::Service));
    assert_eq!((it.known(Kind::Service).len(), it.problems()), (known, vec![bad]));
    it.handle(Event::Delete(reference));
    assert_eq!((it.known(Kind::Service).len(), it.problems().len()), (known - 1, 0));
}

/// Nothing of a policy is known, so that it must not leave its namespace open.
#[test]
fn a_policy_that_cannot_be_read_allows_nothing() {
    let name = ObjectName::namespaced("default", "p");
    let reference = ObjectRef { kind: Kind::NetworkPolicy, name: name.clone() };
    let mut it = index([]);
    it.handle(Event::Unreadable(reference.clone(), Box::default()));
    assert!(it.desired_policies().is_enforced);
    assert_eq!(it.known(Kind::NetworkPolicy).len(), 1);
    // One that is known stays as it was.
    let open = crate::model::NetworkPolicy { ingress: None, ..crate::model::NetworkPolicy::closing(name) };
    it.handle(Event::Apply(Object::NetworkPolicy(Arc::new(open))));
    it.take_policies_dirty();
    it.handle(Event::Unreadable(reference.clone(), Box::default()));
    assert!(!it.take_policies_dirty());
    it.handle(Event::Delete(reference));
    assert!(!it.desired_policies().is_enforced);
}

/// Each node would report those of all others.
#[test]
fn pods_of_other_nodes_that_cannot_be_read_are_not_reported() {
    let reference = ObjectRef { kind: Kind::Pod, name: ObjectName::namespaced("default", "far") };
    let mut it = index([]);
    it.handle(Event::Unreadable(reference, [Problem::new(&"Pod default/far".into(), "", "cannot be read")].into()));
    assert_eq!(it.problems(), []);
}

#[test]
fn problems_go_when_their_cause_goes() {
    let subject = "Service default/web".into();
    let bad = Problem::new(&subject, "spec", "bad");
    let reference = ObjectRef { kind: Kind::Service, name: ObjectName::namespaced("default", "web") };
    let mut it = index([]);
    it.handle(service("web", &[VIP4]).tcp(80).apply());
    it.handle(Event::Reject(reference.clone(), [bad.clone()].into()));
    assert_eq!(problems(&it), ["Service default/web: spec: bad"]);
    assert_eq!(desired(&it, &key(VIP4, 80, TCP)), None);
    // Nor does a fresh list that names it hide what is wrong with it.
    it.handle(Event::Restart(Kind::Service));
    it.handle(Event::Reject(reference, [bad.clone()].into()));
    it.handle(Event::Synced(Kind::Service));
    assert_eq!(problems(&it), ["Service default/web: spec: bad"]);
    it.handle(service("web", &[VIP4]).tcp(80).apply());
    assert_eq!(problems(&it), [""; 0]);
    it.handle(Event::Report { origin: "web.yaml".into(), problems: [bad].into() });
    assert_eq!(problems(&it).len(), 1);
    it.handle(Event::Report { origin: "web.yaml".into(), problems: Box::default() });
    assert_eq!(problems(&it), [""; 0]);
}

fn peers(settings: Settings, events: impl IntoIterator<Item = Event>) -> (BTreeMap<String, Peer>, Vec<String>) {
    peers_on(HostFacts::default(), settings, events)
}

fn peers_on(
    host: HostFacts,
    settings: Settings,
    events: impl IntoIterator<Item = Event>,
) -> (BTreeMap<String, Peer>, Vec<String>) {
    let mut it = Index::new(settings);
    it.set_host(host);
    for event in events {
        it.handle(event);
    }
    let peers = it.desired_peers().into_iter().map(|(prefix, peer)| (prefix.to_string(), peer)).collect();
    (peers, problems(&it))
}

fn entry(node: &str, identity: u32, flags: u16) -> Peer {
    Peer { node: ip(node).into(), identity, flags, pad: 0 }
}

fn none(identity: u32, flags: u16) -> Peer {
    entry("::", identity, flags)
}

fn three_nodes() -> [Event; 2] {
    [
        node("n1", &["172.18.0.11", "fd00:18::11"], &["10.244.1.0/24", "fd00:244:0:1::/64"]).apply(),
        node("n2", &["172.18.0.12", "fd00:18::12"], &["10.244.2.0/24", "fd00:244:0:2::/64"]).apply(),
    ]
}

#[test]
fn peers_in_vxlan() {
    let mut settings = settings(Routing::Vxlan);
    settings.no_masquerade = vec!["10.0.0.0/8".parse().unwrap(), "172.18.0.0/16".parse().unwrap()];
    let (got, problems) = peers_on(host([device(2, "eth0", &["192.0.2.1/24"])]), settings, three_nodes());
    let want = [
        ("192.0.2.1/32", none(identity::HOST, peer::HOST)),
        ("172.18.0.11/32", none(identity::HOST, peer::HOST)),
        ("fd00:18::11/128", none(identity::HOST, peer::HOST)),
        ("10.244.1.0/24", none(identity::POD, peer::LOCAL_PODS)),
        ("fd00:244:0:1::/64", none(identity::POD, peer::LOCAL_PODS)),
        // A range that covers a node's address would be hidden by it: the address takes it over.
        ("172.18.0.12/32", entry("172.18.0.12", identity::NODE, peer::NODE | peer::TUNNEL | peer::NO_MASQ)),
        ("fd00:18::12/128", entry("172.18.0.12", identity::NODE, peer::NODE | peer::TUNNEL)),
        ("10.244.2.0/24", entry("172.18.0.12", identity::POD, peer::POD | peer::TUNNEL)),
        ("fd00:244:0:2::/64", entry("172.18.0.12", identity::POD, peer::POD | peer::TUNNEL)),
        ("10.0.0.0/8", none(identity::WORLD, peer::NO_MASQ)),
        ("172.18.0.0/16", none(identity::WORLD, peer::NO_MASQ)),
    ];
    assert_eq!(got, want.map(|(prefix, peer)| (prefix.to_owned(), peer)).into());
    assert_eq!(problems, [""; 0]);
}

#[test]
fn peers_in_native_routing() {
    let own = host([device(2, "eth0", &["172.18.0.11/24", "fd00:18::11/64"])]);
    let (got, problems) = peers_on(own, settings(Routing::Native), three_nodes());
    assert_eq!(got["172.18.0.12/32"], entry("172.18.0.12", identity::NODE, peer::NODE));
    assert_eq!(got["10.244.2.0/24"], entry("172.18.0.12", identity::POD, peer::POD));
    assert_eq!(got["fd00:244:0:2::/64"], entry("fd00:18::12", identity::POD, peer::POD));
    assert_eq!(problems, [""; 0]);
}

#[test]
fn peers_in_direct_and_vxlan_routing() {
    let settings = settings(Routing::DirectAndVxlan);
    let own = || host([device(2, "eth0", &["172.18.0.11/24", "fd00:18::11/64"])]);
    let far = node("n3", &["172.18.3.13", "fd00:18::13"], &["10.244.3.0/24", "fd00:244:0:3::/64"]).apply();
    let (got, problems) = peers_on(own(), settings.clone(), three_nodes().into_iter().chain([far.clone()]));
    let (node, pod, tunnel) = (identity::NODE, identity::POD, peer::TUNNEL);
    for (prefix, want) in [
        ("172.18.0.12/32", entry("172.18.0.12", node, peer::NODE)),
        ("10.244.2.0/24", entry("172.18.0.12", pod, peer::POD)),
        ("fd00:244:0:2::/64", entry("fd00:18::12", pod, peer::POD)),
        ("172.18.3.13/32", entry("172.18.3.13", node, peer::NODE | tunnel)),
        ("10.244.3.0/24", entry("172.18.3.13", pod, peer::POD | tunnel)),
        // By family: what is on the link is reached there.
        ("fd00:18::13/128", entry("fd00:18::13", node, peer::NODE)),
        ("fd00:244:0:3::/64", entry("fd00:18::13", pod, peer::POD)),
    ] {
        assert_eq!(got[prefix], want, "{prefix}");
    }
    assert_eq!(problems, [""; 0]);
    // Once the networks of the uplinks are known, and when they change.
    let mut it = Index::new(settings);
    it.handle(far);
    assert_eq!(it.desired_peers()[&"fd00:244:0:3::/64".parse().unwrap()].flags, peer::POD | tunnel);
    it.take_peers_dirty();
    assert!(it.set_host(own()) && it.take_peers_dirty());
    assert_eq!(it.desired_peers()[&"fd00:244:0:3::/64".parse().unwrap()].flags, peer::POD);
    assert!(!it.set_host(own()));
}

#[test]
fn an_ipv6_underlay() {
    let it = Settings { overlay_family: Some(Family::V6), ..settings(Routing::Vxlan) };
    let (got, _) = peers(it, three_nodes());
    assert_eq!(got["10.244.2.0/24"], entry("fd00:18::12", identity::POD, peer::POD | peer::TUNNEL));
}

#[test]
fn a_node_that_the_overlay_cannot_reach() {
    let lone = node("n2", &["fd00:18::12"], &["10.244.2.0/24"]).apply();
    let own = || node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).apply();
    let (got, problems) = peers(settings(Routing::Vxlan), [own(), lone.clone()]);
    assert_eq!(got["fd00:18::12/128"], entry("fd00:18::12", identity::NODE, peer::NODE));
    assert!(!got.contains_key("10.244.2.0/24"));
    assert!(problems[0].starts_with("Node n2: status.addresses: no InternalIP of a family"), "{problems:?}");
    let (got, problems) = peers(settings(Routing::Native), [own(), lone]);
    assert!(!got.contains_key("10.244.2.0/24"));
    assert!(problems[0].contains("no IPv4 InternalIP to route 10.244.2.0/24 to"), "{problems:?}");
}

#[test]
fn of_two_nodes_with_one_address_or_range_the_older_has_it() {
    let (got, problems) = peers(
        settings(Routing::Vxlan),
        [
            node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).created(1).apply(),
            node("n2", &["172.18.0.12", "172.18.0.11"], &["10.244.0.0/16"]).created(3).apply(),
            node("n3", &["172.18.0.12"], &["10.244.3.0/24"]).created(2).apply(),
            node("n4", &["172.18.0.14"], &["10.244.3.128/25"]).created(4).apply(),
        ],
    );
    assert_eq!(got["172.18.0.12/32"].node, ip("172.18.0.12").into());
    assert_eq!(got["10.244.3.0/24"], entry("172.18.0.12", identity::POD, peer::POD | peer::TUNNEL));
    assert_eq!(got["172.18.0.11/32"], none(identity::HOST, peer::HOST));
    assert_eq!(got.keys().filter(|prefix| prefix.starts_with("10.")).count(), 2);
    assert_eq!(
        problems,
        [
            "Node n2: status.addresses: 172.18.0.12 belongs to node n3; give each node addresses of its own",
            "Node n2: status.addresses: 172.18.0.11 belongs to node n1; give each node addresses of its own",
            "Node n2: spec.podCIDRs: 10.244.0.0/16 overlaps 10.244.1.0/24 of node n1, it is left out; give each node a range \
             of its own",
            "Node n4: spec.podCIDRs: 10.244.3.128/25 overlaps 10.244.3.0/24 of node n3, it is left out; give each node a \
             range of its own",
        ]
    );
}

/// Each of two nodes may hold the other for the wrong one: then nobody would tell, if only the wrong one did.
#[test]
fn a_node_tells_of_others_that_are_at_odds_with_it() {
    let mut it = Index::new(settings(Routing::Vxlan));
    for event in [
        node("n1", &["172.18.0.11"], &["10.244.1.0/24"]).created(1).apply(),
        node("n2", &["172.18.0.11"], &["10.244.1.0/25"]).created(2).apply(),
        node("n3", &["172.18.0.13"], &["10.244.3.0/24"]).created(2).apply(),
        node("n4", &["172.18.0.13"], &["10.244.3.0/25"]).created(3).apply(),
    ] {
        it.handle(event);
    }
    let report = |subject: &str| Problem::new(&subject.into(), "", "down");
    let problems = [report("watch of Node"), report("server")].into();
    it.handle(Event::Report { origin: Origin::Watch(Kind::Node), problems });
    let own: Vec<_> = it.problems_of_this_node("server").iter().map(ToString::to_string).collect();
    assert_eq!(own.len(), 3, "{own:?}");
    for part in
        ["server: down", "n2: status.addresses: 172.18.0.11 belongs to node n1", "overlaps 10.244.1.0/24 of node n1"]
    {
        assert!(own.iter().any(|it| it.contains(part)), "{part}: {own:?}");
    }
}

#[test]
fn ranges_without_masquerade_never_hide_pods() {
    let mut it = settings(Routing::Vxlan);
    it.no_masquerade = ["10.244.2.0/25", "10.244.2.0/24", "10.0.0.0/8"].map(|cidr| cidr.parse().unwrap()).into();
    let (got, _) = peers(it, three_nodes());
    assert!(!got.contains_key("10.244.2.0/25"));
    assert_eq!(got["10.244.2.0/24"].identity, identity::POD);
    assert_eq!(got["10.0.0.0/8"].flags, peer::NO_MASQ);
}

#[test]
fn a_missing_own_node_is_reported_once_nodes_are_known() {
    let mut it = Index::new(settings(Routing::Vxlan));
    assert_eq!(problems(&it), [""; 0]);
    it.handle(Event::Synced(Kind::Node));
    assert!(problems(&it)[0].contains("check --node-name"));
    assert!(it.own_node().is_none());
    it.handle(three_nodes()[0].clone());
    assert_eq!(problems(&it), [""; 0]);
    assert_eq!(it.own_node().unwrap().pod_cidrs[0].addr(), "10.244.1.0".parse::<IpAddr>().unwrap());
}

#[test]
fn peers_are_dirty_only_after_a_change() {
    let mut it = Index::new(settings(Routing::Vxlan));
    assert!(it.take_peers_dirty());
    it.handle(three_nodes()[1].clone());
    assert!(it.take_peers_dirty());
    it.handle(three_nodes()[1].clone());
    it.handle(gone(Kind::Node, "n9"));
    assert!(!it.take_peers_dirty());
    it.handle(gone(Kind::Node, "n2"));
    assert!(it.take_peers_dirty());
}
