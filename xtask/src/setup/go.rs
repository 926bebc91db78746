//! Go itself, and the programs that are modules of their own on its module proxy.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Work;
use crate::cmd::{Cmd, is_executable, which};
use crate::toolchain::parse_version;
use crate::{cache, paths, ui};

const CNITOOL: &str = "v1.2.3";
/// Cluster DNS; its dependencies do not go together with those of Kubernetes, so it has a module of
/// its own.
const COREDNS: &str = "v1.15.0";
/// Renders the chart in tests.
const HELM: &str = "v3.22.0";
/// Judges the alerts in tests: that of Prometheus 3.16.
const PROMTOOL: &str = "v0.316.0";
/// containerd, by whose default AppArmor profile containers are confined.
const CONTAINERD: &str = "v2.1.4";
/// Writes that profile to a file.
const PROFILE: &str = include_str!("profile.go");
/// What a Go fetches that is older than [`OLDEST_GO`]: the proxy has Go itself, too, and the checksum database vouches for it.
const FETCHED_GO: &str = "v0.0.1-go1.24.6";
/// From this on Go fetches by itself the exact release that a go.mod asks for.
const OLDEST_GO: (u32, u32) = (1, 21);

pub(super) fn ensure_cnitool(work: &mut Work) -> Result<()> {
    ensure_tool(work, "github.com/containernetworking/cni/cnitool", CNITOOL, None)
}

pub(super) fn ensure_coredns(work: &mut Work) -> Result<()> {
    ensure_tool(work, "github.com/coredns/coredns", COREDNS, None)
}

pub(super) fn ensure_helm(work: &mut Work) -> Result<()> {
    ensure_tool(work, "helm.sh/helm/v3/cmd/helm", HELM, None)
}

/// Without service discovery, which takes the libraries of a dozen clouds and is not asked for.
pub(super) fn ensure_promtool(work: &mut Work) -> Result<()> {
    ensure_tool(work, "github.com/prometheus/prometheus/cmd/promtool", PROMTOOL, Some("remove_all_sd"))
}

/// An Ingress controller, by the module in `tests/kubernetes/ingress`: the proxy does not have the list of its versions, without which
/// Go installs nothing.
pub(super) fn ensure_skipper(work: &mut Work) -> Result<()> {
    let module = paths::root().join("tests/kubernetes/ingress");
    let text = fs::read_to_string(module.join("go.mod")).with_context(|| format!("reading {}", module.display()))?;
    let mut key = cache::Key::default();
    key.text("go.mod", &text);
    let stamp = Stamp::new(&paths::tools().join("skipper"), key.finish());
    if stamp.holds() {
        return Ok(());
    }
    let source = paths::tools().join("skipper-src");
    if !work.dry_run {
        for file in ["go.mod", "go.sum"] {
            cache::copy(&module.join(file), &source.join(file))?;
        }
    }
    // -mod=mod in a copy: Go completes go.sum there, and leaves the tracked one alone.
    let args = ["-mod=mod", "github.com/zalando/skipper/cmd/skipper"];
    build(work, "building an Ingress controller (minutes, once)", &source, &args, &stamp)
}

