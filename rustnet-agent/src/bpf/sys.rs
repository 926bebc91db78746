//! The bpf(2) system call: the commands that aya has no public interface for (batches, links by fd, info, `BPF_OBJ_GET`
//! without feature probes), one safe function each. Layouts are those of `union bpf_attr` in `linux/bpf.h`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bytemuck::{Pod, Zeroable};

mod link;

pub use link::{
    AttachedLink, CgroupPrograms, LinkInfo, cgroup_link_info, cgroup_programs, link_by_id, link_create_cgroup,
    link_create_tcx, link_create_xdp, link_detach, link_info, link_update, next_link, prog_name, tcx_links,
};

/// Commands of bpf(2) (`enum bpf_cmd`).
mod cmd {
    pub(super) const MAP_CREATE: i32 = 0;
    pub(super) const MAP_LOOKUP_ELEM: i32 = 1;
    pub(super) const MAP_UPDATE_ELEM: i32 = 2;
    pub(super) const MAP_DELETE_ELEM: i32 = 3;
    pub(super) const MAP_GET_NEXT_KEY: i32 = 4;
    pub(super) const PROG_LOAD: i32 = 5;
    pub(super) const OBJ_PIN: i32 = 6;
    pub(super) const OBJ_GET: i32 = 7;
    pub(super) const PROG_TEST_RUN: i32 = 10;
    pub(super) const PROG_GET_FD_BY_ID: i32 = 13;
    pub(super) const OBJ_GET_INFO_BY_FD: i32 = 15;
    pub(super) const PROG_QUERY: i32 = 16;
    pub(super) const MAP_LOOKUP_AND_DELETE_ELEM: i32 = 21;
    pub(super) const MAP_LOOKUP_BATCH: i32 = 24;
    pub(super) const MAP_UPDATE_BATCH: i32 = 26;
    pub(super) const MAP_DELETE_BATCH: i32 = 27;
    pub(super) const LINK_CREATE: i32 = 28;
    pub(super) const LINK_UPDATE: i32 = 29;
    pub(super) const LINK_GET_FD_BY_ID: i32 = 30;
    pub(super) const LINK_GET_NEXT_ID: i32 = 31;
    pub(super) const LINK_DETACH: i32 = 34;
}

/// `BPF_TCX_INGRESS`.
pub const TCX_INGRESS: u32 = 46;
/// `BPF_TCX_EGRESS`.
pub const TCX_EGRESS: u32 = 47;
/// `BPF_NOEXIST`.
const BPF_NOEXIST: u64 = 1;
/// `BPF_EXIST`.
const BPF_EXIST: u64 = 2;
/// `BPF_PROG_TYPE_SCHED_CLS`.
pub const PROG_TYPE_SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_XDP`.
const PROG_TYPE_XDP: u32 = 6;

/// Calls bpf(2) with an attribute that starts as `attr`; the kernel takes the missing tail as zero.
fn bpf<T>(command: i32, attr: &mut T) -> io::Result<i64> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` of the size given; every pointer in it is valid for the
    // length the command uses, which the callers in this file guarantee.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Takes the fd that a successful command returned.
fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// The shape of a map, as it must agree between the object, the pin and our types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `enum bpf_map_type`.
    pub kind: u32,
    /// Octets of a key.
    pub key_size: u32,
    /// Octets of a value.
    pub value_size: u32,
    /// Most entries.
    pub max_entries: u32,
    /// Creation flags.
    pub flags: u32,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, key_size, value_size, max_entries, flags } = self;
        write!(
            f,
            "{}, key {key_size} B, value {value_size} B, {max_entries} entries, flags {flags:#x}",
            kind_name(*kind)
        )
    }
}

/// The kernel's name of a map type, as bpftool prints it.
pub fn kind_name(kind: u32) -> String {
    match kind {
        1 => "hash".into(),
        2 => "array".into(),
        6 => "percpu_array".into(),
        9 => "lru_hash".into(),
        11 => "lpm_trie".into(),
        27 => "ringbuf".into(),
        other => format!("type {other}"),
    }
}

/// Makes a map.
pub fn map_create(name: &str, layout: Layout) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
        inner_map_fd: u32,
        numa_node: u32,
        name: [u8; 16],
    }
    let mut attr = Attr {
        kind: layout.kind,
        key_size: layout.key_size,
        value_size: layout.value_size,
        max_entries: layout.max_entries,
        flags: layout.flags,
        inner_map_fd: 0,
        numa_node: 0,
        name: object_name(name),
    };
    owned(bpf(cmd::MAP_CREATE, &mut attr)?)
}

/// A name cut to what the kernel takes: 15 octets and a zero.
fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    let n = name.len().min(15);
    out[..n].copy_from_slice(&name.as_bytes()[..n]);
    out
}

#[repr(C)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn elem(map: BorrowedFd<'_>, key: *const u8, value: *const u8) -> ElemAttr {
    ElemAttr { map_fd: raw(map), pad: 0, key: key as u64, value: value as u64, flags: 0 }
}

