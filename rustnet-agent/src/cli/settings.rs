//! The agent's settings for commands that look at things as an agent would.

use std::path::Path;

use anyhow::Result;
use rustnet_common::names::DEFAULT_RUN_DIR;

use super::Places;
use crate::args::Given;
use crate::config::{Config, Refused};

/// Whose settings count where the command line, the environment and the file are silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Those of the agent of the run directory.
    RunningAgent,
    /// Nobody's: before an agent starts, they would be its predecessor's.
    OwnAlone,
}

/// The configuration that an agent with these settings would have; `Err` within says why it would refuse them.
///
/// # Errors
/// See [`Given::gather`].
pub fn config(places: &Places, mut given: Given, whose: Whose) -> Result<Result<Config, Refused>> {
    if let Some(bpffs) = places.bpffs.as_ref().filter(|_| places.bpffs_is_given) {
        given.set("bpffs", bpffs.display().to_string());
    }
    if places.run_dir != Path::new(DEFAULT_RUN_DIR) {
        given.set("run-dir", places.run_dir.display().to_string());
    }
    let agent = places.agent.as_ref().filter(|_| whose == Whose::RunningAgent);
    let agent = agent.map(|agent| agent.settings.clone()).unwrap_or_default();
    let env = |name: &str| std::env::var_os(name);
    let in_pod = env("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty());
    Ok(Config::validate(&given.gather(&env, &agent)?, in_pod))
}
