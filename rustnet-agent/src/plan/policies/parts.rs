//! Entries of pods of other nodes alone: the same writes as for whole states, without looking at these.

use super::course::allows_less;
use super::draft::Draft;
use super::rows::Classes;
use super::{PolicyPlanner, PolicyWrite};
use crate::index::policy::PodChanges;
use ipnet::IpNet;
use rustnet_common::policy::{PolicyPod, flags};
use std::collections::BTreeSet;

impl PolicyPlanner {
    /// The writes that lead to these entries, in order. `None`: more than they may have to be written.
    pub fn plan_pods(&mut self, changes: &PodChanges) -> Option<Vec<PolicyWrite>> {
        let is_enforced = self.held.state.flags & flags::ENFORCED != 0;
        let has_room = self.held.pods.len() + changes.len() <= self.capacities.pods as usize;
        if !(is_enforced && has_room && self.is_whole && self.is_judged) {
            return None;
        }
        let classes = Classes::new(&self.held);
        let (mut put, mut gone, mut come) = (Vec::new(), Vec::new(), BTreeSet::new());
        let mut has_other_classes = false;
        for (ip, class) in changes {
            let before = self.held.pods.get(ip);
            if before.is_some_and(|pod| pod.ifindex != 0) {
                return None;
            }
            let Some(class) = *class else {
                gone.extend(before.map(|_| *ip));
                continue;
            };
            if let Some(pod) = before {
                has_other_classes |= pod.class != class;
            } else {
                let pair = (classes.of_range(IpNet::from(*ip)), class);
                come.extend((pair.0 != pair.1).then_some(pair));
            }
            put.push((*ip, PolicyPod { class, ..PolicyPod::default() }));
        }
        has_other_classes |= !gone.is_empty() || allows_less(&self.held, &self.held, &come);
        let mut draft = Draft::new(std::mem::take(&mut self.held));
        draft.put_pods(put.into_iter());
        draft.delete_pods(gone);
        if has_other_classes {
            draft.put_state(flags::ENFORCED);
        }
        let (held, writes) = draft.done();
        self.held = held;
        Some(writes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::policy::Policies;
    use crate::index::policy::world::{NODE, Random, World};
    use crate::plan::policies::{PolicyCapacities, PolicySnapshot};

    const PLENTY: PolicyCapacities = PolicyCapacities { pods: 10_000, cidrs: 10_000, rules: 100_000 };

    /// Pods of other nodes come, go, and get the labels, ports and namespace of another pod, or its address.
    fn change(random: &mut Random, world: &mut World) {
        let is_elsewhere = |world: &World, n: usize| {
            world.pods[n].spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() != Some(NODE))
        };
        let n = random.below(world.pods.len().max(1));
        if world.pods.is_empty() || !is_elsewhere(world, n) {
            return;
        }
        let other = world.pods[random.below(world.pods.len())].clone();
        match random.below(4) {
            0 => drop(world.pods.remove(n)),
            1 => world.pods[n].metadata.labels = other.metadata.labels,
            2 => {
                let mut pod = world.pods[n].clone();
                pod.metadata.name = Some(format!("new-{}", random.below(10)));
                let ip = format!("10.{}.0.{}", random.below(3), 100 + random.below(50));
                let status = pod.status.get_or_insert_default();
                status.pod_ips = serde_json::from_value(serde_json::json!([{"ip": ip}])).unwrap();
                world.pods.push(pod);
            }
            _ => world.pods[n].status = other.status,
        }
    }

    /// Parts lead to the state that the whole leads to, by the same writes.
    #[test]
    fn pods_of_other_nodes_are_planned_as_with_all_else() {
        let mut by_parts = 0;
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let mut world = random.whole_world();
            let mut index = Policies::new(NODE.into());
            world.lead(&mut index);
            let mut planner = PolicyPlanner::read_back(PolicySnapshot::default(), PLENTY);
            planner.plan(index.desired());
            for _ in 0..20 {
                change(&mut random, &mut world);
                world.lead(&mut index);
                let desired = world.desired();
                let mut whole = PolicyPlanner::read_back(planner.held.clone(), PLENTY);
                let writes = whole.plan(desired.clone());
                let before = planner.held.pods.clone();
                let changes = index.changes(|ip| before.get(&ip).map(|pod| pod.class));
                let planned = changes.and_then(|changes| planner.plan_pods(&changes));
                by_parts += usize::from(planned.as_ref().is_some_and(|it| !it.is_empty()));
                match planned {
                    Some(planned) => assert_eq!(planned, writes, "seed {seed}"),
                    None => drop(planner.plan(index.desired())),
                }
                assert_eq!(planner.held, whole.held, "seed {seed}");
            }
        }
        assert!(by_parts > 100, "{by_parts} changes were planned by parts");
    }
}
