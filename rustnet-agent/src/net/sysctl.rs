//! Kernel settings of this network namespace that forwarding depends on, set and set again when somebody resets them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustnet_common::names;

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    /// Path below `/proc/sys/net`.
    pub path: String,
    /// The value it must have.
    pub want: &'static str,
    /// Values that will do as well; for each of them the setting is left alone.
    pub also: &'static [&'static str],
    /// Missing is fine: the kernel has no IPv6, or the interface has gone.
    pub optional: bool,
}

/// Names of the devices that settings depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// The uplinks.
    pub uplinks: Vec<String>,
    /// Other devices with an IPv6 default route.
    pub others: Vec<String>,
    /// The overlay device.
    pub overlay: Option<String>,
    /// The host's ends of pods' veths.
    pub veths: Vec<String>,
    /// There are several uplinks.
    pub is_multi_homed: bool,
    /// Pods have IPv6.
    pub has_ipv6_pods: bool,
}

/// A setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Path below `/proc/sys/net`.
    pub path: String,
    /// Its value before.
    pub old: String,
    /// Its value now.
    pub new: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.path.replace('/', "."), self.old, self.new)
    }
}

/// All settings.
pub fn wanted(devices: &Devices) -> Vec<Sysctl> {
    let sysctl = |path: String, want, also, optional| Sysctl { path, want, also, optional };
    let mut out = Vec::new();
    // With forwarding, the kernel drops the default routes of router advertisements, and ignores further ones, on devices whose
    // accept_ra is not 2 (rt6_purge_dflt_routers). So this must be first.
    let routers = devices.uplinks.iter().chain(&devices.others);
    out.extend(routers.map(|dev| sysctl(format!("ipv6/conf/{dev}/accept_ra"), "2", &["0"], true)));
    out.push(sysctl("ipv4/ip_forward".into(), "1", &[], false));
    out.push(sysctl("ipv6/conf/all/forwarding".into(), "1", &[], true));
    let internal = || devices.overlay.iter().chain(&devices.veths);
    // Hardened hosts have it off for new devices (`default`), and the kernel takes no IPv6 route for such a device.
    for dev in internal().filter(|_| devices.has_ipv6_pods) {
        out.push(sysctl(format!("ipv6/conf/{dev}/disable_ipv6"), "0", &[], true));
    }
    // Hardened hosts, and systemd-networkd, switch it off for single devices. The kernel's look-up for programs asks the device
    // that a packet came in by (`bpf_ipv4_fib_lookup`); for those of the host that is lo.
    let forwarding = || devices.uplinks.iter().map(String::as_str).chain(internal().map(String::as_str)).chain(["lo"]);
    out.extend(forwarding().map(|dev| sysctl(format!("ipv6/conf/{dev}/forwarding"), "1", &[], true)));
    // An answer of a Service bears the Service's address, and the route to that leads out of one device alone.
    if devices.is_multi_homed {
        out.extend(devices.uplinks.iter().map(|dev| sysctl(format!("ipv4/conf/{dev}/rp_filter"), "2", &["0"], true)));
    }
    out.extend(forwarding().map(|dev| sysctl(format!("ipv4/conf/{dev}/forwarding"), "1", &[], true)));
    // No reverse-path filter where the programs verify sources: what they let through can bear a VIP, whose route leads
    // elsewhere, and even the loose filter refuses that on a device without an address of its own. See also `relax`.
    for dev in internal() {
        out.push(sysctl(format!("ipv4/conf/{dev}/rp_filter"), "0", &[], true));
        // A second line behind the programs, which drop such frames of pods. A pod must not add
        // routes to the host by router advertisements (CVE-2020-13401), nor neighbours by ARP: all
        // neighbours of a pod's veth are permanent.
        out.push(sysctl(format!("ipv6/conf/{dev}/accept_ra"), "0", &[], true));
        out.push(sysctl(format!("ipv4/conf/{dev}/arp_ignore"), "8", &[], true));
        out.push(sysctl(format!("ipv4/conf/{dev}/arp_accept"), "0", &[], true));
    }
    out
}

