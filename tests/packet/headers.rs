//! What may stand between the Ethernet header and the ports: tags, options, extension headers, fragments.

use crate::errors::port_unreachable;
use crate::flows::{
    PORT, Proto, SERVED, answer_of_b, at_backend, at_client, from_a, from_b, from_host, from_outside, later,
};
use crate::frame::{Frame, L4};
use crate::harness::{Flow, Lab, MAC_B, Net, POD_A, UPLINK, each, labs};
use crate::services::exchange;
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use testkit::datapath::Input;

/// A service on pod B, for all protocols.
fn serve(lab: &Lab, net: Net) -> Result<()> {
    [6, 17, 132].into_iter().try_for_each(|p| lab.serve(net.vip(1), 80, p, 0, &[(net.b(), 8080)]).map(drop))
}

/// What `f`, sent to the service, arrives as.
fn arrived(net: Net, f: &Frame) -> Frame {
    at_backend(net, f, net.b())
}

/// Sends a packet with some decoration to the service, and the decorated answer back.
fn there_and_back(lab: &Lab, net: Net, proto: Proto, decorate: impl Fn(&mut Frame)) -> Result<()> {
    let ask = from_a(net, proto, (net.vip(1), 80)).map(&decorate);
    exchange(lab, net, &ask)?;
    let more = later(&ask);
    lab.pod_sends(&more)?.to_the_pod(&arrived(net, &more))
}

#[test]
fn a_vlan_tag_in_the_frame() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        // On the uplink it belongs to another device.
        let f = from_outside(Proto::Udp, (net.world(), 1), (net.vip(1), 80)).map(|f| f.vlan = Some(100));
        lab.uplink_in(&f)?.to_stack(&f)?;
        let f = from_host(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.vlan = Some(100));
        lab.uplink_out(&f)?.to_stack(&f)?;
        // A pod has no business with tags.
        for tag in [0, 100] {
            let f = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.vlan = Some(tag));
            lab.pod_sends(&f)?.dropped(DropReason::VlanFiltered)?;
        }
        Ok(())
    })
}

#[test]
fn ipv4_options_of_every_length() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        serve(lab, net)?;
        for words in 1..=10 {
            // Record route, padded: the kind that may be long (RFC 791).
            let options = |f: &mut Frame| {
                f.options = vec![1; words * 4];
                let len = f.options.len();
                f.options[..3].copy_from_slice(&[7, len as u8 - 1, 4]);
            };
            each(&SERVED, |proto| there_and_back(lab, net, proto, options))
                .with_context(|| format!("{words} words"))?;
            for proto in [Proto::Udp, Proto::Sctp] {
                let f = from_a(net, proto, (net.vip(1), 81)).map(options);
                lab.pod_sends(&f)?
                    .answered(DropReason::NoServicePort, &port_unreachable(&f))
                    .with_context(|| format!("a refusal that quotes {words} words of options"))?;
            }
        }
        Ok(())
    })
}

/// An extension header of a kind: with its least length, or `words` of eight bytes more.
fn extension(kind: u8, words: u8) -> (u8, Vec<u8>) {
    // The authentication header counts in words of four, less two (RFC 4302); of the least length it has 16 bytes.
    let (count, len) =
        if kind == 51 { (2 + 2 * words, 16 + 8 * words as usize) } else { (words, 8 + 8 * words as usize) };
    let mut bytes = vec![0; len];
    bytes[1] = count;
    if kind == 43 {
        // Segment routing: type 0 is refused (RFC 5095).
        bytes[2] = 4;
    }
    if matches!(kind, 0 | 60) {
        // PadN over the rest.
        (bytes[2], bytes[3]) = (1, len as u8 - 4);
    }
    (kind, bytes)
}

