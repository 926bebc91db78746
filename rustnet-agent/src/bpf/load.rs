//! Loads the object's programs while the old ones run, on pinned maps or new ones.
//!
//! Nothing that forwards packets changes here: the old programs stay on their hooks, all pins stay
//! as they are until [`Programs::pin`], and a failure leaves everything as it was.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aya::EbpfLoader;
use aya::maps::Map as AyaMap;
use aya::programs::{Program, ProgramError};
use aya_obj::Object;
use rustnet_common::backend::Backend;
use rustnet_common::{names, v1};

use super::copy::{Place, lru_room};
use super::log::Packets;
use super::store::Map;
use super::store::conntrack::{clock_offset, has_ended, is_superseded};
use super::upgrade::{self, Bridge, Found, NEXT_DIR, Plan, Source};
use super::{fs, migrate, pin, probe, remedy, sys};
use crate::config::{MapSizes, PacketLog};

/// The program that returns the time (see rustnet-ebpf); pinned with those of the hooks.
pub const CLOCK: &str = "clock";

/// Lines of the verifier's log that an error shows: the last ones say why.
const LOG_LINES: usize = 25;

/// How often the verifier may be interrupted.
const LOAD_ATTEMPTS: usize = 5;

/// What to load, and where to.
pub struct Load<'a> {
    /// The object file's bytes, 4-byte aligned.
    pub object: &'a [u8],
    /// The directory of pins.
    pub bpffs: &'a Path,
    /// Sizes of maps that differ from the object's, by name.
    pub sizes: BTreeMap<String, u32>,
    /// Which packets the programs log.
    pub log: PacketLog,
    /// Load the programs of socket calls, too.
    pub has_sockets: bool,
    /// Load the XDP program, too.
    pub has_xdp: bool,
}

/// The programs of one object with their maps, loaded and not attached.
pub struct Programs {
    by_name: BTreeMap<&'static str, OwnedFd>,
    /// Programs that pods do without and that the kernel refused, and why.
    refused: BTreeMap<&'static str, String>,
    maps: BTreeMap<String, OwnedFd>,
    /// Where programs jump to, until it is pinned.
    tails: Option<OwnedFd>,
    /// Maps whose pins are new or replaced.
    replaced: Vec<String>,
    /// Earlier maps that stay pinned until no program uses them.
    old: BTreeMap<String, OwnedFd>,
    plan: Plan,
    /// For each earlier table of connections, the time of the newest entry that was copied.
    copied: BTreeMap<String, u32>,
    /// The upgrade from the retired maps that these programs are the bridge of.
    from_v1: Option<migrate::Upgrade>,
    /// The retired maps that these programs are the bridge to.
    to_v1: Option<migrate::Export>,
    staged: Option<Staged>,
    /// The packet log, if it is on.
    pub log: Option<Packets>,
}

/// The directory of the pins of a load that is on no hook. Removed when dropped.
struct Staged {
    dir: PathBuf,
}

impl Staged {
    /// Makes the directory, without what an agent that was killed left in it.
    fn new(bpffs: &Path) -> Result<Self> {
        let dir = bpffs.join(NEXT_DIR);
        upgrade::remove_dir(&dir)?;
        fs::private_dir(&dir)?;
        Ok(Self { dir })
    }

    fn pin(&self, name: &str, map: BorrowedFd<'_>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        sys::obj_pin(&path, map).map_err(|e| anyhow::anyhow!("pinning {}: {e}: {}", path.display(), remedy(&e)))?;
        Ok(path)
    }

    fn open(&self, name: &str) -> Result<OwnedFd> {
        open(&self.dir.join(name))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Err(error) = upgrade::remove_dir(&self.dir) {
            tracing::warn!("{error:#}; the next start removes it");
        }
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    sys::obj_get(path).map_err(|e| anyhow::anyhow!("opening {}: {e}: {}", path.display(), remedy(&e)))
}

impl Programs {
    /// The program of a name in [`names::PROGRAMS`], or [`CLOCK`].
    pub fn get(&self, name: &str) -> Result<BorrowedFd<'_>> {
        self.by_name.get(name).map(AsFd::as_fd).with_context(|| format!("no program {name}"))
    }

