//! `rn_config`: what the programs must know of their node. One element; written by the agent.

use crate::addr::{Addr, Ip4, Ip6};
use crate::shared_type;

/// The one value of `rn_config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct NodeConfig {
    /// This node's IPv4 address: source of masquerade, hairpin and ICMP errors. 0.0.0.0 when there is none.
    pub node4: Ip4,
    /// This node's IPv6 address, for the same. :: when there is none.
    pub node6: Ip6,
    /// The tunnel's near end; unspecified lets the kernel choose.
    pub tunnel_src: Addr,
    /// Interface index of the uplink.
    pub uplink: u32,
    /// Interface index of the overlay device, 0 in native routing.
    pub overlay: u32,
    /// MTU of the uplink.
    pub uplink_mtu: u32,
    /// Largest IP packet that fits into the overlay.
    pub overlay_mtu: u32,
    /// UDP port of the overlay, host order.
    pub overlay_port: u16,
    /// First port that masquerade may use.
    pub snat_min: u16,
    /// Last port that masquerade may use.
    pub snat_max: u16,
    /// See [`flags`].
    pub flags: u16,
    /// Overlay network identifier.
    pub vni: u32,
    /// Timer ticks in a second, to compare jiffies with.
    pub hz: u32,
    /// Seed of the flow hash; the same on all nodes, so that they choose alike.
    pub seed: u32,
}

/// Bits of [`NodeConfig::flags`].
pub mod flags {
    /// Pods that talk to the world get this node's address.
    pub const MASQUERADE: u16 = 1;
    /// Report new flows as events too, not only drops.
    pub const FLOW_EVENTS: u16 = 2;
}

shared_type!(NodeConfig, 72);
