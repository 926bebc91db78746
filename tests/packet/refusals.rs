//! Who may send what from where: sources, tunnels, doors.

use crate::flows::{ALL, PORT, Proto, as_from_b, from_a, from_b, from_host, from_outside, later};
use crate::frame::Frame;
use crate::harness::{
    Flow, MAC_A, MAC_B, MAC_HOST, Net, OVERLAY, POD_A, POD_B, REDIRECT, SHOT, STACK, UPLINK, each, labs,
};
use anyhow::{Context, Result, ensure};
use rustnet_common::config::mark::DEFAULT as MARK_PROCESSED;
use rustnet_common::drop::{DropReason, hook};
use testkit::datapath::Input;

#[test]
fn a_pod_with_another_ones_address_or_mac() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let good = from_a(net, proto, (net.b(), 80));
            for src in [net.b(), net.far(), net.node(), net.node2(), net.world(), net.vip(1), net.nobody()] {
                let f = good.map(|f| f.src = src);
                lab.pod_sends(&f)?.dropped(DropReason::Spoofed).with_context(|| format!("as {src}"))?;
                // Neither out into the world nor to the host.
                let f = f.map(|f| f.dst = net.world());
                lab.pod_sends(&f)?.dropped(DropReason::Spoofed)?;
                let f = f.map(|f| f.dst = net.node());
                lab.pod_sends(&f)?.dropped(DropReason::Spoofed)?;
            }
            let f = good.map(|f| f.smac = [2, 0, 0, 0, 0x0a, 2]);
            lab.pod_sends(&f)?.dropped(DropReason::Spoofed)?;
            ensure!(lab.halves()? == 0, "a spoofed packet is tracked");
            Ok(())
        })
    })
}

/// Known flows are checked once; a packet of one that comes from elsewhere is checked again.
#[test]
fn a_known_flow_claimed_by_another_pod() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let good = from_a(net, proto, (net.b(), 80));
            lab.pod_sends(&good)?.to_the_pod(&good.hop())?;
            let before = lab.half(Flow::of(&good))?;
            // The thief even knows the MAC.
            let f = later(&good);
            let bytes = f.bytes();
            let input = Input { frame: &bytes, ifindex: POD_B, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(DropReason::Spoofed).context("by another interface")?;
            let f = f.map(|f| f.smac = MAC_B);
            lab.pod_sends(&f)?.dropped(DropReason::Spoofed).context("with another MAC and interface")?;
            let bytes = later(&good).map(|f| f.smac = MAC_B).bytes();
            let input = Input { frame: &bytes, ifindex: POD_A, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?.dropped(DropReason::Spoofed).context("with another MAC")?;
            // The answering half is nobody's until pod B has spoken: then its own only.
            let answer = good.reply().map(|f| (f.smac, f.dmac) = (MAC_A, MAC_HOST));
            lab.pod_sends(&answer)?.dropped(DropReason::Spoofed).context("an answer in B's name")?;
            let outside = good.reply();
            lab.uplink_in(&outside)?.dropped(DropReason::Spoofed).context("an answer in B's name from outside")?;
            lab.overlay_in(net.node2(), &outside)?.dropped(DropReason::UnknownSender).context("and from a tunnel")?;
            let after = lab.half(Flow::of(&good))?;
            ensure!(after == before, "{after:?} is not {before:?}");
            Ok(())
        })
    })
}

/// The address of a pod that is gone is given to another one: what the new one sends is a flow of its own.
#[test]
fn a_flow_ends_with_its_pod() -> Result<()> {
    labs(|lab, net| {
        let f = from_a(net, Proto::Udp, (net.b(), 80));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        lab.put_endpoint(net.a(), POD_B, MAC_B)?;
        let moved = f.map(|f| f.smac = MAC_B);
        lab.pod_sends(&moved)?.to_the_pod(&moved.hop())?;
        let half = lab.half(Flow::of(&f))?;
        ensure!(half.ifindex == POD_B && half.packets == 1, "{half:?}");
        // From now on the old one is foreign.
        lab.pod_sends(&f)?.dropped(DropReason::Spoofed)
    })
}

