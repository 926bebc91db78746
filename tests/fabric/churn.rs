//! Services come, change and go while another one is used: 500 changes, or as many as `RUSTNET_CHANGES` says
//! (`cargo xtask test --long`: 10,000).

mod turns;

use crate::fixture::{Net, SMALL_BACKENDS, SMALL_TABLES, TestService, endpoints, figure, observed};
use crate::state::{State, snapshot};
use anyhow::{Context, Result, bail, ensure};
use rustnet_common::tuple::proto;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;
use testkit::client::Proto;
use testkit::load::{Kind, Load};
use testkit::manifest::{Endpoint, Port, Service};
use testkit::{Node, Setup, wait};

/// Services that change.
const SERVICES: usize = 50;
/// What one service goes through, again and again; see [`phase`].
const PHASES: usize = 10;
const PAUSE: Duration = Duration::from_millis(10);

type Backends = BTreeSet<(IpAddr, u16)>;
/// What the maps should say: address, port and protocol, and the backends that they lead to.
type Wanted = BTreeMap<(IpAddr, u16, u8), Backends>;

fn vips(third: u8, n: u8) -> [IpAddr; 2] {
    [Ipv4Addr::new(10, 96, third, n).into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, third.into(), n.into()).into()]
}

/// Endpoints on no node, with addresses that nothing else has.
fn elsewhere(range: std::ops::Range<u16>) -> Vec<Endpoint> {
    let both = |n: u16| -> [IpAddr; 2] {
        let [high, low] = n.to_be_bytes();
        [Ipv4Addr::new(10, 200, high, low).into(), Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, n).into()]
    };
    range.flat_map(both).map(|address| Endpoint::ready(address, None)).collect()
}

/// A service at a point of its life; none while it is deleted. What it has depends on the round, too, so that no two of a
/// service's lives are alike.
fn phase(n: usize, round: usize) -> Option<Service> {
    let mut service = Service::new(&format!("churn-{n}"), &vips(2, n as u8 + 1), 80, 8080);
    let first = ((round * 7 + n * 31) % 20_000) as u16;
    service.endpoints = elsewhere(first..first + 3);
    match round % PHASES {
        0 => {}
        1 => service.endpoints = elsewhere(first..first + 9),
        2 => service.endpoints.truncate(2),
        3 => service.ports = Port::both(81, 8080),
        4 => service.ports = [Port::both(81, 8080), vec![port("more", 90, 9090)]].concat(),
        5 => service.ports = Port::both(81, 8081),
        6 => service.vips = vips(3, n as u8 + 1).to_vec(),
        7 => service.endpoints.clear(),
        8 => service.endpoints = elsewhere(first + 1..first + 6),
        _ => return None,
    }
    Some(service)
}

fn port(name: &str, port: u16, target: u16) -> Port {
    Port { name: name.into(), proto: Proto::Tcp, port, target }
}

fn wanted<'a>(services: impl IntoIterator<Item = &'a Service>) -> Wanted {
    let mut out = Wanted::new();
    for service in services {
        for vip in &service.vips {
            for port in &service.ports {
                let number = if port.proto == Proto::Tcp { proto::TCP } else { proto::UDP };
                let like = service.endpoints.iter().filter(|e| e.address.is_ipv4() == vip.is_ipv4());
                out.insert((*vip, port.port, number), like.map(|e| (e.address, port.target)).collect());
            }
        }
    }
    out
}

