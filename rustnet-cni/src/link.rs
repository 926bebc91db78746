//! Links, addresses, routes and neighbours of one pod, as netlink messages.
//!
//! The pod's end is created in its own namespace at once: moving a device later costs more than all the rest. It has its
//! addresses as /32 or /128 and a default route through a link-local gateway whose permanent neighbour is the host's end;
//! the host has a route and a permanent neighbour for each address. No packet ever asks for a MAC address.

use crate::netlink::{Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Refused, Reply, Socket};
use crate::types::conf::Mac;
use ipnet::IpNet;
use libc::{
    AF_INET, AF_INET6, IFA_ADDRESS, IFA_LOCAL, IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_GROUP, IFLA_IFALIAS, IFLA_IFNAME,
    IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINK, IFLA_LINKINFO, IFLA_MTU, IFLA_NET_NS_FD, IFLA_OPERSTATE, NDA_DST,
    NDA_LLADDR, RTA_DST, RTA_GATEWAY, RTA_METRICS, RTA_OIF, RTA_PRIORITY, RTA_TABLE,
};
use netlink_packet_core::Emitable;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressHeader, AddressHeaderFlags, AddressScope};
use netlink_packet_route::link::{LinkFlags, LinkHeader};
use netlink_packet_route::neighbour::{NeighbourHeader, NeighbourState};
use netlink_packet_route::route::{RouteFlags, RouteHeader, RouteProtocol, RouteScope, RouteType};
use rustnet_common::names;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

const VETH_INFO_PEER: u16 = 1;
const IF_OPER_UP: u8 = 6;
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IPV4_DEVCONF_ARP_IGNORE: u16 = 19;
const IPV4_DEVCONF_ARP_ACCEPT: u16 = 21;
/// `arp_ignore`: no answer to any ARP request, and so no neighbour entry for its sender.
const ARP_IGNORE_ALL: u32 = 8;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
/// Longest alias of a link that the kernel takes.
pub const IFALIAS_MAX: usize = 255;

/// A link as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MAC address; zero if it has none.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// True if it is administratively up.
    pub up: bool,
    /// Alias; it names the owner of ours.
    pub alias: String,
    /// Group; the network of ours. 0 is that of most links.
    pub group: u32,
    /// Index of a veth's other end, in that end's namespace.
    pub peer: u32,
}

/// The veth pair to make.
pub struct Veth<'a> {
    /// Name of the host's end.
    pub host: &'a str,
    /// Name of the pod's end.
    pub pod: &'a str,
    /// The pod's network namespace.
    pub netns: BorrowedFd<'a>,
    /// MAC address of the host's end.
    pub host_mac: Mac,
    /// MAC address of the pod's end.
    pub pod_mac: Mac,
    /// MTU of both.
    pub mtu: u32,
    /// Group of the host's end. The kernel sets it with the creation, so that no killed call leaves a link without.
    pub group: u32,
}

/// Name of the host's end for an attachment: found again without any state.
pub fn host_name(container_id: &str, ifname: &str) -> String {
    // 44 bits fill the name.
    let hash = hash(&[container_id.as_bytes(), &[0], ifname.as_bytes()].concat());
    format!("{}{:011x}", names::VETH_PREFIX, (hash ^ (hash >> 44)) & 0xfff_ffff_ffff)
}

/// Hashes by FNV-1a. The result is part of the contract with running pods.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// A locally administered unicast MAC address.
///
/// Set explicitly at creation, since udev replaces the kernel's random ones a moment later.
pub fn random_mac() -> io::Result<Mac> {
    let mut mac = [0; 6];
    // SAFETY: the pointer and the length describe `mac`.
    let n = unsafe { libc::getrandom(mac.as_mut_ptr().cast(), mac.len(), 0) };
    if n != 6 {
        return Err(io::Error::last_os_error());
    }
    mac[0] = (mac[0] & 0xfc) | 0x02;
    Ok(mac)
}

