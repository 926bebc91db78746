//! Connection tracking. Contract: [`lookup`] finds what a packet of a known connection becomes, with one look-up; [`open`]
//! makes both halves of a new one, choosing another source port where the answer could not be told apart.
//!
//! Nothing here decides where a packet goes or changes it.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::Address;
use rustnet_common::config::{self, NodeConfig};
use rustnet_common::conntrack::{CtEntry, flags, lifetime, state};
use rustnet_common::drop::DropReason;
use rustnet_common::hash;
use rustnet_common::tuple::{Tuple, proto};

use super::route::{self, Way};
use super::{Packed, Stop, lb};
use crate::ctx::{self, Ctx, Skb, jiffies, random};
use crate::family::Family;
use crate::parse::{Kind, Packet, tcp};

/// Random source ports tried before a connection is refused: with 95 of 100 taken, five in a million searches fail.
const TRIES: u32 = 256;
/// Of these, the first that leave alone what merely is closing.
const PATIENT_TRIES: u32 = 16;

/// What proves that a packet's source address is genuine, remembered in the entry so that it is proved once a flow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// The interface it came in by.
    pub ifindex: u32,
    /// The pod's MAC, or the end of a tunnel's far address.
    pub bytes: [u16; 3],
}

impl Guard {
    /// For hooks that trust their source.
    #[inline(always)]
    pub fn none(ifindex: u32) -> Self {
        Self { ifindex, bytes: [0; 3] }
    }
}

/// Finds the connection of a packet, counts the packet, and keeps both halves alive; `way` becomes what the packet is to
/// become. `verify` is called when the packet does not come from where this half was last seen to come from; its error
/// ends the packet.
#[inline(always)]
pub fn lookup<F: Family, C: Ctx>(
    ctx: &C,
    packet: &Packet<F::A>,
    config: &NodeConfig,
    guard: Guard,
    way: &mut Way<F::A>,
    verify: impl Fn() -> Result<(), DropReason>,
) -> Result<bool, DropReason> {
    let Some(entry) = F::connections().get_ptr_mut(&packet.tuple) else { return Ok(false) };
    // SAFETY: a map value stays valid for this run of the program even if it is evicted; counters may lose a race.
    let e = unsafe { &mut *entry };
    let tcp_flags = packet.tcp_flags;
    if tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN && state::closing(e.state) {
        // The port pair is used again: forget the old connection by opening a new one over it.
        return Ok(false);
    }
    if e.ifindex != guard.ifindex || e.guard != guard.bytes {
        verify()?;
        e.ifindex = guard.ifindex;
        e.guard = guard.bytes;
    }
    e.packets = e.packets.wrapping_add(1);
    e.bytes = e.bytes.wrapping_add(u64::from(ctx.len()));
    let reply = e.flags & flags::REPLY != 0;
    let mut new = e.state;
    if reply {
        new |= state::ANSWERED;
    }
    if tcp_flags & tcp::FIN != 0 && packet.kind == Kind::Flow {
        new |= if reply { state::FIN_REPLY } else { state::FIN_ORIG };
    }
    if tcp_flags & tcp::RST != 0 {
        new |= state::RST;
    }
    let now = jiffies();
    if now.wrapping_sub(e.seen) >= config.hz || new != e.state || e.out == 0 {
        if e.backend == 0 && new & state::ANSWERED == 0 && lb::is_service::<F>(&packet.tuple) {
            // The flow is older than the service it asks for (or than our knowledge of it) and nobody has answered: it
            // would be sent into the void for as long as its sender persists.
            return Ok(false);
        }
        e.seen = now;
        e.state = new;
        e.out = route::pod(e.to.dst);
        mend::<F>(&packet.tuple, e);
    }
    *way = Way { to: e.to, out: e.out };
    Ok(true)
}

