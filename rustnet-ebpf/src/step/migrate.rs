//! Upgrades under traffic. Contract: while the hooks of a node are swapped one by one, programs before and after the upgrade run
//! side by side on tables of their own. Programs loaded with [`MIGRATE`] take flows over from the old table that they do not
//! know or that supersede what they know, and write each flow that they open, refresh or forget into the old table, too. Without it
//! all of this is dead code, which the verifier removes.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, Side, elapsed, flags, lifetime, state};
use rustnet_common::tuple::{Tuple, proto};
use rustnet_common::v1;

use super::table::{self, Placed};
use super::{lb, route};
use crate::ctx::{atomic_or, jiffies};
use crate::family::{Family, V4, V6};
use crate::maps::{self, OldConnections, V1Connections};
use crate::packet::{NewConnection, Packet};

/// What the old tables are; set by the loader: 0 for none, or [`FROM_V1`], [`FROM_OTHER_SIZE`].
#[unsafe(no_mangle)]
pub static MIGRATE: Global<u32> = Global::new(0);

/// `rn_ct4` and `rn_ct6`, of the shape that [`v1`] describes.
const FROM_V1: u32 = 1;
/// `rn_ct4_tcp_old` and so on, of the present shape and another size.
const FROM_OTHER_SIZE: u32 = 2;

/// True if there are old tables.
#[inline(always)]
pub fn is_migrating() -> bool {
    MIGRATE.load() != 0
}

/// True if the old tables are those of v1.
#[inline(always)]
pub fn is_from_v1() -> bool {
    MIGRATE.load() == FROM_V1
}

/// The old tables of a family.
pub trait Old: Family {
    /// Of v1.
    fn v1() -> &'static V1Connections<Self::A>;
    /// Of the present shape: TCP, then all other protocols.
    fn old() -> [&'static OldConnections<Self::A>; 2];
    /// Finds the entry of the old table of the present shape that serves packets of the key in scratch memory in one direction, and
    /// stores its slot there. False if there is none.
    fn find_old(is_swapped: bool) -> bool;
}

/// Declares a family's function with global linkage: the verifier looks at it once, not once for each place that calls it.
macro_rules! global {
    ($family:ident, $name:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(is_swapped: u32) -> u32 {
            let Some(scratch) = $family::scratch() else { return 0 };
            // SAFETY: the element belongs to this CPU, and TC programs do not interrupt each other.
            let key = unsafe { &mut (*scratch).slot_key };
            for slot in [0, SLOT_CONTESTED] {
                key.pad = slot;
                if old::<$family>(key.proto).get_ptr(&*key).is_some_and(|entry| table::serves(entry, is_swapped != 0)) {
                    return 1;
                }
            }
            0
        }
    };
}

global!(V4, rn_old_find4);
global!(V6, rn_old_find6);

impl Old for V4 {
    #[inline(always)]
    fn v1() -> &'static V1Connections<Ip4> {
        &maps::rn_ct4
    }
    #[inline(always)]
    fn old() -> [&'static OldConnections<Ip4>; 2] {
        [&maps::rn_ct4_tcp_old, &maps::rn_ct4_any_old]
    }
    #[inline(always)]
    fn find_old(is_swapped: bool) -> bool {
        rn_old_find4(is_swapped.into()) != 0
    }
}

impl Old for V6 {
    #[inline(always)]
    fn v1() -> &'static V1Connections<Ip6> {
        &maps::rn_ct6
    }
    #[inline(always)]
    fn old() -> [&'static OldConnections<Ip6>; 2] {
        [&maps::rn_ct6_tcp_old, &maps::rn_ct6_any_old]
    }
    #[inline(always)]
    fn find_old(is_swapped: bool) -> bool {
        rn_old_find6(is_swapped.into()) != 0
    }
}

/// Takes the flow of a packet over from the old table if the present one has none, or one that it supersedes: a program of the
/// earlier agent has opened a flow under the tuple of one that is over, of which the present table has a copy.
#[inline(always)]
pub fn adopt<F: Old + Placed>(p: &Packet<F::A>) {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and no connection is being opened yet.
    let c = unsafe { &mut (*scratch).connection };
    let is_found = match MIGRATE.load() {
        FROM_V1 => read_v1::<F>(c, p),
        _ => read_old::<F>(c, p),
    };
    let Some(config) = maps::config() else { return };
    if !is_found || is_over(&c.original, p.tuple.proto, config) {
        return;
    }
    c.key = p.key;
    c.key.pad = 0;
    let first = table::get::<F>(&c.key);
    // SAFETY: a map value stays readable for this run of the program.
    if !first.is_null() && unsafe { &*first }.is_rival_of(&c.original) {
        // For either direction: of a flow that nothing translates there is one entry, in the first slot.
        // SAFETY: see above.
        if unsafe { &*first }.is_superseded_by(&c.original) {
            table::insert::<F>(&c.key, &c.original, BPF_ANY.into());
        }
        return;
    }
    let place = F::place(&p.key, p.is_swapped);
    c.key.pad = place.slot;
    let mut how = BPF_NOEXIST;
    if place.is_taken {
        let entry = table::get::<F>(&c.key);
        // SAFETY: see above.
        if !entry.is_null() && !unsafe { &*entry }.is_superseded_by(&c.original) {
            return;
        }
        how = BPF_ANY;
    }
    table::insert::<F>(&c.key, &c.original, how.into());
}

