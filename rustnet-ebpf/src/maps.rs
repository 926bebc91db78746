//! All maps, by the names that people type. Sizes are defaults; the agent sets them at load.
#![allow(non_upper_case_globals, reason = "these are the names that bpftool shows")]

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::backend::Backend;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::CtEntry;
use rustnet_common::device::Device;
use rustnet_common::drop::{COUNTERS, Counter};
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::host_port::{HostPort, HostPortKey};
use rustnet_common::names::TAILS;
use rustnet_common::peer::Peer;
use rustnet_common::policy::{Policies, PolicyMatch, PolicyPod, PolicyRule};
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::socket::{Asked, SocketKey, Trail};
use rustnet_common::source_range::SourceRange;
use rustnet_common::tuple::Tuple;
use rustnet_common::v1;

use crate::packet::{Flow, InnerPacket, NewConnection, Packet};

const GROWS: usize = BPF_F_NO_PREALLOC as usize;
const MMAP: usize = BPF_F_MMAPABLE as usize;

/// A map of services of one family.
pub type Services<A> = HashMap<SvcKey<A>, SvcEntry, 65536, GROWS>;
/// A map of connections of one family.
pub type Connections<A> = LruHashMap<Tuple<A>, CtEntry<A>, 65_536>;
/// The same before an upgrade of another size.
pub type OldConnections<A> = LruHashMap<Tuple<A>, CtEntry<A>, 1>;
/// Connections of one family in the shape of v1.
pub type V1Connections<A> = LruHashMap<Tuple<A>, v1::CtEntry<A>, 1>;
/// A map of first fragments of one family.
pub type Fragments<A> = LruHashMap<FragKey<A>, FragPorts, 8192>;
/// A map of peers of one family.
pub type Peers<A> = LpmTrie<A, Peer, 16384>;

/// Room in addition to the 512 bytes of stack that all frames of a program share. TC and XDP programs run with bottom halves disabled and
/// do not interrupt each other on a CPU, so one element each suffices.
#[repr(C)]
pub struct Scratch<A> {
    /// The packet in hand.
    pub packet: Packet<A>,
    /// The same once more, read for a report. Not the one in hand: a new flow is reported before its packet is sent.
    pub reported: Packet<A>,
    /// What its connection says of it.
    pub flow: Flow<A>,
    /// The tuple of the header that a packet for direct server return came in.
    pub outer: Tuple<A>,
    /// A key in another slot, while it is looked up.
    pub slot_key: Tuple<A>,
    /// The connection that is being opened.
    pub connection: NewConnection<A>,
    /// The packet that an ICMP error quotes.
    pub inner: InnerPacket<A>,
    /// The pod that has the port of this node which a packet asks for.
    pub host_port: HostPort,
    /// An entry of a table of v1, while it is written.
    pub half: v1::CtEntry<A>,
    /// How a packet leaves that goes back by its device.
    pub leaving: Leaving<A>,
    /// The ICMP error that answers a packet, see [`crate::step::reject`].
    pub error: u64,
    /// The hook that `fragment_in` goes on for.
    pub hook: u8,
}
/// How a packet leaves that goes back by its device, see [`crate::hook::xdp`].
#[repr(C)]
pub struct Leaving<A> {
    /// What it becomes, as long as that is not sure.
    pub flow: Flow<A>,
    /// The kernel's answer about its way.
    pub fib: FibLookup,
    /// MACs of the frame: the sender's, then the receiver's.
    pub macs: [u16; 6],
    /// The node at the far end of the tunnel that it takes; unspecified without one.
    pub node: Addr,
    /// What becomes the tunnel's source port.
    pub hash: u16,
    /// The hop limit that it leaves with.
    pub ttl: u8,
}
/// A token bucket, see [`crate::limit`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Tokens {
    /// Jiffies when it was last filled.
    pub filled: u32,
    /// Tokens taken since.
    pub taken: u32,
}
/// A destination for which no source port was found a moment ago.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NatFull {
    /// Hash of source and destination.
    pub destination: u32,
    /// Jiffies when the search failed.
    pub since: u32,
}
/// Elements of `rn_nat_full`, a power of two.
pub const NAT_FULL_SLOTS: u32 = 256;

/// `struct bpf_fib_lookup` (uapi/linux/bpf.h), with its unions as plain words.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FibLookup {
    /// Address family; out: of the next hop.
    pub family: u8,
    /// Protocol.
    pub l4_protocol: u8,
    /// Source port, in network order.
    pub sport: u16,
    /// Destination port, in network order.
    pub dport: u16,
    /// In: length to check against the MTU; out: the MTU.
    pub tot_len: u16,
    /// In: the interface to look from; out: the one to leave by.
    pub ifindex: u32,
    /// Type of service.
    pub tos: u32,
    /// The source.
    pub src: [u32; 4],
    /// In: the destination; out: the next hop.
    pub dst: [u32; 4],
    /// VLAN protocol and tag.
    pub vlan: u32,
    /// Out: of the device that the packet leaves by, then of the next hop.
    pub macs: [u16; 6],
}

