//! `rn_ct4/6`: one table for connections and for every address translation.
//!
//! A connection has two halves: the key of each is the tuple of one direction *as it arrives*, its value says what that
//! direction becomes (`to`). Hence each half holds all that is needed to rebuild the other: the other half's key is
//! `to.reversed()`, and its `to` is `key.reversed()`. An LRU eviction of one half is mended by the next packet of the other.

use crate::addr::{Ip4, Ip6};
use crate::shared_type;
use crate::tuple::Tuple;

/// Value of `rn_ct4/6`: one half of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CtEntry<A> {
    /// What a packet of this half becomes; equal to the key where nothing is translated.
    pub to: Tuple<A>,
    /// See [`flags`].
    pub flags: u16,
    /// See [`state`]; the same in both halves.
    pub state: u8,
    /// Zero.
    pub pad: u8,
    /// Low 32 bits of jiffies when this connection was last seen; refreshed once a second.
    pub seen: u32,
    /// Interface whose source address was verified for this half; 0 until one was.
    pub ifindex: u32,
    /// Id of the chosen backend, 0 where no service was involved.
    pub backend: u32,
    /// Interface of the pod of this node that this half leads to, with [`QUEUED`]; [`ELSEWHERE`]; or 0 until looked up. Looked up
    /// once a second, for that look-up would be a fifth of what an established flow costs.
    pub out: u32,
    /// What was verified together with `ifindex`, in memory order: a pod's MAC, or the last bytes of a tunnel's far end.
    pub guard: [u16; 3],
    /// Zero.
    pub pad2: [u16; 3],
    /// Packets of this half.
    pub packets: u64,
    /// Bytes of this half (frames, as the hook saw them).
    pub bytes: u64,
}

/// [`CtEntry::out`] of a half that leads to no pod of this node.
pub const ELSEWHERE: u32 = u32::MAX;

/// Added to the interface in [`CtEntry::out`] if packets have to pass its queue
/// ([`QUEUED`](crate::endpoint::flags::QUEUED)). Interface indices are positive and signed, so that the bit is free.
pub const QUEUED: u32 = 1 << 31;

/// Bits of [`CtEntry::flags`].
pub mod flags {
    /// This half is the answering direction.
    pub const REPLY: u16 = 1;
    /// `to` differs from the key.
    pub const NAT: u16 = 2;
    /// A pod that reaches itself through a VIP; policy does not apply.
    pub const HAIRPIN: u16 = 4;
    /// The source was masqueraded by this node.
    pub const MASQ: u16 = 8;
    /// Opened by this node's host.
    pub const FROM_HOST: u16 = 16;
}

/// Bits of [`CtEntry::state`].
pub mod state {
    /// The answering side has spoken.
    pub const ANSWERED: u8 = 1;
    /// FIN from the opening side.
    pub const FIN_ORIG: u8 = 2;
    /// FIN from the answering side.
    pub const FIN_REPLY: u8 = 4;
    /// RST from either side.
    pub const RST: u8 = 8;
    /// Either side is closing for good: both FINs, or a RST.
    pub const fn closing(state: u8) -> bool {
        state & RST != 0 || state & (FIN_ORIG | FIN_REPLY) == FIN_ORIG | FIN_REPLY
    }
}

/// Seconds that a connection may stay silent before it is collected (Cilium's defaults).
pub const fn lifetime(proto: u8, state: u8) -> u32 {
    match proto {
        crate::tuple::proto::TCP if state::closing(state) => 10,
        crate::tuple::proto::TCP if state & state::ANSWERED != 0 => 8000,
        _ => 60,
    }
}

shared_type!(CtEntry<Ip4>, 64);
shared_type!(CtEntry<Ip6>, 88);
