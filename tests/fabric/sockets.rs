//! Socket load-balancing: the nodes' own processes at Services, and what becomes of their sockets when a backend goes.

mod abuse;
mod bind;
mod closed;
mod pods;

use crate::fixture::{
    Net, SERVICE_PORT, TestService, endpoints, in_each_routing, node_port, node_ports, published, wait_served, world,
};
use crate::host_ports::{add_pod, host_port, mappings, refused, served, targets};
use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;
use testkit::client::{Connection, ask, ask_udp, connected_udp};
use testkit::manifest::{Endpoint, Outside};
use testkit::pod::PORT;
use testkit::{Proto, Setup, wait};

in_each_routing!(
    a_node_asks_its_own_node_port,
    a_node_port_at_loopback_addresses,
    loopback_of_a_pod_is_its_own,
    a_node_is_its_own_backend,
    a_socket_sees_the_service,
    datagrams_of_one_socket_to_several_services,
    a_connected_socket_that_names_its_service_again,
    a_socket_that_was_refused_by_a_service,
    mapped_addresses,
    connected_udp_sockets_end_with_their_backend,
    tcp_connections_end_with_their_endpoint_and_not_before,
    tcp_connections_to_living_servers_stay,
    the_sockets_of_others_stay,
    without_an_endpoint_packets_are_refused,
    affinity_of_a_node,
    host_ports_of_the_node_itself,
    a_host_port_at_a_loopback_address_alone,
    connected_udp_sockets_end_with_their_host_port,
    an_address_that_another_service_gets,
);

fn loopback(target: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if target.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(ip, target.port())
}

/// Without programs of socket calls, packets would do the same in some tests.
fn needs_sockets(net: &Net) -> Result<()> {
    // Pods of other tests come and go meanwhile, which fails a command that looks just then.
    wait::until("sockets ask", || {
        let shown = net.node(1).rustnetctl(&["status"])?;
        ensure!(shown.contains("those of this host's processes ask for Services"), "{shown}");
        Ok(())
    })
}

fn with_node_port(net: &Net, endpoints: Vec<Endpoint>) -> Result<TestService<'_>> {
    published(net, Outside { node_port: node_port(), ..Outside::default() }, endpoints)
}

fn a_node_asks_its_own_node_port(net: &Net) -> Result<()> {
    let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
    for node in net.fabric.nodes() {
        for target in node_ports(node, &service) {
            wait_served(node.netns(), target)?;
            for proto in Proto::ALL {
                let answers = ask(node.netns(), proto, target, 40)?;
                answers.only_by(&["a", "c"])?;
                ensure!(answers.by_server.len() == 2, "{proto} {target}: {answers}, of one backend alone");
                answers.only_as(node.address_like(target.ip()))?;
            }
        }
    }
    Ok(())
}

fn a_node_port_at_loopback_addresses(net: &Net) -> Result<()> {
    let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
    let node = net.node(1);
    for target in node_ports(node, &service).map(loopback) {
        wait_served(node.netns(), target)?;
        for proto in Proto::ALL {
            ask(node.netns(), proto, target, 40)?.only_by(&["a", "c"])?;
        }
    }
    // Any of them, and none: they stand for this host.
    for other in ["127.3.2.1", "0.0.0.0"] {
        let target = SocketAddr::new(other.parse()?, service.service.outside.node_port);
        ask(node.netns(), Proto::Tcp, target, 30)?.only_by(&["a", "c"])?;
    }
    // The port of the service itself is nobody's there.
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), SERVICE_PORT);
    ask(node.netns(), Proto::Tcp, target, 2)?.all_failed(ErrorKind::ConnectionRefused)
}

fn loopback_of_a_pod_is_its_own(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let service = with_node_port(net, endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.node(1).netns(), loopback(target))?;
        ask(net.a.netns(), Proto::Tcp, loopback(target), 2)?.all_failed(ErrorKind::ConnectionRefused)?;
        // By packets.
        ask(net.a.netns(), Proto::Tcp, target, 10)?.only_by(&["c"])?;
    }
    Ok(())
}

/// A backend on the host's network, asked by that host.
fn a_node_is_its_own_backend(net: &Net) -> Result<()> {
    let node = net.node(1);
    let own = node.addresses().map(|ip| Endpoint::ready(ip, Some(node.name())));
    let service = with_node_port(net, own.to_vec())?;
    for target in service.targets().into_iter().chain(node_ports(node, &service)) {
        for proto in Proto::ALL {
            let answers = ask(node.netns(), proto, target, 10)?;
            answers.only_by(&[node.name()])?;
        }
    }
    Ok(())
}

