//! IPVS: which virtual servers there are, and the removal of single ones. Read from `/proc`, removed by generic netlink; no
//! `ipvsadm` is needed, nor a flush, which would take everybody's.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result};
use netlink_packet_core::{DefaultNla, Emitable, NetlinkSerializable};
use netlink_sys::protocols::NETLINK_GENERIC;
use rustnet_common::tuple::proto;

use crate::config::NODE_PORTS;
use crate::net::netlink::{Error, Socket, attributes, value};

/// Where the kernel lists them; not there without IPVS.
const FILE: &str = "/proc/thread-self/net/ip_vs";
/// `GENL_ID_CTRL`: answers which number a family of generic netlink has.
const CONTROL: u16 = 0x10;
/// `struct genlmsghdr`.
const HEADER: usize = 4;
/// `AF_INET`, `AF_INET6`, as its attributes have them.
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
/// `IPVS_GENL_NAME`.
const FAMILY: &str = "IPVS";

/// `CTRL_CMD_GETFAMILY`, `IPVS_CMD_DEL_SERVICE`.
mod command {
    pub(super) const GET_FAMILY: u8 = 3;
    pub(super) const DEL_SERVICE: u8 = 3;
}

/// `CTRL_ATTR_*`, `IPVS_CMD_ATTR_*`, `IPVS_SVC_ATTR_*`.
mod attr {
    pub(super) const FAMILY_ID: u16 = 1;
    pub(super) const FAMILY_NAME: u16 = 2;
    /// With `NLA_F_NESTED`.
    pub(super) const SERVICE: u16 = 1 | 1 << 15;
    pub(super) const AF: u16 = 1;
    pub(super) const PROTOCOL: u16 = 2;
    pub(super) const ADDRESS: u16 = 3;
    pub(super) const PORT: u16 = 4;
}

/// What a virtual server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// What is for an address, by protocol.
    Address(u8, SocketAddr),
    /// What netfilter has marked so.
    Mark(u32),
}

/// A virtual server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualServer {
    /// What it takes.
    pub takes: Takes,
    /// Where it leads to.
    pub real: Vec<SocketAddr>,
}

impl fmt::Display for VirtualServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.takes {
            Takes::Address(protocol, at) => write!(f, "virtual server {} {at} of IPVS", proto::name(protocol)),
            Takes::Mark(mark) => write!(f, "virtual server of mark {mark:#x} of IPVS"),
        }
    }
}

/// All virtual servers of this network namespace.
pub fn virtual_servers() -> Result<Vec<VirtualServer>> {
    match std::fs::read_to_string(FILE) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).context(FILE),
    }
}

fn parse(text: &str) -> Vec<VirtualServer> {
    let mut all: Vec<VirtualServer> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let protocol = match words.first() {
            Some(&"TCP") => proto::TCP,
            Some(&"UDP") => proto::UDP,
            Some(&"SCTP") => proto::SCTP,
            Some(&"FWM") => 0,
            // A real server of the virtual one above.
            Some(&"->") => {
                let real = words.get(1).and_then(|word| endpoint(word));
                if let Some((server, real)) = all.last_mut().zip(real) {
                    server.real.push(real);
                }
                continue;
            }
            _ => continue,
        };
        let Some(word) = words.get(1) else { continue };
        let takes = match protocol {
            0 => u32::from_str_radix(word, 16).ok().map(Takes::Mark),
            protocol => endpoint(word).map(|at| Takes::Address(protocol, at)),
        };
        all.extend(takes.map(|takes| VirtualServer { takes, real: Vec::new() }));
    }
    all
}

/// `0A600001:01BB` or `[fd00:0060:...]:01BB`.
fn endpoint(word: &str) -> Option<SocketAddr> {
    let (address, port) = word.rsplit_once(':')?;
    let address: IpAddr = match address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().ok()?.into(),
        None => Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?).into(),
    };
    Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
}

