//! Maglev: a flow that another node gets goes to the same backend, and few flows move when a backend goes.

use crate::external::balancer;
use crate::fixture::{Net, TestService, endpoints, in_each_routing, observed};
use anyhow::{Result, ensure};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::client::{ask, ask_udp, udp_from_port};
use testkit::load::{Kind, Load};
use testkit::manifest::Outside;
use testkit::{Netns, Proto, Setup, wait};

in_each_routing!(flows_stay_with_their_backends);

/// Source ports that no other test in the world has.
const FIRST_PORT: u16 = 24_000;
const FLOWS: u16 = 60;

/// Who answers flows of the world's to a load balancer's address, by port.
fn answers(net: &Net, target: SocketAddr, first: u16) -> Result<Vec<String>> {
    let world = net.fabric.world();
    let ask = |port| world.run(|| Ok(ask_udp(&udp_from_port(port, target)?, "who")?.0)).and_then(|answer| answer);
    (first..first + FLOWS).map(ask).collect()
}

/// Has the segment's router lead an address to a node.
fn lead(net: &Net, vip: IpAddr, node: usize) -> Result<()> {
    net.fabric.switch().ip(&format!("route replace {vip} via {}\n", net.node(node).address_like(vip)))
}

/// Waits until a node leads new flows to these pods.
fn wait_led(from: &Netns, target: SocketAddr, to: &[&str]) -> Result<()> {
    wait::until(&format!("{target} leads to {to:?}"), || ask(from, Proto::Udp, target, FLOWS.into())?.only_by(to))
}

fn flows_stay_with_their_backends(net: &Net) -> Result<()> {
    let (all, fewer) = ([&net.a, &net.b, &net.c], ["b", "c"]);
    let vips = balancer(net)?;
    let mut service = net.unknown_service();
    service.service.is_maglev = true;
    service.service.outside = Outside { balancer: vips.clone(), ..Outside::default() };
    for (vip, first) in vips.into_iter().zip([FIRST_PORT, FIRST_PORT + 2 * FLOWS]) {
        service.set(endpoints(&all))?;
        let target = SocketAddr::new(vip, service.targets()[0].port());
        lead(net, vip, 1)?;
        for pod in [&net.a, &net.c] {
            wait_led(pod.netns(), target, &["a", "b", "c"])?;
        }
        let (once, again) = (answers(net, target, first)?, answers(net, target, first + FLOWS)?);
        ensure!(["a", "b", "c"].iter().all(|pod| once.iter().any(|by| by == pod)), "{once:?}");
        // The other node has no entries of these flows.
        lead(net, vip, 2)?;
        let there = answers(net, target, first)?;
        ensure!(once == there, "{target}: {once:?} by one node, {there:?} by the other");

        // Nor has it of those that only the first node has seen.
        service.set(endpoints(&[&net.b, &net.c]))?;
        wait_led(net.c.netns(), target, &fewer)?;
        let after = answers(net, target, first + FLOWS)?;
        ensure!(after.iter().all(|by| fewer.contains(&by.as_str())), "{target}: {after:?}");
        // By their number alone, a quarter of the others would move, for the lowest of three addresses is gone.
        let moved = again.iter().zip(&after).filter(|(was, is)| *was != "a" && was != is).count();
        ensure!(moved <= 3, "{target}: {moved} flows moved: {again:?}, then {after:?}");
    }
    Ok(())
}

/// Waits until a node shows how it spreads the flows of a Service.
fn wait_spread(net: &Net, node: usize, service: &TestService<'_>, how: &str) -> Result<()> {
    wait::until(&format!("{how} on node {node}"), || {
        let shown = net.node(node).rustnetctl(&["services", &format!("default/{}", service.service.name)])?;
        ensure!(shown.contains(how), "{shown}");
        Ok(())
    })
}

/// While the annotation comes and goes, tables of other sizes replace those that there are, one is given up for lack of room, and the
/// map gets another size, by agents that are stopped or killed.
#[test]
fn flows_go_on_whatever_becomes_of_their_table() -> Result<()> {
    let net = Net::start(Setup::default())?;
    observed(&net, |net| {
        let mut service = net.service(endpoints(&[&net.a, &net.b, &net.c]))?;
        let mut loads = Vec::new();
        for target in service.targets() {
            for from in [net.a.netns(), net.c.netns(), net.node(1).netns()] {
                for proto in Proto::ALL {
                    for kind in [Kind::Established, Kind::New] {
                        loads.push(Load::start(from, kind, proto, target, Duration::from_millis(4))?);
                    }
                }
            }
        }
        let wait_more = || loads.iter().try_for_each(|load| load.wait_more(20));
        let flip = |service: &mut TestService<'_>, is_maglev: bool| {
            service.service.is_maglev = is_maglev;
            service.set(endpoints(&[&net.a, &net.b, &net.c]))?;
            wait_spread(net, 1, service, if is_maglev { "maglev" } else { "random" })?;
            wait_more()
        };
        for is_maglev in [true, false, true] {
            flip(&mut service, is_maglev)?;
        }
        let arguments: [(&[&str], bool, &str); 5] = [
            (&["--maglev-table-size", "251"], false, "maglev"),
            // Its only unit is the one that no table has.
            (&["--maglev-table-size", "131071", "--maglev-entries", "256"], true, "random"),
            (&["--maglev-table-size", "131071"], true, "maglev"),
            (&["--maglev-table-size", "251", "--maglev-entries", "1024"], false, "maglev"),
            (&[], true, "maglev"),
        ];
        for (arguments, is_killed, how) in arguments {
            let node = net.node(1);
            if is_killed {
                node.kill_agent()?;
            } else {
                node.stop_agent()?;
            }
            node.start_agent(arguments)?;
            wait_spread(net, 1, &service, how)?;
            wait_more()?;
            flip(&mut service, false)?;
            service.service.is_maglev = true;
            service.set(endpoints(&[&net.a, &net.b, &net.c]))?;
            wait_spread(net, 1, &service, how)?;
            wait_more()?;
        }
        for load in loads {
            load.stop()?.no_loss()?;
        }
        Ok(())
    })
}
