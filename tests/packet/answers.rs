//! What this node answers, and what it does with packets that it cannot send on as they are: errors that their receiver
//! accepts, none where none is due, and never too many.

use crate::flows::{PORT, Proto, SERVED, from_a, from_b, from_host, from_outside, later};
use crate::forged::ports_of;
use crate::frame::{FIN, Frame, L4, Piece, SYN, transport_sum};
use crate::harness::{
    BOTH, Flow, HZ, Lab, MAC_HOST, NARROW_MTU, Net, OVERLAY_MTU, POD_A, POD_B, REDIRECT, SHOT, STACK, UPLINK,
    lab_apart, labs,
};
use crate::icmp::{error, translated};
use crate::services::{icmp_error, reset};
use anyhow::{Context, Result, bail, ensure};
use etherparse::checksum::Sum16BitWords;
use rustnet_common::addr::{Ip4, Ip6};
use rustnet_common::config::NodeConfig;
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use testkit::datapath::Input;

/// Makes an IP packet of this length.
fn sized(f: &Frame, total: usize) -> Frame {
    let header = f.ip_bytes().len() - f.payload.len();
    f.map(|f| f.payload = vec![0x5a; total - header])
}

/// An error to the host in the host's own name is a martian to it: the service that it asked speaks.
#[test]
fn too_big_for_the_host() -> Result<()> {
    labs(|lab, net| {
        let (kind, code) = if net == Net::V4 { (3, 4) } else { (2, 0) };
        for proto in SERVED {
            for (n, backend, mtu) in [(1, net.far(), OVERLAY_MTU), (2, net.narrow(), NARROW_MTU)] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let ask = from_host(net, proto, (net.vip(n), 80));
                for known in [false, true] {
                    if known {
                        ensure!(lab.uplink_out(&ask)?.verdict == REDIRECT);
                    }
                    let f = sized(&later(&ask), mtu + 1);
                    let error = icmp_error(&f, net.vip(n), kind, code, mtu as u32);
                    lab.uplink_out(&f)?
                        .answered(DropReason::FragNeeded, &error)
                        .with_context(|| format!("{proto:?} to {backend}, known: {known}"))?;
                }
            }
        }
        Ok(())
    })
}

/// Loopback and "this network" are of no use beyond a machine: the host's local services would be reached by pods
/// (CVE-2020-8558).
#[test]
fn a_pod_to_loopback() -> Result<()> {
    labs(|lab, net| {
        let addresses: &[IpAddr] = match net {
            Net::V4 => &[[127, 0, 0, 1], [127, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3]].map(IpAddr::from),
            Net::V6 => &[net.ip([0; 4], "::1"), net.ip([0; 4], "::")],
        };
        for dst in addresses {
            for proto in crate::flows::ALL {
                let f = from_a(net, proto, (*dst, 10_248));
                let shot = lab.pod_sends(&f)?;
                shot.dropped(DropReason::Martian)
                    .or_else(|e| shot.dropped(DropReason::NoFib).map_err(|_| e))
                    .with_context(|| format!("{proto:?} to {dst}"))?;
            }
        }
        ensure!(lab.halves()? == 0, "tracked");
        Ok(())
    })
}

/// What the kernel's routes do not lead out of a device is the stack's as the pod sent it, and no translation stays behind that
/// would meet the stack's answer.
#[test]
fn no_way_leaves_no_translation() -> Result<()> {
    labs(|lab, net| {
        let (local, hole) = match net {
            Net::V4 => ("10.99.7.0/24", "10.99.8.0/24"),
            Net::V6 => ("fd00:99:7::/64", "fd00:99:8::/64"),
        };
        lab.ip(&format!("route replace local {local} dev lo\nroute replace blackhole {hole}"))?;
        for dst in [net.unreachable(), net.ip([10, 99, 7, 5], "fd00:99:7::5"), net.ip([10, 99, 8, 5], "fd00:99:8::5")] {
            for proto in crate::flows::ALL {
                let f = from_a(net, proto, (dst, if proto == Proto::Echo { 0 } else { 80 }));
                lab.pod_sends(&f)?.to_stack(&f).with_context(|| format!("{proto:?} to {dst}"))?;
                let halves = lab.halves()?;
                ensure!(halves == 0, "{proto:?} to {dst}: {halves} entries in the connection table");
            }
        }
        Ok(())
    })
}