/// A MAC address in the usual notation.
pub fn format_mac(m: Mac) -> String {
    format!("{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
}

/// Creates the pair, both ends down; returns the host's end.
pub fn create_veth(host: &mut Socket, v: &Veth<'_>) -> Result<Link, Refused> {
    let what = format!("create veth {} with {} in the pod", v.host, v.pod);
    let end =
        |m: Message, name: &str, mac: Mac| m.text(IFLA_IFNAME, name).attr(IFLA_ADDRESS, &mac).u32(IFLA_MTU, v.mtu);
    let create = Message::new(what, libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link(0));
    let create = end(create, v.host, v.host_mac).u32(IFLA_GROUP, v.group).nested(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |m| {
            m.nested(VETH_INFO_PEER, |m| {
                end(m.with(&link(0)), v.pod, v.pod_mac).u32(IFLA_NET_NS_FD, v.netns.as_raw_fd().cast_unsigned())
            })
        })
    });
    let replies = host.run(vec![create, get_message(v.host)])?;
    first_link(&replies).ok_or_else(|| Refused::unexpected(format!("veth {}: no answer about it", v.host)))
}

/// The link of that name, if there is one.
pub fn get(socket: &mut Socket, name: &str) -> Result<Option<Link>, Refused> {
    Ok(first_link(&socket.run(vec![get_message(name)])?))
}

/// The pod's veth of ours with that index, if there is one. The index of one that has gone may be another device's by now.
pub fn of_pod(socket: &mut Socket, index: u32) -> Result<Option<Link>, Refused> {
    let m = Message::new(format!("look up link {index}"), libc::RTM_GETLINK, 0, &link(index));
    let found = first_link(&socket.run(vec![m.tolerate(&[libc::ENODEV])])?);
    Ok(found.filter(|link| link.name.starts_with(names::VETH_PREFIX)))
}

/// All links of the namespace.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>, Refused> {
    let dump = Message::new("list links", libc::RTM_GETLINK, NLM_F_DUMP, &link(0));
    Ok(socket.run(vec![dump])?.iter().filter_map(parse).collect())
}

/// Deletes a link, and with it the other end, filters, routes and neighbours. A link that has gone is no error.
pub fn delete(socket: &mut Socket, index: u32) -> Result<(), Refused> {
    let m = Message::new(format!("delete link {index}"), libc::RTM_DELLINK, 0, &link(index));
    socket.run(vec![m.tolerate(&[libc::ENODEV])]).map(drop)
}

fn get_message(name: &str) -> Message {
    Message::new(format!("look up link {name}"), libc::RTM_GETLINK, 0, &link(0))
        .text(IFLA_IFNAME, name)
        .tolerate(&[libc::ENODEV])
}

fn first_link(replies: &[Reply]) -> Option<Link> {
    replies.iter().find_map(parse)
}

fn parse(reply: &Reply) -> Option<Link> {
    if reply.kind != libc::RTM_NEWLINK {
        return None;
    }
    let header = LinkHeader::parse(&reply.body).ok()?;
    let attrs = reply.attrs(header.buffer_len());
    Some(Link {
        index: header.index,
        name: attrs.text(IFLA_IFNAME)?.to_owned(),
        mac: attrs.get(IFLA_ADDRESS).and_then(|m| m.try_into().ok()).unwrap_or_default(),
        mtu: attrs.u32(IFLA_MTU).unwrap_or_default(),
        up: header.flags.contains(LinkFlags::Up),
        alias: attrs.text(IFLA_IFALIAS).unwrap_or_default().to_owned(),
        group: attrs.u32(IFLA_GROUP).unwrap_or_default(),
        // Older kernels leave it out when both indices are equal.
        peer: attrs.u32(IFLA_LINK).unwrap_or(header.index),
    })
}

