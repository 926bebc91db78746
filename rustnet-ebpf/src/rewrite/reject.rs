//! Rejections: the packet in hand becomes a TCP reset or an ICMP error to its sender.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::bindings::bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET};
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::csum::Sum;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::field::TCP_CSUM;
use crate::ctx::{Checksums, Ctx, Skb, at, at_pulled, bounded};
use crate::family::Family;
use crate::packet::Packet;
use crate::wire::{ETH_LEN, Ethernet, Header4, Header6, ICMP_LEN, TCP_LEN, Tcp, tcp};

const TTL: u8 = 64;
/// Bytes of the transport header that an error quotes: what a receiver needs, and enough that a checksum which the
/// hardware has yet to fill in stays inside the packet.
const QUOTED_L4: usize = 28;
/// Words of the longest quotation: any IPv4 header, an IPv6 header with 92 bytes of extension headers.
const QUOTED_WORDS: usize = 40;

/// How a family writes the header of a rejection.
pub trait BuildHeader<A>: Copy {
    /// A header from `src` to `dst` in front of `payload` bytes.
    fn build(src: A, dst: A, proto: u8, payload: u16) -> Self;

    /// The sum over the header.
    fn sum(&self) -> Sum;
}

impl BuildHeader<Ip4> for Header4 {
    #[inline(always)]
    fn build(src: Ip4, dst: Ip4, proto: u8, payload: u16) -> Self {
        let total = payload + size_of::<Self>() as u16;
        let csum = Sum::default()
            .add16(0x4500)
            .add16(total)
            .add16(0x4000)
            .add16(u16::from(TTL) << 8 | u16::from(proto))
            .add(src.word())
            .add(dst.word())
            .finish();
        Self {
            ver_ihl: 0x45,
            tos: 0,
            total: total.to_be(),
            id: 0,
            frag: 0x4000_u16.to_be(),
            ttl: TTL,
            proto,
            csum,
            src,
            dst,
        }
    }

    #[inline(always)]
    fn sum(&self) -> Sum {
        // What its own checksum makes of it.
        Sum::default().add(0xffff)
    }
}

impl BuildHeader<Ip6> for Header6 {
    #[inline(always)]
    fn build(src: Ip6, dst: Ip6, proto: u8, payload: u16) -> Self {
        Self { ver_flow: 0x6000_0000_u32.to_be(), payload: payload.to_be(), next: proto, hop_limit: TTL, src, dst }
    }

    #[inline(always)]
    fn sum(&self) -> Sum {
        Sum::default()
            .add(self.ver_flow)
            .add(u32::from(self.payload))
            .add16(u16::from_be_bytes([self.next, self.hop_limit]))
            .add_addr(self.src)
            .add_addr(self.dst)
    }
}

/// The pseudo header's part of a checksum (RFC 9293, 3.1; RFC 8200, 8.1).
#[inline(always)]
fn pseudo<A: Address>(src: A, dst: A, proto: u8, len: u16) -> Sum {
    Sum::default().add_addr(src).add_addr(dst).add16(u16::from(proto)).add16(len)
}

/// Turns the packet into a TCP reset to its sender (RFC 9293, 3.5.2), in the name of its destination, with the MACs swapped.
#[inline(always)]
pub fn reset<F: Family<Header: BuildHeader<F::A>>>(skb: &Skb, p: &Packet<F::A>) -> Result<(), DropReason> {
    make_reset::<F>(skb, p).and_then(|()| swap_macs(skb)).ok_or(DropReason::WriteError)
}

/// Turns the packet into an ICMP error from `src` to its sender, with the MACs swapped. `kind` are type and code, `rest` is what stands
/// behind the checksum.
#[inline(always)]
pub fn error<F: Family<Header: BuildHeader<F::A>>>(
    skb: &Skb,
    p: &Packet<F::A>,
    src: F::A,
    kind: [u8; 2],
    rest: u32,
) -> Result<(), DropReason> {
    make_error::<F>(skb, p, src, kind, rest).and_then(|()| swap_macs(skb)).ok_or(DropReason::WriteError)
}

/// Back to where it came from, on the link layer too.
#[inline(always)]
fn swap_macs(skb: &Skb) -> Option<()> {
    let eth = at_pulled::<Ethernet, _>(skb, 0)?;
    // SAFETY: `at_pulled` proved an Ethernet header; its MACs are at even addresses.
    unsafe {
        let dst = core::ptr::addr_of_mut!((*eth).dst).cast::<[u16; 3]>();
        let src = core::ptr::addr_of_mut!((*eth).src).cast::<[u16; 3]>();
        let d = dst.read();
        dst.write(src.read());
        src.write(d);
    }
    Some(())
}

/// Cuts the packet to `len` bytes.
#[inline(always)]
fn trim(skb: &Skb, len: usize) -> Option<()> {
    // SAFETY: the helper checks the length.
    if unsafe { helper::bpf_skb_change_tail(skb.raw(), len as u32, 0) } == 0 { Some(()) } else { None }
}

