//! What the kernel does by itself: a veth pair from namespace to namespace, routing between veths on one host and on two,
//! and a VXLAN device between the two.

use anyhow::Result;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::Netns;
use testkit::netns::{Holder, Own};

/// MTU of everything without a tunnel.
pub const MTU: u32 = 1500;
/// The same below VXLAN over IPv4.
pub const TUNNEL_MTU: u32 = 1450;

/// An address of each family.
pub type Both = (Ipv4Addr, Ipv6Addr);

/// A namespace with its addresses.
pub struct Place {
    /// The namespace.
    pub netns: Holder,
    /// Its addresses.
    pub addresses: Both,
}

impl Place {
    /// Its address of the same family as `other`.
    pub fn address_like(&self, v4: bool) -> IpAddr {
        if v4 { self.addresses.0.into() } else { self.addresses.1.into() }
    }
}

/// An empty namespace, whose addresses are usable at once.
pub fn namespace(name: &str) -> Result<Holder> {
    let holder = Holder::new(&format!("rn{}-{name}", std::process::id()), Own::default())?;
    for conf in ["all", "default"] {
        holder.sysctl(&format!("ipv6/conf/{conf}/accept_dad"), "0")?;
    }
    Ok(holder)
}

/// A veth pair between two namespaces; both ends are called `dev`.
pub fn join(a: &Netns, b: &Netns, dev: &str, ends: [Both; 2]) -> Result<()> {
    a.ip(&format!("link add {dev} mtu {MTU} type veth peer name {dev} mtu {MTU} netns {}\n", b.pid()))?;
    for (netns, (v4, v6)) in [a, b].into_iter().zip(ends) {
        netns.ip(&format!("addr add {v4}/24 dev {dev}\naddr add {v6}/64 dev {dev} nodad\nlink set {dev} up\n"))?;
    }
    Ok(())
}

/// Two namespaces and nothing between them.
pub fn direct() -> Result<[Place; 2]> {
    let ends = [host_address(0x13, 1), host_address(0x13, 2)];
    let places = [namespace("direct-a")?, namespace("direct-b")?];
    join(&places[0], &places[1], "eth0", ends)?;
    let [a, b] = places;
    Ok([Place { netns: a, addresses: ends[0] }, Place { netns: b, addresses: ends[1] }])
}

fn host_address(net: u8, n: u8) -> Both {
    (Ipv4Addr::new(172, net, 0, n), Ipv6Addr::new(0xfd00, net.into(), 0, 0, 0, 0, 0, n.into()))
}

fn pod_address(net: u8, host: u8, n: u8) -> Both {
    (Ipv4Addr::new(10, net, host, n), Ipv6Addr::new(0xfd00, 0x10, net.into(), host.into(), 0, 0, 0, n.into()))
}

/// Two hosts that route, with pods on veths: what a network without eBPF amounts to at the least.
pub struct Hosts {
    /// Two pods of the first host, one of the second.
    pub routed: [Place; 3],
    /// A pod of each host; between them lies VXLAN.
    pub tunnelled: [Place; 2],
    _routers: [Holder; 2],
}

/// The second octet of routed pods' addresses, and of tunnelled ones'.
const ROUTED: u8 = 201;
const TUNNELLED: u8 = 202;
/// The device of the tunnel.
const TUNNEL: &str = "vx0";

impl Hosts {
    /// Builds them.
    pub fn new() -> Result<Self> {
        let routers = [namespace("kernel-1")?, namespace("kernel-2")?];
        let addresses = [host_address(0x14, 1), host_address(0x14, 2)];
        for router in &routers {
            router.sysctl("ipv4/ip_forward", "1")?;
            router.sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        join(&routers[0], &routers[1], "eth0", addresses)?;
        let pair = Pair { hosts: [&routers[0], &routers[1]], addresses };
        pair.add_routes()?;
        pair.add_tunnel()?;
        Ok(Self {
            routed: [
                pod(&routers[0], "kernel-pod-1", pod_address(ROUTED, 1, 1), MTU)?,
                pod(&routers[0], "kernel-pod-2", pod_address(ROUTED, 1, 2), MTU)?,
                pod(&routers[1], "kernel-pod-3", pod_address(ROUTED, 2, 3), MTU)?,
            ],
            tunnelled: pair.add_tunnelled_pods("vxlan-pod")?,
            _routers: routers,
        })
    }
}

/// Two hosts with `eth0`, each of which forwards and reaches the other.
pub struct Pair<'a> {
    /// The hosts.
    pub hosts: [&'a Netns; 2],
    /// Their addresses.
    pub addresses: [Both; 2],
}

impl Pair<'_> {
    /// Routes to the pods of the other host by its address. [`Pair::remove`] removes them.
    pub fn add_routes(&self) -> Result<()> {
        self.each(|host, other, _, far| {
            let pods = pod_address(ROUTED, other, 0);
            host.ip(&format!("route add {}/24 via {}\nroute add {}/64 via {}\n", pods.0, far.0, pods.1, far.1))
        })
    }

