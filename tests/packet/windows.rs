//! Which segments count: sequence numbers of TCP connections. What a forger sends who knows addresses and ports, but not the
//! numbers, changes neither the lifetime of a connection nor the window in which its resets count.

mod abuse;
mod outside;

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::{lifetime, state};
use rustnet_common::tuple::proto;

use crate::flows::{PORT, Proto, TARGET, from_a};
use crate::frame::{ACK, FIN, Frame, RST, SYN};
use crate::harness::{Lab, Net, labs};
use crate::states::{ANSWERER, segment_of_answerer, segment_of_opener, silence};

/// Lifetime of an established connection, in seconds.
const DAY: u32 = 86_400;

/// A TCP connection from pod A to another node's pod, untranslated or through a service. The far end is where a forger speaks, too.
struct Connection {
    ask: Frame,
    there: Frame,
    answer: Frame,
    back: Frame,
    net: Net,
}

impl Connection {
    fn new(lab: &Lab, net: Net, is_translated: bool) -> Result<Self> {
        lab.forget()?;
        let to: (IpAddr, u16) = if is_translated { (net.vip(1), 80) } else { (net.far(), TARGET) };
        if is_translated {
            lab.serve(net.vip(1), 80, proto::TCP, 0, &[(net.far(), TARGET)])?;
        }
        let ask = from_a(net, Proto::Tcp, to);
        let there = ask.hop().between((net.a(), PORT), (net.far(), TARGET));
        let answer = there.reply();
        let back = answer.hop().between(to, (net.a(), PORT));
        Ok(Self { ask, there, answer, back, net })
    }

    /// Pod A sends; `seq` and `ack` count from each side's first number.
    fn asks(&self, lab: &Lab, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let change = |f| segment_of_opener(f, flags, seq, ack, data);
        lab.pod_sends(&change(&self.ask))?.onto_wire(&change(&self.there))
    }

    /// The far end sends, or who forges it. The segment is delivered, whatever its number: the receiver judges it, too.
    fn answers(&self, lab: &Lab, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let change = |f| segment_of_answerer(f, flags, seq, ack, data);
        lab.overlay_in(self.net.node2(), &change(&self.answer))?.to_the_pod(&change(&self.back))
    }

    fn establish(&self, lab: &Lab) -> Result<()> {
        self.asks(lab, SYN, 0, 0, b"")?;
        self.answers(lab, SYN | ACK, 0, 1, b"")?;
        self.asks(lab, ACK, 1, 1, b"")?;
        self.lives(lab, DAY)
    }

    /// Asserts the lifetime of each entry.
    fn lives(&self, lab: &Lab, seconds: u32) -> Result<()> {
        let connections = lab.connections(self.net)?;
        ensure!(!connections.is_empty(), "no entry");
        for (key, entry) in connections {
            let found = lifetime(proto::TCP, entry.state);
            ensure!(found == seconds, "{key:?} lives {found} s instead of {seconds}, state {:#b}", entry.state);
        }
        Ok(())
    }
}

fn connections(test: impl Fn(&Lab, &Connection) -> Result<()> + Send + Sync) -> Result<()> {
    labs(|lab, net| {
        for is_translated in [false, true] {
            let c = Connection::new(lab, net, is_translated)?;
            test(lab, &c).with_context(|| format!("translated: {is_translated}"))?;
        }
        Ok(())
    })
}

/// Numbers that lie elsewhere.
const ELSEWHERE: [u32; 5] = [1 << 21, 1 << 30, 1 << 31, 0xc000_0000, 0xffe0_0000];

/// A FIN whose number lies elsewhere closes nothing, nor does the acknowledgement of a FIN.
#[test]
fn forged_fins() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        for off in ELSEWHERE {
            c.answers(lab, FIN | ACK, 1 + off, 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("a FIN {off:#x} off"))?;
            c.asks(lab, FIN | ACK, 1 + off, 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("the pod's FIN {off:#x} off"))?;
        }
        c.asks(lab, FIN | ACK, 1, 1, b"")?;
        c.lives(lab, 120)?;
        for off in ELSEWHERE {
            c.answers(lab, ACK, 1 + off, 2, b"")?;
            c.lives(lab, 120).with_context(|| format!("an acknowledgement {off:#x} off"))?;
            c.answers(lab, FIN | ACK, 1 + off, 2, b"")?;
            c.lives(lab, 120).with_context(|| format!("the other FIN {off:#x} off"))?;
        }
        c.answers(lab, FIN | ACK, 1, 2, b"")?;
        c.lives(lab, 10)
    })
}

