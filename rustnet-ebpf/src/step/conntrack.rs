//! Connection tracking. Contract: [`lookup`] classifies a packet with one look-up in the usual case, and keeps its connection up
//! to date. What it cannot assign to a living connection is [`Class::New`].
//!
//! Nothing here decides where a packet goes or changes it.

use aya_ebpf::bindings::BPF_NOEXIST;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::{CtEntry, NOT_LOCAL, Side, VIA_QDISC, flags, state};
use rustnet_common::drop::DropReason;
use rustnet_common::peer;
use rustnet_common::service::scope;
use rustnet_common::tuple::{Tuple, proto};

use super::migrate::{self, Old};
use super::table::{NOTHING_SENT, Placed, Table};
use super::tcp::{self, CLEAR};
use super::{host_port::HostPorts, lb, policy, route, table};
use crate::ctx::{atomic_and, atomic_or, jiffies, masked};
use crate::event::{Recording, Report};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Class, Flow, Kind, Packet, Source};
use crate::parse;
use crate::wire::tcp as bits;

/// Classifies a packet of a flow. Calls `verify` where a connection remembers another source than this; returns its error. The
/// source of a packet that is [`Class::New`] is for the caller to verify.
#[inline(always)]
pub fn lookup<F: Track + Report, C: Recording>(
    ctx: &C,
    p: &Packet<F::A>,
    flow: &'static mut Flow<F::A>,
    source: Source,
    config: &NodeConfig,
    hook: u8,
    verify: impl Fn() -> Result<(), DropReason>,
) -> Result<&'static mut Flow<F::A>, DropReason> {
    lookup_if::<F, C>(ctx, p, flow, source, config, hook, ctx.len(), verify, |_, _| true)
}

/// As [`lookup`]. A packet that `takes` refuses is not followed, and ends in an error: another hook will see it. `takes` gets the entry,
/// and the receiver as in [`Side::ifindex`]. `len` is the length of the frame that is counted.
#[allow(clippy::too_many_arguments, reason = "inlined; a structure would cost stack")]
#[inline(always)]
pub fn lookup_if<F: Track + Report, C: Recording>(
    ctx: &C,
    p: &Packet<F::A>,
    flow: &'static mut Flow<F::A>,
    source: Source,
    config: &NodeConfig,
    hook: u8,
    len: u32,
    verify: impl Fn() -> Result<(), DropReason>,
    takes: impl FnOnce(&CtEntry<F::A>, u32) -> bool,
) -> Result<&'static mut Flow<F::A>, DropReason> {
    flow.reset(&p.tuple);
    let report = || ctx.report::<F>(p.l3(), DropReason::PolicyAudited, hook);
    classify::<F>(flow, p, source, len, config.hz, report, verify, takes)?;
    if flow.class != Class::New {
        parse::remember_ports::<F>(p, ctx.ifindex());
    }
    Ok(flow)
}

