//! Groups of pods that no policy can tell apart, and which of the selectors in use hold for each.
//!
//! Replicas of a workload are one group, so that a cluster has far fewer groups than pods. What is known of a group stays until its
//! namespace changes or a selector comes or goes: an event of a pod asks no selector of others.

use super::ids::ContentHash;
use crate::model::{Labels, NAME_LABEL, NamedPort, Pod, Selector};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Pods that a rule selects: the namespace part and the pod part together.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodPeer {
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Labels of the pods.
    pub pods: Selector,
}

/// Namespaces that a rule selects.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Namespaces {
    /// That of the policy.
    Own(Arc<str>),
    /// Those with such labels.
    Selected(Selector),
}

impl PodPeer {
    /// The hash of its canonical text.
    pub fn hash(&self) -> u64 {
        let text = match &self.namespaces {
            Namespaces::Own(name) => format!("pods of {name} with {}", self.pods),
            Namespaces::Selected(selector) => format!("pods of namespaces with {selector} with {}", self.pods),
        };
        ContentHash::of(&text)
    }

    /// A text for people.
    pub fn text(&self) -> String {
        let namespaces = match &self.namespaces {
            Namespaces::Own(name) => name.to_string(),
            Namespaces::Selected(selector) if selector.requirements().is_empty() => "all namespaces".to_owned(),
            Namespaces::Selected(selector) => format!("namespaces with {selector}"),
        };
        match &self.pods {
            all if all.requirements().is_empty() => format!("pods of {namespaces}"),
            selector => format!("pods of {namespaces} with {selector}"),
        }
    }

    /// Whether it selects this namespace. `labels`: of the namespace; `None`: it has not come yet, and only its name is known.
    fn has_namespace(&self, name: &Arc<str>, labels: Option<&Labels>) -> Holds {
        let is = |holds| if holds { Holds::Yes } else { Holds::No };
        match (&self.namespaces, labels) {
            (Namespaces::Own(own), _) => is(own == name),
            (Namespaces::Selected(selector), Some(labels)) => is(selector.is_met(labels)),
            (Namespaces::Selected(selector), None) => {
                let labels = Labels::from_iter([(NAME_LABEL.into(), Arc::clone(name))]);
                let (of_name, others): (Vec<_>, Vec<_>) =
                    selector.requirements().iter().partition(|it| it.key() == NAME_LABEL);
                match (of_name.iter().all(|it| it.is_met(&labels)), others.is_empty()) {
                    (false, _) => Holds::No,
                    (true, true) => Holds::Yes,
                    (true, false) => Holds::Perhaps,
                }
            }
        }
    }
}

/// All that policies may ask of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupKey {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its labels.
    pub labels: Labels,
    /// Its named ports.
    pub ports: Box<[NamedPort]>,
}

impl GroupKey {
    /// The number of a named port.
    pub fn port(&self, name: &str, proto: u8) -> Option<u16> {
        let is_asked = |port: &&NamedPort| *port.name == *name && port.proto == proto;
        self.ports.iter().find(is_asked).map(|port| port.port)
    }
}

/// Number of a group.
pub type GroupId = u32;
/// Number of a selector in use.
pub type PeerId = u32;

/// A selector in use.
#[derive(Clone, Copy, Debug)]
struct Known {
    id: PeerId,
    hash: u64,
}

#[derive(Debug)]
struct Group {
    key: Arc<GroupKey>,
    pods: usize,
    /// The selectors in use that hold, in order.
    held: Vec<PeerId>,
    /// Those that may hold: the labels of the namespace are not known.
    doubted: Vec<PeerId>,
}

/// Whether a selector holds for a group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Yes,
    /// The labels of the namespace are not known.
    Perhaps,
    No,
}

/// All groups, and all selectors in use.
#[derive(Debug, Default)]
pub struct Groups {
    ids: HashMap<Arc<GroupKey>, GroupId>,
    known: BTreeMap<GroupId, Group>,
    of_namespace: BTreeMap<Arc<str>, BTreeSet<GroupId>>,
    peers: BTreeMap<PodPeer, Known>,
    /// Groups that have not been asked since they came or their namespace changed.
    pending: BTreeSet<GroupId>,
    next_group: GroupId,
    next_peer: PeerId,
}

