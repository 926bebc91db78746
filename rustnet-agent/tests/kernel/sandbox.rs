//! A network namespace, a mount namespace and a BPF file system for one test; all gone when its thread ends.

use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustnet_agent::bpf::attach::{Direction, link_path};
use rustnet_agent::bpf::sys;
use rustnet_agent::config::Config;
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::{link, tc};

/// What a test works with.
pub struct Sandbox {
    /// Where to pin.
    pub bpffs: PathBuf,
    /// The run directory.
    pub run_dir: PathBuf,
    /// For whatever else.
    pub dir: PathBuf,
}

/// Runs a test in a sandbox. Must be root.
pub fn run(test: impl FnOnce(&Sandbox) + Send + 'static) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let root = dir.path().to_owned();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("new namespaces: run the tests as root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
        ip("link set lo up");
        test(&Sandbox { bpffs: root.join("bpf/rustnet"), run_dir: root.join("run"), dir: root });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in this thread's namespace; must succeed.
pub fn ip(args: &str) -> String {
    run_program("ip", args)
}

/// Carries out many lines of `ip` for a family, `-4` or `-6`.
pub fn ip_batch(family: &str, lines: &str) {
    let mut child = Command::new("ip").args([family, "-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("lines");
    assert!(child.wait().expect("ip").success(), "ip {family} -batch");
}

/// Runs a program with arguments split at spaces, which must succeed; returns its output.
pub fn run_program(program: &str, args: &str) -> String {
    let out = command(program, args);
    assert!(out.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("text")
}

/// Runs a program with arguments split at spaces.
pub fn command(program: &str, args: &str) -> Output {
    Command::new(program).args(args.split_whitespace()).output().expect(program)
}

/// Makes `eth0` as an uplink: one end of a veth pair, so that tunnels and routes behave as on hardware.
pub fn uplink() {
    ip("link add eth0 type veth peer name far");
    for dev in ["eth0", "far"] {
        ip(&format!("link set {dev} addrgenmode none"));
        ip(&format!("link set {dev} up"));
    }
    ip("addr add 192.0.2.1/24 dev eth0");
    ip("addr add 2001:db8::1/64 dev eth0 nodad");
    ip("route add default via 192.0.2.254");
}

/// Adds `eth1`, a device like the uplink, with an address of a network of its own. `mtu` is in bytes.
pub fn add_eth1(mtu: u32) {
    ip(&format!("link add eth1 mtu {mtu} type veth peer name far1"));
    for dev in ["eth1", "far1"] {
        ip(&format!("link set {dev} up"));
    }
    ip("addr add 198.51.100.1/24 dev eth1");
}

/// Adds a pod's interface, of which the pod's end stays down. Returns its index.
pub fn add_pod_veth(name: &str) -> u32 {
    ip(&format!("link add {name} type veth peer name pod-{name}"));
    ip(&format!("link set {name} up"));
    ifindex(name)
}

/// Whether this kernel has TCX. Before 6.6 devices get filters on a clsact qdisc instead.
pub fn has_tcx() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let mut numbers = release.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 6)
}

/// The link (without TCX: the device) and the program on the hook of a device.
pub fn on_hook(bpffs: &Path, program: &str, device: &str, direction: Direction) -> Option<(u32, u32)> {
    let mut socket = Socket::open().expect("a netlink socket");
    let index = link::by_name(&mut socket, device).expect("a list of links")?.index;
    if has_tcx() {
        // One uplink's link has no device in its name.
        let paths = [link_path(bpffs, program, None), link_path(bpffs, program, Some(index))];
        let links = paths.iter().filter_map(|path| sys::obj_get(path).ok());
        let mut infos = links.map(|link| sys::link_info(link.as_fd()).expect("a link"));
        return infos.find(|info| info.ifindex == index).map(|info| (info.id, info.prog_id));
    }
    Some((index, tc::filter(&mut socket, index, direction).expect("a list of filters")?.prog_id))
}

/// The links and the programs, as [`on_hook`] returns them, of the four hooks that each agent with an
/// overlay has.
pub fn link_ids(sandbox: &Sandbox) -> Vec<(u32, u32)> {
    use Direction::{Egress, Ingress};
    let hooks = [
        ("uplink_in", "eth0", Ingress),
        ("uplink_out", "eth0", Egress),
        ("overlay_in", "rn_vxlan", Ingress),
        ("overlay_out", "rn_vxlan", Egress),
    ];
    let there = |(program, device, direction): (&str, &str, Direction)| {
        on_hook(&sandbox.bpffs, program, device, direction).unwrap_or_else(|| panic!("{program} hangs on nothing"))
    };
    hooks.map(there).to_vec()
}

/// Index of an interface of this thread's namespace.
pub fn ifindex(name: &str) -> u32 {
    ip(&format!("-o link show {name}")).split(':').next().and_then(|n| n.trim().parse().ok()).expect("an index")
}

/// How long anything may take before it counts as broken; `RUSTNET_DEADLINE` says it for machines a hundred times slower,
/// emulated ones, in seconds.
pub fn deadline() -> Duration {
    let given = std::env::var("RUSTNET_DEADLINE").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(given.unwrap_or(30))
}

/// Waits until `done`: a loaded machine is no failure.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + deadline();
    while !done() {
        assert!(Instant::now() < end, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Sandbox {
    /// An agent's configuration, with small maps.
    pub fn config(&self, extra: &[&str]) -> Config {
        let mut args: Vec<String> = vec![
            "rustnet-agent".into(),
            "--node-name=n1".into(),
            "--routing=vxlan".into(),
            "--health-addr=off".into(),
            "--metrics-addr=off".into(),
            format!("--bpffs={}", self.bpffs.display()),
            format!("--run-dir={}", self.run_dir.display()),
            format!("--manifests={}", self.dir.join("manifests").display()),
        ];
        args.extend(extra.iter().map(|s| (*s).to_owned()));
        if !args.iter().any(|arg| arg.starts_with("--uplink=")) {
            args.push("--uplink=eth0".into());
        }
        if !args.iter().any(|arg| arg.starts_with("--cgroup=")) {
            args.push("--cgroup=/sys/fs/cgroup".into());
        }
        // No test attaches programs to a control group that is not its own.
        if !args.iter().any(|arg| arg.starts_with("--socket-lb=")) {
            args.push("--socket-lb=off".into());
        }
        Config::load(args, &|_| None).expect("a configuration")
    }

    /// Adds a pod's interface with its record. Returns the interface's index.
    pub fn add_pod(&self, veth: &str, address: &str) -> u32 {
        let ifindex = add_pod_veth(veth);
        self.record(veth, ifindex, address);
        ifindex
    }

    /// Writes a record such as the CNI binary leaves.
    pub fn record(&self, veth: &str, ifindex: u32, address: &str) {
        self.write_record("0123456789abcdef", veth, ifindex, address, ["default", "web-0", "u"]);
    }

    /// Puts limits of bandwidth into the record that [`Self::record`] wrote.
    pub fn limit(&self, bandwidth: serde_json::Value) {
        let path = self.run_dir.join("endpoints/0123456789abcdef@eth0.json");
        let text = std::fs::read(&path).expect("a record");
        let mut record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        record["bandwidth"] = bandwidth;
        std::fs::write(path, record.to_string()).expect("a record");
    }

    /// Puts the number of a network namespace into a container's record.
    pub fn give_cookie(&self, container: &str, cookie: u64) {
        self.give(container, "netnsCookie", cookie.into());
    }

    /// Puts a value into a container's record.
    pub fn give(&self, container: &str, key: &str, value: serde_json::Value) {
        let path = self.run_dir.join(format!("endpoints/{container}@eth0.json"));
        let text = std::fs::read(&path).expect("a record");
        let mut record: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        record[key] = value;
        std::fs::write(path, record.to_string()).expect("a record");
    }

    /// Writes the record of a pod whose name the runtime did not tell.
    pub fn nameless_record(&self, container: &str, veth: &str, ifindex: u32, address: &str) {
        self.write_record(container, veth, ifindex, address, ["", "", ""]);
    }

    fn write_record(
        &self,
        container: &str,
        veth: &str,
        ifindex: u32,
        address: &str,
        [namespace, name, uid]: [&str; 3],
    ) {
        let dir = self.run_dir.join("endpoints");
        std::fs::create_dir_all(&dir).expect("a folder");
        let record = serde_json::json!({
            "containerId": container, "ifname": "eth0", "netns": "/run/netns/x", "network": "rustnet",
            "hostIfname": veth, "ifindex": ifindex, "mac": "02:00:00:00:00:07", "addresses": [address],
            "podNamespace": namespace, "podName": name, "podUid": uid,
        });
        // As the CNI binary does: nobody reads half of it.
        let temporary = dir.join(format!(".{container}.tmp"));
        std::fs::write(&temporary, record.to_string()).expect("a record");
        std::fs::rename(&temporary, dir.join(format!("{container}@eth0.json"))).expect("a record");
    }

    /// Runs the `rustnetctl` command on this sandbox.
    pub fn rustnetctl(&self, args: &str) -> Output {
        let run_dir = self.run_dir.display();
        command(env!("CARGO_BIN_EXE_rustnetctl"), &format!("--run-dir {run_dir} {args}"))
    }
}

impl Sandbox {
    /// Starts the `rustnetctl` command on this sandbox.
    pub fn spawn_rustnetctl(&self, args: &str) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rustnetctl"));
        command.arg("--run-dir").arg(&self.run_dir).args(args.split_whitespace());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("rustnetctl")
    }
}

/// Names in a directory, sorted; none if it is not there. The kernel's own in a new BPF file system do not count.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|e| e.expect("entry").file_name().into_string().expect("text")).collect();
    names.retain(|name| !["maps.debug", "progs.debug"].contains(&name.as_str()));
    names.sort();
    names
}
