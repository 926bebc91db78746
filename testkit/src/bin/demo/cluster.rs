//! What the demo runs on: agents, pods, a host outside, and services that lead to them.

use crate::addresses::{self, vips};
use crate::examples;
use crate::table;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Instant;
use testkit::apiserver::ApiServer;
use testkit::manifest::{Endpoint, Outside, Service};
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::{Fabric, Netns, Node, Pod, dist, wait};

/// The port of the services.
pub const SERVICE_PORT: u16 = 80;

/// The node port of one of them.
const NODE_PORT: u16 = 30_080;

/// A load balancer's addresses. An API server keeps those for its controllers: there, they are external IPs.
fn balancer(has_api: bool) -> Outside {
    let addresses = addresses::balancer().to_vec();
    let (balancer, ips) = if has_api { (Vec::new(), addresses) } else { (addresses, Vec::new()) };
    Outside { balancer, ips, is_local: true, ..Outside::default() }
}

/// Agents, pods and services.
pub struct Cluster<'a> {
    /// The nodes.
    pub fabric: &'a Fabric,
    /// Two pods a node.
    pub pods: Vec<Pod>,
    /// Backends: one pod of each node; scaled under traffic.
    pub mixed: Service,
    /// Backend: the first pod alone.
    pub one: Service,
    /// Backend: the host outside, like an API server that is not in the pod range.
    pub outside: Service,
    /// Backend: the first node's own address.
    pub host: Service,
    /// Backends: one pod of each node, at a node port.
    pub published: Service,
    /// The same at a load balancer's address, with `externalTrafficPolicy: Local`.
    pub balanced: Service,
    /// Backend: the first pod. Nobody asks it while it has one: a UDP flow to a backend that is gone goes on when nothing else
    /// serves, and some later request could have that flow's port.
    pub unasked: Service,
    pub api: Option<&'a ApiServer>,
    _servers: Vec<Server>,
}

/// Somebody who sends requests.
pub struct Client<'a> {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub netns: &'a Netns,
    /// Its addresses, as others see them.
    pub addresses: Vec<IpAddr>,
}

/// An endpoint for each address of a pod.
pub fn endpoints(pod: &Pod) -> Vec<Endpoint> {
    pod.addresses().iter().map(|a| Endpoint::ready(*a, Some(pod.node().name()))).collect()
}

/// Starts an agent on every node, and waits until all are ready.
fn start_agents(fabric: &Fabric, api: Option<&ApiServer>) -> Result<()> {
    let kubeconfig = api.map(|api| api.kubeconfig().display().to_string());
    let source: Vec<&str> = kubeconfig.iter().flat_map(|path| ["--kubeconfig", path]).collect();
    fabric.nodes().iter().try_for_each(|node| node.spawn_agent(&source))?;
    fabric.nodes().iter().try_for_each(Node::wait_ready)
}

impl<'a> Cluster<'a> {
    /// True if the nodes have control groups, which socket load-balancing needs.
    pub fn has_sockets(&self) -> bool {
        self.fabric.nodes().iter().all(|node| node.cgroup().is_some())
    }

    /// Starts agents, adds pods, writes services, and waits until they are known.
    pub fn start(fabric: &'a Fabric, api: Option<&'a ApiServer>) -> Result<Self> {
        let start = Instant::now();
        start_agents(fabric, api)?;
        table::note(&format!("{} agents ready after {} ms", fabric.nodes().len(), start.elapsed().as_millis()));
        let start = Instant::now();
        let mut pods = Vec::new();
        for i in 1..=2 {
            for (n, node) in fabric.nodes().iter().enumerate() {
                let mut pod = node.add_pod(&format!("pod-{}", (i - 1) * fabric.nodes().len() + n + 1))?;
                examples::PORTS[i - 1].iter().try_for_each(|port| pod.serve(*port))?;
                pods.push(pod);
            }
        }
        table::note(&format!("{} pods added by the CNI binary in {} ms:", pods.len(), start.elapsed().as_millis()));
        for pod in &pods {
            let addresses: Vec<String> = pod.addresses().iter().map(ToString::to_string).collect();
            table::note(&format!("  {} on {}: {}", pod.name(), pod.node().name(), addresses.join(", ")));
        }
        let first_node = fabric.node(1);
        let servers = vec![
            Server::start(fabric.world(), "outside", PORT)?,
            Server::start(first_node.netns(), first_node.name(), PORT)?,
        ];
        let service = |name: &str, n: u8, endpoints: Vec<Endpoint>| {
            let mut service = Service::new(name, &vips(n), SERVICE_PORT, PORT);
            service.endpoints = endpoints;
            service
        };
        let (world4, world6) = testkit::fabric::WORLD;
        let outside = [IpAddr::from(world4), world6.into()].map(|a| Endpoint::ready(a, None)).to_vec();
        let host = first_node.addresses().map(|a| Endpoint::ready(a, Some(first_node.name()))).to_vec();
        let mixed: Vec<Endpoint> = pods.iter().take(fabric.nodes().len()).flat_map(endpoints).collect();
        let cluster = Self {
            mixed: service("mixed", 1, mixed.clone()),
            one: service("one", 2, pods.first().map(endpoints).unwrap_or_default()),
            outside: service("outside", 3, outside),
            host: service("host", 4, host),
            published: Service {
                outside: Outside { node_port: NODE_PORT, ..Outside::default() },
                ..service("published", 6, mixed.clone())
            },
            balanced: Service { outside: balancer(api.is_some()), ..service("balanced", 7, mixed.clone()) },
            unasked: service("unasked", 5, pods.first().map(endpoints).unwrap_or_default()),
            fabric,
            pods,
            api,
            _servers: servers,
        };
        let all = || cluster.services().into_iter().chain([&cluster.published, &cluster.balanced, &cluster.unasked]);
        all().try_for_each(|service| cluster.write(service))?;
        for text in examples::texts(fabric)? {
            cluster.apply_text(&text)?;
        }
        all().try_for_each(|service| cluster.wait_until_known(service))?;
        Ok(cluster)
    }

