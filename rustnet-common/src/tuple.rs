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
    /// In a key of the connection table, its slot: 0, or [`SLOT_CONTESTED`](crate::conntrack::SLOT_CONTESTED). Else zero.
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

    /// Sets all fields to zero.
    #[inline(always)]
    pub fn clear(&mut self) {
        (self.src, self.dst, self.sport, self.dport) = (A::UNSPECIFIED, A::UNSPECIFIED, 0, 0);
        (self.proto, self.pad, self.pad2) = (0, 0, 0);
    }

    /// As [`Tuple::reversed`], field by field: a copy of a whole tuple costs the kernel side stack.
    #[inline(always)]
    pub fn store_reversed(&self, out: &mut Self) {
        (out.src, out.dst, out.sport, out.dport) = (self.dst, self.src, self.dport, self.sport);
        (out.proto, out.pad, out.pad2) = (self.proto, 0, 0);
    }

    /// True if the canonical form of this tuple is the tuple reversed.
    #[inline(always)]
    pub fn is_swapped(&self) -> bool {
        let (s, d) = (self.src.order(), self.dst.order());
        if s == d { self.sport > self.dport } else { s > d }
    }

    /// [`Tuple::is_swapped`] of the tuple reversed.
    #[inline(always)]
    pub fn is_reverse_swapped(&self) -> bool {
        let (s, d) = (self.src.order(), self.dst.order());
        if s == d { self.dport > self.sport } else { d > s }
    }

    /// The form that both directions of a flow have in common: the smaller (address, port) is the source.
    #[inline(always)]
    #[must_use]
    pub fn canonical(&self) -> Self {
        if self.is_swapped() { self.reversed() } else { Self { pad: 0, pad2: 0, ..*self } }
    }

    /// Stores the canonical form of this tuple reversed, field by field: copies of whole tuples cost the kernel side stack.
    /// Returns [`Tuple::is_reverse_swapped`].
    #[inline(always)]
    pub fn store_reverse_canonical(&self, out: &mut Self) -> bool {
        let is_swapped = self.is_reverse_swapped();
        if is_swapped {
            (out.src, out.dst, out.sport, out.dport) = (self.src, self.dst, self.sport, self.dport);
        } else {
            (out.src, out.dst, out.sport, out.dport) = (self.dst, self.src, self.dport, self.sport);
        }
        (out.proto, out.pad, out.pad2) = (self.proto, 0, 0);
        is_swapped
    }

    /// True if `other` is this tuple reversed.
    #[inline(always)]
    pub fn is_reverse_of(&self, other: &Self) -> bool {
        self.src == other.dst
            && self.dst == other.src
            && self.sport == other.dport
            && self.dport == other.sport
            && self.proto == other.proto
    }
}

/// IP protocol numbers that the datapath knows.
pub mod proto {
    /// ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// IPv4 in IP (RFC 2003).
    pub const IPIP: u8 = 4;
    /// TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// DCCP (RFC 4340).
    pub const DCCP: u8 = 33;
    /// IPv6 in IP (RFC 2473).
    pub const IPV6: u8 = 41;
    /// ICMPv6 (RFC 4443).
    pub const ICMPV6: u8 = 58;
    /// SCTP (RFC 9260).
    pub const SCTP: u8 = 132;
    /// UDP-Lite (RFC 3828).
    pub const UDPLITE: u8 = 136;

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

#[cfg(test)]
mod tests {
    use super::{Address, Ip4, Ip6, Tuple};

    fn check<A: Address + core::fmt::Debug>(addresses: [A; 3]) {
        for src in addresses {
            for dst in addresses {
                for (sport, dport) in [(1, 2), (2, 1), (7, 7)] {
                    let t = Tuple { src, dst, sport, dport, proto: 6, pad: 0, pad2: 0 };
                    let back = t.reversed();
                    assert!(t.canonical() == back.canonical(), "{t:?}");
                    assert!(!t.canonical().is_swapped());
                    assert_eq!(t.is_reverse_swapped(), back.is_swapped());
                    let mut stored = Tuple { pad: 1, ..t };
                    assert_eq!(t.store_reverse_canonical(&mut stored), back.is_swapped());
                    assert!(stored == back.canonical() && stored.pad == 0, "{t:?}");
                    assert!(t.is_reverse_of(&back) && t.is_reverse_of(&t) == (t == back), "{t:?}");
                }
            }
        }
    }

    #[test]
    fn both_directions_have_one_canonical_form() {
        check([Ip4 { ip: [10, 0, 0, 1] }, Ip4 { ip: [10, 0, 0, 2] }, Ip4 { ip: [9, 200, 0, 1] }]);
        let v6 = |last, first| Ip6 { ip: [first, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last] };
        check([v6(1, 0xfd), v6(2, 0xfd), v6(1, 0x20)]);
    }
}
