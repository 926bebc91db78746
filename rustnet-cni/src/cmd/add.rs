//! ADD: connects a pod, or changes nothing.
//!
//! The order allows a repair after a killed call. The veth comes first: its name follows from the
//! container's id, so that a second ADD fails before it has touched anything and DEL finds it
//! without state. Then the lease, which names its owner; then the record, from which map entries
//! are found, and by which the agent decides about network policies; then the map entries; the
//! pod's end comes up last, when the programs would let its packets through. They drop them until
//! the agent has decided, where there are network policies: the call waits for that at its end.

use super::detach::{Removal, group};
use crate::attach::Pins;
use crate::call::Call;
use crate::fault;
use crate::ipam::delegate::Delegate;
use crate::ipam::kernel::Tables;
use crate::ipam::local::{self, Pool, Request};
use crate::link::{self, Link, PodRoute, Veth};
use crate::maps::HostPorts;
use crate::netlink::{Message, Refused, Socket};
use crate::netns::Netns;
use crate::policy;
use crate::shape;
use crate::state::{self, Mark};
use crate::types::bandwidth;
use crate::types::conf::{Attachment, Mac, NetConf};
use crate::types::error::{Error, code};
use crate::types::port_mappings;
use crate::types::result::{AddResult, Interface, Ip, Route};
use ipnet::IpNet;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::files::{Bandwidth, EndpointFile, NodeFile, PortMapping};
use serde_json::{Map, Value};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

/// The smallest MTU of IPv6 (RFC 8200, 5).
const IPV6_MTU_MIN: u32 = 1280;

/// Connects the pod and returns the result to print.
pub fn run(call: &Call) -> Result<Value, Error> {
    let conf = &call.conf;
    let node = state::load_node(&conf.run_dir)?;
    refuse_unknown_args(call)?;
    let mtu = read_mtu(conf, &node)?;
    let bandwidth = bandwidth::parse(conf.bandwidth.as_ref(), mtu)?;
    let port_mappings = port_mappings::parse(conf.port_mappings.as_ref())?;
    let pins = Pins::open(&conf.bpffs)?;
    let host_ports = if port_mappings.is_empty() { None } else { Some(HostPorts::open(&conf.bpffs)?) };
    let delegate = conf.ipam.as_deref().map(|kind| Delegate::find(conf, kind, &call.env.path)).transpose()?;
    if delegate.is_none() {
        require_pool(&node, mtu)?;
    }
    let prev = conf.prev_result.clone().map(AddResult::from_prev).transpose()?.unwrap_or_default();
    let path = call.env.netns.as_deref().unwrap_or_default();
    let netns = Netns::open(path)?;
    let mut host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;
    let mut pod = netns.inside(Socket::open).map_err(|e| Error::io(format!("enter {path}"), &e))?;
    let netns_cookie = netns.cookie().map_err(|e| Error::io(format!("ask for the number of {path}"), &e))?;

    let veth = create_veth(call, mtu, &netns, &mut host)?;
    let attachment = Attachment { container_id: call.env.container_id.clone(), ifname: call.env.ifname.clone() };
    let mut setup = Setup {
        call,
        node: &node,
        pins: &pins,
        host_ports: host_ports.as_ref(),
        delegate: delegate.as_ref(),
        netns: &netns,
        netns_cookie,
        attachment,
        bandwidth,
        port_mappings,
        veth,
        prev,
    };
    let done = setup.finish(&mut host, &mut pod);
    done.map_err(|e| match setup.undo() {
        Ok(()) => e,
        Err(more) => e.details(format!("cleaning up failed as well: {more}")),
    })
}

/// Both ends of the new pair.
struct Pair {
    host: Link,
    host_mac: Mac,
    pod_index: u32,
    pod_mac: Mac,
    mtu: u32,
}

