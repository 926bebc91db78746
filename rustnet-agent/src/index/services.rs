//! Services and their slices: who claims which virtual address, and which entries a change touches.

use super::backends::{BackendSet, Choice, Place, choose};
use super::health_checks::{self, HealthCheck, HealthChecks};
use super::vip::{ServiceRanges, VipKey};
use crate::config::{Algorithm, Forwarding};
use crate::model::{EndpointSlice, Family, Frontend, ObjectName, Problem, Service, ServicePort};
use rustnet_common::service::{flags, scope};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// A service entry as it should be; range and id are the plan's business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredService {
    /// The backends that it leads to; `None` for a wildcard entry.
    pub set: Option<BackendSet>,
    /// See `rustnet_common::service::flags`.
    pub flags: u16,
    /// Session affinity in seconds, 0 for none.
    pub affinity: u32,
}

/// A Service and its slices. Either can come first.
#[derive(Debug, Default)]
struct State {
    service: Option<Arc<Service>>,
    /// In order of their names.
    slices: Vec<Arc<EndpointSlice>>,
}

/// Who wants an entry. Nearly always it is one.
#[derive(Debug)]
enum Claim {
    One(ObjectName),
    /// In order of age, then name: the first has it.
    Many(BTreeSet<(i64, ObjectName)>),
}

impl Claim {
    fn winner(&self) -> Option<&ObjectName> {
        match self {
            Self::One(name) => Some(name),
            Self::Many(claims) => claims.first().map(|(_, name)| name),
        }
    }
}

/// How flows of Services are spread over their backends.
#[derive(Clone, Copy, Debug)]
pub struct Spreading {
    /// Where a Service does not say.
    pub default: Algorithm,
    /// Places of a Maglev table.
    pub table_size: u32,
    /// How clients outside get the answers of backends on other nodes, where a Service does not say.
    pub forwarding: Forwarding,
    /// All nodes have node ports at the addresses that their Nodes name.
    pub has_all_node_ports: bool,
}

impl Spreading {
    /// Places of a Service's tables; 0 for none.
    fn table_size_of(self, service: &Service) -> u32 {
        match service.algorithm.unwrap_or(self.default) {
            Algorithm::Random => 0,
            Algorithm::Maglev => self.table_size,
        }
    }

    /// True if an entry for clients outside, of the traffic policy Cluster, has backends on other nodes answer directly. These nodes look
    /// for the backend among those that they choose from themselves, by an entry of their own.
    fn is_direct(self, service: &Service, is_node_port: bool, choice: &Choice) -> bool {
        let is_wanted = service.forwarding.unwrap_or(self.forwarding) == Forwarding::Dsr;
        is_wanted && !choice.is_hinted && (self.has_all_node_ports || !is_node_port)
    }
}

/// All services.
#[derive(Debug)]
pub struct Services {
    node_name: Arc<str>,
    zone: Arc<str>,
    spreading: Spreading,
    /// Addresses of this node: never claimed, whatever a Service says.
    own: BTreeSet<IpAddr>,
    states: HashMap<ObjectName, State>,
    slice_owner: HashMap<ObjectName, ObjectName>,
    claims: HashMap<VipKey, Claim>,
    /// Entries with more than one claim.
    contested: BTreeSet<VipKey>,
    /// Addresses of this node that have node ports.
    node_ips: Box<[IpAddr]>,
    /// Families of which this node's object names no address: other nodes do not know this one's.
    unnamed: Box<[Family]>,
    /// How many nodes have an address, by their objects.
    of_nodes: HashMap<IpAddr, u32>,
    /// How many services have an address.
    vips: HashMap<IpAddr, Users>,
    /// Services that clients outside have an address of.
    external: u32,
    checks: health_checks::Claims,
    dirty: HashSet<VipKey>,
    /// Services whose load balancer is only for some clients, by age.
    restricted: BTreeSet<(i64, ObjectName)>,
    ranges_dirty: bool,
}

/// How many ports of Services have endpoints elsewhere and none here, by the traffic policy that would need them here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WithoutLocalEndpoints {
    /// `internalTrafficPolicy: Local`.
    pub internal: usize,
    /// `externalTrafficPolicy: Local`.
    pub external: usize,
}

/// How many services have an address.
#[derive(Clone, Copy, Debug, Default)]
struct Users {
    /// As their cluster address.
    cluster: u32,
    /// For clients outside.
    external: u32,
}

