//! An independent check of every checksum in a frame, by etherparse's arithmetic: IPv4 header, TCP, UDP, ICMP, ICMPv6,
//! the frame inside a VXLAN packet, and the IPv4 header that an ICMP error quotes.

use anyhow::{Result, bail};
use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice, ip_number};

/// UDP port of the overlay.
pub const VXLAN_PORT: u16 = 8472;
/// VXLAN's header (RFC 7348, 5).
const VXLAN_HEADER: usize = 8;

/// Verifies a frame. `partial`: the sender left the innermost transport checksum to the hardware; then its field has to
/// hold the sum of the pseudo header, as the kernel's `CHECKSUM_PARTIAL` wants it.
pub fn checksums(frame: &[u8], partial: bool) -> Result<()> {
    let packet = match SlicedPacket::from_ethernet(frame) {
        Ok(packet) => packet,
        Err(e) => bail!("not parsable: {e}"),
    };
    let (pseudo, payload) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            if Sum16BitWords::new().add_slice(header.slice()).ones_complement() != 0 {
                bail!("IPv4 header checksum {:#06x} is wrong", header.header_checksum());
            }
            (Sum16BitWords::new().add_4bytes(header.source()).add_4bytes(header.destination()), ip.payload())
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            (Sum16BitWords::new().add_16bytes(header.source()).add_16bytes(header.destination()), ip.payload())
        }
        _ => return Ok(()),
    };
    if payload.fragmented {
        return Ok(());
    }
    let data = payload.payload;
    let mut pseudo = pseudo;
    let pseudo = pseudo.add_4bytes((data.len() as u32).to_be_bytes()).add_2bytes([0, payload.ip_number.0]);
    match (&packet.transport, payload.ip_number) {
        (Some(TransportSlice::Udp(udp)), _) if udp.destination_port() == VXLAN_PORT => {
            if udp.checksum() != 0 && pseudo.add_slice(data).ones_complement() != 0 {
                bail!("UDP checksum {:#06x} of the tunnel is wrong", udp.checksum());
            }
            match udp.payload().get(VXLAN_HEADER..) {
                Some(inner) => checksums(inner, partial),
                None => bail!("a tunnel packet of {} bytes", udp.payload().len()),
            }
        }
        (Some(TransportSlice::Udp(udp)), _) if udp.checksum() == 0 => match packet.net {
            Some(NetSlice::Ipv4(_)) => Ok(()),
            _ => bail!("UDP without checksum over IPv6 (RFC 8200, 8.1)"),
        },
        (Some(TransportSlice::Udp(udp)), _) => transport("UDP", udp.checksum(), pseudo, data, partial),
        (Some(TransportSlice::Tcp(tcp)), _) => transport("TCP", tcp.checksum(), pseudo, data, partial),
        // No device finishes checksums of ICMP.
        (Some(TransportSlice::Icmpv6(icmp)), _) if matches!(packet.net, Some(NetSlice::Ipv6(_))) => {
            transport("ICMPv6", icmp.checksum(), pseudo, data, false)
        }
        (Some(TransportSlice::Icmpv4(icmp)), _) => {
            transport("ICMP", icmp.checksum(), Sum16BitWords::new(), data, false)?;
            quoted(data)
        }
        (None, ip_number::TCP | ip_number::UDP | ip_number::ICMP | ip_number::IPV6_ICMP) => {
            bail!("no transport header in {} bytes", data.len())
        }
        _ => Ok(()),
    }
}

fn transport(name: &str, field: u16, pseudo: Sum16BitWords, data: &[u8], partial: bool) -> Result<()> {
    if partial {
        // The field holds the pseudo header's sum, not complemented.
        let expected = u16::from_be(!pseudo.ones_complement());
        if field != expected {
            bail!("{name} checksum {field:#06x}, to be finished by the device, should be {expected:#06x}");
        }
    } else if pseudo.add_slice(data).ones_complement() != 0 {
        bail!("{name} checksum {field:#06x} is wrong");
    }
    Ok(())
}

/// The IPv4 header behind an ICMP error has to be sound as well.
fn quoted(icmp: &[u8]) -> Result<()> {
    let (Some(3 | 11 | 12), Some(quoted)) = (icmp.first(), icmp.get(8..)) else { return Ok(()) };
    let header = quoted.first().map_or(0, |b| usize::from(b & 15) * 4);
    match quoted.get(..header) {
        Some(header) if Sum16BitWords::new().add_slice(header).ones_complement() == 0 => Ok(()),
        Some(_) => bail!("the IPv4 header that an ICMP error quotes has a wrong checksum"),
        None => bail!("an ICMP error quotes {} bytes", quoted.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    fn frames() -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let macs = || PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let v4 = || macs().ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        let v6 = || macs().ipv6([0xfd; 16], [0xfe; 16], 64);
        let payload = b"odd length of text!";
        for frame in [&mut Vec::new(), &mut Vec::new(), &mut Vec::new(), &mut Vec::new(), &mut Vec::new()]
            .into_iter()
            .enumerate()
            .map(|(i, out)| -> Result<Vec<u8>> {
                match i {
                    0 => v4().tcp(1, 2, 3, 4).write(out, payload)?,
                    1 => v4().udp(1, 2).write(out, payload)?,
                    2 => v6().tcp(1, 2, 3, 4).write(out, payload)?,
                    3 => v4().icmpv4_echo_request(1, 2).write(out, payload)?,
                    _ => v6().icmpv6_echo_request(1, 2).write(out, payload)?,
                }
                Ok(std::mem::take(out))
            })
        {
            frames.push(frame?);
        }
        Ok(frames)
    }

    #[test]
    fn accepts_what_is_right_and_finds_each_flipped_bit() -> Result<()> {
        for frame in frames()? {
            checksums(&frame, false)?;
            for at in [frame.len() - 1, frame.len() - 2, frame.len() - 8] {
                let mut broken = frame.clone();
                broken[at] ^= 4;
                assert!(checksums(&broken, false).is_err(), "bit flip at {at} of {frame:02x?}");
            }
        }
        Ok(())
    }

    #[test]
    fn looks_into_the_tunnel() -> Result<()> {
        for mut inner in frames()? {
            let wrap = |inner: &[u8]| -> Result<Vec<u8>> {
                let mut payload = vec![8, 0, 0, 0, 0, 0, 1, 0];
                payload.extend_from_slice(inner);
                let mut out = Vec::new();
                let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([172, 18, 0, 11], [172, 18, 0, 12], 64);
                builder.udp(40000, VXLAN_PORT).write(&mut out, &payload)?;
                // The tunnel sends without a checksum of its own.
                out[40..42].fill(0);
                Ok(out)
            };
            checksums(&wrap(&inner)?, false)?;
            if let Some(last) = inner.last_mut() {
                *last ^= 1;
            }
            assert!(checksums(&wrap(&inner)?, false).is_err());
        }
        Ok(())
    }
}