    /// The program of a name in [`names::SOCKET_PROGRAMS`], or [`names::UPLINK_XDP`].
    ///
    /// # Errors
    /// The kernel refused it, or it was not to be loaded.
    pub fn optional(&self, name: &str) -> Result<BorrowedFd<'_>> {
        match self.refused.get(name) {
            Some(why) => bail!("{why}"),
            None => self.get(name),
        }
    }

    /// True if the maps of policies are those of an agent before the one that has ended.
    pub fn has_stale_policies(&self) -> bool {
        self.plan.has_stale_policies
    }

    /// Where the maps of these programs are pinned: in a directory of their own until
    /// [`Programs::pin`].
    pub fn maps_dir<'a>(&'a self, bpffs: &'a Path) -> &'a Path {
        self.staged.as_ref().map_or(bpffs, |staged| &staged.dir)
    }

    /// Pins all maps and programs, each in the place of the one before: from now on the CNI binary
    /// uses these.
    pub fn pin(&mut self, bpffs: &Path) -> Result<()> {
        if self.staged.is_some() {
            upgrade::keep_old(bpffs, &self.old)?;
            self.each_earlier(|name, new, old| if self.is_rewritten(name, new) { new.mirror(old) } else { Ok(()) })?;
            for name in &self.replaced {
                pin::replace(&bpffs.join(name), self.map(name)?)?;
            }
            // What the CNI binary wrote between the copy and the new pin.
            self.each_earlier(|name, new, old| {
                if self.is_rewritten(name, new) { new.insert_missing(&old.read()?).map(drop) } else { Ok(()) }
            })?;
        }
        self.by_name.iter().try_for_each(|(name, fd)| pin::replace(&program_path(bpffs, name), fd.as_fd()))?;
        self.staged = None;
        Ok(())
    }

    /// Pins where programs jump to, in the place of the map before, which the kernel empties then. To be called once no program but
    /// these is on an uplink. Does nothing the second time.
    ///
    /// # Errors
    /// What the BPF file system refuses. Until another try, tunnel packets take the device once this agent has ended.
    pub fn pin_tails(&mut self, bpffs: &Path) -> Result<()> {
        let Some(tails) = &self.tails else { return Ok(()) };
        pin::replace(&program_path(bpffs, names::TAILS_MAP), tails.as_fd())?;
        self.tails = None;
        Ok(())
    }

    /// The earlier tables that these programs use.
    pub fn bridge(&self) -> Bridge {
        self.plan.bridge
    }

    /// True if there are earlier maps, to be removed once these programs are on all hooks.
    pub fn has_leftovers(&self) -> bool {
        self.plan.leftovers
    }

    /// How many entries the earlier maps take, by name.
    pub fn earlier_sizes(&self) -> Result<BTreeMap<String, u32>> {
        let size = |map: &OwnedFd| sys::map_info(map.as_fd()).map(|info| info.layout().max_entries);
        self.old
            .iter()
            .map(|(name, map)| Ok((name.clone(), size(map).with_context(|| format!("looking at {name}"))?)))
            .collect()
    }

    /// Removes the earlier maps, after [`Programs::catch_up`]. Returns what was removed.
    pub fn clear_leftovers(&mut self, bpffs: &Path) -> Result<Vec<String>> {
        let removed = upgrade::clear(bpffs, &self.plan.maps)?;
        self.plan.leftovers = false;
        Ok(removed)
    }

    /// True for a new map in the place of one that user space alone writes.
    fn is_rewritten(&self, name: &str, new: &Place<'_>) -> bool {
        !new.evicts() && self.replaced.iter().any(|replaced| replaced == name)
    }

    /// True if an agent of v1 is to be able to take over from these programs.
    pub fn is_export(&self) -> bool {
        self.to_v1.is_some()
    }

    /// Pins the retired maps for an agent of v1. To be called once no program but these is on a
    /// hook. Returns how many halves of connections were opened since the load.
    pub fn finish_export(&self, bpffs: &Path) -> Result<usize> {
        let export = self.to_v1.as_ref().context("these programs are no bridge to v1")?;
        let added = export.catch_up(&self.maps)?;
        // Backends before services: an agent of v1 that starts meanwhile repairs what is half there.
        for (name, map) in export.maps() {
            pin::replace(&bpffs.join(name), map.as_fd())?;
        }
        Ok(added)
    }

    /// Copies the connections that were opened in the earlier tables since the load. To be called
    /// once no program but these is on a hook. Returns how many there were.
    pub fn catch_up(&self) -> Result<usize> {
        let mut added = 0;
        let backends = self.live_backends()?;
        self.each_earlier(|name, new, old| {
            let Some(offset) = clock_offset(name) else {
                let is_of_sockets = [names::map::SOCK_REV, names::map::SOCK_FWD].contains(&name);
                return if is_of_sockets { new.insert_missing(&old.read()?).map(drop) } else { Ok(()) };
            };
            let mut content = old.read()?;
            content.sort_by_age(offset);
            if let Some(since) = self.copied.get(name) {
                content.retain_since(offset, *since);
            }
            content.retain(|_, value| !has_ended(name, value, |id| backends.contains(&id)));
            added += new.insert_later(&content, |here, there| is_superseded(name, here, there))?;
            Ok(())
        })?;
        if let Some(upgrade) = &self.from_v1 {
            added += upgrade.catch_up(&self.old, &self.maps)?;
        }
        Ok(added)
    }

    /// Ids of the backends that serve.
    fn live_backends(&self) -> Result<HashSet<u32>> {
        let map = self.map(names::map::BACKENDS)?.try_clone_to_owned()?;
        let mut ids = HashSet::new();
        Map::<u32, Backend>::from_fd(map, names::map::BACKENDS)?
            .for_each(|_, backend| ids.extend(backend.serves(backend.id).then_some(backend.id)))?;
        Ok(ids)
    }

    /// Fills the new maps with the content of the earlier ones.
    fn fill(&mut self) -> Result<()> {
        let mut copied = BTreeMap::new();
        self.each_earlier(|name, new, old| {
            let mut content = old.read()?;
            if let Some(newest) = clock_offset(name).and_then(|offset| content.sort_by_age(offset)) {
                copied.insert(name.to_owned(), newest);
                content.keep_last(lru_room(new.layout.max_entries));
            }
            if name == names::map::MAGLEV {
                // What is beyond the end may be of nobody any more. An entry that leads there gets another table with the first plan.
                content.keep_below(new.layout.max_entries);
            }
            match self.plan.maps[name].1 {
                // A predecessor was killed after programs had begun to use it: what is there is
                // newer as a rule.
                Source::Adopted if new.evicts() => {
                    new.insert_later(&content, |here, there| is_superseded(name, here, there)).map(drop)
                }
                Source::Adopted => Ok(()),
                Source::Resized | Source::New => new.write(&content),
            }
        })?;
        self.copied = copied;
        self.fill_contested()?;
        if self.plan.bridge == Bridge::V1 {
            let is_live = self.plan.is_live();
            self.from_v1 =
                Some(migrate::Upgrade::run(&self.old, &self.maps, is_live).context("converting the maps of v1")?);
        }
        Ok(())
    }

    /// Connections of programs that did not have the map may stand in the second slot of their key.
    fn fill_contested(&self) -> Result<()> {
        let is_new = |name: &str| self.plan.maps.get(name).is_none_or(|(_, source)| *source == Source::New);
        let tables = [names::map::CT4_TCP, names::map::CT4_ANY, names::map::CT6_TCP, names::map::CT6_ANY];
        if !is_new(names::map::CT_CONTESTED) || tables.into_iter().all(is_new) {
            return Ok(());
        }
        let map = self.map(names::map::CT_CONTESTED)?.try_clone_to_owned()?;
        Map::<u32, u32>::from_fd(map, names::map::CT_CONTESTED)?.put(&0, &1)
    }

    /// Calls `copy` with each map that has an earlier one of the same shape. Errors name both
    /// sizes.
    fn each_earlier(&self, mut copy: impl FnMut(&str, &Place<'_>, &Place<'_>) -> io::Result<()>) -> Result<()> {
        for (name, old) in self.old.iter().filter(|(name, _)| self.maps.contains_key(*name)) {
            let places = || Ok::<_, io::Error>((Place::of(self.maps[name].as_fd())?, Place::of(old.as_fd())?));
            let (new, old) = places().with_context(|| format!("looking at {name}"))?;
            copy(name, &new, &old).with_context(|| {
                format!(
                    "copying {name} from {} entries to {}: if its content does not fit, set its size in the configuration back",
                    old.layout.max_entries, new.layout.max_entries
                )
            })?;
        }
        Ok(())
    }

    fn map(&self, name: &str) -> Result<BorrowedFd<'_>> {
        self.maps.get(name).map(AsFd::as_fd).with_context(|| format!("no map {name}"))
    }
}

