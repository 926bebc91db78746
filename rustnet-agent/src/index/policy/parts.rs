//! What of a state of the maps stays while only pods of other nodes come, go and change: in a large cluster, nearly all the time.

use super::desired::DesiredPolicies;
use super::groups::GroupId;
use super::spans::Region;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

/// Entries of pods of other nodes that are to be others: the class of each; `None`: none.
pub type PodChanges = BTreeMap<IpAddr, Option<u32>>;

/// The state that was worked out last, and the addresses of other nodes' pods that have come, gone or changed since.
#[derive(Debug, Default)]
pub struct Parts {
    /// The class of a group's addresses in a region; `None`: they need no entry.
    classes: HashMap<(GroupId, Region), Option<u32>>,
    /// How many entries have each class. A class that nobody has any more has no rules.
    members: HashMap<u32, usize>,
    /// The addresses.
    pub touched: BTreeSet<IpAddr>,
}

impl Parts {
    /// A state, with the classes of groups in it.
    pub fn new(classes: HashMap<(GroupId, Region), Option<u32>>, state: &DesiredPolicies) -> Self {
        let mut members = HashMap::new();
        for class in state.pods.values().map(|pod| pod.class).chain(state.cidrs.values().copied()) {
            *members.entry(class).or_default() += 1;
        }
        Self { classes, members, touched: BTreeSet::new() }
    }

    /// The entries of the addresses. `before`: the classes of those that are there. `group`: whose an address is now, if it is one
    /// group's or nobody's. `None`: more than these entries differ, or may.
    pub fn changes(
        &mut self,
        before: impl Fn(IpAddr) -> Option<u32>,
        group: impl Fn(IpAddr) -> Option<Option<(GroupId, Region)>>,
    ) -> Option<PodChanges> {
        let mut changes = PodChanges::new();
        for ip in std::mem::take(&mut self.touched) {
            let class = match group(ip)? {
                Some(place) => *self.classes.get(&place)?,
                None => None,
            };
            let before = before(ip);
            if class == before {
                continue;
            }
            if let Some(class) = class {
                *self.members.get_mut(&class)? += 1;
            }
            if let Some(count) = before.and_then(|before| self.members.get_mut(&before)) {
                *count -= 1;
            }
            changes.insert(ip, class);
        }
        self.members.values().all(|count| *count > 0).then_some(changes)
    }
}
