//! A network of two nodes, four pods and a client outside, served by a proxy: once by rustnet, once by kube-proxy. Addresses,
//! names and servers are the same in both, so that the same objects fit.

use super::model::{Backend, Family, TARGETS};
use super::probe::{Heard, Patience, ask};
use super::reference;
use crate::cluster::block_on;
use crate::relay::Relay;
use crate::server::{ADMIN, Server};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use testkit::janitor::Process;
use testkit::netns::Holder;
use testkit::{Fabric, Netns, Node, Pod, Proto, Routing, Setup, fabric};
use tokio::sync::oneshot;

/// Threads that ask at a place at the same time: most of them wait for answers that do not come.
const ASKERS: usize = 16;

/// Where clients are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A pod of the first node, which is a backend, too.
    PodA,
    /// A pod of the second node, which is a backend, too.
    PodB,
    /// The first node.
    NodeA,
    /// The second node.
    NodeB,
    /// A machine outside.
    Outside,
}

impl Place {
    pub const ALL: [Self; 5] = [Self::PodA, Self::PodB, Self::NodeA, Self::NodeB, Self::Outside];

    /// The node that it is on, or is.
    pub const fn node(self) -> Option<&'static str> {
        match self {
            Self::PodA | Self::NodeA => Some("n1"),
            Self::PodB | Self::NodeB => Some("n2"),
            Self::Outside => None,
        }
    }

    /// The name of its servers, if it has some.
    pub const fn name(self) -> Option<&'static str> {
        match self {
            Self::PodA => Some("a1"),
            Self::PodB => Some("b1"),
            Self::NodeA | Self::NodeB => self.node(),
            Self::Outside => Some("world"),
        }
    }

    /// True for a node itself.
    pub const fn is_node(self) -> bool {
        matches!(self, Self::NodeA | Self::NodeB)
    }
}

/// Pods by name, with their nodes.
pub const PODS: [(&str, &str); 4] = [("a1", "n1"), ("a2", "n1"), ("b1", "n2"), ("b2", "n2")];
/// Names of the nodes.
pub const NODES: [&str; 2] = ["n1", "n2"];

/// The second address of a node, on a device of its own.
pub fn second_address(node: &str, family: Family) -> IpAddr {
    let n = if node == "n1" { 1 } else { 2 };
    match family {
        Family::V4 => Ipv4Addr::new(10, 99, 0, n).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, n.into()).into(),
    }
}

/// One network and its proxy. The order of the fields is the order of their end.
pub struct World {
    /// Its name in reports.
    pub name: &'static str,
    backends: Vec<Backend>,
    places: BTreeMap<Place, Netns>,
    addresses: BTreeMap<Place, BTreeSet<IpAddr>>,
    _servers: Vec<testkit::server::Server>,
    _proxies: Vec<Process>,
    _pods: Vec<Pod>,
    _sandboxes: Vec<Holder>,
    fabric: Fabric,
    _relays: Vec<oneshot::Sender<()>>,
}

/// What a world gets in addition to its fabric.
#[derive(Default)]
struct Parts {
    pods: Vec<Pod>,
    sandboxes: Vec<Holder>,
    proxies: Vec<Process>,
    relays: Vec<oneshot::Sender<()>>,
}

impl World {
    /// With rustnet on both nodes.
    pub fn ours(server: &Server, routing: Routing) -> Result<Self> {
        let fabric = Fabric::build(Setup { routing, ..Setup::default() })?;
        let mut parts = Parts::default();
        for node in fabric.nodes() {
            let kubeconfig = parts.kubeconfig(server, node, "rustnet")?;
            node.spawn_agent(&["--kubeconfig", &kubeconfig.display().to_string()])?;
        }
        for node in fabric.nodes() {
            node.wait_ready()?;
        }
        for (name, node) in PODS {
            parts.pods.push(node_of(&fabric, node)?.add_silent_pod(name)?);
        }
        let pods = parts.pods.iter().map(|pod| Ok((pod.netns().clone(), pod.v4()?, pod.v6()?)));
        let pods = pods.collect::<Result<Vec<_>>>()?;
        Self::furnish("rustnet", fabric, parts, &pods)
    }

    /// With kube-proxy on both nodes, plain routes, and pods that have the addresses of another world's.
    pub fn reference(server: &Server, like: &Self) -> Result<Self> {
        let fabric = Fabric::build(Setup { routing: Routing::Native, ..Setup::default() })?;
        let mut parts = Parts::default();
        reference::wire(&fabric)?;
        let mut pods = Vec::new();
        for ((name, node), backend) in PODS.into_iter().zip(&like.backends) {
            let sandbox = reference::add_pod(node_of(&fabric, node)?, name, backend)?;
            pods.push((Netns::clone(&sandbox), backend.v4, backend.v6));
            parts.sandboxes.push(sandbox);
        }
        for node in fabric.nodes() {
            let kubeconfig = parts.kubeconfig(server, node, "kube-proxy")?;
            parts.proxies.push(reference::start_proxy(node, &kubeconfig)?);
        }
        Self::furnish("kube-proxy", fabric, parts, &pods)
    }

