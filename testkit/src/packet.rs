//! Hand-made packets: built by etherparse, sent as they are through a packet socket.

use crate::netns::{Netns, panic_text};
use crate::raw::PacketSocket;
use anyhow::{Context, Result, bail};
use etherparse::{Ethernet2Header, PacketBuilder, PacketBuilderStep};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

/// Length of an Ethernet header.
const ETHERNET: usize = 14;

/// Ends of a frame on the link.
#[derive(Clone, Copy, Debug)]
pub struct Macs {
    /// Sender.
    pub from: [u8; 6],
    /// Receiver.
    pub to: [u8; 6],
}

fn ethernet(macs: Macs) -> PacketBuilderStep<Ethernet2Header> {
    PacketBuilder::ethernet2(macs.from, macs.to)
}

fn ip(macs: Macs, from: IpAddr, to: IpAddr) -> Result<PacketBuilderStep<etherparse::IpHeaders>> {
    Ok(match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet(macs).ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet(macs).ipv6(from.octets(), to.octets(), 64),
        _ => bail!("{from} and {to} are of different families"),
    })
}

/// A UDP datagram.
pub fn udp(macs: Macs, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    ip(macs, from.ip(), to.ip())?.udp(from.port(), to.port()).write(&mut frame, payload)?;
    Ok(frame)
}

/// A UDP datagram in fragments. `pieces` are ranges of the datagram with its header (8 bytes); all but the last begin and end
/// at multiples of eight, and they may overlap.
pub fn udp_fragments(
    macs: Macs,
    from: SocketAddr,
    to: SocketAddr,
    payload: &[u8],
    id: u16,
    pieces: &[Range<usize>],
) -> Result<Vec<Vec<u8>>> {
    let whole = udp(macs, from, to, payload)?;
    let header = ETHERNET + if from.is_ipv4() { 20 } else { 40 };
    let datagram = &whole[header..];
    let fragment = |piece: &Range<usize>| -> Result<Vec<u8>> {
        let bytes = datagram.get(piece.clone()).with_context(|| format!("{piece:?} is not in the datagram"))?;
        let more = u16::from(piece.end < datagram.len());
        let mut out = whole[..header].to_vec();
        if from.is_ipv4() {
            out[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&((20 + bytes.len()) as u16).to_be_bytes());
            out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&id.to_be_bytes());
            out[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&(more << 13 | (piece.start / 8) as u16).to_be_bytes());
            let (ip, _) = etherparse::Ipv4Header::from_slice(&out[ETHERNET..])?;
            out[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&ip.calc_header_checksum().to_be_bytes());
        } else {
            out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&((8 + bytes.len()) as u16).to_be_bytes());
            let next = std::mem::replace(&mut out[ETHERNET + 6], 44);
            out.extend_from_slice(&[next, 0]);
            out.extend_from_slice(&(piece.start as u16 | more).to_be_bytes());
            out.extend_from_slice(&u32::from(id).to_be_bytes());
        }
        out.extend_from_slice(bytes);
        Ok(out)
    };
    pieces.iter().map(fragment).collect()
}

/// The first segment of a TCP connection.
pub fn tcp_syn(macs: Macs, from: SocketAddr, to: SocketAddr) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    ip(macs, from.ip(), to.ip())?.tcp(from.port(), to.port(), 1, 65_535).syn().write(&mut frame, &[])?;
    Ok(frame)
}

/// An echo request.
pub fn echo(macs: Macs, from: IpAddr, to: IpAddr) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let step = ip(macs, from, to)?;
    match from {
        IpAddr::V4(_) => step.icmpv4_echo_request(77, 1).write(&mut frame, b"echo")?,
        IpAddr::V6(_) => step.icmpv6_echo_request(77, 1).write(&mut frame, b"echo")?,
    }
    Ok(frame)
}

/// Kinds of packets that [`probe`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A datagram.
    Udp,
    /// The first segment of a connection; it has data as well.
    Tcp,
    /// An echo request; the ports are of no use.
    Echo,
}

