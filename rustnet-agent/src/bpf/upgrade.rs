//! How the pinned maps of an earlier agent pass to the programs of this one: what is adopted, what
//! is replaced, and in which order the pins change.
//!
//! Hooks are swapped one by one, so that for a moment the programs of two loads run together.
//! Tables of connections are written by programs. Where the two loads have different ones, the
//! first load is a *bridge*: its programs read the earlier tables, too, and write new connections
//! into both. Once no other program runs, a second load uses the new tables alone.
//!
//! Pins change in this order, and an agent that starts can conclude from them where its predecessor
//! was killed:
//!
//! 1. `next/` holds the pins of a load that runs on no hook yet. It is removed at the next start.
//! 2. `old/` gets the earlier tables, before their pins are replaced. It stays until no program
//!    uses them.
//! 3. The maps' pins are replaced, then those of the programs, then the hooks are swapped.
//! 4. When all hooks run the first load, what the earlier tables got meanwhile is copied. From then
//!    on the new tables are complete: `old/` and the retired maps are removed, and the second load
//!    follows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use aya_obj::Object;
use rustnet_common::names::{PROGS_DIR, map};
use rustnet_common::v1;

use super::layout::{self, Pin};
use super::sys::{self, Layout};
use super::{pin, remedy};

/// Below the bpffs directory: the pins of a load that runs on no hook yet.
pub const NEXT_DIR: &str = "next";
/// Below the bpffs directory: the tables that programs on hooks may still use besides the pinned
/// ones.
pub const OLD_DIR: &str = "old";

/// What is there.
#[derive(Debug, Default)]
pub struct Found {
    /// The maps that the object wants, with the sizes of the configuration.
    pub wanted: BTreeMap<String, Layout>,
    /// Pinned maps of these names, and of retired ones.
    pub pinned: BTreeMap<String, Pin>,
    /// The same in [`OLD_DIR`].
    pub old: BTreeMap<String, Pin>,
    /// Numbers of the maps that the pinned programs use.
    pub used: BTreeSet<u32>,
    /// Maps of the object for earlier tables of the same shape, see [`earlier`].
    pub bridges: BTreeSet<String>,
}

/// Where a map of the load comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It is pinned.
    Adopted,
    /// It is made, and gets the content of the pinned one.
    Resized,
    /// It is made.
    New,
}

/// Which earlier tables the programs of a load use besides their own: the value of their global
/// `MIGRATE`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Bridge {
    /// None.
    #[default]
    None = 0,
    /// The retired ones, see [`v1`].
    V1 = 1,
    /// Those of the same shape and another size.
    Resized = 2,
}

/// What a load does.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Maps in [`OLD_DIR`] that are still the ones in use: their pins are put back first.
    pub roll_back: Vec<String>,
    /// The maps of the load.
    pub maps: BTreeMap<String, (Layout, Source)>,
    /// The earlier tables that it uses.
    pub bridge: Bridge,
    /// Names of earlier maps to keep in [`OLD_DIR`] until no program uses them.
    pub keep: BTreeSet<String>,
    /// Something is to be removed once all hooks are swapped.
    pub leftovers: bool,
    /// The programs that run do not read the maps of policies, so that nobody has brought these up to date.
    pub has_stale_policies: bool,
}

impl Plan {
    /// True if programs on hooks use some of the maps that are this release's own.
    pub fn is_live(&self) -> bool {
        self.maps.iter().any(|(name, map)| is_own(name) && map.1 == Source::Adopted)
    }

    /// Opens the earlier map of a name in [`Plan::keep`].
    pub fn open_earlier(&self, bpffs: &Path, name: &str) -> Result<OwnedFd> {
        let (old, pinned) = (bpffs.join(OLD_DIR).join(name), bpffs.join(name));
        let is_adopted = self.maps.get(name).is_some_and(|(_, source)| *source == Source::Adopted);
        let places = if is_adopted { [old, pinned] } else { [pinned, old] };
        let open = sys::obj_get(&places[0]).or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => sys::obj_get(&places[1]),
            _ => Err(e),
        });
        open.map_err(|e| anyhow::anyhow!("opening {}: {e}: {}", places[0].display(), remedy(&e)))
    }
}

/// The name that the object gives to the earlier table of the same shape.
pub fn earlier(name: &str) -> String {
    format!("{name}_old")
}

