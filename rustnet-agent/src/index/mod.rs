//! From events to the desired state of the maps. Pure: no I/O, no clock, no maps.
//!
//! [`Index`] owns everything. `services` knows who claims which virtual address and marks what changed; `backends` chooses
//! the endpoints of one service port; `health_checks` knows the ports of load balancers' probes; `nodes` makes the peers table, and
//! `service_cidrs` adds the ranges of Services to it; `policy` makes the maps of network policies; `relist` finds what a fresh list
//! left out.

mod backends;
mod health_checks;
mod nodes;
pub mod policy;
mod relist;
mod service_cidrs;
mod services;
pub mod unserved;
mod vip;

pub use backends::{BackendSet, Choice, DesiredBackend};
pub use health_checks::{HealthCheck, HealthChecks};
pub use policy::{DesiredPolicies, LocalInterface, PodChanges};
pub use service_cidrs::is_range as is_service_range;
pub use services::{DesiredService, WithoutLocalEndpoints};
pub use vip::{ServiceRanges, SourceRange, VipKey};

use crate::config::NodePortAddresses;
use crate::host::HostFacts;
use crate::model::{EndpointSlice, Family, Node, ObjectName, Pod, Problem, Service, ServicePort};
use crate::source::{Event, Kind, Object, ObjectRef, Origin};
pub use crate::ways::Settings;
use crate::ways::Ways;
use ipnet::IpNet;
use nodes::Nodes;
use policy::Policies;
use relist::Relist;
use rustnet_common::peer::Peer;
use service_cidrs::ServiceCidrs;
use services::{Services, Spreading};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Addresses that stand for all loopback addresses in the entries of node ports.
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

/// What waits for kinds of its own, so that a kind that cannot be had does not hold up the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Service entries and backends.
    Services,
    /// Peers. Routes follow from the same kind.
    Peers,
    /// Network policies. With half of the pods or namespaces, flows would be denied that are allowed.
    Policies,
}

impl Gate {
    /// All gates.
    pub const ALL: [Self; 3] = [Self::Services, Self::Peers, Self::Policies];
}

/// All objects of the sources, and the desired content of the maps that follows from them.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    host: HostFacts,
    is_host_known: bool,
    services: Services,
    nodes: Nodes,
    service_cidrs: ServiceCidrs,
    /// Decided when somebody asks; emptied by whatever they depend on. For thousands of nodes that takes a few milliseconds.
    ways: OnceCell<Arc<Ways>>,
    ways_version: u64,
    peers_dirty: bool,
    pods: BTreeMap<ObjectName, Arc<Pod>>,
    /// Addresses of pods that were connected with ports of this node.
    port_holders: BTreeSet<IpAddr>,
    policies: Policies,
    relist: Relist,
    /// Problems of objects, rejected ones included.
    problems: BTreeMap<ObjectRef, Box<[Problem]>>,
    /// Problems of origins: files, watches.
    reports: BTreeMap<Origin, Box<[Problem]>>,
}

impl Index {
    /// An empty index.
    pub fn new(settings: Settings) -> Self {
        let mut index = Self {
            policies: Policies::new(Arc::clone(&settings.node_name)),
            services: Services::new(
                Arc::clone(&settings.node_name),
                Spreading {
                    default: settings.lb_algorithm,
                    table_size: settings.maglev_table_size,
                    forwarding: settings.forwarding,
                    has_all_node_ports: settings.node_ports.is_empty()
                        || settings.node_ports.contains(&NodePortAddresses::Primary),
                },
            ),
            settings,
            host: HostFacts::default(),
            is_host_known: false,
            nodes: Nodes::default(),
            service_cidrs: ServiceCidrs::default(),
            ways: OnceCell::new(),
            ways_version: 0,
            peers_dirty: true,
            pods: BTreeMap::new(),
            port_holders: BTreeSet::new(),
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
                let is_ours = !matches!(&object, Object::Pod(pod) if pod.node != self.settings.node_name);
                self.note(object.reference(), if is_ours { problems_of(&object) } else { &[] });
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
            Event::Unreadable(object, problems) => {
                // Whose a pod is cannot be read either.
                let is_ours = object.kind != Kind::Pod || self.has_pod(&object.name);
                self.note(object.clone(), if is_ours { &problems } else { &[] });
                self.relist.saw(&object);
                if object.kind == Kind::NetworkPolicy {
                    self.policies.close_for_unknown(&object.name);
                }
            }
            Event::Restart(kind) => self.relist.restart(kind),
            Event::Synced(kind) => {
                // Ranges of Services wait for several kinds.
                self.peers_dirty = true;
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
                self.peers_dirty |= origin == Origin::Watch(Kind::Node);
                if problems.is_empty() {
                    self.reports.remove(&origin);
                } else {
                    self.reports.insert(origin, problems);
                }
            }
        }
    }

