//! What a forger who does not see the numbers does to a connection, and what ordinary TCP does that looks alike.

use super::{Connection, DAY, ELSEWHERE, connections};
use crate::flows::{Proto, from_a};
use crate::frame::{ACK, FIN, RST, SYN};
use crate::harness::{Flow, Lab, Net, UPLINK, labs};
use crate::states::{ANSWERER, OPENER, segment, silence};
use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::state;

fn reset_bits(lab: &Lab, c: &Connection) -> Result<bool> {
    Ok(lab.connections(c.net)?.values().any(|e| e.state & (state::RST_ORIG | state::RST_REPLY) != 0))
}

/// A bare SYN of the answerer, forged before the true SYN|ACK.
#[test]
fn a_bare_syn_forged_before_the_answer() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            for flags in [SYN, SYN | FIN] {
                lab.forget()?;
                let place = || format!("{off:#x} off, flags {flags:#x}");
                c.asks(lab, SYN, 0, 0, b"")?;
                c.answers(lab, flags, off, 0, b"")?;
                c.answers(lab, SYN | ACK, 0, 1, b"")?;
                c.asks(lab, ACK, 1, 1, b"")?;
                c.lives(lab, DAY).with_context(place)?;
                c.answers(lab, FIN | ACK, 1 + off, 1, b"")?;
                c.lives(lab, DAY).with_context(|| format!("{}: a FIN with the forged number counts", place()))?;
                c.answers(lab, FIN | ACK, 1, 1, b"")?;
                c.lives(lab, 120).with_context(|| format!("{}: the true FIN does not count", place()))?;
            }
        }
        Ok(())
    })
}

/// After it, a forged RST: the true far end goes on, and so does the connection.
#[test]
fn a_reset_after_a_bare_syn() -> Result<()> {
    connections(|lab, c| {
        lab.forget()?;
        let off = 1 << 21;
        c.asks(lab, SYN, 0, 0, b"")?;
        c.answers(lab, SYN, off, 0, b"")?;
        c.answers(lab, SYN | ACK, 0, 1, b"")?;
        c.asks(lab, ACK, 1, 1, b"")?;
        c.answers(lab, RST, 1 + off, 1, b"")?;
        c.answers(lab, ACK, 1, 1, b"true data")?;
        c.asks(lab, ACK, 1, 10, b"")?;
        c.lives(lab, DAY).context("a forged reset counts, and true data of its side does not take it back")
    })
}

/// A RST in SYN_SENT without ACK and number 0, or any reply and then a RST with number 0xffffffff.
#[test]
fn resets_in_syn_sent() -> Result<()> {
    connections(|lab, c| {
        for (before, number) in [(None, 0_u32), (Some(ACK), u32::MAX)] {
            lab.forget()?;
            c.asks(lab, SYN, 0, 0, b"")?;
            if let Some(flags) = before {
                c.answers(lab, flags, 1 << 30, 1 << 30, b"")?;
            }
            c.answers(lab, RST, number.wrapping_sub(ANSWERER), 1, b"")?;
            ensure!(!reset_bits(lab, c)?, "a reset with number {number:#x} counts");
        }
        Ok(())
    })
}

/// The same and a SYN: the true answer still finds the connection.
#[test]
fn reset_and_syn_in_syn_sent() -> Result<()> {
    connections(|lab, c| {
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"")?;
        c.answers(lab, RST, 0_u32.wrapping_sub(ANSWERER), 1, b"")?;
        let change = |f| segment(f, SYN, 77, 0, b"");
        lab.overlay_in(c.net.node2(), &change(&c.answer))?;
        c.answers(lab, SYN | ACK, 0, 1, b"").context("the true answer")
    })
}

/// A SYN of the answerer's direction on a translated connection that is closing.
#[test]
fn a_forged_syn_while_closing() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        c.asks(lab, FIN | ACK, 1, 1, b"")?;
        c.answers(lab, FIN | ACK, 1, 1, b"")?;
        let change = |f| segment(f, SYN, 77, 0, b"");
        lab.overlay_in(c.net.node2(), &change(&c.answer))?;
        c.answers(lab, FIN | ACK, 1, 2, b"").context("the true FIN once more")
    })
}

