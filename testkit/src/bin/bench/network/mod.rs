//! Latency and throughput between pods, compared with what the kernel and other networks reach on
//! the same machine in the same run.
//!
//! Every case of a group gets a short turn, round by round; what counts is the ratio of two turns of one round.

mod bare;
mod bridge;
mod kernel;
mod ours;
mod traffic;

use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result};
use bare::{Bare, Hook};
use bridge::Bridge;
use kernel::{Hosts, Place};
use ours::{FAR, NEAR, Ours, SERVICE_PORT, vips};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::{Netns, Routing, wait};
use traffic::{Ends, PORT, SERVICE_TARGET, Test, Turn};

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Turns of each case.
    pub rounds: usize,
    /// Length of a turn.
    pub time: Duration,
    /// Services in the tables of rustnet and kube-proxy.
    pub services: u32,
    /// CPU of both ends.
    pub cpu: usize,
    /// Only tables whose title holds this.
    pub only: String,
}

/// A ratio that a case is to reach.
struct Goal {
    test: Test,
    least: f64,
}

/// A way from a client to a server.
struct Case<'a> {
    name: &'static str,
    client: &'a Netns,
    server: &'a Netns,
    /// By family, IPv4 first.
    targets: [SocketAddr; 2],
    /// Against the group's first case.
    goals: &'static [Goal],
}

/// Cases that are compared with the first of them.
struct Group<'a> {
    title: &'static str,
    cases: Vec<Case<'a>>,
}

/// Congestion control of all connections, whatever this machine's default is: one that paces would measure its timers. This one is
/// in every kernel, and every network namespace may choose it.
const CONGESTION: &str = "reno";

const NEAR_GOALS: &[Goal] = &[
    Goal { test: Test::Rr, least: 0.97 },
    Goal { test: Test::Crr, least: 0.92 },
    Goal { test: Test::Stream, least: 0.97 },
];
const ROUTED_GOALS: &[Goal] = &[Goal { test: Test::Rr, least: 1.0 }, Goal { test: Test::Crr, least: 1.0 }];
const TUNNEL_GOALS: &[Goal] = &[Goal { test: Test::Rr, least: 0.95 }, Goal { test: Test::Stream, least: 0.95 }];
/// What a packet saves that goes past the device.
const PAST_GOALS: &[Goal] = &[
    Goal { test: Test::Rr, least: 1.05 },
    Goal { test: Test::Crr, least: 1.0 },
    Goal { test: Test::Stream, least: 0.95 },
];

impl<'a> Case<'a> {
    fn places(name: &'static str, client: &'a Place, server: &'a Place) -> Self {
        let targets = [true, false].map(|v4| SocketAddr::new(server.address_like(v4), PORT));
        Self { name, client: &client.netns, server: &server.netns, targets, goals: &[] }
    }

    fn to_address(name: &'static str, client: &'a Netns, server: &'a Netns, addresses: &[IpAddr]) -> Result<Self> {
        let target = |v4: bool| -> Result<SocketAddr> {
            let address = addresses.iter().find(|a| a.is_ipv4() == v4);
            Ok(SocketAddr::new(*address.with_context(|| format!("{name}: not both families"))?, PORT))
        };
        Ok(Self { name, client, server, targets: [target(true)?, target(false)?], goals: &[] })
    }

    fn to_service(name: &'static str, client: &'a Netns, server: &'a Netns, n: u32) -> Self {
        Self { name, client, server, targets: vips(n).map(|v| SocketAddr::new(v, SERVICE_PORT)), goals: &[] }
    }

    fn goals(self, goals: &'static [Goal]) -> Self {
        Self { goals, ..self }
    }

    fn ends(&self, family: usize) -> Ends<'a> {
        let target = self.targets[family];
        let port = if target.port() == SERVICE_PORT { SERVICE_TARGET } else { PORT };
        Ends { client: self.client, server: self.server, target, port }
    }

    /// Services may not be known yet.
    fn wait(&self) -> Result<()> {
        for family in [0, 1] {
            wait::until(self.name, || {
                traffic::turn(Test::Rr, &self.ends(family), 0, Duration::from_millis(1)).map(drop)
            })?;
        }
        Ok(())
    }
}

