//! `v1-maps.json` in the run directory: how many entries the maps of v1 had. An agent of v1 takes
//! no map of another size than its configuration has, and that is not known here when the maps are
//! made for it again.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use rustnet_common::v1;

use crate::config::MapSizes;
use crate::install::write_atomic;

/// The file's name.
pub const FILE: &str = "v1-maps.json";

/// Entries of a connection table of v1, unless its configuration had others.
const CONNECTIONS: u32 = 131_072;

/// Keeps the sizes of the maps of v1 by name.
pub fn write(run_dir: &Path, sizes: &BTreeMap<String, u32>) -> Result<()> {
    let text = serde_json::to_vec(sizes).context("writing JSON")?;
    write_atomic(&run_dir.join(FILE), &text, 0o600).map(drop)
}

/// The size of each map of v1: the one that it had, else that of the present configuration or of
/// v1's.
pub fn read(run_dir: &Path, present: &MapSizes) -> BTreeMap<String, u32> {
    use v1::map::{BACKENDS, CT4, CT6, FRAG4, FRAG6, SVC4, SVC6};
    let MapSizes { services, backends, frags, .. } = *present;
    let mut sizes: BTreeMap<String, u32> = [
        (SVC4, services),
        (SVC6, services),
        (BACKENDS, backends),
        (CT4, CONNECTIONS),
        (CT6, CONNECTIONS),
        (FRAG4, frags),
        (FRAG6, frags),
    ]
    .map(|(name, size)| (name.to_owned(), size))
    .into();
    // Without the file no agent of v1 has run since the last boot.
    let kept = std::fs::read(run_dir.join(FILE)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let kept: BTreeMap<String, u32> = kept.unwrap_or_default();
    sizes.extend(kept.into_iter().filter(|(name, size)| v1::map::ALL.contains(&name.as_str()) && *size > 0));
    sizes
}

#[cfg(test)]
mod tests {
    use super::{read, write};
    use crate::config::MapSizes;
    use rustnet_common::v1;
    use std::collections::BTreeMap;

    #[test]
    fn sizes_are_those_that_v1_had() {
        let dir = tempfile::tempdir().unwrap();
        let present = MapSizes { services: 77, ..MapSizes::default() };
        let sizes = read(dir.path(), &present);
        assert_eq!((sizes["rn_svc4"], sizes["rn_ct6"]), (77, 131_072));
        let had = BTreeMap::from([("rn_ct4".to_owned(), 4096), ("rn_svc4".to_owned(), 512), ("other".to_owned(), 1)]);
        write(dir.path(), &had).unwrap();
        let sizes = read(dir.path(), &present);
        assert_eq!((sizes["rn_ct4"], sizes["rn_svc4"], sizes["rn_svc6"]), (4096, 512, 77));
        assert!(
            sizes
                .keys()
                .map(String::as_str)
                .eq(v1::RETIRED.map(|shape| shape.name).into_iter().collect::<std::collections::BTreeSet<_>>())
        );
    }
}
