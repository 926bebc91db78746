//! Objects as people write them, and what becomes of them.

use super::{BadName, Converter, reference};
use crate::model::{Condition, EndpointSlice, Family, Node, Service};
use crate::source::{Event, Kind, Object};
use rustnet_common::tuple::proto::{SCTP, TCP, UDP};
use serde_json::{Value, json};
use std::sync::Arc;

fn service_event(value: Value) -> Event {
    Converter::new().service(&serde_json::from_value(value).unwrap()).unwrap()
}

fn service(value: Value) -> Arc<Service> {
    match service_event(value) {
        Event::Apply(Object::Service(service)) => service,
        other => panic!("{other:?}"),
    }
}

fn slice_event(value: Value) -> Event {
    Converter::new().slice(&serde_json::from_value(value).unwrap()).unwrap()
}

fn slice(value: Value) -> Arc<EndpointSlice> {
    match slice_event(value) {
        Event::Apply(Object::Slice(slice)) => slice,
        other => panic!("{other:?}"),
    }
}

fn node(value: Value) -> Arc<Node> {
    match Converter::new().node(&serde_json::from_value(value).unwrap()).unwrap() {
        Event::Apply(Object::Node(node)) => node,
        other => panic!("{other:?}"),
    }
}

/// A Service `default/web` with this spec.
fn web(spec: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec})
}

/// A slice of `default/web` with these fields in addition to its metadata.
fn web_slice(family: &str, ports: &Value, endpoints: &Value) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": ports, "endpoints": endpoints,
    })
}

fn texts(problems: &[crate::model::Problem]) -> Vec<String> {
    problems.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn only_problem(problems: &[crate::model::Problem], needles: &[&str]) {
    let texts = texts(problems);
    assert_eq!(texts.len(), 1, "{texts:?}");
    for needle in needles {
        assert!(texts[0].contains(needle), "{needle:?} is not in {:?}", texts[0]);
    }
}

#[test]
fn a_dual_stack_service() {
    let it = service(web(&json!({
        "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00:96::10"], "ipFamilies": ["IPv4", "IPv6"],
        "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Local",
        "ports": [{"name": "http", "port": 80, "targetPort": "web"}, {"name": "dns", "port": 53, "protocol": "UDP"},
                  {"name": "sig", "port": 3868, "protocol": "SCTP"}],
    })));
    assert_eq!(it.name.as_str(), "default/web");
    assert_eq!(it.vips, ["10.96.0.10".parse().unwrap(), "fd00:96::10".parse().unwrap()].into());
    let ports: Vec<_> = it.ports.iter().map(|p| (&*p.name, p.port, p.proto)).collect();
    assert_eq!(ports, [("http", 80, TCP), ("dns", 53, UDP), ("sig", 3868, SCTP)]);
    assert_eq!(it.affinity, 10_800);
    assert!(it.internal_local);
    assert_eq!(texts(&it.problems), [""; 0]);
}

#[test]
fn cluster_ip_alone_is_enough() {
    let it = service(web(&json!({"clusterIP": "fd00:96::1", "ports": [{"port": 80}]})));
    assert_eq!(it.vips, ["fd00:96::1".parse().unwrap()].into());
    assert_eq!(it.ports[0].proto, TCP);
}

#[test]
fn services_without_addresses_of_ours_are_skipped() {
    for (spec, labels) in [
        (json!({"clusterIP": "None", "ports": [{"port": 80}]}), json!({})),
        (json!({"clusterIPs": ["None"], "ports": [{"port": 80}]}), json!({})),
        (json!({"type": "ExternalName", "externalName": "example.com"}), json!({})),
        (json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}), json!({"service.kubernetes.io/headless": ""})),
        (
            json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}),
            json!({"service.kubernetes.io/service-proxy-name": "other"}),
        ),
    ] {
        let mut object = web(&spec);
        object["metadata"]["labels"] = labels;
        assert!(matches!(service_event(object.clone()), Event::Delete(_)), "{object}");
    }
}

