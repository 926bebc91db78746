//! What of the desired maps has room. What has none fails closed, and what holds already goes on.

use super::draft::sets_in_use;
use super::rows::{Classes, allows, full_row, is_within};
use super::{DesiredPolicies, PolicyCapacities, PolicySnapshot, RuleKey};
use crate::index::policy::CLUSTER_KIND;
use crate::model::{ObjectName, Problem};
use ipnet::IpNet;
use rustnet_common::policy::{AUDIT, OPEN, Policies, PolicyPod, PolicyRule};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// The maps that the plan leads to.
pub struct Fit {
    /// Their content, without the state.
    pub wanted: PolicySnapshot,
    /// Flows are judged.
    pub is_enforced: bool,
    /// What was left out.
    pub problems: Vec<Problem>,
    /// Nothing was.
    pub is_whole: bool,
}

/// Leaves out what has no room.
pub fn fit(desired: DesiredPolicies, held: &PolicySnapshot, room: &PolicyCapacities) -> Fit {
    let DesiredPolicies { mut pods, cidrs, rules, is_enforced, sets, .. } = desired;
    let mut problems = Vec::new();
    // Without counts in the messages: each other count would be another event. What a policy of the cluster denies must not wait for
    // room: what the pods were allowed before may be just that.
    let names = |set: u32| sets.get(&set).map_or(&[][..], |names| names);
    let may_keep = |set: u32| !names(set).iter().any(|name| cluster_name(name).is_some());
    let rules = fit_rules(rules, &mut pods, held, (room.rules as usize, &may_keep), |set| {
        let message = if may_keep(set) {
            "the rules of its pods do not fit into the entries that others leave, so that its pods keep what they were allowed \
             before, and new pods are closed; raise policy-rule-entries"
        } else {
            "the rules of its pods do not fit into the entries that others leave, so that its pods are closed; raise \
             policy-rule-entries"
        };
        problems.extend(names(set).iter().map(|name| Problem::new(&subject(name), "", message)));
    });
    let is_half_full = problems.is_empty() && rules.len() > room.rules as usize / 2;
    if is_half_full {
        let message = format!(
            "rules take more than half of the {} entries, so that a change may close its pods for a moment; raise policy-rule-entries",
            room.rules
        );
        problems.push(Problem::new(&"network policies".into(), "", message));
    }
    let mut lost: BTreeMap<IpNet, u32> = BTreeMap::new();
    let (pods, left_out) = fit_pods(pods, room.pods as usize);
    if !left_out.is_empty() {
        lost.extend(left_out.into_iter().map(|(ip, pod)| (IpNet::from(ip), pod.class)));
        let message = format!(
            "some addresses of pods do not fit into the {} entries, so that no selector matches them; raise policy-pod-entries",
            room.pods
        );
        problems.push(Problem::new(&"network policies".into(), "", message));
    }
    let (cidrs, left_out) = fit_cidrs(cidrs, held, room.cidrs as usize);
    if !left_out.is_empty() {
        lost.extend(left_out);
        let message = format!(
            "some ranges do not fit into the {} entries, so that no ipBlock matches their addresses; raise policy-cidr-entries",
            room.cidrs
        );
        problems.push(Problem::new(&"network policies".into(), "", message));
    }
    let mut wanted = PolicySnapshot { state: Policies::default(), pods, cidrs, rules };
    let kept = sets_in_use(&wanted.pods).into_iter().filter(|set| *set != OPEN && !sets.contains_key(set)).collect();
    for set in close_opened(&mut wanted, &lost, (held, &kept)) {
        let message = "what its rules deny does not fit into the entries for pods and ranges, so that its pods are closed; raise \
                       policy-pod-entries and policy-cidr-entries";
        problems.extend(names(set).iter().map(|name| Problem::new(&subject(name), "", message)));
        if names(set).is_empty() {
            let message = "other pods and ranges have come than the rules know that some pods keep, so that these are closed; raise \
                           policy-rule-entries";
            problems.push(Problem::new(&"network policies".into(), "", message));
        }
    }
    problems.dedup();
    let is_whole = problems.len() == usize::from(is_half_full);
    Fit { wanted, is_enforced, problems, is_whole }
}

