//! ADD, CHECK, DEL, STATUS and VERSION from end to end with our own IPAM.

use crate::common::{Call, Node, bpf, command, ip, ip_json, ips, netns, netns_cookie, ping, remove_netns};
use rustnet_common::endpoint::Endpoint;
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn add_makes_what_the_result_says() {
    let node = Node::new();
    let ns = netns("a");
    let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1";
    let r = Call::of("ADD", &node.conf("1.1.0"), "c1", &ns).env("CNI_ARGS", args).run().success();
    let host = r["interfaces"][0]["name"].as_str().expect("name").to_owned();
    let [v4, v6] = ips(&r)[..] else { panic!("two addresses: {r}") };
    assert!(v4.is_ipv4() && v6.is_ipv6() && host.starts_with("rnv"));
    let want = json!({
        "cniVersion": "1.1.0",
        "interfaces": [
            { "name": host, "mac": r["interfaces"][0]["mac"], "mtu": 1450 },
            { "name": "eth0", "mac": r["interfaces"][1]["mac"], "mtu": 1450, "sandbox": ns },
        ],
        "ips": [
            { "address": format!("{v4}/32"), "gateway": "169.254.1.1", "interface": 1 },
            { "address": format!("{v6}/128"), "gateway": "fe80::1", "interface": 1 },
        ],
        "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }, { "dst": "::/0", "gw": "fe80::1" }],
    });
    assert_eq!(r, want);

    // The pod's side.
    let link = &ip_json(&["-n", "a", "addr", "show", "eth0"])[0];
    assert_eq!(link["address"], r["interfaces"][1]["mac"]);
    assert_eq!(link["mtu"], 1450);
    assert_eq!(ip_json(&["-n", "a", "link", "show", "eth0"])[0]["inet6_addr_gen_mode"], "none");
    let addresses: Vec<_> = link["addr_info"].as_array().expect("addresses").iter().collect();
    assert_eq!(addresses.len(), 2, "no link-local address may appear: {addresses:?}");
    for (address, (ip, prefix)) in addresses.iter().zip([(v4, 32), (v6, 128)]) {
        assert_eq!((&address["local"], &address["prefixlen"]), (&json!(ip), &json!(prefix)));
        assert!(address.get("tentative").is_none());
    }
    for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
        let default = ip_json(&["-n", "a", family, "route", "show", "default"]);
        assert_eq!(default[0]["gateway"], gateway);
        let neighbours = ip_json(&["-n", "a", family, "neigh", "show", "nud", "permanent", "dev", "eth0"]);
        assert!(
            neighbours
                .as_array()
                .expect("list")
                .iter()
                .any(|n| n["dst"] == gateway && n["lladdr"] == r["interfaces"][0]["mac"])
        );
    }

    // The host's side.
    let link = &ip_json(&["link", "show", &host])[0];
    assert_eq!(link["address"], r["interfaces"][0]["mac"]);
    assert_eq!(link["inet6_addr_gen_mode"], "none");
    for (sysctl, value) in [
        ("ipv4/.../rp_filter", "0"),
        ("ipv4/.../arp_ignore", "8"),
        ("ipv4/.../arp_accept", "0"),
        ("ipv6/.../accept_ra", "0"),
    ] {
        let path = format!("/proc/sys/net/{}", sysctl.replace("...", &format!("conf/{host}")));
        assert_eq!(fs::read_to_string(&path).expect(&path).trim(), value, "{path}");
    }
    for (family, ip) in [("-4", v4), ("-6", v6)] {
        let route = ip_json(&[family, "route", "show", "dev", &host, &ip.to_string()]);
        assert_eq!(route[0]["dst"], json!(ip), "{route}");
        let neighbour = ip_json(&[family, "neigh", "show", "nud", "permanent", "dev", &host]);
        assert_eq!((&neighbour[0]["dst"], &neighbour[0]["lladdr"]), (&json!(ip), &r["interfaces"][1]["mac"]));
    }
    for hook in ["ingress", "egress"] {
        let out = command("tc", &["-j", "filter", "show", "dev", &host, hook]);
        let filters: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let bpf = filters.as_array().expect("list").iter().find(|f| !f["options"].is_null()).expect("a filter");
        assert_eq!(
            (&bpf["pref"], &bpf["kind"], &bpf["options"]["handle"]),
            (&json!(1), &json!("bpf"), &json!("0x1")),
            "{bpf}"
        );
        assert_eq!(bpf["options"]["direct-action"], true);
        assert_eq!(bpf["options"]["bpf_name"], if hook == "ingress" { "from_pod" } else { "to_pod" });
    }

    // The endpoints map and the record.
    let mut entries = bpf::entries(&node.map);
    entries.sort_unstable_by_key(|e| e.0);
    assert_eq!(entries.iter().map(|e| e.0).collect::<Vec<_>>(), [v4, v6]);
    for (_, e) in &entries {
        let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
        assert_eq!(json!(mac(e.mac)), r["interfaces"][1]["mac"]);
        assert_eq!(json!(mac(e.host_mac)), r["interfaces"][0]["mac"]);
        assert_eq!(json!(e.ifindex), link["ifindex"]);
    }
    let record: Value =
        serde_json::from_slice(&fs::read(node.run.join("endpoints/c1@eth0.json")).expect("record")).expect("JSON");
    let want = json!({
        "containerId": "c1", "ifname": "eth0", "netns": ns, "netnsCookie": netns_cookie(&ns), "network": "rustnet",
        "hostIfname": host,
        "ifindex": link["ifindex"], "mac": r["interfaces"][1]["mac"], "addresses": [v4, v6],
        "podNamespace": "shop", "podName": "web-0", "podUid": "u1",
        "hasRoutes": true,
    });
    assert_eq!(record, want);
    let lease = fs::read_to_string(node.run.join("ipam").join(v4.to_string())).expect("lease");
    assert_eq!(lease, "c1\r\neth0\nrustnet\n");
}

