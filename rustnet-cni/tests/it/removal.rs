//! DEL and GC under abuse: they remove what they can, say what they could not, and touch nothing of anybody else's.

use crate::common::{Call, Node, Traces, bpf, ip, ip_json, ips, netns, ping, until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn host_local(node: &Node, subnet: &str) -> Value {
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "host-local", "subnet": subnet });
    conf
}

/// The files of host-local that hold addresses.
fn leases_on_disk(network: &str) -> usize {
    let dir = fs::read_dir(format!("/var/lib/cni/networks/{network}"));
    let names = dir.into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).count()
}

/// The node's traces without those of a lease that nobody can give back yet.
fn without_leases(node: &Node) -> Traces {
    let mut traces = node.traces();
    traces.forget_files_below("/var/lib/cni/networks");
    traces.forget_files_below("/run/rustnet/ipam/delegated");
    traces
}

fn gc(mut conf: Value, keep: &[&str]) -> Call {
    conf["cni.dev/valid-attachments"] = keep.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
    Call::new("GC", &conf)
}

#[test]
fn without_the_ipam_plugin_all_else_goes_and_the_plugin_is_named() {
    let node = Node::new();
    let before = node.traces();
    let conf = host_local(&node, "10.1.0.0/16");
    let removals: [(&str, Call); 2] = [("DEL", Call::of("DEL", &conf, "c1", "")), ("GC", gc(conf.clone(), &[]))];
    for (verb, removal) in removals {
        Call::of("ADD", &conf, "c1", &netns(verb)).run().success();
        for path in ["/nonexistent", ""] {
            let msg = removal.clone().env("CNI_PATH", path).run().failure(7);
            assert!(msg.contains("host-local") && msg.contains("CNI_PATH"), "{verb}: {msg}");
            assert_eq!(without_leases(&node), before, "{verb}");
            assert_eq!(leases_on_disk("rustnet"), 1, "{verb}");
        }
        // Once the plugin is back, the lease goes, too.
        assert_eq!(removal.run().success(), Value::Null);
        assert_eq!(node.traces(), before, "{verb}");
    }
}

#[test]
fn what_only_add_needs_keeps_no_pod_from_going() {
    let node = Node::new();
    let before = node.traces();
    for ipam in [json!(null), json!("host-local"), json!({ "type": 7 }), json!({ "type": "../x" })] {
        let mut conf = node.conf("1.1.0");
        let ns = netns(&format!("a{}", ipam.to_string().len()));
        Call::of("ADD", &conf, "c1", &ns).run().success();
        Call::of("ADD", &conf, "c2", &netns(&format!("b{}", ipam.to_string().len()))).run().success();
        let is_unknown = ipam["type"].is_string();
        conf["ipam"] = ipam;
        let del =
            Call::of("DEL", &conf, "c1", "/run/netns/absent").without("CNI_PATH").env("CNI_ARGS", "rubbish").run();
        let gc = gc(conf, &[]).without("CNI_PATH").env("CNI_ARGS", "rubbish").run();
        for out in [del, gc] {
            if is_unknown {
                assert!(out.failure(7).contains("../x"));
            } else {
                assert_eq!(out.success(), Value::Null);
            }
        }
        assert_eq!(node.traces(), before);
    }
}

/// host-local refuses what it does not know in `CNI_ARGS`, with DEL, too.
#[test]
fn arguments_that_an_ipam_plugin_refuses_keep_no_address() {
    let node = Node::new();
    let before = node.traces();
    let conf = host_local(&node, "10.1.0.0/16");
    for args in ["rubbish", "OTHER=x"] {
        Call::of("ADD", &conf, "c1", &netns(args)).run().success();
        assert_eq!(Call::of("DEL", &conf, "c1", "").env("CNI_ARGS", args).run().success(), Value::Null);
        assert_eq!(node.traces(), before);
    }
}