/// The retired maps that this object does not use under the same name.
pub fn retired<T>(wanted: &BTreeMap<String, T>) -> impl Iterator<Item = &'static v1::Shape> {
    v1::RETIRED.iter().filter(|shape| !wanted.contains_key(shape.name))
}

impl Found {
    /// Looks at the pins in `bpffs`.
    pub fn look(bpffs: &Path, object: &Object, sizes: &BTreeMap<String, u32>) -> Result<Self> {
        let wanted = layout::wanted(object, sizes);
        let names = || wanted.keys().map(String::as_str).chain(retired(&wanted).map(|shape| shape.name));
        let pinned = layout::pinned(bpffs, names())?;
        let old = layout::pinned(&bpffs.join(OLD_DIR), names())?;
        let used = maps_in_use(bpffs)?;
        let bridges = wanted.keys().map(|name| earlier(name)).filter(|name| object.maps.contains_key(name)).collect();
        Ok(Self { wanted, pinned, old, used, bridges })
    }

    /// Decides. An error names the maps that can neither be adopted nor converted.
    pub fn plan(&self, bpffs: &Path) -> Result<Plan> {
        let mut plan = Plan::default();
        let (mut pinned, mut old) = (self.pinned.clone(), self.old.clone());
        for name in self.wanted.keys() {
            // The agent was killed between steps 2 and 3: no program uses the map that has the pin.
            let Some(earlier) = old.get(name).copied() else { continue };
            let is_used = |pin: &Pin| self.used.contains(&pin.id);
            if is_used(&earlier) && !pinned.get(name).is_some_and(is_used) {
                pinned.insert(name.clone(), earlier);
                old.remove(name);
                plan.roll_back.push(name.clone());
            }
        }
        let is_live =
            self.wanted.keys().any(|name| is_own(name) && pinned.get(name).is_some_and(|p| self.used.contains(&p.id)));
        let retired = retired_pins(&self.wanted, &pinned, &old);
        let was_bridge = retired.keys().any(|name| old.contains_key(*name));
        if !retired.is_empty() && !is_live {
            // Pins of our own maps, if there are any, are of an agent before the one whose programs
            // run.
            pinned.retain(|name, _| !is_own(name));
            old.clear();
        }
        // A release that knows no policies has run since: what these maps say may be of pods that have gone.
        plan.has_stale_policies = is_live && pinned.get(map::POLICY).is_some_and(|pin| !self.used.contains(&pin.id));
        self.refuse(bpffs, &pinned, &retired)?;
        plan.leftovers = !retired.is_empty() || !old.is_empty();
        let resumes = is_live && (was_bridge || !old.is_empty());
        for (name, wanted) in &self.wanted {
            let (layout, source) = match pinned.get(name) {
                None => (*wanted, Source::New),
                // Another size has to wait until the earlier upgrade is complete.
                Some(pin) if resumes || pin.layout == *wanted => (pin.layout, Source::Adopted),
                Some(_) => (*wanted, Source::Resized),
            };
            plan.maps.insert(name.clone(), (layout, source));
        }
        if !retired.is_empty() && (!is_live || was_bridge) {
            plan.bridge = Bridge::V1;
            plan.keep.extend(retired.keys().map(|name| (*name).to_owned()));
        } else {
            plan.keep.extend(old.into_keys());
            plan.keep.extend(plan.maps.iter().filter(|(_, m)| m.1 == Source::Resized).map(|(name, _)| name.clone()));
            if plan.keep.iter().any(|name| self.bridges.contains(&earlier(name))) {
                plan.bridge = Bridge::Resized;
            }
        }
        // Shared maps can change their size in the same load.
        plan.keep.extend(plan.maps.iter().filter(|(_, m)| m.1 == Source::Resized).map(|(name, _)| name.clone()));
        plan.leftovers |= !plan.keep.is_empty();
        Ok(plan)
    }

    fn refuse(
        &self,
        bpffs: &Path,
        pinned: &BTreeMap<String, Pin>,
        retired: &BTreeMap<&'static str, Pin>,
    ) -> Result<()> {
        let ours = self.wanted.iter().filter_map(|(name, wanted)| Some((&**name, *wanted, pinned.get(name)?.layout)));
        let theirs = v1::RETIRED.iter().filter_map(|shape| {
            let there = retired.get(shape.name)?.layout;
            let v1::Shape { name, kind, key_size, value_size, flags } = *shape;
            Some((name, Layout { kind, key_size, value_size, max_entries: there.max_entries, flags }, there))
        });
        layout::refuse_other_shapes(bpffs, ours.chain(theirs))
    }

