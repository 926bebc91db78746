//! The overlay past its device, as the model sees it: frames get their outer headers and lose them on this side of the programs.
//! What a program leaves to the device takes the device's hook.

use std::net::IpAddr;

use anyhow::{Context, Result};
use rustnet_common::drop::hook;
use testkit::datapath::{Input, Output};

use super::model::{Broken, Case};
use super::run;
use crate::flows::{Proto, from_outside};
use crate::frame::{Frame, L4};
use crate::harness::{Lab, MAC_HOST, MAC_OUT, Net, REDIRECT, SHOT, STACK, UPLINK, VNI};
use crate::malformed::Random;

/// What became of a case, by which way.
pub struct Ran {
    pub out: Output,
    /// True for a packet that a program sent past the device.
    pub is_past: bool,
    /// A rule that the outer headers broke.
    pub broken: Option<Broken>,
}

impl Ran {
    pub fn by_device(out: Output) -> Self {
        Self { out, is_past: false, broken: None }
    }
}

fn net_of(ip: IpAddr) -> Net {
    if ip.is_ipv4() { Net::V4 } else { Net::V6 }
}

/// Runs a case where the programs write and take off the tunnel's headers.
pub fn run_past(lab: &Lab, case: &Case) -> Result<Ran> {
    match (case.hook, case.remote) {
        (hook::FROM_POD, _) => run(lab, case).map(leaves),
        // A tag would be the tunnel packet's.
        (hook::OVERLAY_IN, Some(remote)) if case.vlan.is_none() => arrives(lab, case, remote),
        _ => run(lab, case).map(Ran::by_device),
    }
}

/// A packet of a pod, without the outer headers if it has them.
fn leaves(mut out: Output) -> Ran {
    let found = [Net::V4, Net::V6].into_iter().find_map(|net| unwrap(net, &out.frame));
    let Some((inner, broken)) = found.filter(|_| out.verdict == REDIRECT) else { return Ran::by_device(out) };
    out.frame = inner;
    Ran { out, is_past: true, broken }
}

/// A packet that comes by the uplink. What the programs do not take, has to come to the device as it was.
fn arrives(lab: &Lab, case: &Case, remote: IpAddr) -> Result<Ran> {
    let mut frame = wrap(remote, case.vni, &case.bytes);
    // A network that is wrong already could become the right one.
    let forged = if case.vni == VNI { forge(&mut frame, remote, &case.bytes) } else { None };
    let input = Input { frame: &frame, ifindex: UPLINK, ..Input::default() };
    let mut out = lab.datapath().run(hook::NAMES[hook::UPLINK_IN as usize], &input)?.context("no sum was asked for")?;
    match out.verdict {
        STACK => {
            let broken = (out.frame != frame || out.mark != 0).then_some("a packet for the device is changed");
            if forged.is_some() {
                // What becomes of it in the kernel's hands is the kernel's.
                out.verdict = SHOT;
                return Ok(Ran { broken, ..Ran::by_device(out) });
            }
            Ok(Ran { broken, ..Ran::by_device(run(lab, case)?) })
        }
        _ if forged == Some(Forged::Essential) && out.verdict == REDIRECT => {
            Ok(Ran { broken: Some("a forged tunnel header is believed"), ..Ran::by_device(out) })
        }
        REDIRECT => {
            // The pod gets the outer MACs, which a pod does not look at, and the model no others than came in.
            let broken = (out.frame[..12] != frame[..12]).then_some("the outer MACs changed");
            out.frame[..12].copy_from_slice(&case.bytes[..12]);
            Ok(Ran { out, is_past: true, broken })
        }
        SHOT if forged.is_some() => Ok(Ran::by_device(out)),
        verdict => {
            let by_device = run(lab, case)?;
            let is_lost = verdict != SHOT || by_device.verdict != SHOT;
            Ok(Ran { broken: is_lost.then_some("a packet is lost past the device"), ..Ran::by_device(by_device) })
        }
    }
}