impl Probe {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Udp, Self::Tcp, Self::Echo];
}

/// A packet of any kind that carries a payload.
pub fn probe(kind: Probe, macs: Macs, from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let step = ip(macs, from.ip(), to.ip())?;
    match (kind, from) {
        (Probe::Udp, _) => step.udp(from.port(), to.port()).write(&mut frame, payload)?,
        (Probe::Tcp, _) => step.tcp(from.port(), to.port(), 1, 65_535).syn().write(&mut frame, payload)?,
        (Probe::Echo, SocketAddr::V4(_)) => step.icmpv4_echo_request(78, 1).write(&mut frame, payload)?,
        (Probe::Echo, SocketAddr::V6(_)) => step.icmpv6_echo_request(78, 1).write(&mut frame, payload)?,
    }
    Ok(frame)
}

/// The IP packet of a frame inside of another header of its family.
pub fn ip_in_ip(macs: Macs, from: IpAddr, to: IpAddr, inside: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let number = etherparse::IpNumber(if from.is_ipv4() { 4 } else { 41 });
    ip(macs, from, to)?.write(&mut frame, number, inside.get(ETHERNET..).context("no Ethernet frame")?)?;
    Ok(frame)
}

/// An ICMP message of any type: `rest` is the second word of its header.
pub fn icmp(macs: Macs, from: IpAddr, to: IpAddr, kind: u8, code: u8, rest: u32, body: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let step = ip(macs, from, to)?;
    match from {
        IpAddr::V4(_) => step.icmpv4_raw(kind, code, rest.to_be_bytes()).write(&mut frame, body)?,
        IpAddr::V6(_) => step.icmpv6_raw(kind, code, rest.to_be_bytes()).write(&mut frame, body)?,
    }
    Ok(frame)
}

/// "Port unreachable" about the IP packet in a frame.
pub fn port_unreachable(macs: Macs, from: IpAddr, to: IpAddr, about: &[u8]) -> Result<Vec<u8>> {
    let (kind, code) = if from.is_ipv4() { (3, 3) } else { (1, 4) };
    icmp(macs, from, to, kind, code, 0, about.get(ETHERNET..).context("no Ethernet frame")?)
}

/// A message of neighbour or router discovery, with the hop limit 255 that receivers demand (RFC
/// 4861, 7.1).
pub fn discovery(macs: Macs, from: Ipv6Addr, to: Ipv6Addr, kind: u8, rest: u32, body: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let step = ethernet(macs).ipv6(from.octets(), to.octets(), 255);
    step.icmpv6_raw(kind, 0, rest.to_be_bytes()).write(&mut frame, body)?;
    Ok(frame)
}

/// A frame of any `EtherType`.
pub fn other(macs: Macs, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&macs.to[..], &macs.from, &ethertype.to_be_bytes(), payload].concat()
}

/// An ARP packet (RFC 826): operation 1 is a request, 2 a reply.
pub fn arp(macs: Macs, operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let ends = [&macs.from[..], &sender.octets(), &[0; 6], &target.octets()].concat();
    other(macs, 0x0806, &[&[0, 1, 8, 0, 6, 4, 0, operation][..], &ends].concat())
}

/// A frame with VLAN tags, the outermost first: `EtherType` and tag control information of each.
pub fn tagged(frame: &[u8], tags: &[(u16, u16)]) -> Vec<u8> {
    let tag = |(kind, tci): &(u16, u16)| [kind.to_be_bytes(), tci.to_be_bytes()].concat();
    [&frame[..12], &tags.iter().flat_map(tag).collect::<Vec<u8>>(), &frame[12..]].concat()
}

