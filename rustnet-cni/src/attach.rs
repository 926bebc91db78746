//! What the agent has pinned: its programs, put on a pod's veth, and the map of endpoints. Raw bpf(2), no loader.

use crate::netlink::{Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Refused, Socket};
use crate::types::error::{Error, code};
use libc::{TCA_KIND, TCA_OPTIONS};
use netlink_packet_core::Emitable;
use netlink_packet_route::tc::TcHeader;
use rustnet_common::addr::Addr;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::names;
use std::ffi::CString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: u32 = 1;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_MAP_DELETE_ELEM: u32 = 3;
const BPF_OBJ_GET: u32 = 7;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;

const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_INGRESS: u32 = 0xffff_fff2;
const TC_H_EGRESS: u32 = 0xffff_fff3;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const ETH_P_ALL: u16 = 3;

/// The program on the way from a pod, and the one on the way to it.
const HOOKS: [(&str, u32); 2] = [("from_pod", TC_H_INGRESS), ("to_pod", TC_H_EGRESS)];

/// The agent's pins, open.
pub struct Pins {
    programs: [OwnedFd; 2],
    /// `rn_endpoints`.
    pub endpoints: Endpoints,
}

impl Pins {
    /// Opens everything that ADD needs; an error names what is missing and the remedy.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let program = |name: &str| obj_get(&bpffs.join(names::PROGS_DIR).join(name));
        Ok(Self { programs: [program(HOOKS[0].0)?, program(HOOKS[1].0)?], endpoints: Endpoints::open(bpffs)? })
    }

    /// The messages that put the programs on a veth: the qdisc, then both filters. The agent may
    /// have been there first, for it repairs what it finds in the records.
    pub fn attach(&self, index: u32) -> Vec<Message> {
        let clsact = tcmsg(index, CLSACT_HANDLE, TC_H_CLSACT, 0);
        let mut out = vec![
            Message::new("add qdisc clsact", libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &clsact)
                .text(TCA_KIND, "clsact")
                .tolerate(&[libc::EEXIST]),
        ];
        for ((name, parent), fd) in HOOKS.iter().zip(&self.programs) {
            let info = u32::from(names::TC_PRIORITY) << 16 | u32::from(ETH_P_ALL.to_be());
            let header = tcmsg(index, names::TC_HANDLE, *parent, info);
            let m = Message::new(format!("attach {name}"), libc::RTM_NEWTFILTER, NLM_F_CREATE, &header);
            let m = m.text(TCA_KIND, "bpf");
            out.push(m.nested(TCA_OPTIONS, |m| {
                m.u32(TCA_BPF_FD, fd.as_raw_fd().cast_unsigned())
                    .text(TCA_BPF_NAME, name)
                    .u32(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT)
            }));
        }
        out
    }
}

/// The hooks of a veth on which our filter is missing.
pub fn missing_filters(socket: &mut Socket, index: u32) -> Result<Vec<&'static str>, Refused> {
    let mut missing = Vec::new();
    for (name, parent) in HOOKS {
        let header = tcmsg(index, 0, parent, 0);
        let dump = Message::new("list filters", libc::RTM_GETTFILTER, NLM_F_DUMP, &header);
        let found = socket.run(vec![dump])?.iter().any(|r| {
            let Ok(header) = TcHeader::parse(&r.body) else { return false };
            let attrs = r.attrs(header.buffer_len());
            r.kind == libc::RTM_NEWTFILTER
                && header.handle == names::TC_HANDLE.into()
                && header.info >> 16 == u32::from(names::TC_PRIORITY)
                && attrs.text(TCA_KIND) == Some("bpf")
                && attrs.nested(TCA_OPTIONS).u32(TCA_BPF_FLAGS).is_some_and(|f| f & TCA_BPF_FLAG_ACT_DIRECT != 0)
        });
        if !found {
            missing.push(name);
        }
    }
    Ok(missing)
}

/// `rn_endpoints`, open.
pub struct Endpoints(OwnedFd);

