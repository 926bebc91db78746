//! Packets whose content lies: fragments and ICMP errors in another flow's name, addresses of the other family, source routes.

use super::{dropped_as, each, no_trace};
use crate::flows::{PORT, Proto, SERVED, from_a, from_b, from_outside, later};
use crate::frame::{Frame, L4};
use crate::harness::{MAC_A, MAC_B, MAC_HOST, MAC_OUT, Net, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::IpAddr;

/// A datagram in two pieces.
fn pieces(f: &Frame, id: u32) -> [Frame; 2] {
    let whole = f.map(|f| f.payload = vec![0x5a; 1200]);
    let mut pieces = whole.pieces(id, &[800]);
    let second = pieces.remove(1);
    [pieces.remove(0), second]
}

/// A first fragment that is dropped must not change where the real datagram's rest goes.
#[test]
fn fragments_in_another_pods_name() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        each(&[net.vip(1), net.world()], |dst| {
            let becomes = |f: &Frame| {
                f.hop().map(|f| {
                    if dst == net.vip(1) {
                        f.dst = net.b();
                        f.set_ports(PORT, 8080);
                    } else {
                        f.src = net.node();
                    }
                })
            };
            let whole = from_a(net, Proto::Udp, (dst, 80));
            let [first, second] = pieces(&whole, 60);
            let [_, want] = pieces(&becomes(&whole), 60);
            let check = |shot: crate::harness::Shot| {
                if dst == net.vip(1) { shot.to_the_pod(&want) } else { shot.onto_wire(&want) }
            };
            lab.pod_sends(&first)?;
            for (sport, dport) in [(PORT, 81), (1, 80)] {
                let [forged, _] = pieces(&whole.map(|f| f.smac = MAC_B).map(|f| f.set_ports(sport, dport)), 60);
                lab.pod_sends(&forged)?.dropped(DropReason::Spoofed)?;
                check(lab.pod_sends(&second)?).context("after another pod's first")?;
                let [forged, _] = pieces(&whole.map(|f| f.smac = MAC_OUT).map(|f| f.set_ports(sport, dport)), 60);
                lab.uplink_in(&forged)?;
                check(lab.pod_sends(&second)?).context("after one from the uplink")?;
                let shot = lab.overlay_in(net.node2(), &forged)?;
                shot.dropped(DropReason::UnknownSender)?;
                check(lab.pod_sends(&second)?).context("after one out of the tunnel")?;
            }
            Ok(())
        })
    })
}

/// The same for what comes in: the answer to a masqueraded flow, in pieces.
#[test]
fn fragments_in_the_worlds_name() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.world(), 53));
        let left = ask.hop().map(|f| f.src = net.node());
        lab.pod_sends(&ask)?.onto_wire(&left)?;
        let [first, second] = pieces(&left.reply(), 61);
        let arrives = |f: &Frame| f.hop().map(|f| f.dst = net.a());
        lab.uplink_in(&first)?;
        let [_, want] = pieces(&arrives(&left.reply()), 61);
        let [forged, _] = pieces(&left.reply().map(|f| f.set_ports(53, PORT + 1)), 61);
        lab.overlay_in(net.node2(), &forged)?.dropped(DropReason::UnknownSender)?;
        lab.uplink_in(&second)?.to_the_pod(&want).context("after one out of the tunnel")?;
        let by_a = forged.map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
        lab.pod_sends(&by_a)?.dropped(DropReason::Spoofed)?;
        lab.uplink_in(&second)?.to_the_pod(&want).context("after a pod's")
    })
}

/// A first fragment that was refused leaves its rest without a first.
#[test]
fn the_rest_of_what_was_refused() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        // A port that the service lacks.
        let [first, second] = pieces(&from_a(net, Proto::Udp, (net.vip(1), 81)), 62);
        ensure!(lab.pod_sends(&first)?.counted.keys().all(|k| k.0 == DropReason::NoServicePort as u8));
        lab.pod_sends(&second)?.dropped(DropReason::FragNotFound).context("of a refused one")?;
        let [first, second] = pieces(&from_a(net, Proto::Udp, (net.b(), 80)).map(|f| f.src = net.far()), 63);
        lab.pod_sends(&first)?.dropped(DropReason::Spoofed)?;
        let shot = lab.pod_sends(&second)?;
        shot.dropped(DropReason::Spoofed)?;
        // Its real sender's rest has no first either, and is led by its addresses alone.
        let real = second.map(|f| (f.smac, f.dmac) = (MAC_OUT, MAC_HOST));
        lab.overlay_in(net.node2(), &real)?.to_the_pod(&real.hop())?;
        no_trace(lab)
    })
}