#[test]
fn ipv6_extension_headers() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        serve(lab, net)?;
        let chains: [&[u8]; 9] = [
            &[0],
            &[43],
            &[60],
            &[51],
            &[0, 60],
            &[0, 43, 60],
            &[0, 60, 43, 51],
            &[0, 60, 43, 51, 60],
            &[0, 60, 43, 51, 60, 60],
        ];
        for chain in chains {
            for words in [0, 1, 3] {
                let decorate = |f: &mut Frame| f.extensions = chain.iter().map(|k| extension(*k, words)).collect();
                each(&SERVED, |proto| there_and_back(lab, net, proto, decorate))
                    .with_context(|| format!("{chain:?}, {words}"))?;
            }
            let f = from_a(net, Proto::Udp, (net.vip(1), 81)).map(|f| {
                f.extensions = chain.iter().map(|k| extension(*k, 0)).collect();
            });
            lab.pod_sends(&f)?
                .answered(DropReason::NoServicePort, &port_unreachable(&f))
                .with_context(|| format!("a refusal that quotes {chain:?}"))?;
        }
        Ok(())
    })
}

/// Seven extension headers are more than is followed, and so is a chain that ends nowhere.
#[test]
fn longer_chains_are_refused() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        serve(lab, net)?;
        for words in [0, 2] {
            let f = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.extensions = vec![extension(60, words); 7]);
            lab.pod_sends(&f)?.dropped(DropReason::InvalidExthdr)?;
            lab.uplink_out(&f)?.to_stack(&f)?;
            // What comes from outside may be the host's own, and its stack knows better.
            let f = f.map(|f| (f.src, f.dst) = (net.world(), net.node()));
            lab.uplink_in(&f)?.to_stack(&f)?;
        }
        // One header, longer than any offset that is followed.
        let f = from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.extensions = vec![extension(60, 60)]);
        lab.pod_sends(&f)?.dropped(DropReason::InvalidExthdr)?;
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// The datagrams that are cut: UDP with data of its own in every fragment.
fn datagram(f: &Frame) -> Frame {
    f.map(|f| f.payload = (0..=250_u8).cycle().take(3000).collect())
}

#[test]
fn fragments_follow_their_first() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        let whole = datagram(&from_a(net, Proto::Udp, (net.vip(1), 80)));
        let arrives = arrived(net, &whole);
        for cuts in [vec![1448], vec![8, 16, 1448], vec![1400, 2800]] {
            for (f, want) in whole.pieces(0x1_0001, &cuts).iter().zip(arrives.pieces(0x1_0001, &cuts)) {
                lab.pod_sends(f)?.to_the_pod(&want).with_context(|| format!("{:?} of {cuts:?}", f.piece))?;
            }
        }
        // The answer is long, too.
        let answer = answer_of_b(&arrives);
        let back = at_client(net, &answer, 1);
        for (f, want) in answer.pieces(7, &[1440]).iter().zip(back.pieces(7, &[1440])) {
            lab.pod_sends(f)?.to_the_pod(&want)?;
        }
        ensure!(lab.connections(net)?.len() == 2, "fragments opened connections of their own");
        Ok(())
    })
}

/// Fragments that fit everywhere.
const CUTS: [usize; 2] = [1360, 2720];

