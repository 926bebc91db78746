//! The image of a release: one for each architecture, labelled with its source, with a bill of materials and a statement of
//! provenance for each. Equal sources, compilers and packages give an equal digest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::provenance::{self, Build, Compiler};
use super::sbom::{self, Contents, Program};
use super::source::Source;
use super::{Args, crates, debian, image, labels, layer, megabytes};
use crate::arch::Arch;
use crate::cmd::Cmd;
use crate::libraries::{self, Library};
use crate::oci::{self, Image, Index, Statement};
use crate::setup::{self, Need};
use crate::toolchain::{self, Toolchain};
use crate::{cache, dist, ebpf, paths, remap, ui};

/// The kernel side, next to the programs.
const OBJECT: &str = "rustnet.bpf.o";

/// What is known of the programs for one architecture.
struct Part {
    arch: Arch,
    /// Where the programs are.
    dist: PathBuf,
    contents: Contents,
    build: Build,
}

/// Builds the programs, and writes the image with the files next to it; returns the size of its layers in MB.
pub fn make(args: &Args, file: &Path) -> Result<f64> {
    let mut wanted = if args.arch.is_empty() { Arch::host().into_iter().collect() } else { args.arch.clone() };
    wanted.sort_unstable();
    wanted.dedup();
    if wanted.is_empty() {
        bail!(
            "rustnet is built for amd64 and arm64, and this machine is neither\n  remedy: --dev or --dist make an image for it"
        );
    }
    setup::ensure(&[Need::Build])?;
    ebpf::build(&ebpf::Args::default())?;
    let source = Source::read(&paths::root(), args.source.as_deref())?;
    let mut parts = Vec::new();
    for arch in wanted {
        let dist = dist::build_for(arch)?;
        parts.push(gather(arch, &dist, &source, &args.tag)?);
    }
    let name = args.name.rsplit('/').next().unwrap_or(&args.name);
    let index = index(&parts, &source, &args.tag, name, &format!("{}:{}", args.name, args.tag))?;
    let digest = oci::write_index(file, &index)?;
    write_statements(file, &parts, &index)?;
    if source.is_changed || source.commit.is_none() {
        ui::warn("the work tree differs from its commit: the image has no statement of provenance");
    }
    ui::step(&format!("{}@{digest}", args.name));
    Ok(index.images.iter().flat_map(|image| &image.layers).map(|layer| megabytes(layer)).sum())
}

/// The image index of all parts.
fn index(parts: &[Part], source: &Source, version: &str, name: &str, full_name: &str) -> Result<Index> {
    let images = parts.iter().map(|part| {
        let layer = layer(&part.dist, |program| libraries_of(part.arch, program))?;
        Ok(Image {
            architecture: Some(part.arch.name()),
            created: source.created(),
            ..image(layer, version, &source.labels())
        })
    });
    let images: Vec<Image> = images.collect::<Result<_>>()?;
    let statements = parts.iter().zip(&images).map(|(part, image)| part.statements(image)).collect();
    Ok(Index {
        images,
        statements,
        name: name.to_owned(),
        names: vec![full_name.to_owned()],
        annotations: labels(version, &source.labels()),
    })
}

impl Part {
    /// What is said of its image. Of the source of a changed work tree nothing is, for nobody else has it.
    fn statements(&self, image: &Image) -> Vec<Statement> {
        let contents = Contents { digest: image.digest(), ..self.contents.clone() };
        let mut statements = vec![Statement { kind: sbom::KIND.into(), predicate: sbom::document(&contents) }];
        if self.build.source.commit.is_some() && !self.build.source.is_changed {
            let predicate = provenance::predicate(&self.build);
            statements.push(Statement { kind: provenance::KIND.into(), predicate });
        }
        statements
    }
}

/// Reads what is to be said of the programs for one architecture.
fn gather(arch: Arch, dist: &Path, source: &Source, version: &str) -> Result<Part> {
    let target = arch.target();
    let toolchain = Toolchain::find(None)?;
    let kernel_side = Compiler::parse("kernel side", &toolchain.compiler.version);
    let user_space = match Arch::host() {
        Some(host) if host == arch => Compiler::parse("user space", &dist::rustc().arg("-vV").capture()?),
        _ => Compiler { role: "user space", ..kernel_side.clone() },
    };
    let mut programs = Vec::new();
    let mut files = Vec::new();
    for name in dist::PROGRAMS {
        let package = if name == "rustnet-cni" { name } else { "rustnet-agent" };
        programs.push(Program {
            name: name.into(),
            sha256: clean(&dist.join(name))?,
            graph: crates::graph(package, &target)?,
            rust: user_space.release.clone(),
            inside: None,
        });
        files.extend(libraries_of(arch, &dist.join(name))?.into_iter().map(|library| library.file));
    }
    let object = clean(&dist.join(OBJECT))?;
    programs.push(Program {
        name: OBJECT.into(),
        sha256: object.clone(),
        graph: crates::graph("rustnet-ebpf", "bpfel-unknown-none")?,
        rust: kernel_side.release.clone(),
        inside: Some("rustnet-agent".into()),
    });
    let packages = debian::packages(&files);
    let linked = debian::packages(&[c_archive(arch)?]);
    let lock = paths::root().join("Cargo.lock");
    let build = Build {
        source: source.clone(),
        lock: sha256(&fs::read(&lock).with_context(|| format!("reading {}", lock.display()))?),
        target,
        version: version.to_owned(),
        compilers: vec![user_space, kernel_side],
        bpf_linker: toolchain::BPF_LINKER.to_owned(),
        packages: packages.iter().chain(&linked).map(debian::Package::purl).collect(),
        object,
    };
    let contents = Contents {
        version: version.to_owned(),
        architecture: arch.name().to_owned(),
        digest: String::new(),
        created: source.created().unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned()),
        programs,
        packages,
        linked,
    };
    Ok(Part { arch, dist: dist.to_owned(), contents, build })
}

