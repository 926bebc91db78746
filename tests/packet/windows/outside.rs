//! The outside opens a connection to a pod, or a forger in its name does.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use rustnet_common::conntrack::{lifetime, state};
use rustnet_common::tuple::proto;

use super::DAY;
use crate::flows::{PORT, Proto, from_a, from_outside};
use crate::frame::{ACK, FIN, Frame, RST, SYN};
use crate::harness::{Lab, Net, labs};
use crate::states::{segment, silence};

const CLIENT: u32 = 1000;
const SERVER: u32 = 7000;
const CLIENT_PORT: u16 = 5555;

/// A connection of the world to pod A.
struct Inbound<'a> {
    lab: &'a Lab,
    net: Net,
    ask: Frame,
    answer: Frame,
}

impl<'a> Inbound<'a> {
    fn new(lab: &'a Lab, net: Net) -> Result<Self> {
        lab.forget()?;
        let ask = from_outside(Proto::Tcp, (net.world(), CLIENT_PORT), (net.a(), PORT));
        Ok(Self { lab, net, ask, answer: from_a(net, Proto::Tcp, (net.world(), CLIENT_PORT)) })
    }

    /// The world sends, or who forges it; numbers count from the first of each side.
    fn asks(&self, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let f = segment(&self.ask, flags, CLIENT.wrapping_add(seq), SERVER.wrapping_add(ack), data);
        self.lab.uplink_in(&f)?.to_the_pod(&f.hop())
    }

    /// The pod sends, with its own address.
    fn answers(&self, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Result<()> {
        let f = segment(&self.answer, flags, SERVER.wrapping_add(seq), CLIENT.wrapping_add(ack), data);
        self.lab.pod_sends(&f)?.onto_wire(&f.hop())
    }

    /// Both sides go on for some seconds.
    fn goes_on(&self) -> Result<()> {
        for i in 0..3 {
            self.asks(ACK, 1 + i, 1 + i, b"x")?;
            self.answers(ACK, 1 + i, 2 + i, b"y")?;
            silence(self.lab, self.net, 2)?;
        }
        Ok(())
    }

    fn states(&self) -> Result<Vec<u64>> {
        Ok(self.lab.connections(self.net)?.values().map(|entry| entry.state).collect())
    }

    fn lives(&self, seconds: u32) -> Result<()> {
        for state in self.states()? {
            let found = lifetime(proto::TCP, state);
            ensure!(found == seconds, "{found} s instead of {seconds}, state {state:#b}");
        }
        Ok(())
    }
}

/// A SYN forged after the true one, before the pod's answer: the answer shows which of the two the pod has taken.
#[test]
fn a_syn_forged_before_the_answer_of_a_pod() -> Result<()> {
    labs(|lab, net| {
        for off in super::ELSEWHERE {
            for flags in [SYN, SYN | FIN] {
                let c = Inbound::new(lab, net)?;
                c.asks(SYN, 0, 0, b"")?;
                c.asks(flags, off, 0, b"")?;
                c.answers(SYN | ACK, 0, 1, b"")?;
                c.asks(ACK, 1, 1, b"")?;
                c.asks(RST, 1 + off, 1, b"")?;
                c.goes_on()?;
                c.lives(DAY).with_context(|| format!("{off:#x} off, flags {flags:#x}"))?;
                c.asks(FIN | ACK, 4, 4, b"")?;
                c.lives(120).with_context(|| format!("{off:#x} off, flags {flags:#x}, closed"))?;
            }
        }
        Ok(())
    })
}

/// Before the answer there is nothing that a reset of the opener could acknowledge.
#[test]
fn a_reset_of_the_opener_with_acknowledgement_0() -> Result<()> {
    labs(|lab, net| {
        let c = Inbound::new(lab, net)?;
        c.asks(SYN, 0, 0, b"")?;
        c.asks(RST | ACK, 0x7777_7777, 0_u32.wrapping_sub(SERVER), b"")?;
        ensure!(c.states()?.iter().all(|state| state & state::RST_ORIG == 0), "{:?}", c.states()?);
        Ok(())
    })
}

/// A pod refuses a segment of no connection with the number that this acknowledges (RFC 9293, 3.10.7.1).
#[test]
fn a_pod_refuses_a_segment_of_no_connection() -> Result<()> {
    labs(|lab, net| {
        let c = Inbound::new(lab, net)?;
        c.asks(ACK, 0, 1, b"")?;
        c.answers(RST, 1, 0, b"")?;
        c.lives(10)
    })
}

/// One forged answer of a server that the pod has not asked yet: the pod's own connection is masqueraded nevertheless.
#[test]
fn an_answer_forged_before_the_pod_connects() -> Result<()> {
    labs(|lab, net| {
        for flags in [ACK, SYN | ACK] {
            for is_refused in [false, true] {
                let c = Inbound::new(lab, net)?;
                c.asks(flags, 0, 1, b"")?;
                if is_refused {
                    c.answers(RST, 1, 0, b"")?;
                }
                let ask = segment(&c.answer, SYN, 9000, 0, b"");
                let shot = lab.pod_sends(&ask)?;
                let (port, _) = crate::forged::ports_of(net, &shot.frame)?;
                let to: (IpAddr, u16) = (net.world(), CLIENT_PORT);
                shot.onto_wire(&ask.hop().between((net.node(), port), to))
                    .with_context(|| format!("flags {flags:#x}, refused: {is_refused}"))?;
            }
        }
        Ok(())
    })
}
