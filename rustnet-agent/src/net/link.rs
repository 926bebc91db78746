//! Network interfaces: list them, make the overlay device, change and delete what is ours.

use anyhow::{Context, Result};

use super::netlink::{CREATE, Message, Socket, attributes, number, text, unless};

/// `IFLA_*`.
mod attr {
    pub(super) const ADDRESS: u16 = 1;
    pub(super) const NAME: u16 = 3;
    pub(super) const MTU: u16 = 4;
    pub(super) const MASTER: u16 = 10;
    pub(super) const OPERSTATE: u16 = 16;
    pub(super) const LINKINFO: u16 = 18;
    pub(super) const AF_SPEC: u16 = 26;
    pub(super) const EXT_MASK: u16 = 29;
    pub(super) const INFO_KIND: u16 = 1;
    pub(super) const INFO_DATA: u16 = 2;
    pub(super) const INET6_ADDR_GEN_MODE: u16 = 8;
    pub(super) const VXLAN_LEARNING: u16 = 7;
    pub(super) const VXLAN_PORT: u16 = 15;
    pub(super) const VXLAN_ZERO_CSUM6_RX: u16 = 20;
    pub(super) const VXLAN_COLLECT_METADATA: u16 = 25;
}

/// `RTEXT_FILTER_SKIP_STATS`.
const SKIP_STATS: u32 = 8;
/// `IN6_ADDR_GEN_MODE_NONE`.
const ADDR_GEN_NONE: u8 = 1;
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
    /// `IF_OPER_*` (RFC 2863): 6 is up; 0 is unknown, as with drivers that do not report it.
    pub operstate: u8,
    /// Makes no IPv6 link-local address of its own. Unknown (kernels without IPv6) counts as true.
    pub no_link_local: bool,
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

/// `struct ifinfomsg`.
fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[4..8].copy_from_slice(&index.to_ne_bytes());
    out[8..12].copy_from_slice(&flags.to_ne_bytes());
    out[12..16].copy_from_slice(&change.to_ne_bytes());
    out
}

/// All interfaces.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>> {
    let dump = Message::new(libc::RTM_GETLINK, 0, &ifinfomsg(0, 0, 0)).u32(attr::EXT_MASK, SKIP_STATS);
    let replies = socket.dump(dump).context("listing interfaces")?;
    Ok(replies.iter().filter_map(|reply| parse(&reply.body)).collect())
}

/// The interface of a name.
pub fn by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>> {
    let get = Message::new(libc::RTM_GETLINK, 0, &ifinfomsg(0, 0, 0)).string(attr::NAME, name);
    match socket.request(get.u32(attr::EXT_MASK, SKIP_STATS)) {
        Ok(replies) => Ok(replies.iter().find_map(|reply| parse(&reply.body))),
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("looking for interface {name}")),
    }
}

/// The interface of an index.
pub fn by_index(socket: &mut Socket, index: u32) -> Result<Option<Link>> {
    let get = Message::new(libc::RTM_GETLINK, 0, &ifinfomsg(index, 0, 0)).u32(attr::EXT_MASK, SKIP_STATS);
    match socket.request(get) {
        Ok(replies) => Ok(replies.iter().find_map(|reply| parse(&reply.body))),
        Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("looking for interface {index}")),
    }
}

/// Keeps an error about an interface only if the interface is there and up: pods come and go while we work.
pub fn unless_gone<T>(socket: &mut Socket, index: u32, result: Result<T>, gone: T) -> Result<T> {
    match result {
        Err(error) if by_index(socket, index)?.is_some_and(|link| link.is_up()) => Err(error),
        Err(_) => Ok(gone),
        done => done,
    }
}

