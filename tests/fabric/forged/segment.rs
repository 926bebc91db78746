//! A machine on the nodes' segment, and one behind a router.

use crate::fixture::{SERVICE_PORT, endpoints, node_port, published};
use crate::forged::stage::{Control, Family, Mark, Place, Sender, Shot, Stage, Trial, in_routings};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::Pod;
use testkit::check::VXLAN_PORT;
use testkit::client::{Connection, ask_udp, udp_from_port};
use testkit::manifest::Outside;
use testkit::packet::{self, Probe, source_routed, tagged};

in_routings!(
    vxlan = Vxlan, native = Native, direct_and_vxlan = DirectAndVxlan;
    (
        a_forged_source_to_a_pod,
        a_forged_source_to_the_node,
        a_forged_source_through_a_router,
        a_forged_source_to_the_overlays_port_of_a_pod,
        a_forged_answer_of_a_service,
        a_service_asked_from_outside,
        a_vlan_tag_and_a_source_route,
        a_clients_packet_in_a_nodes_name,
    )
);

/// Addresses of this node and of its pods.
fn own_addresses(stage: &Stage<'_>, family: Family) -> Result<Vec<IpAddr>> {
    Ok(vec![family.of(&stage.net.a)?, family.of(&stage.net.b)?, family.of_node(stage.node(1)), family.unleased()?])
}

/// Addresses that come through the tunnel only.
fn tunnelled(stage: &Stage<'_>, family: Family) -> Result<Vec<IpAddr>> {
    let Some(pod) = stage.tunnelled() else { return Ok(Vec::new()) };
    Ok(vec![family.of(pod)?, family.of_node(pod.node())])
}

/// Tries sources, to one place, and counts what is dropped where there are `reasons`.
fn sources(
    trial: &mut Trial<'_>,
    sender: &Sender<'_>,
    reasons: &[DropReason],
    (own, to, place): (IpAddr, SocketAddr, Place),
    forged: &[IpAddr],
) -> Result<()> {
    let control = Control {
        sender,
        make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
        place,
        source: Some(own),
    };
    trial.refused(
        &format!("to {to}"),
        sender,
        reasons,
        &|mark| {
            let each: Result<Vec<_>> = forged.iter().map(|source| mark.shots(sender.macs, *source, to)).collect();
            Ok(each?.into_iter().flatten().collect())
        },
        &control,
    )
}

fn a_forged_source_to_a_pod(stage: &Stage<'_>) -> Result<()> {
    let (sender, mut trial) = (stage.attacker()?, Trial::new(stage)?);
    for family in Family::ALL {
        let to = SocketAddr::new(family.of(&stage.net.a)?, trial.watch.port);
        let legitimate = (family.attacker()?, to, Place::Pod("a"));
        let mut all = own_addresses(stage, family)?;
        all.extend(tunnelled(stage, family)?);
        all.push(stage.local.target_like(to.ip()).ip());
        sources(&mut trial, &sender, &[DropReason::Spoofed], legitimate, &all)?;
        sources(&mut trial, &sender, &[DropReason::Martian], legitimate, &family.martians()?)?;
    }
    trial.finish()
}

/// The node's own stack drops some of them itself, uncounted. It takes IPv4-mapped addresses: to a
/// socket of both families, `::ffff:127.0.0.1` in an IPv6 header is 127.0.0.1.
fn a_forged_source_to_the_node(stage: &Stage<'_>) -> Result<()> {
    let (sender, mut trial) = (stage.attacker()?, Trial::new(stage)?);
    for family in Family::ALL {
        let to = SocketAddr::new(family.of_node(stage.node(1)), trial.watch.port);
        let mut all = own_addresses(stage, family)?;
        // Other nodes speak to this one without the tunnel, their pods do not.
        all.extend(tunnelled(stage, family)?.first());
        // For the kernel, 0.0.0.0/8 is unicast but for its first address.
        all.extend(family.martians()?.into_iter().filter(|martian| martian.to_string() != "0.1.2.3"));
        all.push(stage.local.target_like(to.ip()).ip());
        sources(&mut trial, &sender, &[], (family.attacker()?, to, Place::Host(1)), &all)?;
    }
    trial.finish()
}

