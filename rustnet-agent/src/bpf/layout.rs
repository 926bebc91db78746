//! Do the pinned maps have the shape that the object wants? Asked before loading, because the loader adopts whatever lies
//! under the name.

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

/// The maps an object wants, by name, with the sizes that the configuration asks for.
pub fn wanted(object: &Object, sizes: &BTreeMap<String, u32>) -> BTreeMap<String, Layout> {
    // Others are scratch space of one version of the programs.
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
    if kind == RINGBUF { max_entries.max(4096).next_power_of_two() } else { max_entries.max(1) }
}

/// The maps that are pinned in `bpffs` under one of the names.
pub fn pinned<'a>(bpffs: &Path, names: impl Iterator<Item = &'a String>) -> Result<BTreeMap<String, Layout>> {
    let mut out = BTreeMap::new();
    for name in names {
        let path = bpffs.join(name);
        match sys::obj_get(&path) {
            Ok(fd) => {
                let info = sys::map_info(fd.as_fd()).with_context(|| format!("{} is not a map", path.display()))?;
                out.insert(name.clone(), info.layout());
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => bail!("opening {}: {e}: {}", path.display(), remedy(&e)),
        }
    }
    Ok(out)
}

/// Refuses pinned maps of another shape, naming each with both shapes and the remedy. Nothing is touched.
pub fn compare(bpffs: &Path, wanted: &BTreeMap<String, Layout>, pinned: &BTreeMap<String, Layout>) -> Result<()> {
    let mut message = String::new();
    let mut only_sizes = true;
    for (name, pinned) in pinned {
        let Some(wanted) = wanted.get(name).filter(|wanted| *wanted != pinned) else { continue };
        only_sizes &= Layout { max_entries: pinned.max_entries, ..*wanted } == *pinned;
        let _ =
            write!(message, "\n  {name} is pinned as {pinned}\n  {:len$} but wanted as {wanted}", "", len = name.len());
    }
    if message.is_empty() {
        return Ok(());
    }
    let remedy = if only_sizes {
        "set the map sizes back in the configuration to keep them"
    } else {
        "start the release that pinned them to keep them"
    };
    bail!(
        "pinned maps do not fit, and stay untouched with the programs that use them:{message}\n{remedy}, or drop all state, \
         connections included, with `rustnet --bpffs {} cleanup --yes` and start again",
        bpffs.display()
    );
}

#[cfg(test)]
mod tests {
    use super::{Layout, compare, round};
    use std::collections::BTreeMap;
    use std::path::Path;

    const SVC: Layout = Layout { kind: 1, key_size: 8, value_size: 20, max_entries: 65536, flags: 1 };

    fn one(layout: Layout) -> BTreeMap<String, Layout> {
        BTreeMap::from([("rn_svc4".to_owned(), layout)])
    }

    fn refusal(pinned: Layout) -> String {
        compare(Path::new("/sys/fs/bpf/rn"), &one(SVC), &one(pinned)).unwrap_err().to_string()
    }

    #[test]
    fn the_same_shape_and_missing_maps_are_fine() {
        compare(Path::new("/b"), &one(SVC), &one(SVC)).unwrap();
        compare(Path::new("/b"), &one(SVC), &BTreeMap::new()).unwrap();
    }

    #[test]
    fn each_difference_is_refused_by_name_with_both_shapes() {
        for other in [
            Layout { kind: 9, ..SVC },
            Layout { key_size: 12, ..SVC },
            Layout { value_size: 24, ..SVC },
            Layout { flags: 0, ..SVC },
        ] {
            let text = refusal(other);
            assert!(text.contains("rn_svc4"), "{text}");
            assert!(text.contains(&SVC.to_string()) && text.contains(&other.to_string()), "{text}");
            assert!(text.contains("release") && text.contains("rustnet --bpffs /sys/fs/bpf/rn cleanup"), "{text}");
        }
    }

    #[test]
    fn another_size_points_at_the_configuration() {
        assert!(refusal(Layout { max_entries: 1024, ..SVC }).contains("configuration"));
    }

    #[test]
    fn ring_buffers_are_rounded_up() {
        assert_eq!(round(27, 5000), 8192);
        assert_eq!(round(27, 1), 4096);
        assert_eq!(round(9, 5000), 5000);
    }
}
