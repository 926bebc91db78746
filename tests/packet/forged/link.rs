//! What a pod sends to its link: tags, ARP, neighbour discovery, multicast. Pods have permanent neighbours and need none of
//! it, while the host's stack would believe or forward it.

use super::{dropped_as, each, no_trace, passed};
use crate::flows::{ALL, PORT, Proto, from_a, from_outside};
use crate::frame::{Frame, L4};
use crate::harness::{Lab, MAC_A, MAC_B, Net, OVERLAY, POD_A, STACK, Shot, UPLINK, VNI, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use testkit::datapath::Input;

/// VLAN 0 is a tag, too: the uplink's switch may map its priority, and QinQ hides a second tag behind it.
const TAGS: [u16; 4] = [0, 1, 100, 0xe064];

/// A frame with the tag where a device puts it that takes tags off: outside of the frame.
fn with_tag_outside(lab: &Lab, code: u8, ifindex: u32, tunnel: Option<IpAddr>, f: &Frame, tag: u16) -> Result<Shot> {
    let bytes = f.bytes();
    lab.raw(code, &Input { frame: &bytes, ifindex, tunnel, vni: VNI, vlan: Some(tag), ..Input::default() })
}

/// The tag in the frame, of a kind: 802.1Q or 802.1ad.
fn with_tag_inside(f: &Frame, tag: u16, kind: u16) -> Vec<u8> {
    let mut bytes = f.map(|f| f.vlan = Some(tag)).bytes();
    bytes[12..14].copy_from_slice(&kind.to_be_bytes());
    bytes
}

/// A VLAN tag survives the redirect: a pod would talk to any VLAN of the uplink's port.
#[test]
fn a_pods_tag_leads_nowhere() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        each(&[net.b(), net.far(), net.routed(), net.world(), net.node(), net.vip(1)], |dst| {
            let f = from_a(net, Proto::Udp, (dst, 80));
            lab.forget()?;
            for known in [false, true] {
                if known {
                    passed(&lab.pod_sends(&f)?)?;
                }
                each(&TAGS, |tag| {
                    let shot = with_tag_outside(lab, hook::FROM_POD, POD_A, None, &f, tag)?;
                    shot.dropped(DropReason::VlanFiltered).context("outside of the frame")?;
                    for kind in [0x8100, 0x88a8] {
                        let bytes = with_tag_inside(&f, tag, kind);
                        let input = Input { frame: &bytes, ifindex: POD_A, ..Input::default() };
                        lab.raw(hook::FROM_POD, &input)?
                            .dropped(DropReason::VlanFiltered)
                            .with_context(|| format!("{kind:#x} in the frame"))?;
                        // Both: QinQ.
                        let input = Input { vlan: Some(tag), ..input };
                        lab.raw(hook::FROM_POD, &input)?.dropped(DropReason::VlanFiltered).context("two tags")?;
                    }
                    Ok(())
                })
                .with_context(|| format!("known: {known}"))?;
                if !known {
                    no_trace(lab)?;
                }
            }
            Ok(())
        })
    })
}

#[test]
fn a_tag_out_of_the_tunnel_leads_nowhere() -> Result<()> {
    labs(|lab, net| {
        each(&[net.b(), net.node()], |dst| {
            let f = from_outside(Proto::Udp, (net.far(), PORT), (dst, 80));
            lab.forget()?;
            for known in [false, true] {
                if known {
                    passed(&lab.overlay_in(net.node2(), &f)?)?;
                }
                each(&TAGS, |tag| {
                    with_tag_outside(lab, hook::OVERLAY_IN, OVERLAY, Some(net.node2()), &f, tag)?
                        .dropped(DropReason::VlanFiltered)
                        .context("outside of the frame")?;
                    let bytes = with_tag_inside(&f, tag, 0x8100);
                    let tunnel = Some(net.node2());
                    let input = Input { frame: &bytes, ifindex: OVERLAY, tunnel, vni: VNI, ..Input::default() };
                    lab.raw(hook::OVERLAY_IN, &input)?.dropped(DropReason::VlanFiltered).context("in the frame")
                })?;
                if !known {
                    no_trace(lab)?;
                }
            }
            Ok(())
        })
    })
}

/// At the uplink a tagged frame belongs to another device; without a tag the same packet is refused.
#[test]
fn a_tag_at_the_uplink_is_another_devices() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let f = from_outside(Proto::Udp, (net.world(), 1), (net.vip(1), 80));
        lab.uplink_in(&f)?.dropped(DropReason::IsClusterIp)?;
        with_tag_outside(lab, hook::UPLINK_IN, UPLINK, None, &f, 100)?.to_stack(&f)?;
        // A priority alone names no VLAN.
        with_tag_outside(lab, hook::UPLINK_IN, UPLINK, None, &f, 0xe000)?.dropped(DropReason::IsClusterIp)
    })
}

