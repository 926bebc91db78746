//! Processes that go on after the command: started apart from the terminal, recorded by id and start time (an id alone may
//! be somebody else's by now), each with a log.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::layout::Cluster;
use super::wait;

/// How long the kernel may take to end a killed process.
const PATIENCE: Duration = Duration::from_secs(10);
/// What components see of the environment: nothing of the caller's, no proxies above all.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The recorded processes of a cluster.
pub struct Processes {
    records: PathBuf,
    logs: PathBuf,
}

impl Processes {
    /// Those of this cluster.
    pub fn of(cluster: &Cluster) -> Self {
        Self { records: cluster.dir.join("processes"), logs: cluster.dir.join("logs") }
    }

    /// Starts a program unless it runs already. Returns whether it was started.
    pub fn start(&self, name: &str, argv: &[String]) -> Result<bool> {
        if self.find(name).is_some() {
            return Ok(false);
        }
        fs::create_dir_all(&self.records)?;
        fs::create_dir_all(&self.logs)?;
        let log = File::options().create(true).append(true).open(self.log(name))?;
        let (program, args) = argv.split_first().context("nothing to run")?;
        let home = std::env::var_os("HOME").unwrap_or_else(|| "/root".into());
        let child = Command::new(program)
            .args(args)
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", home)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C at the command is not for them.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {program} for {name}"))?;
        let pid = child.id().cast_signed();
        let started = start_time(pid).with_context(|| format!("{name} ended at once"))?;
        fs::write(self.records.join(name), format!("{pid} {started}\n"))?;
        Ok(true)
    }

    /// The id of a recorded process that lives.
    pub fn find(&self, name: &str) -> Option<Pid> {
        let text = fs::read_to_string(self.records.join(name)).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let pid: i32 = pid.parse().ok()?;
        (start_time(pid)? == started.parse::<u64>().ok()?).then(|| Pid::from_raw(pid))
    }

    /// The only child of a recorded process: what `nsenter` and `unshare` run.
    pub fn child(&self, name: &str) -> Option<Pid> {
        let pid = self.find(name)?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        Some(Pid::from_raw(children.trim().parse().ok()?))
    }

    /// Kills a process and waits until it is gone: nothing that it could still save is wanted.
    pub fn end(&self, name: &str) -> Result<()> {
        if let Some(pid) = self.find(name) {
            // What nsenter runs is the component; nsenter itself would not pass the signal on.
            let target = self.child(name).filter(|_| is_nsenter(pid)).unwrap_or(pid);
            end(target)?;
            end(pid)?;
        }
        match fs::remove_file(self.records.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The names of all records, dead ones included.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.records).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The log of a process.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The last lines of it.
    pub fn tail(&self, name: &str) -> String {
        tail(&self.log(name), 15)
    }
}

/// The last lines of a file; empty when there is none.
pub fn tail(file: &Path, count: usize) -> String {
    let text = fs::read(file).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(count)..];
    let shown = last.iter().flat_map(|line| ["    ".chars().chain(line.chars()).take(400).collect(), "\n".to_owned()]);
    shown.collect()
}

fn is_nsenter(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "nsenter")
}

fn end(pid: Pid) -> Result<()> {
    if kill(pid, Signal::SIGKILL).is_err() || wait::until(PATIENCE, || is_gone(pid)) {
        return Ok(());
    }
    bail!("process {pid} does not end, not even by SIGKILL")
}

/// Whether a process is no more, or only waits for its parent to notice.
fn is_gone(pid: Pid) -> bool {
    // A child of this very command is a zombie until it is waited for.
    let _ = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG));
    stat(pid.as_raw()).is_none_or(|fields| fields[0] == "Z")
}

/// Ticks after boot at which a process started; none when it is not there or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let fields = stat(pid)?;
    if fields[0] == "Z" {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// The fields of `/proc/PID/stat` after the name, which may hold spaces and brackets itself.
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processes(dir: &Path) -> Processes {
        Processes { records: dir.join("processes"), logs: dir.join("logs") }
    }

    fn argv(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_process_is_started_once_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let all = processes(dir.path());
        assert!(all.start("one", &argv(&["sleep", "1000"])).unwrap());
        assert!(!all.start("one", &argv(&["sleep", "1000"])).unwrap());
        let pid = all.find("one").unwrap();
        all.end("one").unwrap();
        assert!(all.find("one").is_none() && is_gone(pid) && all.names().is_empty());
        all.end("one").unwrap();
    }

    #[test]
    fn another_process_of_the_same_id_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let all = processes(dir.path());
        fs::create_dir_all(&all.records).unwrap();
        fs::write(all.records.join("one"), format!("{} 1\n", std::process::id())).unwrap();
        assert!(all.find("one").is_none());
        all.end("one").unwrap();
    }

    #[test]
    fn what_a_process_says_is_in_its_log_and_the_environment_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let all = processes(dir.path());
        all.start("one", &argv(&["sh", "-c", "echo ${CARGO_MANIFEST_DIR-none}; exec sleep 1000"])).unwrap();
        assert!(wait::until(PATIENCE, || all.tail("one") == "    none\n"), "{}", all.tail("one"));
        all.end("one").unwrap();
    }
}
