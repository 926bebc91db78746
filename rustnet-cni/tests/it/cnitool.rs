//! The outside driver: CNI's own cnitool, with its cache and its plugin search.

use crate::common::{BINARY, Node, ips, netns, ping};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Where `cargo xtask setup` and `go install` put it.
fn cnitool() -> PathBuf {
    let home = |p: &str| std::env::var_os("HOME").map(|h| Path::new(&h).join(p));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(|c| Path::new(&c).join("rustnet/bin"));
    let mut dirs: Vec<PathBuf> = [cache, home(".cache/rustnet/bin"), home("go/bin")].into_iter().flatten().collect();
    dirs.extend(std::env::var_os("GOBIN").map(PathBuf::from));
    dirs.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    dirs.into_iter().map(|d| d.join("cnitool")).find(|p| p.is_file()).expect(
        "cnitool is not installed: run `cargo xtask setup`, or \
         `GOBIN=~/.cache/rustnet/bin go install github.com/containernetworking/cni/cnitool@v1.2.3`",
    )
}

fn run(verb: &str, netns: &str) -> Output {
    let plugins = Path::new(BINARY).parent().expect("directory");
    let mut command = Command::new(cnitool());
    command.arg(verb).arg("rustnet").arg(netns);
    command.env("NETCONFPATH", "/run/net.d").env("CNI_PATH", format!("{}:/usr/lib/cni", plugins.display()));
    command.output().expect("cnitool")
}

#[track_caller]
fn success(verb: &str, netns: &str) -> Value {
    let out = run(verb, netns);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{verb}: {text}{}", String::from_utf8_lossy(&out.stderr));
    if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).expect(&text) }
}

#[test]
fn all_verbs_through_cnitool() {
    let node = Node::new();
    fs::create_dir("/run/net.d").expect("directory");
    for (version, ipam) in [
        ("0.4.0", json!(null)),
        ("1.0.0", json!(null)),
        ("1.1.0", json!(null)),
        ("1.1.0", json!({ "type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1" })),
    ] {
        let plugin = json!({ "type": "rustnet-cni", "bpffs": node.bpffs, "runDir": node.run, "ipam": ipam });
        let list = json!({ "cniVersion": version, "name": "rustnet", "plugins": [plugin] });
        fs::write("/run/net.d/10-rustnet.conflist", list.to_string()).expect("conflist");
        let before = node.traces();
        let ns = netns(&format!("a{version}{}", ipam.is_null()));
        let r = success("add", &ns);
        assert_eq!(r["cniVersion"], version);
        ping("", &ips(&r)[0].to_string());
        success("check", &ns);
        if version == "1.1.0" {
            success("status", &ns);
        }
        success("del", &ns);
        success("del", &ns);
        let mut after = node.traces();
        after.forget_files_below("/var/lib/cni/results");
        assert_eq!(after, before);
        if version == "1.1.0" {
            // cnitool's gc takes nothing for valid.
            success("add", &ns);
            success("gc", &ns);
            let mut after = node.traces();
            after.forget_files_below("/var/lib/cni/results");
            assert_eq!(after, before);
        }
    }
    fs::remove_file(node.run.join("node.json")).expect("node.json");
    let out = run("status", "/run/netns/x");
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("is the rustnet agent running"), "{out:?}");
}
