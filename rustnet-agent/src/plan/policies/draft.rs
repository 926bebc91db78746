//! The state of the maps after the writes so far, and these writes.

use super::rows::{Row, row};
use super::{PolicyCapacities, PolicySnapshot, PolicyWrite, RuleKey};
use ipnet::IpNet;
use rustnet_common::policy::{OPEN, PolicyPod, PolicyRule};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A plan in the making. What the maps hold already is not written.
#[derive(Debug)]
pub struct Draft {
    now: PolicySnapshot,
    writes: Vec<PolicyWrite>,
    /// The most entries at any moment: pods, ranges, rules.
    peak: [usize; 3],
}

impl Draft {
    /// No writes yet.
    pub fn new(held: PolicySnapshot) -> Self {
        Self { now: held, writes: Vec::new(), peak: [0; 3] }
    }

    /// The maps after the writes, and the writes.
    pub fn done(self) -> (PolicySnapshot, Vec<PolicyWrite>) {
        (self.now, self.writes)
    }

    /// The maps after the writes so far.
    pub fn now(&self) -> &PolicySnapshot {
        &self.now
    }

    /// True if the maps have room at each moment. A map that holds more than fits is asked for no more.
    pub fn fits(&self, room: &PolicyCapacities) -> bool {
        let room = [room.pods, room.cidrs, room.rules];
        self.peak.iter().zip(room).all(|(peak, room)| *peak <= room as usize)
    }

    /// Puts a rule.
    pub fn put_rule(&mut self, key: RuleKey, rule: PolicyRule) {
        if self.now.rules.get(&key) != Some(&rule) {
            self.now.rules.insert(key, rule);
            self.peak[2] = self.peak[2].max(self.now.rules.len());
            self.writes.push(PolicyWrite::PutRule { key, rule });
        }
    }

    /// Puts rules.
    pub fn put_rules(&mut self, rules: &BTreeMap<RuleKey, PolicyRule>) {
        let changed = differing(&self.now.rules, rules).filter_map(|(key, _, rule)| Some((*key, *rule?)));
        for (key, rule) in changed.collect::<Vec<_>>() {
            self.put_rule(key, rule);
        }
    }

    /// Puts some ports of a set and a class, the longest prefixes first: no port has anything but its old rule or its new one.
    pub fn put_row(&mut self, set: u32, class: u32, row: &Row) {
        for (ports, rule) in row.iter().rev() {
            self.put_rule(RuleKey { set, class, ports: *ports }, *rule);
        }
    }

    /// Makes these all the ports of a set and a class. The others go with the shortest prefixes first, for the same reason.
    pub fn replace_row(&mut self, set: u32, class: u32, wanted: &Row) {
        self.put_row(set, class, wanted);
        for ports in row(&self.now.rules, set, class).into_keys().filter(|ports| !wanted.contains_key(ports)) {
            self.delete_rule(RuleKey { set, class, ports });
        }
    }

    /// Puts all pods of these maps.
    pub fn put_all_pods(&mut self, pods: &BTreeMap<IpAddr, PolicyPod>) {
        let changed = differing(&self.now.pods, pods).filter_map(|(ip, _, pod)| Some((*ip, *pod?)));
        self.put_pods(changed.collect::<Vec<_>>().into_iter());
    }

    /// Puts pods.
    pub fn put_pods(&mut self, pods: impl Iterator<Item = (IpAddr, PolicyPod)>) {
        for (ip, pod) in pods {
            if self.now.pods.get(&ip) != Some(&pod) {
                self.now.pods.insert(ip, pod);
                self.peak[0] = self.peak[0].max(self.now.pods.len());
                self.writes.push(PolicyWrite::PutPod { ip, pod });
            }
        }
    }

