//! Packets of rare forms: without a length, options behind the fragment header, extension headers
//! beyond the packet, and protocols that have no ports but a checksum.

use crate::flows::{PORT, Proto, at_backend, from_a, later};
use crate::frame::{Frame, L4, Piece, transport_sum};
use crate::harness::{Lab, MAC_HOST, MAC_OUT, Net, POD_A, REDIRECT, SHOT, UPLINK, labs};
use anyhow::{Context, Result, ensure};
use etherparse::checksum::Sum16BitWords;
use rustnet_common::config::mark;
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use testkit::datapath::Input;

/// BIG TCP: a frame that stands for more than 64 KiB has no total length (IPv4) or payload length
/// (IPv6, with and without the jumbo option of RFC 2675).
#[test]
fn big_tcp_has_no_length() -> Result<()> {
    labs(|lab, net| {
        let jumbo = |f: &Frame| {
            let l4 = f.map(|f| f.extensions.clear()).ip_bytes().len() - 40;
            let len = (l4 + 8) as u32;
            f.map(|f| f.extensions = vec![(0, [&[0, 0, 0xc2, 4][..], &len.to_be_bytes()].concat())])
        };
        let plain = |f: &Frame| f.clone();
        let forms: &[&dyn Fn(&Frame) -> Frame] = if net == Net::V4 { &[&plain] } else { &[&plain, &jumbo] };
        for (i, form) in forms.iter().enumerate() {
            let ask = from_a(net, Proto::Tcp, (net.world(), 443));
            let left = ask.hop().map(|f| f.src = net.node());
            lab.pod_sends(&ask)?.onto_wire(&left)?;
            let big = form(&later(&left.reply()).with_length(3000));
            let arrives = big.hop().map(|f| f.dst = net.a());
            big_passes(lab, hook::UPLINK_IN, UPLINK, &big, &arrives, 0).with_context(|| format!("form {i}, in"))?;
            let big = form(&later(&ask).with_length(3000));
            let leaves = big.hop().map(|f| f.src = net.node());
            big_passes(lab, hook::FROM_POD, POD_A, &big, &leaves, mark::DEFAULT)
                .with_context(|| format!("form {i}, out"))?;
        }
        // Without segments it is no such frame.
        let f = later(&from_a(net, Proto::Tcp, (net.world(), 443)));
        let bytes = lengthless(&f);
        let shot = lab.raw(hook::FROM_POD, &Input { frame: &bytes, ifindex: POD_A, ..Input::default() })?;
        shot.dropped(DropReason::Malformed)
    })
}

/// The frame with the length of its IP header zero, and the header's checksum right.
fn lengthless(f: &Frame) -> Vec<u8> {
    let mut bytes = f.bytes();
    if f.is_v6() {
        bytes[18..20].fill(0);
    } else {
        bytes[16..18].fill(0);
        bytes[24..26].fill(0);
        let sum = Sum16BitWords::new().add_slice(&bytes[14..34]).ones_complement();
        bytes[24..26].copy_from_slice(&sum.to_ne_bytes());
    }
    bytes
}

fn big_passes(lab: &Lab, code: u8, ifindex: u32, f: &Frame, want: &Frame, mark: u32) -> Result<()> {
    let bytes = lengthless(f);
    let shot = lab.raw(code, &Input { frame: &bytes, ifindex, gso_size: 1200, ..Input::default() })?;
    ensure!(shot.verdict == REDIRECT, "verdict {}, counted {:?}", shot.verdict, shot.counted);
    ensure!(shot.mark == mark, "mark {:#x}", shot.mark);
    ensure!(shot.frame == lengthless(want), "the frame is\n{:02x?}, not\n{:02x?}", shot.frame, lengthless(want));
    Ok(())
}

