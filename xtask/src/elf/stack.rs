//! The stack that an object's call chains need, as the verifier adds it up: a chain over the limit is refused by some kernels
//! and not by others, for they round frames differently.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

use super::calls::{Calls, LOAD_64};

/// Bytes of stack of a chain of calls (include/linux/filter.h, `MAX_BPF_STACK`).
const STACK: u32 = 512;
/// Frames of a chain of calls (include/linux/bpf_verifier.h, `MAX_CALL_FRAMES`).
const FRAMES: usize = 8;
/// What kernel 6.1 rounds a frame up to; 6.18 takes 16.
const ROUND: u32 = 32;
/// Register 10, the frame pointer.
const FRAME_POINTER: u8 = 10;
/// `mov64 dst, src` and `add64 dst, imm`.
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
/// Classes of instructions: the lower three bits of the opcode.
const LOAD: u8 = 1;
const STORE: u8 = 2;
const STORE_REGISTER: u8 = 3;

/// The chain of calls that needs most.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// Bytes, each frame rounded up.
    pub bytes: u32,
    /// From the entry point down.
    pub functions: Vec<String>,
    /// Their frames, not rounded.
    pub frames: Vec<u32>,
}

impl Chain {
    /// Why a kernel would refuse it.
    pub(super) fn problem(&self) -> Option<String> {
        let excess = match (self.bytes > STACK, self.functions.len() > FRAMES) {
            (true, _) => format!("{} bytes of stack, and {STACK} is the limit", self.bytes),
            (_, true) => format!("{} frames, and {FRAMES} is the limit", self.functions.len()),
            _ => return None,
        };
        let frames = self.functions.iter().zip(&self.frames);
        let names: Vec<_> = frames.map(|(f, bytes)| format!("{} ({bytes})", super::short(f))).collect();
        Some(format!("the calls {} need {excess}", names.join(" > ")))
    }
}

/// The deepest chains, by bytes and by frames.
///
/// # Errors
/// When a section cannot be read.
pub(super) fn deepest(file: &object::File<'_>, calls: &Calls) -> Result<[Chain; 2]> {
    let frames = frames(file)?;
    let mut callees: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (callee, callers) in calls {
        for caller in callers {
            callees.entry(caller).or_default().push(callee);
        }
    }
    let mut found = [Chain::default(), Chain::default()];
    for entry in frames.keys().filter(|name| !calls.contains_key(*name)) {
        follow(entry, &frames, &callees, &mut Chain::default(), &mut found);
    }
    Ok(found)
}

fn follow(
    name: &str,
    frames: &BTreeMap<String, u32>,
    callees: &BTreeMap<&str, Vec<&str>>,
    chain: &mut Chain,
    found: &mut [Chain; 2],
) {
    if chain.functions.iter().any(|f| f == name) {
        // The verifier refuses recursion by itself.
        return;
    }
    let frame = frames.get(name).copied().unwrap_or_default();
    let bytes = frame.max(1).next_multiple_of(ROUND);
    chain.bytes += bytes;
    chain.functions.push(name.to_owned());
    chain.frames.push(frame);
    let copy = || Chain { bytes: chain.bytes, functions: chain.functions.clone(), frames: chain.frames.clone() };
    if chain.bytes > found[0].bytes {
        found[0] = copy();
    }
    if chain.functions.len() > found[1].functions.len() {
        found[1] = copy();
    }
    for callee in callees.get(name).into_iter().flatten() {
        follow(callee, frames, callees, chain, found);
    }
    chain.functions.pop();
    chain.frames.pop();
    chain.bytes -= bytes;
}

/// Function -> bytes of its frame.
fn frames(file: &object::File<'_>) -> Result<BTreeMap<String, u32>> {
    let mut frames = BTreeMap::new();
    for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text && s.size() > 0) {
        let Some(section) = symbol.section_index().and_then(|i| file.section_by_index(i).ok()) else { continue };
        if section.kind() != SectionKind::Text {
            continue;
        }
        let code = section.data().with_context(|| format!("reading {}", section.name().unwrap_or_default()))?;
        let (from, to) = (symbol.address() as usize, (symbol.address() + symbol.size()) as usize);
        let body = code.get(from..to).context("a symbol that ends behind its section")?;
        frames.insert(symbol.name()?.to_owned(), frame(body));
    }
    Ok(frames)
}

/// The deepest byte that a function addresses by its frame pointer.
fn frame(code: &[u8]) -> u32 {
    let mut depth = 0;
    let mut copies = [false; 16];
    let mut at = 0;
    while let Some(insn) = code.get(at..at + 8) {
        at += if insn[0] == LOAD_64 { 16 } else { 8 };
        let (dst, src) = (insn[1] & 15, insn[1] >> 4);
        let offset = i32::from(i16::from_le_bytes([insn[2], insn[3]]));
        let imm = i32::from_le_bytes([insn[4], insn[5], insn[6], insn[7]]);
        let reached = match insn[0] & 7 {
            LOAD if src == FRAME_POINTER => offset,
            STORE | STORE_REGISTER if dst == FRAME_POINTER => offset,
            _ if insn[0] == ADD && copies[usize::from(dst)] => imm,
            _ => 0,
        };
        depth = depth.min(reached);
        copies[usize::from(dst)] = insn[0] == MOVE && src == FRAME_POINTER;
    }
    depth.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_as_deep_as_its_deepest_access() {
        // *(u64 *)(r10 - 16) = r1
        let store = [0x7b, 0x1a, 0xf0, 0xff, 0, 0, 0, 0];
        // r2 = r10; r2 += -40
        let address = [MOVE, 0xa2, 0, 0, 0, 0, 0, 0, ADD, 2, 0, 0, 0xd8, 0xff, 0xff, 0xff];
        // r3 += -200, which is no address of the stack.
        let other = [ADD, 3, 0, 0, 0x38, 0xff, 0xff, 0xff];
        assert_eq!(frame(&store), 16);
        assert_eq!(frame(&[&store[..], &address, &other].concat()), 40);
        assert_eq!(frame(&other), 0);
    }

    #[test]
    fn the_deepest_chain_is_found_and_named() {
        let frames = [("main", 100), ("a", 300), ("b", 1), ("c", 100)].map(|(n, d)| (n.to_owned(), d)).into();
        let callees = [("main", vec!["a", "b"]), ("b", vec!["c"]), ("a", vec!["c"])].into();
        let mut found = [Chain::default(), Chain::default()];
        follow("main", &frames, &callees, &mut Chain::default(), &mut found);
        assert_eq!((found[0].bytes, found[0].functions.len()), (128 + 320 + 128, 3));
        assert_eq!(
            found[0].problem().unwrap(),
            "the calls main (100) > a (300) > c (100) need 576 bytes of stack, and 512 is the limit"
        );
        let deep = Chain { bytes: 9, functions: vec!["f".to_owned(); 9], frames: vec![1; 9] };
        assert!(deep.problem().unwrap().contains("9 frames"));
        assert_eq!(Chain { bytes: 512, functions: vec!["f".to_owned(); 8], frames: vec![1; 8] }.problem(), None);
    }
}