fn a_forged_source_through_a_router(stage: &Stage<'_>) -> Result<()> {
    let (sender, mut trial) = (stage.outsider()?, Trial::new(stage)?);
    for family in Family::ALL {
        let to = SocketAddr::new(family.of(&stage.net.a)?, trial.watch.port);
        let mut all = own_addresses(stage, family)?;
        all.extend(tunnelled(stage, family)?);
        all.push(stage.local.target_like(to.ip()).ip());
        sources(&mut trial, &sender, &[DropReason::Spoofed], (family.outsider()?, to, Place::Pod("a")), &all)?;
    }
    trial.finish()
}

/// To a pod the overlay's port is a port like any other: it opens no way past the checks.
fn a_forged_source_to_the_overlays_port_of_a_pod(stage: &Stage<'_>) -> Result<()> {
    let mut trial = Trial::new(stage)?;
    for family in Family::ALL {
        let to = SocketAddr::new(family.of(&stage.net.a)?, VXLAN_PORT);
        for (sender, own) in [(stage.attacker()?, family.attacker()?), (stage.outsider()?, family.outsider()?)] {
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
                place: Place::Pod("a"),
                source: Some(own),
            };
            let mut all = own_addresses(stage, family)?;
            all.extend(tunnelled(stage, family)?);
            all.push(stage.local.target_like(to.ip()).ip());
            trial.refused(
                &format!("as {own}"),
                &sender,
                &[DropReason::Spoofed],
                &|mark| all.iter().map(|source| mark.shot(Probe::Udp, sender.macs, *source, to)).collect(),
                &control,
            )?;
        }
    }
    trial.finish()
}

/// A pod receives no answer of a service that it has not asked, and such a packet does not decide
/// which backend gets its next request.
fn a_forged_answer_of_a_service(stage: &Stage<'_>) -> Result<()> {
    let pod = &stage.net.a;
    let mut trial = Trial::new(stage)?;
    let mut port = 25_100;
    for family in Family::ALL {
        let vip = stage.remote.target_like(family.of(pod)?);
        for (who, sender, own) in [
            ("on the segment", stage.attacker()?, family.attacker()?),
            ("behind a router", stage.outsider()?, family.outsider()?),
        ] {
            for kind in [Probe::Udp, Probe::Tcp] {
                port += 1;
                let to = SocketAddr::new(family.of(pod)?, port);
                let what = format!("{kind:?} in the name of {vip} from a machine {who}");
                let control = Control {
                    sender: &sender,
                    make: &|mark| Ok(vec![mark.shot(kind, sender.macs, own, to)?]),
                    place: Place::Pod("a"),
                    source: Some(own),
                };
                trial.refused(
                    &what,
                    &sender,
                    &[DropReason::Spoofed],
                    &|mark| {
                        let frame = packet::probe(kind, sender.macs, vip, to, mark.bytes())?;
                        Ok(vec![Shot::Frame(frame)])
                    },
                    &control,
                )?;
                let answered = if kind == Probe::Udp {
                    let socket = pod.run_in(|| udp_from_port(port, vip))??;
                    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
                    ask_udp(&socket, "request")
                } else {
                    pod.run_in(|| Connection::open_from_port(port, vip))?
                        .map_err(|e| std::io::Error::other(format!("{e:#}")))
                        .and_then(|mut connection| connection.ask("request"))
                };
                let by = answered.context("the service does not answer").and_then(|(name, _)| {
                    ensure!(name == "c", "answered by {name}");
                    Ok(())
                });
                trial.holds(&format!("a request after {what}"), by);
            }
        }
    }
    trial.finish()
}

