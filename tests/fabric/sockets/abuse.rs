//! Attempts to lead sockets elsewhere, or to have them see a peer that they have not.

use super::pods::listed;
use super::{exchange, loopback, open_udp, wait_ended, with_node_port};
use crate::external::balancer;
use crate::fixture::{Net, endpoints, in_each_routing, node_ports, published, wait_served};
use anyhow::{Result, ensure};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream};
use testkit::client::{Connection, ask, ask_udp, connected_udp};
use testkit::manifest::Outside;
use testkit::pod::PORT;
use testkit::{Proto, wait};

in_each_routing!(
    a_datagram_to_the_backend_itself,
    connected_sockets_of_mapped_addresses_end,
    a_connection_shows_its_service_once_its_backend_has_left,
    a_socket_that_another_namespace_uses,
    a_load_balancer_that_is_for_one_listed_pod,
    a_service_that_goes_and_comes_back,
);

/// The answers come from where they were asked for. A socket with a peer keeps it, and ends with its backend.
fn a_datagram_to_the_backend_itself(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.c]))?;
    for target in service.targets() {
        service.set(endpoints(&[&net.c]))?;
        service.wait_known()?;
        let itself = SocketAddr::new(net.c.address_like(target.ip())?, PORT);
        let connected = net.node(1).netns().run(|| -> Result<_> {
            wait::until("the old endpoint again", || {
                ensure!(ask_udp(&connected_udp(target)?, "who")?.0 == "c");
                Ok(())
            })?;
            let socket = open_udp(target)?;
            for to in [itself, target, itself, target] {
                let (_, from) = exchange(&socket, to, "who")?;
                ensure!(from == to, "{to} answers from {from}");
            }
            let connected = connected_udp(target)?;
            let (_, from) = exchange(&connected, itself, "who")?;
            ensure!((from, connected.peer_addr()?) == (target, target), "{from}");
            Ok(connected)
        })??;
        service.set(endpoints(&[&net.a]))?;
        wait_ended(&connected)?;
    }
    Ok(())
}

/// Of IPv6 sockets that speak IPv4.
fn connected_sockets_of_mapped_addresses_end(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "mapped")?;
    let mut service = net.service(endpoints(&[&net.a]))?;
    let [target, _] = service.targets();
    let IpAddr::V4(ip) = target.ip() else { anyhow::bail!("{target}") };
    let target = SocketAddr::new(ip.to_ipv6_mapped().into(), target.port());
    let mut sockets = Vec::new();
    for from in [net.node(1).netns(), known.pod.netns()] {
        let socket = from.run(|| connected_udp(target))??;
        ensure!(ask_udp(&socket, "before")?.0 == "a" && socket.peer_addr()? == target);
        sockets.push(socket);
    }
    service.set(endpoints(&[&net.c]))?;
    sockets.iter().try_for_each(wait_ended)
}

fn a_connection_shows_its_service_once_its_backend_has_left(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "shown")?;
    let mut service = net.service(endpoints(&[&net.a]))?;
    for target in service.targets() {
        service.set(endpoints(&[&net.a]))?;
        let mut open = Vec::new();
        for from in [net.node(1).netns(), known.pod.netns()] {
            wait::until("the old endpoint again", || ask(from, Proto::Udp, target, 1)?.only_by(&["a"]))?;
            open.push(from.run(|| -> Result<_> { Ok((TcpStream::connect(target)?, connected_udp(target)?)) })??);
        }
        service.set(endpoints(&[&net.c]))?;
        for (tcp, udp) in &open {
            wait_ended(udp)?;
            ensure!(tcp.peer_addr()? == target, "{:?}", tcp.peer_addr());
        }
    }
    Ok(())
}

/// A socket is its maker's: what a pod passes to the host reaches no node port at a loopback address, and the host's does from a pod.
fn a_socket_that_another_namespace_uses(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "passing")?;
    let service = with_node_port(net, endpoints(&[&net.c]))?;
    let host = net.node(1).netns();
    for target in node_ports(net.node(1), &service).map(loopback) {
        wait_served(host, target)?;
        for pod in [&net.a, &known.pod] {
            let of_pod = pod.run_in(|| open_udp(target))??;
            let answer = host.run(|| exchange(&of_pod, target, "a pod's"))?;
            ensure!(answer.is_err(), "{answer:?}");
            let of_host = host.run(|| open_udp(target))??;
            let answer = pod.run_in(|| exchange(&of_host, target, "the host's"))??;
            ensure!(answer == ("c".into(), target), "{answer:?}");
        }
    }
    Ok(())
}

/// Neither another pod's sockets nor the host's come by; and pods are judged by their own address, not by their node's.
fn a_load_balancer_that_is_for_one_listed_pod(net: &Net) -> Result<()> {
    let (inside, outside) = (listed(net, net.node(1), "inside")?, listed(net, net.node(1), "outside")?);
    let vips = balancer(net)?;
    let whole = |ip: &IpAddr| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 });
    let source_ranges = inside.pod.addresses().iter().map(whole).collect();
    let to_balancer = Outside { balancer: vips.clone(), source_ranges, ..Outside::default() };
    let mut service = published(net, to_balancer, endpoints(&[&net.c]))?;
    let port = service.targets()[0].port();
    let targets = || vips.iter().map(|vip| SocketAddr::new(*vip, port));
    for target in targets() {
        wait_served(inside.pod.netns(), target)?;
        for proto in Proto::ALL {
            ask(inside.pod.netns(), proto, target, 3)?.only_by(&["c"])?;
        }
        for from in [outside.pod.netns(), net.node(1).netns()] {
            ask(from, Proto::Tcp, target, 1)?.all_failed(ErrorKind::TimedOut)?;
        }
    }
    service.service.outside.source_ranges = net.node(1).addresses().iter().map(whole).collect();
    service.set(endpoints(&[&net.c]))?;
    for target in targets() {
        wait_served(net.node(1).netns(), target)?;
        ask(inside.pod.netns(), Proto::Tcp, target, 1)?.all_failed(ErrorKind::TimedOut)?;
    }
    Ok(())
}

/// Connections go on, and all sockets can go on with the Service that has the address now.
fn a_service_that_goes_and_comes_back(net: &Net) -> Result<()> {
    let known = listed(net, net.node(1), "again")?;
    let mut service = net.service(endpoints(&[&net.c]))?;
    let mut open = Vec::new();
    for target in service.targets() {
        for from in [net.node(1).netns(), known.pod.netns()] {
            let tcp = Connection::open_in(from, target)?;
            let (udp, loose) = from.run(|| -> Result<_> { Ok((connected_udp(target)?, open_udp(target)?)) })??;
            ask_udp(&udp, "before")?;
            from.run(|| exchange(&loose, target, "before"))??;
            open.push((from, target, tcp, udp, loose));
        }
    }
    net.fabric.manifests().delete(&service.service)?;
    for (_, _, _, udp, _) in &open {
        wait_ended(udp)?;
        let _ = udp.take_error()?;
    }
    service.set(endpoints(&[&net.c, &net.a]))?;
    service.wait_known()?;
    for (from, target, tcp, udp, loose) in &mut open {
        ensure!(tcp.ask("after")?.0 == "c");
        from.run(|| udp.connect(*target))??;
        ask_udp(udp, "after")?;
        ensure!(udp.peer_addr()? == *target);
        let (_, seen) = from.run(|| exchange(loose, *target, "after"))??;
        ensure!(seen == *target, "{target} answers from {seen}");
    }
    Ok(())
}
