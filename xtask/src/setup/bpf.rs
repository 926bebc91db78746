//! The eBPF toolchain: the distribution's rustc with its library source where that is new enough, else rustup's nightly
//! with rust-src; then bpf-linker for that compiler's LLVM. A compiler that is there already is completed first.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Work;
use crate::cmd::{Cmd, which};
use crate::host::Distro;
use crate::toolchain::{BPF_LINKER, Compiler, Route, Toolchain, linker_root, oldest, parse_version};
use crate::ui;

/// Debian's compiler that can build the kernel side: made for its web browsers, so newer than its
/// `rustc`.
const DEBIAN_COMPILER: [&str; 3] = ["cargo-web", "rust-web-src", "rustc-web"];

pub(super) fn ensure(work: &mut Work) -> Result<()> {
    if work.force_linker {
        let compiler = Route::ALL.into_iter().find_map(|r| r.compiler().ok());
        return install_linker(work, &compiler.context("no compiler for eBPF yet\n  remedy: cargo xtask setup")?);
    }
    if Toolchain::find(None).is_ok() {
        return Ok(());
    }
    ui::detail("the eBPF toolchain is not complete");
    let mut reasons = Vec::new();
    let mut routes = Route::ALL;
    routes.sort_by_key(|route| route.compiler().is_err());
    for route in routes {
        let result = compiler(work, route).and_then(|c| c.map_or(Ok(()), |c| install_linker(work, &c)));
        match result {
            Ok(()) if work.dry_run => return Ok(()),
            Ok(()) => return Toolchain::find(Some(route)).map(drop),
            Err(error) => {
                ui::detail(&format!("{}: {error:#}", route.name()));
                reasons.push(format!("{}: {}", route.name(), first_line(&error)));
            }
        }
    }
    bail!(
        "no eBPF toolchain could be installed\n  {}\n  remedy: rustup toolchain install nightly --component rust-src, and \
         bpf-linker {BPF_LINKER} in PATH (its release page has binaries)",
        reasons.join("\n  ")
    )
}

/// The compiler of a route, installed if need be; none in a dry run that only named the steps.
fn compiler(work: &mut Work, route: Route) -> Result<Option<Compiler>> {
    if let Ok(compiler) = route.compiler() {
        return Ok(Some(compiler));
    }
    match route {
        Route::Nightly => {
            if which("rustup").is_none() {
                bail!("no rustup");
            }
            let has_nightly = Cmd::new("rustup").args(["run", "nightly", "rustc", "-V"]).succeeds();
            let install = if has_nightly {
                Cmd::new("rustup").args(["component", "add", "rust-src", "--toolchain", "nightly"])
            } else {
                Cmd::new("rustup").args([
                    "toolchain",
                    "install",
                    "nightly",
                    "--profile",
                    "minimal",
                    "--component",
                    "rust-src",
                ])
            };
            work.step("getting rustup's nightly with rust-src", &install.clean_cargo_env())?;
        }
        Route::System => {
            let version = work.package_version("rust-web-src").as_deref().and_then(parse_version);
            // A dry run refreshes no package lists, and a new machine has none.
            let unknown = work.dry_run && version.is_none() && Distro::this() == Distro::Debian;
            if version < oldest() && !unknown {
                bail!("this distribution has no rustc with its library source that is new enough");
            }
            work.install_packages(&DEBIAN_COMPILER)?;
        }
    }
    if work.dry_run {
        ui::detail(&format!(
            "and then bpf-linker {BPF_LINKER} for the LLVM of that compiler, with its packages if need be"
        ));
        return Ok(None);
    }
    route.compiler().map(Some).map_err(|lack| anyhow::anyhow!("still {lack}"))
}

fn install_linker(work: &mut Work, compiler: &Compiler) -> Result<()> {
    if !work.force_linker && compiler.clone().with_linker().is_ok() {
        return Ok(());
    }
    let root = linker_root(compiler.llvm);
    if which("cargo-binstall").is_some() {
        // Its binaries hold an LLVM of their own, at least as new as any nightly's.
        let binstall = Cmd::cargo()
            .args(["binstall", "--no-confirm", "--force", "--root"])
            .arg(&root)
            .arg(format!("bpf-linker@{BPF_LINKER}"));
        if work.step("downloading bpf-linker", &binstall).is_ok() {
            return Ok(());
        }
        ui::detail("cargo binstall could not get it; building it instead");
    }
    let llvm = compiler.llvm;
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    let development = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
    if !has_llvm(&prefix) {
        if work.package_version(&development[0]).is_none() {
            bail!(
                "bpf-linker needs LLVM {llvm} as {} uses it, and there is no package {}",
                compiler.route.name(),
                development[0]
            );
        }
        work.install_packages(&[&development[0], &development[1]])?;
    }
    let feature = format!("llvm-{llvm}");
    let install = Cmd::cargo()
        .args(["install", "--locked", "--force", &format!("bpf-linker@{BPF_LINKER}"), "--root"])
        .arg(&root)
        .args(["--no-default-features", "--features", &feature])
        .env("LLVM_PREFIX", &prefix)
        .env_remove("CARGO_TARGET_DIR")
        .remedy("its release page has binaries; put one into PATH");
    work.step(&format!("building bpf-linker {BPF_LINKER} for LLVM {llvm} (a minute or two, once)"), &install)
}

fn has_llvm(prefix: &Path) -> bool {
    // Both: the linker's build wants LLVM's headers and the static library of polly, which LLVM's exports name.
    prefix.join("include/llvm-c/Core.h").is_file() && prefix.join("lib/libPolly.a").is_file()
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
