//! `rn_host_ports`: the pods that have a port of this node (`hostPort` of a container). Written by the CNI binary, adopted by the agent.

use crate::addr::{Addr, Address, Ip4};
use crate::shared_type;

/// Key of `rn_host_ports`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(Hash, PartialOrd, Ord))]
#[repr(C)]
pub struct HostPortKey {
    /// The address of the node, IPv4 as mapped; or [`any`], which stands for each address of the node in its family.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// Value of `rn_host_ports`. It counts while the pod is this node's endpoint with this very interface: an entry that a pod has left
/// behind leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HostPort {
    /// The pod's address, IPv4 as mapped.
    pub pod: Addr,
    /// Interface index of its host-side veth.
    pub ifindex: u32,
    /// Port in the pod, host order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

/// The address that stands for each one of the node: of IPv4 if `is_v4`, else of IPv6.
#[inline(always)]
pub fn any(is_v4: bool) -> Addr {
    if is_v4 { Ip4::UNSPECIFIED.to_addr() } else { Addr::UNSPECIFIED }
}

shared_type!(HostPortKey, 20);
shared_type!(HostPort, 24);
