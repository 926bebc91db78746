//! Services for clients outside: node ports, load balancers' addresses, external IPs.

use crate::fixture::{
    Net, TestService, endpoints, in_each_routing, node_port, node_ports, observed, published, wait_served, world,
};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use testkit::client::{Connection, ask, ask_sized, ask_udp, udp_from_port};
use testkit::manifest::{Endpoint, Outside};
use testkit::{Netns, Node, Pod, Proto, Setup, wait};

in_each_routing!(
    node_ports_of_each_node,
    large_transfers,
    a_local_policy_keeps_the_client,
    without_endpoints_clients_are_refused,
    a_load_balancers_address,
    a_load_balancer_for_some,
    an_external_ip_of_a_node,
    clients_inside,
    a_backend_that_is_the_node,
    connections_outlive_their_endpoint,
    the_command_shows_where_connections_are,
);

fn at_nodes() -> Outside {
    Outside { node_port: node_port(), ..Outside::default() }
}

/// What servers on pods see of the world, which asks a node: itself on that node, the node's address elsewhere.
fn seen(node: &Node, pods: &[&Pod], like: IpAddr) -> BTreeSet<IpAddr> {
    let of = |pod: &&Pod| {
        if pod.node().name() == node.name() { world()[usize::from(like.is_ipv6())] } else { node.address_like(like) }
    };
    pods.iter().map(of).collect()
}

pub fn node_ports_of_each_node(net: &Net) -> Result<()> {
    let pods = [&net.a, &net.b, &net.c];
    let service = published(net, at_nodes(), endpoints(&pods))?;
    for node in net.fabric.nodes() {
        for target in node_ports(node, &service) {
            wait_served(net.fabric.world(), target)?;
            for proto in Proto::ALL {
                let answers = ask(net.fabric.world(), proto, target, 60)?;
                answers.only_by(&["a", "b", "c"])?;
                let want = seen(node, &pods, target.ip());
                ensure!(answers.seen_as == want, "{proto} {target}: {answers}, not seen as {want:?}");
            }
        }
    }
    Ok(())
}

/// Larger than one packet, through the overlay and back: segments, fragments, and the path's MTU.
pub fn large_transfers(net: &Net) -> Result<()> {
    let service = published(net, at_nodes(), endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        for (proto, size) in [(Proto::Tcp, 60_000), (Proto::Udp, 1400), (Proto::Udp, 8000)] {
            // A client behind IPv6 learns the path's MTU by an error first.
            wait::until(&format!("{proto} {target}, {size} bytes"), || {
                ask_sized(net.fabric.world(), proto, target, 5, size)?.only_by(&["c"])
            })?;
        }
    }
    Ok(())
}

