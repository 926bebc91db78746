//! Hosts with odd networks: several NICs, addresses in odd places, default routes that lead elsewhere or nowhere, hardened
//! settings. The agents get no `--uplink`: each has to find out.

use crate::fixture::{Net, endpoints, observed, world};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use testkit::client::{ask, ask_udp, udp_from_port};
use testkit::manifest::node_yaml;
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::{Fabric, Netns, Node, Pod, Proto, Routing, Setup, wait};

macro_rules! in_each_mode {
    ($($name:ident),+ $(,)?) => {
        mod vxlan {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Vxlan, super::$name)
            })+
        }
        mod native {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                super::on(testkit::Routing::Native, super::$name)
            })+
        }
    };
}
in_each_mode!(
    a_default_route_by_another_nic,
    a_default_route_of_two_next_hops,
    no_default_route,
    service_ranges_without_a_default_route,
    a_default_route_that_goes_for_a_while,
    a_vpn_takes_the_default_route,
    an_internal_address_that_is_the_second_of_its_device,
    an_internal_address_on_loopback,
    a_bridge_as_the_uplink,
    a_device_on_top_of_the_nic_as_the_uplink,
    a_bridge_of_machines,
    an_address_that_comes_late,
    a_cluster_of_ipv6_on_hosts_of_both_families,
    hardened_settings,
    an_address_that_changes_under_datagrams,
    a_port_that_netfilter_publishes,
    the_host_and_a_pod_use_one_port,
);

/// Two nodes without agents.
pub fn on(routing: Routing, test: impl FnOnce(Fabric) -> Result<()>) -> Result<()> {
    test(Fabric::build(Setup { routing, ..Setup::default() })?)
}

/// Starts the agents, adds pods and servers, and runs the test.
pub fn with_agents(fabric: Fabric, test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    with_options(fabric, &[], test)
}

fn with_options(fabric: Fabric, options: &[&str], test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    let started = fabric.nodes().iter().try_for_each(|node| node.spawn_agent(options));
    let ready = started.and_then(|()| fabric.nodes().iter().try_for_each(Node::wait_ready));
    ready.with_context(|| fabric.logs())?;
    observed(&Net::furnished(fabric)?, test)
}

fn reached(from: &Netns, pod: &Pod) -> Result<()> {
    for address in pod.addresses() {
        for proto in Proto::ALL {
            ask(from, proto, SocketAddr::new(*address, PORT), 2)?.only_by(&[pod.name()])?;
        }
    }
    Ok(())
}

/// Pods of both nodes meet, each host reaches the other's pods, and a service with a pod on each node is served to all.
pub fn meet(net: &Net) -> Result<()> {
    reached(net.a.netns(), &net.c).context("a to c")?;
    reached(net.c.netns(), &net.a).context("c to a")?;
    reached(net.node(1).netns(), &net.c).context("n1 to c")?;
    reached(net.node(2).netns(), &net.a).context("n2 to a")?;
    let service = net.service(endpoints(&[&net.a, &net.c]))?;
    for target in service.targets() {
        for pod in [&net.b, &net.c] {
            ask(pod.netns(), Proto::Tcp, target, 40)?.only_by(&["a", "c"])?;
        }
    }
    Ok(())
}

/// The same for a host's own requests to a service, which need a route that leads out of an uplink.
pub fn hosts_are_served(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.c]))?;
    for target in service.targets() {
        for node in net.fabric.nodes() {
            ask(node.netns(), Proto::Tcp, target, 40)?.only_by(&["a", "c"])?;
        }
    }
    Ok(())
}

/// The world answers a pod, and sees it at one of these addresses.
pub fn seen_as(pod: &Pod, expected: &[IpAddr]) -> Result<()> {
    for address in world() {
        let expected =
            expected.iter().find(|it| it.is_ipv4() == address.is_ipv4()).context("an address of the family")?;
        for proto in Proto::ALL {
            let answers = ask(pod.netns(), proto, SocketAddr::new(address, PORT), 4)?;
            answers.only_by(&["world"])?;
            answers.only_as(*expected)?;
        }
    }
    Ok(())
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().expect("an address")).collect()
}