    /// Takes in what the host looks like. Returns whether that is news.
    pub fn set_host(&mut self, host: HostFacts) -> bool {
        let is_news = self.host != host || !self.is_host_known;
        self.is_host_known = true;
        if is_news {
            self.host = host;
            self.own_node_changed();
        }
        is_news
    }

    /// True once every required kind has been delivered in full, at least once.
    pub fn synced(&self) -> bool {
        Kind::REQUIRED.iter().all(|kind| self.relist.has_synced(*kind))
    }

    /// True once all that this gate waits for has been delivered in full, at least once.
    pub fn is_open(&self, gate: Gate) -> bool {
        // As long as nothing is wrong with their watch.
        let has_nodes = self.has_synced(Kind::Node) || self.reports.contains_key(&Origin::Watch(Kind::Node));
        match gate {
            // This node's zone narrows the choice of endpoints. Without it services work, and a little later it comes.
            Gate::Services => self.has_synced(Kind::Service) && self.has_synced(Kind::Slice) && has_nodes,
            // Without the host's devices no node has a way, and what the maps hold is better.
            Gate::Peers => self.has_synced(Kind::Node) && self.is_host_known,
            Gate::Policies => {
                // What policies of the cluster deny depends on Nodes.
                let has_nodes = self.has_synced(Kind::Node) || (has_nodes && !self.policies.has_cluster_policies());
                has_nodes && Kind::OF_POLICIES.into_iter().all(|kind| self.has_synced(kind))
            }
        }
    }

    /// True once this kind has been delivered in full, at least once.
    pub fn has_synced(&self, kind: Kind) -> bool {
        self.relist.has_synced(kind)
    }

    /// True if the source does not get a kind that network policies follow from, and will not before somebody gives it the right.
    pub fn is_refused_policies(&self) -> bool {
        // Without policies of the cluster the others are enforced.
        let needed = Kind::OF_POLICIES.iter().filter(|kind| **kind != Kind::ClusterNetworkPolicy);
        needed.into_iter().any(|kind| self.reports.contains_key(&Origin::Refusal(*kind)))
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

    /// All Services that have virtual addresses, each with its slices.
    pub fn services(&self) -> impl Iterator<Item = (&Arc<Service>, &[Arc<EndpointSlice>])> {
        self.services.objects()
    }

    /// All service entries that there should be.
    pub fn service_keys(&self) -> impl Iterator<Item = VipKey> + '_ {
        self.services.keys()
    }

    /// The Service and the port that an entry belongs to; `None` for wildcard entries and unknown ones.
    pub fn owner(&self, key: &VipKey) -> Option<(&ObjectName, &ServicePort)> {
        self.services.owner(key)
    }

    /// Those of some addresses that no endpoint has, in whatever condition.
    pub fn without_endpoint(&self, addresses: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        self.services.without_endpoint(addresses)
    }

    /// True if clients outside have an address of a Service.
    pub fn has_external(&self) -> bool {
        self.services.has_external()
    }

    /// What each health check node port of this node should answer, if it may be other than at the last call.
    pub fn take_health_checks(&mut self) -> Option<HealthChecks> {
        self.services.take_health_checks()
    }

    /// Counts the ports of Services with a traffic policy of Local that have endpoints elsewhere and none here.
    pub fn count_without_local_endpoints(&self) -> WithoutLocalEndpoints {
        self.services.count_without_local_endpoints()
    }

    /// True if the desired ranges of clients may be other than at the last call.
    pub fn take_ranges_dirty(&mut self) -> bool {
        self.services.take_ranges_dirty()
    }

    /// Who may come by the entries that ask for the client, the oldest Service first.
    pub fn desired_ranges(&self) -> Vec<ServiceRanges> {
        self.services.desired_ranges()
    }

    /// True if the peers table may be other than at the last call.
    pub fn take_peers_dirty(&mut self) -> bool {
        std::mem::take(&mut self.peers_dirty)
    }

    /// The peers table as it should be. It has ranges of Services only once Services are known: before that, an address of theirs
    /// looks like one that no Service has.
    pub fn desired_peers(&self) -> BTreeMap<IpNet, Peer> {
        let ways = self.ways();
        let mut peers = nodes::peers(&ways);
        if self.is_open(Gate::Services) {
            self.service_cidrs.add_to(&mut peers, &self.settings.service_cidrs, &ways, self.endpoints_in_ranges());
        }
        peers
    }

    /// Takes in the interfaces of this node's pods by their addresses.
    pub fn set_local_interfaces(&mut self, interfaces: BTreeMap<IpAddr, LocalInterface>) {
        self.policies.set_interfaces(interfaces);
    }

