//! The steps of the packet path; each states its contract at its top. Hooks put them in order, none writes packet bytes.

pub mod conntrack;
pub mod forward;
pub mod icmp;
pub mod lb;
pub mod reject;
pub mod route;
pub mod source;

use rustnet_common::drop::DropReason;

/// Why a packet goes no further. The reason decides whether the sender is told.
#[derive(Clone, Copy)]
pub struct Stop {
    /// The reason.
    pub reason: DropReason,
    /// For [`DropReason::FragNeeded`]: what would fit.
    pub mtu: u32,
}

/// The result of a function that is not inlined, in one register: 0 in the low byte and a value above, or a reason and an
/// MTU. A `Result` in such a signature would put a Rust enum into the object's BTF, which the kernel refuses.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Packed {
    bits: u64,
}

impl Packed {
    /// Packs a result.
    #[inline(always)]
    pub fn new(result: Result<i32, Stop>) -> Self {
        let bits = match result {
            Ok(value) => u64::from(value as u32) << 32,
            Err(stop) => u64::from(stop.reason as u8) | u64::from(stop.mtu) << 32,
        };
        Self { bits }
    }

    /// As a register.
    #[inline(always)]
    pub fn bits(self) -> u64 {
        self.bits
    }

    /// From a register that [`Packed::bits`] filled.
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        Self { bits }
    }

    /// The result that was packed.
    #[inline(always)]
    pub fn result(self) -> Result<i32, Stop> {
        let high = (self.bits >> 32) as u32;
        match self.bits as u8 {
            0 => Ok(high as i32),
            // SAFETY: the byte was made from a `DropReason` by `new`.
            code => Err(Stop { reason: unsafe { core::mem::transmute::<u8, DropReason>(code) }, mtu: high }),
        }
    }

    /// The result of a function that gives nothing but success.
    #[inline(always)]
    pub fn done(self) -> Result<(), DropReason> {
        self.result().map(|_| ()).map_err(|stop| stop.reason)
    }
}

impl From<DropReason> for Stop {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self { reason, mtu: 0 }
    }
}
