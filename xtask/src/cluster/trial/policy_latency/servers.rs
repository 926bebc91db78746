//! How long a new server that a policy selects takes until a client that the policy allows reaches
//! it. A client that the policy does not allow must never reach it.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::api::{Api, Event};
use super::figures::{Row, table};
use super::judge::{Outcome, Reached, millis, reached};
use super::requests::{Pace, Requests};
use super::{DEADLINE, POD_START, Part, pods_path, policies_path};
use crate::cluster::layout::Node;
use crate::cluster::pods::Pod;
use crate::cluster::wait;
use crate::ui;

/// How long requests go on after all clients have an answer.
const AFTERWARDS: Duration = Duration::from_millis(300);
const POLICY: &str = "targets";
/// Where agnhost's netexec answers datagrams.
const PORT: u16 = 8081;

/// A new server, and its moments.
struct Target {
    created: Instant,
    /// When the API server showed its addresses.
    addressed: Instant,
    /// When the API server showed that it is ready.
    ready: Instant,
    near: Vec<Reached>,
    far: Vec<Reached>,
}

/// What came of one new server.
struct Found {
    target: Target,
    requests: usize,
    faults: Vec<String>,
}

/// Starts so many pods, on the nodes in turn.
pub fn run(api: &Api, nodes: [&Node; 2], clients: &[Pod], strangers: &[Pod], count: usize) -> Result<Part> {
    let events = api.watch(&pods_path())?;
    api.connect()?.create(&policies_path(), &policy())?;
    let progress = ui::Progress::start("starting servers");
    let mut found = Vec::new();
    for number in 0..count {
        progress.line(&format!("{number} of {count} pods"));
        let (node, near) = (nodes[number % 2], number % 2);
        let name = format!("target-{number}");
        let one = start(api, &events, &name, node, [&clients[near], &clients[1 - near]], strangers);
        found.push(one.inspect_err(|_| progress.failed())?);
        api.connect()?.delete(&format!("{}/{name}", pods_path()))?;
    }
    progress.done();
    api.connect()?.delete(&format!("{}/{POLICY}", policies_path()))?;
    Ok(report(found))
}

fn start(
    api: &Api,
    events: &Receiver<Event>,
    name: &str,
    node: &Node,
    clients: [&Pod; 2],
    strangers: &[Pod],
) -> Result<Found> {
    let created = api.connect()?.create(&pods_path(), &pod(name, node))?.answered;
    let end = Instant::now() + POD_START;
    let (addressed, addresses, early) = addresses(events, name, end)?;
    let ways = |clients: &[&Pod], pace| -> Vec<Requests> {
        let pairs =
            clients.iter().flat_map(|client| addresses.iter().map(move |ip| (client, SocketAddr::new(*ip, PORT))));
        pairs.map(|(client, to)| Requests::start(format!("{} to {to}", client.name), &client.netns, to, pace)).collect()
    };
    let groups = [ways(&clients[..1], Pace::Fast), ways(&clients[1..], Pace::Fast)];
    let denied = ways(&strangers.iter().collect::<Vec<_>>(), Pace::Slow);
    let ready = early.map_or_else(|| readiness(events, name, end), Ok)?;
    let in_time = wait::until(DEADLINE, || groups.iter().flatten().all(Requests::has_answer));
    std::thread::sleep(AFTERWARDS);
    groups.iter().flatten().chain(&denied).for_each(Requests::stop);
    let (mut requests, mut faults, mut both) = (0, Vec::new(), Vec::new());
    for group in groups {
        let mut all = Vec::new();
        for way in group {
            let way_name = way.name.clone();
            let asked = way.finish()?;
            requests += asked.len();
            let found = reached(&asked).filter(|_| in_time);
            let found = found.with_context(|| format!("{way_name} gets no answer after {} s", DEADLINE.as_secs()))?;
            if found.lost > 0 {
                faults.push(format!("{} requests of {way_name} were lost after the first that was not", found.lost));
            }
            all.push(found);
        }
        both.push(all);
    }
    for way in denied {
        let way_name = way.name.clone();
        let asked = way.finish()?;
        requests += asked.len();
        let passed = asked.iter().filter(|it| it.outcome != Outcome::Silent).count();
        if passed > 0 {
            faults.push(format!("{passed} requests of {way_name} passed, which no policy allows"));
        }
    }
    let (far, near) = (both.pop().unwrap_or_default(), both.pop().unwrap_or_default());
    Ok(Found { target: Target { created, addressed, ready, near, far }, requests, faults })
}