pub fn a_local_policy_keeps_the_client(net: &Net) -> Result<()> {
    let outside = Outside { is_local: true, ..at_nodes() };
    let service = published(net, outside, endpoints(&[&net.a, &net.b]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        for proto in Proto::ALL {
            let answers = ask(net.fabric.world(), proto, target, 40)?;
            answers.only_by(&["a", "b"])?;
            answers.only_as(world()[usize::from(target.is_ipv6())])?;
        }
    }
    // The other node has no endpoint: nobody answers, and nobody refuses.
    for target in node_ports(net.node(2), &service) {
        ask(net.fabric.world(), Proto::Tcp, target, 1)?.all_failed(ErrorKind::TimedOut)?;
        // Its pods get all endpoints by the same address.
        ask(net.c.netns(), Proto::Tcp, target, 20)?.only_by(&["a", "b"])?;
    }
    Ok(())
}

pub fn without_endpoints_clients_are_refused(net: &Net) -> Result<()> {
    let mut service = published(net, at_nodes(), endpoints(&[&net.a]))?;
    for node in net.fabric.nodes() {
        for target in node_ports(node, &service) {
            wait_served(net.fabric.world(), target)?;
        }
    }
    service.set(Vec::new())?;
    service.wait_refused()?;
    for node in net.fabric.nodes() {
        for target in node_ports(node, &service) {
            for proto in Proto::ALL {
                ask(net.fabric.world(), proto, target, 3)?.all_failed(ErrorKind::ConnectionRefused)?;
            }
        }
    }
    Ok(())
}

/// Addresses that no other test has. The segment's router leads them to a node, as a load balancer does.
pub fn balancer(net: &Net) -> Result<Vec<IpAddr>> {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let balancer: Vec<IpAddr> = vec![format!("203.0.113.{n}").parse()?, format!("2001:db8:113::{n}").parse()?];
    for vip in &balancer {
        net.fabric.switch().ip(&format!("route add {vip} via {}\n", net.node(1).address_like(*vip)))?;
    }
    Ok(balancer)
}

pub fn a_load_balancers_address(net: &Net) -> Result<()> {
    let balancer = balancer(net)?;
    let pods = [&net.a, &net.c];
    let outside = Outside { balancer: balancer.clone(), ..at_nodes() };
    let service = published(net, outside, endpoints(&pods))?;
    let port = service.targets()[0].port();
    for vip in balancer {
        let target = SocketAddr::new(vip, port);
        wait_served(net.fabric.world(), target)?;
        for proto in Proto::ALL {
            let answers = ask(net.fabric.world(), proto, target, 40)?;
            answers.only_by(&["a", "c"])?;
            let want = seen(net.node(1), &pods, vip);
            ensure!(answers.seen_as == want, "{proto} {target}: {answers}, not seen as {want:?}");
            // Pods and hosts of the cluster do not leave it.
            for from in [net.a.netns(), net.c.netns(), net.node(1).netns(), net.node(2).netns()] {
                ask(from, proto, target, 20)?.only_by(&["a", "c"])?;
            }
            let other = SocketAddr::new(vip, port + 1);
            ask(net.fabric.world(), proto, other, 2)?.all_failed(ErrorKind::ConnectionRefused)?;
        }
    }
    Ok(())
}

/// The address of the world is in its ranges, then in none, then in those of one family.
fn a_load_balancer_for_some(net: &Net) -> Result<()> {
    let balancer = balancer(net)?;
    let [world4, world6] = world();
    let source_ranges = vec![format!("{world4}/30"), format!(" {world6}/126 "), "192.0.2.128/25".into()];
    let outside = Outside { balancer: balancer.clone(), source_ranges, ..at_nodes() };
    let mut service = published(net, outside, endpoints(&[&net.a, &net.c]))?;
    let port = service.targets()[0].port();
    let [four, six] = [0, 1].map(|i| SocketAddr::new(balancer[i], port));
    let mut open = Vec::new();
    for target in [four, six] {
        wait_served(net.fabric.world(), target)?;
        for proto in Proto::ALL {
            ask(net.fabric.world(), proto, target, 20)?.only_by(&["a", "c"])?;
        }
        open.push(Connection::open_in(net.fabric.world(), target)?);
    }

    let judge = |service: &mut TestService<'_>, ranges: &[&str]| {
        service.service.outside.source_ranges = ranges.iter().map(|range| (*range).to_owned()).collect();
        service.set(endpoints(&[&net.a, &net.c]))
    };
    let wait_closed = |target| {
        wait::until(&format!("{target} closed"), || {
            ask(net.fabric.world(), Proto::Udp, target, 1)?.all_failed(ErrorKind::TimedOut)
        })
    };
    judge(&mut service, &["192.0.2.128/25", "2001:db8:ffff::/48"])?;
    for target in [four, six] {
        wait_closed(target)?;
        ask(net.fabric.world(), Proto::Tcp, target, 1)?.all_failed(ErrorKind::TimedOut)?;
        // Pods and hosts of the cluster are asked, too.
        for (from, proto) in [(net.a.netns(), Proto::Udp), (net.node(2).netns(), Proto::Tcp)] {
            let asked = ask(from, proto, target, 1)?.all_failed(ErrorKind::TimedOut);
            asked.with_context(|| format!("{proto} {target}"))?;
        }
    }
    let own = [&net.a, &net.c].map(|pod| pod.addresses().iter().map(ToString::to_string).collect::<Vec<_>>());
    let nodes = world().map(|like| net.node(1).address_like(like).to_string());
    let ranges: Vec<String> = own[0]
        .iter()
        .chain(&nodes)
        .map(|ip| if ip.contains(':') { format!("{ip}/128") } else { format!("{ip}/32") })
        .collect();
    judge(&mut service, &ranges.iter().map(String::as_str).collect::<Vec<_>>())?;
    for target in [four, six] {
        for from in [net.a.netns(), net.node(1).netns()] {
            wait_served(from, target)?;
            for proto in Proto::ALL {
                ask(from, proto, target, 20)?.only_by(&["a", "c"]).with_context(|| format!("{proto} {target}"))?;
            }
        }
        for (from, proto) in [(net.c.netns(), Proto::Tcp), (net.node(2).netns(), Proto::Udp)] {
            ask(from, proto, target, 1)?.all_failed(ErrorKind::TimedOut)?;
        }
    }
    for target in net.fabric.nodes().iter().flat_map(|node| node_ports(node, &service)) {
        ask(net.fabric.world(), Proto::Tcp, target, 20)?.only_by(&["a", "c"]).with_context(|| format!("{target}"))?;
    }
    for connection in &mut open {
        connection.ask("again").context("a known connection")?;
    }

    judge(&mut service, &["0.0.0.0/0"])?;
    wait_served(net.fabric.world(), four)?;
    wait_closed(six)?;
    judge(&mut service, &[])?;
    wait_served(net.fabric.world(), six)
}

