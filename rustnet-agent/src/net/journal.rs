//! Sysctls of the host as they were before the agent changed them, in a file: `rustnetctl cleanup` restores them.
//!
//! The file is in the run directory, which a reboot empties, as it resets sysctls. Those of rustnet's own devices go with these.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustnet_common::names::{OVERLAY_DEV, VETH_PREFIX};
use serde::{Deserialize, Serialize};

use super::sysctl::Change;
use crate::install::write_atomic;

/// Name of the file in the run directory.
pub const FILE: &str = "sysctls.json";

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Its value before the first change.
    before: String,
    /// The value that the agent gave it last.
    set: String,
}

type Entries = BTreeMap<String, Entry>;

fn read(run_dir: &Path) -> Result<Entries> {
    let path = run_dir.join(FILE);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text)
            .with_context(|| format!("{}: not a list of sysctls; remove it", path.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Entries::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// Adds changes to the file.
///
/// # Errors
/// The file cannot be read or written.
pub fn record(run_dir: &Path, changes: &[Change]) -> Result<()> {
    let is_host = |change: &&Change| {
        let is_internal = |part: &str| part.starts_with(VETH_PREFIX) || part == OVERLAY_DEV;
        !change.path.split('/').any(is_internal)
    };
    let mut changes = changes.iter().filter(is_host).peekable();
    if changes.peek().is_none() {
        return Ok(());
    }
    let mut entries = read(run_dir)?;
    for Change { path, old, new } in changes {
        let entry = entries.entry(path.clone()).or_insert_with(|| Entry { before: old.clone(), set: new.clone() });
        entry.set.clone_from(new);
    }
    write_atomic(&run_dir.join(FILE), &serde_json::to_vec_pretty(&entries)?, 0o600).map(drop)
}

/// Restores what still has the value that the agent gave it; what somebody else has changed since is theirs. Returns what was
/// restored, or with `dry_run` would be.
///
/// # Errors
/// The file cannot be read, or a setting cannot be written.
pub fn restore(run_dir: &Path, sysctl_dir: &Path, dry_run: bool) -> Result<Vec<String>> {
    let mut entries: Vec<_> = read(run_dir)?.into_iter().collect();
    // Forwarding of the host first: writing it changes that of all devices.
    entries.sort_by_key(|(path, _)| path.contains("/conf/"));
    let mut restored = Vec::new();
    for (name, Entry { before, set }) in entries {
        let path = sysctl_dir.join(&name);
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == set) {
            if !dry_run {
                fs::write(&path, &before).with_context(|| format!("setting {} to {before}", path.display()))?;
            }
            restored.push(format!("sysctl net.{}: {set} -> {before}", name.replace('/', ".")));
        }
    }
    Ok(restored)
}

#[cfg(test)]
mod tests {
    use super::{Change, record, restore};
    use std::fs;

    fn change(path: &str, old: &str, new: &str) -> Change {
        Change { path: path.into(), old: old.into(), new: new.into() }
    }

    #[test]
    fn the_first_value_is_restored_unless_somebody_else_has_changed_it() {
        let (run, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |path: &str, value: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        let (forward, accept, rp) = ("ipv4/ip_forward", "ipv6/conf/eth0/accept_ra", "ipv4/conf/all/rp_filter");
        record(run.path(), &[change(forward, "0", "1"), change(accept, "1", "2"), change(rp, "2", "0")]).unwrap();
        // Somebody resets it, and the agent sets it again.
        record(run.path(), &[change(rp, "1", "0"), change("ipv4/conf/rnv1/rp_filter", "1", "0")]).unwrap();
        put(forward, "1\n");
        put(accept, "0\n");
        put(rp, "0\n");
        let planned = restore(run.path(), root.path(), true).unwrap();
        assert_eq!((planned.len(), read(forward).trim()), (2, "1"));
        let done = restore(run.path(), root.path(), false).unwrap();
        assert_eq!(done, ["sysctl net.ipv4.ip_forward: 1 -> 0", "sysctl net.ipv4.conf.all.rp_filter: 0 -> 2"]);
        assert_eq!((read(forward).as_str(), read(accept).trim(), read(rp).as_str()), ("0", "0", "2"));
        assert!(restore(run.path(), root.path(), false).unwrap().is_empty());
    }
}
