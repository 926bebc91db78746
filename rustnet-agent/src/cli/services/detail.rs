//! One Service in full: its policies, its front ends as the maps have them, and its backends by name, with the live flows of this
//! node to each.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use ipnet::IpNet;
use rustnet_common::backend::{Backend as Held, flags as backend_flags};
use rustnet_common::service::{SvcEntry, flags, scope};
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::{Maps, clients, no_backends, ranges_of, show_ranges};
use crate::cli::Places;
use crate::cli::ct::{self, Flow};
use crate::cli::output::{Output, json, line, span, table};
use crate::namefile::{ServiceName, Services, service_key};
use crate::plan::VipKey;
use crate::servicefile::{self, Service, State};

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    service: String,
    /// Null where the agent's file does not have the Service.
    policies: Option<Policies>,
    front_ends: Vec<FrontEnd>,
    backends: Vec<Backend>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Policies {
    internal_traffic_policy: &'static str,
    /// Null for a Service that clients outside have no address of.
    external_traffic_policy: Option<&'static str>,
    /// 0 for none.
    affinity_seconds: u32,
    /// Clients outside that the load balancer is for; null for all.
    source_ranges: Option<Vec<IpNet>>,
    health_check: Option<HealthCheck>,
}

/// What load balancers ask this node.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HealthCheck {
    port: u16,
    /// Ready endpoints on this node; with none, it answers 503.
    local_endpoints: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FrontEnd {
    /// `clusterIP`, `nodePort`, `loadBalancer` or `externalIP`; null where the agent's file does not have the Service.
    kind: Option<&'static str>,
    port_name: Option<String>,
    /// Null for a node port that no address of this node has.
    address: Option<IpAddr>,
    port: u16,
    protocol: &'static str,
    clients: &'static str,
    /// False where the object asks for it and the programs do not know it.
    in_maps: bool,
    /// Number of the set of backends that it leads to.
    id: u32,
    affinity_seconds: u32,
    source_ranges: Option<Vec<IpNet>>,
    /// How flows are spread over the backends; null where there is no choice.
    algorithm: Option<&'static str>,
    /// Unit of the map that the Maglev table begins with; 0 for none.
    maglev_table: u16,
    /// How clients outside get the answers of backends on other nodes: `snat` or `dsr`; null where none can be or nobody knows.
    forwarding: Option<&'static str>,
    drop_when_empty: bool,
    backends: u32,
    /// Ids that the entry points to and that are of no backend of it: the maps disagree.
    missing: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Backend {
    address: IpAddr,
    port: u16,
    port_name: Option<String>,
    protocol: &'static str,
    /// `namespace/name`.
    pod: Option<String>,
    node: Option<String>,
    local: bool,
    /// `ready`, `draining` (terminating, and still serving), `serving` (not ready, and keeps its flows), `notReady`; `gone`: no
    /// endpoint any more, but flows lead there; `unknown`: the maps have it and the agent's file does not.
    state: &'static str,
    /// The sets that it is in: new flows of their front ends may lead to it.
    sets: BTreeSet<u32>,
    /// Its numbers in the maps, as `rustnetctl ct list --backend` takes them.
    ids: BTreeSet<u32>,
    /// Flows of this node to it that have not expired and do not end.
    live_flows: u64,
}

/// A port of the Service: name and protocol.
type PortKey = (String, u8);

/// An entry of the maps, with what it leads to.
struct Entry<'a> {
    key: VipKey,
    value: SvcEntry,
    name: &'a ServiceName,
    source_ranges: Option<Vec<IpNet>>,
    backends: Vec<Held>,
}

/// Prints one Service.
pub fn run(places: &Places, name: &str, out: &Output) -> Result<()> {
    let maps = Maps::read(places)?;
    let details = servicefile::read(&places.run_dir)?;
    let details = details.get(name);
    let entries = entries(name, &maps);
    if entries.is_empty() && details.is_none() {
        bail!(
            "no Service {name} here: one without a virtual address (headless, ExternalName), or of another proxy, is not \
             served; `rustnetctl services` lists what is"
        );
    }
    let mut flows = Vec::new();
    ct::for_each_backend_flow(places, |flow| flows.push(flow))?;
    let report = report(name, &entries, &maps.names, details, flows.into_iter());
    if out.is_json() { json(&report) } else { line(&text(&report)) }
}