/// Takes a reverse-path filter out of `all`, where it would count for our devices too (the highest value wins), and puts it on
/// every device that is not ours instead, so that nothing else changes. Adds what was set to `changed`, also before a failure.
pub fn relax(root: &Path, changed: &mut Vec<Change>) -> Result<()> {
    let conf = root.join("ipv4/conf");
    let read = |dev: &str| -> u32 {
        let value = fs::read_to_string(conf.join(dev).join("rp_filter")).unwrap_or_default();
        value.trim().parse().unwrap_or(0)
    };
    let all = read("all");
    if all == 0 {
        return Ok(());
    }
    let change = |dev: &str, old: u32, new: u32| Change {
        path: format!("ipv4/conf/{dev}/rp_filter"),
        old: old.to_string(),
        new: new.to_string(),
    };
    for entry in fs::read_dir(&conf).with_context(|| format!("reading {}", conf.display()))? {
        let name = entry?.file_name();
        let dev = name.to_string_lossy();
        let old = read(&dev);
        if dev == "all" || dev.starts_with(names::VETH_PREFIX) || dev == names::OVERLAY_DEV || old >= all {
            continue;
        }
        match fs::write(conf.join(&*dev).join("rp_filter"), all.to_string()) {
            Ok(()) => changed.push(change(&dev, old, all)),
            // A device that went meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("setting rp_filter of {dev} to {all}")),
        }
    }
    fs::write(conf.join("all/rp_filter"), "0").context("setting ipv4.conf.all.rp_filter to 0")?;
    changed.push(change("all", all, 0));
    Ok(())
}

impl Sysctl {
    /// The value that it has and must not have; `None` where it may stay as it is.
    pub fn wrong(&self, root: &Path) -> Result<Option<String>> {
        let path = root.join(&self.path);
        let old = match fs::read_to_string(&path) {
            Ok(old) => old.trim().to_owned(),
            Err(e) if self.optional && e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        };
        Ok((old != self.want && !self.also.contains(&old.as_str())).then_some(old))
    }
}

/// Sets what differs, each whether another one failed or not; the first failure is returned. Adds what was set to `changed`.
pub fn apply(root: &Path, wanted: &[Sysctl], changed: &mut Vec<Change>) -> Result<()> {
    let mut first = Ok(());
    for sysctl in wanted {
        match set(root, sysctl) {
            Ok(change) => changed.extend(change),
            Err(error) => first = first.and(Err(error)),
        }
    }
    first
}

