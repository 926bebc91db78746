//! IPv4 and IPv6 behind one trait, so that every step exists once. Types, constants and maps; the steps that a family
//! needs are traits of their own, declared where the step is.

use aya_ebpf::btf_maps::lpm_trie::Key;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::device::Device;
use rustnet_common::peer::Peer;
use rustnet_common::tuple::proto;

use crate::maps::{self, Connections, Fragments, Peers, Scratch, Services};
use crate::wire::{Header4, Header6};

/// An IP family: its address type, its header, its maps.
pub trait Family: 'static {
    /// The address type.
    type A: Address + 'static;
    /// The fixed part of the IP header.
    type Header: Copy;
    /// AF_INET or AF_INET6.
    const AF: u8;
    /// Protocol number of a packet of the family inside of another one.
    const IN_IP: u8;
    /// Bits of an address.
    const BITS: u32 = Self::A::LEN as u32 * 8;

    /// Its TCP connections.
    fn tcp_connections() -> &'static Connections<Self::A>;
    /// Its flows of other protocols, apart from TCP: bursts of short flows must not evict idle connections.
    fn other_connections() -> &'static Connections<Self::A>;
    /// Its services.
    fn services() -> &'static Services<Self::A>;
    /// Its peers.
    fn peers() -> &'static Peers<Self::A>;
    /// Its first fragments.
    fn fragments() -> &'static Fragments<Self::A>;
    /// This CPU's scratch memory.
    fn scratch() -> Option<*mut Scratch<Self::A>>;
    /// The node's own address.
    fn node(config: &NodeConfig) -> Self::A;
    /// A device's own address.
    fn device(device: &Device) -> Self::A;

    /// What is known of an address that is no pod of this node.
    #[inline(always)]
    fn peer(addr: Self::A) -> Option<&'static Peer> {
        Self::peers().get(&Key::new(Self::BITS, addr))
    }
}

/// IPv4.
pub enum V4 {}
/// IPv6.
pub enum V6 {}

/// Implements [`Family`] for one family.
macro_rules! family {
    ($family:ident, $addr:ident, $header:ident, $af:literal, $in_ip:ident, $tcp:ident, $any:ident, $svc:ident, $peers:ident, $frag:ident, $scratch:ident, $node:ident, $ip:ident) => {
        impl Family for $family {
            type A = $addr;
            type Header = $header;
            const AF: u8 = $af;
            const IN_IP: u8 = proto::$in_ip;

            #[inline(always)]
            fn tcp_connections() -> &'static Connections<$addr> {
                &maps::$tcp
            }
            #[inline(always)]
            fn other_connections() -> &'static Connections<$addr> {
                &maps::$any
            }
            #[inline(always)]
            fn services() -> &'static Services<$addr> {
                &maps::$svc
            }
            #[inline(always)]
            fn peers() -> &'static Peers<$addr> {
                &maps::$peers
            }
            #[inline(always)]
            fn fragments() -> &'static Fragments<$addr> {
                &maps::$frag
            }
            #[inline(always)]
            fn scratch() -> Option<*mut Scratch<$addr>> {
                maps::$scratch.get_ptr_mut(0)
            }
            #[inline(always)]
            fn node(config: &NodeConfig) -> $addr {
                config.$node
            }
            #[inline(always)]
            fn device(device: &Device) -> $addr {
                device.$ip
            }
        }
    };
}

family!(V4, Ip4, Header4, 2, IPIP, rn_ct4_tcp, rn_ct4_any, rn_svc4_v2, rn_peers4, rn_frag4_v2, rn_scratch4, node4, ip4);
family!(
    V6,
    Ip6,
    Header6,
    10,
    IPV6,
    rn_ct6_tcp,
    rn_ct6_any,
    rn_svc6_v2,
    rn_peers6,
    rn_frag6_v2,
    rn_scratch6,
    node6,
    ip6
);
