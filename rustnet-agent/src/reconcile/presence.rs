//! How the `rustnet` command finds an agent's state: a file next to `node.json`, and a lock that
//! lives as long as an agent. A second lock lets one agent write at a time.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
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
/// Name of the lock of the agent that writes, in the run directory.
pub const WRITER_LOCK: &str = "writer.lock";

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
        make_dir(run_dir)?;
        let mut text = serde_json::to_string_pretty(self).context(FILE)?;
        text.push('\n');
        write_atomic(&run_dir.join(FILE), text.as_bytes(), 0o600).map(drop)
    }
}

/// True if an agent serves a run directory.
pub fn is_served(run_dir: &Path) -> bool {
    run_dir.join(LOCK).exists() && matches!(Presence::exclude(run_dir), Ok(None))
}

/// Says, as long as it lives, that an agent serves a run directory.
#[derive(Debug)]
pub struct Presence {
    here: Flock<File>,
    /// The right to write maps, hooks and files; one agent has it.
    writer: Option<Flock<File>>,
}

impl Presence {
    /// Says that an agent is here and may write. Does not wait: `Err` within says who has to end first.
    ///
    /// A lock file that everybody may open can be locked by everybody. If `may_replace` holds, such a file is replaced
    /// instead of waited for.
    ///
    /// # Errors
    /// The run directory or a file in it cannot be made, opened or closed to others.
    pub fn enter(run_dir: &Path, may_replace: bool) -> Result<Result<Self, String>> {
        close_dir(run_dir)?;
        let here = lock(run_dir, LOCK, FlockArg::LockSharedNonblock, may_replace)?;
        let Some(here) = here else { return Ok(Err(no_agent(run_dir))) };
        let writer = lock(run_dir, WRITER_LOCK, FlockArg::LockExclusiveNonblock, may_replace)?;
        let Some(mut writer) = writer else { return Ok(Err(another(run_dir))) };
        note_holder(&mut writer, run_dir)?;
        Ok(Ok(Self { here, writer: Some(writer) }))
    }

    /// Takes locks again whose files somebody has deleted: another agent would find them free. `Err` within says who has found
    /// them so.
    ///
    /// # Errors
    /// As of [`Presence::enter`].
    pub fn hold(&mut self, run_dir: &Path) -> Result<Result<(), String>> {
        if !is_in_place(&self.here, &run_dir.join(LOCK)) {
            close_dir(run_dir)?;
            let here = lock(run_dir, LOCK, FlockArg::LockSharedNonblock, false)?;
            let Some(here) = here else { return Ok(Err(no_agent(run_dir))) };
            self.here = here;
        }
        if self.writer.as_ref().is_some_and(|it| !is_in_place(it, &run_dir.join(WRITER_LOCK))) {
            let writer = lock(run_dir, WRITER_LOCK, FlockArg::LockExclusiveNonblock, false)?;
            let Some(mut writer) = writer else { return Ok(Err(another(run_dir))) };
            note_holder(&mut writer, run_dir)?;
            self.writer = Some(writer);
        }
        Ok(Ok(()))
    }

    /// Keeps agents away while the state is removed; `None` if one is here.
    ///
    /// # Errors
    /// The run directory or the lock in it cannot be made or opened.
    pub fn exclude(run_dir: &Path) -> Result<Option<Self>> {
        make_dir(run_dir)?;
        let lock = lock(run_dir, LOCK, FlockArg::LockExclusiveNonblock, false)?;
        Ok(lock.map(|here| Self { here, writer: None }))
    }
}

/// Why an agent may not be here.
fn no_agent(run_dir: &Path) -> String {
    format!(
        "{} is locked by a process that is no agent: wait for the end of `rustnet cleanup`, or end the process that `lslocks` shows",
        run_dir.join(LOCK).display()
    )
}

/// Why an agent may not write.
fn another(run_dir: &Path) -> String {
    let path = run_dir.join(WRITER_LOCK);
    let holder = std::fs::read_to_string(&path).unwrap_or_default();
    let holder = if holder.is_empty() { "unknown" } else { holder.trim() };
    format!(
        "another agent ({holder}) writes the maps of this node and holds {}: this one goes on when that one ends; two \
         installations of rustnet cannot serve one node",
        path.display()
    )
}

fn note_holder(writer: &mut Flock<File>, run_dir: &Path) -> Result<()> {
    let holder = format!("pid {}, version {}\n", std::process::id(), env!("CARGO_PKG_VERSION"));
    let note = writer.set_len(0).and_then(|()| writer.write_all(holder.as_bytes()));
    note.with_context(|| format!("{}: cannot write", run_dir.join(WRITER_LOCK).display()))
}