/// Brings the other half up to date, and makes it anew if it was evicted.
#[inline(never)]
fn mend<F: Family>(key: &Tuple<F::A>, e: &CtEntry<F::A>) {
    let other_key = e.to.reversed();
    let back = key.reversed();
    if let Some(other) = F::connections().get_ptr_mut(&other_key) {
        // SAFETY: see `lookup`.
        let other = unsafe { &mut *other };
        if other.to == back {
            other.seen = e.seen;
            other.state = e.state;
            return;
        }
    }
    let half = CtEntry {
        to: back,
        flags: e.flags ^ flags::REPLY,
        state: e.state,
        pad: 0,
        seen: e.seen,
        ifindex: 0,
        backend: e.backend,
        out: 0,
        guard: [0; 3],
        pad2: [0; 3],
        packets: 0,
        bytes: 0,
    };
    // A failure leaves this half alone, which still carries its own direction; the next second tries again.
    let _ = F::connections().insert(&other_key, &half, BPF_ANY.into());
}

/// A connection to be opened.
#[repr(C)]
pub struct Opening<A> {
    /// The tuple as the first packet shows it.
    pub key: Tuple<A>,
    /// The half under construction. Callers set `to` (whose source port [`open`] may change), `flags` (NAT is set by
    /// [`open`]) and `backend`.
    pub half: CtEntry<A>,
    /// What the asking half becomes, while its source port is sought.
    becomes: Tuple<A>,
    /// The answering half's key.
    answer: Tuple<A>,
}

/// Begins to open the connection of a packet: as it stands, without translation.
#[inline(always)]
pub fn begin<F: Family, C: Ctx>(
    ctx: &C,
    packet: &Packet<F::A>,
    guard: Guard,
) -> Result<&'static mut Opening<F::A>, DropReason> {
    let scratch = F::scratch().ok_or(DropReason::CtCreateFailed)?;
    // SAFETY: the element belongs to this CPU, TC programs do not interrupt each other, and nobody else borrows the field.
    let o = unsafe { &mut (*scratch).opening };
    o.key = packet.tuple;
    o.half = CtEntry {
        to: packet.tuple,
        flags: 0,
        state: 0,
        pad: 0,
        seen: jiffies(),
        ifindex: guard.ifindex,
        backend: 0,
        out: 0,
        guard: guard.bytes,
        pad2: [0; 3],
        packets: 1,
        bytes: u64::from(ctx.len()),
    };
    Ok(o)
}

/// True for protocols whose source port can be changed.
#[inline(always)]
fn has_ports<A: Address>(t: &Tuple<A>) -> bool {
    match t.proto {
        proto::TCP | proto::UDP | proto::SCTP => true,
        // Of ICMP only the asking half of echo.
        proto::ICMP | proto::ICMPV6 => t.dport == 0 && t.sport != 0,
        _ => false,
    }
}

/// Opens the connection of the packet at `l3`: the answering half first, for it must be unique, then the asking half. Tells
/// of it where that is asked for.
#[inline(always)]
pub fn open<F: Family>(
    skb: &Skb,
    l3: usize,
    hook: u8,
    o: &mut Opening<F::A>,
    config: &NodeConfig,
) -> Result<(), DropReason> {
    packed_open::<F>(o, config).done()?;
    if config.flags & config::flags::FLOW_EVENTS != 0 {
        F::report(skb, l3, DropReason::Forwarded, hook);
    }
    Ok(())
}

#[inline(never)]
fn packed_open<F: Family>(o: &mut Opening<F::A>, config: &NodeConfig) -> Packed {
    Packed::new(try_open::<F>(o, config).map(|()| 0).map_err(Stop::from))
}

