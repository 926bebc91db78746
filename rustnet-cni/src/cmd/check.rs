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
use crate::types::conf::{Attachment, Mac, parse_mac};
use crate::types::error::{Error, code};
use crate::types::result::{AddResult, Interface, Route};
use rustnet_common::files::{EndpointFile, Limit};
use serde_json::Value;
use std::net::IpAddr;

/// Fails with what has changed, the first thing found.
pub fn run(call: &Call) -> Result<(), Error> {
    let (conf, env) = (&call.conf, &call.env);
    let prev = conf.prev_result.clone().ok_or_else(|| {
        Error::new(code::CONFIG, "CHECK needs prevResult in the configuration")
            .details("the runtime passes ADD's result there")
    })?;
    let prev = AddResult::from_prev(prev)?;
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
    if ips.is_empty() {
        return Err(changed(format!("prevResult has no address of interface {}", env.ifname)));
    }

    let mut host = Socket::open().map_err(|e| Error::io("netlink socket", &e))?;
    let mut pod = netns.inside(Socket::open).map_err(|e| Error::io(format!("enter {path}"), &e))?;
    let pod_link = compare(&mut pod, expected_pod)?;
    let host_link = compare(&mut host, expected_host)?;
    if pod_link.peer != host_link.index {
        return Err(changed(format!("{} is not the other end of {}", env.ifname, host_link.name)));
    }
    check_pod(&mut pod, &pod_link, &ips, &prev)?;
    check_neighbours(
        &mut pod,
        &pod_link,
        host_link.mac,
        &ips.iter().map(|ip| link::gateway_for(*ip)).collect::<Vec<_>>(),
    )?;
    check_host(&mut host, &host_link, &ips)?;
    check_neighbours(&mut host, &host_link, pod_link.mac, &ips)?;
    check_settings(&host_link)?;
    let attachment = Attachment { container_id: env.container_id.clone(), ifname: env.ifname.clone() };
    let record = state::read_record(&conf.run_dir, &attachment)?
        .ok_or_else(|| changed(format!("the record of {}@{} has gone", env.container_id, env.ifname)))?;
    check_record(&record, call, &netns, &host_link, &pod_link, &ips)?;
    if record.has_routes {
        check_routes(&mut pod, &prev)?;
    }
    let bandwidth = record.bandwidth;
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
    check_host_ports(call, &record)?;
    match &conf.ipam {
        Some(kind) => Delegate::find(conf, kind, &env.path)?.check(),
        None => check_leases(call, &attachment, &ips),
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

fn check_pod(pod: &mut Socket, link: &Link, ips: &[IpAddr], prev: &AddResult) -> Result<(), Error> {
    let addresses = link::addresses(pod, link.index)?;
    let routes = link::routes(pod)?;
    for ip in ips {
        if !addresses.contains(&(*ip, link::full_prefix(*ip))) {
            return Err(changed(format!("{ip} is not on {}", link.name)));
        }
        let gateway = link::gateway_for(*ip);
        // In any table: a plugin behind this one may choose tables by the source (`sbr`).
        let mut ours = routes.iter().filter(|r| r.index == link.index && r.v4 == ip.is_ipv4());
        let named = prev.routes.iter().filter(|r| r.dst.prefix_len() == 0).filter_map(|r| r.gw);
        let gateways: Vec<IpAddr> = named.chain([gateway]).collect();
        if !ours.clone().any(|r| r.prefix == 0 && r.gateway.is_some_and(|gw| gateways.contains(&gw))) {
            return Err(changed(format!("the pod's default route via {gateway} has gone")));
        }
        if !ours.any(|r| r.dst == Some(gateway) && r.prefix == link::full_prefix(gateway)) {
            return Err(changed(format!("the pod's route to its gateway {gateway} has gone")));
        }
    }
    Ok(())
}

/// The routes of ADD's result. Not of a pod that an earlier release made: it installed none but the default routes.
fn check_routes(pod: &mut Socket, prev: &AddResult) -> Result<(), Error> {
    let routes = link::routes(pod)?;
    prev.routes.iter().find(|route| !routes.iter().any(|found| is_route(found, route))).map_or(Ok(()), |route| {
        let via = route.gw.map(|gw| format!(" via {gw}")).unwrap_or_default();
        Err(changed(format!("the pod's route {}{via} has gone, or has other attributes", route.dst)))
    })
}

/// True if the route of the kernel is that of a result, as far as the result says.
fn is_route(found: &link::Route, want: &Route) -> bool {
    let number = |key: &str| want.more.get(key).and_then(Value::as_u64).map(|n| n as u32);
    let is_dst = match found.dst {
        Some(dst) => dst == want.dst.network() && found.prefix == want.dst.prefix_len(),
        None => want.dst.prefix_len() == 0 && found.v4 == want.dst.addr().is_ipv4() && found.prefix == 0,
    };
    is_dst
        && want.gw.is_none_or(|gw| found.gateway == Some(gw))
        && number("mtu").is_none_or(|mtu| found.mtu == mtu)
        && number("advmss").is_none_or(|advmss| found.advmss == advmss)
        && number("priority").is_none_or(|priority| found.priority == priority)
        && number("table").is_none_or(|table| found.table == table)
}

fn check_host(host: &mut Socket, link: &Link, ips: &[IpAddr]) -> Result<(), Error> {
    let routes = link::routes(host)?;
    for ip in ips {
        let is_ours = |r: &link::Route| {
            r.is_main() && r.index == link.index && r.dst == Some(*ip) && r.prefix == link::full_prefix(*ip)
        };
        if !routes.iter().any(is_ours) {
            return Err(changed(format!("the host's route to {ip} has gone")));
        }
    }
    match missing_filters(host, link.index)?.as_slice() {
        [] => Ok(()),
        missing => Err(changed(format!("{} is not attached to {}", missing.join(" and "), link.name))),
    }
}

/// Nobody answers who asks for these MAC addresses.
fn check_neighbours(socket: &mut Socket, link: &Link, mac: Mac, ips: &[IpAddr]) -> Result<(), Error> {
    let neighbours = link::neighbours(socket, link.index)?;
    match ips.iter().find(|ip| !neighbours.contains(&(**ip, mac))) {
        None => Ok(()),
        Some(ip) => Err(changed(format!("the permanent neighbour {ip} of {} has gone, or has another MAC", link.name))),
    }
}

/// The settings that ADD made, by the kernel's files: of the host's namespace, in which this process is. IPv6 that is switched off
/// takes the routes away, which [`check_host`] finds.
fn check_settings(link: &Link) -> Result<(), Error> {
    let all = [
        ("ipv4", "rp_filter", "0"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "arp_accept", "0"),
        ("ipv6", "accept_ra", "0"),
    ];
    for (family, key, want) in all {
        let path = format!("/proc/sys/net/{family}/conf/{}/{key}", link.name);
        let found = match std::fs::read_to_string(&path) {
            Ok(found) => found,
            // A kernel without IPv6 has no such setting.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io(path, &e)),
        };
        if found.trim() != want {
            return Err(changed(format!("{path} is {}, not {want}", found.trim())));
        }
    }
    Ok(())
}

/// By the record, the agent restores what gets lost; a wrong one is as bad as none.
fn check_record(
    record: &EndpointFile,
    call: &Call,
    netns: &Netns,
    host: &Link,
    pod: &Link,
    ips: &[IpAddr],
) -> Result<(), Error> {
    let wrong =
        |what: &str| changed(format!("the record of {}@{} has another {what}", record.container_id, record.ifname));
    let cookie = netns.cookie().map_err(|e| Error::io("ask for the number of the network namespace", &e))?;
    let is_same = [
        ("container or interface", record.container_id == call.env.container_id && record.ifname == call.env.ifname),
        ("network", record.network == call.conf.name),
        ("network namespace", record.netns_cookie.is_none() || record.netns_cookie == cookie),
        ("host interface", record.host_ifname == host.name && record.ifindex == host.index),
        ("MAC", record.mac == link::format_mac(pod.mac)),
        ("address", ips.iter().all(|ip| record.addresses.contains(ip)) && record.addresses.len() == ips.len()),
    ];
    is_same.iter().find(|(_, is_same)| !is_same).map_or(Ok(()), |(what, _)| Err(wrong(what)))
}

fn check_limit(socket: &mut Socket, link: &Link, limit: Option<Limit>) -> Result<(), Error> {
    let Some(limit) = limit else { return Ok(()) };
    match shape::wrong(socket, link.index, limit)? {
        None => Ok(()),
        Some(what) => Err(changed(format!("the bandwidth of {} {what}", link.name))),
    }
}

fn check_host_ports(call: &Call, record: &EndpointFile) -> Result<(), Error> {
    if record.host_ports.is_empty() {
        return Ok(());
    }
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

fn check_leases(call: &Call, owner: &Attachment, ips: &[IpAddr]) -> Result<(), Error> {
    let held = Pool::new(&call.conf.run_dir).held_by(owner)?;
    match ips.iter().find(|ip| !held.contains(ip)) {
        None => Ok(()),
        Some(ip) => Err(changed(format!("{ip} is not leased to this container"))),
    }
}
