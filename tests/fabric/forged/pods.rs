//! A pod with raw sockets (`CAP_NET_RAW`, which container runtimes give by default).

use crate::fixture::SERVICE_PORT;
use crate::forged::stage::{Control, Family, Mark, Place, Sender, Shot, Stage, Trial, in_routings};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use std::slice;
use std::time::Duration;
use testkit::Proto;
use testkit::client::{ask, udp_from_port};
use testkit::packet::{self, Macs, Probe, RawPort, mac_of, source_routed, tagged, unsummed};
use testkit::pod::PORT;

in_routings!(
    vxlan = Vxlan, native = Native, direct_and_vxlan = DirectAndVxlan;
    (
        a_source_that_is_not_the_pods_own,
        a_mac_that_is_not_the_pods_own,
        a_vlan_tag,
        a_source_route,
        fragments_in_the_name_of_another_pod,
        an_error_about_a_flow_of_another_pod,
        a_source_that_a_checksum_becomes,
        plain_sockets_cannot_choose_a_source,
    )
);

/// A destination, and where packets to it arrive.
struct Destination {
    address: SocketAddr,
    place: Place,
    /// The source that packets of pod `a` have there.
    source: IpAddr,
}

/// All kinds of destinations of pod `a`.
fn destinations(stage: &Stage<'_>, family: Family, port: u16) -> Result<Vec<Destination>> {
    let (a, node1) = (family.of(&stage.net.a)?, family.of_node(stage.node(1)));
    let to = |ip, place, source| Destination { address: SocketAddr::new(ip, port), place, source };
    let mut all = vec![
        to(family.of(&stage.net.b)?, Place::Pod("b"), a),
        to(family.of(&stage.net.c)?, Place::Pod("c"), a),
        to(node1, Place::Host(1), a),
        to(family.of_node(stage.node(2)), Place::Host(2), a),
        to(family.world(), Place::Wire(1), node1),
        Destination { address: stage.remote.target_like(a), place: Place::Pod("c"), source: a },
    ];
    if family == Family::V4 {
        // Linux forwards class E as unicast.
        all.push(to(family.ip("240.1.2.3", "")?, Place::Wire(1), node1));
    }
    Ok(all)
}

/// Sources that pod `a` must not use.
fn foreign(stage: &Stage<'_>, family: Family) -> Result<Vec<IpAddr>> {
    let mut all = family.martians()?;
    for pod in stage.pods().into_iter().skip(1) {
        all.push(family.of(pod)?);
    }
    all.extend(stage.net.fabric.nodes().iter().map(|node| family.of_node(node)));
    all.extend([family.attacker()?, family.world(), family.unleased()?, family.ip("10.96.0.1", "fd00:96::1")?]);
    all.push(family.ip("169.254.1.1", "fe80::1")?);
    if family == Family::V6 {
        // The pod's own IPv4 address in an IPv6 header.
        all.push(stage.net.a.v4()?.to_ipv6_mapped().into());
        all.push("fe80::a".parse()?);
    }
    Ok(all)
}

/// Makes forged packets of pod `a`, from its own address and the MACs of its link.
type Forge<'a> = &'a dyn Fn(&Mark, Family, &Destination, IpAddr, Macs) -> Result<Vec<Shot>>;

/// Tries forged packets to each destination.
fn to_each_destination(stage: &Stage<'_>, reasons: &[DropReason], forged: Forge<'_>) -> Result<()> {
    let sender = Sender::of(&stage.net.a)?;
    let mut trial = Trial::new(stage)?;
    for family in Family::ALL {
        let own = family.of(&stage.net.a)?;
        for to in destinations(stage, family, trial.watch.port)? {
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to.address)?]),
                place: to.place,
                source: Some(to.source),
            };
            let what = format!("to {} ({:?})", to.address, to.place);
            trial.refused(&what, &sender, reasons, &|mark| forged(mark, family, &to, own, sender.macs), &control)?;
        }
    }
    trial.finish()
}

fn a_source_that_is_not_the_pods_own(stage: &Stage<'_>) -> Result<()> {
    let reasons = [DropReason::Spoofed, DropReason::Martian];
    to_each_destination(stage, &reasons, &|mark, family, to, _, macs| {
        let mut shots = Vec::new();
        for source in foreign(stage, family)? {
            shots.extend(mark.shots(macs, source, to.address)?);
        }
        Ok(shots)
    })
}

fn a_mac_that_is_not_the_pods_own(stage: &Stage<'_>) -> Result<()> {
    let (a, b) = (&stage.net.a, &stage.net.b);
    let foreign = [
        mac_of(b.netns(), "eth0")?,
        mac_of(stage.node(1).netns(), "eth0")?,
        mac_of(stage.node(1).netns(), a.host_interface()?)?,
        [2, 0xba, 0xd0, 0, 0, 1],
        [1, 0, 0x5e, 0, 0, 1],
        [0xff; 6],
        [0; 6],
    ];
    to_each_destination(stage, &[DropReason::Spoofed], &|mark, _, to, own, macs| {
        let mut shots = Vec::new();
        for from in foreign {
            // Whether the frame is addressed to the gateway, or to all, makes no difference.
            for to_mac in [macs.to, [0xff; 6]] {
                shots.extend(mark.shots(Macs { from, to: to_mac }, own, to.address)?);
            }
        }
        Ok(shots)
    })
}