#[inline(always)]
fn try_open<F: Family>(o: &mut Opening<F::A>, config: &NodeConfig) -> Result<(), DropReason> {
    let ports = has_ports(&o.key);
    if o.half.flags & flags::MASQ != 0 && ports && !(config.snat_min..=config.snat_max).contains(&o.half.to.sport) {
        // From the flow's hash: a connection that was evicted gets its port again.
        o.half.to.sport = port(config, hash::flow(&o.key, config.seed));
    }
    let (ifindex, guard, out) = (o.half.ifindex, o.half.guard, o.half.out);
    let (packets, bytes) = (o.half.packets, o.half.bytes);
    o.becomes = o.half.to;
    // The half becomes the answering one for as long as its place is sought.
    o.half.to = o.key.reversed();
    o.half.flags |= flags::REPLY;
    o.half.ifindex = 0;
    o.half.guard = [0; 3];
    o.half.out = 0;
    o.half.packets = 0;
    o.half.bytes = 0;
    let mut claimed = claim::<F>(o, config, !ports);
    if claimed == TAKEN && ports {
        // Another connection would get our answers (two VIPs with one backend, or two pods behind one address).
        // SAFETY: the callback has the signature that the helper wants, and `claimed` outlives the call.
        unsafe { helper::bpf_loop(TRIES, another_port::<F> as *mut c_void, (&raw mut claimed).cast(), 0) };
    }
    match claimed {
        CLAIMED => {}
        TAKEN => return Err(DropReason::NatNoMapping),
        _ => return Err(DropReason::CtCreateFailed),
    }
    o.half.to = o.becomes;
    o.half.flags &= !flags::REPLY;
    o.half.ifindex = ifindex;
    o.half.guard = guard;
    o.half.out = out;
    o.half.packets = packets;
    o.half.bytes = bytes;
    F::connections().insert(&o.key, &o.half, BPF_ANY.into()).map_err(|_| DropReason::CtCreateFailed)
}

/// What [`claim`] gives: the answering half is in.
const CLAIMED: u32 = 0;
/// Another connection has that tuple.
const TAKEN: u32 = 1;
/// The table takes nothing.
const FULL: u32 = 2;

/// Inserts the answering half of a connection that becomes `o.becomes`, unless its tuple belongs to another one. Even one that
/// is closing counts, unless `hurry`: the far end may hold it in TIME_WAIT, and answers a SYN there with a detour at best
/// (RFC 6191).
#[inline(never)]
fn claim<F: Family>(o: &mut Opening<F::A>, config: &NodeConfig, hurry: bool) -> u32 {
    if o.becomes != o.key {
        o.half.flags |= flags::NAT;
    }
    o.answer = o.becomes.reversed();
    if F::connections().insert(&o.answer, &o.half, BPF_NOEXIST.into()).is_ok() {
        return CLAIMED;
    }
    // None: the table is full beyond what its LRU can free, or the entry went away just now.
    if let Some(old) = F::connections().get_ptr_mut(&o.answer) {
        // SAFETY: see `lookup`.
        let old = unsafe { &*old };
        let silent = o.half.seen.wrapping_sub(old.seen);
        let free = old.to == o.half.to
            || (hurry && state::closing(old.state))
            || silent >= lifetime(o.answer.proto, old.state).wrapping_mul(config.hz);
        if !free {
            return TAKEN;
        }
    }
    if F::connections().insert(&o.answer, &o.half, BPF_ANY.into()).is_ok() { CLAIMED } else { FULL }
}

/// One round of the search for a source port: `bpf_loop` calls it until it gives 1. The verifier proves it once.
extern "C" fn another_port<F: Family>(round: u32, claimed: *mut c_void) -> u64 {
    let (Some(scratch), Some(config)) = (F::scratch(), ctx::config()) else { return 1 };
    // SAFETY: as in `begin`; the caller's borrow of the same connection rests while the helper runs.
    let o = unsafe { &mut (*scratch).opening };
    o.becomes.sport = port(config, random());
    let found = claim::<F>(o, config, round >= PATIENT_TRIES);
    // SAFETY: `try_open` passes a pointer to its own variable.
    unsafe { *claimed.cast::<u32>() = found };
    u64::from(found != TAKEN)
}

/// The port of those set aside for translation that a number stands for.
#[inline(always)]
fn port(config: &NodeConfig, number: u32) -> u16 {
    let span = u32::from(config.snat_max.wrapping_sub(config.snat_min)) + 1;
    config.snat_min.wrapping_add(hash::pick(number, span) as u16)
}
