//! Others' tests of network policies, from the Go module proxy: the conformance tests of the network policy API by the pinned module in
//! `tests/kubernetes/policy`, the cases of cyclonus by that in `tests/kubernetes/cyclonus`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Work;
use super::go::{Stamp, build, go};
use super::kubernetes::{self, AGNHOST_SCTP};
use crate::cmd::Cmd;
use crate::{cache, host, paths};

const MODULE: &str = "sigs.k8s.io/network-policy-api";
const CYCLONUS: &str = "github.com/mattfenwick/cyclonus";
/// Where the API has ClusterNetworkPolicy, with all fields.
const CRD: &str = "config/crd/experimental/policy.networking.k8s.io_clusternetworkpolicies.yaml";

/// Programs and manifest, and an agnhost that works in this kernel.
pub(super) fn ensure(work: &mut Work) -> Result<()> {
    ensure_tests(work)?;
    ensure_test2json(work)?;
    ensure_cyclonus(work)?;
    if host::has_sctp() { Ok(()) } else { kubernetes::ensure(work, AGNHOST_SCTP) }
}

/// The version of the tests, which is that of the API, such as `v0.3.0`.
pub fn api_version() -> Result<String> {
    required(&module("policy"), MODULE)
}

/// The version of cyclonus.
pub fn cyclonus_version() -> Result<String> {
    required(&module("cyclonus"), CYCLONUS)
}

fn module(name: &str) -> PathBuf {
    paths::root().join("tests/kubernetes").join(name)
}

/// The version of a module that another one requires.
fn required(by: &Path, module: &str) -> Result<String> {
    let text = go_mod(by)?;
    let version = text.lines().find_map(|line| {
        let line = line.trim();
        line.strip_prefix("require ").unwrap_or(line).strip_prefix(module)?.strip_prefix(' ')
    });
    version.map(str::to_owned).with_context(|| format!("{}: the go.mod does not require {module}", by.display()))
}

fn go_mod(module: &Path) -> Result<String> {
    let file = module.join("go.mod");
    fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}

fn ensure_tests(work: &mut Work) -> Result<()> {
    let module = module("policy");
    let mut key = cache::Key::default();
    key.text("go.mod", &go_mod(&module)?);
    let stamp = Stamp::new(&paths::policy_tests(), key.finish());
    if stamp.holds() && paths::policy_crd().is_file() {
        return Ok(());
    }
    let go = go(work)?;
    let source = paths::tools().join("network-policy-api-src");
    if !work.dry_run {
        for file in ["go.mod", "go.sum"] {
            cache::copy(&module.join(file), &source.join(file))?;
        }
    }
    let compile = Cmd::new(&go)
        // -mod=mod in a copy: Go completes go.sum there, and leaves the tracked one alone.
        .args(["test", "-c", "-vet=off", "-mod=mod", "-ldflags", "-s -w", "-o"])
        .arg(paths::policy_tests())
        .arg(format!("{MODULE}/conformance"))
        .env("CGO_ENABLED", "0")
        .env_remove("GOFLAGS")
        .dir(&source)
        .remedy("Go needs a module proxy that it can reach: go env GOPROXY");
    work.step("building the conformance tests of the network policy API (minutes, once)", &compile)?;
    if work.dry_run {
        return Ok(());
    }
    let list =
        Cmd::new(go).args(["list", "-mod=mod", "-m", "-f", "{{.Dir}}", MODULE]).env_remove("GOFLAGS").dir(source);
    let crd = Path::new(list.capture()?.trim()).join(CRD);
    // Written and not copied: modules are read-only.
    fs::write(paths::policy_crd(), fs::read(&crd).with_context(|| format!("reading {}", crd.display()))?)?;
    stamp.write()
}

/// A part of Go that its packages hold as source.
fn ensure_test2json(work: &mut Work) -> Result<()> {
    let stamp = Stamp::new(&paths::test2json(), "1".to_owned());
    if stamp.holds() {
        return Ok(());
    }
    build(work, "building Go's reader of test results", &paths::tools(), &["cmd/test2json"], &stamp)
}

fn ensure_cyclonus(work: &mut Work) -> Result<()> {
    let module = module("cyclonus");
    let mut key = cache::Key::default();
    key.tree(&module, &module)?;
    let stamp = Stamp::new(&paths::cyclonus(), key.finish());
    if stamp.holds() {
        return Ok(());
    }
    build(work, "building the test cases of cyclonus", &module, &["-trimpath", "-buildvcs=false", "."], &stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_modules() {
        for (name, of, version) in [("policy", MODULE, api_version()), ("cyclonus", CYCLONUS, cyclonus_version())] {
            let version = version.unwrap();
            let sums = fs::read_to_string(module(name).join("go.sum")).unwrap();
            assert!(sums.contains(&format!("{of} {version} ")), "go.sum of {name} has no {version}");
        }
    }

    #[test]
    fn the_cases_of_cyclonus_are_those_of_its_matcher() {
        let oracle = required(&paths::root().join("tests/oracle"), CYCLONUS).unwrap();
        assert_eq!(cyclonus_version().unwrap(), oracle);
    }
}
