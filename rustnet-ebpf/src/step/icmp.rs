//! ICMP errors belong to the connection they quote. Contract: finds that connection, lets `rewrite` translate the quotation
//! back into what its sender once sent, and says what the error's own addresses become.
//!
//! The quoted packet went one way, the error goes the other: its connection half is the quoted tuple reversed, exactly the
//! half that an answer would have taken. So one rule serves service, masquerade and plain flows, in both directions.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::{Tuple, proto};

use super::{Packed, Stop};
use crate::ctx::{Ctx, at_pulled};
use crate::family::Family;
use crate::parse::{Header, Packet};
use crate::rewrite;

/// Length of an ICMP header.
const ICMP_LEN: usize = 8;

/// Translates an ICMP error; `out` becomes its own new tuple. False when it quotes nothing we know.
#[inline(always)]
pub fn translate<F: Family, C: Ctx>(ctx: &C, p: &Packet<F::A>, out: &mut Tuple<F::A>) -> Result<bool, DropReason> {
    match packed_translate::<F, C>(ctx, p, out).result() {
        Ok(known) => Ok(known != 0),
        Err(stop) => Err(stop.reason),
    }
}

#[inline(never)]
fn packed_translate<F: Family, C: Ctx>(ctx: &C, p: &Packet<F::A>, out: &mut Tuple<F::A>) -> Packed {
    Packed::new(try_translate::<F, C>(ctx, p, out).map(i32::from).map_err(Stop::from))
}

#[inline(always)]
fn try_translate<F: Family, C: Ctx>(ctx: &C, p: &Packet<F::A>, out: &mut Tuple<F::A>) -> Result<bool, DropReason> {
    let Some(q) = quoted::<F, C>(ctx, p.l4() + ICMP_LEN) else { return Ok(false) };
    q.answer = q.quoted.reversed();
    let Some(entry) = F::connections().get_ptr(&q.answer) else { return Ok(false) };
    // SAFETY: map values stay valid for this run of the program.
    let entry = unsafe { &*entry };
    if entry.flags & flags::NAT == 0 {
        return Ok(true);
    }
    q.becomes = entry.to.reversed();
    out.dst = q.becomes.src;
    if p.tuple.src == q.quoted.dst {
        // The far end itself complains; a router on the way keeps its own address.
        out.src = q.becomes.dst;
    }
    rewrite::quotation::<F, C>(ctx, p.l4(), q)?;
    Ok(true)
}

/// The packet that an error quotes, and what it becomes.
#[repr(C)]
pub struct Quotation<A> {
    /// Its tuple.
    pub quoted: Tuple<A>,
    /// What that becomes.
    pub becomes: Tuple<A>,
    /// Key of the connection's half: the tuple reversed.
    answer: Tuple<A>,
    /// Offset of its IP header.
    pub l3: u32,
    /// Offset of its transport header.
    pub l4: u32,
}

/// Reads the quotation at `l3`: at least the first eight bytes of its transport header are there (RFC 792).
#[inline(always)]
fn quoted<F: Family, C: Ctx>(ctx: &C, l3: usize) -> Option<&'static mut Quotation<F::A>> {
    let scratch = F::scratch()?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and nobody else borrows the field.
    let q = unsafe { &mut (*scratch).quotation };
    let l4 = F::Header::quoted(ctx, l3, &mut q.quoted)?;
    q.l3 = l3 as u32;
    q.l4 = l4 as u32;
    q.quoted.sport = 0;
    q.quoted.dport = 0;
    match q.quoted.proto {
        proto::TCP | proto::UDP | proto::SCTP => {
            let ports = at_pulled::<[u16; 2], C>(ctx, l4)?;
            // SAFETY: `at_pulled` proved four bytes.
            let [sport, dport] = unsafe { ports.read() };
            q.quoted.sport = u16::from_be(sport);
            q.quoted.dport = u16::from_be(dport);
        }
        proto::ICMP | proto::ICMPV6 => {
            let h = at_pulled::<[u16; 3], C>(ctx, l4)?;
            // SAFETY: `at_pulled` proved six bytes.
            let h = unsafe { h.read() };
            let id = u16::from_be(h[2]);
            match (F::A::IS_V6, h[0].to_ne_bytes()[0]) {
                (false, 8) | (true, 128) => q.quoted.sport = id,
                (false, 0) | (true, 129) => q.quoted.dport = id,
                _ => return None,
            }
        }
        _ => {}
    }
    Some(q)
}
