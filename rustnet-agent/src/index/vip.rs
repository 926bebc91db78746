//! What services are known by.

use crate::model::{Frontend, ObjectName};
use ipnet::IpNet;
use rustnet_common::service::scope;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

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
    /// The entries of a frontend.
    pub fn of(frontend: Frontend<'_>) -> impl Iterator<Item = Self> {
        let Frontend { port, proto, scope, .. } = frontend;
        frontend.addresses().map(move |ip| Self { ip, port, proto, scope })
    }

    /// True if a frontend has this entry.
    pub fn is_of(&self, frontend: &Frontend<'_>) -> bool {
        let Frontend { port, proto, scope, .. } = *frontend;
        (self.port, self.proto, self.scope) == (port, proto, scope) && frontend.addresses().any(|ip| ip == self.ip)
    }

    /// The wildcard entry of an address.
    pub const fn wildcard(ip: IpAddr) -> Self {
        Self { ip, port: 0, proto: 0, scope: scope::CLUSTER }
    }

    /// The wildcard entry of an address for clients outside.
    pub const fn external_wildcard(ip: IpAddr) -> Self {
        Self { scope: scope::EXTERNAL, ..Self::wildcard(ip) }
    }

    /// True for the wildcard entry of an address.
    pub const fn is_wildcard(&self) -> bool {
        self.port == 0 && self.proto == 0
    }
}

impl fmt::Display for VipKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_wildcard() {
            write!(f, "{} (whole address)", self.ip)?;
        } else {
            let proto = rustnet_common::tuple::proto::name(self.proto);
            write!(f, "{}/{proto}", std::net::SocketAddr::new(self.ip, self.port))?;
        }
        if self.scope == scope::EXTERNAL { f.write_str(" from outside") } else { Ok(()) }
    }
}

/// Clients that may come by an entry of a load balancer's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceRange {
    /// The entry, for clients outside.
    pub key: VipKey,
    /// The clients, of the entry's family.
    pub clients: IpNet,
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.clients, self.key)
    }
}

/// Who may come by the entries of one Service that ask for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRanges {
    /// The Service.
    pub service: ObjectName,
    /// The ranges of each entry; none closes it.
    pub entries: BTreeMap<VipKey, BTreeSet<IpNet>>,
}
