//! Pins: files in the BPF file system that keep programs and links alive without us.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use anyhow::{Context, Result};

use super::{remedy, sys};

/// Pins `fd` at `path` in one step: whoever opens the path gets the old object or the new one, never nothing.
pub fn replace(path: &Path, fd: BorrowedFd<'_>) -> Result<()> {
    let file = path.file_name().with_context(|| format!("{} is no file name", path.display()))?;
    // BPF file systems refuse dots in names.
    let temporary = path.with_file_name(format!("{}_new", file.to_string_lossy()));
    remove(&temporary)?;
    sys::obj_pin(&temporary, fd)
        .map_err(|e| anyhow::anyhow!("pinning {}: {e}: {}", temporary.display(), remedy(&e)))?;
    fs::rename(&temporary, path).with_context(|| format!("renaming {} to {}", temporary.display(), path.display()))
}

/// Removes a pin; one that is not there is fine. True when there was one.
pub fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e).with_context(|| format!("removing {}", path.display())),
    }
}
