//! Reads the pinned maps as programs do, and notes when a change is in all entries of its Service.

use super::cluster::{Change, PORT, SERVICES, number_of, vip};
use anyhow::{Context, Result, ensure};
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::store::backends::Backends;
use rustnet_agent::bpf::store::memory::Access;
use rustnet_common::addr::Ip4;
use rustnet_common::names::map;
use rustnet_common::service::{SvcEntry, SvcKey, scope};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Between two looks at the maps.
pub const PAUSE: Duration = Duration::from_micros(200);
/// A change that takes longer is never going to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Maps of an agent.
pub struct Observer {
    services: Map<SvcKey<Ip4>, SvcEntry>,
    backends: Backends,
    protos: &'static [u8],
}

impl Observer {
    /// Opens the maps that are pinned there, of Services with these protocols.
    pub fn open(bpffs: &Path, protos: &'static [u8]) -> Result<Self> {
        let (services, backends) = (Map::open(bpffs, map::SVC4)?, Backends::open(bpffs, Access::Read)?);
        Ok(Self { services, backends, protos })
    }

    /// Returns how long each of `count` changes took, in milliseconds.
    pub fn follow(&self, changes: &Receiver<Change>, count: u32) -> Result<Vec<f64>> {
        let mut times = Vec::with_capacity(count as usize);
        let mut pending = vec![VecDeque::<Change>::new(); SERVICES as usize];
        let mut last = Instant::now();
        while times.len() < count as usize {
            for change in changes.try_iter() {
                pending[change.service as usize].push_back(change);
            }
            for (service, waiting) in (0..).zip(&mut pending).filter(|(_, waiting)| !waiting.is_empty()) {
                let Some(round) = self.round(service)? else { continue };
                let now = Instant::now();
                while let Some(change) = waiting.pop_front_if(|change| change.round <= round) {
                    times.push((now - change.at).as_secs_f64() * 1e3);
                    last = now;
                }
            }
            ensure!(
                last.elapsed() < PATIENCE,
                "no change for {PATIENCE:?}, {} of {count} are in the maps",
                times.len()
            );
            std::thread::sleep(PAUSE);
        }
        Ok(times)
    }

    /// Returns the round whose endpoints all entries of a Service have; `None` between two.
    fn round(&self, service: u32) -> Result<Option<u32>> {
        let mut least = u32::MAX;
        for proto in self.protos {
            let key = SvcKey { vip: vip(service).into(), port: PORT, proto: *proto, scope: scope::CLUSTER };
            let entry = self.services.get(&key)?.with_context(|| format!("Service {service} has no entry"))?;
            let mut numbers = Vec::new();
            for backend in self.backends.of(&entry) {
                // The range was let go of while it was read.
                let Some(backend) = backend else { return Ok(None) };
                let IpAddr::V4(address) = IpAddr::from(backend.addr) else { return Ok(None) };
                numbers.push(number_of(address));
            }
            numbers.sort_unstable();
            let first = *numbers.first().with_context(|| format!("Service {service} has no endpoint"))?;
            ensure!(numbers.iter().copied().eq((first..).take(numbers.len())), "Service {service}: {numbers:?}");
            least = least.min(first);
        }
        Ok(Some(least))
    }
}