/// What the maps of a node say. Fails where they contradict themselves: a packet would be lost there.
fn held(node: &Node) -> Result<Wanted> {
    let snapshot = snapshot(node)?;
    let mut ids = HashSet::new();
    let mut out = Wanted::new();
    let mut wildcards = BTreeSet::new();
    for (key, entry) in &snapshot.services {
        if key.is_wildcard() {
            wildcards.insert(key.ip);
            continue;
        }
        let backends: Option<Vec<_>> = snapshot.backends_of(entry).collect();
        let backends = backends.with_context(|| format!("{key} leads to what is no backend of it: {entry:?}"))?;
        for backend in &backends {
            ensure!(ids.insert(backend.id), "{key} shares a backend: {backend:?}");
        }
        let backends = backends.into_iter().map(|b| (IpAddr::from(b.addr), b.port));
        out.insert((key.ip, key.port, key.proto), backends.collect());
    }
    for (ip, ..) in out.keys() {
        // The wildcard comes last: between the two a port is served already.
        wildcards.remove(ip);
    }
    ensure!(wildcards.is_empty(), "addresses without a port: {wildcards:?}");
    Ok(out)
}

/// Waits until a node's maps say this and nothing else.
fn wait_held(node: &Node, wanted: &Wanted) -> Result<()> {
    wait::until(&format!("the changes on {}", node.name()), || {
        let held = held(node)?;
        if held == *wanted {
            return Ok(());
        }
        let differs = wanted.iter().find(|(key, backends)| held.get(*key) != Some(*backends));
        let surplus = held.keys().find(|key| !wanted.contains_key(*key));
        bail!("wanted {differs:?}, surplus {surplus:?}")
    })
}

/// Writes what differs from `before`.
fn write(net: &Net, before: &[Option<Service>], now: &[Option<Service>]) -> Result<()> {
    for (before, now) in before.iter().zip(now) {
        match (before, now) {
            (_, Some(service)) => net.fabric.manifests().apply(service)?,
            (Some(service), None) => net.fabric.manifests().delete(service)?,
            (None, None) => {}
        }
    }
    Ok(())
}

/// Traffic to a service: established and new flows from a pod of each node, new ones from a host.
fn traffic(net: &Net, service: &TestService<'_>, protos: &[Proto]) -> Result<Vec<Load>> {
    let mut loads = Vec::new();
    for target in service.targets() {
        for proto in protos {
            for from in [net.a.netns(), net.c.netns()] {
                loads.push(Load::start(from, Kind::New, *proto, target, PAUSE)?);
                loads.push(Load::start(from, Kind::Established, *proto, target, PAUSE)?);
            }
            loads.push(Load::start(net.node(1).netns(), Kind::New, *proto, target, PAUSE)?);
        }
    }
    Ok(loads)
}

/// Counts the requests, of which none may be lost.
fn nothing_lost(loads: Vec<Load>) -> Result<usize> {
    let mut sent = 0;
    for load in loads {
        let tally = load.stop()?;
        tally.no_loss()?;
        sent += tally.sent;
    }
    Ok(sent)
}

#[test]
fn changes_of_services_disturb_no_other_and_leave_nothing() -> Result<()> {
    observed(&Net::start(Setup { agent: SMALL_TABLES, ..Setup::default() })?, |net| {
        let kept = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let before = net.fabric.nodes().iter().map(|n| State::of(n).map(State::at_rest)).collect::<Result<Vec<_>>>()?;
        let untouched = held(net.node(1))?;
        ensure!(untouched.len() == 4 && untouched.values().all(|b| b.len() == 3), "{untouched:?}");
        let loads = traffic(net, &kept, &Proto::ALL)?;
        let (mut services, mut changes, mut most) = (vec![None; SERVICES], 0, 0);
        let mut round = 0;
        let wanted_changes = figure("RUSTNET_CHANGES", 500)?;
        while changes < wanted_changes {
            let next: Vec<_> = (0..SERVICES).map(|n| phase(n, round)).collect();
            write(net, &services, &next)?;
            (services, changes, round) = (next, changes + SERVICES, round + 1);
            let mut all = wanted(services.iter().flatten());
            all.extend(untouched.clone());
            for node in net.fabric.nodes() {
                wait_held(node, &all).with_context(|| format!("round {round}"))?;
                most = most.max(snapshot(node)?.backends.iter().filter(|b| b.id != 0).count());
            }
        }
        write(net, &services, &vec![None; SERVICES])?;
        for (node, before) in net.fabric.nodes().iter().zip(&before) {
            before.wait_for(node)?;
        }
        let requests = nothing_lost(loads)?;
        all_room_is_back(net, &untouched)?;
        println!("{changes} changes, {requests} requests, at most {most} slots of backends");
        Ok(())
    })
}

