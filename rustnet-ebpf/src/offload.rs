//! Checksums that a sender leaves to the device. The sender says where the checksum belongs
//! (`PACKET_VNET_HDR`), and the device writes it there, behind all programs: over the source or a
//! port, if nobody looks. No program can read that place, but two helpers depend on it.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::tuple::proto;

use crate::ctx::{Skb, at};

/// A field that [`has_pending_sum`] changes for a moment: identification of IPv4, length of IPv6.
const SCRATCH: usize = 4;

/// Two bits for each protocol, by the lowest five bits of its number: where in the transport header
/// a checksum stands at the earliest. 1: at 6, as in UDP (SCTP has its own at 8); 2: at 16, as in
/// TCP; 0: anywhere, for it may belong to an inner packet. What shares these bits with one of the
/// three has inner packets, if any, behind an IP header.
const PLACES: u64 = 2 << (2 * (proto::TCP & 31)) | 1 << (2 * (proto::UDP & 31)) | 1 << (2 * (proto::SCTP & 31));

/// The last byte of a checksum that stands there. By arithmetic: the verifier would follow each
/// branch to the end.
#[inline(always)]
const fn last_byte(protocol: u8) -> u32 {
    let place = (PLACES >> (2 * (protocol & 31)) & 3) as u32;
    place * (2 * place + 4) + 1
}

const _: () = assert!(last_byte(proto::TCP) == 17 && last_byte(proto::UDP) == 7);
const _: () = assert!(last_byte(proto::SCTP) == 7 && last_byte(47) == 1);

/// True if a device would write a checksum in front of where the packet's protocol has one. Such a
/// packet is spoiled by the look: drop it.
#[inline(always)]
pub fn has_misplaced_sum(skb: &Skb, l3: u32, l4: u32, protocol: u8) -> bool {
    rn_misplaced_sum(skb.raw(), l3, l4, u32::from(protocol)) != 0
}

/// A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_misplaced_sum(skb: *mut __sk_buff, l3: u32, l4: u32, protocol: u32) -> u32 {
    let skb = Skb(skb);
    if !has_pending_sum(&skb, (l3 & 0x7f) as usize + SCRATCH) {
        return 0;
    }
    if matches!(protocol as u8, proto::ICMP | proto::ICMPV6) {
        // No stack leaves these to a device, and what steps go by stands in front.
        return 1;
    }
    // The kernel shortens no packet into a pending checksum (`__bpf_skb_min_len`): it must refuse to
    // take off that byte.
    // SAFETY: no pointers but the context.
    u32::from(unsafe { helper::bpf_skb_change_tail(skb.raw(), l4 + last_byte(protocol as u8), 0) } == 0)
}

/// True if the packet's checksum is left to a device (`CHECKSUM_PARTIAL`): then the helper leaves a
/// field as it is for differences of no pseudo header (`inet_proto_csum_replace_by_diff`).
#[inline(always)]
fn has_pending_sum(skb: &Skb, field: usize) -> bool {
    let Some(before) = at::<u16, _>(skb, field) else { return false };
    // SAFETY: `at` proved two bytes.
    let before = unsafe { before.read() };
    // SAFETY: the helper checks the offset against the packet.
    unsafe { helper::bpf_l4_csum_replace(skb.raw(), field as u32, 0, 1, 0) };
    let Some(now) = at::<u16, _>(skb, field) else { return false };
    // SAFETY: as above.
    unsafe {
        if now.read() == before {
            return true;
        }
        now.write(before);
    }
    false
}