/// Where a program is pinned.
pub fn program_path(bpffs: &Path, name: &str) -> PathBuf {
    bpffs.join(names::PROGS_DIR).join(name)
}

/// Map sizes of the configuration, by map name.
pub fn sizes(maps: &MapSizes) -> BTreeMap<String, u32> {
    use names::map::{
        AFFINITY, BACKEND_IDS, BACKENDS, CT4_ANY, CT4_TCP, CT6_ANY, CT6_TCP, ENDPOINTS, FRAG4, FRAG6, MAGLEV, PEERS4,
        PEERS6, POLICY_CIDRS, POLICY_PODS, POLICY_RULES, SOCK_FWD, SOCK_REV, SOURCE_RANGES, SVC4, SVC6,
    };
    let MapSizes {
        services,
        backends,
        maglev,
        ct_tcp,
        ct_any,
        frags,
        affinities,
        sockets,
        source_ranges,
        policy_pods,
        policy_cidrs,
        policy_rules,
        endpoints,
        peers,
    } = *maps;
    let sizes = [
        (SVC4, services),
        (SVC6, services),
        (BACKEND_IDS, backends),
        (BACKENDS, backends),
        (MAGLEV, maglev),
        (CT4_TCP, ct_tcp),
        (CT4_ANY, ct_any),
        (CT6_TCP, ct_tcp),
        (CT6_ANY, ct_any),
        (FRAG4, frags),
        (FRAG6, frags),
        (AFFINITY, affinities),
        (SOCK_REV, sockets),
        (SOCK_FWD, (sockets / 4).max(1)),
        (SOURCE_RANGES, source_ranges),
        (POLICY_PODS, policy_pods),
        (POLICY_CIDRS, policy_cidrs),
        (POLICY_RULES, policy_rules),
        (ENDPOINTS, endpoints),
        (PEERS4, peers),
        (PEERS6, peers),
    ];
    sizes.into_iter().map(|(name, size)| (name.to_owned(), size)).collect()
}