/// A route that encapsulates is none that a redirect takes, nor one for the stack: it would send the pod's address out.
#[test]
fn a_way_that_encapsulates() -> Result<()> {
    labs(|lab, net| {
        lab.ip(match net {
            Net::V4 => "route replace 10.99.9.0/24 encap ip id 5 dst 172.18.0.13 dev eth0",
            Net::V6 => "route replace fd00:99:9::/64 encap ip6 id 5 dst fd00:18::13 dev eth0",
        })?;
        for proto in SERVED {
            let f = from_a(net, proto, (net.ip([10, 99, 9, 5], "fd00:99:9::5"), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?}"))?;
        }
        ensure!(lab.halves()? == 0, "tracked");
        Ok(())
    })
}

fn without_address(config: &mut NodeConfig) {
    config.node4 = Ip4::from_word(0);
    config.node6 = Ip6::from_words([0; 4]);
}

/// A node without an address of the family cannot lend it.
#[test]
fn a_node_without_address() -> Result<()> {
    labs(|lab, net| {
        lab.configure(without_address)?;
        for proto in SERVED {
            let f = from_a(net, proto, (net.world(), 443));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to the world"))?;
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.a(), 8080)])?;
            let f = from_a(net, proto, (net.vip(1), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to itself"))?;
            lab.serve(net.vip(2), 80, proto.number(net), 0, &[(net.world(), 8080)])?;
            let f = from_a(net, proto, (net.vip(2), 80));
            lab.pod_sends(&f)?.dropped(DropReason::NoFib).with_context(|| format!("{proto:?} to a service"))?;
        }
        ensure!(lab.halves()? == 0, "tracked");
        // Errors in the node's name are not sent, and counted as what they would have said.
        let f = from_a(net, Proto::Udp, (net.far(), 80));
        lab.pod_sends(&f.map(|f| f.ttl = 1))?.dropped(DropReason::TtlExceeded)?;
        lab.pod_sends(&sized(&f, OVERLAY_MTU + 1))?.dropped(DropReason::FragNeeded)?;
        // The rest goes on.
        lab.pod_sends(&f)?.onto_wire(&f.hop())
    })
}

/// An IPv4 packet that may be cut is cut: by the stack or by a device, and never refused (RFC 1191, 4). The kernel measures it
/// only where the neighbour is known.
#[test]
fn what_may_be_cut_is_not_refused() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        lab.ip("neigh replace 172.18.0.1 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent\n\
                neigh replace 172.18.0.13 lladdr 02:00:00:00:ee:01 dev eth0 nud permanent")?;
        let mut result = Ok(());
        for (dst, src) in [(net.routed(), net.a()), (net.narrow(), net.a())] {
            for size in [1519, 1600, 3000] {
                let f = sized(&from_a(net, Proto::Udp, (dst, 80)), size).map(|f| f.may_be_cut = true);
                let shot = lab.pod_sends(&f)?;
                let passed = match shot.verdict {
                    REDIRECT => shot.onto_wire(&f.hop().map(|f| f.src = src)),
                    // The stack cuts it, with the source that it has to leave with, and counts the hop itself.
                    STACK if shot.mark != 0 => shot.done_to_stack(&f.map(|f| f.src = src)),
                    STACK => shot.to_stack(&f.map(|f| f.src = src)),
                    verdict => Err(anyhow::anyhow!("verdict {verdict}, counted {:?}", shot.counted)),
                };
                result = result.and(passed.with_context(|| format!("{size} bytes to {dst}")));
            }
        }
        // The stack refuses a packet with its own source, so that nothing on this node can cut a masqueraded one.
        let f = sized(&from_a(net, Proto::Udp, (net.world(), 80)), 1519).map(|f| f.may_be_cut = true);
        result =
            result.and(lab.pod_sends(&f)?.answered(
                DropReason::FragNeeded,
                &icmp_error(&f, net.node(), 3, 4, 1500).map(|f| f.may_be_cut = false),
            ));
        lab.ip("neigh del 172.18.0.1 dev eth0\nneigh del 172.18.0.13 dev eth0")?;
        result
    })
}

