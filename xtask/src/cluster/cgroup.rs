//! Control groups: one of each node in every hierarchy, so that its pods and its programs are apart
//! from the machine's. Machines with one unified hierarchy and those that also have the older
//! controllers both exist.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A hierarchy's mount point.
struct Hierarchy {
    root: PathBuf,
    unified: bool,
}

/// Makes the group in every hierarchy.
pub fn make(name: &str) -> Result<()> {
    for hierarchy in hierarchies() {
        let group = hierarchy.root.join(name);
        let making = || format!("making the control group {}", group.display());
        fs::create_dir_all(&group).with_context(making)?;
        // The older cpuset controller accepts no process before these files are written.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (above, own) = (hierarchy.root.join(file), group.join(file));
            if !hierarchy.unified && above.is_file() {
                fs::copy(&above, &own).with_context(making)?;
            }
        }
        if hierarchy.unified {
            fs::create_dir_all(group.join(DAEMONS)).with_context(making)?;
        }
    }
    Ok(())
}

/// A leaf for the node's own daemons: a unified group that hands out controllers may hold no process itself.
const DAEMONS: &str = "daemons";

/// The file to which a daemon of the node writes itself; none on a machine without a unified hierarchy.
pub fn daemons(name: &str) -> Option<PathBuf> {
    unified(name).map(|group| group.join(DAEMONS).join("cgroup.procs"))
}

/// The node's group in the unified hierarchy.
pub fn unified(name: &str) -> Option<PathBuf> {
    hierarchies().into_iter().find(|h| h.unified).map(|h| h.root.join(name))
}

/// Removes the groups. They must be empty of processes.
pub fn remove(name: &str) -> Result<()> {
    left(name).iter().try_for_each(|group| remove_tree(group))
}

/// The groups that are there.
pub fn left(name: &str) -> Vec<PathBuf> {
    hierarchies().into_iter().map(|h| h.root.join(name)).filter(|group| group.is_dir()).collect()
}

/// Control groups have files that cannot be removed: only the directories are, children first.
fn remove_tree(group: &Path) -> Result<()> {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    // The kernel takes a moment to forget the last process.
    let gone =
        super::wait::until(std::time::Duration::from_secs(5), || fs::remove_dir(group).is_ok() || !group.exists());
    if gone { Ok(()) } else { fs::remove_dir(group).with_context(|| format!("removing {}", group.display())) }
}

fn hierarchies() -> Vec<Hierarchy> {
    of(&fs::read_to_string("/proc/self/mounts").unwrap_or_default())
}

fn of(mounts: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(root), Some(kind)) = (fields.next(), fields.next()) else { continue };
        let first = !found.iter().any(|h| h.unified);
        match kind {
            // Other mounts of the same one are somebody's own.
            "cgroup2" if first => found.push(Hierarchy { root: root.into(), unified: true }),
            "cgroup" if root.starts_with("/sys/fs/cgroup/") => {
                found.push(Hierarchy { root: root.into(), unified: false });
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_machines_are_understood() {
        let roots = |mounts: &str| -> Vec<_> { of(mounts).into_iter().map(|h| (h.root, h.unified)).collect() };
        assert_eq!(roots("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"), [("/sys/fs/cgroup".into(), true)]);
        let mixed = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                     cgroup2 /tmp/x cgroup2 rw 0 0\n";
        assert_eq!(roots(mixed), [("/sys/fs/cgroup/cpu".into(), false), ("/sys/fs/cgroup/unified".into(), true)]);
    }
}