fn parse(body: &[u8]) -> Option<Link> {
    let (head, rest) = body.split_at_checked(16)?;
    let mut link = Link {
        index: number(&head[4..])?,
        hardware: u16::from_ne_bytes([head[2], head[3]]),
        flags: number(&head[8..])?,
        no_link_local: true,
        ..Link::default()
    };
    for (kind, value) in attributes(rest) {
        match kind {
            attr::NAME => link.name = text(value),
            attr::MTU => link.mtu = number(value)?,
            attr::ADDRESS => link.mac = value.to_vec(),
            attr::MASTER => link.master = number(value),
            attr::OPERSTATE => link.operstate = *value.first()?,
            attr::LINKINFO => parse_info(&mut link, value),
            attr::AF_SPEC => {
                let inet6 = attributes(value).find(|(family, _)| i32::from(*family) == libc::AF_INET6);
                let mode = inet6.and_then(|(_, v)| attributes(v).find(|(kind, _)| *kind == attr::INET6_ADDR_GEN_MODE));
                link.no_link_local = mode.is_none_or(|(_, v)| v == [ADDR_GEN_NONE]);
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_info(link: &mut Link, info: &[u8]) {
    for (kind, value) in attributes(info) {
        match kind {
            attr::INFO_KIND => link.kind = text(value),
            attr::INFO_DATA if link.kind == "vxlan" => link.vxlan = Some(parse_vxlan(value)),
            _ => {}
        }
    }
}

fn parse_vxlan(data: &[u8]) -> Vxlan {
    let mut vxlan = Vxlan::default();
    for (kind, value) in attributes(data) {
        let set = value.first().is_some_and(|v| *v != 0);
        match (kind, value) {
            (attr::VXLAN_PORT, [a, b]) => vxlan.port = u16::from_be_bytes([*a, *b]),
            (attr::VXLAN_COLLECT_METADATA, _) => vxlan.collect_metadata = set,
            (attr::VXLAN_LEARNING, _) => vxlan.learning = set,
            (attr::VXLAN_ZERO_CSUM6_RX, _) => vxlan.zero_csum6_rx = set,
            _ => {}
        }
    }
    vxlan
}

fn port_taken(port: u16) -> String {
    format!(
        "somebody else on this host has UDP port {port}, another VXLAN device perhaps (`ip -d link show type vxlan`): remove it, or \
         give the agents another --overlay-port"
    )
}

/// Makes a VXLAN device that takes the tunnel key from each packet; left down.
pub fn create_vxlan(socket: &mut Socket, name: &str, vxlan: &Vxlan, mac: [u8; 6], mtu: u32) -> Result<()> {
    let port = vxlan.port.to_be_bytes();
    let create = Message::new(libc::RTM_NEWLINK, CREATE, &ifinfomsg(0, 0, 0));
    let create = create.string(attr::NAME, name).attr(attr::ADDRESS, &mac).u32(attr::MTU, mtu);
    let create = create.nested(attr::LINKINFO, |m| {
        m.string(attr::INFO_KIND, "vxlan").nested(attr::INFO_DATA, |m| {
            m.u8(attr::VXLAN_COLLECT_METADATA, vxlan.collect_metadata.into())
                .u8(attr::VXLAN_LEARNING, vxlan.learning.into())
                .u8(attr::VXLAN_ZERO_CSUM6_RX, vxlan.zero_csum6_rx.into())
                .attr(attr::VXLAN_PORT, &port)
        })
    });
    match socket.request(create) {
        Ok(_) => Ok(()),
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
    let quiet = Message::new(libc::RTM_SETLINK, 0, &ifinfomsg(index, 0, 0))
        .nested(attr::AF_SPEC, |m| m.nested(libc::AF_INET6 as u16, |m| m.u8(attr::INET6_ADDR_GEN_MODE, ADDR_GEN_NONE)));
    // A host without IPv6 makes no link-local addresses either.
    unless(socket.request(quiet), &[libc::EAFNOSUPPORT, libc::EINVAL, libc::EOPNOTSUPP])
        .context("switching off IPv6 address generation")?;
    let shape = Message::new(libc::RTM_SETLINK, 0, &ifinfomsg(index, NOARP, NOARP));
    let done = socket.request(shape.attr(attr::ADDRESS, &mac).u32(attr::MTU, mtu));
    done.map(drop).with_context(|| format!("setting up interface {index}"))
}

/// Sets the overlay device up, which opens its socket.
pub fn raise(socket: &mut Socket, index: u32, port: u16) -> Result<()> {
    match socket.request(Message::new(libc::RTM_SETLINK, 0, &ifinfomsg(index, UP, UP))) {
        Ok(_) => Ok(()),
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
    unless(socket.request(Message::new(libc::RTM_DELLINK, 0, &ifinfomsg(index, 0, 0))), &[libc::ENODEV])
        .with_context(|| format!("deleting interface {index}"))
}