impl Users {
    /// True if nobody has the address.
    fn is_empty(self) -> bool {
        self.cluster + self.external == 0
    }

    /// Flags of the wildcard entry for clients of a scope, if there is to be one.
    fn wildcard(self, scope: u8) -> Option<u16> {
        if scope == scope::EXTERNAL {
            return (self.external > 0).then_some(flags::VIP);
        }
        (!self.is_empty()).then_some(if self.cluster == 0 { flags::VIP | flags::SHARED } else { flags::VIP })
    }
}

/// The entries of a Service's frontends, each once: an external IP may be the cluster address, or this node's.
fn port_keys(service: &Service, nodes: &[IpAddr]) -> Vec<VipKey> {
    let mut keys: Vec<_> = service.frontends(nodes).flat_map(VipKey::of).collect();
    if service.is_external() {
        keys.sort_unstable();
        keys.dedup();
    }
    keys
}

impl Services {
    pub fn new(node_name: Arc<str>, spreading: Spreading) -> Self {
        Self {
            node_name,
            spreading,
            zone: "".into(),
            own: BTreeSet::new(),
            states: HashMap::new(),
            slice_owner: HashMap::new(),
            claims: HashMap::new(),
            contested: BTreeSet::new(),
            node_ips: Box::default(),
            unnamed: Box::default(),
            of_nodes: HashMap::new(),
            vips: HashMap::new(),
            external: 0,
            checks: health_checks::Claims::default(),
            dirty: HashSet::new(),
            restricted: BTreeSet::new(),
            ranges_dirty: false,
        }
    }

    pub fn apply_service(&mut self, service: &Arc<Service>) {
        let state = self.states.entry(service.name.clone()).or_default();
        if state.service.as_ref() == Some(service) {
            return;
        }
        let old = state.service.replace(Arc::clone(service));
        if let Some(old) = old {
            self.unclaim(&old);
        }
        self.claim(service);
    }

    pub fn delete_service(&mut self, name: &ObjectName) {
        if let Some(old) = self.states.get_mut(name).and_then(|state| state.service.take()) {
            self.unclaim(&old);
            self.forget_if_empty(name);
        }
    }

    pub fn without_endpoint(&self, mut addresses: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        if !addresses.is_empty() {
            for ip in self.endpoint_addresses() {
                addresses.remove(&ip);
            }
        }
        addresses
    }

