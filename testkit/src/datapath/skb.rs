//! `struct __sk_buff` (uapi/linux/bpf.h), the context of a run, as words.

/// All of it.
pub type SkBuff = [u32; 48];

/// Words of [`SkBuff`] that tests set or read.
pub mod word {
    /// The packet's mark.
    pub const MARK: usize = 2;
    /// The device that a forwarded packet came in by.
    pub const INGRESS: usize = 9;
    /// The device.
    pub const IFINDEX: usize = 10;
    /// The first of five words for whoever works on the packet.
    pub const CB: usize = 12;
    /// Segments of a GSO frame.
    pub const GSO_SEGS: usize = 41;
    /// Payload of one of them.
    pub const GSO_SIZE: usize = 44;
}

/// The packet comes as from a device that sums up all of it (`CHECKSUM_COMPLETE`); EBADMSG if that sum is wrong afterwards.
pub const CHECKSUM_COMPLETE: u32 = 4;
