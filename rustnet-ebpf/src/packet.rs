//! What the steps hand to each other about a packet. Plain data, no access to packet memory.

use rustnet_common::addr::Address;
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::tuple::Tuple;

use crate::ctx::bounded;

/// What a packet is to the steps that follow.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A transport header is there (or a protocol without one).
    Flow,
    /// A later fragment: the tuple has the ports of the first, the packet has none.
    LaterFragment,
    /// An ICMP error that quotes another packet.
    IcmpError,
    /// Neighbour discovery, router discovery and multicast listener reports (ICMPv6 130-137, 143): of the link, never
    /// forwarded.
    LinkLocal,
}

/// A parsed packet.
#[repr(C)]
pub struct Packet<A> {
    /// The flow, as this packet shows it.
    pub tuple: Tuple<A>,
    /// The tuple in canonical order: key of the connection table.
    pub key: Tuple<A>,
    pub(crate) l3: u16,
    pub(crate) l4: u16,
    /// Length of the IP packet in bytes by its own header, or by the frame where the header cannot hold it (BIG TCP).
    pub ip_len: u32,
    /// The same of one segment of a GSO frame; 0 where the segments have different lengths (SCTP).
    pub seg_len: u32,
    /// Bytes that a link's MTU has to hold: `seg_len`, or 0 if the packet may be fragmented on its way (IPv4 without "don't
    /// fragment"), or if the segments have different lengths.
    pub mtu_len: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TCP flags, 0 for other protocols.
    pub tcp_flags: u8,
    /// See [`Kind`].
    pub kind: Kind,
    /// More fragments follow.
    pub(crate) more: bool,
    /// Fragment offset in units of 8 bytes.
    pub(crate) offset: u16,
    /// The canonical tuple is this packet's reversed.
    pub is_swapped: bool,
    pub(crate) pad: u8,
    /// The fragment's identification, as it stands on the wire, if the packet is one.
    pub(crate) id: u32,
    /// TCP: the sequence number.
    pub seq: u32,
    /// TCP: the sequence number after the last byte of this packet; SYN and FIN count as bytes.
    pub seq_end: u32,
    /// TCP: the acknowledgement number, 0 without ACK.
    pub ack: u32,
}

impl<A: Address> Packet<A> {
    /// Makes it a packet of which only the offset of the IP header is known. Sets the fields that the parser does not set for every
    /// packet, and all that is read of a packet which it refuses.
    #[inline(always)]
    pub fn reset(&mut self, l3: usize) {
        self.tuple.clear();
        self.l3 = l3 as u16;
        self.tcp_flags = 0;
        self.kind = Kind::Flow;
        self.more = false;
        self.seq_end = 0;
        self.ack = 0;
    }

    /// True for a first fragment: its checksums cover more than the packet holds.
    #[inline(always)]
    pub fn is_first_fragment(&self) -> bool {
        self.more && self.offset == 0
    }

    /// True if the packet belongs to a flow; false for ICMP errors and link-local protocols.
    #[inline(always)]
    pub fn is_flow(&self) -> bool {
        matches!(self.kind, Kind::Flow | Kind::LaterFragment)
    }

    /// Offset of the IP header.
    #[inline(always)]
    pub fn l3(&self) -> usize {
        bounded(self.l3 as usize)
    }

    /// Offset of the transport header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        bounded(self.l4 as usize)
    }
}

/// The source of a packet as the hook identifies it. The connection's entry remembers it once it was verified, so that a
/// source is verified once per flow.
#[derive(Clone, Copy)]
pub struct Source {
    /// The hook is that of a pod. A constant of each hook, unlike `ifindex`.
    pub is_pod: bool,
    /// Interface of the pod that sends, or [`rustnet_common::conntrack::NOT_LOCAL`].
    pub ifindex: u32,
    /// See [`rustnet_common::conntrack::Side::source`].
    pub bytes: [u64; 2],
}

/// What a packet becomes, and where that leads as far as its connection remembers.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Translation<A> {
    /// The tuple that the packet leaves with.
    pub tuple: Tuple<A>,
    /// Interface of the pod of this node that has `tuple.dst`, with [`rustnet_common::conntrack::VIA_QDISC`];
    /// [`rustnet_common::conntrack::NOT_LOCAL`]; or 0 where that is to be looked up.
    pub egress: u32,
}

/// How a packet relates to the connections that are known.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// It opens a flow.
    New,
    /// It goes the way of the flow's first packet.
    Original,
    /// It answers the opener.
    Reply,
    /// An ICMP error about a known flow.
    Related,
}

/// A packet's class, and what its connection says of it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Flow<A> {
    /// See [`Class`].
    pub class: Class,
    /// Of a new flow: the first slot of its key is empty.
    pub is_vacant: bool,
    /// Of a new flow: policies deny it, and its namespace is audited.
    pub is_audited: bool,
    /// [`rustnet_common::conntrack::flags`] of the connection.
    pub flags: u16,
    /// The connection's backend, 0 if there is none.
    pub backend: u32,
    /// What the packet becomes.
    pub to: Translation<A>,
}

impl<A: Address> Flow<A> {
    /// True if the packet belongs to a connection that nothing translates. Cheaper than to compare two tuples.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        matches!(self.class, Class::Original | Class::Reply) && self.flags & flags::NAT == 0
    }

    /// Has a new flow of a pod lead to a backend. `tuple` is that of its first packet.
    #[inline(always)]
    pub fn lead_to(&mut self, dst: A, port: u16, tuple: &Tuple<A>) {
        self.to.tuple.dst = dst;
        self.to.tuple.dport = port;
        if dst == tuple.src {
            // A pod does not accept a packet from its own address: the node's stands in for it.
            self.flags |= flags::HAIRPIN;
        }
    }

    /// Makes it a new flow, as yet without translation.
    #[inline(always)]
    pub fn reset(&mut self, tuple: &Tuple<A>) {
        self.class = Class::New;
        self.is_vacant = false;
        self.is_audited = false;
        self.flags = 0;
        self.backend = 0;
        self.to.tuple = *tuple;
        self.to.egress = 0;
    }
}

/// A connection under construction, in per-CPU memory.
#[repr(C)]
pub struct NewConnection<A> {
    /// Key of the entry that serves the original direction.
    pub key: Tuple<A>,
    /// Key of the entry that serves the reply direction of a translated flow.
    pub reply_key: Tuple<A>,
    /// The tuple of the first packet.
    pub tuple: Tuple<A>,
    /// Entry of the original direction.
    pub original: CtEntry<A>,
    /// Entry of the reply direction.
    pub reply: CtEntry<A>,
}

/// The packet that an ICMP error quotes (RFC 792), and what it becomes.
#[repr(C)]
pub struct InnerPacket<A> {
    /// Its tuple.
    pub tuple: Tuple<A>,
    /// What that becomes.
    pub translated: Tuple<A>,
    /// Key of its connection.
    pub key: Tuple<A>,
    /// Offset of its IP header.
    pub l3: u32,
    /// Offset of its transport header.
    pub l4: u32,
}
