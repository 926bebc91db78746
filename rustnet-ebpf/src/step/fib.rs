//! The kernel's routes and neighbours. Contract: arms a redirect to where they lead, or says why there is none. A new flow that is
//! masqueraded gets the address of the device that it leaves by; nothing else changes.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;

use super::nat;
use crate::ctx::{Ctx, Skb};
use crate::family::{Family, V4, V6};
use crate::maps::{self, FibLookup};
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Class, Flow};

impl FibLookup {
    /// Asks the kernel, for a packet with this context.
    #[inline(always)]
    pub(super) fn ask<C: Ctx>(&mut self, ctx: &C) -> i64 {
        // SAFETY: this has the layout and the size of the kernel's structure.
        unsafe { helper::bpf_fib_lookup(ctx.context(), (&raw mut *self).cast(), size_of::<Self>() as i32, 0) }
    }

    /// The question for a packet that leaves as `flow` says, from the device `ifindex`. `sport` and `mtu_len`: see [`redirect`].
    #[inline(always)]
    pub(super) fn of<F: Family>(flow: &Flow<F::A>, sport: u16, mtu_len: u32, ifindex: u32) -> Self {
        let to = &flow.to.tuple;
        // Of several next hops the kernel chooses by a hash of addresses, and with a sysctl of ports. Each packet of a flow looks as
        // the first one does, whose address and port of masquerade are not known yet: the flow keeps the device whose address it has.
        let src = match maps::config() {
            // Answers bear the address that the client asked.
            Some(config) if flow.flags & (flags::MASQ | flags::REPLY) == flags::MASQ => F::node(config),
            _ => to.src,
        };
        Self {
            family: F::AF,
            l4_protocol: to.proto,
            sport: sport.to_be(),
            dport: to.dport.to_be(),
            tot_len: mtu_len as u16,
            ifindex,
            tos: 0,
            src: src.words(),
            dst: to.dst.words(),
            vlan: 0,
            macs: [0; 6],
        }
    }
}

/// `struct bpf_redir_neigh`.
#[repr(C)]
struct NextHop {
    family: u32,
    addr: [u32; 4],
}

/// Where the kernel looks from for packets of its own stack (`LOOPBACK_IFINDEX`). Not `BPF_FIB_LOOKUP_OUTPUT`: that asks for a route
/// by the device at hand alone, and a Service's backend may lie behind another one than the Service's address.
pub(super) const LOOPBACK: u32 = 1;
pub(super) const RET_SUCCESS: i64 = 0;
const RET_UNSUPP_LWT: i64 = 6;
pub(super) const RET_NO_NEIGH: i64 = 7;
const RET_FRAG_NEEDED: i64 = 8;
const MTU_FRAG_NEEDED: i64 = 1;

/// What the kernel's tables say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fib {
    /// The redirect is armed: the verdict of the program.
    Redirect(i32),
    /// The tables lead nowhere, or to this host: its own stack decides.
    NoRoute,
    /// The packet exceeds this MTU, and may be fragmented.
    NeedsFragmentation(u32),
}

impl Fib {
    /// No verdict of a redirect is negative.
    const NO_ROUTE: i32 = -1;

    /// An MTU, below [`Self::NO_ROUTE`].
    #[inline(always)]
    fn needs_fragmentation(mtu: u32) -> i32 {
        Self::NO_ROUTE.wrapping_sub((mtu & 0xffff) as i32)
    }

    #[inline(always)]
    fn from_code(code: i32) -> Self {
        match code {
            Self::NO_ROUTE => Self::NoRoute,
            mtu if mtu < 0 => Self::NeedsFragmentation(Self::NO_ROUTE.wrapping_sub(mtu) as u32),
            verdict => Self::Redirect(verdict),
        }
    }
}