/// The reset that closes what the packet wants: it takes its sequence number from the packet's acknowledgement, or
/// acknowledges all of the packet.
#[inline(always)]
fn make_reset<F: Family<Header: BuildHeader<F::A>>>(skb: &Skb, p: &Packet<F::A>) -> Option<()> {
    let (seq, ack, flags) = if p.tcp_flags & tcp::ACK != 0 {
        (p.ack.to_be(), 0, tcp::RST)
    } else {
        (0, p.seq_end.to_be(), tcp::RST | tcp::ACK)
    };
    let ip = size_of::<F::Header>();
    // Options and extension headers go with their room, not by a shorter packet alone: the kernel refuses to cut into a
    // transport header whose checksum is left to a device.
    trim(skb, p.l4() + TCP_LEN)?;
    let extra = p.l4().wrapping_sub(ETH_LEN + ip);
    if extra != 0 {
        // SAFETY: the helper checks the length against the packet, and moves what stands in front.
        let rc = unsafe { helper::bpf_skb_adjust_room(skb.raw(), -(extra as i32), BPF_ADJ_ROOM_NET, 0) };
        if rc != 0 {
            return None;
        }
    }
    let offset_flags = 5 << 12 | u16::from(flags);
    let pseudo = pseudo(p.tuple.dst, p.tuple.src, proto::TCP, TCP_LEN as u16);
    let whole = pseudo.add16(p.tuple.dport).add16(p.tuple.sport).add(seq).add(ack).add16(offset_flags);
    let h = at_pulled::<F::Header, _>(skb, ETH_LEN)?;
    let header = F::Header::build(p.tuple.dst, p.tuple.src, proto::TCP, TCP_LEN as u16);
    // A transport whose checksum is right sums up to the complement of its pseudo header.
    let sum = header.sum().add(u32::from(pseudo.finish()));
    // SAFETY: `at_pulled` proved a whole IP header.
    unsafe { h.write(header) };
    let t = at_pulled::<Tcp, _>(skb, ETH_LEN + ip)?;
    // SAFETY: `at_pulled` proved a whole TCP header.
    unsafe {
        t.write(Tcp {
            sport: p.tuple.dport.to_be(),
            dport: p.tuple.sport.to_be(),
            seq,
            ack,
            offset_flags: offset_flags.to_be(),
            window: 0,
            // What a device that is still to finish the checksum starts from: the folded pseudo header.
            csum: pseudo.fold16(),
            urgent: 0,
        });
    }
    // For all others the rest of the way to the finished checksum; the helper leaves out just the frames that a device will
    // finish, which a program cannot tell by itself.
    if !skb.l4_csum_replace(ETH_LEN + ip + TCP_CSUM, Sum(pseudo.0 + whole.0), false, false, F::A::IS_V6) {
        return None;
    }
    skb.set_csum(sum);
    Some(())
}

/// An ICMP error that quotes the packet.
#[inline(always)]
fn make_error<F: Family<Header: BuildHeader<F::A>>>(
    skb: &Skb,
    p: &Packet<F::A>,
    src: F::A,
    kind: [u8; 2],
    rest: u32,
) -> Option<()> {
    let icmp = if F::A::IS_V6 { proto::ICMPV6 } else { proto::ICMP };
    let ip = size_of::<F::Header>();
    let limit = p.l4().wrapping_sub(p.l3()) + QUOTED_L4;
    // Whole words, so that the sum needs no odd byte.
    let quote = (if (p.ip_len as usize) < limit { p.ip_len as usize } else { limit }) & !3;
    let quote = if quote > QUOTED_WORDS * 4 { QUOTED_WORDS * 4 } else { quote };
    let dst = p.tuple.src;
    trim(skb, ETH_LEN + quote)?;
    // SAFETY: the helper makes room behind the Ethernet header, or refuses.
    if unsafe { helper::bpf_skb_adjust_room(skb.raw(), (ip + ICMP_LEN) as i32, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return None;
    }
    let payload = (ICMP_LEN + quote) as u16;
    let pseudo = if F::A::IS_V6 { pseudo(src, dst, icmp, payload) } else { Sum::default() };
    let first = ETH_LEN + ip + ICMP_LEN;
    if !skb.pull((first + quote) as u32) {
        return None;
    }
    let quoted = rn_sum(skb.raw(), first as u32, quote as u32);
    if quoted == NO_SUM {
        return None;
    }
    let sum = Sum(pseudo.0.wrapping_add(quoted));
    let head = [u16::from_be_bytes(kind), 0, (rest >> 16) as u16, rest as u16];
    let csum = sum.add16(head[0]).add16(head[2]).add16(head[3]).finish();
    let h = at::<F::Header, _>(skb, ETH_LEN)?;
    let outer = F::Header::build(src, dst, icmp, payload);
    let whole = outer.sum().add(u32::from(pseudo.finish()));
    // SAFETY: `at` proved a whole IP header.
    unsafe { h.write(outer) };
    let h = at::<[u16; 4], _>(skb, ETH_LEN + ip)?;
    // SAFETY: `at` proved the eight bytes of an ICMP header.
    unsafe { h.write([head[0].to_be(), csum, head[2].to_be(), head[3].to_be()]) };
    skb.set_csum(whole);
    Some(())
}

/// What [`rn_sum`] gives where the packet is shorter; no sum of words becomes so large.
const NO_SUM: u64 = u64::MAX;

/// The sum over `len` bytes from `first` on, whole words, [`QUOTED_WORDS`] at most. With global linkage: what follows the
/// loop is proved once, not once for each length.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_sum(skb: *mut __sk_buff, first: u32, len: u32) -> u64 {
    let skb = Skb(skb);
    let first = bounded(first as usize);
    let mut sum = Sum::default();
    for i in 0..QUOTED_WORDS {
        if i * 4 >= len as usize {
            break;
        }
        let Some(w) = at::<u32, _>(&skb, first + i * 4) else { return NO_SUM };
        // SAFETY: `at` proved four bytes.
        sum = sum.add(unsafe { w.read() });
    }
    sum.0
}