#[test]
fn own_addresses_from_outside() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for src in [net.a(), net.nobody(), net.node()] {
                let f = from_outside(proto, (src, 1), (net.b(), 80));
                lab.uplink_in(&f)?.dropped(DropReason::Spoofed).with_context(|| format!("as {src}"))?;
            }
            ensure!(lab.halves()? == 0);
            Ok(())
        })
    })
}

#[test]
fn a_tunnel_from_the_wrong_node() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let node3 = net.ip([172, 18, 0, 13], "fd00:18::13");
            let f = from_outside(proto, (net.far(), PORT), (net.b(), 80));
            for remote in [node3, net.node(), net.world()] {
                lab.overlay_in(remote, &f)?
                    .dropped(DropReason::UnknownSender)
                    .with_context(|| format!("from {remote}"))?;
            }
            // Sources that no tunnel brings.
            for src in [net.a(), net.node(), net.world(), net.routed(), net.vip(1)] {
                let f = f.map(|f| f.src = src);
                lab.overlay_in(net.node2(), &f)?
                    .dropped(DropReason::UnknownSender)
                    .with_context(|| format!("as {src}"))?;
            }
            ensure!(lab.halves()? == 0);
            // A known flow that suddenly comes from another node.
            lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
            lab.overlay_in(node3, &later(&f))?.dropped(DropReason::UnknownSender)?;
            lab.overlay_in(net.node2(), &later(&f))?.to_the_pod(&later(&f).hop())?;
            lab.forget()
        })
    })
}

/// Over the other family's underlay.
#[test]
fn a_tunnel_over_the_other_family() -> Result<()> {
    labs(|lab, net| {
        let other = if net == Net::V4 { Net::V6 } else { Net::V4 };
        lab.put_peer(
            net.far(),
            Some((24, 64)),
            rustnet_common::peer::flags::POD | rustnet_common::peer::flags::TUNNEL,
            Some(other.node2()),
        )?;
        let f = from_outside(Proto::Tcp, (net.far(), PORT), (net.b(), 80));
        lab.overlay_in(net.node2(), &f)?.dropped(DropReason::UnknownSender)?;
        lab.overlay_in(other.node2(), &f)?.to_the_pod(&f.hop())?;
        let answer = as_from_b(&f.reply());
        lab.pod_sends(&answer)?.onto_wire(&answer.hop())
    })
}

/// A frame on the overlay device that came through no tunnel.
#[test]
fn no_tunnel_at_all() -> Result<()> {
    labs(|lab, net| {
        let bytes = from_outside(Proto::Udp, (net.far(), 1), (net.b(), 80)).bytes();
        let input = Input { frame: &bytes, ifindex: OVERLAY, ..Input::default() };
        lab.raw(hook::OVERLAY_IN, &input)?.dropped(DropReason::UnknownSender)
    })
}

