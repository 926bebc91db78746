//! The binary as the `loopback` plugin, compared with the reference plugin of that name.

use crate::common::{Call, Called, command, ip, ip_json, netns, remove_netns};
use serde_json::{Value, json};
use std::fs;

const REFERENCE: &str = "/usr/lib/cni/loopback";
/// The versions that both speak.
const VERSIONS: [&str; 4] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0"];

/// The calling thread gets namespaces of its own and an empty /run: no agent, no node.json, no pins.
fn bare_host() {
    let node = crate::common::Node::new();
    fs::remove_dir_all(&node.run).expect("the agent's directory");
    command("umount", &[&node.bpffs.display().to_string()]);
}

/// A namespace whose `lo` is as the kernel makes it: down.
fn fresh(name: &str) -> String {
    let path = netns(name);
    ip(&["-n", name, "link", "set", "lo", "down"]);
    path
}

fn conf(version: &str) -> Value {
    json!({ "cniVersion": version, "name": "cni-loopback", "type": "loopback" })
}

fn call(verb: &str, conf: &Value, netns: &str) -> Call {
    Call::of(verb, conf, "c1", netns).env("CNI_IFNAME", "lo")
}

fn lo(name: &str) -> Value {
    ip_json(&["-n", name, "addr", "show", "lo"])[0].clone()
}

fn is_up(name: &str) -> bool {
    lo(name)["flags"].as_array().expect("flags").contains(&json!("UP"))
}

/// The reference's result in our spelling: it prints an empty `dns`, and before 1.0.0 forgets the
/// family that the specification requires next to each address it found itself.
fn normalised(result: Called) -> Value {
    let mut result = result.success();
    let old = result["cniVersion"].as_str().expect("version") < "1.0.0";
    let members = result.as_object_mut().expect("object");
    assert_eq!(members.remove("dns"), Some(json!({})));
    for ip in result["ips"].as_array_mut().expect("ips") {
        if old && ip.get("version").is_none() {
            ip["version"] = json!(if ip["address"].as_str().expect("address").contains(':') { "6" } else { "4" });
        }
    }
    result
}

#[test]
fn every_verb_does_what_the_reference_does() {
    bare_host();
    for version in VERSIONS {
        let (a, b) = (format!("a{version}"), format!("b{version}"));
        let (ours, theirs) = (fresh(&a), fresh(&b));
        let reference = |verb: &str, conf: &Value| call(verb, conf, &theirs).binary(REFERENCE).run();
        // Twice: a second ADD finds it up.
        for _ in 0..2 {
            let got = call("ADD", &conf(version), &ours).run().success();
            let mut want = normalised(reference("ADD", &conf(version)));
            want["interfaces"][0]["sandbox"] = json!(ours);
            assert_eq!(got, want);
            assert_eq!(got["ips"].as_array().map(Vec::len), Some(2), "{got}");
        }
        let (mut got, mut want) = (lo(&a), lo(&b));
        for seen in [&mut got, &mut want] {
            seen.as_object_mut().expect("object").remove("ifindex");
        }
        assert_eq!(got, want);

        if version >= "0.4.0" {
            assert_eq!(call("CHECK", &conf(version), &ours).run().success(), Value::Null);
        }
        for _ in 0..2 {
            assert_eq!(call("DEL", &conf(version), &ours).run().success(), Value::Null);
            assert_eq!(reference("DEL", &conf(version)).success(), Value::Null);
            assert!(!is_up(&a) && !is_up(&b));
        }
        if version >= "0.4.0" {
            assert!(!reference("CHECK", &conf(version)).ok);
            let why = call("CHECK", &conf(version), &ours).run().failure(102);
            assert!(why.contains("lo") && why.contains("down"), "{why}");
        } else {
            call("CHECK", &conf(version), &ours).run().failure(1);
        }
        for (verb, works) in [("ADD", false), ("DEL", true)] {
            let absent = call(verb, &conf(version), "/run/netns/absent");
            assert_eq!((absent.run().ok, absent.clone().binary(REFERENCE).run().ok), (works, works), "{verb}");
        }
    }
}

