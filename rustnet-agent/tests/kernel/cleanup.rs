//! Cleanup removes everything of ours and nothing else, and only when no agent would put it back.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;

use nix::mount::{MsFlags, mount};
use rustnet_agent::bpf::pin;
use rustnet_agent::bpf::sys::{self, Layout};
use rustnet_common::names::v1;

use crate::agent::{Agent, block_on, make_two_nodes, web};
use crate::sandbox::{self, Sandbox, ip, names, uplink};

/// Everything on this host that could be left over.
fn host() -> String {
    // The kernel adds anycast addresses while it forwards; settings of the kernel stay, others may need them by now.
    let routes = ip("route show table all");
    let routes: Vec<_> = routes.lines().filter(|line| !line.starts_with("anycast")).collect();
    let links = ip("-o link show");
    // Flags, queues and the like change by themselves.
    let links: Vec<_> = links.lines().filter_map(|line| line.split(':').nth(1)).collect();
    let filters = sandbox::command("tc", "filter show dev eth0 ingress").stdout;
    format!("{routes:?}\n{links:?}\n{}", String::from_utf8(filters).unwrap())
}

#[test]
fn cleanup_leaves_nothing_of_ours_and_all_of_others() {
    sandbox::run(|sandbox| {
        uplink();
        let net_d = sandbox.dir.join("net.d");
        fs::create_dir_all(&net_d).unwrap();
        fs::write(net_d.join("10-other.conflist"), "{}").unwrap();
        ip("route add 10.9.0.0/16 via 192.0.2.9");
        let before = host();
        sandbox.add_pod("rnv1", "10.1.1.5");
        block_on(async {
            let config = sandbox.config(&[&format!("--cni-conf-dir={}", net_d.display())]);
            let agent = Agent::start_ready(config, make_two_nodes().into_iter().chain(web(2))).await;
            let out = sandbox.rustnetctl("cleanup --yes");
            assert_eq!(out.status.code(), Some(1));
            assert!(String::from_utf8_lossy(&out.stderr).contains("stop it first"));
            assert!(sandbox.run_dir.join("node.json").exists());
            agent.stop().await;
        });
        assert_ne!(host(), before);
        // What an earlier release left.
        let layout = Layout { kind: 1, key_size: 8, value_size: 20, max_entries: 16, flags: 0 };
        let old = sys::map_create(v1::SVC4, layout).unwrap();
        pin::replace(&sandbox.bpffs.join(v1::SVC4), old.as_fd()).unwrap();
        fs::create_dir_all(sandbox.run_dir.join("ipam")).unwrap();
        fs::write(sandbox.run_dir.join("ipam/10.1.1.5"), "").unwrap();
        clean(sandbox);
        assert_eq!(host(), before);
        assert_eq!(names(&net_d), ["10-other.conflist"]);
        assert!(!sandbox.run_dir.exists());
        assert_eq!(names(&sandbox.bpffs), Vec::<String>::new());
        let again = sandbox.rustnetctl(&format!("--bpffs {} cleanup --yes", sandbox.bpffs.display()));
        assert!(String::from_utf8_lossy(&again.stdout).contains("nothing of rustnet's is left"));
        let dry = sandbox.rustnetctl(&format!("--bpffs {} cleanup --dry-run", sandbox.bpffs.display()));
        assert_eq!(dry.status.code(), Some(0), "{}", String::from_utf8_lossy(&dry.stdout));
    });
}

fn clean(sandbox: &Sandbox) {
    let asked = sandbox.rustnetctl("cleanup");
    assert_eq!(asked.status.code(), Some(2), "without a terminal it wants --yes");
    let dry_run = || -> serde_json::Value {
        let out = sandbox.rustnetctl("-o json cleanup --dry-run");
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let listed = dry_run();
    assert_eq!(listed, dry_run(), "a dry run removes nothing");
    assert_eq!(sandbox.rustnetctl("cleanup --dry-run").status.code(), Some(1), "there is something");
    let out = sandbox.rustnetctl("-o json cleanup --yes");
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let all = |report: &serde_json::Value| -> BTreeSet<String> {
        let mut all: BTreeSet<String> = serde_json::from_value(report["removed"].clone()).unwrap();
        // The lock goes with its directory; the kernel removes routes with their device.
        all.retain(|what| !what.contains("agent.lock") && !what.starts_with("route "));
        all
    };
    assert_eq!(all(&listed), all(&report), "the dry run lists what goes");
    let removed: Vec<_> = report["removed"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    let hook = if sandbox::has_tcx() { "link/uplink_in" } else { "classifier on eth0" };
    let programs = ["prog/from_pod", "prog/tunnel_in", "prog/rn_tails"];
    let others = ["rn_svc4_v2", hook, "device rn_vxlan", "device rnv1", "05-rustnet.conflist"];
    for part in programs.into_iter().chain(others) {
        assert!(removed.iter().any(|what| what.contains(part)), "{part} is missing in {removed:?}");
    }
}

#[test]
fn a_mistyped_run_directory_removes_nothing_of_another_agent() {
    sandbox::run(|sandbox| {
        ip("link add rn_vxlan type vxlan external dstport 8472");
        let out = sandbox.rustnetctl("cleanup --yes");
        assert!(String::from_utf8_lossy(&out.stdout).contains("nothing of rustnet's is left"));
        ip("link show rn_vxlan");
    });
}

/// Kernels without the module bpf_preload have nothing of their own in a BPF file system, as a tmpfs has.
#[test]
fn a_dry_run_lists_no_mount_point() {
    sandbox::run(|sandbox| {
        let bpffs = sandbox.dir.join("mounted");
        fs::create_dir(&bpffs).unwrap();
        mount(Some("none"), &bpffs, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(bpffs.join("rn_config"), "").unwrap();
        let removed = |extra: &str| {
            let out = sandbox.rustnetctl(&format!("-o json --bpffs {} cleanup {extra}", bpffs.display()));
            let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            report["removed"].clone()
        };
        let listed = removed("--dry-run");
        assert_eq!(listed, serde_json::json!([bpffs.join("rn_config")]));
        assert_eq!(listed, removed("--yes"));
    });
}

#[test]
fn a_loopback_plugin_goes_only_if_it_is_ours() {
    sandbox::run(|sandbox| {
        let bin = sandbox.dir.join("bin");
        for (loopback, left) in [("ours", vec![]), ("another's", vec!["loopback"])] {
            fs::create_dir_all(&bin).unwrap();
            fs::write(bin.join("rustnet-cni"), "ours").unwrap();
            fs::write(bin.join("loopback"), loopback).unwrap();
            for _ in 0..2 {
                let out = sandbox.rustnetctl(&format!("cleanup --yes --cni-bin-dir {}", bin.display()));
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
                assert_eq!(names(&bin), left);
            }
        }
    });
}

#[test]
fn foreign_files_keep_their_directories() {
    sandbox::run(|sandbox| {
        fs::create_dir_all(&sandbox.run_dir).unwrap();
        fs::write(sandbox.run_dir.join("mine"), "").unwrap();
        let out = sandbox.rustnetctl("cleanup --yes");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(names(&sandbox.run_dir), ["mine"]);
    });
}