    fn furnish(name: &'static str, fabric: Fabric, parts: Parts, pods: &[(Netns, Ipv4Addr, Ipv6Addr)]) -> Result<Self> {
        let mut backends = Vec::new();
        let mut hosts = Vec::new();
        for ((name, node), (netns, v4, v6)) in PODS.into_iter().zip(pods) {
            backends.push(Backend { name, node: Some(node), v4: *v4, v6: *v6 });
            hosts.push(netns.clone());
        }
        for (name, node) in NODES.into_iter().zip(fabric.nodes()) {
            backends.push(Backend { name, node: Some(name), v4: node.v4(), v6: node.v6() });
            hosts.push(node.netns().clone());
            let [v4, v6] = [Family::V4, Family::V6].map(|family| second_address(name, family));
            node.netns().ip(&format!(
                "link add second type bridge\naddr add {v4}/32 dev second\naddr add {v6}/128 dev second nodad\n\
                 link set second up\n"
            ))?;
            let (to4, to6) = (node.v4(), node.v6());
            fabric.switch().ip(&format!("route add {v4} via {to4}\nroute add {v6} via {to6}\n"))?;
        }
        let (v4, v6) = fabric::WORLD;
        backends.push(Backend { name: "world", node: None, v4, v6 });
        hosts.push(fabric.world().clone());
        let mut servers = Vec::new();
        for (backend, netns) in backends.iter().zip(&hosts) {
            for (port, address) in
                TARGETS.into_iter().flat_map(|port| [(port, backend.v4.into()), (port, backend.v6.into())])
            {
                // By address, so that what has several answers from the one that was asked.
                let (name, address) = (format!("{}:{port}", backend.name), SocketAddr::new(address, port));
                servers.push(testkit::server::Server::bind(netns, &name, address)?);
            }
        }
        lead(&fabric)?;
        for netns in fabric.nodes().iter().map(Node::netns).chain([fabric.switch()]) {
            // A refusal that the kernel rations away looks like a drop.
            netns.sysctl("ipv4/icmp_msgs_per_sec", "1000000")?;
            netns.sysctl("ipv4/icmp_msgs_burst", "100000")?;
        }
        let at = [(Place::PodA, 0), (Place::PodB, 2), (Place::NodeA, 4), (Place::NodeB, 5), (Place::Outside, 6)];
        let places: BTreeMap<_, _> = at.into_iter().map(|(place, i)| (place, hosts[i].clone())).collect();
        let addresses = places.iter().map(|(place, netns)| Ok((*place, addresses(netns)?)));
        let addresses = addresses.collect::<Result<_>>()?;
        let Parts { pods, sandboxes, proxies, relays } = parts;
        Ok(Self {
            name,
            backends,
            places,
            addresses,
            _servers: servers,
            _proxies: proxies,
            _pods: pods,
            _sandboxes: sandboxes,
            fabric,
            _relays: relays,
        })
    }

    /// Everybody that can be a backend: the pods, the nodes, and the machine outside.
    pub fn backends(&self) -> &[Backend] {
        &self.backends
    }

    /// True if an address is of this place.
    pub fn is_at(&self, place: Place, address: IpAddr) -> bool {
        self.addresses[&place].contains(&address)
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        self.fabric.nodes()
    }

    /// Runs a closure at a place.
    pub fn run<T: Send>(&self, place: Place, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.places[&place].run(f)
    }

    /// Asks at one place.
    pub fn ask(&self, place: Place, proto: Proto, target: SocketAddr, patience: Patience) -> Result<Heard> {
        self.run(place, || ask(proto, target, patience))
    }

