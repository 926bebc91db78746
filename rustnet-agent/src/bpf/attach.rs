//! Puts programs on hooks, or swaps those that are there without losing a packet.
//!
//! Uplinks and the overlay device have TCX links, pinned, so that they outlive the agent and no other tool removes them.
//! Kernels before 6.6 have no TCX: there, and on the pods' veths always, a clsact qdisc carries netlink filters.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustnet_common::names;

use super::{pin, remedy, sys};
use crate::net::netlink::Socket;
use crate::net::tc;
pub use crate::net::tc::Direction;

/// The attach type of a TCX hook.
fn tcx(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => sys::TCX_INGRESS,
        Direction::Egress => sys::TCX_EGRESS,
    }
}

/// What it took to have a program on its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was there.
    Unchanged,
    /// Another program was there and has been swapped.
    Swapped,
    /// Nothing of ours was there.
    Attached,
}

/// Where a hook's link is pinned: the program's name, and for further devices the index behind it. Devices change their names,
/// and BPF file systems refuse the dots in them.
pub fn link_path(bpffs: &Path, program: &str, further: Option<u32>) -> PathBuf {
    let dir = bpffs.join(names::LINKS_DIR);
    match further {
        None => dir.join(program),
        Some(ifindex) => dir.join(format!("{program}_{ifindex}")),
    }
}

/// The program whose link is pinned at `path`, as far as the name says. Earlier releases have put the device's name behind it.
pub fn program_of(path: &Path) -> Option<&'static str> {
    let name = path.file_name()?.to_str()?;
    let is_of =
        |program: &&&str| name.strip_prefix(**program).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
    names::PROGRAMS.iter().find(is_of).copied()
}

/// Renames the pin of a device's link to `path`, if there is one under another name: an earlier release's, or one of the time when
/// another device was the first uplink. The kernel refuses a second link of one program. True if there was one.
pub fn adopt_other(pins: &[PathBuf], path: &Path, device: &Device<'_>, direction: Direction) -> Result<bool> {
    let is_of_device = |pin: &&PathBuf| {
        let info = info_of(pin);
        info.is_ok_and(|info| info.ifindex == device.ifindex && info.attach_type == tcx(direction))
    };
    let program = program_of(path);
    let Some(other) = pins.iter().filter(|pin| *pin != path && program_of(pin) == program).find(is_of_device) else {
        return Ok(false);
    };
    fs::rename(other, path).with_context(|| format!("renaming {} to {}", other.display(), path.display()))?;
    Ok(true)
}

/// Index of the device of the link that is pinned at `path`, if there is one.
pub fn device_of(path: &Path) -> Option<u32> {
    info_of(path).ok().map(|info| info.ifindex)
}

/// Number of the link that is pinned at `path`.
///
/// # Errors
///
/// It cannot be opened.
pub fn link_id_of(path: &Path) -> Result<u32> {
    info_of(path).map(|info| info.id).with_context(|| format!("opening the link {}", path.display()))
}

fn info_of(path: &Path) -> io::Result<sys::LinkInfo> {
    let link = sys::obj_get(path)?;
    sys::link_info(link.as_fd())
}

/// Takes programs of ours off a TCX hook whose links are not among `kept`: their pins are in a BPF file system that another one
/// was mounted over, and they would handle each packet a second time. Returns how many.
pub fn drop_strays(device: &Device<'_>, direction: Direction, kept: &BTreeSet<u32>) -> Result<usize> {
    let links = match sys::tcx_links(device.ifindex, tcx(direction)) {
        Ok(links) => links,
        // No TCX here, or the device is gone.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => return Ok(0),
        Err(e) => return Err(e).with_context(|| format!("asking what is attached to {}", device.name)),
    };
    let mut dropped = 0;
    for link in links.iter().filter(|link| link.link_id != 0 && !kept.contains(&link.link_id)) {
        // What goes meanwhile is none of ours.
        let is_ours = sys::prog_name(link.prog_id).is_ok_and(|name| names::PROGRAMS.contains(&name.as_str()));
        if is_ours && let Ok(link) = sys::link_by_id(link.link_id) {
            sys::link_detach(link.as_fd()).with_context(|| format!("detaching from {}", device.name))?;
            dropped += 1;
        }
    }
    Ok(dropped)
}