/// A tag that survived would choose the VLAN of the uplink's switch port.
fn a_vlan_tag(stage: &Stage<'_>) -> Result<()> {
    let tags: [&[(u16, u16)]; 7] = [
        &[(0x8100, 100)],
        &[(0x8100, 0)],
        &[(0x8100, 0xe000)],
        &[(0x8100, 0x0fff)],
        &[(0x88a8, 100)],
        &[(0x8100, 0), (0x8100, 100)],
        &[(0x88a8, 100), (0x8100, 200)],
    ];
    to_each_destination(stage, &[DropReason::VlanFiltered], &|mark, _, to, own, macs| {
        let mut shots = Vec::new();
        for tags in tags {
            for kind in Probe::ALL {
                shots.push(Shot::Frame(tagged(&mark.frame(kind, macs, own, to.address)?, tags)));
            }
        }
        Ok(shots)
    })
}

fn a_source_route(stage: &Stage<'_>) -> Result<()> {
    to_each_destination(stage, &[DropReason::SourceRoute], &|mark, family, to, own, macs| {
        let vias = [family.attacker()?, family.of(&stage.net.b)?, family.of_node(stage.node(2))];
        vias.iter()
            .map(|via| Ok(Shot::Frame(source_routed(&mark.frame(Probe::Udp, macs, own, to.address)?, *via)?)))
            .collect()
    })
}

/// The first fragment has the ports, and the later ones follow its flow. An attacker sends a first
/// fragment in the name of another pod, between the fragments of that pod, which must still arrive.
fn fragments_in_the_name_of_another_pod(stage: &Stage<'_>) -> Result<()> {
    const LEN: usize = 88;
    const ID: u16 = 41_000;
    let (a, b) = (Sender::of(&stage.net.a)?, Sender::of(&stage.net.b)?);
    let mut trial = Trial::new(stage)?;
    for (n, family) in (0..).zip(Family::ALL) {
        let target = stage.remote.target_like(family.of(&stage.net.b)?);
        let port = 24_900 + n;
        let socket = stage.net.b.run_in(|| udp_from_port(port, target))??;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        let from = SocketAddr::new(family.of(&stage.net.b)?, port);
        let to_another_port = SocketAddr::new(target.ip(), SERVICE_PORT + 1);
        for (id, poisoned) in (ID..).zip([false, true]) {
            let text = format!("{poisoned:0width$}", width = LEN - 8);
            let pieces = packet::udp_fragments(b.macs, from, target, text.as_bytes(), id, &[0..40, 40..LEN])?;
            // As the other pod, with its MAC and with the sender's own; by the same ports in
            // reverse, too.
            let mut poison = Vec::new();
            for macs in [a.macs, b.macs] {
                for to in [to_another_port, SocketAddr::new(target.ip(), 9)] {
                    poison.extend(packet::udp_fragments(
                        macs,
                        from,
                        to,
                        &[b'!'; LEN - 8],
                        id,
                        slice::from_ref(&(0..40)),
                    )?);
                }
            }
            packet::send(b.netns, "eth0", [&pieces[0][..]])?;
            if poisoned {
                packet::send(a.netns, "eth0", poison.iter().map(Vec::as_slice))?;
            }
            packet::send(b.netns, "eth0", [&pieces[1][..]])?;
            let mut buffer = [0; 512];
            let answered = socket.recv(&mut buffer).context("no answer").and_then(|len| {
                let answer = String::from_utf8_lossy(&buffer[..len]).into_owned();
                ensure!(answer.starts_with("c ") && answer.ends_with(&text), "answered: {answer}");
                Ok(())
            });
            if poisoned {
                trial.holds(&format!("a datagram in fragments to {target}"), answered);
            } else {
                answered.context("without an attack")?;
            }
        }
    }
    trial.finish()
}