fn create_veth(call: &Call, mtu: u32, netns: &Netns, host: &mut Socket) -> Result<Pair, Error> {
    let env = &call.env;
    let random = || link::random_mac().map_err(|e| Error::io("random MAC address", &e));
    let name = link::host_name(&env.container_id, &env.ifname);
    let pod_mac = call.conf.mac.or(env.pod.mac).map_or_else(random, Ok)?;
    let (pod, group) = (&env.ifname, group(&call.conf));
    let v = Veth { host: &name, pod, netns: netns.as_fd(), host_mac: random()?, pod_mac, mtu, group };
    let made = link::create_veth(host, &v).map_err(|e| exists(call, &name, e))?;
    fault::point("veth").map_err(|e| match link::delete(host, made.index) {
        Ok(()) => e,
        Err(more) => e.details(more.to_string()),
    })?;
    Ok(Pair { host_mac: v.host_mac, pod_index: made.peer, pod_mac, mtu, host: made })
}

/// "File exists" is the ordinary case of a repeated ADD and gets a code and words of its own.
fn exists(call: &Call, name: &str, e: Refused) -> Error {
    if e.errno != libc::EEXIST {
        return e.into();
    }
    let (id, ifname) = (&call.env.container_id, &call.env.ifname);
    let netns = call.env.netns.as_deref().unwrap_or_default();
    Error::new(
        code::EXISTS,
        format!("interface {ifname} of container {id} exists already in {netns}, or {name} on the host"),
    )
    .details("nothing was changed; DEL it first")
}

/// What the steps behind the veth's creation need.
struct Setup<'a> {
    call: &'a Call,
    node: &'a NodeFile,
    pins: &'a Pins,
    host_ports: Option<&'a HostPorts>,
    delegate: Option<&'a Delegate<'a>>,
    netns: &'a Netns,
    netns_cookie: Option<u64>,
    attachment: Attachment,
    bandwidth: Bandwidth,
    port_mappings: Vec<PortMapping>,
    veth: Pair,
    /// The result of the plugins before this one in a chain.
    prev: AddResult,
}

