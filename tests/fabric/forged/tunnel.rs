//! The tunnel: who may send into it, and what may come out of it.

use crate::fixture::Net;
use crate::forged::stage::{Control, Family, INNER, Mark, Place, Sender, Shot, Stage, Trial, VNI, in_routings};
use anyhow::Result;
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use std::slice;
use testkit::check::VXLAN_PORT;
use testkit::packet::{self, Probe, tagged, vxlan};
use testkit::{Fabric, Node, Routing, Setup};

in_routings!(
    vxlan = Vxlan, direct_and_vxlan = DirectAndVxlan;
    (
        a_pods_tunnel_packet_without_privileges,
        a_pods_tunnel_packet_with_raw_sockets,
        a_tunnel_of_a_stranger,
        another_vni_or_family,
        a_source_that_the_far_end_does_not_own,
        a_destination_beyond_this_node,
        a_tag_in_the_tunnel,
    )
);

/// A packet of pod `b` to pod `c`, for a tunnel.
fn smuggled(stage: &Stage<'_>, mark: &Mark) -> Result<Vec<u8>> {
    let to = SocketAddr::new(stage.net.c.v4()?.into(), 5555);
    mark.frame(Probe::Udp, INNER, stage.net.b.v4()?.into(), to)
}

/// Addresses that node 2 has on its interface, and that its Node object does not name; gone when
/// dropped. They are deprecated, so that the node does not choose them as a source.
struct Unnamed<'a>(&'a Node, [IpAddr; 2]);

impl<'a> Unnamed<'a> {
    fn add(node: &'a Node, last: &str) -> Result<Self> {
        let all = [format!("172.18.0.{last}").parse()?, format!("fd00:18::{last}").parse()?];
        node.netns().ip(&format!(
            "addr add {}/24 dev eth0 preferred_lft 0\naddr add {}/64 dev eth0 nodad preferred_lft 0\n",
            all[0], all[1]
        ))?;
        Ok(Self(node, all))
    }
}

impl Drop for Unnamed<'_> {
    fn drop(&mut self) {
        let _ = self.0.netns().ip(&format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", self.1[0], self.1[1]));
    }
}

/// A tunnel packet of a pod would leave with its node's address, which other nodes accept as proof
/// of the inner source.
fn a_pods_tunnel_packet_without_privileges(stage: &Stage<'_>) -> Result<()> {
    let mut trial = Trial::new(stage)?;
    let sender = Sender::of(&stage.net.a)?;
    let port = trial.watch.port;
    let unnamed = Unnamed::add(stage.node(2), "112")?;
    for family in Family::ALL {
        let named = family.of_node(stage.node(2));
        let targets = [
            (named, Place::Host(2)),
            (family.pick(unnamed.1[0], unnamed.1[1]), Place::Host(2)),
            (family.of_node(stage.node(1)), Place::Host(1)),
            (family.of(&stage.net.c)?, Place::Pod("c")),
            (family.attacker()?, Place::Wire(1)),
            (family.outsider()?, Place::Wire(1)),
            (family.world(), Place::Wire(1)),
        ];
        for (target, place) in targets {
            // The same datagram to another port.
            let datagram = |mark: &Mark, port: u16| -> Result<Vec<Shot>> {
                Ok(vec![Shot::Datagram((target, port).into(), vxlan(VNI, &smuggled(stage, mark)?))])
            };
            let control = Control { sender: &sender, make: &|mark| datagram(mark, port), place, source: None };
            let reasons = [DropReason::EncapProhibited];
            trial.refused(&target.to_string(), &sender, &reasons, &|mark| datagram(mark, VXLAN_PORT), &control)?;
        }
        let own = family.of(&stage.net.a)?;
        let to = (family.of(&stage.net.b)?, VXLAN_PORT).into();
        let local = Control {
            sender: &sender,
            make: &|mark| Ok(vec![Shot::Datagram(to, mark.bytes().to_vec())]),
            place: Place::Pod("b"),
            source: Some(own),
        };
        trial.legitimate("that port of a pod of the same node", &local)?;
    }
    // A flow is open before a node has the address.
    let later = [IpAddr::from([172, 18, 0, 113]), "fd00:18::113".parse()?];
    let mut unnamed = None;
    for added in [false, true] {
        if added {
            unnamed = Some(Unnamed::add(stage.node(2), "113")?);
        }
        for (family, to) in Family::ALL.into_iter().zip(later) {
            let (own, other) = (family.of(&stage.net.a)?, (family.of(&stage.net.b)?, port).into());
            let from = SocketAddr::new(own, 41_113);
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, other)?]),
                place: Place::Pod("b"),
                source: Some(own),
            };
            trial.refused(
                &format!("{to}, there: {added}"),
                &sender,
                &[DropReason::EncapProhibited],
                &|mark| {
                    let payload = vxlan(VNI, &smuggled(stage, mark)?);
                    Ok(vec![Shot::Frame(packet::udp(sender.macs, from, (to, VXLAN_PORT).into(), &payload)?)])
                },
                &control,
            )?;
        }
    }
    drop(unnamed);
    trial.finish()
}

