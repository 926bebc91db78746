//! The packet that an ICMP error quotes, translated, and what that means for the error's own checksum.

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::csum::{self, Sum};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::{Tuple, proto};

use super::field::{ICMP_CSUM, addresses, ports, store_id, store_ports};
use crate::ctx::{Checksums, Ctx, at_pulled};
use crate::family::Family;
use crate::packet::InnerPacket;
use crate::wire::{Header4, Header6};

/// How a quoted header changes, and by how much that changes the sum over it.
pub trait WriteInner<A>: Sized {
    /// Stores the addresses of `to` at `l3`; gives the difference of the sum over the header.
    fn rewrite_inner<C: Ctx>(ctx: &C, l3: usize, from: &Tuple<A>, to: &Tuple<A>) -> Option<Sum>;
}

impl WriteInner<Ip4> for Header4 {
    #[inline(always)]
    fn rewrite_inner<C: Ctx>(ctx: &C, l3: usize, from: &Tuple<Ip4>, to: &Tuple<Ip4>) -> Option<Sum> {
        let h = at_pulled::<Self, C>(ctx, l3)?;
        // SAFETY: `at_pulled` proved a whole header.
        unsafe {
            (*h).csum = csum::update((*h).csum, addresses(from, to));
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        // The header's own checksum took the whole difference: the sum over the header is what it was.
        Some(Sum::default())
    }
}

impl WriteInner<Ip6> for Header6 {
    #[inline(always)]
    fn rewrite_inner<C: Ctx>(ctx: &C, l3: usize, from: &Tuple<Ip6>, to: &Tuple<Ip6>) -> Option<Sum> {
        let h = at_pulled::<Self, C>(ctx, l3)?;
        // SAFETY: `at_pulled` proved a whole header.
        unsafe {
            (*h).src = to.src;
            (*h).dst = to.dst;
        }
        Some(addresses(from, to))
    }
}

/// Makes the quoted packet what `to` says, and the checksum of the error at `l4` right. The quoted transport checksum
/// stays: a quotation is cut short, nobody can verify it.
#[inline(always)]
pub fn inner<F: Family<Header: WriteInner<F::A>>, C: Checksums>(
    ctx: &C,
    l4: usize,
    q: &InnerPacket<F::A>,
) -> Result<(), DropReason> {
    let (from, to) = (&q.tuple, &q.translated);
    let mut diff = F::Header::rewrite_inner(ctx, q.l3 as usize & INNER_MAX, from, to).ok_or(DropReason::WriteError)?;
    if from.sport != to.sport || from.dport != to.dport {
        let ports_at = q.l4 as usize & INNER_MAX;
        match from.proto {
            proto::ICMP | proto::ICMPV6 => store_id(ctx, ports_at, to.sport | to.dport)?,
            _ => store_ports(ctx, ports_at, to)?,
        }
        diff = Sum(diff.0 + ports(from, to).0);
    }
    if diff != Sum::default() && !ctx.l4_csum_replace(l4 + ICMP_CSUM, diff, false, false, F::A::IS_V6) {
        return Err(DropReason::WriteError);
    }
    Ok(())
}

/// Offsets into a quotation are below this: the verifier forgets the bound of what was stored in a map.
const INNER_MAX: usize = 0x3ff;
