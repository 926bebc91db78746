//! From one state of policies to another while flows are judged.
//!
//! A flow is judged by up to two sets, each against a class, and a write flips one of these four. So a state in between may join an old set
//! with a new class, or one pod's old set with another's new one, which can allow what neither state allows. Where that may be, the
//! way has three legs. Changed addresses get classes for the passage, one for each pair of old and new class, which the old sets treat
//! like the old class. Changed pods get sets for the passage, which allow what the old set and the new set both allow; the sets that stay
//! are narrowed in the same way. Up to here each write only denies. Then all of them are widened to what the new state allows, and each
//! write only allows. Last, all addresses pass to their new classes and sets, which by then mean the same.
//!
//! An entry of a class counts before those of any class. So a row in use is replaced with the longest prefixes first, and what is left of
//! the old one is deleted with the shortest first: each write changes what becomes of some ports from the old to the new.

use super::draft::{Draft, differing, sets_in_use};
use super::rows::{Classes, Row, allows_silently, both, full_row, is_within, own_row, reduce};
use super::{PolicySnapshot, RuleKey};
use ipnet::IpNet;
use rustnet_common::policy::{ANY_CLASS, OPEN, PolicyPod, PolicyRule, flags};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// How much room a passage may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// No flow is denied that both states allow.
    Exact,
    /// Pods of this node that change are closed in between, to new flows.
    CloseChanged,
    /// All pods of this node are closed in between, to new flows.
    CloseAll,
}

/// An old value and a new one.
type Pair = (u32, u32);

/// The writes from what the maps hold to what they should hold. Both are enforced. `judges_again`: known flows are judged again, even if
/// nothing differs.
pub fn pass_over(held: PolicySnapshot, wanted: &PolicySnapshot, care: Care, judges_again: bool) -> Draft {
    let mut draft = Draft::new(held);
    let is_closed = |ip: &IpAddr, old: &PolicyPod| match care {
        Care::Exact => is_gone(wanted, ip, old),
        Care::CloseChanged => wanted.pods.get(ip) != Some(old),
        Care::CloseAll => true,
    };
    // An entry without an interface closes its pod, and others still know its class.
    let local = draft.now().pods.iter().filter(|(_, pod)| pod.ifindex != 0);
    let close = local.filter(|(ip, pod)| is_closed(ip, pod));
    let close: Vec<_> = close.map(|(ip, pod)| (*ip, PolicyPod { class: pod.class, ..PolicyPod::default() })).collect();
    let has_closed = !close.is_empty();
    draft.put_pods(close.into_iter());
    let used = sets_in_use(&draft.now().pods);
    match care {
        Care::Exact => {}
        Care::CloseChanged => {
            draft.delete_rules(|key| !wanted.rules.contains_key(key) && !used.contains(&key.set));
        }
        Care::CloseAll => draft.delete_all_but(wanted),
    }
    let old = draft.now().clone();
    let changes = Changes::new(&old, wanted);
    let needs_new_verdicts = judges_again || has_closed || changes.is_any();
    let passage = changes.need_passage().then(|| Passage::new(&changes, &old, wanted));
    if let Some(passage) = &passage {
        passage.narrow(&mut draft);
        passage.widen(&mut draft);
        let is_stale = |key: &RuleKey| old.rules.contains_key(key) && !wanted.rules.contains_key(key);
        draft.delete_rules(|key| changes.is_dirty(key.set, key.class) && is_stale(key));
    }
    draft.put_rules(&wanted.rules);
    // Pods before ranges: an address that gets an entry must not meet its new range before that.
    let is_known = |ip: &IpAddr, pod: &PolicyPod| pod.ifindex == 0 || is_same(old.pods.get(ip), pod);
    let changed = differing(&draft.now().pods, &wanted.pods).filter_map(|(ip, _, pod)| Some((*ip, *pod?)));
    let known: Vec<_> = changed.filter(|(ip, pod)| is_known(ip, pod)).collect();
    draft.put_pods(known.into_iter());
    draft.put_cidrs(&wanted.cidrs);
    draft.delete_addresses_but(wanted);
    // A new pod must not meet the old class of another; nor must a flow that is judged again.
    draft.put_all_pods(&wanted.pods);
    if needs_new_verdicts {
        draft.put_state(flags::ENFORCED);
    }
    draft.delete_all_but(wanted);
    draft
}