/// BIG TCP: a frame that stands for more than 64 KiB has no total length (IPv4) or payload length (IPv6, with and without the
/// jumbo option of RFC 2675).
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
            let big = form(&sized(&later(&left.reply()), 3000));
            let arrives = big.hop().map(|f| f.dst = net.a());
            big_passes(lab, hook::UPLINK_IN, UPLINK, &big, &arrives, 0).with_context(|| format!("form {i}, in"))?;
            let big = form(&sized(&later(&ask), 3000));
            let leaves = big.hop().map(|f| f.src = net.node());
            let mark = rustnet_common::config::mark::DEFAULT;
            big_passes(lab, hook::FROM_POD, POD_A, &big, &leaves, mark).with_context(|| format!("form {i}, out"))?;
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

/// An IPv6 datagram with options behind the fragment header: of its pieces, the first names the transport and the others name
/// the options (RFC 8200, 4.5).
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
        let arrives = to_service.hop().between((net.a(), PORT), (net.b(), 8080));
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

/// A later piece that overlaps the TCP header (RFC 3128), while its fragment header names the options in front of it: what the first
/// piece has said counts.
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

/// Decorations between the IP header and TCP: IPv4 options of each length, IPv6 extension headers.
fn decorated(net: Net, f: &Frame) -> Vec<Frame> {
    match net {
        Net::V4 => (1..=10).map(|words| f.map(|f| f.options = vec![1; words * 4])).collect(),
        Net::V6 => {
            let pad = |kind, words: usize| {
                let mut bytes = vec![0; 8 + words * 8];
                (bytes[1], bytes[2], bytes[3]) = (words as u8, 1, (4 + words * 8) as u8);
                (kind, bytes)
            };
            [vec![pad(0, 0)], vec![pad(60, 0)], vec![pad(60, 5)], vec![pad(0, 1), pad(60, 2)], vec![pad(60, 10)]]
                .map(|chain| f.map(|f| f.extensions = chain))
                .to_vec()
        }
    }
}

/// A refusal of TCP has no options, whatever the segment had.
#[test]
fn resets_of_segments_with_options() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[])?;
        for flags in [SYN, SYN | FIN] {
            for data in [&b""[..], b"x", b"early data of a SYN"] {
                let ask =
                    from_a(net, Proto::Tcp, (net.vip(1), 80)).with_flags(flags).map(|f| f.payload = data.to_vec());
                for f in decorated(net, &ask) {
                    let place = || format!("{} + {:?}, {} bytes", f.options.len(), f.extensions, data.len());
                    lab.pod_sends(&f)?.answered(DropReason::NoBackend, &reset(&f)).with_context(place)?;
                    let host = f.map(|f| {
                        (f.smac, f.dmac) = (MAC_HOST, crate::harness::MAC_OUT);
                        f.src = net.node();
                    });
                    lab.uplink_out(&host)?.answered(DropReason::NoBackend, &reset(&host)).with_context(place)?;
                }
            }
        }
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

/// Protocols whose checksum covers addresses: translated with it, or refused; never sent with a wrong one.
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
                (f.smac, f.dmac) = (crate::harness::MAC_OUT, MAC_HOST);
            });
            let want = covered(net, proto, coverage, net.world(), net.a()).hop().map(|f| {
                (f.smac, f.dmac) = (crate::harness::MAC_OUT, MAC_HOST);
            });
            lab.uplink_in(&answer)?.to_the_pod(&want).with_context(place)?;
        }
        Ok(())
    })
}

/// A packet of a rare protocol that ends before its checksum, with bytes behind the IP packet: these stay what they are.
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

/// IPv6 extension headers that reach beyond their packet: whatever stands there is not what a receiver reads.
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

/// Sends a frame again and again; gives how often it was answered.
fn burst(lab: &Lab, code: u8, ifindex: u32, f: &Frame, reason: DropReason) -> Result<u64> {
    let bytes = f.bytes();
    let before = lab.datapath().counts()?;
    let mut answers = 0;
    for _ in 0..BURST {
        let input = Input { frame: &bytes, ifindex, ..Input::default() };
        let out = lab.datapath().run(hook::NAMES[code as usize], &input)?.context("no sum was asked for")?;
        match out.verdict {
            REDIRECT => answers += 1,
            SHOT => {}
            verdict => bail!("verdict {verdict}"),
        }
    }
    let count =
        |counts: &std::collections::BTreeMap<(u8, u8), u64>| counts.get(&(reason as u8, code)).copied().unwrap_or(0);
    let counted = count(&lab.datapath().counts()?) - count(&before);
    ensure!(counted == BURST, "{counted} of {BURST} are counted as {}", reason.name());
    Ok(answers)
}

