//! From pods, namespaces and network policies to the desired maps of policies. Pure.
//!
//! `groups` has which selectors in use hold for which pods, `spans` which ranges hold for which addresses; both make `classes`. `sets`
//! are what policies say for pods of this node, and `rules` what sets say of classes. In use is what policies that select a pod of
//! this node ask for. `ids` gives numbers that the next start gives again. `parts` is what stays while pods of other nodes come and go.

mod classes;
mod desired;
mod groups;
mod ids;
mod parts;
mod rules;
mod sets;
mod spans;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub mod world;

pub use desired::{ClassName, DesiredPolicies, PortPrefix, RuleKey};
pub use parts::PodChanges;

use crate::model::{ClusterNetworkPolicy, Labels, Namespace, NetworkPolicy, Node, ObjectName, Pod};
use classes::Classes;
use groups::{GroupId, Groups};
use ids::{ContentHash, numbers};
use parts::Parts;
use rules::Compiler;
use rustnet_common::policy::{OPEN, PolicyPod};
pub use sets::CLUSTER_KIND;
use sets::{Direction, Selecting, Set, SetPort, Side};
use spans::{Region, Span, Spans};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// All that policies depend on.
#[derive(Debug)]
pub struct Policies {
    node_name: Arc<str>,
    objects: BTreeMap<ObjectName, Arc<NetworkPolicy>>,
    cluster: BTreeMap<ObjectName, Arc<ClusterNetworkPolicy>>,
    nodes: BTreeMap<ObjectName, Arc<Node>>,
    namespaces: BTreeMap<Arc<str>, Labels>,
    /// Those in which the Admin tier alone denies.
    audited: BTreeSet<Arc<str>>,
    /// The pods that count: those with addresses of their own, and those of this node that may get some.
    pods: BTreeMap<ObjectName, Member>,
    /// Who has an address: more than one pod while the news of a reused address is incomplete.
    claims: BTreeMap<IpAddr, Vec<Claim>>,
    /// Addresses of this node's pods, with the interface of each.
    interfaces: BTreeMap<IpAddr, LocalInterface>,
    groups: Groups,
    spans: Spans,
    spans_in_use: BTreeSet<Span>,
    /// Nodes are other than when the spans were made.
    has_other_nodes: bool,
    is_dirty: bool,
    /// The state that was worked out last; `None`: more has changed since than pods of other nodes.
    parts: Option<Parts>,
}

/// The interface of a pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalInterface {
    /// Its index on the host's side, as `rn_endpoints` has it.
    pub ifindex: u32,
    /// Whose it is, as the record of it says; `None`: that of the one pod that has the address. With a name the pod is known before
    /// its object has addresses: the kubelet writes them only after the pod is connected.
    pub pod: Option<ObjectName>,
    /// UID of that pod; empty: not known. A pod of the same name may have been there before.
    pub uid: Box<str>,
}

/// A pod that counts.
#[derive(Debug, PartialEq)]
struct Member {
    /// Of pods of this node alone.
    uid: Arc<str>,
    addresses: Box<[IpAddr]>,
    claim: Claim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Claim {
    group: GroupId,
    /// The pod is on this node.
    is_local: bool,
}

/// Sets of the pods of a group; `None`: all may pass.
#[derive(Clone, Copy, Default)]
struct Sets {
    ingress: Option<usize>,
    egress: Option<usize>,
}

impl Policies {
    /// Nothing, for the node of this name.
    pub fn new(node_name: Arc<str>) -> Self {
        Self {
            node_name,
            objects: BTreeMap::new(),
            cluster: BTreeMap::new(),
            nodes: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            audited: BTreeSet::new(),
            pods: BTreeMap::new(),
            claims: BTreeMap::new(),
            interfaces: BTreeMap::new(),
            groups: Groups::default(),
            spans: Spans::default(),
            spans_in_use: BTreeSet::new(),
            has_other_nodes: false,
            is_dirty: true,
            parts: None,
        }
    }

