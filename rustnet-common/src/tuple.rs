//! The 5-tuple, key of the connection table.

use crate::addr::{Address, Ip4, Ip6};
use crate::shared_type;

/// A flow as one direction of it shows on the wire. ICMP echo carries its identifier in `sport` for requests and in
/// `dport` for replies, so that [`Tuple::reversed`] of a request is the tuple of its reply.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "user", derive(PartialOrd, Ord))]
#[repr(C)]
pub struct Tuple<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Source port, host order.
    pub sport: u16,
    /// Destination port, host order.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
    /// Zero.
    pub pad2: u16,
}

/// The tuple of an IPv4 flow.
pub type Tuple4 = Tuple<Ip4>;
/// The tuple of an IPv6 flow.
pub type Tuple6 = Tuple<Ip6>;

shared_type!(Tuple4, 16);
shared_type!(Tuple6, 40);

// By hand, because the derived one is not inlined on the kernel side. The padding is always zero.
impl<A: PartialEq> PartialEq for Tuple<A> {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        self.src == other.src
            && self.dst == other.dst
            && self.sport == other.sport
            && self.dport == other.dport
            && self.proto == other.proto
    }
}
impl<A: Eq> Eq for Tuple<A> {}

#[cfg(feature = "user")]
impl<A: core::hash::Hash> core::hash::Hash for Tuple<A> {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        (&self.src, &self.dst, self.sport, self.dport, self.proto).hash(state);
    }
}

impl<A: Address> Tuple<A> {
    /// The tuple of the same flow seen from the other side.
    #[inline(always)]
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, sport: self.dport, dport: self.sport, proto: self.proto, pad: 0, pad2: 0 }
    }
}

/// IP protocol numbers that the datapath knows.
pub mod proto {
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;

    /// The name that Kubernetes and people use.
    pub const fn name(proto: u8) -> &'static str {
        match proto {
            ICMP => "ICMP",
            TCP => "TCP",
            UDP => "UDP",
            ICMPV6 => "ICMPv6",
            SCTP => "SCTP",
            _ => "other",
        }
    }
}
