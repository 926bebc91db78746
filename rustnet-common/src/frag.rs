//! `rn_frag4/6`: which ports the later fragments of a datagram belong to.

use crate::addr::{Ip4, Ip6};
use crate::shared_type;

/// Key of `rn_frag4/6` (RFC 791, 2.3; RFC 8200, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FragKey<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Identification as it stands on the wire.
    pub id: u32,
    /// Protocol of the datagram.
    pub proto: u32,
}

/// Value of `rn_frag4/6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FragPorts {
    /// Source port, host order.
    pub sport: u16,
    /// Destination port, host order.
    pub dport: u16,
}

shared_type!(FragKey<Ip4>, 16);
shared_type!(FragKey<Ip6>, 40);
shared_type!(FragPorts, 4);
