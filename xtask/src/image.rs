//! `image`: the agent's container image: the programs, the C library they are linked with, and nothing else. No shell, no
//! package manager, no network, no builder.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::dist::{self, Profile};
use crate::oci::{self, Image, Layer};
use crate::setup::{self, Need};
use crate::{ebpf, paths, ui, v1};

/// The image's name, as the DaemonSet's short `rustnet` is understood by runtimes.
pub const NAME: &str = "docker.io/library/rustnet";
/// Where the programs are in it.
const HOME: &str = "/opt/rustnet";

/// Options of `image`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The tag; the version of this work tree when absent
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// The name before the tag, with the registry
    #[arg(long, default_value = NAME)]
    name: String,
    /// The file to write; target/image/rustnet-TAG.tar when absent
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Programs as for tests: quicker to build, slower to run, larger
    #[arg(long)]
    dev: bool,
    /// A directory with programs that are built already, instead of building them
    #[arg(long, value_name = "DIR", conflicts_with = "dev")]
    dist: Option<PathBuf>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    let profile = if args.dev { Profile::Dev } else { Profile::Release };
    let file = args.output.clone().unwrap_or_else(|| file(&args.tag));
    if args.dist.is_none() {
        setup::ensure(&[Need::Build])?;
        ebpf::build(&ebpf::Args::default())?;
        dist::build(profile, &[])?;
    }
    let size = write(&file, &args.dist.clone().unwrap_or_else(|| profile.dist()), &args.name, &args.tag)?;
    ui::step(&format!("{} holds {}:{}, {size:.1} MB", file.display(), args.name, args.tag));
    ui::detail(&format!("ctr -n k8s.io images import {}", file.display()));
    Ok(())
}

/// Where the image of a tag is put.
pub fn file(tag: &str) -> PathBuf {
    paths::target().join("image").join(format!("rustnet-{tag}.tar"))
}

/// The programs of a directory: those of this release, or those of v1.
fn programs(dist: &Path) -> [&'static str; 3] {
    let of_v1 = v1::PROGRAMS.iter().all(|program| dist.join(program).is_file());
    let ours = dist::PROGRAMS.iter().all(|program| dist.join(program).is_file());
    if of_v1 && !ours { v1::PROGRAMS } else { dist::PROGRAMS }
}

/// Writes the image of the programs in a directory; returns its size in MB.
#[expect(clippy::cast_precision_loss, reason = "a size for people")]
pub fn write(file: &Path, dist: &Path, name: &str, tag: &str) -> Result<f64> {
    let mut layer = Layer::new();
    for program in programs(dist) {
        layer.program(&format!("{HOME}/{program}"), &dist.join(program))?;
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        layer.file(&format!("/usr/share/doc/rustnet/{licence}"), &paths::root().join(licence), 0o644)?;
    }
    layer.dir("/tmp", 0o1777)?;
    let layer = layer.finish()?;
    let size = layer.len() as f64 / 1e6;
    let label = |key: &str, value: &str| (format!("org.opencontainers.image.{key}"), value.to_owned());
    let image = Image {
        layers: vec![layer],
        entrypoint: vec![format!("{HOME}/rustnet-agent")],
        path: HOME.into(),
        labels: vec![label("title", "rustnet"), label("version", tag), label("licenses", "Apache-2.0 OR MIT")],
        names: vec![format!("{name}:{tag}")],
        ..Image::default()
    };
    oci::write(file, &[image])?;
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_v1_has_the_command_by_its_old_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let make = |names: [&str; 3]| names.map(|name| std::fs::write(dir.path().join(name), "").expect("written"));
        make(v1::PROGRAMS);
        assert_eq!(programs(dir.path()), v1::PROGRAMS);
        // `target/dist` may still hold the old command of an earlier build.
        make(dist::PROGRAMS);
        assert_eq!(programs(dir.path()), dist::PROGRAMS);
    }
}