/// A part of one scan over the circle of numbers by ACKs, 2^20 apart: a whole round is 4096, from anywhere.
fn scan(lab: &Lab, c: &Connection) -> Result<()> {
    for k in 0xf00..0xf00 + 0x700_u32 {
        let f = segment(&c.answer, ACK, k << 20, OPENER + 1, b"");
        lab.overlay_in(c.net.node2(), &f)?;
    }
    Ok(())
}

#[test]
fn a_scan_drags_the_numbers_away() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        scan(lab, c)?;
        // The connection is busy: both sides go on, seconds pass.
        for i in 0..3 {
            c.answers(lab, ACK, 1 + i, 1 + i, b"x")?;
            c.asks(lab, ACK, 1 + i, 2 + i, b"y")?;
            silence(lab, c.net, 2)?;
        }
        c.answers(lab, FIN | ACK, 4, 4, b"")?;
        c.lives(lab, 120).context("the true FIN does not count after a scan")
    })
}

#[test]
fn a_scan_then_a_reset() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        scan(lab, c)?;
        for number in [0x2000_0000_u32, 0x5000_0000] {
            lab.overlay_in(c.net.node2(), &segment(&c.answer, RST, number, 0, b""))?;
        }
        for i in 0..3 {
            c.answers(lab, ACK, 1 + i, 1 + i, b"x")?;
            c.asks(lab, ACK, 1 + i, 2 + i, b"y")?;
            silence(lab, c.net, 2)?;
        }
        c.lives(lab, DAY).context("one of four forged resets counts, for good")
    })
}

#[test]
fn a_scan_a_reset_and_a_syn_end_a_busy_connection() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        scan(lab, c)?;
        for number in [0x2000_0000_u32, 0x5000_0000] {
            lab.overlay_in(c.net.node2(), &segment(&c.answer, RST, number, 0, b""))?;
        }
        c.answers(lab, ACK, 1, 1, b"x")?;
        lab.overlay_in(c.net.node2(), &segment(&c.answer, SYN, 77, 0, b""))?;
        c.answers(lab, ACK, 2, 1, b"x").context("true data")
    })
}

/// One forged segment in the window with an acknowledgement of what was never sent.
#[test]
fn a_forged_acknowledgement() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        c.answers(lab, ACK, 1 + 0x8_0000, 1 + (1 << 30), b"")?;
        silence(lab, c.net, 2)?;
        for i in 0..3 {
            c.answers(lab, ACK, 1 + i, 1 + i, b"x")?;
            c.asks(lab, ACK, 1 + i, 2 + i, b"y")?;
            silence(lab, c.net, 2)?;
        }
        c.asks(lab, FIN | ACK, 4, 4, b"")?;
        c.lives(lab, 120).context("the pod's FIN does not count")
    })
}

/// What the pod acknowledges has not all come by here: that opens no window for numbers elsewhere.
#[test]
fn a_fin_forged_while_segments_take_another_way() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            lab.forget()?;
            c.establish(lab)?;
            c.asks(lab, ACK, 1, 1 + (3 << 20), b"")?;
            c.answers(lab, FIN | ACK, 1_u32.wrapping_add(off), 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("a FIN {off:#x} off"))?;
        }
        Ok(())
    })
}

/// A port pair used again: the answer is forged before the true one comes.
#[test]
fn a_forged_answer_to_a_second_syn() -> Result<()> {
    const AGAIN: u32 = 0x4000_0000;
    const ANSWER: u32 = 0x7000_0000;
    connections(|lab, c| {
        for off in ELSEWHERE {
            c.establish(lab)?;
            c.asks(lab, SYN, AGAIN, 0, b"")?;
            c.answers(lab, SYN | ACK, ANSWER.wrapping_add(off), 0x1234_5678, b"")?;
            c.answers(lab, SYN | ACK, ANSWER, AGAIN + 1, b"")?;
            c.asks(lab, ACK, AGAIN + 1, ANSWER + 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("{off:#x} off"))?;
        }
        Ok(())
    })
}

