//! The header in front of packets for direct server return: IPv4 in IPv4 (RFC 2003), IPv6 in IPv6 (RFC 2473).

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::Address;

use super::encap::Encapsulated;
use super::reject::BuildHeader;
use crate::ctx::{Checksums, Ctx, Skb, at};
use crate::family::Family;
use crate::wire::{ETH_LEN, Header4, Header6};

/// `bpf_skb_adjust_room`: segments keep their size, which the MTU has room for.
const FIXED_GSO: u64 = 1;
const ENCAP_L3_IPV4: u64 = 1 << 1;
const ENCAP_L3_IPV6: u64 = 1 << 2;

/// The smallest MTU of IPv6 (RFC 8200, 5): its senders do not believe in a smaller one.
const IPV6_MIN_MTU: u32 = 1280;

/// A family of packets that go inside of another header of the family.
pub trait Wrap: Family<Header: BuildHeader<Self::A>> {
    /// Bytes of that header.
    const WRAP_LEN: u32 = size_of::<Self::Header>() as u32;
    /// The MTU for packets that get that header, where those with it have `mtu`. 0: unknown.
    #[inline(always)]
    fn inner_mtu(mtu: u32) -> u32 {
        let least = if Self::A::IS_V6 { IPV6_MIN_MTU } else { 0 };
        let inner = mtu.saturating_sub(Self::WRAP_LEN);
        if inner < least { least } else { inner }
    }
    /// What that header says of its length, if the packet inside has `len` bytes: nothing if the field is too small for segments that
    /// have yet to be parted.
    #[inline(always)]
    fn payload(len: u32) -> u16 {
        let counted = if Self::A::IS_V6 { 0 } else { Self::WRAP_LEN };
        if len + counted > u32::from(u16::MAX) { 0_u16.wrapping_sub(counted as u16) } else { len as u16 }
    }
}

impl<F: Family<Header: BuildHeader<F::A>>> Wrap for F {}

const _: () = assert!(size_of::<Header4>() == 20 && size_of::<Header6>() == 40);

/// Puts a header in front of a packet of `len` bytes, which stays as it is. Not to be fragmented: its receiver joins nothing. All
/// pointers into the packet are void afterwards.
#[inline(always)]
pub fn wrap<F: Wrap>(skb: &Skb, len: u32, src: F::A, dst: F::A) -> Encapsulated {
    if skb.gso_size() == 0 && len + F::WRAP_LEN > u32::from(u16::MAX) {
        return Encapsulated::Refused;
    }
    let flags = FIXED_GSO | if F::A::IS_V6 { ENCAP_L3_IPV6 } else { ENCAP_L3_IPV4 };
    // SAFETY: no pointers but the context.
    if unsafe { helper::bpf_skb_adjust_room(skb.raw(), F::WRAP_LEN as i32, BPF_ADJ_ROOM_MAC, flags) } != 0 {
        return Encapsulated::Refused;
    }
    let Some(outer) = at::<F::Header, _>(skb, ETH_LEN) else { return Encapsulated::Failed };
    let header = F::Header::build(src, dst, F::IN_IP, F::payload(len));
    let sum = header.sum();
    // SAFETY: `at` proved a whole header.
    unsafe { outer.write(header) };
    skb.update_csum(sum);
    Encapsulated::Done
}

/// Takes that header off. False if it is still there.
#[inline(always)]
pub fn unwrap<F: Wrap>(skb: &Skb) -> bool {
    // Without "the checksum stays as it was verified": what a device says of it may be of the outer packet.
    // SAFETY: no pointers but the context.
    unsafe { helper::bpf_skb_adjust_room(skb.raw(), -(F::WRAP_LEN as i32), BPF_ADJ_ROOM_MAC, FIXED_GSO) == 0 }
}