/// Settings that the host's end needs before it is up: no IPv6 addresses of its own, no
/// reverse-path filter (a reply that the datapath has given a service's address has no route back),
/// no ARP (all its neighbours are permanent), and the attachment's name in the alias. See
/// [`refuse_router_advertisements`] for the setting that netlink cannot change.
pub fn prepare_host(index: u32, alias: &str) -> Vec<Message> {
    let filter = Message::new("turn off the veth's rp_filter and ARP", libc::RTM_NEWLINK, 0, &link(index)).nested(
        IFLA_AF_SPEC,
        |m| {
            m.nested(AF_INET as u16, |m| {
                m.nested(IFLA_INET_CONF, |m| {
                    m.u32(IPV4_DEVCONF_RP_FILTER, 0)
                        .u32(IPV4_DEVCONF_ARP_IGNORE, ARP_IGNORE_ALL)
                        .u32(IPV4_DEVCONF_ARP_ACCEPT, 0)
                })
            })
        },
    );
    vec![filter.attr(IFLA_IFALIAS, alias.as_bytes()), no_ipv6_autoconf(index)]
}

/// Stops the host from accepting router advertisements that the pod sends (CVE-2020-13401). Many
/// hosts have `accept_ra=2` as the default for new devices, because they forward and have a default
/// route from advertisements.
///
/// Works in the network namespace of the calling thread. A kernel without IPv6 has no such setting.
pub fn refuse_router_advertisements(name: &str) -> io::Result<()> {
    set_ipv6(name, "accept_ra")
}

/// Turns IPv6 on. Hardened hosts have it off for new devices (`net.ipv6.conf.default.disable_ipv6`), and the kernel takes no
/// IPv6 route or neighbour for such a device.
///
/// Works in the network namespace of the calling thread. A kernel without IPv6 has no such setting.
pub fn turn_ipv6_on(name: &str) -> io::Result<()> {
    set_ipv6(name, "disable_ipv6")
}

/// Sets a setting of a device to 0.
fn set_ipv6(name: &str, key: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{key}"), "0") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Stops the kernel from making link-local addresses.
pub fn no_ipv6_autoconf(index: u32) -> Message {
    Message::new("set addrgenmode none", libc::RTM_NEWLINK, 0, &link(index))
        .nested(IFLA_AF_SPEC, |m| {
            m.nested(AF_INET6 as u16, |m| m.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]))
        })
        .tolerate(&[libc::EAFNOSUPPORT])
}

/// Sets a link up.
pub fn up(index: u32) -> Message {
    Message::new("set the link up", libc::RTM_NEWLINK, 0, &ifinfomsg(index, LinkFlags::Up, LinkFlags::Up))
}

/// Sets a link down.
pub fn down(index: u32) -> Message {
    Message::new("set the link down", libc::RTM_NEWLINK, 0, &ifinfomsg(index, LinkFlags::empty(), LinkFlags::Up))
}

