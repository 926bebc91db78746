//! `rn_svc4_v2` and `rn_svc6_v2`: what a virtual address and port stands for.

use crate::addr::{Ip4, Ip6};
use crate::shared_type;

/// Key of `rn_svc4_v2` and `rn_svc6_v2`. The key with port 0 and protocol 0 says "this address is a
/// VIP of ours", so that an unknown port of it can be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(Hash, PartialOrd, Ord))]
#[repr(C)]
pub struct SvcKey<A> {
    /// The virtual address.
    pub vip: A,
    /// Port, host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// See [`scope`].
    pub scope: u8,
}

/// Who asks. One VIP can have other backends for traffic from outside.
pub mod scope {
    /// Pods and the host of this node, at any address of a Service.
    pub const CLUSTER: u8 = 0;
    /// Whoever comes in by a device of this node, at node ports, load balancers' addresses and external IPs.
    pub const EXTERNAL: u8 = 1;
}

/// Value of `rn_svc4_v2` and `rn_svc6_v2`: a range of `rn_backend_ids`. One update of this entry
/// flips a service to its new backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SvcEntry {
    /// Index of the first backend's id in `rn_backend_ids`.
    pub first: u32,
    /// Backends in the range; 0 means reject (or drop, see [`flags::DROP_EMPTY`]).
    pub count: u32,
    /// Stable number of the service port, for affinity and for people; its backends bear it. 0 in
    /// wildcard entries.
    pub id: u32,
    /// Session affinity in seconds; 0 is none.
    pub affinity: u32,
    /// See [`flags`].
    pub flags: u16,
    /// Unit of `rn_maglev` that the table of the set begins with; 0: the flow's hash chooses without one. Earlier releases left 0 and
    /// do not look.
    pub table: u16,
}

/// Bits of [`SvcEntry::flags`].
pub mod flags {
    /// Traffic policy Local and no endpoint here: drop silently instead of refusing (KEP-2086).
    pub const DROP_EMPTY: u16 = 1;
    /// The wildcard entry of a VIP.
    pub const VIP: u16 = 2;
    /// The wildcard entry of an address that machines outside may have, too: a load balancer's, or an external IP.
    pub const SHARED: u16 = 4;
    /// Only clients that `rn_source_ranges` has for this address, port and protocol may come by it.
    pub const SOURCE_RANGES: u16 = 8;
    /// A backend is this node at the very port of the entry: its server may bind it. In entries of loopback addresses alone.
    pub const OWN_PORT: u16 = 16;
    /// Backends on other nodes answer clients outside directly (DSR). In entries of [`scope::EXTERNAL`](super::scope::EXTERNAL) alone.
    pub const DIRECT: u16 = 32;
}

shared_type!(SvcKey<Ip4>, 8);
shared_type!(SvcKey<Ip6>, 20);
shared_type!(SvcEntry, 20);
