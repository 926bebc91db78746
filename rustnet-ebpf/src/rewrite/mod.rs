//! The only place where packet bytes and checksums change: address translation here; the inner packets of ICMP errors, rejections and
//! the overlay's headers in the other files.
//!
//! Order inside each function: direct stores first, checksum helpers last, since a helper voids all packet pointers.

mod direct;
mod encap;
mod field;
mod inner;
mod reject;
mod sctp;

pub use direct::{Wrap, unwrap, wrap};
pub use encap::{Encap, Encapsulated, can_change_family, decapsulate, encapsulate};
pub use inner::{WriteInner, inner};
pub use reject::{BuildHeader, error, reset};

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::csum::{self, Sum};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{Checksums, Ctx, Skb, at, at_pulled};
use crate::family::{Family, V4, V6};
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, Kind, Packet};
use crate::wire::{Ethernet, Header4, Header6};
use crate::xdp::Xdp;
use field::{ICMP_CSUM, TCP_CSUM, UDP_CSUM, addresses, no_checksum, ports, store_id, store_ports};

/// How a family's header takes new addresses and a new hop limit.
pub trait WriteHeader<A>: Sized {
    /// Stores them at `l3` and keeps the header's own checksum right. `diff` is that of the addresses.
    fn store<C: Checksums>(ctx: &C, l3: usize, diff: Sum, to: &Tuple<A>, old_ttl: u8, ttl: u8) -> Option<()>;
    /// As [`WriteHeader::store`], of the hop limit alone.
    fn store_ttl<C: Checksums>(ctx: &C, l3: usize, old_ttl: u8, ttl: u8) -> Option<()>;
}

impl WriteHeader<Ip4> for Header4 {
    #[inline(always)]
    fn store<C: Checksums>(ctx: &C, l3: usize, diff: Sum, to: &Tuple<Ip4>, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        let diff = diff.sub16(u16::from(old_ttl) << 8).add16(u16::from(ttl) << 8);
        // SAFETY: `at` proved a whole header.
        unsafe {
            (*h).csum = csum::update((*h).csum, diff);
            (*h).ttl = ttl;
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        Some(())
    }

    #[inline(always)]
    fn store_ttl<C: Checksums>(ctx: &C, l3: usize, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        let diff = Sum::default().sub16(u16::from(old_ttl) << 8).add16(u16::from(ttl) << 8);
        // SAFETY: `at` proved a whole header.
        unsafe {
            (*h).csum = csum::update((*h).csum, diff);
            (*h).ttl = ttl;
        }
        Some(())
    }
}

impl WriteHeader<Ip6> for Header6 {
    #[inline(always)]
    fn store<C: Checksums>(ctx: &C, l3: usize, _diff: Sum, to: &Tuple<Ip6>, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        // SAFETY: `at` proved a whole header.
        unsafe {
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        // The addresses are the transport's matter, see `translate`.
        Self::store_ttl(ctx, l3, old_ttl, ttl)
    }

    #[inline(always)]
    fn store_ttl<C: Checksums>(ctx: &C, l3: usize, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        // SAFETY: `at` proved a whole header.
        unsafe { (*h).hop_limit = ttl };
        if ttl != old_ttl {
            // No checksum covers the hop limit.
            ctx.update_csum(Sum::default().sub16(u16::from(old_ttl)).add16(u16::from(ttl)));
        }
        Some(())
    }
}

/// Translation of packets of one family and context.
pub trait Rewrite<C: Checksums = Skb>: Family {
    /// See [`translate`]. `to` is not the packet's tuple.
    fn rewrite(ctx: &C, p: &Packet<Self::A>, to: &Tuple<Self::A>, ttl: u8) -> PackedResult;
    /// Stores another hop limit, and nothing else.
    fn set_ttl(ctx: &C, p: &Packet<Self::A>, ttl: u8) -> Result<(), DropReason>;
}

/// Makes the packet what `flow.to` says, with hop limit `ttl`. Later fragments and ICMP errors have no ports to change.
#[inline(always)]
pub fn translate<F: Rewrite<C>, C: Checksums>(
    ctx: &C,
    p: &Packet<F::A>,
    flow: &Flow<F::A>,
    ttl: u8,
) -> Result<(), DropReason> {
    if !flow.is_plain() && flow.to.tuple != p.tuple {
        return F::rewrite(ctx, p, &flow.to.tuple, ttl).into_unit();
    }
    if ttl == p.ttl {
        return Ok(());
    }
    // Most packets: no more than the hop limit, without a call.
    F::set_ttl(ctx, p, ttl)
}

/// Stores the MACs of a frame, the sender's first.
#[inline(always)]
pub fn set_macs<C: Ctx>(ctx: &C, macs: &[u16; 6]) -> Result<(), DropReason> {
    let header = at::<[u16; 6], _>(ctx, 0).ok_or(DropReason::WriteError)?;
    let [a, b, c, to @ ..] = *macs;
    // SAFETY: `at` proved both addresses.
    unsafe { header.write([to[0], to[1], to[2], a, b, c]) };
    Ok(())
}

/// Stores the EtherType of a frame, given in network order.
#[inline(always)]
pub fn set_ethertype<C: Ctx>(ctx: &C, ethertype: u16) -> Result<(), DropReason> {
    let header = at::<Ethernet, _>(ctx, 0).ok_or(DropReason::WriteError)?;
    // SAFETY: `at` proved a whole header.
    unsafe { (*header).ethertype = ethertype };
    Ok(())
}

/// Declares a family's translation as a function with global linkage, for the reason that the parser is one. BTF has the type of the
/// context, so that each context needs its own.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty, $ctx:ident, $raw:ty) => {
        /// The translation of one family and context.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(ctx: *mut $raw, p: *const Packet<$addr>, to: *const Tuple<$addr>, ttl: u32) -> u64 {
            if p.is_null() || to.is_null() {
                return PackedResult::new(Err(DropReason::WriteError.into())).bits();
            }
            // SAFETY: the only caller is below and passes references; the verifier checks sizes.
            let (p, to) = unsafe { (&*p, &*to) };
            PackedResult::new(change::<$family, _>(&$ctx(ctx), p, to, ttl as u8).map(|()| 0).map_err(Dropped::from))
                .bits()
        }

