//! What a reading of the programs by a stranger brought to light: connections that a forged segment ends, entries that disagree,
//! fragments that lose their way, and errors in the name of others.

use crate::errors::{error, translated};
use crate::flows::{PORT, Proto, as_from_b, at_backend, at_client, from_a, from_b, from_outside, later};
use crate::forged::ports_of;
use crate::frame::{ACK, Frame, L4, RST, SYN};
use crate::harness::{Flow, Lab, Net, POD_A, POD_B, REDIRECT, SHOT, labs};
use crate::services::exchange;
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::state;
use rustnet_common::drop::{DropReason, hook};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::datapath::Input;

/// A segment with these flags and numbers. Without ACK, the acknowledgement number is 0, as stacks send it.
fn segment(f: &Frame, new_flags: u8, new_seq: u32, new_ack: u32, data: &[u8]) -> Frame {
    f.map(|f| {
        if let L4::Tcp { flags, seq, ack, .. } = &mut f.l4 {
            (*flags, *seq) = (new_flags, new_seq);
            *ack = if new_flags & ACK == 0 { 0 } else { new_ack };
        }
        f.payload = data.to_vec();
    })
}

fn silence(lab: &Lab, net: Net, seconds: u32) -> Result<()> {
    lab.connections(net)?.keys().try_for_each(|key| lab.age(*key, seconds).map(drop))
}

/// A masqueraded connection of pod A to the world, with the first numbers of both sides.
struct Masqueraded {
    ask: Frame,
    answer: Frame,
    opener: u32,
    answerer: u32,
}

impl Masqueraded {
    /// After the handshake.
    fn new(lab: &Lab, net: Net, opener: u32, answerer: u32) -> Result<Self> {
        lab.forget()?;
        let ask = from_a(net, Proto::Tcp, (net.world(), 443));
        let answer = ask.hop().map(|f| f.src = net.node()).reply();
        let c = Self { ask, answer, opener, answerer };
        c.asks(lab, net, SYN, 0, 0, b"")?;
        c.answers(lab, net, SYN | ACK, 0, 1, b"")?;
        c.asks(lab, net, ACK, 1, 1, b"")?;
        Ok(c)
    }

    fn asks(&self, lab: &Lab, net: Net, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let f = segment(&self.ask, flags, self.opener.wrapping_add(seq), self.answerer.wrapping_add(ack), data);
        lab.pod_sends(&f)?.onto_wire(&f.hop().map(|f| f.src = net.node()))
    }

    fn answers(&self, lab: &Lab, net: Net, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let f = segment(&self.answer, flags, self.answerer.wrapping_add(seq), self.opener.wrapping_add(ack), data);
        lab.uplink_in(&f)?.to_the_pod(&f.hop().map(|f| f.dst = net.a()))
    }

    /// True if either entry counts as closing.
    fn is_closing(&self, lab: &Lab) -> Result<bool> {
        let (a, b) = (lab.half(Flow::of(&self.ask))?.state, lab.half(Flow::of(&self.answer))?.state);
        Ok(state::is_closing(a) || state::is_closing(b))
    }
}

/// Whatever number the sides begin with: a reset that lies elsewhere ends nothing, one that comes next ends all.
#[test]
fn resets_and_any_first_number() -> Result<()> {
    const FIRST: [u32; 6] = [0, 1, 0x7fff_fff0, 0x9000_0000, 0xc000_0000, 0xffff_fff0];
    labs(|lab, net| {
        for (opener, answerer) in FIRST.iter().flat_map(|a| FIRST.iter().map(move |b| (*a, *b))) {
            for by_answer in [true, false] {
                let place = || format!("numbers {opener:#x} and {answerer:#x}, by the answerer: {by_answer}");
                let c = Masqueraded::new(lab, net, opener, answerer)?;
                c.asks(lab, net, ACK, 1, 1, b"question")?;
                c.answers(lab, net, ACK, 1, 9, b"answer")?;
                c.asks(lab, net, ACK, 9, 7, b"")?;
                let (next, other) = if by_answer { (7, 9) } else { (9, 7) };
                let reset = |seq: u32| {
                    if by_answer {
                        c.answers(lab, net, RST, seq, other, b"")
                    } else {
                        c.asks(lab, net, RST, seq, other, b"")
                    }
                };
                for off in [0x0100_0000, 0x4000_0000, 0x8000_0000, 0xc000_0000, 0xff00_0000] {
                    reset(next + off)?;
                    ensure!(!c.is_closing(lab)?, "a reset {off:#x} off, {}", place());
                }
                reset(next)?;
                ensure!(c.is_closing(lab)?, "the reset that comes next, {}", place());
            }
        }
        Ok(())
    })
}

