//! The context of XDP programs. Contract: what [`crate::ctx`] asks of a context. Only skeletons run in it as yet.

use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::generated as helper;

use crate::ctx::{Ctx, masked, pointer};

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
}
