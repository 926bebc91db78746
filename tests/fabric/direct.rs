//! Direct server return: backends on other nodes answer clients outside by themselves.

use crate::external::{self, balancer};
use crate::fixture::{
    Net, SERVICE_PORT, TestService, endpoints, in_each_routing, node_port, node_ports, observed, wait_served, world,
};
use crate::overlay::segments_are_echoed;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use testkit::client::{Connection, ask, ask_sized};
use testkit::manifest::{Endpoint, Outside};
use testkit::sniff::Sniffer;
use testkit::{Node, Proto, Routing, Setup, Topology, wait};

in_each_routing!(
    clients_get_their_answers_from_the_backends_node,
    large_transfers,
    datagrams_that_come_as_one_packet,
    a_load_balancers_address,
    session_affinity,
    connections_outlive_their_endpoint,
    clients_inside,
    commands_show_the_mode,
);

/// A service with a node port, whose annotation asks for direct server return.
fn direct(net: &Net, outside: Outside, endpoints: Vec<Endpoint>) -> Result<TestService<'_>> {
    let mut service = net.unknown_service();
    service.service.outside = outside;
    service.service.is_direct = true;
    service.set(endpoints)?;
    service.wait_known()?;
    wait_published(net, &service)?;
    Ok(service)
}

/// Waits until both nodes serve the node ports to clients outside, which their settings say a little later than the maps.
fn wait_published(net: &Net, service: &TestService<'_>) -> Result<()> {
    let mut targets = net.fabric.nodes().iter().flat_map(|node| node_ports(node, service));
    targets.try_for_each(|target| wait_served(net.fabric.world(), target))
}

fn at_nodes() -> Outside {
    Outside { node_port: node_port(), ..Outside::default() }
}

fn the_world(like: IpAddr) -> IpAddr {
    world()[usize::from(like.is_ipv6())]
}

/// Each server sees its client, and the answers leave the backend's node with the address that was asked, by no other node.
fn clients_get_their_answers_from_the_backends_node(net: &Net) -> Result<()> {
    let service = direct(net, at_nodes(), endpoints(&[&net.a, &net.c]))?;
    for node in net.fabric.nodes() {
        for target in node_ports(node, &service) {
            wait_served(net.fabric.world(), target)?;
            for proto in Proto::ALL {
                let answers = ask(net.fabric.world(), proto, target, 40)?;
                answers.only_by(&["a", "c"]).with_context(|| format!("{proto} {target}"))?;
                answers.only_as(the_world(target.ip())).with_context(|| format!("{proto} {target}"))?;
            }
        }
    }
    let service = direct(net, at_nodes(), endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        let [asked, answering] = [1, 2].map(|n| Sniffer::start(net.node(n).netns(), "eth0"));
        let (asked, answering) = (asked?, answering?);
        for proto in Proto::ALL {
            ask(net.fabric.world(), proto, target, 5)?.only_by(&["c"])?;
        }
        for proto in [6, 17] {
            let is_answer = |h: &testkit::sniff::Headers| {
                (h.src, h.sport, h.dst, h.proto) == (target.ip(), target.port(), the_world(target.ip()), proto)
            };
            answering.wait_for("an answer of the backend's node", is_answer)?;
            Sniffer::catch_up([&asked])?;
            asked.none("an answer by the node that was asked", is_answer)?;
        }
    }
    Ok(())
}

/// Larger than one packet, there and back. The client learns what fits from the node that it asks.
fn large_transfers(net: &Net) -> Result<()> {
    let service = direct(net, at_nodes(), endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        for (proto, size) in [(Proto::Tcp, 60_000), (Proto::Udp, 1400), (Proto::Udp, 1472), (Proto::Udp, 8000)] {
            wait::until(&format!("{proto} {target}, {size} bytes"), || {
                ask_sized(net.fabric.world(), proto, target, 5, size)?.only_by(&["c"])
            })?;
        }
        let mut connection = Connection::open_in(net.fabric.world(), target)?;
        connection.download(3 << 20).context("to the client")?;
        connection.upload(3 << 20).context("to the backend")?;
    }
    Ok(())
}