/// Sets one setting; `None` where it may stay as it is.
fn set(root: &Path, sysctl: &Sysctl) -> Result<Option<Change>> {
    let Some(old) = sysctl.wrong(root)? else { return Ok(None) };
    let path: PathBuf = root.join(&sysctl.path);
    match fs::write(&path, sysctl.want) {
        Ok(()) => Ok(Some(Change { path: sysctl.path.clone(), old, new: sysctl.want.to_owned() })),
        // A device that went meanwhile.
        Err(e) if sysctl.optional && e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| {
            format!(
                "setting {} to {}: is it mounted read-only? Name a writable /proc/sys/net by --sysctl-dir, or set it on the host",
                path.display(),
                sysctl.want
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, Devices, Path, Result, Sysctl, wanted};
    use std::fs;

    fn apply(root: &Path, wanted: &[Sysctl]) -> Result<Vec<Change>> {
        let mut changed = Vec::new();
        super::apply(root, wanted, &mut changed).map(|()| changed)
    }

    fn relax(root: &Path) -> Result<Vec<Change>> {
        let mut changed = Vec::new();
        super::relax(root, &mut changed).map(|()| changed)
    }

    #[test]
    fn only_what_differs_is_set_and_missing_devices_do_not_matter() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, value: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        put("ipv4/ip_forward", "0\n");
        put("ipv4/conf/rn_vxlan/rp_filter", "0\n");
        put("ipv4/conf/rnv1/rp_filter", "1\n");
        put("ipv4/conf/rnv1/arp_ignore", "0\n");
        put("ipv4/conf/rnv1/arp_accept", "1\n");
        put("ipv6/conf/rnv1/accept_ra", "2\n");
        put("ipv6/conf/rn_vxlan/accept_ra", "1\n");
        put("ipv6/conf/eth0/accept_ra", "0\n");
        put("ipv6/conf/eth1/accept_ra", "1\n");
        put("ipv6/conf/eth2/accept_ra", "1\n");
        put("ipv4/conf/eth0/rp_filter", "1\n");
        put("ipv6/conf/rnv1/forwarding", "0\n");
        put("ipv6/conf/rnv1/disable_ipv6", "1\n");
        put("ipv6/conf/eth0/disable_ipv6", "1\n");
        put("ipv4/conf/eth0/forwarding", "0\n");
        put("ipv4/conf/eth1/forwarding", "1\n");
        let names = |all: &[&str]| all.iter().map(ToString::to_string).collect();
        let all = wanted(&Devices {
            uplinks: names(&["eth0", "eth1"]),
            others: names(&["eth2"]),
            overlay: Some("rn_vxlan".to_owned()),
            veths: names(&["rnv1", "rnv2"]),
            is_multi_homed: true,
            has_ipv6_pods: true,
        });
        let changed = apply(root.path(), &all).unwrap();
        assert_eq!(
            changed.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [
                "ipv6.conf.eth1.accept_ra: 1 -> 2",
                "ipv6.conf.eth2.accept_ra: 1 -> 2",
                "ipv4.ip_forward: 0 -> 1",
                "ipv6.conf.rnv1.disable_ipv6: 1 -> 0",
                "ipv6.conf.rnv1.forwarding: 0 -> 1",
                "ipv4.conf.eth0.rp_filter: 1 -> 2",
                "ipv4.conf.eth0.forwarding: 0 -> 1",
                "ipv6.conf.rn_vxlan.accept_ra: 1 -> 0",
                "ipv4.conf.rnv1.rp_filter: 1 -> 0",
                "ipv6.conf.rnv1.accept_ra: 2 -> 0",
                "ipv4.conf.rnv1.arp_ignore: 0 -> 8",
                "ipv4.conf.rnv1.arp_accept: 1 -> 0",
            ]
        );
        assert!(apply(root.path(), &all).unwrap().is_empty());
    }

    #[test]
    fn a_filter_in_all_moves_to_the_devices_that_are_not_ours() {
        let root = tempfile::tempdir().unwrap();
        let conf = root.path().join("ipv4/conf");
        for (dev, value) in
            [("all", "2"), ("default", "0"), ("eth0", "1"), ("rnv1", "0"), ("rn_vxlan", "0"), ("lo", "2")]
        {
            fs::create_dir_all(conf.join(dev)).unwrap();
            fs::write(conf.join(dev).join("rp_filter"), value).unwrap();
        }
        assert_eq!(relax(root.path()).unwrap().len(), 3);
        let read = |dev: &str| fs::read_to_string(conf.join(dev).join("rp_filter")).unwrap();
        let now = ["all", "default", "eth0", "rnv1", "rn_vxlan", "lo"].map(read);
        assert_eq!(now, ["0", "2", "2", "0", "0", "2"]);
        assert!(relax(root.path()).unwrap().is_empty());
    }

    /// What was set before a failure is not lost: it has to be restored one day.
    #[test]
    fn changes_before_a_failure_are_returned() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("ipv6/conf/eth0")).unwrap();
        fs::write(root.path().join("ipv6/conf/eth0/accept_ra"), "1").unwrap();
        let devices = Devices { uplinks: vec!["eth0".into()], ..Devices::default() };
        let mut changed = Vec::new();
        super::apply(root.path(), &wanted(&devices), &mut changed).unwrap_err();
        assert_eq!(changed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ipv6.conf.eth0.accept_ra: 1 -> 2"]);
    }

    /// One setting that cannot be set, say for a security module, keeps no other one from being set.
    #[test]
    fn a_failure_stops_no_other_setting() {
        let root = tempfile::tempdir().unwrap();
        // What is a directory cannot be read.
        fs::create_dir_all(root.path().join("ipv6/conf/eth0/accept_ra")).unwrap();
        fs::create_dir_all(root.path().join("ipv4")).unwrap();
        fs::write(root.path().join("ipv4/ip_forward"), "0").unwrap();
        let devices = Devices { uplinks: vec!["eth0".into()], ..Devices::default() };
        let mut changed = Vec::new();
        let error = super::apply(root.path(), &wanted(&devices), &mut changed).unwrap_err();
        assert!(format!("{error:#}").contains("accept_ra"), "{error:#}");
        assert_eq!(changed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["ipv4.ip_forward: 0 -> 1"]);
    }

    #[test]
    fn a_missing_ip_forward_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        assert!(apply(root.path(), &wanted(&Devices::default())).is_err());
    }
}