/// The default profile, as containerd renders it.
pub(super) fn ensure_profile(work: &mut Work) -> Result<()> {
    let file = paths::apparmor_profile();
    let stamp = Stamp::new(&file, CONTAINERD.to_owned());
    if stamp.holds() {
        return Ok(());
    }
    let dir = paths::target().join("containerd-profile");
    let module = format!("module profile\n\ngo 1.24\n\nrequire github.com/containerd/containerd/v2 {CONTAINERD}\n");
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    fs::create_dir_all(paths::tools()).with_context(|| format!("making {}", paths::tools().display()))?;
    for (name, text) in [("go.mod", module.as_str()), ("main.go", PROFILE)] {
        fs::write(dir.join(name), text).with_context(|| format!("writing {}", dir.join(name).display()))?;
    }
    let render = Cmd::new(go(work)?)
        .args(["run", "."])
        .arg(&file)
        .env("GOFLAGS", "-mod=mod")
        .dir(dir)
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step(&format!("rendering the AppArmor profile of containerd {CONTAINERD}"), &render)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

/// What the tests compare network policies with: a small program of ours that calls cyclonus. Its go.mod has the versions.
pub(super) fn ensure_policy_oracle(work: &mut Work) -> Result<()> {
    let source = paths::root().join("tests/oracle");
    let mut key = cache::Key::default();
    key.tree(&source, &source)?;
    let program = paths::policy_oracle();
    let stamp = Stamp::new(&program, key.finish());
    if stamp.holds() {
        return Ok(());
    }
    let args = ["-trimpath", "-buildvcs=false", "."];
    build(work, "building the oracle of network policies", &source, &args, &stamp)
}

/// Builds the program of a stamp in the directory of a module. `args` end with the package.
pub(super) fn build(work: &mut Work, title: &str, module: &Path, args: &[&str], stamp: &Stamp) -> Result<()> {
    let build = Cmd::new(go(work)?)
        .args(["build", "-ldflags", "-s -w", "-o"])
        .arg(&stamp.program)
        .args(args)
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS")
        .dir(module)
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step(title, &build)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

/// A program that is a module of its own, at one version, with a build tag if it has one.
fn ensure_tool(work: &mut Work, package: &str, version: &str, tag: Option<&str>) -> Result<()> {
    let name = package.rsplit('/').next().unwrap_or(package);
    let stamp = Stamp::new(&paths::tools().join(name), version.to_owned());
    if stamp.holds() {
        return Ok(());
    }
    let go = go(work)?;
    let install = Cmd::new(go)
        .args(["install", "-ldflags", "-s -w", "-tags", tag.unwrap_or_default(), &format!("{package}@{version}")])
        .env("GOBIN", paths::tools())
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS")
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step(&format!("building {name} {version}"), &install)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

/// Go, new enough: the machine's, a package's, or one that the package's fetches because it is too old itself.
pub(super) fn go(work: &mut Work) -> Result<PathBuf> {
    if let Some(go) = find_go() {
        return Ok(go);
    }
    if any_go().is_none() {
        ensure!(
            work.package_version("golang-go").is_some(),
            "Go is needed and there is no package golang-go\n  remedy: install Go {}.{} or newer from its own site",
            OLDEST_GO.0,
            OLDEST_GO.1
        );
        work.install_packages(&["golang-go"])?;
        if work.dry_run {
            return Ok("go".into());
        }
    }
    match find_go() {
        Some(go) => Ok(go),
        None => newer_go(work, &any_go().context("golang-go is installed, but there is no go")?),
    }
}

fn any_go() -> Option<PathBuf> {
    which("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| is_executable(go)))
}

fn find_go() -> Option<PathBuf> {
    let old = any_go()?;
    let version = Cmd::new(&old).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").capture().ok()?;
    if parse_version(&version) >= Some(OLDEST_GO) {
        return Some(old);
    }
    fetched_go(&old).ok().filter(|go| is_executable(go))
}

/// Where an old Go leaves the newer one that it fetches.
fn fetched_go(old: &Path) -> Result<PathBuf> {
    let modules = Cmd::new(old).args(["env", "GOMODCACHE"]).capture()?;
    Ok(Path::new(modules.trim()).join(go_module()).join("bin/go"))
}

/// Go itself, as a module.
fn go_module() -> String {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    format!("golang.org/toolchain@{FETCHED_GO}.linux-{arch}")
}

/// Fetches Go by an older one, and makes programs of its files: archives of modules know no modes.
fn newer_go(work: &mut Work, old: &Path) -> Result<PathBuf> {
    let fetch = Cmd::new(old)
        .args(["mod", "download", &go_module()])
        .env_remove("GOFLAGS")
        .dir(std::env::temp_dir())
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step("fetching a newer Go from the module proxy", &fetch)?;
    let go = fetched_go(old)?;
    if work.dry_run {
        return Ok(go);
    }
    let root = go.parent().and_then(Path::parent).context("Go has no directory")?;
    let tools = fs::read_dir(root.join("pkg/tool"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    for dir in tools.into_iter().chain([root.join("bin")]) {
        for file in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            fs::set_permissions(file?.path(), fs::Permissions::from_mode(0o555))?;
        }
    }
    Ok(go)
}

/// Tells whether a program was built completely and from what: its size and a key, in a file next
/// to it. A checksum of 100 MB would take longer than the rest of setup.
pub(super) struct Stamp {
    program: PathBuf,
    key: String,
}

impl Stamp {
    pub(super) fn new(program: &Path, key: String) -> Self {
        Self { program: program.to_owned(), key }
    }

    pub(super) fn holds(&self) -> bool {
        let found = fs::read_to_string(self.file()).ok();
        self.program.is_file() && found.is_some() && found == self.content()
    }

    pub(super) fn write(&self) -> Result<()> {
        let content = self.content().with_context(|| format!("{} was not built", self.program.display()))?;
        ui::detail(&format!("built {}", self.program.display()));
        fs::write(self.file(), content).with_context(|| format!("writing {}", self.file().display()))
    }

    fn content(&self) -> Option<String> {
        let size = fs::metadata(&self.program).ok()?.len();
        Some(format!("{} {size}\n", self.key))
    }

    fn file(&self) -> PathBuf {
        let name = self.program.file_name().unwrap_or_default().to_string_lossy();
        self.program.with_file_name(format!("{name}.stamp"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_a_torn_or_older_program() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("prog");
        let stamp = Stamp::new(&program, "k1".to_owned());
        assert!(!stamp.holds() && stamp.write().is_err());
        fs::write(&program, "0123").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(!stamp.holds());
        stamp.write().unwrap();
        assert!(stamp.holds() && !Stamp::new(&program, "k2".to_owned()).holds());
        fs::write(&program, "012").unwrap();
        assert!(!stamp.holds());
    }
}