/// `UDP_SEGMENT`: the kernel parts them on the way, behind both headers, or at the receiver.
fn datagrams_that_come_as_one_packet(net: &Net) -> Result<()> {
    let service = direct(net, at_nodes(), endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        segments_are_echoed(net.fabric.world(), target).with_context(|| format!("to {target}"))?;
    }
    Ok(())
}

fn a_load_balancers_address(net: &Net) -> Result<()> {
    let balancer = balancer(net)?;
    let service = direct(net, Outside { balancer: balancer.clone(), ..at_nodes() }, endpoints(&[&net.a, &net.c]))?;
    for vip in balancer {
        let target = SocketAddr::new(vip, SERVICE_PORT);
        wait_served(net.fabric.world(), target)?;
        for proto in Proto::ALL {
            let answers = ask(net.fabric.world(), proto, target, 40)?;
            answers.only_by(&["a", "c"])?;
            answers.only_as(the_world(vip))?;
        }
        // Led to the other node from now on: a connection goes on, whichever of them has its backend.
        let mut open = (0..8).map(|_| Connection::open_in(net.fabric.world(), target)).collect::<Result<Vec<_>>>()?;
        for connection in &mut open {
            connection.ask("1")?;
        }
        net.fabric.switch().ip(&format!("route replace {vip} via {}\n", net.node(2).address_like(vip)))?;
        for connection in &mut open {
            connection.ask("2").with_context(|| format!("{target} by the other node"))?;
        }
    }
    drop(service);
    Ok(())
}

fn session_affinity(net: &Net) -> Result<()> {
    let mut service = net.unknown_service();
    service.service.outside = at_nodes();
    service.service.is_direct = true;
    service.service.affinity = true;
    service.set(endpoints(&[&net.c]))?;
    service.wait_known()?;
    wait_published(net, &service)?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        ask(net.fabric.world(), Proto::Tcp, target, 1)?.only_by(&["c"])?;
    }
    // The client has one of them, whatever the hash says now.
    service.set(endpoints(&[&net.a, &net.b, &net.c]))?;
    for target in node_ports(net.node(1), &service) {
        for pod in [&net.a, &net.c] {
            let led = || ask(pod.netns(), Proto::Udp, target, 40)?.all_answered();
            wait::until("the other endpoints", led)?;
        }
        for proto in Proto::ALL {
            ask(net.fabric.world(), proto, target, 20)?.only_by(&["c"]).with_context(|| format!("{proto} {target}"))?;
        }
    }
    Ok(())
}

/// TCP connections stay with their endpoint when it leaves the service.
fn connections_outlive_their_endpoint(net: &Net) -> Result<()> {
    external::outlive(net, direct(net, at_nodes(), endpoints(&[&net.c]))?)
}

