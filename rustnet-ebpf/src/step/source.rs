//! Source verification. Contract: tells whether a packet may bear the source address it bears, at the hook where it came in.

use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::drop::DropReason;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::peer::flags;

use super::conntrack::Guard;
use super::route;
use crate::ctx::{Ctx, Skb, at_pulled};
use crate::family::Family;
use crate::maps;
use crate::parse::Ethernet;

/// The guard of a packet that a pod sends: interface and MAC.
#[inline(always)]
pub fn pod_guard<C: Ctx>(ctx: &C) -> Result<Guard, DropReason> {
    let eth = at_pulled::<Ethernet, C>(ctx, 0).ok_or(DropReason::Malformed)?;
    // SAFETY: `at_pulled` proved an Ethernet header; the source MAC is at an even address.
    let bytes = unsafe { core::ptr::addr_of!((*eth).src).cast::<[u16; 3]>().read() };
    Ok(Guard { ifindex: ctx.ifindex(), bytes })
}

/// A pod of this node.
#[inline(always)]
pub fn endpoint<A: Address>(addr: A) -> Option<&'static Endpoint> {
    let p = maps::rn_endpoints.get_ptr(addr.to_addr())?;
    // SAFETY: map values stay valid for this run of the program.
    Some(unsafe { &*p })
}

/// A pod sends from its own interface, with its own address and MAC.
#[inline(always)]
pub fn verify_pod<F: Family>(src: F::A, guard: Guard) -> Result<(), DropReason> {
    let ep = endpoint(src).ok_or(DropReason::Spoofed)?;
    let m = ep.mac;
    let mac = [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])];
    if ep.ifindex == guard.ifindex && mac == guard.bytes { Ok(()) } else { Err(DropReason::Spoofed) }
}

/// Nobody outside may use an address of this node or of its pods.
#[inline(always)]
pub fn verify_outside<F: Family>(src: F::A) -> Result<(), DropReason> {
    let own = match route::peer::<F>(src) {
        Some(p) => p.flags & (flags::HOST | flags::LOCAL_PODS) != 0,
        None => false,
    };
    if own { Err(DropReason::Spoofed) } else { Ok(()) }
}

/// `struct bpf_tunnel_key` without the near end: the size that all kernels take.
#[repr(C)]
pub struct TunnelKey {
    /// Network identifier.
    pub id: u32,
    /// Far end: word 0 in host order for IPv4, network order words for IPv6.
    pub remote: [u32; 4],
    /// Type of service.
    pub tos: u8,
    /// TTL of the outer header.
    pub ttl: u8,
    /// Unused.
    pub ext: u16,
    /// Flow label.
    pub label: u32,
}

/// The far end is IPv6 (`BPF_F_TUNINFO_IPV6`).
pub const TUNINFO_IPV6: u64 = 1;

/// The far end of the tunnel that the packet came through.
#[inline(never)]
pub fn tunnel_remote(skb: &Skb, out: &mut Addr) {
    let mut key = TunnelKey { id: 0, remote: [0; 4], tos: 0, ttl: 0, ext: 0, label: 0 };
    let (p, len) = ((&raw mut key).cast(), size_of::<TunnelKey>() as u32);
    // SAFETY: `key` has the size that is passed. The helper refuses to read an IPv6 tunnel as an IPv4 one.
    *out = if unsafe { helper::bpf_skb_get_tunnel_key(skb.raw(), p, len, 0) } == 0 {
        Ip4::from_word(key.remote[0].to_be()).to_addr()
    } else {
        // SAFETY: as above.
        unsafe { helper::bpf_skb_get_tunnel_key(skb.raw(), p, len, TUNINFO_IPV6) };
        Ip6::from_words(key.remote)
    };
}

/// The guard of a packet out of the tunnel: the end of the far address (all of it for IPv4).
#[inline(always)]
pub fn tunnel_guard(ifindex: u32, remote: &Addr) -> Guard {
    let w = remote.words();
    Guard { ifindex, bytes: [w[3] as u16, (w[3] >> 16) as u16, (w[2] >> 16) as u16] }
}

/// What comes out of the tunnel comes from the node that owns the inner source.
#[inline(always)]
pub fn verify_tunnel<F: Family>(src: F::A, remote: &Addr) -> Result<(), DropReason> {
    match route::peer::<F>(src) {
        Some(p) if p.flags & flags::TUNNEL != 0 && p.node == *remote => Ok(()),
        _ => Err(DropReason::UnknownSender),
    }
}
