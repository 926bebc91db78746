//! Which address a pod gets: none that the kernel knows to be in use, and the one that somebody asks for.

use crate::common::{Call, Node, bpf, ip, ip_json, ips, netns, ping};
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;

/// Files get lost: a directory is emptied, moved, or hidden by a mount. Pods go on.
#[test]
fn no_address_of_a_living_pod_is_given_out_whatever_was_lost() {
    type Loss = fn(&Node, &[IpAddr], &mut Value);
    let losses: [(&str, Loss); 4] = [
        ("leases", |node, _, _| fs::remove_dir_all(node.run.join("ipam")).expect("leases")),
        ("leases and records", |node, _, _| {
            for dir in ["ipam", "endpoints"] {
                fs::remove_dir_all(node.run.join(dir)).expect(dir);
            }
        }),
        ("leases and map entries", |node, ips, _| {
            fs::remove_dir_all(node.run.join("ipam")).expect("leases");
            for ip in ips {
                bpf::delete(&node.map, *ip);
            }
        }),
        ("the directory's name", |node, _, conf| {
            fs::create_dir("/run/other").expect("directory");
            fs::copy(node.run.join("node.json"), "/run/other/node.json").expect("node.json");
            conf["runDir"] = json!("/run/other");
        }),
    ];
    for (what, lose) in losses {
        std::thread::spawn(move || {
            let node = Node::new();
            let first: Vec<IpAddr> =
                (0..12).flat_map(|n| ips(&node.add(&format!("c{n}"), &netns(&format!("p{n}"))))).collect();
            let entries = bpf::entries(&node.map).len();
            let mut conf = node.conf("1.1.0");
            lose(&node, &first, &mut conf);
            let lost = entries - bpf::entries(&node.map).len();
            let r = Call::of("ADD", &conf, "new", &netns("new")).run().success();
            assert!(ips(&r).iter().all(|ip| !first.contains(ip)), "{what}: {r}");
            assert_eq!(bpf::entries(&node.map).len(), entries - lost + 2, "{what}");
            for ip in first.iter().chain(&ips(&r)) {
                ping("", &ip.to_string());
            }
        })
        .join()
        .expect(what);
    }
}

/// host-local keeps its state on a disk, which may get lost as well.
#[test]
fn an_ipam_plugin_that_lost_its_state_takes_no_address_from_a_living_pod() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "host-local", "subnet": "10.1.0.0/16" });
    let r = Call::of("ADD", &conf, "c1", &netns("a")).run().success();
    for loss in ["state", "state and map entry"] {
        fs::remove_dir_all("/var/lib/cni/networks").expect("state");
        if loss != "state" {
            bpf::delete(&node.map, ips(&r)[0]);
        }
        let before = node.traces();
        let msg = Call::of("ADD", &conf, "c2", &netns(&loss.replace(' ', "-"))).run().failure(11);
        assert!(msg.contains(&ips(&r)[0].to_string()) && msg.contains("in use"), "{loss}: {msg}");
        assert_eq!(node.traces(), before, "{loss}");
        ping("", &ips(&r)[0].to_string());
    }
    // It goes on to the next one.
    let other = Call::of("ADD", &conf, "c2", &netns("b")).run().success();
    assert_ne!(ips(&r), ips(&other));
    for r in [&r, &other] {
        ping("", &ips(r)[0].to_string());
    }
}

/// What a pod left behind that had no DEL: an entry whose interface has gone.
#[test]
fn an_entry_of_an_interface_that_has_gone_keeps_no_address() {
    let node = Node::new();
    let r = node.add("c1", &netns("a"));
    ip(&["link", "del", r["interfaces"][0]["name"].as_str().expect("name")]);
    fs::remove_dir_all(node.run.join("ipam")).expect("leases");
    assert_eq!(bpf::entries(&node.map).len(), 2);
    let again = node.add("c2", &netns("b"));
    assert_eq!(ips(&again), ips(&r));
    ping("", &ips(&again)[0].to_string());
    // The DEL that comes late takes nothing from the new one.
    node.del("c1");
    assert_eq!(bpf::entries(&node.map).len(), 2);
    ping("", &ips(&again)[0].to_string());
}

