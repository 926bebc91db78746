//! The tunnel: what a pod sends to its port, and what comes out of it without right.

use super::{dropped_as, each, no_trace, out_of_tunnel};
use crate::flows::{ALL, PORT, Proto, as_from_b, from_a, from_outside};
use crate::harness::{Flow, Net, VNI, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use rustnet_common::peer::flags;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const OVERLAY_PORT: u16 = 8472;

/// Everything that is not a pod of this node. An address that no table knows may be a node's as well: one that has yet to
/// join, its second interface, a virtual one of keepalived.
fn outside(net: Net) -> Vec<IpAddr> {
    vec![
        net.node(),
        net.nobody(),
        net.node2(),
        net.far(),
        net.routed(),
        net.narrow(),
        net.world(),
        net.router(),
        net.unreachable(),
        net.ip([172, 18, 0, 13], "fd00:18::13"),
    ]
}

/// A pod that builds tunnel packets is taken for its node: masquerade would even give them the node's address.
#[test]
fn tunnel_packets_of_a_pod() -> Result<()> {
    labs(|lab, net| {
        each(&outside(net), |dst| {
            let f = from_a(net, Proto::Udp, (dst, OVERLAY_PORT));
            lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited)?;
            lab.serve(net.vip(1), 80, 17, 0, &[(dst, OVERLAY_PORT)])?;
            let f = from_a(net, Proto::Udp, (net.vip(1), 80));
            lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited).context("by way of a service")
        })?;
        // In pieces: of the first the port is known, and the others have none.
        let whole = from_a(net, Proto::Udp, (net.world(), OVERLAY_PORT)).map(|f| f.payload = vec![7; 2000]);
        let pieces = whole.pieces(50, &[800, 1600]);
        lab.pod_sends(&pieces[0])?.dropped(DropReason::EncapProhibited)?;
        for piece in &pieces[1..] {
            dropped_as(&lab.pod_sends(piece)?, &[DropReason::FragNotFound, DropReason::EncapProhibited])?;
        }
        no_trace(lab)
    })
}

/// A flow is known since a time when that port was nothing special, or its destination was not what it is now.
#[test]
fn tunnel_packets_of_a_known_flow() -> Result<()> {
    labs(|lab, net| {
        each(&outside(net), |dst| {
            lab.configure(|c| c.overlay_port = 4789)?;
            let f = from_a(net, Proto::Udp, (dst, OVERLAY_PORT));
            ensure!(lab.pod_sends(&f)?.verdict != crate::harness::SHOT, "the flow is to be known");
            lab.configure(|_| {})?;
            lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited)
        })
    })
}

/// The pod that was asked is gone, and its address leads to the host or to another node.
#[test]
fn tunnel_packets_to_a_pod_that_is_gone() -> Result<()> {
    labs(|lab, net| {
        let f = from_a(net, Proto::Udp, (net.b(), OVERLAY_PORT));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        lab.drop_endpoint(net.b())?;
        lab.age(Flow::of(&f), 1)?;
        lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited)?;
        lab.put_peer(net.b(), None, flags::POD, None)?;
        lab.pod_sends(&f)?.dropped(DropReason::EncapProhibited)
    })
}

/// By other protocols, from that port, and to pods of this node it is a port like any other.
#[test]
fn what_a_pod_may_send_to_that_port() -> Result<()> {
    labs(|lab, net| {
        let f = from_a(net, Proto::Udp, (net.b(), OVERLAY_PORT));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        for proto in [Proto::Tcp, Proto::Sctp] {
            let f = from_a(net, proto, (net.world(), OVERLAY_PORT));
            lab.pod_sends(&f)?.onto_wire(&f.hop().map(|f| f.src = net.node()))?;
        }
        let f = from_outside(Proto::Udp, (net.far(), 53), (net.b(), OVERLAY_PORT));
        lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
        // Its answer has that port as its source.
        let answer = as_from_b(&f.reply());
        lab.pod_sends(&answer)?.onto_wire(&answer.hop())
    })
}

/// All far ends that differ from a node's address in one bit.
fn one_bit_off(node: IpAddr) -> Vec<IpAddr> {
    match node {
        IpAddr::V4(a) => (0..32).map(|bit| IpAddr::V4(Ipv4Addr::from(u32::from(a) ^ 1 << bit))).collect(),
        IpAddr::V6(a) => (0..128).map(|bit| IpAddr::V6(Ipv6Addr::from(u128::from(a) ^ 1 << bit))).collect(),
    }
}

/// Far ends that look like a node's address to whoever compares a part of it, or forgets its family.
fn look_alikes(net: Net) -> Vec<IpAddr> {
    let more: &[&str] = match net {
        Net::V4 => &["::ffff:172.18.0.12", "2001:db8:bad::ffff:ac12:c", "::ac12:c", "64:ff9b::ac12:c"],
        Net::V6 => &["2001:db8:bad::12", "0.0.0.18", "::12"],
    };
    one_bit_off(net.node2()).into_iter().chain(more.iter().flat_map(|text| text.parse())).collect()
}