/// Mid-stream pick-up: a keep-alive and its answer.
#[test]
fn a_keepalive_picks_up() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        lab.forget()?;
        c.asks(lab, ACK, 0, 1, b"")?;
        c.answers(lab, ACK, 1, 1, b"")?;
        c.lives(lab, DAY)
    })
}

/// The reply entry was evicted and restored by the opener: what counts as the answerer's first number?
#[test]
fn the_first_segment_after_an_eviction() -> Result<()> {
    connections(|lab, c| {
        if lab_entries(lab, c)? == 1 {
            return Ok(());
        }
        for off in ELSEWHERE {
            c.establish(lab)?;
            lab.evict(Flow::of(&c.answer))?;
            silence(lab, c.net, 2)?;
            c.asks(lab, ACK, 1, 1, b"")?;
            ensure!(lab.connections(c.net)?.len() == 2, "not restored");
            // The opener has acknowledged what came before: a true acknowledgement makes no number a first one.
            for ack in [off, 1] {
                c.answers(lab, FIN | ACK, 1 + off, ack, b"")?;
                c.lives(lab, DAY).with_context(|| format!("a FIN {off:#x} off, acknowledging {ack:#x}, counts"))?;
            }
        }
        Ok(())
    })
}

/// The opener's entry was evicted: any reset counts.
#[test]
fn a_reset_after_an_eviction() -> Result<()> {
    connections(|lab, c| {
        if lab_entries(lab, c)? == 1 {
            return Ok(());
        }
        for off in ELSEWHERE {
            c.establish(lab)?;
            lab.evict(Flow::of(&c.ask))?;
            c.answers(lab, RST, 1 + off, 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("a RST {off:#x} off counts"))?;
        }
        Ok(())
    })
}

fn lab_entries(lab: &Lab, c: &Connection) -> Result<usize> {
    c.establish(lab)?;
    Ok(lab.connections(c.net)?.len())
}

/// The opener's end is forged: a SYN with a number that the forger chose, and a reset of the same end that acknowledges it. Only
/// the other end can refuse a SYN.
#[test]
fn a_forged_syn_that_its_own_end_refuses() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            c.establish(lab)?;
            c.asks(lab, SYN, off, 0, b"")?;
            let number = OPENER.wrapping_add(off).wrapping_add(1).wrapping_sub(ANSWERER);
            c.asks(lab, RST | ACK, off, number, b"")?;
            c.lives(lab, DAY).with_context(|| format!("{off:#x} off"))?;
        }
        Ok(())
    })
}

/// A port pair used again, and refused.
#[test]
fn a_second_syn_refused() -> Result<()> {
    const AGAIN: u32 = 0x4000_0000;
    connections(|lab, c| {
        c.establish(lab)?;
        c.asks(lab, SYN, AGAIN, 0, b"")?;
        c.answers(lab, RST | ACK, 0_u32.wrapping_sub(ANSWERER), AGAIN + 1, b"")?;
        c.lives(lab, 10)
    })
}

/// An ICMP error about a flow of the pod that had the address before.
#[test]
fn an_error_for_the_pod_before() -> Result<()> {
    labs(|lab, net| {
        lab.forget()?;
        let ask = from_a(net, Proto::Udp, (net.world(), 443));
        let shot = lab.pod_sends(&ask)?;
        let (port, _) = crate::forged::ports_of(net, &shot.frame)?;
        let left = ask.hop().map(|f| {
            f.src = net.node();
            f.set_ports(port, 443);
        });
        lab.drop_endpoint(net.a())?;
        lab.put_endpoint(net.a(), UPLINK, [2, 0, 0, 0, 0x0c, 1])?;
        let kind = if net == Net::V4 { (3, 3, 0) } else { (1, 4, 0) };
        let e = crate::errors::error(&left, net.world(), kind, 64);
        let shot = lab.uplink_in(&e)?;
        lab.put_endpoint(net.a(), crate::harness::POD_A, crate::harness::MAC_A)?;
        ensure!(shot.verdict != crate::harness::REDIRECT, "the new pod gets an error about the old one's flow");
        Ok(())
    })
}

