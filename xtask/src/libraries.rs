//! Which shared libraries a program needs, and where they are on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use object::elf::{DT_NEEDED, FileHeader64, PT_INTERP};
use object::endian::LittleEndian;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

use crate::arch::Arch;

/// A library that a program needs.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Library {
    /// Where the program's loader looks for it.
    pub place: PathBuf,
    /// Its file on this machine.
    pub file: PathBuf,
}

/// The libraries of a program for this machine, its loader among them; none for a static one.
pub fn native(program: &Path) -> Result<Vec<Library>> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("running ldd")?;
    // A static program is no success to ldd, and prints no path.
    let paths = paths_of(&String::from_utf8_lossy(&output.stdout));
    Ok(paths.into_iter().map(|path| Library { file: path.clone(), place: path }).collect())
}

/// The absolute paths in what ldd prints: `libc.so.6 => /lib/.../libc.so.6 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`.
fn paths_of(ldd: &str) -> Vec<PathBuf> {
    let words = ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

/// The libraries of a program for another architecture, from the directory of Debian's cross-compiler. Only its file is read.
pub fn foreign(program: &Path, arch: Arch) -> Result<Vec<Library>> {
    let dir = sysroot(arch).join("lib");
    let read = |file: &Path| {
        let content = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        needs(&content).with_context(|| format!("{}: no program for {}", file.display(), arch.name()))
    };
    let program = read(program)?;
    let mut found: BTreeMap<String, Library> = BTreeMap::new();
    // The loader first: the C library needs it, too, and it is found by its path alone.
    if let Some(loader) = &program.loader {
        let name = loader.rsplit('/').next().unwrap_or(loader);
        found.insert(name.to_owned(), Library { place: loader.into(), file: dir.join(name) });
    }
    let mut open = program.libraries;
    while let Some(name) = open.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let library = Library { place: Path::new("/lib").join(arch.gnu()).join(&name), file: dir.join(&name) };
        open.extend(read(&library.file)?.libraries);
        found.insert(name, library);
    }
    Ok(found.into_values().collect())
}

/// Where Debian's cross-compiler has the C library of an architecture.
pub fn sysroot(arch: Arch) -> PathBuf {
    Path::new("/usr").join(arch.gnu())
}

/// What a program's file asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    libraries: Vec<String>,
    loader: Option<String>,
}

fn needs(content: &[u8]) -> Result<Needs> {
    let header = FileHeader64::<LittleEndian>::parse(content)?;
    let endian = header.endian()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let mut needs = Needs::default();
    for part in header.program_headers(endian, content)? {
        if part.p_type(endian) == PT_INTERP {
            needs.loader = part.data(endian, content).ok().map(text);
        }
    }
    let sections = header.sections(endian, content)?;
    if let Some((entries, link)) = sections.dynamic(endian, content)? {
        let strings = sections.strings(endian, content, link)?;
        for entry in entries.iter().filter(|entry| entry.tag(endian) == DT_NEEDED) {
            needs.libraries.push(text(entry.string(endian, strings)?));
        }
    }
    Ok(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        assert_eq!(paths_of(text), [PathBuf::from("/lib/x/libc.so.6"), PathBuf::from("/lib64/ld.so.2")]);
        assert_eq!(paths_of("\tstatically linked\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_file_and_ldd_name_the_same_libraries() {
        let this = std::env::current_exe().unwrap();
        let native: Vec<_> = native(&this).unwrap().iter().map(|it| it.place.file_name().unwrap().to_owned()).collect();
        let needs = needs(&fs::read(&this).unwrap()).unwrap();
        assert!(needs.libraries.iter().any(|name| name == "libc.so.6"), "{needs:?}");
        for name in &needs.libraries {
            assert!(native.iter().any(|it| it == name.as_str()), "{name}: {native:?}");
        }
        let loader = needs.loader.unwrap();
        assert!(native.iter().any(|it| Path::new(&loader).file_name() == Some(it)), "{loader}: {native:?}");
    }
}