    /// True if the object has tables of v1 as a bridge, and all its maps are pinned.
    pub fn can_export(&self, object: &Object) -> bool {
        let bridges = [v1::map::CT4, v1::map::CT6];
        bridges.iter().all(|name| object.maps.contains_key(*name) && !self.wanted.contains_key(*name))
            && self.wanted.keys().all(|name| self.pinned.contains_key(name))
    }

    /// The plan of the second load after a bridge: everything is adopted as it is pinned.
    pub fn plan_without_bridge(&self) -> Plan {
        let maps = self.wanted.iter().map(|(name, wanted)| match self.pinned.get(name) {
            Some(pin) => (name.clone(), (pin.layout, Source::Adopted)),
            None => (name.clone(), (*wanted, Source::New)),
        });
        Plan { maps: maps.collect(), ..Plan::default() }
    }
}

/// True for a map that agents of v1 do not know.
fn is_own(name: &str) -> bool {
    !v1::SHARED.contains(&name)
}

/// The retired maps that are there. A pin in its own place counts before one in [`OLD_DIR`].
fn retired_pins(
    wanted: &BTreeMap<String, Layout>,
    pinned: &BTreeMap<String, Pin>,
    old: &BTreeMap<String, Pin>,
) -> BTreeMap<&'static str, Pin> {
    retired(wanted)
        .filter_map(|shape| Some((shape.name, *pinned.get(shape.name).or_else(|| old.get(shape.name))?)))
        .collect()
}

/// Numbers of the maps that the pinned programs use. Only programs count that the agents of all
/// releases replace. Another one stays pinned, with our maps, while an agent of v1 runs.
fn maps_in_use(bpffs: &Path) -> Result<BTreeSet<u32>> {
    let mut used = BTreeSet::new();
    for name in v1::PROGRAMS {
        let path = bpffs.join(PROGS_DIR).join(name);
        let program = match sys::obj_get(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            program => program.map_err(|e| anyhow::anyhow!("opening {}: {e}: {}", path.display(), remedy(&e)))?,
        };
        used.extend(
            sys::prog_map_ids(program.as_fd()).with_context(|| format!("{} is not a program", path.display()))?,
        );
    }
    Ok(used)
}

/// Puts back the pins that a predecessor replaced for programs that it did not pin any more.
pub fn roll_back(bpffs: &Path, names: &[String]) -> Result<()> {
    for name in names {
        let (from, to) = (bpffs.join(OLD_DIR).join(name), bpffs.join(name));
        fs::rename(&from, &to).with_context(|| format!("renaming {} to {}", from.display(), to.display()))?;
    }
    Ok(())
}

/// Makes [`OLD_DIR`] hold these maps and no other (step 2).
pub fn keep_old(bpffs: &Path, maps: &BTreeMap<String, OwnedFd>) -> Result<()> {
    let dir = bpffs.join(OLD_DIR);
    if !maps.is_empty() {
        super::fs::private_dir(&dir)?;
    }
    for (name, map) in maps {
        pin::replace(&dir.join(name), map.as_fd())?;
    }
    remove_pins(&dir, |name| !maps.contains_key(name))
}

/// Removes the earlier tables (step 4): all programs on hooks have a complete copy. Returns what
/// was removed.
pub fn clear<T>(bpffs: &Path, wanted: &BTreeMap<String, T>) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for shape in retired(wanted) {
        if pin::remove(&bpffs.join(shape.name))? {
            removed.push(shape.name.to_owned());
        }
    }
    let old = bpffs.join(OLD_DIR);
    if old.exists() {
        removed.push(OLD_DIR.to_owned());
    }
    remove_dir(&old)?;
    Ok(removed)
}

/// Removes a directory of pins with all that is in it.
pub fn remove_dir(dir: &Path) -> Result<()> {
    remove_pins(dir, |_| true)?;
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", dir.display())),
        _ => Ok(()),
    }
}