impl Setup<'_> {
    fn finish(&mut self, host: &mut Socket, pod: &mut Socket) -> Result<Value, Error> {
        let result = self.addresses(host)?;
        fault::point("ipam")?;
        let ips: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        require_ipv6(&ips, self.veth.mtu)?;
        port_mappings::require_families(&self.port_mappings, &ips)?;
        let record = self.record(&ips);
        state::write_record(&self.call.conf.run_dir, &record)?;
        fault::point("record")?;
        let entry = Endpoint {
            ifindex: self.veth.host.index,
            identity: 0,
            mac: self.veth.pod_mac,
            host_mac: self.veth.host_mac,
            flags: self.bandwidth.endpoint_flags(),
            pad: 0,
        };
        for ip in &ips {
            self.take_entry(host, *ip, &entry)?;
        }
        fault::point("map")?;
        self.limit(host, pod)?;
        let name = &self.veth.host.name;
        link::refuse_router_advertisements(name)
            .map_err(|e| Error::io(format!("write 0 to net.ipv6.conf.{name}.accept_ra"), &e))?;
        if ips.iter().any(IpAddr::is_ipv6) {
            link::turn_ipv6_on(name)
                .map_err(|e| Error::io(format!("write 0 to net.ipv6.conf.{name}.disable_ipv6"), &e))?;
        }
        host.run(self.host_side(&result))?;
        self.take_routes(host, &ips)?;
        fault::point("host")?;
        self.pod_side(pod, &result)?;
        fault::point("pod")?;
        link::settle(pod, self.veth.pod_index, &ips)?;
        let on_host: Vec<IpAddr> = self.delegate.iter().flat_map(|_| gateways_of_ips(&result)).collect();
        link::settle(host, self.veth.host.index, &on_host)?;
        // Last: by a call that fails, another pod would lose them for nothing.
        self.take_ports(&record)?;
        fault::point("ports")?;
        policy::await_decision(&self.call.conf.bpffs, &ips, self.veth.host.index);
        self.result(result)
    }

    /// Addresses from whoever gives them, each with the gateway to report.
    fn addresses(&self, host: &mut Socket) -> Result<AddResult, Error> {
        let conf = &self.call.conf;
        if let Some(delegate) = self.delegate {
            let mark = Mark { network: conf.name.clone(), owner: self.attachment.clone() };
            mark.write(&conf.run_dir, &conf.stdin)?;
            fault::point("mark")?;
            return self.require_wanted(delegate.add()?);
        }
        let wanted = self.wanted();
        let (network, owner) = (&conf.name, &self.attachment);
        let request = Request { ranges: &self.node.pod_cidrs, wanted: &wanted, network, owner };
        let leased = Pool::new(&conf.run_dir).allocate(&request, &mut Tables::read(&self.pins.endpoints, host)?)?;
        Ok(AddResult {
            ips: leased
                .iter()
                .map(|ip| Ip { address: IpNet::from(*ip), gateway: Some(link::gateway_for(*ip)), interface: None })
                .collect(),
            routes: leased
                .iter()
                .map(|ip| Route { dst: default_of(*ip), gw: Some(link::gateway_for(*ip)), more: Map::new() })
                .collect(),
            ..AddResult::default()
        })
    }

    /// The addresses that the runtime or a user asks for.
    fn wanted(&self) -> Vec<IpAddr> {
        let mut all = [&self.call.conf.ips[..], &self.call.env.pod.ips].concat();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Refuses the result of an IPAM plugin that does not know how to give the addresses that were asked for.
    fn require_wanted(&self, result: AddResult) -> Result<AddResult, Error> {
        let given: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        match self.wanted().iter().find(|ip| !given.contains(ip)) {
            None => Ok(result),
            Some(ip) => {
                let kind = self.call.conf.ipam.as_deref().unwrap_or_default();
                let text = format!("IPAM plugin {kind} gave {given:?}, and address {ip} was asked for");
                Err(Error::new(code::UNSUPPORTED, text).details(
                    "ask for none (CNI_ARGS, args.cni.ips, runtimeConfig.ips), or take a plugin that gives it",
                ))
            }
        }
    }

    /// Writes the entry of an address, unless a living pod has one: by its own record, or that of another run directory, it would get
    /// no packet any more. The agent may have written ours already, from the record.
    fn take_entry(&self, host: &mut Socket, ip: IpAddr, entry: &Endpoint) -> Result<(), Error> {
        let map = &self.pins.endpoints;
        let failed = |e: io::Error| Error::io(format!("write {ip} to the endpoints map"), &e);
        if map.insert(ip.into(), entry).map_err(failed)? {
            return Ok(());
        }
        let found = map.get(ip.into()).map_err(failed)?.filter(|found| found.ifindex != entry.ifindex);
        if let Some(found) = found
            && let Some(link) = link::of_pod(host, found.ifindex)?
        {
            return Err(taken(ip, &format!("{} ({}) has it in the endpoints map", link.name, link.alias)));
        }
        map.put(ip.into(), entry).map_err(failed)
    }

    /// Adds the host's routes to the pod. One that is there is another pod's, or the agent has made ours from the record.
    fn take_routes(&self, host: &mut Socket, ips: &[IpAddr]) -> Result<(), Error> {
        let index = self.veth.host.index;
        for ip in ips {
            // One by one: of several messages, the first error hides those behind it.
            let Err(e) = host.run(vec![link::new_route_to(index, *ip)]) else { continue };
            if e.errno != libc::EEXIST {
                return Err(e.into());
            }
            if !link::routes(host)?.iter().any(|r| r.index == index && r.dst == Some(*ip)) {
                return Err(taken(*ip, "the host has another route to it"));
            }
        }
        Ok(())
    }

    fn record(&self, ips: &[IpAddr]) -> EndpointFile {
        let env = &self.call.env;
        EndpointFile {
            container_id: env.container_id.clone(),
            ifname: env.ifname.clone(),
            netns: env.netns.clone().unwrap_or_default(),
            netns_cookie: self.netns_cookie,
            network: self.call.conf.name.clone(),
            host_ifname: self.veth.host.name.clone(),
            ifindex: self.veth.host.index,
            mac: link::format_mac(self.veth.pod_mac),
            addresses: ips.to_vec(),
            pod_namespace: env.pod.namespace.clone(),
            pod_name: env.pod.name.clone(),
            pod_uid: env.pod.uid.clone(),
            bandwidth: self.bandwidth,
            host_ports: self.port_mappings.clone(),
            has_routes: true,
        }
    }

    /// Gives the pod its ports of the node. One that another pod has left behind, or is about to leave, becomes this pod's: of two pods
    /// with one port, the scheduler has ended the first.
    fn take_ports(&self, record: &EndpointFile) -> Result<(), Error> {
        let Some(map) = self.host_ports else { return Ok(()) };
        for (key, value) in record.host_port_entries() {
            map.put(key, &value).map_err(|e| match e.raw_os_error() {
                Some(libc::E2BIG | libc::ENOMEM) => {
                    let text = format!("port {} of the node: the map of host ports is full", key.port);
                    Error::new(code::IO, text)
                        .details("pods of this node have too many host ports: move some to another node")
                }
                _ => Error::io(format!("write port {} to the map of host ports", key.port), &e),
            })?;
        }
        Ok(())
    }

    /// Each limit on the end that sends what it is for, while both are down.
    fn limit(&self, host: &mut Socket, pod: &mut Socket) -> Result<(), Error> {
        let to_pod = self.bandwidth.ingress.map_or(Ok(()), |limit| shape::add(host, self.veth.host.index, limit));
        to_pod.and_then(|()| self.bandwidth.egress.map_or(Ok(()), |l| shape::add(pod, self.veth.pod_index, l)))
    }

    /// The programs go on before the device is up; then routes and neighbours. A delegated IPAM's gateway is an address of
    /// the host's end, so that whoever asks it gets an answer.
    fn host_side(&self, result: &AddResult) -> Vec<Message> {
        let index = self.veth.host.index;
        let alias = super::detach::alias(&self.call.conf, &self.attachment);
        let mut m = self.pins.attach(index);
        m.extend(link::prepare_host(index, &alias));
        m.push(link::up(index));
        if self.delegate.is_some() {
            m.extend(gateways_of_ips(result).into_iter().map(|gw| link::address(index, gw)));
        }
        for ip in result.ips.iter().map(|ip| ip.address.addr()) {
            m.push(link::neighbour(index, ip, self.veth.pod_mac));
        }
        m
    }

    /// The addresses go on while the pod's end is down; then it comes up, with neighbours and routes.
    fn pod_side(&self, pod: &mut Socket, result: &AddResult) -> Result<(), Error> {
        let index = self.veth.pod_index;
        let ips: Vec<IpAddr> = result.ips.iter().map(|ip| ip.address.addr()).collect();
        let addresses = || {
            let all = ips.iter().map(|ip| link::address(index, *ip));
            std::iter::once(link::no_ipv6_autoconf(index)).chain(all).collect()
        };
        match pod.run(addresses()) {
            // Namespaces may be made with IPv6 off by default; the runtime gave no such order for this interface.
            Err(e) if e.errno == libc::EACCES && ips.iter().any(IpAddr::is_ipv6) => {
                let sysctl = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.call.env.ifname);
                let on = self.netns.inside(|| std::fs::write(&sysctl, "0"));
                on.map_err(|e| Error::io(format!("turn on IPv6 by {sysctl}"), &e))?;
                pod.run(addresses())?;
            }
            other => drop(other?),
        }
        let routes = pod_routes(result)?;
        let mut families: Vec<IpAddr> = routes.iter().map(|route| link::gateway_for(route.gateway)).collect();
        families.sort_unstable();
        families.dedup();
        let mut m = vec![link::up(index)];
        for gateway in &families {
            m.push(link::neighbour(index, *gateway, self.veth.host_mac));
            m.push(link::new_route_to(index, *gateway));
        }
        // Before anything of another interface could change: the kernel goes on behind a message that it refuses.
        pod.run(m).map_err(|e| {
            let is_there = e.errno == libc::EEXIST;
            let e = Error::from(e);
            if is_there {
                e.details("another interface of the pod has this route: a pod has one of each family")
            } else {
                e
            }
        })?;
        let mut m = Vec::new();
        // Whatever gateway somebody names, the host forwards.
        m.extend(gateways(result).into_iter().map(|gw| link::neighbour(index, gw, self.veth.host_mac)));
        m.extend(routes.iter().map(|route| link::pod_route(index, route)));
        Ok(pod.run(m).map(drop)?)
    }

    fn result(&self, mut result: AddResult) -> Result<Value, Error> {
        let env = &self.call.env;
        let interface = |name: &str, mac, sandbox: &str| Interface {
            name: name.into(),
            mac: link::format_mac(mac),
            mtu: self.veth.mtu,
            sandbox: sandbox.into(),
        };
        let Self { prev, .. } = self;
        let ours = prev.interfaces.len() + 1;
        result.interfaces.clone_from(&prev.interfaces);
        result.interfaces.extend([
            interface(&self.veth.host.name, self.veth.host_mac, ""),
            interface(&env.ifname, self.veth.pod_mac, env.netns.as_deref().unwrap_or_default()),
        ]);
        result.ips.iter_mut().for_each(|ip| ip.interface = Some(ours));
        result.ips.splice(0..0, prev.ips.iter().cloned());
        result.routes.splice(0..0, prev.routes.iter().cloned());
        if result.dns.is_empty() {
            result.dns = prev.dns.clone();
        }
        if !self.call.conf.dns.is_empty() {
            result.dns = self.call.conf.dns.clone();
        }
        let failed = |e| Error::new(code::DECODE, format!("the result cannot be written: {e}"));
        result.to_json(self.call.conf.version).map_err(failed)
    }

    /// Takes back everything; called only for a veth that this call made, so that nothing can be another's.
    fn undo(&self) -> Result<(), Error> {
        let conf = &self.call.conf;
        Removal::open(conf, &self.call.env.path)?.remove(&self.attachment, conf.ipam.as_deref())
    }
}

