//! The course of a run: probes and Services up, rows one after another.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Pod, Service};
use tokio::time::{Instant, sleep};

use super::cluster::{Agents, Cluster, KnownNode, PAUSE, is_policy, refusal, say};
use super::evidence::Evidence;
use super::objects::{PEER, Role, Run, pod_addresses, trouble_of};
use super::plan::{self, SERVICE_PORT};
use super::report::{Outcome, Progress, Report, not_started};
use super::row::{Check, Facts, Node, Probe, Row, Scenario, Skipped, Step};
use super::verdict::{Failure, judge};
use super::wire::{Answer, Cause, MIN_BYTES, Protocol, Question};

/// Nodes that take part unless others are named: rows are one after another, and node ports are few.
const NODES: usize = 8;
/// How long agents may take to serve the Services of the run. Rows fail after that.
const SETTLING: Duration = Duration::from_secs(15);
/// How often a check is made that may fail for being early, and how long it waits between.
const ATTEMPTS: u32 = 3;
const PAUSE_OF_CHECKS: Duration = Duration::from_secs(1);
/// A check that fails after this time is not made again: a run has many.
const SLOW: Duration = Duration::from_secs(5);

/// The nodes that take part, and rows about those that do not.
#[derive(Debug)]
pub struct Chosen {
    nodes: Vec<KnownNode>,
    left_out: Vec<Outcome>,
}

/// Chooses the nodes that take part: those named, or the first ones that are ready and have an agent.
///
/// # Errors
/// A name that no node has; no node is left.
pub fn choose(known: Vec<KnownNode>, agents: &Agents, names: &[String]) -> Result<Chosen> {
    if let Some(name) = names.iter().find(|name| known.iter().all(|node| node.name != **name)) {
        let all: Vec<_> = known.iter().map(|node| node.name.as_str()).collect();
        bail!("--nodes {name}: no node has this name; there are {}", all.join(", "));
    }
    let is_named = |node: &KnownNode| names.is_empty() || names.contains(&node.name);
    let mut chosen = Chosen { nodes: Vec::new(), left_out: Vec::new() };
    for node in known.into_iter().filter(is_named) {
        let reason = if !node.is_ready {
            Some("is not ready")
        } else if agents.is_known() && !agents.has(&node.name) {
            Some("has no agent of rustnet's")
        } else if names.is_empty() && chosen.nodes.len() == NODES {
            Some("is left out, as eight take part already: --nodes chooses others")
        } else {
            None
        };
        match reason {
            None => chosen.nodes.push(node),
            Some(reason) => {
                let reason = format!("node {} {reason}", node.name);
                let skipped = Skipped { scenario: Scenario::ProbeStart, family: None, reason };
                chosen.left_out.push(Outcome::skipped(&skipped));
            }
        }
    }
    if chosen.nodes.is_empty() {
        let reasons: Vec<_> = chosen.left_out.iter().map(|it| it.detail.as_str()).collect();
        bail!("no node can take part: {}; see `kubectl get nodes`", reasons.join("; "));
    }
    Ok(chosen)
}

/// A run with all that it needs.
pub struct Stage<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// Its agents.
    pub agents: &'a Agents,
    /// The names of the run.
    pub run: &'a Run,
    /// Who is kept informed.
    pub progress: &'a Progress<'a>,
    /// How long the probes may take to start.
    pub limit: Duration,
    /// What to try; empty: all.
    pub scenarios: &'a [Scenario],
}