/// An IPv6 datagram with options behind the fragment header: of its pieces, the first names the
/// transport and the others name the options (RFC 8200, 4.5).
#[test]
fn fragments_with_options_behind() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        // The fragmentable part: destination options, then UDP.
        let behind = |f: &Frame| {
            let mut payload = vec![17, 0, 1, 4, 0, 0, 0, 0];
            payload.extend(&f.ip_bytes()[40..]);
            f.map(|f| (f.l4, f.payload) = (L4::Other(60), payload))
        };
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let to_service = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.payload = vec![7; 2000]);
        let arrives = at_backend(net, &to_service, net.b());
        let cuts = [800, 1600];
        for (f, want) in behind(&to_service).pieces(1, &cuts).iter().zip(behind(&arrives).pieces(1, &cuts)) {
            lab.pod_sends(f)?.to_the_pod(&want).with_context(|| format!("to a service, {:?}", f.piece))?;
        }
        let to_world = to_service.map(|f| f.dst = net.world());
        let leaves = to_world.hop().map(|f| f.src = net.node());
        for (f, want) in behind(&to_world).pieces(2, &cuts).iter().zip(behind(&leaves).pieces(2, &cuts)) {
            lab.pod_sends(f)?.onto_wire(&want).with_context(|| format!("to the world, {:?}", f.piece))?;
        }
        let answer = leaves.reply();
        let back = answer.hop().map(|f| f.dst = net.a());
        for (f, want) in behind(&answer).pieces(3, &cuts).iter().zip(behind(&back).pieces(3, &cuts)) {
            lab.uplink_in(f)?.to_the_pod(&want).with_context(|| format!("from the world, {:?}", f.piece))?;
        }
        Ok(())
    })
}

/// A later piece that overlaps the TCP header (RFC 3128), while its fragment header names the
/// options in front of it: what the first piece has said counts.
#[test]
fn pieces_that_overlap_tcp_behind_options() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let tcp = later(&from_a(net, Proto::Tcp, (net.b(), 80))).map(|f| f.payload = vec![7; 2000]);
        let mut payload = vec![6, 0, 1, 4, 0, 0, 0, 0];
        payload.extend(&tcp.ip_bytes()[40..]);
        let pieces = tcp.map(|f| (f.l4, f.payload) = (L4::Other(60), payload)).pieces(4, &[800, 1600]);
        lab.pod_sends(&pieces[0])?.to_the_pod(&pieces[0].hop())?;
        for from in [8, 16] {
            let f = pieces[1].map(|f| f.piece = Some(Piece { id: 4, from, to: 800, more: true }));
            let shot = lab.raw(hook::FROM_POD, &Input { frame: &f.bytes(), ifindex: POD_A, ..Input::default() })?;
            shot.dropped(DropReason::Malformed).with_context(|| format!("from byte {from} on"))?;
        }
        lab.pod_sends(&pieces[1])?.to_the_pod(&pieces[1].hop())
    })
}

/// IPv6 extension headers that reach beyond their packet: whatever stands there is not what a
/// receiver reads.
#[test]
fn extension_headers_beyond_the_packet() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        for kind in [0, 43, 51, 60] {
            for words in [5, 10, 30] {
                let header = [vec![50, words, 1, 4], vec![0; 20]].concat();
                for dst in [net.b(), net.far(), net.world()] {
                    let f = from_a(net, Proto::Udp, (dst, 0)).map(|f| {
                        (f.l4, f.payload, f.padding) = (L4::Other(kind), header.clone(), 300);
                    });
                    let bytes = f.bytes();
                    lab.raw(hook::FROM_POD, &Input { frame: &bytes, ifindex: POD_A, ..Input::default() })?
                        .dropped(DropReason::Malformed)
                        .with_context(|| format!("header {kind} of {words} words to {dst}"))?;
                }
            }
        }
        ensure!(lab.halves()? == 0, "tracked");
        Ok(())
    })
}

