//! `rn_backends`: one flat, mmapable array of everything a service can lead to.

use crate::addr::Addr;
use crate::shared_type;

/// One backend of one service port. A service's backends stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// Address; IPv4 as mapped.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// See [`flags`].
    pub flags: u16,
    /// Stable number of (service port, endpoint); not soon reused. 0 is no backend.
    pub id: u32,
}

/// Bits of [`Backend::flags`].
pub mod flags {
    /// The endpoint is on this node.
    pub const LOCAL: u16 = 1;
    /// The endpoint is terminating and serves only because no ready one is left (KEP-1669).
    pub const TERMINATING: u16 = 2;
}

shared_type!(Backend, 24);
