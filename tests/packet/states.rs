//! What a connection survives, and what it must not: late segments, forged resets, backends and pods that are gone, other flows
//! with the same ports. Judged by packets: where one goes, and whether a masqueraded port is free for another pod.

use crate::flows::{PORT, Proto, SERVED, TARGET, as_from_b, at_backend, at_client, from_a, from_b, from_host, later};
use crate::forged::ports_of;
use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::harness::{Lab, MAC_B, Net, REDIRECT, SHOT, SNAT, UPLINK, labs};
use crate::services::exchange;
use anyhow::{Context, Result, bail, ensure};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::peer;
use rustnet_common::service::SvcEntry;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::datapath::Input;

/// A segment with these flags, numbers and data.
pub fn segment(f: &Frame, new_flags: u8, new_seq: u32, new_ack: u32, data: &[u8]) -> Frame {
    f.map(|f| {
        if let L4::Tcp { flags, seq, ack, .. } = &mut f.l4 {
            (*flags, *seq, *ack) = (new_flags, new_seq, new_ack);
        }
        f.payload = data.to_vec();
    })
}

/// First number of the side that opens a TCP connection.
pub const OPENER: u32 = 1000;
/// First number of the side that answers.
pub const ANSWERER: u32 = 0xffff_fff0;

/// A segment of the side that opened; `seq` and `ack` count from each side's first number.
pub fn segment_of_opener(f: &Frame, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Frame {
    segment(f, flags, OPENER.wrapping_add(seq), ANSWERER.wrapping_add(ack), data)
}

/// A segment of the side that answers, counted in the same way.
pub fn segment_of_answerer(f: &Frame, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Frame {
    segment(f, flags, ANSWERER.wrapping_add(seq), OPENER.wrapping_add(ack), data)
}

/// Lets all connections be silent for some seconds.
pub fn silence(lab: &Lab, net: Net, seconds: u32) -> Result<()> {
    lab.connections(net)?.keys().try_for_each(|key| lab.age(*key, seconds).map(drop))
}

/// Addresses of a frame without tag.
fn addresses_of(frame: &[u8]) -> Result<(IpAddr, IpAddr)> {
    let address = |at: usize, len: usize| -> Option<IpAddr> {
        let bytes = frame.get(at..at + len)?;
        match len {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        }
    };
    let found = if frame[12] == 8 { address(26, 4).zip(address(30, 4)) } else { address(22, 16).zip(address(38, 16)) };
    found.with_context(|| format!("a frame of {} bytes", frame.len()))
}

/// A TCP connection of pod A to the world, with the only port that masquerade has: whether the port is free for pod B shows
/// whether the connection counts as alive.
struct World {
    /// As pod A sends.
    ask: Frame,
    /// As the world answers.
    answer: Frame,
    /// As the answer arrives in the pod.
    arrives: Frame,
}

impl World {
    fn new(lab: &Lab, net: Net) -> Result<Self> {
        lab.forget()?;
        lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_000))?;
        let ask = from_a(net, Proto::Tcp, (net.world(), 443)).map(|f| f.set_ports(30_000, 443));
        let answer = ask.hop().map(|f| f.src = net.node()).reply();
        let arrives = answer.hop().map(|f| f.dst = net.a());
        Ok(Self { ask, answer, arrives })
    }

    /// Pod A sends; `seq` and `ack` count from each side's first number.
    fn asks(&self, lab: &Lab, net: Net, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let f = segment_of_opener(&self.ask, flags, seq, ack, data);
        lab.pod_sends(&f)?.onto_wire(&f.hop().map(|f| f.src = net.node()))
    }

    /// The world answers, or whoever knows its ports. The segment is delivered: its receiver judges it, too.
    fn answers(&self, lab: &Lab, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let change = |f| segment_of_answerer(f, flags, seq, ack, data);
        lab.uplink_in(&change(&self.answer))?.to_the_pod(&change(&self.arrives))
    }

    fn establish(&self, lab: &Lab, net: Net) -> Result<()> {
        self.asks(lab, net, SYN, 0, 0, b"")?;
        self.answers(lab, SYN | ACK, 0, 1, b"")?;
        self.asks(lab, net, ACK, 1, 1, b"")
    }

    /// True if pod B gets the port.
    fn is_over(lab: &Lab, net: Net) -> Result<bool> {
        let shot = lab.pod_sends(&from_b(net, Proto::Tcp, (net.world(), 443)))?;
        match shot.verdict {
            REDIRECT => Ok(true),
            SHOT if shot.dropped(DropReason::NatNoMapping).is_ok() => Ok(false),
            verdict => bail!("verdict {verdict}, counted {:?}", shot.counted),
        }
    }
}