/// Data, a SYN or a SYN|ACK with another number does not move the window in which a reset counts.
#[test]
fn forged_numbers_before_a_reset() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            for flags in [ACK, SYN, SYN | ACK, FIN | ACK] {
                c.establish(lab)?;
                c.answers(lab, flags, 1 + off, 1, b"data")?;
                silence(lab, c.net, 2)?;
                c.answers(lab, flags, 1 + off, 1, b"data")?;
                c.answers(lab, RST, 1 + off, 1, b"")?;
                c.answers(lab, RST, 5 + off, 1, b"")?;
                c.lives(lab, DAY).with_context(|| format!("{off:#x} off, flags {flags:#x}"))?;
                c.answers(lab, RST, 1, 1, b"")?;
                c.lives(lab, 10).with_context(|| format!("a true reset after {off:#x} off, flags {flags:#x}"))?;
            }
        }
        Ok(())
    })
}

/// An acknowledgement that another one overtook does not open the window of resets again.
#[test]
fn acknowledgements_out_of_order() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        c.answers(lab, ACK, 1, 1, b"data")?;
        c.asks(lab, ACK, 1, 5, b"")?;
        c.asks(lab, ACK, 1, 1, b"")?;
        c.answers(lab, RST, 3, 1, b"")?;
        c.lives(lab, DAY).context("a reset within what is acknowledged")?;
        c.answers(lab, RST, 5, 1, b"")?;
        c.lives(lab, 10)
    })
}

/// A forged SYN of the opener, on whichever side of this node the opener is: what comes after it with its numbers does not count.
#[test]
fn a_forged_syn() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            c.establish(lab)?;
            c.asks(lab, SYN, off, 0, b"")?;
            c.asks(lab, FIN | ACK, 1 + off, 1, b"")?;
            c.asks(lab, RST, 1 + off, 1, b"")?;
            c.lives(lab, DAY).with_context(|| format!("{off:#x} off"))?;
            // The receiver's challenge, and what the opener says to it if the SYN was its own after all (RFC 5961, 4).
            c.answers(lab, ACK, 1, 1, b"")?;
            c.lives(lab, DAY)?;
            c.asks(lab, RST, 1, 0, b"")?;
            c.lives(lab, 10)?;
        }
        Ok(())
    })
}

/// Both ends have lost a connection, and use the port pair again: the new connection's numbers count, those before do not.
#[test]
fn numbers_of_another_connection() -> Result<()> {
    const AGAIN: u32 = 0x4000_0000;
    const ANSWER: u32 = 0x7000_0000;
    connections(|lab, c| {
        // A reset before the opener has acknowledged the answer.
        c.establish(lab)?;
        c.asks(lab, SYN, AGAIN, 0, b"")?;
        c.answers(lab, SYN | ACK, ANSWER, AGAIN + 1, b"")?;
        c.answers(lab, RST, ANSWER + 1, AGAIN + 1, b"")?;
        c.lives(lab, 10).context("reset at once")?;
        for by_reset in [false, true] {
            lab.forget()?;
            c.establish(lab)?;
            c.asks(lab, FIN | ACK, 1, 1, b"")?;
            c.asks(lab, SYN, AGAIN, 0, b"")?;
            c.answers(lab, SYN | ACK, ANSWER, AGAIN + 1, b"")?;
            c.lives(lab, 60).context("answered")?;
            c.asks(lab, ACK, AGAIN + 1, ANSWER + 1, b"")?;
            c.lives(lab, DAY).context("established")?;
            for (flags, seq) in [(FIN | ACK, 1), (RST, 1)] {
                c.answers(lab, flags, seq, 1, b"")?;
                c.asks(lab, flags, seq, 1, b"")?;
                c.lives(lab, DAY).context("numbers of the connection before")?;
            }
            if by_reset {
                c.answers(lab, RST, ANSWER + 1, AGAIN + 1, b"")?;
            } else {
                c.answers(lab, FIN | ACK, ANSWER + 1, AGAIN + 1, b"")?;
                c.lives(lab, 120)?;
                c.asks(lab, FIN | ACK, AGAIN + 1, ANSWER + 2, b"")?;
            }
            c.lives(lab, 10).with_context(|| format!("by a reset: {by_reset}"))?;
        }
        Ok(())
    })
}