/// Its other ports stay the host's.
fn an_external_ip_of_a_node(net: &Net) -> Result<()> {
    let ips = world().map(|like| net.node(1).address_like(like)).to_vec();
    let outside = Outside { ips: ips.clone(), ..Outside::default() };
    let service = published(net, outside, endpoints(&[&net.c]))?;
    let port = service.targets()[0].port();
    for ip in ips {
        let target = SocketAddr::new(ip, port);
        wait_served(net.fabric.world(), target)?;
        for proto in Proto::ALL {
            ask(net.fabric.world(), proto, target, 10)?.only_by(&["c"])?;
            let own = SocketAddr::new(ip, testkit::pod::PORT);
            for from in [net.fabric.world(), net.a.netns(), net.c.netns(), net.node(2).netns()] {
                ask(from, proto, own, 5)?.only_by(&["n1"]).with_context(|| format!("{proto} {own}"))?;
            }
        }
    }
    Ok(())
}

/// Pods here and there, and the other node's host, at the node ports of node 1.
fn clients_inside(net: &Net) -> Result<()> {
    let service = published(net, at_nodes(), endpoints(&[&net.a, &net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        for from in [net.a.netns(), net.b.netns(), net.c.netns(), net.node(2).netns()] {
            for proto in Proto::ALL {
                ask(from, proto, target, 30)?.only_by(&["a", "c"]).with_context(|| format!("{proto} {target}"))?;
            }
        }
    }
    Ok(())
}

/// A backend on the network of the node that is asked, and of another.
pub fn a_backend_that_is_the_node(net: &Net) -> Result<()> {
    for of in [1, 2] {
        let node = net.node(of);
        let at = world().map(|like| Endpoint::ready(node.address_like(like), Some(node.name())));
        let service = published(net, at_nodes(), at.to_vec())?;
        for target in node_ports(net.node(1), &service) {
            wait_served(net.fabric.world(), target)?;
            for proto in Proto::ALL {
                for from in [net.fabric.world(), net.a.netns(), net.c.netns()] {
                    ask(from, proto, target, 10)?
                        .only_by(&[node.name()])
                        .with_context(|| format!("{proto} {target}"))?;
                }
            }
        }
    }
    Ok(())
}

/// TCP connections stay with their endpoint when it leaves the service.
pub fn connections_outlive_their_endpoint(net: &Net) -> Result<()> {
    outlive(net, published(net, at_nodes(), endpoints(&[&net.c]))?)
}

/// The same for a service with node ports that leads to pod c.
pub fn outlive(net: &Net, mut service: TestService<'_>) -> Result<()> {
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
        let mut open = Connection::open_in(net.fabric.world(), target)?;
        ensure!(open.ask("1")?.0 == "c", "another server");
        service.set(endpoints(&[&net.b]))?;
        wait::until("the other endpoint", || ask(net.fabric.world(), Proto::Udp, target, 1)?.only_by(&["b"]))?;
        ensure!(open.ask("2")?.0 == "c", "the connection moved");
        service.set(endpoints(&[&net.c]))?;
        wait::until("the first endpoint", || ask(net.fabric.world(), Proto::Udp, target, 1)?.only_by(&["c"]))?;
    }
    Ok(())
}

/// `rustnetctl services NAME`: an open connection is counted at its endpoint, whatever becomes of that; and the maps are as the
/// source says.
fn the_command_shows_where_connections_are(net: &Net) -> Result<()> {
    let mut service = published(net, at_nodes(), endpoints(&[&net.c]))?;
    let name = format!("default/{}", service.service.name);
    let rows = |like: IpAddr| -> Result<Vec<(String, u64, bool)>> {
        let shown: Value = serde_json::from_str(&net.node(1).rustnetctl(&["-o", "json", "services", &name])?)?;
        let address = net.c.address_like(like)?.to_string();
        let is_it = |it: &&Value| it["protocol"] == "TCP" && it["address"] == *address;
        let backends = shown["backends"].as_array().context("backends")?.iter().filter(is_it);
        let row = |it: &Value| {
            let state = it["state"].as_str().unwrap_or_default().to_owned();
            let is_led_to = it["sets"].as_array().is_some_and(|sets| !sets.is_empty());
            (state, it["liveFlows"].as_u64().unwrap_or_default(), is_led_to)
        };
        Ok(backends.map(row).collect())
    };
    for target in node_ports(net.node(1), &service) {
        let shows = |state: &str, is_led_to: bool| {
            wait::until(&format!("an endpoint that is {state}, with a connection"), || {
                let rows = rows(target.ip())?;
                ensure!(rows == [(state.to_owned(), 1, is_led_to)], "{rows:?}");
                Ok(())
            })
        };
        wait_served(net.fabric.world(), target)?;
        let mut open = Connection::open_in(net.fabric.world(), target)?;
        ensure!(open.ask("1")?.0 == "c", "another server");
        shows("ready", true)?;
        let leaving = endpoints(&[&net.c]).into_iter().map(|it| Endpoint { ready: false, terminating: true, ..it });
        service.set(endpoints(&[&net.b]).into_iter().chain(leaving).collect())?;
        shows("draining", false)?;
        service.set(endpoints(&[&net.b]))?;
        shows("gone", false)?;
        ensure!(open.ask("2")?.0 == "c", "the connection moved");
        service.set(endpoints(&[&net.c]))?;
        shows("ready", true)?;
    }
    // It ends with an error if something differs.
    net.fabric.nodes().iter().try_for_each(|node| node.rustnetctl(&["services", "--verify"]).map(drop))
}

/// This node gives answers of its own processes the node port back, whatever the agent knows of Services at the moment.
#[test]
fn connections_to_a_node_outlive_the_agent_and_the_service() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let at = world().map(|like| Endpoint::ready(node.address_like(like), Some(node.name())));
        let service = published(net, at_nodes(), at.to_vec())?;
        let mut open = Vec::new();
        for target in node_ports(node, &service) {
            wait_served(net.fabric.world(), target)?;
            open.push(Connection::open_in(net.fabric.world(), target)?);
        }
        drop(service);
        node.kill_agent()?;
        node.start_agent(&[])?;
        for connection in &mut open {
            ensure!(connection.ask("1")?.0 == node.name(), "another server");
        }
        Ok(())
    })
}