#[test]
fn packets_flow_both_ways_at_once() {
    let node = Node::new();
    let (a, b) = (netns("a"), netns("b"));
    let first = ips(&node.add("a", &a));
    for ip in &first {
        ping("", &ip.to_string());
    }
    for ip in ips(&node.add("b", &b)) {
        ping(&a, &ip.to_string());
    }
    for target in ["192.0.2.1", "2001:db8::1"] {
        ping(&a, target);
        ping(&b, target);
    }
    for ip in first {
        ping(&b, &ip.to_string());
    }
}

#[test]
fn result_in_every_version() {
    let node = Node::new();
    for version in VERSIONS {
        let ns = netns(version);
        let r = Call::of("ADD", &node.conf(version), "c1", &ns).run().success();
        assert_eq!(r["cniVersion"], version);
        for (i, family) in ["4", "6"].iter().enumerate() {
            let has = r["ips"][i].get("version");
            assert_eq!(has, (version < "1.0.0").then(|| json!(family)).as_ref(), "{version}");
        }
        assert_eq!(r["interfaces"][1].get("mtu").is_some(), version == "1.1.0", "{version}");
        let check = Call::of("CHECK", &node.conf_with(version, &r), "c1", &ns).run();
        if version < "0.4.0" {
            assert!(check.failure(1).contains("0.4.0"));
        } else {
            assert_eq!(check.success(), Value::Null);
        }
        for verb in ["STATUS", "GC"] {
            let out = Call::new(verb, &node.conf(version)).run();
            if version < "1.1.0" {
                assert!(out.failure(1).contains("1.1.0"));
            } else {
                assert_eq!(out.success(), Value::Null);
            }
        }
        assert_eq!(Call::of("DEL", &node.conf_with(version, &r), "c1", &ns).run().success(), Value::Null);
    }
}

