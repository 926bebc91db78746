//! Alerts, dashboard and their documentation: they ask for what a real agent serves, and Helm, Kustomize and Prometheus take them.
//!
//! An alert for a metric that does not exist never fires, and nobody notices before the night in which it should have. So each
//! expression is parsed, and compared with a scrape of a live agent ([`exposed`]). No API server is needed; the live agent is that of
//! a fabric of one node. Needs root and `cargo xtask dist`, and for the renderers `cargo xtask setup --with kubernetes`.

mod alerts;
mod dashboard;
mod documents;
mod exposed;
mod live;
mod promtool;
mod query;
mod render;

use anyhow::{Context as _, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The root of the tree.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The text of a file, by its path from the root of the tree.
fn read(file: &str) -> Result<String> {
    let path = root().join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// The objects of a YAML text.
fn documents(yaml: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// A text that has to be there.
fn text<'a>(value: &'a Value, what: &str) -> Result<&'a str> {
    value.as_str().with_context(|| format!("{what} is no text: {value}"))
}