/// True if a pod of this node is none in the new state.
fn is_gone(wanted: &PolicySnapshot, ip: &IpAddr, old: &PolicyPod) -> bool {
    wanted.pods.get(ip).is_none_or(|pod| pod.ifindex == 0) && old.ifindex != 0
}

/// True for the entries of one pod of this node, before and after.
fn is_same(old: Option<&PolicyPod>, new: &PolicyPod) -> bool {
    old.is_some_and(|old| old.ifindex == new.ifindex)
}

/// What differs between two states.
#[derive(Debug, Default)]
struct Changes {
    /// Entries of pods whose class differs, those of other nodes and those that come and go among them.
    pods: BTreeMap<IpAddr, Pair>,
    /// Ranges of either state.
    cidrs: BTreeMap<IpNet, Pair>,
    /// Pods of this node, the same before and after, whose entry differs.
    local: BTreeMap<IpAddr, (PolicyPod, PolicyPod)>,
    /// Classes that go on, with other rules in a set that goes on.
    dirty_classes: BTreeSet<u32>,
    /// Sets that go on, with other rules for any class.
    dirty_sets: BTreeSet<u32>,
    /// An address that had an entry has another class, or has none any more.
    has_other_classes: bool,
    /// The classes of addresses that had no entry: those of their ranges, and those of their pods.
    come: BTreeSet<Pair>,
}

impl Changes {
    fn new(old: &PolicySnapshot, new: &PolicySnapshot) -> Self {
        let mut it = Self::default();
        it.find_dirty(old, new);
        let (old_classes, new_classes) = (Classes::new(old), Classes::new(new));
        if old.cidrs != new.cidrs || !it.dirty_classes.is_empty() {
            for prefix in old.cidrs.keys().chain(new.cidrs.keys()) {
                it.cidrs.insert(*prefix, (old_classes.of_range(*prefix), new_classes.of_range(*prefix)));
            }
        }
        let mut ips: Vec<IpAddr> = differing(&old.pods, &new.pods).map(|(ip, ..)| *ip).collect();
        if !it.is_clean() {
            ips = old.pods.keys().chain(new.pods.keys()).copied().collect::<BTreeSet<IpAddr>>().into_iter().collect();
        }
        for ip in &ips {
            let (before, after) = (old.pods.get(ip), new.pods.get(ip));
            it.has_other_classes |= after.is_none();
            let pair = (old_classes.of(*ip), new_classes.of(*ip));
            if let Some(after) = after.filter(|after| after.ifindex != 0) {
                let Some(before) = before.filter(|before| is_same(Some(before), after)) else {
                    // It is closed up to its last write. Flows to its address from before it was there are judged as others are.
                    it.has_other_classes |= (after.ingress, after.egress) != (OPEN, OPEN);
                    it.come.insert(pair);
                    continue;
                };
                let is_dirty = |set: &u32| it.dirty_sets.contains(set);
                if before != after || [before.ingress, before.egress].iter().any(is_dirty) {
                    it.local.insert(*ip, (*before, *after));
                }
            }
            it.has_other_classes |= before.is_some() && pair.0 != pair.1;
            if before.is_none() && pair.0 != pair.1 {
                it.come.insert(pair);
            }
            if pair.0 != pair.1 || it.dirty_classes.contains(&pair.0) {
                it.pods.insert(*ip, pair);
            }
        }
        it.has_other_classes |= allows_less(old, new, &it.come);
        it
    }

    /// Numbers follow from content, so that this happens only when two contents have one hash, or after an upgrade.
    fn find_dirty(&mut self, old: &PolicySnapshot, new: &PolicySnapshot) {
        let sets = sets_in_use(&old.pods);
        let classes: BTreeSet<u32> =
            new.pods.values().map(|pod| pod.class).chain(new.cidrs.values().copied()).collect();
        let classes_before: BTreeSet<u32> =
            old.pods.values().map(|pod| pod.class).chain(old.cidrs.values().copied()).collect();
        let kept = sets.intersection(&sets_in_use(&new.pods)).copied().collect::<BTreeSet<u32>>();
        let mut note = |set: u32, class: u32| {
            if !kept.contains(&set) {
            } else if class == ANY_CLASS {
                self.dirty_sets.insert(set);
            } else if classes.contains(&class) && classes_before.contains(&class) {
                self.dirty_classes.insert(class);
            }
        };
        // The names of rules may differ: only what they do counts.
        let effect = |rule: Option<&PolicyRule>| rule.map(|rule| rule.flags);
        let other = differing(&old.rules, &new.rules).filter(|(_, before, after)| effect(*before) != effect(*after));
        other.for_each(|(key, ..)| note(key.set, key.class));
    }

