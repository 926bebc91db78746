//! What the skeleton of the next stage's program decides, for the tests that compare it (see rustnet-ebpf's `skeleton`).

use crate::addr::Addr;
use crate::shared_type;

/// What becomes of a packet.
pub mod verdict {
    /// Nothing of ours: the stack goes on with it.
    pub const STACK: u32 = 1;
    /// It is dropped or refused, see [`super::Decision::detail`].
    pub const DROP: u32 = 2;
    /// It goes to a pod of this node, see [`super::Decision::detail`], or to a backend.
    pub const FORWARD: u32 = 3;
}

/// Element of `rn_decision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Decision {
    /// See [`verdict`].
    pub verdict: u32,
    /// Of a drop: the code of its reason. Of a packet to a pod: its interface.
    pub detail: u32,
    /// The source that it leaves with.
    pub src: Addr,
    /// The destination that it leaves with.
    pub dst: Addr,
    /// The source port that it leaves with.
    pub sport: u16,
    /// The destination port that it leaves with.
    pub dport: u16,
    /// The hop limit that it leaves with.
    pub ttl: u32,
}

shared_type!(Decision, 48);