/// Takes kube-proxy's virtual servers out of all: those at addresses of its device; and node ports, which are at other addresses of
/// this host and lead to the same real servers, or, without any, have such a port. `device`: the addresses of its device; `own`: the
/// host's others.
pub fn take_its(all: &mut Vec<VirtualServer>, device: &BTreeSet<IpAddr>, own: &BTreeSet<IpAddr>) -> Vec<VirtualServer> {
    let on_device = |it: &VirtualServer| matches!(it.takes, Takes::Address(_, at) if device.contains(&at.ip()));
    let real: BTreeSet<SocketAddr> = all.iter().filter(|it| on_device(it)).flat_map(|it| it.real.clone()).collect();
    let is_node_port = |it: &VirtualServer| {
        let Takes::Address(_, at) = it.takes else { return false };
        let has_such_port = (NODE_PORTS.0..=NODE_PORTS.1).contains(&at.port());
        let leads_there = if it.real.is_empty() { has_such_port } else { it.real.iter().all(|to| real.contains(to)) };
        !device.is_empty() && own.contains(&at.ip()) && leads_there
    };
    all.extract_if(.., |it| on_device(it) || is_node_port(it)).collect()
}

/// Removes virtual servers. One that is gone does not matter.
///
/// # Errors
/// The kernel refuses.
pub fn remove(servers: &[VirtualServer]) -> Result<()> {
    if servers.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::of(NETLINK_GENERIC).context("opening a socket of generic netlink")?;
    let family = family(&mut socket, FAMILY)?.context("IPVS has virtual servers and no generic netlink")?;
    for server in servers {
        let Takes::Address(protocol, at) = server.takes else { continue };
        match socket.request(&deletion(family, protocol, at), 0) {
            // ESRCH: there is no such virtual server.
            Err(Error::Refused(refusal)) if refusal.errno == libc::ESRCH => {}
            result => result.with_context(|| format!("removing the {server}"))?,
        }
    }
    Ok(())
}

/// The number of a family of generic netlink; `None` where the kernel has no such family.
fn family(socket: &mut Socket, name: &str) -> Result<Option<u16>> {
    let name = DefaultNla::new(attr::FAMILY_NAME, [name.as_bytes(), &[0]].concat());
    let ask = Message { family: CONTROL, command: command::GET_FAMILY, attributes: vec![name] };
    let number = |body: &[u8]| {
        let found = attributes(body.get(HEADER..)?).find(|found| found.kind() == attr::FAMILY_ID)?;
        Some(u16::from_ne_bytes(value(found).try_into().ok()?))
    };
    match socket.get(&ask, number) {
        Err(Error::Refused(refusal)) if refusal.errno == libc::ENOENT => Ok(None),
        result => result.context("asking generic netlink for a family"),
    }
}

