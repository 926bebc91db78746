//! Agents die, come back, and find the world changed.

use crate::fixture::{Net, TestService, endpoints, observed};
use anyhow::{Result, ensure};
use std::time::Duration;
use testkit::client::ask;
use testkit::load::{Kind, Load};
use testkit::manifest::Service;
use testkit::{Fabric, Proto, Routing, Setup, wait};

const PAUSE: Duration = Duration::from_millis(1);

fn own(routing: Routing) -> Result<Net> {
    Net::start(Setup { routing, ..Setup::default() })
}

/// Established and new flows, TCP and UDP, both families, from pod `a` and from node 2's host.
fn traffic(net: &Net, service: &TestService<'_>) -> Result<Vec<Load>> {
    let mut loads = Vec::new();
    for kind in [Kind::Established, Kind::New] {
        for proto in Proto::ALL {
            for target in service.targets() {
                loads.push(Load::start(net.a.netns(), kind, proto, target, PAUSE)?);
            }
        }
    }
    for target in service.targets() {
        loads.push(Load::start(net.node(2).netns(), Kind::New, Proto::Tcp, target, PAUSE)?);
    }
    Ok(loads)
}

fn more(loads: &[Load], n: usize) -> Result<()> {
    loads.iter().try_for_each(|load| load.wait_more(n))
}

fn nothing_lost(loads: Vec<Load>) -> Result<()> {
    for load in loads {
        load.stop()?.no_loss()?;
    }
    Ok(())
}

fn killed_under_load(net: &Net) -> Result<()> {
    let service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
    let loads = traffic(net, &service)?;
    more(&loads, 20)?;
    for round in 0..3 {
        for node in net.fabric.nodes() {
            node.kill_agent()?;
        }
        more(&loads, 50)?;
        ensure!(net.fabric.nodes().iter().all(|n| !n.agent_runs()), "round {round}: an agent is alive");
        for node in net.fabric.nodes() {
            node.start_agent(&[])?;
        }
        more(&loads, 20)?;
    }
    nothing_lost(loads)
}

#[test]
fn killing_agents_under_load_loses_nothing_vxlan() -> Result<()> {
    observed(&own(Routing::Vxlan)?, killed_under_load)
}

#[test]
fn killing_agents_under_load_loses_nothing_native() -> Result<()> {
    observed(&own(Routing::Native)?, killed_under_load)
}

#[test]
fn stopping_an_agent_leaves_forwarding_as_it_is() -> Result<()> {
    observed(&own(Routing::Vxlan)?, |net| {
        let service = net.service(endpoints(&[&net.b, &net.c]))?;
        let loads = traffic(net, &service)?;
        more(&loads, 20)?;
        for node in net.fabric.nodes() {
            node.stop_agent()?;
        }
        more(&loads, 50)?;
        nothing_lost(loads)
    })
}

#[test]
fn pods_come_and_go_while_the_agent_is_dead() -> Result<()> {
    observed(&own(Routing::Vxlan)?, |net| {
        let service = net.service(endpoints(&[&net.c]))?;
        net.node(1).kill_agent()?;
        let pod = net.node(1).add_pod("newcomer")?;
        pod.check()?;
        for address in pod.addresses() {
            let target = std::net::SocketAddr::new(*address, testkit::pod::PORT);
            for from in [net.a.netns(), net.c.netns(), net.node(1).netns()] {
                ask(from, Proto::Tcp, target, 5)?.only_by(&["newcomer"])?;
            }
            ask(pod.netns(), Proto::Udp, service.target_like(*address), 5)?.only_by(&["c"])?;
        }
        pod.delete()?;
        net.node(1).start_agent(&[])?;
        ask(net.a.netns(), Proto::Tcp, service.targets()[0], 5)?.only_by(&["c"])
    })
}

/// Deleted and changed while nobody watched: pruned and changed after the restart, and not before the source has synced.
#[test]
fn changes_during_an_outage_are_applied_on_return() -> Result<()> {
    observed(&own(Routing::Vxlan)?, |net| {
        let (mut kept, deleted) = (net.service(endpoints(&[&net.b]))?, net.service(endpoints(&[&net.b]))?);
        let gone = deleted.targets();
        net.node(1).kill_agent()?;
        kept.set(endpoints(&[&net.c]))?;
        drop(deleted);
        ask(net.a.netns(), Proto::Tcp, gone[0], 5)?.only_by(&["b"])?;
        net.node(1).start_agent(&[])?;
        for target in kept.targets() {
            wait::until("the change", || ask(net.a.netns(), Proto::Tcp, target, 5)?.only_by(&["c"]))?;
        }
        wait::until("the prune", || {
            let services = net.node(1).rustnetctl(&["services", "-o", "json"])?;
            ensure!(!services.contains(&gone[0].ip().to_string()), "{services}");
            ensure!(!services.contains(&gone[1].ip().to_string()), "{services}");
            Ok(())
        })
    })
}

/// Somebody deletes what the agent owns in the kernel: it is repaired.
#[test]
fn deleted_routes_come_back() -> Result<()> {
    observed(&own(Routing::Vxlan)?, |net| {
        let routes = |family: &str| net.node(1).netns().exec("ip", &[family, "route", "show", "dev", "rn_vxlan"]);
        for family in ["-4", "-6"] {
            let before = routes(family)?;
            ensure!(before.contains("244"), "no routes over the overlay: {before}");
            net.node(1).netns().exec("ip", &[family, "route", "flush", "dev", "rn_vxlan"])?;
            wait::until("the routes are back", || {
                let now = routes(family)?;
                ensure!(before.lines().all(|l| now.contains(l.trim())), "before:\n{before}now:\n{now}");
                Ok(())
            })?;
        }
        net.node(1).netns().sysctl("ipv4/ip_forward", "0")?;
        wait::until("forwarding is on again", || {
            let now = net.node(1).netns().read_sysctl("ipv4/ip_forward")?;
            ensure!(now == "1", "ip_forward is {now}");
            Ok(())
        })
    })
}

/// The agent runs on, reports the error and installs no CNI configuration. Once it can write, it
/// goes on by itself.
#[test]
fn a_directory_that_cannot_be_written_is_reported_and_waited_for() -> Result<()> {
    let fabric = Fabric::build(Setup { nodes: 1, ..Setup::default() })?;
    let node = fabric.node(1);
    let bin = node.cni_bin_dir();
    std::fs::remove_dir_all(&bin)?;
    std::fs::write(&bin, "in the way")?;
    node.spawn_agent(&[])?;
    let ready = || node.http_get("127.0.0.1:9879".parse()?, "/readyz");
    wait::until("the agent names the directory", || {
        let answer = ready()?;
        ensure!(answer.contains("503") && answer.contains("--cni-bin-dir"), "{answer}");
        Ok(())
    })?;
    ensure!(node.agent_runs(), "the agent ended");
    ensure!(!node.cni_conf_dir().join("05-rustnet.conflist").exists(), "a network without its plugin");
    std::fs::remove_file(&bin)?;
    // What wakes the agent is any change, or the next look at the host's network.
    fabric.manifests().apply(&Service::new("any", &["10.96.9.9".parse()?], 80, 80))?;
    node.wait_ready()?;
    node.add_pod("a")?.check()
}