    /// The addresses of all endpoints.
    pub fn endpoint_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let slices = self.states.values().flat_map(|state| state.slices.iter());
        slices.flat_map(|slice| slice.endpoints.iter().map(|endpoint| endpoint.addr))
    }

    /// The slice of this name, as it is known.
    pub fn slice(&self, name: &ObjectName) -> Option<&EndpointSlice> {
        let state = self.states.get(self.slice_owner.get(name)?)?;
        let at = state.slices.binary_search_by(|other| other.name.cmp(name)).ok()?;
        Some(&state.slices[at])
    }

    pub fn apply_slice(&mut self, slice: &Arc<EndpointSlice>) {
        match self.slice_owner.get(&slice.name) {
            Some(owner) if *owner == slice.service => {}
            Some(_) => {
                self.delete_slice(&slice.name);
                self.slice_owner.insert(slice.name.clone(), slice.service.clone());
            }
            None => {
                self.slice_owner.insert(slice.name.clone(), slice.service.clone());
            }
        }
        let state = self.states.entry(slice.service.clone()).or_default();
        match state.slices.binary_search_by(|other| other.name.cmp(&slice.name)) {
            Ok(at) if state.slices[at] == *slice => return,
            Ok(at) => state.slices[at] = Arc::clone(slice),
            Err(at) => state.slices.insert(at, Arc::clone(slice)),
        }
        self.endpoints_changed(&slice.service);
    }

    pub fn delete_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.slice_owner.remove(name) else {
            return;
        };
        if let Some(state) = self.states.get_mut(&owner) {
            state.slices.retain(|slice| slice.name != *name);
        }
        self.endpoints_changed(&owner);
        self.forget_if_empty(&owner);
    }

    /// Replaces this node's addresses, those of them that have node ports, and its zone.
    pub fn set_own(
        &mut self,
        addresses: BTreeSet<IpAddr>,
        node_ips: Box<[IpAddr]>,
        unnamed: Box<[Family]>,
        zone: Arc<str>,
    ) {
        if self.unnamed != unnamed {
            self.unnamed = unnamed;
            self.dirty.extend(self.claims.keys().filter(|key| key.scope == scope::EXTERNAL));
        }
        if self.zone != zone {
            self.zone = zone;
            self.dirty.extend(self.claims.keys());
        }
        for ip in self.own.symmetric_difference(&addresses) {
            let Some(users) = self.vips.get(ip) else { continue };
            self.dirty.insert(VipKey::wildcard(*ip));
            self.dirty.extend((users.external > 0).then(|| VipKey::external_wildcard(*ip)));
            self.dirty.extend(self.claims.keys().filter(|key| key.ip == *ip));
        }
        if self.node_ips != node_ips {
            let all = self.states.values().filter_map(|state| state.service.clone());
            let moved: Vec<_> = all.filter(|service| service.has_node_ports()).collect();
            for service in &moved {
                self.unclaim(service);
            }
            self.node_ips = node_ips;
            for service in &moved {
                self.claim(service);
            }
        }
        self.own = addresses;
    }

    /// A node's addresses have changed; `old` is empty for a new one, `new` for one that is gone.
    pub fn node_changed(&mut self, old: &[IpAddr], new: &[IpAddr]) {
        for ip in new {
            *self.of_nodes.entry(*ip).or_default() += 1;
        }
        for ip in old {
            if let Some(nodes) = self.of_nodes.get_mut(ip) {
                *nodes -= 1;
                if *nodes == 0 {
                    self.of_nodes.remove(ip);
                }
            }
        }
        let served = old.iter().chain(new).filter(|ip| self.vips.contains_key(ip));
        self.dirty.extend(served.flat_map(|ip| [VipKey::wildcard(*ip), VipKey::external_wildcard(*ip)]));
    }

    /// True if clients outside have an address of a Service.
    pub fn has_external(&self) -> bool {
        self.external > 0
    }

    pub fn take_dirty(&mut self) -> Vec<VipKey> {
        self.dirty.drain().collect()
    }

    /// What each health check node port should answer, if it may be other than at the last call.
    pub fn take_health_checks(&mut self) -> Option<HealthChecks> {
        let check = |name: &ObjectName| {
            let slices = self.states.get(name).map_or(&[][..], |state| &state.slices);
            let local_endpoints = health_checks::count_local_endpoints(slices, &self.node_name);
            HealthCheck { service: name.clone(), local_endpoints }
        };
        let is_dirty = self.checks.take_dirty();
        is_dirty.then(|| self.checks.winners().map(|(port, name)| (port, check(name))).collect())
    }

    /// Counts the ports of Services with a traffic policy of Local that have endpoints elsewhere and none here.
    pub fn count_without_local_endpoints(&self) -> WithoutLocalEndpoints {
        let (mut count, mut choice) = (WithoutLocalEndpoints::default(), Choice::default());
        let here = Place { node: &self.node_name, zone: &self.zone };
        for state in self.states.values() {
            let Some(service) = state.service.as_deref().filter(|it| it.internal_local || it.external_local) else {
                continue;
            };
            for port in &service.ports {
                let has_none = service.vips.iter().any(|ip| {
                    choice.clear();
                    choose(true, port, Family::of(*ip), &state.slices, here, &mut choice) == flags::DROP_EMPTY
                });
                let is_external = service.outside().next().is_some() || port.node_port != 0;
                count.internal += usize::from(has_none && service.internal_local);
                count.external += usize::from(has_none && service.external_local && is_external);
            }
        }
        count
    }

    pub fn take_ranges_dirty(&mut self) -> bool {
        std::mem::take(&mut self.ranges_dirty)
    }

    /// Who may come by the entries that ask for the client, the oldest Service first.
    pub fn desired_ranges(&self) -> Vec<ServiceRanges> {
        let of = |name: &ObjectName| {
            let service = self.states.get(name)?.service.as_deref()?;
            let mut entries = BTreeMap::new();
            // Both entries of an address ask for the same clients.
            for key in port_keys(service, &self.node_ips).into_iter().filter(|key| key.scope == scope::EXTERNAL) {
                // The entry may be another Service's, or another frontend's.
                let Some((_, owner, Frontend { source_ranges: Some(ranges), .. })) = self.find(&key) else { continue };
                if owner.name == *name {
                    let family = ranges.iter().filter(|range| range.addr().is_ipv4() == key.ip.is_ipv4());
                    entries.insert(key, family.copied().collect());
                }
            }
            Some(ServiceRanges { service: name.clone(), entries })
        };
        self.restricted.iter().filter_map(|(_, name)| of(name)).collect()
    }

    pub fn keys(&self) -> impl Iterator<Item = VipKey> + '_ {
        let wildcards = self.vips.keys().flat_map(|ip| [VipKey::wildcard(*ip), VipKey::external_wildcard(*ip)]);
        self.claims.keys().copied().chain(wildcards).filter(|key| self.is_desired(key))
    }

    pub fn objects(&self) -> impl Iterator<Item = (&Arc<Service>, &[Arc<EndpointSlice>])> {
        self.states.values().filter_map(|state| Some((state.service.as_ref()?, &*state.slices)))
    }

    pub fn service_names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        self.states.iter().filter(|(_, state)| state.service.is_some()).map(|(name, _)| name.clone())
    }

    pub fn slice_names(&self) -> impl Iterator<Item = ObjectName> + '_ {
        self.slice_owner.keys().cloned()
    }

    pub fn owner(&self, key: &VipKey) -> Option<(&ObjectName, &ServicePort)> {
        let (_, service, frontend) = self.find(key)?;
        Some((&service.name, frontend.target))
    }

    /// Who has an entry, and by which frontend. A cluster address that is this node's own nobody gets.
    fn find(&self, key: &VipKey) -> Option<(&State, &Service, Frontend<'_>)> {
        let state = self.states.get(self.claims.get(key)?.winner()?)?;
        let service = state.service.as_deref()?;
        let is_allowed = |frontend: &Frontend<'_>| frontend.is_external || !self.own.contains(&key.ip);
        let mut frontends = service.frontends(&self.node_ips);
        let frontend = frontends.find(|frontend| key.is_of(frontend) && is_allowed(frontend))?;
        Some((state, service, frontend))
    }

    /// Flags of a wildcard entry, if there is to be one. The other ports of nodes' addresses are the nodes': of this one, and of others,
    /// whose addresses are external IPs and those of load balancers in many clusters.
    fn wildcard(&self, key: &VipKey) -> Option<u16> {
        let is_nodes = self.own.contains(&key.ip) || self.of_nodes.contains_key(&key.ip);
        self.vips.get(&key.ip).filter(|_| !is_nodes)?.wildcard(key.scope)
    }

    pub fn is_desired(&self, key: &VipKey) -> bool {
        if key.is_wildcard() { self.wildcard(key).is_some() } else { self.find(key).is_some() }
    }

    pub fn desired(&self, key: &VipKey, choice: &mut Choice) -> Option<DesiredService> {
        choice.clear();
        if key.is_wildcard() {
            return self.wildcard(key).map(|flags| DesiredService { set: None, flags, affinity: 0 });
        }
        let (state, service, Frontend { is_local, target, source_ranges, .. }) = self.find(key)?;
        let family = Family::of(key.ip);
        let here = Place { node: &self.node_name, zone: &self.zone };
        let judged = if source_ranges.is_some() { flags::SOURCE_RANGES } else { 0 };
        let mut flags = choose(is_local, target, family, &state.slices, here, choice) | judged;
        let is_node_port = self.own.contains(&key.ip);
        let is_outside = key.scope == scope::EXTERNAL && !is_local && !self.unnamed.contains(&family);
        if is_outside && self.spreading.is_direct(service, is_node_port, choice) {
            flags |= flags::DIRECT;
        }
        if key.ip.is_loopback() && choice.backends.iter().any(|it| it.port == key.port && self.own.contains(&it.addr)) {
            flags |= flags::OWN_PORT;
        }
        choice.table_size = self.spreading.table_size_of(service);
        let set =
            BackendSet { service: service.name.clone(), port: target.port, proto: target.proto, family, is_local };
        Some(DesiredService { set: Some(set), flags, affinity: service.affinity })
    }

    /// Claims that lost, each with the remedy.
    pub fn conflicts(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for key in &self.contested {
            let Some(Claim::Many(claims)) = self.claims.get(key) else {
                continue;
            };
            let mut names = claims.iter().map(|(_, name)| name);
            let Some(winner) = names.next() else {
                continue;
            };
            for loser in names {
                problems.push(Problem::new(
                    &format!("Service {loser}").into(),
                    "spec.clusterIPs",
                    format!("{key} belongs to the older Service {winner}; give one of them another address or port"),
                ));
            }
        }
        problems.extend(self.checks.conflicts());
        if self.own.iter().any(|ip| self.vips.contains_key(ip)) {
            let services = self.states.values().filter_map(|state| state.service.as_ref());
            let mut taken: Vec<_> = services
                .flat_map(|service| service.vips.iter().map(|ip| (&service.name, *ip)))
                .filter(|(_, ip)| self.own.contains(ip))
                .collect();
            taken.sort();
            problems.extend(taken.into_iter().map(|(name, ip)| {
                let message = format!(
                    "{ip} is an address of node {}, the service does not get it; choose one of the service range",
                    self.node_name
                );
                Problem::new(&format!("Service {name}").into(), "spec.clusterIPs", message)
            }));
        }
        problems
    }

    fn claim(&mut self, service: &Service) {
        self.checks.add(service);
        for ip in &service.vips {
            self.vips.entry(*ip).or_default().cluster += 1;
            self.dirty.insert(VipKey::wildcard(*ip));
        }
        for ip in service.outside() {
            self.vips.entry(ip).or_default().external += 1;
            self.dirty.extend([VipKey::wildcard(ip), VipKey::external_wildcard(ip)]);
        }
        self.external += u32::from(service.is_external());
        if service.has_source_ranges() {
            self.restricted.insert((service.created, service.name.clone()));
        }
        self.ranges_dirty |= service.is_external() && !self.restricted.is_empty();
        for key in port_keys(service, &self.node_ips) {
            self.dirty.insert(key);
            let claim = match self.claims.remove(&key) {
                None => Claim::One(service.name.clone()),
                Some(Claim::One(other)) => {
                    self.contested.insert(key);
                    let age = self.states.get(&other).and_then(|s| s.service.as_ref()).map_or(0, |s| s.created);
                    Claim::Many([(age, other), (service.created, service.name.clone())].into())
                }
                Some(Claim::Many(mut claims)) => {
                    claims.insert((service.created, service.name.clone()));
                    Claim::Many(claims)
                }
            };
            self.claims.insert(key, claim);
        }
    }

    fn unclaim(&mut self, service: &Service) {
        self.checks.remove(service);
        let addresses = service.vips.iter().map(|ip| (*ip, 1, 0)).chain(service.outside().map(|ip| (ip, 0, 1)));
        for (ip, cluster, external) in addresses {
            self.dirty.insert(VipKey::wildcard(ip));
            self.dirty.extend((external > 0).then(|| VipKey::external_wildcard(ip)));
            if let Some(users) = self.vips.get_mut(&ip) {
                users.cluster -= cluster;
                users.external -= external;
                if users.is_empty() {
                    self.vips.remove(&ip);
                }
            }
        }
        self.external -= u32::from(service.is_external());
        self.ranges_dirty |= service.is_external() && !self.restricted.is_empty();
        self.restricted.remove(&(service.created, service.name.clone()));
        for key in port_keys(service, &self.node_ips) {
            self.dirty.insert(key);
            if let Some(Claim::Many(mut claims)) = self.claims.remove(&key) {
                claims.remove(&(service.created, service.name.clone()));
                let left = if claims.len() == 1 {
                    self.contested.remove(&key);
                    claims.pop_first().map(|(_, name)| Claim::One(name))
                } else {
                    Some(Claim::Many(claims))
                };
                self.claims.extend(left.map(|left| (key, left)));
            }
        }
    }

    /// The slices of a service changed: all its entries may.
    fn endpoints_changed(&mut self, service: &ObjectName) {
        if let Some(service) = self.states.get(service).and_then(|state| state.service.as_ref()) {
            self.dirty.extend(port_keys(service, &self.node_ips));
            self.checks.endpoints_changed(service);
        }
    }

    fn forget_if_empty(&mut self, name: &ObjectName) {
        if self.states.get(name).is_some_and(|state| state.service.is_none() && state.slices.is_empty()) {
            self.states.remove(name);
        }
    }
}
