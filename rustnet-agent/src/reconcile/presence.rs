//! How the `rustnetctl` command finds an agent's state: a file next to `node.json`, and a lock that
//! lives as long as an agent.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, create_dir_all};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::install::write_atomic;

/// Name of the file in the run directory.
pub const FILE: &str = "agent.json";
/// Name of the lock in the run directory.
pub const LOCK: &str = "agent.lock";

/// Where the last agent that served a run directory keeps its things.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentFile {
    /// Version of the agent.
    pub version: String,
    /// Its node.
    pub node_name: String,
    /// Where it pins.
    pub bpffs: PathBuf,
    /// The word of its routing mode.
    pub routing: String,
    /// Where it answers probes.
    #[serde(default)]
    pub health_addr: Option<std::net::SocketAddr>,
    /// Where it installed the CNI binary.
    #[serde(default)]
    pub cni_bin_dir: Option<PathBuf>,
    /// Where it installed the CNI configuration.
    #[serde(default)]
    pub cni_conf_dir: Option<PathBuf>,
    /// Its settings, by flag; a missing one is at its default.
    #[serde(default)]
    pub settings: BTreeMap<String, Vec<String>>,
}

impl AgentFile {
    /// What to write for a configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node_name: config.node_name.clone(),
            bpffs: config.bpffs.clone(),
            routing: config.routing.word().to_owned(),
            health_addr: config.health_addr,
            cni_bin_dir: config.cni_bin_dir.clone(),
            cni_conf_dir: config.cni_conf_dir.clone(),
            settings: config.chosen.clone(),
        }
    }

    /// Reads the file of a run directory; `None` where no agent has run.
    pub fn read(run_dir: &Path) -> Result<Option<Self>> {
        let path = run_dir.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| {
                format!("{}: not an agent's file; remove it, the agent writes it again", path.display())
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("{}: cannot read", path.display())),
        }
    }

    /// Writes the file.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        create_dir_all(run_dir).with_context(|| format!("{}: cannot make the run directory", run_dir.display()))?;
        let mut text = serde_json::to_string_pretty(self).context(FILE)?;
        text.push('\n');
        write_atomic(&run_dir.join(FILE), text.as_bytes(), 0o644).map(drop)
    }
}

/// True if an agent serves a run directory.
pub fn is_served(run_dir: &Path) -> bool {
    run_dir.join(LOCK).exists() && matches!(Presence::exclude(run_dir), Ok(None))
}

/// Says, as long as it lives, that an agent serves a run directory. Two agents may: one is the other's successor.
#[derive(Debug)]
pub struct Presence {
    _lock: Flock<File>,
}

impl Presence {
    /// Tells that an agent is here.
    pub fn announce(run_dir: &Path) -> Result<Self> {
        lock(run_dir, FlockArg::LockShared).map(|lock| Self { _lock: lock })
    }

    /// Keeps agents away while the state is removed; `None` if one is here.
    pub fn exclude(run_dir: &Path) -> Result<Option<Self>> {
        match lock(run_dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { _lock: lock })),
            Err(e) if e.downcast_ref::<Errno>() == Some(&Errno::EWOULDBLOCK) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

fn lock(run_dir: &Path, how: FlockArg) -> Result<Flock<File>> {
    create_dir_all(run_dir).with_context(|| format!("{}: cannot make the run directory", run_dir.display()))?;
    let path = run_dir.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("{}: cannot open", path.display()))?;
    Flock::lock(file, how)
        .map_err(|(_, errno)| anyhow::Error::from(errno).context(format!("locking {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::{AgentFile, Presence, is_served};
    use std::collections::BTreeMap;

    #[test]
    fn cleanup_is_kept_out_while_any_agent_lives() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_served(dir.path()) && !is_served(std::path::Path::new("/nonexistent")));
        let one = Presence::announce(dir.path()).unwrap();
        let two = Presence::announce(dir.path()).unwrap();
        drop(one);
        assert!(Presence::exclude(dir.path()).unwrap().is_none());
        assert!(is_served(dir.path()));
        drop(two);
        assert!(Presence::exclude(dir.path()).unwrap().is_some());
        assert!(!is_served(dir.path()));
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(AgentFile::read(dir.path()).unwrap(), None);
        let file = AgentFile {
            version: "1".into(),
            node_name: "n1".into(),
            bpffs: "/b".into(),
            routing: "vxlan".into(),
            health_addr: "127.0.0.1:1".parse().ok(),
            cni_bin_dir: None,
            cni_conf_dir: Some("/c".into()),
            settings: BTreeMap::from([("node-name".into(), vec!["n1".into()])]),
        };
        file.write(dir.path()).unwrap();
        assert_eq!(AgentFile::read(dir.path()).unwrap(), Some(file));
        std::fs::write(dir.path().join("agent.json"), "[]").unwrap();
        assert!(format!("{:#}", AgentFile::read(dir.path()).unwrap_err()).contains("agent.json"));
    }
}
