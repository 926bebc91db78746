//! The overlay without its device: tunnel packets that lose their headers at the uplink, and those that the device gets.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use rustnet_common::config;
use rustnet_common::drop::hook;
use rustnet_common::endpoint;
use rustnet_common::peer::flags;
use testkit::datapath::Input;

use crate::encap::NEIGHBOURS;
use crate::flows::{PORT, Proto, TARGET, from_a};
use crate::frame::{Frame, L4, Piece};
use crate::harness::{BOTH, Lab, MAC_A, MAC_HOST, MAC_OUT, Net, POD_A, REDIRECT, SHOT, SIDE, STACK, VNI, lab_apart};

/// Runs a test for each family of pods in each of nodes. `ask` is what the other node's pod sends to pod A.
fn tunneled(test: impl Fn(&Lab, Net, Net, &Frame) -> Result<()> + Send + Sync) -> Result<()> {
    lab_apart(|lab| {
        // What is for another MAC is not for this host. A link that changes its address forgets its neighbours.
        lab.ip("link set eth0 address 02:00:00:00:ff:01")?;
        lab.ip(NEIGHBOURS)?;
        for (inner, outer) in BOTH.into_iter().flat_map(|inner| BOTH.map(|outer| (inner, outer))) {
            lab.reset()?;
            lab.configure(|c| c.flags |= config::flags::ENCAPSULATE)?;
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(outer.node2()))?;
            let ask = from_a(inner, Proto::Udp, (inner.far(), TARGET)).reply();
            let result = if inner == outer || lab.datapath().takes_off_other_family() {
                test(lab, inner, outer, &ask)
            } else {
                by_device(lab, inner, &self::outer(outer, &ask).bytes())
            };
            result.with_context(|| format!("{inner:?} in {outer:?}"))?;
        }
        Ok(())
    })
}

/// A tunnel packet of the other node.
pub fn outer(net: Net, inner: &Frame) -> Frame {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((VNI << 8).to_be_bytes());
    payload.extend(inner.bytes());
    let l4 = L4::Udp { sport: 50_000, dport: 8472, checksum: false };
    let (src, dst) = (net.node2(), net.node());
    let (smac, dmac) = (MAC_OUT, MAC_HOST);
    Frame { smac, dmac, src, dst, ttl: 63, flow: 0, l4, payload, may_be_cut: true, ..inner.clone() }
}

/// What the pod gets: the packet one hop further, behind the Ethernet header of the outer one.
fn received(inner: &Frame) -> Frame {
    inner.hop().map(|f| (f.smac, f.dmac) = (MAC_OUT, MAC_HOST))
}

#[test]
fn a_packet_loses_its_headers() -> Result<()> {
    tunneled(|lab, inner, net, _| {
        for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo] {
            let ask = from_a(inner, proto, (inner.far(), TARGET)).reply();
            for time in ["new", "known"] {
                let shot = lab.tunnel_in(&outer(net, &ask).bytes())?;
                shot.to_the_pod(&received(&ask)).with_context(|| format!("{proto:?}, {time}"))?;
            }
        }
        Ok(())
    })
}

/// A packet that goes back: it reaches the stack as it came, and no connection is opened for it here.
fn by_device(lab: &Lab, inner: Net, frame: &[u8]) -> Result<()> {
    let shot = lab.tunnel_in(frame)?;
    ensure!(shot.verdict == STACK, "verdict {}", shot.verdict);
    ensure!(shot.frame == frame, "the frame has changed");
    ensure!(shot.counted.is_empty(), "counted {:?}", shot.counted);
    ensure!(lab.connections(inner)?.is_empty(), "a connection was opened");
    Ok(())
}

/// The frame, as a router leaves it that marks congestion.
fn congested(net: Net, frame: &[u8]) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    if net == Net::V4 {
        bytes[15] = 3;
        let sum = u16::from_be_bytes([bytes[24], bytes[25]]) - 3;
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes[15] |= 3 << 4;
    }
    bytes
}