    /// A pod is there, or is other than before.
    pub fn apply_pod(&mut self, pod: &Pod) {
        let is_local = pod.node == self.node_name;
        if pod.host_network || (pod.addresses.is_empty() && !is_local) {
            return self.delete_pod(&pod.name);
        }
        // Joined before the old one leaves, so that an unchanged group stays known.
        let namespace = namespace_of(&pod.name);
        let claim = Claim { group: self.groups.join(namespace, pod), is_local };
        let uid = if is_local { Arc::clone(&pod.uid) } else { Arc::default() };
        let member = Member { uid, addresses: pod.addresses.clone(), claim };
        if self.pods.get(&pod.name) == Some(&member) {
            return self.groups.leave(claim.group);
        }
        self.delete_pod(&pod.name);
        for ip in &member.addresses {
            self.claims.entry(*ip).or_default().push(claim);
        }
        self.pod_changed(is_local, &member.addresses);
        self.pods.insert(pod.name.clone(), member);
    }

    /// A pod is gone.
    pub fn delete_pod(&mut self, name: &ObjectName) {
        let Some(Member { addresses, claim, .. }) = self.pods.remove(name) else { return };
        for ip in &addresses {
            let Some(claims) = self.claims.get_mut(ip) else { continue };
            if let Some(place) = claims.iter().position(|it| *it == claim) {
                claims.remove(place);
            }
            if claims.is_empty() {
                self.claims.remove(ip);
            }
        }
        self.groups.leave(claim.group);
        self.pod_changed(claim.is_local, &addresses);
    }

    /// A namespace is there, or is other than before.
    pub fn apply_namespace(&mut self, namespace: &Namespace) {
        let name = namespace.name.as_str();
        if self.namespaces.get(name) != Some(&namespace.labels) {
            self.namespaces.insert(name.into(), namespace.labels.clone());
            self.groups.namespace_changed(name);
            self.changed();
        }
        self.set_audited(name, namespace.is_audited);
    }

    fn set_audited(&mut self, name: &str, is_audited: bool) {
        let is_other = if is_audited { self.audited.insert(name.into()) } else { self.audited.remove(name) };
        if is_other {
            self.changed();
        }
    }

    /// A namespace is gone.
    pub fn delete_namespace(&mut self, name: &ObjectName) {
        self.set_audited(name.as_str(), false);
        if self.namespaces.remove(name.as_str()).is_some() {
            self.groups.namespace_changed(name.as_str());
            self.changed();
        }
    }

    /// A policy is there, or is other than before.
    pub fn apply_policy(&mut self, policy: &Arc<NetworkPolicy>) {
        if self.objects.get(&policy.name) != Some(policy) {
            self.objects.insert(policy.name.clone(), Arc::clone(policy));
            self.changed();
        }
    }

    /// A policy is there of which only the name is known. What it was before stays; else it selects all pods of its namespace, and
    /// allows nothing.
    pub fn close_for_unknown(&mut self, name: &ObjectName) {
        if !self.objects.contains_key(name) {
            self.apply_policy(&Arc::new(NetworkPolicy::closing(name.clone())));
        }
    }

    /// A policy is gone.
    pub fn delete_policy(&mut self, name: &ObjectName) {
        if self.objects.remove(name).is_some() {
            self.all_changed();
        }
    }

    /// A policy of the cluster is there, or is other than before.
    pub fn apply_cluster_policy(&mut self, policy: &Arc<ClusterNetworkPolicy>) {
        if self.cluster.get(&policy.name) != Some(policy) {
            self.cluster.insert(policy.name.clone(), Arc::clone(policy));
            self.changed();
        }
    }

    /// A policy of the cluster is gone.
    pub fn delete_cluster_policy(&mut self, name: &ObjectName) {
        if self.cluster.remove(name).is_some() {
            self.all_changed();
        }
    }

    /// A node is there, or is other than before. Policies of the cluster alone ask for nodes.
    pub fn apply_node(&mut self, node: &Arc<Node>) {
        let facts = |node: &Arc<Node>| {
            let Node { addresses, other_addresses, labels, pod_cidrs, .. } = &**node;
            (addresses.clone(), other_addresses.clone(), labels.clone(), pod_cidrs.clone())
        };
        let before = self.nodes.insert(node.name.clone(), Arc::clone(node));
        if before.as_ref().map(facts) != Some(facts(node)) {
            self.nodes_changed();
        }
    }

    /// A node is gone.
    pub fn delete_node(&mut self, name: &ObjectName) {
        if self.nodes.remove(name).is_some() {
            self.nodes_changed();
        }
    }