#[test]
fn del_needs_nothing_and_repeats() {
    let node = Node::new();
    let before = node.traces();
    let ns = netns("a");
    let r = node.add("c1", &ns);
    assert_ne!(node.traces(), before);
    // As containerd does: with everything, then with nothing.
    assert_eq!(Call::of("DEL", &node.conf_with("1.1.0", &r), "c1", &ns).run().success(), Value::Null);
    assert_eq!(node.traces(), before);
    assert!(!ip(&["-n", "a", "link"]).contains("eth0"));
    for _ in 0..3 {
        let bare = Call::of("DEL", &node.conf("1.1.0"), "c1", "").without("CNI_NETNS");
        assert_eq!(bare.run().success(), Value::Null);
    }

    // The namespace goes first.
    let r = node.add("c1", &ns);
    remove_netns(&ns, false);
    assert_eq!(Call::of("DEL", &node.conf_with("1.1.0", &r), "c1", &ns).run().success(), Value::Null);
    assert_eq!(node.traces(), before);

    // Neither agent nor pins nor run directory: nothing to do is no error.
    let gone = json!({ "cniVersion": "1.1.0", "name": "rustnet", "bpffs": "/run/absent", "runDir": "/run/absent" });
    assert_eq!(Call::of("DEL", &gone, "c1", "").run().success(), Value::Null);
    assert_eq!(Call::of("DEL", &gone, "never-added", "/run/netns/absent").run().success(), Value::Null);
}

#[test]
fn del_works_with_the_node_file_and_the_record_gone() {
    let node = Node::new();
    let before = node.traces();
    node.add("c1", &netns("a"));
    fs::remove_file(node.run.join("node.json")).expect("node.json");
    fs::remove_file(node.run.join("endpoints/c1@eth0.json")).expect("record");
    node.del("c1");
    node.write_node_file(&json!({}));
    assert_eq!(node.traces(), before);
}

#[test]
fn del_leaves_an_address_that_was_given_to_another() {
    let node = Node::new();
    node.add("c1", &netns("a"));
    let record = node.run.join("endpoints/c1@eth0.json");
    let old = fs::read(&record).expect("record");
    let mut stale: Value = serde_json::from_slice(&old).expect("JSON");
    node.del("c1");
    let r = node.add("c2", &netns("b"));
    // A record that survived its lease names addresses that are now c2's.
    stale["addresses"] = json!(ips(&r));
    fs::write(&record, stale.to_string()).expect("record");
    node.del("c1");
    assert_eq!(bpf::entries(&node.map).len(), 2);
    ping("", &ips(&r)[0].to_string());
}

#[test]
fn a_second_add_fails_and_harms_nothing() {
    let node = Node::new();
    let (a, b) = (netns("a"), netns("b"));
    let r = node.add("c1", &a);
    let before = node.traces();
    // The same again; another container in the same namespace; the same container elsewhere.
    for (id, ns) in [("c1", &a), ("c2", &a), ("c1", &b)] {
        let out = Call::of("ADD", &node.conf("1.1.0"), id, ns).run().failure(100);
        assert!(out.contains("eth0") && out.contains("DEL"), "{out}");
        assert_eq!(node.traces(), before, "{id} {ns}");
    }
    for ip in ips(&r) {
        ping("", &ip.to_string());
    }
    assert_eq!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &a).run().success(), Value::Null);
    // A second interface of the same container is another matter.
    Call::of("ADD", &node.conf("1.1.0"), "c1", &a).env("CNI_IFNAME", "net1").run().failure(5);
    assert_eq!(node.traces(), before, "two default routes in one pod are refused, and undone");
    assert_eq!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &a).run().success(), Value::Null);
}

/// The kernel takes 255 bytes as an alias. What is longer goes without one, and is found by its name.
#[test]
fn an_attachment_whose_names_fit_no_alias() {
    let node = Node::new();
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    conf["name"] = json!("n".repeat(100));
    let (id, ns) = ("c".repeat(200), netns("a"));
    let r = Call::of("ADD", &conf, &id, &ns).run().success();
    ping("", &ips(&r)[0].to_string());
    assert_eq!(Call::of("DEL", &conf, &id, &ns).run().success(), Value::Null);
    assert_eq!(node.traces(), before);
}

