//! Reads the finished kernel-side object and says what is in it, and what must not be: traces of a panic path, calls
//! of memory functions, undefined symbols. The verifier or libbpf would refuse such an object on a user's machine.

mod calls;
mod stack;

use std::fmt;

use anyhow::{Context, Result, bail};
use object::{Architecture, Object, ObjectSection, ObjectSymbol, SectionKind, SymbolKind};

/// Bytes of one eBPF instruction (a 64-bit load takes two, as the kernel counts too).
const INSN: u64 = 8;
/// Functions that the compiler adds for copies and comparisons it does not unroll.
const MEMORY_FUNCTIONS: [&str; 5] = ["memset", "memcpy", "memmove", "memcmp", "bcmp"];

/// One function of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// The section, which for an entry point is the program type.
    pub section: String,
    /// The symbol.
    pub name: String,
    /// Its length in instructions.
    pub instructions: u64,
    /// Whether it is an entry point (a program) and not a sub-program.
    pub entry: bool,
}

/// What an object holds.
#[derive(Debug, Default)]
pub struct Report {
    /// All functions, programs first.
    pub functions: Vec<Function>,
    /// Bytes of stack of the deepest chain of calls.
    pub stack: u32,
    /// Names of the maps.
    pub maps: Vec<String>,
    /// Why the object must not be used; empty when it is sound.
    pub problems: Vec<String>,
}

/// Examines an object.
///
/// # Errors
/// When the bytes are no little-endian eBPF object.
pub fn examine(bytes: &[u8]) -> Result<Report> {
    let file = object::File::parse(bytes).context("not an ELF object")?;
    if file.architecture() != Architecture::Bpf || !file.is_little_endian() {
        bail!("an object for {:?}, not for little-endian eBPF", file.architecture());
    }
    let mut report = Report::default();
    for section in file.sections() {
        let name = section.name().unwrap_or_default();
        if name.starts_with(".text.unlikely") {
            report.problems.push(format!(
                "section {name}: a panic path survived (a bounds check, a division, an unwrap); look for it with \
                 llvm-objdump -dl"
            ));
        }
    }
    for wanted in [".BTF", ".BTF.ext", "license"] {
        if file.section_by_name(wanted).is_none() {
            report.problems.push(format!("section {wanted} is missing"));
        }
    }
    let calls = calls::reachable(&file)?;
    for symbol in file.symbols() {
        look_at(&file, &symbol, &calls, &mut report);
    }
    let chains = stack::deepest(&file, &calls)?;
    report.problems.extend(chains.iter().filter_map(stack::Chain::problem));
    report.stack = chains[0].bytes;
    report.functions.sort_by(|a, b| (!a.entry, &a.section, &a.name).cmp(&(!b.entry, &b.section, &b.name)));
    report.maps.sort();
    report.problems.sort();
    report.problems.dedup();
    if !report.functions.iter().any(|f| f.entry) {
        report.problems.push("no program in it".to_owned());
    }
    Ok(report)
}

/// Changes the initial value of a global of 32 bits in an object, as a loader does.
///
/// # Errors
/// When there is no such global.
pub fn set_global(mut bytes: Vec<u8>, name: &str, value: u32) -> Result<Vec<u8>> {
    let file = object::File::parse(&*bytes).context("not an ELF object")?;
    let symbol = file.symbol_by_name(name).with_context(|| format!("the object has no global {name}"))?;
    let section = symbol.section_index().and_then(|i| file.section_by_index(i).ok());
    let (offset, _) =
        section.and_then(|s| s.file_range()).with_context(|| format!("{name} is not in a section with bytes"))?;
    let at = usize::try_from(offset + symbol.address())?;
    let place = bytes.get_mut(at..at + 4).with_context(|| format!("{name} lies behind the end of the object"))?;
    place.copy_from_slice(&value.to_le_bytes());
    Ok(bytes)
}

fn look_at<'d>(file: &object::File<'d>, symbol: &object::Symbol<'d, '_>, calls: &calls::Calls, report: &mut Report) {
    let Ok(name) = symbol.name() else { return };
    if name.is_empty() || matches!(symbol.kind(), SymbolKind::Section | SymbolKind::File) {
        return;
    }
    let callers = calls.get(name);
    // Legacy and v0 mangling both hold the length-prefixed crate and module names.
    if name.contains("4core") && name.contains("9panicking") {
        report
            .problems
            .push(format!("symbol {}: a panic path survived (a bounds check, a division, an unwrap)", short(name)));
    } else if MEMORY_FUNCTIONS.contains(&name) && (callers.is_some() || symbol.is_undefined()) {
        let by: Vec<String> = callers.into_iter().flatten().map(|caller| short(caller)).collect();
        report.problems.push(format!(
            "function {name} is called by {}: a copy, a clear or a comparison of bytes; write that with whole integers",
            if by.is_empty() { "the object".to_owned() } else { by.join(", ") }
        ));
    } else if symbol.is_undefined() {
        report.problems.push(format!("symbol {name} is undefined"));
    }
    let Some(section) = symbol.section_index().and_then(|i| file.section_by_index(i).ok()) else { return };
    let section_name = section.name().unwrap_or_default();
    if section.kind() == SectionKind::Text && symbol.kind() == SymbolKind::Text {
        let entry = !section_name.starts_with(".text");
        if entry || callers.is_some() {
            let instructions = symbol.size() / INSN;
            report.functions.push(Function {
                section: section_name.to_owned(),
                name: name.to_owned(),
                instructions,
                entry,
            });
        }
    } else if matches!(section_name, "maps" | ".maps") {
        report.maps.push(name.to_owned());
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>12}  {:<18}  program", "instructions", "type")?;
        for function in &self.functions {
            let kind = if function.entry { function.section.as_str() } else { "(sub-program)" };
            writeln!(f, "{:>12}  {kind:<18}  {}", function.instructions, short(&function.name))?;
        }
        writeln!(f, "{:>12}  bytes of stack at most (limit 512)", self.stack)?;
        write!(f, "{} maps: {}", self.maps.len(), self.maps.join(" "))
    }
}