    /// A VXLAN device on either host, and routes to the pods of the other host through it. [`Pair::remove`] removes them.
    ///
    /// The devices have addresses of the link alone: to a network of Kubernetes, one with others is a way to the world, which wants its
    /// programs.
    pub fn add_tunnel(&self) -> Result<()> {
        self.each(|host, other, near, far| {
            let end = |n| (Ipv4Addr::new(169, 254, 0x15, n), Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x15, n.into()));
            let (own, next, pods) = (end(3 - other), end(other), pod_address(TUNNELLED, other, 0));
            host.ip(&format!(
                "link add {TUNNEL} mtu {TUNNEL_MTU} type vxlan id 42 dstport 4789 local {} remote {} dev eth0\n\
                 addr add {}/24 dev {TUNNEL} scope link\naddr add {}/64 dev {TUNNEL} nodad\nlink set {TUNNEL} up\n\
                 route add {}/24 via {} dev {TUNNEL}\nroute add {}/64 via {} dev {TUNNEL}\n",
                near.0, far.0, own.0, own.1, pods.0, next.0, pods.1, next.1
            ))
        })
    }

    /// A pod of each host, whose names begin with `name`, behind [`Pair::add_routes`].
    pub fn add_routed_pods(&self, name: &str) -> Result<[Place; 2]> {
        self.add_pods(name, ROUTED, MTU)
    }

    /// A pod of each host, whose names begin with `name`, behind [`Pair::add_tunnel`].
    pub fn add_tunnelled_pods(&self, name: &str) -> Result<[Place; 2]> {
        self.add_pods(name, TUNNELLED, TUNNEL_MTU)
    }

    fn add_pods(&self, name: &str, net: u8, mtu: u32) -> Result<[Place; 2]> {
        let add = |n: u8| pod(self.hosts[usize::from(n) - 1], &format!("{name}-{n}"), pod_address(net, n, n), mtu);
        Ok([add(1)?, add(2)?])
    }

    /// Removes what [`Pair::add_routes`] and [`Pair::add_tunnel`] have added, as far as it is there.
    pub fn remove(&self) -> Result<()> {
        self.each(|host, other, _, _| {
            let pods = pod_address(ROUTED, other, 0);
            // Each of these may be missing.
            for line in
                [format!("link del {TUNNEL}"), format!("route del {}/24", pods.0), format!("route del {}/64", pods.1)]
            {
                let _ = host.ip(&format!("{line}\n"));
            }
            Ok(())
        })
    }

    /// Calls with a host, the number of the other, the host's addresses and the other's.
    fn each(&self, mut act: impl FnMut(&Netns, u8, &Both, &Both) -> Result<()>) -> Result<()> {
        let [one, two] = &self.addresses;
        act(self.hosts[0], 2, one, two)?;
        act(self.hosts[1], 1, two, one)
    }
}

/// A pod behind a veth of its own, which the host routes to.
fn pod(host: &Netns, name: &str, addresses: Both, mtu: u32) -> Result<Place> {
    let pod = namespace(name)?;
    let (v4, v6) = addresses;
    host.ip(&format!(
        "link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
         addr add 169.254.1.1/32 dev {name} scope link\naddr add fe80::1/64 dev {name} nodad\nlink set {name} up\n\
         route add {v4}/32 dev {name}\nroute add {v6}/128 dev {name}\n",
        pod.pid()
    ))?;
    pod.ip(&format!(
        "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
         route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\n\
         route add default via fe80::1 dev eth0\n"
    ))?;
    Ok(Place { netns: pod, addresses })
}
