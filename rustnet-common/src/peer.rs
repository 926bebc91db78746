//! `rn_peers4/6`: what lies behind an address that is not a pod of this node.

use crate::addr::{Addr, Ip4, Ip6};
use crate::shared_type;

/// Key of `rn_peers4/6`, as a longest-prefix-match trie wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct PeerKey<A> {
    /// Length of the prefix in bits.
    pub prefix_len: u32,
    /// The prefix.
    pub data: A,
}

/// Value of `rn_peers4/6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Peer {
    /// The node that the prefix lives on: the tunnel's far end. Unspecified when there is none.
    pub node: Addr,
    /// One of [`identity`], or a pod's own later.
    pub identity: u32,
    /// See [`flags`].
    pub flags: u16,
    /// Zero.
    pub pad: u16,
}

/// Bits of [`Peer::flags`].
pub mod flags {
    /// An address of this node: the host's stack has it.
    pub const HOST: u16 = 1;
    /// Another node's own address.
    pub const NODE: u16 = 2;
    /// Another node's pods.
    pub const POD: u16 = 4;
    /// Reached through the overlay; without it, by the kernel's routes.
    pub const TUNNEL: u16 = 8;
    /// Pods keep their address when they talk to it (no masquerade).
    pub const NO_MASQ: u16 = 16;
    /// The pod range of this node itself: an address in it that is no endpoint does not exist.
    pub const LOCAL_PODS: u16 = 32;
    /// A range of Services: an address in it that none of them has does not exist.
    pub const SERVICES: u16 = 64;
}

/// Reserved identities.
pub mod identity {
    /// Nothing known of it: the outside world.
    pub const WORLD: u32 = 2;
    /// This node's host.
    pub const HOST: u32 = 1;
    /// Another node's host.
    pub const NODE: u32 = 6;
    /// A pod whose labels are not known.
    pub const POD: u32 = 3;
}

shared_type!(PeerKey<Ip4>, 8);
shared_type!(PeerKey<Ip6>, 20);
shared_type!(Peer, 24);