#[test]
fn what_somebody_asks_for_is_given_or_refused_by_name() {
    let node = Node::new();
    let before = node.traces();
    let with = |key: &str, value: Value| {
        let mut conf = node.conf("1.1.0");
        conf[key] = value;
        conf
    };
    let plain = node.conf("1.1.0");
    let (v4, v6) = ("10.244.1.77", "fd00:10:244:1::77");
    for (i, (conf, args, want)) in [
        (plain.clone(), format!("IP={v4}"), vec![v4]),
        (plain.clone(), format!("IP={v6}/64,{v4}/24;IgnoreUnknown=1"), vec![v4, v6]),
        (with("runtimeConfig", json!({ "ips": [format!("{v4}/24")] })), String::new(), vec![v4]),
        (with("runtimeConfig", json!({ "ips": null })), String::new(), vec![]),
        (with("args", json!({ "cni": { "ips": [v6] } })), format!("IP={v4};IgnoreUnknown=true"), vec![v4, v6]),
    ]
    .into_iter()
    .enumerate()
    {
        let r = Call::of("ADD", &conf, "c1", &netns(&format!("a{i}"))).env("CNI_ARGS", &args).run().success();
        let got: Vec<String> = ips(&r).iter().map(IpAddr::to_string).collect();
        assert!(got.len() == 2 && want.iter().all(|ip| got.contains(&(*ip).to_owned())), "{args}: {got:?}");
        for ip in &got {
            ping("", ip);
        }
        node.del("c1");
    }
    // The runtime's word counts first, as with the reference plugins.
    let mut conf = with("args", json!({ "cni": { "mac": "02:00:00:00:00:02" } }));
    for (runtime, args, want) in [
        (json!({}), "MAC=02:00:00:00:00:03", "02:00:00:00:00:02"),
        (json!({ "mac": "02:00:00:00:00:01" }), "", "02:00:00:00:00:01"),
    ] {
        conf["runtimeConfig"] = runtime;
        let r = Call::of("ADD", &conf, "c1", &netns(&want.replace(':', ""))).env("CNI_ARGS", args).run().success();
        assert_eq!(r["interfaces"][1]["mac"], want);
        node.del("c1");
    }
    let r = Call::of("ADD", &plain, "c1", &netns("m")).env("CNI_ARGS", "MAC=02:00:00:00:00:03").run().success();
    assert_eq!(r["interfaces"][1]["mac"], "02:00:00:00:00:03");
    node.del("c1");

    let ns = netns("b");
    for (args, code, part) in [
        ("IP=10.9.9.9", 7, "10.9.9.9"),
        ("IP=10.244.1.0", 7, "10.244.1.0"),
        ("IP=10.244.1.7,10.244.1.8", 2, "10.244.1.8"),
        ("IP=x", 4, "\"x\""),
        ("MAC=x", 4, "\"x\""),
        ("IPS=10.244.1.7", 4, "IPS is unknown"),
        ("IgnoreUnknown=0;A=b", 4, "A is unknown"),
    ] {
        let msg = Call::of("ADD", &plain, "c1", &ns).env("CNI_ARGS", args).run().failure(code);
        assert!(msg.contains(part), "{args}: {msg}");
        assert_eq!(node.traces(), before, "{args}");
    }
    let r = node.add("c2", &netns("c"));
    let held = ips(&r)[0];
    let msg = Call::of("ADD", &plain, "c1", &ns).env("CNI_ARGS", &format!("IP={held}")).run().failure(11);
    assert!(msg.contains(&held.to_string()) && msg.contains("c2@eth0"), "{msg}");
}

/// A plugin of IPAM gets the call as it came; it may not know what was asked for.
#[test]
fn an_ipam_plugin_gives_what_was_asked_for_or_the_add_is_refused() {
    let node = Node::new();
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "host-local", "subnet": "10.1.0.0/16" });
    conf["runtimeConfig"] = json!({ "ips": ["10.1.0.77/16"] });
    let r = Call::of("ADD", &conf, "c1", &netns("a")).env("CNI_ARGS", "IgnoreUnknown=1;OTHER=x").run().success();
    assert_eq!(ips(&r), ["10.1.0.77".parse::<IpAddr>().expect("address")]);
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    conf["ipam"] = json!({ "type": "static", "addresses": [{ "address": "10.7.0.5/24" }] });
    conf["args"] = json!({ "cni": { "ips": ["10.7.0.6"] } });
    conf["runtimeConfig"] = json!({});
    conf["ipam"]["type"] = json!("deaf");
    let reply = r#"{"cniVersion":"1.1.0","ips":[{"address":"10.7.0.5/24"}]}"#;
    fs::write("/run/plugins/deaf", format!("#!/bin/sh\n[ $CNI_COMMAND = ADD ] && echo '{reply}'\nexit 0\n"))
        .expect("script");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions("/run/plugins/deaf", mode).expect("mode");
    let msg = Call::of("ADD", &conf, "c1", &netns("b")).run().failure(2);
    assert!(msg.contains("deaf") && msg.contains("10.7.0.6"), "{msg}");
    assert_eq!(node.traces(), before);
}

