//! What the kernel side and user space share: map keys and values, names, and the pure arithmetic both use. No I/O.
//!
//! Rules of this room: every shared type is `repr(C)`, has no implicit padding and asserts its size; ports are in host
//! byte order everywhere but on the wire; addresses are byte arrays in network order, so that `bpftool map dump` reads well.
#![cfg_attr(not(feature = "user"), no_std)]

pub mod addr;
pub mod affinity;
pub mod backend;
pub mod config;
pub mod conntrack;
pub mod crc32c;
pub mod csum;
pub mod device;
pub mod drop;
pub mod endpoint;
pub mod event;
pub mod frag;
pub mod hash;
pub mod host_port;
pub mod log;
pub mod maglev;
pub mod names;
pub mod peer;
pub mod policy;
pub mod service;
pub mod socket;
pub mod source_range;
pub mod tuple;
pub mod v1;

#[cfg(feature = "user")]
pub mod files;

/// Declares that a type shared with the kernel has exactly this size, so that the compiler adds no
/// padding, and (for user space) that it may be viewed as bytes.
#[macro_export]
macro_rules! shared_type {
    ($t:ty, $size:expr) => {
        const _: () = assert!(core::mem::size_of::<$t>() == $size);
        // SAFETY: the type is `repr(C)`, all its fields are integers or arrays of them, every bit pattern is valid,
        // and the size asserted above equals the sum of the fields, so that there is no padding.
        #[cfg(feature = "user")]
        unsafe impl bytemuck::Zeroable for $t {}
        // SAFETY: as above.
        #[cfg(feature = "user")]
        unsafe impl bytemuck::Pod for $t {}
    };
}