/// Congestion on the way becomes the inner packet's, if its sender understands it (RFC 6040, 4.2).
#[test]
fn congestion_reaches_the_pod() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        for (tos, want) in [(1, 3), (2, 3), (3, 3), (0xb9, 0xbb)] {
            let marked = |bytes: &mut [u8], tos: u8| {
                if inner == Net::V4 {
                    let sum = u16::from_be_bytes([bytes[24], bytes[25]]) - (u16::from(tos) - u16::from(bytes[15]));
                    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
                    bytes[15] = tos;
                } else {
                    bytes[14] = 0x60 | tos >> 4;
                    bytes[15] = bytes[15] & 0xf | tos << 4;
                }
            };
            let mut frame = outer(net, ask).bytes();
            let at = frame.len() - ask.bytes().len();
            marked(&mut frame[at..], tos);
            let mut expected = received(ask).bytes();
            marked(&mut expected, want);
            let shot = lab.tunnel_in(&congested(net, &frame))?;
            ensure!(shot.verdict == REDIRECT, "inner {tos:#x}: verdict {}", shot.verdict);
            ensure!(shot.frame == expected, "inner {tos:#x}: {:02x?}, not {expected:02x?}", shot.frame);
        }
        Ok(())
    })
}

/// Outer headers that the kernel has to judge.
#[test]
fn odd_outer_headers_are_the_devices() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        let good = outer(net, ask).bytes();
        let udp = if net == Net::V4 { 34 } else { 54 };
        let changed = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            bytes
        };
        let checksum = outer(net, ask).map(|f| f.l4 = L4::Udp { sport: 50_000, dport: 8472, checksum: true });
        for (what, frame) in [
            ("a checksum", checksum.bytes()),
            ("no identifier", changed(udp + 8, 0)),
            ("another flag", changed(udp + 8, 0x88)),
            ("a policy", changed(udp + 9, 0x08)),
            ("reserved bits", changed(udp + 11, 1)),
            ("another network", changed(udp + 14, VNI as u8 + 1)),
            ("reserved bits behind the network", changed(udp + 15, 1)),
            ("a tagged inner frame", changed(udp + 28, 0x81)),
            ("another MAC", changed(5, 2)),
            ("another port", changed(udp + 3, 0x19)),
        ] {
            by_device(lab, inner, &frame).with_context(|| what.to_owned())?;
        }
        let cut = good[..good.len() - 1].to_vec();
        ensure!(lab.tunnel_in(&cut)?.verdict == SHOT, "shorter than its headers say, which the uplink drops");
        let padded = [&good[..], &[0; 4]].concat();
        by_device(lab, inner, &padded).context("a trailer")?;
        by_device(lab, inner, &congested(net, &good)).context("congestion that the inner packet cannot bear")?;
        let input = Input { frame: &good, ifindex: SIDE, ..Input::default() };
        let shot = lab.run(hook::NAMES[hook::UPLINK_IN as usize], hook::TUNNEL_IN, &input)?;
        ensure!(shot.verdict == STACK && shot.frame == good, "by a device that does not lead to the sender");
        lab.configure(|_| {})?;
        by_device(lab, inner, &good).context("switched off")
    })
}

