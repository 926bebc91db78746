//! The images that a cluster and the end-to-end tests want, made of Kubernetes' own programs and of this machine's: there is
//! no registry. Written once into the user's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};

use crate::cmd::{Cmd, which};
use crate::oci::{self, Blob, Image, Layer};
use crate::setup::{AGNHOST_SCTP, Kubernetes};
use crate::{cache, host, paths, ui};

/// Where images of the tests come from, by name. Of their versions, those that the tests of every pinned Kubernetes name.
const E2E: &str = "registry.k8s.io/e2e-test-images/";
/// What the cluster's DNS runs.
pub const COREDNS: &str = "registry.k8s.io/coredns/coredns:local";
/// An Ingress controller.
pub const INGRESS: &str = "docker.io/library/skipper:local";
/// Applets that Debian's busybox does worse than the real thing, or that no container should have.
const NO_APPLETS: [&str; 8] = ["busybox", "ip", "ss", "su", "init", "reboot", "poweroff", "halt"];
/// Programs in addition to them that the tests call.
const TOOLS: [&str; 14] = [
    "bash",
    "dash",
    "wget",
    "curl",
    "dig",
    "nc.openbsd",
    "ss",
    "ip",
    "iperf",
    "getent",
    "conntrack",
    "nft",
    "socat",
    "iptables-nft",
];
/// Which programs of the tests' images come from Kubernetes.
const PROGRAMS: [&str; 3] = ["pause", "agnhost", "regression-issue-74839"];
/// What tests of network policies name: those of the network policy API, and cyclonus.
const POLICY_TESTS: [&str; 2] = ["agnhost:2.45", "agnhost:2.43"];
/// Changes when the recipe below does.
const RECIPE: &str = "2";

/// The file with all of them; made when it is missing or the programs have changed.
pub fn ensure(kubernetes: Kubernetes) -> Result<PathBuf> {
    let programs = kubernetes.programs()?;
    let mut key = cache::Key::default();
    key.text("recipe", RECIPE);
    for name in PROGRAMS {
        // Written by setup, and changed with the program.
        let stamp = programs.join(name).with_extension("stamp");
        key.text(
            name,
            &fs::read_to_string(&stamp)
                .with_context(|| format!("{} is missing: cargo xtask setup --with cluster", stamp.display()))?,
        );
    }
    let dir = programs.with_file_name("images");
    let file = dir.join(format!("cluster-{}.tar", key.finish()));
    if !file.is_file() {
        let _ = fs::remove_dir_all(&dir); // of earlier programs
        let progress = ui::Progress::start("making the images of the cluster and its tests");
        oci::write(&file, &all(&programs)?)?;
        progress.done();
    }
    Ok(file)
}

/// The file with the image of the Ingress controller; made when it is missing or the program has changed.
pub fn ingress() -> Result<PathBuf> {
    let program = paths::tools().join("skipper");
    let stamp = program.with_extension("stamp");
    let mut key = cache::Key::default();
    key.text(
        "skipper",
        &fs::read_to_string(&stamp)
            .with_context(|| format!("{} is missing: cargo xtask cluster trial ingress", stamp.display()))?,
    );
    let file = paths::tools().join(format!("skipper-{}.tar", key.finish()));
    if !file.is_file() {
        oci::write(&file, &[image(&[&one("/skipper", &program)?], &["/skipper"], &[], vec![INGRESS.into()])])?;
    }
    Ok(file)
}

/// The file with agnhost as tests of network policies name it; made when it is missing or the program has changed. It speaks SCTP
/// by itself where the kernel does not.
pub fn policy_tests(kubernetes: Kubernetes) -> Result<PathBuf> {
    let programs = kubernetes.programs()?;
    let program = if host::has_sctp() { "agnhost" } else { AGNHOST_SCTP };
    let stamp = programs.join(program).with_extension("stamp");
    let mut key = cache::Key::default();
    key.text("recipe", RECIPE);
    key.text("names", &POLICY_TESTS.join(" "));
    key.text(
        program,
        &fs::read_to_string(&stamp)
            .with_context(|| format!("{} is missing: cargo xtask policy-conformance", stamp.display()))?,
    );
    let file = programs.with_file_name("images").join(format!("policy-tests-{}.tar", key.finish()));
    if !file.is_file() {
        let progress = ui::Progress::start("making the image of the policy tests");
        let mut shell = Layer::new();
        shell.link("/bin/bash", "/usr/bin/bash")?;
        let layers = [&base()?, &tools()?, &shell.finish()?, &agnhost(&programs, program)?];
        let names = POLICY_TESTS.map(|name| format!("{E2E}{name}"));
        oci::write(&file, &[image(&layers, &["/agnhost"], &["pause"], names.into())])?;
        progress.done();
    }
    Ok(file)
}

