//! IPv4 and IPv6 behind one trait, so that every step exists once.

use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::DropReason;
use rustnet_common::tuple::Tuple;

use crate::ctx::Skb;
use crate::event::{rn_event4, rn_event6};
use crate::maps::{self, Connections, Fragments, Peers, Scratch, Services};
use crate::parse::{Header, Packet, rn_parse4, rn_parse6};
use crate::rewrite::{Head, QuotedWriter, Writer, rn_rewrite4, rn_rewrite6};
use crate::step::Packed;
use crate::step::route::{rn_route4, rn_route6};

/// Linux's AF_INET and AF_INET6.
pub const AF_INET: u8 = 2;
/// See [`AF_INET`].
pub const AF_INET6: u8 = 10;

/// An IP family: its address type, its header, its maps.
pub trait Family: 'static {
    /// The address type.
    type A: Address + 'static;
    /// The fixed part of the IP header.
    type Header: Header<Self::A> + Writer<Self::A> + QuotedWriter<Self::A> + Head<Self::A>;
    /// AF_INET or AF_INET6.
    const AF: u8;
    /// Bits of an address.
    const BITS: u32 = Self::A::LEN as u32 * 8;

    /// The parser, see [`crate::parse::packet`].
    fn parse(skb: &Skb, p: &mut Packet<Self::A>) -> Packed;
    /// See [`crate::rewrite::translate`].
    fn rewrite(skb: &Skb, p: &Packet<Self::A>, to: &Tuple<Self::A>, ttl: u8) -> Packed;
    /// See [`crate::event`].
    fn report(skb: &Skb, l3: usize, reason: DropReason, hook: u8);
    /// See [`crate::step::route::redirect`].
    fn redirect(skb: &Skb, to: &Tuple<Self::A>, len: u32, output: bool) -> Packed;
    /// Connections of this family.
    fn connections() -> &'static Connections<Self::A>;
    /// Services of this family.
    fn services() -> &'static Services<Self::A>;
    /// Peers of this family.
    fn peers() -> &'static Peers<Self::A>;
    /// First fragments of this family.
    fn fragments() -> &'static Fragments<Self::A>;
    /// This CPU's room beside the stack.
    fn scratch() -> Option<*mut Scratch<Self::A>>;
    /// The node's own address.
    fn node(config: &NodeConfig) -> Self::A;
}

/// IPv4.
pub enum V4 {}
/// IPv6.
pub enum V6 {}

impl Family for V4 {
    type A = Ip4;
    type Header = crate::parse::Header4;
    const AF: u8 = AF_INET;

    #[inline(always)]
    fn parse(skb: &Skb, p: &mut Packet<Ip4>) -> Packed {
        Packed::from_bits(rn_parse4(skb.raw(), p))
    }
    #[inline(always)]
    fn rewrite(skb: &Skb, p: &Packet<Ip4>, to: &Tuple<Ip4>, ttl: u8) -> Packed {
        Packed::from_bits(rn_rewrite4(skb.raw(), p, to, u32::from(ttl)))
    }
    #[inline(always)]
    fn report(skb: &Skb, l3: usize, reason: DropReason, hook: u8) {
        rn_event4(skb.raw(), l3 as u32, u32::from(reason as u8), u32::from(hook));
    }
    #[inline(always)]
    fn redirect(skb: &Skb, to: &Tuple<Ip4>, len: u32, output: bool) -> Packed {
        Packed::from_bits(rn_route4(skb.raw(), to, len, u32::from(output)))
    }
    #[inline(always)]
    fn connections() -> &'static Connections<Ip4> {
        &maps::rn_ct4
    }
    #[inline(always)]
    fn services() -> &'static Services<Ip4> {
        &maps::rn_svc4
    }
    #[inline(always)]
    fn peers() -> &'static Peers<Ip4> {
        &maps::rn_peers4
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Ip4> {
        &maps::rn_frag4
    }
    #[inline(always)]
    fn scratch() -> Option<*mut Scratch<Ip4>> {
        maps::rn_scratch4.get_ptr_mut(0)
    }
    #[inline(always)]
    fn node(config: &NodeConfig) -> Ip4 {
        config.node4
    }
}

impl Family for V6 {
    type A = Ip6;
    type Header = crate::parse::Header6;
    const AF: u8 = AF_INET6;

    #[inline(always)]
    fn parse(skb: &Skb, p: &mut Packet<Ip6>) -> Packed {
        Packed::from_bits(rn_parse6(skb.raw(), p))
    }
    #[inline(always)]
    fn rewrite(skb: &Skb, p: &Packet<Ip6>, to: &Tuple<Ip6>, ttl: u8) -> Packed {
        Packed::from_bits(rn_rewrite6(skb.raw(), p, to, u32::from(ttl)))
    }
    #[inline(always)]
    fn report(skb: &Skb, l3: usize, reason: DropReason, hook: u8) {
        rn_event6(skb.raw(), l3 as u32, u32::from(reason as u8), u32::from(hook));
    }
    #[inline(always)]
    fn redirect(skb: &Skb, to: &Tuple<Ip6>, len: u32, output: bool) -> Packed {
        Packed::from_bits(rn_route6(skb.raw(), to, len, u32::from(output)))
    }
    #[inline(always)]
    fn connections() -> &'static Connections<Ip6> {
        &maps::rn_ct6
    }
    #[inline(always)]
    fn services() -> &'static Services<Ip6> {
        &maps::rn_svc6
    }
    #[inline(always)]
    fn peers() -> &'static Peers<Ip6> {
        &maps::rn_peers6
    }
    #[inline(always)]
    fn fragments() -> &'static Fragments<Ip6> {
        &maps::rn_frag6
    }
    #[inline(always)]
    fn scratch() -> Option<*mut Scratch<Ip6>> {
        maps::rn_scratch6.get_ptr_mut(0)
    }
    #[inline(always)]
    fn node(config: &NodeConfig) -> Ip6 {
        config.node6
    }
}