/// A reset that came before the answer, and was none: the answer's numbers are followed from the first one on.
#[test]
fn a_forged_reset_before_the_answer() -> Result<()> {
    labs(|lab, net| {
        lab.forget()?;
        let ask = from_a(net, Proto::Tcp, (net.world(), 443));
        let answer = ask.hop().map(|f| f.src = net.node()).reply();
        let c = Masqueraded { ask, answer, opener: 1000, answerer: 0x9000_0000 };
        c.asks(lab, net, SYN, 0, 0, b"")?;
        c.answers(lab, net, RST | ACK, 0x1234, 0x4321, b"")?;
        ensure!(!c.is_closing(lab)?, "it acknowledges nothing");
        c.answers(lab, net, SYN | ACK, 0, 1, b"")?;
        c.asks(lab, net, ACK, 1, 1, b"")?;
        for off in [0x0100_0000, 0x4000_0000, 0x8000_0000] {
            c.answers(lab, net, RST, 1 + off, 1, b"")?;
            ensure!(!c.is_closing(lab)?, "a reset {off:#x} off");
        }
        c.answers(lab, net, RST, 1, 1, b"")?;
        ensure!(c.is_closing(lab)?);
        Ok(())
    })
}

/// A receiver may ignore a reset (RFC 5961). Once its sender goes on, both entries know, whichever direction is brought up to
/// date next.
#[test]
fn data_after_a_reset_clears_both_entries() -> Result<()> {
    labs(|lab, net| {
        for by_answer in [true, false] {
            for pause in [0, 1] {
                let c = Masqueraded::new(lab, net, 1000, 2000)?;
                let speak = |is_answer: bool, flags: u8, data: &[u8]| {
                    if is_answer { c.answers(lab, net, flags, 1, 1, data) } else { c.asks(lab, net, flags, 1, 1, data) }
                };
                speak(by_answer, RST, b"")?;
                ensure!(c.is_closing(lab)?);
                speak(!by_answer, ACK, b"data")?;
                speak(by_answer, ACK, b"")?;
                silence(lab, net, pause)?;
                speak(!by_answer, ACK, b"data")?;
                let (a, b) = (lab.half(Flow::of(&c.ask))?.state, lab.half(Flow::of(&c.answer))?.state);
                ensure!(
                    !state::is_closing(a) && !state::is_closing(b),
                    "states {a:#x} and {b:#x}, reset by the answerer: {by_answer}, after {pause} s"
                );
            }
        }
        Ok(())
    })
}

/// Large datagrams from other nodes and their pods to this host.
#[test]
fn fragments_through_the_overlay_to_the_host() -> Result<()> {
    labs(|lab, net| {
        for (proto, src) in [(Proto::Udp, net.far()), (Proto::Echo, net.far()), (Proto::Udp, net.node2())] {
            let whole = from_outside(proto, (src, PORT), (net.node(), 53)).map(|f| f.payload = vec![7; 3000]);
            for f in whole.pieces(50, &[1200, 2400]) {
                lab.overlay_in(net.node2(), &f)?.to_stack(&f).with_context(|| format!("{proto:?} from {src}"))?;
            }
        }
        Ok(())
    })
}

/// Large datagrams to where the kernel knows no way: all of them are the stack's, which says so.
#[test]
fn fragments_without_a_route() -> Result<()> {
    labs(|lab, net| {
        let whole = from_a(net, Proto::Udp, (net.unreachable(), 53)).map(|f| f.payload = vec![7; 3000]);
        for f in whole.pieces(51, &[1200, 2400]) {
            lab.pod_sends(&f)?.to_stack(&f)?;
        }
        Ok(())
    })
}

/// A pod complains about packets to itself, and about no others: it is no router. Else its own address would leave unmasqueraded,
/// and it could end other pods' connections.
#[test]
fn errors_of_a_pod_about_the_flow_of_another() -> Result<()> {
    labs(|lab, net| {
        for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
            lab.forget()?;
            // The world answers pod B; pod A complains to the world about that answer...
            let ask = from_b(net, proto, (net.world(), 443));
            let left = ask.hop().map(|f| f.src = net.node());
            lab.pod_sends(&ask)?.onto_wire(&left)?;
            let answer = left.reply();
            let arrives = answer.hop().map(|f| f.dst = net.b());
            lab.uplink_in(&answer)?.to_the_pod(&arrives)?;
            let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
            let from = |f: &Frame, who: &Frame| f.map(|f| (f.src, f.smac, f.dmac) = (who.src, who.smac, who.dmac));
            let a = from_a(net, proto, (net.world(), 443));
            let forged = from(&error(&arrives, net.a(), kind, 1000), &a);
            lab.pod_sends(&forged)?
                .dropped(DropReason::IcmpUnrelated)
                .with_context(|| format!("{proto:?}, to the world"))?;
            // ... and to pod B about its question.
            let forged = from(&error(&left, net.a(), kind, 1000), &a);
            lab.pod_sends(&forged)?
                .dropped(DropReason::IcmpUnrelated)
                .with_context(|| format!("{proto:?}, to pod B"))?;
            // Pod B itself may.
            let own = from(&error(&arrives, net.b(), kind, 1000), &ask);
            let want = translated(&own, &arrives, &arrives.map(|f| f.dst = net.node()), net.node()).hop();
            lab.pod_sends(&own)?.onto_wire(&want).with_context(|| format!("{proto:?}, pod B's own"))?;
        }
        Ok(())
    })
}