/// An error concerns the sender of the packet that it quotes. An error to another address is
/// dropped.
fn an_error_about_a_flow_of_another_pod(stage: &Stage<'_>) -> Result<()> {
    let (a, b) = (Sender::of(&stage.net.a)?, Sender::of(&stage.net.b)?);
    let (attacker, mut trial) = (stage.attacker()?, Trial::new(stage)?);
    for family in Family::ALL {
        let (own, other) = (family.of(&stage.net.a)?, family.of(&stage.net.b)?);
        let (node1, world) = (family.of_node(stage.node(1)), SocketAddr::new(family.world(), 9));
        // A masqueraded flow of pod `a`.
        let port = 2_901;
        let out = Control {
            sender: &a,
            make: &|mark| {
                let from = SocketAddr::new(own, port);
                Ok(vec![Shot::Frame(packet::udp(a.macs, from, world, mark.bytes())?)])
            },
            place: Place::Wire(1),
            source: Some(node1),
        };
        let masqueraded = trial.legitimate("a masqueraded flow", &out)?.from;
        // The masqueraded packet as a router would quote it, with the mark in its payload.
        let about = |mark: &Mark| packet::udp(a.macs, masqueraded, world, mark.bytes());
        let routers = Control {
            sender: &attacker,
            make: &|mark| {
                let quoted = about(mark)?;
                let from = family.attacker()?;
                Ok(vec![Shot::Frame(packet::port_unreachable(attacker.macs, from, node1, &quoted)?)])
            },
            place: Place::Pod("a"),
            source: None,
        };
        let reasons = [DropReason::IcmpUnrelated, DropReason::Spoofed];
        let error = |mark: &Mark, sender: &Sender<'_>, from, to| {
            let quoted = about(mark)?;
            Ok(Shot::Frame(packet::port_unreachable(sender.macs, from, to, &quoted)?))
        };
        trial.refused(
            "an error of another pod",
            &b,
            &reasons,
            &|mark| {
                // To the quoted server, and to the pod; the quoted packet is of neither.
                [world.ip(), own].iter().map(|to| error(mark, &b, other, *to)).collect()
            },
            &routers,
        )?;
        trial.refused(
            "an error from outside that is addressed to another pod",
            &attacker,
            &[DropReason::IcmpUnrelated],
            &|mark| [own, other].iter().map(|to| error(mark, &attacker, family.attacker()?, *to)).collect(),
            &routers,
        )?;
        // A flow between two pods of this node: no machine outside has seen a packet of it.
        let between = SocketAddr::new(other, trial.watch.port);
        let inside = Control {
            sender: &a,
            make: &|mark| {
                let from = SocketAddr::new(own, port);
                Ok(vec![Shot::Frame(packet::udp(a.macs, from, between, mark.bytes())?)])
            },
            place: Place::Pod("b"),
            source: Some(own),
        };
        trial.legitimate("a flow between pods", &inside)?;
        trial.refused(
            "an error from outside about a flow between two pods",
            &attacker,
            &[],
            &|mark| {
                let quoted = packet::udp(a.macs, SocketAddr::new(own, port), between, mark.bytes())?;
                let from = family.attacker()?;
                let error = |to| packet::port_unreachable(attacker.macs, from, to, &quoted).map(Shot::Frame);
                [node1, own].into_iter().map(error).collect()
            },
            &routers,
        )?;
    }
    trial.finish()
}

/// Without `CAP_NET_RAW` the kernel lets a process neither choose a foreign source nor build
/// headers.
fn plain_sockets_cannot_choose_a_source(stage: &Stage<'_>) -> Result<()> {
    let pod = &stage.net.a;
    let raw = pod.netns().run_unprivileged(|| Ok(RawPort::open_here("eth0").map(drop)))?;
    ensure!(raw.is_err(), "a process without CAP_NET_RAW has a packet socket");
    RawPort::open(pod.netns(), "eth0")?;
    for family in Family::ALL {
        for source in [family.of(&stage.net.b)?, family.of_node(stage.node(1)), family.ip("10.96.0.1", "fd00:96::1")?] {
            let bound = pod.netns().run_unprivileged(|| Ok(std::net::UdpSocket::bind((source, 0))))?;
            let kind = bound.map(drop).map_err(|e| e.kind());
            ensure!(kind == Err(std::io::ErrorKind::AddrNotAvailable), "bound to {source}: {kind:?}");
        }
        let target = SocketAddr::new(family.of(&stage.net.c)?, PORT);
        let answers = ask(pod.netns(), Proto::Udp, target, 1)?;
        answers.only_as(family.of(pod)?)?;
    }
    Ok(())
}

/// A sender with a packet socket says where a device writes the checksum. A device that makes checksums writes it there, behind
/// all programs: over the source, say.
fn a_source_that_a_checksum_becomes(stage: &Stage<'_>) -> Result<()> {
    // As a NIC that makes checksums does. Virtual interfaces hand them on unmade.
    stage.node(1).set_tx_checksum(false)?;
    let tried = checksums_over_the_source(stage);
    stage.node(1).set_tx_checksum(true)?;
    tried
}

fn checksums_over_the_source(stage: &Stage<'_>) -> Result<()> {
    let sender = Sender::of(&stage.net.a)?;
    let mut trial = Trial::new(stage)?;
    for family in Family::ALL {
        let (own, other) = (family.of(&stage.net.a)?, family.of(&stage.net.b)?);
        let to = SocketAddr::new(family.of(&stage.net.c)?, trial.watch.port);
        let control = Control {
            sender: &sender,
            make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
            place: Place::Pod("c"),
            source: Some(own),
        };
        let forged = |mark: &Mark| {
            // An even number of bytes.
            let text = format!("{}{}", mark.text, &"  "[..2 - mark.text.len() % 2]);
            let from = SocketAddr::new(other, mark.port);
            let one = |kind: &Probe| {
                let wanted = packet::probe(*kind, sender.macs, from, to, text.as_bytes())?;
                Ok(Shot::Unsummed(unsummed(&wanted, own)?))
            };
            Probe::ALL.iter().map(one).collect()
        };
        trial.refused(&format!("as {other}"), &sender, &[], &forged, &control)?;
    }
    trial.finish()
}
