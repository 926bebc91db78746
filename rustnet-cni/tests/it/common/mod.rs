//! A node of its own for each test, and calls of the binary on it.

pub mod bpf;

use rustnet_common::addr::Addr;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names;
use rustnet_common::policy::{Policies, PolicyPod};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_rustnet-cni");
/// Where Debian and others put the standard plugins.
const PLUGIN_DIRS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
const BPFFS: &str = "/run/bpf";

/// A node: the calling thread, in namespaces of its own, with a private /run and /var/lib, pins and `node.json`.
pub struct Node {
    /// The endpoints map.
    pub map: OwnedFd,
    /// The map of host ports.
    pub host_ports: OwnedFd,
    /// The state of network policies.
    pub policies: OwnedFd,
    /// What they say of pods.
    pub policy_pods: OwnedFd,
    /// The run directory.
    pub run: PathBuf,
    /// The directory with the pins.
    pub bpffs: PathBuf,
}

/// One finished call.
#[derive(Debug)]
pub struct Called {
    /// True for exit code 0.
    pub ok: bool,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
    /// Standard output as JSON; null if empty.
    pub json: Value,
    /// Standard error.
    pub stderr: String,
}

impl Called {
    /// The result of a call that must have worked.
    #[track_caller]
    pub fn success(self) -> Value {
        assert!(self.ok, "{self:?}");
        self.json
    }

    /// The message and details of a call that must have failed with `code`.
    #[track_caller]
    pub fn failure(self, code: u32) -> String {
        assert!(!self.ok && self.signal.is_none(), "{self:?}");
        assert_eq!(self.json["code"], code, "{self:?}");
        assert!(self.json["cniVersion"].is_string() && !self.json["msg"].as_str().unwrap_or_default().is_empty());
        format!(
            "{} ({})",
            self.json["msg"].as_str().unwrap_or_default(),
            self.json["details"].as_str().unwrap_or_default()
        )
    }
}

/// A call in preparation.
#[derive(Clone)]
pub struct Call {
    vars: Vec<(String, String)>,
    stdin: Vec<u8>,
    binary: PathBuf,
}

impl Call {
    /// A call of a verb with CNI_PATH only.
    pub fn new(verb: &str, conf: &Value) -> Self {
        let path = std::iter::once(PathBuf::from("/run/plugins")).chain(PLUGIN_DIRS.map(PathBuf::from));
        let path = std::env::join_paths(path).expect("paths").into_string().expect("UTF-8");
        let vars = vec![("CNI_COMMAND".into(), verb.into()), ("CNI_PATH".into(), path)];
        Self { vars, stdin: conf.to_string().into_bytes(), binary: BINARY.into() }
    }

    /// A call for `eth0` of a container.
    pub fn of(verb: &str, conf: &Value, id: &str, netns: &str) -> Self {
        Self::new(verb, conf).env("CNI_CONTAINERID", id).env("CNI_NETNS", netns).env("CNI_IFNAME", "eth0")
    }

    /// Sets a variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.vars.retain(|v| v.0 != name);
        self.vars.push((name.into(), value.into()));
        self
    }

    /// Removes a variable.
    pub fn without(mut self, name: &str) -> Self {
        self.vars.retain(|v| v.0 != name);
        self
    }

    /// Replaces standard input.
    pub fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = bytes.to_vec();
        self
    }

    /// Runs another plugin instead.
    pub fn binary(mut self, path: &str) -> Self {
        self.binary = path.into();
        self
    }

    /// Starts it without waiting.
    pub fn start(&self) -> Child {
        let mut command = Command::new(&self.binary);
        command.env_clear().envs(self.vars.iter().map(|(k, v)| (k, v)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start the binary");
        // A call that fails early does not read it all.
        let _ = child.stdin.take().expect("piped").write_all(&self.stdin);
        child
    }

    /// Runs it to its end.
    pub fn run(&self) -> Called {
        finish(self.start())
    }
}

/// Waits for a started call.
pub fn finish(child: Child) -> Called {
    let out = child.wait_with_output().expect("wait");
    let stdout = String::from_utf8(out.stdout).expect("UTF-8");
    let json = if stdout.is_empty() { Value::Null } else { serde_json::from_str(&stdout).expect(&stdout) };
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    Called { ok: out.status.success(), signal: out.status.signal(), json, stderr }
}

/// Everything a pod could leave behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    links: BTreeSet<String>,
    routes: BTreeSet<String>,
    neighbours: BTreeSet<String>,
    files: BTreeSet<String>,
    entries: BTreeSet<IpAddr>,
    host_ports: BTreeSet<(IpAddr, u16)>,
}

impl Traces {
    /// Leaves out what is another tool's.
    pub fn forget_files_below(&mut self, dir: &str) {
        self.files.retain(|f| !f.starts_with(dir));
    }
}