/// The way to another node, as the kernel's routes had it a moment ago.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NextHop {
    /// The node.
    pub node: Addr,
    /// Jiffies when the kernel was asked.
    pub since: u32,
    /// Which of [`WAYS`] it is.
    pub way: u32,
    /// Interface to leave by; 0 where the packets have to take the device.
    pub ifindex: u32,
    /// Largest IP packet on the way; 0 where the kernel did not tell.
    pub mtu: u32,
    /// The kernel's answer. Here, and not on the stack, for which it is too large.
    pub fib: FibLookup,
}
/// The way of a flow that leaves by the device that it came in by, as the kernel's routes had it a moment ago.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Turn {
    /// Source, as the packet leaves.
    pub src: Addr,
    /// Destination.
    pub dst: Addr,
    /// Source port in the upper half, then the destination's.
    pub ports: u32,
    /// Protocol.
    pub proto: u32,
    /// Jiffies when the kernel was asked.
    pub since: u32,
    /// The device.
    pub ifindex: u32,
    /// Largest IP packet that fits, into the tunnel where there is one.
    pub mtu: u32,
    /// MACs: the device's, then those of the next hop.
    pub macs: [u16; 6],
    /// The node at the far end of the tunnel; unspecified without one.
    pub node: Addr,
}
/// Elements of `rn_turns`, a power of two.
pub const TURNS: u32 = 4096;

/// Elements of `rn_probed`, a power of two.
pub const PROBED: u32 = 64;

/// Elements of `rn_next_hops`, a power of two.
pub const NEXT_HOPS: u32 = 256;
/// Ways that are remembered to one node, a power of two: with several equal routes, flows spread over these.
pub const WAYS: u32 = 4;

/// Token buckets there are.
const BUCKETS: usize = 3;

/// A map of one element a CPU.
pub type Scratches<A> = PerCpuArray<Scratch<A>, 1>;

