//! From what a cluster has to the rows: who asks, who is asked and how, and what the answer has to be. Pure.
//!
//! Each node asks the next one in a circle, so that each is once the near end and once the far end. Requests within a node go
//! from a second pod of the first one.

use std::net::{IpAddr, SocketAddr};

use super::row::{Check, End, Expected, Facts, Node, Probe, Row, Scenario, Skipped, Source, Step};
use super::wire::{MIN_BYTES, Protocol, Question};
use crate::model::Family;

/// Of a transfer: more than a window, and many segments of the largest size that the path takes.
const TRANSFER: usize = 1 << 20;
/// Of a large datagram: some fragments with each usual MTU.
const LARGE_DATAGRAM: usize = 8000;
/// Port of all Services of a run.
pub const SERVICE_PORT: u16 = 80;

/// Returns the steps of these scenarios, of all if none is named. Their order: families first, then from near to far; names last,
/// so that DNS has heard of the Services by then.
pub fn plan(facts: &Facts, scenarios: &[Scenario]) -> Vec<Step> {
    let mut steps = Vec::new();
    for family in Family::ALL {
        if facts.nodes.iter().any(|node| family.pick(&node.pod.addresses).is_some()) {
            add_family(facts, family, &mut steps);
        } else {
            steps.push(skip(
                Scenario::PodToLocalPod,
                Some(family),
                format!("no pod has an {family} address, so no row of {family}"),
            ));
        }
    }
    steps.extend(not_tried(facts));
    add_names(facts, &mut steps);
    add_world(facts, &mut steps);
    steps.retain(|step| scenarios.is_empty() || scenarios.contains(&step.scenario()));
    steps
}

fn skip(scenario: Scenario, family: Option<Family>, reason: impl Into<String>) -> Step {
    Step::Skip(Skipped { scenario, family, reason: reason.into() })
}

/// What this cluster does not have, once for both families.
fn not_tried(facts: &Facts) -> Vec<Step> {
    let mut steps = Vec::new();
    if facts.nodes.len() < 2 {
        let reason = "it takes two nodes with a probe, and there is one";
        steps.extend(Scenario::REMOTE.map(|scenario| skip(scenario, None, reason)));
    }
    if let Some(reason) = &facts.without_hosts {
        let is_new = |it: &Scenario| facts.nodes.len() > 1 || !it.is_remote();
        steps.extend(Scenario::OF_HOSTS.into_iter().filter(is_new).map(|scenario| skip(scenario, None, reason)));
    }
    if let Some(reason) = &facts.without_api_server {
        steps.push(skip(Scenario::PodToApiServer, None, reason));
    }
    steps
}

/// The rows of one family.
fn add_family(facts: &Facts, family: Family, steps: &mut Vec<Step>) {
    let mut rows = Rows { facts, family, steps };
    let of_peer = |peer: &Probe| facts.nodes.iter().find(|node| node.name == peer.node);
    if let Some((peer, node)) = facts.peer.as_ref().and_then(|peer| Some((peer, of_peer(peer)?))) {
        rows.add_pod_to_pod(peer, &node.pod, true);
        rows.add_service(Scenario::PodToLocalService, peer, node);
    }
    for node in &facts.nodes {
        if let Some(host) = &node.host {
            rows.add_probe(Scenario::PodToLocalHost, &node.pod, host);
            rows.add_probe(Scenario::HostToLocalPod, host, &node.pod);
        }
        rows.add_service(Scenario::PodToItself, &node.pod, node);
    }
    if facts.nodes.len() > 1 {
        let next = facts.nodes.iter().cycle().skip(1);
        for (near, far) in facts.nodes.iter().zip(next) {
            rows.add_between(near, far);
        }
    }
    for node in &facts.nodes {
        rows.add_api_server(&node.pod);
    }
}

struct Rows<'a> {
    facts: &'a Facts,
    family: Family,
    steps: &'a mut Vec<Step>,
}

