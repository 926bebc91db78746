//! `rn_ct4_tcp`, `rn_ct4_any`, `rn_ct6_tcp`, `rn_ct6_any`: one table for connections and for every address translation.
//!
//! The key is the tuple in canonical order ([`Tuple::canonical`]): both directions of a flow have the same.
//! A flow that nothing translates has one entry. A translated flow has two, one per direction, for its tuples before and after
//! translation differ. Each of the two serves only the packets of its own direction ([`flags::SWAPPED`] says which that is), and
//! holds all that is needed to rebuild the other: the other entry serves `to.reversed()`, and its `to` is that packet's tuple
//! reversed.
//!
//! Two translated flows can want one key for opposite directions. The second of them stands in slot [`SLOT_CONTESTED`].

use crate::addr::{Address, Ip4, Ip6};
use crate::shared_type;
use crate::tuple::Tuple;

/// [`Tuple::pad`] of a key whose regular place belongs to a flow of the opposite direction.
pub const SLOT_CONTESTED: u8 = 1;

/// Value of the connection tables: a flow, or one direction of a translated flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct CtEntry<A> {
    /// What a packet becomes. Of a flow that nothing translates, the tuple of its first packet.
    pub to: Tuple<A>,
    /// See [`flags`].
    pub flags: u16,
    /// Zero.
    pub pad: u16,
    /// Low 32 bits of jiffies when this connection was last seen; refreshed once per second.
    pub seen: u32,
    /// See [`state`]; changed by atomic operations only, the same in both entries of a translated flow. Programs have atomic
    /// operations on words of 64 bits.
    pub state: u64,
    /// Id of the chosen backend, 0 where no service was involved.
    pub backend: u32,
    /// Generation of the policies that allowed this flow ([`crate::policy::Policies`]); zero while there were none.
    pub generation: u32,
    /// Who speaks. Of a flow that nothing translates: the opener, then the other side. Of one direction of a translated flow: its
    /// sender, then its receiver.
    pub sides: [Side; 2],
}

impl<A: Address> CtEntry<A> {
    /// The tuple that the entry was made for: of the original direction, or of the one direction that it serves. `key` is the
    /// entry's own.
    pub fn tuple(&self, key: &Tuple<A>) -> Tuple<A> {
        if self.flags & flags::SWAPPED != 0 { key.reversed() } else { Tuple { pad: 0, ..*key } }
    }

    /// True if some packets of the key that both have are served by either.
    #[inline(always)]
    pub fn is_rival_of(&self, other: &Self) -> bool {
        (self.flags & other.flags & flags::NAT == 0) || (self.flags ^ other.flags) & flags::SWAPPED == 0
    }

    /// True if `other`, an entry for the same packets in another table, was seen later and translates them otherwise: then the
    /// tuple has been given to another flow since.
    #[inline(always)]
    pub fn is_superseded_by(&self, other: &Self) -> bool {
        let is_nat = self.flags & flags::NAT != 0;
        let is_other = is_nat != (other.flags & flags::NAT != 0) || (is_nat && self.to != other.to);
        is_other && is_later(other.seen, self.seen)
    }

    /// True if the entry serves packets of this tuple, whose key it has.
    pub fn serves(&self, tuple: &Tuple<A>) -> bool {
        self.flags & flags::NAT == 0 || (self.flags & flags::SWAPPED != 0) == tuple.is_swapped()
    }
}

/// One side of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Side {
    /// Bytes that it sent (frames, as the hook saw them).
    pub bytes: u64,
    /// What was verified of its source: the MAC of a pod, the far end of the tunnel (all 16 bytes, IPv4 as mapped),
    /// [`SOURCE_OUTSIDE`], [`SOURCE_HOST`] or [`SOURCE_NONE`].
    pub source: [u64; 2],
    /// Packets that it sent.
    pub packets: u32,
    /// Interface of the pod of this node that it is, with [`VIA_QDISC`]; [`NOT_LOCAL`]; or 0 until looked up. An
    /// interface index is never used again before the next boot, so that it is the generation of an endpoint, too: where it
    /// changes, another pod has got the address.
    pub ifindex: u32,
    /// TCP: the sequence number after the last byte that it sent; 0 before the first. Of the receiver in an entry of a translated
    /// flow: the same, as of the last second.
    pub seq_end: u32,
    /// TCP: the highest acknowledgement number that it sent; 0 before the first. Of a receiver, as above.
    pub ack: u32,
}

/// [`Side::source`] of a side that has sent nothing yet: no packet matches it.
pub const SOURCE_NONE: [u64; 2] = [u64::MAX, 0];
/// [`Side::source`] of a packet that came in by an uplink.
pub const SOURCE_OUTSIDE: [u64; 2] = [u64::MAX, 1];
/// [`Side::source`] of a packet of this node's own stack.
pub const SOURCE_HOST: [u64; 2] = [u64::MAX, 2];

