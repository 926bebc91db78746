//! Nodes, routers and the world, wired together.
//!
//! Switched: all nodes on one segment, `172.18.0.0/24` and `fd00:18::/64`, node N at `.1N` and `::1N`. Routed: each node in
//! a segment of its own behind a router, `172.18.N.0/24` and `fd00:18:0:N::/64`, and between the routers a core whose MTU
//! can be smaller. Mixed: the first two nodes so, the others thus. In all, the world (`192.0.2.10`, `2001:db8:2::10`) lies behind
//! the switch, which routes, and knows nothing of pods.

use crate::janitor::{self, RunDir};
use crate::manifest::{Manifests, node_yaml};
use crate::netns::{Holder, Netns, Own};
use crate::node::{Node, Plan};
use crate::raw;
use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use rustnet_agent::bpf::sys;
use rustnet_agent::config::Routing;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// How nodes reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// On one segment.
    Switched,
    /// Each behind its own router.
    Routed {
        /// MTU between the routers.
        core_mtu: u32,
    },
    /// Nodes 1 and 2 on one segment, each other behind its own router.
    Mixed {
        /// MTU between the routers, and between them and the segment.
        core_mtu: u32,
    },
}

impl Topology {
    /// MTU between the segment or router of node `n` and the rest, if there is a router before it.
    fn behind_router(self, n: u8) -> Option<u32> {
        match self {
            Self::Switched => None,
            Self::Routed { core_mtu } => Some(core_mtu),
            Self::Mixed { core_mtu } => (n > 2).then_some(core_mtu),
        }
    }
}

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Number of nodes, 1 to 200.
    pub nodes: u8,
    /// How they are wired.
    pub topology: Topology,
    /// How pods are reached.
    pub routing: Routing,
    /// MTU of the nodes' links.
    pub mtu: u32,
    /// The nodes are known to each other by their IPv6 addresses first: the overlay runs over IPv6.
    pub ipv6_first: bool,
    /// Arguments that every agent gets in addition to its own.
    pub agent: &'static [&'static str],
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            nodes: 2,
            topology: Topology::Switched,
            routing: Routing::Vxlan,
            mtu: 1500,
            ipv6_first: false,
            agent: &[],
        }
    }
}

/// A whole network of nodes.
#[derive(Debug)]
pub struct Fabric {
    setup: Setup,
    nodes: Vec<Node>,
    routers: Vec<Holder>,
    world: Holder,
    switch: Holder,
    manifests: Manifests,
    dir: Arc<RunDir>,
}

/// A host that is no member of the cluster, and the router between it and the nodes.
#[derive(Debug)]
pub struct Outsider {
    /// The host.
    pub host: Holder,
    /// Its router; the leg towards the host is called `out`.
    pub router: Holder,
}

/// The world's addresses.
pub const WORLD: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(192, 0, 2, 10), Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10));

/// Sysctls of everything here: addresses are there at once, no router sends advertisements, and
/// ICMP errors are not rationed (a test may cause many).
fn quiet(netns: &Netns) -> Result<()> {
    for (key, value) in [
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/accept_ra", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
    ] {
        netns.sysctl(key, value)?;
    }
    Ok(())
}

fn forwarding(netns: &Netns) -> Result<()> {
    netns.sysctl("ipv4/ip_forward", "1")?;
    netns.sysctl("ipv6/conf/all/forwarding", "1")
}

/// Where node `n` is: its addresses, prefix lengths and gateways.
struct Place {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    gateway4: Ipv4Addr,
    gateway6: Ipv6Addr,
}

/// `::1N`, so that it reads like the last octet of the IPv4 address, which is decimal.
fn decimal_looking(n: u8) -> Result<u16> {
    let last = format!("{}", 10 + u16::from(n));
    u16::from_str_radix(&last, 16).context("not a node number")
}