/// A forger is faster than the answer: the true numbers count nevertheless.
#[test]
fn an_answer_forged_before_the_true_one() -> Result<()> {
    connections(|lab, c| {
        for off in ELSEWHERE {
            for flags in [SYN | ACK, ACK, FIN | ACK] {
                lab.forget()?;
                c.asks(lab, SYN, 0, 0, b"")?;
                c.answers(lab, flags, off, 1 + off, b"")?;
                c.answers(lab, SYN | ACK, 0, 1, b"")?;
                c.asks(lab, ACK, 1, 1, b"")?;
                c.lives(lab, DAY).with_context(|| format!("{off:#x} off, flags {flags:#x}"))?;
                c.answers(lab, FIN | ACK, 1, 1, b"")?;
                c.lives(lab, 120).with_context(|| format!("{off:#x} off, flags {flags:#x}, closed"))?;
            }
        }
        Ok(())
    })
}

/// A SYN that nobody answered, then one with another number: that of the second counts.
#[test]
fn a_second_syn_before_the_answer() -> Result<()> {
    connections(|lab, c| {
        for second in [0x0100_0000, 0xff00_0000] {
            lab.forget()?;
            c.asks(lab, SYN, 0, 0, b"")?;
            c.asks(lab, SYN, second, 0, b"")?;
            c.answers(lab, SYN | ACK, 0, second.wrapping_add(1), b"")?;
            c.asks(lab, ACK, second.wrapping_add(1), 1, b"")?;
            c.lives(lab, DAY)?;
            c.asks(lab, FIN | ACK, second.wrapping_add(1), 1, b"")?;
            c.lives(lab, 120).with_context(|| format!("{second:#x}"))?;
            c.answers(lab, FIN | ACK, 1, second.wrapping_add(2), b"")?;
            c.lives(lab, 10).with_context(|| format!("{second:#x}"))?;
        }
        Ok(())
    })
}

/// Segments that never came by this node, but arrived: the receiver's acknowledgement says where the sender is.
#[test]
fn segments_that_took_another_way() -> Result<()> {
    const SENT: u32 = 0x0200_0000;
    connections(|lab, c| {
        c.establish(lab)?;
        silence(lab, c.net, 2)?;
        c.asks(lab, ACK, 1, 1 + SENT, b"")?;
        c.answers(lab, FIN | ACK, 1 + SENT, 1, b"")?;
        c.lives(lab, 120)?;
        c.asks(lab, FIN | ACK, 1, 2 + SENT, b"")?;
        c.lives(lab, 10)
    })
}

/// A window is a piece of a circle: data past number 0, and a segment that ends right at 0.
#[test]
fn numbers_that_wrap() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        let data = [0; 15];
        c.answers(lab, ACK, 1, 1, &data)?;
        let last = 1 + data.len() as u32;
        ensure!(ANSWERER.wrapping_add(last) == 0);
        silence(lab, c.net, 2)?;
        c.answers(lab, FIN | ACK, last + (1 << 30), 1, b"")?;
        c.lives(lab, DAY)?;
        c.answers(lab, ACK, last, 1, &data)?;
        c.answers(lab, FIN | ACK, last + 15, 1, b"")?;
        c.lives(lab, 120)
    })
}

/// Both entries of a translated flow say the same.
#[test]
fn a_pending_syn_stands_in_both_entries() -> Result<()> {
    connections(|lab, c| {
        c.establish(lab)?;
        c.asks(lab, SYN, 1 << 30, 0, b"")?;
        for entry in lab.connections(c.net)?.values() {
            ensure!(entry.state & state::SYN_AGAIN != 0, "state {:#b}", entry.state);
        }
        Ok(())
    })
}
