//! Network interfaces: list them, make the overlay device, change and delete what is ours.

use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use netlink_packet_core::{Emitable, NlaBuffer, Parseable, parse_string, parse_u8, parse_u32};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoVxlan, LinkAttribute, LinkExtentMask, LinkHeader,
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::netlink::{CHANGE, CREATE, Error, Socket, attributes, unless, value};

/// The flag of the overlay device while it is down: no neighbour resolution.
const NOARP: u32 = libc::IFF_NOARP as u32;
const UP: u32 = libc::IFF_UP as u32;

/// What of a VXLAN device concerns us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vxlan {
    /// UDP port.
    pub port: u16,
    /// The tunnel key comes with each packet.
    pub collect_metadata: bool,
    /// It learns addresses from traffic.
    pub learning: bool,
    /// Takes IPv6 tunnel packets without a UDP checksum.
    pub zero_csum6_rx: bool,
}

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// `IFF_*`.
    pub flags: u32,
    /// MTU.
    pub mtu: u32,
    /// MAC; empty where there is none.
    pub mac: Vec<u8>,
    /// Kind: `vxlan`, `veth`, `bridge`, `bond`, `vlan`, `tun`, `wireguard`, `dummy`; empty for hardware.
    pub kind: String,
    /// Its framing (`ARPHRD_*`).
    pub hardware: u16,
    /// The bridge, bond or VRF that it is a port of.
    pub master: Option<u32>,
    /// The device below it, of a VLAN or macvlan device; of a veth, its other end.
    pub lower: Option<u32>,
    /// `IF_OPER_*` (RFC 2863): 6 is up; 0 is unknown, as with drivers that do not report it.
    pub operstate: u8,
    /// Makes no IPv6 link-local address of its own. Unknown (kernels without IPv6) counts as true.
    pub no_link_local: bool,
    /// Number of the XDP program in its driver.
    pub xdp: Option<u32>,
    /// Present for VXLAN devices.
    pub vxlan: Option<Vxlan>,
}

impl Link {
    /// Administratively up.
    pub fn is_up(&self) -> bool {
        self.flags & UP != 0
    }

    /// True if its frames have Ethernet headers, which tunnels, WireGuard and PPP lack.
    pub fn is_ethernet(&self) -> bool {
        self.hardware == libc::ARPHRD_ETHER
    }
}

/// All interfaces.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>> {
    socket.dump(&get(LinkUnspec::new_with_index(0)), parse).context("listing interfaces")
}

/// The interface of a name.
pub fn by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>> {
    one(socket, LinkUnspec::new_with_name(name)).with_context(|| format!("looking for interface {name}"))
}

/// The interface of an index.
pub fn by_index(socket: &mut Socket, index: u32) -> Result<Option<Link>> {
    one(socket, LinkUnspec::new_with_index(index)).with_context(|| format!("looking for interface {index}"))
}

fn one(socket: &mut Socket, which: LinkMessageBuilder<LinkUnspec>) -> Result<Option<Link>, Error> {
    match socket.get(&get(which), parse) {
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
        done => done,
    }
}

/// Asks for interfaces, without their counters.
fn get(which: LinkMessageBuilder<LinkUnspec>) -> RouteNetlinkMessage {
    let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
    RouteNetlinkMessage::GetLink(which.append_extra_attribute(mask).build())
}

/// Name of a VLAN device on top of a device.
pub fn vlan_on(links: &[Link], index: u32) -> Option<&str> {
    links.iter().find(|link| link.kind == "vlan" && link.lower == Some(index)).map(|link| link.name.as_str())
}

/// Keeps an error about an interface only if the interface is there and up: pods come and go while we work.
pub fn unless_gone<T>(socket: &mut Socket, index: u32, result: Result<T>, gone: T) -> Result<T> {
    match result {
        Err(error) if by_index(socket, index)?.is_some_and(|link| link.is_up()) => Err(error),
        Err(_) => Ok(gone),
        done => done,
    }
}