impl Load<'_> {
    /// Prepares the directory, compares the maps, loads the programs. A kernel that is too old is
    /// named with what it refuses.
    pub fn run(&self) -> Result<Programs> {
        probe::check_rights()?;
        self.load_all().map_err(|error| match probe::too_old(&probe::release()) {
            Some(why) => error.context(why),
            None => error,
        })
    }

    /// Loads the programs that use no earlier tables, after those of a bridge are on all hooks.
    pub fn run_without_bridge(&self) -> Result<Programs> {
        let object = self.parse()?;
        let plan = Found::look(self.bpffs, &object, &self.sizes)?.plan_without_bridge();
        drop(object);
        self.load(plan, None)
    }

    /// Loads programs with which an agent of v1 can start: a bridge to retired maps of these
    /// sizes, made of the present content. `None` if the object cannot be one.
    pub fn run_for_v1(&self, sizes: &BTreeMap<String, u32>) -> Result<Option<Programs>> {
        let object = self.parse()?;
        let found = Found::look(self.bpffs, &object, &self.sizes)?;
        if !found.can_export(&object) {
            return Ok(None);
        }
        drop(object);
        let mut present = BTreeMap::new();
        for name in found.wanted.keys() {
            present.insert(name.clone(), open(&self.bpffs.join(name))?);
        }
        let export = migrate::Export::new(&present, sizes).context("making the maps of v1")?;
        let plan = Plan { bridge: Bridge::V1, ..found.plan_without_bridge() };
        self.load(plan, Some(export)).map(Some)
    }

    fn load_all(&self) -> Result<Programs> {
        fs::prepare(self.bpffs)?;
        let object = self.parse()?;
        check_btf(&object)?;
        let plan = Found::look(self.bpffs, &object, &self.sizes)?.plan(self.bpffs)?;
        drop(object);
        upgrade::roll_back(self.bpffs, &plan.roll_back)?;
        self.load(plan, None)
    }

    fn parse(&self) -> Result<Object> {
        Object::parse(self.object).context("parsing the eBPF object")
    }

    fn load(&self, plan: Plan, to_v1: Option<migrate::Export>) -> Result<Programs> {
        let csum_ipv6 = u32::from(probe::l4_csum_ipv6()?);
        let decap_l3 = u32::from(probe::decap_l3()?);
        let migrate = plan.bridge as u32;
        let staged = Staged::new(self.bpffs)?;
        let mut old = BTreeMap::new();
        for name in &plan.keep {
            old.insert(name.clone(), plan.open_earlier(self.bpffs, name)?);
        }
        let log = self.log.globals();
        let mut loader = EbpfLoader::new();
        if !self.has_xdp {
            // Nobody looks there.
            loader.map_max_entries(names::TURNS_MAP, 1);
        }
        log.set(&mut loader);
        loader.override_global("L4_CSUM_IPV6", &csum_ipv6, true);
        loader.override_global("DECAP_L3", &decap_l3, true);
        loader.override_global("MIGRATE", &migrate, plan.bridge != Bridge::None);
        for (name, (layout, source)) in &plan.maps {
            if *source == Source::Adopted {
                staged.pin(name, open(&self.bpffs.join(name))?.as_fd())?;
            }
            loader.map_max_entries(name, layout.max_entries).map_pin_path(name, staged.dir.join(name));
        }
        let bridged = bridged(plan.bridge, to_v1.as_ref().map_or(&old, migrate::Export::maps));
        for (name, (table, max_entries)) in &bridged {
            loader.map_max_entries(name, *max_entries).map_pin_path(name, staged.pin(name, *table)?);
        }
        let mut ebpf = loader.load(self.object).context("loading the eBPF object's maps")?;
        let log = self.log.open(&mut ebpf)?;
        let mut maps = BTreeMap::new();
        for name in plan.maps.keys() {
            maps.insert(name.clone(), staged.open(name)?);
        }
        let replaced = plan.maps.iter().filter(|(_, m)| m.1 != Source::Adopted).map(|(name, _)| name.clone()).collect();
        let (by_name, copied) = (BTreeMap::new(), BTreeMap::new());
        drop(loader);
        drop(bridged);
        let staged = Some(staged);
        let mut programs = Programs {
            by_name,
            refused: BTreeMap::new(),
            maps,
            tails: None,
            replaced,
            old,
            plan,
            copied,
            from_v1: None,
            to_v1,
            staged,
            log,
        };
        if !programs.is_export() {
            programs.fill()?;
        }
        for name in names::PROGRAMS.into_iter().chain(names::UNATTACHED).chain([CLOCK]) {
            let program = ebpf.program_mut(name).with_context(|| format!("the eBPF object has no program {name}"))?;
            let Program::SchedClassifier(program) = program else { bail!("program {name} is not a classifier") };
            load_program(|| program.load()).map_err(|e| load_error(name, e))?;
            let fd = program.fd().with_context(|| format!("program {name}"))?;
            programs.by_name.insert(name, fd.as_fd().try_clone_to_owned().with_context(|| format!("program {name}"))?);
        }
        // Pods do without these; what is wrong is reported where they are attached.
        let sockets = names::SOCKET_PROGRAMS.into_iter().filter(|_| self.has_sockets);
        for name in sockets.chain(self.has_xdp.then_some(names::UPLINK_XDP)) {
            match load_optional(&mut ebpf, name) {
                Ok(program) => drop(programs.by_name.insert(name, program)),
                Err(error) => drop(programs.refused.insert(name, format!("{error:#}"))),
            }
        }
        programs.tails = Some(fill_tails(&ebpf, &programs.by_name)?);
        Ok(programs)
    }
}