/// One pod that sends what is dropped must not push out everybody else's first fragments.
#[test]
fn a_flood_of_forged_fragments() -> Result<()> {
    labs(|lab, net| {
        let [first, second] = pieces(&from_a(net, Proto::Udp, (net.b(), 80)), 64);
        lab.pod_sends(&first)?.to_the_pod(&first.hop())?;
        let flood = from_b(net, Proto::Udp, (net.world(), 80)).map(|f| f.src = net.far());
        for id in 0..3000 {
            let [forged, _] = pieces(&flood, 1000 + id);
            let bytes = forged.bytes();
            let input =
                testkit::datapath::Input { frame: &bytes, ifindex: crate::harness::POD_B, ..Default::default() };
            let out = lab.datapath().run("from_pod", &input)?.context("no sum was asked for")?;
            ensure!(out.verdict == crate::harness::SHOT, "a forged fragment got verdict {}", out.verdict);
        }
        lab.pod_sends(&second)?.to_the_pod(&second.hop())
    })
}

/// An ICMP error from `src` to `dst` that quotes all of a packet.
fn error(about: &Frame, src: IpAddr, dst: IpAddr) -> Frame {
    about.map(|f| {
        (f.src, f.dst, f.ttl) = (src, dst, 60);
        (f.smac, f.dmac) = (MAC_OUT, MAC_HOST);
        f.l4 = L4::Icmp { kind: if about.is_v6() { 1 } else { 3 }, code: 1, rest: 0 };
        f.payload = about.ip_bytes();
    })
}

/// The destination of an error has to be the sender of what it quotes (`nf_conntrack_inet_error` of the kernel). Otherwise an
/// error from outside enters a pod that is not reachable from there.
#[test]
fn errors_to_another_than_the_quoted_sender() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            // A masqueraded flow.
            let sent = from_a(net, proto, (net.world(), 443));
            let left = sent.hop().map(|f| f.src = net.node());
            lab.pod_sends(&sent)?.onto_wire(&left)?;
            let stranger = net.ip([10, 99, 99, 99], "fd00:99::99");
            let e = error(&left, net.router(), stranger);
            lab.uplink_in(&e)?.to_stack(&e).context("from outside, to nobody")?;
            let e = error(&left, net.router(), net.b());
            lab.uplink_in(&e)?.dropped(DropReason::IcmpUnrelated).context("from outside, to another pod")?;
            each(&[net.router(), net.a(), net.far(), net.routed()], |dst| {
                let e = error(&left, net.b(), dst).map(|f| f.smac = MAC_B);
                lab.pod_sends(&e)?.dropped(DropReason::IcmpUnrelated).context("of another pod")
            })?;
            let e = error(&left, net.far(), net.b());
            lab.overlay_in(net.node2(), &e)?.dropped(DropReason::IcmpUnrelated).context("out of the tunnel")?;
            // A flow of pods by a service, of which nobody outside has heard.
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let sent = from_a(net, proto, (net.vip(1), 80));
            let there = sent.hop().between((net.a(), PORT), (net.b(), 8080));
            lab.pod_sends(&sent)?.to_the_pod(&there)?;
            let e = error(&there, net.router(), net.node());
            lab.uplink_in(&e)?.to_stack(&e).context("about a pod's flow, to the node")?;
            // With the right destination it is the flow's.
            let e = error(&left, net.router(), net.node());
            ensure!(lab.uplink_in(&e)?.verdict == crate::harness::REDIRECT, "a true error is lost");
            lab.forget()
        })
    })
}

