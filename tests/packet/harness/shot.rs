//! What became of a packet, to be compared as a whole: verdict, mark, bytes, counters, events.

use crate::frame::{Frame, L4};
use anyhow::{Context, Result, bail, ensure};
use rustnet_common::config::mark::DEFAULT as MARK_PROCESSED;
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::event::Event;
use std::collections::BTreeMap;
use std::fmt::Write;
use testkit::check;

/// Verdict: whoever comes next, then the stack.
pub const STACK: i32 = -1;
/// Verdict: dropped.
pub const SHOT: i32 = 2;
/// Verdict: where the helper said.
pub const REDIRECT: i32 = 7;

const ETHERNET: usize = 14;

/// What became of a packet.
#[derive(Debug)]
pub struct Shot {
    pub hook: u8,
    pub(super) sum_is_right: bool,
    pub(super) sent: Vec<u8>,
    pub verdict: i32,
    pub mark: u32,
    pub frame: Vec<u8>,
    /// By reason and hook.
    pub counted: BTreeMap<(u8, u8), u64>,
    pub events: Vec<Event>,
}

impl Shot {
    /// Redirected into a pod, changed into `want`.
    pub fn to_the_pod(&self, want: &Frame) -> Result<()> {
        self.ended(REDIRECT, 0, Some(DropReason::Forwarded), &want.bytes(), usize::MAX)
    }

    /// Redirected to the host's end of a pod's veth, whose queue it passes, marked as done for the hook there.
    pub fn by_the_queue(&self, want: &Frame) -> Result<()> {
        self.onto_wire(want)
    }

    /// Redirected to a device, marked as done for the hook there, changed into `want`.
    pub fn onto_wire(&self, want: &Frame) -> Result<()> {
        self.ended(REDIRECT, MARK_PROCESSED, Some(DropReason::Forwarded), &want.bytes(), usize::MAX)
    }

    /// Left to the stack as `want`, not counted, and marked as done for the hook that it meets after.
    pub fn done_to_stack(&self, want: &Frame) -> Result<()> {
        self.ended(STACK, MARK_PROCESSED, None, &want.bytes(), usize::MAX)
    }

    /// Left to the stack as `want`, not counted.
    pub fn to_stack(&self, want: &Frame) -> Result<()> {
        self.ended(STACK, 0, None, &want.bytes(), usize::MAX)
    }

    /// Counted and reported as audited once; returns what is left to be compared.
    pub fn audited(mut self) -> Result<Self> {
        let reason = DropReason::PolicyAudited as u8;
        ensure!(
            self.counted.remove(&(reason, self.hook)) == Some(1),
            "not counted as audited once: {:?}",
            self.counted
        );
        let (its, others) = self.events.into_iter().partition(|event| event.reason == reason);
        let its: Vec<Event> = its;
        let reported: Vec<_> = its.iter().map(|event| (event.hook, event.len)).collect();
        ensure!(reported == [(self.hook, self.sent.len() as u32)], "reported as audited: {reported:?}");
        self.events = others;
        Ok(self)
    }

    /// Dropped unchanged, counted once.
    pub fn dropped(&self, reason: DropReason) -> Result<()> {
        self.ended(SHOT, 0, Some(reason), &self.sent, usize::MAX)
    }

    /// Refused for `reason`, and `want` reports it to the sender.
    pub fn answered(&self, reason: DropReason, want: &Frame) -> Result<()> {
        let bytes = want.bytes();
        let kept = if matches!(want.l4, L4::Icmp { .. }) { ETHERNET + want.payload.len() } else { bytes.len() };
        self.ended(REDIRECT, MARK_PROCESSED, Some(reason), &bytes, kept)
    }

    /// `kept`: how much of the frame that was sent is still in it.
    fn ended(&self, verdict: i32, mark: u32, reason: Option<DropReason>, want: &[u8], kept: usize) -> Result<()> {
        let counted: Vec<String> = self
            .counted
            .iter()
            .map(|((r, h), n)| {
                let name = DropReason::from_code(*r).map_or("?", DropReason::name);
                format!("{n} x {name} at {}", hook::NAMES.get(*h as usize).unwrap_or(&"?"))
            })
            .collect();
        let expected: BTreeMap<_, _> = reason.map(|r| ((r as u8, self.hook), 1)).into_iter().collect();
        let name = reason.map_or("nothing", DropReason::name);
        ensure!(self.verdict == verdict, "verdict {}, not {verdict}; counted {counted:?}, not {name}", self.verdict);
        ensure!(self.counted == expected, "counted {counted:?}, not {name} once");
        let reported: Vec<(u8, u8, u32)> = self.events.iter().map(|e| (e.reason, e.hook, e.len)).collect();
        let drop = reason.filter(|r| *r != DropReason::Forwarded);
        let expected: Vec<_> = drop.map(|r| (r as u8, self.hook, self.sent.len() as u32)).into_iter().collect();
        ensure!(reported == expected, "reported (reason, hook, length) {reported:?}, not {expected:?}");
        ensure!(self.mark == mark, "mark {:#x}, not {mark:#x}", self.mark);
        if self.frame != want {
            bail!("the frame is\n{}which should be\n{}", show(&self.frame, want), show(want, &self.frame));
        }
        // A frame that was cut has lost its device's sum, and the kernel knows.
        if !self.sum_is_right && self.sent.len() <= kept {
            bail!("the device's sum of the whole packet (CHECKSUM_COMPLETE) is wrong now");
        }
        if reason != Some(DropReason::Malformed) && self.verdict == REDIRECT {
            check::checksums(&self.frame, false).context("of the frame that comes out")?;
        }
        Ok(())
    }
}

/// Hexadecimal, sixteen bytes a line, with a mark before each byte that differs from `other`.
fn show(bytes: &[u8], other: &[u8]) -> String {
    let mut text = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        let _ = write!(text, "  {:4}:", line * 16);
        for (i, b) in chunk.iter().enumerate() {
            let mark = if other.get(line * 16 + i) == Some(b) { ' ' } else { '>' };
            let _ = write!(text, " {mark}{b:02x}");
        }
        text.push('\n');
    }
    text
}