impl Stage<'_> {
    /// Creates all objects in the namespace and tries all rows.
    ///
    /// # Errors
    /// The API server refuses an object, or no probe starts.
    pub async fn run(&self, chosen: Chosen, world: Option<(String, u16)>) -> Result<Report> {
        let Chosen { nodes, left_out: mut outcomes } = chosen;
        self.progress.begin(&format!("creating probes and Services in namespace {}", self.run.namespace));
        let end = Instant::now() + self.limit;
        let forbidden = self.create_probes(&nodes).await?;
        let services = self.create_services(nodes.len()).await?;
        let (probes, troubles) = self.wait_for_probes(&nodes, forbidden.is_none(), end).await?;
        let (api_server, without_api_server) = match self.cluster.api_server().await {
            Ok(found) => (found, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let facts = Facts {
            nodes: nodes.iter().enumerate().filter_map(|(i, node)| member(i, node, &probes, &services[i])).collect(),
            peer: probes.get(PEER).cloned(),
            namespace: self.run.namespace.clone(),
            echo_port: self.run.port + 1,
            headless: self.run.headless_name(),
            without_hosts: forbidden.or_else(|| without_hosts(&troubles)),
            without_dns: self.cluster.without_dns().await,
            api_server,
            without_api_server,
            world,
        };
        if facts.nodes.is_empty() {
            // Mostly the same for all, such as an image that no node has.
            let why = troubles.first().map(|it| format!("{} on {}: {}", it.probe, it.node, it.why)).unwrap_or_default();
            bail!("none of {} probes answers within {:?} (--timeout); {why}", troubles.len(), self.limit);
        }
        self.settle(&facts).await;
        outcomes.extend(troubles.iter().map(|it| not_started(&it.probe, &it.node, it.cause, &it.why)));
        self.try_all(&plan::plan(&facts, self.scenarios), &mut outcomes).await;
        Ok(Report::new(outcomes))
    }

    /// Creates all probes; returns why those of hosts may not be.
    async fn create_probes(&self, nodes: &[KnownNode]) -> Result<Option<String>> {
        let (run, namespace) = (self.run, &self.run.namespace);
        self.cluster.create_account(run).await?;
        for (number, node) in nodes.iter().enumerate() {
            let roles: &[Role] = if number == 0 { &[Role::Pod, Role::Peer] } else { &[Role::Pod] };
            for role in roles {
                let made = self.cluster.create_pod(namespace, &run.probe(*role, number, &node.name)).await;
                made.map_err(|error| refusal(&format!("creating the probe on {}", node.name), &error))?;
            }
        }
        for (number, node) in nodes.iter().enumerate() {
            match self.cluster.create_pod(namespace, &run.probe(Role::Host, number, &node.name)).await {
                Ok(()) => {}
                Err(error) if is_policy(&error) => {
                    return Ok(Some(say("a pod in a node's network is forbidden", &error)));
                }
                Err(error) => return Err(refusal(&format!("creating the probe of host {}", node.name), &error)),
            }
        }
        Ok(None)
    }

    async fn create_services(&self, count: usize) -> Result<Vec<Service>> {
        let namespace = &self.run.namespace;
        self.cluster.create_service(namespace, &self.run.headless()).await?;
        let mut services = Vec::new();
        for number in 0..count {
            services.push(self.cluster.create_service(namespace, &self.run.service(number)).await?);
        }
        Ok(services)
    }

    /// Waits for all probes, and returns those that answer, by name, and those that do not.
    async fn wait_for_probes(
        &self,
        nodes: &[KnownNode],
        has_hosts: bool,
        end: Instant,
    ) -> Result<(BTreeMap<String, Probe>, Vec<Trouble>)> {
        let mut wanted: Vec<(Role, String, String)> = vec![(Role::Peer, PEER.to_owned(), nodes[0].name.clone())];
        for (number, node) in nodes.iter().enumerate() {
            let roles: &[Role] = if has_hosts { &[Role::Pod, Role::Host] } else { &[Role::Pod] };
            wanted.extend(roles.iter().map(|role| (*role, role.name(number), node.name.clone())));
        }
        let trouble = |pods: &BTreeMap<String, Pod>, name: &str| match pods.get(name) {
            Some(pod) => trouble_of(pod),
            None => Some("its pod is gone".to_owned()),
        };
        let pods = loop {
            let pods = self.cluster.pods(&self.run.namespace).await?;
            let missing = wanted.iter().filter(|(_, name, _)| trouble(&pods, name).is_some()).count();
            if missing == 0 || Instant::now() >= end {
                break pods;
            }
            self.progress.begin(&format!("waiting for {missing} of {} probes", wanted.len()));
            sleep(PAUSE).await;
        };
        let (mut probes, mut troubles) = (BTreeMap::new(), Vec::new());
        for (role, probe, node) in wanted {
            let result = if let Some(why) = trouble(&pods, &probe) {
                Err((Cause::NotStarted, why))
            } else {
                let answers = self.cluster.wait_for_probe(self.run, &probe, end).await;
                answers.map_err(|why| (Cause::NotAsked, why))
            };
            match result {
                Ok(()) => {
                    let addresses = pods.get(&probe).map(pod_addresses).unwrap_or_default();
                    probes.insert(probe.clone(), Probe { name: probe, node, addresses });
                }
                Err((cause, why)) => troubles.push(Trouble { role, probe, node, cause, why }),
            }
        }
        Ok((probes, troubles))
    }

    /// Waits until each pod reaches each Service, if not for ever: Services are new, and each agent has to hear of each of them.
    async fn settle(&self, facts: &Facts) {
        self.progress.begin("waiting until all agents serve the Services");
        let end = Instant::now() + SETTLING;
        for near in &facts.nodes {
            for address in facts.nodes.iter().flat_map(|far| &far.cluster_ips) {
                let question = Question {
                    protocol: Protocol::Tcp,
                    host: address.to_string(),
                    port: SERVICE_PORT,
                    bytes: MIN_BYTES,
                    family: None,
                };
                loop {
                    let answer = self.cluster.ask(self.run, &near.pod.name, &question).await;
                    if matches!(answer, Ok(Answer::Reached { .. })) || Instant::now() >= end {
                        break;
                    }
                    sleep(PAUSE).await;
                }
            }
        }
    }

    async fn try_all(&self, steps: &[Step], outcomes: &mut Vec<Outcome>) {
        for (number, step) in (1..).zip(steps) {
            let at = (number, steps.len());
            let outcome = match step {
                Step::Skip(skipped) => Outcome::skipped(skipped),
                Step::Run(row) => {
                    self.progress.begin_row(at, row);
                    self.try_row(row).await
                }
            };
            self.progress.end_row(at, &outcome);
            outcomes.push(outcome);
        }
    }

    async fn try_row(&self, row: &Row) -> Outcome {
        let mut nodes = vec![row.from.node.as_str()];
        if !row.to.node.is_empty() && row.to.node != row.from.node {
            nodes.push(&row.to.node);
        }
        let mut before = Vec::new();
        for node in &nodes {
            before.push(self.cluster.drops(self.agents, node).await);
        }
        // At once: silence differs from slowness only after seconds.
        let results = join_all(row.checks.iter().map(|check| self.try_check(&row.client, check))).await;
        let mut evidence = Vec::new();
        if results.iter().any(Result::is_err) {
            for (node, before) in nodes.iter().zip(&before) {
                let after = self.cluster.drops(self.agents, node).await;
                evidence.push(Evidence::new(node, before, &after));
            }
        }
        Outcome::tried(row, results, evidence)
    }

    /// Asks until the answer is good, or bad for another reason than that somebody has not learned of the objects of the run yet: DNS
    /// and agents learn of them at different times. Returns what to remark.
    async fn try_check(&self, client: &str, check: &Check) -> Result<Option<String>, Failure> {
        let mut before: Option<Failure> = None;
        let mut attempt = 1;
        loop {
            let began = Instant::now();
            let result = match self.cluster.ask(self.run, client, &check.question).await {
                Ok(answer) => judge(check, &answer),
                Err(why) => Err(Failure::new(Cause::NotAsked, check, &why)),
            };
            match result {
                Err(failure) if attempt < ATTEMPTS && began.elapsed() < SLOW && is_early(check, failure.cause) => {
                    before = Some(failure);
                }
                Err(Failure { cause, detail }) if attempt > 1 => {
                    return Err(Failure { cause, detail: format!("{detail} ({attempt} attempts)") });
                }
                Err(failure) => return Err(failure),
                Ok(remark) => {
                    return Ok(before
                        .map(|it| format!("passed at attempt {attempt}, before: {}", it.detail))
                        .or(remark));
                }
            }
            attempt += 1;
            sleep(PAUSE_OF_CHECKS).await;
        }
    }
}

/// True if a check fails like this, too, before all have learned of the objects of the run, or when the API server has not reached its
/// probe.
fn is_early(check: &Check, cause: Cause) -> bool {
    let is_incomplete = check.question.protocol == Protocol::Dns && cause == Cause::WrongServer;
    is_incomplete || matches!(cause, Cause::Refused | Cause::NoName | Cause::NotAsked)
}

/// A probe that does not work.
struct Trouble {
    role: Role,
    probe: String,
    node: String,
    cause: Cause,
    why: String,
}

/// Returns why rows of some hosts are missing.
fn without_hosts(troubles: &[Trouble]) -> Option<String> {
    let hosts = troubles.iter().filter(|it| it.role == Role::Host).map(|it| it.node.as_str());
    let nodes = hosts.collect::<Vec<_>>().join(", ");
    (!nodes.is_empty()).then(|| format!("the probe in the network of {nodes} does not work, see probe-start"))
}

/// Returns a node as the plan wants it, if its probe works.
fn member(number: usize, node: &KnownNode, probes: &BTreeMap<String, Probe>, service: &Service) -> Option<Node> {
    let spec = service.spec.clone().unwrap_or_default();
    let ports: Vec<u16> = spec
        .ports
        .iter()
        .flatten()
        .filter_map(|it| u16::try_from(it.node_port?).ok().filter(|port| *port > 0))
        .collect();
    let host = probes.get(&Role::Host.name(number)).cloned();
    let mut addresses = node.addresses.clone();
    // A cloud's second family may be known to the kubelet alone.
    let more: Vec<IpAddr> =
        host.iter().flat_map(|it| &it.addresses).filter(|it| !addresses.contains(it)).copied().collect();
    addresses.extend(more);
    Some(Node {
        name: node.name.clone(),
        addresses,
        pod: probes.get(&Role::Pod.name(number))?.clone(),
        host,
        cluster_ips: spec.cluster_ips.into_iter().flatten().filter_map(|ip| ip.parse().ok()).collect(),
        ports_of_nodes: <[u16; 2]>::try_from(ports).ok(),
        service: service.metadata.name.clone().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::row::{Expected, Source};
    use super::*;

    fn known(name: &str, is_ready: bool) -> KnownNode {
        KnownNode { name: name.into(), addresses: Vec::new(), is_ready }
    }

    #[test]
    fn only_what_may_be_early_is_asked_again() {
        let check = |protocol| Check {
            question: Question { protocol, host: "h".into(), port: 1, bytes: MIN_BYTES, family: None },
            expected: Expected { server: None, source: Source::Any },
            addresses: Vec::new(),
        };
        for (protocol, cause, want) in [
            (Protocol::Tcp, Cause::Refused, true),
            (Protocol::Tcp, Cause::NoName, true),
            (Protocol::Udp, Cause::NotAsked, true),
            (Protocol::Dns, Cause::WrongServer, true),
            (Protocol::Tcp, Cause::WrongServer, false),
            (Protocol::Tcp, Cause::TimedOut, false),
            (Protocol::Tcp, Cause::WrongSource, false),
            (Protocol::Udp, Cause::Corrupt, false),
        ] {
            assert_eq!(is_early(&check(protocol), cause), want, "{protocol:?} {cause:?}");
        }
    }

    #[test]
    fn nodes_that_do_not_take_part_are_named() {
        let mut nodes: Vec<_> = (0..10).map(|i| known(&format!("n{i}"), true)).collect();
        nodes[0].is_ready = false;
        let chosen = choose(nodes, &Agents::default(), &[]).expect("some");
        assert_eq!(chosen.nodes.len(), NODES);
        let left: Vec<_> = chosen.left_out.iter().map(|it| it.detail.as_str()).collect();
        assert!(left[0].contains("n0 is not ready") && left[1].contains("n9 is left out"), "{left:?}");
    }

    #[test]
    fn named_nodes_are_the_only_ones() {
        let nodes = || vec![known("a", true), known("b", true)];
        let chosen = choose(nodes(), &Agents::default(), &["b".to_owned()]).expect("one");
        assert_eq!(chosen.nodes.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["b"]);
        assert!(chosen.left_out.is_empty());
        let error = choose(nodes(), &Agents::default(), &["c".to_owned()]).expect_err("none");
        assert!(format!("{error}").contains("there are a, b"), "{error}");
        let error = choose(vec![known("a", false)], &Agents::default(), &[]).expect_err("none");
        assert!(format!("{error}").contains("node a is not ready"), "{error}");
    }
}
