//! The agent's pinned objects by raw bpf(2), no loader: programs to attach, and the maps that this binary writes.

use crate::types::error::{Error, code};
use bytemuck::Pod;
use rustnet_common::addr::Addr;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names;
use rustnet_common::policy::{Policies, PolicyPod};
use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const BPF_MAP_LOOKUP_ELEM: u32 = 1;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_OBJ_GET: u32 = 7;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: u32 = 21;
/// A flag of an update: only if the key has no entry.
const BPF_NOEXIST: u64 = 1;

/// A kind of pinned map.
pub trait Pinned {
    /// Its key.
    type Key: Pod;
    /// Its value.
    type Value: Pod;
    /// Its name.
    const NAME: &'static str;
    /// What people call it.
    const TITLE: &'static str;
}

/// `rn_endpoints`.
pub enum OfEndpoints {}
impl Pinned for OfEndpoints {
    type Key = EndpointKey;
    type Value = Endpoint;
    const NAME: &'static str = names::map::ENDPOINTS;
    const TITLE: &'static str = "endpoints map";
}
/// `rn_endpoints`, open.
pub type Endpoints = Map<OfEndpoints>;

/// `rn_host_ports`.
pub enum OfHostPorts {}
impl Pinned for OfHostPorts {
    type Key = HostPortKey;
    type Value = HostPort;
    const NAME: &'static str = names::map::HOST_PORTS;
    const TITLE: &'static str = "map of host ports";
}
/// `rn_host_ports`, open.
pub type HostPorts = Map<OfHostPorts>;

/// `rn_policy`, which the agent alone writes.
pub enum OfPolicies {}
impl Pinned for OfPolicies {
    type Key = u32;
    type Value = Policies;
    const NAME: &'static str = names::map::POLICY;
    const TITLE: &'static str = "map of the state of policies";
}

/// `rn_policy_pods`, which the agent alone writes.
pub enum OfPolicyPods {}
impl Pinned for OfPolicyPods {
    type Key = Addr;
    type Value = PolicyPod;
    const NAME: &'static str = names::map::POLICY_PODS;
    const TITLE: &'static str = "map of policies of pods";
}

/// A pinned map, open.
pub struct Map<P>(OwnedFd, PhantomData<P>);

impl<P: Pinned> Map<P> {
    /// Opens the pinned map and makes sure that its layout is the one we know.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let path = bpffs.join(P::NAME);
        let fd = obj_get(&path)?;
        let mut info = [0_u32; 4];
        let mut attr = Attr::default();
        attr.set_u32(0, fd.as_raw_fd().cast_unsigned());
        attr.set_u32(4, size_of_val(&info) as u32);
        attr.set_ptr(8, info.as_mut_ptr().cast());
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map_err(|e| Error::io(path.display(), &e))?;
        let (key, value) = (size_of::<P::Key>() as u32, size_of::<P::Value>() as u32);
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
        Ok(Self(fd, PhantomData))
    }

    /// Opens the pinned map to delete from it. `None` when it is not pinned or another version's: a pod must be able to go
    /// in any case, and the agent drops entries of interfaces that have gone.
    pub fn open_for_removal(bpffs: &Path) -> Result<Option<Self>, Error> {
        match Self::open(bpffs) {
            Ok(map) => Ok(Some(map)),
            Err(e) if e.code == code::TRY_AGAIN => {
                eprintln!("rustnet-cni: nothing deleted from the {}: {e}", P::TITLE);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Writes an entry.
    pub fn put(&self, key: P::Key, value: &P::Value) -> io::Result<()> {
        let mut value = *value;
        self.element(BPF_MAP_UPDATE_ELEM, key, Some(&mut value), 0)
    }

    /// Writes an entry if the key has none; false if it has.
    pub fn insert(&self, key: P::Key, value: &P::Value) -> io::Result<bool> {
        let mut value = *value;
        match self.element(BPF_MAP_UPDATE_ELEM, key, Some(&mut value), BPF_NOEXIST) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// Reads an entry.
    pub fn get(&self, key: P::Key) -> io::Result<Option<P::Value>> {
        self.read(BPF_MAP_LOOKUP_ELEM, key)
    }

    /// Deletes an entry if `is_ours` says so. Another call may write one meanwhile: what is taken out and is not ours goes back.
    pub fn delete_if(&self, key: P::Key, is_ours: impl Fn(&P::Value) -> bool) -> io::Result<()> {
        if !self.get(key)?.is_some_and(|value| is_ours(&value)) {
            return Ok(());
        }
        match self.read(BPF_MAP_LOOKUP_AND_DELETE_ELEM, key)? {
            Some(mut other) if !is_ours(&other) => {
                match self.element(BPF_MAP_UPDATE_ELEM, key, Some(&mut other), BPF_NOEXIST) {
                    Err(e) if e.raw_os_error() != Some(libc::EEXIST) => Err(e),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn read(&self, command: u32, key: P::Key) -> io::Result<Option<P::Value>> {
        let mut value: P::Value = bytemuck::Zeroable::zeroed();
        match self.element(command, key, Some(&mut value), 0) {
            Ok(()) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn element(&self, command: u32, key: P::Key, value: Option<&mut P::Value>, flags: u64) -> io::Result<()> {
        let mut key = key;
        let mut attr = Attr::default();
        attr.set_u32(0, self.0.as_raw_fd().cast_unsigned());
        attr.set_ptr(8, bytemuck::bytes_of_mut(&mut key).as_mut_ptr());
        if let Some(value) = value {
            attr.set_ptr(16, bytemuck::bytes_of_mut(value).as_mut_ptr());
        }
        attr.set_u64(24, flags);
        bpf(command, &mut attr).map(drop)
    }
}

/// Opens a pinned object.
pub fn obj_get(path: &Path) -> Result<OwnedFd, Error> {
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

    fn set_u64(&mut self, at: usize, v: u64) {
        self.0[at..at + 8].copy_from_slice(&v.to_ne_bytes());
    }

    fn set_ptr(&mut self, at: usize, p: *mut u8) {
        self.set_u64(at, p.expose_provenance() as u64);
    }
}

fn bpf(cmd: u32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: the attribute is as long as stated, and every pointer in it points to a live object of the size that the
    // command uses: a zero-terminated path, or a key and a value whose sizes were compared with the map's.
    let n = unsafe { libc::syscall(libc::SYS_bpf, cmd, std::ptr::from_mut(attr), size_of::<Attr>()) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as i32) }
}
