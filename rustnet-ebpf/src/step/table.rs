//! The connection tables. Contract: finds the entry that serves a packet, and the place for a new one. The only step that knows
//! of the two tables of a family and of the slots of a key ([`rustnet_common::conntrack`]).

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, SLOT_CONTESTED, SOURCE_NONE, Side, flags};
use rustnet_common::tuple::{Tuple, proto};

use crate::ctx::{distinct, masked};
use crate::family::{Family, V4, V6};
use crate::maps;

/// A side that has sent nothing yet.
pub const NOTHING_SENT: Side = Side { bytes: 0, source: SOURCE_NONE, packets: 0, ifindex: 0, seq_end: 0, ack: 0 };

/// One of the two tables of a family: 1 for that of TCP. From one read of the protocol: with two, the verifier would follow a flow of
/// TCP into the other table, too.
#[derive(Clone, Copy)]
pub struct Table(usize);

impl Table {
    /// The table of a key's protocol.
    #[inline(always)]
    pub fn of<A: Address>(key: &Tuple<A>) -> Self {
        Self(masked::<1>(usize::from(key.proto == proto::TCP)))
    }
}

/// The entry that serves packets of the key in one direction; null if there is none.
#[inline(always)]
pub fn find<F: Placed>(key: &Tuple<F::A>, is_swapped: bool) -> *mut CtEntry<F::A> {
    find_in::<F>(Table::of(key), key, is_swapped)
}

/// As [`find`], in a given table.
#[inline(always)]
pub fn find_in<F: Placed>(table: Table, key: &Tuple<F::A>, is_swapped: bool) -> *mut CtEntry<F::A> {
    let (entry, _) = look_up::<F>(table, key, is_swapped);
    entry
}

/// As [`find_in`]; the second result is true if no entry stands in the first slot.
#[inline(always)]
pub fn look_up<F: Placed>(table: Table, key: &Tuple<F::A>, is_swapped: bool) -> (*mut CtEntry<F::A>, bool) {
    let entry = get_from::<F>(table, key);
    let is_vacant = entry.is_null();
    if is_vacant || !serves(entry, is_swapped) {
        return (second::<F>(table, key, is_swapped), is_vacant);
    }
    (entry, false)
}

/// True if the second slot of any key may hold an entry. That takes two translated flows which want one key for opposite directions:
/// on most nodes it never happens, and there a new flow costs one look-up less for each of its keys.
#[inline(always)]
pub fn is_ever_contested() -> bool {
    // SAFETY: an array's element; an aligned word is read in one piece.
    maps::rn_ct_contested.get_ptr(0).is_some_and(|word| unsafe { word.read_volatile() } != 0)
}

#[inline(never)]
fn set_contested() {
    if let Some(word) = maps::rn_ct_contested.get_ptr_mut(0) {
        // SAFETY: see above; nobody writes anything else.
        unsafe { word.write_volatile(1) };
    }
}

/// What both slots of a key hold for packets of one direction.
#[derive(Clone, Copy)]
pub struct Place {
    /// An entry serves them, in this slot.
    pub is_taken: bool,
    /// The slot of that entry, or the slot for a new one.
    pub slot: u8,
    /// An entry of the opposite direction has the same key: a flow that nothing translates would take its packets.
    pub is_contested: bool,
}

impl Place {
    /// The place of a key that no entry has.
    pub const FREE: Self = Self { is_taken: false, slot: 0, is_contested: false };
}

/// Places of one family.
pub trait Placed: Family {
    /// Finds the place of an entry that serves packets of the key in one direction.
    fn place(key: &Tuple<Self::A>, is_swapped: bool) -> Place;
    /// Stores the key of the second slot in scratch memory. False if no second slot ever held an entry.
    fn store_second_key(key: &Tuple<Self::A>) -> bool;
}