/// What was changed of a tunnel packet's headers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Forged {
    /// Sender, receiver, or what it is.
    Essential,
    /// What differs from packet to packet.
    Incidental,
}

/// Changes a byte of every fourth tunnel packet's headers, by the bytes that it has. Not those of the type of service: the inner packet
/// would bear the mark of congestion.
fn forge(frame: &mut [u8], remote: IpAddr, inner: &[u8]) -> Option<Forged> {
    let mut random = Random(inner.iter().fold(1, |sum, byte| sum * 31 % 0x00ff_ffff_ffff + u64::from(*byte)) | 1);
    if random.below(4) != 0 {
        return None;
    }
    let l4 = if remote.is_ipv4() { 34 } else { 54 };
    let at = random.below(l4 + 16);
    if matches!(at, 14 | 15) {
        return None;
    }
    frame[at] ^= 1 + random.below(255) as u8;
    let is_incidental = match at {
        // MAC of the last hop.
        6..12 => true,
        // Identification, hop limit, and a checksum that is the kernel's to verify.
        18 | 19 | 22 | 24 | 25 => remote.is_ipv4(),
        // "Don't fragment" and the bit that means nothing: neither makes it a fragment.
        20 if remote.is_ipv4() => frame[at].trailing_zeros() >= 6,
        // Flow label, hop limit.
        16 | 17 | 21 => remote.is_ipv6(),
        // Source port.
        at => at == l4 || at == l4 + 1,
    };
    Some(if is_incidental { Forged::Incidental } else { Forged::Essential })
}

/// A frame behind the headers of RFC 7348.
fn wrap(remote: IpAddr, vni: u32, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner);
    let base = from_outside(Proto::Udp, (remote, 50_000), (net_of(remote).node(), 8472));
    let l4 = L4::Udp { sport: 50_000, dport: 8472, checksum: false };
    Frame { smac: MAC_OUT, dmac: MAC_HOST, ttl: 63, flow: 0, l4, payload, may_be_cut: true, ..base }.bytes()
}

/// The frame inside, if this is a tunnel packet to the other node, and what is wrong with its headers.
fn unwrap(net: Net, frame: &[u8]) -> Option<(Vec<u8>, Option<Broken>)> {
    let (ip, version) = if net == Net::V4 { (20, 0x45) } else { (40, 0x60) };
    let (l4, inner) = (14 + ip, frame.get(14 + ip + 16..)?);
    let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ends = [octets(net.node()), octets(net.node2())].concat();
    let vxlan = [&[8, 0, 0, 0][..], &(VNI << 8).to_be_bytes()].concat();
    if frame[14] & 0xf0 != version & 0xf0
        || frame[l4 - ends.len()..l4] != ends
        || word(l4 + 2) != 8472
        || frame[l4 + 8..l4 + 16] != vxlan
    {
        return None;
    }
    let tos = |ip: &[u8]| if ip[0] >> 4 == 4 { ip[1] } else { ip[0] << 4 | ip[1] >> 4 };
    let ecn = |inner: u8| if inner & 3 == 3 { 2 } else { inner & 3 };
    let len = frame.len() - l4;
    let (proto, ttl, total) = if net == Net::V4 { (23, 22, len + ip) } else { (20, 21, len) };
    let is_right = frame[14] == version
        && tos(&frame[14..]) == ecn(tos(inner.get(14..16)?))
        && usize::from(word(if net == Net::V4 { 16 } else { 18 })) == total
        && (frame[proto], frame[ttl]) == (17, 64)
        && word(l4) >= 0xc000
        && usize::from(word(l4 + 4)) == len
        && word(l4 + 6) == 0
        && (net == Net::V6 || (word(20) == 0 && header_is_right(&frame[14..34])));
    Some((inner.to_vec(), (!is_right).then_some("a tunnel's header is wrong")))
}

/// True for an IPv4 header with a right checksum.
fn header_is_right(header: &[u8]) -> bool {
    let sum: u32 = header.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}
