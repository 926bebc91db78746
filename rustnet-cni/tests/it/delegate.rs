//! Addresses from another plugin: the real host-local, and scripts that record how they are called.

use crate::common::{Call, Node, ip_json, ips, netns, ping, until};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// The documented example, with this node's directories.
fn documented(node: &Node, version: &str) -> Value {
    json!({
        "cniVersion": version, "name": "dbnet", "type": "rustnet-cni", "bridge": "cni0",
        "keyA": ["some more", "plugin specific", "configuration"],
        "ipam": { "type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1" },
        "dns": { "nameservers": ["10.1.0.1"] },
        "bpffs": node.bpffs, "runDir": node.run,
    })
}

/// Installs a plugin that appends each call to /run/calls and then does `body`.
fn script(name: &str, body: &str) {
    let path = format!("/run/plugins/{name}");
    let text = format!(
        "#!/bin/sh\nstdin=$(cat)\nprintf '%s %s %s %s\\n%s\\n' \"$CNI_COMMAND\" \"$CNI_CONTAINERID\" \"$CNI_IFNAME\" \
         \"$CNI_NETNS\" \"$stdin\" >> /run/calls\n{body}\n"
    );
    fs::write(&path, text).expect("script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
}

/// Each recorded call: its first line, and its standard input.
fn calls() -> Vec<(String, Value)> {
    let text = fs::read_to_string("/run/calls").unwrap_or_default();
    let _ = fs::remove_file("/run/calls");
    let lines: Vec<&str> = text.lines().collect();
    lines.chunks(2).map(|c| (c[0].trim().to_owned(), serde_json::from_str(c[1]).expect(c[1]))).collect()
}

/// True if there is no such process, or nobody has waited for it yet.
fn has_ended(pid: &str) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state.is_empty() || state.contains(") Z ")
}

#[test]
fn the_documented_example() {
    let node = Node::new();
    let before = node.traces();
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let conf = documented(&node, version);
        let ns = netns(version);
        let r = Call::of("ADD", &conf, "c1", &ns).run().success();
        assert_eq!(r["cniVersion"], version);
        assert_eq!(r["dns"], json!({ "nameservers": ["10.1.0.1"] }));
        assert_eq!(r["ips"][0]["gateway"], "10.1.0.1");
        assert_eq!(r["ips"][0]["interface"], 1);
        assert_eq!(r["ips"][0].get("version"), (version < "1.0.0").then(|| json!("4")).as_ref());
        let address = r["ips"][0]["address"].as_str().expect("address");
        assert!(address.starts_with("10.1.0.") && address.ends_with("/16"), "{address}");
        assert!(r.get("routes").is_none());
        let ip = ips(&r)[0].to_string();

        let pod = ip_json(&["-n", version, "addr", "show", "eth0"]);
        assert_eq!((&pod[0]["addr_info"][0]["local"], &pod[0]["addr_info"][0]["prefixlen"]), (&json!(ip), &json!(32)));
        ping("", &ip);
        // The gateway is answered, by the host.
        ping(&ns, "10.1.0.1");
        ping(&ns, "192.0.2.1");
        if version >= "0.4.0" {
            let mut check = conf.clone();
            check["prevResult"] = r.clone();
            assert_eq!(Call::of("CHECK", &check, "c1", &ns).run().success(), Value::Null);
        }
        if version == "1.1.0" {
            assert_eq!(Call::new("STATUS", &conf).run().success(), Value::Null);
            assert_eq!(Call::new("GC", &conf).run().success(), Value::Null);
        }
        for _ in 0..3 {
            assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
        }
        assert_eq!(node.traces(), before, "{version}");
    }
}

#[test]
fn two_pods_on_one_gateway_reach_each_other() {
    let node = Node::new();
    let conf = documented(&node, "1.0.0");
    let (a, b) = (netns("a"), netns("b"));
    let first = Call::of("ADD", &conf, "c1", &a).run().success();
    let second = Call::of("ADD", &conf, "c2", &b).run().success();
    ping(&a, &ips(&second)[0].to_string());
    ping(&b, &ips(&first)[0].to_string());
    ping(&a, "10.1.0.1");
    ping(&b, "10.1.0.1");
}