/// Changes the entry of the IPv6 address.
fn change_entry(node: &Node, r: &Value, change: fn(&mut Endpoint)) {
    let ip = ips(r)[1];
    let mut entry = bpf::entries(&node.map).into_iter().find(|e| e.0 == ip).expect("entry").1;
    change(&mut entry);
    bpf::put(&node.map, ip, &entry);
}

/// Changes the record.
fn change_record(node: &Node, change: fn(&mut Value)) {
    let path = node.run.join("endpoints/c1@eth0.json");
    let mut record = serde_json::from_slice(&fs::read(&path).expect("record")).expect("JSON");
    change(&mut record);
    fs::write(path, record.to_string()).expect("record");
}

/// Changes a setting.
fn change_setting(path: &str, value: &str) {
    fs::write(format!("/proc/sys/net/{path}"), value).expect("a setting of this namespace");
}

#[test]
fn check_finds_every_change() {
    type Change = fn(&Node, &str, &Value);
    let node = Node::new();
    let changes: [(&str, Change); 38] = [
        ("another interface", |node, _, r| change_entry(node, r, |e| e.ifindex += 1)),
        ("another interface", |node, _, r| change_entry(node, r, |e| e.mac[5] ^= 1)),
        ("another interface", |node, _, r| change_entry(node, r, |e| e.host_mac[5] ^= 1)),
        ("other flags", |node, _, r| change_entry(node, r, |e| e.flags ^= 1)),
        ("MAC", |_, host, _| drop(ip(&["link", "set", host, "address", "02:00:00:00:00:07"]))),
        ("MTU", |_, host, _| drop(ip(&["link", "set", host, "mtu", "1400"]))),
        ("neighbour 169.254.1.1", |_, _, _| drop(ip(&["-n", "a", "-4", "neigh", "flush", "all", "nud", "permanent"]))),
        ("neighbour fe80::1", |_, _, _| drop(ip(&["-n", "a", "neigh", "del", "fe80::1", "dev", "eth0"]))),
        ("neighbour fe80::1", |_, _, _| {
            ip(&["-n", "a", "neigh", "replace", "fe80::1", "lladdr", "02:00:00:00:00:07", "dev", "eth0"]);
        }),
        ("neighbour 10.244.1.", |_, host, r| {
            ip(&["neigh", "del", &ips(r)[0].to_string(), "dev", host]);
        }),
        ("neighbour fd00:", |_, host, r| {
            ip(&["neigh", "replace", &ips(r)[1].to_string(), "lladdr", "02:00:00:00:00:07", "dev", host]);
        }),
        ("route to its gateway 169.254.1.1", |_, _, _| drop(ip(&["-n", "a", "route", "del", "169.254.1.1"]))),
        ("route to its gateway fe80::1", |_, _, _| drop(ip(&["-n", "a", "-6", "route", "del", "fe80::1"]))),
        ("rp_filter is 1", |_, host, _| change_setting(&format!("ipv4/conf/{host}/rp_filter"), "1")),
        ("arp_ignore is 0", |_, host, _| change_setting(&format!("ipv4/conf/{host}/arp_ignore"), "0")),
        ("arp_accept is 1", |_, host, _| change_setting(&format!("ipv4/conf/{host}/arp_accept"), "1")),
        ("accept_ra is 2", |_, host, _| change_setting(&format!("ipv6/conf/{host}/accept_ra"), "2")),
        ("host's route to fd00:", |_, host, _| change_setting(&format!("ipv6/conf/{host}/disable_ipv6"), "1")),
        ("record of c1@eth0 has gone", |node, _, _| {
            fs::remove_file(node.run.join("endpoints/c1@eth0.json")).expect("record");
        }),
        ("record of c1@eth0 has another host interface", |node, _, _| change_record(node, |r| r["ifindex"] = json!(7))),
        ("another MAC", |node, _, _| change_record(node, |r| r["mac"] = json!("02:00:00:00:00:07"))),
        ("another address", |node, _, _| change_record(node, |r| r["addresses"] = json!(["10.244.1.9"]))),
        ("another network", |node, _, _| change_record(node, |r| r["network"] = json!("other"))),
        ("another network namespace", |node, _, _| change_record(node, |r| r["netnsCookie"] = json!(7))),
        ("gone", |_, host, _| drop(ip(&["link", "del", host]))),
        ("down", |_, host, _| drop(ip(&["link", "set", host, "down"]))),
        ("down", |_, _, _| drop(ip(&["-n", "a", "link", "set", "eth0", "down"]))),
        ("MAC", |_, _, _| drop(ip(&["-n", "a", "link", "set", "eth0", "address", "02:00:00:00:00:07"]))),
        ("MTU", |_, _, _| drop(ip(&["-n", "a", "link", "set", "eth0", "mtu", "1400"]))),
        ("is not on", |_, _, r| {
            let address = r["ips"][1]["address"].as_str().expect("address");
            ip(&["-n", "a", "addr", "del", address, "dev", "eth0"]);
        }),
        ("default route", |_, _, _| drop(ip(&["-n", "a", "route", "del", "default"]))),
        ("default route", |_, _, _| {
            let replace = ["-n", "a", "route", "replace", "default", "via", "169.254.1.9", "dev", "eth0", "onlink"];
            ip(&replace);
        }),
        ("host's route", |_, host, r| drop(ip(&["route", "del", &ips(r)[0].to_string(), "dev", host]))),
        ("from_pod", |_, host, _| drop(command("tc", &["filter", "del", "dev", host, "ingress"]))),
        ("to_pod", |_, host, _| drop(command("tc", &["filter", "del", "dev", host, "egress"]))),
        ("endpoints map", |node, _, r| bpf::delete(&node.map, ips(r)[1])),
        ("not leased", |node, _, r| fs::remove_file(node.run.join("ipam").join(ips(r)[0].to_string())).expect("lease")),
        // The last one: the pair in the pod stays.
        ("not the other end", |_, _, r| {
            let mac = r["interfaces"][1]["mac"].as_str().expect("MAC");
            ip(&["-n", "a", "link", "set", "eth0", "down"]);
            ip(&["-n", "a", "link", "set", "eth0", "name", "eth9"]);
            let pair = ["link", "add", "eth0", "address", mac, "mtu", "1450", "type", "veth", "peer", "name", "peer0"];
            ip(&[&["-n", "a"], &pair[..]].concat());
            ip(&["-n", "a", "link", "set", "eth0", "up"]);
        }),
    ];
    let ns = netns("a");
    for (part, change) in changes {
        let r = node.add("c1", &ns);
        let check = || Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run();
        assert_eq!(check().success(), Value::Null);
        change(&node, r["interfaces"][0]["name"].as_str().expect("name"), &r);
        let msg = check().failure(102);
        assert!(msg.contains(part), "{part}: {msg}");
        node.del("c1");
    }
    assert!(Call::of("CHECK", &node.conf("1.1.0"), "c1", &ns).run().failure(7).contains("prevResult"));

    // A result without addresses is none of ours, and addresses of another interface are not judged.
    let ns = netns("b");
    let mut r = node.add("c1", &ns);
    r["ips"].as_array_mut().expect("list").push(json!({ "address": "10.9.9.9/24", "interface": 2 }));
    r["interfaces"].as_array_mut().expect("list").push(json!({ "name": "net1", "sandbox": ns }));
    assert_eq!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run().success(), Value::Null);
    r["ips"] = json!([]);
    assert!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run().failure(102).contains("no address"));
}