/// Gives node 1 an address that its object does not name, one of each family.
fn second_addresses(net: &Net) -> Result<[IpAddr; 2]> {
    let addresses: [IpAddr; 2] = ["10.99.0.1".parse()?, "fd00:99::1".parse()?];
    let [v4, v6] = addresses;
    net.node(1).netns().ip(&format!(
        "link add second type bridge\naddr add {v4}/32 dev second\naddr add {v6}/128 dev second nodad\nlink set second up\n"
    ))?;
    for ip in addresses {
        net.fabric.switch().ip(&format!("route add {ip} via {}\n", net.node(1).address_like(ip)))?;
    }
    Ok(addresses)
}

/// Node ports at an address of node 1 that its object does not name, asked from here.
fn at_a_second_address(from: impl Fn(&Net) -> Vec<&Netns>) -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let addresses = second_addresses(net)?;
        let service = published(net, at_nodes(), endpoints(&[&net.a, &net.c]))?;
        for ip in addresses {
            let target = SocketAddr::new(ip, service.service.outside.node_port);
            wait_served(net.fabric.world(), target)?;
            for (from, proto) in from(net).into_iter().flat_map(|from| Proto::ALL.map(|proto| (from, proto))) {
                let answers = ask(from, proto, target, 20)?;
                answers.only_by(&["a", "c"]).with_context(|| format!("{proto} {target} from {}", from.name()))?;
            }
        }
        Ok(())
    })
}

