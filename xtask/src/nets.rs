//! `clean-nets`: removes what runs of tests, demo and benchmarks left when they were killed: namespaces, directories with
//! their mounts, control groups. All of them are called `rn<pid>...`; those of a living process stay.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::cmd::need_root;
use crate::ui;

/// Options of `clean-nets`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Say what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    if !args.dry_run {
        need_root("clean-nets")?;
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let (mut removed, mut failed) = (0, 0);
    for (what, place) in places(&mounts) {
        for path in leftovers(&place, |pid| Path::new("/proc").join(pid).exists()) {
            if args.dry_run {
                ui::detail(&format!("would remove the {what} {}", path.display()));
                removed += 1;
                continue;
            }
            match remove(what, &path, &mounts) {
                Ok(()) => {
                    ui::detail(&format!("removed the {what} {}", path.display()));
                    removed += 1;
                }
                Err(error) => {
                    ui::warn(&format!("cannot remove the {what} {}: {error}", path.display()));
                    failed += 1;
                }
            }
        }
    }
    match (removed, args.dry_run) {
        _ if failed > 0 => {
            bail!("{failed} leftovers stay\n  remedy: end the processes that use them (lsof, fuser), then once more")
        }
        (0, _) => ui::step("nothing was left behind"),
        (n, true) => ui::step(&format!("{n} leftovers")),
        (n, false) => ui::step(&format!("{n} leftovers removed")),
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Namespace,
    Directory,
    ControlGroup,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Namespace => "namespace",
            Self::Directory => "directory",
            Self::ControlGroup => "control group",
        })
    }
}

fn places(mounts: &str) -> Vec<(What, PathBuf)> {
    let cgroup = mount_points(mounts).find(|(_, kind)| *kind == "cgroup2").map(|(path, _)| path);
    let mut places = vec![(What::Namespace, "/run/netns".into()), (What::Directory, std::env::temp_dir())];
    places.extend(cgroup.map(|path| (What::ControlGroup, path)));
    places
}

/// Entries of a directory that are called after a process that is no more.
fn leftovers(place: &Path, alive: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_str().and_then(owner).is_some_and(|pid| !alive(pid)))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// The process id in `rn<pid>`, `rn<pid>-...` or `rn<pid>x<n>...`.
fn owner(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("rn")?;
    let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (pid, tail) = rest.split_at(digits);
    (!pid.is_empty() && (tail.is_empty() || tail.starts_with(['-', 'x']))).then_some(pid)
}

fn remove(what: What, path: &Path, mounts: &str) -> std::io::Result<()> {
    match what {
        What::Namespace => {
            umount2(path, MntFlags::MNT_DETACH)?;
            fs::remove_file(path)
        }
        What::Directory => {
            // Deepest first; a bpffs below must not be walked and emptied entry by entry.
            let mut below: Vec<PathBuf> =
                mount_points(mounts).map(|(p, _)| p).filter(|p| p.starts_with(path)).collect();
            below.sort();
            for mount in below.iter().rev() {
                umount2(mount, MntFlags::MNT_DETACH)?;
            }
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
        }
        What::ControlGroup => remove_cgroup(path),
    }
}

/// Control groups have files that cannot be removed: only the directories are, children first.
fn remove_cgroup(path: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(path)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_cgroup(&entry.path())?;
    }
    fs::remove_dir(path)
}

/// Path and file system of each mount.
fn mount_points(mounts: &str) -> impl Iterator<Item = (PathBuf, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        // The kernel writes a space in a name as \040.
        Some((PathBuf::from(fields.next()?.replace("\\040", " ")), fields.next()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_an_owner() {
        for (name, pid) in [("rn12", "12"), ("rn12-a", "12"), ("rn12x3", "12"), ("rn12x3-node1", "12")] {
            assert_eq!(owner(name), Some(pid), "{name}");
        }
        for name in ["rn", "rnv12", "rn12abc", "12", "xrn12", "rn-12"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }

    #[test]
    fn what_belongs_to_the_living_stays() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["rn1-alive", "rn2-dead", "other"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let found = leftovers(dir.path(), |pid| pid == "1");
        assert_eq!(found, [dir.path().join("rn2-dead")]);
        remove(What::Directory, &found[0], "").unwrap();
        assert!(!found[0].exists() && dir.path().join("rn1-alive").exists());
    }

    #[test]
    fn mounts_are_read_with_their_spaces() {
        let found: Vec<_> = mount_points("bpf /tmp/rn1/a\\040b bpf rw 0 0\n").collect();
        assert_eq!(found, [(PathBuf::from("/tmp/rn1/a b"), "bpf")]);
    }
}
