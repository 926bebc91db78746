//! All maps, by the names that people type. Sizes are defaults; the agent sets them at load.
#![allow(non_upper_case_globals, reason = "these are the names that bpftool shows")]

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::backend::Backend;
use rustnet_common::config::NodeConfig;
use rustnet_common::conntrack::CtEntry;
use rustnet_common::drop::{COUNTERS, Counter};
use rustnet_common::endpoint::{Endpoint, EndpointKey};
use rustnet_common::frag::{FragKey, FragPorts};
use rustnet_common::peer::Peer;
use rustnet_common::service::{SvcEntry, SvcKey};
use rustnet_common::tuple::Tuple;

use crate::parse::Packet;
use crate::step::conntrack::Opening;
use crate::step::icmp::Quotation;

const GROWS: usize = BPF_F_NO_PREALLOC as usize;
const MMAP: usize = BPF_F_MMAPABLE as usize;

/// A map of services of one family.
pub type Services<A> = HashMap<SvcKey<A>, SvcEntry, 65536, GROWS>;
/// A map of connections of one family.
pub type Connections<A> = LruHashMap<Tuple<A>, CtEntry<A>, 131_072>;
/// A map of first fragments of one family.
pub type Fragments<A> = LruHashMap<FragKey<A>, FragPorts, 8192>;
/// A map of peers of one family.
pub type Peers<A> = LpmTrie<A, Peer, 16384>;

/// Room beside the 512 bytes of stack that all frames of a program share. TC programs do not interrupt each other on a
/// CPU, so one element each suffices.
#[repr(C)]
pub struct Scratch<A> {
    /// The packet in hand.
    pub packet: Packet<A>,
    /// The connection that is being opened.
    pub opening: Opening<A>,
    /// The packet that an ICMP error quotes.
    pub quotation: Quotation<A>,
}
/// A map of one element a CPU.
pub type Scratches<A> = PerCpuArray<Scratch<A>, 1>;

#[btf_map]
pub static rn_svc4: Services<Ip4> = Services::new();
#[btf_map]
pub static rn_svc6: Services<Ip6> = Services::new();
#[btf_map]
pub static rn_backends: Array<Backend, 262_144, MMAP> = Array::new();
#[btf_map]
pub static rn_ct4: Connections<Ip4> = Connections::new();
#[btf_map]
pub static rn_ct6: Connections<Ip6> = Connections::new();
#[btf_map]
pub static rn_frag4: Fragments<Ip4> = Fragments::new();
#[btf_map]
pub static rn_frag6: Fragments<Ip6> = Fragments::new();
#[btf_map]
pub static rn_endpoints: HashMap<EndpointKey, Endpoint, 4096, GROWS> = HashMap::new();
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
#[btf_map]
pub static rn_config: Array<NodeConfig, 1> = Array::new();

/// 1 where the kernel knows `BPF_F_IPV6` for `bpf_l4_csum_replace` (6.16 and later); set by the loader.
#[unsafe(no_mangle)]
pub static L4_CSUM_IPV6: Global<u32> = Global::new(0);