/// A datagram of UDP-Lite, whose checksum covers its first bytes only (0: all of it), or of DCCP.
fn covered(net: Net, proto: u8, coverage: usize, src: IpAddr, dst: IpAddr) -> Frame {
    let mut l4 = [&PORT.to_be_bytes()[..], &443_u16.to_be_bytes()].concat();
    l4.extend(if proto == 136 { (coverage as u16).to_be_bytes() } else { [4, 0] });
    l4.extend([0, 0, 4, 1, 0, 0, 0, 7, 0, 0]);
    l4.extend(b"data of an odd length");
    let len = l4.len();
    let covered = if coverage == 0 { len } else { coverage };
    // The pseudo header has the length of all, whatever is covered.
    let sum = transport_sum(src, dst, proto, &l4[..covered]).add_2bytes((!(covered as u16)).to_be_bytes());
    let sum = sum.add_2bytes((len as u16).to_be_bytes()).ones_complement();
    l4[6..8].copy_from_slice(&sum.to_ne_bytes());
    from_a(net, Proto::Udp, (dst, 0)).map(|f| {
        f.src = src;
        (f.l4, f.payload) = (L4::Other(proto), l4);
    })
}

/// Protocols whose checksum covers addresses: translated with it, or refused; never sent with a
/// wrong one.
#[test]
fn checksums_of_rare_protocols() -> Result<()> {
    labs(|lab, net| {
        for (proto, coverage) in [(136, 0), (136, 8), (136, 12), (136, 37), (33, 0)] {
            lab.forget()?;
            let f = covered(net, proto, coverage, net.a(), net.world());
            let shot = lab.pod_sends(&f)?;
            let place = || format!("protocol {proto}, {coverage} bytes covered");
            if shot.verdict == SHOT {
                continue;
            }
            let left = covered(net, proto, coverage, net.node(), net.world()).hop();
            shot.onto_wire(&left).with_context(place)?;
            let answer = covered(net, proto, coverage, net.world(), net.node()).map(|f| {
                (f.smac, f.dmac) = (MAC_OUT, MAC_HOST);
            });
            let want = covered(net, proto, coverage, net.world(), net.a()).hop().map(|f| {
                (f.smac, f.dmac) = (MAC_OUT, MAC_HOST);
            });
            lab.uplink_in(&answer)?.to_the_pod(&want).with_context(place)?;
        }
        Ok(())
    })
}

/// A packet of a rare protocol that ends before its checksum, with bytes behind the IP packet:
/// these stay what they are.
#[test]
fn rare_protocols_cut_short() -> Result<()> {
    labs(|lab, net| {
        for proto in [136, 33] {
            for len in 0..8 {
                lab.forget()?;
                let f = from_a(net, Proto::Udp, (net.world(), 0)).map(|f| {
                    (f.l4, f.payload, f.padding) = (L4::Other(proto), vec![0xa5; len], 20);
                });
                let shot = lab.pod_sends(&f)?;
                if shot.verdict != SHOT {
                    let left = f.hop().map(|f| f.src = net.node());
                    shot.onto_wire(&left).with_context(|| format!("protocol {proto}, {len} bytes"))?;
                }
            }
        }
        Ok(())
    })
}

/// ICMPv6 in IPv4 is a protocol without a checksum that anybody knows: its bytes stay.
#[test]
fn icmp_of_the_other_family() -> Result<()> {
    labs(|lab, net| {
        let proto = if net == Net::V4 { 58 } else { 1 };
        let payload = [&[128, 0, 0x12, 0x34, 0, 7, 0, 1][..], b"as it is"].concat();
        let f = from_a(net, Proto::Udp, (net.world(), 0)).map(|f| (f.l4, f.payload) = (L4::Other(proto), payload));
        let bytes = f.bytes();
        let shot = lab.raw(hook::FROM_POD, &Input { frame: &bytes, ifindex: POD_A, ..Input::default() })?;
        if shot.verdict == SHOT {
            return Ok(());
        }
        let left = f.hop().map(|f| f.src = net.node()).bytes();
        ensure!(shot.frame == left, "the frame is\n{:02x?}, not\n{left:02x?}", shot.frame);
        Ok(())
    })
}