#[test]
fn the_plugin_gets_the_whole_call() {
    let node = Node::new();
    let before = node.traces();
    let reply = r#"{"cniVersion":"1.1.0","ips":[{"address":"10.7.0.5/24","gateway":"10.7.0.1"},{"address":"fd07::5/64","gateway":"fd07::1"}],"routes":[{"dst":"0.0.0.0/0"},{"dst":"10.8.0.0/16","gw":"10.7.0.254","mtu":1300}],"dns":{"nameservers":["10.7.0.53"],"search":["x"]}}"#;
    script("probe", &format!("echo to-stderr >&2\n[ \"$CNI_COMMAND\" = ADD ] && echo '{reply}'\nexit 0"));
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "probe", "anything": { "else": [1, 2] } });
    let ns = netns("a");
    let out = Call::of("ADD", &conf, "c1", &ns).run();
    assert!(out.stderr.contains("to-stderr"), "{out:?}");
    let r = out.success();
    assert_eq!(calls(), [(format!("ADD c1 eth0 {ns}"), conf.clone())]);
    // The result is the plugin's, with our interfaces.
    let reply: Value = serde_json::from_str(reply).expect("JSON");
    for key in ["routes", "dns"] {
        assert_eq!(r[key], reply[key]);
    }
    for (i, gateway) in ["10.7.0.1", "fd07::1"].iter().enumerate() {
        assert_eq!((&r["ips"][i]["address"], &r["ips"][i]["gateway"]), (&reply["ips"][i]["address"], &json!(gateway)));
        ping(&ns, gateway);
        ping("", &ips(&r)[i].to_string());
    }
    let mut with_prev = conf.clone();
    with_prev["prevResult"] = r;
    assert_eq!(Call::of("CHECK", &with_prev, "c1", &ns).run().success(), Value::Null);
    assert_eq!(Call::new("STATUS", &conf).run().success(), Value::Null);
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    let mut gc = conf.clone();
    gc["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(Call::new("GC", &gc).run().success(), Value::Null);
    let want = [
        (format!("CHECK c1 eth0 {ns}"), with_prev),
        ("STATUS".to_owned(), conf.clone()),
        ("DEL c1 eth0".to_owned(), conf.clone()),
        ("GC".to_owned(), gc.clone()),
    ];
    assert_eq!(calls(), want);
    assert_eq!(node.traces(), before);

    // GC hands on the DEL of each stale attachment too: the plugin may know no GC.
    Call::of("ADD", &conf, "c1", &ns).run().success();
    calls();
    assert_eq!(Call::new("GC", &gc).run().success(), Value::Null);
    assert_eq!(calls(), [("DEL c1 eth0".to_owned(), gc.clone()), ("GC".to_owned(), gc)]);
    assert_eq!(node.traces(), before);
}

