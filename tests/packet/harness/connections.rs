//! The connection table's keys and entries as plain values of either family.

use super::addresses::Net;
use crate::frame::Frame;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, Side, flags};
use rustnet_common::tuple::Tuple;
use std::net::IpAddr;

/// A flow in one direction: the connection table's key as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub src: IpAddr,
    pub sport: u16,
    pub dst: IpAddr,
    pub dport: u16,
    pub proto: u8,
}

impl Flow {
    pub fn of(frame: &Frame) -> Self {
        let (sport, dport) = frame.ports();
        Self { src: frame.src, sport, dst: frame.dst, dport, proto: frame.proto() }
    }
    pub fn reversed(self) -> Self {
        Self { src: self.dst, sport: self.dport, dst: self.src, dport: self.sport, proto: self.proto }
    }
    pub(super) fn net(self) -> Net {
        Net::of(self.src)
    }
}

/// One direction of a connection, as plain values: of a translated flow the entry that serves it, else its side of the one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Half {
    /// What packets of this direction become.
    pub to: Flow,
    /// Without `SWAPPED`; `REPLY` is set for the reply direction of flows that nothing translates, too.
    pub flags: u16,
    pub state: u64,
    pub seen: u32,
    /// Interface of the pod that sends, or NOT_LOCAL.
    pub ifindex: u32,
    pub source: [u64; 2],
    pub backend: u32,
    /// Interface of the pod that receives, or NOT_LOCAL.
    pub out: u32,
    pub packets: u32,
    pub bytes: u64,
}

/// Conversions between the tables' types and the tests'.
pub(super) trait Plain: Address + bytemuck::Pod + Ord {
    fn from_ip(ip: IpAddr) -> Self;
    fn ip(self) -> IpAddr;
}
impl Plain for Ip4 {
    fn from_ip(ip: IpAddr) -> Self {
        Self::from_addr(Addr::from(ip))
    }
    fn ip(self) -> IpAddr {
        IpAddr::V4(self.into())
    }
}
impl Plain for Ip6 {
    fn from_ip(ip: IpAddr) -> Self {
        Addr::from(ip)
    }
    fn ip(self) -> IpAddr {
        IpAddr::V6(self.into())
    }
}

pub(super) fn tuple<A: Plain>(f: &Flow) -> Tuple<A> {
    let (src, dst) = (A::from_ip(f.src), A::from_ip(f.dst));
    Tuple { src, dst, sport: f.sport, dport: f.dport, proto: f.proto, pad: 0, pad2: 0 }
}

pub(super) fn flow<A: Plain>(t: &Tuple<A>) -> Flow {
    Flow { src: t.src.ip(), sport: t.sport, dst: t.dst.ip(), dport: t.dport, proto: t.proto }
}

/// [`Side::source`] of a pod that has this MAC.
pub fn source_of_mac(mac: [u8; 6]) -> [u64; 2] {
    let word = |i: usize| u64::from(u16::from_ne_bytes([mac[i], mac[i + 1]]));
    [word(0) << 32 | word(2) << 16 | word(4), 0]
}

/// The sides of an entry that sends and that receives packets of a tuple.
fn sides<A: Plain>(e: &CtEntry<A>, tuple: &Tuple<A>) -> (usize, usize) {
    let is_second = e.flags & flags::NAT == 0 && (e.flags & flags::SWAPPED != 0) != tuple.is_swapped();
    if is_second { (1, 0) } else { (0, 1) }
}

pub(super) fn half<A: Plain>(e: &CtEntry<A>, tuple: &Tuple<A>) -> Half {
    let (sender, receiver) = sides(e, tuple);
    let is_nat = e.flags & flags::NAT != 0;
    let reply = if !is_nat && sender == 1 { flags::REPLY } else { 0 };
    let Side { bytes, source, packets, ifindex, .. } = e.sides[sender];
    Half {
        to: flow(if is_nat { &e.to } else { tuple }),
        flags: (e.flags & !flags::SWAPPED) | reply,
        state: e.state,
        seen: e.seen,
        ifindex,
        source,
        backend: e.backend,
        out: e.sides[receiver].ifindex,
        packets,
        bytes,
    }
}

/// Writes what a test changed of one direction back into its entry.
pub(super) fn change<A: Plain>(e: &mut CtEntry<A>, tuple: &Tuple<A>, h: &Half) {
    let (sender, receiver) = sides(e, tuple);
    if e.flags & flags::NAT != 0 {
        e.to = super::connections::tuple(&h.to);
    }
    (e.state, e.seen, e.backend) = (h.state, h.seen, h.backend);
    let side = &mut e.sides[sender];
    (side.bytes, side.source, side.packets, side.ifindex) = (h.bytes, h.source, h.packets, h.ifindex);
    e.sides[receiver].ifindex = h.out;
}