/// Adds an address as /32 or /128, without duplicate address detection.
pub fn address(index: u32, ip: IpAddr) -> Message {
    let header = AddressHeader {
        family: family(ip),
        prefix_len: full_prefix(ip),
        flags: AddressHeaderFlags::Nodad,
        scope: AddressScope::Universe,
        index,
    };
    with_ip(ip, |bytes| {
        Message::new(format!("add address {ip}"), libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attr(IFA_LOCAL, bytes)
            .attr(IFA_ADDRESS, bytes)
    })
}

/// Adds a permanent neighbour.
pub fn neighbour(index: u32, ip: IpAddr, mac: Mac) -> Message {
    let header = NeighbourHeader {
        family: family(ip),
        ifindex: index,
        state: NeighbourState::Permanent,
        kind: RouteType::Unicast,
        ..NeighbourHeader::default()
    };
    with_ip(ip, |bytes| {
        Message::new(format!("add neighbour {ip}"), libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attr(NDA_DST, bytes)
            .attr(NDA_LLADDR, &mac)
    })
}

/// True if the host has a route to this address alone: it is a pod's, or the host's own.
pub fn has_own_route(socket: &mut Socket, ip: IpAddr) -> Result<bool, Refused> {
    let header = rtmsg(family(ip), full_prefix(ip), RouteScope::Universe, RouteFlags::FibMatch);
    let m = with_ip(ip, |b| Message::new(format!("look up {ip}"), libc::RTM_GETROUTE, 0, &header).attr(RTA_DST, b));
    // Without a route, and where a route says so; of a family that is switched off there are no routes.
    let m = m.tolerate(&[
        libc::ENETUNREACH,
        libc::EHOSTUNREACH,
        libc::EACCES,
        libc::EINVAL,
        libc::EAFNOSUPPORT,
        libc::EOPNOTSUPP,
    ]);
    let is_exact = |r: &Reply| {
        let header = RouteHeader::parse(&r.body);
        r.kind == libc::RTM_NEWROUTE && header.is_ok_and(|route| route.destination_prefix_length == full_prefix(ip))
    };
    Ok(socket.run(vec![m])?.iter().any(is_exact))
}

/// Adds a route to one address on the link, unless there is one.
pub fn new_route_to(index: u32, ip: IpAddr) -> Message {
    let header = rtmsg(family(ip), full_prefix(ip), RouteScope::Link, RouteFlags::empty());
    with_ip(ip, |bytes| {
        Message::new(format!("add route {ip}"), libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &header)
            .attr(RTA_DST, bytes)
            .u32(RTA_OIF, index)
    })
}

/// A route of a pod, through a gateway that needs no route of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoute {
    /// Destination.
    pub dst: IpNet,
    /// Gateway.
    pub gateway: IpAddr,
    /// MTU of the path.
    pub mtu: Option<u32>,
    /// Largest segment that TCP offers.
    pub advmss: Option<u32>,
    /// The kernel's metric; the least counts.
    pub priority: Option<u32>,
    /// Routing table; `None` for the main one.
    pub table: Option<u32>,
}

impl PodRoute {
    /// A route of the main table.
    pub fn new(dst: IpNet, gateway: IpAddr) -> Self {
        Self { dst: dst.trunc(), gateway, mtu: None, advmss: None, priority: None, table: None }
    }
}

/// Adds a route of a pod.
pub fn pod_route(index: u32, route: &PodRoute) -> Message {
    let PodRoute { dst, gateway, .. } = route;
    let mut header = rtmsg(family(*gateway), dst.prefix_len(), RouteScope::Universe, RouteFlags::Onlink);
    if route.table.is_some() {
        header.table = RouteHeader::RT_TABLE_UNSPEC;
    }
    let what = match dst.prefix_len() {
        0 => format!("add default route via {gateway}"),
        _ => format!("add route {dst} via {gateway}"),
    };
    let mut m = Message::new(what, libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &header).u32(RTA_OIF, index);
    m = with_ip(*gateway, |bytes| m.attr(RTA_GATEWAY, bytes));
    if dst.prefix_len() != 0 {
        m = with_ip(dst.addr(), |bytes| m.attr(RTA_DST, bytes));
    }
    for (kind, value) in [(RTA_PRIORITY, route.priority), (RTA_TABLE, route.table)] {
        m = match value {
            Some(value) => m.u32(kind, value),
            None => m,
        };
    }
    let metrics = [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)];
    if metrics.iter().all(|(_, value)| value.is_none()) {
        return m;
    }
    m.nested(RTA_METRICS, |m| {
        metrics.into_iter().fold(m, |m, (kind, value)| match value {
            Some(value) => m.u32(kind, value),
            None => m,
        })
    })
}

