//! `build-ebpf --verify`: loads the object into this machine's kernel, in a mount namespace that ends with the command, and
//! tells what its verifier made of each program. Nothing is attached.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::cmd::{Cmd, need_root};
use crate::{elf, paths, ui};

/// A program may make the verifier look at no more instructions (include/linux/bpf.h, BPF_COMPLEXITY_LIMIT_INSNS).
const KERNEL_LIMIT: u32 = 1_000_000;
/// Ours: a program near the kernel's limit is refused by the next kernel.
const OUR_LIMIT: u32 = 50_000;
/// Ours for kernels before 6.12, which look at half as many again in the same object.
const OLD_LIMIT: u32 = 75_000;
/// What a variant that is loaded for a debugging session, or for the seconds of an upgrade, may take more.
const RARE: u32 = 5_000;
/// Lines of a refusal that are shown.
const LAST_WORDS: usize = 40;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
/// Where the fields of `struct bpf_prog_info` begin; the kernel only ever appends to it.
const JITED_LEN: usize = 16;
const XLATED_LEN: usize = 20;
const VERIFIED: usize = 216;
const INFO: usize = 232;

/// What the kernel says about a loaded program.
#[derive(Debug, PartialEq, Eq)]
pub struct Info {
    /// Instructions that the verifier looked at.
    pub verified: u32,
    /// Bytes of the program as it runs.
    pub translated: u32,
    /// Bytes after compilation.
    pub machine_code: u32,
}

/// Loads the object and lists its programs; an error when the kernel refuses it or a program is over our limit.
pub fn verify(object: &Path) -> Result<()> {
    need_root("build-ebpf --verify")?;
    let dir = paths::target().join("bpf/fs");
    fs::create_dir_all(&dir).with_context(|| format!("making the directory {}", dir.display()))?;
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace of our own")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context(
        "making mounts private\n  remedy: / has to be a mount point, which the root of a chroot is not; use pivot_root",
    )?;
    mount(Some("bpf"), &dir, Some("bpf"), MsFlags::empty(), none)
        .context("mounting bpffs\n  remedy: a kernel with CONFIG_BPF_SYSCALL")?;
    let bytes = fs::read(object).with_context(|| format!("reading {}", object.display()))?;
    let limit = limit(nix::sys::utsname::uname()?.release().to_string_lossy().as_ref());
    let mut over = Vec::new();
    for (number, variant) in VARIANTS.iter().enumerate() {
        ui::step(&format!("loading into this kernel: {}", variant.name));
        let object = dir.with_file_name("variant.o");
        let changed =
            variant.globals.iter().try_fold(bytes.clone(), |b, (name, value)| elf::set_global(b, name, *value))?;
        fs::write(&object, changed).with_context(|| format!("writing {}", object.display()))?;
        let limit = if variant.is_rare { limit + RARE } else { limit };
        let programs = programs(&object, &dir.join(format!("prog{number}")))?;
        println!("{:>12}  {:>12}  {:>12}  program", "verified", "instructions", "machine code");
        for (name, info) in &programs {
            println!("{:>12}  {:>12}  {:>12}  {name}", info.verified, info.translated / 8, info.machine_code);
            if info.verified > limit {
                over.push(format!("{name} ({}), {}: limit {limit}", info.verified, variant.name));
            }
        }
    }
    if over.is_empty() {
        return Ok(());
    }
    bail!("too many verified instructions (the kernel refuses {KERNEL_LIMIT}):\n  {}", over.join("\n  "))
}

fn limit(release: &str) -> u32 {
    let number = |part: Option<&str>| part.and_then(|p| p.parse::<u32>().ok()).unwrap_or_default();
    let mut parts = release.split('.');
    if (number(parts.next()), number(parts.next())) < (6, 12) { OLD_LIMIT } else { OUR_LIMIT }
}