#[test]
fn the_newest_version_with_its_verbs() {
    bare_host();
    let ns = fresh("a");
    let want = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": ns }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }, { "address": "::1/128", "interface": 0 }],
    });
    assert_eq!(call("ADD", &conf("1.1.0"), &ns).run().success(), want);
    assert_eq!(call("CHECK", &conf("1.1.0"), &ns).run().success(), Value::Null);
    let mut gc = conf("1.1.0");
    gc["cni.dev/valid-attachments"] = json!([]);
    for (verb, conf) in [("STATUS", conf("1.1.0")), ("GC", gc)] {
        assert_eq!(Call::new(verb, &conf).run().success(), Value::Null);
        Call::new(verb, &self::conf("1.0.0")).run().failure(1);
    }
    assert!(is_up("a"), "GC touches no pod");
    assert_eq!(call("DEL", &conf("1.1.0"), &ns).run().success(), Value::Null);
    assert!(!is_up("a"));
}

#[test]
fn a_result_so_far_is_passed_on() {
    bare_host();
    for version in VERSIONS {
        let (a, b) = (format!("a{version}"), format!("b{version}"));
        let (ours, theirs) = (fresh(&a), fresh(&b));
        let mut address = json!({ "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0 });
        if version < "1.0.0" {
            address["version"] = json!("4");
        }
        let prev = json!({
            "cniVersion": version, "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/x" }],
            "ips": [address], "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1" }], "dns": { "nameservers": ["10.1.0.53"] },
        });
        let mut conf = conf(version);
        conf["prevResult"] = prev.clone();
        let got = call("ADD", &conf, &ours).run().success();
        assert_eq!(got, prev);
        assert_eq!(got, call("ADD", &conf, &theirs).binary(REFERENCE).run().success());
        assert!(is_up(&a));
        assert_eq!(call("DEL", &conf, &ours).run().success(), Value::Null);
        conf["prevResult"] = json!([]);
        call("ADD", &conf, &ours).run().failure(6);
        assert_eq!(call("DEL", &conf, &ours).run().success(), Value::Null);
    }
}

#[test]
fn without_ipv6_there_is_one_address() {
    bare_host();
    let (ours, theirs) = (fresh("a"), fresh("b"));
    for ns in [&ours, &theirs] {
        let off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6";
        command("nsenter", &[&format!("--net={ns}"), "sh", "-c", off]);
    }
    let got = call("ADD", &conf("1.0.0"), &ours).run().success();
    assert_eq!(got["ips"], json!([{ "address": "127.0.0.1/8", "interface": 0 }]));
    let want = normalised(call("ADD", &conf("1.0.0"), &theirs).binary(REFERENCE).run());
    assert_eq!(got["ips"], want["ips"]);
}

#[test]
fn a_namespace_that_has_gone_or_is_the_hosts() {
    bare_host();
    let vanished = netns("a");
    remove_netns(&vanished, true);
    let conf = conf("1.0.0");
    for path in ["/run/netns/absent", vanished.as_str(), "/run"] {
        for verb in ["ADD", "CHECK"] {
            let why = call(verb, &conf, path).run().failure(3);
            assert!(why.contains(path), "{why}");
        }
        assert_eq!(call("DEL", &conf, path).run().success(), Value::Null);
    }
    for unset in [call("DEL", &conf, ""), call("DEL", &conf, "").without("CNI_NETNS")] {
        assert_eq!(unset.run().success(), Value::Null);
    }
    for verb in ["ADD", "CHECK"] {
        call(verb, &conf, "/proc/self/ns/net").run().failure(8);
    }
    assert_eq!(call("DEL", &conf, "/proc/self/ns/net").run().success(), Value::Null);
    let host = &ip_json(&["link", "show", "lo"])[0];
    assert!(host["flags"].as_array().expect("flags").contains(&json!("UP")), "the host's lo stays up: {host}");
}

#[test]
fn the_environment_is_checked_as_for_any_plugin() {
    bare_host();
    let ns = fresh("a");
    let conf = conf("1.0.0");
    call("ADD", &conf, &ns).env("CNI_CONTAINERID", "../c1").run().failure(4);
    call("ADD", &conf, &ns).without("CNI_IFNAME").run().failure(4);
    assert!(!is_up("a"));
    // Another name changes nothing: it is `lo` all the same.
    let got = call("ADD", &conf, &ns).env("CNI_IFNAME", "eth0").run().success();
    assert_eq!(got["interfaces"][0]["name"], "lo");
    assert!(is_up("a"));
}
