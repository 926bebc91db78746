//! Processes that cannot outlive this one, and the removal of files and control groups that a run leaves.
//!
//! Every child is started by one thread that lives as long as the process does: `PR_SET_PDEATHSIG` watches the *thread*
//! that forked, and test threads come and go. Directories and control groups are registered here and removed by whoever
//! comes first: a `Drop`, the exit handler, or the next run, which sweeps up after a run that was killed.

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// What the exit handler has to remove.
#[derive(Default)]
struct Left {
    pids: BTreeSet<u32>,
    cgroups: Vec<PathBuf>,
    /// The control group that this process was in before it got one of its own.
    cgroup_before: Option<PathBuf>,
    dirs: Vec<PathBuf>,
    counter: u32,
    /// All has been removed: a thread that does not know yet must not begin again.
    over: bool,
}

static LEFT: Mutex<Option<Left>> = Mutex::new(None);
static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();

fn left() -> MutexGuard<'static, Option<Left>> {
    let mut guard = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
    if guard.is_none() {
        *guard = Some(Left::default());
        // SAFETY: the handler is a plain function without arguments.
        unsafe { libc::atexit(at_exit) };
    }
    guard
}

/// Runs `f` on the registry.
fn with_left<T>(f: impl FnOnce(&mut Left) -> T) -> T {
    f(left().get_or_insert_default())
}

extern "C" fn at_exit() {
    clean_up();
}

/// Ends every process that was started here and removes every registered directory and control group. For a signal
/// handling thread and for the end of the process; a `Drop` does the same for its own things.
pub fn clean_up() {
    let (pids, cgroups, cgroup_before, dirs) = with_left(|l| {
        l.over = true;
        let groups = (std::mem::take(&mut l.cgroups), l.cgroup_before.take());
        (std::mem::take(&mut l.pids), groups.0, groups.1, std::mem::take(&mut l.dirs))
    });
    for pid in &pids {
        let _ = kill(Pid::from_raw((*pid).cast_signed()), Signal::SIGKILL);
    }
    for pid in &pids {
        let _ = nix::sys::wait::waitpid(Pid::from_raw((*pid).cast_signed()), None);
    }
    if let Some(before) = cgroup_before {
        let _ = std::fs::write(before.join("cgroup.procs"), "0");
    }
    for cgroup in cgroups.iter().rev() {
        remove_cgroup(cgroup);
    }
    for dir in dirs {
        let _ = std::fs::remove_dir_all(dir);
    }
}

/// A control group can be removed once the kernel has reaped its members, which may be a moment after they died.
pub(crate) fn remove_cgroup(path: &Path) -> bool {
    for _ in 0..200 {
        match std::fs::remove_dir(path) {
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => {
                thread::sleep(std::time::Duration::from_millis(2));
            }
            result => return result.is_ok(),
        }
    }
    false
}

/// A name nobody else has: `rn<pid>` for the first, then `rn<pid>b`, `rn<pid>c`...
pub(crate) fn unique_prefix() -> String {
    let n = with_left(|l| {
        l.counter += 1;
        l.counter - 1
    });
    let pid = std::process::id();
    if n == 0 { format!("rn{pid}") } else { format!("rn{pid}x{n}") }
}

/// Creates a directory below the temporary directory, and sweeps up those of runs that were killed.
pub(crate) fn make_dir(name: &str) -> Result<PathBuf> {
    static SWEPT: OnceLock<()> = OnceLock::new();
    let base = std::env::temp_dir();
    SWEPT.get_or_init(|| sweep(&base, |p| drop(std::fs::remove_dir_all(p))));
    let dir = base.join(name);
    with_left(|l| {
        ensure!(!l.over, "everything is being taken down");
        std::fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        l.dirs.push(dir.clone());
        Ok(dir)
    })
}

pub(crate) fn remove_dir(path: &Path) {
    with_left(|l| l.dirs.retain(|d| d != path));
    let _ = std::fs::remove_dir_all(path);
}

/// Creates a version 2 control group for threads of this process and others, where this machine has the hierarchy and lets us.
pub(crate) fn make_cgroup(name: &str) -> Option<PathBuf> {
    static OURS: OnceLock<Option<PathBuf>> = OnceLock::new();
    let path = OURS.get_or_init(own_cgroup).as_ref()?.join(name);
    with_left(|l| {
        (!l.over && std::fs::create_dir(&path).is_ok()).then(|| l.cgroups.push(path.clone()))?;
        std::fs::write(path.join("cgroup.type"), "threaded").ok()?;
        Some(path)
    })
}

/// A group that holds this process: threads can only change between groups below one that holds them all.
fn own_cgroup() -> Option<PathBuf> {
    let root = cgroup2_root()?;
    sweep(&root, remove_cgroup_tree);
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let before = own.lines().find_map(|line| line.strip_prefix("0::"))?.trim_start_matches('/');
    let path = root.join(format!("rn{}", std::process::id()));
    with_left(|l| {
        (!l.over && std::fs::create_dir(&path).is_ok()).then(|| l.cgroups.push(path.clone()))?;
        l.cgroup_before = Some(root.join(before));
        std::fs::write(path.join("cgroup.procs"), "0").ok()?;
        Some(path)
    })
}