fn none_if_missing(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads the value of `key` into `value`; false when there is none. The buffer must hold a value of this map (for
/// per-CPU maps: one, rounded up to 8 octets, for each possible CPU).
pub fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    none_if_missing(bpf(cmd::MAP_LOOKUP_ELEM, &mut elem(map, key.as_ptr(), value.as_mut_ptr())))
}

/// Writes one entry, new or not.
pub fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    bpf(cmd::MAP_UPDATE_ELEM, &mut elem(map, key.as_ptr(), value.as_ptr())).map(drop)
}

/// Writes one entry unless the key has one (`BPF_NOEXIST`). False when it has.
pub fn map_insert(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<bool> {
    let mut attr = ElemAttr { flags: BPF_NOEXIST, ..elem(map, key.as_ptr(), value.as_ptr()) };
    match bpf(cmd::MAP_UPDATE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Writes one entry if the key has one (`BPF_EXIST`). False when it has none.
pub fn map_replace(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<bool> {
    let mut attr = ElemAttr { flags: BPF_EXIST, ..elem(map, key.as_ptr(), value.as_ptr()) };
    none_if_missing(bpf(cmd::MAP_UPDATE_ELEM, &mut attr))
}

/// Deletes one entry; false when there was none.
pub fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    none_if_missing(bpf(cmd::MAP_DELETE_ELEM, &mut elem(map, key.as_ptr(), std::ptr::null())))
}

/// Takes one entry out, whose value comes into `value`; false when there was none. Hash maps alone.
pub fn map_take(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    none_if_missing(bpf(cmd::MAP_LOOKUP_AND_DELETE_ELEM, &mut elem(map, key.as_ptr(), value.as_mut_ptr())))
}

/// Writes the key that follows `key` (the first one for `None`) to `next`; false at the end.
pub fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let key = key.map_or(std::ptr::null(), <[u8]>::as_ptr);
    none_if_missing(bpf(cmd::MAP_GET_NEXT_KEY, &mut elem(map, key, next.as_mut_ptr())))
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Where a batched read stands between two calls.
#[derive(Default)]
pub struct Cursor {
    token: [u64; 8],
    started: bool,
}

/// Reads the next entries into `keys` and `values` (room for `count` each). Returns how many, and whether the end was
/// reached. ENOSPC: a bucket holds more than `count` entries, ask for more.
pub fn map_lookup_batch(
    map: BorrowedFd<'_>,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> io::Result<(usize, bool)> {
    let mut out = [0_u64; 8];
    let mut attr = BatchAttr {
        in_batch: if cursor.started { cursor.token.as_ptr() as u64 } else { 0 },
        out_batch: out.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    let more = none_if_missing(bpf(cmd::MAP_LOOKUP_BATCH, &mut attr))?;
    *cursor = Cursor { token: out, started: true };
    Ok((attr.count as usize, !more))
}

/// True if the kernel has no batch command for this map type.
pub fn has_no_batch(e: &io::Error) -> bool {
    // 524 is the kernel's own ENOTSUPP, which maps without a batch operation return.
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | 524))
}

/// Writes `count` entries. On an error, the entries before the returned number stand.
pub fn map_update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: u32) -> Result<(), (u32, io::Error)> {
    batch(cmd::MAP_UPDATE_BATCH, map, keys, values.as_ptr(), count)
}

/// Deletes `count` entries; stops with ENOENT at one that is not there.
pub fn map_delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> Result<(), (u32, io::Error)> {
    batch(cmd::MAP_DELETE_BATCH, map, keys, std::ptr::null(), count)
}

fn batch(
    command: i32,
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: *const u8,
    count: u32,
) -> Result<(), (u32, io::Error)> {
    let mut attr = BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values as u64,
        count,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    match bpf(command, &mut attr) {
        Ok(_) => Ok(()),
        Err(e) => Err((if attr.count > count { 0 } else { attr.count }, e)),
    }
}

#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

/// Opens a pinned map, program or link.
pub fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    owned(bpf(cmd::OBJ_GET, &mut ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 })?)
}

/// Pins a map, program or link; EEXIST when the file is there.
pub fn obj_pin(path: &Path, fd: BorrowedFd<'_>) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(cmd::OBJ_PIN, &mut ObjAttr { path: path.as_ptr() as u64, fd: raw(fd), flags: 0 }).map(drop)
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

fn info<T: Pod>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut out = T::zeroed();
    let len = size_of::<T>() as u32;
    bpf(cmd::OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: raw(fd), len, info: std::ptr::from_mut(&mut out) as u64 })?;
    Ok(out)
}

/// `struct bpf_map_info`, its beginning.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MapInfo {
    kind: u32,
    /// The kernel's number of the map.
    pub id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    /// Name, zero-padded.
    pub name: [u8; 16],
}

impl MapInfo {
    /// The map's shape.
    pub fn layout(&self) -> Layout {
        let Self { kind, key_size, value_size, max_entries, flags, .. } = *self;
        Layout { kind, key_size, value_size, max_entries, flags }
    }
}

/// What the kernel says of a map.
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    info(fd)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProgInfo {
    kind: u32,
    id: u32,
}