/// Each frame that is not IP costs the host a neighbour entry, or more: LLDP, PPPoE, MPLS, EAPOL, 802.3, unknown types.
#[test]
fn what_is_not_ip_stays_with_the_pod() -> Result<()> {
    labs(|lab, _| {
        for smac in [MAC_A, MAC_B, [2, 9, 9, 9, 9, 9]] {
            for kind in [0x0806, 0x8035, 0x88cc, 0x8863, 0x8864, 0x8847, 0x888e, 0x0026, 0x88f7, 0x22f0, 0xffff, 0] {
                for dmac in [[0xff; 6], [2, 0, 0, 0, 0xff, 1], [1, 0x80, 0xc2, 0, 0, 0]] {
                    let mut frame = [&dmac[..], &smac, &u16::to_be_bytes(kind)].concat();
                    // An ARP request for the gateway, whatever the kind.
                    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
                    frame.extend([&smac[..], &[10, 244, 1, 10], &[0; 6], &[169, 254, 1, 1]].concat());
                    frame.resize(60, 0);
                    let shot = lab.raw(hook::FROM_POD, &Input { frame: &frame, ifindex: POD_A, ..Input::default() })?;
                    shot.dropped(DropReason::UnsupportedL2).with_context(|| format!("{kind:#06x}"))?;
                    // The same behind a tag: either reason is true.
                    let mut tagged = frame.clone();
                    tagged.splice(12..12, [0x81, 0, 0, 100]);
                    let shot =
                        lab.raw(hook::FROM_POD, &Input { frame: &tagged, ifindex: POD_A, ..Input::default() })?;
                    dropped_as(&shot, &[DropReason::VlanFiltered, DropReason::UnsupportedL2])
                        .with_context(|| format!("{kind:#06x} behind a tag"))?;
                }
            }
        }
        Ok(())
    })
}

/// ARP and the like go on unseen at every other door: the uplink's neighbours need them.
#[test]
fn what_is_not_ip_passes_elsewhere() -> Result<()> {
    labs(|lab, _| {
        let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0xee, 1], &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        frame.resize(60, 0);
        for (code, ifindex) in [(hook::TO_POD, POD_A), (hook::UPLINK_IN, UPLINK), (hook::UPLINK_OUT, UPLINK)] {
            let shot = lab.raw(code, &Input { frame: &frame, ifindex, ..Input::default() })?;
            ensure!(shot.verdict == STACK && shot.counted.is_empty() && shot.frame == frame, "{shot:?}");
        }
        Ok(())
    })
}

fn ip6(text: &str) -> IpAddr {
    Net::V6.ip([0; 4], text)
}

/// An ICMPv6 message of pod A.
fn message(kind: u8, src: IpAddr, dst: IpAddr) -> Frame {
    from_a(Net::V6, Proto::Udp, (dst, 0)).map(|f| {
        f.l4 = L4::Icmp { kind, code: 0, rest: 0 };
        f.payload = vec![0; 32];
        (f.src, f.ttl) = (src, 255);
    })
}

/// Router solicitations and advertisements, neighbour discovery, redirects, multicast listeners' reports: to whatever address,
/// with whatever source. An advertisement would become the host's default route (CVE-2020-13401).
#[test]
fn discovery_of_a_pod() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let link = ["fe80::1", "fe80::2", "ff02::1", "ff02::2", "ff02::16", "ff02::1:ff00:11"].map(ip6);
        let all = [&link[..], &[net.node(), net.b(), net.nobody(), net.far(), net.node2(), net.routed(), net.world()]];
        for kind in [130, 131, 132, 133, 134, 135, 136, 137, 143] {
            each(&all.concat(), |dst| {
                lab.pod_sends(&message(kind, net.a(), dst))?.dropped(DropReason::NdNotForwarded)?;
                let other = [DropReason::Spoofed, DropReason::NdNotForwarded, DropReason::Martian];
                each(&[ip6("fe80::a"), ip6("fe80::1"), ip6("::"), net.b(), net.node(), net.world()], |src| {
                    dropped_as(&lab.pod_sends(&message(kind, src, dst))?, &other)
                })
            })
            .with_context(|| format!("type {kind}"))?;
        }
        no_trace(lab)
    })
}