/// A packet with a source route through `via`: loose, by an IPv4 option (RFC 791, 3.1), or by an
/// IPv6 routing header of type 0 (RFC 5095). The frame must be one of [`probe`].
pub fn source_routed(frame: &[u8], via: IpAddr) -> Result<Vec<u8>> {
    let mut out = frame.to_vec();
    match via {
        IpAddr::V4(via) => {
            out[ETHERNET] += 2;
            let total = u16::from_be_bytes([out[ETHERNET + 2], out[ETHERNET + 3]]) + 8;
            out[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total.to_be_bytes());
            let option = [&[131, 7, 4][..], &via.octets(), &[0]].concat();
            out.splice(ETHERNET + 20..ETHERNET + 20, option);
            let (ip, _) = etherparse::Ipv4Header::from_slice(&out[ETHERNET..])?;
            out[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&ip.calc_header_checksum().to_be_bytes());
        }
        IpAddr::V6(via) => {
            let payload = u16::from_be_bytes([out[ETHERNET + 4], out[ETHERNET + 5]]) + 24;
            out[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&payload.to_be_bytes());
            let next = std::mem::replace(&mut out[ETHERNET + 6], 43);
            let header = [&[next, 2, 0, 1, 0, 0, 0, 0][..], &via.octets()].concat();
            out.splice(ETHERNET + 40..ETHERNET + 40, header);
        }
    }
    Ok(out)
}

/// A frame without its checksum.
pub struct Unsummed {
    bytes: Vec<u8>,
    /// The first byte that the checksum covers.
    start: u16,
    /// Where it belongs, counted from there.
    offset: u16,
}

/// A frame from `own` that the device which makes its checksum turns into `wanted`: the checksum covers all behind the IP
/// header's beginning of the source, and is written over the last two bytes of the source. Two bytes behind the packet
/// make it what it should be. The two sources differ in their last two bytes alone.
pub fn unsummed(wanted: &[u8], own: IpAddr) -> Result<Unsummed> {
    let (start, len) = if own.is_ipv4() { (ETHERNET + 12, 4) } else { (ETHERNET + 8, 16) };
    let at = start + len - 2;
    let mut bytes = wanted.to_vec();
    match own {
        IpAddr::V4(own) => bytes[start..start + len].copy_from_slice(&own.octets()),
        IpAddr::V6(own) => bytes[start..start + len].copy_from_slice(&own.octets()),
    }
    if bytes[start..at] != wanted[start..at] || !(bytes.len() - start).is_multiple_of(2) {
        bail!("no packet of {own} can become this one");
    }
    let sum = |bytes: &[u8]| {
        let words = bytes.chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])));
        let mut sum: u64 = words.sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    };
    let becomes = u16::from_be_bytes([wanted[at], wanted[at + 1]]);
    // All words together have to be the complement of what is to be written.
    let missing = sum(&[(!becomes).to_be_bytes(), (!sum(&bytes[start..])).to_be_bytes()].concat());
    bytes.extend(missing.to_be_bytes());
    Ok(Unsummed { bytes, start: start as u16, offset: (at - start) as u16 })
}

/// What a VXLAN sender would put into its datagram (RFC 7348, 5).
pub fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x08, 0, 0, 0];
    payload.extend_from_slice(&(vni << 8).to_be_bytes());
    payload.extend_from_slice(inner);
    payload
}

/// A socket that sends frames out of an interface.
pub struct RawPort(PacketSocket);

impl RawPort {
    /// Opens one.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        netns.run(|| Self::open_here(interface))?
    }

    /// Opens one as the calling thread, with its privileges and in its namespace.
    pub fn open_here(interface: &str) -> Result<Self> {
        PacketSocket::open_to_send(interface).map(Self)
    }

    /// Sends frames. All calls send on one CPU: between virtual interfaces, frames of one CPU stay
    /// in order, also those of different senders.
    pub fn send<'a>(&self, frames: impl IntoIterator<Item = &'a [u8]> + Send) -> Result<()> {
        Self::on_one_cpu(|| frames.into_iter().try_for_each(|frame| self.0.send(frame)))
    }

    /// The same for one frame, whose checksum the device that it leaves by has to make.
    pub fn send_unsummed(&self, frame: &Unsummed) -> Result<()> {
        Self::on_one_cpu(|| self.0.send_unsummed(&frame.bytes, frame.start, frame.offset))
    }

    fn on_one_cpu(send: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        std::thread::scope(|scope| {
            let sending = scope.spawn(|| stay_on_one_cpu().and_then(|()| send()));
            sending.join().unwrap_or_else(|panic| bail!("a sender panicked: {}", panic_text(&*panic)))
        })
    }
}

