//! What the tables of sockets hold of those that are closed: nothing; and of those that are open: all, however many come and go.

use super::{exchange, open_udp, wait_ended};
use crate::fixture::{Net, endpoints, in_each_routing, observed};
use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::sys::socket::{SockaddrStorage, connect};
use rustnet_agent::bpf::store::Map;
use rustnet_agent::bpf::store::sockets::Sockets;
use rustnet_common::names::map;
use rustnet_common::socket::{SocketKey, TRAIL};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use testkit::client::{ask_udp, connected_udp};
use testkit::{Node, Setup};

in_each_routing!(
    short_connections_leave_nothing,
    a_socket_with_several_peers_leaves_nothing,
    a_socket_that_lost_its_peer_leaves_nothing,
    a_socket_with_more_peers_than_it_remembers,
    a_socket_that_asks_the_same_again_and_again,
);

/// The kernel's number of a socket.
fn cookie(socket: BorrowedFd<'_>) -> Result<u64> {
    let (mut cookie, mut len) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: value and length are ours, and the length is that of the value.
    let result = unsafe {
        let value = (&raw mut cookie).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, value, &raw mut len)
    };
    ensure!(result == 0, "SO_COOKIE: {}", std::io::Error::last_os_error());
    Ok(cookie)
}

/// The sockets of which the tables hold something: of those with a backend, and of those without a peer.
fn held(node: &Node) -> Result<[Vec<u64>; 2]> {
    let dir = node.bpffs_from_outside();
    let led: Vec<_> = Sockets::open(&dir)?.entries()?.into_iter().map(|(key, _)| key.cookie).collect();
    let kept = Map::<SocketKey, u32>::open(&dir, map::SOCK_FWD)?.entries()?;
    Ok([led, kept.into_iter().map(|(key, _)| key.cookie).collect()])
}

/// How many entries of a socket either table has.
fn counts(node: &Node, cookie: u64) -> Result<[usize; 2]> {
    Ok(held(node)?.map(|table| table.iter().filter(|it| **it == cookie).count()))
}

/// Its address as an IPv6 socket writes it.
fn mapped(target: SocketAddr) -> SocketAddr {
    match target.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), target.port()),
        IpAddr::V6(_) => target,
    }
}

/// Of either protocol, both families and both in one socket; with a peer and without.
fn short_connections_leave_nothing(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.c]))?;
    let node = net.node(1);
    let targets = service.targets().into_iter().flat_map(|it| BTreeSet::from([it, mapped(it)]));
    for target in targets {
        node.netns().run(|| -> Result<()> {
            let streams = (0..20).map(|_| Ok(TcpStream::connect(target)?)).collect::<Result<Vec<_>>>()?;
            let connected = (0..20).map(|_| Ok(connected_udp(target)?)).collect::<Result<Vec<_>>>()?;
            let open = (0..20).map(|_| open_udp(target)).collect::<Result<Vec<_>>>()?;
            for socket in &open {
                exchange(socket, target, "open")?;
            }
            let streams_of: BTreeSet<_> = streams.iter().map(|it| cookie(it.as_fd())).collect::<Result<_>>()?;
            let datagrams = connected.iter().chain(&open);
            let datagrams_of: BTreeSet<_> = datagrams.map(|it| cookie(it.as_fd())).collect::<Result<_>>()?;
            let count = |table: &[u64], of: &BTreeSet<u64>| table.iter().filter(|it| of.contains(it)).count();
            let seen = |[led, kept]: &[Vec<u64>; 2]| {
                [count(led, &streams_of), count(led, &datagrams_of), count(kept, &datagrams_of)]
            };
            let found = seen(&held(node)?);
            ensure!(found == [20, 40, 40], "{target}: {found:?} entries of open sockets");
            drop((streams, connected, open));
            let found = seen(&held(node)?);
            ensure!(found == [0; 3], "{target}: {found:?} entries of closed sockets");
            Ok(())
        })??;
    }
    Ok(())
}

/// Without a peer, to two Services; and connected to one after the other.
fn a_socket_with_several_peers_leaves_nothing(net: &Net) -> Result<()> {
    let (one, two) = (net.service(endpoints(&[&net.a]))?, net.service(endpoints(&[&net.c]))?);
    let node = net.node(1);
    for targets in [[one.targets()[0], two.targets()[0]], [one.targets()[1], two.targets()[1]]] {
        node.netns().run(|| -> Result<()> {
            let (open, connected) = (open_udp(targets[0])?, open_udp(targets[0])?);
            for (n, target) in targets.into_iter().cycle().take(20).enumerate() {
                exchange(&open, target, &format!("n{n}"))?;
                connected.connect(target)?;
            }
            for socket in [open, connected] {
                let cookie = cookie(socket.as_fd())?;
                ensure!(counts(node, cookie)? == [2, 2], "{targets:?}: {:?}", counts(node, cookie)?);
                drop(socket);
                ensure!(counts(node, cookie)? == [0, 0], "{targets:?}: {:?}", counts(node, cookie)?);
            }
            Ok(())
        })??;
    }
    Ok(())
}

