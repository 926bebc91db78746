//! Maps in memory, which refuse every order of writes that would hurt a reader, and can fail after any step.

use super::{GRACE, Maps, Snapshot, VipKey, Write};
use anyhow::{Context, bail, ensure};
use rustnet_common::backend::Backend;
use rustnet_common::service::SvcEntry;
use std::collections::BTreeMap;
use std::time::Duration;

/// The maps of one node, for tests of everything above them.
#[derive(Clone, Debug)]
pub struct MemoryMaps {
    held: Snapshot,
    capacity: u32,
    now: Duration,
    /// When a slot was last let go of.
    let_go: BTreeMap<u32, Duration>,
    /// Steps until the crash; a range of backends counts one a slot.
    steps_left: Option<usize>,
    /// Flows that were to be forgotten, in order.
    forgotten: Vec<(u8, Vec<u32>)>,
}

impl MemoryMaps {
    /// Empty maps with this many slots for backends.
    pub fn new(capacity: u32) -> Self {
        Self {
            held: Snapshot::default(),
            capacity,
            now: Duration::ZERO,
            let_go: BTreeMap::new(),
            steps_left: None,
            forgotten: Vec::new(),
        }
    }

    /// Maps that hold this already.
    pub fn with(held: Snapshot, capacity: u32) -> Self {
        Self { held, ..Self::new(capacity) }
    }

    /// Sets the time, by which the reuse of slots is judged.
    pub fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    /// Fail after this many steps. One write is one step, but a range of backends is one step for each slot.
    pub fn crash_after(&mut self, steps: usize) {
        self.steps_left = Some(steps);
    }

    /// No crash any more.
    pub fn mend(&mut self) {
        self.steps_left = None;
    }

    /// What the maps hold.
    pub fn held(&self) -> &Snapshot {
        &self.held
    }

    /// Flows that were to be forgotten since the last call.
    pub fn take_forgotten(&mut self) -> Vec<(u8, Vec<u32>)> {
        std::mem::take(&mut self.forgotten)
    }

    /// The backends that an entry leads to.
    pub fn backends(&self, entry: &SvcEntry) -> &[Backend] {
        self.held.backends.get(entry.first as usize..end_of(entry) as usize).unwrap_or_default()
    }

    fn step(&mut self) -> anyhow::Result<()> {
        if let Some(left) = &mut self.steps_left {
            *left = left.checked_sub(1).context("crash, as the test asked for")?;
        }
        Ok(())
    }

    fn user_of(&self, slot: u32) -> Option<VipKey> {
        self.held.services.iter().find(|(_, e)| slot >= e.first && slot - e.first < e.count).map(|(key, _)| *key)
    }

    fn store(&mut self, first: u32, backends: &[Backend]) -> anyhow::Result<()> {
        ensure!(!backends.is_empty(), "an empty range of backends is written at {first}");
        let end = first.checked_add(backends.len() as u32).filter(|end| *end <= self.capacity);
        let end = end.with_context(|| format!("{} backends at {first} exceed the array", backends.len()))?;
        for (key, entry) in &self.held.services {
            let apart = entry.count == 0 || entry.first >= end || end_of(entry) <= first;
            ensure!(apart, "slots {first}..{end} are written while {key} leads there");
        }
        for (slot, since) in self.let_go.range(first..end) {
            ensure!(self.now >= *since + GRACE, "slot {slot} is written too soon after it was let go of");
        }
        if self.held.backends.len() < end as usize {
            self.held.backends.resize(end as usize, bytemuck::Zeroable::zeroed());
        }
        for (slot, backend) in (first..end).zip(backends) {
            self.step()?;
            ensure!(backend.id != 0, "backend without an id at {slot}");
            self.held.backends[slot as usize] = *backend;
        }
        Ok(())
    }

    fn put(&mut self, key: VipKey, entry: SvcEntry) -> anyhow::Result<()> {
        let slots = entry.first as usize..entry.first as usize + entry.count as usize;
        let written = self.held.backends.get(slots.clone());
        let written = written.with_context(|| format!("{key} leads to {slots:?}, beyond what was written"))?;
        ensure!(written.iter().all(|b| b.id != 0), "{key} leads to slots that were never written");
        let mut ids: Vec<u32> = written.iter().map(|b| b.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ensure!(ids.len() == slots.len(), "{key} has two backends of one id");
        for (other, held) in self.held.services.iter().filter(|(other, _)| **other != key) {
            let apart =
                held.count == 0 || entry.count == 0 || held.first >= end_of(&entry) || entry.first >= end_of(held);
            ensure!(apart, "{key} and {other} share slots");
        }
        let old = self.held.services.insert(key, entry);
        self.let_go_of(old);
        Ok(())
    }

    fn let_go_of(&mut self, entry: Option<SvcEntry>) {
        for slot in entry.iter().flat_map(|e| e.first..end_of(e).min(self.capacity)) {
            if self.user_of(slot).is_none() {
                self.let_go.insert(slot, self.now);
            }
        }
    }
}

/// The slot behind an entry's last one; maps made up by a test may hold anything.
fn end_of(entry: &SvcEntry) -> u32 {
    entry.first.saturating_add(entry.count)
}

impl Maps for MemoryMaps {
    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        Ok(self.held.clone())
    }

    fn apply(&mut self, writes: &[Write]) -> anyhow::Result<()> {
        for write in writes {
            match write {
                Write::Backends { first, backends } => {
                    self.store(*first, backends)?;
                    continue;
                }
                _ => self.step()?,
            }
            match write {
                Write::Backends { .. } => {}
                Write::PutService { key, entry } => self.put(*key, *entry)?,
                Write::DeleteService { key } => {
                    let old = self.held.services.remove(key);
                    ensure!(old.is_some(), "{key} is deleted, but it is not there");
                    self.let_go_of(old);
                }
                Write::PutPeer { prefix, peer } => {
                    if self.held.peers.insert(*prefix, *peer) == Some(*peer) {
                        bail!("peer {prefix} is written, but it is there already");
                    }
                }
                Write::DeletePeer { prefix } => {
                    ensure!(self.held.peers.remove(prefix).is_some(), "peer {prefix} is deleted, but it is not there");
                }
                Write::ForgetFlows { proto, backends } => {
                    ensure!(!backends.is_empty(), "flows to no backend are forgotten");
                    self.forgotten.push((*proto, backends.clone()));
                }
            }
        }
        Ok(())
    }

    fn backend_capacity(&self) -> u32 {
        self.capacity
    }
}
