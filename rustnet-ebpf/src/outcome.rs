//! How a step ends: success, or the reason why a packet is dropped.

use rustnet_common::drop::DropReason;

/// A packet that goes no further. The reason decides whether its sender gets an answer.
#[derive(Clone, Copy)]
pub struct Dropped {
    /// The reason.
    pub reason: DropReason,
    /// For [`DropReason::FragNeeded`]: the MTU of the path, in bytes.
    pub mtu: u32,
}

/// The result of a function that is not inlined, in one register: 0 in the low byte and a value above, or a reason and an
/// MTU. A `Result` in such a signature would put a Rust enum into the object's BTF, which the kernel refuses.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct PackedResult {
    bits: u64,
}

impl PackedResult {
    /// Packs a result.
    #[inline(always)]
    pub fn new(result: Result<i32, Dropped>) -> Self {
        let bits = match result {
            Ok(value) => u64::from(value as u32) << 32,
            Err(dropped) => u64::from(dropped.reason as u8) | u64::from(dropped.mtu) << 32,
        };
        Self { bits }
    }

    /// As a register.
    #[inline(always)]
    pub fn bits(self) -> u64 {
        self.bits
    }

    /// From a register that [`PackedResult::bits`] filled.
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        Self { bits }
    }

    /// Unpacks the result. A code that no reason has counts as malformed.
    #[inline(always)]
    pub fn result(self) -> Result<i32, Dropped> {
        let high = (self.bits >> 32) as u32;
        match self.bits as u8 {
            0 => Ok(high as i32),
            code => {
                let reason = DropReason::from_code(code).unwrap_or(DropReason::Malformed);
                Err(Dropped { reason, mtu: high })
            }
        }
    }

    /// The result of a function that returns nothing but success.
    #[inline(always)]
    pub fn into_unit(self) -> Result<(), DropReason> {
        self.result().map(|_| ()).map_err(|dropped| dropped.reason)
    }
}

impl From<DropReason> for Dropped {
    #[inline(always)]
    fn from(reason: DropReason) -> Self {
        Self { reason, mtu: 0 }
    }
}
