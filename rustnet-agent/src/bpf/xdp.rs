//! Puts the XDP program on uplinks, or swaps the one that is there.
//!
//! In driver mode alone: in the kernel's generic mode XDP runs after the skb is made, and would save nothing. Links are pinned, so that
//! they outlive the agent. A device without the program forwards the same packets by `uplink_in`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustnet_common::names::{LINKS_DIR, UPLINK_IN, UPLINK_XDP};

use super::attach::{Device, Outcome, device_of, link_path, program_of};
use super::load::program_path;
use super::{pin, remedy, sys};
use crate::config::Xdp;
use crate::net::link::{self, Link, vlan_on};
use crate::net::netlink::Socket;

/// True for the pin of a link of the XDP program.
pub fn is_link(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.strip_prefix(UPLINK_XDP).is_some_and(|rest| rest.starts_with('_')))
}

/// Why a device must not have the program in this mode, and what helps; `None` if it may.
pub fn unfit(mode: Xdp, links: &[Link], index: u32) -> Option<String> {
    let is = |kind: &str| links.iter().any(|link| link.index == index && link.kind == kind);
    if is("bond") {
        let why = "it is a bond, whose ports run the program, and see themselves";
        return Some(format!("{why}; give --xdp off"));
    }
    if let Some(vlan) = vlan_on(links, index) {
        let why = "whose packets look like those of the device once it has taken the tag off";
        return Some(format!("{vlan} is a VLAN of it, {why}; use another device for one of both, or give --xdp off"));
    }
    (is("veth") && mode != Xdp::NativeVeth).then(|| {
        "it is a veth, which loses what XDP sends unless its other end has an XDP program, too; give --xdp native-veth if it \
         has, else --xdp off"
            .to_owned()
    })
}

/// Has the program on a device.
///
/// # Errors
/// The driver has no XDP, another program is there, or the kernel refuses it for another reason.
pub fn attach(socket: &mut Socket, bpffs: &Path, device: &Device<'_>, prog: BorrowedFd<'_>) -> Result<Outcome> {
    let path = link_path(bpffs, UPLINK_XDP, Some(device.ifindex));
    match sys::obj_get(&path) {
        Ok(link) => {
            let info = sys::link_info(link.as_fd()).with_context(|| format!("{} is no link", path.display()))?;
            if info.ifindex == device.ifindex {
                if info.prog_id == sys::prog_id(prog).context("asking for a program's id")? {
                    return Ok(Outcome::Unchanged);
                }
                sys::link_update(link.as_fd(), prog).map_err(|e| refused(device, &e))?;
                return Ok(Outcome::Swapped);
            }
            // Its device is gone.
            pin::remove(&path)?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
    }
    let create = || sys::link_create_xdp(prog, device.ifindex);
    let link = match create() {
        Err(e) if is_taken(&e) && drop_stray(socket, device)? => create(),
        created => created,
    };
    pin::replace(&path, link.map_err(|e| refused(device, &e))?.as_fd())?;
    Ok(Outcome::Attached)
}

/// True if a program is on the hook.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// Takes a program of ours off a device where no pin of ours has its link, as [`super::attach::drop_strays`] does: it would go on with
/// tables that nobody writes. True if there was one.
fn drop_stray(socket: &mut Socket, device: &Device<'_>) -> Result<bool> {
    let there = link::by_index(socket, device.ifindex)?.and_then(|link| link.xdp);
    // What goes meanwhile is none of ours.
    let is_ours = |id: &u32| sys::prog_name(*id).is_ok_and(|name| name == UPLINK_XDP);
    let Some(there) = there.filter(is_ours) else { return Ok(false) };
    let mut id = 0;
    while let Some(next) = sys::next_link(id).context("listing links")? {
        id = next;
        let Ok(link) = sys::link_by_id(id) else { continue };
        let info = sys::link_info(link.as_fd());
        // A program belongs to one agent, and so to devices of one network namespace.
        if info.is_ok_and(|info| info.is_xdp() && (info.prog_id, info.ifindex) == (there, device.ifindex)) {
            sys::link_detach(link.as_fd()).with_context(|| format!("detaching XDP from {}", device.name))?;
            tracing::warn!("an XDP program taken off {}, whose pin is not here", device.name);
            return Ok(true);
        }
    }
    Ok(false)
}

/// What a refusal of the kernel means, and what helps.
fn refused(device: &Device<'_>, error: &io::Error) -> anyhow::Error {
    let name = device.name;
    let why = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "its driver has no XDP: use a device that has, or give --xdp off".to_owned(),
        _ if is_taken(error) => {
            format!("another program has its XDP hook (`ip link show dev {name}`): take that off, or give --xdp off")
        }
        Some(libc::EINVAL | libc::ERANGE) => {
            "its MTU is too large for XDP, its driver's receive offloads (LRO) or queues forbid it, or it takes part in another device; \
             the kernel's log says more. Change that, or give --xdp off"
                .to_owned()
        }
        _ => remedy(error).to_owned(),
    };
    anyhow::anyhow!("XDP on {name}: {error}: {why}")
}

