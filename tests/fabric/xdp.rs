//! XDP on uplinks (`--xdp native-veth`): clients outside get the same answers, most of them without an skb.

use crate::external;
use crate::fixture::{Net, TestService, endpoints, node_port, node_ports, observed, published, wait_served};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::hook;
use std::net::SocketAddr;
use std::time::Duration;
use testkit::client::ask_sized;
use testkit::load::{Kind, Load};
use testkit::manifest::Outside;
use testkit::stream::Stream;
use testkit::{Node, Proto, Routing, Setup, wait};

const NATIVE: &[&str] = &["--xdp", "native-veth"];
/// Datagrams of a burst, and the pause behind it.
const BURST: (usize, Duration) = (8, Duration::from_millis(2));

/// Runs a test on a fabric whose uplinks have the program.
fn with_xdp(routing: Routing, test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    let net = Net::start(Setup { routing, agent: NATIVE, ..Setup::default() })?;
    let _wire = net.fabric.wire_xdp()?;
    net.fabric.nodes().iter().try_for_each(|node| has_program(node, true))?;
    observed(&net, test)
}

/// The same, where node 1 alone has it, by a flag of its own agent.
fn on_one_node(test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    let net = Net::start(Setup { routing: Routing::Native, ..Setup::default() })?;
    let _wire = net.fabric.wire_xdp()?;
    observed(&net, |net| {
        restart(net.node(1), NATIVE)?;
        has_program(net.node(1), true)?;
        test(net)
    })
}

fn restart(node: &Node, extra: &[&str]) -> Result<()> {
    node.stop_agent()?;
    node.start_agent(extra)
}

/// `status` lists the uplink among those with the program, or does not.
fn has_program(node: &Node, is_wanted: bool) -> Result<()> {
    wait::until(&format!("XDP of {}", node.name()), || {
        let status = node.rustnetctl(&["status"])?;
        let line = status.lines().find(|line| line.starts_with("XDP:")).unwrap_or_default();
        ensure!(line.contains("on eth0") == is_wanted && !line.contains("not on"), "{status}");
        Ok(())
    })
}

fn sent(node: &Node) -> Result<u64> {
    node.forwarded_at(hook::UPLINK_XDP)
}

/// A node port of node 1 whose only backend is on node 2.
fn across(net: &Net) -> Result<TestService<'_>> {
    let outside = Outside { node_port: node_port(), ..Outside::default() };
    let service = published(net, outside, endpoints(&[&net.c]))?;
    for target in node_ports(net.node(1), &service) {
        wait_served(net.fabric.world(), target)?;
    }
    Ok(service)
}

/// Many packets in both directions, of which few are seen by other programs.
#[test]
fn known_flows_leave_in_the_driver() -> Result<()> {
    for routing in [Routing::Native, Routing::Vxlan] {
        with_xdp(routing, most_packets_leave_in_the_driver).with_context(|| format!("{routing:?}"))?;
    }
    Ok(())
}

fn most_packets_leave_in_the_driver(net: &Net) -> Result<()> {
    let (node, service) = (net.node(1), across(net)?);
    for target in node_ports(node, &service) {
        for (proto, size) in [(Proto::Tcp, 60_000), (Proto::Udp, 1300)] {
            let before = sent(node)?;
            // A client behind IPv6 learns the overlay's MTU by an error first.
            wait::until(&format!("{proto} {target}"), || {
                ask_sized(net.fabric.world(), proto, target, 20, size)?.only_by(&["c"])
            })?;
            // Nothing but the first packet of each flow is left to others, and its first answers.
            let more = sent(node)? - before;
            let least = if proto == Proto::Tcp { 20 * 2 * 60_000 / 1500 } else { 10 };
            ensure!(more >= least, "{proto} to {target}: {more} packets, not {least}");
        }
    }
    Ok(())
}

/// What clients outside see is the same as without.
#[test]
fn clients_see_no_difference() -> Result<()> {
    for routing in [Routing::Native, Routing::Vxlan, Routing::DirectAndVxlan] {
        with_xdp(routing, |net| {
            for test in [
                external::node_ports_of_each_node,
                external::large_transfers,
                external::a_local_policy_keeps_the_client,
                external::without_endpoints_clients_are_refused,
                external::a_load_balancers_address,
                external::a_backend_that_is_the_node,
                external::connections_outlive_their_endpoint,
            ] {
                test(net)?;
            }
            Ok(())
        })
        .with_context(|| format!("{routing:?}"))?;
    }
    Ok(())
}