#[test]
fn a_service_without_an_address_is_rejected_with_the_remedy() {
    match service_event(web(&json!({"ports": [{"port": 80}]}))) {
        Event::Reject(object, problems) => {
            assert_eq!(object.to_string(), "Service default/web");
            only_problem(&problems, &["Service default/web: spec.clusterIPs: ", "write clusterIPs"]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bad_address_costs_that_address() {
    for (vip, needle) in [
        ("10.96.0.256", "not an IP address"),
        ("10.96.0x1.1", "not an IP address"),
        ("10.96..1", "not an IP address"),
        ("10.96.1", "not an IP address"),
        ("010.1.1.0256", "not an IP address"),
        ("+10.1.1.1", "not an IP address"),
        ("127.0.0.1", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("169.254.1.1", "link-local"),
        ("::ffff:10.0.0.1", "IPv4-mapped"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("ff02::1", "multicast"),
    ] {
        let it = service(web(&json!({"clusterIPs": [vip, "fd00:96::10"], "ports": [{"port": 80}]})));
        assert_eq!(it.vips, ["fd00:96::10".parse().unwrap()].into(), "{vip}");
        only_problem(&it.problems, &["Service default/web: spec.clusterIPs[0]: ", needle, "; "]);
    }
}

/// Google's clusters take pods and Services from there, and Linux forwards it as any other.
#[test]
fn class_e_is_as_good_as_any_other_range() {
    let it = service(web(&json!({"clusterIP": "240.10.0.1", "ports": [{"port": 80}]})));
    assert_eq!(it.vips, ["240.10.0.1".parse().unwrap()].into());
    let it = slice(web_slice("IPv4", &json!([{"port": 80}]), &json!([{"addresses": ["255.255.255.254"]}])));
    assert_eq!(it.endpoints[0].addr, "255.255.255.254".parse::<std::net::IpAddr>().unwrap());
    assert_eq!((texts(&it.problems), it.endpoints.len()), (Vec::new(), 1));
    let it = node(json!({
        "metadata": {"name": "n1"}, "spec": {"podCIDR": "250.0.1.0/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "240.0.0.11"}]},
    }));
    assert_eq!(it.addresses, ["240.0.0.11".parse().unwrap()].into());
    assert_eq!(texts(&it.problems), [""; 0]);
}

/// Kubernetes' components read them so, and never as octal numbers (CVE-2021-29923).
#[test]
fn leading_zeros_are_decimal() {
    let it = service(web(&json!({"clusterIP": "010.096.011.0012", "ports": [{"port": 80}]})));
    assert_eq!(it.vips, ["10.96.11.12".parse().unwrap()].into());
    assert_eq!(texts(&it.problems), [""; 0]);
    let it = slice(web_slice("IPv4", &json!([{"port": 80}]), &json!([{"addresses": ["010.244.001.002"]}])));
    assert_eq!(it.endpoints[0].addr, "10.244.1.2".parse::<std::net::IpAddr>().unwrap());
    let it = node(json!({
        "metadata": {"name": "n1"}, "spec": {"podCIDR": "010.244.001.000/24"},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.018.0.011"}]},
    }));
    assert_eq!(it.addresses, ["172.18.0.11".parse().unwrap()].into());
    assert_eq!(it.pod_cidrs, ["10.244.1.0/24".parse().unwrap()].into());
    assert_eq!(texts(&it.problems), [""; 0]);
    let pod = json!({"metadata": {"name": "a"}, "status": {"podIPs": [{"ip": "010.244.001.010"}]}});
    match Converter::new().pod(&serde_json::from_value(pod).unwrap()).unwrap() {
        Event::Apply(Object::Pod(pod)) => assert_eq!(pod.addresses, ["10.244.1.10".parse().unwrap()].into()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn addresses_must_agree_with_families() {
    let it = service(web(&json!({
        "clusterIPs": ["10.96.0.10", "fd00:96::10"], "ipFamilies": ["IPv6", "IPv6"], "ports": [{"port": 80}],
    })));
    assert_eq!(it.vips, ["fd00:96::10".parse().unwrap()].into());
    only_problem(&it.problems, &["clusterIPs[0]", "10.96.0.10 is IPv4 where ipFamilies[0] says IPv6"]);
    let it = service(web(&json!({"clusterIPs": ["10.96.0.10", "10.96.0.11"], "ports": [{"port": 80}]})));
    only_problem(&it.problems, &["clusterIPs[1]", "second IPv4 address"]);
}

#[test]
fn a_bad_port_costs_that_port() {
    for (bad, field, needle) in [
        (json!({"name": "x", "port": 0}), "spec.ports[0].port", "0 is not a port"),
        (json!({"name": "x", "port": 65536}), "spec.ports[0].port", "65536 is not a port"),
        (json!({"name": "x", "port": -1}), "spec.ports[0].port", "-1 is not a port"),
        (json!({"name": "x", "port": 1, "protocol": "tcp"}), "spec.ports[0].protocol", "use TCP, UDP or SCTP"),
    ] {
        let it = service(web(&json!({"clusterIP": "10.96.0.1", "ports": [bad, {"name": "ok", "port": 80}]})));
        assert_eq!(it.ports.len(), 1);
        only_problem(&it.problems, &[field, needle]);
    }
}

#[test]
fn the_first_of_two_equal_ports_wins() {
    let it = service(web(&json!({
        "clusterIP": "10.96.0.1", "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 80}],
    })));
    assert_eq!(&*it.ports[0].name, "a");
    only_problem(&it.problems, &["spec.ports[1].port", "80/TCP is there twice"]);
    let it = service(web(&json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}, {"port": 81}]})));
    only_problem(&it.problems, &["spec.ports[1].name", "a name of its own"]);
    // The same number twice is fine with two protocols.
    let it = service(web(&json!({
        "clusterIP": "10.96.0.1", "ports": [{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}],
    })));
    assert_eq!((it.ports.len(), it.problems.len()), (2, 0));
}

#[test]
fn affinity_has_a_default_and_a_range() {
    let with = |config: Value| {
        service(web(&json!({
            "clusterIP": "10.96.0.1", "ports": [{"port": 80}], "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": config,
        })))
    };
    assert_eq!(with(json!({"clientIP": {"timeoutSeconds": 60}})).affinity, 60);
    assert_eq!(with(json!({})).affinity, 10_800);
    let bad = with(json!({"clientIP": {"timeoutSeconds": 86_401}}));
    assert_eq!(bad.affinity, 10_800);
    only_problem(&bad.problems, &["timeoutSeconds", "use 1-86400"]);
}

#[test]
fn absent_conditions_mean_ready_and_not_terminating() {
    let conditions = [
        (json!(null), Condition::Ready),
        (json!({}), Condition::Ready),
        (json!({"ready": true, "terminating": true}), Condition::Ready),
        (json!({"ready": false}), Condition::Holding),
        (json!({"ready": false, "terminating": true}), Condition::Draining),
        (json!({"ready": false, "serving": true, "terminating": true}), Condition::Draining),
        (json!({"ready": false, "serving": false, "terminating": true}), Condition::Unusable),
        (json!({"ready": false, "serving": false}), Condition::Unusable),
        (json!({"ready": false, "serving": true, "terminating": false}), Condition::Holding),
        (json!({"ready": false, "serving": true}), Condition::Holding),
    ];
    for (given, want) in conditions {
        let it = slice(web_slice(
            "IPv4",
            &json!([{"port": 80}]),
            &json!([{"addresses": ["10.0.0.1"], "conditions": given.clone()}]),
        ));
        assert_eq!(it.endpoints[0].condition, want, "{given}");
    }
}

#[test]
fn only_the_first_address_of_an_endpoint_counts() {
    let it = slice(web_slice("IPv4", &json!([{"port": 80}]), &json!([{"addresses": ["10.0.0.1", "10.0.0.2"]}])));
    let addresses: Vec<_> = it.endpoints.iter().map(|e| e.addr.to_string()).collect();
    assert_eq!(addresses, ["10.0.0.1"]);
}

#[test]
fn an_address_of_the_other_family_is_refused() {
    let it = slice(web_slice(
        "IPv4",
        &json!([{"port": 80}]),
        &json!([{"addresses": ["fd00::1"]}, {"addresses": ["10.0.0.1"]}, {"addresses": []}]),
    ));
    assert_eq!((it.family, it.endpoints.len()), (Family::V4, 1));
    assert_eq!(
        texts(&it.problems),
        [
            "EndpointSlice default/web-1: endpoints[0].addresses[0]: fd00::1 is IPv6 in an IPv4 slice, it is left out; put \
             it into a slice of addressType IPv6",
            "EndpointSlice default/web-1: endpoints[2].addresses: empty, the endpoint is left out; write its address",
        ]
    );
}

#[test]
fn ports_that_are_none_are_left_out() {
    let it = slice(web_slice(
        "IPv6",
        &json!([{"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 70000}, {"name": "d", "port": 8080}]),
        &json!([{"addresses": ["fd00::1"]}]),
    ));
    assert_eq!(it.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [8080]);
    assert_eq!(it.problems.len(), 3);
}

#[test]
fn one_name_for_two_protocols_is_two_ports() {
    let dns = json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns", "port": 53, "protocol": "TCP"}]);
    let it = slice(web_slice("IPv4", &dns, &json!([{"addresses": ["10.244.1.2"]}])));
    assert_eq!(it.ports.iter().map(|p| p.proto).collect::<Vec<_>>(), [UDP, TCP]);
    assert_eq!(it.problems.len(), 0);
}

#[test]
fn slices_that_are_not_for_us() {
    let ports = json!([{"port": 80}]);
    let endpoints = json!([{"addresses": ["10.0.0.1"]}]);
    let mut headless = web_slice("IPv4", &ports, &endpoints);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    assert!(matches!(slice_event(headless), Event::Delete(_)));
    assert!(matches!(slice_event(web_slice("FQDN", &ports, &endpoints)), Event::Delete(_)));
    for (bad, needle) in [
        (web_slice("IPv5", &ports, &endpoints), "use IPv4 or IPv6"),
        (
            {
                let mut nameless = web_slice("IPv4", &ports, &endpoints);
                nameless["metadata"]["labels"] = json!({});
                nameless
            },
            "set kubernetes.io/service-name",
        ),
    ] {
        match slice_event(bad) {
            Event::Reject(_, problems) => only_problem(&problems, &[needle]),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ten_thousand_bad_addresses_are_a_short_report() {
    let endpoints: Vec<_> = (0..10_000).map(|_| json!({"addresses": ["nonsense"]})).collect();
    let it = slice(web_slice("IPv4", &json!([{"port": 80}]), &json!(endpoints)));
    assert_eq!(it.problems.len(), 9);
    assert_eq!(&*it.problems[8].message, "and 9992 more problems like these");
}

#[test]
fn a_node() {
    let it = node(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"},
                     "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:244:0:1::/64"]},
        "status": {"addresses": [{"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "172.18.0.11"},
                                 {"type": "InternalIP", "address": "fd00:18::11"},
                                 {"type": "ExternalIP", "address": "203.0.113.1"}]},
    }));
    assert_eq!((it.name.as_str(), &*it.zone, it.created), ("n1", "z1", 1_767_225_600));
    assert_eq!(it.addresses, ["172.18.0.11".parse().unwrap(), "fd00:18::11".parse().unwrap()].into());
    assert_eq!(it.address(Family::V6), Some("fd00:18::11".parse().unwrap()));
    assert_eq!(it.pod_cidrs, ["10.244.1.0/24".parse().unwrap(), "fd00:244:0:1::/64".parse().unwrap()].into());
    assert_eq!(texts(&it.problems), [""; 0]);
}

#[test]
fn a_node_with_nothing_says_what_is_missing() {
    let it = node(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}}));
    let texts = texts(&it.problems);
    assert!(texts[0].contains("Node n1: status.addresses: no InternalIP"), "{texts:?}");
    assert!(texts[1].contains("Node n1: spec.podCIDRs: no pod range"), "{texts:?}");
}

#[test]
fn a_bad_pod_range_costs_that_range() {
    for (cidr, needle, kept) in [
        ("10.244.1.0/33", "not a range", false),
        ("10.244.1.0", "not a range", false),
        ("0.0.0.0/0", "everything", false),
        ("10.244.1.7/24", "taken as 10.244.1.0/24", true),
    ] {
        let it = node(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
            "spec": {"podCIDRs": [cidr, "fd00:244:0:1::/64"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "172.18.0.11"}]},
        }));
        assert_eq!(it.pod_cidrs.len(), 1 + usize::from(kept), "{cidr}");
        only_problem(&it.problems, &["Node n1: spec.podCIDRs[0]: ", needle]);
    }
}

#[test]
fn a_pod_has_its_addresses_until_it_has_finished() {
    let pod = |phase: &str| {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-0", "namespace": "shop", "uid": "u1"},
            "spec": {"nodeName": "n1", "containers": []},
            "status": {"phase": phase, "podIP": "10.244.1.5", "podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00:244::5"}]},
        });
        match Converter::new().pod(&serde_json::from_value(object).unwrap()) {
            Ok(Event::Apply(Object::Pod(pod))) => pod,
            other => panic!("{other:?}"),
        }
    };
    let it = pod("Running");
    assert_eq!((it.name.as_str(), &*it.uid, &*it.node, it.host_network), ("shop/web-0", "u1", "n1", false));
    assert_eq!(it.addresses, ["10.244.1.5".parse().unwrap(), "fd00:244::5".parse().unwrap()].into());
    for phase in ["Succeeded", "Failed"] {
        assert!(pod(phase).addresses.is_empty(), "{phase}");
    }
}