impl Place {
    fn of(n: u8, topology: Topology) -> Result<Self> {
        let (subnet, last4, last6) = match topology.behind_router(n) {
            None => (0, 10 + n, decimal_looking(n)?),
            Some(_) => (n, 11, 0x11),
        };
        let v6 = |last| Ipv6Addr::new(0xfd00, 0x18, 0, subnet.into(), 0, 0, 0, last);
        Ok(Self {
            v4: Ipv4Addr::new(172, 18, subnet, last4),
            v6: v6(last6),
            gateway4: Ipv4Addr::new(172, 18, subnet, 1),
            gateway6: v6(1),
        })
    }
}

impl Fabric {
    /// Builds everything but the agents and pods.
    pub fn build(setup: Setup) -> Result<Self> {
        if !(1..=200).contains(&setup.nodes) {
            bail!("a fabric has 1 to 200 nodes, not {}", setup.nodes);
        }
        let prefix = janitor::unique_prefix();
        let dir = Arc::new(RunDir::make(&prefix)?);
        let manifests = Manifests::new(dir.path().join("manifests"));
        std::fs::create_dir(manifests.dir())?;
        let named = |name: &str| -> Result<Holder> {
            let holder = Holder::new(&format!("{prefix}-{name}"), Own::default())?;
            quiet(&holder)?;
            Ok(holder)
        };
        let switch = named("sw")?;
        let world = named("world")?;
        forwarding(&switch)?;
        switch.ip("link add br0 type bridge\n")?;
        let mut fabric = Self { setup, nodes: Vec::new(), routers: Vec::new(), world, switch, manifests, dir };
        fabric.wire_switch()?;
        for n in 1..=setup.nodes {
            let node = fabric.new_node(&prefix, n)?;
            fabric.nodes.push(node);
            if let Some(core_mtu) = setup.topology.behind_router(n) {
                let router = named(&format!("r{n}"))?;
                forwarding(&router)?;
                fabric.wire_router(n, &router, core_mtu)?;
                fabric.routers.push(router);
            }
            fabric.wire_node(n)?;
        }
        Ok(fabric)
    }

    /// Builds everything and starts an agent on every node.
    pub fn start(setup: Setup) -> Result<Self> {
        let fabric = Self::build(setup)?;
        for node in &fabric.nodes {
            node.spawn_agent(&[])?;
        }
        for node in &fabric.nodes {
            node.wait_ready()?;
        }
        Ok(fabric)
    }

    /// The switch's bridge and the link to the world.
    fn wire_switch(&self) -> Result<()> {
        let segment = "addr add 172.18.0.1/24 dev br0\naddr add fd00:18::1/64 dev br0 nodad\n";
        let core = "addr add 172.31.0.254/24 dev br0\naddr add fd00:31::254/64 dev br0 nodad\n";
        let addresses = match self.setup.topology {
            Topology::Switched => segment.to_owned(),
            Topology::Routed { .. } => core.to_owned(),
            Topology::Mixed { .. } => [segment, core].concat(),
        };
        let world = self.world.pid();
        self.switch.ip(&format!(
            "link set br0 up\n{addresses}link add world type veth peer name eth0 netns {world}\n\
             addr add 192.0.2.1/24 dev world\naddr add 2001:db8:2::1/64 dev world nodad\nlink set world up\n"
        ))?;
        let (v4, v6) = WORLD;
        self.world.ip(&format!(
            "addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via 192.0.2.1\nroute add default via 2001:db8:2::1\n"
        ))
    }