fn remove_pins(dir: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("reading {}", dir.display()))?,
    };
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_none_or(&which) {
            pin::remove(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Bridge, Found, Layout, Pin, Plan, Source};
    use std::path::Path;

    const CT: Layout = Layout { kind: 9, key_size: 16, value_size: 120, max_entries: 4096, flags: 0 };
    const ENDPOINTS: Layout = Layout { kind: 1, key_size: 16, value_size: 24, max_entries: 256, flags: 1 };
    const V1_CT: Layout = Layout { value_size: 64, max_entries: 512, ..CT };

    fn bigger(layout: Layout) -> Layout {
        Layout { max_entries: layout.max_entries * 2, ..layout }
    }

    fn name(name: &str) -> String {
        name.to_owned()
    }

    /// An object with one connection table and one shared map, on a new node.
    fn fresh() -> Found {
        Found {
            wanted: [(name("rn_ct4_tcp"), CT), (name("rn_endpoints"), ENDPOINTS)].into(),
            bridges: [name("rn_ct4_tcp_old")].into(),
            ..Found::default()
        }
    }

    /// The same after an agent of this release has run.
    fn steady() -> Found {
        let pinned =
            [(name("rn_ct4_tcp"), Pin { id: 1, layout: CT }), (name("rn_endpoints"), Pin { id: 2, layout: ENDPOINTS })];
        Found { pinned: pinned.into(), used: [1, 2].into(), ..fresh() }
    }

    /// A node on which an agent of v1 has run.
    fn v1() -> Found {
        let pinned =
            [(name("rn_ct4"), Pin { id: 10, layout: V1_CT }), (name("rn_endpoints"), Pin { id: 2, layout: ENDPOINTS })];
        Found { pinned: pinned.into(), used: [10, 2].into(), ..fresh() }
    }

    fn plan(found: &Found) -> Plan {
        found.plan(Path::new("/b")).unwrap()
    }

    fn sources(plan: &Plan) -> [Source; 2] {
        ["rn_ct4_tcp", "rn_endpoints"].map(|name| plan.maps[name].1)
    }

    fn size(plan: &Plan, name: &str) -> u32 {
        plan.maps[name].0.max_entries
    }

    #[test]
    fn a_new_node_gets_new_maps() {
        let plan = plan(&fresh());
        assert_eq!((sources(&plan), plan.bridge), ([Source::New; 2], Bridge::None));
        assert!(!plan.leftovers && plan.keep.is_empty());
    }

    #[test]
    fn maps_of_the_same_layout_are_adopted() {
        let plan = plan(&steady());
        assert_eq!((sources(&plan), plan.bridge), ([Source::Adopted; 2], Bridge::None));
        assert!(!plan.leftovers);
    }

    /// A release without policies leaves their maps pinned.
    #[test]
    fn maps_of_policies_that_no_program_uses_are_stale() {
        let mut found = steady();
        found.wanted.insert(name("rn_policy"), ENDPOINTS);
        assert!(!plan(&found).has_stale_policies, "there are none");
        found.pinned.insert(name("rn_policy"), Pin { id: 3, layout: ENDPOINTS });
        assert!(plan(&found).has_stale_policies);
        found.used.insert(3);
        assert!(!plan(&found).has_stale_policies);
        // Of programs that are on no hook, nothing is known.
        found.used.clear();
        assert!(!plan(&found).has_stale_policies);
    }

    #[test]
    fn another_size_of_a_connection_table_needs_a_bridge() {
        let mut found = steady();
        found.wanted.insert(name("rn_ct4_tcp"), bigger(CT));
        let plan = plan(&found);
        assert_eq!((sources(&plan), plan.bridge), ([Source::Resized, Source::Adopted], Bridge::Resized));
        assert_eq!((size(&plan, "rn_ct4_tcp"), plan.keep), (8192, [name("rn_ct4_tcp")].into()));
        assert!(plan.leftovers);
    }

    #[test]
    fn another_size_of_a_map_of_user_space_needs_none() {
        let mut found = steady();
        found.wanted.insert(name("rn_endpoints"), bigger(ENDPOINTS));
        let plan = plan(&found);
        assert_eq!((sources(&plan), plan.bridge), ([Source::Adopted, Source::Resized], Bridge::None));
        assert_eq!(plan.keep, [name("rn_endpoints")].into());
    }

    #[test]
    fn another_shape_is_refused() {
        let mut found = steady();
        found.pinned.insert(name("rn_ct4_tcp"), Pin { id: 1, layout: Layout { value_size: 56, ..CT } });
        assert!(found.plan(Path::new("/b")).unwrap_err().to_string().contains("rn_ct4_tcp is pinned as"));
        let mut found = v1();
        found.pinned.insert(name("rn_ct4"), Pin { id: 10, layout: Layout { value_size: 56, ..V1_CT } });
        assert!(found.plan(Path::new("/b")).unwrap_err().to_string().contains("rn_ct4 is pinned as"));
    }

    #[test]
    fn tables_of_v1_are_converted_behind_a_bridge() {
        let plan = plan(&v1());
        assert_eq!((sources(&plan), plan.bridge), ([Source::New, Source::Adopted], Bridge::V1));
        assert_eq!(plan.keep, [name("rn_ct4")].into());
    }

    #[test]
    fn tables_of_v1_and_another_size_of_a_shared_map_are_one_load() {
        let mut found = v1();
        found.wanted.insert(name("rn_endpoints"), bigger(ENDPOINTS));
        let plan = plan(&found);
        assert_eq!((sources(&plan), plan.bridge), ([Source::New, Source::Resized], Bridge::V1));
        assert_eq!(plan.keep, [name("rn_ct4"), name("rn_endpoints")].into());
    }

    #[test]
    fn tables_exported_for_v1_that_no_agent_took_are_only_removed() {
        let mut found = steady();
        found.pinned.insert(name("rn_ct4"), Pin { id: 10, layout: V1_CT });
        // The programs of the export write into both.
        found.used.insert(10);
        let plan = plan(&found);
        assert_eq!((sources(&plan), plan.bridge), ([Source::Adopted; 2], Bridge::None));
        assert!(plan.leftovers && plan.keep.is_empty());
    }

    #[test]
    fn after_an_agent_of_v1_our_own_pins_are_stale() {
        let mut found = steady();
        found.pinned.insert(name("rn_ct4"), Pin { id: 10, layout: V1_CT });
        found.used = [10, 2].into();
        let plan = plan(&found);
        assert_eq!((sources(&plan), plan.bridge), ([Source::New, Source::Adopted], Bridge::V1));
    }

    #[test]
    fn killed_while_the_hooks_were_swapped_the_bridge_is_built_again() {
        let mut found = steady();
        found.pinned.insert(name("rn_ct4"), Pin { id: 10, layout: V1_CT });
        found.old.insert(name("rn_ct4"), Pin { id: 10, layout: V1_CT });
        found.used.insert(10);
        // A size that was changed meanwhile waits.
        found.wanted.insert(name("rn_ct4_tcp"), bigger(CT));
        let one = plan(&found);
        assert_eq!((sources(&one), one.bridge), ([Source::Adopted; 2], Bridge::V1));
        assert_eq!((size(&one, "rn_ct4_tcp"), one.keep), (4096, [name("rn_ct4")].into()));

        let mut found = steady();
        found.old.insert(name("rn_ct4_tcp"), Pin { id: 9, layout: bigger(CT) });
        found.used.insert(9);
        let two = plan(&found);
        assert_eq!((sources(&two), two.bridge), ([Source::Adopted; 2], Bridge::Resized));
        assert!(two.roll_back.is_empty() && two.leftovers);
    }

    #[test]
    fn killed_before_its_programs_were_pinned_nothing_has_happened() {
        let mut found = steady();
        found.wanted.insert(name("rn_ct4_tcp"), bigger(CT));
        found.pinned.insert(name("rn_ct4_tcp"), Pin { id: 9, layout: bigger(CT) });
        found.old.insert(name("rn_ct4_tcp"), Pin { id: 1, layout: CT });
        let again = plan(&found);
        assert_eq!(again.roll_back, ["rn_ct4_tcp"]);
        assert_eq!((sources(&again), again.bridge), ([Source::Resized, Source::Adopted], Bridge::Resized));

        let mut found = v1();
        found.pinned.insert(name("rn_ct4_tcp"), Pin { id: 9, layout: CT });
        found.old.insert(name("rn_ct4"), Pin { id: 10, layout: V1_CT });
        let again = plan(&found);
        assert_eq!((sources(&again), again.bridge), ([Source::New, Source::Adopted], Bridge::V1));
    }

    #[test]
    fn the_second_load_adopts_all_and_bridges_nothing() {
        let mut found = steady();
        found.old.insert(name("rn_ct4_tcp"), Pin { id: 9, layout: bigger(CT) });
        found.wanted.insert(name("rn_endpoints"), bigger(ENDPOINTS));
        let plan = found.plan_without_bridge();
        assert_eq!((sources(&plan), plan.bridge), ([Source::Adopted; 2], Bridge::None));
        assert_eq!(size(&plan, "rn_endpoints"), 256);
    }
}
