//! `rn_counters`: packets and bytes by reason and hook, summed over the CPUs.

use std::path::Path;

use anyhow::Result;
use rustnet_common::drop::{Counter, DropReason, counter_index, hook};
use rustnet_common::names::map;

use super::Map;
use super::map::possible_cpus;

/// The counters.
pub struct Counters {
    map: Map<u32, Counter>,
    cpus: usize,
}

/// One counter that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Why.
    pub reason: DropReason,
    /// One of [`hook`].
    pub hook: u8,
    /// How much.
    pub count: Counter,
}

impl Row {
    /// Name of the hook.
    pub fn hook_name(&self) -> &'static str {
        hook::NAMES[usize::from(self.hook)]
    }
}

impl Counters {
    /// Opens the pin in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Self::of(Map::open(bpffs, map::COUNTERS)?)
    }

    /// The counters of a map that is at hand.
    pub fn of(map: Map<u32, Counter>) -> Result<Self> {
        Ok(Self { map, cpus: possible_cpus()? })
    }

    /// All counters that are not zero, by reason, then hook.
    pub fn read(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for reason in DropReason::ALL {
            for hook in 0..hook::NAMES.len() as u8 {
                let count = sum(&self.map.per_cpu(counter_index(*reason as u8, hook), self.cpus)?);
                if count.packets != 0 {
                    rows.push(Row { reason: *reason, hook, count });
                }
            }
        }
        Ok(rows)
    }
}

fn sum(cpus: &[Counter]) -> Counter {
    cpus.iter().fold(Counter::default(), |a, b| Counter {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::{Counter, Counters, DropReason, Map, Row, counter_index, hook, possible_cpus};
    use crate::bpf::sys::{Layout, map_create, map_update};

    #[test]
    fn counters_are_summed_over_all_cpus() {
        let layout =
            Layout { kind: 6, key_size: 4, value_size: 16, max_entries: rustnet_common::drop::COUNTERS, flags: 0 };
        let map: Map<u32, Counter> = Map::from_fd(map_create("rn_counters", layout).unwrap(), "rn_counters").unwrap();
        let cpus = possible_cpus().unwrap();
        let each = vec![Counter { packets: 2, bytes: 100 }; cpus];
        let key = counter_index(DropReason::Spoofed as u8, hook::FROM_POD);
        map_update(map.fd(), bytemuck::bytes_of(&key), bytemuck::cast_slice(&each)).unwrap();
        let rows = Counters { map, cpus }.read().unwrap();
        let count = Counter { packets: 2 * cpus as u64, bytes: 100 * cpus as u64 };
        assert_eq!(rows, [Row { reason: DropReason::Spoofed, hook: hook::FROM_POD, count }]);
        assert_eq!(rows[0].hook_name(), "from_pod");
    }
}
