//! The rows under traffic: a service is scaled, agents are killed and come back, and every request is counted.

use crate::addresses::family;
use crate::cluster::{Cluster, SERVICE_PORT, endpoints};
use crate::rows::enough;
use crate::table::{self, Row, Table};
use anyhow::{Result, anyhow};
use std::net::SocketAddr;
use std::time::Duration;
use testkit::client::ask;
use testkit::load::{Kind, Load};
use testkit::manifest::Service;
use testkit::pod::PORT;
use testkit::{Netns, Pod, Proto};

/// Pause between two requests of one client.
const PAUSE: Duration = Duration::from_millis(2);

/// One client's steady traffic.
struct Stream {
    what: String,
    family: &'static str,
    proto: Proto,
    load: Load,
}

/// New and established flows, both protocols and families, from the last pod to the service `web`.
fn start(cluster: &Cluster<'_>, kinds: &[(Kind, Proto)]) -> Result<Vec<Stream>> {
    let from = cluster.pods.last().ok_or_else(|| anyhow!("no pods"))?;
    let mut streams = Vec::new();
    for (kind, proto) in kinds {
        for vip in &cluster.mixed.vips {
            let target = SocketAddr::new(*vip, SERVICE_PORT);
            let load = Load::start(from.netns(), *kind, *proto, target, PAUSE)?;
            let what = format!("{} > service mixed, {kind}", from.name());
            streams.push(Stream { what, family: family(*vip), proto: *proto, load });
        }
    }
    Ok(streams)
}

const EVERYTHING: [(Kind, Proto); 4] = [
    (Kind::Established, Proto::Tcp),
    (Kind::Established, Proto::Udp),
    (Kind::New, Proto::Tcp),
    (Kind::New, Proto::Udp),
];

/// Ends the traffic: one row each, which holds when nothing was lost.
fn finish(streams: Vec<Stream>, table: &mut Table) -> Result<()> {
    for stream in streams {
        let tally = stream.load.stop()?;
        let by: Vec<String> = tally.by_server.iter().map(|(server, n)| format!("{server} {n}")).collect();
        let row = Row {
            what: &stream.what,
            family: stream.family,
            proto: &stream.proto.to_string(),
            sent: tally.sent,
            answers: &format!("{}; {} lost", by.join(", "), tally.lost),
            median: Some(tally.longest_gap),
        };
        table.row(&row, tally.no_loss());
    }
    Ok(())
}

fn more(streams: &[Stream], requests: usize) -> Result<()> {
    streams.iter().try_for_each(|s| s.load.wait_more(requests))
}

/// Scaling, killing, restarting.
pub fn all(cluster: &mut Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    scale(cluster, requests, table)?;
    without_agents(cluster, requests, table)
}

fn scale(cluster: &mut Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("service mixed scaled under traffic, by its EndpointSlice file (last column: longest gap)");
    table::columns();
    let streams = start(cluster, &EVERYTHING)?;
    more(&streams, requests)?;
    let all: Vec<&Pod> = cluster.pods.iter().collect();
    let few = all[..cluster.fabric.nodes().len()].to_vec();
    let rounds = [all, few];
    for (round, backends) in rounds.iter().enumerate() {
        cluster.mixed.endpoints = backends.iter().flat_map(|p| endpoints(p)).collect();
        cluster.apply(&cluster.mixed)?;
        let names: Vec<&str> = backends.iter().map(|p| p.name()).collect();
        let from = cluster.pods.last().ok_or_else(|| anyhow!("no pods"))?.netns();
        let verdict = reached(from, &cluster.mixed, &names);
        table.fact(&format!("{}: new connections go to {}", ["up", "down"][round], names.join(", ")), verdict);
        more(&streams, requests)?;
    }
    finish(streams, table)
}

/// New connections reach all of these backends and no other.
fn reached(from: &Netns, service: &Service, names: &[&str]) -> Result<()> {
    for vip in &service.vips {
        for proto in Proto::ALL {
            ask(from, proto, SocketAddr::new(*vip, SERVICE_PORT), enough(1, names.len()))?.only_by(names)?;
        }
    }
    Ok(())
}

fn without_agents(cluster: &mut Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    table::step("agents killed (SIGKILL) and restarted under traffic (last column: longest gap)");
    table::columns();
    let streams = start(cluster, &EVERYTHING)?;
    more(&streams, requests)?;
    for node in cluster.fabric.nodes() {
        node.kill_agent()?;
    }
    more(&streams, requests * 10)?;
    let dead = cluster.fabric.nodes().iter().all(|n| !n.agent_runs());
    let verdict = if dead { Ok(()) } else { Err(anyhow!("an agent is alive")) };
    table.fact("every agent is dead, traffic goes on", verdict);
    newcomer(cluster, requests, table)?;
    cluster.restart_agents()?;
    more(&streams, requests * 3)?;
    table.fact("every agent is back and ready", Ok(()));
    finish(streams, table)
}

/// A pod that is added while the agents are dead.
fn newcomer(cluster: &Cluster<'_>, requests: usize, table: &mut Table) -> Result<()> {
    let pod = cluster.fabric.node(1).add_pod("newcomer")?;
    let from = cluster.pods.last().ok_or_else(|| anyhow!("no pods"))?;
    for address in pod.addresses() {
        let answers = ask(from.netns(), Proto::Tcp, SocketAddr::new(*address, PORT), requests)?;
        let what = format!("{} > pod added without agent", from.name());
        table.answers(&what, family(*address), "TCP", &answers, answers.only_by(&["newcomer"]));
        let vip = cluster.mixed.vips[usize::from(address.is_ipv6())];
        let answers = ask(pod.netns(), Proto::Udp, SocketAddr::new(vip, SERVICE_PORT), requests)?;
        table.answers("pod added without agent > service mixed", family(vip), "UDP", &answers, answers.all_answered());
    }
    pod.delete()
}