fn all(programs: &Path) -> Result<Vec<Image>> {
    let base = base()?;
    let tools = tools()?;
    let agnhost = agnhost(programs, "agnhost")?;
    let pause = one("/pause", &programs.join("pause"))?;
    let coredns = one("/coredns", &paths::tools().join("coredns"))?;
    let regression = one("/regression-issue-74839", &programs.join("regression-issue-74839"))?;
    let e2e = |names: &[&str]| names.iter().map(|name| format!("{E2E}{name}")).collect::<Vec<_>>();
    let shell = [&base, &tools];
    Ok(vec![
        image(
            &[&pause],
            &["/pause"],
            &[],
            ["3.10", "3.10.1", "3.10.2"].map(|tag| format!("registry.k8s.io/pause:{tag}")).into(),
        ),
        image(&[&coredns], &["/coredns"], &[], vec![COREDNS.into()]),
        // It runs CoreDNS, too, where tests want a name server of their own.
        image(
            &[&base, &tools, &agnhost, &coredns],
            &["/agnhost"],
            &["pause"],
            e2e(&["agnhost:2.56", "agnhost:2.63.0"]),
        ),
        image(
            &[&base, &regression],
            &["/regression-issue-74839"],
            &[],
            e2e(&["regression-issue-74839:1.2", "regression-issue-74839:1.4"]),
        ),
        image(&[&base], &[], &["sh"], e2e(&["busybox:1.37.0-1"])),
        image(
            &shell,
            &[],
            &["sh"],
            [
                e2e(&["jessie-dnsutils:1.7", "glibc-dns-testing:2.0.0"]),
                ["v0.7.14", "v0.9.6"]
                    .map(|tag| format!("registry.k8s.io/build-image/distroless-iptables:{tag}"))
                    .into(),
            ]
            .concat(),
        ),
        // Web servers: what they serve is of no interest, and their versions only have to differ.
        image(
            &[&base, &tools, &agnhost],
            &[],
            &["/agnhost", "netexec", "--http-port=80", "--udp-port=-1"],
            e2e(&["nginx:1.14-4", "nginx:1.15-4", "nginx:1.27-0", "httpd:2.4.38-4", "httpd:2.4.39-4"]),
        ),
    ])
}

fn image(layers: &[&Rc<Blob>], entrypoint: &[&str], cmd: &[&str], names: Vec<String>) -> Image {
    let words = |words: &[&str]| words.iter().map(ToString::to_string).collect();
    Image {
        layers: layers.iter().map(|layer| Rc::clone(layer)).collect(),
        entrypoint: words(entrypoint),
        cmd: words(cmd),
        path: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
        names,
        ..Image::default()
    }
}

/// A shell with its small programs, and users.
fn base() -> Result<Rc<Blob>> {
    let mut layer = Layer::new();
    for dir in ["/root", "/usr/bin", "/var", "/uploads", "/results", "/home", "/run"] {
        layer.dir(dir, 0o755)?;
    }
    layer.dir("/tmp", 0o1777)?;
    let busybox = which("busybox").context("no busybox: cargo xtask setup --with cluster")?;
    layer.program("/bin/busybox", &busybox)?;
    for applet in Cmd::new(&busybox).arg("--list").capture()?.split_whitespace() {
        if !NO_APPLETS.contains(&applet) {
            layer.link(&format!("/bin/{applet}"), "/bin/busybox")?;
        }
    }
    for (file, text) in
        [("passwd", PASSWD), ("group", GROUP), ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")]
    {
        layer.content(&format!("/etc/{file}"), text.as_bytes(), 0o644)?;
    }
    layer.finish()
}

/// Programs that tests call in containers, as this machine has them.
fn tools() -> Result<Rc<Blob>> {
    let mut layer = Layer::new();
    for tool in TOOLS {
        let path = which(tool).with_context(|| format!("no {tool}: cargo xtask setup --with cluster"))?;
        layer.program(&format!("/usr/bin/{tool}"), &path.canonicalize()?)?;
    }
    // busybox's own shell prefers its applets to what is in PATH, and its wget crashes on -T.
    for (path, target) in [
        ("/bin/sh", "/usr/bin/dash"),
        ("/bin/wget", "/usr/bin/wget"),
        ("/bin/nc", "/usr/bin/nc.openbsd"),
        ("/usr/bin/nc", "nc.openbsd"),
        ("/usr/local/bin/iperf", "/usr/bin/iperf"),
    ] {
        layer.link(path, target)?;
    }
    layer.content("/etc/wgetrc", b"tries = 1\n", 0o644)?;
    for name in ["iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore"] {
        // One program; it looks at the name that it is called by.
        layer.link(&format!("/usr/sbin/{name}"), "/usr/bin/iptables-nft")?;
    }
    for extension in extensions() {
        layer.file(&extension.display().to_string(), &extension, 0o644)?;
    }
    layer.finish()
}

/// What iptables loads.
fn extensions() -> Vec<PathBuf> {
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path().join("xtables"));
    let files = libraries.filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten();
    let mut files: Vec<PathBuf> = files.map(|entry| entry.path()).collect();
    files.sort();
    files
}

fn agnhost(programs: &Path, program: &str) -> Result<Rc<Blob>> {
    let mut layer = Layer::new();
    layer.file("/agnhost", &programs.join(program), 0o755)?;
    layer.link("/agnhost-2", "agnhost")?;
    for file in ["localhost.crt", "localhost.key"] {
        layer.file(&format!("/{file}"), &programs.join(file), 0o644)?;
    }
    layer.finish()
}

fn one(path: &str, from: &Path) -> Result<Rc<Blob>> {
    let mut layer = Layer::new();
    layer.program(path, from)?;
    layer.finish()
}

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n\
                      user-defined-in-image:x:1000:1000::/home:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n\
                     group-defined-in-image:x:50000:user-defined-in-image\n";