    /// True if the desired maps of policies may be other than at the last call.
    pub fn take_policies_dirty(&mut self) -> bool {
        self.policies.take_dirty()
    }

    /// The maps of policies as they should be, once [`Gate::Policies`] is open.
    pub fn desired_policies(&mut self) -> DesiredPolicies {
        self.policies.desired()
    }

    /// What differs from that since, if it is entries of pods of other nodes alone; see [`policy::Policies::changes`].
    pub fn policy_changes(&mut self, before: impl Fn(IpAddr) -> Option<u32>) -> Option<PodChanges> {
        self.policies.changes(before)
    }

    /// The pods of all nodes that policies may be about: name and addresses.
    pub fn policy_pods(&self) -> impl Iterator<Item = (&ObjectName, &[IpAddr])> {
        self.policies.pods()
    }

    fn is_in_service_range(&self, ip: IpAddr) -> bool {
        self.service_cidrs.contains(&self.settings.service_cidrs, ip)
    }

    /// True if an endpoint of this slice takes a range of Services out.
    fn is_slice_in_service_range(&self, name: &ObjectName) -> bool {
        let slice = self.services.slice(name);
        slice.is_some_and(|slice| slice.endpoints.iter().any(|endpoint| self.is_in_service_range(endpoint.addr)))
    }

    /// Endpoints whose addresses are in ranges of Services.
    fn endpoints_in_ranges(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.services.endpoint_addresses().filter(|ip| self.is_in_service_range(*ip))
    }

    /// True once [`Self::desired_peers`] has all ranges of Services that there are.
    pub fn knows_service_ranges(&self) -> bool {
        self.is_open(Gate::Services) && self.has_synced(Kind::ServiceCidr)
    }

    /// This node's place, and the ways to all others.
    pub fn ways(&self) -> Arc<Ways> {
        let decide = || Arc::new(Ways::new(&self.settings, self.nodes.iter(), &self.host));
        Arc::clone(self.ways.get_or_init(decide))
    }

    /// A number that grows when the ways may have changed.
    pub fn ways_version(&self) -> u64 {
        self.ways_version
    }

