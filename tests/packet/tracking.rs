//! The connection table over a flow's life: states, both halves kept alive, evicted halves restored, port pairs reused.

use crate::errors::reset;
use crate::flows::{
    ALL, PORT, Proto, SERVED, as_from_b, at_backend, at_client, from_a, from_b, from_host, from_outside, later,
};
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{Flow, Lab, MAC_B, MAC_HOST, Net, OVERLAY, POD_A, POD_B, UPLINK, VNI, each, labs};
use crate::services::exchange;
use anyhow::{Context, Result, bail, ensure};
use rustnet_common::config;
use rustnet_common::conntrack::{NOT_LOCAL, SOURCE_NONE, flags, state};
use rustnet_common::drop::hook;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use testkit::datapath::Input;

/// A service flow from pod A to pod B: what is sent, and what the answer to it is.
fn begin(lab: &Lab, net: Net, proto: Proto) -> Result<(Frame, Frame)> {
    lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
    let ask = from_a(net, proto, (net.vip(1), 80));
    let answer = exchange(lab, net, &ask)?;
    Ok((ask, answer))
}

fn there(net: Net, f: &Frame) -> Frame {
    at_backend(net, f, net.b())
}

fn back(net: Net, f: &Frame) -> Frame {
    at_client(net, f, 1)
}

#[test]
fn an_evicted_half_is_restored() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            for forwards in [true, false] {
                let (ask, answer) = begin(lab, net, proto)?;
                // The third segment of the handshake changes the state.
                lab.pod_sends(&later(&ask))?.to_the_pod(&there(net, &later(&ask)))?;
                let (key, answer_key) = (Flow::of(&ask), Flow::of(&answer));
                let (gone, left) = if forwards { (answer_key, key) } else { (key, answer_key) };
                let before = lab.half(gone)?;
                lab.evict(gone)?;
                // Within a second nothing is looked after.
                let more = if forwards { later(&ask) } else { later(&answer) };
                let want = if forwards { there(net, &more) } else { back(net, &more) };
                lab.pod_sends(&more)?.to_the_pod(&want)?;
                ensure!(lab.half(gone).is_err(), "restored at once: every packet pays for it");
                lab.age(left, 1)?;
                lab.pod_sends(&more)?.to_the_pod(&want)?;
                let restored = lab.half(gone)?;
                ensure!(
                    (restored.to, restored.flags, restored.state, restored.backend)
                        == (before.to, before.flags, before.state, before.backend),
                    "{restored:?} was {before:?}"
                );
                ensure!((restored.source, restored.packets) == (SOURCE_NONE, 0), "{restored:?}");
                ensure!(restored.seen == lab.half(left)?.seen, "halves of different age");
                // And the other direction goes on.
                let (f, want) = if forwards {
                    (later(&answer), back(net, &later(&answer)))
                } else {
                    (later(&ask), there(net, &later(&ask)))
                };
                lab.pod_sends(&f)?.to_the_pod(&want)?;
                lab.forget()?;
            }
            Ok(())
        })
    })
}

/// Traffic in one direction keeps both halves young.
#[test]
fn one_direction_keeps_both_alive() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let (ask, answer) = begin(lab, net, proto)?;
            let (key, answer_key) = (Flow::of(&ask), Flow::of(&answer));
            let old = lab.age(answer_key, 30)?;
            lab.age(key, 30)?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(net, &later(&ask)))?;
            let (a, b) = (lab.half(key)?.seen, lab.half(answer_key)?.seen);
            ensure!(a == b && a.wrapping_sub(old) >= 29 * crate::harness::HZ, "{old}, then {a} and {b}");
            lab.forget()
        })
    })
}

/// Both halves evicted: the flow is opened again, to the same backend, for the hash decides.
#[test]
fn both_halves_evicted() -> Result<()> {
    labs(|lab, net| {
        each(&SERVED, |proto| {
            let (ask, answer) = begin(lab, net, proto)?;
            let before = lab.half(Flow::of(&ask))?;
            lab.forget()?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(net, &later(&ask)))?;
            ensure!(lab.half(Flow::of(&ask))?.to == before.to);
            lab.pod_sends(&later(&answer))?.to_the_pod(&back(net, &later(&answer)))
        })
    })
}