/// Simultaneous open.
#[test]
fn simultaneous_open() -> Result<()> {
    connections(|lab, c| {
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"")?;
        c.answers(lab, SYN, 0, 0, b"")?;
        c.asks(lab, SYN | ACK, 0, 1, b"")?;
        c.answers(lab, SYN | ACK, 0, 1, b"")?;
        c.asks(lab, ACK, 1, 1, b"data")?;
        c.lives(lab, DAY)?;
        c.answers(lab, FIN | ACK, 1, 5, b"")?;
        c.lives(lab, 120)
    })
}

/// TFO: a SYN with data, refused, and the fallback.
#[test]
fn fast_open() -> Result<()> {
    connections(|lab, c| {
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"request")?;
        c.answers(lab, SYN | ACK, 0, 1, b"")?;
        c.asks(lab, ACK, 1, 1, b"request")?;
        c.lives(lab, DAY)?;
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"request")?;
        c.answers(lab, SYN | ACK, 0, 8, b"answer")?;
        c.answers(lab, FIN | ACK, 7, 8, b"")?;
        c.asks(lab, FIN | ACK, 8, 8, b"")?;
        c.lives(lab, 10)
    })
}

/// One round over the circle, in blocks of 32 segments that ascend, the blocks descending: the number is dragged by less than 2^25,
/// which may be in flight.
fn scan_in_blocks(lab: &Lab, c: &Connection) -> Result<()> {
    for block in (0..128_u32).rev() {
        for k in 0..32 {
            let number = ((block * 32 + k) << 20).wrapping_add(0x180_0000);
            lab.overlay_in(c.net.node2(), &segment(&c.answer, ACK, number, OPENER + 1, b""))?;
        }
    }
    Ok(())
}

/// The true sender is not shut out by it, and takes back what resets within the wider window did.
#[test]
fn a_scan_in_blocks() -> Result<()> {
    connections(|lab, c| {
        for resets in [0, 512_u32] {
            c.establish(lab)?;
            scan_in_blocks(lab, c)?;
            for k in 0..resets {
                lab.overlay_in(c.net.node2(), &segment(&c.answer, RST, k << 23, 0, b""))?;
            }
            for i in 0..3 {
                c.answers(lab, ACK, 1 + i, 1 + i, b"x")?;
                c.asks(lab, ACK, 1 + i, 2 + i, b"y")?;
                silence(lab, c.net, 2)?;
            }
            c.lives(lab, DAY).with_context(|| format!("{resets} resets"))?;
            c.answers(lab, FIN | ACK, 4, 4, b"")?;
            c.lives(lab, 120).with_context(|| format!("{resets} resets, closed"))?;
            lab.forget()?;
        }
        Ok(())
    })
}

/// Segments in flight, more than the window is wide, and then a reset in their midst: the receiver takes it.
#[test]
fn a_reset_amid_what_is_in_flight() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        for k in 0..3_u32 {
            c.asks(lab, ACK, 1 + (k << 20), 1, b"")?;
        }
        c.asks(lab, RST | ACK, 1 + (2 << 20), 1, b"")?;
        c.lives(lab, 10)
    })
}

/// A forged ACK before the true refusal.
#[test]
fn a_refusal_after_a_forged_ack() -> Result<()> {
    connections(|lab, c| {
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"")?;
        c.answers(lab, ACK, 1 << 30, 1 << 30, b"")?;
        c.answers(lab, RST | ACK, 0_u32.wrapping_sub(ANSWERER), 1, b"")?;
        c.lives(lab, 10)
    })
}

/// The opener's entry was evicted before the answer: number 0 is none.
#[test]
fn a_reset_with_number_0_after_an_eviction() -> Result<()> {
    connections(|lab, c| {
        if lab_entries(lab, c)? == 1 {
            return Ok(());
        }
        lab.forget()?;
        c.asks(lab, SYN, 0, 0, b"")?;
        lab.evict(Flow::of(&c.ask))?;
        c.answers(lab, RST, 0_u32.wrapping_sub(ANSWERER), 0, b"")?;
        ensure!(!reset_bits(lab, c)?, "counts");
        Ok(())
    })
}