/// Routes of the result are routes of the pod.
#[test]
fn routes_of_the_plugin_are_installed() {
    let node = Node::new();
    let before = node.traces();
    let reply = json!({
        "cniVersion": "1.1.0",
        "ips": [{ "address": "10.7.0.5/24", "gateway": "10.7.0.1" }, { "address": "fd07::5/64", "gateway": "fd07::1" }],
        "routes": [
            { "dst": "0.0.0.0/0", "gw": "10.7.0.1" },
            { "dst": "192.0.2.0/24", "gw": "10.7.0.254", "mtu": 1300, "advmss": 1200 },
            { "dst": "10.9.0.0/16" },
            { "dst": "10.10.0.0/16", "priority": 77, "table": 300 },
            { "dst": "2001:db8::/32", "gw": "fd07::fe" },
        ],
    });
    script("routes", &format!("[ \"$CNI_COMMAND\" = ADD ] && echo '{reply}'\nexit 0"));
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "routes" });
    let ns = netns("a");
    let r = Call::of("ADD", &conf, "c1", &ns).run().success();
    assert_eq!(r["routes"], reply["routes"]);
    let via = |args: &[&str]| ip_json(&[&["-n", "a"], args].concat())[0].clone();
    assert_eq!(via(&["-4", "route", "show", "default"])["gateway"], "10.7.0.1");
    assert_eq!(via(&["-6", "route", "show", "default"])["gateway"], "fe80::1");
    let route = via(&["-4", "route", "show", "192.0.2.0/24"]);
    assert_eq!(route["gateway"], "10.7.0.254");
    assert_eq!((&route["metrics"][0]["mtu"], &route["metrics"][0]["advmss"]), (&json!(1300), &json!(1200)));
    assert_eq!(via(&["-4", "route", "show", "10.9.0.0/16"])["gateway"], "169.254.1.1");
    assert_eq!(via(&["-4", "route", "show", "table", "300"])["metric"], 77);
    assert_eq!(via(&["-6", "route", "show", "2001:db8::/32"])["gateway"], "fd07::fe");
    // Whatever gateway they name, the host forwards.
    for target in ["192.0.2.1", "2001:db8::1", "10.7.0.1"] {
        ping(&ns, target);
    }
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    let of_table = "-4 route del 10.10.0.0/16 table 300;-4 route add 10.10.0.0/16 via 169.254.1.1 dev eth0 onlink";
    for (changes, part) in [
        ("-4 route del 192.0.2.0/24 dev eth0", "192.0.2.0/24 via 10.7.0.254"),
        ("-4 route change 192.0.2.0/24 via 10.7.0.253 dev eth0 onlink mtu 1300 advmss 1200", "192.0.2.0/24"),
        ("-4 route change 192.0.2.0/24 via 10.7.0.254 dev eth0 onlink mtu 1301 advmss 1200", "192.0.2.0/24"),
        ("-4 route change 192.0.2.0/24 via 10.7.0.254 dev eth0 onlink mtu 1300 advmss 1201", "192.0.2.0/24"),
        ("-4 route del 10.9.0.0/16 dev eth0", "10.9.0.0/16"),
        ("-4 route flush table 300", "10.10.0.0/16"),
        (&format!("{of_table} table 300 metric 78"), "10.10.0.0/16"),
        (&format!("{of_table} table 301 metric 77"), "10.10.0.0/16"),
        ("-4 route del default dev eth0", "default route"),
    ] {
        let mut with_prev = conf.clone();
        with_prev["prevResult"] = Call::of("ADD", &conf, "c1", &ns).run().success();
        let check = Call::of("CHECK", &with_prev, "c1", &ns);
        assert_eq!(check.run().success(), Value::Null);
        for change in changes.split(';') {
            let args: Vec<&str> = ["-n", "a"].into_iter().chain(change.split(' ')).collect();
            crate::common::ip(&args);
        }
        let msg = check.run().failure(102);
        assert!(msg.contains(part), "{part}: {msg}");
        assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    }
    for (route, part) in [
        (json!({ "dst": "10.9.0.0/16", "gw": "fd07::1" }), "other family"),
        (json!({ "dst": "10.9.0.0/16", "mtu": "big" }), "mtu"),
        (json!({ "dst": "10.9.0.0/33" }), "cannot be read"),
    ] {
        let mut bad = reply.clone();
        bad["routes"] = json!([route]);
        script("routes", &format!("[ \"$CNI_COMMAND\" = ADD ] && echo '{bad}'\nexit 0"));
        let out = Call::of("ADD", &conf, "c1", &ns).run();
        assert!(!out.ok && out.json.to_string().contains(part), "{part}: {out:?}");
    }
    assert_eq!(node.traces(), before);
}