    /// A router with one leg at its node and one in the core; every router knows every other one.
    fn wire_router(&self, n: u8, router: &Holder, core_mtu: u32) -> Result<()> {
        let place = Place::of(n, self.setup.topology)?;
        self.switch.ip(&format!(
            "link add r{n} mtu {core_mtu} type veth peer name core mtu {core_mtu} netns {}\nlink set r{n} master br0 up\n\
             link set br0 mtu {core_mtu}\n\
             route add 172.18.{n}.0/24 via 172.31.0.{n}\n",
            router.pid()
        ))?;
        router.ip(&format!(
            "addr add 172.31.0.{n}/24 dev core\naddr add fd00:31::{n}/64 dev core nodad\nlink set core up\n\
             route add default via 172.31.0.254\nroute add default via fd00:31::254\n\
             link add node mtu {} type veth peer name eth0 mtu {} netns {}\n\
             addr add {}/24 dev node\naddr add {}/64 dev node nodad\nlink set node up\n",
            self.setup.mtu,
            self.setup.mtu,
            self.nodes[usize::from(n) - 1].netns().pid(),
            place.gateway4,
            place.gateway6
        ))?;
        self.switch.ip(&format!("route add fd00:18:0:{n:x}::/64 via fd00:31::{n}\n"))?;
        if self.setup.routing == Routing::Native {
            // Routers between the nodes have to know the pods then.
            let cidrs = &self.nodes[usize::from(n) - 1].pod_cidrs().to_vec();
            let routes = |hops: [String; 2]| -> String {
                let hop = |cidr: &IpNet| &hops[usize::from(cidr.addr().is_ipv6())];
                cidrs.iter().fold(String::new(), |batch, cidr| batch + &format!("route add {cidr} via {}\n", hop(cidr)))
            };
            self.switch.ip(&routes([format!("172.31.0.{n}"), format!("fd00:31::{n}")]))?;
            router.ip(&routes([place.v4.to_string(), place.v6.to_string()]))?;
        }
        for other in 1..=self.setup.nodes {
            if other != n && self.setup.topology.behind_router(other).is_some() {
                router.ip(&format!(
                    "route add 172.18.{other}.0/24 via 172.31.0.{other}\n\
                     route add fd00:18:0:{other:x}::/64 via fd00:31::{other}\n"
                ))?;
            }
        }
        Ok(())
    }

    fn new_node(&self, prefix: &str, n: u8) -> Result<Node> {
        let place = Place::of(n, self.setup.topology)?;
        let name = format!("n{n}");
        let pod_cidrs: Vec<IpNet> =
            vec![format!("10.244.{n}.0/24").parse()?, format!("fd00:244:0:{n:x}::/64").parse()?];
        let mut addresses: Vec<IpAddr> = vec![place.v4.into(), place.v6.into()];
        if self.setup.ipv6_first {
            addresses.reverse();
        }
        self.manifests.write(&format!("node-{name}.yaml"), &node_yaml(&name, &addresses, &pod_cidrs))?;
        let node = Node::new(Plan {
            name,
            full_name: format!("{prefix}-n{n}"),
            v4: place.v4,
            v6: place.v6,
            pod_cidrs,
            routing: self.setup.routing,
            agent: self.setup.agent,
            manifests: self.manifests.dir().to_owned(),
            run: self.dir.clone(),
        })?;
        quiet(node.netns())?;
        Ok(node)
    }

    /// The node's end of its link.
    fn wire_node(&self, n: u8) -> Result<()> {
        let place = Place::of(n, self.setup.topology)?;
        let node = self.nodes[usize::from(n) - 1].netns();
        if self.setup.topology.behind_router(n).is_none() {
            let mtu = self.setup.mtu;
            self.switch.ip(&format!(
                "link add n{n} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\nlink set n{n} master br0 up\n",
                node.pid()
            ))?;
        }
        let mut batch = String::new();
        let _ = writeln!(batch, "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad", place.v4, place.v6);
        let _ = writeln!(batch, "link set eth0 up");
        let _ = writeln!(batch, "route add default via {}\nroute add default via {}", place.gateway4, place.gateway6);
        node.ip(&batch)
    }