/// Waits until the kernel has caught up with a link that came up: it starts the queue of a veth whose other end came up,
/// and adds the local routes of IPv6 addresses, from work queues, so that the first packets would be lost.
///
/// Usually there is nothing to wait for: since 6.9 the look-up itself brings the link's state up to date. Gives up
/// silently after a second, for then the network is in order and only slow.
pub fn settle(socket: &mut Socket, index: u32, local: &[IpAddr]) -> Result<(), Refused> {
    let veth = || Message::new("look up the veth", libc::RTM_GETLINK, 0, &link(index));
    let route = |ip: IpAddr| {
        let header = rtmsg(family(ip), full_prefix(ip), RouteScope::Universe, RouteFlags::empty());
        with_ip(ip, |b| Message::new(format!("look up {ip}"), libc::RTM_GETROUTE, 0, &header).attr(RTA_DST, b))
            .tolerate(&[libc::ENETUNREACH, libc::EHOSTUNREACH])
    };
    let ready = |r: &Reply| match r.kind {
        libc::RTM_NEWLINK => r.attrs(link(0).buffer_len()).get(IFLA_OPERSTATE) == Some(&[IF_OPER_UP]),
        libc::RTM_NEWROUTE => RouteHeader::parse(&r.body).is_ok_and(|route| route.kind == RouteType::Local),
        _ => false,
    };
    let v6: Vec<IpAddr> = local.iter().copied().filter(IpAddr::is_ipv6).collect();
    let mut pause = Duration::from_micros(100);
    while pause < Duration::from_millis(500) {
        let mut questions = vec![veth()];
        questions.extend(v6.iter().map(|ip| route(*ip)));
        if socket.run(questions)?.iter().filter(|r| ready(r)).count() == 1 + v6.len() {
            return Ok(());
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    Ok(())
}

/// Our link-local gateway of the address's family.
pub fn gateway_for(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => names::GATEWAY4.into(),
        IpAddr::V6(_) => names::GATEWAY6.into(),
    }
}

/// The prefix length of one address.
pub fn full_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// Addresses of the link, with prefix lengths.
pub fn addresses(socket: &mut Socket, index: u32) -> Result<Vec<(IpAddr, u8)>, Refused> {
    let all = all_addresses(socket)?.into_iter().filter(|(of, ..)| *of == index);
    Ok(all.map(|(_, ip, prefix)| (ip, prefix)).collect())
}

/// Addresses of all links: index, address, prefix length.
pub fn all_addresses(socket: &mut Socket) -> Result<Vec<(u32, IpAddr, u8)>, Refused> {
    let dump = Message::new("list addresses", libc::RTM_GETADDR, NLM_F_DUMP, &AddressHeader::default());
    let replies = socket.run(vec![dump])?;
    let all = replies.iter().filter(|r| r.kind == libc::RTM_NEWADDR);
    Ok(all
        .filter_map(|r| {
            let header = AddressHeader::parse(&r.body).ok()?;
            let attrs = r.attrs(header.buffer_len());
            let ip = ip_from(attrs.get(IFA_LOCAL).or_else(|| attrs.get(IFA_ADDRESS))?)?;
            Some((header.index, ip, header.prefix_len))
        })
        .collect())
}

/// A route, as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination; `None` for the default route.
    pub dst: Option<IpAddr>,
    /// Prefix length of the destination.
    pub prefix: u8,
    /// Gateway, if it has one.
    pub gateway: Option<IpAddr>,
    /// Outgoing interface; 0 if it has several or none.
    pub index: u32,
    /// True for IPv4.
    pub v4: bool,
    /// Routing table.
    pub table: u32,
    /// The kernel's metric.
    pub priority: u32,
    /// MTU of the path; 0 if it has none of its own.
    pub mtu: u32,
    /// Largest segment that TCP offers; 0 as above.
    pub advmss: u32,
}

impl Route {
    /// True if it is in the main table.
    pub fn is_main(&self) -> bool {
        self.table == u32::from(RouteHeader::RT_TABLE_MAIN)
    }
}