#[test]
fn status_and_add_name_what_is_missing() {
    let node = Node::new();
    let ns = netns("a");
    let before = node.traces();
    let conf = node.conf("1.1.0");
    let refused = |part: &str| {
        let status = Call::new("STATUS", &conf).run().failure(50);
        assert!(status.contains(part), "{part}: {status}");
        let add = Call::of("ADD", &conf, "c1", &ns).run().failure(11);
        assert!(add.contains(part), "{part}: {add}");
    };
    assert_eq!(Call::new("STATUS", &conf).run().success(), Value::Null);
    let good = json!({ "version": 1, "nodeName": "n1", "podCIDRs": ["10.244.1.0/24"], "mtu": 1450 });
    let with = |key: &str, value: Value| {
        let mut file = good.clone();
        file[key] = value;
        file
    };
    for (part, file) in [
        ("version 2", with("version", json!(2))),
        ("the uplink is down", with("notReady", json!("the uplink is down"))),
        ("podCIDR", with("podCIDRs", json!([]))),
        ("cannot be read", json!({})),
        ("cannot be read", with("mtu", json!("x"))),
    ] {
        node.write_node_file(&file);
        refused(part);
    }
    fs::remove_file(node.run.join("node.json")).expect("node.json");
    refused("is the rustnet agent running on this node");
    node.write_node_file(&good);

    for pin in ["rn_endpoints", "prog/from_pod", "prog/to_pod"] {
        let (path, aside) = (node.bpffs.join(pin), node.bpffs.join("aside"));
        fs::rename(&path, &aside).expect("move the pin");
        refused("is the rustnet agent running on this node");
        fs::rename(&aside, &path).expect("move the pin back");
    }
    // Pinned by another version.
    fs::rename(node.bpffs.join("rn_endpoints"), node.bpffs.join("aside")).expect("move the pin");
    bpf::pin_map(&node.bpffs.join("rn_endpoints"), 16, 40, 8);
    refused("another version");
    assert_eq!(Call::of("DEL", &conf, "c1", &ns).run().success(), Value::Null);
    fs::remove_file(node.bpffs.join("rn_endpoints")).expect("unpin");
    fs::rename(node.bpffs.join("aside"), node.bpffs.join("rn_endpoints")).expect("move the pin back");
    assert_eq!(node.traces(), before);
    // The agent is dead all the while: the files and the pins suffice.
    node.add("c1", &ns);
}