/// `IPVS_CMD_DEL_SERVICE`.
fn deletion(family: u16, protocol: u8, at: SocketAddr) -> Message {
    let (af, mut address) = match at.ip() {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    // `union nf_inet_addr`.
    address.resize(16, 0);
    let service = [
        DefaultNla::new(attr::AF, af.to_ne_bytes().to_vec()),
        DefaultNla::new(attr::PROTOCOL, u16::from(protocol).to_ne_bytes().to_vec()),
        DefaultNla::new(attr::ADDRESS, address),
        DefaultNla::new(attr::PORT, at.port().to_be_bytes().to_vec()),
    ];
    let mut nested = vec![0; service.as_slice().buffer_len()];
    service.as_slice().emit(&mut nested);
    Message { family, command: command::DEL_SERVICE, attributes: vec![DefaultNla::new(attr::SERVICE, nested)] }
}

/// A request to a family of generic netlink, in the first version of its protocol.
struct Message {
    family: u16,
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[self.command, 1, 0, 0]);
        self.attributes.as_slice().emit(&mut buffer[HEADER..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:01BB rr
  -> C0000201:192B      Masq    1      0          0
UDP  0A60000A:0035 rr  ops
  -> 0AF40102:0035      Masq    1      0          0
  -> 0AF40203:0035      Masq    1      0          0
TCP  [fd00:0096:0000:0000:0000:0000:0000:0001]:0050 rr
  -> [fd00:0244:0000:0001:0000:0000:0000:0005]:1F90      Masq    1      0          0
UDP  C0000201:7535 rr
  -> 0AF40102:0035      Masq    1      0          0
TCP  C0000201:7536 rr
TCP  C0000201:0050 wlc persistent 600
  -> 0A000009:0050      Route   1      0          0
TCP  C0000263:7537 rr
FWM  0000000A wlc
  -> 0A000009:0050      Route   1      0          0
";

    fn ips(all: &[&str]) -> BTreeSet<IpAddr> {
        all.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    #[test]
    fn the_kernels_list_is_read() {
        let all = parse(LIST);
        let names: Vec<_> = all.iter().map(|it| (it.to_string(), it.real.len())).collect();
        let server = |name: &str, real| (format!("virtual server {name} of IPVS"), real);
        let want = [
            server("TCP 10.96.0.1:443", 1),
            server("UDP 10.96.0.10:53", 2),
            server("TCP [fd00:96::1]:80", 1),
            server("UDP 192.0.2.1:30005", 1),
            server("TCP 192.0.2.1:30006", 0),
            server("TCP 192.0.2.1:80", 1),
            server("TCP 192.0.2.99:30007", 0),
            server("of mark 0xa", 1),
        ];
        assert_eq!(names, want);
        assert_eq!(all[2].real, ["[fd00:244:0:1::5]:8080".parse().unwrap()]);
        assert!(parse("TCP\nTCP x\n  -> y\nFWM z\n").is_empty());
    }

    #[test]
    fn only_kube_proxys_are_taken() {
        let (device, own) = (ips(&["10.96.0.1", "10.96.0.10", "fd00:96::1"]), ips(&["192.0.2.1", "127.0.0.1"]));
        let mut all = parse(LIST);
        let its: Vec<_> = take_its(&mut all, &device, &own).iter().map(ToString::to_string).collect();
        let at = [
            "TCP 10.96.0.1:443",
            "UDP 10.96.0.10:53",
            "TCP [fd00:96::1]:80",
            "UDP 192.0.2.1:30005",
            "TCP 192.0.2.1:30006",
        ];
        assert_eq!(its, at.map(|at| format!("virtual server {at} of IPVS")));
        // A load balancer of somebody else's, one at an address that this host has not, one by a mark.
        assert_eq!(all.len(), 3);
        let mut all = parse(LIST);
        assert!(
            take_its(&mut all, &BTreeSet::new(), &own).is_empty(),
            "without its device nothing tells whose they are"
        );
    }

    #[test]
    fn a_deletion_names_one_virtual_server() {
        let bytes = |at: &str| {
            let message = deletion(0x22, proto::TCP, at.parse().unwrap());
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            assert_eq!(message.message_type(), 0x22);
            bytes
        };
        let header = |length: u16, kind: u16| [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        let number = |kind, number: [u8; 2]| [header(6, kind), number.to_vec(), vec![0; 2]].concat();
        let want = |af: u16, address: [u8; 16]| {
            let service = [
                number(1, af.to_ne_bytes()),
                number(2, 6_u16.to_ne_bytes()),
                header(20, 3),
                address.to_vec(),
                number(4, [0x01, 0xbb]),
            ];
            let service = service.concat();
            [vec![3, 1, 0, 0], header(4 + service.len() as u16, 0x8001), service].concat()
        };
        let v4 = [10, 96, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes("10.96.0.1:443"), want(2, v4));
        assert_eq!(bytes("[::1]:443"), want(10, Ipv6Addr::LOCALHOST.octets()));
    }

    #[test]
    fn the_kernel_tells_the_number_of_a_family() {
        let mut socket = Socket::of(NETLINK_GENERIC).unwrap();
        assert_eq!(family(&mut socket, "nlctrl").unwrap(), Some(CONTROL));
        assert_eq!(family(&mut socket, "rn_nothing").unwrap(), None);
    }
}
