//! The overlay. Contract: sends a packet through it, by its device or past it; reads and writes the far end and the network identifier
//! that the device takes from, or gives to, the outer headers.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated as helper;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::config::{NODE_TUNNEL_PORTS, NodeConfig, flags};
use rustnet_common::drop::DropReason;
use rustnet_common::peer::{self, Peer};

use super::{fib, nexthop};
use crate::ctx::{Ctx, Skb};
use crate::family::{V4, V6};
use crate::maps;
use crate::outcome::Dropped;
use crate::packet::Packet;
use crate::rewrite::{self, Encap, Encapsulated};

/// `struct bpf_tunnel_key` without the near end.
#[repr(C)]
struct TunnelKey {
    id: u32,
    /// Far end: word 0 in host order for IPv4, network order words for IPv6.
    remote: [u32; 4],
    tos: u8,
    ttl: u8,
    ext: u16,
    label: u32,
}

/// All of `struct bpf_tunnel_key` (since kernel 6.0).
#[repr(C)]
struct TunnelEnds {
    key: TunnelKey,
    /// Near end, as the far end.
    local: [u32; 4],
}

/// The far end is IPv6.
const BPF_F_TUNINFO_IPV6: u64 = 1;
const BPF_F_ZERO_CSUM_TX: u64 = 2;

/// The tunnel that a packet came through.
#[derive(Clone, Copy)]
pub struct Tunnel {
    /// The far end, IPv4 as mapped; unspecified if the packet came through no tunnel.
    pub remote: Addr,
    /// The network identifier (VNI).
    pub id: u32,
}

impl Tunnel {
    /// No tunnel.
    pub const NONE: Self = Self { remote: Addr::UNSPECIFIED, id: 0 };
}

/// Reads the tunnel that the packet came through.
#[inline(never)]
pub fn read(skb: &Skb, out: &mut Tunnel) {
    let mut key = TunnelKey { id: 0, remote: [0; 4], tos: 0, ttl: 0, ext: 0, label: 0 };
    let (p, len) = ((&raw mut key).cast(), size_of::<TunnelKey>() as u32);
    // SAFETY: `key` has the size that is passed. The helper refuses to read an IPv6 tunnel as an IPv4 one.
    out.remote = if unsafe { helper::bpf_skb_get_tunnel_key(skb.raw(), p, len, 0) } == 0 {
        Ip4::from_word(key.remote[0].to_be()).to_addr()
    } else {
        // SAFETY: as above.
        unsafe { helper::bpf_skb_get_tunnel_key(skb.raw(), p, len, BPF_F_TUNINFO_IPV6) };
        match Ip6::from_words(key.remote) {
            // The device listens on sockets of both families; the IPv4 one is read above. A mapped address here is forged.
            mapped if mapped.is_v4() => Addr::UNSPECIFIED,
            remote => remote,
        }
    };
    out.id = key.id;
}

/// The smallest MTU of IPv6 (RFC 8200, 5).
const IPV6_MIN_MTU: u32 = 1280;

/// Refuses a packet that the path to a node does not let through: nobody fragments outer packets over IPv6, and the device drops
/// without a word. Over IPv4, routers do.
#[inline(always)]
pub fn verify_path<A>(skb: &Skb, p: &Packet<A>, node: &Addr) -> Result<(), Dropped> {
    let len = p.seg_len;
    if node.is_v4() || len + V6::OVERHEAD <= IPV6_MIN_MTU {
        return Ok(());
    }
    // SAFETY: no pointers but the context.
    let hash = unsafe { helper::bpf_get_hash_recalc(skb.raw()) } as u32;
    let mtu = nexthop::path_mtu(skb, node, hash);
    if mtu != 0 && len + V6::OVERHEAD > mtu {
        return Err(Dropped { reason: DropReason::FragNeeded, mtu: mtu - V6::OVERHEAD });
    }
    Ok(())
}

