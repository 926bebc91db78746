//! Stands in for the agent: pins programs that let everything pass and the maps of pods, by raw bpf(2).

use rustnet_common::addr::Addr;
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::policy::{Policies, PolicyPod};
use std::ffi::CString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const PROG_LOAD: u32 = 5;
const OBJ_PIN: u32 = 6;
const MAP_TYPE_HASH: u32 = 1;
const PROG_TYPE_SCHED_CLS: u32 = 3;
const NO_PREALLOC: u32 = 1;
/// The key of a map of one entry.
static ONLY: u32 = 0;

#[repr(C, align(8))]
struct Attr([u8; 64]);

impl Attr {
    fn new() -> Self {
        Self([0; 64])
    }
    fn u32(mut self, at: usize, v: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&v.to_ne_bytes());
        self
    }
    fn ptr<T>(mut self, at: usize, p: *const T) -> Self {
        self.0[at..at + 8].copy_from_slice(&(p.expose_provenance() as u64).to_ne_bytes());
        self
    }
    fn call(mut self, cmd: u32) -> io::Result<i32> {
        // SAFETY: every pointer stored by the callers below outlives the call and has the size that the command uses.
        let n = unsafe { libc::syscall(libc::SYS_bpf, cmd, &raw mut self, size_of::<Self>()) };
        if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as i32) }
    }
    fn open(self, cmd: u32) -> OwnedFd {
        let fd = self.call(cmd).expect("bpf");
        // SAFETY: the kernel just opened it for us.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

/// Loads `r0 = 0; exit` (TC_ACT_OK) and pins it.
pub fn pin_program(path: &Path) {
    let code: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];
    let attr = Attr::new().u32(0, PROG_TYPE_SCHED_CLS).u32(4, 2).ptr(8, code.as_ptr());
    pin(&attr.ptr(16, c"GPL".as_ptr()).open(PROG_LOAD), path);
}

/// Creates a hash map and pins it.
pub fn pin_map(path: &Path, key: u32, value: u32, entries: u32) -> OwnedFd {
    let fd = Attr::new()
        .u32(0, MAP_TYPE_HASH)
        .u32(4, key)
        .u32(8, value)
        .u32(12, entries)
        .u32(16, NO_PREALLOC)
        .open(MAP_CREATE);
    pin(&fd, path);
    fd
}

fn pin(fd: &OwnedFd, path: &Path) {
    let path = CString::new(path.as_os_str().as_bytes()).expect("path");
    Attr::new().ptr(0, path.as_ptr()).u32(8, fd.as_raw_fd().cast_unsigned()).call(OBJ_PIN).expect("pin");
}

/// All entries of an endpoints map, by address.
pub fn entries(map: &OwnedFd) -> Vec<(IpAddr, Endpoint)> {
    all::<EndpointKey, Endpoint>(map).into_iter().map(|(key, value)| (key.into(), value)).collect()
}

/// All entries of a map of host ports.
pub fn host_ports(map: &OwnedFd) -> Vec<(HostPortKey, HostPort)> {
    let mut all = all::<HostPortKey, HostPort>(map);
    all.sort_unstable_by_key(|(key, _)| *key);
    all
}

fn all<K: bytemuck::Pod, V: bytemuck::Pod>(map: &OwnedFd) -> Vec<(K, V)> {
    let fd = map.as_raw_fd().cast_unsigned();
    let mut out = Vec::new();
    let mut key: Option<K> = None;
    loop {
        let mut next: K = bytemuck::Zeroable::zeroed();
        let attr = Attr::new().u32(0, fd).ptr(16, &raw mut next);
        let attr = if let Some(k) = &key { attr.ptr(8, &raw const *k) } else { attr };
        if attr.call(MAP_GET_NEXT_KEY).is_err() {
            return out;
        }
        let mut value: V = bytemuck::Zeroable::zeroed();
        Attr::new().u32(0, fd).ptr(8, &raw const next).ptr(16, &raw mut value).call(MAP_LOOKUP_ELEM).expect("entry");
        out.push((next, value));
        key = Some(next);
    }
}

/// Writes an entry.
pub fn put(map: &OwnedFd, ip: IpAddr, value: &Endpoint) {
    let key: EndpointKey = Addr::from(ip);
    let attr = Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, &raw const key);
    attr.ptr(16, std::ptr::from_ref(value)).call(MAP_UPDATE_ELEM).expect("entry");
}

/// Writes the state of network policies.
pub fn put_policies(map: &OwnedFd, value: &Policies) {
    let attr = Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, &raw const ONLY);
    attr.ptr(16, std::ptr::from_ref(value)).call(MAP_UPDATE_ELEM).expect("entry");
}

/// Writes what policies say of a pod.
pub fn put_policy_pod(map: &OwnedFd, ip: IpAddr, value: &PolicyPod) {
    let key = Addr::from(ip);
    let attr = Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, &raw const key);
    attr.ptr(16, std::ptr::from_ref(value)).call(MAP_UPDATE_ELEM).expect("entry");
}

/// Deletes an entry.
pub fn delete(map: &OwnedFd, ip: IpAddr) {
    let key: EndpointKey = Addr::from(ip);
    Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, &raw const key).call(MAP_DELETE_ELEM).expect("entry");
}

/// Writes an entry of a map of host ports.
pub fn put_host_port(map: &OwnedFd, key: &HostPortKey, value: &HostPort) {
    let attr = Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, std::ptr::from_ref(key));
    attr.ptr(16, std::ptr::from_ref(value)).call(MAP_UPDATE_ELEM).expect("entry");
}

/// Deletes an entry of a map of host ports.
pub fn delete_host_port(map: &OwnedFd, key: &HostPortKey) {
    let attr = Attr::new().u32(0, map.as_raw_fd().cast_unsigned()).ptr(8, std::ptr::from_ref(key));
    attr.call(MAP_DELETE_ELEM).expect("entry");
}