/// Reads an attribute at a time: one that a new kernel has changed must not hide the interface.
fn parse(body: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(body).ok()?;
    let mut link = Link {
        index: header.index,
        hardware: header.link_layer_type.into(),
        flags: header.flags.bits(),
        no_link_local: true,
        ..Link::default()
    };
    for attribute in attributes(&body[header.buffer_len()..]) {
        match attribute.kind() {
            libc::IFLA_IFNAME => link.name = parse_string(attribute.value()).ok()?,
            libc::IFLA_MTU => link.mtu = parse_u32(attribute.value()).ok()?,
            libc::IFLA_ADDRESS => link.mac = attribute.value().to_vec(),
            libc::IFLA_LINK => link.lower = parse_u32(attribute.value()).ok(),
            libc::IFLA_MASTER => link.master = parse_u32(attribute.value()).ok(),
            libc::IFLA_OPERSTATE => link.operstate = parse_u8(attribute.value()).ok()?,
            libc::IFLA_LINKINFO => parse_info(&mut link, attribute),
            libc::IFLA_AF_SPEC => link.no_link_local = has_no_link_local(attribute),
            libc::IFLA_XDP => link.xdp = parse_xdp(attribute),
            _ => {}
        }
    }
    Some(link)
}

fn parse_info(link: &mut Link, info: NlaBuffer<&[u8]>) {
    for attribute in attributes(value(info)) {
        match attribute.kind() {
            libc::IFLA_INFO_KIND => link.kind = parse_string(attribute.value()).unwrap_or_default(),
            libc::IFLA_INFO_DATA if link.kind == "vxlan" => link.vxlan = Some(parse_vxlan(attribute)),
            _ => {}
        }
    }
}

fn parse_vxlan(data: NlaBuffer<&[u8]>) -> Vxlan {
    let mut vxlan = Vxlan::default();
    for attribute in attributes(value(data)) {
        match InfoVxlan::parse(&attribute) {
            Ok(InfoVxlan::Port(port)) => vxlan.port = port,
            Ok(InfoVxlan::CollectMetadata(is_set)) => vxlan.collect_metadata = is_set,
            Ok(InfoVxlan::Learning(is_set)) => vxlan.learning = is_set,
            Ok(InfoVxlan::UDPZeroCsumRX(is_set)) => vxlan.zero_csum6_rx = is_set,
            _ => {}
        }
    }
    vxlan
}

fn parse_xdp(xdp: NlaBuffer<&[u8]>) -> Option<u32> {
    /// `IFLA_XDP_DRV_PROG_ID`.
    const IN_DRIVER: u16 = 5;
    let id = attributes(value(xdp)).find(|attribute| attribute.kind() == IN_DRIVER);
    id.and_then(|id| parse_u32(id.value()).ok())
}

fn has_no_link_local(families: NlaBuffer<&[u8]>) -> bool {
    let inet6 = attributes(value(families)).find(|family| i32::from(family.kind()) == libc::AF_INET6);
    let mode = inet6.into_iter().flat_map(|inet6| attributes(value(inet6))).find_map(|attribute| {
        match AfSpecInet6::parse(&attribute) {
            Ok(AfSpecInet6::AddrGenMode(mode)) => Some(mode),
            _ => None,
        }
    });
    mode.is_none_or(|mode| mode == In6AddrGenMode::None)
}

fn port_taken(port: u16) -> String {
    format!(
        "somebody else on this host has UDP port {port}, another VXLAN device perhaps (`ip -d link show type vxlan`): remove it, or \
         give the agents another --overlay-port"
    )
}

