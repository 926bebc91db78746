//! rustnet against the real kube-proxy: the same Services at the same time in two networks that are alike, and each address of
//! each Service asked from each place in both. What differs has to be one of the differences that the documents list.
//!
//! | Environment | Default |
//! |---|---|
//! | `RUSTNET_SERVICES` | 60: how many Services are drawn |
//! | `RUSTNET_SERVICES_SEED` | 2: the seed of the draw |

mod compare;
mod expected;
mod health;
mod model;
mod probe;
mod question;
mod random;
mod reference;
mod shrink;
mod world;

use super::cluster::{Cluster, block_on, one_at_a_time};
use super::kube_source::NODES;
use super::server::Server;
use anyhow::{Context as _, Result, ensure};
use compare::Report;
use model::{Backend, Case, Family, Type};
use probe::Patience;
use random::Random;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use testkit::apiserver::Store;
use testkit::netns::{Holder, Own};
use testkit::{Node, Proto, Routing, wait};
use world::{Place, World};

const DOCUMENT: &str = include_str!("../../docs/kube-proxy-differences.md");
/// So many Services live at the same time.
const AT_ONCE: u16 = 60;
/// So many smaller Services are tried to show a difference by less.
const SHRINKS: usize = 25;
/// The number of the first sentinel: its address is above those of all others.
const SENTINELS: u16 = 0xf000;
/// The node port of the sentinel.
const SENTINEL_PORT: u16 = 32_760;

/// Both worlds and the API server that feeds them. The order of the fields is the order of their end.
struct Rig {
    reference: World,
    ours: World,
    server: Server,
    _holder: Holder,
    /// Names of the slices that there are.
    slices: BTreeSet<String>,
    rounds: u16,
}

impl Rig {
    fn start(routing: Routing) -> Result<Self> {
        let holder = Holder::new(&format!("rn{}-differential", std::process::id()), Own::default())?;
        let server = Server::start(&holder, Store::Pinned, &[])?;
        holder.run(|| block_on(async { Cluster::new(&server)?.apply(NODES).await }))??;
        let ours = World::ours(&server, routing)?;
        let reference = World::reference(&server, &ours)?;
        Ok(Self { reference, ours, server, _holder: holder, slices: BTreeSet::new(), rounds: 0 })
    }

    fn worlds(&self) -> [&World; 2] {
        [&self.reference, &self.ours]
    }

    fn backends(&self) -> &[Backend] {
        self.ours.backends()
    }

    /// Gives the cluster these Services, takes those of `gone` from it, and waits until both proxies know.
    fn publish(&mut self, cases: &[Case], gone: &[Case]) -> Result<()> {
        let wanted: BTreeSet<String> =
            cases.iter().flat_map(|case| (0..case.slices.len()).map(|n| case.slice_name(n))).collect();
        let stale: Vec<String> = self.slices.difference(&wanted).cloned().collect();
        self.slices = wanted;
        let server = &self.server;
        server.netns().run(|| {
            block_on(async {
                let cluster = Cluster::new(server)?;
                for slice in &stale {
                    cluster.delete("discovery.k8s.io/v1", "EndpointSlice", slice).await?;
                }
                for case in gone {
                    cluster.delete("v1", "Service", &case.name()).await?;
                }
                for case in cases {
                    for mut object in case.objects() {
                        if object["kind"] == "Service" && case.type_ == Type::LoadBalancer {
                            object["status"] = case.status();
                        }
                        cluster.apply_object(&object).await?;
                    }
                }
                Ok(())
            })
        })??;
        self.rounds += 1;
        self.settle()
    }

    /// Publishes these Services, lets go of others, and compares how the first `count` of them are served.
    fn judge(&mut self, cases: &[Case], count: usize, gone: &[Case]) -> Result<Report> {
        let start = Instant::now();
        self.publish(cases, gone)?;
        let (published, start) = (start.elapsed(), Instant::now());
        let questions = question::all(&cases[..count], self.ours.nodes());
        let mut report = compare::compare(cases, &questions, &self.reference, &self.ours)?;
        eprintln!("published in {published:?}, compared in {:?}: {report}", start.elapsed());
        if let Err(error) = report.check(cases) {
            let alone = self.shrink(cases, &report).unwrap_or_else(|error| format!("{error:#}"));
            return Err(error.context(format!("alone and smaller: {alone}\n\nall of them")));
        }
        compare::compare_health(&cases[..count], &self.reference, &self.ours, &mut report)?;
        Ok(report)
    }