/// The gateways of the addresses, each once, without ours.
fn gateways_of_ips(result: &AddResult) -> Vec<IpAddr> {
    foreign(result.ips.iter().filter_map(|ip| ip.gateway))
}

/// The gateways of addresses and routes, each once, without ours.
fn gateways(result: &AddResult) -> Vec<IpAddr> {
    foreign(result.ips.iter().filter_map(|ip| ip.gateway).chain(result.routes.iter().filter_map(|route| route.gw)))
}

fn foreign(gateways: impl Iterator<Item = IpAddr>) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = gateways.filter(|gateway| link::gateway_for(*gateway) != *gateway).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The routes of the pod: those of the result, and the default routes that it does not have.
fn pod_routes(result: &AddResult) -> Result<Vec<PodRoute>, Error> {
    let mut routes = result.routes.iter().map(pod_route).collect::<Result<Vec<_>, _>>()?;
    for ip in result.ips.iter().map(|ip| ip.address.addr()) {
        let is_default =
            |r: &PodRoute| r.dst.prefix_len() == 0 && r.dst.addr().is_ipv4() == ip.is_ipv4() && r.table.is_none();
        if !routes.iter().any(is_default) {
            routes.push(PodRoute::new(default_of(ip), link::gateway_for(ip)));
        }
    }
    Ok(routes)
}

