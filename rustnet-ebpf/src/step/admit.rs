//! Admission of new flows. Contract: the one place that opens connections, if policies allow them. It reserves the tuple of
//! the answers, choosing another source port where the answers could not be distinguished, and
//! inserts the entries.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, NOT_LOCAL, Side, elapsed, flags, lifetime, state};
use rustnet_common::drop::DropReason;
use rustnet_common::hash;
use rustnet_common::tuple::{Tuple, proto};

use super::migrate::{self, Old};
use super::table::{self, NOTHING_SENT, Place, Placed};
use super::{policy, route};
use crate::ctx::{Ctx, Skb, jiffies, random};
use crate::event::Report;
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, NewConnection, Packet, Source};
use crate::parse;

/// Random source ports tried before a connection is refused: with 95 of 100 taken, two in a million searches fail.
const TRIES: u32 = 256;
/// As many for a destination where such a search has failed within a second: a search costs more than a packet.
const TRIES_WHEN_FULL: u32 = 16;
/// Of these, the first that leave alone connections which merely are closing.
const KEEP_CLOSING_TRIES: u32 = 16;

/// Opens the connection of a new flow, whose source port may change. `len` is the length of the frame that is counted. Emits a flow event if `FLOW_EVENTS` is set.
#[inline(always)]
pub fn admit<F: Report + Create>(
    skb: &Skb,
    p: &Packet<F::A>,
    flow: &mut Flow<F::A>,
    config: &NodeConfig,
    source: Source,
    len: u32,
    hook: u8,
) -> Result<(), DropReason> {
    if F::create(flow, source, len).result().map_err(|dropped| dropped.reason)? == NEEDS_PAIR {
        F::create_pair(flow).into_unit()?;
    }
    parse::remember_ports::<F>(p, skb.ifindex());
    // By arithmetic, for the verifier would follow each of two conditions to the end.
    if u16::from(flow.is_audited) | config.flags & config::flags::FLOW_EVENTS != 0 {
        F::report(skb, p.l3(), u8::from(flow.is_audited) * DropReason::PolicyAudited as u8, hook);
    }
    Ok(())
}

/// Creation of connections of one family.
pub trait Create: parse::Remember {
    /// Inserts the entry of the flow of the packet in hand, or returns [`NEEDS_PAIR`]. `len` is the length of its frame.
    fn create(flow: &mut Flow<Self::A>, source: Source, len: u32) -> PackedResult;
    /// Inserts both entries of the flow that [`Create::create`] was called for.
    fn create_pair(flow: &mut Flow<Self::A>) -> PackedResult;
}

/// The flow is translated: each direction needs an entry of its own.
const NEEDS_PAIR: i32 = 1;