#[test]
fn states_of_a_tcp_connection() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), 8080)])?;
        let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
        let answer = as_from_b(&there(net, &ask).reply());
        let (key, answer_key) = (Flow::of(&ask), Flow::of(&answer));
        let open = state::ANSWERED | state::ESTABLISHED;
        let closing = open | state::FIN_ORIG | state::FIN_ACKED;
        let steps: [(&Frame, u8, u64); 8] = [
            (&ask, SYN, 0),
            // A repeated SYN of a connection that is not closing is a retransmission.
            (&ask, SYN, 0),
            (&answer, SYN | ACK, state::ANSWERED),
            (&ask, ACK, open),
            (&ask, FIN | ACK, open | state::FIN_ORIG),
            (&answer, ACK, closing),
            (&answer, FIN | ACK, closing | state::FIN_REPLY),
            (&ask, ACK, closing | state::FIN_REPLY),
        ];
        for (i, (f, tcp, want)) in steps.into_iter().enumerate() {
            let f = f.with_flags(tcp);
            let becomes = if Flow::of(&f) == key { there(net, &f) } else { back(net, &f) };
            lab.pod_sends(&f)?.to_the_pod(&becomes)?;
            let (a, b) = (lab.half(key)?, lab.half(answer_key)?);
            ensure!(
                (a.state, b.state) == (want, want),
                "after step {i}: {:#x} and {:#x}, not {want:#x}",
                a.state,
                b.state
            );
        }
        ensure!(state::is_closing(lab.half(key)?.state));
        // Either side's reset ends it.
        for by_answer in [false, true] {
            lab.forget()?;
            lab.pod_sends(&ask)?.to_the_pod(&there(net, &ask))?;
            // A refusal acknowledges the SYN; who gives up before an answer goes on from it (RFC 9293, 3.10.7).
            let f = if by_answer {
                reset(&there(net, &ask))
            } else {
                ask.with_flags(RST).map(|f| {
                    if let L4::Tcp { seq, .. } = &mut f.l4 {
                        *seq += 1;
                    }
                })
            };
            let f = if by_answer { f.map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64)) } else { f };
            lab.pod_sends(&f)?.to_the_pod(&if by_answer { back(net, &f) } else { there(net, &f) })?;
            ensure!(state::is_closing(lab.half(key)?.state) && state::is_closing(lab.half(answer_key)?.state));
        }
        Ok(())
    })
}

/// A port pair used again after FIN or RST: a new connection, which may have another backend.
#[test]
fn a_port_pair_is_used_again() -> Result<()> {
    labs(|lab, net| {
        for reset in [false, true] {
            let (ask, answer) = begin(lab, net, Proto::Tcp)?;
            if reset {
                let f = answer.with_flags(RST);
                lab.pod_sends(&f)?.to_the_pod(&back(net, &f))?;
            } else {
                for f in [ask.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
                    lab.pod_sends(&f)?;
                }
            }
            // The service has moved meanwhile.
            lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), 8080)])?;
            // The old connection's last segments still go the old way.
            lab.pod_sends(&ask.with_flags(ACK))?.to_the_pod(&there(net, &ask.with_flags(ACK)))?;
            lab.pod_sends(&ask)?.onto_wire(&at_backend(net, &ask, net.far()))?;
            let half = lab.half(Flow::of(&ask))?;
            ensure!(half.state == 0 && half.packets == 1, "{half:?}");
            let answer = at_backend(net, &ask, net.far()).reply();
            lab.overlay_in(net.node2(), &answer)?.to_the_pod(&back(net, &answer))?;
            // What is left of the old one does not speak for the new one.
            let stale = from_b(net, Proto::Tcp, (net.a(), PORT)).map(|f| f.set_ports(8080, PORT)).with_flags(ACK);
            let _ = lab.pod_sends(&stale)?;
            let half = lab.half(Flow::of(&ask))?;
            ensure!(half.to.dst == net.far(), "{half:?}");
            lab.forget()?;
        }
        Ok(())
    })
}

/// Both entries of the connection before are gone then: what its backend still sends does not arrive in the service's name.
#[test]
fn nothing_stays_of_the_connection_before() -> Result<()> {
    labs(|lab, net| {
        let (ask, answer) = begin(lab, net, Proto::Tcp)?;
        for f in [ask.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
            lab.pod_sends(&f)?;
        }
        lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), 8080)])?;
        lab.pod_sends(&ask)?.onto_wire(&at_backend(net, &ask, net.far()))?;
        ensure!(lab.half(Flow::of(&answer)).is_err() && lab.connections(net)?.len() == 2, "an entry stayed");
        let late = answer.with_flags(ACK);
        lab.pod_sends(&late)?.to_the_pod(&late.hop())
    })
}

/// The same, to the same backend: the answering half is taken over, not avoided.
#[test]
fn a_port_pair_is_used_again_with_the_same_backend() -> Result<()> {
    labs(|lab, net| {
        let (ask, answer) = begin(lab, net, Proto::Tcp)?;
        for f in [ask.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
            lab.pod_sends(&f)?;
        }
        lab.pod_sends(&ask)?.to_the_pod(&there(net, &ask))?;
        let (a, b) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
        ensure!(
            (a.state, b.state) == (0, 0) && a.flags == flags::NAT && b.flags == flags::NAT | flags::REPLY,
            "{a:?} {b:?}"
        );
        lab.pod_sends(&answer.with_flags(SYN | ACK))?.to_the_pod(&back(net, &answer.with_flags(SYN | ACK)))
    })
}

