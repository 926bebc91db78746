//! Ports of the node that pods have: entries in the map, and what CHECK, DEL, GC and failures make of them.

use crate::common::{Call, Node, bpf, ip_json, ips, netns};
use rustnet_common::host_port::HostPort;
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;

fn with(mut conf: Value, mappings: &Value) -> Value {
    conf["capabilities"] = json!({ "portMappings": true });
    conf["runtimeConfig"] = json!({ "portMappings": mappings });
    conf
}

fn conf(node: &Node, mappings: &Value) -> Value {
    with(node.conf("1.1.0"), mappings)
}

/// One port, as containerd asks for it.
fn one(port: u16) -> Value {
    json!([{ "HostPort": port, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" }])
}

/// Address, port and protocol of each entry, and where it leads.
fn entries(node: &Node) -> Vec<(IpAddr, u16, u8, IpAddr, u16, u32)> {
    let all = bpf::host_ports(&node.host_ports).into_iter();
    all.map(|(k, v)| (k.addr.into(), k.port, k.proto, v.pod.into(), v.port, v.ifindex)).collect()
}

fn ifindex(result: &Value) -> u32 {
    let host = result["interfaces"][0]["name"].as_str().expect("name");
    let index = ip_json(&["link", "show", host])[0]["ifindex"].as_u64().expect("index");
    u32::try_from(index).expect("positive")
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

#[test]
fn each_mapping_is_an_entry_of_its_families() {
    let node = Node::new();
    let (before, ns) = (node.traces(), netns("a"));
    let mappings = json!([
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "", "name": "web" },
        { "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "127.0.0.1" },
        { "hostPort": 7, "containerPort": 7, "protocol": "sctp", "hostIP": "::" },
    ]);
    let r = Call::of("ADD", &conf(&node, &mappings), "c1", &ns).run().success();
    let [v4, v6] = ips(&r)[..] else { panic!("{r}") };
    let index = ifindex(&r);
    let mut want = vec![
        (ip("0.0.0.0"), 8080, 6, v4, 80, index),
        (ip("::"), 8080, 6, v6, 80, index),
        (ip("127.0.0.1"), 53, 17, v4, 5353, index),
        (ip("::"), 7, 132, v6, 7, index),
    ];
    let mut found = entries(&node);
    want.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, want);
    let record = fs::read(node.run.join("endpoints/c1@eth0.json")).expect("record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let kept = json!([
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "127.0.0.1" },
        { "hostPort": 7, "containerPort": 7, "protocol": "sctp", "hostIP": "::" },
    ]);
    assert_eq!(record["hostPorts"], kept);
    // The runtime need not say it again.
    for conf in [with(node.conf_with("1.1.0", &r), &mappings), node.conf_with("1.1.0", &r)] {
        assert_eq!(Call::of("CHECK", &conf, "c1", &ns).run().success(), Value::Null);
    }
    node.del("c1");
    assert_eq!(node.traces(), before);
}

#[test]
fn mistakes_are_named_and_leave_nothing() {
    let node = Node::with_ranges(&["10.244.1.0/24"]);
    let (before, ns) = (node.traces(), netns("a"));
    for (mappings, code, part) in [
        (json!("80"), 6, "portMappings"),
        (json!([{ "hostPort": 0, "containerPort": 80 }]), 7, "portMappings[0].hostPort is 0"),
        (json!([{ "hostPort": 80, "containerPort": 0 }]), 7, "portMappings[0].containerPort is 0"),
        (json!([{ "hostPort": 80, "containerPort": 80, "protocol": "gre" }]), 7, "protocol \"gre\""),
        (json!([{ "hostPort": 80, "containerPort": 80, "hostIP": "node" }]), 7, "hostIP \"node\""),
        (json!([{ "hostPort": 80, "containerPort": 80, "hostIP": "2001:db8::1" }]), 7, "hostIP 2001:db8::1 is IPv6"),
    ] {
        let message = Call::of("ADD", &conf(&node, &mappings), "c1", &ns).run().failure(code);
        assert!(message.contains(part), "{mappings}: {message}");
        assert_eq!(node.traces(), before, "{mappings}");
    }
    // A pod that was never connected goes, whatever it asked for.
    let bad = conf(&node, &json!("80"));
    assert_eq!(Call::of("DEL", &bad, "c1", "").run().success(), Value::Null);
}

/// As an earlier release has pinned: pods without such ports are connected, others wait for the agent of this one.
#[test]
fn without_the_map() {
    let node = Node::new();
    let ns = netns("a");
    fs::rename(node.bpffs.join("rn_host_ports"), node.bpffs.join("aside")).expect("move the pin");
    let before = node.traces();
    assert!(Call::of("ADD", &conf(&node, &one(80)), "c1", &ns).run().failure(11).contains("rn_host_ports"));
    assert_eq!(node.traces(), before);
    node.add("c1", &ns);
    node.del("c1");
    assert_eq!(node.traces(), before);
    fs::rename(node.bpffs.join("aside"), node.bpffs.join("rn_host_ports")).expect("move the pin back");
    Call::of("ADD", &conf(&node, &one(80)), "c1", &ns).run().success();
    fs::rename(node.bpffs.join("rn_host_ports"), node.bpffs.join("aside")).expect("move the pin");
    let out = Call::of("DEL", &node.conf("1.1.0"), "c1", "").run();
    assert!(out.stderr.contains("map of host ports"), "{out:?}");
    out.success();
}

/// The pod that has a port keeps it where another one, which asks for the same, never comes.
#[test]
fn an_addition_that_fails_takes_no_port() {
    let node = Node::new();
    let first = Call::of("ADD", &conf(&node, &one(80)), "c1", &netns("a")).run().success();
    let (index, ns) = (ifindex(&first), netns("b"));
    for step in ["map", "host", "pod"] {
        Call::of("ADD", &conf(&node, &one(80)), "c2", &ns).env("RUSTNET_CNI_FAIL_AT", step).run().failure(5);
        assert!(entries(&node).iter().map(|e| (e.1, e.5)).eq([(80, index); 2]), "{step}: {:?}", entries(&node));
    }
    node.del("c1");
}

/// A pod that ends may be deleted after its successor with the same port was added.
#[test]
fn a_late_deletion_leaves_the_successor_its_port() {
    let node = Node::new();
    let before = node.traces();
    for late in ["DEL", "GC"] {
        Call::of("ADD", &conf(&node, &one(80)), "c1", &netns(&format!("{late}1"))).run().success();
        let ns = netns(&format!("{late}2"));
        let second = Call::of("ADD", &conf(&node, &one(80)), "c2", &ns).run().success();
        let index = ifindex(&second);
        let is_seconds = || entries(&node).iter().map(|e| (e.1, e.5)).eq([(80, index); 2]);
        assert!(is_seconds(), "the later pod has it: {:?}", entries(&node));
        match late {
            "DEL" => node.del("c1"),
            _ => node.gc(&["c2"]),
        }
        assert!(is_seconds(), "{late}: {:?}", entries(&node));
        let check = Call::of("CHECK", &node.conf_with("1.1.0", &second), "c2", &ns);
        assert_eq!(check.run().success(), Value::Null);
        node.del("c2");
        assert_eq!(node.traces(), before);
    }
}

#[test]
fn check_finds_a_lost_port() {
    let node = Node::new();
    let ns = netns("a");
    let r = Call::of("ADD", &conf(&node, &one(80)), "c1", &ns).run().success();
    let (key, own) = bpf::host_ports(&node.host_ports)[0];
    let check = || Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run();
    bpf::put_host_port(&node.host_ports, &key, &HostPort { ifindex: own.ifindex + 1, ..own });
    assert!(check().failure(102).contains("port 80 is another pod's"));
    bpf::delete_host_port(&node.host_ports, &key);
    assert!(check().failure(102).contains("port 80 is not in the map"));
    bpf::put_host_port(&node.host_ports, &key, &own);
    assert_eq!(check().success(), Value::Null);
}

#[test]
fn a_full_map_leaves_nothing() {
    let node = Node::new();
    let before = node.traces();
    let many = |count: u16| -> Value { (1..=count).map(|n| json!({ "hostPort": n, "containerPort": n })).collect() };
    let message = Call::of("ADD", &conf(&node, &many(9)), "c1", &netns("a")).run().failure(5);
    assert!(message.contains("host ports is full"), "{message}");
    assert_eq!(node.traces(), before);
    Call::of("ADD", &conf(&node, &many(8)), "c1", &netns("b")).run().success();
    node.del("c1");
    assert_eq!(node.traces(), before);
}