    /// Asks all questions, many at the same time; the answers in the same order.
    pub fn ask_all(&self, questions: &[(Place, Proto, SocketAddr, Patience)]) -> Result<Vec<Heard>> {
        let heard: Vec<Mutex<Heard>> = questions.iter().map(|_| Mutex::default()).collect();
        let (heard, questions) = (&heard, &questions);
        std::thread::scope(|scope| {
            let mut askers = Vec::new();
            for (place, netns) in &self.places {
                let next = std::sync::Arc::new(AtomicUsize::new(0));
                for _ in 0..ASKERS {
                    let next = next.clone();
                    askers.push(scope.spawn(move || {
                        netns.run(|| {
                            loop {
                                let i = next.fetch_add(1, Ordering::Relaxed);
                                let Some((at, proto, target, patience)) = questions.get(i) else { break };
                                if at == place {
                                    let answer = ask(*proto, *target, *patience);
                                    *heard[i].lock().unwrap_or_else(PoisonError::into_inner) = answer;
                                }
                            }
                        })
                    }));
                }
            }
            askers
                .into_iter()
                .try_for_each(|asker| asker.join().map_err(|panic| anyhow::anyhow!("a client panicked: {panic:?}"))?)
        })?;
        Ok(heard.iter().map(|it| it.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect())
    }

    /// The ends of the proxies' logs.
    pub fn logs(&self) -> String {
        let mut text = self.fabric.logs();
        for node in self.fabric.nodes() {
            let log = std::fs::read_to_string(reference::log(node)).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            text += &lines[lines.len().saturating_sub(20)..].join("\n");
        }
        text
    }
}

impl Parts {
    /// A kubeconfig by which a node reaches the API server: through a relay on its own loopback interface, so that no network
    /// that is tested lies between the two.
    fn kubeconfig(&mut self, server: &Server, node: &Node, of: &str) -> Result<PathBuf> {
        let listener = node.netns().run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))??;
        listener.set_nonblocking(true)?;
        let url = format!("https://{}", listener.local_addr()?);
        let (end, ended) = oneshot::channel::<()>();
        server.netns().thread(move || {
            block_on(async {
                let _relay = Relay::on(tokio::net::TcpListener::from_std(listener)?)?;
                // Dropping the sender ends it.
                let _ = ended.await;
                Ok(())
            })
        })?;
        self.relays.push(end);
        let made = server.kubeconfig(ADMIN, &url)?;
        let own = node.dir().join(format!("{of}.kubeconfig"));
        std::fs::rename(&made, &own).with_context(|| format!("cannot move {}", made.display()))?;
        Ok(own)
    }
}

fn node_of<'a>(fabric: &'a Fabric, name: &str) -> Result<&'a Node> {
    fabric.nodes().iter().find(|node| node.name() == name).with_context(|| format!("no node {name}"))
}

/// The node to which an address of Services is led from outside.
pub fn led_to(ip: IpAddr) -> &'static str {
    let is_first = match ip {
        IpAddr::V4(ip) => ip.octets()[0] == 10 || ip.octets()[3] < 128,
        IpAddr::V6(ip) => ip.segments()[0] != 0xfd00 && ip.segments()[7] < 128,
    };
    if is_first { "n1" } else { "n2" }
}

/// Leads addresses of Services to nodes, but only from outside: whatever the cluster sends there itself is unreachable, and does
/// not go round in circles.
fn lead(fabric: &Fabric) -> Result<()> {
    let switch = fabric.switch();
    let [one, two] = [fabric.node(1), fabric.node(2)];
    let (mut routes, mut rules) = (String::new(), String::new());
    for (range, node) in [
        ("10.96.0.0/16", one),
        ("fd00:96::/64", two),
        ("203.0.113.0/25", one),
        ("203.0.113.128/25", two),
        ("198.18.113.0/25", one),
        ("198.18.113.128/25", two),
        ("2001:db8:113::/121", one),
        ("2001:db8:113::80/121", two),
        ("2001:db8:118::/121", one),
        ("2001:db8:118::80/121", two),
    ] {
        let is_v6 = range.contains(':');
        let via = if is_v6 { node.v6().to_string() } else { node.v4().to_string() };
        let _ = writeln!(routes, "route add {range} via {via}");
        let family = if is_v6 { "ip6" } else { "ip" };
        let _ = writeln!(rules, "iifname != world {family} daddr {range} reject with icmpx host-unreachable");
    }
    switch.ip(&routes)?;
    nft(switch, &format!("table inet lead {{ chain forward {{ type filter hook forward priority 0;\n{rules}}}\n}}\n"))
}

/// Loads rules.
pub fn nft(netns: &Netns, rules: &str) -> Result<()> {
    let output = netns.command("nft")?.args(["-f", "-"]).output(Some(rules.as_bytes()))?;
    ensure!(output.status.success(), "nft: {}\nof:\n{rules}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// All addresses of a namespace.
fn addresses(netns: &Netns) -> Result<BTreeSet<IpAddr>> {
    let devices: Value = serde_json::from_str(&netns.exec("ip", &["-json", "addr", "show"])?)?;
    let infos = devices.as_array().into_iter().flatten().filter_map(|device| device["addr_info"].as_array()).flatten();
    let found: BTreeSet<IpAddr> = infos.filter_map(|info| info["local"].as_str()?.parse().ok()).collect();
    ensure!(!found.is_empty(), "{} has no address: {devices}", netns.name());
    Ok(found)
}