/// The kernel does not know any more where it was connected.
fn a_socket_that_lost_its_peer_leaves_nothing(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a]))?;
    let node = net.node(1);
    for target in service.targets() {
        node.netns().run(|| -> Result<()> {
            let socket = connected_udp(target)?;
            let cookie = cookie(socket.as_fd())?;
            disconnect(&socket)?;
            ensure!(socket.peer_addr().is_err(), "it has a peer");
            ensure!(counts(node, cookie)? == [1, 1], "{:?}", counts(node, cookie)?);
            drop(socket);
            ensure!(counts(node, cookie)? == [0, 0], "{target}: {:?}", counts(node, cookie)?);
            Ok(())
        })??;
    }
    Ok(())
}

/// connect(2) with AF_UNSPEC.
fn disconnect(socket: &UdpSocket) -> Result<()> {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: an address of the length that is given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const none, size_of_val(&none) as libc::socklen_t) };
    ensure!(result == 0, "connect: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The last ones go.
fn a_socket_with_more_peers_than_it_remembers(net: &Net) -> Result<()> {
    let services = (0..TRAIL + 2).map(|_| net.service(endpoints(&[&net.a]))).collect::<Result<Vec<_>>>()?;
    let node = net.node(1);
    node.netns().run(|| -> Result<()> {
        let socket = open_udp(services[0].targets()[0])?;
        let cookie = cookie(socket.as_fd())?;
        for service in &services {
            let target = service.targets()[0];
            // All have one backend, so that one entry says what was asked for last.
            let (by, from) = exchange(&socket, target, "one of many")?;
            ensure!((by.as_str(), from) == ("a", target), "{by} {from}");
        }
        ensure!(counts(node, cookie)? == [1, TRAIL + 2], "{:?}", counts(node, cookie)?);
        drop(socket);
        ensure!(counts(node, cookie)? == [0, 2], "{:?}", counts(node, cookie)?);
        Ok(())
    })?
}

/// Of two Services with one backend, the entry is the other's each time; that takes no room from the peers before.
fn a_socket_that_asks_the_same_again_and_again(net: &Net) -> Result<()> {
    let first = net.service(endpoints(&[&net.c]))?;
    let both = [net.service(endpoints(&[&net.a]))?, net.service(endpoints(&[&net.a]))?];
    let node = net.node(1);
    for family in 0..2 {
        let targets = both.each_ref().map(|service| service.targets()[family]);
        let first = first.targets()[family];
        node.netns().run(|| -> Result<()> {
            let socket = open_udp(first)?;
            let cookie = cookie(socket.as_fd())?;
            exchange(&socket, first, "first")?;
            for target in targets.into_iter().cycle().take(TRAIL * 2) {
                exchange(&socket, target, "again")?;
            }
            ensure!(counts(node, cookie)? == [2, 3], "{:?}", counts(node, cookie)?);
            drop(socket);
            ensure!(counts(node, cookie)? == [0, 0], "{:?}", counts(node, cookie)?);
            Ok(())
        })??;
    }
    Ok(())
}

/// A socket that nobody reads is known for as long as it is open. The table has room for fewer than the others that come and go.
#[test]
fn short_connections_cost_a_living_socket_nothing() -> Result<()> {
    const ROOM: usize = 1024;
    let net = Net::start(Setup::default())?;
    observed(&net, |net| {
        let mut service = net.service(endpoints(&[&net.a]))?;
        let (node, targets) = (net.node(1), service.targets());
        let before = node.netns().run(|| targets.map(connected_udp))?;
        node.stop_agent()?;
        node.start_agent(&["--socket-entries", &ROOM.to_string()])?;
        let after = node.netns().run(|| targets.map(connected_udp))?;
        let mut living = before.into_iter().chain(after).collect::<Result<Vec<_>, _>>()?;
        node.netns().run(|| -> Result<()> {
            for n in 0..ROOM * 2 {
                for target in targets {
                    drop(connected_udp(target)?);
                    if n % 4 == 0 {
                        drop(TcpStream::connect(target)?);
                    }
                }
            }
            Ok(())
        })??;
        let shown = node.rustnetctl(&["status"])?;
        let line = shown.lines().find(|line| line.contains("Map rn_sock_rev")).context("no line of the map")?;
        ensure!(line.contains("024 ("), "{line}");
        for (n, socket) in living.iter().enumerate() {
            ensure!(counts(node, cookie(socket.as_fd())?)? == [1, 1], "socket {n} is forgotten");
            let peer = socket.peer_addr()?;
            ensure!(targets.contains(&peer), "socket {n} shows {peer}");
        }
        service.set(endpoints(&[&net.c]))?;
        living.iter().try_for_each(wait_ended)?;
        // Ended by the agent, they have no peer, and can be used again.
        for socket in &mut living {
            let _ = socket.take_error()?;
            let target =
                targets.into_iter().find(|it| it.is_ipv4() == socket.local_addr().is_ok_and(|at| at.is_ipv4()));
            let target = target.context("no target of its family")?;
            node.netns().run(|| connect(socket.as_raw_fd(), &SockaddrStorage::from(target)))??;
            ensure!(ask_udp(socket, "again")?.0 == "c");
        }
        let cookies = living.iter().map(|socket| cookie(socket.as_fd())).collect::<Result<Vec<_>>>()?;
        drop(living);
        for cookie in cookies {
            ensure!(counts(node, cookie)? == [0, 0], "{:?}", counts(node, cookie)?);
        }
        Ok(())
    })
}