/// A device that programs go on.
pub struct Device<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its index.
    pub ifindex: u32,
}

/// Has `prog` on the TCX hook of a device, by the link pinned at `path` if it lives and is of this device; without TCX, in a
/// filter.
pub fn device_hook(
    socket: &mut Socket,
    path: &Path,
    device: &Device<'_>,
    direction: Direction,
    prog: BorrowedFd<'_>,
) -> Result<Outcome> {
    if let Some(outcome) = adopt(path, device, direction, prog)? {
        return Ok(outcome);
    }
    match sys::link_create_tcx(prog, device.ifindex, tcx(direction)) {
        Ok(link) => {
            pin::replace(path, link.as_fd())?;
            Ok(Outcome::Attached)
        }
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            filter(socket, device.ifindex, direction, prog, &name_of(path))
                .with_context(|| format!("attaching to {} without TCX", device.name))
        }
        Err(e) => Err(anyhow::anyhow!("attaching {} to {}: {e}: {}", name_of(path), device.name, remedy(&e))),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Swaps the program of the link pinned at `path`. `None` when there is no link, or it is of no use: its device is gone or
/// another one. Such a pin is removed, which detaches it.
fn adopt(path: &Path, device: &Device<'_>, direction: Direction, prog: BorrowedFd<'_>) -> Result<Option<Outcome>> {
    let link = match sys::obj_get(path) {
        Ok(link) => link,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => anyhow::bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
    };
    let info = sys::link_info(link.as_fd()).with_context(|| format!("{} is not a link", path.display()))?;
    if info.ifindex != device.ifindex || info.attach_type != tcx(direction) {
        pin::remove(path)?;
        return Ok(None);
    }
    if info.prog_id == sys::prog_id(prog).context("asking for a program's id")? {
        return Ok(Some(Outcome::Unchanged));
    }
    match sys::link_update(link.as_fd(), prog) {
        Ok(()) => Ok(Some(Outcome::Swapped)),
        // The device went between the two calls.
        Err(e) if e.raw_os_error() == Some(libc::ENOLINK) => {
            pin::remove(path)?;
            Ok(None)
        }
        Err(e) => anyhow::bail!("swapping the program of {}: {e}: {}", path.display(), remedy(&e)),
    }
}

/// Has both programs of a pod on its host-side veth: makes what is missing, swaps what is another program.
pub fn pod_hooks(
    socket: &mut Socket,
    ifindex: u32,
    from_pod: BorrowedFd<'_>,
    to_pod: BorrowedFd<'_>,
) -> Result<Outcome> {
    let one = filter(socket, ifindex, Direction::Ingress, from_pod, names::PROGRAMS[0])?;
    let two = filter(socket, ifindex, Direction::Egress, to_pod, names::PROGRAMS[1])?;
    Ok(if one == Outcome::Unchanged { two } else { one })
}

/// Has `prog` in our filter on a device.
fn filter(
    socket: &mut Socket,
    ifindex: u32,
    direction: Direction,
    prog: BorrowedFd<'_>,
    name: &str,
) -> Result<Outcome> {
    let wanted = sys::prog_id(prog).context("asking for a program's id")?;
    let there = tc::filter(socket, ifindex, direction)?;
    if there.as_ref().is_some_and(|filter| filter.prog_id == wanted) {
        return Ok(Outcome::Unchanged);
    }
    tc::set_filter(socket, ifindex, direction, prog, name, there.is_some())?;
    Ok(if there.is_some() { Outcome::Swapped } else { Outcome::Attached })
}

#[cfg(test)]
mod tests {
    use super::{link_path, program_of};
    use std::path::Path;

    #[test]
    fn each_device_has_its_own_link() {
        let path = |further| link_path(Path::new("/b"), "uplink_in", further).to_string_lossy().into_owned();
        assert_eq!(path(None), "/b/link/uplink_in");
        assert_eq!(path(Some(12)), "/b/link/uplink_in_12");
        let program = |name| program_of(&Path::new("/b/link").join(name));
        for name in ["uplink_in", "uplink_in_12", "uplink_in_eth0-10", "uplink_in_new"] {
            assert_eq!(program(name), Some("uplink_in"));
        }
        for name in ["uplink_input", "odd", "uplink"] {
            assert_eq!(program(name), None);
        }
    }
}