fn pod_route(route: &Route) -> Result<PodRoute, Error> {
    let gateway = route.gw.unwrap_or_else(|| link::gateway_for(route.dst.addr()));
    if gateway.is_ipv4() != route.dst.addr().is_ipv4() {
        let text = format!("the IPAM plugin's route {} has gateway {gateway}, of the other family", route.dst);
        return Err(Error::new(code::CONFIG, text).details("correct the routes of the ipam plugin"));
    }
    let number = |key: &str| match route.more.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_u64().and_then(|n| u32::try_from(n).ok()).map(Some).ok_or_else(|| {
            Error::new(code::CONFIG, format!("the IPAM plugin's route {}: {key} is {value}, not a number", route.dst))
                .details("correct the routes of the ipam plugin")
        }),
    };
    Ok(PodRoute {
        mtu: number("mtu")?,
        advmss: number("advmss")?,
        priority: number("priority")?,
        table: number("table")?,
        ..PodRoute::new(route.dst, gateway)
    })
}

fn taken(ip: IpAddr, by: &str) -> Error {
    Error::new(code::TRY_AGAIN, format!("address {ip} is in use: {by}"))
        .details("the pod that has it goes on; whoever gave the address out has lost its state: restore it, or try again for another address")
}

/// Refuses an argument that nobody knows: whoever passes it expects something. An IPAM plugin may know more of them.
fn refuse_unknown_args(call: &Call) -> Result<(), Error> {
    match &call.env.pod.unknown {
        Some(key) if call.conf.ipam.is_none() => {
            Err(Error::new(code::ENVIRONMENT, format!("CNI_ARGS: {key} is unknown")).details(
                "known are IP, MAC and the K8S_POD_... of Kubernetes; add IgnoreUnknown=1 if it does not matter",
            ))
        }
        _ => Ok(()),
    }
}

