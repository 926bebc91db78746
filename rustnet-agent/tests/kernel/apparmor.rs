//! A kernel that confines containers: what the default profile of runtimes refuses, and that doctor names it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use nix::mount::{MsFlags, mount};
use serde_json::Value;

use super::sandbox::{self, Sandbox, uplink};

/// Name of containerd's default profile.
const PROFILE: &str = "cri-containerd.apparmor.d";

/// `rustnetctl doctor`, under a profile if there is one, where nodes have their BPF file system.
fn doctor(sandbox: &Sandbox, profile: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rustnetctl"));
    command
        .args("-o json --bpffs /sys/fs/bpf/rustnet doctor --pre --node-name n1 --uplink eth0 --manifests".split(' '));
    command.arg(&sandbox.dir);
    if let Some(profile) = profile {
        let change = format!("exec {profile}");
        // SAFETY: opens and writes a file, which is async-signal-safe.
        unsafe {
            command.pre_exec(move || std::fs::write("/proc/self/attr/apparmor/exec", &change));
        }
    }
    command.output().expect("rustnetctl")
}

/// Status, detail and hint of the check of pins.
fn pins(output: &Output) -> [String; 3] {
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let groups = report["groups"].as_array().expect("groups").iter();
    let mut checks = groups.flat_map(|group| group["checks"].as_array().expect("checks"));
    let check = checks.find(|check| check["name"] == "pins").unwrap_or_else(|| panic!("no check of pins: {report:#}"));
    ["status", "detail", "hint"].map(|field| check[field].as_str().unwrap_or_default().to_owned())
}

#[test]
#[ignore = "needs AppArmor with containerd's profile: cargo xtask kernels --test apparmor"]
fn the_default_profile_refuses_pins_and_doctor_names_it() {
    sandbox::run(|sandbox| {
        uplink();
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None::<&str>).expect("a BPF file system");
        let [status, detail, _] = pins(&doctor(sandbox, None));
        assert_eq!(status, "ok", "unconfined, as deploy/daemonset.yaml has it: {detail}");
        let [status, detail, hint] = pins(&doctor(sandbox, Some(PROFILE)));
        assert_eq!(status, "bad", "{detail}");
        assert!(detail.contains("confined by cri-containerd.apparmor.d (enforce)"), "{detail}");
        assert!(hint.contains("appArmorProfile Unconfined"), "{hint}");
    });
}
