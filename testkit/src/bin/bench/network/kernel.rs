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

impl Hosts {
    /// Builds them.
    pub fn new() -> Result<Self> {
        let hosts = [namespace("kernel-1")?, namespace("kernel-2")?];
        let [one, two] = [host_address(0x14, 1), host_address(0x14, 2)];
        for host in &hosts {
            host.sysctl("ipv4/ip_forward", "1")?;
            host.sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        join(&hosts[0], &hosts[1], "eth0", [one, two])?;
        for (host, n, (near, far)) in [(&hosts[0], 1, (one, two)), (&hosts[1], 2, (two, one))] {
            let other = 3 - n;
            let (vx, vx_far) = (host_address(0x15, n), host_address(0x15, other));
            let net = |second| pod_address(second, other, 0);
            let (routed, tunnelled) = (net(ROUTED), net(TUNNELLED));
            host.ip(&format!(
                "route add {}/24 via {}\nroute add {}/64 via {}\n\
                 link add vx0 mtu {TUNNEL_MTU} type vxlan id 42 dstport 4789 local {} remote {} dev eth0\n\
                 addr add {}/24 dev vx0\naddr add {}/64 dev vx0 nodad\nlink set vx0 up\n\
                 route add {}/24 via {}\nroute add {}/64 via {}\n",
                routed.0,
                far.0,
                routed.1,
                far.1,
                near.0,
                far.0,
                vx.0,
                vx.1,
                tunnelled.0,
                vx_far.0,
                tunnelled.1,
                vx_far.1
            ))?;
        }
        Ok(Self {
            routed: [
                pod(&hosts[0], "kernel-pod-1", pod_address(ROUTED, 1, 1), MTU)?,
                pod(&hosts[0], "kernel-pod-2", pod_address(ROUTED, 1, 2), MTU)?,
                pod(&hosts[1], "kernel-pod-3", pod_address(ROUTED, 2, 3), MTU)?,
            ],
            tunnelled: [
                pod(&hosts[0], "vxlan-pod-1", pod_address(TUNNELLED, 1, 1), TUNNEL_MTU)?,
                pod(&hosts[1], "vxlan-pod-2", pod_address(TUNNELLED, 2, 2), TUNNEL_MTU)?,
            ],
            _routers: hosts,
        })
    }
}

/// A pod behind a veth of its own, which the host routes to.
fn pod(host: &Netns, name: &str, addresses: Both, mtu: u32) -> Result<Place> {
    let pod = namespace(name)?;
    let (v4, v6) = addresses;
    host.ip(&format!(
        "link add {name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}\n\
         addr add 169.254.1.1/32 dev {name}\naddr add fe80::1/64 dev {name} nodad\nlink set {name} up\n\
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
