//! The reference CNI plugins: where they are.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use testkit::Node;

/// Where distributions and people put them.
const DIRS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];

/// Where a plugin is.
pub fn find(name: &str) -> Result<PathBuf> {
    match DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!(
            "the CNI plugin {name} is in none of {}: `cargo xtask setup` installs it (Debian: containernetworking-plugins)",
            DIRS.join(", ")
        ),
    }
}

/// Puts a plugin where the plugins called on this node look for others.
pub fn offer(node: &Node, name: &str) -> Result<()> {
    let link = node.cni_bin_dir().join(name);
    if link.exists() {
        return Ok(());
    }
    std::os::unix::fs::symlink(find(name)?, &link).with_context(|| format!("cannot create {}", link.display()))
}