/// Removes a control group and those below it.
fn remove_cgroup_tree(path: &Path) {
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup_tree(&entry.path());
        }
    }
    remove_cgroup(path);
}

pub(crate) fn drop_cgroup(path: &Path) {
    // Threads may still be in it: then it goes at the end.
    if remove_cgroup(path) {
        with_left(|l| l.cgroups.retain(|c| c != path));
    }
}

/// Where the version 2 hierarchy is mounted.
fn cgroup2_root() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Removes entries called `rn<pid>...` whose process is no more.
fn sweep(base: &Path, remove: impl Fn(&Path)) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix("rn")) else { continue };
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let ours = !digits.is_empty() && matches!(rest[digits.len()..].chars().next(), None | Some('x' | '-'));
        if ours && !Path::new(&format!("/proc/{digits}")).exists() {
            remove(&entry.path());
        }
    }
}

/// Runs a closure on the thread that never ends, and gives back what it returns.
fn on_spawner<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let spawner = SPAWNER.get_or_init(|| {
        let (tx, rx) = channel::<Job>();
        thread::Builder::new()
            .name("spawner".into())
            .spawn(move || rx.into_iter().for_each(|job| job()))
            .map_or_else(|_| channel().0, |_| tx)
    });
    let (tx, rx) = channel();
    spawner.send(Box::new(move || drop(tx.send(f())))).map_err(|_| anyhow!("the spawning thread is gone"))?;
    rx.recv().context("the spawning thread is gone")
}

/// Prepares a command so that its process dies with ours and is deaf to the terminal's Ctrl-C.
fn tie_to_us(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: only async-signal-safe system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died between the fork and the line above.
            if libc::getppid().cast_unsigned() != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
    command.process_group(0);
}

/// Runs a command to its end and collects what it prints.
pub fn output(mut command: Command) -> Result<Output> {
    let shown = format!("{command:?}");
    on_spawner(move || {
        tie_to_us(&mut command);
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn()
    })?
    .and_then(Child::wait_with_output)
    .with_context(|| format!("cannot run {shown}"))
}

/// Runs a command to its end with `input` as its standard input.
pub fn output_with_input(mut command: Command, input: &[u8]) -> Result<Output> {
    let shown = format!("{command:?}");
    let mut child = on_spawner(move || {
        tie_to_us(&mut command);
        command.stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn()
    })?
    .with_context(|| format!("cannot run {shown}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that exits without reading gives EPIPE; its exit status tells more.
        let _ = std::io::Write::write_all(&mut stdin, input);
    }
    child.wait_with_output().with_context(|| format!("cannot run {shown}"))
}

/// A long-running process; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts it.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let shown = format!("{command:?}");
        let mut child = on_spawner(move || {
            tie_to_us(&mut command);
            command.spawn()
        })?
        .with_context(|| format!("cannot start {shown}"))?;
        let over = with_left(|l| l.over || !l.pids.insert(child.id()));
        if over {
            let _ = child.kill().and_then(|()| child.wait());
            bail!("cannot start {shown}: everything is being taken down");
        }
        Ok(Self { child })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).with_context(|| format!("cannot send {signal}"))
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.child.wait().unwrap_or_else(|_| ExitStatus::from_raw(0));
        let pid = self.pid();
        with_left(|l| l.pids.remove(&pid));
        status
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.wait();
    }
}

/// A directory of one run; removed when dropped.
#[derive(Debug)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    /// Makes one whose name begins with `prefix`.
    pub fn make(prefix: &str) -> Result<Self> {
        Ok(Self(make_dir(prefix)?))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_only_what_dead_runs_left() -> Result<()> {
        let base = std::env::temp_dir().join(format!("sweep-test-{}", std::process::id()));
        // 4194304 is above the largest pid_max there is.
        for name in ["rn4194305", "rn4194305x2", "rn4194305-n1", "rnfoo", "rn", "rn4194305y", &unique_prefix()] {
            std::fs::create_dir_all(base.join(name))?;
        }
        sweep(&base, |p| drop(std::fs::remove_dir_all(p)));
        let kept: BTreeSet<String> =
            std::fs::read_dir(&base)?.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
        std::fs::remove_dir_all(&base)?;
        assert_eq!(kept.len(), 4, "{kept:?}");
        assert!(kept.contains("rn4194305y"));
        Ok(())
    }

    #[test]
    fn a_process_outlives_the_thread_that_asked_for_it_and_dies_with_its_handle() -> Result<()> {
        let asked = thread::spawn(|| {
            let mut sleep = Command::new("sleep");
            sleep.arg("1000");
            Process::spawn(sleep)
        });
        let mut process = asked.join().map_err(|_| anyhow!("panicked"))??;
        assert!(process.ended().is_none(), "the parent-death signal went to the wrong thread");
        let proc_dir = PathBuf::from(format!("/proc/{}", process.pid()));
        drop(process);
        assert!(!proc_dir.exists());
        Ok(())
    }
}