/// Asserts that a connection of [`World`] lives after some seconds of silence, or that it does not.
fn ends(lab: &Lab, net: Net, seconds: u32, over: bool) -> Result<()> {
    silence(lab, net, seconds)?;
    let is_over = World::is_over(lab, net)?;
    ensure!(is_over == over, "after {seconds} s of silence the port is {}", if is_over { "free" } else { "taken" });
    Ok(())
}

/// Opens a TCP connection of pod A to a service on pod B.
fn open_to_b(lab: &Lab, net: Net) -> Result<(u32, Frame, Frame)> {
    let id = lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), TARGET)])?[0];
    let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
    let answer = exchange(lab, net, &ask)?;
    let more = later(&ask);
    lab.pod_sends(&more)?.to_the_pod(&at_backend(net, &more, net.b()))?;
    Ok((id, ask, answer))
}

/// The port pair is used again, to another backend; then the first backend speaks once more.
#[test]
fn late_segments_of_the_connection_before() -> Result<()> {
    labs(|lab, net| {
        for (flags, pause) in [(RST | ACK, 0), (RST, 0), (FIN | ACK, 0), (ACK, 1), (RST | ACK, 1), (SYN | ACK, 1)] {
            for answered in [false, true] {
                lab.forget()?;
                let (_, ask, answer) = open_to_b(lab, net)?;
                for f in [ask.with_flags(FIN | ACK), answer.with_flags(FIN | ACK)] {
                    lab.pod_sends(&f)?;
                }
                lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), TARGET)])?;
                let to_far = |f: &Frame| at_backend(net, f, net.far());
                lab.pod_sends(&ask)?.onto_wire(&to_far(&ask))?;
                let from_far = to_far(&ask).reply();
                let arrives = at_client(net, &from_far, 1);
                if answered {
                    lab.overlay_in(net.node2(), &from_far)?.to_the_pod(&arrives)?;
                }
                silence(lab, net, pause)?;
                // What becomes of it, is the old connection's matter.
                lab.pod_sends(&answer.with_flags(flags))?;
                let place = || format!("flags {flags:#x} after {pause} s, answered: {answered}");
                let more = later(&ask);
                lab.pod_sends(&more)?.onto_wire(&to_far(&more)).with_context(place)?;
                lab.overlay_in(net.node2(), &from_far)?.to_the_pod(&arrives).with_context(place)?;
                // And the reset has not ended it: the next SYN is a repetition, to the same backend.
                lab.serve(net.vip(1), 80, 6, 0, &[(net.routed(), TARGET), (net.routed(), TARGET)])?;
                lab.pod_sends(&ask)?.onto_wire(&to_far(&ask)).with_context(place)?;
            }
        }
        Ok(())
    })
}

/// Two FINs at one time on two CPUs: neither may be lost, or the connection never closes and its port pair stays with the old
/// backend. Rounds of it, for one time is not always enough.
#[test]
fn fins_on_two_cpus() -> Result<()> {
    const FLOWS: u16 = 150;
    labs(|lab, net| {
        for round in 0..6 {
            lab.forget()?;
            lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), TARGET)])?;
            let asks: Vec<_> = (0..FLOWS)
                .map(|i| from_a(net, Proto::Tcp, (net.vip(1), 80)).map(|f| f.set_ports(PORT + i, 80)))
                .collect();
            let answer = |ask: &Frame| {
                let there = ask.hop().between((net.a(), ask.ports().0), (net.b(), TARGET));
                as_from_b(&there.reply())
            };
            for ask in &asks {
                lab.pod_sends(ask)?;
                lab.pod_sends(&answer(ask))?;
            }
            let by_a: Vec<_> = asks.iter().map(|f| f.with_flags(FIN | ACK).bytes()).collect();
            let by_b: Vec<_> = asks.iter().map(|f| answer(f).with_flags(FIN | ACK).bytes()).collect();
            let at = [AtomicUsize::new(0), AtomicUsize::new(0)];
            let side = |mine: usize, frames: &[Vec<u8>], ifindex: u32| -> Result<()> {
                for (i, frame) in frames.iter().enumerate() {
                    at[mine].store(i + 1, Ordering::SeqCst);
                    while at[1 - mine].load(Ordering::SeqCst) <= i {
                        std::thread::yield_now();
                    }
                    lab.datapath().run("from_pod", &Input { frame, ifindex, ..Input::default() })?;
                }
                Ok(())
            };
            std::thread::scope(|s| {
                let other = s.spawn(|| side(1, &by_b, crate::harness::POD_B));
                side(0, &by_a, crate::harness::POD_A)?;
                other.join().map_err(|_| anyhow::anyhow!("the other thread panicked"))?
            })?;
            lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), TARGET)])?;
            for ask in &asks {
                let port = ask.ports().0;
                lab.pod_sends(ask)?
                    .onto_wire(&ask.hop().between((net.a(), port), (net.far(), TARGET)))
                    .with_context(|| format!("port {port} in round {round} counts as open"))?;
            }
        }
        Ok(())
    })
}