/// The same behind extension headers, and in a first fragment (RFC 6980).
#[test]
fn discovery_behind_other_headers() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let options = |kind| (kind, vec![0, 0, 1, 4, 0, 0, 0, 0]);
        let alert = (0, vec![0, 0, 5, 2, 0, 0, 1, 0]);
        for kind in [133, 134, 135, 136, 137, 143] {
            each(&[ip6("ff02::1"), net.node(), net.world()], |dst| {
                for chain in [vec![options(0)], vec![options(60)], vec![alert.clone()], vec![options(0), options(60)]] {
                    let f = message(kind, net.a(), dst).map(|f| f.extensions = chain);
                    lab.pod_sends(&f)?.dropped(DropReason::NdNotForwarded).context("behind options")?;
                }
                let whole = message(kind, net.a(), dst);
                for f in whole.pieces(77, &[]).into_iter().chain(whole.pieces(78, &[16])) {
                    let reasons = [DropReason::NdNotForwarded, DropReason::FragNotFound];
                    dropped_as(&lab.pod_sends(&f)?, &reasons).with_context(|| format!("{:?}", f.piece))?;
                }
                Ok(())
            })
            .with_context(|| format!("type {kind}"))?;
        }
        no_trace(lab)
    })
}

/// At the uplink and out of the tunnel: nothing of the kind reaches a pod.
#[test]
fn discovery_from_elsewhere() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        for kind in [133, 134, 135, 136, 137] {
            for src in [net.router(), ip6("fe80::1"), ip6("::")] {
                let f = message(kind, src, net.a());
                let reasons = [DropReason::NdNotForwarded, DropReason::Martian];
                dropped_as(&lab.uplink_in(&f)?, &reasons).with_context(|| format!("from {src}"))?;
            }
            // To the host neither from a pod that is reached through the tunnel; but from nodes, and from the host's own address,
            // by which the host finds out that another has it.
            for dst in [net.node(), ip6("ff02::1"), ip6("ff02::1:ff00:11")] {
                lab.uplink_in(&message(kind, net.far(), dst))?.dropped(DropReason::Spoofed)?;
                for src in [net.node2(), net.node(), net.router()] {
                    let f = message(kind, src, dst);
                    lab.uplink_in(&f)?.to_stack(&f).with_context(|| format!("from {src} to {dst}"))?;
                }
            }
            for dst in [net.b(), net.node(), ip6("ff02::1"), ip6("fe80::1")] {
                let f = message(kind, net.far(), dst);
                lab.overlay_in(net.node2(), &f)?.dropped(DropReason::UnknownSender)?;
            }
        }
        no_trace(lab)
    })
}

/// Multicast and broadcast of a pod: no other pod is on its link, and the host's own sockets would be reached past every check.
#[test]
fn multicast_of_a_pod() -> Result<()> {
    labs(|lab, net| {
        let groups: &[IpAddr] = match net {
            Net::V4 => &[
                IpAddr::from([224, 0, 0, 1]),
                IpAddr::from([224, 0, 0, 22]),
                IpAddr::from([224, 0, 0, 251]),
                IpAddr::from([239, 255, 255, 250]),
                IpAddr::from([255, 255, 255, 255]),
            ],
            Net::V6 => &["ff02::1", "ff02::fb", "ff05::2", "ff0e::1"].map(ip6),
        };
        each(groups, |group| {
            for proto in [Proto::Udp, Proto::Echo] {
                let f = from_a(net, proto, (group, 5353));
                lab.pod_sends(&f)?.dropped(DropReason::NdNotForwarded).with_context(|| format!("{proto:?}"))?;
            }
            let igmp = from_a(net, Proto::Udp, (group, 0)).map(|f| f.l4 = L4::Other(2));
            lab.pod_sends(&igmp)?.dropped(DropReason::NdNotForwarded).context("IGMP")?;
            let overlay = from_a(net, Proto::Udp, (group, 8472));
            let reasons = [DropReason::NdNotForwarded, DropReason::EncapProhibited];
            dropped_as(&lab.pod_sends(&overlay)?, &reasons).context("to the overlay's port")?;
            each(&[net.b(), net.far(), net.node(), net.node2(), net.world(), net.nobody()], |src| {
                let f = from_a(net, Proto::Udp, (group, 5353)).map(|f| f.src = src);
                dropped_as(&lab.pod_sends(&f)?, &[DropReason::Spoofed, DropReason::NdNotForwarded])
            })
        })?;
        no_trace(lab)
    })
}

