//! Services: the way to a backend and back, hairpin, refusals, collisions.

use crate::flows::{ALL, PORT, Proto, SERVED, from_a, from_b, from_host, from_outside, later};
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{Flow, Lab, MAC_A, MAC_B, MAC_HOST, Net, POD_B, SNAT, lab, labs};
use anyhow::{Context, Result, ensure};
use rustnet_common::backend::{Backend, id};
use rustnet_common::conntrack::flags;
use rustnet_common::drop::DropReason;
use rustnet_common::names::map;
use rustnet_common::peer;
use rustnet_common::service::{self, SvcEntry};
use std::net::IpAddr;

const VIP_PORT: u16 = 80;
const TARGET: u16 = 8080;

fn each(mut test: impl FnMut(Proto) -> Result<()>) -> Result<()> {
    SERVED.into_iter().try_for_each(|proto| test(proto).with_context(|| format!("{proto:?}")))
}

/// A service with one backend; gives the backend's id.
fn serve(lab: &Lab, net: Net, proto: Proto, vip: IpAddr, to: (IpAddr, u16)) -> Result<u32> {
    Ok(lab.serve(vip, VIP_PORT, proto.number(net), 0, &[to])?[0])
}

#[test]
fn a_backend_on_this_node() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let id = serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&more.hop().between((net.a(), PORT), (net.b(), TARGET)))?;

            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            ensure!((there.to, back.to) == (Flow::of(&arrives), Flow::of(&ask).reversed()), "{there:?} {back:?}");
            ensure!((there.flags, back.flags) == (flags::NAT, flags::NAT | flags::REPLY), "{there:?} {back:?}");
            ensure!((there.backend, back.backend) == (id, id), "{there:?} {back:?}");
            ensure!((there.packets, back.packets) == (2, 1), "{there:?} {back:?}");
            Ok(())
        })?;
        ensure!(lab.connections(net)?.len() == 2 * SERVED.len());
        Ok(())
    })
}

/// Addresses of one sum leave a checksum as it is, so that it does not tell whether a device will finish it.
#[test]
fn a_backend_whose_address_sums_up_to_the_services() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let to = net.ip([10, 95, 0, 2], "fd00:95::2");
            lab.put_peer(to, None, peer::flags::POD, None)?;
            serve(lab, net, proto, net.vip(1), (to, TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (to, TARGET));
            lab.pod_sends(&ask)?.onto_wire(&arrives)?;
            let answer = arrives.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))
        })
    })
}

/// 240.0.0.0/4 is no martian, neither as a VIP nor as a pod's source.
#[test]
fn class_e_addresses_are_served() -> Result<()> {
    lab(|lab| {
        let (net, vip, pod) = (Net::V4, IpAddr::from([240, 10, 0, 1]), IpAddr::from([255, 255, 255, 254]));
        lab.put_endpoint(pod, POD_B, MAC_B)?;
        each(|proto| {
            serve(lab, net, proto, vip, (pod, TARGET))?;
            let ask = from_a(net, proto, (vip, VIP_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (pod, TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((vip, VIP_PORT), (net.a(), PORT)))
        })
    })
}

#[test]
fn a_backend_elsewhere() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            for (n, to) in [(1, net.far()), (2, net.routed())] {
                serve(lab, net, proto, net.vip(n), (to, TARGET))?;
                let ask = from_a(net, proto, (net.vip(n), VIP_PORT));
                let arrives = ask.hop().between((net.a(), PORT), (to, TARGET));
                lab.pod_sends(&ask)?.onto_wire(&arrives)?;
                let answer = arrives.reply();
                let shot = if n == 1 { lab.overlay_in(net.node2(), &answer) } else { lab.uplink_in(&answer) };
                shot?.to_the_pod(&answer.hop().between((net.vip(n), VIP_PORT), (net.a(), PORT)))?;
            }
            Ok(())
        })
    })
}

/// An API server, say: masqueraded, for it knows nothing of pods.
#[test]
fn a_backend_in_the_world() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.world(), 6443))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let leaves = ask.hop().between((net.node(), PORT), (net.world(), 6443));
            lab.pod_sends(&ask)?.onto_wire(&leaves)?;
            let answer = leaves.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))?;
            let half = lab.half(Flow::of(&ask))?;
            ensure!(half.flags == flags::NAT | flags::MASQ, "{half:?}");
            Ok(())
        })
    })
}

