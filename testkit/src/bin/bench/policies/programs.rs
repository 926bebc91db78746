//! What policies cost a packet: the programs with maps of policies of different sizes, in turn with programs without any.

use crate::packets::{A4, B4, Case, Extent, POD, Samples, Side, load_side, sample, with_devices, within_node};
use crate::stats::{Sorted, verdict};
use anyhow::{Context, Result};
use rustnet_common::addr::Addr;
use rustnet_common::names::map;
use rustnet_common::policy::{
    ALLOW, ANY_PORT, FULL, OPEN, Policies, PolicyCidrKey, PolicyMatch, PolicyPod, PolicyRule, PolicyRuleKey, flags,
};
use rustnet_common::tuple::proto;
use std::net::{IpAddr, Ipv4Addr};
use testkit::datapath::{Datapath, object_path, service_sizes};

/// Policies of each side that has some: each is a set with two rules, a class with a pod elsewhere, and a range.
const POLICIES: [u32; 2] = [10, 30_000];
const NAMES: [&str; 3] = ["no policies", "10 policies", "30,000 policies"];
/// Nanoseconds that policies may add to a known flow and to a new one, and how much more the second number of them may.
const GOALS: [f64; 2] = [5.0, 150.0];
const FLAT: f64 = 1.25;
/// Class and set of the client and of the server.
const CLIENT: u32 = 1;
const SERVER: u32 = 2;
/// The first class and set of policies that are about others.
const OTHERS: u32 = 1000;

/// Measures and prints.
pub fn run(extent: &Extent) -> Result<()> {
    let cases = within_node()?;
    let samples = with_devices(|| {
        let mut samples: [Samples; 2] = Default::default();
        // What a known flow costs differs by a tenth with the addresses that the kernel chooses for the programs.
        for _ in 0..extent.loads.max(1) {
            let sides = sides()?;
            for (case, samples) in cases.iter().zip(&mut samples) {
                sample(&sides, case, extent, samples)?;
            }
        }
        Ok(samples)
    })?;
    println!(
        "from_pod, UDP over IPv4 to a pod of the node, both of whose ends have policies, ns per packet above empty: least / median of {} \
         loads. A policy has a set with two rules, a pod elsewhere with a class of its own, and a range.\n\n\
         | | {} | Policies add (least), ns | Goal | |\n|---|---|---|---|---|---|---|",
        extent.loads,
        NAMES.join(" | ")
    );
    for ((case, samples), goal) in cases.iter().zip(samples).zip(GOALS) {
        print(case, samples, goal)?;
    }
    Ok(())
}

fn print(case: &Case, samples: Samples, goal: f64) -> Result<()> {
    let base = Sorted::new(samples.base);
    let above: Vec<(f64, f64)> = samples
        .own
        .into_iter()
        .map(Sorted::new)
        .map(|it| (it.least() - base.least(), it.median() - base.median()))
        .collect();
    let [none, few, many] = above[..].try_into().context("three sides")?;
    let columns = above.iter().map(|(least, median)| format!("{least:.0} / {median:.0}"));
    let (few, many) = (few.0 - none.0, many.0 - none.0);
    let is_flat = many <= goal && many <= (few * FLAT).max(goal / 10.0);
    println!(
        "| {} | {} | {few:.0}, {many:.0} | {goal} | {} |",
        case.name,
        columns.collect::<Vec<_>>().join(" | "),
        verdict(few <= goal && is_flat)
    );
    Ok(())
}

fn sides() -> Result<Vec<Side>> {
    let room = POLICIES[1] * 2 + 1024;
    let mut tables = service_sizes(1024, 524_288).to_vec();
    tables.extend([map::POLICY_PODS, map::POLICY_CIDRS, map::POLICY_RULES].map(|name| (name, room)));
    let counts = [None].into_iter().chain(POLICIES.map(Some));
    let side = |(name, count): (_, Option<u32>)| {
        let side = load_side(name, &object_path(), &tables)?;
        count.map_or(Ok(()), |count| enforce(&side.datapath, count)).with_context(|| format!("writing {name}"))?;
        Ok(side)
    };
    NAMES.into_iter().zip(counts).map(side).collect()
}

/// Writes policies of the two ends, and so many of others.
fn enforce(d: &Datapath, count: u32) -> Result<()> {
    let (pods, cidrs, rules) = (d.table(map::POLICY_PODS)?, d.table(map::POLICY_CIDRS)?, d.table(map::POLICY_RULES)?);
    let ip = |ip: Ipv4Addr| Addr::from(IpAddr::V4(ip));
    let client = PolicyPod { class: CLIENT, ingress: OPEN, egress: CLIENT, ifindex: POD };
    for n in 0..16 {
        pods.put(&ip(Ipv4Addr::from(u32::from(A4) + n)), &client)?;
    }
    pods.put(&ip(B4), &PolicyPod { class: SERVER, ingress: SERVER, egress: OPEN, ifindex: POD })?;
    let rule = |set: u32, class: u32, port: u16| {
        let data = PolicyMatch { set, class, proto: proto::UDP, pad: 0, port: port.to_be_bytes() };
        PolicyRuleKey { prefix_len: if port == 0 { ANY_PORT } else { FULL }, data }
    };
    let allow = PolicyRule { flags: ALLOW, rule: 1 };
    rules.put(&rule(CLIENT, SERVER, 80), &allow)?;
    rules.put(&rule(SERVER, CLIENT, 80), &allow)?;
    for n in 0..count {
        let other = OTHERS + n;
        // Half of them are policies for the server itself: their rules stand next to the one that is looked for.
        let set = if n % 2 == 0 { SERVER } else { other };
        rules.put(&rule(set, other, 80), &allow)?;
        rules.put(&rule(set, other, 443), &allow)?;
        let elsewhere = PolicyPod { class: other, ingress: OPEN, egress: OPEN, ifindex: 0 };
        pods.put(&ip(Ipv4Addr::from(0x0a80_0000 + n)), &elsewhere)?;
        let data = ip(Ipv4Addr::from(0x6440_0000 + (n << 6)));
        cidrs.put(&PolicyCidrKey { prefix_len: 122, data }, &other)?;
    }
    d.table(map::POLICY)?.put(&0_u32, &Policies { generation: 1, flags: flags::ENFORCED })
}
