//! `rn_events`: records in the ring buffer.

use crate::addr::Addr;
use crate::shared_type;

/// One drop, or one new flow where those are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Nanoseconds since boot (`bpf_ktime_get_ns`; drops are rare enough to pay for it).
    pub time: u64,
    /// Source address, IPv4 as mapped; unspecified when the packet could not be parsed.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, host order.
    pub sport: u16,
    /// Destination port, host order.
    pub dport: u16,
    /// IP protocol.
    pub proto: u8,
    /// Code of [`crate::drop::DropReason`]; 0 is a new flow.
    pub reason: u8,
    /// One of [`crate::drop::hook`].
    pub hook: u8,
    /// Zero.
    pub pad: u8,
    /// Interface the hook belongs to.
    pub ifindex: u32,
    /// Length of the frame.
    pub len: u32,
}

shared_type!(Event, 56);