/// What the agent can make of the object before it loads it.
struct Variant {
    name: &'static str,
    /// Allowed [`RARE`] instructions more.
    is_rare: bool,
    /// Read-only globals and their values. By these the verifier leaves out what is off.
    globals: &'static [(&'static str, u32)],
}

/// Not all combinations: the packet log is for a person who watches, bridges are for the seconds of an upgrade.
const VARIANTS: [Variant; 5] = [
    Variant { name: "as usual", is_rare: false, globals: &[] },
    // What the agent sets where its probes of helpers succeed.
    Variant { name: "as usual, newer kernels", is_rare: false, globals: &[("DECAP_L3", 1), ("L4_CSUM_IPV6", 1)] },
    Variant { name: "with the packet log", is_rare: true, globals: &[("BPF_LOG", 1)] },
    Variant { name: "as a bridge to v1", is_rare: true, globals: &[("MIGRATE", 1)] },
    Variant { name: "as a bridge between sizes", is_rare: true, globals: &[("MIGRATE", 2)] },
];

/// Loads all programs of the object, pins them in a directory that is not there yet, and tells what the kernel says of each.
pub fn programs(object: &Path, pins: &Path) -> Result<Vec<(String, Info)>> {
    Cmd::new("bpftool").args(["prog", "loadall"]).args([object, pins]).capture()?;
    let mut names: Vec<_> = fs::read_dir(pins)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    names.sort();
    let info = |pin: &PathBuf| {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let info = info_of(pin).with_context(|| format!("asking the kernel about {name}"))?;
        Ok((name, info))
    };
    names.iter().map(info).collect()
}

/// The end of a refusal: a verifier's log may have a hundred thousand lines, and its last ones say why.
pub fn last_words(refusal: &str) -> Vec<&str> {
    let lines: Vec<&str> = refusal.lines().collect();
    lines[lines.len().saturating_sub(LAST_WORDS)..].to_vec()
}

fn info_of(pin: &Path) -> Result<Info> {
    let path = std::ffi::CString::new(pin.as_os_str().as_encoded_bytes())?;
    let mut get = Attr::default();
    get.0[0] = path.as_ptr() as u64;
    let fd = RawFd::try_from(bpf(BPF_OBJ_GET, &mut get)?)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else owns it.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut bytes = [0u8; INFO];
    let mut info = Attr::default();
    // __u32 bpf_fd, __u32 info_len, __u64 info: little-endian machines only, as the target of the object says.
    info.0[0] = u64::from(program.as_raw_fd().cast_unsigned()) | (INFO as u64) << 32;
    info.0[1] = bytes.as_mut_ptr() as u64;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut info)?;
    Ok(parse(&bytes))
}

fn parse(bytes: &[u8; INFO]) -> Info {
    let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    Info { verified: field(VERIFIED), translated: field(XLATED_LEN), machine_code: field(JITED_LEN) }
}

/// The first words of `union bpf_attr`; both commands use no more.
#[derive(Default)]
#[repr(C, align(8))]
struct Attr([u64; 2]);

fn bpf(command: libc::c_int, attr: &mut Attr) -> std::io::Result<libc::c_long> {
    // SAFETY: `attr` lives through the call and its size is passed; the addresses in it are of
    // buffers that do too.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<Attr>()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_have_a_limit_of_their_own() {
        for (release, expected) in [("6.1.0-13-amd64", OLD_LIMIT), ("6.12.9", OUR_LIMIT), ("7.2.1", OUR_LIMIT)] {
            assert_eq!(limit(release), expected, "{release}");
        }
    }

    #[test]
    fn fields_are_read_where_the_kernel_writes_them() {
        let mut bytes = [0; INFO];
        bytes[16] = 1;
        bytes[20] = 2;
        bytes[216..220].copy_from_slice(&[0, 1, 0, 0]);
        assert_eq!(parse(&bytes), Info { verified: 256, translated: 2, machine_code: 1 });
    }
}