    /// Plugs another host into the switch, at `172.18.0.LAST` and `fd00:18::LAST`.
    pub fn add_host(&self, name: &str, last: u8) -> Result<Holder> {
        if matches!(self.setup.topology, Topology::Routed { .. }) {
            bail!("a routed fabric has no room for another host");
        }
        let prefix = self.switch.name().trim_end_matches("-sw");
        let host = Holder::new(&format!("{prefix}-{name}"), Own::default())?;
        quiet(&host)?;
        self.switch.ip(&format!(
            "link add {name} type veth peer name eth0 netns {}\nlink set {name} master br0 up\n",
            host.pid()
        ))?;
        host.ip(&format!(
            "addr add 172.18.0.{last}/24 dev eth0\naddr add fd00:18::{last}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via 172.18.0.1\nroute add default via fd00:18::1\n"
        ))?;
        Ok(host)
    }

    /// Plugs a router into the switch, at `172.18.0.LAST` and `fd00:18::LAST`, and a host behind
    /// it, at `198.51.100.LAST` and `2001:db8:66::LAST`. The switch has a route back. The router
    /// has routes to the pods of the nodes on the switch, as in native routing, and forwards
    /// packets with any source.
    pub fn add_outsider(&self, name: &str, last: u8) -> Result<Outsider> {
        let router = self.add_host(&format!("{name}-r"), last)?;
        forwarding(&router)?;
        for key in ["all", "default", "eth0"] {
            router.sysctl(&format!("ipv4/conf/{key}/rp_filter"), "0")?;
        }
        let prefix = self.switch.name().trim_end_matches("-sw");
        let host = Holder::new(&format!("{prefix}-{name}"), Own::default())?;
        quiet(&host)?;
        router.ip(&format!(
            "link add out type veth peer name eth0 netns {}\n\
             addr add 198.51.100.1/24 dev out\naddr add 2001:db8:66::1/64 dev out nodad\nlink set out up\n",
            host.pid()
        ))?;
        host.ip(&format!(
            "addr add 198.51.100.{last}/24 dev eth0\naddr add 2001:db8:66::{last}/64 dev eth0 nodad\nlink set eth0 up\n\
             route add default via 198.51.100.1\nroute add default via 2001:db8:66::1\n"
        ))?;
        self.switch.ip(&format!(
            "route add 198.51.100.0/24 via 172.18.0.{last}\nroute add 2001:db8:66::/64 via fd00:18::{last}\n"
        ))?;
        for (n, node) in (1..).zip(&self.nodes) {
            if self.setup.topology.behind_router(n).is_none() {
                for cidr in node.pod_cidrs() {
                    router.ip(&format!("route add {cidr} via {}\n", node.address_like(cidr.addr())))?;
                }
            }
        }
        Ok(Outsider { host, router })
    }

    /// Gives node `n` a second NIC, `nat0`, at `10.0.2.15/24` and `fd00:2::15/64`, behind whose router (`.2`, `::2`) the world
    /// lies. The router is returned. Nodes do not reach each other there.
    pub fn add_second_network(&self, n: usize) -> Result<Holder> {
        let prefix = self.switch.name().trim_end_matches("-sw");
        let router = Holder::new(&format!("{prefix}-nat{n}"), Own::default())?;
        quiet(&router)?;
        forwarding(&router)?;
        let (node, world) = (self.node(n).netns(), self.world.pid());
        router.ip(&format!(
            "link add node type veth peer name nat0 netns {}\n\
             addr add 10.0.2.2/24 dev node\naddr add fd00:2::2/64 dev node nodad\nlink set node up\n\
             link add world type veth peer name nat{n} netns {world}\n\
             addr add 198.18.{n}.1/24 dev world\naddr add fd00:99:{n}::1/64 dev world nodad\nlink set world up\n\
             route add default via 198.18.{n}.2\nroute add default via fd00:99:{n}::2\n",
            node.pid()
        ))?;
        self.world.ip(&format!(
            "addr add 198.18.{n}.2/24 dev nat{n}\naddr add fd00:99:{n}::2/64 dev nat{n} nodad\nlink set nat{n} up\n\
             route add 10.0.2.0/24 via 198.18.{n}.1 src {}\nroute add fd00:2::/64 via fd00:99:{n}::1 src {}\n",
            WORLD.0, WORLD.1
        ))?;
        node.ip("addr add 10.0.2.15/24 dev nat0\naddr add fd00:2::15/64 dev nat0 nodad\nlink set nat0 up\n")?;
        Ok(router)
    }

