//! TCP within connection tracking. Contract: [`follow`] returns what a segment changes in the state of its connection, and follows
//! the sequence numbers of both sides. A segment with numbers of another connection changes nothing.
//!
//! It is forwarded all the same, for its receiver judges it.

use rustnet_common::conntrack::{MAX_IN_FLIGHT, NOT_LOCAL, SEQ_WINDOW, Side, state};

use crate::packet::Packet;
use crate::wire::tcp;

/// Places by which bits to clear are shifted, behind all bits of [`state`].
pub const CLEAR: u32 = 32;

/// Follows a segment that is no RST; returns bits of the state to set, and [`CLEAR`] places higher those to clear.
///
/// # Safety
/// Both are sides of a map value: that of the sender and that of the receiver.
#[inline(always)]
pub unsafe fn follow<A>(sender: *mut Side, receiver: *mut Side, p: &Packet<A>, old: u64, is_reply: bool) -> u64 {
    // SAFETY: see above; other CPUs write the side, too, as in `rn_tcp`.
    unsafe {
        if is_next(&raw const *sender, p, old) {
            ((*sender).seq_end, (*sender).ack) = (p.seq_end, p.ack);
            return old & state::ESTABLISHED;
        }
    }
    let numbers = u64::from(p.seq) | u64::from(p.ack) << 32;
    let control = u64::from(p.seq_end) | u64::from(p.tcp_flags) << 32 | u64::from(is_reply) << 40;
    rn_tcp(sender, receiver, numbers, control, old)
}

/// True for what most segments are: the next one of an established connection, with nothing but data and an acknowledgement. What
/// [`rn_tcp`] makes of it takes no call.
#[inline(always)]
unsafe fn is_next<A>(sender: *const Side, p: &Packet<A>, old: u64) -> bool {
    const ESTABLISHED: u64 = state::ANSWERED | state::ESTABLISHED;
    // SAFETY: `follow` passes a side of a map value.
    let (expected, acknowledged) = unsafe { ((*sender).seq_end, (*sender).ack) };
    old == ESTABLISHED
        && p.tcp_flags & (tcp::FIN | tcp::SYN | tcp::ACK) == tcp::ACK
        && p.seq == expected
        // 0 is "none yet".
        && p.seq != 0
        && p.seq_end != 0
        && p.ack.wrapping_sub(acknowledged) as i32 >= 0
}

/// A segment and the state before it.
struct Segment {
    seq: u32,
    ack: u32,
    seq_end: u32,
    flags: u8,
    is_reply: bool,
    old: u64,
}

/// A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_tcp(sender: *mut Side, receiver: *mut Side, numbers: u64, control: u64, old: u64) -> u64 {
    // SAFETY: the only caller is above and passes two sides of a map value; the verifier checks their sizes. Other CPUs write
    // them, too, and a number that is lost to such a race is followed by the next segment's.
    let (Some(sender), Some(receiver)) = (unsafe { sender.as_mut() }, unsafe { receiver.as_mut() }) else { return 0 };
    let segment = Segment {
        seq: numbers as u32,
        ack: (numbers >> 32) as u32,
        seq_end: control as u32,
        flags: (control >> 32) as u8,
        is_reply: control >> 40 & 1 != 0,
        old,
    };
    if sender.seq_end == 0 && segment.flags & tcp::ACK != 0 && is_local(sender) {
        // Whatever SYN came before, by whomever: this is the one that the pod answers.
        receiver.seq_end = segment.ack;
    }
    if is_in_window(sender, receiver, &segment) {
        track(sender, &segment);
        progress(&segment)
    } else {
        start_again(sender, &segment)
    }
}

/// True for a pod of this node, which nobody can forge.
#[inline(always)]
fn is_local(side: &Side) -> bool {
    side.ifindex != NOT_LOCAL && side.ifindex != 0
}

/// True if a segment has the numbers of its connection, give or take [`SEQ_WINDOW`]. The first segment of a side has to
/// acknowledge what the other side sent.
#[inline(always)]
fn is_in_window(sender: &Side, receiver: &Side, s: &Segment) -> bool {
    let is_first = sender.seq_end == 0;
    let (number, expected) = if is_first { (s.ack, receiver.seq_end) } else { (s.seq, sender.seq_end) };
    if is_first && expected != 0 && s.flags & tcp::ACK == 0 {
        return is_opening(s);
    }
    // The window begins at what the receiver has acknowledged: a forged number within it does not shut out the true sender.
    let in_flight = expected.wrapping_sub(receiver.ack);
    let span = if is_first || receiver.ack == 0 || in_flight > MAX_IN_FLIGHT { 0 } else { in_flight };
    let low = expected.wrapping_sub(span).wrapping_sub(SEQ_WINDOW);
    expected == 0 || number.wrapping_sub(low) <= span + 2 * SEQ_WINDOW || is_opening(s)
}

/// True for a SYN that asks, of a connection that nobody has answered. It may differ from the SYN before.
#[inline(always)]
fn is_opening(s: &Segment) -> bool {
    s.flags & (tcp::SYN | tcp::ACK) == tcp::SYN && !s.is_reply && s.old & state::ANSWERED == 0
}

