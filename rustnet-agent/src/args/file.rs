//! The settings of the file that `--config` names.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};

use super::settings::{self, Arity};

/// Reads the file: scalars and sequences of scalars as text, by key.
///
/// # Errors
/// A file that cannot be read or is no mapping, and all unknown keys and misplaced values in it.
pub fn read(path: &Path) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{shown}: cannot read the configuration file; check --config and its permissions"))?;
    if text.trim().is_empty() {
        return Ok(BTreeMap::new());
    }
    let value: serde_json::Value =
        serde_saphyr::from_str(&text).with_context(|| format!("{shown}: not valid YAML or JSON"))?;
    let map = match value {
        serde_json::Value::Null => return Ok(BTreeMap::new()),
        serde_json::Value::Object(map) => map,
        _ => bail!("{shown}: the top level must be a mapping, such as `routing: vxlan`"),
    };
    let mut out = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, value) in map {
        let Some(setting) = settings::all().find(|setting| setting.key == key) else {
            problems.push(unknown_key(&key));
            continue;
        };
        match scalars(&value) {
            Some(texts) if texts.len() > 1 && setting.arity != Arity::Many => {
                problems.push(format!("key {key}: takes one value, not a sequence of {}", texts.len()));
            }
            Some(texts) => {
                if !texts.is_empty() || setting.arity == Arity::Many && !value.is_null() {
                    out.insert(key, texts);
                }
            }
            None => problems
                .push(format!("key {key}: neither a value nor a sequence of values; write `{key}: {}`", setting.value)),
        }
    }
    if !problems.is_empty() {
        bail!("{shown}: {}", problems.join("\n  "));
    }
    Ok(out)
}

/// The text of a scalar or of a sequence of scalars; `None` for mappings and deeper nesting.
fn scalars(value: &serde_json::Value) -> Option<Vec<String>> {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match value {
        Null => Some(Vec::new()),
        Bool(value) => Some(vec![value.to_string()]),
        Number(value) => Some(vec![value.to_string()]),
        String(value) => Some(vec![value.clone()]),
        Array(values) => values
            .iter()
            .map(|value| if value.is_array() { None } else { scalars(value) })
            .collect::<Option<Vec<_>>>()
            .map(|values| values.concat()),
        Object(_) => None,
    }
}

fn unknown_key(key: &str) -> String {
    let lower = key.to_lowercase().replace(['-', '_'], "");
    let nearest = settings::all()
        .map(|setting| (strsim::levenshtein(&lower, &setting.key.to_lowercase()), setting.key))
        .min()
        .filter(|(distance, near)| *distance <= near.len().max(3) / 3);
    match nearest {
        Some((_, near)) => format!("unknown key {key}: did you mean {near}?"),
        None => format!("unknown key {key}: `rustnet-agent --help` lists the keys"),
    }
}

#[cfg(test)]
mod tests {
    use super::unknown_key;

    #[test]
    fn the_nearest_key_is_offered() {
        for (wrong, right) in [
            ("podCidrs", "podCIDRs"),
            ("pod-cidrs", "podCIDRs"),
            ("upLink", "uplink"),
            ("uplinks", "uplink"),
            ("routingMode", "`rustnet-agent --help`"),
            ("overlay_port", "overlayPort"),
            ("masqurade", "masquerade"),
            ("xyz", "`rustnet-agent --help`"),
        ] {
            assert!(unknown_key(wrong).contains(right), "{wrong}: {}", unknown_key(wrong));
        }
    }
}
