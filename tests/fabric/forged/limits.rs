//! Limits: forged packets that rustnet delivers, because it cannot distinguish them from legitimate
//! ones. `docs/security.md` names a remedy for each. If a test here fails, the document promises
//! too little.

use crate::forged::stage::{Control, Family, INNER, Place, Stage, Trial, VNI, tried};
use anyhow::{Context, Result};
use std::net::SocketAddr;
use testkit::Routing;
use testkit::packet::Probe;

/// Where pods are reached by plain routes, a pod's packet comes from a router. Any machine on the
/// segment looks like one.
fn a_routed_pods_source(stage: &Stage<'_>) -> Result<()> {
    let (sender, trial) = (stage.attacker()?, Trial::new(stage)?);
    let routed = stage.routed().context("no routed pod")?;
    for family in Family::ALL {
        let to = SocketAddr::new(family.of(&stage.net.a)?, trial.watch.port);
        for source in [family.of(routed)?, family.of_node(routed.node())] {
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, source, to)?]),
                place: Place::Pod("a"),
                source: Some(source),
            };
            trial.legitimate("a routed source", &control)?;
        }
    }
    Ok(())
}

#[test]
fn a_machine_on_the_segment_can_be_a_routed_pod_native() -> Result<()> {
    tried(Routing::Native, a_routed_pods_source)
}

#[test]
fn a_machine_on_the_segment_can_be_a_routed_pod_direct_and_vxlan() -> Result<()> {
    tried(Routing::DirectAndVxlan, a_routed_pods_source)
}

/// VXLAN has no authentication: a sender with a node's address and the VNI passes for that node.
#[test]
fn a_machine_on_the_segment_can_be_a_node_of_the_overlay() -> Result<()> {
    tried(Routing::Vxlan, |stage| {
        let (sender, trial) = (stage.attacker()?, Trial::new(stage)?);
        let peer = stage.tunnel_peer()?;
        for family in Family::ALL {
            let (source, to) = (family.of(peer)?, SocketAddr::new(family.of(&stage.net.a)?, trial.watch.port));
            let control = Control {
                sender: &sender,
                make: &|mark| {
                    let inner = mark.frame(Probe::Udp, INNER, source, to)?;
                    Ok(vec![sender.tunnel(peer.node().v4().into(), stage.node(1).v4().into(), VNI, &inner)?])
                },
                place: Place::Pod("a"),
                source: Some(source),
            };
            trial.legitimate("a tunnel in the name of a node", &control)?;
        }
        Ok(())
    })
}

/// Between the nodes themselves rustnet is not involved.
#[test]
fn a_machine_on_the_segment_can_be_a_node_to_another_node() -> Result<()> {
    tried(Routing::Vxlan, |stage| {
        let (sender, trial) = (stage.attacker()?, Trial::new(stage)?);
        for family in Family::ALL {
            let (source, to) = (family.of_node(stage.node(2)), family.of_node(stage.node(1)));
            let to = SocketAddr::new(to, trial.watch.port);
            let control = Control {
                sender: &sender,
                make: &|mark| Ok(vec![mark.shot(Probe::Udp, sender.macs, source, to)?]),
                place: Place::Host(1),
                source: Some(source),
            };
            trial.legitimate("a node's source", &control)?;
        }
        Ok(())
    })
}
