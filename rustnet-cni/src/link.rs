//! Links, addresses, routes and neighbours of one pod, as netlink messages.
//!
//! The pod's end is created in its own namespace at once: moving a device later costs more than all the rest. It has its
//! addresses as /32 or /128 and a default route through a link-local gateway whose permanent neighbour is the host's end;
//! the host has a route and a permanent neighbour for each address. No packet ever asks for a MAC address.

use crate::netlink::{Message, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, Refused, Reply, Socket};
use libc::{
    AF_INET, AF_INET6, AF_UNSPEC, IFA_ADDRESS, IFA_LOCAL, IFF_UP, IFLA_ADDRESS, IFLA_IFALIAS, IFLA_IFNAME, IFLA_LINK,
    IFLA_LINKINFO, IFLA_MTU, IFLA_NET_NS_FD, NDA_DST, NDA_LLADDR, NUD_PERMANENT, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN, RTA_DST, RTA_GATEWAY, RTA_OIF, RTN_UNICAST, RTPROT_STATIC,
};
use rustnet_common::names;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_OPERSTATE: u16 = 16;
const IF_OPER_UP: u8 = 6;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IPV4_DEVCONF_ARP_IGNORE: u16 = 19;
const IPV4_DEVCONF_ARP_ACCEPT: u16 = 21;
/// `arp_ignore`: no answer to any ARP request, and so no neighbour entry for its sender.
const ARP_IGNORE_ALL: u32 = 8;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_F_NODAD: u8 = 2;
const RTNH_F_ONLINK: u32 = 4;

/// Size of `struct ifinfomsg`.
pub const IFINFOMSG: usize = 16;
/// Longest alias of a link that the kernel takes.
const IFALIAS_MAX: usize = 255;

/// A MAC address.
pub type Mac = [u8; 6];

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
    /// Alias; what [`alias`] made, for ours.
    pub alias: String,
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
}