/// The kubelet's own API, say. The answer leaves by the host's stack and is turned back at the pod's door.
#[test]
fn a_backend_that_is_this_nodes_own_address() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.node(), 10250))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.between((net.a(), PORT), (net.node(), 10250));
            lab.pod_sends(&ask)?.to_stack(&arrives)?;
            let answer = arrives.reply();
            let restored = answer.between((net.vip(1), VIP_PORT), (net.a(), PORT));
            lab.to_pod(crate::harness::POD_A, &answer)?.to_stack(&restored)
        })
    })
}

#[test]
fn the_host_asks_a_service() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            for (n, to) in [(1, net.b()), (2, net.far()), (3, net.routed()), (4, net.world())] {
                serve(lab, net, proto, net.vip(n), (to, TARGET))?;
                let ask = from_host(net, proto, (net.vip(n), VIP_PORT));
                // The host is the sender, not a router: its hop limit stays.
                let leaves = ask.between((net.node(), PORT), (to, TARGET));
                lab.uplink_out(&ask)?.onto_wire(&leaves).with_context(|| format!("to {to}"))?;
                ensure!(lab.half(Flow::of(&ask))?.flags & flags::FROM_HOST != 0, "not known as the host's");
                let answer = leaves.reply();
                let (as_asked, shot) = (
                    answer.between((net.vip(n), VIP_PORT), (net.node(), PORT)),
                    match n {
                        1 => lab.pod_sends(&answer.map(|f| f.smac = MAC_B)),
                        2 => lab.overlay_in(net.node2(), &answer),
                        _ => lab.uplink_in(&answer),
                    },
                );
                let as_asked = if n == 1 { as_asked.map(|f| f.smac = MAC_B) } else { as_asked };
                shot?.to_stack(&as_asked).with_context(|| format!("from {to}"))?;
            }
            // A backend that is the host itself: the stack would route it back to here for ever.
            serve(lab, net, proto, net.vip(5), (net.node(), TARGET))?;
            lab.uplink_out(&from_host(net, proto, (net.vip(5), VIP_PORT)))?.dropped(DropReason::HostHairpin)
        })
    })
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.a(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.hop().between((net.node(), PORT), (net.a(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_A, MAC_HOST, 64));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))?;
            let (there, back) = (lab.half(Flow::of(&ask))?, lab.half(Flow::of(&answer))?);
            ensure!(there.flags & back.flags & flags::HAIRPIN != 0, "{there:?} {back:?}");
            Ok(())
        })
    })
}

/// Two addresses with one backend, asked from one port: the backend must see two connections (RFC 9293, 3.4).
#[test]
fn two_services_with_one_backend_and_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            serve(lab, net, proto, net.vip(2), (net.b(), TARGET))?;
            let mut seen = Vec::new();
            for n in [1, 2] {
                let ask = from_a(net, proto, (net.vip(n), VIP_PORT));
                let shot = lab.pod_sends(&ask)?;
                let to = lab.half(Flow::of(&ask))?.to;
                let arrives = ask.hop().between((net.a(), to.sport), (net.b(), TARGET));
                shot.to_the_pod(&arrives)?;
                ensure!(!seen.contains(&to.sport), "both come from port {}", to.sport);
                ensure!(n == 1 || SNAT.contains(&to.sport), "port {} is not set aside", to.sport);
                seen.push(to.sport);
            }
            for (n, port) in [1, 2].into_iter().zip(seen) {
                let answer = from_b(net, proto, (net.a(), port)).map(|f| f.set_ports(TARGET, port));
                lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.vip(n), VIP_PORT), (net.a(), PORT)))?;
            }
            Ok(())
        })
    })
}

/// A connection to the backend itself has just ended: its server may hold that pair of ports in TIME_WAIT, so that the next
/// one, by the service, comes from another port.
#[test]
fn a_service_asked_after_its_backend_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp, net.vip(1), (net.b(), TARGET))?;
        let direct = from_a(net, Proto::Tcp, (net.b(), TARGET));
        lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
        let answer = direct.reply().map(|f| (f.smac, f.dmac) = (MAC_B, MAC_HOST));
        for end in [direct.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
            lab.pod_sends(&end)?.to_the_pod(&end.hop())?;
        }
        let ask = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        let shot = lab.pod_sends(&ask)?;
        let port = lab.half(Flow::of(&ask))?.to.sport;
        ensure!(port != PORT, "the backend sees the pair of ports again");
        shot.to_the_pod(&ask.hop().between((net.a(), port), (net.b(), TARGET)))
    })
}

