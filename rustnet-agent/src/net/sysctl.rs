//! Kernel settings of this network namespace that forwarding depends on, set and set again when somebody resets them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where the kernel shows the settings of the reader's network namespace.
pub const ROOT: &str = "/proc/sys/net";

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below [`ROOT`].
    pub path: String,
    /// The value it must have.
    pub want: &'static str,
    /// Values that will do as well; for each of them the setting is left alone.
    pub also: &'static [&'static str],
    /// Missing is fine: the kernel has no IPv6, or the interface has gone.
    pub optional: bool,
}

/// All settings, for an uplink, the overlay device (if any) and the pods' veths.
pub fn wanted(uplinks: &[String], overlay: Option<&str>, veths: &[String]) -> Vec<Sysctl> {
    let sysctl = |path: String, want, also, optional| Sysctl { path, want, also, optional };
    let mut out = Vec::new();
    // Forwarding makes the kernel ignore router advertisements unless told to go on (accept_ra 2); the node's own default
    // route may come from them, so this must be first.
    out.extend(uplinks.iter().map(|dev| sysctl(format!("ipv6/conf/{dev}/accept_ra"), "2", &["0"], true)));
    out.push(sysctl("ipv4/ip_forward".into(), "1", &[], false));
    out.push(sysctl("ipv6/conf/all/forwarding".into(), "1", &[], true));
    // Loose reverse-path filtering: replies of pods leave by another way than their requests came. The strictest of `all`
    // and the device counts, and 2 is "stricter" than 1.
    let devices = overlay.into_iter().chain(veths.iter().map(String::as_str));
    out.extend(devices.map(|dev| sysctl(format!("ipv4/conf/{dev}/rp_filter"), "2", &[], true)));
    out
}

/// Sets what differs; returns what was set, as `path: old -> new`.
pub fn apply(root: &Path, wanted: &[Sysctl]) -> Result<Vec<String>> {
    let mut changed = Vec::new();
    for sysctl in wanted {
        let path: PathBuf = root.join(&sysctl.path);
        let old = match fs::read_to_string(&path) {
            Ok(old) => old.trim().to_owned(),
            Err(e) if sysctl.optional && e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        if old == sysctl.want || sysctl.also.contains(&old.as_str()) {
            continue;
        }
        fs::write(&path, sysctl.want).with_context(|| {
            format!(
                "setting {} to {}: is /proc/sys mounted read-only? Give the agent a writable one, or set it on the host",
                path.display(),
                sysctl.want
            )
        })?;
        changed.push(format!("{}: {old} -> {}", sysctl.path.replace('/', "."), sysctl.want));
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::{apply, wanted};
    use std::fs;

    #[test]
    fn only_what_differs_is_set_and_missing_devices_do_not_matter() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, value: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        put("ipv4/ip_forward", "0\n");
        put("ipv4/conf/rn_vxlan/rp_filter", "2\n");
        put("ipv4/conf/rnv1/rp_filter", "1\n");
        put("ipv6/conf/eth0/accept_ra", "0\n");
        put("ipv6/conf/eth1/accept_ra", "1\n");
        let uplinks = ["eth0".to_owned(), "eth1".to_owned()];
        let veths = ["rnv1".to_owned(), "rnv2".to_owned()];
        let all = wanted(&uplinks, Some("rn_vxlan"), &veths);
        let changed = apply(root.path(), &all).unwrap();
        assert_eq!(
            changed,
            ["ipv6.conf.eth1.accept_ra: 1 -> 2", "ipv4.ip_forward: 0 -> 1", "ipv4.conf.rnv1.rp_filter: 1 -> 2"]
        );
        assert!(apply(root.path(), &all).unwrap().is_empty());
    }

    #[test]
    fn a_missing_ip_forward_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        assert!(apply(root.path(), &wanted(&[], None, &[])).is_err());
    }
}
