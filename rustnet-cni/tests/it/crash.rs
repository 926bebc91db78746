//! Killed or failing at every step: the next DEL or GC repairs what is left, or there is nothing
//! left.

use crate::common::{Call, Node, Traces, bpf, ip_json, ips, netns, ping};
use serde_json::{Value, json};
use std::fs;

const SIGKILL: i32 = 9;
const ADD: [&str; 7] = ["veth", "lease", "ipam", "record", "map", "host", "pod"];
const DEL: [&str; 3] = ["unmap", "unlink", "unrecord"];

fn crash(verb: &str, conf: &Value, ns: &str, step: &str) {
    let out = Call::of(verb, conf, "c1", ns).env("RUSTNET_CNI_CRASH_AT", step).run();
    assert_eq!(out.signal, Some(SIGKILL), "{verb} was not killed at {step}: {out:?}");
}

/// Crashes an ADD at each step and repairs it in each way.
fn add_crashes(node: &Node, conf: &Value, steps: &[&str], before: &Traces) {
    let ns = netns("a");
    for step in steps {
        crash("ADD", conf, &ns, step);
        let entries = bpf::entries(&node.map).len();
        let up = ip_json(&["-n", "a", "link", "show"]).to_string().contains(r#""UP""#)
            && ip_json(&["-n", "a", "link", "show", "eth0"]).to_string().contains(r#""UP""#);
        assert!(!up || entries > 0, "{step}: the pod could send before its endpoint was known");
        assert_eq!(Call::of("DEL", conf, "c1", "").run().success(), Value::Null);
        assert_eq!(node.traces(), *before, "DEL after a crash at {step}");

        crash("ADD", conf, &ns, step);
        let mut gc = conf.clone();
        gc["cni.dev/valid-attachments"] = json!([{ "containerID": "other", "ifname": "eth0" }]);
        assert_eq!(Call::new("GC", &gc).run().success(), Value::Null);
        assert_eq!(node.traces(), *before, "GC after a crash at {step}");
    }
    // Nothing lasting came of all that.
    let r = Call::of("ADD", conf, "c1", &ns).run().success();
    ping("", &ips(&r)[0].to_string());
    assert_eq!(Call::of("DEL", conf, "c1", "").run().success(), Value::Null);
    assert_eq!(node.traces(), *before);
}

/// Crashes a DEL at each step and repairs it in each way.
fn del_crashes(node: &Node, conf: &Value, steps: &[&str], before: &Traces) {
    let ns = netns("b");
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    for step in steps {
        for (verb, repair) in [("DEL", Call::of("DEL", conf, "c1", "")), ("GC", Call::new("GC", &gc))] {
            Call::of("ADD", conf, "c1", &ns).run().success();
            crash("DEL", conf, "", step);
            assert_eq!(repair.run().success(), Value::Null);
            assert_eq!(node.traces(), *before, "{verb} after a DEL that crashed at {step}");
        }
    }
}

/// Lets an ADD fail at each step.
fn add_failures(node: &Node, conf: &Value, steps: &[&str], before: &Traces) {
    let ns = netns("c");
    for step in steps {
        let out = Call::of("ADD", conf, "c1", &ns).env("RUSTNET_CNI_FAIL_AT", step).run();
        assert!(out.failure(5).contains(step));
        assert_eq!(node.traces(), *before, "ADD that failed at {step}");
        assert_eq!(ip_json(&["-n", "c", "link"]).as_array().map(Vec::len), Some(1), "{step}");
    }
}

#[test]
fn with_our_own_addresses() {
    let node = Node::new();
    let (conf, before) = (node.conf("1.1.0"), node.traces());
    add_crashes(&node, &conf, &ADD, &before);
    del_crashes(&node, &conf, &DEL, &before);
    add_failures(&node, &conf, &ADD, &before);
}

#[test]
fn with_delegated_addresses() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "host-local", "subnet": "10.1.0.0/16" });
    let before = node.traces();
    add_crashes(&node, &conf, &["veth", "mark", "ipam", "record", "map", "host", "pod"], &before);
    del_crashes(&node, &conf, &["unmap", "unlink", "unrecord", "undelegate"], &before);
    add_failures(&node, &conf, &["veth", "mark", "ipam", "record", "map", "host", "pod"], &before);
}

#[test]
fn with_ports_of_the_node() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["runtimeConfig"] = json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "protocol": "tcp" }] });
    let before = node.traces();
    add_crashes(&node, &conf, &["record", "map", "ports", "host"], &before);
    del_crashes(&node, &conf, &["unport", "unmap", "unlink", "unrecord"], &before);
    add_failures(&node, &conf, &["record", "map", "ports", "host"], &before);
}

#[test]
fn a_half_written_record_is_no_obstacle() {
    let node = Node::new();
    let before = node.traces();
    let ns = netns("a");
    fs::create_dir_all(node.run.join("endpoints")).expect("directory");
    for text in ["", "{", "[]", "{\"containerId\":\"c1\"}"] {
        node.add("c1", &ns);
        fs::write(node.run.join("endpoints/.c1@eth0.json.tmp"), "{").expect("temporary file");
        fs::write(node.run.join("endpoints/c1@eth0.json"), text).expect("record");
        node.gc(&["c1"]);
        node.del("c1");
        assert_eq!(node.traces(), before, "{text:?}");
    }
}

#[test]
fn the_reboot() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "host-local", "subnet": "10.1.0.0/16" });
    let ns = netns("a");
    let before = node.traces();
    let r = Call::of("ADD", &conf, "c1", &ns).run().success();
    // What is on a tmpfs goes, the veth and the map with it; host-local's leases stay.
    let host = r["interfaces"][0]["name"].as_str().expect("name");
    crate::common::ip(&["link", "del", host]);
    bpf::delete(&node.map, ips(&r)[0]);
    for dir in ["endpoints", "ipam"] {
        fs::remove_dir_all(node.run.join(dir)).expect(dir);
    }
    assert_ne!(node.traces(), before, "host-local's lease survives");
    // The runtime then deletes the sandboxes of before.
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    assert_eq!(node.traces(), before);
}

#[test]
fn one_networks_gc_leaves_what_another_networks_killed_add_left() {
    let node = Node::new();
    let before = node.traces();
    let mut other = node.conf("1.1.0");
    other["name"] = json!("other");
    let ns = netns("a");
    for step in ["record", "map", "host", "pod"] {
        crash("ADD", &other, &ns, step);
        let left = node.traces();
        node.add("c2", &netns(step));
        node.gc(&[]);
        assert_eq!(node.traces(), left, "{step}");
        other["cni.dev/valid-attachments"] = json!([]);
        assert_eq!(Call::new("GC", &other).run().success(), Value::Null);
        assert_eq!(node.traces(), before, "{step}");
    }
}