impl Endpoints {
    /// Opens the pinned map and makes sure that its layout is the one we know.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let path = bpffs.join(names::map::ENDPOINTS);
        let fd = obj_get(&path)?;
        let mut info = [0_u32; 4];
        let mut attr = Attr::default();
        attr.set_u32(0, fd.as_raw_fd().cast_unsigned());
        attr.set_u32(4, size_of_val(&info) as u32);
        attr.set_ptr(8, info.as_mut_ptr().cast());
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map_err(|e| Error::io(path.display(), &e))?;
        let (key, value) = (size_of::<EndpointKey>() as u32, size_of::<Endpoint>() as u32);
        if (info[2], info[3]) != (key, value) {
            return Err(Error::new(
                code::TRY_AGAIN,
                format!(
                    "{} has keys of {} and values of {} bytes, not {key} and {value}",
                    path.display(),
                    info[2],
                    info[3]
                ),
            )
            .details("it was pinned by another version of rustnet: install the CNI binary of the running agent"));
        }
        Ok(Self(fd))
    }

    /// Opens the pinned map to delete from it. `None` when it is not pinned or another version's: a pod must be able to go
    /// in any case, and the agent drops entries of interfaces that have gone.
    pub fn open_for_removal(bpffs: &Path) -> Result<Option<Self>, Error> {
        match Self::open(bpffs) {
            Ok(map) => Ok(Some(map)),
            Err(e) if e.code == code::TRY_AGAIN => {
                eprintln!("rustnet-cni: nothing deleted from the endpoints map: {e}");
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Writes an entry.
    pub fn put(&self, ip: IpAddr, value: &Endpoint) -> io::Result<()> {
        let mut value = *value;
        self.element(BPF_MAP_UPDATE_ELEM, ip, Some(&mut value))
    }

    /// Reads an entry.
    pub fn get(&self, ip: IpAddr) -> io::Result<Option<Endpoint>> {
        let mut value: Endpoint = bytemuck::Zeroable::zeroed();
        match self.element(BPF_MAP_LOOKUP_ELEM, ip, Some(&mut value)) {
            Ok(()) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Deletes an entry; one that has gone is no error.
    pub fn delete(&self, ip: IpAddr) -> io::Result<()> {
        match self.element(BPF_MAP_DELETE_ELEM, ip, None) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    fn element(&self, cmd: u32, ip: IpAddr, value: Option<&mut Endpoint>) -> io::Result<()> {
        let mut key: EndpointKey = Addr::from(ip);
        let mut attr = Attr::default();
        attr.set_u32(0, self.0.as_raw_fd().cast_unsigned());
        attr.set_ptr(8, bytemuck::bytes_of_mut(&mut key).as_mut_ptr());
        if let Some(value) = value {
            attr.set_ptr(16, bytemuck::bytes_of_mut(value).as_mut_ptr());
        }
        bpf(cmd, &mut attr).map(drop)
    }
}

fn obj_get(path: &Path) -> Result<OwnedFd, Error> {
    let text = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(code::CONFIG, format!("bpffs: {} holds a zero byte", path.display())))?;
    let mut attr = Attr::default();
    attr.set_ptr(0, text.as_ptr().cast_mut().cast());
    let fd = bpf(BPF_OBJ_GET, &mut attr).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Error::new(code::TRY_AGAIN, format!("{} is not pinned", path.display()))
            .details("is the rustnet agent running on this node, and is \"bpffs\" in the configuration its --bpffs?"),
        // SAFETY: plain system call without pointers.
        Some(libc::EACCES) if unsafe { libc::geteuid() } != 0 => Error::io(path.display(), &e),
        // To root, the kernel's words for a file that is none of its objects.
        Some(libc::EACCES | libc::EINVAL) => {
            Error::new(code::IO, format!("{} is no pinned BPF object", path.display()))
                .details("\"bpffs\" in the configuration must lie on a bpf file system")
        }
        _ => Error::io(path.display(), &e),
    })?;
    // SAFETY: the kernel just opened this descriptor for us and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The start of `union bpf_attr`; the commands used here need no more, and the kernel takes the rest for zero.
#[derive(Default)]
#[repr(C, align(8))]
struct Attr([u8; 32]);

impl Attr {
    fn set_u32(&mut self, at: usize, v: u32) {
        self.0[at..at + 4].copy_from_slice(&v.to_ne_bytes());
    }

    fn set_ptr(&mut self, at: usize, p: *mut u8) {
        self.0[at..at + 8].copy_from_slice(&(p.expose_provenance() as u64).to_ne_bytes());
    }
}

fn bpf(cmd: u32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: the attribute is as long as stated, and every pointer in it points to a live object of the size that the
    // command uses: a zero-terminated path, or a key and a value whose sizes were compared with the map's.
    let n = unsafe { libc::syscall(libc::SYS_bpf, cmd, std::ptr::from_mut(attr), size_of::<Attr>()) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as i32) }
}

/// `struct tcmsg`.
pub fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> TcHeader {
    TcHeader { index: index.cast_signed(), handle: handle.into(), parent: parent.into(), info, ..TcHeader::default() }
}
