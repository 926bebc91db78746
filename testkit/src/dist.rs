//! Where the built programs are: `RUSTNET_DIST`, or whichever of the build directories is newest.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Path of a program of ours: `rustnet-agent`, `rustnet-cni` or `rustnetctl`.
pub fn find(program: &str) -> Result<PathBuf> {
    if let Some(dist) = std::env::var_os("RUSTNET_DIST") {
        let path = PathBuf::from(dist).join(program);
        if path.is_file() {
            return path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()));
        }
        bail!("RUSTNET_DIST is set, but {} does not exist: run `cargo xtask dist`", path.display());
    }
    let target = target_dir();
    // Of several builds, the one that was made last is meant.
    let built = |folder: &str| {
        let path = target.join(folder).join(program);
        path.metadata().and_then(|m| m.modified()).ok().map(|time| (time, path))
    };
    if let Some((_, path)) = ["dist", "dist-dev", "release", "debug"].into_iter().filter_map(built).max() {
        return Ok(path);
    }
    bail!(
        "{program} is not built (looked into {}/{{dist,dist-dev,release,debug}}): run `cargo xtask dist`",
        target.display()
    )
}

/// Path of a program as `cargo xtask agent-v1` has built it.
pub fn find_v1(program: &str) -> Result<PathBuf> {
    let path = target_dir().join("v1/dist").join(program);
    if path.is_file() { Ok(path) } else { bail!("{} does not exist: run `cargo xtask agent-v1`", path.display()) }
}

/// The target directory: above the running program, or below the workspace.
pub fn target_dir() -> PathBuf {
    let above = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file()).map(Path::to_path_buf));
    above.unwrap_or_else(|| workspace().join("target"))
}

/// The root of the sources this was built from.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Where captures and logs of failed tests go.
pub fn artifacts() -> Result<PathBuf> {
    let dir = std::env::var_os("RUSTNET_ARTIFACTS").map_or_else(|| target_dir().join("artifacts"), PathBuf::from);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    Ok(dir)
}
