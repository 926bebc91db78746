//! Where an address of a Service leads to, as the maps have it: policies judge the backend.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use rustnet_common::service::{SvcEntry, scope};

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

    /// What a destination is. Entries for clients of the cluster come before those for clients outside.
    pub fn find(&self, to: SocketAddr, proto: u8) -> Front {
        let entry = |port, proto| {
            let key = |scope| VipKey { ip: to.ip(), port, proto, scope };
            [scope::CLUSTER, scope::EXTERNAL].into_iter().find_map(|scope| self.services.get(&key(scope)))
        };
        match (entry(to.port(), proto), entry(0, 0)) {
            (Some(entry), _) => {
                let backends = self.backends.of(entry).flatten();
                Front::Service {
                    name: self.names.get(&service_key(to.ip(), to.port(), proto)).map(|name| name.service.clone()),
                    backends: backends.map(|it| SocketAddr::new(IpAddr::from(it.addr), it.port)).collect(),
                }
            }
            (None, Some(_)) => Front::NoPort,
            (None, None) => Front::None,
        }
    }
}
