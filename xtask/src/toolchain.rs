//! Finds what can build for the eBPF target. Two routes lead there: a distribution's rustc with its library source (Debian:
//! rustc-web, cargo-web, rust-web-src), or rustup's nightly with rust-src. Both need a bpf-linker for the same LLVM.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::cmd::{Cmd, is_executable, which};
use crate::paths;

/// The bpf-linker that setup installs, and the oldest that is accepted.
pub const BPF_LINKER: &str = "0.13.0";

/// Where the compiler comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Route {
    /// rustup's nightly with the rust-src component.
    Nightly,
    /// The distribution's own rustc, cargo and library source in /usr.
    System,
}

/// A compiler that has the library's source, so that it can build `core` for the eBPF target.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// How it is run.
    pub route: Route,
    /// All of `rustc -vV`.
    pub version: String,
    /// Major version of its LLVM.
    pub llvm: u32,
}

/// A compiler and the linker for it.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// The linker.
    pub linker: PathBuf,
}

/// Why a route cannot be used as things are.
pub type Lack = String;

impl Route {
    /// Both, in the order of preference: a distribution's compiler stays what it is, while a nightly is another one every day.
    pub const ALL: [Self; 2] = [Self::System, Self::Nightly];

    /// What to call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nightly => "rustup's nightly",
            Self::System => "the system's rustc",
        }
    }

    fn rustc(self) -> Cmd {
        match self {
            Self::Nightly => Cmd::new("rustup").args(["run", "nightly", "rustc"]).clean_cargo_env(),
            Self::System => Cmd::new("/usr/bin/rustc").clean_cargo_env(),
        }
    }

    /// The compiler of this route, or what it lacks.
    pub fn compiler(self) -> Result<Compiler, Lack> {
        let (found, name) = match self {
            Self::Nightly => (which("rustup").is_some(), "rustup"),
            Self::System => (
                ["/usr/bin/rustc", "/usr/bin/cargo"].iter().all(|f| is_executable(Path::new(f))),
                "/usr/bin/rustc and cargo",
            ),
        };
        if !found {
            return Err(format!("no {name}"));
        }
        let Ok(version) = self.rustc().arg("-vV").capture() else {
            return Err(match self {
                Self::Nightly => "no nightly toolchain".to_owned(),
                Self::System => "/usr/bin/rustc does not run".to_owned(),
            });
        };
        let (Some(release), Some(llvm)) = (release_of(&version), llvm_of(&version)) else {
            return Err("rustc -vV does not tell its release and its LLVM".to_owned());
        };
        if Some(release) < oldest() {
            return Err(format!("rustc {}.{} is older than {}", release.0, release.1, env!("CARGO_PKG_RUST_VERSION")));
        }
        let sysroot = self.rustc().args(["--print", "sysroot"]).capture().unwrap_or_default();
        let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !source.is_file() {
            return Err("no library source (rust-src)".to_owned());
        }
        Ok(Compiler { route: self, version, llvm })
    }
}

impl Compiler {
    /// A compiler and a linker for it, or what is lacking.
    pub fn with_linker(self) -> Result<Toolchain, Lack> {
        match linker(self.llvm) {
            Some(linker) => Ok(Toolchain { compiler: self, linker }),
            None => Err(format!("no bpf-linker {BPF_LINKER} for LLVM {}", self.llvm)),
        }
    }
}

impl Toolchain {
    /// The toolchain to use: the asked route, or the first that is complete.
    pub fn find(asked: Option<Route>) -> Result<Self> {
        let mut lacks = Vec::new();
        for route in Route::ALL.into_iter().filter(|r| asked.is_none_or(|a| a == *r)) {
            match route.compiler().and_then(Compiler::with_linker) {
                Ok(toolchain) => return Ok(toolchain),
                Err(lack) => lacks.push(format!("{}: {lack}", route.name())),
            }
        }
        bail!("no toolchain for eBPF ({})\n  remedy: cargo xtask setup", lacks.join("; "))
    }

    /// `cargo` of this toolchain, ready for `build -Z build-std=core`.
    pub fn cargo(&self) -> Cmd {
        let cargo = match self.compiler.route {
            Route::Nightly => Cmd::new("rustup").args(["run", "nightly", "cargo"]),
            // RUSTC_BOOTSTRAP: a stable compiler refuses -Z flags without it.
            Route::System => Cmd::new("/usr/bin/cargo")
                .env("RUSTC_BOOTSTRAP", "1")
                .env("RUSTC", "/usr/bin/rustc")
                .env_remove("RUSTUP_TOOLCHAIN"),
        };
        // The flags in .cargo/config.toml count only as long as none of these is set.
        let cargo =
            ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "RUSTC_WRAPPER", "CARGO_BUILD_TARGET"]
                .into_iter()
                .fold(cargo.clean_cargo_env(), Cmd::env_remove);
        cargo.path_first(&[self.linker.parent().unwrap_or(Path::new("/")).to_owned()])
    }

    /// `rustc` of this toolchain.
    pub fn rustc(&self) -> Cmd {
        self.compiler.route.rustc()
    }

    /// What a result of this toolchain depends on.
    pub fn identity(&self) -> String {
        format!("{}bpf-linker {BPF_LINKER} {}", self.compiler.version, self.linker.display())
    }
}

/// Where setup puts the linker it builds for one LLVM.
pub fn linker_root(llvm: u32) -> PathBuf {
    paths::cache().join(format!("bpf-linker-{BPF_LINKER}-llvm{llvm}"))
}

fn linker(llvm: u32) -> Option<PathBuf> {
    let own = linker_root(llvm).join("bin/bpf-linker");
    if is_executable(&own) {
        return Some(own);
    }
    // One that the developer installed: it does not tell its LLVM, so a mismatch shows when it links.
    let found = which("bpf-linker")?;
    let version = Cmd::new(&found).arg("--version").capture().ok()?;
    let version = parse_version(version.split_whitespace().nth(1)?)?;
    (Some(version) >= parse_version(BPF_LINKER)).then_some(found)
}

/// The oldest compiler that the workspace takes.
pub fn oldest() -> Option<(u32, u32)> {
    parse_version(env!("CARGO_PKG_RUST_VERSION"))
}

fn release_of(version: &str) -> Option<(u32, u32)> {
    parse_version(field(version, "release: ")?)
}

fn llvm_of(version: &str) -> Option<u32> {
    parse_version(field(version, "LLVM version: ")?).map(|v| v.0)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

/// Major and minor of `1.96.0`, `v22.1`, `1.97.0-nightly`.
pub fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().trim_start_matches(['v', 'g', 'o']).split(['.', '-', '+', '~', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = "rustc 1.97.0-nightly (0 2026-05-19)\nhost: x86_64-unknown-linux-gnu\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4\n";

    #[test]
    fn rustc_tells_its_release_and_llvm() {
        assert_eq!(release_of(VERSION), Some((1, 97)));
        assert_eq!(llvm_of(VERSION), Some(22));
        assert_eq!(llvm_of("release: 1.0"), None);
    }

    #[test]
    fn versions_of_many_spellings() {
        assert_eq!(parse_version("0.13.0"), Some((0, 13)));
        assert_eq!(parse_version("go1.24.3"), Some((1, 24)));
        assert_eq!(parse_version("v1.34.4"), Some((1, 34)));
        assert_eq!(parse_version("1.19~1"), Some((1, 19)));
        assert_eq!(parse_version("none"), None);
        assert!(parse_version("0.9.2") < parse_version("0.13.0"));
    }
}
