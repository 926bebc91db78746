//! SCTP: new ports mean a new CRC32c (RFC 9260, 6.8), found without reading the packet again.

use rustnet_common::addr::Address;
use rustnet_common::crc32c;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::Tuple;

use super::store_ports;
use crate::ctx::{Ctx, at_pulled};
use crate::parse::Packet;

/// Offset of the CRC.
const CRC: usize = 8;

/// Stores the ports of `to` and makes the CRC right, unless it is for the device to fill in or covers later fragments.
#[inline(always)]
pub fn translate<A: Address, C: Ctx>(ctx: &C, p: &Packet<A>, to: &Tuple<A>) -> Result<(), DropReason> {
    let from = &p.tuple;
    let l4 = p.l4();
    if to.sport == from.sport && to.dport == from.dport {
        return Ok(());
    }
    store_ports(ctx, l4, to)?;
    let old = u32::from(from.sport) << 16 | u32::from(from.dport);
    let new = u32::from(to.sport) << 16 | u32::from(to.dport);
    ctx.sum_changed(super::ports(from, to));
    let field = at_pulled::<u32, C>(ctx, l4 + CRC).ok_or(DropReason::WriteError)?;
    // SAFETY: `at_pulled` proved four bytes.
    let crc = unsafe { field.read() };
    // A sender leaves 0 where the device is to compute it.
    if crc == 0 || p.first_of_many() {
        return Ok(());
    }
    let len = p.ip_len.wrapping_sub(l4.wrapping_sub(p.l3()) as u32);
    let updated = (u32::from_le(crc) ^ rn_crc32c(old ^ new, len)).to_le();
    // SAFETY: as above; nothing since has moved the packet.
    unsafe { field.write(updated) };
    ctx.sum_changed(rustnet_common::csum::Sum::default().sub(crc).add(updated));
    Ok(())
}

/// See [`crc32c::first_word`]. With global linkage: its loops are proved once a program, not once for every way that leads
/// to them.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_crc32c(diff: u32, len: u32) -> u32 {
    crc32c::first_word(diff.to_be(), len)
}
