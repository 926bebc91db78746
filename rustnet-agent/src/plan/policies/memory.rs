//! Maps of policies in memory, which refuse what the kernel refuses, and can fail after any write.

use super::{PolicyCapacities, PolicyMaps, PolicySnapshot, PolicyWrite};
use anyhow::ensure;

/// The maps of one node, for tests of everything above them.
#[derive(Clone, Debug)]
pub struct MemoryPolicyMaps {
    held: PolicySnapshot,
    capacities: PolicyCapacities,
    writes_left: Option<usize>,
}

impl MemoryPolicyMaps {
    /// Maps that hold this already, with this much room.
    pub fn new(held: PolicySnapshot, capacities: PolicyCapacities) -> Self {
        Self { held, capacities, writes_left: None }
    }

    /// Fail after this many writes.
    pub fn crash_after(&mut self, writes: usize) {
        self.writes_left = Some(writes);
    }

    /// What the maps hold.
    pub fn held(&self) -> &PolicySnapshot {
        &self.held
    }

    fn write(&mut self, write: &PolicyWrite) -> anyhow::Result<()> {
        let PolicyCapacities { pods, cidrs, rules } = self.capacities;
        let PolicySnapshot { state, pods: held_pods, cidrs: held_cidrs, rules: held_rules } = &mut self.held;
        match write {
            PolicyWrite::PutRule { key, rule } => {
                // A full trie of an old kernel takes no new value either.
                ensure!(held_rules.len() < rules as usize, "rn_policy_rules is full");
                held_rules.insert(*key, *rule);
            }
            PolicyWrite::DeleteRule { key } => ensure!(held_rules.remove(key).is_some(), "{key:?} is not there"),
            PolicyWrite::PutCidr { prefix, class } => {
                ensure!(held_cidrs.len() < cidrs as usize, "rn_policy_cidrs is full");
                held_cidrs.insert(*prefix, *class);
            }
            PolicyWrite::DeleteCidr { prefix } => ensure!(held_cidrs.remove(prefix).is_some(), "{prefix} is not there"),
            PolicyWrite::PutPod { ip, pod } => {
                ensure!(held_pods.len() < pods as usize || held_pods.contains_key(ip), "rn_policy_pods is full");
                held_pods.insert(*ip, *pod);
            }
            PolicyWrite::DeletePod { ip } => ensure!(held_pods.remove(ip).is_some(), "{ip} is not there"),
            PolicyWrite::PutState { state: new } => *state = *new,
        }
        Ok(())
    }
}

impl PolicyMaps for MemoryPolicyMaps {
    fn snapshot(&self) -> anyhow::Result<PolicySnapshot> {
        Ok(self.held.clone())
    }

    fn apply(&mut self, writes: &[PolicyWrite]) -> anyhow::Result<()> {
        for write in writes {
            if let Some(left) = &mut self.writes_left {
                ensure!(*left > 0, "the test's crash");
                *left -= 1;
            }
            self.write(write)?;
        }
        Ok(())
    }

    fn capacities(&self) -> PolicyCapacities {
        self.capacities
    }
}