/// Sends a finished packet to a node, marked as processed. `len` is that of the IP packet, or of one segment, if its headers may be
/// written here; 0 if it has to take the device.
#[inline(always)]
pub fn send(skb: &Skb, peer: &Peer, len: u32, config: &NodeConfig) -> Result<i32, DropReason> {
    let node = &peer.node;
    if len != 0 && config.flags & flags::ENCAPSULATE != 0 {
        let (high, low) = node.halves();
        match rn_encap(skb.raw(), high, low, len | (u32::from(peer.flags & peer::flags::NODE) * FOR_NODE)) {
            BY_DEVICE => {}
            WRITE_ERROR => return Err(DropReason::WriteError),
            verdict => return Ok(verdict),
        }
    }
    if !set(skb, node, config) {
        return Err(DropReason::WriteError);
    }
    // SAFETY: no pointers are involved.
    Ok(unsafe { helper::bpf_redirect(config.overlay, 0) as i32 })
}

/// In place of a verdict, which is never negative: the packet is unchanged, and takes the device.
const BY_DEVICE: i32 = -2;
/// The packet is not whole any more.
const WRITE_ERROR: i32 = -1;

/// In the length, for [`rn_encap`]: the packet is for the stack of a node.
const FOR_NODE: u32 = 1 << 30;

const _: () = assert!(peer::flags::NODE <= 2 && NODE_TUNNEL_PORTS.is_power_of_two());

/// Writes the tunnel's headers and returns the verdict. `len`: that of the packet or of a segment, with [`FOR_NODE`] times
/// [`peer::flags::NODE`]. A function with global linkage, which both families share: the verifier looks at it once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn rn_encap(skb: *mut __sk_buff, high: u64, low: u64, len: u32) -> i32 {
    let skb = &Skb(skb);
    let node = Addr::from_halves(high, low);
    let Some(config) = maps::config() else { return BY_DEVICE };
    let ports = if len >= FOR_NODE { NODE_TUNNEL_PORTS - 1 } else { u16::MAX };
    let len = len & (FOR_NODE - 1);
    // SAFETY: no pointers but the context.
    let hash = unsafe { helper::bpf_get_hash_recalc(skb.raw()) } as u32;
    let Some(hop) = nexthop::to(skb, &node, hash) else { return BY_DEVICE };
    let port = hash as u16 & ports;
    let overhead = if node.is_v4() { V4::OVERHEAD } else { V6::OVERHEAD };
    // Without a check of its own the redirect would send what no device takes. The device fragments, and takes BIG TCP.
    if len + overhead > hop.mtu || skb.len() + overhead > u32::from(u16::MAX) {
        return BY_DEVICE;
    }
    let words = node.words();
    let done = if node.is_v4() {
        let id = nexthop::identification(skb, &node);
        rewrite::encapsulate::<V4, _>(skb, config.node4, Ip4::from_word(words[3]), port, id, config)
    } else {
        rewrite::encapsulate::<V6, _>(skb, config.node6, Ip6::from_words(words), port, 0, config)
    };
    match done {
        Encapsulated::Done => fib::redirect_neigh(hop.ifindex, hop.fib.family, hop.fib.dst, false),
        Encapsulated::Refused => BY_DEVICE,
        Encapsulated::Failed => WRITE_ERROR,
    }
}

/// Sets the tunnel that the packet leaves by. The near end is the address by which other nodes know this one: they accept no other
/// sender. Where it has none of the family, the kernel chooses.
#[inline(always)]
pub fn set(skb: &Skb, node: &Addr, config: &NodeConfig) -> bool {
    let words = node.words();
    let v4 = node.is_v4();
    let mut ends = TunnelEnds {
        key: TunnelKey {
            id: config.vni,
            remote: if v4 { [u32::from_be(words[3]), 0, 0, 0] } else { words },
            tos: 0,
            ttl: 64,
            ext: 0,
            label: 0,
        },
        local: if v4 { [u32::from_be(config.node4.word()), 0, 0, 0] } else { config.node6.words() },
    };
    let flags = if v4 { BPF_F_ZERO_CSUM_TX } else { BPF_F_TUNINFO_IPV6 | BPF_F_ZERO_CSUM_TX };
    // SAFETY: `ends` has the size that is passed.
    unsafe {
        helper::bpf_skb_set_tunnel_key(skb.raw(), (&raw mut ends).cast(), size_of::<TunnelEnds>() as u32, flags) == 0
    }
}