/// TCP headers in pieces from outside, for a pod: where the host's stack reassembles (netfilter does), it would forward to the pod
/// what no hook of the uplink has verified.
#[test]
fn headers_in_pieces_from_outside() -> Result<()> {
    labs(|lab, net| {
        for src in [net.b(), net.vip(1), net.far(), net.routed()] {
            let whole = from_outside(Proto::Tcp, (src, PORT), (net.a(), 80)).map(|f| f.payload = vec![7; 40]);
            for f in whole.pieces(52, &[8, 16]) {
                let shot = lab.uplink_in(&f)?;
                ensure!(shot.verdict == SHOT, "from {src}: verdict {}", shot.verdict);
            }
        }
        // For the host itself, its stack judges.
        let whole = from_outside(Proto::Tcp, (net.routed(), PORT), (net.node(), 80)).map(|f| f.payload = vec![7; 40]);
        for f in whole.pieces(53, &[8, 16]) {
            lab.uplink_in(&f)?.to_stack(&f)?;
        }
        Ok(())
    })
}

/// The entry of the answers was evicted, and the far end spoke before the opener: its packet opened a flow of its own under the
/// key. The opener's next packet puts that right, with the ports that the connection has.
#[test]
fn an_evicted_entry_whose_key_was_taken() -> Result<()> {
    labs(|lab, net| {
        for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
            lab.forget()?;
            lab.serve(net.vip(1), 80, proto.number(net), 0, &[(net.b(), 8080)])?;
            let ask = from_a(net, proto, (net.vip(1), 80));
            let there = |f: &Frame| at_backend(net, f, net.b());
            let back = |f: &Frame| at_client(net, f, 1);
            let answer = exchange(lab, net, &ask)?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(&later(&ask)))?;
            lab.evict(Flow::of(&answer))?;
            let lost = later(&answer);
            lab.pod_sends(&lost)?.to_the_pod(&lost.hop()).context("nobody knows that it is an answer")?;
            silence(lab, net, 1)?;
            lab.pod_sends(&later(&ask))?.to_the_pod(&there(&later(&ask))).with_context(|| format!("{proto:?}"))?;
            lab.pod_sends(&lost)?.to_the_pod(&back(&lost)).with_context(|| format!("{proto:?}: the answer again"))?;
        }
        Ok(())
    })
}

/// The first two datagrams of a flow at one time on two CPUs, as resolvers send them: both go on, and from one port, so that the
/// answers to both arrive. The flows' ports are outside the masquerade range, a fifth of which is taken, so that some flows have
/// to search.
#[test]
fn two_cpus_open_one_flow() -> Result<()> {
    const FLOWS: u16 = 300;
    labs(|lab, net| {
        for (to, proto) in [(net.world(), Proto::Udp), (net.world(), Proto::Tcp), (net.routed(), Proto::Udp)] {
            for round in 0..2 {
                lab.forget()?;
                lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_999))?;
                for i in 0..200 {
                    lab.pod_sends(&from_b(net, proto, (to, 443)).map(|f| f.set_ports(30_000 + i * 5, 443)))?;
                }
                let asks: Vec<_> = (0..FLOWS)
                    .map(|i| from_a(net, proto, (to, 443)).map(|f| f.set_ports(1024 + i, 443)).bytes())
                    .collect();
                let (one, two) = on_two_cpus(lab, net, [(&asks, POD_A), (&asks, POD_A)])?;
                for (i, (a, b)) in one.iter().zip(&two).enumerate() {
                    let place = || format!("{proto:?} to {to}, round {round}, flow {i}");
                    ensure!(a.is_some() && b.is_some(), "{}: one was refused: {a:?} and {b:?}", place());
                    ensure!(a == b, "{}: from ports {a:?} and {b:?}", place());
                }
            }
        }
        Ok(())
    })
}

