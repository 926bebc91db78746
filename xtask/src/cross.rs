//! Builds the programs for another architecture than this machine's. The compiler is that of the kernel side: it comes with the
//! library's source, which is built for the other architecture first. So no prebuilt library has to be downloaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::arch::Arch;
use crate::cmd::{Cmd, which};
use crate::setup::{self, Need};
use crate::toolchain::Toolchain;
use crate::{ebpf, libraries, paths, remap, ui};

/// Builds the programs around the object that `build-ebpf` left; returns where cargo leaves them.
pub fn build(arch: Arch) -> Result<PathBuf> {
    let Some(Arch::Amd64) = Arch::host() else {
        bail!("only a machine with x86-64 builds for {}\n  remedy: build on a machine with it", arch.name());
    };
    setup::ensure(&[Need::Cross])?;
    let toolchain = Toolchain::find(None)?;
    ui::step(&format!("building the programs for {} with {}", arch.name(), toolchain.compiler.route.name()));
    let agent = ["build", "--package", "rustnet-agent", "--bins"];
    cargo(&toolchain, arch, &agent)?.run()?;
    // As on this machine, the CNI binary alone is static.
    let cni = ["rustc", "--package", "rustnet-cni", "--bin", "rustnet-cni"];
    cargo(&toolchain, arch, &cni)?.args(["--", "-C", "target-feature=+crt-static"]).run()?;
    Ok(target().join(arch.target()).join("release"))
}

/// A target directory of its own: the two compilers would throw away each other's builds.
fn target() -> PathBuf {
    paths::target().join("cross")
}

fn cargo(toolchain: &Toolchain, arch: Arch, words: &[&str]) -> Result<Cmd> {
    let target_name = arch.target();
    let linker = format!("CARGO_TARGET_{}_LINKER", target_name.to_uppercase().replace('-', "_"));
    let cargo = toolchain
        .cargo()
        .args(words)
        .args(["--locked", "--release", "--target", &target_name, "-Z", "build-std=std,panic_unwind"])
        .env("CARGO_TARGET_DIR", target())
        .env("CARGO_ENCODED_RUSTFLAGS", remap::encoded(&toolchain.rustc())?)
        .env(linker, format!("{}-gcc", arch.gnu()))
        .dir(paths::root());
    Ok(ebpf::with_object(cargo))
}

/// Runs a program of another architecture in QEMU, and compares the version that it prints with this work tree's.
pub fn try_out(arch: Arch, program: &Path) -> Result<()> {
    let qemu = format!("qemu-{}-static", arch.rust());
    let qemu = which(&qemu).with_context(|| format!("no {qemu}: cargo xtask setup --with arm64"))?;
    let version = Cmd::new(qemu).arg("-L").arg(libraries::sysroot(arch)).arg(program).arg("--version").capture()?;
    ensure!(
        version.trim_end().ends_with(env!("CARGO_PKG_VERSION")),
        "{} prints the version {version:?}",
        program.display()
    );
    ui::detail(&format!("{} runs in QEMU: {}", program.display(), version.trim_end()));
    Ok(())
}