/// A SYN on a connection that never ended, because its backend died: the service's other backend gets it.
#[test]
fn a_syn_whose_backend_is_gone() -> Result<()> {
    labs(|lab, net| {
        for before in [&[][..], &[FIN | ACK], &[ACK]] {
            for heard in [true, false] {
                lab.forget()?;
                let (id, ask) = if heard {
                    let (id, ask, _) = open_to_b(lab, net)?;
                    (id, ask)
                } else {
                    let id = lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), TARGET)])?[0];
                    let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
                    lab.pod_sends(&ask)?;
                    (id, ask)
                };
                for flags in before {
                    lab.pod_sends(&ask.with_flags(*flags))?;
                }
                lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), TARGET)])?;
                lab.withdraw(id)?;
                let place = || format!("after {before:?}, answered: {heard}");
                let there = |f: &Frame| at_backend(net, f, net.far());
                lab.pod_sends(&ask)?.onto_wire(&there(&ask)).with_context(place)?;
                let answer = there(&ask).reply();
                let arrives = at_client(net, &answer, 1);
                lab.overlay_in(net.node2(), &answer)?.to_the_pod(&arrives).with_context(place)?;
                lab.pod_sends(&later(&ask))?.onto_wire(&there(&later(&ask))).with_context(place)?;
            }
        }
        // And if there is none, it is refused.
        lab.forget()?;
        let (id, ask, _) = open_to_b(lab, net)?;
        lab.serve(net.vip(1), 80, 6, 0, &[])?;
        lab.withdraw(id)?;
        let shot = lab.pod_sends(&ask)?;
        ensure!(shot.counted.keys().eq([&(DropReason::NoBackend as u8, hook::FROM_POD)]), "{:?}", shot.counted);
        Ok(())
    })
}

/// While the backend serves, a repeated SYN is a repetition, and data of a connection whose backend is leaving goes on.
#[test]
fn a_syn_whose_backend_is_there() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 6, 0, &[(net.b(), TARGET)])?;
        let ask = from_a(net, Proto::Tcp, (net.vip(1), 80));
        let there = |f: &Frame| at_backend(net, f, net.b());
        lab.pod_sends(&ask)?.to_the_pod(&there(&ask))?;
        lab.pod_sends(&ask)?.to_the_pod(&there(&ask))?;
        lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), TARGET)])?;
        lab.pod_sends(&later(&ask))?.to_the_pod(&there(&later(&ask)))
    })
}

/// Another CPU may have refreshed the rival a tick after this one read its clock: that is no silence of 49 days.
#[test]
fn a_rival_seen_after_our_clock() -> Result<()> {
    labs(|lab, net| {
        for ahead in [1, 5, 1000, 30_000] {
            let w = World::new(lab, net)?;
            w.establish(lab, net)?;
            for key in lab.connections(net)?.keys() {
                lab.change_half(*key, |h| h.seen = h.seen.wrapping_add(600_000 + ahead))?;
            }
            ensure!(!World::is_over(lab, net)?, "seen {ahead} ticks ahead, the port counts as free");
            w.answers(lab, ACK, 1, 1, b"to pod A")?;
        }
        Ok(())
    })
}