/// Takes the program off all devices but these. Returns what was done.
///
/// # Errors
/// A pin cannot be read or removed.
pub fn detach_others(bpffs: &Path, kept: &[u32]) -> Result<Vec<String>> {
    let mut done = Vec::new();
    for path in link_paths(bpffs)? {
        let is_kept = device_of(&path).is_some_and(|device| kept.contains(&device));
        if !is_kept && pin::remove(&path)? {
            done.push(format!("{} removed: XDP is not for its device any more", path.display()));
        }
    }
    Ok(done)
}

/// Indexes of the devices that have the pinned program.
///
/// # Errors
/// A pin cannot be read.
pub fn attached(bpffs: &Path) -> Result<Vec<u32>> {
    let pinned = sys::obj_get(&program_path(bpffs, UPLINK_XDP)).and_then(|program| sys::prog_id(program.as_fd())).ok();
    let mut devices = Vec::new();
    for path in link_paths(bpffs)? {
        let info = sys::obj_get(&path).and_then(|link| sys::link_info(link.as_fd()));
        let info = info.with_context(|| format!("opening {}", path.display()))?;
        devices.extend((info.ifindex != 0 && pinned == Some(info.prog_id)).then_some(info.ifindex));
    }
    Ok(devices)
}

/// Indexes of the devices that have `uplink_in` by a link (TCX, kernels from 6.6 on).
///
/// # Errors
/// The directory of links cannot be read.
pub fn uplinks(bpffs: &Path) -> Result<Vec<u32>> {
    let is_uplink = |path: &PathBuf| program_of(path) == Some(UPLINK_IN);
    Ok(all_links(bpffs)?.iter().filter(|path| is_uplink(path)).filter_map(|path| device_of(path)).collect())
}

fn link_paths(bpffs: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = all_links(bpffs)?;
    paths.retain(|path| is_link(path));
    Ok(paths)
}

fn all_links(bpffs: &Path) -> Result<Vec<PathBuf>> {
    let dir = bpffs.join(LINKS_DIR);
    let entries = fs::read_dir(&dir).and_then(|entries| entries.map(|it| Ok(it?.path())).collect());
    entries.with_context(|| format!("reading {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_veths_and_bonds_are_unfit() {
        let link = |index, kind: &str, lower| Link {
            index,
            kind: kind.into(),
            lower,
            name: format!("d{index}"),
            ..Link::default()
        };
        let links = [
            link(2, "", None),
            link(3, "veth", Some(9)),
            link(4, "", None),
            link(5, "vlan", Some(4)),
            link(6, "bond", None),
        ];
        assert_eq!(unfit(Xdp::Native, &links, 2), None);
        assert!(unfit(Xdp::Native, &links, 3).is_some_and(|why| why.contains("--xdp native-veth")));
        assert_eq!(unfit(Xdp::NativeVeth, &links, 3), None);
        assert!(unfit(Xdp::NativeVeth, &links, 6).is_some_and(|why| why.contains("it is a bond")));
        assert!(unfit(Xdp::NativeVeth, &links, 4).is_some_and(|why| why.contains("d5 is a VLAN of it")));
    }

    #[test]
    fn its_links_are_those_of_devices() {
        let is_link = |name| is_link(&Path::new("/b/link").join(name));
        assert!(is_link("uplink_xdp_12"));
        assert!(!is_link("uplink_xdp") && !is_link("uplink_in_12") && !is_link("sock_bind4"));
    }
}