/// Pods and nodes reach the same ports.
fn clients_inside(net: &Net) -> Result<()> {
    let service = direct(net, at_nodes(), endpoints(&[&net.a, &net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        for from in [net.a.netns(), net.b.netns(), net.c.netns(), net.node(1).netns(), net.node(2).netns()] {
            for proto in Proto::ALL {
                let answers = ask(from, proto, target, 30)?;
                answers.only_by(&["a", "c"]).with_context(|| format!("{proto} {target} from {}", from.name()))?;
            }
        }
    }
    Ok(())
}

fn rows(node: &Node, command: &[&str], field: &str) -> Result<Vec<Value>> {
    let shown: Value = serde_json::from_str(&node.rustnetctl(&[&["-o", "json"], command].concat())?)?;
    Ok(shown[field].as_array().with_context(|| format!("no {field}"))?.clone())
}

/// `rustnetctl ct list` and `rustnetctl services NAME`.
fn commands_show_the_mode(net: &Net) -> Result<()> {
    let service = direct(net, at_nodes(), endpoints(&[&net.c]))?;
    let name = format!("default/{}", service.service.name);
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        let mut open = Connection::open_in(net.fabric.world(), target)?;
        open.ask("1")?;
        let port = target.port().to_string();
        let list = ["ct", "list", "--proto", "tcp", "--dst", &target.ip().to_string(), "--port", &port];
        let state = |node, is_direct: bool| {
            wait::until("an established connection", || {
                let rows = rows(node, &list, "connections")?;
                let is_it = |row: &Value| {
                    let has = |field: &str, word: &str| {
                        row[field].as_array().is_some_and(|all| all.iter().any(|it| it == word))
                    };
                    has("state", "established") && has("flags", "dsr") == is_direct
                };
                ensure!(rows.iter().any(is_it), "{rows:?}");
                Ok(())
            })
        };
        state(net.node(1), true)?;
        state(net.node(2), false)?;
        open.ask("2")?;
    }
    let want = [r#""clusterIP" "cluster" null"#, r#""nodePort" "cluster" null"#, r#""nodePort" "external" "dsr""#];
    let want: BTreeSet<_> = want.map(str::to_owned).into();
    // The agent writes the names of fields in its own time.
    wait::until("the mode of each front end", || {
        let front_ends = rows(net.node(1), &["services", &name], "frontEnds")?;
        let mode = |it: &Value| format!("{} {} {}", it["kind"], it["clients"], it["forwarding"]);
        let modes: BTreeSet<_> = front_ends.iter().map(mode).collect();
        ensure!(modes == want, "{modes:?}");
        Ok(())
    })?;
    net.fabric.nodes().iter().try_for_each(|node| node.rustnetctl(&["services", "--verify"]).map(drop))
}

/// Nodes that are set so, and a path to the client that is narrower than the nodes' and the pods' links: its routers report to the node
/// that the client asks.
fn a_narrow_path_to_the_client(setup: Setup) -> Result<()> {
    let agent = &["--forwarding-mode", "dsr"];
    observed(&Net::start(Setup { agent, ..setup })?, |net| {
        let mut service = net.unknown_service();
        service.service.outside = at_nodes();
        service.set(endpoints(&[&net.c]))?;
        service.wait_known()?;
        wait_published(net, &service)?;
        for target in node_ports(net.node(1), &service) {
            wait_served(net.fabric.world(), target)?;
            ask(net.fabric.world(), Proto::Tcp, target, 5)?.only_as(the_world(target.ip()))?;
            let client = the_world(target.ip());
            net.fabric.switch().ip(&format!("route add {client} dev world mtu lock 1300\n"))?;
            for (proto, size) in [(Proto::Tcp, 60_000), (Proto::Udp, 1400)] {
                wait::until(&format!("{proto} {target}, {size} bytes"), || {
                    ask_sized(net.fabric.world(), proto, target, 5, size)?.only_by(&["c"])
                })?;
            }
            let mut connection = Connection::open_in(net.fabric.world(), target)?;
            connection.download(1 << 20).context("to the client")?;
        }
        Ok(())
    })
}

#[test]
fn a_narrow_path_to_the_client_vxlan() -> Result<()> {
    a_narrow_path_to_the_client(Setup::default())
}

#[test]
fn a_narrow_path_to_the_client_native() -> Result<()> {
    a_narrow_path_to_the_client(Setup { routing: Routing::Native, ..Setup::default() })
}

/// Nodes of two segments, some of them behind the overlay, others not.
#[test]
fn direct_and_vxlan() -> Result<()> {
    let setup = Setup {
        nodes: 3,
        routing: Routing::DirectAndVxlan,
        topology: Topology::Mixed { core_mtu: 1500 },
        ..Setup::default()
    };
    observed(&Net::start(setup)?, |net| {
        let far = net.node(3).add_pod("d")?;
        let service = direct(net, at_nodes(), endpoints(&[&net.a, &net.c, &far]))?;
        for node in net.fabric.nodes() {
            for target in node_ports(node, &service) {
                wait_served(net.fabric.world(), target)?;
                for proto in Proto::ALL {
                    let answers = ask(net.fabric.world(), proto, target, 60)?;
                    answers.only_by(&["a", "c", "d"]).with_context(|| format!("{proto} {target}"))?;
                    answers.only_as(the_world(target.ip())).with_context(|| format!("{proto} {target}"))?;
                }
            }
        }
        Ok(())
    })
}