/// Sends frames out of an interface of a namespace, as [`RawPort::send`] does.
pub fn send<'a>(from: &Netns, interface: &str, frames: impl IntoIterator<Item = &'a [u8]> + Send) -> Result<()> {
    RawPort::open(from, interface)?.send(frames)
}

/// Binds the calling thread to the first CPU that the process may use.
pub fn stay_on_one_cpu() -> Result<()> {
    let myself = Pid::from_raw(0);
    let allowed = sched_getaffinity(myself).context("cannot read the CPU affinity")?;
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or_default());
    let mut one = CpuSet::new();
    one.set(first.context("no CPU is allowed")?)?;
    sched_setaffinity(myself, &one).context("cannot set the CPU affinity")
}

/// The MAC address of an interface.
pub fn mac_of(netns: &Netns, interface: &str) -> Result<[u8; 6]> {
    let links = netns.exec("ip", &["-j", "link", "show", "dev", interface])?;
    let links: serde_json::Value = serde_json::from_str(&links).context("ip -j printed no JSON")?;
    parse_mac(links[0]["address"].as_str().unwrap_or_default()).with_context(|| format!("no MAC of {interface}"))
}

/// The MAC by which an interface reaches a neighbour.
pub fn neighbour_mac(netns: &Netns, interface: &str, address: IpAddr) -> Result<[u8; 6]> {
    let text = netns.exec("ip", &["-j", "neigh", "show", "dev", interface])?;
    let all: serde_json::Value = serde_json::from_str(&text).context("ip -j printed no JSON")?;
    let wanted = address.to_string();
    all.as_array()
        .and_then(|all| all.iter().find(|n| n["dst"] == wanted.as_str()))
        .and_then(|n| parse_mac(n["lladdr"].as_str()?))
        .with_context(|| format!("{interface} of {} has no neighbour {wanted}: {text}", netns.name()))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|b| u8::from_str_radix(b, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_sound_packets() -> Result<()> {
        let macs = Macs { from: [2, 0, 0, 0, 0, 1], to: [2, 0, 0, 0, 0, 2] };
        for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse()?, to.parse()?);
            for frame in [udp(macs, from, to, b"abc")?, tcp_syn(macs, from, to)?, echo(macs, from.ip(), to.ip())?] {
                crate::check::checksums(&frame, false)?;
                crate::check::checksums(&port_unreachable(macs, to.ip(), from.ip(), &frame)?, false)?;
                crate::check::checksums(&source_routed(&frame, to.ip())?, false)?;
            }
            for kind in Probe::ALL {
                crate::check::checksums(&probe(kind, macs, from, to, b"abc")?, false)?;
            }
        }
        assert!(udp(macs, "10.0.0.1:1".parse()?, "[fd00::2]:2".parse()?, b"").is_err());
        Ok(())
    }

    #[test]
    fn tags_stand_between_the_addresses_and_the_ethertype() {
        let macs = Macs { from: [1; 6], to: [2; 6] };
        let frame = tagged(&other(macs, 0x0800, b"x"), &[(0x88a8, 7), (0x8100, 0x2064)]);
        let tags = [0x88, 0xa8, 0, 7, 0x81, 0, 0x20, 0x64, 8, 0, b'x'];
        assert_eq!(frame, [&[2; 6][..], &[1; 6], &tags].concat());
    }

    #[test]
    fn reads_macs() {
        assert_eq!(parse_mac("02:00:00:00:00:ff"), Some([2, 0, 0, 0, 0, 255]));
        assert_eq!(parse_mac("02:00"), None);
        assert_eq!(parse_mac(""), None);
    }
}