    /// Puts ranges, the longest first: no address has a class but its old one or its new one.
    pub fn put_cidrs(&mut self, cidrs: &BTreeMap<IpNet, u32>) {
        let mut changed: Vec<_> =
            cidrs.iter().filter(|(prefix, class)| self.now.cidrs.get(prefix) != Some(class)).collect();
        changed.sort_by_key(|(prefix, _)| Reverse(prefix.prefix_len()));
        for (prefix, class) in changed {
            self.now.cidrs.insert(*prefix, *class);
            self.peak[1] = self.peak[1].max(self.now.cidrs.len());
            self.writes.push(PolicyWrite::PutCidr { prefix: *prefix, class: *class });
        }
    }

    /// Replaces the flags, and raises the generation.
    pub fn put_state(&mut self, flags: u32) {
        self.now.state = self.now.state.changed(flags);
        self.writes.push(PolicyWrite::PutState { state: self.now.state });
    }

    /// Deletes what these maps do not have: addresses, then rules.
    pub fn delete_all_but(&mut self, wanted: &PolicySnapshot) {
        self.delete_addresses_but(wanted);
        let stale =
            differing(&self.now.rules, &wanted.rules).filter_map(|(key, _, rule)| rule.is_none().then_some(*key));
        for key in stale.collect::<Vec<_>>() {
            self.delete_rule(key);
        }
    }

    /// Deletes the pods that these maps do not have, then the ranges, the shortest first.
    pub fn delete_addresses_but(&mut self, wanted: &PolicySnapshot) {
        let pods = differing(&self.now.pods, &wanted.pods).filter_map(|(ip, _, pod)| pod.is_none().then_some(*ip));
        self.delete_pods(pods.collect());
        let mut cidrs: Vec<IpNet> =
            self.now.cidrs.keys().filter(|it| !wanted.cidrs.contains_key(it)).copied().collect();
        cidrs.sort_by_key(|prefix| (prefix.prefix_len(), *prefix));
        for prefix in cidrs {
            self.now.cidrs.remove(&prefix);
            self.writes.push(PolicyWrite::DeleteCidr { prefix });
        }
    }

    /// Deletes pods.
    pub fn delete_pods(&mut self, pods: Vec<IpAddr>) {
        for ip in pods {
            self.now.pods.remove(&ip);
            self.writes.push(PolicyWrite::DeletePod { ip });
        }
    }

    /// Deletes rules.
    pub fn delete_rules(&mut self, is_stale: impl Fn(&RuleKey) -> bool) {
        let rules: Vec<RuleKey> = self.now.rules.keys().filter(|key| is_stale(key)).copied().collect();
        for key in rules {
            self.delete_rule(key);
        }
    }

    fn delete_rule(&mut self, key: RuleKey) {
        if self.now.rules.remove(&key).is_some() {
            self.writes.push(PolicyWrite::DeleteRule { key });
        }
    }
}

/// The sets of pods of this node.
pub fn sets_in_use(pods: &BTreeMap<IpAddr, PolicyPod>) -> BTreeSet<u32> {
    let local = pods.values().filter(|pod| pod.ifindex != 0);
    local.flat_map(|pod| [pod.ingress, pod.egress]).filter(|set| *set != OPEN).collect()
}

/// The entries that differ, with the value of either side. One walk over both maps.
pub fn differing<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, Option<&'a V>, Option<&'a V>)> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    let pairs = std::iter::from_fn(move || match (old.peek(), new.peek()) {
        (Some((a, _)), Some((b, _))) if a == b => {
            let ((key, before), (_, after)) = old.next().zip(new.next())?;
            Some((key, Some(before), Some(after)))
        }
        (Some((a, _)), Some((b, _))) if a < b => old.next().map(|(key, before)| (key, Some(before), None)),
        (Some(_), None) => old.next().map(|(key, before)| (key, Some(before), None)),
        (_, Some(_)) => new.next().map(|(key, after)| (key, None, Some(after))),
        (None, None) => None,
    });
    pairs.filter(|(_, before, after)| before != after)
}
