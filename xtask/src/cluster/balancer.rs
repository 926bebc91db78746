//! A provider of load balancers, as a cloud has one: gives Services addresses, and leads these, on the segment's router, to the nodes
//! whose health checks pass.
//!
//! It follows cloud-provider's service controller: a finalizer while a Service has an address (KEP-980), the node's `/healthz` of the
//! proxy for the traffic policy Cluster (KEP-3836), the Service's health check node port for Local.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use serde_json::{Deserializer, Value, json};

use super::layout::Cluster;
use super::process::Processes;
use super::{wait, wires};
use crate::cmd::Cmd;

const NAME: &str = "balancer";
const FINALIZER: &str = "service.kubernetes.io/load-balancer-cleanup";
/// Between two health checks of a node, and for the answer to one.
const PERIOD: Duration = Duration::from_secs(1);
/// Port of the proxy's own health check.
const PROXY: u16 = 10256;

/// Addresses that clients have of load balancers: none of the nodes' segment, as of clients far away.
const CLIENTS: [&str; 2] = ["198.51.100.1", "2001:db8:100::1"];

/// What addresses are given from. Without a route of its own, an address is silent: a client that heard "unreachable" from its own
/// stack would hear what no client far away does.
const RANGES: [&str; 2] = ["203.0.113.0/24", "2001:db8:113::/64"];
/// A packet that leaves by it comes back to a host that does not forward, and is dropped.
const NOWHERE: [&str; 2] = ["dev", "lo"];

/// Starts the provider unless it runs.
pub fn start(cluster: &Cluster) -> Result<()> {
    let processes = Processes::of(cluster);
    let this = std::env::current_exe().context("cannot tell where this program is")?.display().to_string();
    let argv = [&this, "cluster", "--name", &cluster.name, "balance"].map(ToString::to_string);
    processes.start(NAME, &argv)?;
    let log = processes.log(NAME);
    let is_ready = || fs::read_to_string(&log).is_ok_and(|text| text.contains("balancing"));
    let started = wait::until(Duration::from_secs(10), || is_ready() || processes.find(NAME).is_none());
    ensure!(
        started && processes.find(NAME).is_some(),
        "no load balancers; the end of its log:\n{}",
        processes.tail(NAME)
    );
    Ok(())
}