/// The peer of a connected socket is what was asked for, of either protocol.
fn a_socket_sees_the_service(net: &Net) -> Result<()> {
    let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
    let node = net.node(1);
    let all = service.targets().into_iter().chain(node_ports(node, &service)).collect::<Vec<_>>();
    for target in all.iter().copied().chain([loopback(all[2]), loopback(all[3])]) {
        wait_served(node.netns(), target)?;
        let (tcp, udp) = node.netns().run(|| -> Result<_> {
            Ok((TcpStream::connect(target)?.peer_addr()?, connected_udp(target)?.peer_addr()?))
        })??;
        ensure!((tcp, udp) == (target, target), "{target} shows as {tcp} and {udp}");
    }
    Ok(())
}

fn open_udp(like: SocketAddr) -> Result<UdpSocket> {
    let any: IpAddr = if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

/// A datagram there and one back by a socket without a peer: who answered, and from where.
fn exchange(socket: &UdpSocket, target: SocketAddr, text: &str) -> Result<(String, SocketAddr)> {
    let mut buffer = [0; 512];
    socket.send_to(text.as_bytes(), target)?;
    let (len, from) = socket.recv_from(&mut buffer).with_context(|| format!("no answer from {target}"))?;
    let answer = String::from_utf8_lossy(&buffer[..len]).into_owned();
    Ok((answer.split(' ').next().unwrap_or_default().to_owned(), from))
}

/// Each has one backend for as long as it serves, and each answer comes from the service that was asked.
fn datagrams_of_one_socket_to_several_services(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let one = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    let two = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    net.node(1).netns().run(|| -> Result<()> {
        for targets in [[one.targets()[0], two.targets()[0]], [one.targets()[1], two.targets()[1]]] {
            let socket = open_udp(targets[0])?;
            for target in targets {
                let mut by = BTreeSet::new();
                for n in 0..20 {
                    let (server, from) = exchange(&socket, target, &format!("n{n}"))?;
                    ensure!(from == target, "{target} answers from {from}");
                    by.insert(server);
                }
                ensure!(by.len() == 1, "{target}: one socket has the backends {by:?}");
            }
        }
        Ok(())
    })?
}

/// Each datagram goes to the backend that the socket is connected to, or its answer would be none of the peer's.
fn a_connected_socket_that_names_its_service_again(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    net.node(1).netns().run(|| -> Result<()> {
        for target in service.targets() {
            for n in 0..10 {
                let socket = connected_udp(target)?;
                let (server, from) = exchange(&socket, target, &format!("n{n}"))?;
                ensure!(from == target, "{target} answers from {from}");
                let again = ask_udp(&socket, "again")?.0;
                ensure!(again == server, "{target}: one socket has the backends {server} and {again}");
            }
        }
        Ok(())
    })?
}

/// A socket that a Service's backend has refused connects to that backend itself: it has asked for no Service.
fn a_socket_that_was_refused_by_a_service(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let mut mute = net.node(2).add_silent_pod("mute")?;
    let mut service = net.service(endpoints(&[&net.c]))?;
    service.set(endpoints(&[&mute]))?;
    let refused = |target: SocketAddr| -> Result<OwnedFd> {
        let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let refusal = connect(fd.as_raw_fd(), &SockaddrStorage::from(target));
        ensure!(refusal == Err(Errno::ECONNREFUSED), "{target}: {refusal:?}");
        Ok(fd)
    };
    let node = net.node(1).netns();
    let sockets = service.targets().map(|target| wait::until("a refusal", || node.run(|| refused(target))?));
    mute.serve(PORT)?;
    for (fd, target) in sockets.into_iter().zip(service.targets()) {
        let (fd, itself) = (fd?, SocketAddr::new(mute.address_like(target.ip())?, PORT));
        node.run(|| connect(fd.as_raw_fd(), &SockaddrStorage::from(itself)))?.context("the backend itself")?;
        let shown = TcpStream::from(fd).peer_addr()?;
        ensure!(shown == itself, "{itself} shows as {shown}");
    }
    Ok(())
}

/// IPv6 sockets that speak IPv4.
fn mapped_addresses(net: &Net) -> Result<()> {
    let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
    let node = net.node(1);
    let map = |target: SocketAddr| match target.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), target.port()),
        IpAddr::V6(_) => target,
    };
    for target in
        [service.targets()[0], node_ports(node, &service)[0], loopback(node_ports(node, &service)[0])].map(map)
    {
        let shown = node.netns().run(|| -> Result<_> {
            let socket = open_udp(target)?;
            let (server, from) = exchange(&socket, target, "mapped")?;
            ensure!(["a", "c"].contains(&server.as_str()), "{server} answered");
            Ok((TcpStream::connect(target)?.peer_addr()?, from))
        })??;
        ensure!(shown == (target, target), "{target} shows as {shown:?}");
    }
    Ok(())
}

