//! What the binary says to calls that make no sense, as a table; the unit tests have the longer ones.

use crate::common::{BINARY, Call, Node, finish, netns, remove_netns};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

const VERBS: [&str; 5] = ["ADD", "CHECK", "DEL", "GC", "STATUS"];

#[test]
fn no_verb_prints_who_it_is() {
    for call in [Call::new("", &json!({})), Call::new("ADD", &json!({})).without("CNI_COMMAND")] {
        let out = call.run();
        assert!(out.ok && out.json == Value::Null, "{out:?}");
        assert!(
            out.stderr.contains("rustnet-cni") && out.stderr.contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"),
            "{out:?}"
        );
    }
}

#[test]
fn version_needs_no_configuration() {
    let all = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    let bare = Call::new("VERSION", &json!({})).without("CNI_PATH");
    for (stdin, version) in
        [("", "1.1.0"), ("{", "1.1.0"), (r#"{"cniVersion":"0.1.0"}"#, "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0")]
    {
        let out = bare.clone().stdin(stdin.as_bytes()).run().success();
        assert_eq!(out, json!({ "cniVersion": version, "supportedVersions": all }), "{stdin}");
    }
}

#[test]
fn unknown_verbs() {
    for verb in ["add", "UPDATE", "ADD ", "DELETE"] {
        let out = Call::new(verb, &json!({ "cniVersion": "1.0.0", "name": "n" })).run();
        assert!(out.failure(4).contains(verb.trim()));
    }
}

#[test]
fn bad_standard_input_is_refused_by_every_verb() {
    for verb in VERBS {
        for (stdin, code) in [
            (&b""[..], 6),
            (b"{", 6),
            (b"[]", 6),
            (b"\xff\xfe{}", 6),
            (br#"{"cniVersion":1,"name":"n"}"#, 6),
            (br#"{"cniVersion":"9.9.9","name":"n"}"#, 1),
            (br#"{"name":"n"}"#, 1),
            (br#"{"cniVersion":"1.1.0"}"#, 7),
            (br#"{"cniVersion":"1.1.0","name":"a/b"}"#, 7),
            (br#"{"cniVersion":"1.1.0","name":"n","runDir":7}"#, 6),
            (br#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":{}}"#, 6),
        ] {
            let call = Call::of(verb, &json!({}), "c1", "/run/netns/absent").stdin(stdin);
            call.run().failure(code);
        }
    }
}

#[test]
fn a_bad_previous_result_stops_check_only() {
    let node = Node::new();
    for prev in [json!("x"), json!([]), json!({ "ips": [{ "address": "10.0.0.300/24" }] }), json!({ "interfaces": 7 })]
    {
        let conf = node.conf_with("1.1.0", &prev);
        Call::of("CHECK", &conf, "c1", "/run/netns/absent").run().failure(6);
        assert_eq!(Call::of("DEL", &conf, "c1", "").run().success(), Value::Null);
    }
}

#[test]
fn errors_come_in_the_configurations_version() {
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let out = Call::of("ADD", &json!({ "cniVersion": version, "name": "n" }), "-", "/x").run();
        assert_eq!(out.json["cniVersion"], version);
        out.failure(4);
    }
}

#[test]
fn missing_and_absurd_variables() {
    let conf = json!({ "cniVersion": "1.1.0", "name": "n" });
    for verb in ["ADD", "CHECK", "DEL"] {
        for var in ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH", "CNI_NETNS"] {
            if verb == "DEL" && matches!(var, "CNI_NETNS" | "CNI_PATH") {
                continue;
            }
            let out = Call::of(verb, &conf, "c1", "/run/netns/a").without(var).run();
            assert!(out.failure(4).contains(var));
        }
        let long = "x".repeat(5000);
        for (var, value) in [
            ("CNI_CONTAINERID", "../c1"),
            ("CNI_CONTAINERID", "c 1"),
            ("CNI_CONTAINERID", long.as_str()),
            ("CNI_IFNAME", "sixteen-letters-"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "eth%d"),
            ("CNI_ARGS", "x"),
        ] {
            if var == "CNI_ARGS" && verb != "ADD" {
                continue;
            }
            let out = Call::of(verb, &conf, "c1", "/run/netns/a").env(var, value).run();
            assert!(out.failure(4).contains(var), "{verb} {var}={value}");
        }
    }
}

#[test]
fn a_namespace_that_is_none() {
    let node = Node::new();
    let before = node.traces();
    let vanished = netns("a");
    remove_netns(&vanished, true);
    fs::write("/run/file", "").expect("file");
    for path in ["/run/netns/absent", vanished.as_str(), "/run/file", "/run", "/proc/self/ns/mnt", "relative"] {
        for verb in ["ADD", "CHECK"] {
            let mut conf = node.conf("1.1.0");
            conf["prevResult"] = json!({});
            let msg = Call::of(verb, &conf, "c1", path).run().failure(3);
            assert!(msg.contains(path), "{msg}");
        }
        assert_eq!(Call::of("DEL", &node.conf("1.1.0"), "c1", path).run().success(), Value::Null);
    }
    // The host itself is no pod, whatever the runtime overrides.
    for is_overridden in ["", "1"] {
        let call = Call::of("ADD", &node.conf("1.1.0"), "c1", "/proc/self/ns/net");
        let msg = call.env("CNI_NETNS_OVERRIDE", is_overridden).run().failure(8);
        assert!(msg.contains("/proc/self/ns/net") && msg.contains("CNI_NETNS_OVERRIDE"), "{msg}");
    }
    assert_eq!(node.traces(), before);
}

#[test]
fn no_bpf_file_system_and_no_rights() {
    let node = Node::new();
    let ns = netns("a");
    let before = node.traces();
    let mut conf = node.conf("1.1.0");
    conf["bpffs"] = json!("/run/plain");
    fs::create_dir_all("/run/plain/prog").expect("directory");
    for file in ["prog/from_pod", "prog/to_pod", "rn_endpoints"] {
        fs::write(format!("/run/plain/{file}"), "").expect("file");
    }
    let msg = Call::of("ADD", &conf, "c1", &ns).run().failure(5);
    assert!(msg.contains("/run/plain/prog/from_pod") && msg.contains("bpf file system"), "{msg}");

    // As another user: the binary is copied to where that user may run it.
    fs::copy(BINARY, "/run/cni").expect("copy");
    fs::set_permissions("/run/cni", fs::Permissions::from_mode(0o755)).expect("mode");
    let call =
        format!("printf '%s' '{}' | setpriv --reuid=65534 --regid=65534 --clear-groups /run/cni", node.conf("1.1.0"));
    let mut command = Command::new("sh");
    command.args(["-c", &call]).env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", "c1").env("CNI_NETNS", &ns);
    command.env("CNI_IFNAME", "eth0").env("CNI_PATH", "/x").stdout(std::process::Stdio::piped());
    let msg = finish(command.spawn().expect("setpriv")).failure(5);
    assert!(msg.contains("must run as root"), "{msg}");
    assert_eq!(node.traces(), before);
}
