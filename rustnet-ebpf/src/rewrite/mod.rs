//! The only place where packet bytes and checksums change: address translation here, ICMP quotations and answers of our
//! own in the files beside.
//!
//! Order inside each function: direct stores first, checksum helpers last, for a helper voids all packet pointers.

mod answer;
mod quotation;
mod sctp;

pub use answer::{Answer, Head, answer};
pub use quotation::{QuotedWriter, quotation};

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::csum::{self, Sum};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{Ctx, Skb, at, at_pulled};
use crate::family::{Family, V4, V6};
use crate::parse::{Header4, Header6, Kind, Packet};
use crate::step::{Packed, Stop};

/// Offsets of checksums in transport headers.
const TCP_CSUM: usize = 16;
const UDP_CSUM: usize = 6;
const ICMP_CSUM: usize = 2;

/// How a family's header takes new addresses and a new hop limit.
pub trait Writer<A>: Sized {
    /// Stores them at `l3` and keeps the header's own checksum right.
    fn store<C: Ctx>(ctx: &C, l3: usize, from: &Tuple<A>, to: &Tuple<A>, old_ttl: u8, ttl: u8) -> Option<()>;
}

impl Writer<Ip4> for Header4 {
    #[inline(always)]
    fn store<C: Ctx>(ctx: &C, l3: usize, from: &Tuple<Ip4>, to: &Tuple<Ip4>, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        let diff = Sum::default()
            .sub(from.src.word())
            .add(to.src.word())
            .sub(from.dst.word())
            .add(to.dst.word())
            .sub16(u16::from(old_ttl) << 8)
            .add16(u16::from(ttl) << 8);
        // SAFETY: `at` proved a whole header.
        unsafe {
            (*h).csum = csum::update((*h).csum, diff);
            (*h).ttl = ttl;
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        Some(())
    }
}

impl Writer<Ip6> for Header6 {
    #[inline(always)]
    fn store<C: Ctx>(ctx: &C, l3: usize, _from: &Tuple<Ip6>, to: &Tuple<Ip6>, old_ttl: u8, ttl: u8) -> Option<()> {
        let h = at::<Self, C>(ctx, l3)?;
        // SAFETY: `at` proved a whole header.
        unsafe {
            (*h).hop_limit = ttl;
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        if ttl != old_ttl {
            // No checksum covers the hop limit. The addresses are the transport's matter, see `translate`.
            ctx.sum_changed(Sum::default().sub16(u16::from(old_ttl)).add16(u16::from(ttl)));
        }
        Some(())
    }
}

/// What the difference between two tuples means for a checksum.
#[inline(always)]
pub fn addresses<A: Address>(from: &Tuple<A>, to: &Tuple<A>) -> Sum {
    Sum::default().sub_addr(from.src).sub_addr(from.dst).add_addr(to.src).add_addr(to.dst)
}

/// As [`addresses`], for the ports.
#[inline(always)]
pub fn ports<A>(from: &Tuple<A>, to: &Tuple<A>) -> Sum {
    Sum::default().sub16(from.sport).sub16(from.dport).add16(to.sport).add16(to.dport)
}

/// Makes the packet what `to` says, with hop limit `ttl`. Later fragments and ICMP errors have no ports to change.
#[inline(always)]
pub fn translate<F: Family>(skb: &Skb, p: &Packet<F::A>, to: &Tuple<F::A>, ttl: u8) -> Result<(), DropReason> {
    if *to == p.tuple && ttl == p.ttl { Ok(()) } else { F::rewrite(skb, p, to, ttl).done() }
}

/// Declares a family's translation as a function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($name:ident, $family:ty, $addr:ty) => {
        /// The translation of one family.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(
            skb: *mut __sk_buff,
            p: *const Packet<$addr>,
            to: *const Tuple<$addr>,
            ttl: u32,
        ) -> u64 {
            if p.is_null() || to.is_null() {
                return Packed::new(Err(DropReason::WriteError.into())).bits();
            }
            // SAFETY: the callers in `family` pass references; the verifier checks sizes.
            let (p, to) = unsafe { (&*p, &*to) };
            Packed::new(change::<$family, _>(&Skb(skb), p, to, ttl as u8).map(|()| 0).map_err(Stop::from)).bits()
        }
    };
}

global!(rn_rewrite4, V4, Ip4);
global!(rn_rewrite6, V6, Ip6);

#[inline(always)]
fn change<F: Family, C: Ctx>(ctx: &C, p: &Packet<F::A>, to: &Tuple<F::A>, ttl: u8) -> Result<(), DropReason> {
    let from = &p.tuple;
    F::Header::store(ctx, p.l3(), from, to, p.ttl, ttl).ok_or(DropReason::WriteError)?;
    if *to == *from {
        return Ok(());
    }
    if p.kind == Kind::LaterFragment {
        no_checksum(ctx, from, to);
        return Ok(());
    }
    let (offset, pseudo, zero_is_none) = match from.proto {
        proto::TCP => (p.l4() + TCP_CSUM, true, false),
        proto::UDP => (p.l4() + UDP_CSUM, true, true),
        proto::ICMPV6 => (p.l4() + ICMP_CSUM, true, false),
        proto::ICMP => (p.l4() + ICMP_CSUM, false, false),
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
            ctx.sum_changed(ports(from, to));
            return Ok(());
        }
    }
    let moved = p.kind == Kind::Flow && (to.sport != from.sport || to.dport != from.dport);
    if moved {
        match from.proto {
            // The identifier of an echo stands in one of the two ports, the other is 0.
            proto::ICMP | proto::ICMPV6 => store_id(ctx, p.l4(), to.sport | to.dport)?,
            _ => store_ports(ctx, p.l4(), to)?,
        }
    }
    if pseudo && !ctx.l4_checksum(offset, addresses(from, to), true, zero_is_none, F::A::IS_V6) {
        return Err(DropReason::WriteError);
    }
    if moved && !ctx.l4_checksum(offset, ports(from, to), false, zero_is_none, F::A::IS_V6) {
        return Err(DropReason::WriteError);
    }
    Ok(())
}

/// Says that the addresses changed and that no transport checksum takes this back; IPv4 has one of its own for them.
#[inline(always)]
fn no_checksum<A: Address, C: Ctx>(ctx: &C, from: &Tuple<A>, to: &Tuple<A>) {
    if A::IS_V6 {
        ctx.sum_changed(addresses(from, to));
    }
}

/// Stores both ports.
#[inline(always)]
fn store_ports<A, C: Ctx>(ctx: &C, l4: usize, to: &Tuple<A>) -> Result<(), DropReason> {
    let p = at::<[u16; 2], C>(ctx, l4).ok_or(DropReason::WriteError)?;
    // SAFETY: `at` proved four bytes.
    unsafe { p.write([to.sport.to_be(), to.dport.to_be()]) };
    Ok(())
}

/// Stores the identifier of an ICMP echo.
#[inline(always)]
fn store_id<C: Ctx>(ctx: &C, l4: usize, id: u16) -> Result<(), DropReason> {
    let p = at::<[u16; 3], C>(ctx, l4).ok_or(DropReason::WriteError)?;
    // SAFETY: `at` proved six bytes.
    unsafe { (*p)[2] = id.to_be() };
    Ok(())
}
