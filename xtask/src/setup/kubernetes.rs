//! Kubernetes' own programs, built from the Go module proxy by the pinned modules in `tests/kubernetes`. The results stay in
//! the user's cache under their version.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Work;
use super::go::{Stamp, go};
use crate::cmd::Cmd;
use crate::toolchain::parse_version;
use crate::{cache, paths};

/// The versions that are pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Kubernetes {
    /// What all tests run against
    #[default]
    #[value(name = "1.34")]
    #[serde(rename = "1.34")]
    V1_34,
    /// A newer one, for clusters of one's own
    #[value(name = "1.36")]
    #[serde(rename = "1.36")]
    V1_36,
}

impl Kubernetes {
    /// As people name it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::V1_34 => "1.34",
            Self::V1_36 => "1.36",
        }
    }

    /// All of it, such as `v1.34.4`: what its module requires.
    pub fn version(self) -> Result<String> {
        required_version(&self.go_mod()?)
    }

    /// Its programs: `kubernetes/<version>/bin` in the user's cache.
    pub fn programs(self) -> Result<PathBuf> {
        Ok(paths::cache().join("kubernetes").join(self.version()?).join("bin"))
    }

    /// Its module.
    fn module(self) -> PathBuf {
        match self {
            Self::V1_34 => modules(),
            Self::V1_36 => modules().join(self.word()),
        }
    }

    fn go_mod(self) -> Result<String> {
        let file = self.module().join("go.mod");
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    fn copy_module(self, to: &Path) -> Result<()> {
        for file in ["go.mod", "go.sum"] {
            cache::copy(&self.module().join(file), &to.join(file))?;
        }
        cache::copy(&modules().join("pause/main.go"), &to.join("pause/main.go"))
    }
}

fn modules() -> PathBuf {
    paths::root().join("tests/kubernetes")
}

/// agnhost that speaks SCTP by itself, for kernels without it.
pub const AGNHOST_SCTP: &str = "agnhost-sctp";
/// The library by which agnhost speaks SCTP. `tests/kubernetes/sctp` takes its place.
const SCTP: &str = "github.com/ishidawataru/sctp";

/// Builds a program of the version that this run of setup is about.
pub(super) fn ensure(work: &mut Work, program: &str) -> Result<()> {
    let kubernetes = work.kubernetes;
    let (version, bin) = (kubernetes.version()?, kubernetes.programs()?);
    let mut key = cache::Key::default();
    key.text("go.mod", &kubernetes.go_mod()?);
    let is_replaced = program == AGNHOST_SCTP;
    if is_replaced {
        key.tree(&modules(), &modules().join("sctp"))?;
    }
    let stamp = Stamp::new(&bin.join(program), key.finish());
    if stamp.holds() {
        return Ok(());
    }
    let go = go(work)?;
    let source = bin.with_file_name(if is_replaced { "src-sctp" } else { "src" });
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
        kubernetes.copy_module(&source)?;
        if is_replaced {
            replace_sctp(&source)?;
        }
    }
    work.step(&format!("building {program} {version} (minutes, once)"), &build)?;
    if work.dry_run { Ok(()) } else { stamp.write() }
}

/// Puts our SCTP in the place of the library in a copy of the module.
fn replace_sctp(module: &Path) -> Result<()> {
    let from = modules().join("sctp");
    for file in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
        let file = file?;
        cache::copy(&file.path(), &module.join("sctp").join(file.file_name()))?;
    }
    let file = module.join("go.mod");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    fs::write(&file, format!("{text}\nreplace {SCTP} => ./sctp\n"))
        .with_context(|| format!("writing {}", file.display()))
}

/// The Go package of a program.
fn package(program: &str) -> String {
    match program {
        // Streaming lists need a newer store than some distributions have.
        "etcd" => "go.etcd.io/etcd/server/v3".to_owned(),
        "e2e.test" => "k8s.io/kubernetes/test/e2e".to_owned(),
        "ginkgo" => "github.com/onsi/ginkgo/v2/ginkgo".to_owned(),
        AGNHOST_SCTP => package("agnhost"),
        "agnhost" | "regression-issue-74839" => format!("k8s.io/kubernetes/test/images/{program}"),
        // Our own, in the module's directory.
        "pause" => "./pause".to_owned(),
        _ => format!("k8s.io/kubernetes/cmd/{program}"),
    }
}

/// How Go makes a program: tests have no main function of their own. Whether they are well written is not our question, and
/// takes minutes.
fn build_verb(program: &str) -> &'static [&'static str] {
    if program == "e2e.test" { &["test", "-c", "-vet=off"] } else { &["build"] }
}

/// Files of Kubernetes' sources that its test images hold, copied next to the programs.
pub(super) fn ensure_fixtures(work: &mut Work) -> Result<()> {
    let to = work.kubernetes.programs()?;
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

/// The version of `k8s.io/kubernetes` that a go.mod requires.
fn required_version(go_mod: &str) -> Result<String> {
    let version = go_mod.lines().find_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("require ").unwrap_or(line);
        line.strip_prefix("k8s.io/kubernetes ")?.split_whitespace().next()
    });
    version.map(str::to_owned).context("the go.mod does not require k8s.io/kubernetes")
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
}
