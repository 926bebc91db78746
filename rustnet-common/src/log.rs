//! The packet log: what its programs and the agent agree on.

/// Addresses that a packet may be filtered by.
pub const FILTERS: usize = 4;

/// What becomes of a packet.
pub mod outcome {
    /// Names by code.
    pub const NAMES: [&str; 6] = ["pass", "drop", "pod", "tunnel", "direct", "world"];
    /// It goes on: from an ingress hook to the stack, from an egress hook out of the device.
    pub const PASS: u32 = 0;
    /// It is dropped, or refused with an answer.
    pub const DROP: u32 = 1;
    /// To a pod of this node.
    pub const POD: u32 = 2;
    /// Through the overlay.
    pub const TUNNEL: u32 = 3;
    /// By the kernel's routes, inside the cluster.
    pub const DIRECT: u32 = 4;
    /// By the kernel's routes, to the outside world.
    pub const WORLD: u32 = 5;
}