/// The name of a policy of the cluster; `None` for others.
fn cluster_name(policy: &ObjectName) -> Option<&str> {
    policy.as_str().strip_prefix(CLUSTER_KIND)?.strip_prefix('/')
}

/// What a problem of a policy is about.
fn subject(policy: &ObjectName) -> Arc<str> {
    match cluster_name(policy) {
        Some(name) => format!("{CLUSTER_KIND} {name}").into(),
        None => format!("NetworkPolicy {policy}").into(),
    }
}

/// Closes the pods of sets that would allow more to addresses than they should; returns these sets. `lost`: the classes of the
/// addresses that have no entry. `kept`: the sets of before that pods keep, for theirs do not fit; they have nothing for new classes.
fn close_opened(
    maps: &mut PolicySnapshot,
    lost: &BTreeMap<IpNet, u32>,
    (held, kept): (&PolicySnapshot, &BTreeSet<u32>),
) -> Vec<u32> {
    let classes = Classes::new(maps);
    let pairs = lost.iter().map(|(range, class)| (*class, classes.of_range(*range)));
    let pairs: BTreeSet<Pair> = pairs.filter(|(lost, now)| lost != now).collect();
    let moved = if kept.is_empty() { BTreeSet::new() } else { moved_classes(held, maps) };
    if pairs.is_empty() && moved.is_empty() {
        return Vec::new();
    }
    let allows_more = |from: &PolicySnapshot, pairs: &BTreeSet<Pair>, set: u32| {
        pairs.iter().any(|(old, now)| !is_within(&full_row(maps, set, *now), &full_row(from, set, *old), allows))
    };
    let opens = |set: &u32| allows_more(maps, &pairs, *set) || (kept.contains(set) && allows_more(held, &moved, *set));
    let opened: Vec<u32> = sets_in_use(&maps.pods).into_iter().filter(|set| *set != OPEN).filter(opens).collect();
    for pod in maps.pods.values_mut().filter(|pod| pod.ifindex != 0) {
        if opened.contains(&pod.ingress) || opened.contains(&pod.egress) {
            *pod = PolicyPod { class: pod.class, ..PolicyPod::default() };
        }
    }
    opened
}

/// An old class and a new one.
type Pair = (u32, u32);

/// The classes of addresses whose class changes.
fn moved_classes(old: &PolicySnapshot, new: &PolicySnapshot) -> BTreeSet<Pair> {
    let (old_classes, new_classes) = (Classes::new(old), Classes::new(new));
    let ranges = old.cidrs.keys().chain(new.cidrs.keys());
    let ranges = ranges.map(|range| (old_classes.of_range(*range), new_classes.of_range(*range)));
    let pods = old.pods.keys().chain(new.pods.keys()).map(|ip| (old_classes.of(*ip), new_classes.of(*ip)));
    ranges.chain(pods).filter(|(old, new)| old != new).collect()
}

type Rules = BTreeMap<RuleKey, PolicyRule>;