fn a_pods_tunnel_packet_with_raw_sockets(stage: &Stage<'_>) -> Result<()> {
    let mut trial = Trial::new(stage)?;
    let sender = Sender::of(&stage.net.a)?;
    for family in Family::ALL {
        let own = family.of(&stage.net.a)?;
        let to = (family.of(&stage.net.c)?, trial.watch.port).into();
        let control = Control {
            sender: &sender,
            make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
            place: Place::Pod("c"),
            source: Some(own),
        };
        let node2 = family.of_node(stage.node(2));
        // In its own name and in a node's; whole, and as the first of fragments.
        let sources = [own, family.of_node(stage.node(1)), node2, family.of(&stage.net.b)?];
        trial.refused(
            "a tunnel packet",
            &sender,
            &[DropReason::EncapProhibited, DropReason::Spoofed],
            &|mark| {
                let mut shots = Vec::new();
                for source in sources {
                    for target in [node2, family.of_node(stage.node(1)), family.attacker()?, family.world()] {
                        shots.push(sender.tunnel(source, target, VNI, &smuggled(stage, mark)?)?);
                    }
                }
                let payload = vxlan(VNI, &smuggled(stage, mark)?);
                let (from, to) = (SocketAddr::new(own, 50_000), SocketAddr::new(node2, VXLAN_PORT));
                let piece = 0..payload.len() / 8 * 8;
                let first = packet::udp_fragments(sender.macs, from, to, &payload, 7, slice::from_ref(&piece))?;
                shots.extend(first.into_iter().map(Shot::Frame));
                Ok(shots)
            },
            &control,
        )?;
    }
    trial.finish()
}

/// A legitimate packet of a far end: from its pod to pod `a`, through the tunnel to node 1.
struct Right<'a> {
    sender: Sender<'a>,
    /// The ends of the tunnel.
    far: IpAddr,
    near: IpAddr,
}

impl<'a> Right<'a> {
    fn of(stage: &'a Stage<'_>, underlay: Family) -> Result<Self> {
        let far = underlay.of_node(stage.tunnel_peer()?.node());
        Ok(Self { sender: stage.far_end()?, far, near: underlay.of_node(stage.node(1)) })
    }

    fn shot(&self, stage: &Stage<'_>, family: Family, mark: &Mark) -> Result<Shot> {
        let from = SocketAddr::new(family.of(stage.tunnel_peer()?)?, KNOWN);
        let inner = packet::udp(INNER, from, (family.of(&stage.net.a)?, KNOWN).into(), mark.bytes())?;
        self.sender.tunnel(self.far, self.near, VNI, &inner)
    }
}

/// The port of both ends of a flow that is open already.
const KNOWN: u16 = 2_902;

/// Packets that only the far end may send: of its pod and of itself, to a pod and to the node, of a
/// new flow and of the one that is open.
fn only_by_the_far_end(stage: &Stage<'_>, family: Family, mark: &Mark, port: u16) -> Result<Vec<Vec<u8>>> {
    let peer = stage.tunnel_peer()?;
    let (pod, a) = (family.of(peer)?, family.of(&stage.net.a)?);
    Ok(vec![
        packet::udp(INNER, (pod, KNOWN).into(), (a, KNOWN).into(), mark.bytes())?,
        mark.frame(Probe::Udp, INNER, pod, (a, port).into())?,
        mark.frame(Probe::Tcp, INNER, pod, (a, port).into())?,
        mark.frame(Probe::Echo, INNER, pod, (a, port).into())?,
        mark.frame(Probe::Udp, INNER, family.of_node(peer.node()), (a, port).into())?,
        mark.frame(Probe::Udp, INNER, pod, (family.of_node(stage.node(1)), port).into())?,
    ])
}