/// Two pods at one time on two CPUs, from one port: the world sees two flows.
#[test]
fn two_cpus_open_two_flows_from_one_port() -> Result<()> {
    labs(|lab, net| {
        for round in 0..2 {
            lab.forget()?;
            let asks = |from: fn(Net, Proto, (IpAddr, u16)) -> Frame| -> Vec<_> {
                let flow = |i| from(net, Proto::Udp, (net.world(), 443)).map(|f| f.set_ports(30_000 + i, 443));
                (0..FLOWS_APART).map(|i| flow(i).bytes()).collect()
            };
            let (one, two) = on_two_cpus(lab, net, [(&asks(from_a), POD_A), (&asks(from_b), POD_B)])?;
            for (i, (a, b)) in one.iter().zip(&two).enumerate() {
                ensure!(a.is_some() && b.is_some() && a != b, "round {round}, flow {i}: from ports {a:?} and {b:?}");
            }
        }
        Ok(())
    })
}

/// Two CPUs open one flow, and each has found another source port: the port of the slower one is free again.
#[test]
fn two_cpus_open_one_flow_and_keep_one_port() -> Result<()> {
    labs(|lab, net| {
        for round in 0..2 {
            lab.forget()?;
            let asks: Vec<_> = (0..FLOWS_APART)
                .map(|i| from_a(net, Proto::Udp, (net.world(), 443)).map(|f| f.set_ports(1024 + i, 443)).bytes())
                .collect();
            lab.configure(|c| (c.snat_min, c.snat_max) = (30_000, 30_000 + 2 * FLOWS_APART))?;
            on_two_cpus(lab, net, [(&asks, POD_A), (&asks, POD_A)])?;
            let connections = lab.connections(net)?;
            for (key, half) in &connections {
                let other = connections.get(&half.to.reversed());
                ensure!(other.is_some_and(|o| o.to == key.reversed()), "round {round}: {key:?} is left alone");
            }
        }
        Ok(())
    })
}

/// Few enough for the table, whatever the CPUs keep of its free places for themselves.
const FLOWS_APART: u16 = 100;

/// Two sequences of frames on two CPUs, pair by pair at one time; gives the source port that each leaves from.
fn on_two_cpus(lab: &Lab, net: Net, frames: [(&[Vec<u8>], u32); 2]) -> Result<(Ports, Ports)> {
    let at = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let side = |mine: usize| -> Result<Ports> {
        let (frames, ifindex) = frames[mine];
        let mut ports = Vec::new();
        for (i, frame) in frames.iter().enumerate() {
            at[mine].store(i + 1, Ordering::SeqCst);
            while at[1 - mine].load(Ordering::SeqCst) <= i {
                std::hint::spin_loop();
            }
            let input = Input { frame, ifindex, ..Input::default() };
            let out = lab.datapath().run("from_pod", &input)?.context("no sum was asked for")?;
            ports.push(if out.verdict == REDIRECT { Some(ports_of(net, &out.frame)?.0) } else { None });
        }
        Ok(ports)
    };
    std::thread::scope(|s| -> Result<_> {
        let other = s.spawn(|| side(1));
        let one = side(0)?;
        Ok((one, other.join().map_err(|_| anyhow::anyhow!("the other thread panicked"))??))
    })
}

/// Source ports of what was redirected.
type Ports = Vec<Option<u16>>;

/// A quotation that ends inside of the quoted header, by the length of the packet that bears it; the frame goes on. What stands
/// behind a packet is none of it, and its checksum does not cover that.
#[test]
fn quotations_that_go_on_behind_the_packet() -> Result<()> {
    labs(|lab, net| {
        lab.serve(net.vip(1), 80, 17, 0, &[(net.b(), 8080)])?;
        let ask = from_a(net, Proto::Udp, (net.vip(1), 80));
        let there = at_backend(net, &ask, net.b());
        lab.pod_sends(&ask)?.to_the_pod(&there)?;
        let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
        let header = if net == Net::V4 { 20 } else { 40 };
        let whole = as_from_b(&error(&there, net.b(), kind, header + 8));
        let bytes = whole.bytes();
        for missing in [1, 4, 8, 12, 24] {
            let short = whole.map(|f| f.payload.truncate(header + 8 - missing));
            let mut frame = short.bytes();
            frame.extend(&bytes[frame.len()..]);
            let input = Input { frame: &frame, ifindex: POD_B, ..Input::default() };
            lab.raw(hook::FROM_POD, &input)?
                .dropped(DropReason::IcmpUnrelated)
                .with_context(|| format!("{missing} bytes"))?;
        }
        let back = translated(&whole, &there, &ask.hop(), net.vip(1)).hop();
        lab.pod_sends(&whole)?.to_the_pod(&back)
    })
}