#[test]
fn a_full_pool_is_named_and_undone() {
    let node = Node::with_ranges(&["10.244.1.0/29", "fd00:10:244:1::/64"]);
    let ns: Vec<_> = (0..6).map(|n| netns(&format!("p{n}"))).collect();
    for (n, ns) in ns.iter().enumerate().take(5) {
        node.add(&format!("c{n}"), ns);
    }
    let before = node.traces();
    let msg = Call::of("ADD", &node.conf("1.1.0"), "c5", &ns[5]).run().failure(101);
    // The kubelet's event of the pod carries it.
    for part in ["10.244.1.0/29", "all 5 are taken", "delete pods", "larger podCIDR"] {
        assert!(msg.contains(part), "{part}: {msg}");
    }
    assert_eq!(node.traces(), before);
    assert_eq!(Call::new("STATUS", &node.conf("1.1.0")).run().success(), Value::Null);
    node.del("c2");
    node.add("c5", &ns[5]);
}

/// What a runtime or an administrator has spoilt meanwhile: the pod goes, and leaves nothing.
#[test]
fn a_configuration_that_makes_no_pod_removes_one() {
    let node = Node::new();
    let (before, ns) = (node.traces(), netns("a"));
    for (key, value) in [
        ("runtimeConfig", json!({ "mac": "01:00:5e:00:00:01" })),
        ("runtimeConfig", json!({ "mac": "rubbish", "dns": 7 })),
        ("mtu", json!(1)),
    ] {
        node.add("c1", &ns);
        let mut conf = node.conf("1.1.0");
        conf[key] = value;
        for _ in 0..2 {
            assert_eq!(Call::of("DEL", &conf, "c1", &ns).run().success(), Value::Null, "{conf}");
        }
        assert_eq!(node.traces(), before, "{conf}");
    }
}

