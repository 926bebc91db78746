//! What the maps hold and what they should hold, hence the writes that lead from one to the other. Pure: maps and time come
//! in as arguments.

mod flows;
mod ids;
mod memory;
mod planner;
mod ranges;

pub use memory::MemoryMaps;
pub use planner::{GRACE, Plan, Planner};

use ipnet::IpNet;
use rustnet_common::backend::Backend;
use rustnet_common::peer::Peer;
use rustnet_common::service::SvcEntry;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// One map write. The order of a list of writes is the order to apply them in: after each of them every service has
/// either its old backends or its new ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Plain stores to `rn_backends[first..]`. No service refers to these slots yet.
    Backends {
        /// Index of the first slot.
        first: u32,
        /// What to store.
        backends: Vec<Backend>,
    },
    /// Adds or flips a service.
    PutService {
        /// Which.
        key: VipKey,
        /// Its new value.
        entry: SvcEntry,
    },
    /// Removes a service.
    DeleteService {
        /// Which.
        key: VipKey,
    },
    /// Adds or replaces a peer.
    PutPeer {
        /// Its prefix.
        prefix: IpNet,
        /// Its value.
        peer: Peer,
    },
    /// Removes a peer.
    DeletePeer {
        /// Its prefix.
        prefix: IpNet,
    },
    /// Deletes the connection entries of a protocol whose backend is in the list. Idempotent.
    ForgetFlows {
        /// IP protocol number.
        proto: u8,
        /// Backend ids.
        backends: Vec<u32>,
    },
}

/// Key of a service, whatever its family. Port 0 and protocol 0 is the wildcard entry of a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VipKey {
    /// The virtual address.
    pub ip: IpAddr,
    /// Port, host order.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// One of `rustnet_common::service::scope`.
    pub scope: u8,
}

impl VipKey {
    /// The wildcard entry of an address.
    pub const fn wildcard(ip: IpAddr) -> Self {
        Self { ip, port: 0, proto: 0, scope: rustnet_common::service::scope::CLUSTER }
    }

    /// True for the wildcard entry of an address.
    pub const fn is_wildcard(&self) -> bool {
        self.port == 0 && self.proto == 0
    }
}

impl fmt::Display for VipKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_wildcard() {
            return write!(f, "{} (whole address)", self.ip);
        }
        let proto = rustnet_common::tuple::proto::name(self.proto);
        write!(f, "{}/{proto}", std::net::SocketAddr::new(self.ip, self.port))
    }
}

/// What the maps hold, read back at start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// `rn_svc4` and `rn_svc6`.
    pub services: BTreeMap<VipKey, SvcEntry>,
    /// `rn_backends`, from index 0 to the highest slot in use at least. Slots that no service refers to are welcome:
    /// their ids are not given out again soon.
    pub backends: Vec<Backend>,
    /// `rn_peers4` and `rn_peers6`.
    pub peers: BTreeMap<IpNet, Peer>,
}

/// The maps, as the plan sees them.
pub trait Maps {
    /// Reads everything back.
    fn snapshot(&self) -> anyhow::Result<Snapshot>;
    /// Applies writes in order. After an error some prefix of them is in effect; take a new snapshot and adopt it.
    fn apply(&mut self, writes: &[Write]) -> anyhow::Result<()>;
    /// Slots of `rn_backends`.
    fn backend_capacity(&self) -> u32;
    /// Entries that `rn_svc4` and `rn_svc6` can hold, each.
    fn service_capacity(&self) -> u32 {
        u32::MAX
    }
    /// Entries that `rn_peers4` and `rn_peers6` can hold, each.
    fn peer_capacity(&self) -> u32 {
        u32::MAX
    }
}