/// [`Side::ifindex`] of a side that is no pod of this node.
pub const NOT_LOCAL: u32 = u32::MAX;

/// Added to the interface in [`Side::ifindex`] if packets have to traverse its qdisc
/// ([`VIA_QDISC`](crate::endpoint::flags::VIA_QDISC)). Interface indices are positive and signed, so that the bit is free.
pub const VIA_QDISC: u32 = 1 << 31;

/// Bits of [`CtEntry::flags`].
pub mod flags {
    /// This entry serves the reply direction of a translated flow.
    pub const REPLY: u16 = 1;
    /// `to` differs from the packet's tuple.
    pub const NAT: u16 = 2;
    /// A pod that reaches itself through a VIP; policy does not apply.
    pub const HAIRPIN: u16 = 4;
    /// The source was masqueraded by this node.
    pub const MASQ: u16 = 8;
    /// Opened by this node's host.
    pub const FROM_HOST: u16 = 16;
    /// The tuple that this entry was made for is the canonical one reversed. With [`NAT`] only packets of that direction are
    /// served; without, packets of that direction are the original direction, and others the reply direction.
    pub const SWAPPED: u16 = 32;
    /// Opened by what this node's stack forwarded to a pod of it from elsewhere: answers go back through the stack, which may have
    /// translated the flow.
    pub const VIA_STACK: u16 = 64;
    /// Opened from outside at a Service's address for clients outside, or at a pod's port of this node: this node forwards both
    /// directions, wherever they lead.
    pub const EXTERNAL: u16 = 128;
    /// With [`EXTERNAL`]: asked at another address than the one by which other nodes know this one. They refuse it inside the tunnel.
    pub const SECOND_ADDRESS: u16 = 256;
    /// With [`EXTERNAL`] and [`NAT`]: the backend on another node answers the client directly (DSR). Packets go there whole, behind a
    /// header of their own, and `to` says what that node makes of them. No answers pass here, so that no entry of the reply direction
    /// belongs to this one.
    pub const DIRECT: u16 = 512;
}

/// Bits of [`CtEntry::state`].
pub mod state {
    /// The reply direction has been seen.
    pub const ANSWERED: u64 = 1;
    /// FIN from the opener.
    pub const FIN_ORIG: u64 = 2;
    /// FIN from the other side.
    pub const FIN_REPLY: u64 = 4;
    /// A RST from the opener, with a sequence number that its receiver accepts, and nothing but RSTs from it since.
    pub const RST_ORIG: u64 = 8;
    /// TCP: the opener has sent an ACK after the answer; the handshake is over.
    pub const ESTABLISHED: u64 = 16;
    /// The receiver of a FIN has acknowledged something since.
    pub const FIN_ACKED: u64 = 32;
    /// As [`RST_ORIG`], from the other side.
    pub const RST_REPLY: u64 = 64;
    /// A SYN of the opener with a number of another connection. If the other side answers it by SYN|ACK, the numbers of that
    /// connection count from then on.
    pub const SYN_AGAIN: u64 = 128;
    /// With [`SYN_AGAIN`]: the upper bits of the number that answers that SYN.
    pub const SYN_NUMBER: u64 = 0xffff_fe00;

    /// True if the connection ends for good: both FINs, or a RST.
    pub const fn is_closing(state: u64) -> bool {
        state & (RST_ORIG | RST_REPLY) != 0 || state & (FIN_ORIG | FIN_REPLY) == FIN_ORIG | FIN_REPLY
    }
}

/// Seconds that a connection may stay silent before it is collected.
///
/// The values are netfilter's (`nf_conntrack_tcp_timeout_*`), with the two that kube-proxy sets: 86,400 s established, 3,600 s
/// half-closed with the FIN acknowledged. UDP has RFC 4787's two minutes (REQ-5), whether answered or not.
pub const fn lifetime(proto: u8, state: u64) -> u32 {
    use crate::tuple::proto::{ICMP, ICMPV6, SCTP, TCP, UDP};
    match proto {
        TCP if state::is_closing(state) => 10,
        TCP if state & (state::FIN_ORIG | state::FIN_REPLY) != 0 => {
            if state & state::FIN_ACKED != 0 {
                3600
            } else {
                120
            }
        }
        TCP if state & state::ESTABLISHED != 0 => 86_400,
        TCP if state & state::ANSWERED != 0 => 60,
        TCP | UDP => 120,
        SCTP => 210,
        ICMP | ICMPV6 => 30,
        _ => 600,
    }
}

/// Bytes by which the number of a segment may differ from what is expected of its sender. A segment further off is forwarded,
/// for its receiver judges it, but changes no state: who forges addresses and ports without seeing the flow would have to send
/// some two thousand segments for one that counts.
pub const SEQ_WINDOW: u32 = 1 << 20;

