//! docs/monitoring.md names each metric, and no other one.

use super::query::used;
use super::{live, read};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;

/// The name by which people know a series: a histogram has three.
fn family(name: &str) -> &str {
    ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name)
}

#[test]
fn each_metric_is_documented_and_no_other_one() -> Result<()> {
    let served = live::all()?;
    let served: BTreeSet<_> = served.0.keys().map(|name| family(name).to_owned()).collect();
    let document = read("docs/monitoring.md")?;
    let named = used(&document, r"`((?:rustnet|kubeproxy|process)_[a-z_]+)[`{]")?;
    let named: BTreeSet<_> = named.iter().map(|name| family(name).to_owned()).collect();
    let (missing, invented): (Vec<_>, Vec<_>) =
        (served.difference(&named).collect(), named.difference(&served).collect());
    ensure!(missing.is_empty() && invented.is_empty(), "not documented: {missing:?}; not served: {invented:?}");
    Ok(())
}