/// Fills in the flow, which is a new one as yet.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "see above")]
fn classify<F: Track>(
    flow: &mut Flow<F::A>,
    p: &Packet<F::A>,
    source: Source,
    len: u32,
    hz: u32,
    report_audited: impl Fn(),
    verify: impl Fn() -> Result<(), DropReason>,
    takes: impl FnOnce(&CtEntry<F::A>, u32) -> bool,
) -> Result<(), DropReason> {
    if migrate::is_migrating() {
        F::adopt();
    }
    let (entry, is_vacant) = table::look_up::<F>(Table::of(&p.key), &p.key, p.is_swapped);
    if entry.is_null() {
        flow.is_vacant = is_vacant;
        return Ok(());
    }
    // SAFETY: a map value stays readable and writable for this run of the program, even if another CPU deletes it. Fields
    // are accessed through raw pointers, for other CPUs write them, too; counters may lose a race, `state` is atomic.
    let (e_flags, old, seen) = unsafe { ((*entry).flags, state_of(entry), (*entry).seen) };
    let is_nat = e_flags & flags::NAT != 0;
    let is_reply = is_reply(e_flags, p.is_swapped);
    // SAFETY: see above; the index is 0 or 1.
    let (sender, receiver) = unsafe {
        let sides = (&raw mut (*entry).sides).cast::<Side>();
        let first = masked::<1>(usize::from(is_reply && !is_nat));
        (sides.add(first), sides.add(first ^ 1))
    };
    // SAFETY: see above. What `takes` reads of the entry does not change while the entry lives.
    if !takes(unsafe { &*entry }, unsafe { (*receiver).ifindex }) {
        return Err(DropReason::NoFib);
    }
    // SAFETY: see above.
    let generation = unsafe { (*entry).generation };
    // Read each time: what is kept over a call takes stack.
    // SAFETY: see above.
    let came_by = || unsafe { (&raw const (*sender).ifindex).read_volatile() };
    // What was judged before is not what a pod sends that has got the address since.
    if generation != policy::generation() || (source.is_pod && came_by() == NOT_LOCAL) {
        // Nobody gets a report or an answer in another one's name.
        verify()?;
        match F::judge_again().result() {
            Ok(AUDITED) => report_audited(),
            Ok(_) => {}
            Err(dropped) => {
                // What opens another flow, because the backend of this one serves no more, is judged as one.
                let may_reopen = p.tuple.proto == proto::UDP || p.tcp_flags & (bits::SYN | bits::ACK) == bits::SYN;
                return if may_reopen && !is_reply && F::reopen(false) { Ok(()) } else { Err(dropped.reason) };
            }
        }
    }
    // Not a variable: the verifier would follow either value of it to the end. A time ahead, which another CPU read a moment later,
    // counts as long ago: one refresh too many.
    let is_due = || jiffies().wrapping_sub(seen) >= hz;
    let is_moved = (came_by() ^ source.ifindex) & !VIA_QDISC != 0;
    // SAFETY: see above.
    if is_moved || unsafe { (*sender).source } != source.bytes || (!source.is_pod && is_due()) {
        // What holds for new flows holds for known ones, too: peers may have changed since.
        verify()?;
        if !F::accept_source(source) {
            return Ok(());
        }
    }
    // SAFETY: see above.
    let backend = unsafe { (*entry).backend };
    let tcp_flags = p.tcp_flags;
    // A client of TCP keeps its backend until the connection ends; one of UDP would send to a dead one for ever.
    let is_syn = tcp_flags & (bits::SYN | bits::ACK) == bits::SYN;
    let led_to = if p.tuple.proto == proto::UDP { backend } else { 0 };
    if (is_syn || (led_to != 0 && lb::has_ended(led_to))) && F::reopen(is_reply) {
        return Ok(());
    }
    // SAFETY: see above.
    unsafe {
        (*sender).packets = (*sender).packets.wrapping_add(1);
        (*sender).bytes = (*sender).bytes.wrapping_add(u64::from(len));
    }
    let mut set = u64::from(is_reply) * state::ANSWERED;
    let reset = state::RST_ORIG << (3 * u32::from(is_reply));
    if p.tuple.proto == proto::TCP && p.kind == Kind::Flow {
        if tcp_flags & bits::RST == 0 {
            // SAFETY: see above.
            set |= unsafe { tcp::follow(sender, receiver, p, old, is_reply) };
        } else if F::is_reset_acceptable() {
            set |= reset;
        }
    }
    // SAFETY: see above.
    let known = unsafe { (*receiver).ifindex };
    if (set & !old != 0 || known == 0 || is_due()) && !F::refresh(set, jiffies()) {
        F::forget();
        return Ok(());
    }
    // SAFETY: see above.
    unsafe {
        if is_nat {
            flow.to.tuple = (*entry).to;
        }
        flow.to.egress = (*receiver).ifindex;
    }
    flow.class = if is_reply { Class::Reply } else { Class::Original };
    flow.flags = e_flags;
    flow.backend = backend;
    Ok(())
}

