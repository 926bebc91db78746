//! GC: removes the attachments that its list omits, and nothing else.

use crate::common::{Call, Node, ip, ips, netns, ping};
use serde_json::{Value, json};
use std::fs;

#[test]
fn without_a_list_it_does_nothing() {
    let node = Node::new();
    node.add("c1", &netns("a"));
    let before = node.traces();
    let conf = node.conf("1.1.0");
    assert_eq!(Call::new("GC", &conf).run().success(), Value::Null);
    assert_eq!(node.traces(), before);
}

#[test]
fn it_keeps_the_valid_and_removes_the_rest() {
    let node = Node::new();
    let clean = node.traces();
    let r = node.add("c1", &netns("a"));
    let only_c1 = node.traces();
    for id in ["c2", "c3"] {
        node.add(id, &netns(id));
    }
    // It works without the agent's file.
    fs::remove_file(node.run.join("node.json")).expect("node.json");
    node.gc(&["c1", "unknown"]);
    node.write_node_file(&json!({}));
    assert_eq!(node.traces(), only_c1);
    ping("", &ips(&r)[0].to_string());
    node.gc(&[]);
    assert_eq!(node.traces(), clean);
}

/// What is known from files goes all the same.
#[test]
fn without_the_list_of_links_it_removes_the_rest_and_fails() {
    let node = Node::new();
    let clean = node.traces();
    node.add("c1", &netns("a"));
    let mut conf = node.conf("1.1.0");
    conf["cni.dev/valid-attachments"] = json!([]);
    let mut other = conf.clone();
    other["name"] = json!("other");
    let msg = Call::new("GC", &other).env("RUSTNET_CNI_FAIL_AT", "links").run().failure(5);
    assert!(msg.contains("links"), "{msg}");
    assert_ne!(node.traces(), clean, "a living pod of another network is gone");
    let msg = Call::new("GC", &conf).env("RUSTNET_CNI_FAIL_AT", "links").run().failure(5);
    assert!(msg.contains("links"), "{msg}");
    assert_eq!(node.traces(), clean);
}

#[test]
fn it_leaves_other_networks_and_foreign_links_alone() {
    let node = Node::new();
    let mut other = node.conf("1.1.0");
    other["name"] = json!("other");
    let r = Call::of("ADD", &other, "c1", &netns("a")).run().success();
    ip(&["link", "add", "foreign0", "type", "veth", "peer", "name", "foreign1"]);
    let before = node.traces();
    node.add("c2", &netns("b"));
    node.gc(&[]);
    assert_eq!(node.traces(), before);
    ping("", &ips(&r)[0].to_string());
}

/// Another installation has records in another directory, and interfaces of the same prefix.
#[test]
fn it_leaves_the_interfaces_of_another_run_directory_alone() {
    let node = Node::new();
    let mut other = node.conf("1.1.0");
    other["runDir"] = json!("/run/other");
    fs::create_dir("/run/other").expect("/run/other");
    fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
    let r = Call::of("ADD", &other, "c1", &netns("a")).run().success();
    let before = node.traces();
    node.gc(&[]);
    assert_eq!(node.traces(), before);
    ping("", &ips(&r)[0].to_string());
}