    /// A bridge of machines on node `n`, `virbr0` at `192.168.122.1/24` and `fd00:7::1/64`, with one machine at `.10` and
    /// `::10`, which is returned. It has no route to anywhere else.
    pub fn add_machine(&self, n: usize) -> Result<Holder> {
        let prefix = self.switch.name().trim_end_matches("-sw");
        let machine = Holder::new(&format!("{prefix}-vm{n}"), Own::default())?;
        quiet(&machine)?;
        self.node(n).netns().ip(&format!(
            "link add virbr0 type bridge\naddr add 192.168.122.1/24 dev virbr0\naddr add fd00:7::1/64 dev virbr0 nodad\n\
             link set virbr0 up\nlink add vnet0 type veth peer name eth0 netns {}\nlink set vnet0 master virbr0 up\n",
            machine.pid()
        ))?;
        machine.ip("addr add 192.168.122.10/24 dev eth0\naddr add fd00:7::10/64 dev eth0 nodad\nlink set eth0 up\n")?;
        Ok(machine)
    }

    /// The directory of this run; removed at the end.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What was asked for.
    pub fn setup(&self) -> Setup {
        self.setup
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Node number `n`, from 1.
    pub fn node(&self, n: usize) -> &Node {
        &self.nodes[n - 1]
    }

    /// The switch between the nodes.
    pub fn switch(&self) -> &Netns {
        &self.switch
    }

    /// Makes the switch a peer for XDP on the nodes' uplinks, until the result is dropped: it takes what XDP sends, for which a veth
    /// needs a program of its own, and finishes all checksums, as a wire does.
    pub fn wire_xdp(&self) -> Result<Vec<OwnedFd>> {
        /// `XDP_PASS`.
        const PASS: u32 = 2;
        self.switch.run(|| {
            let pass = [sys::instruction(0xb7, 0, 0, 0, PASS), sys::instruction(0x95, 0, 0, 0, 0)];
            let pass = sys::prog_load_xdp("pass", &pass).context("cannot load a program that passes all")?;
            let wire = |port: String| {
                raw::set_tx_checksum(&port, false)?;
                let index = nix::net::if_::if_nametoindex(port.as_str())?;
                sys::link_create_xdp(pass.as_fd(), index).with_context(|| format!("XDP on {port}"))
            };
            (1..=self.nodes.len()).map(|n| wire(format!("n{n}"))).collect()
        })?
    }

    /// The router in front of node `n`, in a routed fabric.
    pub fn router(&self, n: usize) -> &Netns {
        &self.routers[n - 1]
    }

    /// The host outside.
    pub fn world(&self) -> &Netns {
        &self.world
    }

    /// The directory that all agents watch.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The ends of all logs, for the report of a failure.
    pub fn logs(&self) -> String {
        let mut out = String::new();
        for node in &self.nodes {
            let _ = writeln!(out, "--- agent of {} ---\n{}", node.name(), node.agent_log(40));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_alike_in_both_families() -> Result<()> {
        let place = Place::of(2, Topology::Switched)?;
        assert_eq!((place.v4.to_string(), place.v6.to_string()), ("172.18.0.12".into(), "fd00:18::12".into()));
        let place = Place::of(2, Topology::Routed { core_mtu: 1400 })?;
        assert_eq!((place.v4.to_string(), place.v6.to_string()), ("172.18.2.11".into(), "fd00:18:0:2::11".into()));
        Ok(())
    }
}
