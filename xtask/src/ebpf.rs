//! `build-ebpf`: compiles the kernel side, refuses an object that a kernel would refuse, and keeps sound ones in the
//! user's cache under a key made of everything they depend on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cmd::Cmd;
use crate::toolchain::{Route, Toolchain};
use crate::{cache, elf, paths, remap, ui, verify};

/// What the object is made from, relative to the root.
const SOURCES: [&str; 6] = [
    "rustnet-ebpf/src",
    "rustnet-ebpf/Cargo.toml",
    "rustnet-common/src",
    "rustnet-common/Cargo.toml",
    "Cargo.toml",
    ".cargo/config.toml",
];

/// Options of `build-ebpf`.
#[derive(clap::Args, Debug, Default)]
pub struct Args {
    /// Compile even when the cache holds the object for these sources and this toolchain
    #[arg(long)]
    force: bool,
    /// Use this toolchain instead of the first complete one
    #[arg(long, env = "RUSTNET_BPF_TOOLCHAIN")]
    toolchain: Option<Route>,
    /// Load it into this machine's kernel too, in each variant, and list what the verifier says of each program (needs root)
    #[arg(long)]
    verify: bool,
}

/// Leaves a sound object at `target/bpf/rustnet.bpf.o` and lists what is in it.
pub fn build(args: &Args) -> Result<()> {
    let toolchain = Toolchain::find(args.toolchain)?;
    let object = paths::object();
    let cached = cached_path(&toolchain)?;
    let origin = if !args.force && cache::holds(&cached) {
        cache::copy(&cached, &object)?;
        "from the cache"
    } else {
        let built = compile(&toolchain)?;
        check(&built)?;
        cache::store(&built, &cached)?;
        cache::copy(&built, &object)?;
        "built"
    };
    let report = check(&object)?;
    ui::step(&format!("{} ({origin}, {})", object.display(), toolchain.compiler.route.name()));
    println!("{report}");
    if args.verify { verify::verify(&object) } else { Ok(()) }
}

/// Sets where the kernel-side object is when that is not the usual place. Only then: between a build with the variable and one
/// without it (an editor's, say) cargo would compile the agent again.
pub fn with_object(cargo: Cmd) -> Cmd {
    if paths::target() == paths::root().join("target") {
        return cargo;
    }
    cargo.env("RUSTNET_BPF_OBJECT", paths::object())
}

fn compile(toolchain: &Toolchain) -> Result<PathBuf> {
    // A target directory of its own: the other compiler would throw away the host's builds, and wait for their lock.
    let dir = paths::target().join("bpf-build");
    ui::step(&format!(
        "building the kernel side with {}",
        toolchain.compiler.version.lines().next().unwrap_or("rustc")
    ));
    build_command(toolchain, &dir)?.run()?;
    Ok(dir.join("bpfel-unknown-none/bpf/rustnet-ebpf"))
}

fn build_command(toolchain: &Toolchain, target: &Path) -> Result<Cmd> {
    // In addition to the flags of .cargo/config.toml, which a variable of the environment would replace.
    let flags = serde_json::to_string(&remap::flags(&toolchain.rustc())?).context("writing the compiler's flags")?;
    let cargo = toolchain.cargo().args(["--config", &format!("target.bpfel-unknown-none.rustflags={flags}")]);
    Ok(cargo
        .args(["build", "--locked", "--target", "bpfel-unknown-none", "-Z", "build-std=core", "--profile", "bpf"])
        .args(["--package", "rustnet-ebpf"])
        .env("CARGO_TARGET_DIR", target)
        // Only `pt_regs`, which no program uses, depends on the kernel's architecture. By default it would be this machine's, and the
        // names of types in BTF would depend on where the object is built.
        .env("AYA_BPF_TARGET_ARCH", "x86_64")
        .dir(paths::root())
        .remedy(
            "fix what the compiler names above; \"Invalid bitcode\" or \"Unknown attribute\" there mean a bpf-linker made for \
             another LLVM: cargo xtask setup --force-linker",
        ))
}

fn check(object: &Path) -> Result<elf::Report> {
    let bytes = fs::read(object).with_context(|| format!("reading {}", object.display()))?;
    let report = elf::examine(&bytes).with_context(|| format!("examining {}", object.display()))?;
    if report.problems.is_empty() {
        return Ok(report);
    }
    bail!("{} must not be used:\n  {}", object.display(), report.problems.join("\n  "))
}

fn cached_path(toolchain: &Toolchain) -> Result<PathBuf> {
    let root = paths::root();
    let mut key = cache::Key::default();
    key.text("toolchain", &toolchain.identity());
    key.text("paths in it", remap::SCHEME);
    key.text(
        "dependencies",
        &locked_dependencies(&fs::read_to_string(root.join("Cargo.lock")).context("reading Cargo.lock")?),
    );
    SOURCES.iter().try_for_each(|source| key.tree(&root, &root.join(source)))?;
    Ok(paths::cache().join("bpf").join(key.finish()).join("rustnet.bpf.o"))
}

/// The entries of Cargo.lock that matter for the kernel side: a change of the agent's dependencies
/// is no reason to build again.
fn locked_dependencies(lock: &str) -> String {
    let wanted = |block: &&str| {
        let name = block.lines().find_map(|l| l.strip_prefix("name = \"")).unwrap_or_default().trim_end_matches('"');
        name.starts_with("aya-") || matches!(name, "rustnet-ebpf" | "rustnet-common" | "network-types")
    };
    lock.split("[[package]]").filter(wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernel_sides_dependencies_count() {
        let lock = "version = 4\n\n[[package]]\nname = \"aya-ebpf\"\nversion = \"0.2.1\"\n\n[[package]]\nname = \"tokio\"\nversion = \"1\"\n";
        let kept = locked_dependencies(lock);
        assert!(kept.contains("aya-ebpf") && kept.contains("0.2.1") && !kept.contains("tokio"), "{kept}");
    }
}