/// The MTU of the pod. The node's is what fits through its uplinks and its tunnel.
pub(super) fn read_mtu(conf: &NetConf, node: &NodeFile) -> Result<u32, Error> {
    let mtu = conf.mtu.unwrap_or(node.mtu);
    if mtu <= node.mtu {
        return Ok(mtu);
    }
    Err(Error::new(code::CONFIG, format!("mtu {mtu} is more than the {} of node {}", node.mtu, node.node_name))
        .details("packets to other nodes would not fit: leave mtu out of the configuration, or set --mtu of the agent"))
}

/// Refuses a node whose own ranges have no address for a pod, or one that the pod cannot have.
pub(super) fn require_pool(node: &NodeFile, mtu: u32) -> Result<(), Error> {
    local::require_ranges(&node.pod_cidrs)?;
    let addresses: Vec<IpAddr> = node.pod_cidrs.iter().map(IpNet::addr).collect();
    require_ipv6(&addresses, mtu)
}

/// Refuses IPv6 where the kernel or the MTU has none.
fn require_ipv6(ips: &[IpAddr], mtu: u32) -> Result<(), Error> {
    let Some(ip) = ips.iter().find(|ip| ip.is_ipv6()) else { return Ok(()) };
    if mtu < IPV6_MTU_MIN {
        return Err(Error::new(code::CONFIG, format!("mtu {mtu} is too small for IPv6 ({ip})"))
            .details(format!("set at least {IPV6_MTU_MIN}, or give the pods IPv4 addresses only")));
    }
    if Path::new("/proc/sys/net/ipv6/conf").exists() {
        return Ok(());
    }
    Err(Error::new(code::CONFIG, format!("the kernel has no IPv6, and pods get IPv6 addresses ({ip})"))
        .details("start it without ipv6.disable=1 (/proc/cmdline), or take the IPv6 range from the node's podCIDRs or the ipam plugin"))
}

fn default_of(ip: IpAddr) -> IpNet {
    let any = if ip.is_ipv4() { IpAddr::from([0_u8; 4]) } else { IpAddr::from([0_u8; 16]) };
    IpNet::new_assert(any, 0)
}