/// An error at the uplink about what a remote pod or another node has sent to a pod here: it is for its own node, and this one
/// does not carry a stranger's packet into the tunnel.
#[test]
fn errors_do_not_enter_the_tunnel() -> Result<()> {
    labs(|lab, net| {
        each(&[net.far(), net.node2()], |remote| {
            each(&SERVED, |proto| {
                let sent = from_outside(proto, (remote, PORT), (net.b(), 80));
                lab.overlay_in(net.node2(), &sent)?.to_the_pod(&sent.hop())?;
                each(&[net.router(), net.routed(), net.ip([169, 254, 1, 1], "fe80::1")], |src| {
                    let shot = lab.uplink_in(&error(&sent, src, remote))?;
                    ensure!(shot.verdict != crate::harness::REDIRECT, "sent on, counted {:?}", shot.counted);
                    Ok(())
                })
            })
        })
    })
}

/// Errors that quote nothing known enter no pod, from wherever.
#[test]
fn errors_about_nothing() -> Result<()> {
    labs(|lab, net| {
        each(&[Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo], |proto| {
            let about = from_a(net, proto, (net.world(), 443));
            let e = error(&about, net.router(), net.a());
            lab.uplink_in(&e)?.dropped(DropReason::IcmpUnrelated).context("from outside")?;
            lab.overlay_in(net.node2(), &error(&about, net.far(), net.a()))?
                .dropped(DropReason::IcmpUnrelated)
                .context("out of the tunnel")?;
            let e = error(&about, net.b(), net.a()).map(|f| f.smac = MAC_B);
            lab.pod_sends(&e)?.dropped(DropReason::IcmpUnrelated).context("of another pod")?;
            // A quotation that cannot be read is of nothing known.
            let cut = error(&about, net.router(), net.a()).map(|f| f.payload.truncate(12));
            let bytes = cut.bytes();
            let input =
                testkit::datapath::Input { frame: &bytes, ifindex: crate::harness::UPLINK, ..Default::default() };
            lab.raw(rustnet_common::drop::hook::UPLINK_IN, &input)?
                .dropped(DropReason::IcmpUnrelated)
                .context("that quotes too little")
        })?;
        no_trace(lab)
    })
}

/// Addresses of the other family in IPv6 (`::ffff:0:0/96`): the maps hold IPv4 in that form, and the kernel drops them.
#[test]
fn mapped_addresses() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(a) => IpAddr::V6(a.to_ipv6_mapped()),
            IpAddr::V6(_) => ip,
        };
        let v4 = Net::V4;
        let own = mapped(v4.a());
        each(&[Proto::Tcp, Proto::Udp, Proto::Sctp, Proto::Echo], |proto| {
            each(&[v4.b(), v4.far(), v4.routed(), v4.world(), v4.node(), v4.vip(1), v4.nobody()], |dst| {
                let f = from_a(net, proto, (mapped(dst), 80));
                lab.pod_sends(&f)?.dropped(DropReason::Martian).context("as the destination")?;
                lab.pod_sends(&f.map(|f| f.src = own))?.dropped(DropReason::Martian).context("as both")?;
                let f = from_outside(proto, (net.world(), PORT), (mapped(dst), 80));
                if dst == v4.b() {
                    // The stack drops it before it asks for a way.
                    let shot = lab.uplink_in(&f)?;
                    shot.dropped(DropReason::Martian)
                        .or_else(|e| shot.to_stack(&f).map_err(|_| e))
                        .context("from outside")?;
                }
                let f = from_outside(proto, (net.far(), PORT), (mapped(dst), 80));
                let shot = lab.overlay_in(net.node2(), &f)?;
                dropped_as(&shot, &[DropReason::Martian, DropReason::NoFib]).context("out of the tunnel")
            })?;
            each(&[net.b(), net.world(), net.node(), net.far()], |dst| {
                let f = from_a(net, proto, (dst, 80)).map(|f| f.src = own);
                lab.pod_sends(&f)?.dropped(DropReason::Martian).context("as the source")
            })
        })?;
        no_trace(lab)
    })
}