fn entries<'a>(name: &str, maps: &'a Maps) -> Vec<Entry<'a>> {
    let services = maps.services.iter().filter(|(_, entry)| entry.flags & flags::VIP == 0);
    let entry = |(key, entry): (&VipKey, &SvcEntry)| {
        let owner = maps.names.get(&service_key(key.ip, key.port, key.proto)).filter(|owner| owner.service == name)?;
        let backends = maps.backends.of(entry).flatten().collect();
        let source_ranges = ranges_of(key, entry, &maps.ranges);
        Some(Entry { key: *key, value: *entry, name: owner, source_ranges, backends })
    };
    services.filter_map(entry).collect()
}

fn report(
    name: &str,
    entries: &[Entry<'_>],
    names: &Services,
    details: Option<&Service<'_>>,
    flows: impl Iterator<Item = Flow>,
) -> Report {
    let mut front_ends: Vec<FrontEnd> = entries.iter().map(|entry| front_end(entry, details)).collect();
    front_ends.extend(details.iter().flat_map(|details| absent(entries, details)));
    front_ends.sort_by_key(|it| (it.kind, it.port_name.clone(), it.port, it.protocol, it.address, it.clients));
    Report {
        service: name.to_owned(),
        policies: details.map(policies),
        front_ends,
        backends: Backends::collect(name, entries, names, details, flows),
    }
}

fn policies(details: &Service<'_>) -> Policies {
    let policy = |is_local: bool| if is_local { "Local" } else { "Cluster" };
    let is_external = !details.external_ips.is_empty()
        || !details.load_balancer_ips.is_empty()
        || details.ports.iter().any(|port| port.node_port != 0);
    let endpoints = || details.slices.iter().filter(|slice| !slice.ports.is_empty()).flat_map(|slice| &slice.endpoints);
    // A pod with an address of each family is one.
    let local = |is_v4: bool| {
        let of_family = endpoints().filter(|it| it.address.is_ipv4() == is_v4);
        let ready = of_family.filter(|it| it.here && it.state == State::Ready);
        ready.map(|it| it.address).collect::<BTreeSet<_>>().len()
    };
    let check = || HealthCheck { port: details.health_check_port, local_endpoints: local(true).max(local(false)) };
    Policies {
        internal_traffic_policy: policy(details.internal_local),
        external_traffic_policy: is_external.then(|| policy(details.external_local)),
        affinity_seconds: details.affinity_seconds,
        source_ranges: details.source_ranges.as_ref().map(|ranges| ranges.to_vec()),
        health_check: (details.health_check_port != 0).then(check),
    }
}

fn front_end(it: &Entry<'_>, details: Option<&Service<'_>>) -> FrontEnd {
    FrontEnd {
        kind: details.map(|details| kind(&it.key, details)),
        port_name: some(&it.name.port),
        address: Some(it.key.ip),
        port: it.key.port,
        protocol: proto::name(it.key.proto),
        clients: clients(&it.key),
        in_maps: true,
        id: it.value.id,
        affinity_seconds: it.value.affinity,
        source_ranges: it.source_ranges.clone(),
        algorithm: (it.value.count > 1).then_some(if it.value.table == 0 { "random" } else { "maglev" }),
        maglev_table: it.value.table,
        forwarding: forwarding(it, details),
        drop_when_empty: it.value.flags & flags::DROP_EMPTY != 0,
        backends: it.backends.len() as u32,
        missing: it.value.count - it.backends.len() as u32,
    }
}

/// How clients outside get the answers of backends on other nodes.
fn forwarding(it: &Entry<'_>, details: Option<&Service<'_>>) -> Option<&'static str> {
    let is_cluster_policy = details.is_some_and(|details| !details.external_local);
    match it.value.flags & flags::DIRECT {
        0 => (it.key.scope == scope::EXTERNAL && is_cluster_policy).then_some("snat"),
        _ => Some("dsr"),
    }
}