/// The kernel's routes for packets of one family.
pub trait Routed: Family {
    /// See [`redirect`]; for packets that came in.
    fn fib(skb: &Skb, flow: &mut Flow<Self::A>, sport: u16, mtu_len: u32) -> PackedResult;
    /// The same for packets of this host.
    fn fib_output(skb: &Skb, flow: &mut Flow<Self::A>, sport: u16, mtu_len: u32) -> PackedResult;
}

/// Arms a redirect along the kernel's route to where the flow leads. `sport` is the packet's before translation; `mtu_len` is checked
/// against the path's MTU, 0 if the packet may be fragmented; `is_output` looks as a local sender would.
#[inline(always)]
pub fn redirect<F: Routed>(
    skb: &Skb,
    flow: &mut Flow<F::A>,
    sport: u16,
    mtu_len: u32,
    is_output: bool,
) -> Result<Fib, Dropped> {
    let found = if is_output { F::fib_output(skb, flow, sport, mtu_len) } else { F::fib(skb, flow, sport, mtu_len) };
    found.result().map(Fib::from_code)
}

/// Declares a look-up of a family as a function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty, $is_output:literal) => {
        /// See [`redirect`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff, flow: *mut Flow<$addr>, sport: u32, mtu_len: u32) -> u64 {
            // SAFETY: the only caller is below and passes a reference; the verifier checks its size.
            let found = match unsafe { flow.as_mut() } {
                Some(flow) => try_redirect::<$family>(&Skb(skb), flow, sport as u16, mtu_len, $is_output),
                None => Err(DropReason::NoFib.into()),
            };
            PackedResult::new(found).bits()
        }
    };
}

global!(rn_fib4, V4, Ip4, false);
global!(rn_fib6, V6, Ip6, false);
global!(rn_fib_output4, V4, Ip4, true);
global!(rn_fib_output6, V6, Ip6, true);

impl Routed for V4 {
    #[inline(always)]
    fn fib(skb: &Skb, flow: &mut Flow<Ip4>, sport: u16, mtu_len: u32) -> PackedResult {
        PackedResult::from_bits(rn_fib4(skb.raw(), flow, u32::from(sport), mtu_len))
    }

    #[inline(always)]
    fn fib_output(skb: &Skb, flow: &mut Flow<Ip4>, sport: u16, mtu_len: u32) -> PackedResult {
        PackedResult::from_bits(rn_fib_output4(skb.raw(), flow, u32::from(sport), mtu_len))
    }
}

impl Routed for V6 {
    #[inline(always)]
    fn fib(skb: &Skb, flow: &mut Flow<Ip6>, sport: u16, mtu_len: u32) -> PackedResult {
        PackedResult::from_bits(rn_fib6(skb.raw(), flow, u32::from(sport), mtu_len))
    }

    #[inline(always)]
    fn fib_output(skb: &Skb, flow: &mut Flow<Ip6>, sport: u16, mtu_len: u32) -> PackedResult {
        PackedResult::from_bits(rn_fib_output6(skb.raw(), flow, u32::from(sport), mtu_len))
    }
}

#[inline(always)]
fn try_redirect<F: Family>(
    skb: &Skb,
    flow: &mut Flow<F::A>,
    sport: u16,
    mtu_len: u32,
    is_output: bool,
) -> Result<i32, Dropped> {
    let mut fib = FibLookup::of::<F>(flow, sport, mtu_len, if is_output { LOOPBACK } else { skb.ifindex() });
    let rc = fib.ask(skb);
    match rc {
        // The family may change on the way: an IPv4 route can have an IPv6 next hop (RFC 5549).
        RET_SUCCESS | RET_NO_NEIGH => {
            if flow.class == Class::New && flow.flags & flags::MASQ != 0 {
                nat::choose_source::<F>(skb, flow, fib.ifindex);
            }
            Ok(redirect_neigh(fib.ifindex, fib.family, fib.dst, is_output && rc == RET_NO_NEIGH))
        }
        RET_FRAG_NEEDED if mtu_len == 0 => Ok(Fib::needs_fragmentation(u32::from(fib.tot_len))),
        RET_FRAG_NEEDED => Err(Dropped { reason: DropReason::FragNeeded, mtu: u32::from(fib.tot_len) }),
        RET_UNSUPP_LWT => Err(DropReason::NoFib.into()),
        _ => Ok(Fib::NO_ROUTE),
    }
}

