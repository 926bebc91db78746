//! Packets to this host that the parser refuses, and that its stack can read all the same: their sources are judged, too.

use super::{dropped_as, each, no_trace};
use crate::flows::{PORT, Proto, from_outside, later};
use crate::frame::{Frame, SYN};
use crate::harness::{Lab, Net, SIDE, STACK, UPLINK, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::names::SIDE_IN;
use rustnet_common::peer::flags;
use std::net::IpAddr;
use testkit::datapath::Input;

/// An IPv6 header of destination options, of the least length.
fn options() -> (u8, Vec<u8>) {
    (60, vec![0, 0, 1, 4, 0, 0, 0, 0])
}

/// What no step reads: a TCP header in pieces (the stack puts them together), the middle of a datagram, and more extension
/// headers than are followed.
fn unread(net: Net, src: IpAddr, dst: IpAddr) -> Vec<(&'static str, Frame)> {
    let datagram = from_outside(Proto::Udp, (src, 53), (dst, PORT)).map(|f| f.payload = vec![1; 64]);
    let segment = later(&from_outside(Proto::Tcp, (src, 53), (dst, PORT))).with_flags(SYN);
    let mut all = vec![
        ("eight bytes of a TCP header", segment.pieces(30, &[8]).remove(0)),
        ("sixteen bytes of a TCP header", segment.pieces(31, &[16]).remove(0)),
        ("the rest of it", segment.pieces(31, &[16]).remove(1)),
        ("the middle of a datagram", datagram.pieces(32, &[24]).remove(1)),
    ];
    if net == Net::V6 {
        all.push(("seven extension headers", datagram.map(|f| f.extensions = vec![options(); 7])));
    }
    all
}

#[test]
fn a_source_of_ours_by_the_uplink() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), 8080)])?;
        each(&[net.a(), net.nobody(), net.node(), net.vip(1), net.far()], |src| {
            for (what, f) in unread(net, src, net.node()) {
                lab.uplink_in(&f)?.dropped(DropReason::Spoofed).context(what)?;
            }
            Ok(())
        })?;
        // What the kernel takes for a source like others.
        let nobody = if net == Net::V4 { "127.0.0.1" } else { "::" };
        for (what, f) in unread(net, nobody.parse()?, net.node()) {
            lab.uplink_in(&f)?.dropped(DropReason::Martian).context(what)?;
        }
        // Other nodes speak so to this host, and machines of the segment and the world.
        let on_link = net.ip([169, 254, 7, 7], "fe80::7");
        each(&[net.node2(), net.routed(), net.world(), on_link], |src| {
            for (what, f) in unread(net, src, net.node()) {
                lab.uplink_in(&f)?.to_stack(&f).context(what)?;
            }
            Ok(())
        })?;
        no_trace(lab)
    })
}

#[test]
fn a_source_of_ours_by_a_side_device() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), 8080)])?;
        lab.put_device(SIDE, Some(net.side()))?;
        lab.put_peer(net.side(), None, flags::HOST, None)?;
        each(&[net.a(), net.node(), net.side(), net.vip(1), net.far()], |src| {
            each(&[net.side(), net.a(), net.world()], |dst| {
                for (what, f) in unread(net, src, dst) {
                    lab.side_in(&f)?.dropped(DropReason::Spoofed).context(what)?;
                }
                Ok(())
            })
        })?;
        each(&[net.machine(), net.nobody()], |src| {
            for (what, f) in unread(net, src, net.side()) {
                lab.side_in(&f)?.to_stack(&f).context(what)?;
            }
            Ok(())
        })?;
        no_trace(lab)
    })
}

/// A socket of both families takes an IPv4-mapped source for the IPv4 address: for that of a pod, say.
#[test]
fn a_mapped_source_by_a_side_device() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V4 {
            return Ok(());
        }
        let mapped = |text: &str| net.ip([0; 4], text);
        each(&[mapped("::ffff:10.244.1.10"), mapped("::ffff:127.0.0.1"), mapped("::ffff:192.0.2.10")], |src| {
            let f = from_outside(Proto::Udp, (src, 53), (net.side(), PORT));
            lab.side_in(&f)?.dropped(DropReason::Martian)
        })
    })
}

/// A frame behind two tags: one that the device took off, one in front of the packet.
fn behind_tags(lab: &Lab, ifindex: u32, f: &Frame, tags: (u16, u16)) -> Result<crate::harness::Shot> {
    let bytes = f.map(|f| f.vlan = Some(tags.1)).bytes();
    let input = Input { frame: &bytes, ifindex, vlan: Some(tags.0), ..Input::default() };
    if ifindex == SIDE { lab.run(SIDE_IN, hook::UPLINK_IN, &input) } else { lab.raw(hook::UPLINK_IN, &input) }
}

/// The kernel takes off any number of tags that name no VLAN (`__netif_receive_skb_core`), after the hook: what stands behind
/// them would pass the hook unseen.
#[test]
fn tags_that_name_no_vlan() -> Result<()> {
    labs(|lab, net| {
        lab.put_peer(net.side(), None, flags::HOST, None)?;
        each(&[net.b(), net.far(), net.world()], |src| {
            let f = from_outside(Proto::Udp, (src, 53), (net.a(), PORT));
            each(&[UPLINK, SIDE], |ifindex| {
                each(&[(0, 0), (0xe000, 0), (0, 0x6000), (0x1000, 0x1000)], |tags| {
                    let shot = behind_tags(lab, ifindex, &f, tags)?;
                    dropped_as(&shot, &[DropReason::VlanFiltered])
                })?;
                // These are other devices'.
                each(&[(0, 100), (100, 0), (100, 100)], |tags| {
                    let shot = behind_tags(lab, ifindex, &f, tags)?;
                    ensure!(shot.verdict == STACK, "{shot:?}");
                    Ok(())
                })
            })
        })?;
        no_trace(lab)
    })
}
