//! The maps of an agent, pinned for a measurement.

use anyhow::Result;
use rustnet_agent::bpf::load::{Load, sizes};
use rustnet_agent::bpf::object;
use rustnet_agent::bpf::store::BpfMaps;
use rustnet_agent::config::{MapSizes, PacketLog};
use rustnet_agent::plan::{Maps, Snapshot, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Pins maps of these sizes as the agent would.
pub fn load(bpffs: &Path, maps: &MapSizes) -> Result<BpfMaps> {
    let (object, sizes) = (object::embedded()?, sizes(maps));
    Load { object, bpffs, sizes, log: PacketLog::Off, has_sockets: false, has_xdp: false }.run()?.pin(bpffs)?;
    BpfMaps::open(bpffs)
}

/// The real maps, and how long writing to them took.
pub struct Timed {
    maps: BpfMaps,
    took: Duration,
}

impl Timed {
    /// Nothing has been written yet.
    pub fn new(maps: BpfMaps) -> Self {
        Self { maps, took: Duration::ZERO }
    }

    /// How long all writes took so far.
    pub fn took(&self) -> Duration {
        self.took
    }
}

impl Maps for Timed {
    fn snapshot(&self) -> Result<Snapshot> {
        self.maps.snapshot()
    }
    fn apply(&mut self, writes: &[Write]) -> Result<()> {
        let start = Instant::now();
        let result = self.maps.apply(writes);
        self.took += start.elapsed();
        result
    }
    fn backend_capacity(&self) -> u32 {
        self.maps.backend_capacity()
    }
    fn table_capacity(&self) -> u32 {
        self.maps.table_capacity()
    }
    fn service_capacity(&self) -> u32 {
        self.maps.service_capacity()
    }
    fn peer_capacity(&self) -> u32 {
        self.maps.peer_capacity()
    }
}