/// Waits for the addresses of a pod. Returns them, when they were seen, and when the pod was seen
/// ready, if that was as soon.
fn addresses(events: &Receiver<Event>, name: &str, end: Instant) -> Result<(Instant, Vec<IpAddr>, Option<Instant>)> {
    loop {
        let event = next(events, name, end, "an address")?;
        let status = &event.value["object"]["status"];
        let ips = status["podIPs"].as_array().into_iter().flatten().filter_map(|ip| ip["ip"].as_str());
        let ips: Vec<IpAddr> = ips.map(str::parse).collect::<Result<_, _>>()?;
        if !ips.is_empty() {
            return Ok((event.at, ips, is_ready(status).then_some(event.at)));
        }
    }
}

/// Waits until a pod is ready; returns when that was seen.
fn readiness(events: &Receiver<Event>, name: &str, end: Instant) -> Result<Instant> {
    loop {
        let event = next(events, name, end, "readiness")?;
        if is_ready(&event.value["object"]["status"]) {
            return Ok(event.at);
        }
    }
}

fn is_ready(status: &Value) -> bool {
    let conditions = status["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|it| it["type"] == "Ready" && it["status"] == "True")
}

/// The next event of a pod.
pub fn next(events: &Receiver<Event>, name: &str, end: Instant, what: &str) -> Result<Event> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let event = events.recv_timeout(left).with_context(|| format!("{name} gets no {what}"))?;
        ensure!(event.value["type"] != "ERROR", "the watch of pods fails: {}", event.value["object"]);
        if event.value["object"]["metadata"]["name"] == name {
            return Ok(event);
        }
    }
}

fn report(found: Vec<Found>) -> Part {
    let requests = found.iter().map(|it| it.requests).sum();
    let (targets, faults): (Vec<_>, Vec<_>) = found.into_iter().map(|it| (it.target, it.faults)).unzip();
    // The last of its addresses counts.
    let last = |all: &[Reached], moment: fn(&Reached) -> Instant| all.iter().map(moment).max();
    let rows = |origin: fn(&Target) -> Instant| -> Vec<Row> {
        let row = |name: &str, ways: fn(&Target) -> &Vec<Reached>, moment: fn(&Reached) -> Instant| {
            let times = targets.iter().filter_map(|it| Some(millis(origin(it), last(ways(it), moment)?)));
            Row::new(name, times.collect::<Vec<_>>())
        };
        vec![
            row("same node, the network lets requests pass", |it| &it.near, |it| it.network),
            row("same node, the server answers", |it| &it.near, |it| it.server),
            row("other node, the network lets requests pass", |it| &it.far, |it| it.network),
            row("other node, the server answers", |it| &it.far, |it| it.server),
        ]
    };
    let mut from_creation = rows(|it| it.created);
    let seen = |moment: fn(&Target) -> Instant| targets.iter().map(move |it| millis(it.created, moment(it)));
    from_creation.push(Row::new("(the API server shows its addresses)", seen(|it| it.addressed)));
    from_creation.push(Row::new("(the API server shows that it is ready)", seen(|it| it.ready)));
    let mut from_addresses = rows(|it| it.addressed);
    for (name, ways) in [("same", (|it| &it.near) as fn(&Target) -> &Vec<Reached>), ("other", |it| &it.far)] {
        let silent = targets.iter().map(|it| ways(it).iter().map(|it| it.silent_before).sum::<u32>().into());
        from_addresses.push(Row::new(format!("({name} node, requests without an answer before)"), silent));
    }
    let text = format!(
        "{}{}{}",
        table("A NEW SERVER, FROM ITS CREATION", "ms", &from_creation),
        table("FROM ITS ADDRESSES IN THE API", "ms", &from_addresses),
        table("FROM ITS READINESS IN THE API", "ms", &rows(|it| it.ready))
    );
    Part { text, probes: requests, faults: faults.concat() }
}

fn policy() -> Value {
    json!({
        "metadata": {"name": POLICY},
        "spec": {
            "podSelector": {"matchLabels": {"role": "target"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}]}],
        },
    })
}

fn pod(name: &str, node: &Node) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"role": "target"}},
        "spec": {
            "nodeName": node.name,
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "server",
                "image": "registry.k8s.io/e2e-test-images/agnhost:2.56",
                "args": ["netexec"],
            }],
        },
    })
}
