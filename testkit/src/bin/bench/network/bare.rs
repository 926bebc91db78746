//! Pods of one host joined by nothing but `bpf_redirect_peer`, in programs of four instructions: what is left of a network when
//! all that it decides is taken away. Once on classic filters, as rustnet's pods have them, once on TCX.

use super::kernel::{Both, MTU, Place, namespace};
use anyhow::Result;
use rustnet_agent::bpf::attach;
use rustnet_agent::bpf::sys::{self, instruction};
use rustnet_agent::net::netlink::Socket;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use testkit::Netns;
use testkit::netns::Holder;

const MOV: u8 = 0xb7;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const REDIRECT_PEER: u32 = 155;
/// `TC_ACT_UNSPEC`.
const NEXT: u32 = u32::MAX;
/// Interface index of the first pod's veth; the second one's is the next.
const FIRST: u32 = 11;

/// Where programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A clsact qdisc with filters.
    Clsact,
    /// TCX links.
    Tcx,
}

/// Two pods.
pub struct Bare {
    /// The pods.
    pub pods: [Place; 2],
    _links: Vec<OwnedFd>,
    _host: Holder,
}

impl Bare {
    /// Builds them.
    pub fn new(hook: Hook) -> Result<Self> {
        let name = format!("bare-{hook:?}").to_lowercase();
        let host = namespace(&name)?;
        let pods = [pod(&host, &name, 1)?, pod(&host, &name, 2)?];
        let links = host.run(|| connect(hook))??;
        Ok(Self { pods, _links: links, _host: host })
    }
}

fn addresses(n: u8) -> Both {
    (Ipv4Addr::new(10, 203, 0, n), Ipv6Addr::new(0xfd00, 0x10, 203, 0, 0, 0, 0, n.into()))
}

/// A pod whose neighbours are all known: its programs would lead its questions astray, too.
fn pod(host: &Netns, name: &str, n: u8) -> Result<Place> {
    let pod = namespace(&format!("{name}-{n}"))?;
    let index = FIRST + u32::from(n) - 1;
    let (v4, v6) = addresses(n);
    host.ip(&format!(
        "link add p{n} index {index} address 02:00:00:00:fe:0{n} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {}\n\
         link set p{n} up\n",
        pod.pid()
    ))?;
    pod.ip(&format!(
        "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
         route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1\nroute add default via fe80::1 dev eth0\n\
         neigh add 169.254.1.1 lladdr 02:00:00:00:fe:0{n} dev eth0 nud permanent\n\
         neigh add fe80::1 lladdr 02:00:00:00:fe:0{n} dev eth0 nud permanent\n"
    ))?;
    Ok(Place { netns: pod, addresses: addresses(n) })
}

/// Whatever one pod sends appears in the other. Returns what keeps it so.
fn connect(hook: Hook) -> Result<Vec<OwnedFd>> {
    let mut links = Vec::new();
    let mut socket = Socket::open()?;
    let pass = sys::prog_load_sched_cls("pass", &[instruction(MOV, 0, 0, 0, NEXT), instruction(EXIT, 0, 0, 0, 0)])?;
    for (from, to) in [(FIRST, FIRST + 1), (FIRST + 1, FIRST)] {
        let code = [
            instruction(MOV, 1, 0, 0, to),
            instruction(MOV, 2, 0, 0, 0),
            instruction(CALL, 0, 0, 0, REDIRECT_PEER),
            instruction(EXIT, 0, 0, 0, 0),
        ];
        let program = sys::prog_load_sched_cls("bare", &code)?;
        match hook {
            Hook::Clsact => drop(attach::pod_hooks(&mut socket, from, program.as_fd(), pass.as_fd())?),
            Hook::Tcx => links.push(sys::link_create_tcx(program.as_fd(), from, sys::TCX_INGRESS)?),
        }
    }
    Ok(links)
}
