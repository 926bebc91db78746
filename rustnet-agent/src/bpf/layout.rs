//! The shapes of maps: those that the object wants, and those of the pinned ones.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya_obj::Object;
use rustnet_common::names;

use super::{remedy, sys};
use sys::Layout;

/// `BPF_MAP_TYPE_RINGBUF`, whose size must be a power of two of at least a page.
const RINGBUF: u32 = 27;

/// `BPF_MAP_TYPE_SK_STORAGE`, which has a value for each socket and no size.
const SK_STORAGE: u32 = 24;

/// A pinned map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The kernel's number of it.
    pub id: u32,
    /// Its shape.
    pub layout: Layout,
}

/// The maps an object wants, by name, with the sizes that the configuration asks for.
pub fn wanted(object: &Object, sizes: &BTreeMap<String, u32>) -> BTreeMap<String, Layout> {
    // Others are scratch space of one version of the programs, or tables of an earlier one.
    let ours = object.maps.iter().filter(|(name, _)| names::map::ALL.contains(&name.as_str()));
    ours.map(|(name, map)| {
        let max_entries = sizes.get(name).copied().unwrap_or(map.max_entries());
        let layout = Layout {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: round(map.map_type(), max_entries),
            flags: map.map_flags(),
        };
        (name.clone(), layout)
    })
    .collect()
}

/// The size that the kernel will accept for a map of this type.
pub fn round(kind: u32, max_entries: u32) -> u32 {
    match kind {
        RINGBUF => max_entries.max(4096).next_power_of_two(),
        SK_STORAGE => 0,
        _ => max_entries.max(1),
    }
}

/// The maps that are pinned in `dir` under one of the names.
pub fn pinned<'a>(dir: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<BTreeMap<String, Pin>> {
    let mut out = BTreeMap::new();
    for name in names {
        let path = dir.join(name);
        match sys::obj_get(&path) {
            Ok(fd) => {
                let info = sys::map_info(fd.as_fd()).with_context(|| format!("{} is not a map", path.display()))?;
                out.insert(name.to_owned(), Pin { id: info.id, layout: info.layout() });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
        }
    }
    Ok(out)
}

/// True if nothing but the number of entries differs.
pub fn same_shape(one: Layout, other: Layout) -> bool {
    Layout { max_entries: other.max_entries, ..one } == other
}

/// Refuses pinned maps that can neither be adopted nor copied: their entries are of another shape.
/// The error names each with both shapes and the remedy. Nothing is touched.
pub fn refuse_other_shapes<'a>(bpffs: &Path, pairs: impl IntoIterator<Item = (&'a str, Layout, Layout)>) -> Result<()> {
    let mut message = String::new();
    for (name, wanted, pinned) in pairs {
        if !same_shape(wanted, pinned) {
            let len = name.len();
            let _ = write!(message, "\n  {name} is pinned as {pinned}\n  {:len$} but wanted as {wanted}", "");
        }
    }
    if message.is_empty() {
        return Ok(());
    }
    bail!(
        "pinned maps have a shape that this release cannot convert; they and the programs that use them stay as they \
         are:{message}\nstart the release that pinned them, or remove all state, connections included, with \
         `rustnetctl --bpffs {} cleanup --yes` and start again",
        bpffs.display()
    );
}

#[cfg(test)]
mod tests {
    use super::{Layout, refuse_other_shapes, round};
    use std::path::Path;

    const SVC: Layout = Layout { kind: 1, key_size: 8, value_size: 20, max_entries: 65536, flags: 1 };

    fn compare(pinned: Layout) -> anyhow::Result<()> {
        refuse_other_shapes(Path::new("/sys/fs/bpf/rn"), [("rn_svc4", SVC, pinned)])
    }

    #[test]
    fn the_same_shape_is_fine_whatever_its_size() {
        compare(SVC).unwrap();
        compare(Layout { max_entries: 16, ..SVC }).unwrap();
    }

    #[test]
    fn each_difference_is_refused_by_name_with_both_shapes() {
        for other in [
            Layout { kind: 9, ..SVC },
            Layout { key_size: 12, ..SVC },
            Layout { value_size: 24, ..SVC },
            Layout { flags: 0, ..SVC },
        ] {
            let text = compare(other).unwrap_err().to_string();
            assert!(text.contains("rn_svc4"), "{text}");
            assert!(text.contains(&SVC.to_string()) && text.contains(&other.to_string()), "{text}");
            assert!(text.contains("release") && text.contains("rustnetctl --bpffs /sys/fs/bpf/rn cleanup"), "{text}");
        }
    }

    #[test]
    fn ring_buffers_are_rounded_up() {
        assert_eq!(round(27, 5000), 8192);
        assert_eq!(round(27, 1), 4096);
        assert_eq!(round(9, 5000), 5000);
    }
}
