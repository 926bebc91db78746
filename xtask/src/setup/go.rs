//! What comes from the Go module proxy: cnitool, and Kubernetes' own programs, built from the pinned `go.mod` in
//! `tests/kubernetes`. The results stay in the user's cache under their version.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Work;
use crate::cmd::{Cmd, is_executable, which};
use crate::toolchain::parse_version;
use crate::{cache, paths, ui};

const CNITOOL: &str = "v1.2.3";
/// Cluster DNS; its dependencies do not go together with those of Kubernetes, hence a module of its own.
const COREDNS: &str = "v1.15.0";
/// Renders the chart in tests.
const HELM: &str = "v3.22.0";
/// What a Go fetches that is older than [`OLDEST_GO`]: the proxy has Go itself, too, and the checksum database vouches for it.
const FETCHED_GO: &str = "v0.0.1-go1.24.6";
/// From this on Go fetches by itself the exact release that a go.mod asks for.
const OLDEST_GO: (u32, u32) = (1, 21);

/// Where Kubernetes' programs are: `kubernetes/<version>/bin` in the user's cache.
pub fn kubernetes_dir() -> Result<PathBuf> {
    Ok(paths::cache().join("kubernetes").join(kubernetes_version()?).join("bin"))
}

/// The version that the module in `tests/kubernetes` pins, such as `v1.34.4`.
pub fn kubernetes_version() -> Result<String> {
    required_version(&go_mod()?)
}

pub(super) fn ensure_cnitool(work: &mut Work) -> Result<()> {
    ensure_tool(work, "github.com/containernetworking/cni/cnitool", CNITOOL)
}

pub(super) fn ensure_coredns(work: &mut Work) -> Result<()> {
    ensure_tool(work, "github.com/coredns/coredns", COREDNS)
}

pub(super) fn ensure_helm(work: &mut Work) -> Result<()> {
    ensure_tool(work, "helm.sh/helm/v3/cmd/helm", HELM)
}

