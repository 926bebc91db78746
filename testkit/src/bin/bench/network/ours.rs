//! rustnet itself: two nodes on one wire, an agent on each, two pods on the first and one on the second, and services.

use super::kernel::{MTU, join};
use super::traffic::SERVICE_TARGET;
use anyhow::Result;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::manifest::{Endpoint, Service};
use testkit::{Fabric, Pod, Routing, Setup};

/// The port of services.
pub const SERVICE_PORT: u16 = 80;
/// Services without meaning are written so many to a file.
const FILE: u32 = 1000;

/// Virtual addresses of service `n`.
pub fn vips(n: u32) -> [IpAddr; 2] {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 96, 0, 0)) + 10 + n);
    [v4.into(), Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 10 + n as u16).into()]
}

/// A service that leads to these addresses.
pub fn service(name: &str, n: u32, backends: &[IpAddr], node: &str) -> Service {
    let mut service = Service::new(name, &vips(n), SERVICE_PORT, SERVICE_TARGET);
    service.endpoints = backends.iter().map(|a| Endpoint::ready(*a, Some(node))).collect();
    service
}

/// A service in which nobody is interested, so that tables are not empty.
pub fn filler(n: u32) -> Service {
    let v4 = Ipv4Addr::new(10, 244, 200, (n % 250) as u8 + 1);
    let v6 = Ipv6Addr::new(0xfd00, 0x244, 0, 200, 0, 0, 0, (n % 250) as u16 + 1);
    service(&format!("filler-{n}"), n, &[v4.into(), v6.into()], "n9")
}

/// Two nodes.
pub struct Ours {
    /// Two on the first node, one on the second; gone before their nodes.
    pub pods: Vec<Pod>,
    _fabric: Fabric,
}

/// The service behind which the first node's second pod is, and the one with the second node's pod.
pub const NEAR: u32 = 0;
/// See [`NEAR`].
pub const FAR: u32 = 1;

impl Ours {
    /// Starts everything, with `services` services in all, and agents with further arguments.
    pub fn start(routing: Routing, services: u32, agent: &'static [&'static str]) -> Result<Self> {
        let fabric = Fabric::build(Setup { nodes: 2, routing, mtu: MTU, agent, ..Setup::default() })?;
        straighten(&fabric)?;
        let fillers: Vec<Service> = (2..services).map(filler).collect();
        for (i, some) in fillers.chunks(FILE as usize).enumerate() {
            let yaml: Vec<String> = some.iter().map(Service::yaml).collect();
            fabric.manifests().write(&format!("fillers-{i}.yaml"), &yaml.join("---\n"))?;
        }
        for node in fabric.nodes() {
            node.spawn_agent(&[])?;
        }
        for node in fabric.nodes() {
            node.wait_ready()?;
        }
        let mut pods = Vec::new();
        for (node, name) in [(1, "pod-1"), (1, "pod-2"), (2, "pod-3")] {
            pods.push(fabric.node(node).add_silent_pod(name)?);
        }
        for (name, n, pod) in [("near", NEAR, &pods[1]), ("far", FAR, &pods[2])] {
            fabric.manifests().apply(&service(name, n, pod.addresses(), pod.node().name()))?;
        }
        Ok(Self { pods, _fabric: fabric })
    }
}

/// Puts a wire between the two nodes in place of the switch, as the peers have it.
fn straighten(fabric: &Fabric) -> Result<()> {
    let nodes = [fabric.node(1), fabric.node(2)];
    for node in nodes {
        node.netns().ip("link del eth0\n")?;
    }
    join(nodes[0].netns(), nodes[1].netns(), "eth0", nodes.map(|n| (n.v4(), n.v6())))
}