/// The client asks the backend itself and its service, from one port.
#[test]
fn a_service_and_its_backend_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let direct = from_a(net, proto, (net.b(), TARGET));
            lab.pod_sends(&direct)?.to_the_pod(&direct.hop())?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let shot = lab.pod_sends(&ask)?;
            let port = lab.half(Flow::of(&ask))?.to.sport;
            ensure!(port != PORT, "the backend sees one connection");
            shot.to_the_pod(&ask.hop().between((net.a(), port), (net.b(), TARGET)))?;
            let answer = direct.reply().map(|f| (f.smac, f.dmac) = (MAC_B, MAC_HOST));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop())
        })
    })
}

/// Asks a service on pod B, and then pod B itself from the same port. Returns what arrives of the first, the second as it was sent,
/// and the port that the second leaves with.
fn ask_service_then_backend(lab: &Lab, net: Net, proto: Proto) -> Result<(Frame, Frame, u16)> {
    serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
    let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
    let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
    lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
    let direct = from_a(net, proto, (net.b(), TARGET));
    let shot = lab.pod_sends(&direct)?;
    let port = lab.half(Flow::of(&direct))?.to.sport;
    ensure!(port != PORT, "the backend sees one connection");
    shot.to_the_pod(&direct.hop().between((net.a(), port), (net.b(), TARGET)))?;
    Ok((arrives, direct, port))
}

/// And the other way round: the service first.
#[test]
fn a_backend_asked_directly_after_its_service_from_one_client_port() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let (_, direct, port) = ask_service_then_backend(lab, net, proto)?;
            let arrives = direct.hop().between((net.a(), port), (net.b(), TARGET));
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.b(), TARGET), (net.a(), PORT)))
        })
    })
}

/// Of the two entries that then stand under one key the first is evicted: the other does not take its packets, and goes on.
#[test]
fn the_first_of_two_entries_under_one_key_is_evicted() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let (arrives, direct, port) = ask_service_then_backend(lab, net, proto)?;
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            lab.evict(Flow::of(&answer))?;
            let shot = lab.pod_sends(&answer)?;
            let to = lab.half(Flow::of(&answer)).context("the answer has no entry of its own")?.to;
            shot.to_the_pod(&answer.hop().between((net.b(), to.sport), (net.a(), PORT)))?;
            let more = later(&direct);
            lab.pod_sends(&more)?.to_the_pod(&more.hop().between((net.a(), port), (net.b(), TARGET)))?;
            lab.forget()
        })
    })
}

/// A flow that is older than the service at its destination, and was answered, goes on as it was.
#[test]
fn an_answered_flow_older_than_its_service() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            let ask = from_a(net, proto, (net.routed(), VIP_PORT));
            lab.pod_sends(&ask)?.onto_wire(&ask.hop())?;
            let answer = ask.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop())?;
            serve(lab, net, proto, net.routed(), (net.b(), TARGET))?;
            lab.age(Flow::of(&ask), 1)?;
            let more = later(&ask);
            lab.pod_sends(&more)?.onto_wire(&more.hop())?;
            lab.forget()?;
            lab.drop_service(net.routed(), VIP_PORT, proto.number(net))
        })
    })
}

/// A reset that refuses `asked`, built from RFC 9293, 3.5.2 alone.
pub fn reset(asked: &Frame) -> Frame {
    let L4::Tcp { sport, dport, seq, ack, flags, .. } = asked.l4 else { panic!("not TCP") };
    let len = asked.payload.len() as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (seq, ack, flags) = if flags & ACK != 0 { (ack, 0, RST) } else { (0, seq.wrapping_add(len), RST | ACK) };
    asked.reply().map(|f| {
        f.l4 = L4::Tcp { sport: dport, dport: sport, seq, ack, flags, window: 0 };
        (f.ttl, f.id, f.flow, f.payload) = (64, 0, 0, Vec::new());
        (f.options, f.extensions) = (Vec::new(), Vec::new());
    })
}

