//! Bandwidth limits: the queues on both ends, what is kept of them, and what CHECK, DEL and GC make of them.

use crate::common::{Call, Node, bpf, command, ip_json, ips, netns, ping};
use rustnet_common::endpoint::flags;
use serde_json::{Value, json};
use std::fs;

/// With one limit as a person would state it, and one as containerd passes on an annotation.
fn conf(node: &Node, prev: Option<&Value>) -> Value {
    let mut conf = prev.map_or_else(|| node.conf("1.1.0"), |prev| node.conf_with("1.1.0", prev));
    conf["capabilities"] = json!({ "bandwidth": true });
    conf["runtimeConfig"] = json!({ "bandwidth": {
        "IngressRate": 8_000_000, "IngressBurst": 800_000, "EgressRate": 80_000_000_000_u64, "EgressBurst": u32::MAX,
    }});
    conf
}

/// The root queue as `tc` tells it: kind, and of TBF bytes a second, burst in bytes and what may wait.
fn root(netns: Option<&str>, device: &str) -> Option<(u64, u64, u64)> {
    let place = netns.map_or(vec![], |ns| vec!["-n", ns]);
    let out = command("tc", &[&place[..], &["-j", "qdisc", "show", "dev", device]].concat());
    let all: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    let tbf = all.as_array().expect("list").iter().find(|q| q["kind"] == "tbf")?;
    assert_eq!((&tbf["root"], &tbf["handle"]), (&json!(true), &json!("1:")), "{tbf}");
    // What may wait, `tc` shows as the time that it takes (in microseconds) behind a full bucket.
    let number = |key: &str| tbf["options"][key].as_u64().unwrap_or_else(|| panic!("{key}: {tbf}"));
    Some((number("rate"), number("burst"), number("lat")))
}

fn near(found: u64, want: u64) -> bool {
    // The kernel keeps times of 64 ns.
    found.abs_diff(want) * 100 <= want
}

#[test]
fn each_limit_is_a_queue_on_the_end_that_sends() {
    let node = Node::new();
    let before = node.traces();
    let ns = netns("a");
    let r = Call::of("ADD", &conf(&node, None), "c1", &ns).run().success();
    let host = r["interfaces"][0]["name"].as_str().expect("name");
    let (rate, burst, latency) = root(None, host).expect("a queue for what the pod receives");
    assert!(rate == 1_000_000 && near(burst, 100_000) && near(latency, 25_000), "{rate} {burst} {latency}");
    let (rate, burst, latency) = root(Some("a"), "eth0").expect("a queue for what it sends");
    assert!(rate == 10_000_000_000 && near(burst, 250_000_000) && near(latency, 25_000), "{rate} {burst} {latency}");

    assert!(bpf::entries(&node.map).iter().all(|(_, e)| e.flags == flags::VIA_QDISC));
    let record = fs::read(node.run.join("endpoints/c1@eth0.json")).expect("record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let want = json!({ "ingress": { "rate": 8_000_000, "burst": 800_000 },
                       "egress": { "rate": 80_000_000_000_u64, "burst": 2_000_000_000 } });
    assert_eq!(record["bandwidth"], want);
    for ip in ips(&r) {
        ping("", &ip.to_string());
    }
    // The runtime need not tell it again.
    for conf in [conf(&node, Some(&r)), node.conf_with("1.1.0", &r)] {
        assert_eq!(Call::of("CHECK", &conf, "c1", &ns).run().success(), Value::Null);
    }

    // Another pod has none of it.
    let other = node.add("c2", &netns("b"));
    assert_eq!(root(None, other["interfaces"][0]["name"].as_str().expect("name")), None);
    assert_eq!(root(Some("b"), "eth0"), None);
    let unlimited = ips(&other);
    assert!(bpf::entries(&node.map).iter().all(|(ip, e)| (e.flags == 0) == unlimited.contains(ip)));
    node.gc(&["c1"]);
    assert!(root(None, host).is_some());
    node.del("c1");
    assert_eq!(node.traces(), before);
}