#[btf_map]
pub static rn_svc4_v2: Services<Ip4> = Services::new();
#[btf_map]
pub static rn_svc6_v2: Services<Ip6> = Services::new();
#[btf_map]
pub static rn_backends_v2: Array<Backend, 262_144, MMAP> = Array::new();
#[btf_map]
pub static rn_backend_ids: Array<u32, 262_144, MMAP> = Array::new();
/// See [`rustnet_common::maglev`].
#[btf_map]
pub static rn_maglev: Array<u64, 262_144, MMAP> = Array::new();
#[btf_map]
pub static rn_ct4_tcp: Connections<Ip4> = Connections::new();
#[btf_map]
pub static rn_ct4_any: Connections<Ip4> = Connections::new();
#[btf_map]
pub static rn_ct6_tcp: Connections<Ip6> = Connections::new();
#[btf_map]
pub static rn_ct6_any: Connections<Ip6> = Connections::new();
/// 1 as soon as an entry has stood in [`rustnet_common::conntrack::SLOT_CONTESTED`]. Before that, nobody looks there.
#[btf_map]
pub static rn_ct_contested: Array<u32, 1> = Array::new();
#[btf_map]
pub static rn_frag4_v2: Fragments<Ip4> = Fragments::new();
#[btf_map]
pub static rn_frag6_v2: Fragments<Ip6> = Fragments::new();
#[btf_map]
pub static rn_affinity: LruHashMap<AffinityKey, Affinity, 32_768> = LruHashMap::new();
#[btf_map]
pub static rn_source_ranges: LpmTrie<SourceRange, u32, 4096> = LpmTrie::new();
/// See [`rustnet_common::policy`].
#[btf_map]
pub static rn_policy: Array<Policies, 1> = Array::new();
#[btf_map]
pub static rn_policy_pods: HashMap<Addr, PolicyPod, 65_536, GROWS> = HashMap::new();
#[btf_map]
pub static rn_policy_cidrs: LpmTrie<Addr, u32, 16_384> = LpmTrie::new();
#[btf_map]
pub static rn_policy_rules: LpmTrie<PolicyMatch, PolicyRule, 65_536> = LpmTrie::new();
#[btf_map]
pub static rn_endpoints: HashMap<EndpointKey, Endpoint, 4096, GROWS> = HashMap::new();
#[btf_map]
pub static rn_host_ports: HashMap<HostPortKey, HostPort, 4096, GROWS> = HashMap::new();
#[btf_map]
pub static rn_peers4: Peers<Ip4> = Peers::new();
#[btf_map]
pub static rn_peers6: Peers<Ip6> = Peers::new();
#[btf_map]
pub static rn_scratch4: Scratches<Ip4> = Scratches::new();
#[btf_map]
pub static rn_scratch6: Scratches<Ip6> = Scratches::new();
#[btf_map]
pub static rn_counters: PerCpuArray<Counter, { COUNTERS as usize }> = PerCpuArray::new();
#[btf_map]
pub static rn_events: RingBuf<(), 262_144> = RingBuf::new();
/// The connection tables before an upgrade, of the shape of v1, and of the present shape; see [`crate::step::migrate`]. One
/// entry where there is no upgrade.
#[btf_map]
pub static rn_ct4: V1Connections<Ip4> = V1Connections::new();
#[btf_map]
pub static rn_ct6: V1Connections<Ip6> = V1Connections::new();
#[btf_map]
pub static rn_ct4_tcp_old: OldConnections<Ip4> = OldConnections::new();
#[btf_map]
pub static rn_ct4_any_old: OldConnections<Ip4> = OldConnections::new();
#[btf_map]
pub static rn_ct6_tcp_old: OldConnections<Ip6> = OldConnections::new();
#[btf_map]
pub static rn_ct6_any_old: OldConnections<Ip6> = OldConnections::new();
/// The packet log, see [`crate::log`]; not pinned. The name that `aya_log` looks for.
#[btf_map]
pub static AYA_LOGS: RingBuf<(), 131_072> = RingBuf::new();
/// Destinations without a free source port, by hash; not pinned.
#[btf_map]
pub static rn_nat_full: Array<NatFull, { NAT_FULL_SLOTS as usize }> = Array::new();
/// Ways to other nodes, by a hash of the node's address; not pinned. Of each CPU, so that nobody reads what is half written.
#[btf_map]
pub static rn_next_hops: PerCpuArray<NextHop, { NEXT_HOPS as usize }> = PerCpuArray::new();
/// Ways of flows that XDP sends back, by a hash of the flow; not pinned. Of each CPU, as [`rn_next_hops`]. The agent makes it one element where no
/// device is to have XDP.
#[btf_map]
pub static rn_turns: PerCpuArray<Turn, { TURNS as usize }> = PerCpuArray::new();
/// When a packet to a next hop last went by TC, by its MAC; not pinned. Of each CPU.
#[btf_map]
pub static rn_probed: PerCpuArray<u32, { PROBED as usize }> = PerCpuArray::new();
/// The next identification of outer IPv4 packets, by the same hash; not pinned. Of all CPUs: fragments of two packets must not meet.
#[btf_map]
pub static rn_outer_ids: Array<u64, { NEXT_HOPS as usize }> = Array::new();
/// Programs to jump to: [`rustnet_common::names::TAILS`].
#[btf_map]
pub static rn_tails: ProgramArray<{ TAILS.len() }> = ProgramArray::new();
/// 1 while a packet that `tunnel_in` left to the device is on its way back to `uplink_in`; not pinned.
#[btf_map]
pub static rn_left: PerCpuArray<u32, 1> = PerCpuArray::new();
/// See [`crate::limit`]; not pinned.
#[btf_map]
pub static rn_limits: PerCpuArray<Tokens, BUCKETS> = PerCpuArray::new();
/// A device without an entry has no addresses of its own: packets that leave by it get the node's.
#[btf_map]
pub static rn_devices: HashMap<u32, Device, 1024, GROWS> = HashMap::new();
/// Network namespaces whose sockets ask for Services: [`rustnet_common::socket::netns`].
#[btf_map]
pub static rn_sock_netns: HashMap<u64, u32, 4096, GROWS> = HashMap::new();
#[btf_map]
pub static rn_sock_fwd: LruHashMap<SocketKey, u32, 16_384> = LruHashMap::new();
#[btf_map]
pub static rn_sock_rev: LruHashMap<SocketKey, Asked, 65_536> = LruHashMap::new();
/// Which entries of both a socket has.
#[btf_map]
pub static rn_sock_led: SkStorage<Trail> = SkStorage::new();
#[btf_map]
pub static rn_config: Array<NodeConfig, 1> = Array::new();

/// The node's settings; `None` before the agent has written them.
#[inline(always)]
pub fn config() -> Option<&'static NodeConfig> {
    rn_config.get(0)
}

/// The pod of this node that has the address.
#[inline(always)]
pub fn endpoint<A: Address>(addr: A) -> Option<&'static Endpoint> {
    let p = rn_endpoints.get_ptr(addr.to_addr())?;
    // SAFETY: map values stay valid for this run of the program.
    Some(unsafe { &*p })
}
