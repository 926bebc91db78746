//! What clients outside must not get by a Service, and what a Service for them must not do to other flows.

use super::{NODE_PORT, ask, publish};
use crate::flows::{PORT, Proto, TARGET, from_outside};
use crate::harness::{Flow, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;

/// Who may write an EndpointSlice could name another node's tunnel as a backend, and this node would lend everybody its address
/// there.
#[test]
fn nobody_reaches_the_overlays_port_by_a_service() -> Result<()> {
    labs(|lab, net| {
        for to in [net.node2(), net.far(), net.routed(), net.world(), net.node()] {
            publish(lab, net, Proto::Udp, (to, 8472))?;
            let ask = ask(net, Proto::Udp);
            lab.uplink_in(&ask)?.dropped(DropReason::EncapProhibited).with_context(|| format!("to {to}"))?;
            ensure!(lab.halves()? == 0, "a refused packet opened a flow");
        }
        // A pod that listens there is no tunnel's end.
        publish(lab, net, Proto::Udp, (net.b(), 8472))?;
        let ask = ask(net, Proto::Udp);
        lab.uplink_in(&ask)?.to_the_pod(&ask.hop().between((net.world(), PORT), (net.b(), 8472)))
    })
}

/// A client that claims another node's overlay's port would get a backend's answers there, from this node.
#[test]
fn no_answer_goes_to_the_overlays_port() -> Result<()> {
    labs(|lab, net| {
        publish(lab, net, Proto::Udp, (net.far(), TARGET))?;
        let ask = from_outside(Proto::Udp, (net.node2(), 8472), (net.node(), NODE_PORT));
        lab.uplink_in(&ask)?;
        let source = lab.half(Flow::of(&ask))?.to.sport;
        let answer = ask.hop().between((net.node(), source), (net.far(), TARGET)).reply();
        lab.overlay_in(net.node2(), &answer)?.dropped(DropReason::EncapProhibited)
    })
}