/// Builds all networks, measures and prints.
pub fn run(extent: &Extent) -> Result<()> {
    println!(
        "## Pod to pod (`cargo xtask bench network`)\n\n{} rounds of {} ms a case, both ends on CPU {}, {CONGESTION}, {} services in the \
         tables of rustnet and kube-proxy. A \
         round's ratio is the case's median transaction (throughput for streams) against the first case's of the same round; what counts \
         is the median over the rounds. \"By the best\" compares the quickest hundredth of all transactions (the best turns): on a busy \
         machine the steadier figure.",
        extent.rounds,
        extent.time.as_millis(),
        extent.cpu,
        extent.services
    );
    let direct = kernel::direct()?;
    let hosts = Hosts::new()?;
    let bare = [Bare::new(Hook::Clsact)?, Bare::new(Hook::Tcx)?];
    let native = Ours::start(Routing::Native, extent.services, &[]).context("rustnet, native routing")?;
    let vxlan = Ours::start(Routing::Vxlan, extent.services, &[]).context("rustnet, VXLAN")?;
    let past = Ours::start(Routing::Vxlan, extent.services, &["--overlay-path", "programs"])
        .context("rustnet, VXLAN past its device")?;
    let bridge = present("bridge plugin", Bridge::start(None));
    let proxied = present("bridge plugin with kube-proxy", Bridge::start(Some(extent.services)));
    let groups = groups(&direct, &hosts, &bare, [&native, &vxlan, &past], [bridge.as_ref(), proxied.as_ref()])?;
    for case in groups.iter().flat_map(|g| &g.cases) {
        for netns in [case.client, case.server] {
            netns.sysctl("ipv4/tcp_congestion_control", CONGESTION)?;
        }
        case.wait()?;
    }
    let wanted = |group: &Group<'_>, test: Test| title(group, test).contains(&extent.only);
    let mut results: BTreeMap<(usize, Test, usize), Vec<Vec<Turn>>> = BTreeMap::new();
    for round in 0..extent.rounds {
        for (g, group) in groups.iter().enumerate() {
            for (test, family) in Test::ALL.into_iter().flat_map(|t| [(t, 0), (t, 1)]) {
                if !wanted(group, test) {
                    continue;
                }
                let turns = results
                    .entry((g, test, family))
                    .or_insert_with(|| group.cases.iter().map(|_| Vec::new()).collect());
                let mut order: Vec<usize> = (0..group.cases.len()).collect();
                if round % 2 == 1 {
                    // There and back, so that a steady drift favours nobody.
                    order.reverse();
                }
                for i in order {
                    turns[i].push(traffic::turn(test, &group.cases[i].ends(family), extent.cpu, extent.time)?);
                }
            }
        }
    }
    for (g, group) in groups.iter().enumerate() {
        for test in Test::ALL {
            if wanted(group, test) {
                print(group, test, [&results[&(g, test, 0)], &results[&(g, test, 1)]]);
            }
        }
    }
    Ok(())
}

/// A peer, or a line that says why it is missing.
fn present<T>(name: &str, started: Result<T>) -> Option<T> {
    match started {
        Ok(peer) => Some(peer),
        Err(error) => {
            println!("\n**Not measured: {name}.** {error:#}");
            None
        }
    }
}

fn groups<'a>(
    direct: &'a [Place; 2],
    hosts: &'a Hosts,
    bare: &'a [Bare; 2],
    [native, vxlan, past]: [&'a Ours; 3],
    [bridge, proxied]: [Option<&'a Bridge>; 2],
) -> Result<Vec<Group<'a>>> {
    let mut near = vec![
        Case::places("direct veth pair", &direct[0], &direct[1]),
        Case::places("kernel routing", &hosts.routed[0], &hosts.routed[1]),
        Case::places("redirect_peer alone, clsact", &bare[0].pods[0], &bare[0].pods[1]),
        Case::places("redirect_peer alone, TCX", &bare[1].pods[0], &bare[1].pods[1]),
    ];
    let mut far = vec![Case::places("kernel routing", &hosts.routed[0], &hosts.routed[2])];
    let tunnel = Case::places("kernel VXLAN", &hosts.tunnelled[0], &hosts.tunnelled[1]);
    if let Some(Bridge { pods, .. }) = bridge {
        near.push(Case::to_address("bridge plugin", &pods[0].netns, &pods[1].netns, &pods[1].addresses)?);
        far.push(Case::to_address("bridge plugin, routes", &pods[0].netns, &pods[2].netns, &pods[2].addresses)?);
    }
    if let Some(Bridge { pods, .. }) = proxied {
        let (a, b, c) = (&pods[0].netns, &pods[1].netns, &pods[2].netns);
        near.push(Case::to_address("bridge with kube-proxy, pod", a, b, &pods[1].addresses)?);
        near.push(Case::to_service("bridge, kube-proxy, ClusterIP", a, b, NEAR));
        far.push(Case::to_service("bridge, kube-proxy, ClusterIP", a, c, FAR));
    }
    let pods = |ours: &'a Ours| -> [&'a Netns; 3] { [0, 1, 2].map(|i| ours.pods[i].netns()) };
    let [a, b, c] = pods(native);
    near.push(Case::to_address("rustnet, pod", a, b, native.pods[1].addresses())?.goals(NEAR_GOALS));
    near.push(Case::to_service("rustnet, ClusterIP", a, b, NEAR));
    far.push(Case::to_address("rustnet native, pod", a, c, native.pods[2].addresses())?.goals(ROUTED_GOALS));
    far.push(Case::to_service("rustnet native, ClusterIP", a, c, FAR));
    let [a, _, c] = pods(vxlan);
    let [client, _, server] = pods(past);
    let tunnel = vec![
        tunnel,
        Case::to_address("rustnet VXLAN, pod", a, c, vxlan.pods[2].addresses())?.goals(TUNNEL_GOALS),
        Case::to_service("rustnet VXLAN, ClusterIP", a, c, FAR),
        Case::to_address("rustnet VXLAN past the device, pod", client, server, past.pods[2].addresses())?
            .goals(PAST_GOALS),
        Case::to_service("rustnet VXLAN past the device, ClusterIP", client, server, FAR),
    ];
    Ok(vec![
        Group { title: "One node, MTU 1500", cases: near },
        Group { title: "Two nodes, routed, MTU 1500", cases: far },
        Group { title: "Two nodes, VXLAN, MTU 1450", cases: tunnel },
    ])
}