/// An ICMP error about `asked`, from `src`. It quotes the IP header and 28 bytes behind it, in whole words, of which there
/// are 40 at most.
pub fn icmp_error(asked: &Frame, src: IpAddr, kind: u8, code: u8, rest: u32) -> Frame {
    let packet = asked.ip_bytes();
    let header = if asked.is_v6() {
        40 + asked.extensions.iter().map(|(_, b)| b.len()).sum::<usize>()
    } else {
        20 + asked.options.len()
    };
    let quoted = packet.len().min(header + 28).min(160) / 4 * 4;
    asked.reply().map(|f| {
        f.src = src;
        f.l4 = L4::Icmp { kind, code, rest };
        f.payload = packet[..quoted].to_vec();
        (f.ttl, f.id, f.flow, f.options, f.extensions) = (64, 0, 0, Vec::new(), Vec::new());
    })
}

/// Port unreachable, from the address that the packet was for.
pub fn port_unreachable(asked: &Frame) -> Frame {
    let (kind, code) = if asked.is_v6() { (1, 4) } else { (3, 3) };
    icmp_error(asked, asked.dst, kind, code, 0)
}

fn refusal(asked: &Frame) -> Frame {
    if matches!(asked.l4, L4::Tcp { .. }) { reset(asked) } else { port_unreachable(asked) }
}

#[test]
fn no_endpoints_or_no_such_port_is_refused() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[])?;
            for (port, reason) in [(VIP_PORT, DropReason::NoBackend), (81, DropReason::NoServicePort)] {
                let ask = from_a(net, proto, (net.vip(1), port));
                lab.pod_sends(&ask)?.answered(reason, &refusal(&ask))?;
                // The way back to a pod leads by its own door, to the host by its own stack.
                let ask = from_host(net, proto, (net.vip(1), port));
                lab.uplink_out(&ask)?.answered(reason, &refusal(&ask))?;
            }
            ensure!(lab.halves()? == 0, "a refused flow is tracked");
            Ok(())
        })
    })
}

/// Echo to a VIP: there is no service behind it.
#[test]
fn echo_to_a_virtual_address_is_refused() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Tcp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Echo, (net.vip(1), 0));
        lab.pod_sends(&ask)?.answered(DropReason::NoServicePort, &port_unreachable(&ask))
    })
}

#[test]
fn resets_answer_each_kind_of_segment() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 6, 0, &[])?;
        let base = from_a(net, Proto::Tcp, (net.vip(1), VIP_PORT));
        for (flags, seq, ack, payload) in [
            (SYN, 0xffff_ffff, 0, &b""[..]),
            (SYN, 7, 0, b"fast open"),
            (ACK, 5, 0x1234_5678, b""),
            (ACK, 5, 0xffff_ffff, b"data of an odd length"),
            (FIN | ACK, 5, 9, b""),
            (FIN, 5, 9, b"x"),
            (0, 5, 9, b"xyz"),
            (SYN | ACK, 5, 9, b""),
        ] {
            let ask = base.map(|f| {
                f.l4 = L4::Tcp { sport: PORT, dport: VIP_PORT, seq, ack, flags, window: 1 };
                f.payload = payload.to_vec();
            });
            lab.pod_sends(&ask)?
                .answered(DropReason::NoBackend, &reset(&ask))
                .with_context(|| format!("flags {flags:#x}, {} bytes", payload.len()))?;
        }
        // No reset answers a reset (RFC 9293, 3.5.2).
        lab.pod_sends(&base.with_flags(RST))?.dropped(DropReason::NoBackend)?;
        lab.pod_sends(&base.with_flags(RST | ACK))?.dropped(DropReason::NoBackend)
    })
}

/// Of every length around what is quoted.
#[test]
fn unreachable_quotes_as_much_as_there_is() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &[])?;
        for len in (0..48).chain([100, 1000, 1400]) {
            let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT)).map(|f| f.payload = vec![0xa5; len]);
            lab.pod_sends(&ask)?
                .answered(DropReason::NoBackend, &port_unreachable(&ask))
                .with_context(|| format!("{len} bytes"))?;
        }
        Ok(())
    })
}

