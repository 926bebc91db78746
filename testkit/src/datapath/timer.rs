//! How long a program takes. A run repeats on what the run before left of the packet, so the
//! packet's first bytes are restored before each. The same run of a program that does nothing
//! measures that cost.

use super::skb::{SkBuff, word};
use super::{
    ADD, AND, CALL, CB, Datapath, Input, LOAD_WORD, MOV, MOV_REG, STORE_REG, STORE_WORD, context, instruction,
};
use anyhow::{Context, Result, ensure};
use rustnet_agent::bpf::sys::{self, TestRun};
use std::os::fd::{AsFd, OwnedFd};

/// The program that does nothing.
pub const EMPTY: &str = "empty";

/// Bytes that are restored: all headers, and four bytes at least of what follows.
const RESTORED: u8 = 96;
const STORE_BYTES: u32 = 9;
const LOAD_CONTEXT: u8 = LOAD_WORD;
const STORE_HALF: u8 = 0x6b;
const STORE_BYTE: u8 = 0x73;
const SHIFT_RIGHT: u8 = 0x77;
const MULTIPLY: u8 = 0x27;
const SWAP_32: (u8, u32) = (0xdc, 32);

/// What differs from one repetition to the next. Offsets are those of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vary {
    /// Nothing: one flow.
    Nothing,
    /// A million flows: the two bytes at `port`, and the last four bits of the byte at `host`, which are zero.
    Flow {
        /// Of the source port.
        port: u8,
        /// Of the last byte of the source address.
        host: u8,
    },
    /// The same, and the IPv4 address at `to`, of 65,536 from `first` on, in an order without order.
    FlowAndAddress {
        /// Of the source port.
        port: u8,
        /// Of the last byte of the source address.
        host: u8,
        /// Of the address.
        to: u8,
        /// The first address, host order.
        first: u32,
    },
}

/// A packet and a program, ready to be run again and again.
pub struct Timer {
    prelude: OwnedFd,
    context: SkBuff,
    frame: Vec<u8>,
}

impl Datapath {
    /// Prepares to time a program, or [`EMPTY`].
    pub fn timer(&self, program: &str, input: &Input<'_>, vary: Vary) -> Result<Timer> {
        ensure!(
            input.frame.len() >= usize::from(RESTORED),
            "a frame of {} bytes, {RESTORED} are needed",
            input.frame.len()
        );
        let jump = self.jump(program)?;
        let base = -i16::from(RESTORED);
        let at = |offset: u8| base + i16::from(offset);
        let mut code = vec![instruction(MOV_REG, 6, 1, 0, 0)];
        for (i, b) in (0_u8..).zip(input.frame[..usize::from(RESTORED)].chunks_exact(4)) {
            code.push(instruction(STORE_WORD, 10, 0, at(i * 4), u32::from_ne_bytes([b[0], b[1], b[2], b[3]])));
        }
        // The number of the repetition outlives it in the packet's control block.
        let count = CB + 4;
        code.push(instruction(LOAD_CONTEXT, 7, 6, count, 0));
        code.push(instruction(ADD, 7, 0, 0, 1));
        code.push(instruction(STORE_REG, 6, 7, count, 0));
        if let Vary::Flow { port, host } | Vary::FlowAndAddress { port, host, .. } = vary {
            code.push(instruction(STORE_HALF, 10, 7, at(port), 0));
            code.push(instruction(MOV_REG, 8, 7, 0, 0));
            code.push(instruction(SHIFT_RIGHT, 8, 0, 0, 16));
            code.push(instruction(AND, 8, 0, 0, 15));
            code.push(instruction(ADD, 8, 0, 0, u32::from(input.frame[usize::from(host)])));
            code.push(instruction(STORE_BYTE, 10, 8, at(host), 0));
        }
        if let Vary::FlowAndAddress { to, first, .. } = vary {
            code.push(instruction(MOV_REG, 8, 7, 0, 0));
            code.push(instruction(MULTIPLY, 8, 0, 0, 40_503));
            code.push(instruction(AND, 8, 0, 0, 0xffff));
            code.push(instruction(ADD, 8, 0, 0, first));
            code.push(instruction(SWAP_32.0, 8, 0, 0, SWAP_32.1));
            // In halves: an address in a frame stands at an even offset and no better.
            code.push(instruction(STORE_HALF, 10, 8, at(to), 0));
            code.push(instruction(SHIFT_RIGHT, 8, 0, 0, 16));
            code.push(instruction(STORE_HALF, 10, 8, at(to + 2), 0));
        }
        code.extend([
            instruction(MOV_REG, 1, 6, 0, 0),
            instruction(MOV, 2, 0, 0, 0),
            instruction(MOV_REG, 3, 10, 0, 0),
            instruction(ADD, 3, 0, 0, i32::from(base).cast_unsigned()),
            instruction(MOV, 4, 0, 0, u32::from(RESTORED)),
            instruction(MOV, 5, 0, 0, 0),
            instruction(CALL, 0, 0, 0, STORE_BYTES),
        ]);
        code.extend(jump);
        let prelude =
            sys::prog_load_sched_cls("rn_timer", &code).context("cannot load the program that restores the packet")?;
        Ok(Timer { prelude, context: context(input), frame: input.frame.to_vec() })
    }
}

impl Timer {
    /// Runs it `repeat` times; nanoseconds for each, and the last verdict. Each call goes on where the last one ended.
    pub fn run(&mut self, repeat: u32) -> Result<(u32, i32)> {
        let mut out = vec![0; self.frame.len() + 256];
        let run = TestRun { packet: &self.frame, out: &mut out, context: &mut self.context, repeat, flags: 0 };
        let ran = sys::test_run(self.prelude.as_fd(), run)?;
        let count = word::CB + 1;
        let done = self.context[count];
        // Only what tests may set goes back in.
        let keep = [word::MARK, word::IFINDEX, count].map(|i| (i, self.context[i]));
        self.context = [0; 48];
        for (i, value) in keep {
            self.context[i] = value;
        }
        self.context[word::MARK] = 0;
        ensure!(done != 0, "the packet's control block was cleared");
        Ok((ran.duration, ran.verdict.cast_signed()))
    }
}