/// A table that is full of live connections: new ones get in (the LRU makes room), old ones that speak go on.
#[test]
fn a_full_table() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let flow = |i: u32| from_a(net, Proto::Udp, (net.vip(1), 80)).map(|f| f.set_ports(1024 + i as u16, 80));
        let arrives = |f: &Frame| {
            f.hop().map(|f2| {
                f2.dst = net.b();
                let (sport, _) = f.ports();
                f2.set_ports(sport, 8080);
            })
        };
        for i in 0..4000 {
            let f = flow(i);
            lab.pod_sends(&f)?.to_the_pod(&arrives(&f)).with_context(|| format!("flow {i}"))?;
        }
        ensure!(lab.connections(net)?.len() <= 1024, "{}", lab.connections(net)?.len());
        let last = flow(3999);
        lab.pod_sends(&last)?.to_the_pod(&arrives(&last))
    })
}

/// Where a flow leads is looked up once per second: another pod with the address is none of this flow's, and an address that no
/// pod has is the stack's to speak for.
#[test]
fn a_flow_loses_its_pod() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            let (ask, answer) = begin(lab, net, proto)?;
            let (key, back_key) = (Flow::of(&ask), Flow::of(&answer));
            ensure!((lab.half(key)?.out, lab.half(back_key)?.out) == (POD_B, POD_A));
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(net, &later(&ask)))?;
            lab.put_endpoint(net.b(), UPLINK, MAC_B)?;
            lab.pod_sends(&later(&ask))?;
            ensure!(lab.half(key)?.out == POD_B, "looked up for each packet");
            lab.age(key, 1)?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(net, &later(&ask)))?;
            let half = lab.half(key)?;
            ensure!(half.out == UPLINK && half.packets == 1, "{proto:?}: not opened again: {half:?}");
            lab.drop_endpoint(net.b())?;
            lab.age(key, 1)?;
            // No hop on the way to the stack, which will say that there is no such host.
            let as_sent = there(net, &later(&ask)).map(|f| f.ttl += 1);
            lab.pod_sends(&later(&ask))?.to_stack(&as_sent)?;
            ensure!(lab.half(key)?.out == NOT_LOCAL);
            lab.put_endpoint(net.b(), POD_B, MAC_B)?;
            lab.forget()?;
        }
        Ok(())
    })
}

/// A new flow is reported once, as its first packet was sent, where the configuration asks for it.
#[test]
fn new_flows_are_reported() -> Result<()> {
    labs(|lab, net| {
        lab.configure(|c| c.flags |= config::flags::FLOW_EVENTS)?;
        each(&SERVED, |proto| {
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let ask = from_a(net, proto, (net.vip(1), 80));
            let incoming = from_outside(proto, (net.far(), PORT), (net.b(), 81));
            let routed = from_outside(proto, (net.routed(), PORT), (net.b(), 82));
            let probe = from_host(net, proto, (net.b(), 83));
            let host = from_host(net, proto, (net.vip(1), 80));
            for (hook, ifindex, f) in [
                (hook::FROM_POD, POD_A, &ask),
                (hook::OVERLAY_IN, OVERLAY, &incoming),
                (hook::UPLINK_IN, UPLINK, &routed),
                (hook::TO_POD, POD_B, &probe),
                (hook::UPLINK_OUT, UPLINK, &host),
            ] {
                let bytes = f.bytes();
                let tunnel = (hook == hook::OVERLAY_IN).then_some(net.node2());
                let input = Input { frame: &bytes, ifindex, tunnel, vni: VNI, ..Input::default() };
                let shot = lab.raw(hook, &input)?;
                let [e] = shot.events[..] else { bail!("{:?} at {hook}", shot.events) };
                let reported =
                    Flow { src: e.src.into(), sport: e.sport, dst: e.dst.into(), dport: e.dport, proto: e.proto };
                ensure!(reported == Flow::of(f), "{reported:?} at {hook}");
                ensure!((e.reason, e.hook, e.ifindex, e.len) == (0, hook, ifindex, bytes.len() as u32), "{e:?}");
                ensure!(lab.half(reported).is_ok(), "reported before it is tracked");
                ensure!(lab.raw(hook, &input)?.events.is_empty(), "reported again at {hook}");
            }
            Ok(())
        })
    })
}

/// A host with `route_localnet` may ask from a loopback address, and any from a link-local one. No flow is opened: answers to known
/// flows are not judged by their destination, and a pod's own packets to such addresses are dropped.
#[test]
fn the_host_from_addresses_that_pods_cannot_ask() -> Result<()> {
    labs(|lab, net| {
        let sources: &[IpAddr] = match net {
            Net::V4 => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
            Net::V6 => &[IpAddr::V6(Ipv6Addr::LOCALHOST), net.ip([0; 4], "fe80::1")],
        };
        for src in sources {
            for proto in ALL {
                let f = from_host(net, proto, (net.a(), 8080)).map(|f| f.src = *src);
                lab.to_pod(POD_A, &f)?.to_stack(&f)?;
                ensure!(lab.halves()? == 0, "{proto:?} from {src} is tracked");
            }
        }
        Ok(())
    })
}