        impl Rewrite<$ctx> for $family {
            #[inline(always)]
            fn rewrite(ctx: &$ctx, p: &Packet<$addr>, to: &Tuple<$addr>, ttl: u8) -> PackedResult {
                PackedResult::from_bits($name(ctx.raw(), p, to, u32::from(ttl)))
            }
            #[inline(always)]
            fn set_ttl(ctx: &$ctx, p: &Packet<$addr>, ttl: u8) -> Result<(), DropReason> {
                let stored = <$family as Family>::Header::store_ttl(ctx, p.l3(), p.ttl, ttl);
                stored.ok_or(DropReason::WriteError)
            }
        }
    };
}

global!(rn_rewrite4, V4, Ip4, Skb, __sk_buff);
global!(rn_rewrite6, V6, Ip6, Skb, __sk_buff);
global!(rn_xdp_rewrite4, V4, Ip4, Xdp, xdp_md);
global!(rn_xdp_rewrite6, V6, Ip6, Xdp, xdp_md);

#[inline(always)]
fn change<F: Family<Header: WriteHeader<F::A>>, C: Checksums>(
    ctx: &C,
    p: &Packet<F::A>,
    to: &Tuple<F::A>,
    ttl: u8,
) -> Result<(), DropReason> {
    let from = &p.tuple;
    let diff = addresses(from, to);
    F::Header::store(ctx, p.l3(), diff, to, p.ttl, ttl).ok_or(DropReason::WriteError)?;
    if p.kind == Kind::LaterFragment {
        no_checksum(ctx, from, to);
        return Ok(());
    }
    let (offset, pseudo, zero_is_none) = match from.proto {
        proto::TCP => (p.l4() + TCP_CSUM, true, false),
        proto::UDP => (p.l4() + UDP_CSUM, true, true),
        // Both sum up the pseudo header, too; their ports are not translated.
        proto::UDPLITE | proto::DCCP => (p.l4() + UDP_CSUM, true, false),
        proto::ICMPV6 if F::A::IS_V6 => (p.l4() + ICMP_CSUM, true, false),
        proto::ICMP if !F::A::IS_V6 => (p.l4() + ICMP_CSUM, false, false),
        proto::SCTP => {
            sctp::translate(ctx, p, to)?;
            no_checksum(ctx, from, to);
            return Ok(());
        }
        _ => {
            no_checksum(ctx, from, to);
            return Ok(());
        }
    };
    if from.proto == proto::UDP {
        let field = at_pulled::<u16, C>(ctx, offset).ok_or(DropReason::WriteError)?;
        // SAFETY: `at_pulled` proved two bytes.
        if unsafe { field.read() } == 0 {
            // The sender computed none (RFC 768), and none is made up here.
            store_ports(ctx, p.l4(), to)?;
            no_checksum(ctx, from, to);
            ctx.update_csum(ports(from, to));
            return Ok(());
        }
    }
    let moved = p.kind == Kind::Flow && (to.sport != from.sport || to.dport != from.dport);
    let mut before = 0;
    if moved {
        match from.proto {
            // The identifier of an echo stands in one of the two ports, the other is 0.
            proto::ICMP | proto::ICMPV6 => store_id(ctx, p.l4(), to.sport | to.dport)?,
            _ => store_ports(ctx, p.l4(), to)?,
        }
        let field = at::<u16, C>(ctx, offset).ok_or(DropReason::WriteError)?;
        // SAFETY: `at` proved two bytes.
        before = unsafe { field.read() };
    }
    if pseudo && !ctx.l4_csum_replace(offset, diff, true, zero_is_none, F::A::IS_V6) {
        return Err(DropReason::WriteError);
    }
    let diff = if pseudo { diff } else { Sum::default() };
    if moved && !ctx.ports_csum_replace(offset, (before, diff), ports(from, to), zero_is_none) {
        return Err(DropReason::WriteError);
    }
    Ok(())
}
