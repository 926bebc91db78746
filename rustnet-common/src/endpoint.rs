//! `rn_endpoints`: the pods of this node. Written by the CNI binary, adopted by the agent.

use crate::addr::Addr;
use crate::shared_type;

/// Key of `rn_endpoints`: a pod's address, IPv4 as mapped.
pub type EndpointKey = Addr;

/// Value of `rn_endpoints`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Endpoint {
    /// Interface index of the host-side veth.
    pub ifindex: u32,
    /// Security identity of the pod; 0 until policies are known.
    pub identity: u32,
    /// MAC of the pod's interface.
    pub mac: [u8; 6],
    /// MAC of the host-side veth.
    pub host_mac: [u8; 6],
    /// See [`flags`].
    pub flags: u16,
    /// Zero.
    pub pad: u16,
}

/// Bits of [`Endpoint::flags`].
pub mod flags {
    /// Packets to the pod traverse the qdisc of the host-side veth: its bandwidth is limited.
    pub const VIA_QDISC: u16 = 1;
}

shared_type!(Endpoint, 24);
