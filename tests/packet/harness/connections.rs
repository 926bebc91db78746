//! The connection table's keys and entries as plain values of either family.

use super::addresses::Net;
use crate::frame::Frame;
use rustnet_common::addr::{Addr, Address, Ip4, Ip6};
use rustnet_common::conntrack::CtEntry;
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

/// Half of a connection, as plain values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Half {
    pub to: Flow,
    pub flags: u16,
    pub state: u8,
    pub seen: u32,
    pub ifindex: u32,
    pub guard: [u8; 6],
    pub backend: u32,
    pub out: u32,
    pub packets: u64,
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

pub(super) fn half<A: Plain>(e: &CtEntry<A>) -> Half {
    let CtEntry { to, flags, state, seen, ifindex, backend, out, packets, bytes, .. } = *e;
    Half { to: flow(&to), flags, state, seen, ifindex, guard: bytemuck::cast(e.guard), backend, out, packets, bytes }
}

pub(super) fn entry<A: Plain>(h: &Half) -> CtEntry<A> {
    let Half { flags, state, seen, ifindex, guard, backend, out, packets, bytes, .. } = *h;
    let (to, guard) = (tuple(&h.to), bytemuck::cast(guard));
    CtEntry { to, flags, state, pad: 0, seen, ifindex, backend, out, guard, pad2: [0; 3], packets, bytes }
}