/// Every Vagrant box, and every machine with a private network next to its public one.
fn a_default_route_by_another_nic(fabric: Fabric) -> Result<()> {
    let _router = fabric.add_second_network(1)?;
    fabric.node(1).netns().ip(
        "route replace default via 10.0.2.2 dev nat0\nroute del default via fd00:18::1\nroute add default via fd00:2::2 dev nat0\n",
    )?;
    with_agents(fabric, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        seen_as(&net.a, &ips(&["10.0.2.15", "fd00:2::15"]))?;
        seen_as(&net.c, &net.node(2).addresses())
    })
}

fn a_default_route_of_two_next_hops(fabric: Fabric) -> Result<()> {
    let _router = fabric.add_second_network(1)?;
    fabric.node(1).netns().ip(
        "route replace default nexthop via 172.18.0.1 dev eth0 nexthop via 10.0.2.2 dev nat0\n\
         route del default via fd00:18::1\n\
         route add default nexthop via fd00:18::1 dev eth0 nexthop via fd00:2::2 dev nat0\n",
    )?;
    with_agents(fabric, |net| {
        meet(net)?;
        // Whichever way a flow takes, its answers find back.
        for address in world() {
            for proto in Proto::ALL {
                ask(net.a.netns(), proto, SocketAddr::new(address, PORT), 20)?.only_by(&["world"])?;
            }
        }
        repaired(net)
    })
}

/// What somebody deleted is put back: the looks at the host go on.
fn repaired(net: &Net) -> Result<()> {
    let address = net.a.v4()?;
    net.node(1).netns().ip(&format!("route del {address}\n"))?;
    wait::until("the pod's route is back", || reached(net.node(1).netns(), &net.a))
}

/// An air-gapped machine.
fn no_default_route(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        node.netns().ip("route flush default\n")?;
        node.netns().exec("ip", &["-6", "route", "flush", "default"])?;
    }
    with_agents(fabric, |net| {
        meet(net)?;
        repaired(net)
    })
}

