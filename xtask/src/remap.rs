//! Compiler flags that replace the paths of this machine in a program by fixed ones, so that two machines and two work trees build
//! equal programs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use memchr::memmem;

use crate::cmd::Cmd;
use crate::paths;

/// Changes when the replacements below do.
pub const SCHEME: &str = "1";

/// Returns the flags for this compiler, one replacement each. Where two match, rustc takes the last.
pub fn flags(rustc: &Cmd) -> Result<Vec<String>> {
    let sysroot = rustc.clone().args(["--print", "sysroot"]).capture()?;
    let version = rustc.clone().arg("-vV").capture()?;
    let commit = field(&version, "commit-hash: ").context("rustc -vV names no commit")?;
    let home = cargo_home().context("neither CARGO_HOME nor HOME is set")?;
    let registry = home.join("registry");
    let mut replacements = vec![
        (home, "/cargo".to_owned()),
        // The prebuilt standard library has this name already; where its source is installed, rustc would take the source's own.
        (Path::new(sysroot.trim()).join("lib/rustlib/src/rust"), format!("/rustc/{commit}")),
        (paths::root(), "/rustnet".to_owned()),
    ];
    if !paths::target().starts_with(paths::root()) {
        replacements.push((paths::target(), "/rustnet/target".to_owned()));
    }
    // Where it is a symbolic link, cargo enters the directory behind it.
    if resolved(&registry) != registry {
        replacements.push((resolved(&registry), "/cargo/registry".to_owned()));
    }
    let flag = |(from, to): (PathBuf, String)| format!("--remap-path-prefix={}={to}", from.display());
    Ok(replacements.into_iter().map(flag).collect())
}

/// The flags as the value of `CARGO_ENCODED_RUSTFLAGS`, which replaces flags from all other places.
pub fn encoded(rustc: &Cmd) -> Result<String> {
    Ok(flags(rustc)?.join("\u{1f}"))
}

/// Returns which directories of this machine a program names: the work tree, the target directory and Cargo's home.
pub fn leaks(program: &[u8]) -> Vec<PathBuf> {
    let home = cargo_home();
    let registry = home.as_ref().map(|home| resolved(&home.join("registry")));
    let dirs = [Some(paths::root()), Some(paths::target()), home, registry];
    dirs.into_iter().flatten().filter(|dir| names(program, dir)).collect()
}

/// The path without symbolic links; as it is when there is nothing.
fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn names(program: &[u8], dir: &Path) -> bool {
    memmem::find(program, format!("{}/", dir.display()).as_bytes()).is_some()
}

fn cargo_home() -> Option<PathBuf> {
    let set = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    set.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
}

fn field<'a>(version: &'a str, name: &str) -> Option<&'a str> {
    version.lines().find_map(|line| line.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_equal_wherever_its_source_is() {
        let build = |dir: &Path| {
            let source = dir.join("main.rs");
            std::fs::write(&source, "fn main() { panic!(\"{}\", file!()) }").unwrap();
            let remap = format!("--remap-path-prefix={}=/rustnet", dir.display());
            let rustc = Cmd::new("rustc").clean_cargo_env();
            rustc.args(["-Cstrip=debuginfo", &remap, "-o"]).arg(dir.join("out")).arg(&source).capture().unwrap();
            std::fs::read(dir.join("out")).unwrap()
        };
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (first, second) = (build(a.path()), build(b.path()));
        assert!(first == second, "the two differ");
        assert!(!names(&first, a.path()) && memmem::find(&first, b"/rustnet/main.rs").is_some());
    }

    #[test]
    fn a_path_in_a_program_is_found() {
        let text = format!("\0{}/xtask\0", paths::root().display());
        assert_eq!(leaks(text.as_bytes()).first(), Some(&paths::root()));
        assert_eq!(leaks(b"/rustnet/xtask/src/main.rs"), [""; 0].map(PathBuf::from));
    }

    #[test]
    fn every_directory_is_replaced() {
        let flags = flags(&Cmd::new("rustc").clean_cargo_env()).unwrap();
        for to in ["=/cargo", "=/rustnet"] {
            assert!(flags.iter().any(|flag| flag.ends_with(to)), "{to}: {flags:?}");
        }
        assert!(flags.iter().any(|flag| flag.contains("=/rustc/")), "{flags:?}");
    }
}