const BURST: u64 = 8000;

/// A node limits the errors that it sends (RFC 4443, 2.4(f); RFC 1812, 4.3.2.8): a sender with a forged source would make it a
/// reflector, twice as loud.
#[test]
fn errors_are_limited() -> Result<()> {
    for net in BOTH {
        for kind in 0..4 {
            lab_apart(|lab| {
                lab.serve(net.vip(1), 80, 17, 0, &[])?;
                let (code, ifindex, f, reason) = match kind {
                    0 => {
                        let f = from_outside(Proto::Udp, (net.routed(), 1), (net.b(), 80)).map(|f| f.ttl = 1);
                        (hook::UPLINK_IN, UPLINK, f, DropReason::TtlExceeded)
                    }
                    1 => {
                        let f = from_a(net, Proto::Udp, (net.world(), 33_434)).map(|f| f.ttl = 1);
                        (hook::FROM_POD, POD_A, f, DropReason::TtlExceeded)
                    }
                    2 => (hook::FROM_POD, POD_A, from_a(net, Proto::Udp, (net.vip(1), 80)), DropReason::NoBackend),
                    _ => {
                        let f = sized(&from_a(net, Proto::Udp, (net.far(), 80)), OVERLAY_MTU + 1);
                        let all = burst(lab, hook::FROM_POD, POD_A, &f, DropReason::FragNeeded)?;
                        ensure!(all == BURST, "{net:?}: {all} of {BURST}: a pod's own packets are too big");
                        return Ok(());
                    }
                };
                let answers = burst(lab, code, ifindex, &f, reason)?;
                ensure!(answers > 0, "{net:?}: no error is sent at all for {}", reason.name());
                ensure!(answers < BURST / 2, "{net:?}: {answers} errors for {BURST} packets, {}", reason.name());
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The clock starts five minutes before its 32 bits wrap (`INITIAL_JIFFIES`), and the buckets of a new load start at 0: a time
/// that lies ahead. A bucket belongs to one CPU, where no time lies ahead of now: it is one of long ago.
#[test]
fn a_bucket_of_before_the_wrap_is_filled_again() -> Result<()> {
    lab_apart(|lab| {
        let net = Net::V4;
        lab.serve(net.vip(1), 80, 17, 0, &[])?;
        let ask = from_a(net, Proto::Udp, (net.b(), 80));
        lab.pod_sends(&ask)?;
        let now = lab.half(Flow::of(&ask))?.seen;
        let before_the_wrap = now.wrapping_add(200 * HZ);
        for bucket in 0..2 {
            lab.datapath().fill_percpu("rn_limits", bucket, [before_the_wrap, 1000])?;
        }
        let refused = from_a(net, Proto::Udp, (net.vip(1), 80));
        let answers = burst(lab, hook::FROM_POD, POD_A, &refused, DropReason::NoBackend)?;
        ensure!(answers > 0, "no error is sent until the clock wraps");
        ensure!(!lab.datapath().events().is_empty(), "no drop is recorded until the clock wraps");
        Ok(())
    })
}

/// A pod that asks for errors all the time does not take those of others: without "too big", a connection of theirs stands still.
#[test]
fn errors_of_one_pod_do_not_take_anothers() -> Result<()> {
    for net in BOTH {
        lab_apart(|lab| {
            let f = from_b(net, Proto::Udp, (net.world(), 33_434)).map(|f| f.ttl = 1);
            burst(lab, hook::FROM_POD, POD_B, &f, DropReason::TtlExceeded)?;
            let bytes = sized(&from_a(net, Proto::Udp, (net.far(), 80)), OVERLAY_MTU + 1).bytes();
            let input = Input { frame: &bytes, ifindex: POD_A, ..Input::default() };
            let out = lab.datapath().run(hook::NAMES[hook::FROM_POD as usize], &input)?;
            let verdict = out.context("no sum was asked for")?.verdict;
            ensure!(verdict == REDIRECT, "{net:?}: verdict {verdict}: no error for pod A");
            Ok(())
        })?;
    }
    Ok(())
}

/// The host complains about an answer of a service: to the backend that sent it, quoting what that has sent.
#[test]
fn errors_of_the_host_to_a_service() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            for (n, backend) in [(1, net.routed()), (2, net.world())] {
                lab.serve(net.vip(n), 80, proto.number(net), 0, &[(backend, 8080)])?;
                let ask = from_host(net, proto, (net.vip(n), 80));
                let shot = lab.uplink_out(&ask)?;
                let (port, _) = ports_of(net, &shot.frame)?;
                let left = ask.between((net.node(), port), (backend, 8080));
                shot.onto_wire(&left)?;
                let answer = left.reply();
                let seen = answer.between((net.vip(n), 80), (net.node(), PORT));
                lab.uplink_in(&answer)?.to_stack(&seen)?;
                for kind in if net == Net::V4 {
                    [(3, 3, 0), (3, 4, 1400), (11, 1, 0)]
                } else {
                    [(1, 4, 0), (2, 0, 1400), (3, 1, 0)]
                } {
                    let e = error(&seen, net.node(), kind, 1000)
                        .map(|f| (f.smac, f.dmac) = (MAC_HOST, crate::harness::MAC_OUT));
                    let want = translated(&e, &seen, &answer, net.node());
                    lab.uplink_out(&e)?.onto_wire(&want).with_context(|| format!("{proto:?} {kind:?} to {backend}"))?;
                }
            }
        }
        Ok(())
    })
}

/// Marks that others set (Calico: 0x01000000 is "seen"; kube-proxy, Cilium): no packet passes unchecked for one of them, and
/// each comes out as it went in.
#[test]
fn foreign_marks_open_no_door() -> Result<()> {
    const MARKS: [u32; 14] = [
        0x0100_0000,
        0x0300_0000,
        0x0340_0000,
        0x0500_0000,
        0x0710_0000,
        0x0001_0000,
        0x0008_0000,
        0x4000,
        0x8000,
        0x0200,
        0x0a00,
        0x0b00,
        0x0e00,
        0x1,
    ];
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.far(), 8080)])?;
        for mark in MARKS {
            let refused = [
                (
                    hook::UPLINK_IN,
                    UPLINK,
                    from_outside(Proto::Udp, (net.world(), 1), (net.vip(1), 80)),
                    DropReason::IsClusterIp,
                ),
                (
                    hook::UPLINK_IN,
                    UPLINK,
                    from_outside(Proto::Udp, (net.node(), 1), (net.a(), 80)),
                    DropReason::Spoofed,
                ),
                (
                    hook::OVERLAY_OUT,
                    crate::harness::OVERLAY,
                    from_host(net, Proto::Udp, (net.world(), 80)),
                    DropReason::NoFib,
                ),
                (hook::FROM_POD, POD_A, from_b(net, Proto::Udp, (net.a(), 80)), DropReason::Spoofed),
            ];
            for (code, ifindex, f, reason) in refused {
                let bytes = f.bytes();
                let shot = lab.raw(code, &Input { frame: &bytes, ifindex, mark, ..Input::default() })?;
                let place = || format!("mark {mark:#x} at {}", hook::NAMES[code as usize]);
                ensure!(
                    shot.verdict == SHOT && shot.counted.keys().eq([&(reason as u8, code)]),
                    "{}: {shot:?}",
                    place()
                );
            }
            // What is the stack's keeps its mark.
            let f = from_outside(Proto::Udp, (net.world(), 1), (net.node(), 22));
            let bytes = f.bytes();
            let shot = lab.raw(hook::UPLINK_IN, &Input { frame: &bytes, ifindex: UPLINK, mark, ..Input::default() })?;
            ensure!((shot.verdict, shot.mark) == (STACK, mark), "mark {mark:#x} became {:#x}", shot.mark);
            // What the host asks of a service is led to its backend.
            let f = from_host(net, Proto::Udp, (net.vip(1), 80));
            let bytes = f.bytes();
            let shot =
                lab.raw(hook::UPLINK_OUT, &Input { frame: &bytes, ifindex: UPLINK, mark, ..Input::default() })?;
            ensure!(shot.verdict == REDIRECT, "mark {mark:#x}: a service's packet leaves as it is");
        }
        Ok(())
    })
}