#[test]
fn names_are_checked() {
    let meta = |value: Value| serde_json::from_value(value).unwrap();
    assert_eq!(reference(Kind::Service, &meta(json!({"name": "web"}))).unwrap().name.as_str(), "default/web");
    assert_eq!(reference(Kind::Node, &meta(json!({"name": "n1", "namespace": "x"}))).unwrap().name.as_str(), "n1");
    for bad in [json!({}), json!({"name": ""}), json!({"name": "a/b"}), json!({"name": "web", "namespace": "A"})] {
        let error: BadName = reference(Kind::Service, &meta(bad)).unwrap_err();
        assert!(error.to_string().contains("set metadata.name"), "{error}");
    }
}

/// A Service of this type with these ranges, an external IP and two addresses of a load balancer.
fn with_source_ranges(type_: &str, ranges: &Value) -> Arc<Service> {
    let mut value = web(&json!({
        "clusterIPs": ["10.96.0.1", "fd00:96::1"], "type": type_, "ports": [{"port": 80}], "loadBalancerSourceRanges": ranges,
        "externalIPs": ["198.51.100.7", "203.0.113.7"],
    }));
    value["status"] =
        json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}, {"ip": "2001:db8:7::7"}, {"ip": "203.0.113.7"}]}});
    service(value)
}