fn title(group: &Group<'_>, test: Test) -> String {
    format!("{}: {}", group.title, test.name())
}

/// One table: a group and a test, both families.
fn print(group: &Group<'_>, test: Test, families: [&Vec<Vec<Turn>>; 2]) {
    let peer = group.cases.first().map_or("", |c| c.name);
    let (pace, figures) = match test {
        Test::Stream => ("Gbit/s", "Gbit/s of turns: least / median / greatest"),
        Test::Rr | Test::Crr => ("1/s", "us: least / median / p99"),
    };
    println!("\n### {}\n", title(group, test));
    println!("| | Case | {pace} | {figures} | Of {peer} (least-greatest) | By the best | Goal | |");
    println!("|---|---|---|---|---|---|---|---|");
    for (family, cases) in ["IPv4", "IPv6"].into_iter().zip(families) {
        let best_of_peer = best(&cases[0]);
        for (i, (case, turns)) in group.cases.iter().zip(cases).enumerate() {
            let (median, figures) = figures_of(test, turns);
            let ratios = Sorted::new(turns.iter().zip(&cases[0]).map(|(own, peer)| own.pace() / peer.pace()).collect());
            let (ratio, by_best) = if i == 0 {
                ("1".to_owned(), "1".to_owned())
            } else {
                (
                    format!("{:.3} ({:.3}-{:.3})", ratios.median(), ratios.least(), ratios.greatest()),
                    format!("{:.3}", best(turns) / best_of_peer),
                )
            };
            let (goal, word) = match case.goals.iter().find(|g| g.test == test) {
                Some(goal) => (format!("{:.2}", goal.least), verdict(ratios.median() >= goal.least)),
                None => (String::new(), ""),
            };
            println!("| {family} | {} | {median} | {figures} | {ratio} | {by_best} | {goal} | {word} |", case.name);
        }
    }
}

/// The pace of the median turn, and the distribution.
fn figures_of(test: Test, turns: &[Turn]) -> (String, String) {
    let paces = |scale: f64| Sorted::new(turns.iter().map(|t| t.pace() * scale).collect());
    if test == Test::Stream {
        let r = paces(8e-9);
        let figures = format!("{:.2} / {:.2} / {:.2}", r.least(), r.median(), r.greatest());
        return (format!("{:.2}", r.median()), figures);
    }
    let each = turns.iter().flat_map(Turn::each).map(|ns| f64::from(*ns) / 1e3);
    (format!("{:.0}", paces(1.0).median()), Sorted::new(each.collect()).three(2))
}

/// The pace that one of a hundred transactions exceeds, or the best stream: what is left when hardly anybody disturbs.
fn best(turns: &[Turn]) -> f64 {
    let mut each: Vec<u32> = turns.iter().flat_map(Turn::each).copied().collect();
    each.sort_unstable();
    let quick = each.get(each.len() / 100);
    quick.map_or_else(|| turns.iter().map(Turn::pace).fold(f64::NAN, f64::max), |ns| 1e9 / f64::from(*ns))
}