/// IPv4 options that prescribe a route: loose and strict (RFC 791), at each place where an option may stand.
fn source_routes() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for kind in [131, 137] {
        let route = [kind, 7, 4, 192, 0, 2, 1];
        for before in [
            &[][..],
            &[1],
            &[1, 1, 1],
            &[7, 7, 4, 0, 0, 0, 0],
            &[148, 4, 0, 0],
            &[68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ] {
            let mut options = [before, &route].concat();
            options.resize(options.len().next_multiple_of(4), 0);
            all.push(options);
        }
        // Nine addresses, and one behind thirty bytes of padding.
        let mut long = vec![kind, 39, 4];
        long.resize(40, 0);
        all.push(long);
        let mut last = vec![1; 33];
        last.extend(route);
        all.push(last);
    }
    all
}

#[test]
fn source_routed_packets() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        // IPv6: a routing header of type 0 (RFC 5095), with one address to come, also behind other headers.
        let mut header = vec![0, 2, 0, 1, 0, 0, 0, 0];
        header.extend([0x20, 1, 0xd, 0xb8, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10]);
        let pad = |kind| (kind, vec![0, 0, 1, 4, 0, 0, 0, 0]);
        let chains = [vec![], vec![pad(0)], vec![pad(60)], vec![pad(0), pad(60)]];
        let chains = chains.map(|chain| [chain, vec![(43, header.clone())]].concat());
        let routed: Vec<_> = match net {
            Net::V4 => source_routes().into_iter().map(|options| (options, Vec::new())).collect(),
            Net::V6 => chains.into_iter().map(|chain| (Vec::new(), chain)).collect(),
        };
        for (i, headers) in routed.iter().enumerate() {
            let route = |f: &Frame| f.map(|f| (f.options, f.extensions) = headers.clone());
            each(&[net.b(), net.far(), net.routed(), net.world(), net.vip(1)], |dst| {
                lab.forget()?;
                let f = from_a(net, Proto::Udp, (dst, 80));
                lab.pod_sends(&route(&f))?.dropped(DropReason::SourceRoute)?;
                no_trace(lab)?;
                ensure!(lab.pod_sends(&f)?.verdict == crate::harness::REDIRECT);
                lab.pod_sends(&route(&later(&f)))?.dropped(DropReason::SourceRoute).context("of a known flow")
            })
            .with_context(|| format!("route {i}"))?;
            lab.forget()?;
            for known in [false, true] {
                let f = from_outside(Proto::Udp, (net.routed(), PORT), (net.b(), 80));
                let g = from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80));
                if known {
                    lab.uplink_in(&f)?.to_the_pod(&f.hop())?;
                    lab.overlay_in(net.node2(), &g)?.to_the_pod(&g.hop())?;
                }
                let place = || format!("route {i}, known: {known}");
                // The stack refuses it, too, and so does the pod's door.
                let shot = lab.uplink_in(&route(&f))?;
                shot.dropped(DropReason::SourceRoute)
                    .or_else(|e| shot.to_stack(&route(&f)).map_err(|_| e))
                    .with_context(place)?;
                lab.overlay_in(net.node2(), &route(&g))?.dropped(DropReason::SourceRoute).with_context(place)?;
            }
            // For the host itself, its stack decides.
            let f = route(&from_outside(Proto::Udp, (net.world(), 1), (net.node(), 80)));
            lab.uplink_in(&f)?.to_stack(&f)?;
        }
        Ok(())
    })
}

/// Other options and routing headers pass.
#[test]
fn options_that_prescribe_nothing() -> Result<()> {
    labs(|lab, net| {
        let f = from_a(net, Proto::Udp, (net.b(), 80));
        let good = match net {
            // No-operation, record route, router alert, a time stamp, and 131 as data behind the end of the list.
            Net::V4 => [
                &[1, 1, 1, 1][..],
                &[7, 7, 4, 0, 0, 0, 0, 1],
                &[148, 4, 0, 0],
                &[68, 4, 5, 0],
                &[7, 7, 131, 131, 131, 131, 131, 1],
            ]
            .map(|o| f.map(|f| f.options = o.to_vec()))
            .to_vec(),
            // Type 2 (Mobile IPv6).
            Net::V6 => {
                let mut header = vec![0, 2, 2, 1, 0, 0, 0, 0];
                header.extend([0xfd; 16]);
                vec![f.map(|f| f.extensions = vec![(43, header)])]
            }
        };
        each(&good.iter().collect::<Vec<_>>(), |f| lab.pod_sends(f)?.to_the_pod(&f.hop()))
    })
}