#[test]
fn a_limit_for_one_way_leaves_the_other_alone() {
    let node = Node::new();
    for (way, other, flags) in [("ingress", "egress", flags::VIA_QDISC), ("egress", "ingress", 0)] {
        let ns = netns(way);
        let mut conf = node.conf("1.1.0");
        // As containerd writes what was not asked for.
        conf["runtimeConfig"] = json!({ "bandwidth": {
            format!("{way}Rate"): 1_000_000, format!("{way}Burst"): u32::MAX,
            format!("{other}Rate"): 0, format!("{other}Burst"): 0,
        }});
        let r = Call::of("ADD", &conf, "c1", &ns).run().success();
        let host = root(None, r["interfaces"][0]["name"].as_str().expect("name"));
        let pod = root(Some(way), "eth0");
        assert_eq!((host.is_some(), pod.is_some()), (way == "ingress", way == "egress"));
        let (rate, burst, _) = host.or(pod).expect("one of them");
        assert!(rate == 125_000 && near(burst, 131_072), "{rate} {burst}");
        assert!(bpf::entries(&node.map).iter().all(|(_, e)| e.flags == flags));
        node.del("c1");
    }
}

#[test]
fn check_finds_limits_that_were_changed() {
    type Change = fn(&Node, &str, &Value);
    fn tbf(device: &str, rate: &str, burst: &str) {
        let queue = ["root", "tbf", "rate", rate, "burst", burst, "latency", "25ms"];
        command("tc", &[&["qdisc", "replace", "dev", device][..], &queue].concat());
    }
    let changes: [(&str, Change); 5] = [
        ("not limited any more", |_, host, _| drop(command("tc", &["qdisc", "del", "dev", host, "root"]))),
        ("not limited any more", |_, _, _| drop(command("tc", &["-n", "a", "qdisc", "del", "dev", "eth0", "root"]))),
        ("2000000 bytes/s", |_, host, _| tbf(host, "16mbit", "100000")),
        ("525000 wait", |_, host, _| tbf(host, "8mbit", "500000")),
        ("other flags", |node, _, r| {
            let (ip, mut entry) =
                bpf::entries(&node.map).into_iter().find(|(ip, _)| *ip == ips(r)[1]).expect("an entry");
            entry.flags = 0;
            bpf::put(&node.map, ip, &entry);
        }),
    ];
    let node = Node::new();
    let ns = netns("a");
    for (part, change) in changes {
        let r = Call::of("ADD", &conf(&node, None), "c1", &ns).run().success();
        change(&node, r["interfaces"][0]["name"].as_str().expect("name"), &r);
        let msg = Call::of("CHECK", &conf(&node, Some(&r)), "c1", &ns).run().failure(102);
        assert!(msg.contains(part), "{part}: {msg}");
        node.del("c1");
    }
}

/// A runtime calls DEL after an ADD that failed, with the same configuration: the pod must be able to go.
#[test]
fn limits_that_make_no_sense_are_refused_before_anything_is_made() {
    let node = Node::new();
    let ns = netns("a");
    let before = node.traces();
    for (limits, code, part) in [
        (json!({ "ingressRate": -1, "ingressBurst": 1 }), 7, "-1"),
        (json!({ "egressRate": "10M" }), 6, "egressRate"),
        (json!({ "EgressBurst": 1_000_000 }), 7, "without egressRate"),
        (json!({ "ingressRate": 1_000_000, "ingressBurst": 8 }), 7, "no packet of 1450 bytes"),
        (json!(7), 6, "not an object"),
    ] {
        let mut conf = node.conf("1.1.0");
        conf["runtimeConfig"] = json!({ "bandwidth": limits });
        let msg = Call::of("ADD", &conf, "c1", &ns).run().failure(code);
        assert!(msg.contains(part), "{limits}: {msg}");
        assert_eq!(node.traces(), before);
        assert!(ip_json(&["-n", "a", "link"]).as_array().expect("list").len() == 1, "{limits}: more than lo");
        assert_eq!(Call::of("DEL", &conf, "c1", &ns).run().success(), Value::Null);
    }
}
