//! Links of bpf(2): those of TCX, XDP and control groups, by fd, by device and by number.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytemuck::{Pod, Zeroable};

use super::{bpf, cmd, info, owned, raw};

/// `struct bpf_link_info`, its beginning, with the members for devices of the union.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct LinkInfo {
    kind: u32,
    /// The kernel's number of the link.
    pub id: u32,
    /// The program it runs.
    pub prog_id: u32,
    pad: u32,
    /// The interface; 0 once it is gone.
    pub ifindex: u32,
    /// Of TCX: [`TCX_INGRESS`] or [`TCX_EGRESS`].
    pub attach_type: u32,
}

impl LinkInfo {
    /// True for a link of XDP.
    pub fn is_xdp(&self) -> bool {
        /// `BPF_LINK_TYPE_XDP`.
        const XDP: u32 = 6;
        self.kind == XDP
    }
}

/// What the kernel says of a link to a device.
pub fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    info(fd)
}

/// `struct bpf_link_info`, its beginning, with the member for control groups of the union.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    /// The program it runs.
    pub prog_id: u32,
    pad: u32,
    /// The control group; 0 once it is gone.
    pub cgroup_id: u64,
    /// `enum bpf_attach_type`.
    pub attach_type: u32,
    pad2: u32,
}

/// What the kernel says of a link to a control group.
pub fn cgroup_link_info(fd: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    info(fd)
}

/// Attaches a program to a hook of what `target` names: an fd, or an interface.
fn link_create(prog: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    owned(bpf(cmd::LINK_CREATE, &mut Attr { prog_fd: raw(prog), target, attach_type, flags })?)
}

/// Attaches a program to a hook of a control group. Others may be there, too.
pub fn link_create_cgroup(prog: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    link_create(prog, raw(cgroup), attach_type, 0)
}

/// What is on a hook of a control group.
pub struct CgroupPrograms {
    /// Numbers of the programs.
    pub ids: Vec<u32>,
    /// Further programs may be attached (`BPF_F_ALLOW_MULTI`).
    pub lets_others_in: bool,
}

/// What is on a hook of a control group itself, not of those above it.
pub fn cgroup_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<CgroupPrograms> {
    /// Most programs on one hook (`BPF_CGROUP_MAX_PROGS`).
    const MOST: usize = 64;
    const ALLOW_MULTI: u32 = 2;
    #[repr(C)]
    struct Attr {
        target_fd: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        pad: u32,
    }
    let mut ids = [0_u32; MOST];
    let mut attr = Attr {
        target_fd: raw(cgroup),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr().expose_provenance() as u64,
        count: MOST as u32,
        pad: 0,
    };
    bpf(cmd::PROG_QUERY, &mut attr)?;
    let ids = ids[..(attr.count as usize).min(MOST)].to_vec();
    Ok(CgroupPrograms { ids, lets_others_in: attr.attach_flags & ALLOW_MULTI != 0 })
}

/// Attaches a program to a TCX hook. EINVAL where the kernel has no TCX (before 6.6).
pub fn link_create_tcx(prog: BorrowedFd<'_>, ifindex: u32, attach_type: u32) -> io::Result<OwnedFd> {
    link_create(prog, ifindex, attach_type, 0)
}

/// Attaches a program to the XDP hook of a device, in its driver. EOPNOTSUPP where the driver has none, EBUSY where another program is.
pub fn link_create_xdp(prog: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    /// `BPF_XDP`.
    const XDP: u32 = 37;
    /// `XDP_FLAGS_DRV_MODE`.
    const DRIVER_MODE: u32 = 1 << 2;
    link_create(prog, ifindex, XDP, DRIVER_MODE)
}

/// Swaps a link's program atomically. ENOLINK when the link's interface is gone.
pub fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link_fd: u32,
        prog_fd: u32,
        flags: u32,
        old_prog_fd: u32,
    }
    bpf(cmd::LINK_UPDATE, &mut Attr { link_fd: raw(link), prog_fd: raw(prog), flags: 0, old_prog_fd: 0 }).map(drop)
}

/// A link that is attached to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedLink {
    /// Number of its program.
    pub prog_id: u32,
    /// Its own number; 0 for a program that was attached without a link.
    pub link_id: u32,
}

/// What is on a TCX hook of a device, in the order in which it runs.
///
/// # Errors
/// `EINVAL` where the kernel has no TCX (before 6.6).
pub fn tcx_links(ifindex: u32, attach_type: u32) -> io::Result<Vec<AttachedLink>> {
    /// Most programs on one hook (`BPF_MPROG_MAX`).
    const MOST: usize = 64;
    #[repr(C)]
    struct Attr {
        target_ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        count: u32,
        pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut attr = Attr {
        target_ifindex: ifindex,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: programs.as_mut_ptr().expose_provenance() as u64,
        count: MOST as u32,
        pad: 0,
        prog_attach_flags: 0,
        link_ids: links.as_mut_ptr().expose_provenance() as u64,
        link_attach_flags: 0,
        revision: 0,
    };
    bpf(cmd::PROG_QUERY, &mut attr)?;
    let count = (attr.count as usize).min(MOST);
    let both = programs.into_iter().zip(links).take(count);
    Ok(both.map(|(prog_id, link_id)| AttachedLink { prog_id, link_id }).collect())
}

/// The object of a number (`BPF_*_GET_FD_BY_ID`).
fn by_id(command: i32, id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    bpf(command, &mut Attr { id, next_id: 0, open_flags: 0 }).and_then(owned)
}

/// The link of a number.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    by_id(cmd::LINK_GET_FD_BY_ID, id)
}

/// The number of the link behind this one, of all that there are; `None` behind the last.
pub fn next_link(id: u32) -> io::Result<Option<u32>> {
    #[repr(C)]
    struct Attr {
        start: u32,
        next: u32,
    }
    let mut attr = Attr { start: id, next: 0 };
    match bpf(cmd::LINK_GET_NEXT_ID, &mut attr) {
        Ok(_) => Ok(Some(attr.next)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Takes a link off its device, whoever holds it.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
    }
    bpf(cmd::LINK_DETACH, &mut Attr { link: raw(link) }).map(drop)
}

/// Name of the program of a number, up to 15 octets of it.
pub fn prog_name(id: u32) -> io::Result<String> {
    /// `struct bpf_prog_info`, its beginning.
    #[derive(Clone, Copy, Pod, Zeroable)]
    #[repr(C)]
    struct Info {
        kind: u32,
        id: u32,
        tag: [u8; 8],
        jited_len: u32,
        xlated_len: u32,
        jited: u64,
        xlated: u64,
        load_time: u64,
        created_by: u32,
        map_count: u32,
        map_ids: u64,
        name: [u8; 16],
    }
    let program = by_id(cmd::PROG_GET_FD_BY_ID, id)?;
    let info: Info = info(program.as_fd())?;
    let name = CStr::from_bytes_until_nul(&info.name).map_err(io::Error::other)?;
    Ok(name.to_string_lossy().into_owned())
}