/// Name of the host's end for an attachment: found again without any state.
pub fn host_name(container_id: &str, ifname: &str) -> String {
    // FNV-1a; 44 bits of it fill the name.
    let hash = [container_id.as_bytes(), &[0], ifname.as_bytes()]
        .concat()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    format!("{}{:011x}", names::VETH_PREFIX, (hash ^ (hash >> 44)) & 0xfff_ffff_ffff)
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
    let create = Message::new(what, libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfomsg(0, 0, 0));
    let create = end(create, v.host, v.host_mac).nested(IFLA_LINKINFO, |m| {
        m.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |m| {
            m.nested(VETH_INFO_PEER, |m| {
                end(m.raw(&ifinfomsg(0, 0, 0)), v.pod, v.pod_mac)
                    .u32(IFLA_NET_NS_FD, v.netns.as_raw_fd().cast_unsigned())
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

/// All links of the namespace.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>, Refused> {
    let dump = Message::new("list links", libc::RTM_GETLINK, NLM_F_DUMP, &ifinfomsg(0, 0, 0));
    Ok(socket.run(vec![dump])?.iter().filter_map(parse).collect())
}

/// Deletes a link, and with it the other end, filters, routes and neighbours. A link that has gone is no error.
pub fn delete(socket: &mut Socket, index: u32) -> Result<(), Refused> {
    let m = Message::new(format!("delete link {index}"), libc::RTM_DELLINK, 0, &ifinfomsg(index, 0, 0));
    socket.run(vec![m.tolerate(&[libc::ENODEV])]).map(drop)
}

fn get_message(name: &str) -> Message {
    Message::new(format!("look up link {name}"), libc::RTM_GETLINK, 0, &ifinfomsg(0, 0, 0))
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
    let attrs = reply.attrs(IFINFOMSG);
    let index = reply.header_u32(4);
    Some(Link {
        index,
        name: attrs.text(IFLA_IFNAME)?.to_owned(),
        mac: attrs.get(IFLA_ADDRESS).and_then(|m| m.try_into().ok()).unwrap_or_default(),
        mtu: attrs.u32(IFLA_MTU).unwrap_or_default(),
        up: reply.header_u32(8) & IFF_UP as u32 != 0,
        alias: attrs.text(IFLA_IFALIAS).unwrap_or_default().to_owned(),
        // Older kernels leave it out when both indices are equal.
        peer: attrs.u32(IFLA_LINK).unwrap_or(index),
    })
}

/// Settings that the host's end needs before it is up: no IPv6 addresses of its own, no
/// reverse-path filter (a reply that the datapath has given a service's address has no route back),
/// no ARP (all its neighbours are permanent), and the attachment's name in the alias. See
/// [`refuse_router_advertisements`] for the setting that netlink cannot change.
pub fn prepare_host(index: u32, alias: &str) -> Vec<Message> {
    let filter = Message::new("turn off the veth's rp_filter and ARP", libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0))
        .nested(IFLA_AF_SPEC, |m| {
            m.nested(AF_INET as u16, |m| {
                m.nested(IFLA_INET_CONF, |m| {
                    m.u32(IPV4_DEVCONF_RP_FILTER, 0)
                        .u32(IPV4_DEVCONF_ARP_IGNORE, ARP_IGNORE_ALL)
                        .u32(IPV4_DEVCONF_ARP_ACCEPT, 0)
                })
            })
        });
    let filter = if alias.len() <= IFALIAS_MAX { filter.attr(IFLA_IFALIAS, alias.as_bytes()) } else { filter };
    vec![filter, no_ipv6_autoconf(index)]
}

/// Stops the host from accepting router advertisements that the pod sends (CVE-2020-13401). Many
/// hosts have `accept_ra=2` as the default for new devices, because they forward and have a default
/// route from advertisements.
///
/// Works in the network namespace of the calling thread. A kernel without IPv6 has no such setting.
pub fn refuse_router_advertisements(name: &str) -> io::Result<()> {
    match std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Stops the kernel from making link-local addresses.
pub fn no_ipv6_autoconf(index: u32) -> Message {
    Message::new("set addrgenmode none", libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0))
        .nested(IFLA_AF_SPEC, |m| {
            m.nested(AF_INET6 as u16, |m| m.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]))
        })
        .tolerate(&[libc::EAFNOSUPPORT])
}

/// Sets a link up.
pub fn up(index: u32) -> Message {
    Message::new("set the link up", libc::RTM_NEWLINK, 0, &ifinfomsg(index, IFF_UP as u32, IFF_UP as u32))
}

/// Sets a link down.
pub fn down(index: u32) -> Message {
    Message::new("set the link down", libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, IFF_UP as u32))
}

/// Adds an address as /32 or /128, without duplicate address detection.
pub fn address(index: u32, ip: IpAddr) -> Message {
    let header = [family(ip), full_prefix(ip), IFA_F_NODAD, RT_SCOPE_UNIVERSE];
    let header = [header, index.to_ne_bytes()].concat();
    with_ip(ip, |bytes| {
        Message::new(format!("add address {ip}"), libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attr(IFA_LOCAL, bytes)
            .attr(IFA_ADDRESS, bytes)
    })
}

/// Adds a permanent neighbour.
pub fn neighbour(index: u32, ip: IpAddr, mac: Mac) -> Message {
    let header =
        [&[family(ip), 0, 0, 0][..], &index.to_ne_bytes(), &NUD_PERMANENT.to_ne_bytes(), &[0, RTN_UNICAST]].concat();
    with_ip(ip, |bytes| {
        Message::new(format!("add neighbour {ip}"), libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attr(NDA_DST, bytes)
            .attr(NDA_LLADDR, &mac)
    })
}

/// Adds a route to one address on the link.
pub fn route_to(index: u32, ip: IpAddr) -> Message {
    let header = rtmsg(family(ip), full_prefix(ip), RT_SCOPE_LINK, 0);
    with_ip(ip, |bytes| {
        Message::new(format!("add route {ip}"), libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &header)
            .attr(RTA_DST, bytes)
            .u32(RTA_OIF, index)
    })
}

/// Adds the default route through a gateway that needs no route of its own.
pub fn default_route(index: u32, gateway: IpAddr) -> Message {
    let header = rtmsg(family(gateway), 0, RT_SCOPE_UNIVERSE, RTNH_F_ONLINK);
    with_ip(gateway, |bytes| {
        Message::new(format!("add default route via {gateway}"), libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &header)
            .attr(RTA_GATEWAY, bytes)
            .u32(RTA_OIF, index)
    })
}

/// Waits until the kernel has caught up with a link that came up: it starts the queue of a veth whose other end came up,
/// and adds the local routes of IPv6 addresses, from work queues, so that the first packets would be lost.
///
/// Usually there is nothing to wait for: since 6.9 the look-up itself brings the link's state up to date. Gives up
/// silently after a second, for then the network is in order and only slow.
pub fn settle(socket: &mut Socket, index: u32, local: &[IpAddr]) -> Result<(), Refused> {
    let link = || Message::new("look up the veth", libc::RTM_GETLINK, 0, &ifinfomsg(index, 0, 0));
    let route = |ip: IpAddr| {
        let header = rtmsg(family(ip), full_prefix(ip), 0, 0);
        with_ip(ip, |b| Message::new(format!("look up {ip}"), libc::RTM_GETROUTE, 0, &header).attr(RTA_DST, b))
            .tolerate(&[libc::ENETUNREACH, libc::EHOSTUNREACH])
    };
    let ready = |r: &Reply| match r.kind {
        libc::RTM_NEWLINK => r.attrs(IFINFOMSG).get(IFLA_OPERSTATE) == Some(&[IF_OPER_UP]),
        libc::RTM_NEWROUTE => r.body.get(7) == Some(&libc::RTN_LOCAL),
        _ => false,
    };
    let v6: Vec<IpAddr> = local.iter().copied().filter(IpAddr::is_ipv6).collect();
    let mut pause = Duration::from_micros(100);
    while pause < Duration::from_millis(500) {
        let mut questions = vec![link()];
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
    let dump = Message::new("list addresses", libc::RTM_GETADDR, NLM_F_DUMP, &[AF_UNSPEC as u8, 0, 0, 0, 0, 0, 0, 0]);
    let replies = socket.run(vec![dump])?;
    let ours = replies.iter().filter(|r| r.kind == libc::RTM_NEWADDR && r.header_u32(4) == index);
    Ok(ours
        .filter_map(|r| {
            let attrs = r.attrs(8);
            Some((ip_from(attrs.get(IFA_LOCAL).or_else(|| attrs.get(IFA_ADDRESS))?)?, *r.body.get(1)?))
        })
        .collect())
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination; `None` for the default route.
    pub dst: Option<IpAddr>,
    /// Prefix length of the destination.
    pub prefix: u8,
    /// Gateway, if it has one.
    pub gateway: Option<IpAddr>,
    /// Outgoing interface.
    pub index: u32,
    /// True for IPv4.
    pub v4: bool,
}

/// Routes of the main table that leave by the link.
pub fn routes(socket: &mut Socket, index: u32) -> Result<Vec<Route>, Refused> {
    let mut all = Vec::new();
    for af in [AF_INET as u8, AF_INET6 as u8] {
        let dump = Message::new("list routes", libc::RTM_GETROUTE, NLM_F_DUMP, &rtmsg(af, 0, 0, 0));
        for r in socket.run(vec![dump])? {
            let attrs = r.attrs(12);
            let main = r.body.get(4) == Some(&RT_TABLE_MAIN) && r.kind == libc::RTM_NEWROUTE;
            if main && attrs.u32(RTA_OIF) == Some(index) {
                all.push(Route {
                    dst: attrs.get(RTA_DST).and_then(ip_from),
                    prefix: r.body.get(1).copied().unwrap_or_default(),
                    gateway: attrs.get(RTA_GATEWAY).and_then(ip_from),
                    index,
                    v4: af == AF_INET as u8,
                });
            }
        }
    }
    Ok(all)
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

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET as u8 } else { AF_INET6 as u8 }
}

/// `struct ifinfomsg`: family and type 0, index, flags and the mask of those to change.
fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; IFINFOMSG] {
    let mut h = [0; IFINFOMSG];
    h[4..8].copy_from_slice(&index.to_ne_bytes());
    h[8..12].copy_from_slice(&flags.to_ne_bytes());
    h[12..16].copy_from_slice(&change.to_ne_bytes());
    h
}

/// `struct rtmsg` for the main table.
fn rtmsg(family: u8, dst_len: u8, scope: u8, flags: u32) -> [u8; 12] {
    let mut h = [family, dst_len, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0, 0, 0, 0];
    h[8..12].copy_from_slice(&flags.to_ne_bytes());
    h
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
        assert_eq!(host_name("c1", "eth0"), host_name("c1", "eth0"));
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