    /// The first Service that was served differently, alone and with as little as still shows it.
    fn shrink(&mut self, cases: &[Case], report: &Report) -> Result<String> {
        let at = report.first().context("no difference")?;
        let gone: Vec<Case> = [&cases[..at], &cases[at + 1..]].concat();
        let mut case = cases[at].clone();
        let Some(mut shown) = self.differs(&case, &gone)? else {
            return Ok(format!("{} alone shows no difference", case.name()));
        };
        let mut left = SHRINKS;
        'smaller: loop {
            for simpler in shrink::simpler(&case) {
                if left == 0 {
                    return Ok(shown);
                }
                left -= 1;
                if let Ok(Some(text)) = self.differs(&simpler, &[]) {
                    (case, shown) = (simpler, text);
                    continue 'smaller;
                }
            }
            return Ok(shown);
        }
    }

    /// How this Service is served differently, if it is.
    fn differs(&mut self, case: &Case, gone: &[Case]) -> Result<Option<String>> {
        let cases = std::slice::from_ref(case);
        self.publish(cases, gone)?;
        let questions = question::all(cases, self.ours.nodes());
        let report = compare::compare(cases, &questions, &self.reference, &self.ours)?;
        Ok(report.check(cases).err().map(|error| format!("{error:#}")))
    }

    /// Waits until both proxies serve a Service that was written after all others.
    fn settle(&self) -> Result<()> {
        let number = SENTINELS + self.rounds;
        let vips = [Family::V4, Family::V6].map(|family| model::vip(number, family));
        let world = self.backends().last().context("a machine outside")?;
        let name = format!("sentinel-{number}");
        let mut objects: Vec<Value> = vec![json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {
                "type": "NodePort", "clusterIP": vips[0], "clusterIPs": vips, "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": [{"name": "udp", "protocol": "UDP", "port": 7, "nodePort": SENTINEL_PORT}],
            },
        })];
        for (kind, ip) in [("IPv4", world.address(Family::V4)), ("IPv6", world.address(Family::V6))] {
            objects.push(json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{}", kind.to_lowercase()),
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": kind, "ports": [{"name": "udp", "protocol": "UDP", "port": model::TARGETS[0]}],
                "endpoints": [{"addresses": [ip]}],
            }));
        }
        let server = &self.server;
        let before = format!("sentinel-{}", number - 1);
        server.netns().run(|| {
            block_on(async {
                let cluster = Cluster::new(server)?;
                if number > SENTINELS + 1 {
                    // It has the node port.
                    cluster.delete("v1", "Service", &before).await?;
                }
                for object in &objects {
                    cluster.apply_object(object).await?;
                }
                Ok(())
            })
        })??;
        let patience = Patience { tries: 1, timeout: Duration::from_secs(4), timeouts: 1 };
        for world in self.worlds() {
            let inside = [Place::PodA, Place::PodB].into_iter();
            let inside = inside.flat_map(|place| vips.map(|vip| (place, SocketAddr::new(vip, 7))));
            let addresses = world.nodes().iter().flat_map(Node::addresses);
            let outside = addresses.map(|ip| (Place::Outside, SocketAddr::new(ip, SENTINEL_PORT)));
            for (place, target) in inside.chain(outside) {
                wait::until(&format!("{}: {target} served at {place:?}", world.name), || {
                    let heard = world.ask(place, Proto::Udp, target, patience)?;
                    ensure!(!heard.answers.is_empty(), "{heard}");
                    Ok(())
                })
                .with_context(|| world.logs())?;
            }
        }
        Ok(())
    }
}

/// Draws Services, publishes them and compares; then changes some of them, and compares those again.
fn campaign(routing: Routing, count: u16, seed: u64) -> Result<()> {
    let _one = one_at_a_time();
    eprintln!("{count} Services, seed {seed}");
    let mut rig = Rig::start(routing)?;
    let mut random = Random::new(seed);
    let mut total = Report::default();
    let (mut gone, mut drawn, mut next) = (Vec::new(), 0, 0);
    while drawn < count {
        let batch = (count - drawn).min(AT_ONCE);
        drawn += batch;
        let backends = rig.backends().to_vec();
        let mut draw = |number| Case::draw(number, seed, &mut random, &backends);
        let changed = batch / 4;
        let numbers = next..next + batch - changed;
        next = numbers.end;
        let mut cases: Vec<Case> = numbers.clone().map(&mut draw).collect();
        // Those that are changed below keep their addresses to themselves.
        model::share_addresses(&mut cases[changed.into()..], &mut Random::new(seed ^ u64::from(drawn)));
        total.add(rig.judge(&cases, cases.len(), &gone)?);
        for (case, number) in cases.iter_mut().zip(numbers.take(changed.into())) {
            *case = draw(number);
        }
        total.add(rig.judge(&cases, changed.into(), &[])?);
        gone = cases;
    }
    eprintln!("{total}");
    let idle = total.idle();
    ensure!(idle.is_empty(), "these rules never applied: {idle:?}; is there still such a difference?");
    Ok(())
}

/// A number of the environment, or the usual one.
fn number<T: std::str::FromStr>(variable: &str, usual: T) -> Result<T> {
    let Ok(text) = std::env::var(variable) else { return Ok(usual) };
    text.parse().ok().with_context(|| format!("{variable}={text} is no number"))
}

#[test]
fn random_services_are_served_as_kube_proxy_serves_them() -> Result<()> {
    campaign(Routing::Vxlan, number("RUSTNET_SERVICES", 60)?, number("RUSTNET_SERVICES_SEED", 2)?)
}

#[test]
#[ignore = "the long tier runs it"]
fn random_services_are_served_as_kube_proxy_serves_them_with_native_routing() -> Result<()> {
    campaign(Routing::Native, number("RUSTNET_SERVICES", 60)?, number("RUSTNET_SERVICES_SEED", 2)?)
}

#[test]
fn the_rules_are_the_compared_rows_of_the_document() -> Result<()> {
    let rows = DOCUMENT.lines().filter(|line| line.starts_with("| ") && line.ends_with(" | yes |"));
    let rows: BTreeSet<&str> = rows.filter_map(|row| row[2..].split(" | ").next()).collect();
    let rules: BTreeSet<&str> = expected::names().collect();
    ensure!(rules == rows, "rules: {rules:#?}\nrows of docs/kube-proxy-differences.md: {rows:#?}");
    Ok(())
}