/// The rules that fit. Pods whose set does not fit keep the one that they have, else they are closed. `note` gets each set that does
/// not fit.
fn fit_rules(
    mut rules: Rules,
    pods: &mut BTreeMap<IpAddr, PolicyPod>,
    held: &PolicySnapshot,
    (room, may_keep): (usize, &dyn Fn(u32) -> bool),
    mut note: impl FnMut(u32),
) -> Rules {
    if rules.len() <= room {
        return rules;
    }
    let count = |rules: &Rules| {
        let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
        for key in rules.keys() {
            *counts.entry(key.set).or_default() += 1;
        }
        counts
    };
    let (counts, counts_before) = (count(&rules), count(&held.rules));
    let used_before = sets_in_use(&held.pods);
    let mut left = room;
    let mut failed = BTreeSet::new();
    let (known, new): (Vec<_>, Vec<_>) = counts.iter().partition(|(set, _)| used_before.contains(set));
    for (set, count) in known.into_iter().chain(new) {
        if *count <= left {
            left -= count;
        } else {
            note(*set);
            failed.insert(*set);
        }
    }
    let audited = |rules: &Rules| -> BTreeSet<u32> {
        rules.iter().filter(|(_, rule)| rule.flags & AUDIT != 0).map(|(key, _)| key.set).collect()
    };
    let (audits, audits_before) = (audited(&rules), audited(&held.rules));
    rules.retain(|key, _| !failed.contains(&key.set));
    let wanted = sets_in_use(pods);
    let mut kept: BTreeMap<u32, bool> = BTreeMap::new();
    for (ip, pod) in pods.iter_mut().filter(|(_, pod)| pod.ifindex != 0) {
        let before = held.pods.get(ip).filter(|before| before.ifindex == pod.ifindex);
        let mut keep = |set: &mut u32, before: Option<u32>| {
            if !failed.contains(set) {
                return true;
            }
            // What was audited allowed all, as no set at all does.
            let is_open = |before: &u32| *before == OPEN || (audits_before.contains(before) && !audits.contains(set));
            let Some(before) = before.filter(|before| !is_open(before) && may_keep(*set)) else { return false };
            *set = before;
            *kept.entry(before).or_insert_with(|| {
                if wanted.contains(&before) {
                    return !failed.contains(&before);
                }
                let count = counts_before.get(&before).copied().unwrap_or_default();
                let has_room = count <= left;
                if has_room {
                    left -= count;
                    rules.extend(
                        held.rules.iter().filter(|(key, _)| key.set == before).map(|(key, rule)| (*key, *rule)),
                    );
                }
                has_room
            })
        };
        let is_kept =
            keep(&mut pod.ingress, before.map(|it| it.ingress)) && keep(&mut pod.egress, before.map(|it| it.egress));
        if !is_kept {
            // Closed, and others still know its class.
            *pod = PolicyPod { class: pod.class, ..PolicyPod::default() };
        }
    }
    rules
}

type Pods = BTreeMap<IpAddr, PolicyPod>;
type Cidrs = BTreeMap<IpNet, u32>;

/// The pods that fit, those of this node first, and the others. No selector matches these: they are allowed less.
fn fit_pods(pods: Pods, room: usize) -> (Pods, Pods) {
    if pods.len() <= room {
        return (pods, Pods::new());
    }
    let (own, others): (Vec<_>, Vec<_>) = pods.into_iter().partition(|(_, pod)| pod.ifindex != 0);
    let mut all = own.into_iter().chain(others);
    (all.by_ref().take(room).collect(), all.collect())
}

/// The ranges that fit, those that are there already first, and the others. Without a range within another its addresses would have
/// what only the outer one has: all or nothing.
fn fit_cidrs(cidrs: Cidrs, held: &PolicySnapshot, room: usize) -> (Cidrs, Cidrs) {
    if cidrs.len() <= room {
        return (cidrs, Cidrs::new());
    }
    let mut nests: Vec<Vec<(IpNet, u32)>> = Vec::new();
    for (prefix, class) in cidrs {
        match nests.last_mut() {
            Some(nest) if nest.first().is_some_and(|(outer, _)| outer.contains(&prefix)) => nest.push((prefix, class)),
            _ => nests.push(vec![(prefix, class)]),
        }
    }
    nests.sort_by_key(|nest| nest.first().is_none_or(|(outer, _)| !held.cidrs.contains_key(outer)));
    let mut left = room;
    let fits = |nest: &Vec<(IpNet, u32)>| {
        let has_room = nest.len() <= left;
        left -= if has_room { nest.len() } else { 0 };
        has_room
    };
    let (fitting, left_out): (Vec<_>, Vec<_>) = nests.into_iter().partition(fits);
    let (mut fitting, mut left_out): (Cidrs, Cidrs) =
        (fitting.into_iter().flatten().collect(), left_out.into_iter().flatten().collect());
    // The trie holds IPv4 as mapped, which ranges of IPv6 may contain.
    let mapped = IpAddr::V6(std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped());
    let all_v4 = IpNet::V4(ipnet::Ipv4Net::default());
    if !fitting.contains_key(&all_v4) {
        left_out.extend(fitting.extract_if(.., |prefix, _| prefix.contains(&mapped)));
    }
    (fitting, left_out)
}