    /// The settings that the ways depend on.
    pub fn settings(&self) -> &Settings {
        &self.settings
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

    /// True if a pod of this node has this name.
    pub fn has_pod(&self, name: &ObjectName) -> bool {
        self.pods.contains_key(name)
    }

    /// What is wrong with a source itself, by the subject that it reports under. Cheap: before everything is known, the loop asks
    /// at each turn.
    pub fn problems_of_source<'a>(&'a self, source: &'a str) -> impl Iterator<Item = &'a Problem> {
        self.reports.values().flatten().filter(move |problem| *problem.subject == *source)
    }

    /// What of it concerns this node: its own object, its pods', another one that is at odds with it, and, with this subject, its
    /// source.
    pub fn problems_of_this_node(&self, source: &str) -> Vec<Problem> {
        let subject = format!("Node {}", self.settings.node_name);
        let is_own = |problem: &Problem| *problem.subject == *subject || *problem.subject == *source;
        let known = self.reports.values().chain(self.problems.values()).flatten();
        let mut own: Vec<Problem> = known.filter(|problem| is_own(problem)).cloned().collect();
        let of_pods = self.problems.iter().filter(|(object, _)| object.kind == Kind::Pod);
        own.extend(of_pods.flat_map(|(_, problems)| problems.iter().cloned()));
        let ways = self.ways();
        own.extend(ways.problems.iter().filter(|problem| is_own(problem)).cloned());
        own.extend(self.own_node_is_missing());
        own.extend(ways.with_own.iter().chain(&ways.unrouted).cloned());
        own
    }

    /// Takes in which pods were connected with ports of this node, by their addresses.
    pub fn set_port_holders(&mut self, addresses: BTreeSet<IpAddr>) {
        self.port_holders = addresses;
    }

    /// What objects ask for and do not get.
    pub fn unserved(&self) -> unserved::Unserved {
        unserved::find(self.pods(), &self.port_holders)
    }

    /// All that is wrong with the input at present.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self.reports.values().chain(self.problems.values()).flatten().cloned().collect();
        let ways = self.ways();
        all.extend(ways.problems.iter().chain(&ways.unrouted).cloned());
        all.extend(self.service_cidrs.problems(&self.settings.service_cidrs, &ways, self.endpoints_in_ranges()));
        all.extend(self.services.conflicts());
        all.extend(unserved::problems(&self.unserved()));
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
            Object::Slice(slice) => {
                self.peers_dirty |= self.is_slice_in_service_range(&slice.name);
                self.services.apply_slice(&slice);
                self.peers_dirty |= self.is_slice_in_service_range(&slice.name);
            }
            Object::Node(node) => {
                self.policies.apply_node(&node);
                if let Some(before) = self.nodes.apply(&node) {
                    self.services
                        .node_changed(before.as_ref().map_or(&[][..], |node| &*node.addresses), &node.addresses);
                    self.nodes_changed(self.settings.is_own(&node));
                }
            }
            Object::Pod(pod) => {
                self.policies.apply_pod(&pod);
                if pod.node == self.settings.node_name {
                    self.pods.insert(pod.name.clone(), pod);
                } else {
                    self.pods.remove(&pod.name);
                }
            }
            Object::Namespace(namespace) => self.policies.apply_namespace(&namespace),
            Object::NetworkPolicy(policy) => self.policies.apply_policy(&policy),
            Object::ClusterNetworkPolicy(policy) => self.policies.apply_cluster_policy(&policy),
            Object::ServiceCidr(object) => {
                self.service_cidrs.apply(object);
                self.peers_dirty = true;
            }
        }
    }

    fn delete(&mut self, object: &ObjectRef) {
        match object.kind {
            Kind::Service => self.services.delete_service(&object.name),
            Kind::Slice => {
                self.peers_dirty |= self.is_slice_in_service_range(&object.name);
                self.services.delete_slice(&object.name);
            }
            Kind::Node => {
                self.policies.delete_node(&object.name);
                if let Some(before) = self.nodes.delete(&object.name) {
                    self.services.node_changed(&before.addresses, &[]);
                    self.nodes_changed(object.name.as_str() == &*self.settings.node_name);
                }
            }
            Kind::Pod => {
                self.pods.remove(&object.name);
                self.policies.delete_pod(&object.name);
            }
            Kind::Namespace => self.policies.delete_namespace(&object.name),
            Kind::NetworkPolicy => self.policies.delete_policy(&object.name),
            Kind::ClusterNetworkPolicy => self.policies.delete_cluster_policy(&object.name),
            Kind::ServiceCidr => {
                self.service_cidrs.delete(&object.name);
                self.peers_dirty = true;
            }
        }
    }

    /// Every object of a kind that left something here.
    fn known(&self, kind: Kind) -> Vec<ObjectRef> {
        let mut names: BTreeSet<ObjectName> = match kind {
            Kind::Service => self.services.service_names().collect(),
            Kind::Slice => self.services.slice_names().collect(),
            Kind::Node => self.nodes.iter().map(|node| node.name.clone()).collect(),
            Kind::Pod => self.pods.keys().chain(self.policies.pod_names()).cloned().collect(),
            Kind::Namespace => self.policies.namespace_names().collect(),
            Kind::NetworkPolicy => self.policies.policy_names().cloned().collect(),
            Kind::ClusterNetworkPolicy => self.policies.cluster_policy_names().cloned().collect(),
            Kind::ServiceCidr => self.service_cidrs.names().collect(),
        };
        names.extend(self.problems.keys().filter(|object| object.kind == kind).map(|object| object.name.clone()));
        names.into_iter().map(|name| ObjectRef { kind, name }).collect()
    }

    fn nodes_changed(&mut self, is_own: bool) {
        if is_own {
            return self.own_node_changed();
        }
        self.ways.take();
        self.ways_version += 1;
        self.peers_dirty = true;
    }

    /// This node's addresses or zone may have changed: services depend on both.
    fn own_node_changed(&mut self) {
        let mut addresses: BTreeSet<IpAddr> = self.host.own_addresses().into_iter().collect();
        let own = self.nodes.get(&self.settings.node_name);
        addresses.extend(own.iter().flat_map(|node| node.addresses.iter().copied()));
        let zone: Arc<str> = own.map_or_else(|| "".into(), |node| Arc::clone(&node.zone));
        let primary = own.map_or(&[][..], |node| &node.addresses);
        let has_node_ports = |ip: &IpAddr| self.settings.has_node_ports(*ip, primary.contains(ip));
        // Packets with these addresses do not leave a host: only its sockets ask for them.
        let loopback = LOOPBACK.iter().filter(|_| self.settings.has_host_sockets);
        let node_ips = addresses.iter().chain(loopback).copied().filter(has_node_ports).collect();
        let is_unnamed = |family: &Family| own.is_some() && !primary.iter().any(|ip| Family::of(*ip) == *family);
        let unnamed = [Family::V4, Family::V6].into_iter().filter(is_unnamed).collect();
        self.services.set_own(addresses, node_ips, unnamed, zone);
        self.nodes_changed(false);
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
        Object::Pod(pod) => &pod.problems,
        Object::Namespace(it) => &it.problems,
        Object::NetworkPolicy(it) => &it.problems,
        Object::ServiceCidr(it) => &it.problems,
        Object::ClusterNetworkPolicy(it) => &it.problems,
    }
}

#[cfg(test)]
mod tests;