impl Rows<'_> {
    fn add_between(&mut self, near: &Node, far: &Node) {
        self.add_pod_to_pod(&near.pod, &far.pod, false);
        if let Some(host) = &far.host {
            self.add_probe(Scenario::PodToRemoteHost, &near.pod, host);
        }
        if let Some(host) = &near.host {
            self.add_probe(Scenario::HostToRemotePod, host, &far.pod);
        }
        self.add_service(Scenario::PodToRemoteService, &near.pod, far);
        if let Some(host) = &near.host {
            self.add_service(Scenario::HostToRemoteService, host, far);
        }
        self.add_node_port(Scenario::PodToLocalNodePort, &near.pod, near, far);
        self.add_node_port(Scenario::PodToRemoteNodePort, &near.pod, far, far);
    }

    fn add_pod_to_pod(&mut self, from: &Probe, to: &Probe, is_local: bool) {
        let [small, large] = if is_local {
            [Scenario::PodToLocalPod, Scenario::LargePacketsLocal]
        } else {
            [Scenario::PodToRemotePod, Scenario::LargePacketsRemote]
        };
        self.add_probe(small, from, to);
        self.add_probe(large, from, to);
    }

    fn add_probe(&mut self, scenario: Scenario, from: &Probe, to: &Probe) {
        let sizes = match scenario {
            Scenario::LargePacketsLocal | Scenario::LargePacketsRemote => [TRANSFER, LARGE_DATAGRAM],
            _ => [MIN_BYTES; 2],
        };
        let Some(address) = self.address(scenario, to, &to.addresses) else { return };
        let end = End { name: title(to, self.is_host(to)), address: address.to_string(), node: to.node.clone() };
        self.add_echo(scenario, from, &to.name, end, [self.facts.echo_port; 2], sizes, address);
    }

    /// Asks the ClusterIP of the Service that leads to a node's pod.
    fn add_service(&mut self, scenario: Scenario, from: &Probe, of: &Node) {
        let Some(address) = self.family.pick(&of.cluster_ips) else {
            let reason = format!("the Service {} has no {} address", of.service, self.family);
            return self.steps.push(skip(scenario, Some(self.family), reason));
        };
        let end = service_end(of, address.to_string());
        self.add_echo(scenario, from, &of.pod.name, end, [SERVICE_PORT; 2], [MIN_BYTES; 2], address);
    }

    /// Asks a node port of the Service that leads to a node's pod, at a node.
    fn add_node_port(&mut self, scenario: Scenario, from: &Probe, at: &Node, of: &Node) {
        let Some(ports) = of.ports_of_nodes else {
            let reason = format!("the Service {} has no node ports", of.service);
            return self.steps.push(skip(scenario, Some(self.family), reason));
        };
        let Some(address) = self.family.pick(&at.addresses) else {
            let reason = format!("node {} has no {} address", at.name, self.family);
            return self.steps.push(skip(scenario, Some(self.family), reason));
        };
        let name = format!("node port of {}, endpoint on {}", at.name, of.name);
        let end = End { name, address: SocketAddr::new(address, ports[0]).to_string(), node: of.name.clone() };
        self.add_echo(scenario, from, &of.pod.name, end, ports, [MIN_BYTES; 2], address);
    }

    fn add_api_server(&mut self, from: &Probe) {
        let Some(to) = self.facts.api_server.iter().find(|it| Family::of(it.ip()) == self.family) else {
            // A cluster of both families has one of one family.
            return;
        };
        let Some(own) = self.address(Scenario::PodToApiServer, from, &from.addresses) else { return };
        let check = Check {
            question: question(Protocol::Connect, to.ip(), to.port(), MIN_BYTES),
            expected: Expected { server: None, source: Source::Any },
            addresses: Vec::new(),
        };
        let end = End { name: "Service default/kubernetes".into(), address: to.to_string(), node: String::new() };
        self.push(Scenario::PodToApiServer, from, own, end, vec![check]);
    }

    /// Adds a row of one request over TCP and one over UDP.
    #[expect(clippy::too_many_arguments, reason = "all rows are made here")]
    fn add_echo(
        &mut self,
        scenario: Scenario,
        from: &Probe,
        server: &str,
        to: End,
        ports: [u16; 2],
        sizes: [usize; 2],
        address: IpAddr,
    ) {
        let Some(own) = self.address(scenario, from, &from.addresses) else { return };
        let expected = Expected { server: Some(server.to_owned()), source: self.source(scenario, from, own) };
        let check = |protocol, i: usize| Check {
            question: question(protocol, address, ports[i], sizes[i]),
            expected: expected.clone(),
            addresses: Vec::new(),
        };
        self.push(scenario, from, own, to, vec![check(Protocol::Tcp, 0), check(Protocol::Udp, 1)]);
    }

    fn push(&mut self, scenario: Scenario, client: &Probe, own: IpAddr, to: End, checks: Vec<Check>) {
        let name = title(client, self.is_host(client));
        let from = End { name, address: own.to_string(), node: client.node.clone() };
        let (family, client) = (Some(self.family), client.name.clone());
        self.steps.push(Step::Run(Row { scenario, family, client, from, to, checks }));
    }

    /// Returns the source that a server has to see: a pod's own address everywhere (docs/debugging.md), but a node's where the
    /// pod asks itself.
    fn source(&self, scenario: Scenario, client: &Probe, own: IpAddr) -> Source {
        let of_node = || {
            let node = self.facts.nodes.iter().find(|node| node.name == client.node);
            let all =
                node.into_iter().flat_map(|it| it.addresses.iter().chain(it.host.iter().flat_map(|it| &it.addresses)));
            let mut all: Vec<IpAddr> = all.copied().filter(|it| Family::of(*it) == self.family).collect();
            all.sort_unstable();
            all.dedup();
            all
        };
        if self.is_host(client) {
            return Source::OwnOr(of_node());
        }
        match scenario {
            // With socket load-balancing the packet does not leave the pod.
            Scenario::PodToItself => Source::OwnOr(of_node()),
            _ => Source::OneOf(vec![own]),
        }
    }

    /// Returns a probe's address of the family, or skips the scenario.
    fn address(&mut self, scenario: Scenario, of: &Probe, addresses: &[IpAddr]) -> Option<IpAddr> {
        let found = self.family.pick(addresses);
        if found.is_none() {
            let reason = format!("{} has no {} address", title(of, self.is_host(of)), self.family);
            self.steps.push(skip(scenario, Some(self.family), reason));
        }
        found
    }

    fn is_host(&self, probe: &Probe) -> bool {
        self.facts.nodes.iter().any(|node| node.host.as_ref().is_some_and(|host| host.name == probe.name))
    }
}