/// The release before installed default routes alone, whatever the plugin returned, and its records do not speak of routes.
#[test]
fn check_of_a_pod_of_an_earlier_release_demands_its_default_routes_alone() {
    let node = Node::new();
    let reply = json!({
        "cniVersion": "1.1.0",
        "ips": [{ "address": "10.7.0.5/24", "gateway": "10.7.0.1" }],
        "routes": [{ "dst": "0.0.0.0/0", "gw": "10.7.0.1" }, { "dst": "10.9.0.0/16" }],
    });
    script("routes", &format!("[ \"$CNI_COMMAND\" = ADD ] && echo '{reply}'\nexit 0"));
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "routes" });
    let ns = netns("a");
    conf["prevResult"] = Call::of("ADD", &conf, "c1", &ns).run().success();
    let check = Call::of("CHECK", &conf, "c1", &ns);
    let in_pod = |args: &str| crate::common::ip(&["-n", "a"].into_iter().chain(args.split(' ')).collect::<Vec<_>>());
    in_pod("route del 10.9.0.0/16");
    in_pod("route replace default via 169.254.1.1 dev eth0 onlink");
    assert!(check.run().failure(102).contains("10.7.0.1"));
    let path = node.run.join("endpoints/c1@eth0.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).expect("record")).expect("JSON");
    assert_eq!(record.as_object_mut().expect("object").remove("hasRoutes"), Some(json!(true)));
    fs::write(&path, record.to_string()).expect("record");
    assert_eq!(check.run().success(), Value::Null);
    in_pod("route del default");
    assert!(check.run().failure(102).contains("default route"));
}

/// Two interfaces of one pod cannot share the route to the gateway. The first one keeps it.
#[test]
fn a_second_interface_takes_no_route_of_the_first() {
    let node = Node::new();
    let ns = netns("a");
    let r = node.add("c1", &ns);
    let before = node.traces();
    let reply = json!({
        "cniVersion": "1.1.0",
        "ips": [{ "address": "10.7.0.5/24" }],
        "routes": [{ "dst": "10.9.0.0/16" }],
    });
    script("second", &format!("[ \"$CNI_COMMAND\" = ADD ] && echo '{reply}'\nexit 0"));
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "second" });
    let msg = Call::of("ADD", &conf, "c1", &ns).env("CNI_IFNAME", "net1").run().failure(5);
    assert!(msg.contains("add route 169.254.1.1") && msg.contains("another interface of the pod"), "{msg}");
    assert_eq!(node.traces(), before);
    assert_eq!(Call::of("CHECK", &node.conf_with("1.1.0", &r), "c1", &ns).run().success(), Value::Null);
}

/// A plugin that never ends, and what it has started, hold no pod up.
#[test]
fn a_plugin_that_hangs_is_killed_and_named() {
    let node = Node::new();
    let before = node.traces();
    fs::write(
        "/run/plugins/hangs",
        "#!/bin/sh\n[ $CNI_COMMAND = DEL ] && exit 0\nsleep 100000 &\necho $! > /run/child\nsleep 100000\n",
    )
    .expect("script");
    fs::set_permissions("/run/plugins/hangs", fs::Permissions::from_mode(0o755)).expect("mode");
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "hangs" });
    conf["ipamTimeoutSeconds"] = json!(1);
    let add = Call::of("ADD", &conf, "c1", &netns("a"));
    // On a busy machine, a second may be too short for the plugin to start something, and for the DEL after the failure.
    until("the plugin is killed after it has started something, and all is undone", &|| {
        let msg = add.run().failure(11);
        for part in ["hangs ADD", "1s", "ipamTimeoutSeconds"] {
            assert!(msg.contains(part), "{part}: {msg}");
        }
        fs::metadata("/run/child").is_ok_and(|file| file.len() > 0) && node.traces() == before
    });
    let child = fs::read_to_string("/run/child").expect("the plugin ran");
    until("what it started ends", &|| has_ended(child.trim()));
    for bad in [json!(0), json!(3601), json!("x")] {
        conf["ipamTimeoutSeconds"] = bad;
        assert!(Call::of("ADD", &conf, "c1", "/x").run().failure(7).contains("ipamTimeoutSeconds"));
        assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    }
}

/// A runtime that loses its patience kills the plugin that it started, and no other.
#[test]
fn a_plugin_ends_with_the_call_that_runs_it() {
    let node = Node::new();
    script(
        "waits",
        "[ \"$CNI_COMMAND\" = DEL ] && exit 0\necho $$ > /run/pid.new; mv /run/pid.new /run/pid; exec sleep 100000",
    );
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "waits" });
    let mut call = Call::of("ADD", &conf, "c1", &netns("a")).start();
    until("the plugin starts", &|| fs::metadata("/run/pid").is_ok());
    let pid = fs::read_to_string("/run/pid").expect("pid");
    call.kill().expect("kill");
    call.wait().expect("wait");
    until("the plugin ends", &|| has_ended(pid.trim()));
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
}