/// The kernel's number of a program.
pub fn prog_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    info::<ProgInfo>(fd).map(|i| i.id)
}

/// The kernel's numbers of the maps that a program uses.
pub fn prog_map_ids(fd: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    /// `struct bpf_prog_info`, its beginning.
    #[repr(C)]
    #[derive(Default)]
    struct Info {
        kind: u32,
        id: u32,
        tag: u64,
        jited_len: u32,
        xlated_len: u32,
        jited: u64,
        xlated: u64,
        load_time: u64,
        created_by_uid: u32,
        count: u32,
        ids: u64,
    }
    // More maps than an object of ours has; a verifier's limit, too (MAX_USED_MAPS).
    let mut ids = vec![0_u32; 64];
    let mut out = Info { count: ids.len() as u32, ids: ids.as_mut_ptr() as u64, ..Info::default() };
    let len = size_of::<Info>() as u32;
    bpf(cmd::OBJ_GET_INFO_BY_FD, &mut InfoAttr { fd: raw(fd), len, info: std::ptr::from_mut(&mut out) as u64 })?;
    ids.truncate(out.count as usize);
    Ok(ids)
}

/// A run of a program on a packet (`BPF_PROG_TEST_RUN`).
#[derive(Default)]
pub struct TestRun<'a> {
    /// The packet.
    pub packet: &'a [u8],
    /// Receives the packet afterwards; ENOSPC if it does not fit. Empty: it is of no interest.
    pub out: &'a mut [u8],
    /// `struct __sk_buff` as words, read and written. Empty: all zero.
    pub context: &'a mut [u32],
    /// How often.
    pub repeat: u32,
    /// `BPF_F_TEST_*`.
    pub flags: u32,
}

/// What a run gave.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// What the program returned.
    pub verdict: u32,
    /// Mean duration in nanoseconds.
    pub duration: u32,
    /// Length of the packet afterwards.
    pub len: usize,
}

/// `BPF_F_TEST_XDP_LIVE_FRAMES`: what an XDP program returns is done, and nothing is returned of frame and context.
pub const LIVE_FRAMES: u32 = 1 << 1;

/// Runs a program.
pub fn test_run(prog: BorrowedFd<'_>, run: TestRun<'_>) -> io::Result<Ran> {
    #[repr(C)]
    struct Attr {
        prog_fd: u32,
        retval: u32,
        data_size_in: u32,
        data_size_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch_size: u32,
        pad: u32,
    }
    /// A pointer without a size would mean as much as there is.
    fn unless_empty<T>(slice: &[T], pointer: *const T) -> u64 {
        if slice.is_empty() { 0 } else { pointer as u64 }
    }
    let TestRun { packet, out, context, repeat, flags } = run;
    let before = context.to_vec();
    let ctx_size = size_of_val(context) as u32;
    let (out_ptr, ctx_ptr) = (out.as_mut_ptr(), context.as_mut_ptr());
    let mut attr = Attr {
        prog_fd: raw(prog),
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: unless_empty(out, out_ptr),
        repeat,
        duration: 0,
        ctx_size_in: ctx_size,
        ctx_size_out: if flags & LIVE_FRAMES == 0 { ctx_size } else { 0 },
        ctx_in: unless_empty(&before, before.as_ptr()),
        ctx_out: if flags & LIVE_FRAMES == 0 { unless_empty(context, ctx_ptr) } else { 0 },
        flags,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    bpf(cmd::PROG_TEST_RUN, &mut attr)?;
    Ok(Ran { verdict: attr.retval, duration: attr.duration, len: attr.data_size_out as usize })
}

/// One eBPF instruction (`struct bpf_insn`) as the kernel reads it.
pub const fn instruction(code: u8, dst: u8, src: u8, off: i16, imm: u32) -> u64 {
    code as u64 | ((src << 4 | dst) as u64) << 8 | (off.cast_unsigned() as u64) << 16 | (imm as u64) << 32
}

/// Loads a classifier given as instructions.
pub fn prog_load_sched_cls(name: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
    prog_load(PROG_TYPE_SCHED_CLS, name, instructions)
}

/// Loads an XDP program given as instructions.
pub fn prog_load_xdp(name: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
    prog_load(PROG_TYPE_XDP, name, instructions)
}

fn prog_load(kind: u32, name: &str, instructions: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let mut attr = Attr {
        kind,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: object_name(name),
    };
    owned(bpf(cmd::PROG_LOAD, &mut attr)?)
}

#[cfg(test)]
mod tests {
    use super::{Layout, object_name};

    #[test]
    fn names_are_cut_to_the_kernels_length() {
        assert_eq!(&object_name("rn_svc4"), b"rn_svc4\0\0\0\0\0\0\0\0\0");
        assert_eq!(&object_name("a_name_longer_than_that"), b"a_name_longer_t\0");
    }

    #[test]
    fn a_layout_reads_well() {
        let layout = Layout { kind: 9, key_size: 16, value_size: 56, max_entries: 4096, flags: 0 };
        assert_eq!(layout.to_string(), "lru_hash, key 16 B, value 56 B, 4096 entries, flags 0x0");
    }
}