/// Outer sources that are no node's: the sender's own, and some that equal a node's in the lower 48
/// bits or without regard to the family.
fn strangers(underlay: Family, far: IpAddr) -> Result<Vec<IpAddr>> {
    let IpAddr::V6(v6) = far else {
        let IpAddr::V4(v4) = far else { return Ok(Vec::new()) };
        let [a, b, c, d] = v4.octets();
        let lower = u16::from_be_bytes([a, b]);
        let look_alike = format!("2001:db8:bad::ffff:{lower:x}:{:x}", u16::from_be_bytes([c, d]));
        let mut all = vec![look_alike.parse()?];
        for family in Family::ALL {
            all.extend([family.attacker()?, family.world()]);
        }
        return Ok(all);
    };
    let mut look_alike = v6.segments();
    look_alike[..5].copy_from_slice(&[0x2001, 0xdb8, 0xbad, 0, 0]);
    Ok(vec![std::net::Ipv6Addr::from(look_alike).into(), underlay.attacker()?, underlay.world()])
}

/// Runs attempts to get packets of each family through the tunnel to node 1. The control is the far
/// end's own packet to pod `a`.
fn check_tunnel(
    stage: &Stage<'_>,
    underlay: Family,
    attempt: impl Fn(&mut Trial<'_>, &Right<'_>, Family, &Control<'_>) -> Result<()>,
) -> Result<()> {
    let right = Right::of(stage, underlay)?;
    let mut trial = Trial::new(stage)?;
    for family in Family::ALL {
        let control = Control {
            sender: &right.sender,
            make: &|mark| Ok(vec![right.shot(stage, family, mark)?]),
            place: Place::Pod("a"),
            source: Some(family.of(stage.tunnel_peer()?)?),
        };
        attempt(&mut trial, &right, family, &control)?;
    }
    trial.finish()
}

fn strangers_fail(stage: &Stage<'_>, underlay: Family) -> Result<()> {
    let attacker = stage.attacker()?;
    check_tunnel(stage, underlay, |trial, right, family, control| {
        let port = trial.watch.port;
        for stranger in strangers(underlay, right.far)? {
            let near = stage.node(1).address_like(stranger);
            trial.refused(
                &format!("a tunnel from {stranger}, in it {family:?}"),
                &attacker,
                &[DropReason::UnknownSender],
                &|mark| {
                    let inner = only_by_the_far_end(stage, family, mark, port)?;
                    inner.iter().map(|inner| attacker.tunnel(stranger, near, VNI, inner)).collect()
                },
                control,
            )?;
        }
        // Behind a router, and in the name of a node that is none.
        let outsider = stage.outsider()?;
        trial.refused(
            &format!("a tunnel from behind a router, in it {family:?}"),
            &outsider,
            &[DropReason::UnknownSender],
            &|mark| {
                let inner = only_by_the_far_end(stage, family, mark, port)?;
                inner.iter().map(|inner| outsider.tunnel(underlay.outsider()?, right.near, VNI, inner)).collect()
            },
            control,
        )?;
        Ok(())
    })
}

fn a_tunnel_of_a_stranger(stage: &Stage<'_>) -> Result<()> {
    strangers_fail(stage, Family::V4)
}

/// A network identifier that is not ours, and a node's address of the family that is not the
/// tunnel's. The attacker uses the far end's own addresses.
fn others_fail(stage: &Stage<'_>, underlay: Family) -> Result<()> {
    let (attacker, peer) = (stage.attacker()?, stage.tunnel_peer()?.node());
    check_tunnel(stage, underlay, |trial, right, family, control| {
        let port = trial.watch.port;
        let mut attempts: Vec<_> = [0, 2, 0x0001_0001, 0x00ff_ffff].map(|vni| (right.far, right.near, vni)).into();
        if stage.node(1).netns().exec("ip", &["-4", "addr", "show", "dev", "eth0"])?.contains("inet ") {
            let other = if underlay == Family::V4 { Family::V6 } else { Family::V4 };
            attempts.push((other.of_node(peer), other.of_node(stage.node(1)), VNI));
        }
        for (far, near, vni) in attempts {
            trial.refused(
                &format!("network {vni} from {far}, in it {family:?}"),
                &attacker,
                &[DropReason::UnknownSender],
                &|mark| {
                    let inner = only_by_the_far_end(stage, family, mark, port)?;
                    inner.iter().map(|inner| attacker.tunnel(far, near, vni, inner)).collect()
                },
                control,
            )?;
        }
        Ok(())
    })
}

fn another_vni_or_family(stage: &Stage<'_>) -> Result<()> {
    others_fail(stage, Family::V4)
}

/// The node at the far end is one of the cluster, and may use its own addresses and its pods' only.
fn foreign_sources_fail(stage: &Stage<'_>, underlay: Family) -> Result<()> {
    check_tunnel(stage, underlay, |trial, right, family, control| {
        let port = trial.watch.port;
        let mut sources = vec![
            family.of(&stage.net.a)?,
            family.of(&stage.net.b)?,
            family.unleased()?,
            family.of_node(stage.node(1)),
            family.attacker()?,
            family.world(),
            family.ip("10.96.0.1", "fd00:96::1")?,
            family.ip("240.1.2.3", "fe80::b")?,
        ];
        sources.extend(stage.routed().map(|pod| family.of(pod)).transpose()?);
        sources.extend(family.martians()?);
        for to in [family.of(&stage.net.a)?, family.of_node(stage.node(1))] {
            trial.refused(
                &format!("to {to}"),
                &right.sender,
                &[DropReason::UnknownSender, DropReason::Martian, DropReason::Spoofed],
                &|mark| {
                    let mut shots = Vec::new();
                    for source in &sources {
                        for kind in Probe::ALL {
                            let inner = mark.frame(kind, INNER, *source, (to, port).into())?;
                            shots.push(right.sender.tunnel(right.far, right.near, VNI, &inner)?);
                        }
                    }
                    Ok(shots)
                },
                control,
            )?;
        }
        Ok(())
    })
}

fn a_source_that_the_far_end_does_not_own(stage: &Stage<'_>) -> Result<()> {
    foreign_sources_fail(stage, Family::V4)
}

/// Out of the tunnel come packets to this node and its pods. The node is no router for the rest.
fn a_destination_beyond_this_node(stage: &Stage<'_>) -> Result<()> {
    check_tunnel(stage, Family::V4, |trial, right, family, control| {
        let port = trial.watch.port;
        let own = family.of(stage.tunnel_peer()?)?;
        let mut beyond: Vec<SocketAddr> = vec![
            (family.world(), port).into(),
            (family.attacker()?, port).into(),
            (family.outsider()?, port).into(),
            (family.of_node(stage.node(2)), port).into(),
            (family.of(&stage.net.c)?, port).into(),
            (family.ip("240.1.2.3", "2001:db8:77::1")?, port).into(),
            (family.ip("255.255.255.255", "ff02::1")?, port).into(),
            (family.ip("224.0.0.1", "ff0e::1")?, port).into(),
            (family.ip("127.0.0.1", "::1")?, port).into(),
            (family.ip("169.254.1.1", "fe80::1")?, port).into(),
        ];
        beyond.push(stage.local.target_like(own));
        trial.refused(
            &format!("in it {family:?}"),
            &right.sender,
            &[],
            &|mark| {
                let inner = |to: &SocketAddr| mark.frame(Probe::Udp, INNER, own, *to);
                let tunnel = |inner: Vec<u8>| right.sender.tunnel(right.far, right.near, VNI, &inner);
                beyond.iter().map(|to| inner(to).and_then(tunnel)).collect()
            },
            control,
        )?;
        Ok(())
    })
}

fn a_tag_in_the_tunnel(stage: &Stage<'_>) -> Result<()> {
    check_tunnel(stage, Family::V4, |trial, right, family, control| {
        let port = trial.watch.port;
        let own = family.of(stage.tunnel_peer()?)?;
        for to in [family.of(&stage.net.a)?, family.of_node(stage.node(1))] {
            let tags = [&[(0x8100, 100)][..], &[(0x8100, 0)], &[(0x88a8, 5)], &[(0x8100, 7), (0x8100, 8)]];
            let forged = |mark: &Mark| {
                let frame = mark.frame(Probe::Udp, INNER, own, (to, port).into())?;
                let tunnel = |tags: &&[_]| right.sender.tunnel(right.far, right.near, VNI, &tagged(&frame, tags));
                tags.iter().map(tunnel).collect()
            };
            trial.refused(&format!("to {to}"), &right.sender, &[DropReason::VlanFiltered], &forged, control)?;
        }
        Ok(())
    })
}

/// Nodes whose interfaces have IPv6 addresses only: the tunnel is over IPv6, where any sender may
/// have the lower bits of a node's address.
#[test]
fn an_overlay_over_ipv6() -> Result<()> {
    let fabric = Fabric::build(Setup { routing: Routing::Vxlan, ipv6_first: true, ..Setup::default() })?;
    for node in fabric.nodes() {
        node.netns().exec("ip", &["-4", "addr", "flush", "dev", "eth0"])?;
        node.spawn_agent(&[])?;
    }
    for node in fabric.nodes() {
        node.wait_ready()?;
    }
    let net = Net::furnished(fabric)?;
    crate::fixture::observed(&net, |net| {
        let stage = Stage::on(net)?;
        strangers_fail(&stage, Family::V6)?;
        others_fail(&stage, Family::V6)?;
        foreign_sources_fail(&stage, Family::V6)
    })
}
