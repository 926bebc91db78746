//! The maps of network policies: which writes lead from what they hold to what they should hold, and in which order.
//!
//! After every write each flow that both states allow passes, and each that both deny is denied. `course` has the order, `rows` what a
//! set says of a class, `fit` leaves out what has no room, `draft` is the state of the maps after the writes so far, and `judge` is what the programs make of a flow by them.
//! `parts` plans changes of pods of other nodes alone.

mod course;
mod draft;
mod fit;
pub mod judge;
mod memory;
mod parts;
mod rows;
#[cfg(test)]
mod tests;

pub use crate::index::policy::{DesiredPolicies, PodChanges, PortPrefix, RuleKey};
pub use memory::MemoryPolicyMaps;

use crate::model::Problem;
use course::Care;
use draft::Draft;
use ipnet::IpNet;
use rustnet_common::policy::{Policies, PolicyPod, PolicyRule, flags};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// One map write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyWrite {
    /// Adds or replaces an entry of `rn_policy_rules`.
    PutRule {
        /// Which.
        key: RuleKey,
        /// Its value.
        rule: PolicyRule,
    },
    /// Removes an entry of `rn_policy_rules`.
    DeleteRule {
        /// Which.
        key: RuleKey,
    },
    /// Adds or replaces an entry of `rn_policy_cidrs`.
    PutCidr {
        /// Which.
        prefix: IpNet,
        /// Its class.
        class: u32,
    },
    /// Removes an entry of `rn_policy_cidrs`.
    DeleteCidr {
        /// Which.
        prefix: IpNet,
    },
    /// Adds or replaces an entry of `rn_policy_pods`.
    PutPod {
        /// Which.
        ip: IpAddr,
        /// Its value.
        pod: PolicyPod,
    },
    /// Removes an entry of `rn_policy_pods`.
    DeletePod {
        /// Which.
        ip: IpAddr,
    },
    /// Replaces the value of `rn_policy`.
    PutState {
        /// Its new value.
        state: Policies,
    },
}

/// What the maps hold, read back at start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySnapshot {
    /// `rn_policy`.
    pub state: Policies,
    /// `rn_policy_pods`.
    pub pods: BTreeMap<IpAddr, PolicyPod>,
    /// `rn_policy_cidrs`.
    pub cidrs: BTreeMap<IpNet, u32>,
    /// `rn_policy_rules`.
    pub rules: BTreeMap<RuleKey, PolicyRule>,
}

/// Entries that each map has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyCapacities {
    /// `rn_policy_pods`.
    pub pods: u32,
    /// `rn_policy_cidrs`.
    pub cidrs: u32,
    /// `rn_policy_rules`.
    pub rules: u32,
}

/// The maps of policies, as the plan sees them.
pub trait PolicyMaps {
    /// Reads everything back.
    fn snapshot(&self) -> anyhow::Result<PolicySnapshot>;
    /// Applies writes in order. After an error some prefix of them is in effect; take a new snapshot and adopt it.
    fn apply(&mut self, writes: &[PolicyWrite]) -> anyhow::Result<()>;
    /// How much they have room for.
    fn capacities(&self) -> PolicyCapacities;
}

/// Plans the writes. It takes them as applied.
#[derive(Debug)]
pub struct PolicyPlanner {
    held: PolicySnapshot,
    capacities: PolicyCapacities,
    problems: Vec<Problem>,
    /// Known flows have been judged by what the maps hold, or will be.
    is_judged: bool,
    /// The maps hold all that was wanted the last time.
    is_whole: bool,
}

impl PolicyPlanner {
    /// Begins with what an agent that has ended, or a write that has failed, left in the maps. Which writes came before is not known, so
    /// that known flows are judged again.
    pub fn adopt(held: PolicySnapshot, capacities: PolicyCapacities) -> Self {
        Self { is_judged: false, ..Self::read_back(held, capacities) }
    }

    /// Begins with what the maps hold after all writes.
    pub fn read_back(held: PolicySnapshot, capacities: PolicyCapacities) -> Self {
        // Before Linux 6.13 a full trie does not even take another value for a prefix that it has.
        let usable = |capacity: u32| capacity.saturating_sub(1);
        let PolicyCapacities { pods, cidrs, rules } = capacities;
        let capacities = PolicyCapacities { pods, cidrs: usable(cidrs), rules: usable(rules) };
        Self { held, capacities, problems: Vec::new(), is_judged: true, is_whole: false }
    }

    /// What the maps hold.
    pub fn held(&self) -> &PolicySnapshot {
        &self.held
    }

    /// What did not fit.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The writes that lead to these maps, in order.
    pub fn plan(&mut self, desired: DesiredPolicies) -> Vec<PolicyWrite> {
        let fit = fit::fit(desired, &self.held, &self.capacities);
        (self.problems, self.is_whole) = (fit.problems, fit.is_whole);
        let wanted = PolicySnapshot { state: Policies::default(), ..fit.wanted };
        let judges_again = !std::mem::replace(&mut self.is_judged, true);
        let was_enforced = self.held.state.flags & flags::ENFORCED != 0;
        let draft = match (was_enforced, fit.is_enforced) {
            (false, is_enforced) => self.begin(&wanted, is_enforced),
            (true, false) => self.end(&wanted),
            (true, true) => {
                let tries = [Care::Exact, Care::CloseChanged, Care::CloseAll].into_iter();
                let mut drafts = tries.map(|care| course::pass_over(self.held.clone(), &wanted, care, judges_again));
                let fits = |draft: &Draft| draft.fits(&self.capacities);
                // The last one needs no more room than either state.
                let last = || course::pass_over(self.held.clone(), &wanted, Care::CloseAll, judges_again);
                drafts.find(fits).unwrap_or_else(last)
            }
        };
        let (held, writes) = draft.done();
        self.held = held;
        writes
    }

    /// Nothing is judged yet, so that the order of all but the last write does not matter.
    fn begin(&self, wanted: &PolicySnapshot, is_enforced: bool) -> Draft {
        let mut draft = Draft::new(self.held.clone());
        draft.delete_all_but(wanted);
        draft.put_rules(&wanted.rules);
        draft.put_all_pods(&wanted.pods);
        draft.put_cidrs(&wanted.cidrs);
        if is_enforced {
            draft.put_state(flags::ENFORCED);
        }
        draft
    }

    /// Nothing is judged after the first write.
    fn end(&self, wanted: &PolicySnapshot) -> Draft {
        let mut draft = Draft::new(self.held.clone());
        draft.put_state(0);
        draft.delete_all_but(wanted);
        draft
    }
}
