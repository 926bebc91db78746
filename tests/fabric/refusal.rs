//! Nobody there: refused, at once, by an answer that the client's kernel accepts.

use crate::fixture::{Net, SERVICE_PORT, endpoints, in_each_routing};
use anyhow::{Result, ensure};
use rustnet_common::drop::DropReason;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;
use testkit::client::{ask, connected_udp};
use testkit::pod::PORT;
use testkit::sniff::{Frame, Sniffer};
use testkit::{Netns, Pod, Proto, wait};

in_each_routing!(
    a_service_without_endpoints_refuses,
    an_unknown_port_refuses,
    an_address_of_a_service_range_that_no_service_has_leads_nowhere,
    a_service_that_is_filled_again_serves,
    refusals_are_sound_packets,
    refusals_are_sound_packets_with_offloads_on,
    a_closed_port_of_a_backend_is_reported_through_the_translation,
    a_closed_port_of_a_pod_is_reported,
);

/// Clients must not wait for a time-out; the bar is far above what a refusal takes and far below any time-out.
const AT_ONCE: Duration = Duration::from_secs(1);

fn refused(from: &Netns, target: SocketAddr) -> Result<()> {
    for proto in Proto::ALL {
        let answers = ask(from, proto, target, 3)?;
        answers.all_failed(ErrorKind::ConnectionRefused)?;
        ensure!(answers.errors.iter().all(|e| e.after < AT_ONCE), "{target}: slow: {answers}");
    }
    Ok(())
}

fn a_service_without_endpoints_refuses(net: &Net) -> Result<()> {
    let before = net.node(1).counter(DropReason::NoBackend)?;
    let service = net.service(Vec::new())?;
    for target in service.targets() {
        for from in [net.a.netns(), net.c.netns(), net.node(1).netns(), net.node(2).netns()] {
            refused(from, target)?;
        }
    }
    ensure!(net.node(1).counter(DropReason::NoBackend)? >= before + 24, "refusals are not counted");
    Ok(())
}

fn an_unknown_port_refuses(net: &Net) -> Result<()> {
    let before = net.node(1).counter(DropReason::NoServicePort)?;
    let service = net.service(endpoints(&[&net.b]))?;
    for target in service.targets() {
        for from in [net.a.netns(), net.c.netns(), net.node(1).netns()] {
            refused(from, SocketAddr::new(target.ip(), SERVICE_PORT + 1))?;
        }
    }
    ensure!(net.node(1).counter(DropReason::NoServicePort)? >= before + 24, "refusals are not counted");
    Ok(())
}

/// The router would send its packets back: they stay on the node while the range is there.
fn an_address_of_a_service_range_that_no_service_has_leads_nowhere(net: &Net) -> Result<()> {
    // A range that no other test asks.
    let range = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: second}\n\
                 spec: {cidrs: [10.95.7.0/24, 'fd00:95:7::/112']}\n";
    let nobody: [SocketAddr; 2] = ["10.95.7.9:80".parse()?, "[fd00:95:7::9]:80".parse()?];
    let node = net.node(1);
    let all = || [net.a.netns(), node.netns()].into_iter().flat_map(|from| nobody.map(|target| (from, target)));
    let wire = Sniffer::start(node.netns(), "eth0")?;
    let send = |from: &Netns, target| -> Result<()> {
        from.run(|| connected_udp(target)?.send(b"x"))??;
        Ok(())
    };
    let left = |target: SocketAddr| -> Result<usize> {
        Sniffer::catch_up([&wire])?;
        let is_ours = |frame: &Frame| frame.headers().is_some_and(|h| h.dst == target.ip());
        Ok(wire.matching(usize::MAX, is_ours).len())
    };
    let dropped = || node.counter(DropReason::NoService);
    let all_leave = || {
        all().try_for_each(|(from, target)| {
            wait::until("packets leave the node", || {
                let before = left(target)?;
                send(from, target)?;
                ensure!(left(target)? > before, "nothing to {target}");
                Ok(())
            })
        })
    };
    all_leave()?;
    net.fabric.manifests().write("service-ranges.yaml", range)?;
    for target in nobody {
        wait::until("the range is there", || {
            let before = dropped()?;
            send(net.a.netns(), target)?;
            ensure!(dropped()? > before, "{target} is not refused");
            Ok(())
        })?;
    }
    for (from, target) in all() {
        let before = (left(target)?, dropped()?);
        send(from, target)?;
        ensure!(dropped()? > before.1, "what is dropped is not counted");
        ask(from, Proto::Tcp, target, 1)?.all_failed(ErrorKind::TimedOut)?;
        ensure!(left(target)? == before.0, "packets to {target} leave the node");
    }
    net.fabric.manifests().remove("service-ranges.yaml")?;
    all_leave()
}

fn a_service_that_is_filled_again_serves(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.c]))?;
    for _ in 0..2 {
        service.set(Vec::new())?;
        service.wait_known()?;
        service.set(endpoints(&[&net.b]))?;
        for target in service.targets() {
            for proto in Proto::ALL {
                wait::until("served again", || ask(net.a.netns(), proto, target, 5)?.only_by(&["b"]))?;
            }
        }
    }
    Ok(())
}

fn refusals_are_sound_packets(net: &Net) -> Result<()> {
    let from = net.node(1).add_pod("plain")?;
    from.set_tx_checksum(false)?;
    sound(net, &from)
}

/// The request's checksum is left to the device: then the refusal's is, too (its buffer is the request's).
fn refusals_are_sound_packets_with_offloads_on(net: &Net) -> Result<()> {
    sound(net, &net.a)
}

fn sound(net: &Net, from: &Pod) -> Result<()> {
    let service = net.service(Vec::new())?;
    let sniffer = Sniffer::start(from.netns(), "eth0")?;
    for target in service.targets() {
        refused(from.netns(), target)?;
        let vip = target.ip();
        sniffer.wait_for("a refusal from the VIP", |h| h.src == vip)?;
    }
    sniffer.stop().verify_checksums()
}

fn a_closed_port_of_a_backend_is_reported_through_the_translation(net: &Net) -> Result<()> {
    let silent = [net.node(1).add_silent_pod("silent-1")?, net.node(2).add_silent_pod("silent-2")?];
    for pod in &silent {
        let service = net.unawaited_service(endpoints(&[pod]))?;
        service.wait_refused()?;
        let sniffer = Sniffer::start(net.a.netns(), "eth0")?;
        for target in service.targets() {
            refused(net.a.netns(), target)?;
            let backend = pod.address_like(target.ip())?;
            sniffer.none("the backend shows through the translation", |h| h.src == backend)?;
        }
        sniffer.stop().verify_checksums()?;
    }
    Ok(())
}

fn a_closed_port_of_a_pod_is_reported(net: &Net) -> Result<()> {
    for pod in [&net.b, &net.c] {
        for address in pod.addresses() {
            refused(net.a.netns(), SocketAddr::new(*address, PORT + 1))?;
            refused(net.node(1).netns(), SocketAddr::new(*address, PORT + 1))?;
        }
    }
    Ok(())
}
