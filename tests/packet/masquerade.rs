//! Pods and the outside world: the node's address stands in for theirs.

use crate::flows::{ALL, PORT, Proto, from_a, from_b, from_outside, later};
use crate::frame::Frame;
use crate::harness::{Flow, SNAT, each, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::{flags, state};
use rustnet_common::drop::DropReason;
use rustnet_common::peer;

#[test]
fn there_and_back() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let to = (net.world(), proto.port(443));
            let ask = from_a(net, proto, to);
            let leaves = ask.hop().between((net.node(), PORT), to);
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let answer = leaves.reply().map(|f| f.ttl = 57);
            let arrives = answer.hop().map(|f| {
                f.dst = net.a();
            });
            lab.uplink_in(&answer)?.to_the_pod(&arrives)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop().between((net.node(), PORT), to))?;
            let half = lab.half(Flow::of(&ask))?;
            let state = if proto == Proto::Tcp { state::ANSWERED | state::ESTABLISHED } else { state::ANSWERED };
            ensure!(half.flags == flags::NAT | flags::MASQ && half.state == state, "{half:?}");
            Ok(())
        })
    })
}

#[test]
fn the_client_port_is_kept_where_it_may_be() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let to = (net.world(), proto.port(443));
            for port in [*SNAT.start(), *SNAT.end(), *SNAT.start() - 1, *SNAT.end() + 1, 1, 65_535] {
                let ask = from_a(net, proto, to).map(|f| f.set_ports(port, to.1));
                let shot = lab.pod_sends(&ask)?;
                let new = lab.half(Flow::of(&ask))?.to.sport;
                ensure!(SNAT.contains(&new) && (new == port || !SNAT.contains(&port)), "port {port} became {new}");
                shot.onto_wire(&ask.hop().between((net.node(), new), to))?;
                let answer = ask.between((net.node(), new), to).reply();
                lab.uplink_in(&answer)?.to_the_pod(&answer.hop().between(to, (net.a(), port)).map(|f| {
                    // An echo reply bears the identifier as its destination's.
                    f.set_ports(to.1, port);
                }))?;
            }
            Ok(())
        })
    })
}

/// Two pods with one port to one destination: the world sees two flows.
#[test]
fn pods_do_not_get_each_others_answers() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let to = (net.world(), proto.port(443));
            let (a, b) = (from_a(net, proto, to), from_b(net, proto, to));
            lab.pod_sends(&a)?.onto_wire(&a.hop().between((net.node(), PORT), to))?;
            let shot = lab.pod_sends(&b)?;
            let port = lab.half(Flow::of(&b))?.to.sport;
            ensure!(port != PORT && SNAT.contains(&port), "port {port}");
            shot.onto_wire(&b.hop().between((net.node(), port), to))?;
            for (ask, port) in [(&a, PORT), (&b, port)] {
                let answer = ask.between((net.node(), port), to).reply();
                let arrives = answer.hop().map(|f| {
                    f.dst = ask.src;
                    f.set_ports(to.1, PORT);
                });
                lab.uplink_in(&answer)?.to_the_pod(&arrives)?;
            }
            Ok(())
        })
    })
}

/// A protocol without ports has one flow between two addresses: the second pod is refused, not mixed up.
#[test]
fn a_protocol_without_ports() -> Result<()> {
    labs(|lab, net| {
        let esp = |f: Frame| f.map(|f| f.l4 = crate::frame::L4::Other(50));
        let a = esp(from_a(net, Proto::Udp, (net.world(), 0)));
        let leaves = a.hop().map(|f| f.src = net.node());
        lab.pod_sends(&a)?.onto_wire(&leaves)?;
        let answer = leaves.reply();
        lab.uplink_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))?;
        lab.pod_sends(&esp(from_b(net, Proto::Udp, (net.world(), 0))))?.dropped(DropReason::NatNoMapping)
    })
}

/// All ports of the range taken towards one destination: refused and counted; free again once their flows are over.
#[test]
fn the_range_exhausted_and_reclaimed() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_001))?;
        let to = (net.world(), 443);
        let flows: Vec<_> = [30_000, 30_001].map(|p| from_a(net, Proto::Tcp, to).map(|f| f.set_ports(p, 443))).into();
        for f in &flows {
            lab.pod_sends(f)?.onto_wire(&f.hop().map(|f| f.src = net.node()))?;
        }
        let third = from_b(net, Proto::Tcp, to);
        lab.pod_sends(&third)?.dropped(DropReason::NatNoMapping)?;
        ensure!(lab.connections(net)?.len() == 4, "a refused flow is tracked");
        // One that ended is soon reused.
        let reset = crate::errors::reset(&flows[0].hop().map(|f| f.src = net.node()));
        lab.uplink_in(&reset)?.to_the_pod(&reset.hop().map(|f| f.dst = net.a()))?;
        lab.pod_sends(&third)?.onto_wire(&third.hop().between((net.node(), 30_000), to))?;
        Ok(())
    })
}

