//! `dist`: the built programs in one directory, by their fixed names, with the kernel-side object
//! next to them. Programs for users name no path of this machine: equal sources and compilers give equal programs.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::arch::Arch;
use crate::cmd::Cmd;
use crate::setup::{self, Need};
use crate::{cache, cross, ebpf, paths, remap, ui};

pub const PROGRAMS: [&str; 3] = ["rustnet-agent", "rustnet-cni", "rustnetctl"];

/// How the programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// For users: optimised, in `target/dist`.
    Release,
    /// For tests: quick to compile, with overflow checks and debug assertions, in `target/dist-dev`.
    Dev,
}

/// Options of `dist`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Compile as for tests, into target/dist-dev: quicker to build, slower to run
    #[arg(long)]
    dev: bool,
    /// The processor architecture; that of this machine when absent
    #[arg(long, conflicts_with = "dev")]
    arch: Option<Arch>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Need::Build])?;
    ebpf::build(&ebpf::Args::default())?;
    let dist = if let Some(arch) = args.arch {
        build_for(arch)?
    } else {
        let profile = if args.dev { Profile::Dev } else { Profile::Release };
        build(profile, &[])?;
        profile.dist()
    };
    ui::step(&format!("{} holds {} and rustnet.bpf.o", dist.display(), PROGRAMS.join(", ")));
    Ok(())
}

/// Builds the programs for users on machines of one architecture; returns where they are.
pub fn build_for(arch: Arch) -> Result<PathBuf> {
    if Some(arch) == Arch::host() {
        build(Profile::Release, &[])?;
        return Ok(Profile::Release.dist());
    }
    let built = cross::build(arch)?;
    let dist = paths::target().join(format!("dist-{}", arch.name()));
    collect(&built, &dist)?;
    cross::try_out(arch, &dist.join("rustnetctl"))?;
    Ok(dist)
}

/// Builds the programs, and further packages with them, around the object that `build-ebpf` left.
pub fn build(profile: Profile, further: &[&str]) -> Result<()> {
    let mut cargo = Cmd::cargo().arg("build");
    cargo = match profile {
        Profile::Release => {
            let packages = ["rustnet-agent"].into_iter().chain(further.iter().copied());
            cargo.args(["--locked", "--release", "--bins"]).args(packages.flat_map(|p| ["--package", p]))
        }
        // All that `cargo test` is going to want, so that each dependency is compiled once and with one set of features.
        Profile::Dev => cargo.args(["--workspace", "--exclude", "rustnet-ebpf", "--all-targets"]),
    };
    ui::step(match profile {
        Profile::Release => "building the programs (release)",
        Profile::Dev => "building the programs and the tests (dev)",
    });
    environment(cargo, profile)?.dir(paths::root()).run()?;
    if profile == Profile::Release {
        static_cni()?;
    }
    collect(&profile.built(), &profile.dist())
}

/// Copies the programs to where they are looked for.
fn collect(built: &Path, dist: &Path) -> Result<()> {
    for program in PROGRAMS {
        cache::copy(&built.join(program), &dist.join(program))?;
    }
    cache::copy(&paths::object(), &dist.join("rustnet.bpf.o"))
}

/// Links the CNI binary statically: it is copied to hosts whose C library may be older than the builder's, or another one. Only
/// the link differs, so that nothing else is compiled for it.
fn static_cni() -> Result<()> {
    let cargo =
        Cmd::cargo().args(["rustc", "--locked", "--release", "--package", "rustnet-cni", "--bin", "rustnet-cni"]);
    let cargo = cargo.args(["--", "-C", "target-feature=+crt-static"]);
    environment(cargo, Profile::Release)?.dir(paths::root()).run()
}

/// Sets what a build of this profile depends on: for users, the flags that keep paths of this machine out of the programs.
pub fn environment(cmd: Cmd, profile: Profile) -> Result<Cmd> {
    let cmd = match profile {
        Profile::Release => cmd.env("CARGO_ENCODED_RUSTFLAGS", remap::encoded(&rustc())?),
        Profile::Dev => cmd,
    };
    Ok(ebpf::with_object(cmd))
}

/// The compiler that the developer uses.
pub fn rustc() -> Cmd {
    Cmd::new("rustc").clean_cargo_env().dir(paths::root())
}

impl Profile {
    /// Where the programs are put.
    pub fn dist(self) -> PathBuf {
        paths::target().join(match self {
            Self::Release => "dist",
            Self::Dev => "dist-dev",
        })
    }

    /// Where cargo leaves them.
    pub fn built(self) -> PathBuf {
        paths::target().join(Path::new(match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }))
    }
}
