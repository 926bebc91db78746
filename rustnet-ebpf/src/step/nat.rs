//! The translation of new flows. Contract: says what a flow becomes: backend (DNAT), node address (hairpin, masquerade), or itself.

use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config;
use rustnet_common::conntrack::{NOT_LOCAL, flags};
use rustnet_common::drop::DropReason;
use rustnet_common::peer;
use rustnet_common::service::scope;
use rustnet_common::tuple::{Tuple, proto};

use super::host_port::HostPorts;
use super::lb::{self, Vip};
use super::route::{self, Route};
use crate::ctx::Skb;
use crate::family::{Family, V4, V6};
use crate::maps;
use crate::outcome::{Dropped, PackedResult};
use crate::packet::{Flow, Packet};

/// Translation of new flows of one family.
pub trait Nat: HostPorts {
    /// Fills in what a pod's new flow becomes.
    fn translate_new(p: &Packet<Self::A>, flow: &mut Flow<Self::A>) -> PackedResult;
    /// Fills in what a new flow from outside to a Service becomes.
    fn translate_external(p: &Packet<Self::A>, flow: &mut Flow<Self::A>) -> PackedResult;
}

/// Declares a family's function with global linkage, for the reason that the parser is one.
macro_rules! global {
    ($family:ident, $addr:ident, $name:ident, $external:ident) => {
        impl Nat for $family {
            #[inline(always)]
            fn translate_new(p: &Packet<$addr>, flow: &mut Flow<$addr>) -> PackedResult {
                PackedResult::from_bits($name(p, flow))
            }
            #[inline(always)]
            fn translate_external(p: &Packet<$addr>, flow: &mut Flow<$addr>) -> PackedResult {
                PackedResult::from_bits($external(p, flow))
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $external(p: *const Packet<$addr>, flow: *mut Flow<$addr>) -> u64 {
            // SAFETY: as below.
            let translated = match unsafe { (p.as_ref(), flow.as_mut()) } {
                (Some(p), Some(flow)) => translate_external::<$family>(p, flow),
                _ => Err(DropReason::Malformed),
            };
            PackedResult::new(translated.map(|()| 0).map_err(Dropped::from)).bits()
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(p: *const Packet<$addr>, flow: *mut Flow<$addr>) -> u64 {
            // SAFETY: the only caller is above and passes references; the verifier checks sizes.
            let translated = match unsafe { (p.as_ref(), flow.as_mut()) } {
                (Some(p), Some(flow)) => translate_new::<$family>(p, flow),
                _ => Err(DropReason::Malformed),
            };
            PackedResult::new(translated.map(|()| 0).map_err(Dropped::from)).bits()
        }
    };
}

global!(V4, Ip4, rn_nat4, rn_external4);
global!(V6, Ip6, rn_nat6, rn_external6);

/// Gives a flow that is masqueraded the address of the device that it leaves by, if that has one. A port that the pod would keep is
/// given up where the host has a socket that would miss its answers.
#[inline(always)]
pub fn choose_source<F: Family>(skb: &Skb, flow: &mut Flow<F::A>, ifindex: u32) {
    let to = &mut flow.to.tuple;
    // To other nodes and their pods the host speaks with the address that they know.
    let is_between_nodes = flow.flags & (flags::FROM_HOST | flags::EXTERNAL) != 0 && F::peer(to.dst).is_some();
    if let (false, Some(device)) = (is_between_nodes, maps::rn_devices.get_ptr(&ifindex)) {
        // SAFETY: map values stay valid for this run of the program.
        let address = F::device(unsafe { &*device });
        if address != F::A::UNSPECIFIED {
            to.src = address;
        }
    }
    if is_port_of_host::<F>(skb, to) {
        // No port of masquerade: admission chooses one.
        to.sport = 0;
    }
}

/// `struct bpf_sock_tuple`, with room for either family.
#[repr(C)]
struct SockTuple {
    words: [u32; 8],
    ports: u32,
}

/// True if a socket of the host would get the answers to this tuple: one bound to the port, or connected from it.
#[inline(always)]
fn is_port_of_host<F: Family>(skb: &Skb, to: &Tuple<F::A>) -> bool {
    let is_masquerade_port =
        maps::config().is_some_and(|config| (config.snat_min..=config.snat_max).contains(&to.sport));
    if !is_masquerade_port || (to.proto != proto::UDP && to.proto != proto::TCP) {
        return false;
    }
    // As the answer comes in: from the far end, to this host.
    let answer = Tuple { src: to.dst, dst: to.src, sport: to.dport, dport: to.sport, ..*to };
    // A socket that listens does not miss answers.
    match socket_state::<F>(skb, &answer) {
        NO_SOCKET => false,
        TCP_LISTEN => to.proto != proto::TCP,
        _ => true,
    }
}

/// True if a packet that comes in answers a socket of this host, which is connected to its sender.
#[inline(always)]
pub fn is_answer_to_host<F: Family>(skb: &Skb, t: &Tuple<F::A>) -> bool {
    let is_known = t.proto == proto::UDP || t.proto == proto::TCP;
    is_known && !matches!(socket_state::<F>(skb, t), NO_SOCKET | TCP_CLOSE | TCP_LISTEN)
}

/// State of the socket of this host that would get a packet of TCP or UDP, or [`NO_SOCKET`]. Unconnected UDP sockets are
/// [`TCP_CLOSE`].
#[inline(always)]
fn socket_state<F: Family>(skb: &Skb, t: &Tuple<F::A>) -> u32 {
    let (src, dst) = (t.src.words(), t.dst.words());
    let ports = u32::from(t.sport.to_be()) | u32::from(t.dport.to_be()) << 16;
    let mut tuple = SockTuple { words: [src[0], src[1], src[2], src[3], dst[0], dst[1], dst[2], dst[3]], ports };
    let mut len = size_of::<SockTuple>() as u32;
    if F::BITS == 32 {
        tuple.words = [src[0], dst[0], ports, 0, 0, 0, 0, 0];
        len = 12;
    }
    let (skb, at) = (skb.raw().cast(), (&raw mut tuple).cast());
    // SAFETY: `tuple` has the layout that the helpers want for this length, and a socket that is found is released.
    unsafe {
        let socket = if t.proto == proto::UDP {
            helper::bpf_sk_lookup_udp(skb, at, len, THIS_NETNS, 0)
        } else {
            helper::bpf_sk_lookup_tcp(skb, at, len, THIS_NETNS, 0)
        };
        if socket.is_null() {
            return NO_SOCKET;
        }
        let state = (*socket).state;
        helper::bpf_sk_release(socket.cast());
        state
    }
}

/// `BPF_F_CURRENT_NETNS`.
const THIS_NETNS: u64 = u64::MAX;
/// States (include/net/tcp_states.h).
const TCP_CLOSE: u32 = 7;
/// See [`TCP_CLOSE`].
const TCP_LISTEN: u32 = 10;
/// None of the kernel's.
const NO_SOCKET: u32 = 0;

#[inline(always)]
fn translate_new<F: HostPorts>(p: &Packet<F::A>, flow: &mut Flow<F::A>) -> Result<(), DropReason> {
    let Some(config) = maps::config() else { return Ok(()) };
    if let Some(backend) = lb::select::<F>(&p.tuple, scope::CLUSTER, config.seed)? {
        flow.lead_to(F::A::from_addr(backend.addr), backend.port, &p.tuple);
        flow.backend = backend.id;
    } else {
        F::translate_to_host_port(p, flow);
    }
    let to = &mut flow.to;
    to.egress = route::local_pod(to.tuple.dst);
    if to.egress == NOT_LOCAL && lb::find_vip(to.tuple.dst) == Vip::Unassigned {
        return Err(DropReason::NoService);
    }
    if config.flags & config::flags::MASQUERADE != 0 && route::of::<F>(to, flow.flags).route == Route::World {
        if to.tuple.proto == F::IN_IP {
            // It may be for a pod whose node this one does not know yet, and would pass there for direct server return by this node.
            return Err(DropReason::EncapProhibited);
        }
        flow.flags |= flags::MASQ;
    }
    if flow.flags & (flags::HAIRPIN | flags::MASQ) != 0 {
        to.tuple.src = F::node(config);
        if to.tuple.src == F::A::UNSPECIFIED {
            return Err(DropReason::NoFib);
        }
    }
    Ok(())
}

/// The client keeps its address where the answers pass here anyhow: a backend on this node. Others answer to this node's address.
#[inline(always)]
fn translate_external<F: HostPorts>(p: &Packet<F::A>, flow: &mut Flow<F::A>) -> Result<(), DropReason> {
    let Some(config) = maps::config() else { return Err(DropReason::NoFib) };
    // Set by `uplink_in` alone. Clients on other devices of this node may have addresses that no other node has a way to.
    let is_by_uplink = flow.flags & flags::EXTERNAL != 0;
    if let Some(backend) = lb::select::<F>(&p.tuple, scope::EXTERNAL, config.seed)? {
        flow.to.tuple.dst = F::A::from_addr(backend.addr);
        flow.to.tuple.dport = backend.port;
        flow.backend = backend.id;
    } else if !F::translate_to_host_port(p, flow) && !route::is_host::<F>(p.tuple.dst) {
        // Its entry went since the packet was classified.
        return Err(DropReason::BackendLookupFailed);
    }
    let to = &mut flow.to;
    to.egress = route::local_pod(to.tuple.dst);
    flow.flags |= flags::EXTERNAL;
    if p.tuple.dst != F::node(config) {
        flow.flags |= flags::SECOND_ADDRESS;
    }
    if to.egress == NOT_LOCAL && !route::is_host::<F>(to.tuple.dst) {
        if is_by_uplink && may_answer_directly::<F>(&p.tuple, to.tuple.dst, config) {
            flow.flags |= flags::DIRECT;
            return Ok(());
        }
        flow.flags |= flags::MASQ;
        to.tuple.src = F::node(config);
        if to.tuple.src == F::A::UNSPECIFIED {
            return Err(DropReason::NoFib);
        }
    }
    Ok(())
}

/// True if the backend `to` of a new flow from outside is to answer directly: the Service wants it, and the backend's node can find out
/// what this one knows. It has no node ports of the other addresses of this node, and cannot tell whose those are. Clients inside the
/// cluster see the backend's answers by ways of their own.
#[inline(always)]
fn may_answer_directly<F: Family>(t: &Tuple<F::A>, to: F::A, config: &config::NodeConfig) -> bool {
    let node = F::node(config);
    let is_of_pod =
        || F::peer(to).is_some_and(|peer| peer.flags & (peer::flags::POD | peer::flags::NODE) == peer::flags::POD);
    // Few Services are: what comes next costs more.
    lb::is_direct::<F>(t)
        && is_of_pod()
        && node != F::A::UNSPECIFIED
        && (t.dst == node || lb::is_external_vip::<F>(t.dst))
        && route::is_client_outside::<F>(t.src)
}