/// As systemd-networkd does when it restarts.
fn a_default_route_that_goes_for_a_while(fabric: Fabric) -> Result<()> {
    with_agents(fabric, |net| {
        let node = net.node(1).netns();
        node.ip("route flush default\n")?;
        node.exec("ip", &["-6", "route", "flush", "default"])?;
        meet(net)?;
        repaired(net)?;
        node.ip("route add default via 172.18.0.1\nroute add default via fd00:18::1\n")?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

fn a_vpn_takes_the_default_route(fabric: Fabric) -> Result<()> {
    with_agents(fabric, |net| {
        let node = net.node(1).netns();
        let mtu = || net.a.netns().exec("cat", &["/sys/class/net/eth0/mtu"]);
        let before = mtu()?;
        node.exec("ip", &["tuntap", "add", "tun0", "mode", "tun"])?;
        node.ip("link set tun0 mtu 1380 up\naddr add 10.8.0.2/24 dev tun0\naddr add fd00:8::2/64 dev tun0 nodad\n\
             route replace default via 10.8.0.1 dev tun0\n\
             route del default via fd00:18::1\nroute add default via fd00:8::1 dev tun0\n")?;
        wait::until("the problem is reported", || {
            let log = net.node(1).agent_log(200);
            ensure!(log.contains("default route leads through tun0"), "{log}");
            Ok(())
        })?;
        meet(net)?;
        ensure!(mtu()? == before, "the MTU of pods is another one");
        let fresh = net.node(1).add_pod("fresh")?;
        ensure!(
            fresh.netns().exec("cat", &["/sys/class/net/eth0/mtu"])? == before,
            "the MTU of new pods is another one"
        );
        reached(fresh.netns(), &net.c)?;
        let answer = net.node(1).http_get("127.0.0.1:9879".parse()?, "/readyz")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        fresh.delete()
    })
}

/// `--node-ip` names an address that was added behind the first.
fn an_internal_address_that_is_the_second_of_its_device(fabric: Fabric) -> Result<()> {
    for (n, node) in (1..).zip(fabric.nodes()) {
        let (v4, v6) = (node.v4(), node.v6());
        node.netns().ip(&format!(
            "addr del {v4}/24 dev eth0\naddr del {v6}/64 dev eth0\n\
             addr add 172.18.0.20{n}/24 dev eth0\naddr add fd00:18::20{n}/64 dev eth0 nodad\n\
             addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n\
             route replace default via 172.18.0.1\nroute replace default via fd00:18::1\n"
        ))?;
    }
    with_agents(fabric, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// Where hosts speak BGP, the node's address is on no NIC.
fn an_internal_address_on_loopback(fabric: Fabric) -> Result<()> {
    move_nodes_to_loopback(&fabric)?;
    with_agents(fabric, |net| {
        meet(net)?;
        // The world has no way back to the loopback addresses: packets have that of the NIC.
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// The same with an overlay between the IPv6 addresses: the kernel would begin its tunnel at that of the NIC.
#[test]
fn an_ipv6_overlay_between_addresses_on_loopback() -> Result<()> {
    on(Routing::Vxlan, |fabric| {
        move_nodes_to_loopback(&fabric)?;
        with_options(fabric, &["--overlay-family=ipv6"], meet)
    })
}

fn move_nodes_to_loopback(fabric: &Fabric) -> Result<()> {
    let routing = fabric.setup().routing;
    let own = |n: usize| ips(&[&format!("10.255.0.{n}"), &format!("fd00:255::{n}")]);
    for (n, other) in [(1, 2), (2, 1)] {
        let (node, peer) = (fabric.node(n), fabric.node(other));
        let (own, far) = (own(n), own(other));
        node.netns().ip(&format!(
            "addr add {}/32 dev lo\naddr add {}/128 dev lo nodad\n\
             route add {}/32 via {}\nroute add {}/128 via {}\n",
            own[0],
            own[1],
            far[0],
            peer.v4(),
            far[1],
            peer.v6()
        ))?;
        fabric.manifests().write(&format!("node-n{n}.yaml"), &node_yaml(node.name(), &own, node.pod_cidrs()))?;
        if routing == Routing::Native {
            // No node is a neighbour: the routers know the way, here by hand.
            for cidr in peer.pod_cidrs() {
                let hop = peer.address_like(cidr.addr());
                let source = own[usize::from(cidr.addr().is_ipv6())];
                node.netns().ip(&format!("route add {cidr} via {hop} src {source}\n"))?;
            }
        }
    }
    Ok(())
}

/// Moves the addresses of a node's NIC to a device on top of it.
pub fn move_addresses(node: &Node, to: &str) -> Result<()> {
    let (v4, v6) = (node.v4(), node.v6());
    node.netns().exec("ip", &["-6", "route", "flush", "default"])?;
    node.netns().ip(&format!(
        "addr flush dev eth0\naddr add {v4}/24 dev {to}\naddr add {v6}/64 dev {to} nodad\nlink set {to} up\n\
         route add default via 172.18.0.1\nroute add default via fd00:18::1\n"
    ))
}

/// Gives a node new addresses, as a DHCP server's new lease: first they are there, then the old
/// ones go.
pub fn replace_addresses(node: &Node, new: &[IpAddr]) -> Result<()> {
    node.netns().sysctl("ipv4/conf/eth0/promote_secondaries", "1")?;
    node.netns().ip(&format!(
        "addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\naddr del {}/24 dev eth0\naddr del {}/64 dev eth0\n\
         route replace default via 172.18.0.1\nroute replace default via fd00:18::1\n",
        new[0],
        new[1],
        node.v4(),
        node.v6()
    ))
}

fn a_bridge_as_the_uplink(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        node.netns().ip("link add br0 type bridge\nlink set eth0 master br0\n")?;
        move_addresses(node, "br0")?;
    }
    with_agents(fabric, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// As with VLANs: the NIC has no address, a device on top of it has. A macvlan, for not every kernel has VLANs.
fn a_device_on_top_of_the_nic_as_the_uplink(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        node.netns().ip("link add link eth0 name top0 type macvlan mode bridge\n")?;
        move_addresses(node, "top0")?;
    }
    with_agents(fabric, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// Machines and containers behind a bridge of the node, which know no pods.
fn a_bridge_of_machines(fabric: Fabric) -> Result<()> {
    let machine = fabric.add_machine(1)?;
    let _server = Server::start(&machine, "machine", PORT)?;
    with_agents(fabric, |net| {
        for address in ips(&["192.168.122.10", "fd00:7::10"]) {
            for proto in Proto::ALL {
                ask(net.node(1).netns(), proto, SocketAddr::new(address, PORT), 2)?.only_by(&["machine"])?;
                let answers = ask(net.a.netns(), proto, SocketAddr::new(address, PORT), 4)?;
                answers.only_by(&["machine"])?;
                answers.only_as(if address.is_ipv4() { "192.168.122.1".parse()? } else { "fd00:7::1".parse()? })?;
            }
        }
        // The machine reaches pods by this host, which forwards; Services are for pods and nodes alone.
        machine.ip("route add default via 192.168.122.1\nroute add default via fd00:7::1\n")?;
        reached(&machine, &net.a)?;
        let service = net.service(endpoints(&[&net.a, &net.c]))?;
        for target in service.targets() {
            let before = net.node(1).counter(DropReason::IsClusterIp)?;
            ensure!(ask(&machine, Proto::Udp, target, 1)?.answered() == 0, "a machine is served by {target}");
            ensure!(net.node(1).counter(DropReason::IsClusterIp)? > before, "no drop is counted");
        }
        meet(net)
    })
}

/// A lease that the network gives only after the agent has started.
fn an_address_that_comes_late(fabric: Fabric) -> Result<()> {
    let node = fabric.node(1);
    let (v4, v6) = (node.v4(), node.v6());
    node.netns().exec("ip", &["-6", "route", "flush", "default"])?;
    // The link-local address stays: it needs no network.
    node.netns().ip("addr flush dev eth0 scope global\n")?;
    for node in fabric.nodes() {
        node.spawn_agent(&[])?;
    }
    let why = |text: &str| {
        wait::until("the agent says what is missing", || {
            let answer = node.http_get("127.0.0.1:9879".parse()?, "/readyz")?;
            ensure!(answer.starts_with("HTTP/1.1 503") && answer.contains(text), "{answer}");
            Ok(())
        })
    };
    why("no device leads to other nodes").with_context(|| fabric.logs())?;
    // One family first.
    node.netns().ip(&format!("addr add {v6}/64 dev eth0 nodad\nroute add default via fd00:18::1\n"))?;
    node.netns().ip(&format!("addr add {v4}/24 dev eth0\nroute add default via 172.18.0.1\n"))?;
    fabric.nodes().iter().try_for_each(Node::wait_ready).with_context(|| fabric.logs())?;
    observed(&Net::furnished(fabric)?, |net| {
        wait::until("pods of both nodes meet", || meet(net))?;
        hosts_are_served(net)?;
        seen_as(&net.a, &net.node(1).addresses())
    })
}

/// The hosts of nearly all IPv6 clusters have IPv4, too.
fn a_cluster_of_ipv6_on_hosts_of_both_families(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        let cidrs: Vec<_> = node.pod_cidrs().iter().filter(|cidr| cidr.addr().is_ipv6()).copied().collect();
        let text = node_yaml(node.name(), &[node.v6().into()], &cidrs);
        fabric.manifests().write(&format!("node-{}.yaml", node.name()), &text)?;
    }
    with_agents(fabric, |net| {
        ensure!(net.a.addresses().len() == 1 && net.a.addresses()[0].is_ipv6(), "{:?}", net.a.addresses());
        reached(net.a.netns(), &net.c)?;
        reached(net.c.netns(), &net.a)?;
        reached(net.node(1).netns(), &net.c)?;
        let outside = SocketAddr::new(world()[1], PORT);
        let answers = ask(net.a.netns(), Proto::Tcp, outside, 4)?;
        answers.only_by(&["world"])?;
        answers.only_as(net.node(1).v6().into())
    })
}

/// What hardening guides and systemd-networkd write, before the agent starts and while it runs.
fn hardened_settings(fabric: Fabric) -> Result<()> {
    let harden = |node: &Node| -> Result<()> {
        for (key, value) in [
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/eth0/rp_filter", "1"),
            ("ipv4/conf/eth0/forwarding", "0"),
            ("ipv4/conf/all/accept_redirects", "0"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/all/accept_source_route", "0"),
            ("ipv4/ip_local_port_range", "1024 65535"),
            ("ipv4/tcp_tw_reuse", "1"),
        ] {
            node.netns().sysctl(key, value)?;
        }
        Ok(())
    };
    fabric.nodes().iter().try_for_each(harden)?;
    with_agents(fabric, |net| {
        meet(net)?;
        seen_as(&net.a, &net.node(1).addresses())?;
        harden(net.node(1))?;
        net.node(1).netns().sysctl("ipv4/ip_forward", "0")?;
        wait::until("settings are set again", || seen_as(&net.a, &net.node(1).addresses()))?;
        // Ports of masquerade do not run out: as many at once to one address as a busy node has.
        for address in world() {
            ask(net.a.netns(), Proto::Tcp, SocketAddr::new(address, PORT), 100)?.only_by(&["world"])?;
            ask(net.b.netns(), Proto::Udp, SocketAddr::new(address, PORT), 100)?.only_by(&["world"])?;
        }
        meet(net)
    })
}

/// Datagrams of one socket go on from the new address, as behind the kernel's masquerade.
fn an_address_that_changes_under_datagrams(fabric: Fabric) -> Result<()> {
    with_agents(fabric, |net| {
        let node = net.node(1);
        let new = ips(&["172.18.0.121", "fd00:18::121"]);
        let sockets = world().map(|address| {
            net.a.netns().run(|| udp_from_port(8310, SocketAddr::new(address, PORT))).and_then(|socket| socket)
        });
        let [four, six] = sockets;
        let sockets = [four?, six?];
        for (socket, expected) in sockets.iter().zip(node.addresses()) {
            let (_, seen) = ask_udp(socket, "before")?;
            ensure!(seen == expected, "{seen}");
        }
        replace_addresses(node, &new)?;
        net.fabric.manifests().write("node-n1.yaml", &node_yaml(node.name(), &new, node.pod_cidrs()))?;
        for (socket, expected) in sockets.iter().zip(&new) {
            wait::until("the flow goes on from the new address", || {
                let (_, seen) = ask_udp(socket, "after")?;
                ensure!(seen == *expected, "{seen}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

/// A published port without masquerade: portmap, Docker, kube-proxy next to rustnet.
fn a_port_that_netfilter_publishes(fabric: Fabric) -> Result<()> {
    let client = fabric.add_host("client", 99)?;
    with_agents(fabric, |net| {
        let node = net.node(1);
        for (family, address) in [("ip", net.a.v4()?.to_string()), ("ip6", format!("[{}]", net.a.v6()?))] {
            let nft = |rule: &str| node.netns().exec("nft", &[rule]);
            nft(&format!("add table {family} published"))?;
            nft(&format!("add chain {family} published in {{ type nat hook prerouting priority -100; }}"))?;
            for proto in ["tcp", "udp"] {
                nft(&format!("add rule {family} published in {proto} dport 18080 dnat to {address}:{PORT}"))?;
            }
        }
        for address in node.addresses() {
            for proto in Proto::ALL {
                let published = SocketAddr::new(address, 18080);
                ask(&client, proto, published, 4)?.only_by(&["a"]).with_context(|| format!("{proto:?} {published}"))?;
                ask(net.node(2).netns(), proto, published, 4)?.only_by(&["a"])?;
            }
        }
        meet(net)
    })
}

/// NTP, IKE, SIP: both bind a port of their own, and ask one server.
fn the_host_and_a_pod_use_one_port(fabric: Fabric) -> Result<()> {
    with_agents(fabric, |net| {
        let node = net.node(1);
        for address in world() {
            let target = SocketAddr::new(address, PORT);
            let host = node.netns().run(|| udp_from_port(8301, target)).and_then(|socket| socket)?;
            let pod = net.a.netns().run(|| udp_from_port(8301, target)).and_then(|socket| socket)?;
            for n in 0..10 {
                for (who, socket) in [("host", &host), ("pod", &pod)] {
                    let (by, _) = ask_udp(socket, &format!("{who} {n}")).with_context(|| format!("{who} {n}"))?;
                    ensure!(by == "world", "{by}");
                }
            }
        }
        Ok(())
    })
}

/// With the Services' ranges configured, a host's own requests to Services need no default route.
fn service_ranges_without_a_default_route(fabric: Fabric) -> Result<()> {
    for node in fabric.nodes() {
        node.netns().ip("route flush default\n")?;
        node.netns().exec("ip", &["-6", "route", "flush", "default"])?;
        node.spawn_agent(&["--service-cidrs", "10.96.0.0/16,fd00:96::/64"])?;
    }
    fabric.nodes().iter().try_for_each(Node::wait_ready).with_context(|| fabric.logs())?;
    observed(&Net::furnished(fabric)?, |net| {
        meet(net)?;
        hosts_are_served(net)?;
        // Nobody listens there, and no packet circles.
        let nobody = SocketAddr::new("10.96.200.200".parse()?, 80);
        ensure!(ask(net.node(1).netns(), Proto::Tcp, nobody, 1)?.answered() == 0, "an address of no Service answers");
        Ok(())
    })
}
