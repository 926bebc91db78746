//! Programs of bind(2): refuse a process of the host a port that is a node port of a Service here. Nobody would reach its server, not
//! even the host itself: its sockets ask the Service. A server that was there before the Service stays, and one that is the Service's
//! backend at that port may come.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated as helper;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::service::flags;
use rustnet_common::socket::netns;
use rustnet_common::tuple::Tuple;

use super::{ALLOW, LOOPBACK4, LOOPBACK6, flags_of};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::step::lb;

/// What a program returns to refuse the call, which fails with EPERM.
const REFUSE: i32 = 0;

/// A port that a socket has taken.
#[derive(Clone, Copy)]
struct Bound {
    port: u16,
    proto: u8,
}

impl Bound {
    /// `None` for sockets of pods, and of whoever keeps asking by packets.
    #[inline(always)]
    fn of(sock: *mut bpf_sock) -> Option<Self> {
        // SAFETY: the kernel hands the program a valid context; the verifier rewrites these loads. The port is in host order.
        let (namespace, port, proto) =
            unsafe { (helper::bpf_get_netns_cookie(sock.cast()), (*sock).src_port, (*sock).protocol) };
        let is_host = flags_of(namespace).is_some_and(|flags| flags & netns::HOST != 0);
        if is_host { Some(Self { port: port as u16, proto: proto as u8 }) } else { None }
    }

    /// The flags of the Service's entry for this port of an address.
    #[inline(always)]
    fn flags_at<F: Family>(self, dst: F::A) -> Option<u16> {
        let Self { port: dport, proto } = self;
        lb::flags_of::<F>(&Tuple { src: F::A::UNSPECIFIED, dst, sport: 0, dport, proto, pad: 0, pad2: 0 })
    }

    /// True if a server at this address has no clients. Loopback addresses have an entry for each node port and for nothing else, unless
    /// no loopback address has node ports: then the host itself reaches a server there.
    #[inline(always)]
    fn is_taken<F: Family>(self, addr: F::A, loopback: F::A) -> bool {
        let is_taken = |flags: u16| flags & flags::OWN_PORT == 0;
        self.flags_at::<F>(loopback).is_some_and(is_taken)
            && (addr.is_martian_destination() || self.flags_at::<F>(addr).is_some())
    }
}

#[inline(always)]
fn verdict(is_taken: bool) -> i32 {
    if is_taken { REFUSE } else { ALLOW }
}

#[cgroup_sock(post_bind4)]
pub fn sock_bind4(ctx: SockContext) -> i32 {
    let Some(bound) = Bound::of(ctx.sock) else { return ALLOW };
    // SAFETY: see `Bound::of`.
    let addr = Ip4::from_word(unsafe { (*ctx.sock).src_ip4 });
    verdict(bound.is_taken::<V4>(addr, LOOPBACK4))
}

#[cgroup_sock(post_bind6)]
pub fn sock_bind6(ctx: SockContext) -> i32 {
    let Some(bound) = Bound::of(ctx.sock) else { return ALLOW };
    // SAFETY: see `Bound::of`. Word by word, as the verifier wants it.
    let addr = unsafe {
        let words = (&raw const (*ctx.sock).src_ip6).cast::<u32>();
        let word = |n: usize| words.add(n).read_volatile();
        Ip6::from_words([word(0), word(1), word(2), word(3)])
    };
    // A server of both families has no clients of IPv4; where the node has no IPv6, it has none.
    let is_of_both = addr == Ip6::UNSPECIFIED && maps::config().is_some_and(|config| config.node6 == Ip6::UNSPECIFIED);
    let is_taken = if addr.is_v4() || is_of_both {
        let addr = if is_of_both { Ip4::UNSPECIFIED } else { Ip4::from_addr(addr) };
        bound.is_taken::<V4>(addr, LOOPBACK4)
    } else {
        bound.is_taken::<V6>(addr, LOOPBACK6)
    };
    verdict(is_taken)
}