/// As small frames come from a real device: padded to 60 bytes.
#[test]
fn refusals_of_padded_frames() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &[])?;
        lab.serve(net.vip(1), VIP_PORT, 6, 0, &[])?;
        for proto in [Proto::Tcp, Proto::Udp] {
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT)).map(|f| {
                f.payload.truncate(1);
                f.padding = 17;
            });
            lab.pod_sends(&ask)?.answered(DropReason::NoBackend, &refusal(&ask).map(|f| f.padding = 0))?;
        }
        Ok(())
    })
}

/// internalTrafficPolicy Local without an endpoint here (KEP-2086).
#[test]
fn a_local_service_without_local_endpoints_drops_silently() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), service::flags::DROP_EMPTY, &[])?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            lab.pod_sends(&ask)?.dropped(DropReason::NoLocalBackend)?;
            lab.uplink_out(&from_host(net, proto, (net.vip(1), VIP_PORT)))?.dropped(DropReason::NoLocalBackend)
        })
    })
}

/// A service empties: what is established goes on, what is new is refused.
#[test]
fn established_flows_outlive_their_backend() -> Result<()> {
    labs(|lab, net| {
        each(|proto| {
            serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            let ask = from_a(net, proto, (net.vip(1), VIP_PORT));
            let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
            lab.serve(net.vip(1), VIP_PORT, proto.number(net), 0, &[])?;
            let more = later(&ask);
            lab.pod_sends(&more)?.to_the_pod(&more.hop().between((net.a(), PORT), (net.b(), TARGET)))?;
            let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
            lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))?;
            let new = ask.map(|f| f.set_ports(PORT + 1, VIP_PORT));
            lab.pod_sends(&new)?.answered(DropReason::NoBackend, &refusal(&new))
        })
    })
}

/// The same client and port always meet the same backend, and many clients meet all.
#[test]
fn the_choice_depends_on_the_flow_alone() -> Result<()> {
    labs(|lab, net| {
        let backends = [net.a(), net.b(), net.far(), net.routed()].map(|ip| (ip, TARGET));
        lab.serve(net.vip(1), VIP_PORT, 17, 0, &backends)?;
        let mut met = std::collections::BTreeMap::<IpAddr, u32>::new();
        for port in 30_000..30_200 {
            let ask = from_b(net, Proto::Udp, (net.vip(1), VIP_PORT)).map(|f| f.set_ports(port, VIP_PORT));
            lab.pod_sends(&ask)?;
            let first = lab.half(Flow::of(&ask))?.to.dst;
            lab.forget()?;
            lab.pod_sends(&ask)?;
            ensure!(lab.half(Flow::of(&ask))?.to.dst == first, "port {port} went to another backend");
            lab.forget()?;
            *met.entry(first).or_default() += 1;
        }
        ensure!(met.len() == 4 && met.values().all(|n| *n > 25), "{met:?}");
        Ok(())
    })
}

#[test]
fn entries_that_contradict_each_other_are_counted() -> Result<()> {
    labs(|lab, net| {
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        // Ranges outside the array, and an empty place in it.
        for first in [5000, u32::MAX - 8, 900] {
            lab.put_service(
                net.vip(1),
                VIP_PORT,
                17,
                &SvcEntry { first, count: 3, id: 1, affinity: 0, flags: 0, pad: 0 },
            )?;
            lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// The entry or the range may be another one's by the time it is read.
#[test]
fn a_backend_of_another_id_or_service_gets_no_flow() -> Result<()> {
    labs(|lab, net| {
        let id = serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let slot = id::slot_of(id);
        let index = lab.service(net.vip(1), VIP_PORT, Proto::Udp.number(net))?.first;
        let table = lab.datapath().table::<u32, Backend>(map::BACKENDS)?;
        let good = table.get(&slot)?.context("the backend")?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        for other in [
            Backend::cleared(id),
            Backend { id: id::next(slot, id), ..good },
            Backend { service: good.service + 1, ..good },
        ] {
            table.put(&slot, &other)?;
            lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        }
        table.put(&slot, &good)?;
        lab.datapath().table(map::BACKEND_IDS)?.put(&index, &id::next(slot, id))?;
        lab.pod_sends(&ask)?.dropped(DropReason::BackendLookupFailed)?;
        ensure!(lab.halves()? == 0);
        lab.datapath().table(map::BACKEND_IDS)?.put(&index, &id)?;
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), TARGET)))
    })
}