/// Waits until a UDP socket has no peer any more.
fn wait_ended(socket: &UdpSocket) -> Result<()> {
    wait::until("the socket ended", || match ask_udp(socket, "after") {
        Err(e) if e.raw_os_error() == Some(nix::libc::EDESTADDRREQ) => Ok(()),
        other => anyhow::bail!("{other:?}"),
    })
}

fn connected_udp_sockets_end_with_their_backend(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.a]))?;
    let netns = net.node(1).netns();
    for target in service.targets() {
        service.set(endpoints(&[&net.a]))?;
        service.wait_known()?;
        wait::until("the old endpoint again", || ask(netns, Proto::Udp, target, 1)?.only_by(&["a"]))?;
        let socket = netns.run(|| connected_udp(target))??;
        ensure!(ask_udp(&socket, "before")?.0 == "a");
        service.set(endpoints(&[&net.c]))?;
        wait_ended(&socket)?;
        // The owner sees the error once, which may have been a moment ago.
        let _ = socket.take_error()?;
        netns.run(|| socket.connect(target))??;
        ensure!(ask_udp(&socket, "again")?.0 == "c");
    }
    Ok(())
}

/// To a pod of another node that is no endpoint of any Service: what lives here is known.
fn tcp_connections_end_with_their_endpoint_and_not_before(net: &Net) -> Result<()> {
    let pod = net.node(2).add_pod("leaver")?;
    let mut service = net.service(endpoints(&[&pod]))?;
    let netns = net.node(1).netns();
    for target in service.targets() {
        service.set(endpoints(&[&pod]))?;
        service.wait_known()?;
        wait::until("the old endpoint again", || ask(netns, Proto::Tcp, target, 1)?.only_by(&["leaver"]))?;
        let mut connection = Connection::open_in(netns, target)?;
        connection.ask("before")?;
        let socket = netns.run(|| connected_udp(target))??;
        ensure!(ask_udp(&socket, "before")?.0 == "leaver");
        // An endpoint that is not ready, and does not serve, is known nevertheless.
        let mut unready = endpoints(&[&net.a, &pod]);
        for endpoint in unready.iter_mut().filter(|it| it.node.as_deref() == Some("n2")) {
            (endpoint.ready, endpoint.serving) = (false, false);
        }
        service.set(unready)?;
        wait::until("the endpoint gets no new ones", || ask(netns, Proto::Tcp, target, 10)?.only_by(&["a"]))?;
        // The agent has looked: a UDP socket with the same backend has ended.
        wait_ended(&socket)?;
        ensure!(connection.ask("unready")?.0 == "leaver");
        service.set(endpoints(&[&net.a]))?;
        wait::until("the connection ended", || match connection.ask("gone") {
            Err(e) if e.kind() == ErrorKind::ConnectionAborted => Ok(()),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => anyhow::bail!("{other:?}"),
        })?;
    }
    pod.delete()
}

/// A pod of this node that is no endpoint any more, and a server that is no pod.
fn tcp_connections_to_living_servers_stay(net: &Net) -> Result<()> {
    let world = world().map(|ip| Endpoint::ready(ip, None));
    for (before, name) in [(endpoints(&[&net.a]), "a"), (world.to_vec(), "world")] {
        let mut service = net.service(before)?;
        let netns = net.node(1).netns();
        let mut open = Vec::new();
        for target in service.targets() {
            let mut connection = Connection::open_in(netns, target)?;
            ensure!(connection.ask("before")?.0 == name);
            let socket = netns.run(|| connected_udp(target))??;
            ask_udp(&socket, "before")?;
            open.push((connection, socket));
        }
        service.set(endpoints(&[&net.c]))?;
        for (_, socket) in &open {
            wait_ended(socket)?;
        }
        // A second look comes after the time that an endpoint may be missing.
        let watched = netns.run(|| connected_udp(service.targets()[0]))??;
        service.set(endpoints(&[&net.b]))?;
        wait_ended(&watched)?;
        for (connection, _) in &mut open {
            ensure!(connection.ask("after")?.0 == name);
        }
    }
    Ok(())
}

