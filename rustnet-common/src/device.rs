//! `rn_devices`: the addresses of this host's devices. The key is the interface index; written by the agent.

use crate::addr::{Ip4, Ip6};
use crate::shared_type;

/// Value of `rn_devices`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Device {
    /// Source of masqueraded IPv4 packets that leave by it. 0.0.0.0 when there is none.
    pub ip4: Ip4,
    /// The same for IPv6. :: when there is none.
    pub ip6: Ip6,
}

shared_type!(Device, 20);