#[test]
fn a_range_without_an_address_for_pods_is_named() {
    for range in ["10.244.1.0/31", "10.244.1.7/32", "fd00:10:244:1::/127"] {
        std::thread::spawn(move || {
            let node = Node::with_ranges(&[range]);
            let before = node.traces();
            let conf = node.conf("1.1.0");
            for msg in [
                Call::of("ADD", &conf, "c1", &netns("a")).run().failure(7),
                Call::new("STATUS", &conf).run().failure(50),
            ] {
                assert!(msg.contains(range) && msg.contains("too small") && msg.contains("/30"), "{msg}");
            }
            assert_eq!(node.traces(), before);
        })
        .join()
        .expect(range);
    }
}

/// What is larger than the node's fits through no uplink; IPv6 needs 1280.
#[test]
fn bounds_of_the_mtu() {
    let node = Node::new();
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    for (mtu, part) in [(1451, "1450 of node n1"), (9000, "9000"), (1279, "IPv6"), (1000, "1280"), (67, "68")] {
        conf["mtu"] = json!(mtu);
        let msg = Call::of("ADD", &conf, "c1", &netns(&format!("a{mtu}"))).run().failure(7);
        assert!(msg.contains("mtu") && msg.contains(part), "{mtu}: {msg}");
        // What no node could have is refused with the configuration, before STATUS.
        let code = if mtu < 68 { 7 } else { 50 };
        assert!(Call::new("STATUS", &conf).run().failure(code).contains(part));
        assert_eq!(node.traces(), before);
    }
    for mtu in [1280, 1450] {
        conf["mtu"] = json!(mtu);
        let ns = format!("b{mtu}");
        for address in ips(&Call::of("ADD", &conf, "c1", &netns(&ns)).run().success()) {
            ping("", &address.to_string());
        }
        assert_eq!(ip_json(&["-n", &ns, "link", "show", "eth0"])[0]["mtu"], mtu);
        node.del("c1");
    }
    // Addresses of another plugin are known only later.
    conf["mtu"] = json!(1279);
    for (subnet, ok) in [("10.1.0.0/16", true), ("fd01::/64", false)] {
        conf["ipam"] = json!({ "type": "host-local", "subnet": subnet });
        let out = Call::of("ADD", &conf, "c1", &netns(&format!("c{ok}"))).run();
        if ok {
            out.success();
            Call::of("DEL", &conf, "c1", "").run().success();
        } else {
            assert!(out.failure(7).contains("IPv6"));
        }
        assert_eq!(node.traces(), before);
    }
}

/// Booted with `ipv6.disable=1`, the kernel has neither these files nor IPv6. An empty directory stands in for that.
#[test]
fn a_kernel_without_ipv6_is_named() {
    let node = Node::new();
    let before = node.traces();
    let ns = netns("a");
    crate::common::mount("tmpfs", "/proc/sys/net/ipv6", "tmpfs", 0);
    let msg = Call::of("ADD", &node.conf("1.1.0"), "c1", &ns).run().failure(7);
    for part in ["no IPv6", "fd00:10:244:1::", "ipv6.disable=1", "podCIDRs"] {
        assert!(msg.contains(part), "{part}: {msg}");
    }
    assert_eq!(node.traces(), before);
    // Pods of IPv4 need none of it.
    node.write_node_file(&json!({ "version": 1, "nodeName": "n1", "podCIDRs": ["10.244.1.0/24"], "mtu": 1450 }));
    let r = node.add("c1", &ns);
    ping("", &ips(&r)[0].to_string());
    let conf = node.conf_with("1.1.0", &r);
    assert_eq!(Call::of("CHECK", &conf, "c1", &ns).run().success(), Value::Null);
}

/// `conf.all` switches IPv6 off on all devices that are there, and on new ones.
#[test]
fn ipv6_that_is_off_on_all_devices_of_the_host() {
    let node = Node::new();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("a setting of this namespace");
    let r = node.add("c1", &netns("a"));
    let host = r["interfaces"][0]["name"].as_str().expect("name");
    let off = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{host}/disable_ipv6")).expect("setting");
    assert_eq!(off.trim(), "0");
    // The host's own addresses of IPv6 have gone with it; pods have theirs.
    ping("", &ips(&r)[0].to_string());
    let b = netns("b");
    node.add("c2", &b);
    ping(&b, &ips(&r)[1].to_string());
}