/// A DEL that fails for another reason than its arguments is none that an answer to another question could make good.
#[test]
fn a_del_that_fails_is_not_asked_again_without_arguments() {
    let node = Node::new();
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "picky" });
    let plugin = |error: &str| {
        let text = format!(
            "#!/bin/sh\ncase $CNI_COMMAND in\nADD) echo '{{\"cniVersion\":\"1.1.0\",\"ips\":[{{\"address\":\"10.7.0.5/24\"}}]}}' ;;\n\
             DEL) [ -z \"$CNI_ARGS\" ] || {{ echo '{error}'; exit 1; }} ;;\nesac\n"
        );
        fs::write("/run/plugins/picky", text).expect("script");
        fs::set_permissions("/run/plugins/picky", fs::Permissions::from_mode(0o755)).expect("mode");
    };
    let ns = netns("a");
    let mark = node.run.join("ipam/delegated/rustnet/c1@eth0");
    let del = Call::of("DEL", &conf, "c1", "").env("CNI_ARGS", "OTHER=x");
    for (error, is_asked_again) in [
        (r#"{"code":100,"msg":"the database is away"}"#, false),
        (r#"{"code":999,"msg":"ARGS: unknown args [\"OTHER=x\"]"}"#, true),
        (r#"{"code":4,"msg":"OTHER"}"#, true),
    ] {
        plugin(error);
        Call::of("ADD", &conf, "c1", &ns).run().success();
        if is_asked_again {
            assert_eq!(del.run().success(), Value::Null, "{error}");
        } else {
            assert!(del.run().failure(100).contains("the database is away"));
            assert!(mark.exists(), "nobody gives the address back any more");
            assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
        }
        assert_eq!(node.traces(), before, "{error}");
    }
}

#[test]
fn a_step_that_fails_keeps_no_other_from_being_tried() {
    let node = Node::new();
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    conf["runtimeConfig"] = json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "protocol": "tcp" }] });
    let ns = netns("a");
    for step in ["unport", "unmap", "unlink", "unrecord"] {
        let r = Call::of("ADD", &conf, "c1", &ns).run().success();
        let host = r["interfaces"][0]["name"].as_str().expect("name").to_owned();
        let msg = Call::of("DEL", &conf, "c1", "").env("RUSTNET_CNI_FAIL_AT", step).run().failure(5);
        assert!(msg.contains(step), "{msg}");
        assert!(!ip(&["link"]).contains(&host), "{step}: the veth is there");
        assert_eq!(bpf::entries(&node.map).len() + bpf::host_ports(&node.host_ports).len(), 0, "{step}");
        assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
        assert_eq!(node.traces(), before, "{step}");
    }
}

/// Addresses stay leased as long as the map may lead to them.
#[test]
fn a_map_that_cannot_be_opened_keeps_the_lease_and_not_the_veth() {
    let node = Node::new();
    let before = node.traces();
    let mut broken = node.conf("1.1.0");
    broken["bpffs"] = json!("/run/plain");
    fs::create_dir("/run/plain").expect("directory");
    fs::write("/run/plain/rn_endpoints", "").expect("file");
    let r = node.add("c1", &netns("a"));
    let msg = Call::of("DEL", &broken, "c1", "").run().failure(5);
    assert!(msg.contains("/run/plain/rn_endpoints") && msg.contains("DEL it again"), "{msg}");
    assert!(!ip(&["link"]).contains(r["interfaces"][0]["name"].as_str().expect("name")));
    assert!(node.run.join("ipam").join(ips(&r)[0].to_string()).exists());
    node.del("c1");
    assert_eq!(node.traces(), before);
}

/// The names of two attachments may agree by chance, or the other one is of another installation.
#[test]
fn a_link_of_this_name_that_is_anothers_stays() {
    let node = Node::new();
    let mut other = node.conf("1.1.0");
    other["runDir"] = json!("/run/other");
    fs::create_dir("/run/other").expect("directory");
    fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
    let r = Call::of("ADD", &other, "c1", &netns("a")).run().success();
    let before = node.traces();
    Call::of("ADD", &node.conf("1.1.0"), "c1", &netns("b")).run().failure(100);
    node.del("c1");
    node.gc(&[]);
    assert_eq!(node.traces(), before);
    ping("", &ips(&r)[0].to_string());
    assert_eq!(Call::of("DEL", &other, "c1", "").run().success(), Value::Null);

    let r = node.add("c1", &netns("c"));
    let host = r["interfaces"][0]["name"].as_str().expect("name");
    fs::remove_file(node.run.join("endpoints/c1@eth0.json")).expect("record");
    ip(&["link", "set", host, "alias", "/run/rustnet rustnet c2@eth0"]);
    node.del("c1");
    assert!(ip(&["link"]).contains(host), "c2's veth is gone");
}