#[test]
fn node_ports_at_a_second_address() -> Result<()> {
    at_a_second_address(|net| vec![net.fabric.world(), net.a.netns(), net.b.netns()])
}

#[test]
fn node_ports_at_a_second_address_from_other_nodes() -> Result<()> {
    at_a_second_address(|net| vec![net.c.netns(), net.node(2).netns()])
}

/// A node port whose backend is on the node's own network, and that backend itself, both from one port of the client, in either order.
#[test]
fn a_node_port_and_its_backend_from_one_port() -> Result<()> {
    observed(&Net::start(Setup::default())?, |net| {
        let node = net.node(1);
        let at = world().map(|like| Endpoint::ready(node.address_like(like), Some(node.name())));
        let service = published(net, at_nodes(), at.to_vec())?;
        for target in node_ports(node, &service) {
            wait_served(net.fabric.world(), target)?;
            let itself = SocketAddr::new(target.ip(), testkit::pod::PORT);
            for client in [net.fabric.world(), net.c.netns()] {
                for (port, order) in [(41_000, [target, itself]), (41_001, [itself, target])] {
                    client
                        .run(|| both_answer(port, order))?
                        .with_context(|| format!("from {}, port {port}", client.name()))?;
                }
            }
        }
        Ok(())
    })
}

/// UDP, then TCP, to two addresses of node 1 from one port. The first is asked again while the connection to the second is open.
fn both_answer(port: u16, targets: [SocketAddr; 2]) -> Result<()> {
    for (i, to) in targets.into_iter().enumerate() {
        let answer = ask_udp(&udp_from_port(port, to)?, &i.to_string());
        ensure!(answer.with_context(|| format!("UDP {to}"))?.0 == "n1", "another server");
    }
    let [mut first, mut second] =
        [Connection::open_from_port(port, targets[0])?, Connection::open_from_port(port, targets[1])?];
    for (to, open) in [(targets[1], &mut second), (targets[0], &mut first)] {
        ensure!(open.ask("1").with_context(|| format!("TCP {to}"))?.0 == "n1", "another server");
    }
    Ok(())
}