/// A new pod with a gone one's address gets nothing of the old one's connections: neither the world's answers...
#[test]
fn answers_for_the_pod_before() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            lab.forget()?;
            let ask = from_b(net, proto, (net.world(), 443));
            let left = ask.hop().map(|f| f.src = net.node());
            lab.pod_sends(&ask)?.onto_wire(&left)?;
            let answer = left.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.b()))?;
            replace(lab, net.b())?;
            silence(lab, net, 1)?;
            let shot = lab.uplink_in(&later(&answer))?;
            ensure!(shot.verdict != REDIRECT, "{proto:?}: delivered to the new pod");
            put_back(lab, net.b())?;
        }
        Ok(())
    })
}

/// ... nor what a client sends to its service on the old one...
#[test]
fn a_client_of_the_pod_before() -> Result<()> {
    labs(|lab, net| {
        lab.forget()?;
        let (id, ask, _) = open_to_b(lab, net)?;
        replace(lab, net.b())?;
        lab.serve(net.vip(1), 80, 6, 0, &[(net.far(), TARGET)])?;
        lab.withdraw(id)?;
        silence(lab, net, 1)?;
        let shot = lab.pod_sends(&later(&ask))?;
        let (_, dst) = addresses_of(&shot.frame)?;
        ensure!(shot.verdict == SHOT || dst != net.b(), "delivered to the new pod");
        put_back(lab, net.b())
    })
}

/// ... nor a backend's answers in the name of a service that the new one never asked.
#[test]
fn a_service_that_the_pod_before_asked() -> Result<()> {
    labs(|lab, net| {
        lab.forget()?;
        let (_, _, answer) = open_to_b(lab, net)?;
        replace(lab, net.a())?;
        silence(lab, net, 1)?;
        let shot = lab.pod_sends(&answer)?;
        let (src, _) = addresses_of(&shot.frame)?;
        ensure!(shot.verdict != REDIRECT || src != net.vip(1), "delivered in the service's name");
        lab.put_endpoint(net.a(), crate::harness::POD_A, crate::harness::MAC_A)
    })
}

/// Another pod gets the address: on another interface, with another MAC.
fn replace(lab: &Lab, ip: IpAddr) -> Result<()> {
    lab.drop_endpoint(ip)?;
    lab.put_endpoint(ip, UPLINK, [2, 0, 0, 0, 0x0c, 1])
}

fn put_back(lab: &Lab, ip: IpAddr) -> Result<()> {
    lab.put_endpoint(ip, crate::harness::POD_B, MAC_B)
}

/// A reset whose number lies elsewhere ends nothing (RFC 5961, 3.2): whoever knows four numbers of 16 bits could end everything.
#[test]
fn resets_out_of_the_window() -> Result<()> {
    labs(|lab, net| {
        for off in [1 << 30, 1 << 31, 0xc000_0000, 0x0100_0000] {
            for flags in [RST, RST | ACK] {
                let w = World::new(lab, net)?;
                w.establish(lab, net)?;
                w.answers(lab, flags, 1 + off, 1, b"")?;
                ends(lab, net, 11, false).with_context(|| format!("a reset {off:#x} off, flags {flags:#x}"))?;
                // Of the other side as well.
                w.asks(lab, net, flags, 1 + off, 1, b"")?;
                ends(lab, net, 11, false).with_context(|| format!("the pod's reset {off:#x} off"))?;
            }
        }
        Ok(())
    })
}

/// A reset with the number that comes next ends the connection, from either side, also across the number's wrap.
#[test]
fn resets_in_the_window() -> Result<()> {
    labs(|lab, net| {
        for by_answer in [true, false] {
            for data in [&b""[..], b"sixteen bytes or so of data"] {
                let len = data.len() as u32;
                let w = World::new(lab, net)?;
                w.establish(lab, net)?;
                if by_answer {
                    w.answers(lab, ACK, 1, 1, data)?;
                    w.asks(lab, net, ACK, 1, 1 + len, b"")?;
                    w.answers(lab, RST, 1 + len, 1, b"")?;
                } else {
                    w.asks(lab, net, ACK, 1, 1, data)?;
                    w.answers(lab, ACK, 1, 1 + len, b"")?;
                    w.asks(lab, net, RST | ACK, 1 + len, 1, b"")?;
                }
                ends(lab, net, 11, true).with_context(|| format!("by the answerer: {by_answer}, {len} bytes"))?;
            }
        }
        Ok(())
    })
}

