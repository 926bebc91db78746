//! Flows that outlive a change, and flows that look alike.

use crate::fixture::{Net, endpoints, in_each_routing, world};
use anyhow::{Result, anyhow, ensure};
use std::net::{IpAddr, SocketAddr};
use testkit::client::{Connection, ask, ask_udp, connected_udp, udp_from_port};
use testkit::manifest::Endpoint;
use testkit::pod::PORT;
use testkit::{Pod, Proto, wait};

in_each_routing!(
    one_client_port_through_two_vips_to_one_backend,
    one_port_of_two_pods_to_one_server_outside,
    a_client_port_to_the_vip_and_to_the_backend_itself,
    a_connected_udp_socket_moves_to_a_live_backend,
    a_udp_socket_survives_a_service_that_is_empty_for_a_while,
    a_udp_socket_older_than_its_service_is_served,
    a_connection_outlives_its_endpoint,
    terminating_endpoints_serve_when_no_ready_one_is_left,
    endpoints_that_are_not_ready_get_nothing,
);

/// Both flows have the same five numbers once translated: one of them has to give way, unseen.
fn one_client_port_through_two_vips_to_one_backend(net: &Net) -> Result<()> {
    for (i, backend) in [&net.b, &net.c].into_iter().enumerate() {
        let (one, two) = (net.service(endpoints(&[backend]))?, net.service(endpoints(&[backend]))?);
        for (first, second) in one.targets().into_iter().zip(two.targets()) {
            side_by_side(&net.a, 21_000 + i as u16, [first, second])?;
        }
    }
    Ok(())
}

fn a_client_port_to_the_vip_and_to_the_backend_itself(net: &Net) -> Result<()> {
    for (i, backend) in [&net.b, &net.c].into_iter().enumerate() {
        let service = net.service(endpoints(&[backend]))?;
        for address in backend.addresses() {
            let direct = SocketAddr::new(*address, PORT);
            side_by_side(&net.a, 21_100 + i as u16, [direct, service.target_like(*address)])?;
            side_by_side(&net.a, 21_200 + i as u16, [service.target_like(*address), direct])?;
        }
    }
    Ok(())
}

/// Two flows from one port of a pod, in turns.
fn side_by_side(from: &Pod, port: u16, targets: [SocketAddr; 2]) -> Result<()> {
    from.run_in(|| -> Result<()> {
        let udp = [udp_from_port(port, targets[0])?, udp_from_port(port, targets[1])?];
        let mut tcp = [Connection::open_from_port(port, targets[0])?, Connection::open_from_port(port, targets[1])?];
        for round in 0..5 {
            for i in 0..2 {
                ask_udp(&udp[i], &format!("udp {round} {i}")).map_err(|e| anyhow!("UDP to {}: {e}", targets[i]))?;
                tcp[i].ask(&format!("tcp {round} {i}")).map_err(|e| anyhow!("TCP to {}: {e}", targets[i]))?;
            }
        }
        Ok(())
    })?
}

/// Masquerade has to keep them apart by another source port.
fn one_port_of_two_pods_to_one_server_outside(net: &Net) -> Result<()> {
    for world in world() {
        let target = SocketAddr::new(world, PORT);
        let open = |pod: &Pod| {
            pod.run_in(|| -> Result<_> {
                Ok((udp_from_port(22_000, target)?, Connection::open_from_port(22_000, target)?))
            })?
        };
        let mut flows = [open(&net.a)?, open(&net.b)?];
        for round in 0..5 {
            for (udp, tcp) in &mut flows {
                let expected: IpAddr = net.node(1).address_like(world);
                let (_, seen) = ask_udp(udp, &format!("udp {round}")).map_err(|e| anyhow!("UDP to {world}: {e}"))?;
                ensure!(seen == expected, "{seen}");
                let (_, seen) = tcp.ask(&format!("tcp {round}")).map_err(|e| anyhow!("TCP to {world}: {e}"))?;
                ensure!(seen == expected, "{seen}");
            }
        }
    }
    Ok(())
}