/// All unicast routes of the namespace.
pub fn routes(socket: &mut Socket) -> Result<Vec<Route>, Refused> {
    let mut all = Vec::new();
    for af in [AddressFamily::Inet, AddressFamily::Inet6] {
        let header = RouteHeader { address_family: af, ..RouteHeader::default() };
        let dump = Message::new("list routes", libc::RTM_GETROUTE, NLM_F_DUMP, &header);
        for r in socket.run(vec![dump])?.iter().filter(|r| r.kind == libc::RTM_NEWROUTE) {
            let Ok(header) = RouteHeader::parse(&r.body) else { continue };
            let attrs = r.attrs(header.buffer_len());
            if header.kind != RouteType::Unicast {
                continue;
            }
            let metric = |kind| attrs.nested(RTA_METRICS).u32(kind).unwrap_or_default();
            all.push(Route {
                dst: attrs.get(RTA_DST).and_then(ip_from),
                prefix: header.destination_prefix_length,
                gateway: attrs.get(RTA_GATEWAY).and_then(ip_from),
                index: attrs.u32(RTA_OIF).unwrap_or_default(),
                v4: af == AddressFamily::Inet,
                table: attrs.u32(RTA_TABLE).unwrap_or_else(|| header.table.into()),
                priority: attrs.u32(RTA_PRIORITY).unwrap_or_default(),
                mtu: metric(RTAX_MTU),
                advmss: metric(RTAX_ADVMSS),
            });
        }
    }
    Ok(all)
}

/// The permanent neighbours of a link.
pub fn neighbours(socket: &mut Socket, index: u32) -> Result<Vec<(IpAddr, Mac)>, Refused> {
    let header = NeighbourHeader { ifindex: index, ..NeighbourHeader::default() };
    let dump = Message::new("list neighbours", libc::RTM_GETNEIGH, NLM_F_DUMP, &header);
    let replies = socket.run(vec![dump])?;
    let all = replies.iter().filter(|r| r.kind == libc::RTM_NEWNEIGH).filter_map(|r| {
        let header = NeighbourHeader::parse(&r.body).ok()?;
        let attrs = r.attrs(header.buffer_len());
        let is_ours = header.ifindex == index && header.state == NeighbourState::Permanent;
        let mac = attrs.get(NDA_LLADDR)?.try_into().ok()?;
        is_ours.then_some((attrs.get(NDA_DST).and_then(ip_from)?, mac))
    });
    Ok(all.collect())
}

fn ip_from(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

fn with_ip<T>(ip: IpAddr, f: impl FnOnce(&[u8]) -> T) -> T {
    match ip {
        IpAddr::V4(a) => f(&a.octets()),
        IpAddr::V6(a) => f(&a.octets()),
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn ifinfomsg(index: u32, flags: LinkFlags, change_mask: LinkFlags) -> LinkHeader {
    LinkHeader { index, flags, change_mask, ..LinkHeader::default() }
}

/// Asks for a link, deletes it, or changes none of its flags.
fn link(index: u32) -> LinkHeader {
    ifinfomsg(index, LinkFlags::empty(), LinkFlags::empty())
}

/// A route of the main table.
fn rtmsg(family: AddressFamily, dst_len: u8, scope: RouteScope, flags: RouteFlags) -> RouteHeader {
    RouteHeader {
        address_family: family,
        destination_prefix_length: dst_len,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        scope,
        kind: RouteType::Unicast,
        flags,
        ..RouteHeader::default()
    }
}

#[cfg(test)]
mod tests {
    use super::{format_mac, host_name, random_mac};
    use std::collections::HashSet;

    #[test]
    fn host_names_fit_and_differ() {
        let mut seen = HashSet::new();
        for id in 0..2000 {
            for ifname in ["eth0", "net1"] {
                let name = host_name(&format!("container{id}"), ifname);
                assert_eq!(name.len(), 14, "{name}");
                assert!(name.starts_with("rnv") && seen.insert(name));
            }
        }
        // Part of the contract with running pods: an upgrade must find the old interfaces.
        assert_eq!(host_name("c1", "eth0"), "rnv2b3bfe61ab2");
        assert_ne!(host_name("c1e", "th0"), host_name("c1", "eth0"));
    }

    #[test]
    fn macs_are_local_unicast() {
        for _ in 0..100 {
            let mac = random_mac().expect("random");
            assert_eq!(mac[0] & 3, 2, "{}", format_mac(mac));
        }
    }
}
