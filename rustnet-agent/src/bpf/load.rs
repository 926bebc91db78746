//! Loads the object's programs beside those that run, on the maps that are pinned or new ones.
//!
//! Nothing that forwards packets changes here: the old programs stay on their hooks, and a failure leaves them there.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aya::EbpfLoader;
use aya::programs::{Program, ProgramError};
use aya_obj::Object;
use rustnet_common::names;

use super::sys::Layout;
use super::{fs, layout, pin, probe};
use crate::config::MapSizes;

/// The program that tells user space the time (see rustnet-ebpf); pinned beside those of the hooks.
pub const CLOCK: &str = "clock";

/// Lines of the verifier's log that an error shows: the last ones say why.
const LOG_LINES: usize = 25;

/// What to load, and where to.
pub struct Load<'a> {
    /// The object file's bytes, 4-byte aligned.
    pub object: &'a [u8],
    /// The directory of pins.
    pub bpffs: &'a Path,
    /// Sizes of maps that differ from the object's, by name.
    pub sizes: BTreeMap<String, u32>,
}

/// The programs of one object, loaded and not attached.
pub struct Programs {
    by_name: BTreeMap<&'static str, OwnedFd>,
}

impl Programs {
    /// The program of a name in [`names::PROGRAMS`], or [`CLOCK`].
    pub fn get(&self, name: &str) -> Result<BorrowedFd<'_>> {
        self.by_name.get(name).map(AsFd::as_fd).with_context(|| format!("no program {name}"))
    }

    /// Pins all programs, each in the place of the one before: from now on the CNI binary attaches these.
    pub fn pin(&self, bpffs: &Path) -> Result<()> {
        self.by_name.iter().try_for_each(|(name, fd)| pin::replace(&program_path(bpffs, name), fd.as_fd()))
    }
}

/// Where a program is pinned.
pub fn program_path(bpffs: &Path, name: &str) -> PathBuf {
    bpffs.join(names::PROGS_DIR).join(name)
}

/// Map sizes of the configuration, by map name.
pub fn sizes(maps: &MapSizes) -> BTreeMap<String, u32> {
    use names::map::{BACKEND_IDS, BACKENDS, CT4_ANY, CT4_TCP, CT6_ANY, CT6_TCP, ENDPOINTS, FRAG4, FRAG6, PEERS4, PEERS6, SVC4, SVC6};
    let MapSizes { services, backends, ct_tcp, ct_any, frags, endpoints, peers } = *maps;
    let sizes = [
        (SVC4, services),
        (SVC6, services),
        (BACKEND_IDS, backends),
        (BACKENDS, backends),
        (CT4_TCP, ct_tcp),
        (CT4_ANY, ct_any),
        (CT6_TCP, ct_tcp),
        (CT6_ANY, ct_any),
        (FRAG4, frags),
        (FRAG6, frags),
        (ENDPOINTS, endpoints),
        (PEERS4, peers),
        (PEERS6, peers),
    ];
    sizes.into_iter().map(|(name, size)| (name.to_owned(), size)).collect()
}

impl Load<'_> {
    /// Prepares the directory, compares the maps, loads the programs. A kernel that is too old is named with what it refuses.
    pub fn run(&self) -> Result<Programs> {
        probe::check_rights()?;
        self.load_all().map_err(|error| match probe::too_old(&probe::release()) {
            Some(why) => error.context(why),
            None => error,
        })
    }

    fn load_all(&self) -> Result<Programs> {
        fs::prepare(self.bpffs)?;
        let object = Object::parse(self.object).context("parsing the eBPF object")?;
        check_btf(&object)?;
        let wanted = layout::wanted(&object, &self.sizes);
        layout::compare(self.bpffs, &wanted, &layout::pinned(self.bpffs, wanted.keys())?)?;
        drop(object);
        self.load(&wanted)
    }

    fn load(&self, maps: &BTreeMap<String, Layout>) -> Result<Programs> {
        let csum_ipv6 = u32::from(probe::l4_csum_ipv6()?);
        let mut loader = EbpfLoader::new();
        loader.override_global("L4_CSUM_IPV6", &csum_ipv6, true);
        for (name, layout) in maps {
            loader.map_max_entries(name, layout.max_entries).map_pin_path(name, self.bpffs.join(name));
        }
        let mut ebpf = loader.load(self.object).context("loading the eBPF object's maps")?;
        let mut by_name = BTreeMap::new();
        for name in names::PROGRAMS.into_iter().chain([CLOCK]) {
            let program = ebpf.program_mut(name).with_context(|| format!("the eBPF object has no program {name}"))?;
            let Program::SchedClassifier(program) = program else { bail!("program {name} is not a classifier") };
            program.load().map_err(|e| load_error(name, e))?;
            let fd = program.fd().with_context(|| format!("program {name}"))?;
            by_name.insert(name, fd.as_fd().try_clone_to_owned().with_context(|| format!("program {name}"))?);
        }
        Ok(Programs { by_name })
    }
}

/// Where the kernel tells its types.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// True if the object needs the kernel's BTF, and there is none.
pub fn lacks_btf(object: &[u8]) -> Result<bool> {
    Ok(needs_btf(&Object::parse(object).context("parsing the eBPF object")?))
}

/// Only relocations against the kernel's own types need the kernel's BTF.
fn needs_btf(object: &Object) -> bool {
    object.has_btf_relocations() && !Path::new(VMLINUX).exists()
}

fn check_btf(object: &Object) -> Result<()> {
    if needs_btf(object) {
        bail!("this kernel has no BTF ({VMLINUX} is missing): use one built with CONFIG_DEBUG_INFO_BTF=y");
    }
    Ok(())
}

/// The kernel's refusal, with the end of the verifier's log and what it means for the node.
fn load_error(name: &str, error: ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = tail(&verifier_log.to_string(), LOG_LINES);
            if log.is_empty() {
                let remedy = super::remedy(&io_error);
                return anyhow::anyhow!("the kernel refused program {name}: {io_error}: {remedy}");
            }
            // EACCES then means the program, not our rights.
            anyhow::anyhow!(
                "the kernel's verifier refused program {name} ({io_error}); what was attached before runs on. Report this with the \
                 kernel's version and its last words:\n{log}"
            )
        }
        other => anyhow::Error::from(other).context(format!("loading program {name}")),
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::{sizes, tail};
    use crate::config::MapSizes;

    #[test]
    fn sizes_carry_the_maps_names() {
        let sizes = sizes(&MapSizes { ct_tcp: 77, ..MapSizes::default() });
        assert_eq!(sizes["rn_ct4_tcp"], 77);
        assert!(sizes.keys().all(|name| rustnet_common::names::map::ALL.contains(&name.as_str())));
    }

    #[test]
    fn the_end_of_a_log_is_kept() {
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }
}