/// Cluster addresses are not served to the outside.
fn a_service_asked_from_outside(stage: &Stage<'_>) -> Result<()> {
    let (sender, mut trial) = (stage.attacker()?, Trial::new(stage)?);
    for family in Family::ALL {
        let own = family.attacker()?;
        let to = SocketAddr::new(family.of(&stage.net.b)?, trial.watch.port);
        let vip = stage.local.target_like(own).ip();
        let control = Control {
            sender: &sender,
            make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
            place: Place::Pod("b"),
            source: Some(own),
        };
        trial.refused(
            "a service",
            &sender,
            &[DropReason::IsClusterIp],
            &|mark| {
                let ports = [SERVICE_PORT, VXLAN_PORT, 9];
                ports.iter().map(|port| mark.shot(Probe::Udp, sender.macs, own, (vip, *port).into())).collect()
            },
            &control,
        )?;
    }
    trial.finish()
}

/// A tagged frame belongs to another device than the uplink.
fn a_vlan_tag_and_a_source_route(stage: &Stage<'_>) -> Result<()> {
    let (sender, mut trial) = (stage.attacker()?, Trial::new(stage)?);
    for family in Family::ALL {
        let (own, to) = (family.attacker()?, SocketAddr::new(family.of(&stage.net.a)?, trial.watch.port));
        let control = Control {
            sender: &sender,
            make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, own, to)?]),
            place: Place::Pod("a"),
            source: Some(own),
        };
        let shot = |frame| vec![Shot::Frame(frame)];
        // The last ones name no VLAN, and the kernel takes off all of them: behind the hook.
        let zeros = [(0x8100, 0), (0x88a8, 0), (0x8100, 0xe000)];
        for tags in [&[(0x8100, 100)][..], &[(0x88a8, 100)], &[(0x8100, 7), (0x8100, 0)], &zeros[..2], &zeros] {
            for source in [own, family.of(&stage.net.b)?] {
                let forged = |mark: &Mark| Ok(shot(tagged(&mark.frame(Probe::Udp, sender.macs, source, to)?, tags)));
                trial.refused(&format!("tags {tags:x?}, from {source}"), &sender, &[], &forged, &control)?;
            }
        }
        let via = family.of(&stage.net.b)?;
        let forged = |mark: &Mark| Ok(shot(source_routed(&mark.frame(Probe::Udp, sender.macs, own, to)?, via)?));
        trial.refused("a source route", &sender, &[], &forged, &control)?;
    }
    trial.finish()
}

/// A packet for direct server return, of a client that asks a node for a Service: in the name of a node that has to send such packets
/// through the tunnel, or of the pod's own node. The control is a packet to the pod.
fn a_clients_packet_in_a_nodes_name(stage: &Stage<'_>) -> Result<()> {
    let outside = Outside { node_port: node_port(), ..Outside::default() };
    let service = published(stage.net, outside, endpoints(&[&stage.net.a]))?;
    let mut trial = Trial::new(stage)?;
    for (sender, own) in
        [(stage.attacker()?, Family::attacker as fn(Family) -> _), (stage.outsider()?, Family::outsider)]
    {
        for family in Family::ALL {
            let (client, pod) = (own(family)?, family.of(&stage.net.a)?);
            let to = SocketAddr::new(pod, trial.watch.port);
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, client, to)?]),
                place: Place::Pod("a"),
                source: Some(client),
            };
            let nodes = [Some(stage.node(1)), stage.tunnelled().map(Pod::node)];
            for node in nodes.into_iter().flatten().map(|node| family.of_node(node)) {
                let asked = SocketAddr::new(node, service.service.outside.node_port);
                let make = |mark: &Mark| -> Result<Vec<Shot>> {
                    let inside = Probe::ALL.iter().map(|kind| mark.frame(*kind, sender.macs, client, asked));
                    let wrapped = inside.map(|inside| packet::ip_in_ip(sender.macs, node, pod, &inside?));
                    wrapped.map(|frame| Ok(Shot::Frame(frame?))).collect()
                };
                trial.refused(&format!("in the name of {node}"), &sender, &[DropReason::Spoofed], &make, &control)?;
            }
        }
    }
    trial.finish()
}