/// A far end is the node's in all bits and in its family, for new flows and for known ones alike: an attacker may have his own
/// /64, and with it any lower half.
#[test]
fn far_ends_that_look_alike() -> Result<()> {
    labs(|lab, net| {
        each(&look_alikes(net), |remote| {
            let f = from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80));
            out_of_tunnel(lab, remote, VNI, &f)?.dropped(DropReason::UnknownSender).context("a new flow")?;
            no_trace(lab)?;
            lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
            out_of_tunnel(lab, remote, VNI, &f)?.dropped(DropReason::UnknownSender).context("a known flow")?;
            lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
            lab.forget()
        })
    })
}

/// The same for what a pod has asked, also of a service, before the far end has answered and after.
#[test]
fn far_ends_that_look_alike_answer() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let port = if proto == Proto::Echo { 0 } else { 80 };
            let ask = from_a(net, proto, (net.far(), port));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.reply();
            for answered in [false, true] {
                each(&look_alikes(net)[30..], |remote| {
                    out_of_tunnel(lab, remote, VNI, &answer)?.dropped(DropReason::UnknownSender)
                })
                .with_context(|| format!("answered: {answered}"))?;
                lab.overlay_in(net.node2(), &answer)?.to_the_pod(&answer.hop())?;
            }
            lab.forget()
        })
    })
}

/// Packets of another virtual network: the device that collects metadata takes all of them.
#[test]
fn another_networks_packets() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let f = from_outside(proto, (net.far(), PORT), (net.b(), 80));
            let others = [0, 2, 3, 0x100, 0x0001_0000, 0x0001_0001, 0x0080_0001, 0x00ff_ffff];
            for known in [false, true] {
                if known {
                    lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
                }
                each(&others, |vni| {
                    each(&[net.b(), net.node()], |dst| {
                        let f = f.map(|f| f.dst = dst);
                        out_of_tunnel(lab, net.node2(), vni, &f)?.dropped(DropReason::UnknownSender)
                    })
                })
                .with_context(|| format!("known: {known}"))?;
                if !known {
                    no_trace(lab)?;
                }
            }
            lab.forget()
        })?;
        // Ours is what the settings say.
        lab.configure(|c| c.vni = 4096)?;
        let f = from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80));
        out_of_tunnel(lab, net.node2(), VNI, &f)?.dropped(DropReason::UnknownSender)?;
        out_of_tunnel(lab, net.node2(), 4096, &f)?.to_the_pod(&f.hop())
    })
}

/// Other nodes' pods do not use this node as a router: out of the tunnel it goes to a pod here, or to the host.
#[test]
fn out_of_the_tunnel_to_elsewhere() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        each(&[net.far(), net.node2()], |src| {
            each(&ALL, |proto| {
                let to = |dst| from_outside(proto, (src, PORT), (dst, 80));
                each(&[net.far(), net.node2(), net.world(), net.routed(), net.narrow(), net.unreachable()], |dst| {
                    lab.overlay_in(net.node2(), &to(dst))?.dropped(DropReason::NoFib)
                })?;
                let shot = lab.overlay_in(net.node2(), &to(net.vip(1)))?;
                dropped_as(&shot, &[DropReason::NoFib, DropReason::IsClusterIp]).context("to a service")?;
                let link = net.ip([224, 0, 0, 1], "ff02::1");
                lab.overlay_in(net.node2(), &to(link))?.dropped(DropReason::UnknownSender).context("to a group")?;
                // The host answers for its own pods that are no more.
                each(&[net.node(), net.nobody()], |dst| lab.overlay_in(net.node2(), &to(dst))?.to_stack(&to(dst)))
            })
        })?;
        no_trace(lab)
    })
}

/// Of a flow that is known, to a pod that has moved away: this node is no detour.
#[test]
fn out_of_the_tunnel_to_a_pod_that_has_moved() -> Result<()> {
    labs(|lab, net| {
        let f = from_outside(Proto::Udp, (net.far(), PORT), (net.b(), 80));
        lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
        lab.drop_endpoint(net.b())?;
        lab.put_peer(net.b(), None, flags::POD, None)?;
        lab.age(Flow::of(&f), 1)?;
        lab.overlay_in(net.node2(), &f)?.dropped(DropReason::NoFib)
    })
}

/// A range of pods has moved to another node: what the node before still sends of a known flow is refused within a second, and the
/// flow goes on from the new one.
#[test]
fn a_range_that_has_moved_to_another_node() -> Result<()> {
    labs(|lab, net| {
        let node3 = net.ip([172, 18, 0, 13], "fd00:18::13");
        each(&ALL, |proto| {
            let f = from_outside(proto, (net.far(), PORT), (net.b(), 80));
            lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop())?;
            lab.put_peer(net.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(node3))?;
            lab.age(Flow::of(&f), 1)?;
            lab.overlay_in(net.node2(), &f)?.dropped(DropReason::UnknownSender).context("from the node before")?;
            lab.overlay_in(node3, &f)?.to_the_pod(&f.hop())?;
            lab.put_peer(net.far(), Some((24, 64)), flags::POD | flags::TUNNEL, Some(net.node2()))?;
            lab.forget()
        })
    })
}
