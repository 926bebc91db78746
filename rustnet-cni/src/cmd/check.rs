//! CHECK: is the pod's network still what ADD made?

use crate::attach::missing_filters;
use crate::call::Call;
use crate::ipam::delegate::Delegate;
use crate::ipam::local::Pool;
use crate::link::{self, Link};
use crate::maps::{Endpoints, HostPorts};
use crate::netlink::Socket;
use crate::netns::Netns;
use crate::shape;
use crate::state;
use crate::types::conf::{Attachment, parse_mac};
use crate::types::error::{Error, code};
use crate::types::result::{AddResult, Interface};
use rustnet_common::files::{EndpointFile, Limit};
use std::net::IpAddr;

/// Fails with what has changed, the first thing found.
pub fn run(call: &Call) -> Result<(), Error> {
    let (conf, env) = (&call.conf, &call.env);
    let prev = conf.prev_result.clone().ok_or_else(|| {
        Error::new(code::CONFIG, "CHECK needs prevResult in the configuration")
            .details("the runtime passes ADD's result there")
    })?;
    if !prev.is_object() {
        // serde would also take an array for a struct.
        return Err(Error::new(code::DECODE, "prevResult is not a JSON object"));
    }
    let prev: AddResult = serde_json::from_value(prev)
        .map_err(|e| Error::new(code::DECODE, format!("prevResult cannot be read: {e}")))?;
    let path = env.netns.as_deref().unwrap_or_default();
    let netns = Netns::open(path)?;
    let host_name = link::host_name(&env.container_id, &env.ifname);
    let in_pod = |i: &&Interface| i.name == env.ifname && !i.sandbox.is_empty();
    let expected_pod = prev.interfaces.iter().find(in_pod);
    let expected_pod = expected_pod.ok_or_else(|| changed(format!("prevResult has no interface {}", env.ifname)))?;
    let expected_host = prev.interfaces.iter().find(|i| i.name == host_name && i.sandbox.is_empty());
    let expected_host = expected_host.ok_or_else(|| changed(format!("prevResult has no interface {host_name}")))?;
    let position = prev.interfaces.iter().position(|i| i == expected_pod);
    let ips: Vec<IpAddr> = prev
        .ips
        .iter()
        .filter(|ip| ip.interface.is_none() || ip.interface == position)
        .map(|ip| ip.address.addr())
        .collect();

    let mut host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;
    let mut pod = netns.inside(Socket::open).map_err(|e| Error::io(format!("enter {path}"), &e))?;
    let pod_link = compare(&mut pod, expected_pod)?;
    let host_link = compare(&mut host, expected_host)?;
    if pod_link.peer != host_link.index {
        return Err(changed(format!("{} is not the other end of {}", env.ifname, host_link.name)));
    }
    check_pod(&mut pod, &pod_link, &ips)?;
    check_host(&mut host, &host_link, &ips)?;
    let attachment = Attachment { container_id: env.container_id.clone(), ifname: env.ifname.clone() };
    // The limits that ADD kept. Without its record nothing is known of any.
    let record = state::read_record(&conf.run_dir, &attachment)?;
    let bandwidth = record.as_ref().map(|r| r.bandwidth).unwrap_or_default();
    check_limit(&mut host, &host_link, bandwidth.ingress)?;
    check_limit(&mut pod, &pod_link, bandwidth.egress)?;

    let map = Endpoints::open(&conf.bpffs)?;
    for ip in &ips {
        match map.get((*ip).into()).map_err(|e| Error::io(format!("read {ip} in the endpoints map"), &e))? {
            None => return Err(changed(format!("{ip} is not in the endpoints map"))),
            Some(e) if (e.ifindex, e.mac, e.host_mac) != (host_link.index, pod_link.mac, host_link.mac) => {
                return Err(changed(format!("the endpoints map has another interface for {ip}")));
            }
            Some(e) if e.flags != bandwidth.endpoint_flags() => {
                return Err(changed(format!("the endpoints map has other flags for {ip}")));
            }
            Some(_) => {}
        }
    }
    check_host_ports(call, record.as_ref())?;
    match &conf.ipam {
        Some(kind) => Delegate::find(conf, kind, &env.path)?.check(),
        None => check_leases(call, &attachment, &prev),
    }
}