impl Node {
    /// A node with 10.244.1.0/24 and fd00:10:244:1::/64.
    pub fn new() -> Self {
        Self::with_ranges(&["10.244.1.0/24", "fd00:10:244:1::/64"])
    }

    /// A node with the given pod ranges.
    pub fn with_ranges(ranges: &[&str]) -> Self {
        // SAFETY: plain system call; it gives this thread namespaces of its own.
        let n = unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET) };
        assert_eq!(n, 0, "unshare: {} (these tests need root)", std::io::Error::last_os_error());
        mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE);
        mount("tmpfs", "/run", "tmpfs", 0);
        mount("tmpfs", "/var/lib", "tmpfs", 0);
        for dir in ["/run/netns", "/run/bpf", "/run/rustnet", "/run/plugins"] {
            fs::create_dir(dir).expect(dir);
        }
        mount("bpf", BPFFS, "bpf", 0);
        ip(&["link", "set", "lo", "up"]);
        // As many hosts have it: new devices filter by reverse path, and accept router
        // advertisements.
        let sysctls = [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/default/rp_filter", "1"),
            ("ipv4/conf/default/arp_accept", "1"),
            ("ipv6/conf/default/accept_ra", "2"),
        ];
        for (sysctl, value) in sysctls {
            fs::write(format!("/proc/sys/net/{sysctl}"), value).expect(sysctl);
        }
        // Addresses for the host's own packets to start from.
        ip(&["addr", "add", "192.0.2.1/32", "dev", "lo"]);
        ip(&["addr", "add", "2001:db8::1/128", "dev", "lo", "nodad"]);

        let bpffs = PathBuf::from(BPFFS);
        fs::create_dir(bpffs.join(names::PROGS_DIR)).expect("directory on bpffs");
        for name in ["from_pod", "to_pod"] {
            bpf::pin_program(&bpffs.join(names::PROGS_DIR).join(name));
        }
        let (key, value) = (size_of::<EndpointKey>() as u32, size_of::<Endpoint>() as u32);
        let map = bpf::pin_map(&bpffs.join(names::map::ENDPOINTS), key, value, 4096);
        let (key, value) = (size_of::<HostPortKey>() as u32, size_of::<HostPort>() as u32);
        let host_ports = bpf::pin_map(&bpffs.join(names::map::HOST_PORTS), key, value, 16);
        let (key, value) = (size_of::<u32>() as u32, size_of::<Policies>() as u32);
        let policies = bpf::pin_map(&bpffs.join(names::map::POLICY), key, value, 1);
        let (key, value) = (size_of::<Addr>() as u32, size_of::<PolicyPod>() as u32);
        let policy_pods = bpf::pin_map(&bpffs.join(names::map::POLICY_PODS), key, value, 16);
        let node = Self { map, host_ports, policies, policy_pods, run: "/run/rustnet".into(), bpffs };
        node.write_node_file(&json!({ "version": 1, "nodeName": "n1", "podCIDRs": ranges, "mtu": 1450 }));
        node
    }

    /// Replaces `node.json`.
    pub fn write_node_file(&self, content: &Value) {
        fs::write(self.run.join("node.json"), content.to_string()).expect("node.json");
    }

    /// A configuration with our own IPAM.
    pub fn conf(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "name": "rustnet", "type": "rustnet-cni", "bpffs": self.bpffs, "runDir": self.run })
    }

    /// ADD's configuration extended for CHECK or DEL.
    pub fn conf_with(&self, version: &str, prev: &Value) -> Value {
        let mut conf = self.conf(version);
        conf["prevResult"] = prev.clone();
        conf
    }

    /// ADD with our own IPAM, version 1.1.0; must succeed.
    #[track_caller]
    pub fn add(&self, id: &str, netns: &str) -> Value {
        Call::of("ADD", &self.conf("1.1.0"), id, netns).run().success()
    }

    /// DEL without namespace and prevResult; must succeed.
    #[track_caller]
    pub fn del(&self, id: &str) {
        let out = Call::of("DEL", &self.conf("1.1.0"), id, "").run().success();
        assert_eq!(out, Value::Null);
    }

    /// GC that keeps the given containers' eth0; must succeed.
    #[track_caller]
    pub fn gc(&self, keep: &[&str]) {
        let mut conf = self.conf("1.1.0");
        conf["cni.dev/valid-attachments"] =
            keep.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
        assert_eq!(Call::new("GC", &conf).run().success(), Value::Null);
    }

    /// What is there now.
    pub fn traces(&self) -> Traces {
        let set = |args: &[&str], keys: &[&str]| -> BTreeSet<String> {
            let items = ip_json(args);
            let text = |v: &Value| keys.iter().map(|k| v[*k].to_string()).collect::<Vec<_>>().join(" ");
            items.as_array().expect("list").iter().map(text).collect()
        };
        let mut routes = set(&["-4", "route", "show", "table", "all"], &["dst", "dev"]);
        routes.extend(set(&["-6", "route", "show", "table", "all"], &["dst", "dev"]));
        let mut files = BTreeSet::new();
        for dir in [&self.run, Path::new("/var/lib/cni")] {
            walk(dir, &mut files);
        }
        // Memories of the last address, not leases.
        files.retain(|f| !f.ends_with("/.last") && !f.contains("last_reserved_ip") && !f.ends_with("/lock"));
        Traces {
            links: set(&["link"], &["ifname"]),
            routes,
            neighbours: set(&["neigh", "show", "nud", "permanent"], &["dst", "dev"]),
            files,
            entries: bpf::entries(&self.map).into_iter().map(|e| e.0).collect(),
            host_ports: bpf::host_ports(&self.host_ports).into_iter().map(|e| (e.0.addr.into(), e.0.port)).collect(),
        }
    }
}