/// True if a side is a pod of this node.
#[inline(always)]
fn is_local(ifindex: u32) -> bool {
    ifindex != 0 && ifindex != NOT_LOCAL
}

#[inline(always)]
unsafe fn state_of<A>(entry: *mut CtEntry<A>) -> u64 {
    // SAFETY: callers pass a map value; an aligned word is read in one piece.
    unsafe { (&raw const (*entry).state).read_volatile() }
}

/// True if a packet goes the way of the reply.
#[inline(always)]
pub fn is_reply(e_flags: u16, is_swapped: bool) -> bool {
    let (is_reply_entry, is_nat) = (e_flags & flags::REPLY, (e_flags / flags::NAT) & 1);
    let is_opposite = ((e_flags / flags::SWAPPED) & 1) ^ u16::from(is_swapped);
    (is_nat & is_reply_entry) | (!is_nat & is_opposite) != 0
}

/// The steps of tracking of one family, functions with global linkage for the reason that the parser is one. Those that are not
/// needed for each packet find its entry again. They take the packet in hand from scratch memory: kernels before 6.2 refuse a look-up
/// whose key stands behind an argument of such a function.
pub trait Track: Placed + Old + parse::Remember {
    /// Remembers another verified source. False if the connection is over: another pod has the address now, and the connections of
    /// the one before are none of its own.
    fn accept_source(source: Source) -> bool;
    /// True if a SYN opens another connection: the port pair is used again, or the backend has left the service. True for UDP if the
    /// backend serves no more. Then the connection before is forgotten.
    fn reopen(is_reply: bool) -> bool;
    /// Once per second and at each change of state: looks up the receiver again, sets bits of the state and clears those that
    /// stand [`CLEAR`] places higher, and brings the other direction up to date. False if the connection is over: its receiver
    /// was replaced, its other direction belongs to another flow, the packet asks for a service that the flow bypasses, or (UDP) for one
    /// that leads elsewhere.
    fn refresh(set: u64, now: u32) -> bool;
    /// See [`is_led`].
    fn is_led(e_flags: u16, backend: u32) -> bool;
    /// See [`couple`].
    fn couple(keep: u64) -> bool;
    /// Forgets the packet's connection, which is over.
    fn forget();
    /// See [`tcp::is_reset_acceptable`].
    fn is_reset_acceptable() -> bool;
    /// See [`migrate::adopt`].
    fn adopt();
    /// See [`judge_again`].
    fn judge_again() -> PackedResult;
}

