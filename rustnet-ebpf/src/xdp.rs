//! The context of XDP programs. Contract: what [`crate::ctx`] asks of a context.

use aya_ebpf::bindings::xdp_md;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::csum::{self, Sum};

use crate::ctx::{Checksums, Ctx, at, masked, pointer};

/// The context of XDP programs. A frame lies in one piece; devices that deliver fragments refuse such programs.
#[derive(Clone, Copy)]
pub struct Xdp(pub *mut xdp_md);

impl Xdp {
    /// The raw pointer as helpers take it.
    #[inline(always)]
    pub fn raw(&self) -> *mut xdp_md {
        self.0
    }
}

impl Ctx for Xdp {
    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.0.cast()
    }
    #[inline(always)]
    fn data(&self) -> usize {
        pointer::<{ core::mem::offset_of!(xdp_md, data) }, _>(self.0)
    }
    #[inline(always)]
    fn data_end(&self) -> usize {
        pointer::<{ core::mem::offset_of!(xdp_md, data_end) }, _>(self.0)
    }
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: no pointers but the context, which the kernel hands to the program.
        unsafe { helper::bpf_xdp_get_buff_len(self.0) as u32 }
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a valid context; the verifier rewrites this load.
        unsafe { (*self.0).ingress_ifindex }
    }
    #[inline(always)]
    fn pull(&self, _len: u32) -> bool {
        false
    }
    #[inline(always)]
    fn load(&self, offset: u32, to: &mut [u8; 64], len: u32) -> bool {
        let len = masked::<63>(len.wrapping_sub(1) as usize) as u32 + 1;
        // SAFETY: `len` is at most the length of the array; the helper checks it against the frame.
        unsafe { helper::bpf_xdp_load_bytes(self.0, offset, to.as_mut_ptr().cast(), len) == 0 }
    }
    #[inline(always)]
    fn gso_size(&self) -> u32 {
        0
    }
    #[inline(always)]
    fn gso_segs(&self) -> u32 {
        0
    }
}

/// A frame that a device has received has all its checksums, and no sum of the whole packet goes with it.
impl Checksums for Xdp {
    #[inline(always)]
    fn l4_csum_replace(&self, offset: usize, diff: Sum, _pseudo: bool, zero_is_none: bool, _v6: bool) -> bool {
        let Some(field) = at::<u16, _>(self, offset) else { return false };
        // SAFETY: `at` proved two bytes.
        unsafe {
            let csum = csum::update(field.read(), diff);
            // Of UDP, 0 stands for "none", and all ones are the same number.
            field.write(if zero_is_none && csum == 0 { u16::MAX } else { csum });
        }
        true
    }
    #[inline(always)]
    fn ports_csum_replace(&self, offset: usize, _before: (u16, Sum), diff: Sum, zero_is_none: bool) -> bool {
        self.l4_csum_replace(offset, diff, false, zero_is_none, false)
    }
    #[inline(always)]
    fn update_csum(&self, _diff: Sum) {}
    #[inline(always)]
    fn set_csum(&self, _sum: Sum) {}
}