/// A link without an alias is of the network that its group names.
#[test]
fn a_link_without_an_alias_that_is_anothers_stays() {
    let node = Node::new();
    let before = node.traces();
    let mut other = node.conf("1.1.0");
    other["runDir"] = json!("/run/other");
    fs::create_dir("/run/other").expect("directory");
    fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
    let out = Call::of("ADD", &other, "c1", &netns("a")).env("RUSTNET_CNI_CRASH_AT", "veth").run();
    assert_eq!(out.signal, Some(9), "{out:?}");
    let left = node.traces();
    assert_ne!(left, before);
    node.del("c1");
    assert_eq!(node.traces(), left);
    assert_eq!(Call::of("DEL", &other, "c1", "").run().success(), Value::Null);
    assert_eq!(node.traces(), before);
    // Links of earlier releases have no group.
    Call::of("ADD", &other, "c1", &netns("b")).env("RUSTNET_CNI_CRASH_AT", "veth").run();
    let host = left_link();
    ip(&["link", "set", &host, "group", "0"]);
    node.del("c1");
    assert_eq!(node.traces(), before);
}

/// The name of the one veth of the host.
fn left_link() -> String {
    let links = ip_json(&["link"]);
    let names = links.as_array().expect("list").iter().filter_map(|link| link["ifname"].as_str());
    names.filter(|name| name.starts_with("rnv")).collect::<Vec<_>>().concat()
}

/// Names that fit no alias of the kernel: the owner is known all the same.
#[test]
fn gc_of_another_run_directory_leaves_pods_with_long_names() {
    let node = Node::new();
    let before = node.traces();
    let mut other = node.conf("1.1.0");
    (other["runDir"], other["name"]) = (json!("/run/other"), json!("n".repeat(100)));
    fs::create_dir("/run/other").expect("directory");
    fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
    let id = "c".repeat(200);
    let r = Call::of("ADD", &other, &id, &netns("a")).run().success();
    let with = node.traces();
    node.gc(&[]);
    assert_eq!(node.traces(), with);
    ping("", &ips(&r)[0].to_string());
    assert_eq!(gc(other.clone(), &[&id]).run().success(), Value::Null);
    assert_eq!(node.traces(), with);
    assert_eq!(gc(other, &[]).run().success(), Value::Null);
    assert_eq!(node.traces(), before);
}

/// Between the making of a link and its record: the ADD may still run.
#[test]
fn gc_leaves_a_link_that_another_network_has_just_made() {
    let node = Node::new();
    let before = node.traces();
    let own = node.conf("1.1.0");
    let (mut renamed, mut moved) = (own.clone(), own.clone());
    renamed["name"] = json!("other");
    moved["runDir"] = json!("/run/other");
    fs::create_dir("/run/other").expect("directory");
    fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
    let ns = netns("a");
    for other in [renamed, moved] {
        let out = Call::of("ADD", &other, "c1", &ns).env("RUSTNET_CNI_CRASH_AT", "veth").run();
        assert_eq!(out.signal, Some(9), "{out:?}");
        let left = node.traces();
        assert_ne!(left, before);
        node.gc(&[]);
        assert_eq!(node.traces(), left);
        assert_eq!(gc(other, &[]).run().success(), Value::Null);
        assert_eq!(node.traces(), before);
    }
}

