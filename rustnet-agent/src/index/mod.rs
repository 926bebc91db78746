//! From events to the desired state of the maps. Pure: no I/O, no clock, no maps.
//!
//! [`Index`] owns everything. `services` knows who claims which virtual address and marks what changed; `backends` chooses
//! the endpoints of one service port; `nodes` makes the peers table; `relist` finds what a fresh list left out.

mod backends;
mod nodes;
mod relist;
mod services;
mod vip;

pub use backends::{BackendSet, Choice, DesiredBackend};
pub use services::DesiredService;
pub use vip::VipKey;

use crate::config::Routing;
use crate::model::{Family, Node, ObjectName, Pod, Problem, ServicePort};
use crate::source::{Event, Kind, Object, ObjectRef};
use ipnet::IpNet;
use nodes::Nodes;
use relist::Relist;
use rustnet_common::peer::Peer;
use services::Services;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// What the index must know of its own node.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of this node.
    pub node_name: Arc<str>,
    /// How packets get to other nodes.
    pub routing: Routing,
    /// Family of the nodes' addresses between which the overlay is spanned.
    pub tunnel_family: Family,
    /// Ranges beyond pods and nodes to which pods keep their address.
    pub no_masquerade: Vec<IpNet>,
    /// Addresses of this node's interfaces, in addition to those in its Node object.
    pub own_addresses: Vec<IpAddr>,
    /// Networks that this node's uplinks are in.
    pub links: Vec<IpNet>,
}

impl Settings {
    /// A node of whose host nothing is known yet.
    pub fn new(node_name: &str, routing: Routing) -> Self {
        Self {
            node_name: node_name.into(),
            routing,
            tunnel_family: Family::V4,
            no_masquerade: Vec::new(),
            own_addresses: Vec::new(),
            links: Vec::new(),
        }
    }
}

/// All objects of the sources, and the desired content of the maps that follows from them.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    services: Services,
    nodes: Nodes,
    pods: BTreeMap<ObjectName, Arc<Pod>>,
    relist: Relist,
    /// Problems of objects, rejected ones included.
    problems: BTreeMap<ObjectRef, Box<[Problem]>>,
    /// Problems of origins: files, watches.
    reports: BTreeMap<Arc<str>, Box<[Problem]>>,
}

impl Index {
    /// An empty index.
    pub fn new(settings: Settings) -> Self {
        let mut index = Self {
            services: Services::new(Arc::clone(&settings.node_name)),
            settings,
            nodes: Nodes::default(),
            pods: BTreeMap::new(),
            relist: Relist::default(),
            problems: BTreeMap::new(),
            reports: BTreeMap::new(),
        };
        index.own_node_changed();
        index
    }