impl Groups {
    /// A pod is there. Gives its group.
    pub fn join(&mut self, namespace: &str, pod: &Pod) -> GroupId {
        let namespace =
            self.of_namespace.get_key_value(namespace).map_or_else(|| namespace.into(), |(it, _)| Arc::clone(it));
        let key = GroupKey { namespace, labels: pod.labels.clone(), ports: pod.ports.clone() };
        if let Some((id, group)) = self.ids.get(&key).and_then(|id| Some((id, self.known.get_mut(id)?))) {
            group.pods += 1;
            return *id;
        }
        let (id, key) = (self.next_group, Arc::new(key));
        self.next_group += 1;
        self.of_namespace.entry(Arc::clone(&key.namespace)).or_default().insert(id);
        self.ids.insert(Arc::clone(&key), id);
        self.known.insert(id, Group { key, pods: 1, held: Vec::new(), doubted: Vec::new() });
        self.pending.insert(id);
        id
    }

    /// A pod of a group is gone.
    pub fn leave(&mut self, id: GroupId) {
        let Some(group) = self.known.get_mut(&id) else { return };
        group.pods -= 1;
        if group.pods > 0 {
            return;
        }
        let key = Arc::clone(&group.key);
        self.known.remove(&id);
        self.ids.remove(&key);
        self.pending.remove(&id);
        if let Some(all) = self.of_namespace.get_mut(&key.namespace) {
            all.remove(&id);
            if all.is_empty() {
                self.of_namespace.remove(&key.namespace);
            }
        }
    }

    /// The labels of a namespace may be others.
    pub fn namespace_changed(&mut self, name: &str) {
        self.pending.extend(self.of_namespace.get(name).into_iter().flatten());
    }

    /// Takes in which selectors are in use, and asks what has not been asked.
    pub fn set_peers(&mut self, wanted: &BTreeSet<PodPeer>, namespaces: &BTreeMap<Arc<str>, Labels>) {
        let gone = self.peers.extract_if(.., |peer, _| !wanted.contains(peer));
        let gone: BTreeSet<PeerId> = gone.map(|(_, known)| known.id).collect();
        if !gone.is_empty() {
            for group in self.known.values_mut() {
                group.held.retain(|id| !gone.contains(id));
                group.doubted.retain(|id| !gone.contains(id));
            }
        }
        let pending = std::mem::take(&mut self.pending);
        for id in pending {
            let Some(group) = self.known.get_mut(&id) else { continue };
            let labels = namespaces.get(&group.key.namespace);
            let key = &group.key;
            let of = |wanted| {
                let holds = |peer: &PodPeer| {
                    peer.has_namespace(&key.namespace, labels) == wanted && peer.pods.is_met(&key.labels)
                };
                let mut ids: Vec<PeerId> =
                    self.peers.iter().filter(|(peer, _)| holds(peer)).map(|(_, known)| known.id).collect();
                ids.sort_unstable();
                ids
            };
            (group.held, group.doubted) =
                (of(Holds::Yes), if labels.is_none() { of(Holds::Perhaps) } else { Vec::new() });
        }
        for peer in wanted {
            if self.peers.contains_key(peer) {
                continue;
            }
            // Greater than all: the lists stay in order.
            let id = self.next_peer;
            self.next_peer += 1;
            for (name, groups) in &self.of_namespace {
                let holds = peer.has_namespace(name, namespaces.get(name));
                for group in groups.iter().filter(|_| holds != Holds::No) {
                    let group = self.known.get_mut(group).filter(|group| peer.pods.is_met(&group.key.labels));
                    let Some(group) = group else { continue };
                    if holds == Holds::Yes { &mut group.held } else { &mut group.doubted }.push(id);
                }
            }
            self.peers.insert(peer.clone(), Known { id, hash: peer.hash() });
        }
    }

    /// The selectors in use with the hash of each.
    pub fn hashes(&self) -> impl Iterator<Item = (PeerId, u64)> {
        self.peers.values().map(|known| (known.id, known.hash))
    }

    /// The selectors in use with the number of each, in order.
    pub fn peers(&self) -> impl Iterator<Item = (&PodPeer, PeerId)> {
        self.peers.iter().map(|(peer, known)| (peer, known.id))
    }

    /// The number of a selector in use.
    pub fn peer(&self, peer: &PodPeer) -> Option<PeerId> {
        self.peers.get(peer).map(|known| known.id)
    }

    /// All that policies may ask of the pods of a group.
    pub fn key(&self, id: GroupId) -> Option<&Arc<GroupKey>> {
        self.known.get(&id).map(|group| &group.key)
    }

    /// The selectors in use that may hold for a group, or may not, in order.
    pub fn doubted(&self, id: GroupId) -> &[PeerId] {
        self.known.get(&id).map_or(&[], |group| &group.doubted)
    }

    /// The selectors in use that hold for a group, in order.
    pub fn held(&self, id: GroupId) -> &[PeerId] {
        self.known.get(&id).map_or(&[], |group| &group.held)
    }
}