/// True if an entry of the old table counts no more: silent for too long, or to a backend that serves no more (of UDP: a client of TCP
/// keeps its own until it ends). Ids of v1 are others.
#[inline(always)]
fn is_over<A: Address>(entry: &CtEntry<A>, protocol: u8, config: &NodeConfig) -> bool {
    let is_gone = entry.backend != 0 && protocol != proto::TCP && !is_from_v1() && !lb::is_serving(entry.backend);
    is_gone || elapsed(jiffies(), entry.seen) >= lifetime(protocol, entry.state).wrapping_mul(config.hz)
}

/// Stores the flow of a packet as the table of v1 has it. False if there is none.
#[inline(always)]
fn read_v1<F: Old + Placed>(c: &mut NewConnection<F::A>, p: &Packet<F::A>) -> bool {
    let Some(half) = F::v1().get_ptr(&p.tuple) else { return false };
    // SAFETY: a map value stays readable for this run of the program.
    let half = unsafe { &*half };
    let is_nat = half.flags & v1::flags::NAT != 0;
    let is_reply = half.flags & v1::flags::REPLY != 0;
    // v1 translates flows of pods and of the host alone. What earlier releases exported of clients outside lacks its flags.
    let opener = if is_reply { half.to.dst } else { p.tuple.src };
    if is_nat && half.flags & v1::flags::FROM_HOST == 0 && !route::is_local_pod(opener) {
        return false;
    }
    let entry = &mut c.original;
    // One entry of an untranslated flow serves both directions, and has the opener's tuple.
    let is_swapped = p.is_swapped != (!is_nat && is_reply);
    entry.to = if is_nat {
        half.to
    } else if is_reply {
        p.tuple.reversed()
    } else {
        p.tuple
    };
    entry.flags = half.flags & if is_nat { v1::flags::ALL } else { !v1::flags::REPLY };
    if is_swapped {
        entry.flags |= flags::SWAPPED;
    }
    entry.pad = 0;
    entry.seen = half.seen;
    entry.state = v1::present_state(p.tuple.proto, half.state);
    // An id of v1 leads nowhere here, and flows but those of TCP would end.
    entry.backend = if p.tuple.proto == proto::TCP { half.backend } else { 0 };
    entry.generation = 0;
    // Interfaces of 0 are looked up, and sources verified, at the next packet; the refresh then restores the other direction.
    entry.sides = [UNKNOWN; 2];
    true
}

/// A side of which nothing is known.
const UNKNOWN: Side = table::NOTHING_SENT;

/// The same of the old table of the present shape.
#[inline(always)]
fn read_old<F: Old + Placed>(c: &mut NewConnection<F::A>, p: &Packet<F::A>) -> bool {
    let Some(entry) = entry_of::<F>(&p.key, p.is_swapped) else { return false };
    // SAFETY: a map value stays readable for this run of the program.
    c.original = unsafe { *entry };
    true
}

/// The entry of the old table of the present shape that serves packets of the key in one direction. Its key stands in scratch memory.
#[inline(always)]
fn entry_of<F: Old>(key: &Tuple<F::A>, is_swapped: bool) -> Option<*mut CtEntry<F::A>> {
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and its other users are done with the key.
    let copy = unsafe { &mut (*F::scratch()?).slot_key };
    *copy = *key;
    if F::find_old(is_swapped) { old::<F>(key.proto).get_ptr_mut(&*copy) } else { None }
}

/// Deletes the entry that [`entry_of`] has found.
#[inline(always)]
fn remove_found<F: Old>() {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: see `entry_of`.
    let key = unsafe { &(*scratch).slot_key };
    let _ = old::<F>(key.proto).remove(key);
}

#[inline(always)]
fn old<F: Old>(protocol: u8) -> &'static OldConnections<F::A> {
    let [tcp, any] = F::old();
    if protocol == proto::TCP { tcp } else { any }
}

/// True if a flow of the old table already has the answers that a connection under construction wants.
#[inline(never)]
pub fn is_reply_taken<F: Old>(c: &NewConnection<F::A>) -> bool {
    if MIGRATE.load() == FROM_V1 {
        let Some(scratch) = F::scratch() else { return false };
        // SAFETY: as in `mirror`.
        let reply = unsafe { &mut (*scratch).slot_key };
        c.original.to.store_reversed(reply);
        return F::v1().get_ptr(&*reply).is_some_and(|half| {
            // SAFETY: a map value stays readable for this run of the program.
            unsafe { (*half).to != c.reply.to }
        });
    }
    old::<F>(c.key.proto).get_ptr(&c.reply_key).is_some_and(|entry| {
        // SAFETY: see above.
        unsafe { (*entry).to != c.reply.to }
    })
}