#[test]
fn status_has_the_codes_of_the_specification() {
    let node = Node::new();
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "sick" });
    for (theirs, ours) in [(50, 50), (51, 51), (7, 50), (100, 50)] {
        let versions = r#"{"cniVersion":"1.1.0","supportedVersions":["1.1.0"]}"#;
        let answer = format!(r#"{{"code":{theirs},"msg":"no addresses"}}"#);
        script(
            "sick",
            &format!("[ \"$CNI_COMMAND\" = VERSION ] && echo '{versions}' && exit 0\necho '{answer}'; exit 1"),
        );
        assert!(Call::new("STATUS", &conf).run().failure(ours).contains("no addresses"));
    }
}

#[test]
fn an_older_plugin_gets_its_own_version() {
    let node = Node::new();
    script(
        "old",
        r#"case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.2.0","0.3.1","0.4.0"]}' ;;
*) case "$stdin" in
  *'"cniVersion":"0.4.0"'*) [ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.7.0.5/24"}]}'; exit 0 ;;
  *) echo '{"code":1,"msg":"incompatible CNI versions"}'; exit 1 ;;
  esac ;;
esac"#,
    );
    let mut conf = node.conf("1.1.0");
    conf["ipam"] = json!({ "type": "old" });
    let ns = netns("a");
    let r = Call::of("ADD", &conf, "c1", &ns).run().success();
    assert_eq!(r["cniVersion"], "1.1.0");
    assert!(r["ips"][0].get("version").is_none());
    let verbs: Vec<_> = calls().into_iter().map(|c| c.0.split(' ').next().expect("verb").to_owned()).collect();
    assert_eq!(verbs, ["ADD", "VERSION", "ADD"]);
    for verb in ["STATUS", "GC"] {
        assert_eq!(Call::new(verb, &conf).run().success(), Value::Null);
    }
    assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
}

#[test]
fn failures_of_the_plugin_are_handed_on_and_undone() {
    let node = Node::new();
    let before = node.traces();
    let ns = netns("a");
    let mut conf = node.conf("1.1.0");
    for (body, code, part) in [
        (r#"echo '{"code":11,"msg":"come back later","details":"busy"}'; exit 1"#, 11, "come back later"),
        ("echo rubbish; exit 3", 5, "rubbish"),
        ("exit 1", 5, "exit status: 1"),
        ("echo rubbish", 6, "cannot be read"),
        (r#"echo '{"cniVersion":"1.1.0"}'"#, 7, "no address"),
        (r#"echo '{"cniVersion":"1.1.0","ips":[{"address":"10.7.0.500/24"}]}'"#, 6, "cannot be read"),
    ] {
        script("bad", &format!("[ \"$CNI_COMMAND\" = DEL ] && exit 0\n{body}"));
        conf["ipam"] = json!({ "type": "bad" });
        let msg = Call::of("ADD", &conf, "c1", &ns).run().failure(code);
        assert!(msg.contains(part) && msg.contains("bad"), "{msg}");
        let verbs: Vec<_> = calls().into_iter().map(|c| c.0).collect();
        assert_eq!(verbs, [format!("ADD c1 eth0 {ns}"), format!("DEL c1 eth0 {ns}")]);
        assert_eq!(node.traces(), before);
    }
    conf["ipam"] = json!({ "type": "not-installed" });
    let msg = Call::of("ADD", &conf, "c1", &ns).run().failure(7);
    assert!(msg.contains("not-installed") && msg.contains("CNI_PATH"), "{msg}");
    Call::new("STATUS", &conf).run().failure(50);
    conf["ipam"] = json!({ "type": "host-local", "ranges": [[{ "subnet": "10.1.0.0/30" }]] });
    Call::of("ADD", &conf, "c1", &ns).run().success();
    let full = node.traces();
    let out = Call::of("ADD", &conf, "c2", &netns("b")).run();
    assert!(!out.ok && out.json["msg"].as_str().expect("msg").contains("host-local ADD"), "{out:?}");
    assert_eq!(node.traces(), full);
}