    /// True if a flow that is known may be judged otherwise now. A pod that merely comes has none, but for those of its address before
    /// it was known.
    fn is_any(&self) -> bool {
        let has_other_ranges = self.cidrs.values().any(|(old, new)| old != new);
        self.has_other_classes || has_other_ranges || !self.local.is_empty() || !self.is_clean()
    }

    fn is_clean(&self) -> bool {
        self.dirty_sets.is_empty() && self.dirty_classes.is_empty()
    }

    fn is_dirty(&self, set: u32, class: u32) -> bool {
        self.dirty_sets.contains(&set) || self.dirty_classes.contains(&class)
    }

    /// True unless each flow is flipped by one write alone.
    fn need_passage(&self) -> bool {
        let of_family = |is_v4: bool| self.local.keys().filter(|ip| ip.is_ipv4() == is_v4).count();
        let has_other_sets =
            |(old, new): &(PolicyPod, PolicyPod)| (old.ingress, old.egress) != (new.ingress, new.egress);
        let elsewhere = self.pods.keys().any(|ip| !self.local.contains_key(ip));
        let has_other_classes = elsewhere || self.cidrs.values().any(|(old, new)| old != new);
        let moves = of_family(true) > 1 || of_family(false) > 1;
        moves || (has_other_classes && self.local.values().any(has_other_sets)) || !self.is_clean()
    }
}

/// True if a set of both states allows less to an address with an entry now than it did without. Mostly a pod that comes is allowed
/// more than its range. A set that denies may say otherwise. `come`: the classes of ranges and of pods in them.
pub fn allows_less(old: &PolicySnapshot, new: &PolicySnapshot, come: &BTreeSet<Pair>) -> bool {
    if come.is_empty() {
        return false;
    }
    let used = sets_in_use(&old.pods);
    let is_kept = |set: &u32, (old_class, new_class): &Pair| {
        is_within(&full_row(old, *set, *old_class), &full_row(new, *set, *new_class), allows_silently)
    };
    used.intersection(&sets_in_use(&new.pods)).any(|set| !come.iter().all(|pair| is_kept(set, pair)))
}

/// Classes and sets in between.
struct Passage<'a> {
    changes: &'a Changes,
    old: &'a PolicySnapshot,
    new: &'a PolicySnapshot,
    /// Classes for the passage of each changed class.
    classes: BTreeMap<Pair, u32>,
    /// All classes while addresses pass, with what they were and will be.
    mids: BTreeMap<u32, Pair>,
    /// Sets for the passage of each changed set.
    sets: BTreeMap<Pair, u32>,
    /// Sets of pods before.
    used: BTreeSet<u32>,
    /// Those that pods go on to have.
    kept: BTreeSet<u32>,
}

impl<'a> Passage<'a> {
    fn new(changes: &'a Changes, old: &'a PolicySnapshot, new: &'a PolicySnapshot) -> Self {
        let both = [old, new];
        let known_classes = both.iter().flat_map(|it| {
            let of_rules = it.rules.keys().map(|key| key.class);
            it.pods.values().map(|pod| pod.class).chain(it.cidrs.values().copied()).chain(of_rules)
        });
        let mut taken: BTreeSet<u32> = known_classes.collect();
        let mut steady = taken.clone();
        steady.insert(ANY_CLASS);
        let moved = |pair: &&Pair| pair.0 != pair.1 || changes.dirty_classes.contains(&pair.0);
        let pairs: BTreeSet<Pair> =
            changes.pods.values().chain(changes.cidrs.values()).filter(moved).copied().collect();
        let classes = pairs.into_iter().map(|pair| (pair, take_number(pair, &mut taken))).collect::<BTreeMap<_, _>>();
        steady.retain(|class| !changes.dirty_classes.contains(class));
        let mut mids: BTreeMap<u32, Pair> = steady.into_iter().map(|class| (class, (class, class))).collect();
        mids.extend(classes.iter().map(|(pair, class)| (*class, *pair)));

        let known_sets = both.iter().flat_map(|it| it.rules.keys().map(|key| key.set).chain(sets_in_use(&it.pods)));
        let mut taken: BTreeSet<u32> = known_sets.collect();
        let of_pod = |(old, new): &(PolicyPod, PolicyPod)| [(old.ingress, new.ingress), (old.egress, new.egress)];
        let moved = |pair: &Pair| pair.0 != pair.1 || changes.dirty_sets.contains(&pair.0);
        let pairs: BTreeSet<Pair> = changes.local.values().flat_map(of_pod).filter(moved).collect();
        let sets = pairs.into_iter().map(|pair| (pair, take_number(pair, &mut taken))).collect();
        let used = sets_in_use(&old.pods);
        let kept = used.intersection(&sets_in_use(&new.pods)).copied().collect();
        Self { changes, old, new, classes, mids, sets, used, kept }
    }

