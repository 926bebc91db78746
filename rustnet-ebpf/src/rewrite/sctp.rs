//! SCTP: new ports mean a new CRC32c (RFC 9260, 6.8), found without reading the packet again.

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::Address;
use rustnet_common::crc32c;
use rustnet_common::csum::Sum;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::Tuple;

use super::field::{self, store_ports};
use crate::ctx::{Checksums, at_pulled};
use crate::packet::Packet;

/// Offset of the CRC.
const CRC: usize = 8;

/// Stores the ports of `to` and makes the CRC right, unless it is for the device to fill in or covers later fragments.
#[inline(always)]
pub fn translate<A: Address, C: Checksums>(ctx: &C, p: &Packet<A>, to: &Tuple<A>) -> Result<(), DropReason> {
    let from = &p.tuple;
    let l4 = p.l4();
    if to.sport == from.sport && to.dport == from.dport {
        return Ok(());
    }
    store_ports(ctx, l4, to)?;
    let old = u32::from(from.sport) << 16 | u32::from(from.dport);
    let new = u32::from(to.sport) << 16 | u32::from(to.dport);
    ctx.update_csum(field::ports(from, to));
    let field = at_pulled::<u32, C>(ctx, l4 + CRC).ok_or(DropReason::WriteError)?;
    // SAFETY: `at_pulled` proved four bytes.
    let crc = unsafe { field.read() };
    // A sender leaves 0 where the device is to compute it.
    if crc == 0 || p.is_first_fragment() {
        return Ok(());
    }
    let len = p.ip_len.wrapping_sub(l4.wrapping_sub(p.l3()) as u32);
    let updated = (u32::from_le(crc) ^ rn_crc32c(old ^ new, len)).to_le();
    // SAFETY: as above; nothing since has moved the packet.
    unsafe { field.write(updated) };
    ctx.update_csum(Sum::default().sub(crc).add(updated));
    Ok(())
}

/// A CRC under way.
#[repr(C)]
struct Crc {
    value: u32,
    len: u32,
}

/// See [`crc32c::first_word`]. With global linkage: it is proved once per program, not once for every way that leads to it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_crc32c(diff: u32, len: u32) -> u32 {
    let mut crc = Crc { value: diff.to_be(), len };
    // SAFETY: the callback has the signature that the helper wants, and `crc` outlives the call.
    unsafe { helper::bpf_loop(crc32c::POWERS as u32, next_power as *mut c_void, (&raw mut crc).cast(), 0) };
    crc.value
}

/// One round: `bpf_loop` calls it. The verifier checks it once.
extern "C" fn next_power(round: u32, crc: *mut c_void) -> u64 {
    // SAFETY: `rn_crc32c` passes a pointer to its own variable.
    let crc = unsafe { &mut *crc.cast::<Crc>() };
    crc.value = crc32c::step(crc.value, crc.len, round as usize);
    0
}