/// A stream of datagrams, and connections old and new, to each target.
struct Traffic {
    streams: Vec<Stream>,
    loads: Vec<Load>,
}

impl Traffic {
    fn start(net: &Net, targets: [SocketAddr; 2]) -> Result<Self> {
        let (mut streams, mut loads) = (Vec::new(), Vec::new());
        for target in targets {
            streams.push(Stream::start(net.fabric.world(), target, BURST.0, BURST.1)?);
            for (kind, proto) in [(Kind::Established, Proto::Tcp), (Kind::New, Proto::Tcp), (Kind::New, Proto::Udp)] {
                loads.push(Load::start(net.fabric.world(), kind, proto, target, Duration::from_millis(4))?);
            }
        }
        Ok(Self { streams, loads })
    }

    fn wait_more(&self, n: usize) -> Result<()> {
        self.loads.iter().try_for_each(|load| load.wait_more(n))
    }

    fn nothing_lost(self) -> Result<()> {
        self.loads.into_iter().try_for_each(|load| load.stop()?.no_loss())?;
        self.streams.into_iter().try_for_each(|stream| stream.stop()?.no_loss())
    }
}

/// The agent killed, started, started with other map sizes, and without XDP: the program goes on, is swapped, stays away during the
/// upgrade, comes back, and goes.
#[test]
fn agents_come_and_go_under_traffic() -> Result<()> {
    on_one_node(|net| {
        let (node, service) = (net.node(1), across(net)?);
        let traffic = Traffic::start(net, node_ports(node, &service))?;
        let goes_on = |is_wanted: bool| -> Result<()> {
            has_program(node, is_wanted)?;
            let before = sent(node)?;
            traffic.wait_more(20)?;
            ensure!((sent(node)? > before) == is_wanted, "{before} packets before, {} now", sent(node)?);
            Ok(())
        };
        goes_on(true)?;
        node.kill_agent()?;
        let before = sent(node)?;
        traffic.wait_more(20)?;
        ensure!(sent(node)? > before, "nothing is forwarded without an agent");
        node.start_agent(NATIVE)?;
        goes_on(true)?;
        for sizes in [&["--ct-tcp-entries", "16384", "--ct-any-entries", "8192"][..], &[]] {
            restart(node, &[NATIVE, sizes].concat())?;
            goes_on(true)?;
        }
        restart(node, &[])?;
        goes_on(false)?;
        restart(node, NATIVE)?;
        goes_on(true)?;
        traffic.nothing_lost()
    })
}

/// Another program on the hook stays there, and TC serves clients. Once it has gone, ours comes. So with a veth that may have no program at
/// its other end.
#[test]
fn a_device_that_cannot_have_it() -> Result<()> {
    on_one_node(|net| {
        let (node, service) = (net.node(1), across(net)?);
        let run = |program: &str, args: &[&str]| node.netns().command(program)?.args(args).text().map(drop);
        let is_refused = |words: [&str; 2]| {
            wait::until(&format!("the agent says {words:?}"), || {
                let log = std::fs::read_to_string(node.agent_log_path())?;
                ensure!(words.iter().all(|word| log.contains(word)), "{log}");
                let status = node.rustnetctl(&["status"])?;
                ensure!(status.contains("not on eth0; TC forwards"), "{status}");
                Ok(())
            })?;
            let before = sent(node)?;
            for target in node_ports(node, &service) {
                ask_sized(net.fabric.world(), Proto::Tcp, target, 5, 10_000)?.only_by(&["c"])?;
            }
            ensure!(sent(node)? == before, "XDP has sent");
            Ok(())
        };
        restart(node, &["--xdp", "native"])?;
        is_refused(["XDP on eth0: it is a veth", "--xdp native-veth"])?;

        node.stop_agent()?;
        let program = node.bpffs().join("prog/uplink_xdp").display().to_string();
        run("bpftool", &["net", "attach", "xdpdrv", "pinned", &program, "dev", "eth0"])?;
        let before = sent(node)?;
        node.start_agent(NATIVE)?;
        wait::until("the agent names the other program", || {
            let log = std::fs::read_to_string(node.agent_log_path())?;
            ensure!(log.contains("another program has its XDP hook"), "{log}");
            Ok(())
        })?;
        run("bpftool", &["net", "detach", "xdpdrv", "dev", "eth0"])?;
        has_program(node, true)?;
        for target in node_ports(node, &service) {
            ask_sized(net.fabric.world(), Proto::Tcp, target, 5, 10_000)?.only_by(&["c"])?;
        }
        ensure!(sent(node)? > before, "XDP has sent nothing");
        Ok(())
    })
}