/// A refusal bears number 0 and acknowledges the SYN (RFC 9293, 3.10.7.1): it ends what has hardly begun.
#[test]
fn a_reset_that_refuses() -> Result<()> {
    labs(|lab, net| {
        let w = World::new(lab, net)?;
        w.asks(lab, net, SYN, 0, 0, b"")?;
        w.answers(lab, RST | ACK, 0_u32.wrapping_sub(ANSWERER), 1, b"")?;
        ends(lab, net, 11, true)?;
        // One that acknowledges something else refuses nothing.
        let w = World::new(lab, net)?;
        w.asks(lab, net, SYN, 0, 0, b"")?;
        w.answers(lab, RST | ACK, 0_u32.wrapping_sub(ANSWERER), 0x0100_0000, b"")?;
        ends(lab, net, 11, false)
    })
}

/// A receiver may ignore a reset (RFC 5961): when data flows on, the connection is as alive as before.
#[test]
fn data_after_a_reset() -> Result<()> {
    labs(|lab, net| {
        let w = World::new(lab, net)?;
        w.establish(lab, net)?;
        w.answers(lab, RST, 1, 1, b"")?;
        w.asks(lab, net, ACK, 1, 1, b"data")?;
        w.answers(lab, ACK, 1, 5, b"")?;
        w.asks(lab, net, ACK, 5, 1, b"more")?;
        ends(lab, net, 11, false)
    })
}

/// A handshake without its third segment: a server that is there and a client that is not. RFC 5382, REQ-5 wants four minutes,
/// not the hours of an established connection.
#[test]
fn half_open_connections() -> Result<()> {
    labs(|lab, net| {
        let half = |lab: &Lab| -> Result<World> {
            let w = World::new(lab, net)?;
            w.asks(lab, net, SYN, 0, 0, b"")?;
            w.answers(lab, SYN | ACK, 0, 1, b"")?;
            Ok(w)
        };
        half(lab)?;
        ends(lab, net, 50, false)?;
        half(lab)?;
        ends(lab, net, 301, true).context("SYN, SYN|ACK")?;
        // Repetitions change nothing.
        let w = half(lab)?;
        w.asks(lab, net, SYN, 0, 0, b"")?;
        w.answers(lab, SYN | ACK, 0, 1, b"")?;
        ends(lab, net, 301, true).context("SYN, SYN|ACK, SYN, SYN|ACK")?;
        // The third segment does.
        let w = half(lab)?;
        w.asks(lab, net, ACK, 1, 1, b"")?;
        ends(lab, net, 301, false).context("established")?;
        silence(lab, net, 7000)?;
        ensure!(!World::is_over(lab, net)?, "two hours are nothing for an established connection (RFC 5382, REQ-5)");
        Ok(())
    })
}

/// One side has said its last, and the other is silent: minutes, not hours.
#[test]
fn half_closed_connections() -> Result<()> {
    labs(|lab, net| {
        for by_answer in [false, true] {
            let close = || -> Result<()> {
                let w = World::new(lab, net)?;
                w.establish(lab, net)?;
                if by_answer { w.answers(lab, FIN | ACK, 1, 1, b"") } else { w.asks(lab, net, FIN | ACK, 1, 1, b"") }
            };
            close()?;
            ends(lab, net, 59, false)?;
            close()?;
            ends(lab, net, 301, true).with_context(|| format!("closed by the answerer: {by_answer}"))?;
        }
        // Both have: seconds.
        let w = World::new(lab, net)?;
        w.establish(lab, net)?;
        w.asks(lab, net, FIN | ACK, 1, 1, b"")?;
        w.answers(lab, FIN | ACK, 1, 2, b"")?;
        w.asks(lab, net, ACK, 2, 2, b"")?;
        ends(lab, net, 130, true)
    })
}

/// A datagram flow with answers keeps its port for two minutes (RFC 4787, REQ-5).
#[test]
fn answered_datagrams() -> Result<()> {
    labs(|lab, net| {
        for (seconds, over) in [(119, false), (301, true)] {
            lab.forget()?;
            lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_000))?;
            let ask = from_a(net, Proto::Udp, (net.world(), 443)).map(|f| f.set_ports(30_000, 443));
            let left = ask.hop().map(|f| f.src = net.node());
            lab.pod_sends(&ask)?.onto_wire(&left)?;
            let answer = left.reply();
            lab.uplink_in(&answer)?.to_the_pod(&answer.hop().map(|f| f.dst = net.a()))?;
            lab.pod_sends(&ask)?.onto_wire(&left)?;
            silence(lab, net, seconds)?;
            let shot = lab.pod_sends(&from_b(net, Proto::Udp, (net.world(), 443)))?;
            ensure!((shot.verdict == REDIRECT) == over, "after {seconds} s: verdict {}, not {over}", shot.verdict);
        }
        Ok(())
    })
}