/// Sockets without a peer, sockets that never asked for a Service, and those of pods.
fn the_sockets_of_others_stay(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.a, &net.c]))?;
    let netns = net.node(1).netns();
    let target = service.targets()[0];
    let pod = net.a.addresses()[0];
    let direct_target = SocketAddr::new(pod, PORT);
    let (open, direct, watched) = netns.run(|| -> Result<_> {
        let open = open_udp(target)?;
        exchange(&open, target, "before")?;
        let mut watched = Vec::new();
        // Until one of them has the backend that goes.
        while !watched.iter().any(|socket| ask_udp(socket, "who").is_ok_and(|(by, _)| by == "a")) {
            watched.push(connected_udp(target)?);
            ensure!(watched.len() < 64, "nobody answers as a");
        }
        Ok((open, connected_udp(direct_target)?, watched))
    })??;
    let mut direct_tcp = Connection::open_in(netns, direct_target)?;
    let mut of_pod = Connection::open_in(net.b.netns(), target)?;
    service.set(endpoints(&[&net.c]))?;
    wait::until("a socket ended", || {
        let has_ended = |socket: &UdpSocket| {
            ask_udp(socket, "who").is_err_and(|e| e.raw_os_error() == Some(nix::libc::EDESTADDRREQ))
        };
        ensure!(watched.iter().any(has_ended), "none has ended");
        Ok(())
    })?;
    let (by, from) = netns.run(|| exchange(&open, target, "after"))??;
    ensure!((by.as_str(), from) == ("c", target), "{by} {from}");
    ensure!(ask_udp(&direct, "direct")?.0 == "a");
    ensure!(direct_tcp.ask("direct")?.0 == "a");
    of_pod.ask("pod")?;
    Ok(())
}

fn without_an_endpoint_packets_are_refused(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let mut service = net.service(endpoints(&[&net.a]))?;
    service.set(Vec::new())?;
    service.wait_refused()?;
    for target in service.targets() {
        for proto in Proto::ALL {
            ask(net.node(1).netns(), proto, target, 3)?.all_failed(ErrorKind::ConnectionRefused)?;
        }
    }
    Ok(())
}

/// All sockets of a node are one client.
fn affinity_of_a_node(net: &Net) -> Result<()> {
    needs_sockets(net)?;
    let mut service = net.unknown_service();
    service.service.affinity = true;
    service.set(endpoints(&[&net.a, &net.b, &net.c]))?;
    service.wait_known()?;
    for target in service.targets() {
        let answers = ask(net.node(1).netns(), Proto::Tcp, target, 20)?;
        answers.all_answered()?;
        ensure!(answers.by_server.len() == 1, "{target}: {answers}");
    }
    Ok(())
}

fn host_ports_of_the_node_itself(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let pod = add_pod(node, "own", port)?;
    for target in targets(node, port) {
        served(node.netns(), target, "own", node.address_like(target.ip()))?;
        served(node.netns(), loopback(target), "own", node.address_like(target.ip()))?;
        // A loopback address of a pod is its own, and another node's port is none of this one.
        refused(net.a.netns(), loopback(target))?;
        refused(net.node(2).netns(), loopback(target))?;
        for elsewhere in [net.node(2).address_like(target.ip()), world()[usize::from(target.is_ipv6())]] {
            refused(node.netns(), SocketAddr::new(elsewhere, port))?;
        }
        let (connected, from) = node.netns().run(|| -> Result<_> {
            let from = exchange(&open_udp(target)?, target, "datagram")?.1;
            Ok((TcpStream::connect(loopback(target))?.peer_addr()?, from))
        })??;
        ensure!((connected, from) == (loopback(target), target), "{target} shows as {connected} and {from}");
        // Another port is the node's own.
        served(node.netns(), SocketAddr::new(target.ip(), PORT), "n1", target.ip())?;
    }
    pod.delete()?;
    for target in targets(node, port) {
        refused(node.netns(), target)?;
        refused(node.netns(), loopback(target))?;
    }
    Ok(())
}

