//! Token buckets per CPU for what a sender could otherwise trigger once per packet: ICMP errors of our own (RFC 1812, 4.3.2.8;
//! RFC 4443, 2.4 f) and records in the ring buffer.

use crate::ctx::jiffies;
use crate::maps::{self, Tokens};

/// What is limited.
#[derive(Clone, Copy)]
pub enum Bucket {
    /// ICMP errors that this node sends.
    IcmpErrors = 0,
    /// Records in `rn_events`.
    Events = 1,
    /// ICMP errors about flows that policies deny: whoever asks for those all the time takes none of the others.
    Denials = 2,
}

/// Tokens that a bucket holds, and gets back per second and CPU. Linux sends 1,000 ICMP errors per second
/// (`net.ipv4.icmp_msgs_per_sec`).
const RATE: u32 = 1000;

/// Takes a token from a [`Bucket`]; false if none is left. What has no bucket is not limited.
#[inline(always)]
pub fn take(bucket: u32) -> bool {
    let (Some(tokens), Some(config)) = (maps::rn_limits.get_ptr_mut(bucket), maps::config()) else {
        return true;
    };
    let now = jiffies();
    // SAFETY: the element belongs to this CPU.
    let tokens = unsafe { &mut *tokens };
    // Unlike other times, none here lies ahead: another CPU writes no element of this one. A new map says 0.
    if now.wrapping_sub(tokens.filled) >= config.hz {
        *tokens = Tokens { filled: now, taken: 0 };
    }
    if tokens.taken >= RATE {
        return false;
    }
    tokens.taken += 1;
    true
}
