//! Hand-made packets: built by etherparse, sent as they are through a packet socket.

use crate::netns::Netns;
use crate::raw::PacketSocket;
use anyhow::{Context, Result, bail};
use etherparse::{Ethernet2Header, PacketBuilder, PacketBuilderStep};
use std::net::{IpAddr, SocketAddr};
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

/// What a VXLAN sender would put into its datagram (RFC 7348, 5).
pub fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x08, 0, 0, 0];
    payload.extend_from_slice(&(vni << 8).to_be_bytes());
    payload.extend_from_slice(inner);
    payload
}

/// Sends frames out of an interface of a namespace.
pub fn send<'a>(from: &Netns, interface: &str, frames: impl IntoIterator<Item = &'a [u8]> + Send) -> Result<()> {
    from.run(|| {
        let socket = PacketSocket::open(interface)?;
        frames.into_iter().try_for_each(|frame| socket.send(frame))
    })?
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
            }
        }
        assert!(udp(macs, "10.0.0.1:1".parse()?, "[fd00::2]:2".parse()?, b"").is_err());
        Ok(())
    }

    #[test]
    fn reads_macs() {
        assert_eq!(parse_mac("02:00:00:00:00:ff"), Some([2, 0, 0, 0, 0, 255]));
        assert_eq!(parse_mac("02:00"), None);
        assert_eq!(parse_mac(""), None);
    }
}
