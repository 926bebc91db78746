//! Single fields, and what their change means for a checksum: shared by all rewrites.

use rustnet_common::addr::Address;
use rustnet_common::csum::Sum;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::Tuple;

use crate::ctx::{Checksums, Ctx, at};

/// Offsets of checksums in transport headers.
pub const TCP_CSUM: usize = 16;
/// UDP, UDP-Lite (RFC 3828) and DCCP (RFC 4340) have it at the same place.
pub const UDP_CSUM: usize = 6;
/// ICMP and ICMPv6.
pub const ICMP_CSUM: usize = 2;

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

/// Accounts for changed addresses that no transport checksum covers; IPv4 has a header checksum for them.
#[inline(always)]
pub fn no_checksum<A: Address, C: Checksums>(ctx: &C, from: &Tuple<A>, to: &Tuple<A>) {
    if A::IS_V6 {
        ctx.update_csum(addresses(from, to));
    }
}

/// Stores both ports.
#[inline(always)]
pub fn store_ports<A, C: Ctx>(ctx: &C, l4: usize, to: &Tuple<A>) -> Result<(), DropReason> {
    let p = at::<[u16; 2], C>(ctx, l4).ok_or(DropReason::WriteError)?;
    // SAFETY: `at` proved four bytes.
    unsafe { p.write([to.sport.to_be(), to.dport.to_be()]) };
    Ok(())
}

/// Stores the identifier of an ICMP echo.
#[inline(always)]
pub fn store_id<C: Ctx>(ctx: &C, l4: usize, id: u16) -> Result<(), DropReason> {
    let p = at::<[u16; 3], C>(ctx, l4).ok_or(DropReason::WriteError)?;
    // SAFETY: `at` proved six bytes.
    unsafe { (*p)[2] = id.to_be() };
    Ok(())
}
