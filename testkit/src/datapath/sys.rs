//! The calls to bpf(2) that the packet tests and the benchmarks need, and nothing above them.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const MAP_GET_NEXT_KEY: u32 = 4;
const PROG_LOAD: u32 = 5;
const PROG_TEST_RUN: u32 = 10;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;

const MAP_TYPE_PROG_ARRAY: u32 = 3;
const PROG_TYPE_SCHED_CLS: u32 = 3;

/// `struct bpf_map_info` begins so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MapInfo {
    /// Map type.
    pub kind: u32,
    /// Identifier.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Elements at most.
    pub max_entries: u32,
}

fn bpf<T>(command: u32, attr: &mut T) -> Result<i64> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` for this command; callers keep alive what it points to.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if rc < 0 { Err(Error::last_os_error()) } else { Ok(rc) }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just given us this descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element(map: BorrowedFd<'_>, key: &[u8], value: u64) -> Element {
    Element { map: map.as_raw_fd().cast_unsigned(), pad: 0, key: key.as_ptr() as u64, value, flags: 0 }
}

fn found(result: Result<i64>) -> Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Reads an element into `value`; false if there is none.
pub fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> Result<bool> {
    found(bpf(MAP_LOOKUP_ELEM, &mut element(map, key, value.as_mut_ptr() as u64)))
}

/// Writes an element.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> Result<()> {
    bpf(MAP_UPDATE_ELEM, &mut element(map, key, value.as_ptr() as u64)).map(drop)
}

/// Deletes an element; false if there was none.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> Result<bool> {
    found(bpf(MAP_DELETE_ELEM, &mut element(map, key, 0)))
}

/// The key behind `key`, or the first; false at the end.
pub fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool> {
    let mut attr = element(map, key.unwrap_or_default(), next.as_mut_ptr() as u64);
    if key.is_none() {
        attr.key = 0;
    }
    found(bpf(MAP_GET_NEXT_KEY, &mut attr))
}

#[repr(C)]
struct Batch {
    first: u64,
    position: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes many elements at once; keys and values stand side by side.
pub fn update_batch(map: BorrowedFd<'_>, keys: &[u8], values: &[u8], count: u32) -> Result<()> {
    let (keys, values) = (keys.as_ptr() as u64, values.as_ptr() as u64);
    let map = map.as_raw_fd().cast_unsigned();
    let mut attr = Batch { first: 0, position: 0, keys, values, count, map, elem_flags: 0, flags: 0 };
    bpf(MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// Reads the first `count` elements of an array at once.
pub fn lookup_batch(map: BorrowedFd<'_>, values: &mut [u8], count: u32) -> Result<()> {
    let mut keys = vec![0_u32; count as usize];
    let mut position = 0_u32;
    let mut attr = Batch {
        first: 0,
        position: (&raw mut position) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map: map.as_raw_fd().cast_unsigned(),
        elem_flags: 0,
        flags: 0,
    };
    // "Not found" says that the end was reached.
    found(bpf(MAP_LOOKUP_BATCH, &mut attr))?;
    if attr.count == count { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

/// What the kernel says of a map.
pub fn map_info(map: BorrowedFd<'_>) -> Result<MapInfo> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = MapInfo::default();
    let mut attr =
        Attr { fd: map.as_raw_fd().cast_unsigned(), len: size_of::<MapInfo>() as u32, info: (&raw mut info) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// A map of programs to jump to.
pub fn prog_array(entries: u32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        flags: u32,
    }
    bpf(MAP_CREATE, &mut Attr { kind: MAP_TYPE_PROG_ARRAY, key_size: 4, value_size: 4, max_entries: entries, flags: 0 })
        .map(owned)
}

/// One instruction.
pub const fn instruction(code: u8, dst: u8, src: u8, off: i16, imm: u32) -> u64 {
    code as u64 | ((src << 4 | dst) as u64) << 8 | (off.cast_unsigned() as u64) << 16 | (imm as u64) << 32
}

/// Loads a classifier given as instructions.
pub fn load_classifier(instructions: &[u64]) -> Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
    }
    let license = c"GPL";
    let mut attr = Attr {
        kind: PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
    };
    bpf(PROG_LOAD, &mut attr).map(owned)
}

/// `struct __sk_buff` (uapi/linux/bpf.h) as words.
pub type SkBuff = [u32; 48];

/// Words of [`SkBuff`] that tests set or read.
pub mod word {
    /// The packet's mark.
    pub const MARK: usize = 2;
    /// The device.
    pub const IFINDEX: usize = 10;
    /// The first of five words for whoever works on the packet.
    pub const CB: usize = 12;
    /// Segments of a GSO frame.
    pub const GSO_SEGS: usize = 41;
    /// Payload of one of them.
    pub const GSO_SIZE: usize = 44;
}

/// What a run gave.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// What the program returned.
    pub verdict: i32,
    /// Mean duration in nanoseconds.
    pub duration: u32,
    /// Length of the packet afterwards.
    pub len: usize,
}

/// The packet comes as from a device that sums up all of it (`CHECKSUM_COMPLETE`); EBADMSG if that sum is wrong afterwards.
pub const CHECKSUM_COMPLETE: u32 = 4;

/// Runs a program (`BPF_PROG_TEST_RUN`). The context is read and written; `out` receives the packet.
pub fn test_run(
    prog: BorrowedFd<'_>,
    packet: &[u8],
    context: &mut SkBuff,
    out: &mut [u8],
    repeat: u32,
    flags: u32,
) -> Result<Ran> {
    #[repr(C)]
    struct Attr {
        prog: u32,
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
    let before = *context;
    let mut attr = Attr {
        prog: prog.as_raw_fd().cast_unsigned(),
        retval: 0,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        duration: 0,
        ctx_size_in: size_of::<SkBuff>() as u32,
        ctx_size_out: size_of::<SkBuff>() as u32,
        ctx_in: before.as_ptr() as u64,
        ctx_out: context.as_mut_ptr() as u64,
        flags,
        cpu: 0,
        batch_size: 0,
        pad: 0,
    };
    bpf(PROG_TEST_RUN, &mut attr)?;
    Ok(Ran { verdict: attr.retval.cast_signed(), duration: attr.duration, len: attr.data_size_out as usize })
}