/// An address goes back to whoever gave it, whatever the configuration says by now.
#[test]
fn an_address_goes_back_to_the_plugin_that_gave_it() {
    let node = Node::new();
    let before = node.traces();
    let then = host_local(&node, "10.1.0.0/16");
    let (mut elsewhere, mut renamed) = (host_local(&node, "10.2.0.0/16"), then.clone());
    elsewhere["ipam"]["dataDir"] = json!("/run/elsewhere");
    renamed["name"] = json!("other");
    let mut spoilt = then.clone();
    spoilt["ipam"] = json!("host-local");
    for (i, now) in [node.conf("1.1.0"), elsewhere, renamed, spoilt].into_iter().enumerate() {
        for removal in [Call::of("DEL", &now, "c1", ""), gc(now.clone(), &[])] {
            let r = Call::of("ADD", &then, "c1", &netns(&format!("a{i}"))).run().success();
            assert_eq!(leases_on_disk("rustnet"), 1);
            if now["name"] == "other" {
                // GC of another network: only what has lost its device.
                let left = node.traces();
                assert_eq!(gc(now.clone(), &[]).run().success(), Value::Null);
                assert_eq!(node.traces(), left);
                ip(&["link", "del", r["interfaces"][0]["name"].as_str().expect("name")]);
            }
            assert_eq!(removal.run().success(), Value::Null, "{now}");
            assert_eq!(node.traces(), before, "{now}");
            crate::common::remove_netns(&format!("/run/netns/a{i}"), false);
        }
    }
}

/// Marks of earlier releases do not tell whose address it was.
#[test]
fn a_lease_that_nobody_can_give_back_is_named() {
    let node = Node::new();
    let before = node.traces();
    Call::of("ADD", &host_local(&node, "10.1.0.0/16"), "c1", &netns("a")).run().success();
    fs::write(node.run.join("ipam/delegated/rustnet/c1@eth0"), "").expect("mark");
    let out = Call::of("DEL", &node.conf("1.1.0"), "c1", "").run();
    assert!(out.ok && out.stderr.contains("c1@eth0") && out.stderr.contains("host-local"), "{out:?}");
    assert_eq!(without_leases(&node), before);
}

/// Both keys that runtimes have used; each alone, or both with different lists.
#[test]
fn gc_reads_both_keys() {
    let node = Node::new();
    let list = |id: &str| json!([{ "containerID": id, "ifname": "eth0" }]);
    let cases = [
        (list("c1"), Value::Null, 1),
        (Value::Null, list("c1"), 1),
        (list("c1"), list("c2"), 2),
        (Value::Null, Value::Null, 0),
        (json!([]), json!([]), 0),
    ];
    for (i, (valid, older, want)) in cases.into_iter().enumerate() {
        for id in ["c1", "c2"] {
            node.add(id, &netns(&format!("{id}-{i}")));
        }
        let mut conf = node.conf("1.1.0");
        for (key, value) in [("cni.dev/valid-attachments", valid), ("cni.dev/attachments", older)] {
            if value.is_array() {
                conf[key] = value;
            }
        }
        if want == 0 && conf.get("cni.dev/attachments").is_none() {
            conf["cni.dev/attachments"] = Value::Null;
        }
        assert_eq!(Call::new("GC", &conf).run().success(), Value::Null);
        let links = ip_json(&["link"]);
        let left = links.as_array().expect("list").iter().filter(|l| l["ifname"].to_string().contains("rnv")).count();
        assert_eq!(left, want, "{conf}");
        node.gc(&[]);
    }
}

/// Networks that were renamed have no GC of their own any more.
#[test]
fn gc_takes_what_has_no_device_any_more() {
    let node = Node::new();
    let mut old = node.conf("1.1.0");
    old["name"] = json!("old");
    let living = Call::of("ADD", &old, "c1", &netns("a")).run().success();
    let want = node.traces();
    // One loses its device, one is killed between its address and its record.
    let r = Call::of("ADD", &old, "c2", &netns("b")).run().success();
    ip(&["link", "del", r["interfaces"][0]["name"].as_str().expect("name")]);
    let out = Call::of("ADD", &old, "c3", &netns("c")).env("RUSTNET_CNI_CRASH_AT", "ipam").run();
    assert_eq!(out.signal, Some(9), "{out:?}");
    crate::common::remove_netns("/run/netns/c", false);
    // With its namespace, the kernel removes the link some time later.
    until("the killed call's link goes", &|| ip(&["-o", "link"]).matches("rnv").count() == 1);
    node.gc(&[]);
    assert_eq!(node.traces(), want);
    ping("", &ips(&living)[0].to_string());
}
