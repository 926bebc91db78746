//! One file a hook (or pair of hooks): which steps run, in which order. No hook writes a packet byte.

pub mod from_pod;
pub mod overlay;
pub mod to_pod;
pub mod uplink;

use rustnet_common::names::MARK_DONE;

use crate::ctx::Skb;

/// True if an earlier hook of this node is done with the packet; takes the mark off.
#[inline(always)]
pub fn done(skb: &Skb) -> bool {
    let mark = skb.mark();
    if mark & MARK_DONE == 0 {
        return false;
    }
    skb.set_mark(mark & !MARK_DONE);
    true
}