/// Fills in where programs jump to, and returns the map.
fn fill_tails(ebpf: &aya::Ebpf, by_name: &BTreeMap<&'static str, OwnedFd>) -> Result<OwnedFd> {
    let Some(AyaMap::ProgramArray(map)) = ebpf.map(names::TAILS_MAP) else {
        bail!("the eBPF object has no map {} of programs", names::TAILS_MAP)
    };
    let map = map.fd().as_fd().try_clone_to_owned().with_context(|| format!("map {}", names::TAILS_MAP))?;
    for (index, name) in (0_u32..).zip(names::TAILS) {
        let program = by_name.get(name).with_context(|| format!("no program {name}"))?;
        sys::map_update(map.as_fd(), &index.to_ne_bytes(), &program.as_raw_fd().to_ne_bytes())
            .with_context(|| format!("writing {name} to {}", names::TAILS_MAP))?;
    }
    Ok(map)
}

/// Loads a program. A signal interrupts the verifier, which then has to start again (libbpf, too,
/// tries five times).
fn load_program(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..LOAD_ATTEMPTS {
        match load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.raw_os_error() == Some(libc::EAGAIN) => {}
            result => return result,
        }
    }
    load()
}

fn load_optional(ebpf: &mut aya::Ebpf, name: &str) -> Result<OwnedFd> {
    let program = ebpf.program_mut(name).with_context(|| format!("the eBPF object has no program {name}"))?;
    let fd = match program {
        Program::CgroupSockAddr(program) => load_program(|| program.load()).and_then(|()| program.fd()),
        Program::CgroupSock(program) => load_program(|| program.load()).and_then(|()| program.fd()),
        Program::Xdp(program) => load_program(|| program.load()).and_then(|()| program.fd()),
        _ => bail!("program {name} is neither for socket calls nor for XDP"),
    };
    let fd = fd.map_err(|e| load_error(name, e))?;
    fd.as_fd().try_clone_to_owned().with_context(|| format!("program {name}"))
}

/// The earlier tables that a bridge uses, by the names that the object has for them, with their
/// sizes.
fn bridged(bridge: Bridge, old: &BTreeMap<String, OwnedFd>) -> BTreeMap<String, (BorrowedFd<'_>, u32)> {
    let name_of = |name: &String| match bridge {
        Bridge::None => None,
        Bridge::V1 => [v1::map::CT4, v1::map::CT6].contains(&name.as_str()).then(|| name.clone()),
        Bridge::Resized => clock_offset(name).map(|_| upgrade::earlier(name)),
    };
    let table = |(name, map): (&String, &'_ OwnedFd)| -> Option<(String, u32)> {
        Some((name_of(name)?, sys::map_info(map.as_fd()).ok()?.layout().max_entries))
    };
    old.iter().filter_map(|pair| table(pair).map(|(name, size)| (name, (pair.1.as_fd(), size)))).collect()
}

/// Where the kernel has its types.
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
                let remedy = remedy(&io_error);
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