fn walk(dir: &Path, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            walk(&entry.path(), files);
        } else {
            files.insert(entry.path().display().to_string());
        }
    }
}

/// Mounts a file system in the test's namespace.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong) {
    let c = |s: &str| CString::new(s).expect("no zero byte");
    let (source, at, kind) = (c(source), c(target), c(kind));
    // SAFETY: all pointers are zero-terminated strings that live until the call returns.
    let n = unsafe { libc::mount(source.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
    assert_eq!(n, 0, "mount {target}: {}", std::io::Error::last_os_error());
}

/// Makes a network namespace as a runtime does, and returns its path.
pub fn netns(name: &str) -> String {
    let path = format!("/run/netns/{name}");
    File::create(&path).expect("namespace's file");
    let target = path.clone();
    let made = std::thread::spawn(move || {
        // SAFETY: plain system call; it gives this thread, which ends at once, a network namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        mount("/proc/thread-self/ns/net", &target, "", libc::MS_BIND);
        ip(&["link", "set", "lo", "up"]);
    });
    made.join().expect("namespace");
    path
}

/// The kernel's number of a namespace.
pub fn netns_cookie(path: &str) -> u64 {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let namespace = File::open(path).expect("namespace");
    let asked = std::thread::spawn(move || {
        // SAFETY: plain system call; it changes only the namespace of this thread, which ends at once.
        assert_eq!(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
        let socket = UnixDatagram::unbound().expect("socket");
        let mut cookie = 0_u64;
        let mut len = size_of::<u64>() as libc::socklen_t;
        let value = (&raw mut cookie).cast();
        // SAFETY: value and length are ours, and the length is that of the value.
        let n = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, &raw mut len) };
        assert_eq!(n, 0, "{}", std::io::Error::last_os_error());
        cookie
    });
    asked.join().expect("a number")
}

/// Removes a namespace as a runtime does; with `keep_file` its mount point stays.
pub fn remove_netns(path: &str, keep_file: bool) {
    let c = CString::new(path).expect("no zero byte");
    // SAFETY: the pointer is a zero-terminated string that lives until the call returns.
    assert_eq!(unsafe { libc::umount2(c.as_ptr(), libc::MNT_DETACH) }, 0, "umount {path}");
    if !keep_file {
        fs::remove_file(path).expect("namespace's file");
    }
}

/// Runs a command that must succeed.
#[track_caller]
pub fn command(program: &str, args: &[&str]) -> Output {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    out
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `ip`.
#[track_caller]
pub fn ip(args: &[&str]) -> String {
    text(&command("ip", args).stdout)
}

/// Runs `ip -j -d`.
#[track_caller]
pub fn ip_json(args: &[&str]) -> Value {
    let out = ip(&[&["-j", "-d"], args].concat());
    if out.trim().is_empty() { json!([]) } else { serde_json::from_str(&out).expect(&out) }
}

/// One echo request from a namespace (empty: the host), which must be answered.
#[track_caller]
pub fn ping(netns: &str, target: &str) {
    let ping = ["ping", "-n", "-c", "1", "-W", "5", target];
    if netns.is_empty() {
        command(ping[0], &ping[1..]);
    } else {
        command("nsenter", &[&[format!("--net={netns}").as_str()], &ping[..]].concat());
    }
}

/// True if one echo request is answered.
pub fn pings(netns: &str, target: &str) -> bool {
    let ping = ["ping", "-n", "-c", "1", "-W", "1", target];
    let mut command = match netns {
        "" => Command::new(ping[0]),
        _ => Command::new("nsenter"),
    };
    if netns.is_empty() {
        command.args(&ping[1..]);
    } else {
        command.arg(format!("--net={netns}")).args(ping);
    }
    command.output().expect("ping").status.success()
}

/// Waits for a condition.
#[track_caller]
pub fn until(what: &str, is: &dyn Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_mins(1), "not within a minute: {what}");
        std::thread::yield_now();
    }
}

/// The addresses in a result.
pub fn ips(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().expect("ips");
    ips.iter()
        .map(|ip| ip["address"].as_str().and_then(|a| a.split('/').next()).expect("address").parse().expect("address"))
        .collect()
}