    /// Takes in the interfaces of this node's pods, by address.
    pub fn set_interfaces(&mut self, interfaces: BTreeMap<IpAddr, LocalInterface>) {
        if self.interfaces != interfaces {
            self.interfaces = interfaces;
            self.changed();
        }
    }

    /// True if the desired maps may be others than at the last call.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.is_dirty)
    }

    /// Names of the pods that count.
    pub fn pod_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.pods.keys()
    }

    /// The pods that count: name and addresses.
    pub fn pods(&self) -> impl Iterator<Item = (&ObjectName, &[IpAddr])> {
        self.pods.iter().map(|(name, pod)| (name, &*pod.addresses))
    }

    /// Names of all namespaces.
    pub fn namespace_names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        self.namespaces.keys().map(|name| ObjectName::cluster(name))
    }

    /// True if there are policies of the cluster.
    pub fn has_cluster_policies(&self) -> bool {
        !self.cluster.is_empty()
    }

    /// Names of all policies of the cluster.
    pub fn cluster_policy_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.cluster.keys()
    }

    /// Names of all NetworkPolicies.
    pub fn policy_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.objects.keys()
    }

    /// The maps as they should be.
    pub fn desired(&mut self) -> DesiredPolicies {
        if !self.has_policies() {
            return DesiredPolicies::default();
        }
        let local = self.local_pods();
        let (sets, sets_of) = self.sets(&local);
        let has_doubts = sets.iter().any(Set::has_doubts);
        self.use_what_is_asked(&sets, has_doubts);
        let names = sets.iter().flat_map(|set| &set.rules).flat_map(|rule| &rule.ports).filter_map(|port| match port {
            SetPort::Named(name, proto) => Some((Arc::clone(name), *proto)),
            SetPort::Prefix(_) => None,
        });
        let mut classes = Classes::new(&self.groups, &self.spans, names.collect(), has_doubts);
        let set_hashes: Vec<u64> = sets.iter().map(Set::hash).collect();
        let set_numbers = numbers(&set_hashes);
        let number = |place: Option<usize>| place.map_or(OPEN, |place| set_numbers[place]);

        let mut pods = Vec::new();
        for (ip, (group, ifindex)) in &local {
            let place = classes.of_pod(*group, self.spans.region(*ip));
            let Sets { ingress, egress } = sets_of.get(group).copied().unwrap_or_default();
            pods.push((*ip, place, number(ingress), number(egress), *ifindex));
        }
        // Of an address of this node without a pod nobody knows whose it is: closed.
        let mut elsewhere: HashMap<(GroupId, Region), Option<usize>> = HashMap::new();
        for (ip, claims) in self.claims.iter().filter(|(ip, _)| !self.interfaces.contains_key(ip)) {
            let region = self.spans.region(*ip);
            let place = match &claims[..] {
                [Claim { group, .. }] => {
                    *elsewhere.entry((*group, region)).or_insert_with(|| classes.of_pod_elsewhere(*group, region))
                }
                claims => class_of_claims(&mut classes, region, claims),
            };
            pods.extend(place.map(|place| (*ip, place, OPEN, OPEN, 0)));
        }
        let cidrs: Vec<_> = self.spans.prefixes().map(|(prefix, region)| (prefix, classes.of_region(region))).collect();

        let class_numbers = classes.numbers();
        let mut desired = DesiredPolicies { is_enforced: true, ..DesiredPolicies::default() };
        let pod = |(ip, place, ingress, egress, ifindex)| {
            let class = class_numbers[place];
            (ip, PolicyPod { class, ingress, egress, ifindex })
        };
        desired.pods = pods.into_iter().map(pod).collect();
        desired.cidrs = cidrs.into_iter().map(|(prefix, place)| (prefix, class_numbers[place])).collect();
        desired.rule_names = rule_names(&sets);
        desired.class_names = class_numbers.iter().copied().zip(classes.names()).skip(1).collect();
        let rule_numbers: HashMap<&str, u32> =
            desired.rule_names.iter().map(|(number, name)| (&**name, *number)).collect();
        let holders = classes.holders();
        let classes_of = |side: &Side| {
            let places = match side {
                Side::Pods(peer) => self.groups.peer(peer).and_then(|id| holders.peers.get(&id)),
                Side::Span(span) => self.spans.number(span).and_then(|number| holders.spans.get(&number)),
            };
            places.map_or(&[][..], |places| places)
        };
        let doubted_of = |side: &Side| {
            let places = match side {
                Side::Pods(peer) => self.groups.peer(peer).and_then(|id| holders.doubted.get(&id)),
                Side::Span(_) => None,
            };
            places.map_or(&[][..], |places| places)
        };
        let compiler =
            Compiler { holders: &holders, classes: &class_numbers, classes_of: &classes_of, doubted_of: &doubted_of };
        let mut rules = Vec::new();
        for (set, number) in sets.iter().zip(&set_numbers) {
            let of_rule = |rule: &sets::SetRule| rule_numbers.get(&*rule.name).copied().unwrap_or_default();
            let numbers: Vec<u32> = set.rules.iter().map(of_rule).collect();
            rules.append(&mut compiler.compile(*number, set, &numbers));
        }
        desired.rules = rules.into_iter().collect();
        desired.sets = sets.into_iter().zip(set_numbers).map(|(set, number)| (number, set.policies)).collect();
        let number = |place: Option<usize>| place.map(|place| class_numbers[place]);
        let elsewhere = elsewhere.into_iter().map(|(group, place)| (group, number(place))).collect();
        self.parts = Some(Parts::new(elsewhere, &desired));
        desired
    }

    /// The entries that have to be others in the maps that [`Self::desired`] wanted, and [`Self::changes`] since; `before`: the classes
    /// of other nodes' pods in these. `None`: all has to be worked out.
    pub fn changes(&mut self, before: impl Fn(IpAddr) -> Option<u32>) -> Option<PodChanges> {
        let mut parts = self.parts.take()?;
        let group = |ip: IpAddr| match self.claims.get(&ip).map_or(&[][..], |claims| claims) {
            _ if self.interfaces.contains_key(&ip) => None,
            [] => Some(None),
            [claim] => Some(Some((claim.group, self.spans.region(ip)))),
            // What two pods are is none's class.
            _ => None,
        };
        let changes = parts.changes(before, group)?;
        self.parts = Some(parts);
        Some(changes)
    }

    /// While there is no policy, nothing depends on the rest.
    fn changed(&mut self) {
        if self.has_policies() {
            self.all_changed();
        }
    }

    fn all_changed(&mut self) {
        self.is_dirty = true;
        self.parts = None;
    }

    fn nodes_changed(&mut self) {
        self.has_other_nodes = true;
        if self.has_cluster_policies() {
            self.all_changed();
        }
    }

    /// A pod with these addresses has come, gone or changed.
    fn pod_changed(&mut self, is_local: bool, addresses: &[IpAddr]) {
        match &mut self.parts {
            Some(parts) if !is_local => {
                parts.touched.extend(addresses);
                self.is_dirty |= self.has_policies();
            }
            _ => self.changed(),
        }
    }

    fn has_policies(&self) -> bool {
        !(self.objects.is_empty() && self.cluster.is_empty())
    }

    /// The pods of this node that are known with their interface: group and interface by address. While there are policies of the
    /// cluster, which ones select a pod depends on its namespace.
    fn local_pods(&self) -> BTreeMap<IpAddr, (GroupId, u32)> {
        let has_namespace = |group: &GroupId| {
            self.cluster.is_empty()
                || self.groups.key(*group).is_some_and(|key| self.namespaces.contains_key(&key.namespace))
        };
        let group = |ip: &IpAddr, interface: &LocalInterface| {
            let Some(name) = &interface.pod else { return self.only_claim(ip) };
            let has_uid = |pod: &Member| [&*pod.uid, &interface.uid].contains(&"") || *pod.uid == *interface.uid;
            let is_it = |pod: &&Member| pod.claim.is_local && has_uid(pod);
            self.pods.get(name).filter(is_it).map(|pod| pod.claim.group)
        };
        let group = |ip, interface| group(ip, interface).filter(has_namespace);
        let known = self.interfaces.iter().filter_map(|(ip, it)| Some((*ip, (group(ip, it)?, it.ifindex))));
        known.collect()
    }

    /// The group of the one pod of this node that has an address. While two have it, what is allowed to either is not known.
    fn only_claim(&self, ip: &IpAddr) -> Option<GroupId> {
        let mut local = self.claims.get(ip)?.iter().filter(|claim| claim.is_local);
        let claim = local.next()?;
        local.next().is_none().then_some(claim.group)
    }

    /// The sets of this node's pods, and which of them each group has.
    fn sets(&self, local: &BTreeMap<IpAddr, (GroupId, u32)>) -> (Vec<Set>, HashMap<GroupId, Sets>) {
        let mut cluster: Vec<&ClusterNetworkPolicy> = self.cluster.values().map(|policy| &**policy).collect();
        cluster.sort_by_key(|policy| (policy.tier, policy.priority, &policy.name));
        let mut sets: Vec<Set> = Vec::new();
        let mut places: HashMap<Set, usize> = HashMap::new();
        let mut of_group = HashMap::new();
        for (group, _) in local.values() {
            let Some(key) = self.groups.key(*group).filter(|_| !of_group.contains_key(group)) else { continue };
            let labels = self.namespaces.get(&key.namespace);
            let is_subject = |policy: &&&ClusterNetworkPolicy| {
                let subject = policy.subject.as_ref().zip(labels);
                subject.is_some_and(|(it, labels)| it.namespaces.is_met(labels) && it.pods.is_met(&key.labels))
            };
            let selecting = Selecting {
                namespaced: self.of_namespace(&key.namespace).filter(|it| it.selector.is_met(&key.labels)).collect(),
                cluster: cluster.iter().filter(is_subject).copied().collect(),
                is_audited: self.audited.contains(&key.namespace),
            };
            let mut set = |direction| {
                let set = Set::new(direction, &selecting, key)?;
                Some(*places.entry(set).or_insert_with_key(|set| {
                    sets.push(set.clone());
                    sets.len() - 1
                }))
            };
            let its = Sets { ingress: set(Direction::Ingress), egress: set(Direction::Egress) };
            of_group.insert(*group, its);
        }
        (sets, of_group)
    }

    /// The NetworkPolicies of a namespace. The others are far more.
    fn of_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a NetworkPolicy> {
        let from = ObjectName::namespaced(namespace, "");
        let all = self.objects.range(from..).take_while(move |(name, _)| namespace_of(name) == namespace);
        all.map(|(_, policy)| &**policy)
    }

    /// Looks for the selectors and ranges of these sets, and for no others.
    fn use_what_is_asked(&mut self, sets: &[Set], has_doubts: bool) {
        let (mut peers, mut spans) = (BTreeSet::new(), BTreeSet::new());
        spans.extend(has_doubts.then_some(Span::PodRanges));
        for side in sets.iter().flat_map(|set| &set.rules).filter_map(|rule| rule.sides.as_ref()).flatten() {
            match side {
                Side::Pods(peer) => drop(peers.insert(peer.clone())),
                Side::Span(span) => drop(spans.insert(span.clone())),
            }
        }
        self.groups.set_peers(&peers, &self.namespaces);
        if self.spans_in_use != spans || std::mem::take(&mut self.has_other_nodes) {
            self.spans = Spans::new(spans.clone(), &self.nodes.values().map(|node| &**node));
            self.spans_in_use = spans;
        }
    }
}

/// The class of an address that several pods claim; `None` if it needs no entry.
fn class_of_claims(classes: &mut Classes<'_>, region: Region, claims: &[Claim]) -> Option<usize> {
    let groups: Vec<GroupId> = claims.iter().map(|claim| claim.group).collect();
    let place = classes.of_all(&groups, region);
    (!classes.is_plain(place)).then_some(place)
}

/// A number for the name of each rule.
fn rule_names(sets: &[Set]) -> BTreeMap<u32, Box<str>> {
    let names: BTreeSet<&str> = sets.iter().flat_map(|set| &set.rules).map(|rule| &*rule.name).collect();
    let hashes: Vec<u64> = names.iter().map(|name| ContentHash::of(name)).collect();
    numbers(&hashes).into_iter().zip(names).map(|(number, name)| (number, name.into())).collect()
}

/// The namespace in the name of an object that has one.
fn namespace_of(name: &ObjectName) -> &str {
    name.as_str().split_once('/').map_or("", |(namespace, _)| namespace)
}
