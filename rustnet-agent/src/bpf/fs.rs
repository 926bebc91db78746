//! The directory for pins: made sure to be on a BPF file system and closed to others.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use rustnet_common::names;

/// Where a BPF file system is mounted by custom.
const SYSTEM_BPFFS: &str = "/sys/fs/bpf";

/// Prepares `dir` for pins, with its `prog` and `link` folders. Mounts a BPF file system when none is there.
pub fn prepare(dir: &Path) -> Result<()> {
    if !dir.is_absolute() {
        bail!("--bpffs {}: must be an absolute path, for example {}", dir.display(), names::DEFAULT_BPFFS);
    }
    let below = nearest_existing(dir);
    if !is_bpffs(&below)? {
        mount_bpffs(dir)?;
    }
    for dir in [dir.to_owned(), dir.join(names::PROGS_DIR), dir.join(names::LINKS_DIR)] {
        private_dir(&dir)?;
    }
    Ok(())
}

/// True if `dir` exists and is on a BPF file system.
pub fn is_bpffs(dir: &Path) -> Result<bool> {
    let stat = statfs(dir).with_context(|| format!("looking at {}", dir.display()))?;
    Ok(stat.filesystem_type() == BPF_FS_MAGIC)
}

/// The longest prefix of `dir` that exists.
pub fn nearest_existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Where to mount for pins in `dir`: the customary place when the pins are to be below it, else `dir` itself.
fn mount_point(dir: &Path) -> &Path {
    let system = Path::new(SYSTEM_BPFFS);
    if dir.starts_with(system) && system.exists() { system } else { dir }
}

fn mount_bpffs(dir: &Path) -> Result<()> {
    let at = mount_point(dir);
    let remedy = || {
        format!(
            "{} is not on a BPF file system and one cannot be mounted at {at}: run `mount -t bpf bpf {at}` on the host, \
             or let a privileged init container do it (see deploy/)",
            dir.display(),
            at = at.display()
        )
    };
    fs::create_dir_all(at).with_context(remedy)?;
    // As systemd mounts it: no more than other hosts do, and no less.
    mount(Some("bpf"), at, Some("bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, Some("mode=0700"))
        .with_context(remedy)
}

/// Makes a directory that only its owner can open: a BPF file system is listable by everybody as mounted.
pub(super) fn private_dir(dir: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o700).recursive(true).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(e).with_context(|| format!("making {}", dir.display()));
        }
        _ => {}
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).with_context(|| format!("closing {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::{is_bpffs, mount_point, nearest_existing, prepare};
    use std::path::Path;

    #[test]
    fn pins_below_the_customary_place_mount_it_there() {
        assert_eq!(mount_point(Path::new("/sys/fs/bpf/rustnet")), Path::new("/sys/fs/bpf"));
        assert_eq!(mount_point(Path::new("/run/x/bpf")), Path::new("/run/x/bpf"));
    }

    #[test]
    fn the_nearest_existing_directory_decides() {
        assert_eq!(nearest_existing(Path::new("/proc/self/none/at/all")), Path::new("/proc/self"));
        assert!(!is_bpffs(Path::new("/proc")).unwrap());
    }

    #[test]
    fn a_relative_path_is_refused() {
        assert!(prepare(Path::new("bpf")).unwrap_err().to_string().contains("absolute"));
    }
}
