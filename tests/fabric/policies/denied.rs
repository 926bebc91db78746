//! With `--policy-deny-response icmp`, a pod that its own node denies gets an error in place of a time-out, which its kernel accepts.

use super::{NAMESPACE, pods_yaml, put_policy};
use crate::fixture::{Net, endpoints, observed, world};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use testkit::client::{Connection, ask, ask_udp, connected_udp};
use testkit::pod::PORT;
use testkit::sniff::{Headers, Sniffer};
use testkit::{Netns, Proto, Routing, Setup, wait};

#[test]
fn denials_are_answered_by_vxlan() -> Result<()> {
    answered(Routing::Vxlan)
}

#[test]
fn denials_are_answered_by_native_routes() -> Result<()> {
    answered(Routing::Native)
}

/// What the kernel makes of the error: `EHOSTUNREACH` of IPv4's, `EACCES` of IPv6's.
fn kind(target: IpAddr) -> (ErrorKind, i32) {
    if target.is_ipv4() { (ErrorKind::HostUnreachable, 113) } else { (ErrorKind::PermissionDenied, 13) }
}

/// Connects by TCP, and asks by a connected UDP socket. The error of a time-out is another one.
fn fails(from: &Netns, target: SocketAddr) -> Result<()> {
    let (kind, number) = kind(target.ip());
    for proto in Proto::ALL {
        let answers = ask(from, proto, target, 2)?;
        answers.all_failed(kind).with_context(|| format!("{proto} from {} to {target}", from.name()))?;
        let is_it = |text: &str| text.contains(&format!("os error {number}"));
        ensure!(answers.errors.iter().all(|e| is_it(&e.text)), "{proto} to {target}: {answers}");
    }
    Ok(())
}

fn all_fail(when: &str, asks: &[(&Netns, SocketAddr)]) -> Result<()> {
    for (from, target) in asks {
        wait::until(&format!("{when}: {} gets an error from {target}", from.name()), || fails(from, *target))?;
    }
    Ok(())
}

fn answered(routing: Routing) -> Result<()> {
    let agent = &["--policy-deny-response", "icmp"];
    observed(&Net::start(Setup { routing, agent, ..Setup::default() })?, run)
}

fn run(net: &Net) -> Result<()> {
    let (a, b, c) = (&net.a, &net.b, &net.c);
    let manifests = net.fabric.manifests();
    manifests.write("namespace.yaml", NAMESPACE)?;
    manifests.write("pods.yaml", &pods_yaml(&[a, b, c]))?;
    let of_b = net.service(endpoints(&[b]))?;
    let of_c = net.service(endpoints(&[c]))?;
    let open: Vec<_> = b.addresses().iter().map(|ip| SocketAddr::new(*ip, PORT)).collect();
    let mut connections = Vec::new();
    for target in &open {
        let datagrams = a.netns().run(|| connected_udp(*target))??;
        ask_udp(&datagrams, "before")?;
        connections.push((*target, Connection::open_in(a.netns(), *target)?, datagrams));
    }

    put_policy(manifests, "closed", "b", "policyTypes: [Ingress]")?;
    let before = net.node(1).counter(DropReason::PolicyDenied)?;
    let asks: Vec<_> = open.iter().copied().chain(of_b.targets()).map(|target| (a.netns(), target)).collect();
    all_fail("b is closed", &asks)?;
    ensure!(net.node(1).counter(DropReason::PolicyDenied)? >= before + 8, "denials are not counted");
    // What was allowed: datagrams fail, too. A TCP connection that is established outlives errors (RFC 1122, 4.2.3.9).
    for (target, connection, datagrams) in &mut connections {
        let error = ask_udp(datagrams, "after").err().context("a flow outlives its policy")?;
        ensure!(error.kind() == kind(target.ip()).0, "{target}: {error}");
        ensure!(connection.ask("after").is_err(), "{target}: a connection outlives its policy");
    }

    manifests.remove("closed.yaml")?;
    put_policy(manifests, "silent", "a", "policyTypes: [Egress]")?;
    let mut targets: Vec<_> =
        [b, c].iter().flat_map(|pod| pod.addresses()).map(|ip| SocketAddr::new(*ip, PORT)).collect();
    targets.extend(of_b.targets().into_iter().chain(of_c.targets()));
    targets.extend(world().map(|ip| SocketAddr::new(ip, PORT)));
    let asks: Vec<_> = targets.iter().map(|target| (a.netns(), *target)).collect();
    let sniffer = Sniffer::start(a.netns(), "eth0")?;
    all_fail("a may open nothing", &asks)?;
    for target in &targets {
        sniffer.wait_for("an error from the address asked", |h| h.src == target.ip() && is_prohibited(h))?;
    }
    sniffer.stop().verify_checksums()?;
    // It answers, and others are answered.
    for proto in Proto::ALL {
        ask(c.netns(), proto, SocketAddr::new(a.v4()?.into(), PORT), 5)?.only_by(&["a"])?;
        wait::until("b is open again", || {
            ask(c.netns(), proto, SocketAddr::new(b.v4()?.into(), PORT), 5)?.only_by(&["b"])
        })?;
    }
    Ok(())
}

/// Type and code stand where ports do.
fn is_prohibited(h: &Headers) -> bool {
    matches!((h.proto, h.sport, h.dport), (1, 3, 13) | (58, 1, 1))
}