/// Makes a VXLAN device that takes the tunnel key from each packet, and sends from ports of a range; left down.
pub fn create_vxlan(
    socket: &mut Socket,
    name: &str,
    vxlan: &Vxlan,
    source_ports: RangeInclusive<u16>,
    mac: [u8; 6],
    mtu: u32,
) -> Result<()> {
    let create = LinkMessageBuilder::<LinkVxlan>::new(name)
        .address(mac.to_vec())
        .mtu(mtu)
        .collect_metadata(vxlan.collect_metadata)
        .learning(vxlan.learning)
        .udp_zero_csum6_rx(vxlan.zero_csum6_rx)
        .port(vxlan.port)
        // The kernel takes the upper bound for the first port that is not used.
        .port_range(*source_ports.start(), source_ports.end() + 1);
    match socket.request(&RouteNetlinkMessage::NewLink(create.build()), CREATE) {
        Ok(()) => Ok(()),
        // The name was free: it is the port that is taken.
        Err(e) if e.errno() == Some(libc::EEXIST) => Err(e).with_context(|| port_taken(vxlan.port)),
        Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => Err(e).with_context(|| {
            format!("making {name}: this kernel has no VXLAN: load the vxlan module, or use --routing native")
        }),
        Err(e) => Err(e).with_context(|| format!("making {name}")),
    }
}

/// Sets MAC and MTU of the overlay device, and turns off link-local addresses and neighbour
/// resolution. Leaves it up or down.
pub fn configure(socket: &mut Socket, index: u32, mac: [u8; 6], mtu: u32) -> Result<()> {
    let inet6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let quiet = LinkUnspec::new_with_index(index).append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![inet6]));
    // A host without IPv6 makes no link-local addresses either.
    unless(set(socket, quiet), &[libc::EAFNOSUPPORT, libc::EINVAL, libc::EOPNOTSUPP])
        .context("switching off IPv6 address generation")?;
    let shape = LinkUnspec::new_with_index(index).arp(false).address(mac.to_vec()).mtu(mtu);
    set(socket, shape).with_context(|| format!("setting up interface {index}"))
}

fn set(socket: &mut Socket, link: LinkMessageBuilder<LinkUnspec>) -> Result<(), Error> {
    socket.request(&RouteNetlinkMessage::SetLink(link.build()), CHANGE)
}

/// Sets the overlay device up, which opens its socket.
pub fn raise(socket: &mut Socket, index: u32, port: u16) -> Result<()> {
    match set(socket, LinkUnspec::new_with_index(index).up()) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.errno(), Some(libc::EADDRINUSE | libc::EEXIST | libc::ENOTUNIQ)) => {
            Err(e).with_context(|| port_taken(port))
        }
        Err(e) => Err(e).with_context(|| format!("setting interface {index} up")),
    }
}

/// True if the device is as [`configure`] leaves it, whether up or down.
pub fn is_configured(link: &Link) -> bool {
    link.flags & NOARP != 0 && link.no_link_local
}

/// Deletes an interface; false when it was gone.
pub fn delete(socket: &mut Socket, index: u32) -> Result<bool> {
    let link = LinkUnspec::new_with_index(index).build();
    unless(socket.request(&RouteNetlinkMessage::DelLink(link), CHANGE), &[libc::ENODEV])
        .with_context(|| format!("deleting interface {index}"))
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::{InfoKind, LinkFlags, LinkInfo, LinkMessage, State};

    use super::*;

    /// `ip link add v0 type veth` on Linux 6.18, shortened, and with an attribute that no reader expects.
    #[test]
    fn an_attribute_that_cannot_be_read_does_not_hide_the_interface() {
        let mut message = LinkMessage::default();
        message.header = LinkHeader { index: 7, link_layer_type: 1.into(), flags: LinkFlags::Up, ..message.header };
        message.attributes = vec![
            LinkAttribute::Qdisc("noop".into()),
            LinkAttribute::IfName("v0".into()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::Controller(3),
            LinkAttribute::OperState(State::Up),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
        ];
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        // `IFLA_MAP` of one octet.
        bytes.extend([5, 0, 14, 0, 1, 0, 0, 0]);
        let link = parse(&bytes).unwrap();
        assert!(LinkMessage::parse(&bytes).is_err(), "the test needs an attribute that the crate refuses");
        let expected = Link {
            index: 7,
            name: "v0".into(),
            flags: UP,
            mtu: 1500,
            kind: "veth".into(),
            hardware: libc::ARPHRD_ETHER,
            master: Some(3),
            operstate: 6,
            no_link_local: true,
            ..Link::default()
        };
        assert_eq!(link, expected);
        assert!(link.is_up() && link.is_ethernet());
    }
}