/// What the host asks of a service leaves from a port that its other traffic cannot have, with the node's own address.
#[test]
fn the_hosts_flows_to_services() -> Result<()> {
    labs(|lab, net| {
        let second = net.ip([172, 18, 0, 99], "fd00:18::99");
        lab.put_peer(second, None, peer::flags::HOST, None)?;
        for proto in SERVED {
            for (n, to) in [(1, net.far()), (2, net.routed()), (3, net.world())] {
                lab.serve(net.vip(n), 443, proto.number(net), 0, &[(to, 6443)])?;
                for (src, client) in [(net.node(), 61_000), (net.node(), 12_345), (second, 61_001)] {
                    let ask = from_host(net, proto, (net.vip(n), 443)).map(|f| {
                        f.src = src;
                        f.set_ports(client, 443);
                    });
                    let place = || format!("{proto:?} from {src} port {client} to {to}");
                    let shot = lab.uplink_out(&ask)?;
                    let (port, _) = ports_of(net, &shot.frame)?;
                    let left = ask.between((net.node(), port), (to, 6443));
                    shot.onto_wire(&left).with_context(place)?;
                    ensure!(SNAT.contains(&port), "{} leaves from port {port}", place());
                    let more = later(&ask);
                    lab.uplink_out(&more)?
                        .onto_wire(&more.between((net.node(), port), (to, 6443)))
                        .with_context(place)?;
                    let answer = left.reply();
                    let want = answer.between((net.vip(n), 443), (src, client));
                    let shot = if n == 1 { lab.overlay_in(net.node2(), &answer) } else { lab.uplink_in(&answer) };
                    shot?.to_stack(&want).with_context(place)?;
                    // The host's direct connection from the same port is not the service's.
                    let direct = left.reply().map(|f| f.set_ports(6443, client));
                    if n != 1 {
                        lab.uplink_in(&direct)?.to_stack(&direct).with_context(place)?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// Two flows of the host to two services with one backend, from one port.
#[test]
fn the_hosts_flows_to_one_backend() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            let mut seen: Vec<(u16, u8)> = Vec::new();
            for n in [1, 2] {
                lab.serve(net.vip(n), 443, proto.number(net), 0, &[(net.world(), 6443)])?;
                let ask = from_host(net, proto, (net.vip(n), 443)).map(|f| f.set_ports(61_000, 443));
                let (port, _) = ports_of(net, &lab.uplink_out(&ask)?.frame)?;
                ensure!(SNAT.contains(&port) && seen.iter().all(|s| s.0 != port), "port {port} after {seen:?}");
                seen.push((port, n));
            }
            for (port, n) in seen {
                let left = from_host(net, proto, (net.world(), 6443)).map(|f| f.set_ports(port, 6443));
                let answer = left.reply();
                lab.uplink_in(&answer)?.to_stack(&answer.between((net.vip(n), 443), (net.node(), 61_000)))?;
            }
        }
        Ok(())
    })
}

/// A service's entry that leads to another service's backend, as an element that was reused a moment ago: the packet reaches neither.
#[test]
fn a_backend_of_another_service() -> Result<()> {
    labs(|lab, net| {
        for proto in SERVED {
            let number = proto.number(net);
            lab.serve(net.vip(1), 80, number, 0, &[(net.b(), TARGET)])?;
            let one = lab.service(net.vip(1), 80, number)?;
            lab.serve(net.vip(2), 80, number, 0, &[(net.far(), TARGET)])?;
            lab.put_service(net.vip(2), 80, number, &SvcEntry { first: one.first, id: one.id + 1000, ..one })?;
            lab.pod_sends(&from_a(net, proto, (net.vip(2), 80)))?
                .dropped(DropReason::BackendLookupFailed)
                .with_context(|| format!("{proto:?}"))?;
            let host = from_host(net, proto, (net.vip(2), 80));
            lab.uplink_out(&host)?.dropped(DropReason::BackendLookupFailed).context("asked by the host")?;
        }
        ensure!(lab.halves()? == 0);
        Ok(())
    })
}