/// Follows the numbers of a sender. 0 is "none yet": a SYN has no acknowledgement number.
#[inline(always)]
fn track(sender: &mut Side, s: &Segment) {
    if is_opening(s) || sender.seq_end == 0 || s.seq_end.wrapping_sub(sender.seq_end) as i32 > 0 {
        sender.seq_end = s.seq_end.wrapping_add(u32::from(s.seq_end == 0));
    }
    if s.flags & tcp::ACK != 0 && (sender.ack == 0 || s.ack.wrapping_sub(sender.ack) as i32 > 0) {
        sender.ack = s.ack;
    }
}

/// What a segment of the connection changes.
#[inline(always)]
fn progress(s: &Segment) -> u64 {
    let (fin, syn, ack) = (s.flags & !(s.flags >> 1) & 1, s.flags >> 1 & 1, s.flags >> 4 & 1);
    let reply = u64::from(s.is_reply);
    let other_fin = s.old >> (2 - reply) & 1;
    let answered = s.old & state::ANSWERED;
    // The sender goes on: the RST before was none of its own.
    let reset = s.old & (state::RST_ORIG << (3 * reply));
    ((u64::from(fin) * state::FIN_ORIG) << reply)
        | ((other_fin & u64::from(ack)) * state::FIN_ACKED)
        | (((answered | reply) & u64::from(ack & !syn)) * state::ESTABLISHED)
        | reset << CLEAR
}

const _: () = assert!(tcp::FIN == 1 && tcp::SYN == 2 && tcp::ACK == 16);
const _: () = assert!(state::RST_REPLY == state::RST_ORIG << 3);
const _: () = assert!(state::ANSWERED == 1 && state::FIN_ORIG == 2 && state::FIN_REPLY == 4);

/// What a segment of another connection changes. One end has lost this connection, and uses the port pair again; the other end
/// answers its SYN by SYN|ACK if it has lost it, too.
#[inline(always)]
fn start_again(sender: &mut Side, s: &Segment) -> u64 {
    match s.flags & (tcp::SYN | tcp::ACK) {
        tcp::SYN if !s.is_reply => {
            state::SYN_AGAIN | u64::from(s.seq_end) & state::SYN_NUMBER | state::SYN_NUMBER << CLEAR
        }
        SYN_ACK if s.is_reply && is_answer_to_syn(s.ack, s.old) => {
            (sender.seq_end, sender.ack) = (s.seq_end, s.ack);
            (u64::from(u32::MAX) & !state::ANSWERED) << CLEAR
        }
        _ => 0,
    }
}

/// True for an acknowledgement of the SYN of [`start_again`].
#[inline(always)]
fn is_answer_to_syn(ack: u32, old: u64) -> bool {
    old & state::SYN_AGAIN != 0 && (u64::from(ack) ^ old) & state::SYN_NUMBER == 0
}

const SYN_ACK: u8 = tcp::SYN | tcp::ACK;

/// Lets the numbers of each side follow what the other side acknowledges, if that is a pod of this node, which nobody can forge:
/// segments can be lost on their way to this node, or take another. `keep` are the bits of the state that stay: after
/// [`start_again`], the numbers are those of the sender's segment.
#[inline(always)]
pub fn align(sender: *mut Side, receiver: *mut Side, keep: u64) {
    rn_tcp_align(sender, receiver, u32::from(keep & state::SYN_AGAIN == 0));
    rn_tcp_align(receiver, sender, 0);
}

/// A function with global linkage for the reason that [`rn_tcp`] is one.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_tcp_align(own: *const Side, other: *mut Side, is_again: u32) -> u32 {
    // SAFETY: as in `rn_tcp`.
    let (Some(own), Some(other)) = (unsafe { own.as_ref() }, unsafe { other.as_mut() }) else { return 0 };
    if is_again != 0 || (is_local(own) && own.ack != 0 && other.seq_end.wrapping_sub(own.ack) > MAX_IN_FLIGHT) {
        other.seq_end = own.ack;
    }
    if is_again != 0 {
        other.ack = own.seq_end;
    }
    0
}

/// True if the receiver of a RST accepts it: between what it has acknowledged and what the sender has sent (RFC 5961, 3.2;
/// netfilter checks the same window).
///
/// # Safety
/// Both are sides of map values: that of the sender and that of the receiver.
#[inline(always)]
pub unsafe fn is_reset_acceptable<A>(
    own: *const Side,
    other: *const Side,
    p: &Packet<A>,
    old: u64,
    is_reply: bool,
) -> bool {
    // SAFETY: see above.
    let (high, low, other_end) = unsafe { ((*own).seq_end, (*other).ack, (*other).seq_end) };
    // The other end refuses the SYN of `start_again`. The opener's own end cannot: who forged that SYN chose its number.
    if is_reply && p.tcp_flags & tcp::ACK != 0 && is_answer_to_syn(p.ack, old) {
        return true;
    }
    if old & state::ANSWERED == 0 || high == 0 {
        // Of a SYN that was not answered (RFC 9293, 3.10.7.3), the acknowledgement counts; of what a side refuses that has sent
        // nothing, the number that the other side acknowledged (3.10.7.1).
        let number = if high == 0 { low } else { high };
        let (found, number) = if p.tcp_flags & tcp::ACK != 0 { (p.ack, other_end) } else { (p.seq, number) };
        return number != 0 && found == number;
    }
    // What one of them has not shown yet, the other one's number stands for: a SYN, say, that nobody has acknowledged.
    let low = if low == 0 { high.wrapping_sub(1) } else { low };
    let span = high.wrapping_sub(low);
    p.seq.wrapping_sub(low) <= if span > MAX_IN_FLIGHT { 0 } else { span }
}
