//! `agent-v1`: the programs of the last commit with the retired maps (`rustnet-common/src/v1.rs`),
//! for tests of upgrades.

use std::path::PathBuf;

use anyhow::Result;

use crate::cmd::Cmd;
use crate::setup::{self, Need};
use crate::{cache, paths, ui};

/// The commit.
const COMMIT: &str = "6c3bd9c7f538ae7051aa2586a1f9d230ca5e5651";

/// What is in the image of that commit.
pub const PROGRAMS: [&str; 3] = ["rustnet-agent", "rustnet-cni", "rustnet"];

/// Where the programs are.
pub fn dist() -> PathBuf {
    paths::target().join("v1/dist")
}

/// Where the files of that commit are: outside of this work tree, whose `.cargo/config.toml` cargo would join with theirs.
pub fn source() -> PathBuf {
    paths::cache().join("v1").join(COMMIT).join("source")
}

/// The command: leaves the programs in `target/v1/dist`, and the files in [`source`].
pub fn run() -> Result<()> {
    let dist = dist();
    extract()?;
    if !PROGRAMS.iter().all(|program| cache::holds(&cached(program))) {
        setup::ensure(&[Need::Build])?;
        build()?;
    }
    PROGRAMS.iter().try_for_each(|program| cache::copy(&cached(program), &dist.join(program)))?;
    ui::step(&format!("{} holds {}", dist.display(), PROGRAMS.join(", ")));
    Ok(())
}

fn cached(program: &str) -> PathBuf {
    paths::cache().join("v1").join(COMMIT).join(program)
}

fn extract() -> Result<()> {
    let source = source();
    std::fs::create_dir_all(&source)?;
    let archive = paths::target().join("v1-source.tar");
    Cmd::new("git")
        .args(["archive", "--output"])
        .arg(&archive)
        .arg(COMMIT)
        .dir(paths::root())
        .remedy("the commit must be in this clone: git fetch --unshallow")
        .run()?;
    Cmd::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&source).run()
}

/// Builds in a tree of its own, by the commands of that commit.
fn build() -> Result<()> {
    let (source, target) = (source(), paths::target().join("v1/build"));
    ui::step(&format!("building the programs of commit {}", &COMMIT[..7]));
    let cargo = || Cmd::cargo().env("CARGO_TARGET_DIR", &target).dir(&source);
    cargo().args(["run", "--locked", "--package", "xtask", "--", "build-ebpf"]).run()?;
    cargo()
        .args(["build", "--locked", "--bins", "--package", "rustnet-agent", "--package", "rustnet-cni"])
        .env("RUSTNET_BPF_OBJECT", target.join("bpf/rustnet.bpf.o"))
        .run()?;
    PROGRAMS.iter().try_for_each(|program| cache::store(&target.join("debug").join(program), &cached(program)))
}
