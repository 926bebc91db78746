//! Packets that are cut short, lie about their lengths, or were changed at random. Whatever they are: no verdict but drop,
//! stack or forward; what is forwarded has lengths that fit, and checksums as right as they were.

use crate::flows::{ALL, PORT, Proto, from_a, from_b, from_host, from_outside, later};
use crate::frame::{Frame, L4, transport_sum};
use crate::harness::{
    BOTH, Lab, MAC_A, MAC_HOST, Net, OVERLAY, POD_A, POD_B, REDIRECT, SHOT, STACK, UPLINK, VNI, lab, labs,
};
use anyhow::{Context, Result, bail, ensure};
use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket};
use rustnet_common::drop::{DropReason, hook};
use std::collections::BTreeMap;
use std::net::IpAddr;
use testkit::check;
use testkit::datapath::Input;

/// A packet, and where it comes in.
struct Case {
    hook: u8,
    ifindex: u32,
    tunnel: Option<IpAddr>,
    frame: Vec<u8>,
    /// Length without padding.
    len: usize,
}

/// One of everything that the tables elsewhere hold, with the state that it needs.
fn corpus(lab: &Lab) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for net in BOTH {
        for proto in [6, 17, 132] {
            lab.serve(net.vip(1), 80, proto, 0, &[(net.b(), 8080), (net.far(), 8080)])?;
            lab.serve(net.vip(2), 80, proto, 0, &[])?;
            lab.serve(net.vip(3), 80, proto, 0, &[(net.a(), 8080)])?;
            lab.serve(net.vip(4), 80, proto, 0, &[(net.node(), 8080)])?;
        }
        let mut add = |code: u8, f: Frame| {
            let (ifindex, tunnel) = match code {
                hook::FROM_POD if f.src == net.b() => (POD_B, None),
                hook::FROM_POD | hook::TO_POD => (POD_A, None),
                hook::UPLINK_IN | hook::UPLINK_OUT => (UPLINK, None),
                hook::OVERLAY_IN => (OVERLAY, Some(net.node2())),
                _ => (OVERLAY, None),
            };
            let frame = f.bytes();
            cases.push(Case { hook: code, ifindex, tunnel, len: frame.len() - f.padding, frame });
        };
        for proto in ALL {
            for dst in [
                net.b(),
                net.far(),
                net.routed(),
                net.world(),
                net.node(),
                net.vip(1),
                net.vip(2),
                net.vip(3),
                net.vip(4),
            ] {
                let f = from_a(net, proto, (dst, 80));
                add(hook::FROM_POD, f.clone());
                add(hook::FROM_POD, later(&f));
                add(hook::FROM_POD, f.map(|f| f.ttl = 1));
            }
            add(hook::FROM_POD, from_b(net, proto, (net.a(), PORT)).map(|f| f.set_ports(8080, PORT)));
            let answer = from_a(net, proto, (net.world(), 443)).map(|f| f.src = net.node()).reply();
            add(hook::UPLINK_IN, answer);
            add(hook::UPLINK_IN, from_outside(proto, (net.routed(), 1), (net.b(), 80)));
            add(hook::UPLINK_IN, from_outside(proto, (net.world(), 1), (net.vip(1), 80)));
            add(hook::OVERLAY_IN, from_outside(proto, (net.far(), 1), (net.a(), 80)));
            add(hook::OVERLAY_OUT, from_host(net, proto, (net.far(), 80)));
            add(hook::TO_POD, from_host(net, proto, (net.a(), 80)));
            for n in 1..=4 {
                add(hook::UPLINK_OUT, from_host(net, proto, (net.vip(n), 80)));
            }
        }
        let tcp = from_a(net, Proto::Tcp, (net.vip(1), 80));
        let big = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.payload = vec![7; 100]);
        add(hook::FROM_POD, tcp.map(|f| f.vlan = Some(5)));
        for piece in big.pieces(1, &[16, 48]) {
            add(hook::FROM_POD, piece);
        }
        match net {
            Net::V4 => add(hook::FROM_POD, tcp.map(|f| f.options = vec![1; 12])),
            Net::V6 => {
                let chain = [0, 60, 43, 51]
                    .map(|k| (k, vec![0, if k == 51 { 2 } else { 1 }, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
                add(hook::FROM_POD, tcp.map(|f| f.extensions = chain.to_vec()));
            }
        }
        // Errors about what was sent above.
        let (kind, rest) = if net == Net::V4 { (3, 0) } else { (1, 0) };
        for (quoted, src, code) in [
            (from_a(net, Proto::Udp, (net.world(), 80)).map(|f| f.src = net.node()), net.router(), hook::UPLINK_IN),
            (from_a(net, Proto::Tcp, (net.far(), 8080)), net.far(), hook::OVERLAY_IN),
            (from_b(net, Proto::Tcp, (net.a(), PORT)).map(|f| f.set_ports(80, PORT)), net.a(), hook::FROM_POD),
        ] {
            add(
                code,
                quoted.map(|f| {
                    (f.payload, f.dst, f.src) = (quoted.ip_bytes(), quoted.src, src);
                    (f.smac, f.dmac) = (MAC_A, MAC_HOST);
                    f.l4 = L4::Icmp { kind, code: 0, rest };
                }),
            );
        }
    }
    // Run all of it once, so that there are connections to hit.
    for case in &cases {
        judge(lab, case, &case.frame)?;
    }
    Ok(cases)
}

fn sound(frame: &[u8]) -> bool {
    check::checksums(frame, false).is_ok()
}

/// Runs a variant of a case and holds it against the rules above; gives the verdict.
fn judge(lab: &Lab, case: &Case, frame: &[u8]) -> Result<i32> {
    let (len, mut whole) = (frame.len(), frame.to_vec());
    // The kernel wants an IP header to begin with.
    whole.resize(len.max(64), 0);
    let cut = if whole.len() == len { 0 } else { len as u32 };
    let input = Input { frame: &whole, ifindex: case.ifindex, tunnel: case.tunnel, vni: VNI, cut, ..Input::default() };
    let out = lab.datapath().run(hook::NAMES[case.hook as usize], &input)?.context("no sum was asked for")?;
    match out.verdict {
        SHOT => {}
        STACK | REDIRECT => {
            lengths(&out.frame, out.verdict == REDIRECT)
                .and_then(|()| if sound(frame) { check::checksums(&out.frame, false) } else { Ok(()) })
                .with_context(|| {
                    format!("{} made\n{:02x?}\nof\n{frame:02x?}", hook::NAMES[case.hook as usize], out.frame)
                })?;
        }
        other => bail!("verdict {other} for {frame:02x?}"),
    }
    Ok(out.verdict)
}

/// What is forwarded says of itself no more than there is.
fn lengths(frame: &[u8], forwarded: bool) -> Result<()> {
    if !forwarded {
        return Ok(());
    }
    let packet = SlicedPacket::from_ethernet(frame).map_err(|e| anyhow::anyhow!("not parsable: {e}"));
    // Etherparse reads on into what the programs need not understand: only the network header has to be right.
    let at = if frame.get(12..14) == Some(&[0x81, 0]) { 18 } else { 14 };
    let ip = frame.get(at..).context("no IP header")?;
    let (len, least) = match ip.first().map(|b| b >> 4) {
        Some(4) if ip.len() >= 20 => (usize::from(u16::from_be_bytes([ip[2], ip[3]])), usize::from(ip[0] & 15) * 4),
        Some(6) if ip.len() >= 40 => (usize::from(u16::from_be_bytes([ip[4], ip[5]])) + 40, 40),
        _ => bail!("no IP packet: {packet:?}"),
    };
    ensure!(len <= ip.len() && len >= least && least >= 20, "an IP packet of {len} in {} bytes", ip.len());
    Ok(())
}

#[test]
fn the_corpus_itself() -> Result<()> {
    lab(|lab| {
        let mut verdicts = BTreeMap::<i32, u32>::new();
        for case in &corpus(lab)? {
            *verdicts.entry(judge(lab, case, &case.frame)?).or_default() += 1;
        }
        // It is worth something only if it reaches everything.
        ensure!(verdicts.len() == 3 && verdicts.values().all(|n| *n > 10), "{verdicts:?}");
        Ok(())
    })
}

#[test]
fn cut_short_at_every_length() -> Result<()> {
    lab(|lab| {
        for case in &corpus(lab)? {
            // A device hands over no less than an Ethernet header.
            for len in 14..case.len {
                let verdict = judge(lab, case, &case.frame[..len])?;
                ensure!(
                    verdict != REDIRECT,
                    "{} forwards {len} of {} bytes: {:02x?}",
                    hook::NAMES[case.hook as usize],
                    case.len,
                    case.frame
                );
            }
        }
        Ok(())
    })
}

/// At a pod's door, what is cut short is dropped and counted: nothing behind it has to parse it.
#[test]
fn cut_short_from_a_pod_is_counted() -> Result<()> {
    labs(|lab, net| {
        for proto in ALL {
            let f = from_a(net, proto, (net.b(), 80));
            let bytes = f.bytes();
            for len in 14..bytes.len() {
                let input = Input { frame: &bytes, ifindex: POD_A, cut: len as u32, ..Input::default() };
                lab.raw(hook::FROM_POD, &input)?
                    .dropped(DropReason::Malformed)
                    .with_context(|| format!("{proto:?}, {len} of {} bytes", bytes.len()))?;
            }
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

#[test]
fn headers_that_lie() -> Result<()> {
    lab(|lab| {
        let net = Net::V4;
        let at = |f: &Frame, changes: &[(usize, u8)]| {
            let mut bytes = f.bytes();
            for (i, b) in changes {
                bytes[*i] = *b;
            }
            bytes
        };
        let drop = |what: &str, frame: Vec<u8>, reason: DropReason| -> Result<()> {
            let input = Input { frame: &frame, ifindex: POD_A, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(reason).with_context(|| what.to_owned())
        };
        let f = from_a(net, Proto::Tcp, (net.b(), 80));
        for ihl in 0..5 {
            drop("header length below five words", at(&f, &[(14, 0x40 | ihl)]), DropReason::Malformed)?;
        }
        for ihl in 6..16 {
            drop("header length beyond the packet's", at(&f, &[(14, 0x40 | ihl)]), DropReason::Malformed)?;
        }
        for version in [0, 5, 6, 15] {
            drop("version", at(&f, &[(14, version << 4 | 5)]), DropReason::Malformed)?;
        }
        for total in (0..40_u16).chain([41, 1500, 65_535]) {
            let [hi, lo] = total.to_be_bytes();
            drop("total length", at(&f, &[(16, hi), (17, lo)]), DropReason::Malformed)?;
        }
        let net = Net::V6;
        let f = from_a(net, Proto::Tcp, (net.b(), 80));
        for version in [0, 4, 5, 7, 15] {
            drop("version", at(&f, &[(14, version << 4)]), DropReason::Malformed)?;
        }
        for payload in (0..20_u16).chain([21, 1500, 65_535]) {
            let [hi, lo] = payload.to_be_bytes();
            drop("payload length", at(&f, &[(18, hi), (19, lo)]), DropReason::Malformed)?;
        }
        // An extension header that is longer than the packet; one whose rest is missing.
        let f = f.map(|f| f.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])]);
        for words in 3..40 {
            drop("extension length", at(&f, &[(55, words)]), DropReason::Malformed)?;
        }
        for words in [60, 100, 255] {
            drop("extension length beyond what is followed", at(&f, &[(55, words)]), DropReason::InvalidExthdr)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// A generator that gives the same numbers on every machine (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) as usize * n) >> 32
    }
}

/// Makes checksums right again, as far as the packet can still be read: mutants with wrong ones would all look alike to a
/// check of checksums.
fn repair(frame: &mut [u8]) {
    let at = if frame.get(12..14) == Some(&[0x81, 0]) { 18 } else { 14 };
    if frame.get(at).is_none_or(|b| b >> 4 == 4) && frame.len() >= at + 20 {
        let header = usize::from(frame[at] & 15) * 4;
        if let Some(ip) = frame.get_mut(at..at + header)
            && header >= 20
        {
            ip[10..12].fill(0);
            let sum = Sum16BitWords::new().add_slice(ip).ones_complement();
            ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
    }
    let Some((at, sum)) = transport(frame) else { return };
    frame[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
}

/// Where the transport checksum stands, and what it should be.
fn transport(frame: &[u8]) -> Option<(usize, u16)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst, payload) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            (IpAddr::V4(ip.header().source_addr()), IpAddr::V4(ip.header().destination_addr()), ip.payload())
        }
        Some(NetSlice::Ipv6(ip)) => {
            (IpAddr::V6(ip.header().source_addr()), IpAddr::V6(ip.header().destination_addr()), ip.payload())
        }
        _ => return None,
    };
    let proto = payload.ip_number.0;
    let checksum = match proto {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return None,
    };
    let mut l4 = payload.payload.to_vec();
    if payload.fragmented {
        return None;
    }
    l4.get_mut(checksum..checksum + 2)?.fill(0);
    let at = payload.payload.as_ptr() as usize - frame.as_ptr() as usize + checksum;
    let sum = transport_sum(src, dst, proto, &l4).ones_complement();
    Some((at, if sum == 0 && proto == 17 { 0xffff } else { sum }))
}

pub fn mutate(random: &mut Random, original: &[u8]) -> Vec<u8> {
    const BYTES: [u8; 8] = [0, 1, 0x7f, 0x80, 0xff, 0x45, 0x60, 44];
    let mut frame = original.to_vec();
    for _ in 0..=random.below(4) {
        // Mostly the headers: nobody reads payload.
        let end = if random.below(8) == 0 { frame.len() } else { frame.len().min(80) };
        let i = random.below(end);
        match random.below(5) {
            0 => frame[i] ^= 1 << random.below(8),
            1 => frame[i] = random.next() as u8,
            2 => frame[i] = BYTES[random.below(BYTES.len())],
            3 => frame[i] = frame[i].wrapping_add(1),
            _ => frame[i] = frame[i].wrapping_sub(1),
        }
    }
    match random.below(8) {
        0 => frame.truncate(14 + random.below(frame.len() - 14)),
        1 => frame.resize(frame.len() + random.below(64), 0xcc),
        _ => {}
    }
    if random.below(2) == 0 {
        repair(&mut frame);
    }
    frame
}

/// Two hundred thousand of them; the seed and the number of the run stand in the failure's text.
#[test]
fn random_mutants() -> Result<()> {
    lab(|lab| {
        let runs: u64 = std::env::var("RUSTNET_MUTANTS").ok().and_then(|n| n.parse().ok()).unwrap_or(200_000);
        let corpus = corpus(lab)?;
        let mut random = Random(0x5eed_0000_0001);
        let mut forwarded = 0_u32;
        let mut forwarded_sound = 0_u32;
        for run in 0..runs {
            let case = &corpus[random.below(corpus.len())];
            let frame = mutate(&mut random, &case.frame);
            let verdict = judge(lab, case, &frame).with_context(|| format!("run {run}"))?;
            forwarded += u32::from(verdict == REDIRECT);
            forwarded_sound += u32::from(verdict == REDIRECT && sound(&frame));
        }
        // Mutants that all die at the first header would prove nothing.
        ensure!(u64::from(forwarded) > runs / 20, "only {forwarded} of {runs} were forwarded");
        ensure!(u64::from(forwarded_sound) > runs / 50, "only {forwarded_sound} of {runs} were sound and forwarded");
        Ok(())
    })
}