/// The rows by name, of both families.
fn add_names(facts: &Facts, steps: &mut Vec<Step>) {
    if let Some(reason) = &facts.without_dns {
        let both = [Scenario::PodToServiceName, Scenario::HeadlessServiceName];
        return steps.extend(both.map(|scenario| skip(scenario, None, reason)));
    }
    for family in Family::ALL {
        let all: Vec<IpAddr> = facts.nodes.iter().filter_map(|node| family.pick(&node.pod.addresses)).collect();
        let next = facts.nodes.iter().cycle().skip(1);
        for (near, far) in facts.nodes.iter().zip(next) {
            let Some(own) = family.pick(&near.pod.addresses) else { continue };
            let from = End { name: title(&near.pod, false), address: own.to_string(), node: near.name.clone() };
            let mut add = |scenario, to: End, check| {
                let (family, client, from) = (Some(family), near.pod.name.clone(), from.clone());
                steps.push(Step::Run(Row { scenario, family, client, from, to, checks: vec![check] }));
            };
            let host = |service: &str| format!("{service}.{}.svc", facts.namespace);
            // Of a cluster with one node, the pod itself answers, as the node.
            if family.pick(&far.cluster_ips).is_some() {
                let source = if near.name == far.name { Source::Any } else { Source::OneOf(vec![own]) };
                let name = host(&far.service);
                let question = by_name(Protocol::Tcp, &name, SERVICE_PORT, family);
                let expected = Expected { server: Some(far.pod.name.clone()), source };
                let to = service_end(far, name);
                add(Scenario::PodToServiceName, to, Check { question, expected, addresses: Vec::new() });
            }
            let name = host(&facts.headless);
            let question = by_name(Protocol::Dns, &name, 0, family);
            let to = End { name: "headless Service".into(), address: name, node: String::new() };
            let expected = Expected { server: None, source: Source::Any };
            add(Scenario::HeadlessServiceName, to, Check { question, expected, addresses: all.clone() });
        }
    }
}

fn add_world(facts: &Facts, steps: &mut Vec<Step>) {
    let Some((host, port)) = &facts.world else {
        return steps.push(skip(Scenario::PodToWorld, None, "no server was named: give --world HOST:PORT"));
    };
    let address: Option<IpAddr> = host.parse().ok();
    let family = address.map(Family::of);
    for node in &facts.nodes {
        let own = family.map_or(node.pod.addresses.first().copied(), |family| family.pick(&node.pod.addresses));
        let Some(own) = own else {
            let reason = format!("{} has no address of that family", title(&node.pod, false));
            steps.push(skip(Scenario::PodToWorld, family, reason));
            continue;
        };
        let question =
            Question { protocol: Protocol::Connect, host: host.clone(), port: *port, bytes: MIN_BYTES, family: None };
        let expected = Expected { server: None, source: Source::Any };
        let shown = address.map_or_else(|| format!("{host}:{port}"), |ip| SocketAddr::new(ip, *port).to_string());
        steps.push(Step::Run(Row {
            scenario: Scenario::PodToWorld,
            family,
            client: node.pod.name.clone(),
            from: End { name: title(&node.pod, false), address: own.to_string(), node: node.name.clone() },
            to: End { name: "world".into(), address: shown, node: String::new() },
            checks: vec![Check { question, expected, addresses: Vec::new() }],
        }));
    }
}