/// Redirects out of an interface, to the MAC that the neighbour table has for the next hop.
///
/// `is_waiting`: a packet of this host whose next hop has no MAC yet. It waits for one, and leaves by the route that is attached to it
/// (`neigh_update`), which is the one to the Service's address. Without a next hop, the helper attaches the one to its destination.
#[inline(always)]
pub(super) fn redirect_neigh(ifindex: u32, family: u8, addr: [u32; 4], is_waiting: bool) -> i32 {
    let mut hop = NextHop { family: u32::from(family), addr };
    let size = if is_waiting { 0 } else { size_of::<NextHop>() };
    // SAFETY: `hop` has the layout and the size of the kernel's structure.
    unsafe { helper::bpf_redirect_neigh(ifindex, (&raw mut hop).cast(), size as i32, 0) as i32 }
}

/// Arms a redirect to the pod `dst` through the qdisc of the host's veth `ifindex`; the pod is its own next hop. `mtu_len` is
/// checked against the veth's MTU. Where it is 0 and the packet exceeds the MTU, the caller fragments if `can_fragment`.
#[inline(always)]
pub fn redirect_via_qdisc<F: Family>(
    skb: &Skb,
    ifindex: u32,
    dst: &F::A,
    mtu_len: u32,
    can_fragment: bool,
) -> Result<Fib, Dropped> {
    packed_via_qdisc::<F, false>(skb, ifindex, dst, mtu_len, can_fragment).result().map(Fib::from_code)
}

/// The same for a packet inside of another header of its family, which it loses on the way.
#[inline(always)]
pub fn redirect_inner_via_qdisc<F: Family>(skb: &Skb, ifindex: u32, dst: &F::A, mtu_len: u32) -> Result<Fib, Dropped> {
    packed_via_qdisc::<F, true>(skb, ifindex, dst, mtu_len, false).result().map(Fib::from_code)
}

/// A function of its own for the sake of its stack frame.
#[inline(never)]
fn packed_via_qdisc<F: Family, const IS_INNER: bool>(
    skb: &Skb,
    ifindex: u32,
    dst: &F::A,
    mtu_len: u32,
    can_fragment: bool,
) -> PackedResult {
    let less = if IS_INNER { size_of::<F::Header>() as i32 } else { 0 };
    PackedResult::new(try_via_qdisc::<F>(skb, ifindex, *dst, mtu_len, can_fragment, less))
}

#[inline(always)]
fn try_via_qdisc<F: Family>(
    skb: &Skb,
    ifindex: u32,
    dst: F::A,
    mtu_len: u32,
    can_fragment: bool,
    less: i32,
) -> Result<i32, Dropped> {
    // In: 0, so that the helper measures the packet itself, unless it stands for several; out: the MTU.
    let mut mtu = 0;
    // SAFETY: `mtu` is the word that the helper wants.
    let rc = unsafe { helper::bpf_check_mtu(skb.raw().cast(), ifindex, &raw mut mtu, -less, 0) };
    match rc {
        _ if rc < 0 => Err(DropReason::NoFib.into()),
        MTU_FRAG_NEEDED if mtu_len == 0 && can_fragment => Ok(Fib::needs_fragmentation(mtu)),
        _ if mtu_len > mtu || (mtu_len == 0 && rc == MTU_FRAG_NEEDED) => {
            Err(Dropped { reason: DropReason::FragNeeded, mtu })
        }
        _ => Ok(redirect_neigh(ifindex, F::AF, dst.words(), false)),
    }
}