/// Declares a family's function with global linkage, for the reason that the parser is one. Bit 0 of its result: taken; bit 1:
/// contested; above: the slot.
macro_rules! global {
    ($family:ident, $addr:ident, $name:ident, $second:ident) => {
        impl Placed for $family {
            #[inline(always)]
            fn place(key: &Tuple<$addr>, is_swapped: bool) -> Place {
                let bits = $name(key, u32::from(is_swapped));
                Place { is_taken: bits & 1 != 0, slot: (bits >> 8 & 1) as u8, is_contested: bits & 2 != 0 }
            }
            #[inline(always)]
            fn store_second_key(key: &Tuple<$addr>) -> bool {
                $second(key) != 0
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(key: *const Tuple<$addr>, is_swapped: u32) -> u32 {
            // SAFETY: the only caller is above and passes a reference; the verifier checks its size.
            let Some(key) = (unsafe { key.as_ref() }) else { return 0 };
            let place = find_place::<$family>(key, is_swapped != 0);
            u32::from(place.is_taken) | u32::from(place.is_contested) << 1 | u32::from(place.slot) << 8
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $second(key: *const Tuple<$addr>) -> u32 {
            // SAFETY: see above.
            let key = unsafe { key.as_ref() }.filter(|_| is_ever_contested()).and_then(slot_key::<$family>);
            key.map_or(0, |key| {
                key.pad = SLOT_CONTESTED;
                1
            })
        }
    };
}

global!(V4, Ip4, rn_ct_place4, rn_ct_second4);
global!(V6, Ip6, rn_ct_place6, rn_ct_second6);

#[inline(always)]
fn find_place<F: Family>(key: &Tuple<F::A>, is_swapped: bool) -> Place {
    let table = Table::of(key);
    let mut place = Place::FREE;
    // In both slots by a copy: kernels before 6.2 refuse a look-up whose key stands behind an argument of a global function.
    let Some(key) = slot_key::<F>(key) else { return place };
    let entry = get_from::<F>(table, key);
    if !entry.is_null() {
        if serves(entry, is_swapped) {
            place.is_taken = true;
            return place;
        }
        place.is_contested = true;
        place.slot = SLOT_CONTESTED;
    }
    if !is_ever_contested() {
        return place;
    }
    key.pad = SLOT_CONTESTED;
    let other = get_from::<F>(table, key);
    if !other.is_null() {
        if serves(other, is_swapped) {
            place.is_taken = true;
            place.slot = SLOT_CONTESTED;
        } else {
            place.is_contested = true;
        }
    }
    place
}

/// The entry in the second slot of a key if it serves packets of this direction, else null.
#[inline(always)]
fn second<F: Placed>(table: Table, key: &Tuple<F::A>, is_swapped: bool) -> *mut CtEntry<F::A> {
    if !F::store_second_key(key) {
        return core::ptr::null_mut();
    }
    let Some(scratch) = F::scratch() else { return core::ptr::null_mut() };
    // SAFETY: see `slot_key`.
    let entry = get_from::<F>(table, unsafe { &(*scratch).slot_key });
    if !entry.is_null() && serves(entry, is_swapped) { entry } else { core::ptr::null_mut() }
}

/// A copy of a key in this CPU's scratch memory, in the first slot. Field by field: a copy of the whole costs stack.
#[inline(always)]
fn slot_key<F: Family>(key: &Tuple<F::A>) -> Option<&'static mut Tuple<F::A>> {
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and callers are done with the key that they
    // got before.
    let copy = unsafe { &mut (*F::scratch()?).slot_key };
    (copy.src, copy.dst, copy.sport, copy.dport) = (key.src, key.dst, key.sport, key.dport);
    (copy.proto, copy.pad, copy.pad2) = (key.proto, 0, 0);
    Some(copy)
}

/// True if an entry serves packets of this direction.
#[inline(always)]
pub fn serves<A>(entry: *const CtEntry<A>, is_swapped: bool) -> bool {
    // SAFETY: callers pass the value of a map, which stays readable for this run of the program.
    let flags = unsafe { (*entry).flags };
    // By arithmetic, for the verifier would follow each of two conditions to the end.
    (flags / flags::NAT) & ((flags / flags::SWAPPED) ^ u16::from(is_swapped)) & 1 == 0
}

/// The entry under exactly this key, or null.
#[inline(always)]
pub fn get<F: Family>(key: &Tuple<F::A>) -> *mut CtEntry<F::A> {
    get_from::<F>(Table::of(key), key)
}

#[inline(always)]
fn get_from<F: Family>(table: Table, key: &Tuple<F::A>) -> *mut CtEntry<F::A> {
    // Two call sites: with one, the kernel could not tell which map is meant, and would not inline the look-up.
    if table.0 != 0 {
        distinct::<0, _>(F::tcp_connections().get_ptr_mut(key).unwrap_or(core::ptr::null_mut()))
    } else {
        distinct::<1, _>(F::other_connections().get_ptr_mut(key).unwrap_or(core::ptr::null_mut()))
    }
}

/// Inserts an entry; `flags` are those of `bpf_map_update_elem`.
#[inline(always)]
pub fn insert<F: Family>(key: &Tuple<F::A>, entry: &CtEntry<F::A>, flags: u64) -> bool {
    if key.pad == SLOT_CONTESTED {
        // First: whoever finds the entry has to look for it.
        set_contested();
    }
    if key.proto == proto::TCP {
        F::tcp_connections().insert(key, entry, flags).is_ok()
    } else {
        F::other_connections().insert(key, entry, flags).is_ok()
    }
}

/// Deletes the entry under exactly this key.
#[inline(always)]
pub fn delete<F: Family>(key: &Tuple<F::A>) {
    // An entry that another CPU or the kernel removed first is as good as deleted.
    let _ = if key.proto == proto::TCP { F::tcp_connections().remove(key) } else { F::other_connections().remove(key) };
}