fn title(probe: &Probe, is_host: bool) -> String {
    if is_host { format!("host {}", probe.node) } else { format!("{} on {}", probe.name, probe.node) }
}

fn service_end(of: &Node, address: String) -> End {
    End { name: format!("Service {}, endpoint on {}", of.service, of.name), address, node: of.name.clone() }
}

fn question(protocol: Protocol, address: IpAddr, port: u16, bytes: usize) -> Question {
    Question { protocol, host: address.to_string(), port, bytes, family: None }
}

fn by_name(protocol: Protocol, host: &str, port: u16, family: Family) -> Question {
    Question { protocol, host: host.to_owned(), port, bytes: MIN_BYTES, family: Some(family) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum as _;

    fn probe(name: &str, node: &str, addresses: &[&str]) -> Probe {
        let addresses = addresses.iter().map(|it| it.parse().expect("an address")).collect();
        Probe { name: name.into(), node: node.into(), addresses }
    }

    fn node(i: usize, is_dual: bool) -> Node {
        let both = |four: String, six: String| -> Vec<IpAddr> {
            [Some(four), is_dual.then_some(six)]
                .into_iter()
                .flatten()
                .map(|it| it.parse().expect("an address"))
                .collect()
        };
        let name = format!("n{i}");
        let pods = both(format!("10.244.{i}.2"), format!("fd00:244:{i}::2"));
        let addresses = both(format!("172.18.0.1{i}"), format!("fd00:18::1{i}"));
        Node {
            pod: Probe { name: format!("pod-{i}"), node: name.clone(), addresses: pods },
            host: Some(Probe { name: format!("host-{i}"), node: name.clone(), addresses: addresses.clone() }),
            addresses,
            cluster_ips: both(format!("10.96.0.1{i}"), format!("fd00:96::1{i}")),
            ports_of_nodes: Some([30_000, 30_001]),
            service: format!("echo-{i}"),
            name,
        }
    }

    fn facts(nodes: usize, is_dual: bool) -> Facts {
        Facts {
            nodes: (1..=nodes).map(|i| node(i, is_dual)).collect(),
            peer: Some(probe("peer", "n1", if is_dual { &["10.244.1.3", "fd00:244:1::3"] } else { &["10.244.1.3"] })),
            namespace: "ns".into(),
            echo_port: 19_961,
            headless: "pods".into(),
            api_server: vec!["10.96.0.1:443".parse().expect("an address")],
            ..Facts::default()
        }
    }

    /// Scenario and family of each row, or what is skipped.
    fn rows(steps: &[Step]) -> (Vec<&Row>, Vec<&Skipped>) {
        let run = steps.iter().filter_map(|it| if let Step::Run(row) = it { Some(row) } else { None });
        let skipped = steps.iter().filter_map(|it| if let Step::Skip(skipped) = it { Some(skipped) } else { None });
        (run.collect(), skipped.collect())
    }

    fn count(rows: &[&Row], scenario: Scenario) -> usize {
        rows.iter().filter(|row| row.scenario == scenario).count()
    }

    #[test]
    fn two_nodes_of_both_families_have_all_rows() {
        let facts = Facts { world: Some(("192.0.2.1".into(), 443)), ..facts(2, true) };
        let steps = plan(&facts, &[]);
        let (rows, skipped) = rows(&steps);
        assert!(skipped.is_empty(), "{skipped:?}");
        for scenario in [Scenario::PodToLocalPod, Scenario::LargePacketsLocal, Scenario::PodToLocalService] {
            assert_eq!(count(&rows, scenario), 2, "{scenario:?}");
        }
        for scenario in Scenario::REMOTE.into_iter().chain(Scenario::OF_HOSTS).chain([
            Scenario::PodToItself,
            Scenario::PodToServiceName,
            Scenario::HeadlessServiceName,
        ]) {
            assert_eq!(count(&rows, scenario), 4, "{scenario:?}");
        }
        for scenario in [Scenario::PodToApiServer, Scenario::PodToWorld] {
            assert_eq!(count(&rows, scenario), 2, "of one family: {scenario:?}");
        }
        let last = rows.iter().rposition(|row| row.scenario == Scenario::PodToApiServer);
        let first = rows.iter().position(|row| row.scenario == Scenario::PodToServiceName);
        assert!(last < first, "names come last");
    }

    #[test]
    fn only_scenarios_that_are_named_are_tried() {
        let named = [Scenario::PodToRemotePod, Scenario::PodToWorld];
        let steps = plan(&facts(2, true), &named);
        let (tried, skipped) = rows(&steps);
        assert_eq!((tried.len(), count(&tried, Scenario::PodToRemotePod)), (4, 4), "two ways, two families");
        assert_eq!(skipped.iter().map(|it| it.scenario).collect::<Vec<_>>(), [Scenario::PodToWorld]);
    }

    #[test]
    fn each_node_is_once_near_and_once_far() {
        let steps = plan(&facts(3, false), &[]);
        let (rows, _) = rows(&steps);
        let ways: Vec<_> = rows
            .iter()
            .filter(|row| row.scenario == Scenario::PodToRemotePod)
            .map(|row| (row.from.node.as_str(), row.to.node.as_str()))
            .collect();
        assert_eq!(ways, [("n1", "n2"), ("n2", "n3"), ("n3", "n1")]);
    }

    #[test]
    fn a_peer_whose_node_has_no_other_probe_asks_nobody() {
        let mut facts = facts(3, true);
        facts.nodes.remove(0);
        let steps = plan(&facts, &[]);
        assert_eq!(count(&rows(&steps).0, Scenario::PodToLocalPod), 0);
    }

    #[test]
    fn one_node_of_one_family_says_what_it_skips() {
        let steps = plan(&facts(1, false), &[]);
        let (rows, skipped) = rows(&steps);
        assert!(rows.iter().all(|row| row.family == Some(Family::V4) && !row.scenario.is_remote()));
        for scenario in Scenario::REMOTE {
            assert!(
                skipped.iter().any(|it| it.scenario == scenario && it.reason.contains("two nodes")),
                "{scenario:?}"
            );
        }
        assert!(skipped.iter().any(|it| it.family == Some(Family::V6) && it.reason.contains("no pod")));
        assert!(skipped.iter().any(|it| it.scenario == Scenario::PodToWorld && it.reason.contains("--world")));
        assert_eq!(count(&rows, Scenario::PodToServiceName), 1, "the pod asks itself");
    }

    #[test]
    fn what_is_forbidden_or_absent_is_skipped_with_its_reason() {
        let mut facts = facts(2, true);
        facts.nodes.iter_mut().for_each(|node| node.host = None);
        facts.without_hosts = Some("Pod Security forbids it".into());
        facts.without_dns = Some("no DNS".into());
        (facts.api_server, facts.without_api_server) = (Vec::new(), Some("forbidden".into()));
        let steps = plan(&facts, &[]);
        let (rows, skipped) = rows(&steps);
        for scenario in Scenario::OF_HOSTS {
            assert_eq!(count(&rows, scenario), 0, "{scenario:?}");
            assert!(skipped.iter().any(|it| it.scenario == scenario && it.reason.contains("Pod Security")));
        }
        assert!(skipped.iter().any(|it| it.scenario == Scenario::HeadlessServiceName && it.reason == "no DNS"));
        assert!(skipped.iter().any(|it| it.scenario == Scenario::PodToApiServer && it.reason == "forbidden"));
    }

    #[test]
    fn pods_keep_their_address_and_a_pod_that_asks_itself_has_its_nodes() {
        let steps = plan(&facts(2, false), &[]);
        let (rows, _) = rows(&steps);
        let source = |scenario| {
            let row = rows.iter().find(|row| row.scenario == scenario).expect("a row");
            row.checks[0].expected.source.clone()
        };
        let (pod, node): (IpAddr, IpAddr) =
            ("10.244.1.2".parse().expect("an address"), "172.18.0.11".parse().expect("an address"));
        for scenario in [Scenario::PodToRemotePod, Scenario::PodToRemoteService, Scenario::PodToRemoteNodePort] {
            assert_eq!(source(scenario), Source::OneOf(vec![pod]), "{scenario:?}");
        }
        for scenario in [Scenario::HostToRemotePod, Scenario::PodToItself] {
            assert_eq!(source(scenario), Source::OwnOr(vec![node]), "{scenario:?}");
        }
    }

    #[test]
    fn names_of_scenarios_are_an_interface() {
        for scenario in Scenario::value_variants() {
            let value = scenario.to_possible_value().map(|it| it.get_name().to_owned());
            assert_eq!(value, Some(scenario.name()), "the option and JSON have one name");
        }
        assert_eq!(Scenario::PodToRemoteNodePort.name(), "pod-to-remote-node-port");
    }
}