/// The provider itself; does not return.
#[expect(clippy::print_stdout, reason = "its log")]
pub fn run(cluster: &Cluster) -> Result<()> {
    // All of it works on the segment, as its router.
    setns(File::open(cluster.netns_file("sw"))?, CloneFlags::CLONE_NEWNET)?;
    for family in ["ipv4", "ipv6"] {
        // Connections of one client are spread over the nodes.
        fs::write(format!("/proc/sys/net/{family}/fib_multipath_hash_policy"), "1")?;
    }
    for client in CLIENTS {
        wires::ip(&["addr", "replace", client, "dev", "lo"])?;
    }
    for (range, client) in RANGES.iter().zip(CLIENTS) {
        wires::ip(&[&["route", "replace", range], &NOWHERE[..], &["src", client]].concat())?;
    }
    let (events, received) = mpsc::channel();
    let argv = [cluster.program("kubectl")?, format!("--kubeconfig={}", cluster.kubeconfig("inside"))];
    thread::spawn({
        let argv = argv.clone();
        move || loop {
            if let Err(error) = watch(&argv, &events) {
                println!("{error:#}");
            }
            thread::sleep(PERIOD);
        }
    });
    let nodes = cluster.nodes().into_iter().map(|node| {
        let address = node.address();
        Ok([address.v4.parse()?, address.v6.parse()?])
    });
    let nodes = nodes.collect::<Result<_>>()?;
    let mut balancer = Balancer { argv, nodes, services: BTreeMap::new(), failed: BTreeMap::new() };
    println!("balancing");
    let mut checked = Instant::now();
    loop {
        match received.recv_timeout(PERIOD.saturating_sub(checked.elapsed())) {
            Ok(event) => {
                balancer.take(event);
            }
            Err(RecvTimeoutError::Timeout) => {
                for event in std::mem::take(&mut balancer.failed).into_values() {
                    balancer.take(event);
                }
                balancer.check();
                checked = Instant::now();
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// Sends each change of a Service, until the API server goes.
fn watch(argv: &[String; 2], events: &Sender<Value>) -> Result<()> {
    let mut kubectl = Command::new(&argv[0])
        .arg(&argv[1])
        .args(["get", "services", "--all-namespaces", "--output=json", "--watch", "--output-watch-events"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = kubectl.stdout.take().context("kubectl has an output")?;
    for event in Deserializer::from_reader(output).into_iter::<Value>() {
        events.send(event.context("what kubectl prints")?)?;
    }
    kubectl.wait()?;
    Ok(())
}

/// A Service with addresses.
struct Served {
    vips: Vec<IpAddr>,
    /// Where nodes say whether they want its traffic.
    check: u16,
    /// Its clients stay at one node: what a node knows of them, another does not.
    has_affinity: bool,
    /// The nodes that each address leads to; `None`: no route was made yet.
    led_to: Vec<Option<Vec<IpAddr>>>,
}

struct Balancer {
    /// kubectl.
    argv: [String; 2],
    /// Addresses of each node, of both families.
    nodes: Vec<[IpAddr; 2]>,
    /// By namespace and name.
    services: BTreeMap<(String, String), Served>,
    /// Events that could not be dealt with, to be tried again.
    failed: BTreeMap<(String, String), Value>,
}

impl Balancer {
    /// Deals with an event.
    #[expect(clippy::print_stdout, reason = "its log")]
    fn take(&mut self, event: Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = &event["object"]["metadata"];
        let key = (text(&name["namespace"]), text(&name["name"]));
        self.failed.remove(&key);
        match self.handle(&event, &key) {
            Ok(()) => {}
            // Its last event follows.
            Err(error) if format!("{error:#}").contains("NotFound") => {}
            Err(error) => {
                println!("{error:#}");
                self.failed.insert(key, event);
            }
        }
    }

    fn handle(&mut self, event: &Value, key: &(String, String)) -> Result<()> {
        let service = &event["object"];
        if event["type"] == "DELETED" {
            self.release(key);
            return Ok(());
        }
        let (spec, given) = (&service["spec"], &service["status"]["loadBalancer"]["ingress"]);
        let finalizers: Vec<&str> =
            service["metadata"]["finalizers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let has_finalizer = finalizers.contains(&FINALIZER);
        let is_ours = spec["type"] == "LoadBalancer" && spec["loadBalancerClass"].is_null();
        if !is_ours || !service["metadata"]["deletionTimestamp"].is_null() {
            self.release(key);
            if has_finalizer {
                self.patch(key, &json!({"status": {"loadBalancer": {"ingress": null}}}), true)?;
                let others: Vec<_> = finalizers.into_iter().filter(|it| *it != FINALIZER).collect();
                self.patch(key, &json!({"metadata": {"finalizers": others}}), false)?;
            }
            return Ok(());
        }
        if !has_finalizer {
            let all: Vec<_> = finalizers.into_iter().chain([FINALIZER]).collect();
            self.patch(key, &json!({"metadata": {"finalizers": all}}), false)?;
        }
        let families = spec["ipFamilies"].as_array().into_iter().flatten().map(|family| usize::from(family == "IPv6"));
        let check = spec["healthCheckNodePort"].as_u64().map_or(Ok(PROXY), u16::try_from)?;
        let vips = if let Some(served) = self.services.get(key) {
            served.vips.clone()
        } else {
            let both = self.free(given)?;
            families.map(|family| both[family]).collect()
        };
        let ingress: Vec<Value> = vips.iter().map(|vip| json!({"ip": vip.to_string(), "ipMode": "VIP"})).collect();
        let (led_to, has_affinity) = (vec![None; vips.len()], spec["sessionAffinity"] == "ClientIP");
        let served = self.services.entry(key.clone()).or_insert(Served { vips, check, has_affinity, led_to });
        (served.check, served.has_affinity) = (check, has_affinity);
        if *given != json!(ingress) {
            // Clients come as soon as there is an address.
            self.check();
            self.patch(key, &json!({"status": {"loadBalancer": {"ingress": ingress}}}), true)?;
        }
        Ok(())
    }

    /// One address of each family that no Service has; those that it had before this process, if it had any.
    fn free(&self, given: &Value) -> Result<[IpAddr; 2]> {
        let pair = |n: u16| [IpAddr::from([203, 0, 113, n as u8]), IpAddr::from([0x2001, 0xdb8, 0x113, 0, 0, 0, 0, n])];
        let is_free =
            |pair: &[IpAddr; 2]| !self.services.values().any(|it| it.vips.iter().any(|vip| pair.contains(vip)));
        let had = |pair: &[IpAddr; 2]| pair.iter().any(|vip| given[0]["ip"] == vip.to_string());
        let all = || (1..255).map(pair).filter(is_free);
        all().find(had).or_else(|| all().next()).context("all 254 addresses are given out")
    }

    fn release(&mut self, key: &(String, String)) {
        let Some(served) = self.services.remove(key) else { return };
        let routed = served.vips.iter().zip(&served.led_to).filter(|(_, nodes)| nodes.is_some());
        for (vip, _) in routed {
            // One that is gone already is as good.
            let _ = wires::ip(&["route", "del", &vip.to_string()]);
        }
    }

    /// Leads each address to the nodes that want its traffic.
    #[expect(clippy::print_stdout, reason = "its log")]
    fn check(&mut self) {
        for ((namespace, name), served) in &mut self.services {
            let healthy = self.nodes.iter().filter(|node| is_healthy(node, served.check));
            let healthy: Vec<_> = healthy.take(if served.has_affinity { 1 } else { usize::MAX }).collect();
            for (vip, led_to) in served.vips.iter().zip(&mut served.led_to) {
                let nodes: Vec<IpAddr> = healthy.iter().map(|node| node[usize::from(vip.is_ipv6())]).collect();
                if led_to.as_ref() == Some(&nodes) {
                    continue;
                }
                match lead(*vip, &nodes) {
                    Ok(()) => {
                        println!("{namespace}/{name}: {vip} leads to {nodes:?}");
                        *led_to = Some(nodes);
                    }
                    Err(error) => println!("{namespace}/{name}: {error:#}"),
                }
            }
        }
    }

    fn patch(&self, (namespace, name): &(String, String), patch: &Value, is_of_status: bool) -> Result<()> {
        let mut kubectl =
            Cmd::new(&self.argv[0]).arg(&self.argv[1]).args(["patch", "service", name, "--namespace", namespace]);
        kubectl = kubectl.args(["--type=merge", "--patch", &patch.to_string()]);
        if is_of_status {
            kubectl = kubectl.arg("--subresource=status");
        }
        kubectl.capture().map(drop)
    }
}

fn lead(vip: IpAddr, nodes: &[IpAddr]) -> Result<()> {
    let args = route(vip, nodes);
    wires::ip(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

/// What `ip` takes for the route of an address to these nodes; without any it is silent.
fn route(vip: IpAddr, nodes: &[IpAddr]) -> Vec<String> {
    let (vip, client) = (vip.to_string(), CLIENTS[usize::from(vip.is_ipv6())]);
    let hops: Vec<String> = nodes.iter().map(ToString::to_string).collect();
    let mut args = vec!["route", "replace", &vip, "src", client];
    if hops.is_empty() {
        args.extend(NOWHERE);
    }
    for hop in &hops {
        args.extend(["nexthop", "via", hop, "dev", "br0"]);
    }
    args.into_iter().map(str::to_owned).collect()
}

/// True if a node answers a health check at its first address that answers at all.
fn is_healthy(node: &[IpAddr; 2], port: u16) -> bool {
    let ask = |address: &IpAddr| -> std::io::Result<String> {
        let mut connection = TcpStream::connect_timeout(&SocketAddr::new(*address, port), PERIOD)?;
        connection.set_read_timeout(Some(PERIOD))?;
        connection.write_all(b"GET /healthz HTTP/1.0\r\nHost: node\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    };
    node.iter().find_map(|address| ask(address).ok()).is_some_and(|answer| answer.split(' ').nth(1) == Some("200"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_leads_to_its_nodes_or_nowhere() {
        let [vip, one, two] = ["203.0.113.1", "172.18.0.11", "172.18.0.12"].map(|it| it.parse().unwrap());
        let words = |nodes: &[IpAddr]| route(vip, nodes).join(" ");
        let base = "route replace 203.0.113.1 src 198.51.100.1";
        assert_eq!(words(&[one, two]), format!("{base} nexthop via {one} dev br0 nexthop via {two} dev br0"));
        // A blackhole would be an error of connect, which no client far away gets.
        assert_eq!(words(&[]), format!("{base} dev lo"));
    }
}