#[test]
fn settings_reach_the_pod() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["mtu"] = json!(1400);
    conf["dns"] = json!({ "nameservers": ["10.96.0.10"], "search": ["cluster.local"], "options": [], "domain": "" });
    conf["runtimeConfig"] = json!({ "mac": "c2:11:22:33:44:55", "portMappings": null });
    let r = Call::of("ADD", &conf, "c1", &netns("a")).run().success();
    assert_eq!(r["dns"], json!({ "nameservers": ["10.96.0.10"], "search": ["cluster.local"] }));
    let link = &ip_json(&["-n", "a", "link", "show", "eth0"])[0];
    assert_eq!((&link["mtu"], &link["address"]), (&json!(1400), &json!("c2:11:22:33:44:55")));
}

/// Not the first in a chain: what came before stays in the result.
#[test]
fn a_previous_result_is_passed_through() {
    let node = Node::new();
    let ns = netns("a");
    let prev = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "up0" }, { "name": "net0", "mac": "02:00:00:00:00:09", "sandbox": ns }],
        "ips": [{ "address": "192.168.7.2/24", "gateway": "192.168.7.1", "interface": 1 }],
        "routes": [],
        "dns": { "nameservers": ["192.168.7.53"] },
    });
    let r = Call::of("ADD", &node.conf_with("1.1.0", &prev), "c1", &ns).run().success();
    assert_eq!(r["interfaces"].as_array().map(Vec::len), Some(4));
    assert_eq!((&r["interfaces"][0], &r["interfaces"][1]), (&prev["interfaces"][0], &prev["interfaces"][1]));
    assert_eq!((&r["interfaces"][3]["name"], &r["ips"][0]), (&json!("eth0"), &prev["ips"][0]));
    assert_eq!((&r["ips"][1]["interface"], &r["ips"][2]["interface"]), (&json!(3), &json!(3)));
    assert_eq!(r["dns"], prev["dns"]);
    assert_eq!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run().success(), Value::Null);
    let bad = node.conf_with("1.1.0", &json!([]));
    Call::of("ADD", &bad, "c2", &netns("b")).run().failure(6);
}

#[test]
fn ipv6_is_turned_on_where_the_namespace_has_it_off() {
    let node = Node::new();
    let ns = netns("a");
    let off = "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6";
    command("nsenter", &[&format!("--net={ns}"), "sh", "-c", off]);
    for ip in ips(&node.add("c1", &ns)) {
        ping("", &ip.to_string());
    }
}

/// Hardened hosts have IPv6 on named devices alone.
#[test]
fn ipv6_is_turned_on_where_the_host_has_it_off_for_new_devices() {
    let node = Node::new();
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("a setting of this namespace");
    for ip in ips(&node.add("c1", &netns("a"))) {
        ping("", &ip.to_string());
    }
}

/// A bridge of containers or machines in the pods' range: two would have one address.
#[test]
fn addresses_of_the_host_are_not_given_to_pods() {
    let node = Node::with_ranges(&["10.244.1.0/29", "fd00:10:244:1::/120"]);
    let own = ["10.244.1.2", "10.244.1.4", "fd00:10:244:1::2"].map(|ip| ip.parse::<IpAddr>().expect("an address"));
    command("ip", &["link", "add", "docker0", "type", "bridge"]);
    command("ip", &["link", "set", "docker0", "up"]);
    for ip in own {
        command("ip", &["addr", "add", &ip.to_string(), "dev", "docker0"]);
    }
    for n in 0..3 {
        let given = ips(&node.add(&format!("c{n}"), &netns(&format!("p{n}"))));
        assert!(given.iter().all(|ip| !own.contains(ip)), "{given:?}");
    }
}

#[test]
fn single_family_nodes() {
    for (range, want) in [("10.244.1.0/24", "0.0.0.0/0"), ("fd00:10:244:1::/64", "::/0")] {
        // Each in a thread, since a node is made of the thread's namespaces.
        std::thread::spawn(move || {
            let node = Node::with_ranges(&[range]);
            let before = node.traces();
            let r = node.add("c1", &netns("a"));
            assert_eq!(r["routes"].as_array().map(Vec::len), Some(1));
            assert_eq!(r["routes"][0]["dst"], want);
            ping("", &ips(&r)[0].to_string());
            node.del("c1");
            assert_eq!(node.traces(), before);
        })
        .join()
        .expect(range);
    }
}
