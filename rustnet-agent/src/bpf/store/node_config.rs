//! `rn_config`: the one element that tells the programs about their node.

use std::path::Path;

use anyhow::{Context, Result};
use rustnet_common::config::NodeConfig;
use rustnet_common::names::map;

use super::Map;

/// The node's settings.
pub struct NodeConfigStore {
    map: Map<u32, NodeConfig>,
}

impl NodeConfigStore {
    /// Opens the pin in `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self> {
        Ok(Self { map: Map::open(bpffs, map::CONFIG)? })
    }

    /// What the programs see now.
    pub fn read(&self) -> Result<NodeConfig> {
        self.map.get(&0)?.context("rn_config has no element")
    }

    /// Writes `config` if it differs; true when it did.
    pub fn write(&self, config: &NodeConfig) -> Result<bool> {
        let differs = self.read()? != *config;
        if differs {
            self.map.put(&0, config)?;
        }
        Ok(differs)
    }
}
