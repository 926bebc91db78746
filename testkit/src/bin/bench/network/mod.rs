//! Latency and throughput between pods, compared with what the kernel and other networks reach on
//! the same machine in the same run.
//!
//! Every case of a group gets a short turn, round by round; what counts is the ratio of two turns of one round.

mod bare;
mod bridge;
mod case;
pub mod cluster;
mod kernel;
mod measure;
mod ours;
mod table;
mod traffic;

use anyhow::{Context, Result};
use bare::{Bare, Hook};
use bridge::Bridge;
use case::{Case, Goal, Group, goal};
use kernel::{Hosts, Place};
use measure::CONGESTION;
use ours::{FAR, NEAR, Ours};
use std::time::Duration;
use testkit::{Netns, Routing};
use traffic::Test;

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

const NEAR_GOALS: &[Goal] = &[goal(Test::Rr, 0.97), goal(Test::Crr, 0.92), goal(Test::Stream, 0.97)];
const ROUTED_GOALS: &[Goal] = &[goal(Test::Rr, 1.0), goal(Test::Crr, 1.0)];
const TUNNEL_GOALS: &[Goal] = &[goal(Test::Rr, 0.95), goal(Test::Stream, 0.95)];
/// What a packet saves that goes past the device.
const PAST_GOALS: &[Goal] = &[goal(Test::Rr, 1.05), goal(Test::Crr, 1.0), goal(Test::Stream, 0.95)];

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
    let vxlan =
        Ours::start(Routing::Vxlan, extent.services, &["--overlay-path", "device"]).context("rustnet, VXLAN")?;
    let past = Ours::start(Routing::Vxlan, extent.services, &["--overlay-path", "programs"])
        .context("rustnet, VXLAN past its device")?;
    let bridge = present("bridge plugin", Bridge::start(None));
    let proxied = present("bridge plugin with kube-proxy", Bridge::start(Some(extent.services)));
    let groups = groups(&direct, &hosts, &bare, [&native, &vxlan, &past], [bridge.as_ref(), proxied.as_ref()])?;
    measure::prepare(&groups)?;
    let results = measure::run(&groups, extent)?;
    table::print_all(&groups, &results);
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
        Group::new("One node, MTU 1500", near),
        Group::new("Two nodes, routed, MTU 1500", far),
        Group::new("Two nodes, VXLAN, MTU 1450", tunnel),
    ])
}
