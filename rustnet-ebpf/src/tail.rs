//! Jumps from one program to another of the same load.

use aya_ebpf::programs::TcContext;
use rustnet_common::names::TAILS;

use crate::maps;

/// Index of `tunnel_in`.
pub const TUNNEL_IN: u32 = 0;
/// Index of `uplink_in`.
pub const UPLINK_IN: u32 = 1;
/// Index of `external_in`.
pub const EXTERNAL_IN: u32 = 2;

/// Index of `direct_out`.
pub const DIRECT_OUT: u32 = 3;
/// Index of `direct_in`.
pub const DIRECT_IN: u32 = 4;
/// Index of `fragment_in`.
pub const FRAGMENT_IN: u32 = 5;

const _: () = assert!(TAILS.len() == 6);

/// Goes on in another program, for good. Returns where there is none.
#[inline(always)]
pub fn jump(ctx: &TcContext, index: u32) {
    // SAFETY: no value of this program is needed afterwards, and the other one is of the same type.
    unsafe { maps::rn_tails.tail_call(ctx, index) }
}

/// Says that the packet in hand has been in `tunnel_in`.
#[inline(always)]
pub fn leave() {
    if let Some(left) = maps::rn_left.get_ptr_mut(0) {
        // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
        unsafe { *left = 1 }
    }
}

/// True if the packet in hand has been in `tunnel_in`; the next one has not.
#[inline(always)]
pub fn is_left() -> bool {
    let Some(left) = maps::rn_left.get_ptr_mut(0) else { return true };
    // SAFETY: see `leave`.
    unsafe {
        let is_left = *left != 0;
        if is_left {
            *left = 0;
        }
        is_left
    }
}
