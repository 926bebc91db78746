//! How long a new client that a policy allows by its label takes from its first instruction until
//! its requests pass, and how many are lost before: the server's node has to learn of the client
//! first. A new client without the label must never pass.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use super::api::{Api, Event};
use super::figures::{Row, table};
use super::judge::{Numbered, numbered};
use super::servers::next;
use super::{DEADLINE, POD_START, Part, pods_path, policies_path, steady};
use crate::cluster::layout::Node;
use crate::cluster::pods::Pod;
use crate::cluster::{wait, wires};
use crate::ui;

const POLICY: &str = "newcomers";
/// How long probes go on after the first of each way has arrived.
const AFTERWARDS: Duration = Duration::from_millis(300);
/// How long a client runs that must not pass.
const STRANGER: Duration = Duration::from_secs(3);
/// What the client runs: hundreds of probes a second, each with the second of its start, its own,
/// and its number. A read of what never comes is a pause without a process.
const SCRIPT: &str = r#"
start=$EPOCHREALTIME; number=0
exec 3<> <(:)
while :; do
  for to in "$@"; do echo "$start $EPOCHREALTIME $number" >"/dev/udp/$to"; done
  number=$((number + 1))
  read -rt 0.001 -u 3
done"#;

/// A probe as the client wrote it. Times are seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Probe {
    start: f64,
    sent: f64,
    number: u32,
}

impl Probe {
    fn read(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let mut seconds = || words.next()?.parse().ok();
        let (start, sent) = (seconds()?, seconds()?);
        Some(Self { start, sent, number: words.next()?.parse().ok()? })
    }
}

/// What arrived, by server and client.
type Arrived = BTreeMap<(SocketAddr, IpAddr), Vec<Probe>>;

/// Servers in pods of both nodes.
struct Servers {
    /// Addresses of each pod.
    addresses: Vec<Vec<SocketAddr>>,
    arrived: Arc<Mutex<Arrived>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Servers {
    fn start(pods: &[Pod]) -> Result<Self> {
        let (arrived, stop) = (Arc::<Mutex<Arrived>>::default(), Arc::new(AtomicBool::new(false)));
        let (mut addresses, mut threads) = (Vec::new(), Vec::new());
        for pod in pods {
            let mut own = Vec::new();
            for ip in &pod.addresses {
                let socket = wires::inside(&pod.netns, || steady::listen(*ip))??;
                own.push(socket.local_addr()?);
                let (arrived, stop) = (Arc::clone(&arrived), Arc::clone(&stop));
                threads.push(thread::spawn(move || serve(&socket, &arrived, &stop)));
            }
            addresses.push(own);
        }
        Ok(Self { addresses, arrived, stop, threads })
    }

    /// What arrived at a server from a client.
    fn arrived(&self, server: SocketAddr, client: IpAddr) -> Vec<Probe> {
        let all = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&(server, client)).cloned().unwrap_or_default()
    }

    fn finish(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| anyhow!("a server panicked"))??;
        }
        Ok(())
    }
}

fn serve(socket: &UdpSocket, arrived: &Mutex<Arrived>, stop: &AtomicBool) -> io::Result<()> {
    let (own, mut bytes) = (socket.local_addr()?, [0; 128]);
    while !stop.load(Ordering::Relaxed) {
        let (length, client) = match socket.recv_from(&mut bytes) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        if let Some(probe) = Probe::read(&String::from_utf8_lossy(&bytes[..length])) {
            let mut all = arrived.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry((own, client.ip())).or_default().push(probe);
        }
    }
    Ok(())
}

/// What came of a client, seen by servers of one node.
struct Way {
    /// From its first instruction to the first probe that passed, in milliseconds.
    passed: f64,
    /// The probes before it.
    before: u32,
}

/// A new client.
struct Newcomer {
    near: Way,
    far: Way,
    /// From its first instruction until the API server showed its addresses, in milliseconds.
    addressed: f64,
    probes: usize,
    faults: Vec<String>,
}

/// Starts so many clients, on the nodes in turn, and one on each node that must not pass.
pub fn run(api: &Api, nodes: [&Node; 2], pods: &[Pod], count: usize) -> Result<Part> {
    let servers = Servers::start(pods)?;
    let events = api.watch(&pods_path())?;
    api.connect()?.create(&policies_path(), &policy())?;
    let progress = ui::Progress::start("starting clients");
    let result = start_all(api, &events, nodes, &servers, count, &progress);
    let ended = servers.finish();
    let (found, faults) = result.inspect_err(|_| progress.failed())?;
    progress.done();
    ended?;
    api.connect()?.delete(&format!("{}/{POLICY}", policies_path()))?;
    Ok(report(&found, faults))
}

fn start_all(
    api: &Api,
    events: &Receiver<Event>,
    nodes: [&Node; 2],
    servers: &Servers,
    count: usize,
    progress: &ui::Progress,
) -> Result<(Vec<Newcomer>, Vec<String>)> {
    let (mut found, mut faults) = (Vec::new(), Vec::new());
    for number in 0..count {
        progress.line(&format!("{number} of {count} pods"));
        let name = format!("newcomer-{number}");
        let (ips, addressed) = start(api, events, &name, nodes[number % 2], "newcomer", servers)?;
        let near = number % 2;
        let one = newcomer(servers, &name, &ips, addressed, [near, 1 - near])?;
        api.connect()?.delete(&format!("{}/{name}", pods_path()))?;
        found.push(one);
    }
    for (number, node) in nodes.into_iter().enumerate() {
        let name = format!("stranger-{number}");
        let (ips, _) = start(api, events, &name, node, "stranger", servers)?;
        thread::sleep(STRANGER);
        api.connect()?.delete(&format!("{}/{name}", pods_path()))?;
        let pairs = ips.iter().flat_map(|ip| servers.addresses.iter().flatten().map(move |server| (*server, *ip)));
        let passed: usize = pairs.map(|(server, ip)| servers.arrived(server, ip).len()).sum();
        if passed > 0 {
            faults.push(format!("{passed} probes of {name} passed, which no policy allows"));
        }
    }
    Ok((found, faults))
}

