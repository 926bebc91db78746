//! `image`: the agent's container image: the programs, the C library they are linked with, and nothing else. No shell, no
//! package manager, no network, no builder.

mod crates;
mod debian;
mod provenance;
mod release;
mod sbom;
mod source;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::Result;

use crate::arch::Arch;
use crate::dist::{self, Profile};
use crate::libraries::{self, Library};
use crate::oci::{self, Blob, Image, Layer};
use crate::setup::{self, Need};
use crate::{ebpf, paths, ui, v1};

/// The image's name, as the DaemonSet's short `rustnet` is understood by runtimes.
pub const NAME: &str = "docker.io/library/rustnet";
/// Where the programs are in it.
const HOME: &str = "/opt/rustnet";
/// Labels of every image of rustnet, `org.opencontainers.image.*`.
const LABELS: [(&str, &str); 3] = [
    ("title", "rustnet"),
    ("description", "A Kubernetes pod network in Rust and eBPF"),
    // Of the kernel side, which is loaded and never linked: MIT OR GPL-2.0-only.
    ("licenses", "(Apache-2.0 OR MIT) AND (MIT OR GPL-2.0-only)"),
];

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
    /// The processor architectures of the image; that of this machine when absent
    #[arg(long, value_delimiter = ',')]
    arch: Vec<Arch>,
    /// Where the source can be had; the address of the remote `origin` when absent
    #[arg(long, value_name = "URL")]
    source: Option<String>,
    /// Programs as for tests: quicker to build, slower to run, larger; without bill of materials and provenance
    #[arg(long, conflicts_with_all = ["arch", "source"])]
    dev: bool,
    /// A directory with programs that are built already, instead of building them; without bill of materials and provenance
    #[arg(long, value_name = "DIR", conflicts_with_all = ["dev", "arch", "source"])]
    dist: Option<PathBuf>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    let file = args.output.clone().unwrap_or_else(|| file(&args.tag));
    let size = match &args.dist {
        Some(dist) => write(&file, dist, &args.name, &args.tag)?,
        None if args.dev => {
            setup::ensure(&[Need::Build])?;
            ebpf::build(&ebpf::Args::default())?;
            dist::build(Profile::Dev, &[])?;
            write(&file, &Profile::Dev.dist(), &args.name, &args.tag)?
        }
        None => release::make(args, &file)?,
    };
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
pub fn write(file: &Path, dist: &Path, name: &str, tag: &str) -> Result<f64> {
    let layer = layer(dist, libraries::native)?;
    let size = megabytes(&layer);
    let image = Image { names: vec![format!("{name}:{tag}")], ..image(layer, tag, &[]) };
    oci::write(file, &[image])?;
    Ok(size)
}

/// The one layer: the programs of a directory, the libraries that each needs, licences.
fn layer(dist: &Path, libraries: impl Fn(&Path) -> Result<Vec<Library>>) -> Result<Rc<Blob>> {
    let mut layer = Layer::new();
    for program in programs(dist) {
        let from = dist.join(program);
        layer.program_with(&format!("{HOME}/{program}"), &from, &libraries(&from)?)?;
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT"] {
        layer.file(&format!("/usr/share/doc/rustnet/{licence}"), &paths::root().join(licence), 0o644)?;
    }
    layer.dir("/tmp", 0o1777)?;
    layer.finish()
}

/// The image of a layer, without a name.
fn image(layer: Rc<Blob>, version: &str, further: &[(&str, String)]) -> Image {
    Image {
        layers: vec![layer],
        entrypoint: vec![format!("{HOME}/rustnet-agent")],
        path: HOME.into(),
        labels: labels(version, further),
        ..Image::default()
    }
}

fn labels(version: &str, further: &[(&str, String)]) -> Vec<(String, String)> {
    let ours = LABELS.map(|(key, value)| (key, value.to_owned())).into_iter().chain([("version", version.to_owned())]);
    let all = ours.chain(further.iter().cloned());
    all.map(|(key, value)| (format!("org.opencontainers.image.{key}"), value)).collect()
}

#[expect(clippy::cast_precision_loss, reason = "a size for people")]
fn megabytes(layer: &Blob) -> f64 {
    layer.len() as f64 / 1e6
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