fn libraries_of(arch: Arch, program: &Path) -> Result<Vec<Library>> {
    if Arch::host() == Some(arch) { libraries::native(program) } else { libraries::foreign(program, arch) }
}

/// The C library that the CNI binary is linked with.
fn c_archive(arch: Arch) -> Result<PathBuf> {
    let compiler = if Arch::host() == Some(arch) { "cc".to_owned() } else { format!("{}-gcc", arch.gnu()) };
    let path = PathBuf::from(Cmd::new(compiler).arg("-print-file-name=libc.a").capture()?.trim());
    Ok(path.canonicalize().unwrap_or(path))
}

/// SHA-256 of a program that names no path of this machine; an error for one that does.
fn clean(file: &Path) -> Result<String> {
    let content = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    if let Some(dir) = remap::leaks(&content).first() {
        bail!("{} names {}: elsewhere the same source would give another program", file.display(), dir.display());
    }
    Ok(sha256(&content))
}

fn sha256(content: &[u8]) -> String {
    cache::hex(&Sha256::digest(content))
}

/// Writes what is in the image about each architecture into files next to it, and the digest.
fn write_statements(file: &Path, parts: &[Part], index: &Index) -> Result<()> {
    for ((part, image), statements) in parts.iter().zip(&index.images).zip(&index.statements) {
        for statement in statements {
            let (kind, content) = if statement.kind == sbom::KIND {
                ("spdx", statement.predicate.clone())
            } else {
                ("provenance", statement.about(&[(&index.name, &image.digest())]))
            };
            let to = file.with_extension(format!("{}.{kind}.json", part.arch.name()));
            fs::write(&to, format!("{content:#}\n")).with_context(|| format!("writing {}", to.display()))?;
            ui::detail(&format!("{}", to.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, UNIX_EPOCH};

    fn part(dir: &Path, content: &str, mode: u32, time: u64) -> Part {
        fs::create_dir_all(dir).unwrap();
        for name in dist::PROGRAMS.into_iter().chain([OBJECT]) {
            let file = dir.join(name);
            fs::write(&file, format!("{name}: {content}")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            fs::File::open(&file).unwrap().set_modified(UNIX_EPOCH + Duration::from_secs(time)).unwrap();
        }
        let source = source();
        let contents =
            Contents { architecture: "amd64".into(), created: source.created().unwrap(), ..Contents::default() };
        let build = Build { source, ..Build::default() };
        Part { arch: Arch::host().unwrap(), dist: dir.to_owned(), contents, build }
    }

    fn source() -> Source {
        Source {
            commit: Some("c0ffee".into()),
            time: jiff::Timestamp::from_second(1_700_000_000).ok(),
            ..Source::default()
        }
    }

    fn built(dir: &Path, part: Part) -> (String, Vec<u8>) {
        let file = dir.join("image.tar");
        let index = index(&[part], &source(), "1", "rustnet", "docker.io/library/rustnet:1").unwrap();
        let digest = oci::write_index(&file, &index).unwrap();
        (digest, fs::read(file).unwrap())
    }

    #[test]
    fn times_modes_and_places_of_programs_do_not_change_the_digest() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = built(a.path(), part(&a.path().join("dist"), "1", 0o755, 1_000));
        let second = built(b.path(), part(&b.path().join("else/where"), "1", 0o700, 2_000_000_000));
        assert!(first == second, "{} is not {}", first.0, second.0);
        let other = built(b.path(), part(&b.path().join("dist"), "2", 0o755, 1_000));
        assert_ne!(first.0, other.0);
    }

    #[test]
    fn a_changed_work_tree_has_a_bill_of_materials_and_no_provenance() {
        let dir = tempfile::tempdir().unwrap();
        let mut part = part(dir.path(), "1", 0o755, 0);
        let kinds = |part: &Part| -> Vec<String> {
            part.statements(&Image::default()).into_iter().map(|statement| statement.kind).collect()
        };
        assert_eq!(kinds(&part), [sbom::KIND, provenance::KIND]);
        part.build.source.is_changed = true;
        assert_eq!(kinds(&part), [sbom::KIND]);
    }

    #[test]
    fn a_program_that_names_this_work_tree_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("program");
        fs::write(&file, format!("{}/src/main.rs", paths::root().display())).unwrap();
        assert!(clean(&file).unwrap_err().to_string().contains("another program"));
        fs::write(&file, "/rustnet/src/main.rs").unwrap();
        assert_eq!(clean(&file).unwrap(), sha256(b"/rustnet/src/main.rs"));
    }
}