/// A service that takes every slot there is fits: nothing leaked.
fn all_room_is_back(net: &Net, untouched: &Wanted) -> Result<()> {
    let used: usize = untouched.values().map(BTreeSet::len).sum();
    let mut big = Service::new("big", &vips(4, 1)[..1], 80, 8080);
    big.ports.retain(|p| p.proto == Proto::Tcp);
    big.endpoints = elsewhere(0..(SMALL_BACKENDS - used) as u16).into_iter().filter(|e| e.address.is_ipv4()).collect();
    ensure!(big.endpoints.len() == SMALL_BACKENDS - used, "{} endpoints", big.endpoints.len());
    net.fabric.manifests().apply(&big)?;
    let mut all = wanted([&big]);
    all.extend(untouched.clone());
    net.fabric.nodes().iter().try_for_each(|node| wait_held(node, &all).context("every slot that should be free"))?;
    // And one more does not: the figure above is exact.
    let mut more = Service::new("more", &vips(4, 2)[..1], 80, 8080);
    more.endpoints = elsewhere(30_000..30_001).into_iter().filter(|e| e.address.is_ipv4()).collect();
    net.fabric.manifests().apply(&more)?;
    wait::until("the complaint about a full map", || {
        let log = net.node(1).agent_log(20);
        ensure!(log.contains("default/more"), "nothing about it in the log: {log}");
        Ok(())
    })
}

/// Crashes of an agent, each at another write, unless `RUSTNET_CRASHES` names another number.
const CRASHES: usize = 3;
/// Writes of a plan among which the crashes are spread.
const WRITES: usize = 40;

/// Agents die between two writes of a plan, another two each time: packets reach old or new backends, the maps never
/// contradict themselves, and the next agent finishes the work.
#[test]
fn an_agent_that_dies_between_two_writes_leaves_a_working_state() -> Result<()> {
    observed(&Net::start(Setup { agent: SMALL_TABLES, ..Setup::default() })?, |net| {
        let kept = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let mut moved = net.service(endpoints(&[&net.a, &net.b]))?;
        let sides = [vec![&net.b, &net.c], vec![&net.a, &net.b]];
        let mut loads = traffic(net, &kept, &Proto::ALL)?;
        loads.extend(traffic(net, &moved, &[Proto::Tcp])?);
        let node = net.node(1);
        let program = testkit::dist::find("rustnet-agent")?;
        let mut services = vec![None; 6];
        let crashes = figure("RUSTNET_CRASHES", CRASHES)?;
        for round in 0..crashes {
            let before = held(node)?;
            node.stop_agent()?;
            moved.set(endpoints(&sides[round % 2]))?;
            let next: Vec<_> = (0..services.len()).map(|n| phase(n, round * 3 + n)).collect();
            write(net, &services, &next)?;
            services = next;
            let after = wanted(services.iter().flatten().chain([&kept.service, &moved.service]));
            let writes = (1 + round * WRITES / crashes).to_string();
            node.spawn_agent_of(&program, &[("RUSTNET_CRASH_AFTER_WRITES", &writes)], &[])?;
            let status = node.wait_agent_ended()?;
            ensure!(status.signal() == Some(9), "the agent was to die after {writes} writes: {status}");
            let between = held(node).with_context(|| format!("after {writes} writes"))?;
            for (key, backends) in &between {
                let known = [&before, &after].map(|state| state.get(key)).contains(&Some(backends));
                ensure!(known, "{key:?} leads to {backends:?} after {writes} writes");
            }
            loads.iter().try_for_each(|load| load.wait_more(20))?;
            node.start_agent(&[])?;
            wait_held(node, &after)?;
        }
        println!("{} requests", nothing_lost(loads)?);
        Ok(())
    })
}