/// Bytes that a sender can have sent and its receiver not acknowledged, as far as numbers are believed. TCP allows sixteen times as
/// many (RFC 7323, 2.3); Linux lets buffers grow to a tenth of it by default (`tcp_rmem`, 6 MiB).
pub const MAX_IN_FLIGHT: u32 = 1 << 26;

/// Ticks since `then`, for clocks of 32 bits that wrap. A time that lies ahead, read by another CPU a moment later, counts as now.
#[inline(always)]
pub const fn elapsed(now: u32, then: u32) -> u32 {
    let age = now.wrapping_sub(then);
    if age > i32::MAX as u32 { 0 } else { age }
}

/// True if `one` is a later time than `other`, for clocks of 32 bits that wrap.
#[inline(always)]
pub const fn is_later(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

shared_type!(Side, 40);
shared_type!(CtEntry<Ip4>, 120);
shared_type!(CtEntry<Ip6>, 144);

#[cfg(test)]
mod tests {
    use super::state::{ANSWERED, ESTABLISHED, FIN_ACKED, FIN_ORIG, FIN_REPLY, RST_ORIG, RST_REPLY};
    use super::{CtEntry, elapsed, flags, is_later, lifetime};
    use crate::addr::Ip4;
    use crate::tuple::proto::{ICMP, ICMPV6, SCTP, TCP, UDP};

    #[test]
    fn an_entry_is_superseded_by_a_later_one_that_translates_otherwise() {
        let entry = |flags, dport, seen| {
            let mut entry: CtEntry<Ip4> = bytemuck::Zeroable::zeroed();
            (entry.flags, entry.to.dport, entry.seen) = (flags, dport, seen);
            entry
        };
        let nat = entry(flags::NAT | flags::REPLY, 80, u32::MAX);
        for (other, is_superseded) in [
            (entry(0, 0, 1), true),
            (entry(flags::NAT, 81, 1), true),
            (entry(flags::NAT, 80, 1), false),
            (entry(0, 0, u32::MAX), false),
            (entry(0, 0, u32::MAX - 1), false),
        ] {
            assert_eq!(nat.is_superseded_by(&other), is_superseded, "{other:?}");
        }
        let plain = entry(0, 0, u32::MAX);
        assert!(plain.is_superseded_by(&entry(flags::NAT, 80, 1)));
        assert!(!plain.is_superseded_by(&entry(flags::SWAPPED, 9, 1)), "nothing translates either");
        assert!(plain.is_rival_of(&nat) && nat.is_rival_of(&plain) && nat.is_rival_of(&nat));
        assert!(!nat.is_rival_of(&entry(flags::NAT | flags::SWAPPED, 80, 0)), "of opposite directions");
        assert!(is_later(1, u32::MAX) && !is_later(7, 7) && !is_later(u32::MAX, 1));
    }

    #[test]
    fn each_state_has_its_lifetime() {
        assert_eq!(lifetime(TCP, 0), 120, "SYN without an answer");
        assert_eq!(lifetime(TCP, ANSWERED), 60, "SYN and SYN|ACK, nothing more");
        assert_eq!(lifetime(TCP, ANSWERED | ESTABLISHED), 86_400);
        assert_eq!(lifetime(TCP, ANSWERED | ESTABLISHED | FIN_ORIG), 120);
        assert_eq!(lifetime(TCP, ANSWERED | ESTABLISHED | FIN_REPLY | FIN_ACKED), 3600);
        assert_eq!(lifetime(TCP, ANSWERED | ESTABLISHED | FIN_ORIG | FIN_REPLY | FIN_ACKED), 10);
        assert_eq!(lifetime(TCP, ANSWERED | ESTABLISHED | RST_ORIG), 10);
        assert_eq!(lifetime(TCP, RST_REPLY), 10);
        assert_eq!(lifetime(UDP, 0), 120);
        assert_eq!(lifetime(UDP, ANSWERED), 120);
        assert_eq!(lifetime(SCTP, ANSWERED), 210);
        assert_eq!([lifetime(ICMP, 0), lifetime(ICMPV6, ANSWERED)], [30; 2]);
        let esp = 50;
        assert_eq!(lifetime(esp, ANSWERED), 600, "as netfilter's of protocols that it does not know");
    }

    #[test]
    fn a_time_ahead_counts_as_now() {
        assert_eq!(elapsed(10, 4), 6);
        assert_eq!(elapsed(10, 11), 0);
        assert_eq!(elapsed(3, 0xffff_fffe), 5);
        let half = i32::MAX as u32;
        assert_eq!((elapsed(half + 7, 7), elapsed(half + 8, 7)), (half, 0));
    }
}
