//! ICMP errors belong to the connection they quote. Contract: finds that connection, lets `rewrite` translate the inner packet
//! back into what its sender once sent, and returns what the error's own addresses become.
//!
//! The inner packet went one way, the error goes the other: the entry that serves it is the one that serves an answer. So one
//! rule holds for service, masquerade and plain flows, in both directions.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{NOT_LOCAL, SOURCE_HOST, SOURCE_NONE, SOURCE_OUTSIDE, Side, flags};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::table::{self, Placed};
use super::{conntrack, route};
use crate::ctx::{Checksums, Ctx, Skb, at_pulled, masked};
use crate::family::{Family, V4, V6};
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Class, Flow, InnerPacket, Packet, Translation};
use crate::parse::ReadHeader;
use crate::rewrite::{self, WriteInner};
use crate::wire::ICMP_LEN;

/// Bytes of the transport header that an error quotes at least (RFC 792).
const QUOTED_MIN: u32 = 8;

/// Results of [`Icmp::relate`].
const UNKNOWN: i32 = 0;
/// See [`UNKNOWN`].
const KNOWN: i32 = 1;
/// The flow's far end is a pod of this node, sends through the tunnel, or is this host: see [`Reporter::Outside`].
const INSIDE: i32 = 2;
/// Flags of the flows of clients outside.
const OUTSIDE: u16 = flags::EXTERNAL | flags::SECOND_ADDRESS | flags::DIRECT;

/// Who may send an error.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Reporter {
    /// The receiver of what it quotes, and every router on the way there.
    AnyHop = 0,
    /// The receiver alone. A pod is no router: an error about another's flow would carry its own address out as it is, and end
    /// the other's connection.
    Receiver = 1,
    /// As any hop, of flows whose other end answers by an uplink or has not answered: no machine
    /// outside sees a packet of the others.
    Outside = 2,
}

/// ICMP errors of one family and context.
pub trait Icmp<C: Ctx>: Family {
    /// Relates the error to its flow: bits of [`KNOWN`], [`INSIDE`], [`flags::VIA_STACK`] and [`OUTSIDE`] in the result. `to` becomes what the
    /// error's own addresses become.
    fn relate(ctx: &C, p: &Packet<Self::A>, to: &mut Translation<Self::A>, by: Reporter) -> PackedResult;
}

/// Declares a family's function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty, $ctx:ident, $raw:ty) => {
        impl Icmp<$ctx> for $family {
            #[inline(always)]
            fn relate(ctx: &$ctx, p: &Packet<$addr>, to: &mut Translation<$addr>, by: Reporter) -> PackedResult {
                PackedResult::from_bits($name(ctx.raw(), p, to, by as u32))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(ctx: *mut $raw, p: *const Packet<$addr>, to: *mut Translation<$addr>, by: u32) -> u64 {
            let is_by_receiver = by == Reporter::Receiver as u32;
            // SAFETY: the only caller is above and passes references; the verifier checks sizes.
            let related = match unsafe { (p.as_ref(), to.as_mut()) } {
                (Some(p), Some(to)) => try_relate::<$family, _>(&$ctx(ctx), p, to, is_by_receiver),
                _ => Ok(UNKNOWN),
            };
            PackedResult::new(related.map_err(Dropped::from)).bits()
        }
    };
}

global!(rn_icmp4, V4, Ip4, Skb, __sk_buff);
global!(rn_icmp6, V6, Ip6, Skb, __sk_buff);

/// Classifies an ICMP error, and translates the packet inside: [`Class::Related`] if it quotes a known flow, else
/// [`Class::New`].
#[inline(always)]
pub fn relate<F: Icmp<C>, C: Ctx>(
    ctx: &C,
    p: &Packet<F::A>,
    flow: &'static mut Flow<F::A>,
    by: Reporter,
) -> Result<&'static mut Flow<F::A>, DropReason> {
    flow.reset(&p.tuple);
    let known = F::relate(ctx, p, &mut flow.to, by).result().map_err(|dropped| dropped.reason)?;
    if by == Reporter::Outside && known & INSIDE != 0 {
        // It goes no further, so that it does not matter what of it is translated.
        return Err(DropReason::IcmpUnrelated);
    }
    if known != UNKNOWN {
        flow.class = Class::Related;
        flow.flags = known as u16 & (flags::VIA_STACK | OUTSIDE);
    }
    Ok(flow)
}

