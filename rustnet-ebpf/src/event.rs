//! The only drop sink: a counter for each reason and hook, and a record in the ring buffer.

use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::Address;
use rustnet_common::drop::counter_index;
use rustnet_common::event::Event;

use crate::ctx::{Ctx, Skb};
use crate::family::Family;
use crate::maps;
use crate::parse::Packet;

/// Counts a packet.
#[inline(always)]
pub fn count<C: Ctx>(ctx: &C, reason: u8, hook: u8) {
    if let Some(counter) = maps::rn_counters.get_ptr_mut(counter_index(reason, hook)) {
        // SAFETY: the element belongs to this CPU.
        unsafe {
            (*counter).packets = (*counter).packets.wrapping_add(1);
            (*counter).bytes = (*counter).bytes.wrapping_add(u64::from(ctx.len()));
        }
    }
}

/// Counts and reports a packet that goes no further.
#[inline(always)]
pub fn drop<F: Family>(skb: &Skb, l3: usize, reason: u8, hook: u8) {
    count(skb, reason, hook);
    let Some(mut slot) = maps::rn_events.reserve_bytes(size_of::<Event>(), 0) else { return };
    let mut p = Packet::new(l3);
    // What could be read before the parser gave up is worth telling.
    let _ = F::parse(skb, &mut p);
    let t = &p.tuple;
    // SAFETY: no arguments.
    let time = unsafe { helper::bpf_ktime_get_ns() };
    let event = Event {
        time,
        src: t.src.to_addr(),
        dst: t.dst.to_addr(),
        sport: t.sport,
        dport: t.dport,
        proto: t.proto,
        reason,
        hook,
        pad: 0,
        ifindex: skb.ifindex(),
        len: skb.len(),
    };
    // SAFETY: the reservation has the size of an event and is 8-byte aligned.
    unsafe { slot.as_mut_ptr().cast::<Event>().write(event) };
    slot.submit(0);
}
