//! Collisions: several connections to one backend from one client port, which the backend must tell
//! apart.

use super::serve;
use crate::flows::{
    PORT, Proto, SERVED, TARGET, VIP_PORT, answer_of_b, as_from_b, at_backend, at_client, from_a, from_b, later,
};
use crate::frame::{ACK, FIN, Frame};
use crate::harness::{Flow, Lab, Net, SNAT, each, labs};
use anyhow::{Context, Result, ensure};

/// Two addresses with one backend, asked from one port: the backend must see two connections (RFC
/// 9293, 3.4).
#[test]
fn two_services_with_one_backend_and_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            serve(lab, net, proto, net.vip(2), (net.b(), TARGET))?;
            let mut seen = Vec::new();
            for n in [1, 2] {
                let ask = from_a(net, proto, (net.vip(n), VIP_PORT));
                let shot = lab.pod_sends(&ask)?;
                let to = lab.half(Flow::of(&ask))?.to;
                let arrives = ask.hop().between((net.a(), to.sport), (net.b(), TARGET));
                shot.to_the_pod(&arrives)?;
                ensure!(!seen.contains(&to.sport), "both come from port {}", to.sport);
                ensure!(n == 1 || SNAT.contains(&to.sport), "port {} is not set aside", to.sport);
                seen.push(to.sport);
            }
            for (n, port) in [1, 2].into_iter().zip(seen) {
                let answer = from_b(net, proto, (net.a(), port)).map(|f| f.set_ports(TARGET, port));
                lab.pod_sends(&answer)?.to_the_pod(&at_client(net, &answer, n))?;
            }
            Ok(())
        })
    })
}

/// A connection to the backend itself has just ended: its server may hold that pair of ports in
/// TIME_WAIT, so that the next one, by the service, comes from another port.
#[test]
fn a_service_asked_after_its_backend_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp, net.vip(1), (net.b(), TARGET))?;
        let direct = from_a(net, Proto::Tcp, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        let answer = as_from_b(&direct.reply());
        for end in [direct.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
            lab.pod_sends(&end)?.to_the_pod(&end.hop())?;
        }
        let ask = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        let shot = lab.pod_sends(&ask)?;
        let port = lab.half(Flow::of(&ask))?.to.sport;
        ensure!(port != PORT, "the backend sees the pair of ports again");
        shot.to_the_pod(&ask.hop().between((net.a(), port), (net.b(), TARGET)))
    })
}

/// The client asks the backend itself and its service, from one port.
#[test]
fn a_service_and_its_backend_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let direct = from_a(net, proto, (net.b(), TARGET));
            lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let shot = lab.pod_sends(&ask)?;
            let port = lab.half(Flow::of(&ask))?.to.sport;
            ensure!(port != PORT, "the backend sees one connection");
            shot.to_the_pod(&ask.hop().between((net.a(), port), (net.b(), TARGET)))?;
            let answer = as_from_b(&direct.reply());
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())
        })
    })
}

/// Asks a service on pod B, and then pod B itself from the same port. Returns what arrives of the
/// first, the second as it was sent, and the port that the second leaves with.
fn ask_service_then_backend(lab: &Lab, net: Net, proto: Proto) -> Result<(Frame, Frame, u16)> {
    serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
    let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
    let arrives = at_backend(net, &ask, net.b());
    lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
    let direct = from_a(net, proto, (net.b(), TARGET));
    let shot = lab.pod_sends(&direct)?;
    let port = lab.half(Flow::of(&direct))?.to.sport;
    ensure!(port != PORT, "the backend sees one connection");
    shot.to_the_pod(&direct.hop().between((net.a(), port), (net.b(), TARGET)))?;
    Ok((arrives, direct, port))
}

/// And the other way round: the service first.
#[test]
fn a_backend_asked_directly_after_its_service_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let (_, direct, port) = ask_service_then_backend(lab, net, proto)?;
            let arrives = direct.hop().between((net.a(), port), (net.b(), TARGET));
            let answer = answer_of_b(&arrives);
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.b(), TARGET), (net.a(), PORT)))
        })
    })
}

/// Of the two entries that then stand under one key the first is evicted: the other does not take
/// its packets, and goes on.
#[test]
fn the_first_of_two_entries_under_one_key_is_evicted() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let (arrives, direct, port) = ask_service_then_backend(lab, net, proto)?;
            let answer = answer_of_b(&arrives);
            lab.evict(Flow::of(&answer))?;
            let shot = lab.pod_sends(&answer)?;
            let to = lab.half(Flow::of(&answer)).context("the answer has no entry of its own")?.to;
            shot.to_the_pod(&answer.hop().between((net.b(), to.sport), (net.a(), PORT)))?;
            let more = later(&direct);
            lab.pod_sends(&more)?.to_the_pod(&more.hop().between((net.a(), port), (net.b(), TARGET)))?;
            lab.forget()
        })
    })
}