/// Declares a family's creation as a function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $addr:ident, $name:ident, $pair:ident) => {
        impl Create for $family {
            #[inline(always)]
            fn create(flow: &mut Flow<$addr>, source: Source, len: u32) -> PackedResult {
                PackedResult::from_bits($name(flow, source.ifindex, source.bytes[0], source.bytes[1], len))
            }
            #[inline(always)]
            fn create_pair(flow: &mut Flow<$addr>) -> PackedResult {
                PackedResult::from_bits($pair(flow))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $pair(flow: *mut Flow<$addr>) -> u64 {
            // SAFETY: the only caller is above and passes a reference; the verifier checks its size.
            let created = unsafe { flow.as_mut() }.map_or(Err(DropReason::CtCreateFailed), create_pair::<$family>);
            PackedResult::new(created.map(|()| 0).map_err(Dropped::from)).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(flow: *mut Flow<$addr>, ifindex: u32, source: u64, source2: u64, len: u32) -> u64 {
            // SAFETY: see above.
            let created = match unsafe { flow.as_mut() } {
                Some(flow) => create::<$family>(
                    flow,
                    Source { is_pod: ifindex != NOT_LOCAL, ifindex, bytes: [source, source2] },
                    len,
                ),
                None => Err(DropReason::CtCreateFailed),
            };
            PackedResult::new(created.map_err(Dropped::from)).bits()
        }
    };
}

global!(V4, Ip4, rn_ct_create4, rn_ct_pair4);
global!(V6, Ip6, rn_ct_create6, rn_ct_pair6);

/// Fills in the connection in this CPU's scratch memory.
#[inline(always)]
fn prepare<A: Address>(c: &mut NewConnection<A>, flow: &Flow<A>, p: &Packet<A>, source: Source, len: u32) {
    let local = if source.is_pod { route::local_pod(p.tuple.src) } else { NOT_LOCAL };
    let egress = if flow.to.egress == 0 { route::local_pod(flow.to.tuple.dst) } else { flow.to.egress };
    c.tuple = p.tuple;
    c.key = p.key;
    c.original.to = flow.to.tuple;
    c.original.flags = flow.flags | if p.is_swapped { flags::SWAPPED } else { 0 };
    c.original.pad = 0;
    c.original.seen = jiffies();
    c.original.state = 0;
    c.original.backend = flow.backend;
    c.original.sides[0] = Side {
        bytes: u64::from(len),
        source: source.bytes,
        packets: 1,
        ifindex: local,
        seq_end: p.seq_end,
        ack: p.ack,
    };
    c.original.sides[1] = Side { ifindex: egress, ..NOTHING_SENT };
}

/// True for protocols whose source port can be changed.
#[inline(always)]
fn has_ports<A: Address>(t: &Tuple<A>) -> bool {
    match t.proto {
        proto::TCP | proto::UDP | proto::SCTP => true,
        // Of ICMP only the request of an echo.
        proto::ICMP | proto::ICMPV6 => t.dport == 0 && t.sport != 0,
        _ => false,
    }
}

#[inline(always)]
fn create<F: Placed + Old>(flow: &mut Flow<F::A>, source: Source, len: u32) -> Result<i32, DropReason> {
    let scratch = F::scratch().ok_or(DropReason::CtCreateFailed)?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, nothing writes the packet after the parser,
    // and this is the only borrow of the connection.
    let (c, p) = unsafe { (&mut (*scratch).connection, &(*scratch).packet) };
    let generation = policy::judge::<F>(p, flow)?;
    prepare(c, flow, p, source, len);
    c.original.generation = generation;
    let place =
        if flow.is_vacant && !table::is_ever_contested() { Place::FREE } else { F::place(&c.key, p.is_swapped) };
    c.key.pad = place.slot;
    if place.is_taken {
        // Another CPU opened this flow a moment ago.
        return follow::<F>(c, flow).map(|_| 0);
    }
    if flow.flags & flags::DIRECT != 0 {
        // No answers come by here.
        c.original.flags |= flags::NAT;
    } else if c.original.to != c.tuple || place.is_contested {
        return Ok(NEEDS_PAIR);
    }
    // One entry for both directions, or for the only one.
    if !table::insert::<F>(&c.key, &c.original, BPF_NOEXIST.into()) {
        return follow::<F>(c, flow).map(|_| 0);
    }
    if migrate::is_migrating() {
        migrate::mirror::<F>(false);
    }
    Ok(0)
}

#[inline(always)]
fn create_pair<F: Reserve>(flow: &mut Flow<F::A>) -> Result<(), DropReason> {
    let (Some(scratch), Some(config)) = (F::scratch(), maps::config()) else {
        return Err(DropReason::CtCreateFailed);
    };
    // SAFETY: see `create`.
    let c = unsafe { &mut (*scratch).connection };
    let ports = has_ports(&c.tuple);
    if ports && c.original.flags & flags::MASQ != 0 && !is_snat_port(config, c.original.to.sport) {
        // From the flow's hash: a connection that was evicted gets its port again.
        c.original.to.sport = port(config, hash::flow(&c.tuple, config.seed));
    }
    c.original.flags |= flags::NAT;
    c.reply = c.original;
    c.tuple.store_reversed(&mut c.reply.to);
    c.reply.sides = [
        Side { ifindex: c.original.sides[1].ifindex, ..NOTHING_SENT },
        // The number that the first answer has to acknowledge.
        Side { ifindex: c.original.sides[0].ifindex, seq_end: c.original.sides[0].seq_end, ..NOTHING_SENT },
    ];
    let mut reservation = if c.original.to == c.tuple {
        // Not translated for a reason of its own: only another source port sets its answers apart.
        Reservation::TAKEN
    } else {
        F::reserve(!ports, true)
    };
    if reservation == Reservation::TAKEN && ports {
        let towards = hash::flow(&Tuple { sport: 0, ..c.original.to }, config.seed);
        reservation = search_port::<F>(towards, c.original.seen, config, reservation);
    }
    match reservation {
        Reservation::RESERVED => {}
        Reservation::TAKEN => return Err(DropReason::NatNoMapping),
        _ => return Err(DropReason::CtCreateFailed),
    }
    flow.to.tuple.sport = c.original.to.sport;
    if table::insert::<F>(&c.key, &c.original, BPF_NOEXIST.into()) {
        if migrate::is_migrating() {
            migrate::mirror::<F>(true);
        }
        return Ok(());
    }
    // Another CPU was faster. Its packet may have got another source port, and all packets of a flow have to have the same.
    let followed = follow::<F>(c, flow);
    if !matches!(followed, Ok(true)) {
        table::delete::<F>(&c.reply_key);
    }
    followed.map(|_| ())
}

/// Lets the packet take the way of the entry that another CPU inserted under its key; true if that is the way which was planned for
/// it. Where it leads elsewhere, the packet is refused: its route has been found already.
#[inline(always)]
fn follow<F: Family>(c: &NewConnection<F::A>, flow: &mut Flow<F::A>) -> Result<bool, DropReason> {
    let entry = table::get::<F>(&c.key);
    if entry.is_null() || !table::serves(entry, c.original.flags & flags::SWAPPED != 0) {
        return Err(DropReason::CtCreateFailed);
    }
    // SAFETY: a map value stays readable for this run of the program.
    let to = unsafe { if (*entry).flags & flags::NAT != 0 { &(*entry).to } else { &c.tuple } };
    if to.dst != flow.to.tuple.dst || to.dport != flow.to.tuple.dport {
        return Err(DropReason::CtCreateFailed);
    }
    let is_same = *to == flow.to.tuple;
    flow.to.tuple.src = to.src;
    flow.to.tuple.sport = to.sport;
    Ok(is_same)
}

/// Results of [`reserve`], as the callback of a helper can hand them on.
struct Reservation;

impl Reservation {
    /// The entry of the reply direction is in.
    const RESERVED: u32 = 0;
    /// Another connection has that tuple.
    const TAKEN: u32 = 1;
    /// The table takes nothing.
    const FULL: u32 = 2;
}

/// Reservations of one family.
trait Reserve: Placed + Old {
    /// See [`reserve`]. A first attempt finds its tuple free as a rule, and inserts without a look-up. Those of a search do not: an
    /// insertion that fails costs three look-ups.
    fn reserve(reuse_closing: bool, is_first: bool) -> u32;
}

/// Declares a family's function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $name:ident) => {
        impl Reserve for $family {
            #[inline(always)]
            fn reserve(reuse_closing: bool, is_first: bool) -> u32 {
                $name(u32::from(reuse_closing), u32::from(is_first))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(reuse_closing: u32, is_first: u32) -> u32 {
            reserve::<$family>(reuse_closing != 0, is_first != 0)
        }
    };
}

global!(V4, rn_ct_reserve4);
global!(V6, rn_ct_reserve6);

/// Inserts the entry of the reply direction, unless its tuple belongs to another connection. A closing connection counts, too,
/// unless `reuse_closing`: the far end may hold it in TIME_WAIT, and delays a SYN there (RFC 6191).
#[inline(always)]
fn reserve<F: Placed + Old>(reuse_closing: bool, is_first: bool) -> u32 {
    let (Some(scratch), Some(config)) = (F::scratch(), maps::config()) else { return Reservation::FULL };
    // SAFETY: as in `create`; the callers do not use their borrows while this runs.
    let c = unsafe { &mut (*scratch).connection };
    let is_swapped = c.original.to.store_reverse_canonical(&mut c.reply_key);
    let swapped = if is_swapped { flags::SWAPPED } else { 0 };
    c.reply.flags = (c.original.flags & !flags::SWAPPED) | flags::REPLY | swapped;
    if migrate::is_migrating() && migrate::is_reply_taken::<F>(c) {
        return Reservation::TAKEN;
    }
    if is_first && !table::is_ever_contested() && table::insert::<F>(&c.reply_key, &c.reply, BPF_NOEXIST.into()) {
        return Reservation::RESERVED;
    }
    let place = F::place(&c.reply_key, is_swapped);
    c.reply_key.pad = place.slot;
    let mut how = BPF_NOEXIST;
    if place.is_taken {
        let entry = table::get::<F>(&c.reply_key);
        if !entry.is_null() && !is_reusable(c, entry, config, reuse_closing) {
            return Reservation::TAKEN;
        }
        how = BPF_ANY;
    }
    if table::insert::<F>(&c.reply_key, &c.reply, how.into()) {
        return Reservation::RESERVED;
    }
    let entry = table::get::<F>(&c.reply_key);
    if entry.is_null() {
        return Reservation::FULL;
    }
    // Another CPU was faster, with a packet of this flow or of another.
    // SAFETY: a map value stays readable for this run of the program.
    if unsafe { (*entry).to == c.reply.to } { Reservation::RESERVED } else { Reservation::TAKEN }
}

/// True if the entry of a reply direction belongs to this very connection, or to one that is over.
#[inline(always)]
fn is_reusable<A: Address>(
    c: &NewConnection<A>,
    entry: *const CtEntry<A>,
    config: &NodeConfig,
    reuse_closing: bool,
) -> bool {
    // SAFETY: a map value stays readable for this run of the program.
    let (to, old_state, seen) = unsafe { (&(*entry).to, (*entry).state, (*entry).seen) };
    *to == c.reply.to
        || (reuse_closing && state::is_closing(old_state))
        || elapsed(c.original.seen, seen) >= lifetime(c.reply_key.proto, old_state).wrapping_mul(config.hz)
}

/// Searches a source port for which the answers can be distinguished; `number` is the hash of the destination. The connection is no
/// argument: while a function has it as one, the compiler may take for granted that no helper's callback writes it.
#[inline(always)]
fn search_port<F: Reserve>(number: u32, now: u32, config: &NodeConfig, reservation: u32) -> u32 {
    let full = maps::rn_nat_full.get_ptr_mut(number & (maps::NAT_FULL_SLOTS - 1));
    // A time ahead, of another CPU a moment ago, may be one of before the clock wrapped just as well: the search is a long one.
    // SAFETY: an array's element; two words that another CPU may write in between only cost a longer or shorter search.
    let is_full = full
        .is_some_and(|full| unsafe { (*full).destination == number && now.wrapping_sub((*full).since) < config.hz });
    let (tries, keep_closing) = if is_full { (TRIES_WHEN_FULL, 0) } else { (TRIES, KEEP_CLOSING_TRIES) };
    let mut search = Search { reservation, keep_closing };
    // SAFETY: the callback has the signature that the helper wants, and `search` outlives the call.
    unsafe { helper::bpf_loop(tries, try_random_port::<F> as *mut c_void, (&raw mut search).cast(), 0) };
    if search.reservation == Reservation::TAKEN
        && !is_full
        && let Some(full) = full
    {
        // SAFETY: see above.
        unsafe { *full = maps::NatFull { destination: number, since: now } };
    }
    search.reservation
}

/// A search for a source port.
#[repr(C)]
struct Search {
    /// See [`Reservation`].
    reservation: u32,
    /// Rounds that leave alone connections which merely are closing.
    keep_closing: u32,
}

/// One round of a [`Search`]: `bpf_loop` calls it until it returns 1. The verifier checks it once.
extern "C" fn try_random_port<F: Reserve>(round: u32, search: *mut c_void) -> u64 {
    let (Some(scratch), Some(config)) = (F::scratch(), maps::config()) else { return 1 };
    // SAFETY: `search_port` passes a pointer to its own variable.
    let search = unsafe { &mut *search.cast::<Search>() };
    // SAFETY: as in `create`; the caller does not use its borrow while the helper runs.
    let c = unsafe { &mut (*scratch).connection };
    c.original.to.sport = port(config, random());
    search.reservation = F::reserve(round >= search.keep_closing, false);
    u64::from(search.reservation != Reservation::TAKEN)
}

/// True for ports that translation may use.
#[inline(always)]
fn is_snat_port(config: &NodeConfig, port: u16) -> bool {
    (config.snat_min..=config.snat_max).contains(&port) && port != config.overlay_port
}

/// Maps a number to a port that translation may use: the SNAT range without the overlay's port, whose packets the kernel's
/// tunnel socket takes.
#[inline(always)]
fn port(config: &NodeConfig, number: u32) -> u16 {
    let span = u32::from(config.snat_max.wrapping_sub(config.snat_min)) + 1;
    let port = config.snat_min.wrapping_add(hash::pick(number, span) as u16);
    match port {
        port if port != config.overlay_port => port,
        last if last == config.snat_max => config.snat_min,
        port => port.wrapping_add(1),
    }
}
