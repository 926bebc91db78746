//! `dist`: the built programs in one directory, by their fixed names, with the kernel-side object
//! next to them.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cmd::Cmd;
use crate::setup::{self, Need};
use crate::{cache, ebpf, paths, ui};

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
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure(&[Need::Build])?;
    ebpf::build(&ebpf::Args::default())?;
    let profile = if args.dev { Profile::Dev } else { Profile::Release };
    build(profile, &[])?;
    ui::step(&format!("{} holds {} and rustnet.bpf.o", profile.dist().display(), PROGRAMS.join(", ")));
    Ok(())
}

/// Builds the programs, and further packages with them, around the object that `build-ebpf` left.
pub fn build(profile: Profile, further: &[&str]) -> Result<()> {
    let mut cargo = Cmd::cargo().arg("build");
    cargo = match profile {
        Profile::Release => {
            let packages = ["rustnet-agent"].into_iter().chain(further.iter().copied());
            cargo.args(["--release", "--bins"]).args(packages.flat_map(|p| ["--package", p]))
        }
        // All that `cargo test` is going to want, so that each dependency is compiled once and with one set of features.
        Profile::Dev => cargo.args(["--workspace", "--exclude", "rustnet-ebpf", "--all-targets"]),
    };
    ui::step(match profile {
        Profile::Release => "building the programs (release)",
        Profile::Dev => "building the programs and the tests (dev)",
    });
    environment(cargo).dir(paths::root()).run()?;
    if profile == Profile::Release {
        static_cni()?;
    }
    let dist = profile.dist();
    for program in PROGRAMS {
        cache::copy(&profile.built().join(program), &dist.join(program))?;
    }
    cache::copy(&paths::object(), &dist.join("rustnet.bpf.o"))
}

/// Links the CNI binary statically: it is copied to hosts whose C library may be older than the builder's, or another one. Only
/// the link differs, so that nothing else is compiled for it.
fn static_cni() -> Result<()> {
    let cargo = Cmd::cargo().args(["rustc", "--release", "--package", "rustnet-cni", "--bin", "rustnet-cni"]);
    cargo.args(["--", "-C", "target-feature=+crt-static"]).dir(paths::root()).run()
}

/// Tells the agent's build where the object is when that is not the usual place. Set only then:
/// between a build with the variable and one without it (an editor's, say) cargo would compile the
/// agent again.
pub fn environment(cmd: Cmd) -> Cmd {
    if paths::target() == paths::root().join("target") {
        return cmd;
    }
    cmd.env("RUSTNET_BPF_OBJECT", paths::object())
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
