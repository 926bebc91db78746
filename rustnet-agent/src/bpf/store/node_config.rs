//! `rn_config`: the one element that tells the programs about their node.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustnet_common::config::{NodeConfig, flags, meaning};
use rustnet_common::names::map;

use super::Map;

/// The node's settings.
pub struct NodeConfigStore {
    map: Map<u32, NodeConfig>,
}

impl NodeConfigStore {
    /// Opens the pin in `bpffs`.
    ///
    /// # Errors
    /// There is none, or a later release has written the maps: their values may mean something else by now.
    pub fn open(bpffs: &Path) -> Result<Self> {
        let store = Self { map: Map::open(bpffs, map::CONFIG)? };
        let found = store.read()?.meaning();
        ensure!(
            (0..=meaning::PRESENT).contains(&found),
            "{}: a later release has written the maps (meaning {found}, this one knows up to {}): use that release, or remove all \
             state, connections included, with `rustnet cleanup`",
            map::CONFIG,
            meaning::PRESENT
        );
        Ok(store)
    }

    /// What the programs see now.
    pub fn read(&self) -> Result<NodeConfig> {
        self.map.get(&0)?.context("rn_config has no element")
    }

    /// Writes `config` if it differs; true when it did.
    pub fn write(&self, config: &NodeConfig) -> Result<bool> {
        let config = config.with_meaning(meaning::PRESENT);
        let differs = self.read()? != config;
        if differs {
            self.map.put(&0, &config)?;
        }
        Ok(differs)
    }
    /// Has the programs write and take off the overlay's headers, or leave both to its device; true when that is a change.
    pub fn set_encapsulate(&self, is_on: bool) -> Result<bool> {
        let mut config = self.read()?;
        let flags = config.flags & !flags::ENCAPSULATE;
        config.flags = if is_on { flags | flags::ENCAPSULATE } else { flags };
        self.write(&config)
    }
}