    /// Takes in one event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Apply(object) => {
                self.note(object.reference(), problems_of(&object));
                self.relist.saw(&object.reference());
                self.apply(object);
            }
            Event::Delete(object) => {
                self.note(object.clone(), &[]);
                self.delete(&object);
            }
            Event::Reject(object, problems) => {
                self.note(object.clone(), &problems);
                self.relist.saw(&object);
                self.delete(&object);
            }
            Event::Restart(kind) => self.relist.restart(kind),
            Event::Synced(kind) => {
                if let Some(seen) = self.relist.synced(kind) {
                    for object in self.known(kind) {
                        if !seen.contains(&object.name) {
                            self.note(object.clone(), &[]);
                            self.delete(&object);
                        }
                    }
                }
            }
            Event::Report { origin, problems } => {
                if problems.is_empty() {
                    self.reports.remove(&origin);
                } else {
                    self.reports.insert(origin, problems);
                }
            }
        }
    }

    /// Replaces the addresses of this node's interfaces, and the networks of its uplinks. Returns whether that is news.
    pub fn set_own_addresses(&mut self, addresses: Vec<IpAddr>, links: Vec<IpNet>) -> bool {
        let new = self.settings.own_addresses != addresses || self.settings.links != links;
        if new {
            (self.settings.own_addresses, self.settings.links) = (addresses, links);
            self.own_node_changed();
        }
        new
    }

    /// True once every required kind has been delivered in full, at least once.
    pub fn synced(&self) -> bool {
        Kind::REQUIRED.iter().all(|kind| self.relist.has_synced(*kind))
    }

    /// True once this kind has been delivered in full, at least once.
    pub fn has_synced(&self, kind: Kind) -> bool {
        self.relist.has_synced(kind)
    }

    /// The service entries that may be other than at the last call, in no order.
    pub fn take_dirty_services(&mut self) -> Vec<VipKey> {
        self.services.take_dirty()
    }

    /// What a service entry should be; `None` if there should be none. `choice` is cleared and filled.
    pub fn desired_service(&self, key: &VipKey, choice: &mut Choice) -> Option<DesiredService> {
        self.services.desired(key, choice)
    }

    /// True if there should be such a service entry.
    pub fn is_desired(&self, key: &VipKey) -> bool {
        self.services.is_desired(key)
    }

    /// All service entries that there should be.
    pub fn service_keys(&self) -> impl Iterator<Item = VipKey> + '_ {
        self.services.keys()
    }

    /// The Service and the port that an entry belongs to; `None` for wildcard entries and unknown ones.
    pub fn owner(&self, key: &VipKey) -> Option<(&ObjectName, &ServicePort)> {
        self.services.owner(key)
    }

    /// True if the peers table may be other than at the last call.
    pub fn take_peers_dirty(&mut self) -> bool {
        self.nodes.take_dirty()
    }

    /// The peers table as it should be.
    pub fn desired_peers(&self) -> BTreeMap<IpNet, Peer> {
        self.nodes.peers(&self.settings)
    }

    /// This node's own object.
    pub fn own_node(&self) -> Option<&Node> {
        self.nodes.get(&self.settings.node_name)
    }

    /// All nodes, this one included.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter()
    }

    /// The pods of this node, those that use its own network included.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }

    /// What is wrong with a source itself, by the subject that it reports under. Cheap: before everything is known, the loop asks
    /// at each turn.
    pub fn problems_of_source<'a>(&'a self, source: &'a str) -> impl Iterator<Item = &'a Problem> {
        self.reports.values().flatten().filter(move |problem| *problem.subject == *source)
    }

    /// What of it concerns this node: its own object, another one that is at odds with it, and, with this subject, its source.
    pub fn problems_of_this_node(&self, source: &str) -> Vec<Problem> {
        let subject = format!("Node {}", self.settings.node_name);
        let is_own = |problem: &Problem| *problem.subject == *subject || *problem.subject == *source;
        let known = self.reports.values().chain(self.problems.values()).flatten();
        let mut own: Vec<Problem> = known.filter(|problem| is_own(problem)).cloned().collect();
        own.extend(self.nodes.conflicts(&self.settings).into_iter().filter(is_own));
        own.extend(self.own_node_is_missing());
        own.extend(self.nodes.conflicts_with_own(&self.settings));
        own
    }

    /// All that is wrong with the input at present.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.reports.values().chain(self.problems.values()).flatten().cloned().collect();
        all.extend(self.nodes.conflicts(&self.settings));
        all.extend(self.services.conflicts());
        all.extend(self.own_node_is_missing());
        all
    }

    fn own_node_is_missing(&self) -> Option<Problem> {
        let message =
            "this node's own object is missing: no pod range is known; check --node-name against the Nodes there are";
        let is_missing = self.relist.has_synced(Kind::Node) && self.own_node().is_none();
        is_missing.then(|| Problem::new(&format!("Node {}", self.settings.node_name).into(), "", message))
    }

    fn apply(&mut self, object: Object) {
        match object {
            Object::Service(service) => self.services.apply_service(&service),
            Object::Slice(slice) => self.services.apply_slice(&slice),
            Object::Node(node) => {
                let own = node.name.as_str() == &*self.settings.node_name;
                self.nodes.apply(node);
                if own {
                    self.own_node_changed();
                }
            }
            // A directory of manifests may name the whole cluster's.
            Object::Pod(pod) if pod.node != self.settings.node_name => drop(self.pods.remove(&pod.name)),
            Object::Pod(pod) => drop(self.pods.insert(pod.name.clone(), pod)),
        }
    }

    fn delete(&mut self, object: &ObjectRef) {
        match object.kind {
            Kind::Service => self.services.delete_service(&object.name),
            Kind::Slice => self.services.delete_slice(&object.name),
            Kind::Node => {
                self.nodes.delete(&object.name);
                if object.name.as_str() == &*self.settings.node_name {
                    self.own_node_changed();
                }
            }
            Kind::Pod => {
                self.pods.remove(&object.name);
            }
        }
    }

    /// Every object of a kind that left something here.
    fn known(&self, kind: Kind) -> Vec<ObjectRef> {
        let mut names: BTreeSet<ObjectName> = match kind {
            Kind::Service => self.services.service_names().collect(),
            Kind::Slice => self.services.slice_names().collect(),
            Kind::Node => self.nodes.iter().map(|node| node.name.clone()).collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
        };
        names.extend(self.problems.keys().filter(|object| object.kind == kind).map(|object| object.name.clone()));
        names.into_iter().map(|name| ObjectRef { kind, name }).collect()
    }

    /// This node's addresses or zone may have changed: services depend on both.
    fn own_node_changed(&mut self) {
        let mut addresses: BTreeSet<IpAddr> = self.settings.own_addresses.iter().copied().collect();
        let own = self.nodes.get(&self.settings.node_name);
        addresses.extend(own.iter().flat_map(|node| node.addresses.iter().copied()));
        let zone: Arc<str> = own.map_or_else(|| "".into(), |node| Arc::clone(&node.zone));
        self.services.set_own(addresses, zone);
        self.nodes.set_dirty();
    }

    /// Replaces what is known to be wrong with an object.
    fn note(&mut self, object: ObjectRef, problems: &[Problem]) {
        if problems.is_empty() {
            self.problems.remove(&object);
        } else {
            self.problems.insert(object, problems.into());
        }
    }
}

fn problems_of(object: &Object) -> &[Problem] {
    match object {
        Object::Service(service) => &service.problems,
        Object::Slice(slice) => &slice.problems,
        Object::Node(node) => &node.problems,
        Object::Pod(_) => &[],
    }
}

#[cfg(test)]
mod tests;
