//! A service that loses its last endpoint: from the first refusal on, a node refuses every new flow.

use crate::fixture::{Net, endpoints, in_each_routing, node_port, node_ports, published, wait_served};
use anyhow::{Result, anyhow, ensure};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use testkit::client::{Connection, ask, ask_udp, connected_udp, udp_from_port};
use testkit::manifest::Outside;
use testkit::{Netns, Proto, wait};

in_each_routing!(
    nobody_answers_after_the_first_refusal_on_a_node,
    a_udp_flow_ends_with_the_last_backend,
    a_socket_of_udp_is_refused_and_recovers,
);

/// Who answers a request from a port that nobody used before; none if it is refused. Ports are
/// counted, because a UDP flow of before cannot be distinguished from a new one that has its port.
fn fresh(from: &Netns, proto: Proto, target: SocketAddr) -> Result<Option<String>> {
    static NEXT: AtomicU16 = AtomicU16::new(1100);
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    let asked = from.run(|| -> Result<String> {
        Ok(match proto {
            Proto::Tcp => Connection::open_from_port(port, target)?.ask("new")?.0,
            Proto::Udp => ask_udp(&udp_from_port(port, target)?, "new")?.0,
        })
    })?;
    match asked {
        Ok(server) => Ok(Some(server)),
        Err(e) if refused(&e) => Ok(None),
        Err(e) => Err(e.context(format!("{proto} from port {port} to {target}"))),
    }
}

fn refused(error: &anyhow::Error) -> bool {
    error.chain().any(|e| {
        let io = e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        io || e.to_string().starts_with("ECONNREFUSED")
    })
}

/// Requests after the first refusal, of each kind.
const MORE: usize = 25;

fn nobody_answers_after_the_first_refusal_on_a_node(net: &Net) -> Result<()> {
    let mut service = net.service(endpoints(&[&net.b]))?;
    let clients = [net.a.netns(), net.c.netns(), net.node(1).netns(), net.node(2).netns()];
    for _ in 0..3 {
        for from in clients {
            for target in service.targets() {
                for proto in Proto::ALL {
                    wait::until("served", || ask(from, proto, target, 2)?.only_by(&["b"]))?;
                }
            }
        }
        service.set(Vec::new())?;
        for from in clients {
            for target in service.targets() {
                for proto in Proto::ALL {
                    wait::until("the first refusal", || {
                        fresh(from, proto, target)?.map_or(Ok(()), |server| Err(anyhow!("answered by {server}")))
                    })?;
                    for i in 1..=MORE {
                        let answer = fresh(from, proto, target)?;
                        let what =
                            format!("{proto} request {i} after the first refusal of {target} to {}", from.name());
                        ensure!(answer.is_none(), "{what}: answered by {answer:?}");
                    }
                }
            }
        }
        service.set(endpoints(&[&net.b]))?;
    }
    Ok(())
}

/// A UDP flow of before is refused with the rest as soon as nobody serves (a client's kernel gives ports at random, so that a
/// new socket may well have its port), and served again as soon as somebody does.
fn a_udp_flow_ends_with_the_last_backend(net: &Net) -> Result<()> {
    static NEXT: AtomicU16 = AtomicU16::new(24_500);
    let mut service = net.service(endpoints(&[&net.b]))?;
    for target in service.targets() {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        let again = || -> Result<Option<String>> {
            match net.a.run_in(|| -> Result<_> { Ok(ask_udp(&udp_from_port(port, target)?, "again")?) })? {
                Ok(answer) => Ok(Some(answer.0)),
                Err(e) if refused(&e) => Ok(None),
                Err(e) => Err(e),
            }
        };
        wait::until("b serves", || ask(net.a.netns(), Proto::Udp, target, 2)?.only_by(&["b"]))?;
        ensure!(again()?.as_deref() == Some("b"));
        service.set(Vec::new())?;
        service.wait_known()?;
        // The agent deletes the flow's entries after it has emptied the service.
        wait::until("the flow of before ends with the last backend", || {
            ensure!(again()?.is_none(), "it is answered");
            Ok(())
        })?;
        service.set(endpoints(&[&net.c]))?;
        service.wait_known()?;
        ensure!(again()?.as_deref() == Some("c"), "the flow finds the new backend");
        service.set(endpoints(&[&net.b]))?;
    }
    Ok(())
}

/// One connected socket each, of clients outside at node ports and of a pod, through three times without endpoints. The flow stays
/// refused for as long as nobody serves, and goes to the next endpoint.
fn a_socket_of_udp_is_refused_and_recovers(net: &Net) -> Result<()> {
    let outside = Outside { node_port: node_port(), ..Outside::default() };
    let mut service = published(net, outside, endpoints(&[&net.b]))?;
    let mut sockets = Vec::new();
    for (family, target) in service.targets().into_iter().enumerate() {
        sockets.push((target, net.a.run_in(|| connected_udp(target))??));
        for node in net.fabric.nodes() {
            let target = node_ports(node, &service)[family];
            wait_served(net.fabric.world(), target)?;
            sockets.push((target, net.fabric.world().run(|| connected_udp(target))??));
        }
    }
    let is_refusal = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
    for (server, pod) in [("b", &net.b), ("c", &net.c), ("b", &net.b)] {
        service.set(endpoints(&[pod]))?;
        for (target, socket) in &sockets {
            wait::until(&format!("{target} served by {server}"), || {
                let (answered, _) = ask_udp(socket, "known")?;
                ensure!(answered == server, "{answered} answers");
                Ok(())
            })?;
        }
        service.set(Vec::new())?;
        for (target, socket) in &sockets {
            wait::until(&format!("{target} refused"), || {
                let asked = ask_udp(socket, "first");
                ensure!(asked.as_ref().is_err_and(is_refusal), "{asked:?}");
                Ok(())
            })?;
            for i in 1..=MORE {
                let asked = ask_udp(socket, "more");
                ensure!(asked.as_ref().is_err_and(is_refusal), "{target}, request {i} after the refusal: {asked:?}");
            }
        }
    }
    Ok(())
}