#[test]
fn source_ranges() {
    for (given, want) in [
        (json!(null), None),
        (json!([]), None),
        (
            json!([" 192.0.2.0/24 ", "2001:db8::/32", "192.0.2.0/24", "010.1.2.3/8"]),
            Some(vec!["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32"]),
        ),
        (json!(["0.0.0.0/0"]), Some(vec!["0.0.0.0/0"])),
    ] {
        let it = with_source_ranges("LoadBalancer", &given);
        let ranges = it.source_ranges.as_ref().map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(ranges, want.map(|all| all.into_iter().map(str::to_owned).collect()), "{given}");
        assert_eq!(texts(&it.problems), [""; 0]);
        assert_eq!(it.balanced, ["203.0.113.7".parse().unwrap(), "2001:db8:7::7".parse().unwrap()].into());
        assert_eq!(it.external, ["198.51.100.7".parse().unwrap()].into());
    }
    // Those of another type, as the API server may keep them.
    let it = with_source_ranges("NodePort", &json!(["192.0.2.0/24"]));
    assert_eq!((&it.source_ranges, it.balanced.len(), it.external.len()), (&None, 0, 2));
}

#[test]
fn what_is_no_source_range_allows_nobody() {
    for bad in ["", " ", "192.0.2.1", "192.0.2.0/33", "2001:db8::/129", "all", "192.0.2.0/24, 198.51.100.0/24"] {
        let it = with_source_ranges("LoadBalancer", &json!(["192.0.2.0/24", bad]));
        assert_eq!(it.source_ranges, Some(["192.0.2.0/24".parse().unwrap()].into()), "{bad:?}");
        only_problem(&it.problems, &["spec.loadBalancerSourceRanges[1]: ", "is not a range", "; write"]);
        let it = with_source_ranges("LoadBalancer", &json!([bad]));
        assert_eq!(it.source_ranges, Some([].into()), "{bad:?}");
        assert_eq!(it.balanced.len(), 2);
    }
}