#[test]
fn fragments_of_masqueraded_flows_and_through_the_overlay() -> Result<()> {
    labs(|lab, net| {
        let whole = datagram(&from_a(net, Proto::Udp, (net.world(), 53)));
        let leaves = whole.hop().between((net.node(), PORT), (net.world(), 53));
        for (f, want) in whole.pieces(9, &CUTS).iter().zip(leaves.pieces(9, &CUTS)) {
            lab.pod_sends(f)?.onto_wire(&want)?;
        }
        let answer = leaves.reply();
        let back = answer.hop().map(|f| f.dst = net.a());
        // Their checksums are the datagram's, and it takes all pieces to verify them.
        for (f, want) in answer.pieces(10, &CUTS).iter().zip(back.pieces(10, &CUTS)) {
            lab.uplink_in(f)?.to_the_pod(&want)?;
        }
        let whole = datagram(&from_a(net, Proto::Udp, (net.far(), 53)));
        let answer = whole.reply();
        for f in whole.pieces(11, &CUTS) {
            lab.pod_sends(&f)?.onto_wire(&f.hop())?;
        }
        for f in answer.pieces(12, &CUTS) {
            lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
        }
        // Echo is cut as well.
        let ping = datagram(&from_a(net, Proto::Echo, (net.world(), 0)));
        let leaves = ping.hop().map(|f| f.src = net.node());
        for (f, want) in ping.pieces(13, &CUTS).iter().zip(leaves.pieces(13, &CUTS)) {
            lab.pod_sends(f)?.onto_wire(&want)?;
        }
        let answer = leaves.reply();
        let back = answer.hop().map(|f| f.dst = net.a());
        for (f, want) in answer.pieces(14, &CUTS).iter().zip(back.pieces(14, &CUTS)) {
            lab.uplink_in(f)?.to_the_pod(&want)?;
        }
        Ok(())
    })
}

#[test]
fn a_later_fragment_without_its_first() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        let whole = datagram(&from_a(net, Proto::Udp, (net.vip(1), 80)));
        let [first, later] = whole.pieces(20, &[1440]).try_into().map_err(|_| anyhow::anyhow!("two pieces"))?;
        lab.pod_sends(&later)?.dropped(DropReason::FragNotFound)?;
        lab.pod_sends(&first)?.to_the_pod(&arrived(net, &first))?;
        lab.pod_sends(&later)?.to_the_pod(&arrived(net, &later))?;
        // Of another datagram, of another sender, of another protocol: not this one's.
        let other = whole.pieces(21, &[1440]).remove(1);
        lab.pod_sends(&other)?.dropped(DropReason::FragNotFound)?;
        let other = later.map(|f| (f.src, f.smac) = (net.b(), MAC_B));
        lab.pod_sends(&other)?.dropped(DropReason::FragNotFound)?;
        // Nor one by another interface, whoever its sender says to be.
        let other = later.map(|f| f.smac = MAC_B);
        lab.pod_sends(&other)?.dropped(DropReason::FragNotFound)?;
        if net == Net::V4 {
            // IPv6 fragments are identified without their protocol (RFC 8200, 4.5).
            let other = later.map(|f| f.l4 = L4::Sctp { sport: 1, dport: 2, crc: true });
            lab.pod_sends(&other)?.dropped(DropReason::FragNotFound)?;
        }
        // At the uplink it may be the host's.
        let other = from_outside(Proto::Udp, (net.world(), 1), (net.node(), 2));
        let later = datagram(&other).pieces(22, &[1440]).remove(1);
        lab.uplink_in(&later)?.to_stack(&later)
    })
}

/// Between pods, and from outside to a pod, addresses suffice.
#[test]
fn a_fragment_between_pods_needs_no_first() -> Result<()> {
    labs(|lab, net| {
        // The last one fits everywhere.
        let two = |f: &Frame, id| -> Result<[Frame; 2]> {
            let mut pieces = datagram(f).pieces(id, &[1440, 2400]);
            pieces.remove(1);
            pieces.try_into().map_err(|_| anyhow::anyhow!("two pieces"))
        };
        for (number, proto) in [Proto::Udp, Proto::Tcp, Proto::Sctp, Proto::Echo].into_iter().enumerate() {
            let id = 100 + 10 * number as u32;
            let [first, later] = two(&from_a(net, proto, (net.b(), 8080)), id)?;
            lab.pod_sends(&later)?.to_the_pod(&later.hop())?;
            ensure!(lab.connections(net)?.is_empty(), "it opened a connection");
            lab.pod_sends(&first)?.to_the_pod(&first.hop())?;
            lab.pod_sends(&later)?.to_the_pod(&later.hop())?;
            lab.forget()?;
            for to in [net.far(), net.routed()] {
                let [_, later] = two(&from_a(net, proto, (to, 8080)), id + 1)?;
                lab.pod_sends(&later)?.onto_wire(&later.hop())?;
            }
            let [_, later] = two(&from_outside(proto, (net.far(), PORT), (net.a(), 8080)), id + 2)?;
            lab.overlay_in(net.node2(), &later)?.to_the_pod(&later.hop())?;
            for from in [net.routed(), net.world()] {
                let [_, later] = two(&from_outside(proto, (from, PORT), (net.a(), 8080)), id + 3)?;
                lab.uplink_in(&later)?.to_the_pod(&later.hop())?;
            }
            ensure!(lab.connections(net)?.is_empty(), "one opened a connection");
        }
        Ok(())
    })
}