/// A forged source does not get past because the destination is link-local: DHCP discovery, or a packet to the gateway.
#[test]
fn a_forged_source_to_the_gateway() -> Result<()> {
    labs(|lab, net| {
        let gateway = net.ip([169, 254, 1, 1], "fe80::1");
        let sources = [net.b(), net.far(), net.node(), net.node2(), net.world(), net.ip([0; 4], "::")];
        let reasons = [DropReason::Spoofed, DropReason::Martian, DropReason::NdNotForwarded];
        for proto in ALL {
            each(&sources, |src| {
                let f = from_a(net, proto, (gateway, 67)).map(|f| f.src = src);
                dropped_as(&lab.pod_sends(&f)?, &reasons)
            })
            .with_context(|| format!("{proto:?}"))?;
        }
        no_trace(lab)
    })
}

/// 240.0.0.0/4 is unicast to Linux, which forwards it, and some clusters have their pods and services there: it is treated like
/// any other address.
#[test]
fn class_e_is_unicast() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        let out = IpAddr::from([240, 1, 2, 3]);
        each(&ALL, |proto| {
            let at = |port| (out, if proto == Proto::Echo { 0 } else { port });
            each(&[net.b(), net.far(), net.world(), net.node(), net.nobody()], |src| {
                let f = from_a(net, proto, at(80)).map(|f| f.src = src);
                lab.pod_sends(&f)?.dropped(DropReason::Spoofed)
            })?;
            let f = from_a(net, proto, at(80));
            lab.pod_sends(&f)?.onto_wire(&f.hop().map(|f| f.src = net.node())).context("masqueraded")?;
            let f = from_outside(proto, at(7), (net.b(), 80));
            lab.uplink_in(&f)?.to_the_pod(&f.hop()).context("from outside")
        })?;
        // Pods and services there.
        let (pod, far, vip) =
            (IpAddr::from([240, 244, 1, 11]), IpAddr::from([240, 244, 2, 20]), [240, 96, 0, 1].into());
        lab.put_endpoint(pod, crate::harness::POD_B, MAC_B)?;
        let flags = rustnet_common::peer::flags::POD | rustnet_common::peer::flags::TUNNEL;
        lab.put_peer(far, Some((24, 64)), flags, Some(net.node2()))?;
        lab.serve(vip, 80, 17, 0, &[(far, 8080)])?;
        let f = from_a(net, Proto::Udp, (pod, 80));
        lab.pod_sends(&f)?.to_the_pod(&f.hop()).context("to a pod here")?;
        let f = from_a(net, Proto::Udp, (vip, 80));
        lab.pod_sends(&f)?.onto_wire(&f.hop().between((net.a(), PORT), (far, 8080))).context("to a service")?;
        let f = from_outside(Proto::Udp, (far, 1), (pod, 80));
        lab.overlay_in(net.node2(), &f)?.to_the_pod(&f.hop()).context("out of the tunnel")?;
        let f = crate::flows::from_host(net, Proto::Udp, (far, 80));
        let shot = lab.overlay_out(&f)?;
        ensure!(shot.verdict == STACK && shot.frame == f.bytes(), "into the tunnel: {shot:?}");
        Ok(())
    })
}

/// Neighbour discovery and the like is between neighbours: this node's stack has it, and nobody
/// forwards it.
#[test]
fn what_concerns_the_link() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        for kind in 133..=137 {
            let message = |src: IpAddr, dst: IpAddr| message(kind, src, dst).map(|f| f.payload = vec![0; 16]);
            // A pod's neighbours are permanent: whatever its source, it has nothing to discover.
            for dst in
                [ip6("fe80::1"), ip6("ff02::1"), ip6("ff02::1:ff00:11"), net.node(), net.b(), net.far(), net.world()]
            {
                for src in [net.a(), net.b(), net.world(), ip6("fe80::a"), ip6("::")] {
                    let shot = lab.pod_sends(&message(src, dst))?;
                    shot.dropped(DropReason::NdNotForwarded).with_context(|| format!("{src} to {dst}"))?;
                }
            }
            lab.uplink_in(&message(net.router(), net.node()))?.to_stack(&message(net.router(), net.node()))?;
            lab.to_pod(POD_A, &message(net.node(), net.a()))?.to_stack(&message(net.node(), net.a()))?;

            lab.uplink_in(&message(net.router(), net.a()))?
                .dropped(DropReason::NdNotForwarded)
                .context("from outside")?;
            lab.overlay_in(net.node2(), &message(net.far(), net.b()))?.dropped(DropReason::UnknownSender)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}