/// Writes the connection that was opened a moment ago into the old table.
#[inline(never)]
pub fn mirror<F: Old>(is_pair: bool) {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and its creator is done with it.
    let c = unsafe { &mut (*scratch).connection };
    // What the old table does not take, its programs open again.
    if MIGRATE.load() == FROM_V1 {
        if c.original.flags & flags::EXTERNAL != 0 {
            // v1 has no such flows, and would refuse their packets.
            return;
        }
        // SAFETY: see above. Both are in scratch memory, since the stack has no room for them.
        let (half, reply) = unsafe { (&mut (*scratch).half, &mut (*scratch).slot_key) };
        store_half(&c.original, half);
        half.to = c.original.to;
        let _ = F::v1().insert(&c.tuple, &*half, BPF_ANY.into());
        c.original.to.store_reversed(reply);
        c.tuple.store_reversed(&mut half.to);
        half.flags |= v1::flags::REPLY;
        let _ = F::v1().insert(&*reply, &*half, BPF_ANY.into());
        return;
    }
    let _ = old::<F>(c.key.proto).insert(&c.key, &c.original, BPF_ANY.into());
    if is_pair {
        let _ = old::<F>(c.key.proto).insert(&c.reply_key, &c.reply, BPF_ANY.into());
    }
}

/// Stores a half of v1 in the original direction, but for what it becomes.
#[inline(always)]
fn store_half<A: Address>(entry: &CtEntry<A>, half: &mut v1::CtEntry<A>) {
    half.flags = entry.flags & v1::flags::ALL & !v1::flags::REPLY;
    half.state = v1::retired_state(entry.state);
    half.pad = 0;
    half.seen = entry.seen;
    half.ifindex = 0;
    half.backend = entry.backend;
    half.out = 0;
    half.guard = [0; 3];
    half.pad2 = [0; 3];
    half.packets = 0;
    half.bytes = 0;
}

/// Keeps the packet's connection alive in the old table.
#[inline(never)]
pub fn touch<F: Old>(p: &Packet<F::A>, entry_state: u64, now: u32) {
    if MIGRATE.load() == FROM_V1 {
        let Some(one) = F::v1().get_ptr_mut(&p.tuple) else { return };
        // SAFETY: a map value stays writable for this run of the program.
        unsafe {
            (*one).seen = now;
            (*one).state |= v1::retired_state(entry_state);
            let other = (*one).to.reversed();
            if let Some(other) = F::v1().get_ptr_mut(&other) {
                (*other).seen = now;
                (*other).state |= v1::retired_state(entry_state);
            }
        }
        return;
    }
    if let Some(entry) = entry_of::<F>(&p.key, p.is_swapped) {
        // SAFETY: see above.
        unsafe {
            (*entry).seen = now;
            atomic_or(&raw mut (*entry).state, entry_state & !state::SYN_NUMBER);
        }
    }
}

/// Deletes the packet's connection from the old table, both directions of it.
#[inline(never)]
pub fn forget<F: Old>(p: &Packet<F::A>) {
    if MIGRATE.load() == FROM_V1 {
        if let Some(one) = F::v1().get_ptr(&p.tuple) {
            // SAFETY: a map value stays readable for this run of the program.
            let other = unsafe { (*one).to.reversed() };
            // SAFETY: see above.
            let is_half = F::v1().get_ptr(&other).is_some_and(|half| p.tuple.is_reverse_of(unsafe { &(*half).to }));
            if is_half {
                let _ = F::v1().remove(&other);
            }
        }
        let _ = F::v1().remove(&p.tuple);
        return;
    }
    let (Some(entry), Some(scratch)) = (entry_of::<F>(&p.key, p.is_swapped), F::scratch()) else { return };
    // SAFETY: a map value stays readable for this run of the program; the key is free until `conntrack::forget` uses it.
    let (is_nat, is_swapped, other) = unsafe {
        let other = &mut (*scratch).connection.reply_key;
        ((*entry).flags & flags::NAT != 0, (*entry).to.store_reverse_canonical(other), other)
    };
    remove_found::<F>();
    if !is_nat {
        return;
    }
    // SAFETY: see above.
    if entry_of::<F>(other, is_swapped).is_some_and(|half| p.tuple.is_reverse_of(unsafe { &(*half).to })) {
        remove_found::<F>();
    }
}

const _: () = assert!(FROM_V1 != FROM_OTHER_SIZE && v1::flags::ALL & flags::SWAPPED == 0);
