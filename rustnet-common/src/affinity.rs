//! `rn_affinity`: which backend a client of a Service with session affinity has.

use crate::addr::Addr;
use crate::shared_type;

/// Key of `rn_affinity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(Hash, PartialOrd, Ord))]
#[repr(C)]
pub struct AffinityKey {
    /// The client, IPv4 as mapped.
    pub client: Addr,
    /// [`SvcEntry::id`](crate::service::SvcEntry::id) of the service port.
    pub service: u32,
}

/// Value of `rn_affinity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Affinity {
    /// Id of the backend.
    pub backend: u32,
    /// Low 32 bits of jiffies when the client last opened a flow.
    pub seen: u32,
}

/// The longest session affinity that the API allows, in seconds.
pub const MAX_SECONDS: u32 = 86_400;

shared_type!(AffinityKey, 20);
shared_type!(Affinity, 8);