    /// From what the old state allows to what both allow.
    fn narrow(&self, draft: &mut Draft) {
        for (pair, class) in &self.classes {
            for set in &self.used {
                draft.put_row(*set, *class, &own_row(self.old, *set, pair.0));
            }
        }
        let classes = self.changes.pods.iter().map(|(ip, pair)| {
            let pod = self.old.pods.get(ip).copied().unwrap_or_default();
            (*ip, PolicyPod { class: self.class(*pair), ..pod })
        });
        draft.put_pods(classes);
        draft.put_cidrs(&self.changes.cidrs.iter().map(|(prefix, pair)| (*prefix, self.class(*pair))).collect());
        for (pair, set) in &self.sets {
            let of_both = self.any_of_both(*pair);
            for (class, of) in &self.mids {
                let row = both(&full_row(self.old, pair.0, of.0), &full_row(self.new, pair.1, of.1));
                let any: &[&Row] = if *class == ANY_CLASS { &[] } else { &[&of_both] };
                draft.put_row(*set, *class, &reduce(&row, any));
            }
        }
        let sets = self.changes.local.iter().map(|(ip, (old, new))| {
            let set = |old: u32, new: u32| self.sets.get(&(old, new)).copied().unwrap_or(old);
            let class = self.changes.pods.get(ip).map_or(old.class, |pair| self.class(*pair));
            let (ingress, egress) = (set(old.ingress, new.ingress), set(old.egress, new.egress));
            (*ip, PolicyPod { class, ingress, egress, ifindex: old.ifindex })
        });
        draft.put_pods(sets);
        for (pair, class) in &self.classes {
            for set in &self.kept {
                let row = both(&full_row(self.old, *set, pair.0), &full_row(self.new, *set, pair.1));
                draft.replace_row(*set, *class, &reduce(&row, &[&own_row(self.old, *set, ANY_CLASS)]));
            }
        }
    }

    /// What a set for the passage says of any class while less is allowed.
    fn any_of_both(&self, (old, new): Pair) -> Row {
        both(&full_row(self.old, old, ANY_CLASS), &full_row(self.new, new, ANY_CLASS))
    }

    /// From what both states allow to what the new one allows, and to all that its sets and classes meet on the rest of the way.
    fn widen(&self, draft: &mut Draft) {
        let sets: BTreeSet<u32> = sets_in_use(&self.new.pods);
        for (pair, class) in &self.classes {
            for set in &sets {
                draft.replace_row(*set, *class, &own_row(self.new, *set, pair.1));
            }
        }
        for (pair, set) in &self.sets {
            // A class must not meet what any may do before it has its own rules, which hold before that and after.
            let (before, after) = (self.any_of_both(*pair), own_row(self.new, pair.1, ANY_CLASS));
            for (class, of) in self.mids.iter().filter(|(class, _)| **class != ANY_CLASS) {
                draft.replace_row(*set, *class, &reduce(&full_row(self.new, pair.1, of.1), &[&before, &after]));
            }
            draft.replace_row(*set, ANY_CLASS, &after);
            for class in &self.changes.dirty_classes {
                draft.put_row(*set, *class, &own_row(self.new, pair.1, *class));
            }
        }
    }

    fn class(&self, pair: Pair) -> u32 {
        self.classes.get(&pair).copied().unwrap_or(pair.0)
    }
}

/// A number for the passage of a pair that nothing else has. The greatest one stands for undecided pods in the programs.
fn take_number(pair: Pair, taken: &mut BTreeSet<u32>) -> u32 {
    let mut number = pair.0.rotate_left(16) ^ pair.1.wrapping_mul(0x9e37_79b1);
    while number == ANY_CLASS || number == u32::MAX || !taken.insert(number) {
        number = number.wrapping_add(1);
    }
    number
}
