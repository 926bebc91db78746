//! Where an address of a Service leads to, as the maps have it: policies judge the backend.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use rustnet_common::service::{SvcEntry, flags, scope};

use crate::bpf::store;
use crate::bpf::store::backends::Backends;
use crate::bpf::store::memory::Access;
use crate::cli::Places;
use crate::namefile::{self, SERVICES, Services, service_key};
use crate::plan::VipKey;

/// What an address, port and protocol are to the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Front {
    /// No address of a Service.
    None,
    /// An address of a Service that has nothing at this port: new flows to it are refused.
    NoPort,
    /// A port of a Service.
    Service {
        /// `namespace/name`; none if it is not known.
        name: Option<String>,
        /// Its backends.
        backends: Vec<SocketAddr>,
    },
}

/// All Services, to be asked.
pub struct Fronts {
    services: BTreeMap<VipKey, SvcEntry>,
    backends: Backends,
    names: Services,
}

impl Fronts {
    /// Reads the maps, and the agent's file of names.
    ///
    /// # Errors
    /// One cannot be read.
    pub fn read(places: &Places) -> Result<Self> {
        Ok(Self {
            backends: Backends::open(places.bpffs()?, Access::Read)?,
            services: store::services(places.bpffs()?)?,
            names: namefile::read(&places.run_dir, SERVICES)?,
        })
    }

    /// What a destination is to a client, who may be outside of the cluster: the entry that is for such clients counts.
    pub fn find(&self, to: SocketAddr, proto: u8, is_outside: bool) -> Front {
        find(&self.services, to, proto, is_outside, |entry| self.resolve(to, proto, entry))
    }

    fn resolve(&self, to: SocketAddr, proto: u8, entry: &SvcEntry) -> Front {
        let backends = self.backends.of(entry).flatten();
        Front::Service {
            name: self.names.get(&service_key(to.ip(), to.port(), proto)).map(|name| name.service.clone()),
            backends: backends.map(|it| SocketAddr::new(IpAddr::from(it.addr), it.port)).collect(),
        }
    }
}

/// Finds the entry of a destination, as the programs do, and passes it on.
fn find(
    services: &BTreeMap<VipKey, SvcEntry>,
    to: SocketAddr,
    proto: u8,
    is_outside: bool,
    resolve: impl FnOnce(&SvcEntry) -> Front,
) -> Front {
    let scopes = if is_outside { [scope::EXTERNAL, scope::CLUSTER] } else { [scope::CLUSTER, scope::EXTERNAL] };
    let entry = |port, proto| {
        let key = |scope| VipKey { ip: to.ip(), port, proto, scope };
        scopes.into_iter().find_map(|scope| services.get(&key(scope)))
    };
    match (entry(to.port(), proto), entry(0, 0)) {
        (Some(entry), _) => resolve(entry),
        // Other ports of an address that is shared with machines outside lead there, for clients of the cluster.
        (None, Some(all)) if is_outside || all.flags & flags::SHARED == 0 => Front::NoPort,
        (None, _) => Front::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What decides is whose entry is found, and whether the address refuses its other ports.
    #[test]
    fn a_client_gets_the_entry_for_such_clients() {
        let ip = IpAddr::from([203, 0, 113, 9]);
        let key = |port, proto, scope| VipKey { ip, port, proto, scope };
        let entry = |id, flags| SvcEntry { first: 0, count: 0, id, affinity: 0, flags, table: 0 };
        let services: BTreeMap<VipKey, SvcEntry> = [
            (key(443, 6, scope::CLUSTER), entry(1, 0)),
            (key(443, 6, scope::EXTERNAL), entry(2, 0)),
            (key(80, 6, scope::EXTERNAL), entry(3, 0)),
            (key(0, 0, scope::CLUSTER), entry(4, flags::SHARED)),
        ]
        .into();
        let found = |port, is_outside| {
            find(&services, SocketAddr::new(ip, port), 6, is_outside, |entry| Front::Service {
                name: Some(entry.id.to_string()),
                backends: Vec::new(),
            })
        };
        let service = |id: &str| Front::Service { name: Some(id.to_owned()), backends: Vec::new() };
        assert_eq!((found(443, false), found(443, true)), (service("1"), service("2")));
        assert_eq!(found(80, false), service("3"));
        assert_eq!((found(6443, false), found(6443, true)), (Front::None, Front::NoPort));
    }
}
