//! The only drop sink: a counter for each reason and hook, and a record in the ring buffer. New flows are recorded there,
//! too, if `FLOW_EVENTS` is set. Counters are exact; records are limited, so that one pod cannot fill the ring for all.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::Address;
use rustnet_common::drop::{DropReason, counter_index};
use rustnet_common::event::Event;

use crate::ctx::{Ctx, Skb};
use crate::family::{Family, V4, V6};
use crate::limit::{self, Bucket};
use crate::maps;
use crate::parse::Parse;
use crate::xdp::Xdp;

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

/// Reports of one family.
pub trait Report: Family {
    /// Counts a packet and records it, or only records the first packet of a flow ([`DropReason::Forwarded`]).
    fn report(skb: &Skb, l3: usize, reason: u8, hook: u8);
}

/// A context whose packets can be reported.
pub trait Recording: Ctx {
    /// Reports a packet; see [`Report::report`].
    fn report<F: Report>(&self, l3: usize, reason: DropReason, hook: u8);
}

impl Recording for Skb {
    #[inline(always)]
    fn report<F: Report>(&self, l3: usize, reason: DropReason, hook: u8) {
        F::report(self, l3, reason as u8, hook);
    }
}

/// XDP serves flows between machines outside and pods of other nodes. Policies judge none of them here.
impl Recording for Xdp {
    #[inline(always)]
    fn report<F: Report>(&self, _l3: usize, _reason: DropReason, _hook: u8) {}
}

/// Declares a family's sink as a function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($name:ident, $family:ty) => {
        /// See [`Report::report`].
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name(skb: *mut __sk_buff, l3: u32, reason: u32, hook: u32) -> i32 {
            report::<$family>(&Skb(skb), (l3 & 0x7f) as usize, reason as u8, hook as u8);
            0
        }

        impl Report for $family {
            #[inline(always)]
            fn report(skb: &Skb, l3: usize, reason: u8, hook: u8) {
                $name(skb.raw(), l3 as u32, u32::from(reason), u32::from(hook));
            }
        }
    };
}

global!(rn_event4, V4);
global!(rn_event6, V6);

/// Reports a packet, and counts it if it is not one that is forwarded anyway: that one is counted where it leaves.
#[inline(always)]
fn report<F: Parse<Skb>>(skb: &Skb, l3: usize, reason: u8, hook: u8) {
    if reason != DropReason::Forwarded as u8 {
        count(skb, reason, hook);
    }
    if !limit::take(Bucket::Events as u32) {
        return;
    }
    let Some(scratch) = F::scratch() else { return };
    let Some(mut slot) = maps::rn_events.reserve_bytes(size_of::<Event>(), 0) else { return };
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and this is the only borrow of the field.
    let p = unsafe { &mut (*scratch).reported };
    p.reset(l3);
    // A packet that cannot be parsed is recorded with the fields read so far.
    let _ = F::parse(skb, p);
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