/// Who may not send the first fragment may not send the later ones.
#[test]
fn a_fragment_without_its_first_is_judged_by_its_addresses() -> Result<()> {
    labs(|lab, net| {
        let later = |f: &Frame| datagram(f).pieces(30, &[1440, 2400]).remove(2);
        let to = |dst| later(&from_a(net, Proto::Udp, (dst, 8080)));
        for dst in [net.world(), net.node(), net.node2(), net.vip(1)] {
            lab.pod_sends(&to(dst))?.dropped(DropReason::FragNotFound).with_context(|| dst.to_string())?;
        }
        for dst in [net.b(), net.far()] {
            for src in [net.b(), net.far(), net.node(), net.world()] {
                lab.pod_sends(&to(dst).map(|f| f.src = src))?.dropped(DropReason::Spoofed)?;
            }
            lab.pod_sends(&to(dst).map(|f| f.smac = MAC_B))?.dropped(DropReason::Spoofed)?;
        }
        let late = to(net.b()).map(|f| f.ttl = 1);
        lab.pod_sends(&late)?.dropped(DropReason::TtlExceeded).context("no error is sent about a later fragment")?;

        let by = |src| later(&from_outside(Proto::Udp, (src, PORT), (net.a(), 8080)));
        for src in [net.b(), net.node(), net.world(), net.routed()] {
            lab.overlay_in(net.node2(), &by(src))?.dropped(DropReason::UnknownSender)?;
        }
        lab.overlay_in(net.world(), &by(net.far()))?.dropped(DropReason::UnknownSender)?;
        for src in [net.b(), net.node(), net.far()] {
            lab.uplink_in(&by(src))?.dropped(DropReason::Spoofed)?;
        }
        // This node is no router between others.
        let on = later(&from_outside(Proto::Udp, (net.far(), PORT), (net.routed(), 8080)));
        lab.overlay_in(net.node2(), &on)?.dropped(DropReason::NoFib)?;
        // It could write over what its receiver has judged by the first one, whichever the protocol is.
        for (from, proto) in [(16, Proto::Udp), (16, Proto::Sctp)] {
            let near = datagram(&from_a(net, proto, (net.b(), 8080))).pieces(31, &[from]).remove(1);
            lab.pod_sends(&near)?.dropped(DropReason::FragNotFound)?;
        }
        ensure!(lab.connections(net)?.is_empty(), "one opened a connection");
        Ok(())
    })
}

/// RFC 3128 and RFC 1858: a TCP header in pieces, or one that is written over by the next fragment.
#[test]
fn tcp_headers_in_pieces() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        let whole = later(&from_a(net, Proto::Tcp, (net.vip(1), 80))).map(|f| f.payload = vec![1; 100]);
        for cut in [8, 16] {
            let pieces = whole.pieces(30, &[cut]);
            lab.pod_sends(&pieces[0])?.dropped(DropReason::Malformed).with_context(|| format!("first {cut} bytes"))?;
            lab.pod_sends(&pieces[1])?.dropped(DropReason::Malformed).with_context(|| format!("from {cut}"))?;
        }
        // After a good first one, a second that reaches into the header is no better.
        let pieces = whole.pieces(31, &[24]);
        lab.pod_sends(&pieces[0])?.to_the_pod(&arrived(net, &pieces[0]))?;
        lab.pod_sends(&pieces[1])?.to_the_pod(&arrived(net, &pieces[1]))?;
        for cut in [8, 16] {
            let overlap = whole.pieces(31, &[cut]).remove(1);
            lab.pod_sends(&overlap)?.dropped(DropReason::Malformed)?;
        }
        Ok(())
    })
}

