//! `rn_frag4_v2`, `rn_frag6_v2`: which ports the later fragments of a datagram belong to.

use crate::addr::{Ip4, Ip6};
use crate::shared_type;

/// Key of `rn_frag4_v2` and `rn_frag6_v2` (RFC 791, 2.3; RFC 8200, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FragKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Identification as it stands on the wire.
    pub id: u32,
    /// Protocol of the datagram for IPv4, 0 for IPv6, whose fragments are identified without it (RFC 8200, 4.5).
    pub proto: u32,
    /// Interface that the fragments came in by: one sender cannot name the ports of another's.
    pub ifindex: u32,
}

/// Value of `rn_frag4_v2` and `rn_frag6_v2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FragPorts {
    /// Source port, host order.
    pub sport: u16,
    /// Destination port, host order.
    pub dport: u16,
    /// The transport protocol.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 3],
}

shared_type!(FragKey<Ip4>, 20);
shared_type!(FragKey<Ip6>, 44);
shared_type!(FragPorts, 8);