/// What comes out of the tunnel never goes back into it, and to the host only by its stack.
#[test]
fn out_of_the_tunnel_to_anywhere_but_pods() -> Result<()> {
    labs(|lab, net| {
        for dst in [net.node(), net.nobody()] {
            let f = from_outside(Proto::Udp, (net.far(), PORT), (dst, 80));
            lab.overlay_in(net.node2(), &f)?.to_stack(&f)?;
        }
        for dst in [net.far(), net.world(), net.routed()] {
            let f = from_outside(Proto::Udp, (net.far(), PORT), (dst, 80));
            lab.overlay_in(net.node2(), &f)?.dropped(DropReason::NoFib)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// A pod that builds tunnel packets itself could speak as anybody.
#[test]
fn tunnel_packets_of_a_pod() -> Result<()> {
    labs(|lab, net| {
        for node in [net.node(), net.node2()] {
            let f = from_a(net, Proto::Udp, (node, 8472));
            lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited).with_context(|| format!("to {node}"))?;
        }
        // Nor without an overlay of this node's own: another's may have the port.
        lab.configure(|c| c.overlay = 0)?;
        for node in [net.node(), net.node2()] {
            let f = from_a(net, Proto::Udp, (node, 8472));
            lab.pod_sends(&f)?
                .dropped(DropReason::EncapProhibited)
                .with_context(|| format!("to {node}, no overlay"))?;
        }
        lab.configure(|_| {})?;
        ensure!(lab.connections(net)?.is_empty());
        // By way of a service neither.
        lab.serve(net.vip(1), 80, 17, 0, &[(net.node2(), 8472)])?;
        lab.pod_sends(&from_a(net, Proto::Udp, (net.vip(1), 80)))?.dropped(DropReason::EncapProhibited)?;
        // To the same port of a pod, and by TCP, it may.
        let f = from_a(net, Proto::Udp, (net.b(), 8472));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        let f = from_a(net, Proto::Tcp, (net.node(), 8472));
        lab.pod_sends(&f)?.to_stack(&f)
    })
}

/// The tunnel's own packets are the stack's, which takes them apart.
#[test]
fn tunnel_packets_at_the_uplink() -> Result<()> {
    labs(|lab, net| {
        let f = from_outside(Proto::Udp, (net.node2(), 50_000), (net.node(), 8472));
        lab.uplink_in(&f)?.to_stack(&f)?;
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

#[test]
fn what_an_earlier_hook_has_done_is_let_through() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[])?;
        let foreign_bits = 0x4000;
        for (code, ifindex, f) in [
            (hook::TO_POD, POD_A, from_host(net, Proto::Udp, (net.a(), 80))),
            (hook::UPLINK_OUT, UPLINK, from_host(net, Proto::Udp, (net.vip(1), 80))),
            (hook::OVERLAY_OUT, OVERLAY, from_host(net, Proto::Udp, (net.far(), 80))),
            (hook::UPLINK_IN, UPLINK, from_outside(Proto::Udp, (net.world(), 1), (net.vip(1), 80))),
        ] {
            let bytes = f.bytes();
            let input = Input { frame: &bytes, ifindex, mark: MARK_PROCESSED | foreign_bits, ..Input::default() };
            let shot = lab.raw(code, &input)?;
            // The outer packet needs no steps at the uplink either.
            let left = if code == hook::OVERLAY_OUT { MARK_PROCESSED | foreign_bits } else { foreign_bits };
            ensure!(shot.mark == left, "mark {:#x}, not {left:#x}", shot.mark);
            ensure!(shot.verdict == STACK && shot.counted.is_empty() && shot.frame == bytes, "{shot:?}");
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// Pods may set marks on their packets; one that looks like ours opens no door.
#[test]
fn a_pods_mark_is_no_pass() -> Result<()> {
    labs(|lab, net| {
        let bytes = from_a(net, Proto::Udp, (net.b(), 80)).map(|f| f.src = net.world()).bytes();
        let input = Input { frame: &bytes, ifindex: POD_A, mark: MARK_PROCESSED, ..Input::default() };
        let shot = lab.raw(hook::FROM_POD, &input)?;
        ensure!(shot.verdict == SHOT, "{shot:?}");
        Ok(())
    })
}

#[test]
fn the_hosts_way_into_the_overlay() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            for dst in [net.far(), net.node2()] {
                let f = from_host(net, proto, (dst, 80));
                lab.overlay_out(&f)?.done_to_stack(&f)?;
            }
            for dst in [net.a(), net.world(), net.routed(), net.node(), net.nobody()] {
                let f = from_host(net, proto, (dst, 80));
                lab.overlay_out(&f)?.dropped(DropReason::NoFib).with_context(|| format!("to {dst}"))?;
            }
            Ok(())
        })
    })
}

/// Traffic between a pod and another node goes through the overlay both ways.
#[test]
fn another_nodes_own_address() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let f: Frame = from_a(net, proto, (net.node2(), 80));
            lab.pod_sends(&f)?.onto_wire(&f.hop())?;
            let answer = f.reply();
            lab.overlay_in(net.node2(), &answer)?.to_the_pod(&answer.hop())?;
            // By the uplink alone nothing shows that it is that node.
            lab.uplink_in(&answer)?.dropped(DropReason::Spoofed)
        })
    })
}

/// Marks that others set (Calico: 0x01000000 is "seen"; kube-proxy, Cilium): no packet passes
/// unchecked for one of them, and each comes out as it went in.
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
                (hook::OVERLAY_OUT, OVERLAY, from_host(net, Proto::Udp, (net.world(), 80)), DropReason::NoFib),
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