/// A second fragment at offset 0 with other ports does not open a second way for the datagram's rest unseen: the rest
/// goes where the last first fragment went, and both were judged.
#[test]
fn a_repeated_first_fragment() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        let to_service = datagram(&from_a(net, Proto::Udp, (net.vip(1), 80))).pieces(40, &[1440]);
        lab.pod_sends(&to_service[0])?.to_the_pod(&arrived(net, &to_service[0]))?;
        let elsewhere = datagram(&from_a(net, Proto::Udp, (net.vip(1), 81))).pieces(40, &[1440]);
        // One that is refused names no ports.
        let shot = lab.pod_sends(&elsewhere[0])?;
        ensure!(shot.counted.keys().eq([&(DropReason::NoServicePort as u8, hook::FROM_POD)]), "{shot:?}");
        lab.pod_sends(&to_service[1])?.to_the_pod(&arrived(net, &to_service[1]))?;
        // One that passes names those of its datagram.
        let direct = datagram(&from_a(net, Proto::Udp, (net.b(), 81)));
        for ports in [(1000, 81), (1001, 82)] {
            let pieces = direct.map(|f| f.set_ports(ports.0, ports.1)).pieces(41, &[1440]);
            lab.pod_sends(&pieces[0])?.to_the_pod(&pieces[0].hop())?;
            lab.pod_sends(&pieces[1])?.to_the_pod(&pieces[1].hop())?;
            let flow = Flow { sport: ports.0, dport: ports.1, ..Flow::of(&direct) };
            ensure!(lab.half(flow)?.packets == 2, "{ports:?}");
        }
        Ok(())
    })
}

/// Frames that are not IP are the stack's, but those of pods and out of the tunnel, where nothing else comes from. So are
/// frames that hold no more than a header.
#[test]
fn what_is_not_ip() -> Result<()> {
    labs(|lab, _| {
        let mut arp = [&[0xff; 6][..], &[2, 0, 0, 0, 0x0a, 1], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        arp.resize(60, 0);
        let short = [&[0xff; 6][..], &[2, 0, 0, 0, 0x0a, 1], &[0x81, 0, 0]].concat();
        for frame in [arp, short] {
            for (code, ifindex) in [
                (hook::FROM_POD, POD_A),
                (hook::TO_POD, POD_A),
                (hook::UPLINK_IN, UPLINK),
                (hook::UPLINK_OUT, UPLINK),
                (hook::OVERLAY_IN, crate::harness::OVERLAY),
                (hook::OVERLAY_OUT, crate::harness::OVERLAY),
            ] {
                let shot = lab.raw(code, &Input { frame: &frame, ifindex, ..Input::default() })?;
                if matches!(code, hook::FROM_POD | hook::OVERLAY_IN) {
                    let reason = if frame.len() == 60 { DropReason::UnsupportedL2 } else { DropReason::VlanFiltered };
                    shot.dropped(reason)?;
                    continue;
                }
                ensure!(shot.verdict == crate::harness::STACK && shot.counted.is_empty(), "{shot:?}");
                ensure!(shot.frame == frame, "changed");
            }
        }
        Ok(())
    })
}

/// Bytes behind the IP packet stay, and count for nothing.
#[test]
fn padding_is_carried_along() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net)?;
        each(&SERVED, |proto| {
            there_and_back(lab, net, proto, |f| {
                f.payload.truncate(1);
                f.padding = 17;
            })
        })?;
        ensure!(lab.half(Flow::of(&from_b(net, Proto::Udp, (net.a(), 1)))).is_err());
        Ok(())
    })
}