/// Which field of the Service an entry follows from.
fn kind(key: &VipKey, details: &Service<'_>) -> &'static str {
    let has_port = details.ports.iter().any(|port| (port.port, port.protocol) == (key.port, key.proto));
    let is_at = |addresses: &[IpAddr]| has_port && addresses.contains(&key.ip);
    if is_at(&details.cluster_ips) {
        "clusterIP"
    } else if is_at(&details.load_balancer_ips) {
        "loadBalancer"
    } else if is_at(&details.external_ips) {
        "externalIP"
    } else {
        "nodePort"
    }
}

/// Front ends that the object asks for and the maps do not have.
fn absent(entries: &[Entry<'_>], details: &Service<'_>) -> Vec<FrontEnd> {
    let is_there = |key: &VipKey| entries.iter().any(|entry| entry.key == *key);
    let is_served = |ip: &&IpAddr| details.cluster_ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
    let mut found = Vec::new();
    for port in &details.ports {
        let front_end = |kind, address, number, scope: u8| FrontEnd {
            kind: Some(kind),
            port_name: some(&port.name),
            address,
            port: number,
            protocol: proto::name(port.protocol),
            clients: if scope == scope::EXTERNAL { "external" } else { "cluster" },
            in_maps: false,
            id: 0,
            affinity_seconds: 0,
            source_ranges: None,
            algorithm: None,
            maglev_table: 0,
            forwarding: None,
            drop_when_empty: false,
            backends: 0,
            missing: 0,
        };
        let both = [scope::CLUSTER, scope::EXTERNAL];
        let fields = [
            ("clusterIP", &details.cluster_ips, &both[..1]),
            ("loadBalancer", &details.load_balancer_ips, &both[..]),
            ("externalIP", &details.external_ips, &both[..]),
        ];
        for (kind, addresses, scopes) in fields {
            for ip in addresses.iter().filter(is_served) {
                let key = |scope: u8| VipKey { ip: *ip, port: port.port, proto: port.protocol, scope };
                let missing = scopes.iter().filter(|scope| !is_there(&key(**scope)));
                found.extend(missing.map(|scope| front_end(kind, Some(*ip), port.port, *scope)));
            }
        }
        let has_node_port = |it: &Entry<'_>| (it.key.port, it.key.proto) == (port.node_port, port.protocol);
        if port.node_port != 0 && !entries.iter().any(has_node_port) {
            found.push(front_end("nodePort", None, port.node_port, scope::EXTERNAL));
        }
    }
    found
}

/// The backends of a Service while they are collected, by port and address.
#[derive(Default)]
struct Backends(BTreeMap<(PortKey, SocketAddr), Backend>);

impl Backends {
    fn collect(
        name: &str,
        entries: &[Entry<'_>],
        names: &Services,
        details: Option<&Service<'_>>,
        flows: impl Iterator<Item = Flow>,
    ) -> Vec<Backend> {
        let mut all = Self::default();
        let namespace = name.split_once('/').map_or(name, |(namespace, _)| namespace);
        if let Some(details) = details {
            all.add_endpoints(details, namespace);
        }
        let mut by_id = HashMap::new();
        for entry in entries {
            all.add_held(entry, &mut by_id);
        }
        for flow in flows {
            // A draining backend may have no number any more; where its clients ask tells whose flow it is.
            let asked = || {
                let owner = names.get(&service_key(flow.asked.ip(), flow.asked.port(), flow.proto));
                let owner = owner.filter(|owner| owner.service == name)?;
                Some(((owner.port.clone(), flow.proto), flow.led_to))
            };
            if let Some(at) = by_id.get(&flow.backend).cloned().or_else(asked) {
                all.at(at, "gone").live_flows += 1;
            }
        }
        all.0.into_values().collect()
    }

    fn at(&mut self, at: (PortKey, SocketAddr), state: &'static str) -> &mut Backend {
        let ((port, protocol), address) = at.clone();
        self.0.entry(at).or_insert_with(|| Backend {
            address: address.ip(),
            port: address.port(),
            port_name: some(&port),
            protocol: proto::name(protocol),
            pod: None,
            node: None,
            local: false,
            state,
            sets: BTreeSet::new(),
            ids: BTreeSet::new(),
            live_flows: 0,
        })
    }

    /// An endpoint that several slices have is in the best state that any gives it.
    fn add_endpoints(&mut self, details: &Service<'_>, namespace: &str) {
        let mut states: BTreeMap<(PortKey, SocketAddr), State> = BTreeMap::new();
        for port in &details.ports {
            for slice in &details.slices {
                let is_target = |it: &&servicefile::Port<'_>| (&it.name, it.protocol) == (&port.name, port.protocol);
                let Some(target) = slice.ports.iter().find(is_target) else { continue };
                for it in &slice.endpoints {
                    let at = ((port.name.to_string(), port.protocol), SocketAddr::new(it.address, target.port));
                    let best = states.get(&at).map_or(it.state, |other| it.state.min(*other));
                    states.insert(at.clone(), best);
                    let backend = self.at(at, word(best));
                    backend.state = word(best);
                    backend.local |= it.here;
                    backend.node = backend.node.take().or_else(|| some(&it.node));
                    backend.pod = backend.pod.take().or_else(|| some(&it.pod).map(|pod| format!("{namespace}/{pod}")));
                }
            }
        }
    }

    fn add_held(&mut self, entry: &Entry<'_>, by_id: &mut HashMap<u32, (PortKey, SocketAddr)>) {
        for held in &entry.backends {
            let at = ((entry.name.port.clone(), entry.key.proto), SocketAddr::new(IpAddr::from(held.addr), held.port));
            by_id.insert(held.id, at.clone());
            let is_draining = held.flags & backend_flags::TERMINATING != 0;
            let backend = self.at(at, if is_draining { word(State::Draining) } else { "unknown" });
            backend.sets.insert(entry.value.id);
            backend.ids.insert(held.id);
            backend.local |= held.flags & backend_flags::LOCAL != 0;
        }
    }
}

const fn word(state: State) -> &'static str {
    match state {
        State::Ready => "ready",
        State::Draining => "draining",
        State::Serving => "serving",
        State::NotReady => "notReady",
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn text(report: &Report) -> String {
    let mut out = vec![heading("Service", &report.service)];
    match &report.policies {
        Some(policies) => out.extend(policy_lines(policies)),
        None => out.push(heading("Object", &format!("not known: the agent has written no {}", servicefile::FILE))),
    }
    let columns = [
        "FRONT END",
        "PORT",
        "ADDRESS",
        "PROTOCOL",
        "CLIENTS",
        "SOURCE RANGES",
        "AFFINITY",
        "ALGORITHM",
        "MODE",
        "SET",
        "BACKENDS",
    ];
    out.extend([String::new(), table(&columns, report.front_ends.iter().map(front_end_row).collect())]);
    let columns = ["BACKEND", "PORT", "PROTOCOL", "POD", "NODE", "STATE", "SETS", "FLOWS"];
    out.extend([String::new(), table(&columns, report.backends.iter().map(backend_row).collect())]);
    out.join("\n")
}

fn heading(name: &str, value: &str) -> String {
    format!("{:19}{value}", format!("{name}:"))
}

fn policy_lines(policies: &Policies) -> Vec<String> {
    let affinity = match policies.affinity_seconds {
        0 => "none".to_owned(),
        seconds => format!("ClientIP, {}", span(seconds.into())),
    };
    let mut lines = vec![heading("Internal policy", policies.internal_traffic_policy)];
    lines.extend(policies.external_traffic_policy.map(|policy| heading("External policy", policy)));
    lines.push(heading("Session affinity", &affinity));
    if policies.source_ranges.is_some() {
        lines.push(heading("Source ranges", &show_ranges(policies.source_ranges.as_deref())));
    }
    if let Some(HealthCheck { port, local_endpoints }) = policies.health_check {
        let endpoints = if local_endpoints == 1 { "endpoint" } else { "endpoints" };
        lines.push(heading("Health check port", &format!("{port}, {local_endpoints} ready {endpoints} here")));
    }
    lines
}

fn front_end_row(it: &FrontEnd) -> Vec<String> {
    let address = match it.address {
        Some(ip) => SocketAddr::new(ip, it.port).to_string(),
        None => format!("*:{}", it.port),
    };
    let backends = match it {
        FrontEnd { in_maps: false, .. } => "not in the maps: see `services --verify`".to_owned(),
        FrontEnd { missing: 1.., .. } => {
            format!("{} ({} missing: restart the agent and report this)", it.backends, it.missing)
        }
        FrontEnd { backends: 0, .. } => no_backends(it.drop_when_empty).to_owned(),
        _ => it.backends.to_string(),
    };
    let affinity = if it.affinity_seconds == 0 { "-".to_owned() } else { format!("{}s", it.affinity_seconds) };
    vec![
        or_dash(it.kind),
        or_dash(it.port_name.as_deref()),
        address,
        it.protocol.to_owned(),
        it.clients.to_owned(),
        show_ranges(it.source_ranges.as_deref()),
        affinity,
        or_dash(it.algorithm),
        or_dash(it.forwarding),
        if it.in_maps { it.id.to_string() } else { "-".to_owned() },
        backends,
    ]
}

fn backend_row(it: &Backend) -> Vec<String> {
    let node = match (&it.node, it.local) {
        (Some(node), true) => format!("{node} (here)"),
        (None, true) => "this node".to_owned(),
        (node, false) => or_dash(node.as_deref()),
    };
    let sets: Vec<String> = it.sets.iter().map(ToString::to_string).collect();
    vec![
        SocketAddr::new(it.address, it.port).to_string(),
        or_dash(it.port_name.as_deref()),
        it.protocol.to_owned(),
        or_dash(it.pod.as_deref()),
        node,
        if it.state == word(State::NotReady) { "not ready" } else { it.state }.to_owned(),
        or_dash(some(&sets.join(", ")).as_deref()),
        it.live_flows.to_string(),
    ]
}

fn or_dash(text: Option<&str>) -> String {
    text.unwrap_or("-").to_owned()
}

#[cfg(test)]
mod tests;