/// Of 200 ports, with up to 190 taken: each new flow finds a free one. And one whose entries were evicted gets its own again.
#[test]
fn the_last_ports_are_found_and_given_again() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_199))?;
        let to = (net.world(), 443);
        let flow = |port| from_a(net, Proto::Tcp, to).map(|f| f.set_ports(port, 443));
        let given = |f: &Frame| Ok::<_, anyhow::Error>(lab.half(Flow::of(f))?.to.sport);
        let first = flow(40_000);
        lab.pod_sends(&first)?;
        let own = given(&first)?;
        for port in 40_001..40_190 {
            let f = flow(port);
            let shot = lab.pod_sends(&f)?;
            shot.onto_wire(&f.hop().between((net.node(), given(&f)?), to)).with_context(|| format!("from {port}"))?;
        }
        let answer = first.hop().between((net.node(), own), to).reply();
        lab.evict(Flow::of(&first))?;
        lab.evict(Flow::of(&answer))?;
        let more = later(&first);
        lab.pod_sends(&more)?.onto_wire(&more.hop().between((net.node(), own), to))
    })
}

/// A flow that nobody has seen for longer than its protocol's lifetime gives its port away.
#[test]
fn a_silent_flow_gives_its_port_away() -> Result<()> {
    labs(|lab, net| {
        // One port only, so that there is no choice.
        lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_000))?;
        let to = (net.world(), 53);
        let a = from_a(net, Proto::Udp, to).map(|f| f.set_ports(30_000, 53));
        lab.pod_sends(&a)?.onto_wire(&a.hop().map(|f| f.src = net.node()))?;
        let b = from_b(net, Proto::Udp, to);
        lab.pod_sends(&b)?.dropped(DropReason::NatNoMapping)?;
        let answer = Flow::of(&a.map(|f| f.src = net.node())).reversed();
        lab.age(answer, 119)?;
        lab.pod_sends(&b)?.dropped(DropReason::NatNoMapping)?;
        lab.age(answer, 1)?;
        lab.pod_sends(&b)?.onto_wire(&b.hop().between((net.node(), 30_000), to))?;
        let now = lab.half(answer)?;
        ensure!((now.to.dst, now.to.dport) == (net.b(), PORT), "{now:?}");
        Ok(())
    })
}

#[test]
fn ranges_that_are_not_to_be_masqueraded() -> Result<()> {
    labs(|lab, net| {
        lab.put_peer(net.world(), Some((24, 48)), peer::flags::NO_MASQ, None)?;
        let ask = from_a(net, Proto::Tcp, (net.world(), 443));
        lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
        lab.configure(|c| c.flags = 0)?;
        let ask = from_a(net, Proto::Tcp, (net.router(), 443));
        lab.pod_sends(&ask)?.onto_wire(&ask.hop())
    })
}

/// What nobody asked for and is for the node itself is the stack's.
#[test]
fn the_nodes_own_traffic_is_left_alone() -> Result<()> {
    labs(|lab, net| {
        each(&ALL, |proto| {
            let f = from_outside(proto, (net.world(), PORT), (net.node(), 22));
            lab.uplink_in(&f)?.to_stack(&f)?;
            let f = crate::flows::from_host(net, proto, (net.world(), 443));
            lab.uplink_out(&f)?.to_stack(&f)
        })?;
        ensure!(lab.halves()? == 0, "the node's own traffic is tracked");
        Ok(())
    })
}

#[test]
fn only_the_peer_that_the_pod_asked_may_answer() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.world(), 53));
        let leaves = ask.hop().map(|f| f.src = net.node());
        lab.pod_sends(&ask)?.onto_wire(&leaves)?;
        for stranger in [
            leaves.reply().map(|f| f.src = net.router()),
            leaves.reply().map(|f| f.set_ports(54, PORT)),
            leaves.reply().map(|f| f.set_ports(53, PORT + 1)),
        ] {
            lab.uplink_in(&stranger)?.to_stack(&stranger)?;
        }
        Ok(())
    })
}