/// Declares the functions of a family.
macro_rules! global {
    (
        $family:ident, $accept:ident, $reopen:ident, $refresh:ident, $led:ident, $couple:ident, $forget:ident, $reset:ident, $adopt:ident,
        $judge:ident
    ) => {
        impl Track for $family {
            #[inline(always)]
            fn accept_source(source: Source) -> bool {
                $accept(source.ifindex, source.bytes[0], source.bytes[1]) != 0
            }
            #[inline(always)]
            fn reopen(is_reply: bool) -> bool {
                $reopen(u32::from(is_reply)) != 0
            }
            #[inline(always)]
            fn refresh(set: u64, now: u32) -> bool {
                $refresh(set, now) != 0
            }
            #[inline(always)]
            fn is_led(e_flags: u16, backend: u32) -> bool {
                $led(e_flags.into(), backend) != 0
            }
            #[inline(always)]
            fn couple(keep: u64) -> bool {
                $couple(keep) != 0
            }
            #[inline(always)]
            fn forget() {
                $forget();
            }
            #[inline(always)]
            fn is_reset_acceptable() -> bool {
                $reset() != 0
            }
            #[inline(always)]
            fn adopt() {
                $adopt();
            }
            #[inline(always)]
            fn judge_again() -> PackedResult {
                PackedResult::from_bits($judge())
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $judge() -> u64 {
            let judged = in_hand::<$family>().map_or(Ok(false), judge_again::<$family>);
            PackedResult::new(judged.map(i32::from).map_err(Dropped::from)).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $adopt() -> u32 {
            in_hand::<$family>().map_or(0, |p| {
                migrate::adopt::<$family>(p);
                1
            })
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $accept(ifindex: u32, source: u64, source2: u64) -> u32 {
            let source = Source { is_pod: ifindex != NOT_LOCAL, ifindex, bytes: [source, source2] };
            u32::from(in_hand::<$family>().is_none_or(|p| accept_source::<$family>(p, source)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $reopen(is_reply: u32) -> u32 {
            u32::from(in_hand::<$family>().is_some_and(|p| reopen::<$family>(p, is_reply != 0)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $refresh(set: u64, now: u32) -> u32 {
            u32::from(in_hand::<$family>().is_some_and(|p| refresh::<$family>(p, set, now)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $led(e_flags: u32, backend: u32) -> u32 {
            u32::from(in_hand::<$family>().is_none_or(|p| is_led::<$family>(p, e_flags as u16, backend)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $couple(keep: u64) -> u32 {
            u32::from(in_hand::<$family>().is_none_or(|p| couple::<$family>(p, keep)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $forget() -> u32 {
            in_hand::<$family>().map_or(0, |p| {
                forget::<$family>(p);
                1
            })
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $reset() -> u32 {
            u32::from(in_hand::<$family>().is_none_or(is_reset_acceptable::<$family>))
        }
    };
}

/// The packet that [`parse::packet`] has read last.
#[inline(always)]
fn in_hand<F: Family>() -> Option<&'static Packet<F::A>> {
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and nothing writes the packet after the
    // parser.
    F::scratch().map(|scratch| unsafe { &(*scratch).packet })
}

global!(
    V4,
    rn_ct_accept4,
    rn_ct_reopen4,
    rn_ct_refresh4,
    rn_ct_led4,
    rn_ct_couple4,
    rn_ct_forget4,
    rn_ct_reset4,
    rn_ct_adopt4,
    rn_ct_judge4
);
global!(
    V6,
    rn_ct_accept6,
    rn_ct_reopen6,
    rn_ct_refresh6,
    rn_ct_led6,
    rn_ct_couple6,
    rn_ct_forget6,
    rn_ct_reset6,
    rn_ct_adopt6,
    rn_ct_judge6
);

/// Result of [`Track::judge_again`]: policies deny the flow, and its namespace is audited.
const AUDITED: i32 = 1;

/// Judges the packet's flow by the present policies, and remembers that they allow it. The result is that of [`policy::verify`].
///
/// # Errors
/// They do not: then each packet of the flow is judged.
#[inline(always)]
fn judge_again<F: Placed>(p: &Packet<F::A>) -> Result<bool, DropReason> {
    let entry = table::find::<F>(&p.key, p.is_swapped);
    if entry.is_null() {
        return Ok(false);
    }
    let generation = policy::generation();
    // SAFETY: see `classify`. What a packet becomes does not change while the entry lives.
    unsafe {
        let is_audited = policy::verify_known(&p.tuple, &(*entry).to, (*entry).flags)?;
        (*entry).generation = generation;
        Ok(is_audited)
    }
}

#[inline(always)]
fn accept_source<F: Track>(p: &Packet<F::A>, source: Source) -> bool {
    let entry = table::find::<F>(&p.key, p.is_swapped);
    if entry.is_null() {
        return true;
    }
    // SAFETY: see `classify`.
    unsafe {
        let e_flags = (*entry).flags;
        let first = masked::<1>(usize::from(e_flags & flags::NAT == 0 && is_reply(e_flags, p.is_swapped)));
        let sender = (&raw mut (*entry).sides).cast::<Side>().add(first);
        if ((*sender).ifindex ^ source.ifindex) & !VIA_QDISC != 0 {
            if is_local((*sender).ifindex) {
                F::forget();
                return false;
            }
            (*sender).ifindex = if source.is_pod { route::local_pod(p.tuple.src) } else { NOT_LOCAL };
        }
        (*sender).source = source.bytes;
    }
    true
}

#[inline(always)]
fn reopen<F: Track>(p: &Packet<F::A>, is_reply: bool) -> bool {
    let entry = table::find::<F>(&p.key, p.is_swapped);
    if entry.is_null() {
        return true;
    }
    // SAFETY: see `classify`.
    let (e_flags, backend, old) = unsafe { ((*entry).flags, (*entry).backend, state_of(entry)) };
    // Who answers through a translation cannot open a connection.
    let is_answerer = is_reply && e_flags & flags::NAT != 0;
    // A pod of this node, which nobody can forge, opens a connection of its own: what an outsider opened before was none.
    // SAFETY: see `classify`.
    let is_by_pod = is_reply && is_local(unsafe { (*entry).sides[1].ifindex });
    // Of a flow whose answers do not pass here, the opener's FIN is all that is seen of its end.
    let is_half_over = e_flags & flags::DIRECT != 0 && old & state::FIN_ORIG != 0;
    let is_over = (state::is_closing(old) || is_by_pod || is_half_over) && !is_answerer;
    let is_bound = is_reply && p.tuple.proto != proto::UDP;
    if is_over || (!is_bound && backend != 0 && !lb::is_serving(backend)) {
        F::forget();
        return true;
    }
    false
}

#[inline(always)]
fn is_reset_acceptable<F: Placed>(p: &Packet<F::A>) -> bool {
    let table = Table::of(&p.key);
    let entry = table::find_in::<F>(table, &p.key, p.is_swapped);
    if entry.is_null() {
        return true;
    }
    // SAFETY: see `classify`.
    unsafe {
        let (own, other) = if (*entry).flags & flags::NAT != 0 {
            let Some(key) = scratch_key::<F>() else { return true };
            let other = counterpart::<F>(table, &(*entry).to, key);
            if other.is_null() {
                // Evicted: what the receiver has acknowledged is not known.
                let number = (*entry).sides[0].seq_end;
                return number != 0 && p.seq == number;
            }
            (&raw const (*entry).sides[0], &raw const (*other).sides[0])
        } else if ((*entry).flags & flags::SWAPPED != 0) == p.is_swapped {
            (&raw const (*entry).sides[0], &raw const (*entry).sides[1])
        } else {
            (&raw const (*entry).sides[1], &raw const (*entry).sides[0])
        };
        tcp::is_reset_acceptable(own, other, p, state_of(entry), is_reply((*entry).flags, p.is_swapped))
    }
}

/// The entry of a translated flow's other direction, found by what this direction becomes; null if it was evicted. Leaves its key
/// in `key`.
#[inline(always)]
fn counterpart<F: Placed>(table: Table, to: &Tuple<F::A>, key: &mut Tuple<F::A>) -> *mut CtEntry<F::A> {
    let is_swapped = to.store_reverse_canonical(key);
    table::find_in::<F>(table, key, is_swapped)
}

/// Room for the key of the other direction.
#[inline(always)]
fn scratch_key<F: Family>() -> Option<&'static mut Tuple<F::A>> {
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and a connection is opened only after
    // the steps of this file are done with the field.
    F::scratch().map(|scratch| unsafe { &mut (*scratch).connection.reply_key })
}

#[inline(always)]
fn refresh<F: Track + HostPorts + Old>(p: &Packet<F::A>, set: u64, now: u32) -> bool {
    let entry = table::find::<F>(&p.key, p.is_swapped);
    if entry.is_null() {
        // Evicted since the look-up; the packet itself goes on.
        return true;
    }
    let (set, keep) = (set & u64::from(u32::MAX), !(set >> CLEAR));
    // SAFETY: see `classify`.
    unsafe {
        let e_flags = (*entry).flags;
        let is_nat = e_flags & flags::NAT != 0;
        let is_reply = !is_nat && (e_flags & flags::SWAPPED != 0) != p.is_swapped;
        if !is_nat {
            let sides = (&raw mut (*entry).sides).cast::<Side>();
            let sender = masked::<1>(usize::from(is_reply));
            tcp::align(sides.add(sender), sides.add(sender ^ 1), keep);
        }
        if (*entry).backend == 0
            && (is_reply || (state_of(entry) | set) & state::ANSWERED == 0)
            && F::is_asked(p, !is_nat && !is_reply)
        {
            // The flow is older than the service that it asks for, and nothing has answered; or the entry was opened by the
            // address that is a VIP now. Either way the packet would miss the service.
            return false;
        }
        let is_asked = e_flags & (flags::NAT | flags::REPLY) == flags::NAT && p.tuple.proto == proto::UDP;
        if is_asked && (*entry).backend != 0 && !F::is_led(e_flags, (*entry).backend) {
            // The Service lost this port or address, and others of it lead to the backend.
            return false;
        }
        let receiver = if is_reply { &raw mut (*entry).sides[0] } else { &raw mut (*entry).sides[1] };
        let dst = if is_nat { (*entry).to.dst } else { p.tuple.dst };
        let local = route::local_pod(dst);
        if is_local((*receiver).ifindex) && ((*receiver).ifindex ^ local) & !VIA_QDISC != 0 {
            return false;
        }
        // What was judged before is the flow to an address that no pod of this node had. What is audited opens once more, and is reported.
        if (*receiver).ifindex == NOT_LOCAL && local != NOT_LOCAL && !matches!(F::judge_again().result(), Ok(0)) {
            return false;
        }
        (*receiver).ifindex = local;
        (*entry).seen = now;
        atomic_and(&raw mut (*entry).state, keep);
        atomic_or(&raw mut (*entry).state, set);
        if migrate::is_migrating() {
            migrate::touch::<F>(p, state_of(entry), now);
        }
        if !is_nat || e_flags & flags::DIRECT != 0 {
            return true;
        }
        F::couple(keep)
    }
}

/// True if what a packet of a flow with these flags asks for leads to a backend.
#[inline(always)]
fn is_led<F: Family>(p: &Packet<F::A>, e_flags: u16, backend: u32) -> bool {
    const ELSEWHERE: u16 = flags::EXTERNAL | flags::SECOND_ADDRESS;
    let scope = if e_flags & flags::EXTERNAL != 0 { scope::EXTERNAL } else { scope::CLUSTER };
    let is_led_at = |vip| lb::kept::<F>(vip, p.tuple.dport, p.tuple.proto, scope, backend).is_some();
    // What another node hands on may have asked a node port of that one. This node has the port at its own address.
    let is_of_node = || F::peer(p.tuple.dst).is_some_and(|peer| peer.flags & peer::flags::NODE != 0);
    let is_node_port =
        || e_flags & ELSEWHERE == ELSEWHERE && is_of_node() && maps::config().is_some_and(|it| is_led_at(F::node(it)));
    is_led_at(p.tuple.dst) || is_node_port()
}

/// Brings the entry of the other direction up to date, or makes it again. False if it belongs to another flow.
#[inline(always)]
fn couple<F: Placed>(p: &Packet<F::A>, keep: u64) -> bool {
    let table = Table::of(&p.key);
    let entry = table::find_in::<F>(table, &p.key, p.is_swapped);
    let Some(key) = scratch_key::<F>() else { return true };
    if entry.is_null() {
        return true;
    }
    // SAFETY: see `classify`.
    unsafe {
        let other = counterpart::<F>(table, &(*entry).to, key);
        if !other.is_null() {
            if p.tuple.is_reverse_of(&(*other).to) {
                (*other).seen = (*entry).seen;
                atomic_and(&raw mut (*other).state, keep);
                atomic_or(&raw mut (*other).state, state_of(entry));
                tcp::align(&raw mut (*entry).sides[0], &raw mut (*other).sides[0], keep);
                (*other).sides[1].seq_end = (*entry).sides[0].seq_end;
                (*other).sides[1].ack = (*entry).sides[0].ack;
                return true;
            }
            let is_stray = ((*other).flags & flags::NAT == 0) & (state_of(other) & state::ANSWERED == 0);
            if !is_stray || !(*entry).to.is_reverse_of(&(*other).to) {
                return false;
            }
            // The other entry was evicted, and an answer came first, as a flow that nothing translates and nobody answered.
            table::delete::<F>(key);
        }
        restore::<F>(entry, &p.tuple);
        true
    }
}

/// Inserts the entry of the other direction again after an eviction. `tuple` is that of a packet of this direction.
#[inline(always)]
unsafe fn restore<F: Placed>(entry: *mut CtEntry<F::A>, tuple: &Tuple<F::A>) {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: `couple` passes a map value; scratch memory belongs to this CPU.
    unsafe {
        let c = &mut (*scratch).connection;
        let is_swapped = (*entry).to.store_reverse_canonical(&mut c.reply_key);
        let swapped = if is_swapped { flags::SWAPPED } else { 0 };
        let other = &mut c.reply;
        (other.to.src, other.to.dst) = (tuple.dst, tuple.src);
        (other.to.sport, other.to.dport) = (tuple.dport, tuple.sport);
        (other.to.proto, other.to.pad, other.to.pad2) = (tuple.proto, 0, 0);
        other.flags = ((*entry).flags ^ flags::REPLY) & !flags::SWAPPED | swapped;
        other.pad = 0;
        other.state = state_of(entry);
        other.seen = (*entry).seen;
        other.backend = (*entry).backend;
        other.generation = (*entry).generation;
        other.sides[0] = NOTHING_SENT;
        other.sides[1] = NOTHING_SENT;
        other.sides[0].ifindex = (*entry).sides[1].ifindex;
        other.sides[1].ifindex = (*entry).sides[0].ifindex;
        other.sides[0].seq_end = (*entry).sides[0].ack;
        other.sides[1].seq_end = (*entry).sides[0].seq_end;
        // A failure leaves this direction alone, which still serves its packets; the next second tries again.
        c.reply_key.pad = F::place(&c.reply_key, is_swapped).slot;
        let _ = table::insert::<F>(&c.reply_key, &c.reply, BPF_NOEXIST.into());
    }
}

/// Deletes the entry that serves a packet, and that of its other direction.
#[inline(always)]
fn forget<F: Placed + Old>(p: &Packet<F::A>) {
    if migrate::is_migrating() {
        migrate::forget::<F>(p);
    }
    let table = Table::of(&p.key);
    let entry = table::find_in::<F>(table, &p.key, p.is_swapped);
    let Some(key) = scratch_key::<F>() else { return };
    if entry.is_null() {
        return;
    }
    // SAFETY: see `classify`.
    unsafe {
        if (*entry).flags & flags::NAT != 0 {
            let other = counterpart::<F>(table, &(*entry).to, key);
            if !other.is_null() && p.tuple.is_reverse_of(&(*other).to) {
                delete::<F>(key, (*other).flags & flags::SWAPPED != 0);
            }
        }
    }
    *key = p.key;
    delete::<F>(key, p.is_swapped);
}

/// Deletes the entry that serves packets of the key in one direction.
#[inline(always)]
fn delete<F: Placed>(key: &mut Tuple<F::A>, is_swapped: bool) {
    let place = F::place(key, is_swapped);
    if place.is_taken {
        key.pad = place.slot;
        table::delete::<F>(key);
    }
}