/// A symbol as people write it, without its hash.
fn short(name: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(name))
}

#[cfg(test)]
mod tests {
    use object::write::{Object as Writer, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
    use object::{BinaryFormat, Endianness, RelocationFlags, SymbolFlags, SymbolScope};

    use super::calls::{CALL, LOAD_64, PSEUDO_CALL};
    use super::*;

    /// A sound object; `add` may spoil it.
    fn fabricate(architecture: Architecture, add: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
        let mut file = Writer::new(BinaryFormat::Elf, architecture, Endianness::Little);
        for name in [".BTF", ".BTF.ext", "license"] {
            let section = file.add_section(Vec::new(), name.as_bytes().to_vec(), SectionKind::Data);
            file.append_section_data(section, b"GPL\0", 1);
        }
        function(&mut file, "classifier", "from_pod", 3);
        let maps = file.add_section(Vec::new(), b".maps".to_vec(), SectionKind::Data);
        symbol(&mut file, "rn_svc4", SymbolKind::Data, SymbolSection::Section(maps), 32);
        add(&mut file);
        file.write().unwrap()
    }

    fn function(file: &mut Writer<'_>, section: &str, name: &str, instructions: usize) -> SymbolId {
        code(file, section, name, &vec![0; instructions * 8]).1
    }

    fn code(file: &mut Writer<'_>, section: &str, name: &str, code: &[u8]) -> (SectionId, SymbolId) {
        let section = file.add_section(Vec::new(), section.as_bytes().to_vec(), SectionKind::Text);
        file.append_section_data(section, code, 8);
        (section, symbol(file, name, SymbolKind::Text, SymbolSection::Section(section), code.len() as u64))
    }

    /// A function of one instruction: a call, relocated against the target's symbol.
    fn caller(file: &mut Writer<'_>, section: &str, name: &str, target: SymbolId) {
        let (section, _) = code(file, section, name, &[CALL, PSEUDO_CALL << 4, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        let flags = RelocationFlags::Elf { r_type: object::elf::R_BPF_64_32 };
        file.add_relocation(section, Relocation { offset: 0, symbol: target, addend: 0, flags }).unwrap();
    }

    fn symbol(file: &mut Writer<'_>, name: &str, kind: SymbolKind, section: SymbolSection, size: u64) -> SymbolId {
        file.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value: 0,
            size,
            kind,
            scope: SymbolScope::Dynamic,
            weak: false,
            section,
            flags: SymbolFlags::None,
        })
    }

    fn problems(add: impl FnOnce(&mut Writer<'_>)) -> Vec<String> {
        examine(&fabricate(Architecture::Bpf, add)).unwrap().problems
    }

    #[test]
    fn a_sound_object_is_listed() {
        let bytes = fabricate(Architecture::Bpf, |file| {
            let step = function(file, ".text", "_ZN3lib4step2lb17h0123456789abcdefE", 5);
            caller(file, "xdp", "xdp_uplink", step);
        });
        let report = examine(&bytes).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        assert_eq!(report.maps, ["rn_svc4"]);
        let seen: Vec<_> = report.functions.iter().map(|f| (f.section.as_str(), f.instructions, f.entry)).collect();
        assert_eq!(seen, [("classifier", 3, true), ("xdp", 1, true), (".text", 5, false)]);
        assert!(report.to_string().contains("lib::step::lb"), "{report}");
    }

    #[test]
    fn a_panic_section_is_a_problem() {
        let found = problems(|file| {
            function(file, ".text.unlikely.", "cold", 1);
        });
        assert!(found.len() == 1 && found[0].contains(".text.unlikely."), "{found:?}");
    }

    #[test]
    fn panic_symbols_of_both_manglings_are_problems() {
        for name in ["_ZN4core9panicking18panic_bounds_check17h0123456789abcdefE", "_RNvNtCs1_4core9panicking5panic"] {
            let found = problems(|file| {
                function(file, ".text", name, 1);
            });
            assert!(found.len() == 1 && found[0].contains("core::panicking::panic"), "{found:?}");
        }
    }

    #[test]
    fn memory_functions_that_a_program_calls_are_problems() {
        for name in MEMORY_FUNCTIONS {
            let found = problems(|file| {
                let target = function(file, ".text", name, 1);
                caller(file, "xdp", "xdp_uplink", target);
            });
            assert!(found.len() == 1 && found[0].contains(&format!("{name} is called by xdp_uplink")), "{found:?}");
            let found = problems(|file| {
                symbol(file, name, SymbolKind::Unknown, SymbolSection::Undefined, 0);
            });
            assert!(found.len() == 1 && found[0].contains(name), "{found:?}");
        }
    }

    #[test]
    fn memory_functions_that_no_program_reaches_are_none() {
        let found = problems(|file| {
            let target = function(file, ".text", "memcpy", 1);
            caller(file, ".text", "memmove", target);
        });
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn a_call_within_one_section_needs_no_relocation() {
        let found = problems(|file| {
            // memset, and right after it a program that calls back by two instructions.
            let (section, _) = code(file, "xdp", "memset", &[0; 8]);
            let value = file.append_section_data(section, &[CALL, PSEUDO_CALL << 4, 0, 0, 0xfe, 0xff, 0xff, 0xff], 8);
            let id = symbol(file, "xdp_uplink", SymbolKind::Text, SymbolSection::Section(section), 8);
            file.symbol_mut(id).value = value;
        });
        assert!(found.len() == 1 && found[0].contains("memset is called by xdp_uplink"), "{found:?}");
    }

    #[test]
    fn a_function_that_a_helper_calls_back_counts() {
        let found = problems(|file| {
            let target = function(file, ".text", "memcpy", 1);
            // r2 = the function's address, for bpf_loop.
            let (section, _) = code(file, "xdp", "xdp_uplink", &[&[LOAD_64, 2][..], &[0; 14]].concat());
            let flags = RelocationFlags::Elf { r_type: object::elf::R_BPF_64_64 };
            file.add_relocation(section, Relocation { offset: 0, symbol: target, addend: 0, flags }).unwrap();
        });
        assert!(found.len() == 1 && found[0].contains("memcpy is called by xdp_uplink"), "{found:?}");
    }

    #[test]
    fn too_deep_a_stack_is_a_problem() {
        let found = problems(|file| {
            // *(u64 *)(r10 - 512) = r1, and a call of a function with a frame of its own.
            let target = function(file, ".text", "step", 1);
            let body =
                [[0x7b, 0x1a, 0, 0xfe, 0, 0, 0, 0], [CALL, PSEUDO_CALL << 4, 0, 0, 0xff, 0xff, 0xff, 0xff]].concat();
            let (section, _) = code(file, "xdp", "xdp_uplink", &body);
            let flags = RelocationFlags::Elf { r_type: object::elf::R_BPF_64_32 };
            file.add_relocation(section, Relocation { offset: 8, symbol: target, addend: 0, flags }).unwrap();
        });
        assert_eq!(found, ["the calls xdp_uplink (512) > step (0) need 544 bytes of stack, and 512 is the limit"]);
    }

    #[test]
    fn a_global_gets_another_value() {
        let bytes = fabricate(Architecture::Bpf, |file| {
            let section = file.add_section(Vec::new(), b".rodata".to_vec(), SectionKind::ReadOnlyData);
            file.append_section_data(section, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0], 4);
            let id = symbol(file, "MIGRATE", SymbolKind::Data, SymbolSection::Section(section), 4);
            file.symbol_mut(id).value = 4;
        });
        let changed = set_global(bytes.clone(), "MIGRATE", 0x0403_0201).unwrap();
        let file = object::File::parse(&*changed).unwrap();
        let data = file.section_by_name(".rodata").unwrap().data().unwrap();
        assert_eq!(data, [1, 0, 0, 0, 1, 2, 3, 4, 3, 0, 0, 0]);
        assert!(set_global(bytes, "ELSEWHERE", 1).unwrap_err().to_string().contains("no global ELSEWHERE"));
    }

    #[test]
    fn an_undefined_symbol_is_a_problem() {
        let found = problems(|file| {
            symbol(file, "elsewhere", SymbolKind::Unknown, SymbolSection::Undefined, 0);
        });
        assert_eq!(found, ["symbol elsewhere is undefined"]);
    }

    #[test]
    fn an_object_without_programs_or_btf_is_refused() {
        let mut file = Writer::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        function(&mut file, ".text", "lonely", 1);
        let found = examine(&file.write().unwrap()).unwrap().problems;
        for wanted in [".BTF is missing", ".BTF.ext is missing", "license is missing", "no program"] {
            assert!(found.iter().any(|p| p.contains(wanted)), "{wanted}: {found:?}");
        }
    }

    #[test]
    fn objects_for_other_machines_and_other_files_are_refused() {
        assert!(examine(b"not an object").is_err());
        let error = examine(&fabricate(Architecture::X86_64, |_| {})).unwrap_err();
        assert!(error.to_string().contains("X86_64"), "{error}");
    }
}