#[test]
fn a_virtual_address_asked_from_outside_is_dropped() -> Result<()> {
    labs(|lab, net| {
        for proto in ALL {
            if proto != Proto::Echo {
                serve(lab, net, proto, net.vip(1), (net.b(), TARGET))?;
            }
            let ask = from_outside(proto, (net.world(), PORT), (net.vip(1), VIP_PORT));
            lab.uplink_in(&ask)?.dropped(DropReason::IsClusterIp)?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}

/// A pod that answers from a port of a service without having been asked.
#[test]
fn nothing_is_translated_back_without_a_connection() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let f = from_b(net, Proto::Udp, (net.a(), PORT)).map(|f| f.set_ports(TARGET, PORT));
        lab.pod_sends(&f)?.to_the_pod(&f.hop())?;
        // The host's own traffic to its pods is not a service's either.
        let f = from_host(net, Proto::Udp, (net.b(), TARGET));
        lab.to_pod(POD_B, &f)?.to_stack(&f)
    })
}

/// RFC 768: no checksum over IPv4 is no checksum afterwards; over IPv6 there always is one.
#[test]
fn udp_without_checksum_stays_without() -> Result<()> {
    labs(|lab, net| {
        if net == Net::V6 {
            return Ok(());
        }
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT))
            .map(|f| f.l4 = L4::Udp { sport: PORT, dport: VIP_PORT, checksum: false });
        let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
        lab.pod_sends(&ask)?.to_the_pod(&arrives)?;
        let answer = arrives.reply().map(|f| (f.smac, f.dmac, f.ttl) = (MAC_B, MAC_HOST, 64));
        lab.pod_sends(&answer)?.to_the_pod(&answer.hop().between((net.vip(1), VIP_PORT), (net.a(), PORT)))
    })
}

/// A sender whose device computes the CRC leaves 0, and so must we; the device computes it over what we made.
#[test]
fn sctp_without_crc_stays_without() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Sctp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Sctp, (net.vip(1), VIP_PORT))
            .map(|f| f.l4 = L4::Sctp { sport: PORT, dport: VIP_PORT, crc: false });
        lab.pod_sends(&ask)?.to_the_pod(&ask.hop().between((net.a(), PORT), (net.b(), TARGET)))
    })
}

/// The CRC covers every length alike.
#[test]
fn sctp_of_many_lengths() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Sctp, net.vip(1), (net.b(), TARGET))?;
        for len in (0..40).chain([255, 256, 257, 1000, 1400]) {
            let ask = from_a(net, Proto::Sctp, (net.vip(1), VIP_PORT)).map(|f| f.payload = vec![len as u8; len]);
            let arrives = ask.hop().between((net.a(), PORT), (net.b(), TARGET));
            lab.pod_sends(&ask)?.to_the_pod(&arrives).with_context(|| format!("{len} bytes"))?;
        }
        Ok(())
    })
}

/// A UDP checksum that becomes zero is sent as all ones, of every payload that there is.
#[test]
fn udp_checksums_never_become_none() -> Result<()> {
    labs(|lab, net| {
        serve(lab, net, Proto::Udp, net.vip(1), (net.b(), TARGET))?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), VIP_PORT));
        let arrives = |f: &Frame| f.hop().between((net.a(), PORT), (net.b(), TARGET));
        let checksum = |f: &Frame| {
            let bytes = f.bytes();
            let at = if net == Net::V4 { 40 } else { 60 };
            u16::from_be_bytes([bytes[at], bytes[at + 1]])
        };
        // The payload's first word is chosen so that the checksum behind the translation is all ones, then before it.
        for target in [&arrives as &dyn Fn(&Frame) -> Frame, &Frame::clone] {
            let plain = ask.map(|f| f.payload = vec![0, 0]);
            let word = checksum(&target(&plain));
            let full = plain.map(|f| f.payload = word.to_be_bytes().to_vec());
            ensure!(checksum(&target(&full)) == 0xffff, "the test's arithmetic");
            lab.pod_sends(&full)?.to_the_pod(&arrives(&full))?;
        }
        Ok(())
    })
}