fn a_connected_udp_socket_moves_to_a_live_backend(net: &Net) -> Result<()> {
    let doomed = net.node(2).add_pod("doomed")?;
    let mut service = net.service(endpoints(&[&doomed]))?;
    let sockets = service.targets().map(|target| net.a.run_in(|| connected_udp(target)));
    let sockets = sockets.into_iter().map(|s| Ok(s??)).collect::<Result<Vec<_>>>()?;
    for socket in &sockets {
        ensure!(ask_udp(socket, "before")?.0 == "doomed");
    }
    service.set(endpoints(&[&net.b]))?;
    doomed.delete()?;
    for socket in &sockets {
        wait::until("the same socket is answered by a live backend", || {
            let (server, _) = ask_udp(socket, "after")?;
            ensure!(server == "b", "answered by {server}");
            Ok(())
        })?;
    }
    Ok(())
}

fn a_udp_socket_survives_a_service_that_is_empty_for_a_while(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.b]))?;
    for target in service.targets() {
        let socket = net.a.run_in(|| connected_udp(target))??;
        ensure!(ask_udp(&socket, "first")?.0 == "b");
        service.set(Vec::new())?;
        service.wait_known()?;
        service.set(endpoints(&[&net.c]))?;
        wait::until("the same socket is answered again", || {
            let (server, _) = ask_udp(&socket, "again")?;
            ensure!(server == "c", "answered by {server}");
            Ok(())
        })?;
        service.set(endpoints(&[&net.b]))?;
        service.wait_known()?;
        // Of both families: the next round begins with the other one.
        for target in service.targets() {
            wait::until("only the first backend", || ask(net.a.netns(), Proto::Udp, target, 10)?.only_by(&["b"]))?;
        }
    }
    Ok(())
}

/// What was sent to the VIP before the service was known went to the world; that flow must not stay there.
fn a_udp_socket_older_than_its_service_is_served(net: &Net) -> Result<()> {
    for family in 0..net.unknown_service().targets().len() {
        let mut service = net.unknown_service();
        let target = service.targets()[family];
        let socket = net.a.run_in(|| connected_udp(target))??;
        ensure!(ask_udp(&socket, "too early").is_err(), "{target} is known too early");
        service.set(endpoints(&[&net.b]))?;
        wait::until("the old socket is served", || {
            let (server, _) = ask_udp(&socket, "in time")?;
            ensure!(server == "b", "answered by {server}");
            Ok(())
        })?;
    }
    Ok(())
}

fn a_connection_outlives_its_endpoint(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.b]))?;
    let mut connections = Vec::new();
    for target in service.targets() {
        connections.push(Connection::open_in(net.a.netns(), target)?);
    }
    for connection in &mut connections {
        ensure!(connection.ask("before")?.0 == "b");
    }
    service.set(endpoints(&[&net.c]))?;
    for target in service.targets() {
        wait::until("new ones go elsewhere", || ask(net.a.netns(), Proto::Tcp, target, 10)?.only_by(&["c"]))?;
    }
    service.set(Vec::new())?;
    service.wait_known()?;
    for connection in &mut connections {
        let (server, _) = connection.ask("after")?;
        ensure!(server == "b", "answered by {server}");
    }
    Ok(())
}

/// Endpoints of a pod with chosen conditions.
fn conditions(pod: &Pod, ready: bool, serving: bool, terminating: bool) -> Vec<Endpoint> {
    let change = |e: Endpoint| Endpoint { ready, serving, terminating, ..e };
    endpoints(&[pod]).into_iter().map(change).collect()
}

fn terminating_endpoints_serve_when_no_ready_one_is_left(net: &Net) -> Result<()> {
    let mut service = net.service(conditions(&net.b, false, true, true))?;
    for target in service.targets() {
        ask(net.a.netns(), Proto::Tcp, target, 10)?.only_by(&["b"])?;
    }
    service.set([conditions(&net.b, false, true, true), endpoints(&[&net.c])].concat())?;
    for target in service.targets() {
        wait::until("the ready one alone", || ask(net.a.netns(), Proto::Tcp, target, 20)?.only_by(&["c"]))?;
    }
    Ok(())
}

fn endpoints_that_are_not_ready_get_nothing(net: &Net) -> Result<()> {
    let service = net.service([conditions(&net.b, false, false, false), endpoints(&[&net.c])].concat())?;
    for target in service.targets() {
        for proto in Proto::ALL {
            ask(net.a.netns(), proto, target, 30)?.only_by(&["c"])?;
        }
    }
    Ok(())
}
