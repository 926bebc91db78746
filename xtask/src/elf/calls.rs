//! Which function calls which inside an object, read from the instructions and their relocations.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SectionKind, SymbolKind};

/// Opcode of a call; with [`PSEUDO_CALL`] as its source register, of a function in the same object.
pub(super) const CALL: u8 = 0x85;
/// See [`CALL`].
pub(super) const PSEUDO_CALL: u8 = 1;
/// Opcode of the one instruction that takes two places; with [`PSEUDO_FUNCTION`] as its source register, of a function's address,
/// which a helper calls.
pub(super) const LOAD_64: u8 = 0x18;
const PSEUDO_FUNCTION: u8 = 4;

/// Function called -> its callers. Only what an entry point can reach is in it: bpf-linker exports the memory functions
/// always, and then leaves them in an object that never calls them.
pub(super) type Calls = BTreeMap<String, BTreeSet<String>>;

/// Reads the calls that the object's entry points can make, directly or not.
pub(super) fn reachable(file: &object::File<'_>) -> Result<Calls> {
    let edges = edges(file)?;
    let mut open: Vec<&str> = file.symbols().filter(|s| is_entry(file, s)).filter_map(|s| s.name().ok()).collect();
    let mut seen: BTreeSet<&str> = open.iter().copied().collect();
    let mut calls = Calls::new();
    while let Some(caller) = open.pop() {
        for (_, target) in edges.iter().filter(|(c, _)| c == caller) {
            calls.entry(target.clone()).or_default().insert(caller.to_owned());
            if seen.insert(target) {
                open.push(target);
            }
        }
    }
    Ok(calls)
}

fn is_code(file: &object::File<'_>, target: Option<&RelocationTarget>) -> bool {
    let Some(RelocationTarget::Symbol(index)) = target else { return false };
    let section = file.symbol_by_index(*index).ok().and_then(|s| s.section_index());
    section.and_then(|i| file.section_by_index(i).ok()).is_some_and(|s| s.kind() == SectionKind::Text)
}

fn is_entry(file: &object::File<'_>, symbol: &object::Symbol<'_, '_>) -> bool {
    let section = symbol.section_index().and_then(|i| file.section_by_index(i).ok());
    section.is_some_and(|s| s.kind() == SectionKind::Text && !s.name().unwrap_or_default().starts_with(".text"))
}

/// Every call as (caller, target).
fn edges(file: &object::File<'_>) -> Result<Vec<(String, String)>> {
    let functions: Vec<(SectionIndex, u64, u64, String)> = file
        .symbols()
        .filter(|s| s.kind() == SymbolKind::Text && s.size() > 0)
        .filter_map(|s| Some((s.section_index()?, s.address(), s.size(), s.name().ok()?.to_owned())))
        .collect();
    let at = |section: SectionIndex, offset: u64| {
        functions.iter().find(|f| f.0 == section && (f.1..f.1 + f.2).contains(&offset)).map(|f| f.3.clone())
    };
    let mut edges = Vec::new();
    for section in file.sections().filter(|s| s.kind() == SectionKind::Text) {
        let code = section.data().with_context(|| format!("reading {}", section.name().unwrap_or_default()))?;
        let relocated: BTreeMap<u64, RelocationTarget> = section.relocations().map(|(o, r)| (o, r.target())).collect();
        let mut offset = 0;
        while let Some(insn) = code.get(offset..offset + 8) {
            let place = offset as u64;
            offset += if insn[0] == LOAD_64 { 16 } else { 8 };
            let is_call = insn[0] == CALL && insn[1] >> 4 == PSEUDO_CALL;
            // Before libbpf or aya mark it, a function's address is a relocation against code.
            let is_callback =
                insn[0] == LOAD_64 && (insn[1] >> 4 == PSEUDO_FUNCTION || is_code(file, relocated.get(&place)));
            if !is_call && !is_callback {
                continue;
            }
            // The operand counts instructions from the next one, or from the start of a section that is relocated against.
            let imm = i64::from(i32::from_le_bytes([insn[4], insn[5], insn[6], insn[7]]));
            let distance = if is_call { (imm + 1) * 8 } else { imm };
            let target = match relocated.get(&place) {
                Some(RelocationTarget::Symbol(index)) => {
                    let symbol = file.symbol_by_index(*index).context("a relocation names no symbol")?;
                    match symbol.section_index() {
                        Some(section) if symbol.kind() == SymbolKind::Section => at(section, distance.cast_unsigned()),
                        _ => symbol.name().ok().map(str::to_owned),
                    }
                }
                _ => at(section.index(), (place.cast_signed() + distance).cast_unsigned()),
            };
            edges.extend(at(section.index(), place).zip(target));
        }
    }
    Ok(edges)
}