#[inline(always)]
fn try_relate<F: Placed + Family<Header: ReadHeader<F::A> + WriteInner<F::A>>, C: Checksums>(
    ctx: &C,
    p: &Packet<F::A>,
    to: &mut Translation<F::A>,
    is_by_receiver: bool,
) -> Result<i32, DropReason> {
    let Some(q) = read_inner::<F, C>(ctx, p.l4() + ICMP_LEN) else { return Ok(UNKNOWN) };
    if q.l4 + QUOTED_MIN > u32::from(p.l3) + p.ip_len {
        // What stands behind the packet, padding, its checksum does not cover.
        return Ok(UNKNOWN);
    }
    if p.tuple.dst != q.tuple.src {
        // An error goes to the sender of what it quotes; else it would carry a quotation to a third party
        // (netfilter: nf_conntrack_inet_error).
        return Ok(UNKNOWN);
    }
    if is_by_receiver && p.tuple.src != q.tuple.dst {
        return Ok(UNKNOWN);
    }
    let is_swapped = q.tuple.store_reverse_canonical(&mut q.key);
    let entry = table::find::<F>(&q.key, is_swapped);
    if entry.is_null() {
        return Ok(UNKNOWN);
    }
    // SAFETY: map values stay readable for this run of the program.
    let (entry_flags, entry_to) = unsafe { ((*entry).flags, &(*entry).to) };
    let is_nat = entry_flags & flags::NAT != 0;
    let dst = if is_nat { entry_to.dst } else { p.tuple.dst };
    let receiver = masked::<1>(usize::from(is_nat || !conntrack::is_reply(entry_flags, is_swapped)));
    // SAFETY: see above; the index is 0 or 1.
    let (ifindex, far) = unsafe {
        let sides = (&raw const (*entry).sides).cast::<Side>();
        ((*sides.add(receiver)).ifindex, inside(sides.add(receiver ^ 1)))
    };
    if route::is_replaced(ifindex, dst) {
        // Another pod has the address now: it gets nothing of the connections of the one before.
        return Ok(UNKNOWN);
    }
    if !is_nat {
        return Ok(KNOWN | far | i32::from(entry_flags & flags::VIA_STACK));
    }
    if entry_flags & flags::DIRECT != 0 {
        // The backend's node translates it, as it translates the flow.
        to.tuple.dst = entry_to.dst;
        return Ok(KNOWN | far | i32::from(entry_flags & OUTSIDE));
    }
    q.translated = entry_to.reversed();
    to.tuple.dst = q.translated.src;
    if p.tuple.src == q.tuple.dst {
        // The far end itself sends the error; a router on the way keeps its own address.
        to.tuple.src = q.translated.dst;
    }
    rewrite::inner::<F, C>(ctx, p.l4(), q)?;
    Ok(KNOWN | far | i32::from(entry_flags & OUTSIDE))
}

/// [`INSIDE`] unless a side of a connection may be beyond an uplink. Before that side has sent anything, only a pod of this node is
/// known to be inside. By arithmetic, for the verifier would follow each condition to the end.
#[inline(always)]
fn inside(side: *const Side) -> i32 {
    // SAFETY: the only caller passes a side of a map value.
    let (source, ifindex) = unsafe { ((*side).source, (*side).ifindex) };
    let bits = (source[0] ^ SOURCE_OUTSIDE[0]) | (source[1] & !SOURCE_OUTSIDE[1]) | u64::from(ifindex.wrapping_add(1));
    let is_inside = (bits | bits >> 32) as u32 & !1;
    ((is_inside | is_inside.wrapping_neg()) >> 31) as i32 * INSIDE
}

const _: () = assert!(
    flags::VIA_STACK > 3
        && flags::EXTERNAL > 3
        && flags::SECOND_ADDRESS > 3
        && flags::DIRECT > 3
        && NOT_LOCAL == u32::MAX
        && SOURCE_OUTSIDE[1] == 1
        && SOURCE_NONE[1] == 0
        && SOURCE_HOST[1] == 2
);

/// Reads the inner packet at `l3`: at least the first eight bytes of its transport header are there (RFC 792).
#[inline(always)]
fn read_inner<F: Family<Header: ReadHeader<F::A>>, C: Ctx>(
    ctx: &C,
    l3: usize,
) -> Option<&'static mut InnerPacket<F::A>> {
    let scratch = F::scratch()?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and this is the only borrow of the field.
    let q = unsafe { &mut (*scratch).inner };
    let l4 = F::Header::inner(ctx, l3, &mut q.tuple)?;
    q.l3 = l3 as u32;
    q.l4 = l4 as u32;
    q.tuple.sport = 0;
    q.tuple.dport = 0;
    match q.tuple.proto {
        proto::TCP | proto::UDP | proto::SCTP => {
            let ports = at_pulled::<[u16; 2], C>(ctx, l4)?;
            // SAFETY: `at_pulled` proved four bytes.
            let [sport, dport] = unsafe { ports.read() };
            q.tuple.sport = u16::from_be(sport);
            q.tuple.dport = u16::from_be(dport);
        }
        proto::ICMP | proto::ICMPV6 => {
            let h = at_pulled::<[u16; 3], C>(ctx, l4)?;
            // SAFETY: `at_pulled` proved six bytes.
            let h = unsafe { h.read() };
            let id = u16::from_be(h[2]);
            match (F::A::IS_V6, h[0].to_ne_bytes()[0]) {
                (false, 8) | (true, 128) => q.tuple.sport = id,
                (false, 0) | (true, 129) => q.tuple.dport = id,
                _ => return None,
            }
        }
        _ => {}
    }
    Some(q)
}