fn changed(what: String) -> Error {
    Error::new(code::CHANGED, what).details("DEL and ADD repair it: delete the pod, its controller makes a new one")
}

/// The interface, if it is as ADD's result says.
fn compare(socket: &mut Socket, want: &Interface) -> Result<Link, Error> {
    let name = &want.name;
    let link = link::get(socket, name)?.ok_or_else(|| changed(format!("interface {name} has gone")))?;
    if parse_mac(&want.mac) != Some(link.mac) {
        return Err(changed(format!("interface {name} has MAC {}, not {}", link::format_mac(link.mac), want.mac)));
    }
    if want.mtu != 0 && want.mtu != link.mtu {
        return Err(changed(format!("interface {name} has MTU {}, not {}", link.mtu, want.mtu)));
    }
    if !link.up {
        return Err(changed(format!("interface {name} is down")));
    }
    Ok(link)
}

fn check_pod(pod: &mut Socket, link: &Link, ips: &[IpAddr]) -> Result<(), Error> {
    let addresses = link::addresses(pod, link.index)?;
    let routes = link::routes(pod, link.index)?;
    for ip in ips {
        if !addresses.contains(&(*ip, link::full_prefix(*ip))) {
            return Err(changed(format!("{ip} is not on {}", link.name)));
        }
        let gateway = link::gateway_for(*ip);
        if !routes.iter().any(|r| r.prefix == 0 && r.v4 == ip.is_ipv4() && r.gateway == Some(gateway)) {
            return Err(changed(format!("the pod's default route via {gateway} has gone")));
        }
    }
    Ok(())
}

fn check_host(host: &mut Socket, link: &Link, ips: &[IpAddr]) -> Result<(), Error> {
    let routes = link::routes(host, link.index)?;
    for ip in ips {
        if !routes.iter().any(|r| r.dst == Some(*ip) && r.prefix == link::full_prefix(*ip)) {
            return Err(changed(format!("the host's route to {ip} has gone")));
        }
    }
    match missing_filters(host, link.index)?.as_slice() {
        [] => Ok(()),
        missing => Err(changed(format!("{} is not attached to {}", missing.join(" and "), link.name))),
    }
}

fn check_limit(socket: &mut Socket, link: &Link, limit: Option<Limit>) -> Result<(), Error> {
    let Some(limit) = limit else { return Ok(()) };
    match shape::wrong(socket, link.index, limit)? {
        None => Ok(()),
        Some(what) => Err(changed(format!("the bandwidth of {} {what}", link.name))),
    }
}

fn check_host_ports(call: &Call, record: Option<&EndpointFile>) -> Result<(), Error> {
    let Some(record) = record.filter(|record| !record.host_ports.is_empty()) else { return Ok(()) };
    let map = HostPorts::open(&call.conf.bpffs)?;
    for (key, want) in record.host_port_entries() {
        let port = key.port;
        let found = map.get(key).map_err(|e| Error::io(format!("read port {port} in the map of host ports"), &e))?;
        match found {
            None => return Err(changed(format!("port {port} is not in the map of host ports"))),
            Some(found) if found != want => {
                return Err(changed(format!("port {port} is another pod's in the map of host ports")));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

fn check_leases(call: &Call, owner: &Attachment, prev: &AddResult) -> Result<(), Error> {
    let held = Pool::new(&call.conf.run_dir).held_by(owner)?;
    match prev.ips.iter().find(|ip| !held.contains(&ip.address.addr())) {
        None => Ok(()),
        Some(ip) => Err(changed(format!("{} is not leased to this container", ip.address.addr()))),
    }
}