/// A program that is a module of its own, at one version.
fn ensure_tool(work: &mut Work, package: &str, version: &str) -> Result<()> {
    let name = package.rsplit('/').next().unwrap_or(package);
    let stamp = Stamp::new(&paths::tools().join(name), version.to_owned());
    if stamp.holds() {
        return Ok(());
    }
    let go = go(work)?;
    let install = Cmd::new(go)
        .args(["install", "-ldflags", "-s -w", &format!("{package}@{version}")])
        .env("GOBIN", paths::tools())
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS")
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step(&format!("building {name} {version}"), &install)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

pub(super) fn ensure_kubernetes(work: &mut Work, program: &str) -> Result<()> {
    let go_mod = go_mod()?;
    let version = required_version(&go_mod)?;
    let bin = kubernetes_dir()?;
    let mut key = cache::Key::default();
    key.text("go.mod", &go_mod);
    let stamp = Stamp::new(&bin.join(program), key.finish());
    if stamp.holds() {
        return Ok(());
    }
    let go = go(work)?;
    let source = bin.with_file_name("src");
    let build = Cmd::new(go)
        .args(build_verb(program))
        // -mod=mod in a copy: Go completes go.sum there, and leaves the tracked one alone.
        .args(["-mod=mod", "-ldflags", &linker_flags(&version), "-o"])
        .arg(bin.join(program))
        .arg(package(program))
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS")
        .dir(&source)
        .remedy("Go needs a module proxy that it can reach (go env GOPROXY), 2 GB of memory and 3 GB of disk");
    if !work.dry_run {
        copy_module(&source)?;
    }
    work.step(&format!("building {program} {version} (minutes, once)"), &build)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

/// The Go package of a program.
fn package(program: &str) -> String {
    match program {
        // Streaming lists need a newer store than some distributions have.
        "etcd" => "go.etcd.io/etcd/server/v3".to_owned(),
        "e2e.test" => "k8s.io/kubernetes/test/e2e".to_owned(),
        "ginkgo" => "github.com/onsi/ginkgo/v2/ginkgo".to_owned(),
        "agnhost" | "regression-issue-74839" => format!("k8s.io/kubernetes/test/images/{program}"),
        // Our own, in the module's directory.
        "pause" => "./pause".to_owned(),
        _ => format!("k8s.io/kubernetes/cmd/{program}"),
    }
}

/// How Go makes a program: tests have no main function of their own.
fn build_verb(program: &str) -> &'static [&'static str] {
    if program == "e2e.test" { &["test", "-c"] } else { &["build"] }
}

/// Files of Kubernetes' sources that its test images hold, copied beside the programs.
pub(super) fn ensure_fixtures(work: &mut Work) -> Result<()> {
    let to = kubernetes_dir()?;
    if work.dry_run || FIXTURES.iter().all(|file| to.join(file.name).is_file()) {
        return Ok(());
    }
    let go = go(work)?;
    let list =
        Cmd::new(go).args(["list", "-mod=mod", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"]).env_remove("GOFLAGS");
    let source = PathBuf::from(list.dir(to.with_file_name("src")).capture()?.trim());
    FIXTURES.iter().try_for_each(|file| cache::copy(&source.join(file.path).join(file.name), &to.join(file.name)))
}

struct Fixture {
    path: &'static str,
    name: &'static str,
}

/// agnhost serves HTTPS with these.
const FIXTURES: [Fixture; 2] = [
    Fixture { path: "test/images/agnhost/porter", name: "localhost.crt" },
    Fixture { path: "test/images/agnhost/porter", name: "localhost.key" },
];

/// Go, new enough: the machine's, a package's, or one that the package's fetches because it is too old itself.
fn go(work: &mut Work) -> Result<PathBuf> {
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

fn module() -> PathBuf {
    paths::root().join("tests/kubernetes")
}

fn go_mod() -> Result<String> {
    let file = module().join("go.mod");
    fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}

fn copy_module(to: &Path) -> Result<()> {
    for file in ["go.mod", "go.sum", "pause/main.go"] {
        let from = module().join(file);
        if from.is_file() {
            cache::copy(&from, &to.join(file))?;
        }
    }
    Ok(())
}

/// The version of `k8s.io/kubernetes` that a go.mod requires.
fn required_version(go_mod: &str) -> Result<String> {
    let version = go_mod.lines().find_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("require ").unwrap_or(line);
        line.strip_prefix("k8s.io/kubernetes ")?.split_whitespace().next()
    });
    version.map(str::to_owned).context("tests/kubernetes/go.mod does not require k8s.io/kubernetes")
}

/// Kubernetes takes its own version from the link step; without one it refuses its clients' version checks.
fn linker_flags(version: &str) -> String {
    let (major, minor) = parse_version(version).unwrap_or_default();
    let package = "k8s.io/component-base/version";
    format!(
        "-s -w -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor} \
         -X k8s.io/client-go/pkg/version.gitVersion={version}"
    )
}

/// Tells whether a program was built completely and from what: its size and a key, in a file beside it. A checksum of
/// 100 MB would take longer than the rest of setup.
struct Stamp {
    program: PathBuf,
    key: String,
}

impl Stamp {
    fn new(program: &Path, key: String) -> Self {
        Self { program: program.to_owned(), key }
    }

    fn holds(&self) -> bool {
        let found = fs::read_to_string(self.file()).ok();
        is_executable(&self.program) && found.is_some() && found == self.content()
    }

    fn write(&self) -> Result<()> {
        let content = self.content().with_context(|| format!("{} was not built", self.program.display()))?;
        ui::detail(&format!("built {}", self.program.display()));
        fs::write(self.file(), content).with_context(|| format!("writing {}", self.file().display()))
    }

    fn content(&self) -> Option<String> {
        let size = fs::metadata(&self.program).ok()?.len();
        Some(format!("{} {size}\n", self.key))
    }

    fn file(&self) -> PathBuf {
        self.program.with_extension("stamp")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_both_forms_of_require() {
        assert_eq!(required_version("module m\nrequire k8s.io/kubernetes v1.34.4\n").unwrap(), "v1.34.4");
        assert_eq!(required_version("require (\n\tk8s.io/kubernetes v1.35.0 // x\n)\n").unwrap(), "v1.35.0");
        assert!(required_version("require k8s.io/api v0.34.4\n").is_err());
    }

    #[test]
    fn the_link_step_names_the_version() {
        assert!(linker_flags("v1.34.4").contains("gitMinor=34 "));
    }

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