/// Inner packets that need an answer, another queue, or this node's stack.
#[test]
fn odd_inner_packets_are_the_devices() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        let piece = |from, to, more| ask.map(|f| f.piece = Some(Piece { id: 7, from, to, more }));
        for (what, packet) in [
            ("the last hop", ask.map(|f| f.ttl = 1)),
            ("a first fragment", piece(0, 16, true)),
            ("a later fragment", piece(16, 24, false)),
            ("an error", ask.map(|f| f.l4 = L4::Icmp { kind: if inner == Net::V4 { 3 } else { 1 }, code: 0, rest: 0 })),
            ("another node's pod", ask.map(|f| f.src = inner.routed())),
            ("no pod at all", ask.map(|f| f.src = inner.world())),
            ("this node's pod", ask.map(|f| f.src = inner.b())),
            ("for this node", ask.map(|f| f.dst = inner.node())),
            ("for nobody", ask.map(|f| f.dst = inner.nobody())),
            ("for another node", ask.map(|f| f.dst = inner.node2())),
            ("for a service", ask.map(|f| f.dst = inner.vip(1))),
        ] {
            by_device(lab, inner, &outer(net, &packet).bytes()).with_context(|| what.to_owned())?;
        }
        let forged = outer(net, ask).map(|f| f.src = net.router()).bytes();
        ensure!(lab.tunnel_in(&forged)?.verdict == SHOT, "no node at all, which the uplink drops");
        if net == Net::V6 {
            // The other node's IPv4 address as a mapped one: what looks the same in the maps.
            let IpAddr::V4(node) = Net::V4.node2() else { bail!("no IPv4 address") };
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(node.into()))?;
            let mapped = outer(net, ask).map(|f| f.src = node.to_ipv6_mapped().into()).bytes();
            ensure!(lab.tunnel_in(&mapped)?.verdict == SHOT, "a mapped address, which the uplink drops");
            lab.put_peer(inner.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(net.node2()))?;
        }
        lab.put_peer(net.router(), None, flags::NODE | flags::TUNNEL, Some(net.router()))?;
        by_device(lab, inner, &forged).context("another node")?;
        lab.put_endpoint_with(inner.a(), POD_A, MAC_A, endpoint::flags::VIA_QDISC)?;
        by_device(lab, inner, &outer(net, ask).bytes()).context("a pod of limited bandwidth")
    })
}

/// A packet of a known flow that goes back is followed once: by `overlay_in`.
#[test]
fn what_goes_back_is_not_counted() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        let good = outer(net, ask).bytes();
        lab.tunnel_in(&good)?.to_the_pod(&received(ask))?;
        let before = lab.connections(inner)?;
        lab.put_peer(net.router(), None, flags::NODE | flags::TUNNEL, Some(net.router()))?;
        let forged = outer(net, ask).map(|f| f.src = net.router()).bytes();
        ensure!(lab.tunnel_in(&forged)?.verdict == STACK, "another far end");
        ensure!(lab.tunnel_in(&outer(net, &ask.map(|f| f.ttl = 1)).bytes())?.verdict == STACK, "the last hop");
        ensure!(format!("{:?}", lab.connections(inner)?) == format!("{before:?}"), "followed");
        Ok(())
    })
}

/// One packet that goes back says nothing of the next one.
#[test]
fn the_next_packet_is_judged_by_itself() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        let good = outer(net, ask).bytes();
        for _ in 0..3 {
            by_device(lab, inner, &outer(net, &ask.map(|f| f.ttl = 1)).bytes())?;
        }
        lab.tunnel_in(&good)?.to_the_pod(&received(ask))
    })
}

/// The connection counts what the pod gets.
#[test]
fn the_tunnels_headers_are_not_counted() -> Result<()> {
    tunneled(|lab, inner, net, ask| {
        lab.tunnel_in(&outer(net, ask).bytes())?;
        lab.tunnel_in(&outer(net, ask).bytes())?;
        let connections = lab.connections(inner)?;
        let (_, half) = connections.first_key_value().context("no connection")?;
        ensure!(half.bytes == 2 * ask.bytes().len() as u64, "{half:?}");
        Ok(())
    })
}

/// Connections through services are translated on either way.
#[test]
fn answers_of_backends_are_translated_back() -> Result<()> {
    tunneled(|lab, inner, net, _| {
        lab.serve(inner.vip(1), 80, rustnet_common::tuple::proto::UDP, 0, &[(inner.far(), TARGET)])?;
        let ask = from_a(inner, Proto::Udp, (inner.vip(1), 80));
        lab.pod_sends_unsummed(&ask.bytes())?;
        let answer = ask.between((inner.a(), PORT), (inner.far(), TARGET)).reply();
        let want = received(&answer).between((inner.vip(1), 80), (inner.a(), PORT));
        lab.tunnel_in(&outer(net, &answer).bytes())?.to_the_pod(&want)
    })
}
