//! Checksums that a sender leaves to the device. The sender says where the checksum belongs (`PACKET_VNET_HDR`), and the device
//! writes it there, behind all programs: over the source or a port, if nobody looks. No program can read that place, but helpers
//! depend on it.

use aya_ebpf::bindings::{__sk_buff, BPF_CSUM_LEVEL_DEC, BPF_CSUM_LEVEL_INC, BPF_CSUM_LEVEL_QUERY};
use aya_ebpf::helpers::generated as helper;
use rustnet_common::tuple::proto;

use crate::ctx::Skb;

/// Two bits for each protocol, by the lowest five bits of its number: where in the transport header a checksum stands at the earliest.
/// 1: at 6, as in UDP (SCTP has its own at 8); 2: at 16, as in TCP; 0: anywhere, for it may belong to an inner packet. What shares
/// these bits with one of the three has inner packets, if any, behind an IP header.
const PLACES: u64 = 2 << (2 * (proto::TCP & 31)) | 1 << (2 * (proto::UDP & 31)) | 1 << (2 * (proto::SCTP & 31));

/// The last byte of a checksum that stands there. By arithmetic: the verifier would follow each branch to the end.
#[inline(always)]
const fn last_byte(protocol: u8) -> u32 {
    let place = (PLACES >> (2 * (protocol & 31)) & 3) as u32;
    place * (2 * place + 4) + 1
}

const _: () = assert!(last_byte(proto::TCP) == 17 && last_byte(proto::UDP) == 7);
const _: () = assert!(last_byte(proto::SCTP) == 7 && last_byte(47) == 1);

/// What is said of a packet's checksum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Nothing that concerns a router.
    Fine,
    /// A device would write a checksum in front of where the packet's protocol has one. The packet is spoiled by the look: drop it.
    Misplaced,
    /// A sum of the whole packet is known (`CHECKSUM_COMPLETE`), and has to follow each change.
    Summed,
}

/// What is said of a packet's checksum, `l4` being the offset of its transport header. Pointers into the packet are void afterwards.
///
/// The overlay's device takes back what is said of a packet's checksum (`iptunnel_handle_offloads`; not of a segmented frame, whose
/// checksum is always left to a device): where nothing is left to a device, a packet on its way there needs two helpers and no function.
#[inline(always)]
pub fn of(skb: &Skb, l4: usize, protocol: u8, is_tunneled: bool) -> Offload {
    if is_tunneled && raise_level(skb.raw()) {
        return Offload::Fine;
    }
    match rn_offload(skb.raw(), l4 as u32, u32::from(protocol), u32::from(is_tunneled)) {
        FINE => Offload::Fine,
        SUMMED => Offload::Summed,
        _ => Offload::Misplaced,
    }
}

const FINE: u32 = 0;
const MISPLACED: u32 = 1;
const SUMMED: u32 = 2;

/// A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_offload(skb: *mut __sk_buff, l4: u32, protocol: u32, is_raised: u32) -> u32 {
    // SAFETY: no pointers but the context, here and below.
    unsafe {
        if is_raised == 0 && raise_level(skb) {
            helper::bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC.into());
            return FINE;
        }
        if helper::bpf_csum_update(skb, 0) >= 0 {
            return SUMMED;
        }
    }
    if matches!(protocol as u8, proto::ICMP | proto::ICMPV6) {
        // No stack leaves these to a device, and what steps go by stands in front.
        return MISPLACED;
    }
    // The kernel shortens no packet into a pending checksum (`__bpf_skb_min_len`): it must refuse to take off that byte.
    // SAFETY: no pointers but the context.
    if unsafe { helper::bpf_skb_change_tail(skb, l4 + last_byte(protocol as u8), 0) } == 0 { MISPLACED } else { FINE }
}

/// Raises the level of verified checksums, of those that can have one. False where the checksum is left to a device
/// (`CHECKSUM_PARTIAL`) or is a sum of the whole packet, which takes updates.
///
/// Of the four states, two become or stay "verified" when the level is raised, and have a level then
/// (`__skb_incr_checksum_unnecessary`).
#[inline(always)]
fn raise_level(skb: *mut __sk_buff) -> bool {
    // SAFETY: no pointers but the context.
    unsafe {
        helper::bpf_csum_level(skb, BPF_CSUM_LEVEL_INC.into());
        helper::bpf_csum_level(skb, BPF_CSUM_LEVEL_QUERY.into()) >= 0
    }
}
