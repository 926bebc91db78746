//! Direct server return (DSR). Contract: decides which packets another node has handed on for it, and which backend of this node they are
//! for; keeps the state of flows whose answers do not pass here. Which flows those are is for `nat` to decide.

use aya_ebpf::bindings::__sk_buff;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::config;
use rustnet_common::conntrack::{flags, state};
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::proto;

use super::source::Verify;
use super::table::{self, Placed};
use super::{lb, route, source};
use crate::ctx::{Skb, at_pulled, atomic_or};
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, Kind, Packet};
use crate::wire::{Header4, Header6, tcp};

/// What is read of a header inside of another one.
pub trait ReadInside<A>: Copy {
    /// The destination, if it is a header of this family.
    fn destination(&self) -> Option<A>;
}

impl ReadInside<Ip4> for Header4 {
    #[inline(always)]
    fn destination(&self) -> Option<Ip4> {
        (self.ver_ihl >> 4 == 4).then_some(self.dst)
    }
}

impl ReadInside<Ip6> for Header6 {
    #[inline(always)]
    fn destination(&self) -> Option<Ip6> {
        (self.ver_flow.to_ne_bytes()[0] >> 4 == 6).then_some(self.dst.by_word())
    }
}

/// Direct server return of one family.
pub trait Direct: Placed + Verify {
    /// True if a packet of the family, inside of another header of it, comes from another node which hands it on for direct server
    /// return: for a pod of this node, and asks that node or a Service's address for clients outside. Whether the source of the outer
    /// header is genuine is for the caller to verify.
    fn is_wrapped(skb: &Skb, p: &Packet<Self::A>) -> bool;
    /// Proves that the source of a packet which another node has handed on is a client outside.
    fn verify_client(p: &Packet<Self::A>) -> Result<(), DropReason>;
    /// Fills in what the new flow of a packet that `node` has handed on for the pod becomes.
    fn translate_direct(p: &Packet<Self::A>, flow: &mut Flow<Self::A>, pod: Addr, is_node_port: bool) -> PackedResult;
}

/// Declares a family's functions with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $addr:ident, $wrapped:ident, $client:ident, $translate:ident) => {
        impl Direct for $family {
            #[inline(always)]
            fn is_wrapped(skb: &Skb, p: &Packet<$addr>) -> bool {
                // Most packets, without a call.
                p.tuple.proto == <$family>::IN_IP && $wrapped(skb.raw(), p) != 0
            }
            #[inline(always)]
            fn verify_client(p: &Packet<$addr>) -> Result<(), DropReason> {
                PackedResult::from_bits($client(p)).into_unit()
            }
            #[inline(always)]
            fn translate_direct(
                p: &Packet<$addr>,
                flow: &mut Flow<$addr>,
                pod: Addr,
                is_node_port: bool,
            ) -> PackedResult {
                let (high, low) = pod.halves();
                PackedResult::from_bits($translate(p, flow, high, low, u32::from(is_node_port)))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $wrapped(skb: *mut __sk_buff, p: *const Packet<$addr>) -> u32 {
            // SAFETY: the only caller is above and passes a reference; the verifier checks its size.
            u32::from(unsafe { p.as_ref() }.is_some_and(|p| is_wrapped::<$family>(&Skb(skb), p)))
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $client(p: *const Packet<$addr>) -> u64 {
            // SAFETY: see above.
            let verified = unsafe { p.as_ref() }.map_or(Err(DropReason::Malformed), |p| {
                $family::verify_outside(p)?;
                if route::is_client_outside::<$family>(p.tuple.src) { Ok(()) } else { Err(DropReason::Spoofed) }
            });
            PackedResult::new(verified.map(|()| 0).map_err(Dropped::from)).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $translate(
            p: *const Packet<$addr>,
            flow: *mut Flow<$addr>,
            high: u64,
            low: u64,
            is_node_port: u32,
        ) -> u64 {
            // SAFETY: see above.
            let translated = match unsafe { (p.as_ref(), flow.as_mut()) } {
                (Some(p), Some(flow)) => translate::<$family>(p, flow, Addr::from_halves(high, low), is_node_port != 0),
                _ => Err(DropReason::Malformed),
            };
            PackedResult::new(translated.map(|()| 0).map_err(Dropped::from)).bits()
        }
    };
}

global!(V4, Ip4, rn_wrapped4, rn_client4, rn_direct4);
global!(V6, Ip6, rn_wrapped6, rn_client6, rn_direct6);

#[inline(always)]
fn is_wrapped<F: Family<Header: ReadInside<F::A>>>(skb: &Skb, p: &Packet<F::A>) -> bool {
    let is_whole = p.kind == Kind::Flow && !p.is_first_fragment() && p.l4() == p.l3() + size_of::<F::Header>();
    if !is_whole || !route::is_local_pod(p.tuple.dst) || !source::is_node::<F>(p.tuple.src) {
        return false;
    }
    let Some(inside) = at_pulled::<F::Header, _>(skb, p.l4()) else { return false };
    // SAFETY: `at_pulled` proved a whole header.
    let Some(asked) = (unsafe { (*inside).destination() }) else { return false };
    // An address has an entry as soon as this node knows its Service; whether there are node ports, the setting says a little later.
    let has_node_ports = || maps::config().is_some_and(|config| config.flags & config::flags::EXTERNAL != 0);
    lb::is_external_vip::<F>(asked) || (asked == p.tuple.src && has_node_ports())
}

#[inline(always)]
fn translate<F: Family>(
    p: &Packet<F::A>,
    flow: &mut Flow<F::A>,
    pod: Addr,
    is_node_port: bool,
) -> Result<(), DropReason> {
    let Some(config) = maps::config() else { return Err(DropReason::NoFib) };
    // The ports of a node are those of all nodes. But its address can be an external IP, too.
    let vip = if is_node_port && !lb::is_external::<F>(&p.tuple) { F::node(config) } else { p.tuple.dst };
    let backend = lb::select_at::<F>(&p.tuple, vip, pod, config.seed)?;
    flow.to.tuple.dst = F::A::from_addr(pod);
    flow.to.tuple.dport = backend.port;
    flow.to.egress = route::local_pod(flow.to.tuple.dst);
    flow.backend = backend.id;
    flow.flags |= flags::EXTERNAL;
    if p.tuple.dst != F::node(config) {
        flow.flags |= flags::SECOND_ADDRESS;
    }
    Ok(())
}

/// Marks a TCP connection as established whose answers do not pass here, once its opener acknowledges something with a number of this
/// connection.
#[inline(always)]
pub fn follow<F: Placed>(p: &Packet<F::A>) {
    const ESTABLISHED: u64 = state::ANSWERED | state::ESTABLISHED;
    if p.tuple.proto != proto::TCP || p.tcp_flags & (tcp::SYN | tcp::RST | tcp::ACK) != tcp::ACK {
        return;
    }
    let entry = table::find::<F>(&p.key, p.is_swapped);
    if entry.is_null() {
        return;
    }
    // SAFETY: a map value stays readable and writable for this run of the program; the state changes by atomic operations alone.
    unsafe {
        let is_of_connection = (*entry).sides[0].seq_end == p.seq_end;
        if is_of_connection && (&raw const (*entry).state).read_volatile() & ESTABLISHED != ESTABLISHED {
            atomic_or(&raw mut (*entry).state, ESTABLISHED);
        }
    }
}