/// Starts a client; returns its addresses, and when the API server showed them.
fn start(
    api: &Api,
    events: &Receiver<Event>,
    name: &str,
    node: &Node,
    role: &str,
    servers: &Servers,
) -> Result<(Vec<IpAddr>, f64)> {
    api.connect()?.create(&pods_path(), &pod(name, node, role, &servers.addresses.concat()))?;
    let end = Instant::now() + POD_START;
    loop {
        let event = next(events, name, end, "an address")?;
        let ips = event.value["object"]["status"]["podIPs"].as_array().into_iter().flatten();
        let ips: Vec<IpAddr> = ips.filter_map(|ip| ip["ip"].as_str()).map(str::parse).collect::<Result<_, _>>()?;
        if !ips.is_empty() {
            let at = SystemTime::now() - event.at.elapsed();
            return Ok((ips, at.duration_since(UNIX_EPOCH)?.as_secs_f64()));
        }
    }
}

/// Waits until probes of a client have arrived everywhere, and for a while more; judges them.
fn newcomer(servers: &Servers, name: &str, ips: &[IpAddr], addressed: f64, places: [usize; 2]) -> Result<Newcomer> {
    let pairs = |place: usize| -> Vec<(SocketAddr, IpAddr)> {
        let all = servers.addresses[place].iter();
        all.filter_map(|to| Some((*to, *ips.iter().find(|ip| ip.is_ipv4() == to.is_ipv4())?))).collect()
    };
    let both = places.map(pairs);
    let all_pass = || both.iter().flatten().all(|(server, client)| !servers.arrived(*server, *client).is_empty());
    let in_time = wait::until(DEADLINE + POD_START, all_pass);
    thread::sleep(AFTERWARDS);
    let (mut faults, mut probes, mut start) = (Vec::new(), 0, 0.0);
    let mut ways = Vec::new();
    for pairs in both {
        let mut way = Way { passed: 0.0, before: 0 };
        for (server, client) in pairs {
            let arrived = servers.arrived(server, client);
            let numbers: Vec<u32> = arrived.iter().map(|it| it.number).collect();
            let found = numbered(&numbers).filter(|_| in_time);
            let Numbered { before, later } = found.with_context(|| format!("{name} does not reach {server}"))?;
            let first = arrived.iter().find(|it| it.number == before).context("the first probe")?;
            way.passed = way.passed.max((first.sent - first.start) * 1e3);
            way.before = way.before.max(before);
            (probes, start) = (probes + arrived.len(), first.start);
            if later > 0 {
                faults.push(format!("{later} probes of {name} to {server} were lost after the first that passed"));
            }
        }
        ways.push(way);
    }
    let limit = DEADLINE.as_secs_f64() * 1e3;
    ensure!(ways.iter().all(|way| way.passed < limit), "{name} passes after more than {limit} ms");
    let (far, near) = (ways.pop().context("two ways")?, ways.pop().context("two ways")?);
    Ok(Newcomer { near, far, addressed: (addressed - start) * 1e3, probes, faults })
}

fn report(found: &[Newcomer], mut faults: Vec<String>) -> Part {
    faults.extend(found.iter().flat_map(|it| it.faults.iter().cloned()));
    let passed = [
        Row::new("to the same node", found.iter().map(|it| it.near.passed)),
        Row::new("to the other node", found.iter().map(|it| it.far.passed)),
        Row::new("(the API server shows its addresses)", found.iter().map(|it| it.addressed)),
        Row::new(
            "to the other node, from the addresses in the API",
            found.iter().map(|it| (it.far.passed - it.addressed).max(0.0)),
        ),
    ];
    let before = [
        Row::new("to the same node", found.iter().map(|it| it.near.before.into())),
        Row::new("to the other node", found.iter().map(|it| it.far.before.into())),
    ];
    let mut text = table("A NEW CLIENT, FROM ITS FIRST INSTRUCTION TO THE FIRST PROBE THAT PASSES", "ms", &passed);
    let _ = write!(text, "{}", table("LOST BEFORE", "probes", &before));
    Part { text, probes: found.iter().map(|it| it.probes).sum(), faults }
}

fn policy() -> Value {
    json!({
        "metadata": {"name": POLICY},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"role": "newcomer"}}}]}],
        },
    })
}

fn pod(name: &str, node: &Node, role: &str, servers: &[SocketAddr]) -> Value {
    let targets = servers.iter().map(|to| format!("{}/{}", to.ip(), to.port()));
    let command: Vec<String> = ["bash", "-c", SCRIPT, name].map(str::to_owned).into_iter().chain(targets).collect();
    json!({
        "metadata": {"name": name, "labels": {"role": role}},
        "spec": {
            "nodeName": node.name,
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "client",
                "image": "registry.k8s.io/e2e-test-images/agnhost:2.56",
                "command": command,
            }],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_read_as_the_script_writes_it() {
        let probe = Probe::read("1764571697.250000 1764571697.500000 12\n").unwrap();
        assert_eq!(probe, Probe { start: 1_764_571_697.25, sent: 1_764_571_697.5, number: 12 });
        assert_eq!(Probe::read("1764571697.250000 12"), None);
    }
}