#[test]
fn what_is_asked_for_and_not_served_is_noted() {
    for (ports, want) in
        [(json!([{"containerPort": 80}]), false), (json!([{"containerPort": 80, "hostPort": 80}]), true)]
    {
        let value = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "ports": ports}]}});
        match Converter::new().pod(&serde_json::from_value(value).unwrap()).unwrap() {
            Event::Apply(Object::Pod(pod)) => assert_eq!(pod.host_ports, want),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_pod_wants_its_sockets_balanced_or_not_by_its_annotation() {
    for (annotations, want, is_well) in [
        (json!(null), None, true),
        (json!({"example.com/other": "x"}), None, true),
        (json!({"rustnet.io/socket-lb": "true"}), Some(true), true),
        (json!({"rustnet.io/socket-lb": "false"}), Some(false), true),
        (json!({"rustnet.io/socket-lb": "True"}), None, false),
        (json!({"rustnet.io/socket-lb": "off"}), None, false),
        (json!({"rustnet.io/socket-lb": ""}), None, false),
    ] {
        let value = json!({"metadata": {"name": "p", "annotations": annotations}});
        let Ok(Event::Apply(Object::Pod(pod))) = Converter::new().pod(&serde_json::from_value(value).unwrap()) else {
            panic!("{annotations}: no pod")
        };
        assert_eq!(pod.socket_lb, want, "{annotations}");
        if is_well {
            assert_eq!(texts(&pod.problems), [""; 0]);
        } else {
            only_problem(
                &pod.problems,
                &["Pod default/p: metadata.annotations[rustnet.io/socket-lb]: ", "; give \"true\""],
            );
        }
    }
}

#[test]
fn a_node_leaves_when_it_is_deleted_or_the_autoscaler_says_so() {
    let is_leaving = |deleted: Value, taints: &[&str]| {
        let taints: Vec<_> = taints.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
        let value = json!({"metadata": {"name": "n1", "deletionTimestamp": deleted}, "spec": {"taints": taints}});
        match Converter::new().node(&serde_json::from_value(value).unwrap()).unwrap() {
            Event::Apply(Object::Node(node)) => node.is_leaving,
            other => panic!("{other:?}"),
        }
    };
    assert!(!is_leaving(json!(null), &["node.kubernetes.io/unschedulable"]));
    assert!(is_leaving(json!(null), &["other", "ToBeDeletedByClusterAutoscaler"]));
    assert!(is_leaving(json!("2026-01-03T03:04:05Z"), &[]));
}

#[test]
fn only_load_balancers_with_policy_local_have_a_health_check_port() {
    for (type_, policy, given, want) in [
        ("LoadBalancer", "Local", json!(30_001), 30_001),
        ("LoadBalancer", "Local", json!(0), 0),
        ("LoadBalancer", "Local", json!(null), 0),
        ("LoadBalancer", "Cluster", json!(30_001), 0),
        ("NodePort", "Local", json!(30_001), 0),
        ("ClusterIP", "Local", json!(70_000), 0),
    ] {
        let spec = json!({
            "clusterIP": "10.96.0.1", "type": type_, "ports": [{"port": 80}], "externalTrafficPolicy": policy,
            "healthCheckNodePort": given,
        });
        let it = service(web(&spec));
        assert_eq!((it.health_check_port, &*it.problems), (want, &[][..]), "{type_} {policy} {given}");
    }
    let spec = json!({
        "clusterIP": "10.96.0.1", "type": "LoadBalancer", "ports": [{"port": 80}], "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 70_000,
    });
    let it = service(web(&spec));
    assert_eq!(it.health_check_port, 0);
    let problems: Vec<_> = it.problems.iter().map(ToString::to_string).collect();
    assert!(
        matches!(&problems[..], [it] if it.contains("spec.healthCheckNodePort: 70000 is not a port")),
        "{problems:?}"
    );
}

#[test]
fn a_slice_says_what_set_it_off() {
    let mut value = web_slice("IPv4", &json!([{"port": 80}]), &json!([]));
    assert_eq!(slice(value.clone()).triggered, None);
    value["metadata"]["annotations"] =
        json!({"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-28T12:00:00.5Z"});
    let since = slice(value).triggered.unwrap().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(since.as_millis(), 1_795_867_200_500);
}

fn service_cidr(value: Value) -> Arc<crate::model::ServiceCidr> {
    match Converter::new().service_cidr(&serde_json::from_value(value).unwrap()).unwrap() {
        Event::Apply(Object::ServiceCidr(object)) => object,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_cidr_is_its_ranges() {
    let spec = json!({"cidrs": ["10.96.0.0/16", "fd00:96::/112", "010.97.0.7/24", "10.96.0.0/16"]});
    let it = service_cidr(json!({"metadata": {"name": "kubernetes"}, "spec": spec}));
    assert_eq!((it.name.as_str(), &*it.problems), ("kubernetes", &[][..]));
    assert_eq!(*it.cidrs, ["10.96.0.0/16", "fd00:96::/112", "10.97.0.0/24"].map(|cidr| cidr.parse().unwrap()));
    // It counts until it is gone.
    let meta = json!({"name": "old", "deletionTimestamp": "2026-01-03T03:04:05Z"});
    assert_eq!(service_cidr(json!({"metadata": meta, "spec": spec})).cidrs, it.cidrs);
    for nothing in [json!({"metadata": {"name": "x"}}), json!({"metadata": {"name": "x"}, "spec": {}})] {
        let it = service_cidr(nothing);
        assert_eq!((it.cidrs.len(), it.problems.len()), (0, 0));
    }
}

#[test]
fn a_bad_range_of_services_costs_itself_alone() {
    for (bad, needle) in [
        ("10.96.0.0", "is not a range"),
        ("10.96.0.0/33", "is not a range"),
        ("", "is not a range"),
        ("0.0.0.0/0", "everything"),
        ("::/0", "everything"),
        ("127.0.0.0/16", "loopback"),
        ("169.254.0.0/20", "link-local"),
        ("224.0.0.0/8", "multicast"),
        ("fe80::/64", "link-local"),
    ] {
        let spec = json!({"cidrs": ["10.96.0.0/16", bad, "fd00:96::/112"]});
        let it = service_cidr(json!({"metadata": {"name": "second"}, "spec": spec}));
        assert_eq!(it.cidrs.len(), 2, "{bad}");
        only_problem(&it.problems, &["ServiceCIDR second: spec.cidrs[1]: ", needle, "it is left out"]);
    }
}