    /// Gives the agents a service and its slices, and waits until every node's maps have them.
    pub fn apply(&self, service: &Service) -> Result<()> {
        self.write(service)?;
        self.wait_until_known(service)
    }

    fn write(&self, service: &Service) -> Result<()> {
        match self.api {
            Some(api) => api.apply(&service.yaml(), "apply"),
            None => self.fabric.manifests().apply(service),
        }
    }

    /// The same with a file of the examples.
    fn apply_text(&self, (file, text): &(String, String)) -> Result<()> {
        match self.api {
            Some(api) => api.apply(text, "apply"),
            None => self.fabric.manifests().write(file, text),
        }
    }

    /// Starts all agents again, and waits until they are ready.
    pub fn restart_agents(&self) -> Result<()> {
        start_agents(self.fabric, self.api)
    }

    /// The services that everybody asks.
    pub fn services(&self) -> [&Service; 4] {
        [&self.mixed, &self.one, &self.outside, &self.host]
    }

    /// The agents see a file when it is written, and each node's own when it comes to it: rows are counted only once the maps
    /// of all nodes have exactly these endpoints.
    fn wait_until_known(&self, service: &Service) -> Result<()> {
        self.fabric.nodes().iter().try_for_each(|node| {
            wait::until(&format!("service {} known on {}", service.name, node.name()), || known(node, service))
        })
    }

    /// A pod of each node, and each node's host.
    pub fn clients(&self) -> Vec<Client<'_>> {
        let pods = self.pods.iter().take(self.fabric.nodes().len()).map(|pod| Client {
            name: pod.name().to_owned(),
            netns: pod.netns(),
            addresses: pod.addresses().to_vec(),
        });
        let hosts = self.fabric.nodes().iter().map(|node| Client {
            name: format!("{}'s host", node.name()),
            netns: node.netns(),
            addresses: node.addresses().to_vec(),
        });
        pods.chain(hosts).collect()
    }

    /// Commands that show the inside, for a person.
    pub fn hints(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let dist = dist::find("rustnetctl").map_or_else(|_| "rustnetctl".into(), |p| p.display().to_string());
        for node in self.fabric.nodes() {
            let (enter, bpffs, run) = (node.netns().enter_hint(), node.bpffs(), node.run_dir());
            let (bpffs, run) = (bpffs.display(), run.display());
            lines.push(format!("{}:", node.name()));
            lines.push(format!("  {enter} {dist} --bpffs {bpffs} --run-dir {run} status"));
            lines.push(format!("  {enter} bpftool map dump pinned {bpffs}/{}", rustnet_common::names::map::SVC4));
            lines.push(format!("  {enter} ip route"));
            lines.push(format!("  tail -f {}", node.agent_log_path().display()));
        }
        for pod in &self.pods {
            let mut line = format!("{}: {} ", pod.name(), pod.netns().enter_hint());
            let _ = write!(line, "curl -s http://{}:{SERVICE_PORT}/", self.mixed.vips[0]);
            lines.push(line);
        }
        lines.push(match self.api {
            Some(api) => format!("export KUBECONFIG={}", api.kubeconfig().display()),
            None => format!("manifests (edit them!): {}", self.fabric.manifests().dir().display()),
        });
        lines
    }
}

/// An error unless the node's maps have exactly this service's endpoints, behind each of its addresses and ports.
fn known(node: &Node, service: &Service) -> Result<()> {
    let (bpffs, run_dir) = (node.bpffs().display().to_string(), node.run_dir().display().to_string());
    let command = node.netns().command(dist::find("rustnetctl")?)?;
    let text = command.args(["--bpffs", &bpffs, "--run-dir", &run_dir, "-o", "json", "services"]).text()?;
    let entries: Vec<Value> = serde_json::from_str(&text).with_context(|| text.clone())?;
    let sockets = |list: &Value| -> BTreeSet<String> {
        let backends = list.as_array().into_iter().flatten();
        backends.map(|it| format!("{} {}", it["address"].as_str().unwrap_or_default(), it["port"])).collect()
    };
    for vip in &service.vips {
        for port in &service.ports {
            let entry = entries.iter().find(|it| {
                it["vip"] == vip.to_string() && it["port"] == port.port && it["protocol"] == port.proto.to_string()
            });
            let of_family = service.endpoints.iter().filter(|it| it.ready && it.address.is_ipv4() == vip.is_ipv4());
            let wanted = of_family.map(|it| format!("{} {}", it.address, port.target)).collect();
            let there = entry.map(|it| sockets(&it["backends"]));
            ensure!(there.as_ref() == Some(&wanted), "{vip} {} {}: {there:?}, not {wanted:?}", port.proto, port.port);
        }
    }
    Ok(())
}