/// True if `path` still names the file of this lock.
fn is_in_place(lock: &Flock<File>, path: &Path) -> bool {
    let inode = lock.metadata().map(|it| it.ino());
    inode.is_ok_and(|inode| std::fs::symlink_metadata(path).is_ok_and(|now| now.ino() == inode))
}

/// Makes the run directory, for root alone.
fn make_dir(run_dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(run_dir);
    made.with_context(|| format!("{}: cannot make the run directory", run_dir.display()))
}

/// The same for one that was made for everybody. A directory such as `/run` is others', too.
fn close_dir(run_dir: &Path) -> Result<()> {
    make_dir(run_dir)?;
    let is_shared = run_dir.parent().is_none_or(|parent| parent.parent().is_none());
    let close = || -> std::io::Result<()> {
        if !is_shared && std::fs::metadata(run_dir)?.mode() & 0o077 != 0 {
            std::fs::set_permissions(run_dir, Permissions::from_mode(0o700))?;
        }
        Ok(())
    };
    close().with_context(|| format!("{}: cannot close it to other users", run_dir.display()))
}

/// Takes a lock at once; `None` if somebody has it.
fn lock(run_dir: &Path, name: &str, how: FlockArg, may_replace: bool) -> Result<Option<Flock<File>>> {
    let path = run_dir.join(name);
    let shown = path.display();
    loop {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path).with_context(|| format!("{shown}: cannot open"))?;
        let meta = file.metadata().with_context(|| format!("{shown}: cannot look at it"))?;
        let is_open_to_all = meta.mode() & 0o077 != 0;
        match Flock::lock(file, how) {
            // Not if it was replaced meanwhile.
            Ok(lock) if std::fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == meta.ino()) => {
                if is_open_to_all {
                    let closed = lock.set_permissions(Permissions::from_mode(0o600));
                    closed.with_context(|| format!("{shown}: cannot close it to other users"))?;
                }
                return Ok(Some(lock));
            }
            Ok(_) => {}
            Err((_, Errno::EWOULDBLOCK)) if is_open_to_all && may_replace => {
                tracing::warn!("{shown} was open to all users and is locked: it is replaced");
                std::fs::remove_file(&path).with_context(|| format!("{shown}: cannot remove"))?;
            }
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno).with_context(|| format!("{shown}: cannot lock")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AgentFile, File, LOCK, Permissions, Presence, WRITER_LOCK, is_served};
    use std::collections::BTreeMap;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use std::path::Path;

    fn enter(dir: &Path) -> Presence {
        Presence::enter(dir, false).unwrap().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn cleanup_is_kept_out_while_an_agent_lives() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_served(dir.path()) && !is_served(Path::new("/nonexistent")));
        let agent = enter(dir.path());
        assert!(Presence::exclude(dir.path()).unwrap().is_none());
        assert!(is_served(dir.path()));
        drop(agent);
        let cleanup = Presence::exclude(dir.path()).unwrap().unwrap();
        let why = Presence::enter(dir.path(), true).unwrap().unwrap_err();
        assert!(why.contains("agent.lock") && why.contains("rustnet cleanup"), "{why}");
        drop(cleanup);
        assert!(!is_served(dir.path()));
        enter(dir.path());
    }

    #[test]
    fn one_agent_writes_and_the_next_learns_which() {
        let dir = tempfile::tempdir().unwrap();
        let one = enter(dir.path());
        let why = Presence::enter(dir.path(), true).unwrap().unwrap_err();
        assert!(
            why.contains(&format!("(pid {}, version ", std::process::id())) && why.contains("writer.lock"),
            "{why}"
        );
        drop(one);
        enter(dir.path());
    }

    #[test]
    fn nobody_else_can_open_the_locks() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        std::fs::set_permissions(&run, Permissions::from_mode(0o755)).unwrap();
        std::fs::write(run.join(LOCK), "").unwrap();
        std::fs::set_permissions(run.join(LOCK), Permissions::from_mode(0o644)).unwrap();
        drop(enter(&run));
        assert_eq!((mode(&run), mode(&run.join(LOCK)), mode(&run.join(WRITER_LOCK))), (0o700, 0o600, 0o600));
    }

    #[test]
    fn a_lock_that_anybody_could_take_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for name in [LOCK, WRITER_LOCK] {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            let other = File::open(&path).unwrap();
            other.lock().unwrap();
            assert!(Presence::enter(dir.path(), false).unwrap().is_err(), "{name}");
            drop(Presence::enter(dir.path(), true).unwrap().unwrap());
            assert_eq!(mode(&path), 0o600);
        }
    }

    #[test]
    fn a_symbolic_link_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join(LOCK)).unwrap();
        let error = format!("{:#}", Presence::enter(dir.path(), true).unwrap_err());
        assert!(error.contains("agent.lock"), "{error}");
        assert!(!dir.path().join("elsewhere").exists());
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
