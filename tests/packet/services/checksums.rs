//! Checksums of what is translated to a backend: UDP's none and zero, SCTP's CRC.

use super::{exchange, serve};
use crate::flows::{PORT, Proto, TARGET, VIP_PORT, at_backend, from_a};
use crate::frame::{Frame, L4};
use crate::harness::{Net, labs};
use anyhow::{Context, Result, ensure};

/// RFC 768: no checksum over IPv4 is no checksum afterwards; over IPv6 there always is one.
#[test]
fn udp_without_checksum_stays_without() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT))
            .map(|f| f.l4 = L4::Udp { sport: PORT, dport: VIP_PORT, checksum: false });
        exchange(lab, net, &ask).map(drop)
    })
}

/// A sender whose device computes the CRC leaves 0, and so must we; the device computes it over
/// what we made.
#[test]
fn sctp_without_crc_stays_without() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Sctp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Sctp, (net.vip(1), VIP_PORT))
            .map(|f| f.l4 = L4::Sctp { sport: PORT, dport: VIP_PORT, crc: false });
        lab.pod_sends(&ask)?.to_the_pod(&at_backend(net, &ask, net.b()))
    })
}

/// The CRC covers every length alike.
#[test]
fn sctp_of_many_lengths() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Sctp, net.vip(1), (net.b(), TARGET))?;
        for len in (0..40).chain([255, 256, 257, 1000, 1400]) {
            let ask = from_a(net, Proto::Sctp, (net.vip(1), VIP_PORT)).map(|f| f.payload = vec![len as u8; len]);
            let arrives = at_backend(net, &ask, net.b());
            lab.pod_sends(&ask)?.to_the_pod(&arrives).with_context(|| format!("{len} bytes"))?;
        }
        Ok(())
    })
}

/// A UDP checksum that becomes zero is sent as all ones, of every payload that there is.
#[test]
fn udp_checksums_never_become_none() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        let arrives = |f: &Frame| at_backend(net, f, net.b());
        let checksum = |f: &Frame| {
            let bytes = f.bytes();
            let at = if net == Net::V4 { 40 } else { 60 };
            u16::from_be_bytes([bytes[at], bytes[at + 1]])
        };
        // The payload's first word is chosen so that the checksum behind the translation is all
        // ones, then before it.
        for target in [&arrives as &dyn Fn(&Frame) -> Frame, &Frame::clone] {
            let plain = ask.map(|f| f.payload = vec![0, 0]);
            let word = checksum(&target(&plain));
            let full = plain.map(|f| f.payload = word.to_be_bytes().to_vec());
            ensure!(checksum(&target(&full)) == 0xffff, "the test's arithmetic");
            lab.pod_sends(&full)?.to_the_pod(&arrives(&full))?;
        }
        Ok(())
    })
}