fn connected_udp_sockets_end_with_their_host_port(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    let pod = add_pod(node, "one", port)?;
    let sockets: Vec<_> = targets(node, port).into_iter().flat_map(|it| [it, loopback(it)]).collect();
    let sockets = node.netns().run(|| sockets.into_iter().map(connected_udp).collect::<Result<Vec<_>, _>>())??;
    for socket in &sockets {
        ensure!(ask_udp(socket, "before")?.0 == "one");
    }
    pod.delete()?;
    let next = add_pod(node, "two", port)?;
    for socket in &sockets {
        let target = node.netns().run(|| socket.peer_addr())?;
        wait_ended(socket).with_context(|| format!("{target:?}"))?;
    }
    next.delete()
}

/// A socket without a peer has its backend for as long as the Service that it asks for has it.
fn an_address_that_another_service_gets(net: &Net) -> Result<()> {
    let port = node_port();
    let at = |node_port| Outside { node_port, ..Outside::default() };
    let mut one = published(net, at(port), endpoints(&[&net.a]))?;
    let node = net.node(1);
    for target in node_ports(node, &one).map(loopback) {
        wait_served(node.netns(), target)?;
    }
    let targets = node_ports(node, &one).map(loopback);
    let sockets =
        targets.map(|target| node.netns().run(|| Ok::<_, anyhow::Error>((open_udp(target)?, connected_udp(target)?))));
    let mut open = Vec::new();
    for (target, sockets) in targets.into_iter().zip(sockets) {
        let (without_peer, connected) = sockets??;
        ensure!(node.netns().run(|| exchange(&without_peer, target, "before"))??.0 == "a");
        ensure!(ask_udp(&connected, "before")?.0 == "a");
        open.push((target, without_peer, connected));
    }
    // The first Service lives on by its own address.
    one.service.outside = at(0);
    one.set(endpoints(&[&net.a]))?;
    let _two = published(net, at(port), endpoints(&[&net.c]))?;
    for (target, without_peer, connected) in &open {
        wait::until("the other Service answers", || {
            let (by, _) = node.netns().run(|| exchange(without_peer, *target, "after"))??;
            ensure!(by == "c", "{by} answers");
            Ok(())
        })?;
        wait_ended(connected)?;
    }
    Ok(())
}

fn a_host_port_at_a_loopback_address_alone(net: &Net) -> Result<()> {
    let (node, port) = (net.node(1), host_port());
    for like in ["127.0.0.1", "::1"] {
        let mut pod = node.add_pod_with("local", &mappings(port, like))?;
        pod.serve(PORT)?;
        let target = SocketAddr::new(like.parse()?, port);
        served(node.netns(), target, "local", node.address_like(target.ip()))?;
        let outside = SocketAddr::new(node.address_like(target.ip()), port);
        refused(net.fabric.world(), outside)?;
        refused(node.netns(), outside)?;
        refused(net.a.netns(), outside)?;
        pod.delete()?;
    }
    Ok(())
}

/// Connections, what their sockets see, and new ones go on while no agent runs and while another one takes over; without socket
/// load-balancing, the sockets are left alone.
#[test]
fn the_agent_comes_and_goes() -> Result<()> {
    let net = Net::start(Setup::default())?;
    crate::fixture::observed(&net, |net| {
        let service = with_node_port(net, endpoints(&[&net.a, &net.c]))?;
        let node = net.node(1);
        let target = loopback(node_ports(node, &service)[0]);
        wait_served(node.netns(), target)?;
        let mut connection = Connection::open_in(node.netns(), target)?;
        node.kill_agent()?;
        ask(node.netns(), Proto::Tcp, target, 30)?.only_by(&["a", "c"])?;
        connection.ask("dead")?;
        node.start_agent(&[])?;
        ask(node.netns(), Proto::Tcp, target, 30)?.only_by(&["a", "c"])?;
        connection.ask("again")?;
        node.stop_agent()?;
        node.start_agent(&["--socket-lb", "off"])?;
        connection.ask("off")?;
        ask(node.netns(), Proto::Tcp, target, 3)?.all_failed(ErrorKind::ConnectionRefused)?;
        // By packets, which the programs of the uplink translate.
        for (target, proto) in service.targets().into_iter().flat_map(|target| Proto::ALL.map(|proto| (target, proto)))
        {
            ask(node.netns(), proto, target, 30)?.only_by(&["a", "c"])?;
        }
        Ok(())
    })
}
