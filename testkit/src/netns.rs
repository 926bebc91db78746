//! A namespace and how to be inside: closures run in a thread that enters it, commands enter before they exec.

use crate::janitor::{self, Process};
use anyhow::{Context, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::{File, OpenOptions};
use std::io::{Error, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Handle to a network namespace (for nodes: with a mount namespace and a control group of its own). Cheap to clone;
/// the namespace lives as long as its [`Holder`], or any socket in it.
#[derive(Clone, Debug)]
pub struct Netns {
    name: Arc<str>,
    pid: u32,
    net: Arc<OwnedFd>,
    mounts: Option<Arc<OwnedFd>>,
    cgroup: Option<Arc<PathBuf>>,
}

/// Keeps a namespace alive, by a sleeping process that is called like it.
#[derive(Debug)]
pub struct Holder {
    netns: Netns,
    _process: Process,
}

/// What a namespace has of its own, in addition to interfaces.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Its own mounts: a private copy of the tree, with `/sys` of this network namespace.
    pub mounts: bool,
    /// Its processes belong to this control group.
    pub cgroup: Option<PathBuf>,
}

impl Holder {
    /// Makes a new network namespace with loopback up.
    pub fn new(name: &str, own: Own) -> Result<Self> {
        let mut command = sleeper(name);
        let cgroup = own.cgroup.as_deref().map(open_procs).transpose()?;
        let flags = if own.mounts { libc::CLONE_NEWNET | libc::CLONE_NEWNS } else { libc::CLONE_NEWNET };
        let procs = cgroup.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: only async-signal-safe system calls between fork and exec; the descriptor is open until after spawn.
        unsafe {
            command.pre_exec(move || {
                join_cgroup(procs)?;
                if libc::unshare(flags) != 0 {
                    return Err(Error::last_os_error());
                }
                Ok(())
            });
        }
        let process = spawn_keeping(command, cgroup).with_context(|| {
            format!("cannot create the namespaces of {name}: this needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN)")
        })?;
        let pid = process.pid();
        let open = |kind: &str| -> Result<Arc<OwnedFd>> {
            let path = format!("/proc/{pid}/ns/{kind}");
            Ok(Arc::new(File::open(&path).with_context(|| format!("cannot open {path}"))?.into()))
        };
        let mounts = if own.mounts { Some(open("mnt")?) } else { None };
        let netns = Netns { name: name.into(), pid, net: open("net")?, mounts, cgroup: own.cgroup.map(Arc::new) };
        let holder = Self { netns, _process: process };
        if own.mounts {
            holder.run(own_mounts)??;
        }
        holder.ip("link set lo up")?;
        Ok(holder)
    }

    /// Holds a network namespace that somebody else made, by a file that stands for it.
    pub fn of(name: &str, file: &Path) -> Result<Self> {
        let net = File::open(file).with_context(|| format!("cannot open the namespace {}", file.display()))?;
        let mut command = sleeper(name);
        let fd = net.as_raw_fd();
        // SAFETY: only an async-signal-safe system call between fork and exec; the file is open until after spawn.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(fd, libc::CLONE_NEWNET) == 0 { Ok(()) } else { Err(Error::last_os_error()) }
            });
        }
        let process = Process::spawn(command).with_context(|| format!("cannot enter {}", file.display()))?;
        let netns =
            Netns { name: name.into(), pid: process.pid(), net: Arc::new(net.into()), mounts: None, cgroup: None };
        Ok(Self { netns, _process: process })
    }
}

/// The process of a [`Holder`].
fn sleeper(name: &str) -> Command {
    let mut command = Command::new("sleep");
    command.arg0(name).arg("infinity").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

impl std::ops::Deref for Holder {
    type Target = Netns;
    fn deref(&self) -> &Netns {
        &self.netns
    }
}

/// Cuts the mount namespace off from its parent's and shows the devices of its own network namespace in `/sys`.
fn own_mounts() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make mounts private")?;
    // A new sysfs hides what is mounted below the old one: the control groups are carried over.
    let aside = "/mnt";
    let cgroups = "/sys/fs/cgroup";
    mount(Some(cgroups), aside, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .context("cannot bind control groups")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("cannot mount sysfs")?;
    mount(Some(aside), cgroups, none, MsFlags::MS_MOVE, none).context("cannot move control groups")?;
    Ok(())
}

fn open_procs(cgroup: &Path) -> Result<File> {
    let path = cgroup.join("cgroup.procs");
    OpenOptions::new().write(true).open(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// Moves the calling process into the control group whose `cgroup.procs` this is. Async-signal-safe.
fn join_cgroup(procs: Option<RawFd>) -> std::io::Result<()> {
    let Some(fd) = procs else { return Ok(()) };
    // SAFETY: the buffer is one byte long; "0" stands for the writer.
    if unsafe { libc::write(fd, b"0".as_ptr().cast(), 1) } == 1 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Spawns and only then lets go of a file that the child needs before it execs.
fn spawn_keeping(command: Command, file: Option<File>) -> Result<Process> {
    let process = Process::spawn(command);
    drop(file);
    process
}

/// A command together with the descriptors that it needs until it has started.
pub struct NsCommand {
    command: Command,
    keep: Vec<Arc<OwnedFd>>,
    procs: Option<File>,
}

impl NsCommand {
    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// The command itself, for what has no method here.
    pub fn inner(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts it as a process that dies with ours.
    pub fn spawn(self) -> Result<Process> {
        let process = Process::spawn(self.command);
        drop((self.keep, self.procs));
        process
    }

    /// Runs it to its end, with an optional standard input.
    pub fn output(self, input: Option<&[u8]>) -> Result<std::process::Output> {
        let output = match input {
            Some(input) => janitor::output_with_input(self.command, input),
            None => janitor::output(self.command),
        };
        drop((self.keep, self.procs));
        output
    }

    /// Where its standard output goes, for [`NsCommand::spawn`].
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.command.stdout(stdout);
        self
    }

    /// Where its standard error goes, for [`NsCommand::spawn`].
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.command.stderr(stderr);
        self
    }

    /// Runs it to its end and gives what it printed; failure is an error with both outputs.
    pub fn text(self) -> Result<String> {
        let shown = format!("{:?}", self.command);
        let output = self.output(None)?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("{shown}: {}: {}{}", output.status, stdout, stderr.trim());
        }
        Ok(stdout.into_owned())
    }
}

impl Netns {
    /// The name, `rn<pid>-...`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process to enter: `nsenter -t PID -n -m`.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Path by which other programs find the network namespace.
    pub fn net_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }

    /// How to look inside, as a person types it.
    pub fn enter_hint(&self) -> String {
        format!("nsenter -t {} -n{}", self.pid, if self.mounts.is_some() { " -m" } else { "" })
    }

    fn enter(&self) -> Result<()> {
        if let Some(cgroup) = &self.cgroup {
            let threads = cgroup.join("cgroup.threads");
            std::fs::write(&threads, "0").with_context(|| format!("cannot join {}", threads.display()))?;
        }
        if let Some(mounts) = &self.mounts {
            unshare(CloneFlags::CLONE_FS).context("cannot unshare the working directory")?;
            setns(mounts, CloneFlags::CLONE_NEWNS)
                .with_context(|| format!("cannot enter the mounts of {}", self.name))?;
        }
        setns(&self.net, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {}", self.name))
    }

    /// Runs a closure inside, in a thread of its own, and waits for it.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let name = self.name.clone();
        thread::scope(|scope| {
            let inside = scope.spawn(|| self.enter().map(|()| f()));
            match inside.join() {
                Ok(result) => result,
                Err(panic) => Err(anyhow!("a closure inside {name} panicked: {}", panic_text(&*panic))),
            }
        })
    }

    /// Runs a closure inside as the user "nobody", without any capability: what a process of an
    /// ordinary container may do, less raw sockets.
    pub fn run_unprivileged<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.run(|| crate::raw::drop_privileges().and_then(|()| f()))?
    }

    /// Runs a closure inside that may outlive the caller.
    pub fn thread<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<Result<T>>> {
        let netns = self.clone();
        thread::Builder::new()
            .name(self.name.to_string())
            .spawn(move || netns.enter().map(|()| f()))
            .context("cannot start a thread")
    }

    /// A command that will run inside: in its network, its mounts and its control group.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<NsCommand> {
        let mut command = Command::new(program);
        let procs = self.cgroup.as_deref().map(|c| open_procs(c)).transpose()?;
        let mut keep = vec![self.net.clone()];
        keep.extend(self.mounts.clone());
        let (net, mounts) = (self.net.as_raw_fd(), self.mounts.as_ref().map(AsRawFd::as_raw_fd));
        let procs_fd = procs.as_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: only async-signal-safe system calls; `NsCommand` keeps the descriptors open until the child has exec'ed.
        unsafe {
            command.pre_exec(move || {
                join_cgroup(procs_fd)?;
                if mounts.is_some_and(|fd| libc::setns(fd, libc::CLONE_NEWNS) != 0)
                    || libc::setns(net, libc::CLONE_NEWNET) != 0
                {
                    return Err(Error::last_os_error());
                }
                Ok(())
            });
        }
        Ok(NsCommand { command, keep, procs })
    }

    /// Runs a program inside and gives its standard output.
    pub fn exec(&self, program: &str, args: &[&str]) -> Result<String> {
        self.command(program)?.args(args).text()
    }

    /// Runs lines of `ip` commands, without the leading `ip`, in one process.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let output = self.command("ip")?.args(["-batch", "-"]).output(Some(batch.as_bytes()))?;
        if !output.status.success() {
            bail!("in {}: ip: {}\nof:\n{batch}", self.name, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Sets a sysctl of this network namespace, by its path below `/proc/sys/net`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.run(|| {
            let mut file = OpenOptions::new().write(true).open(&path)?;
            file.write_all(value.as_bytes())
        })?
        .with_context(|| format!("in {}: cannot write {value} to {path}", self.name))
    }

    /// Reads a sysctl of this network namespace.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = format!("/proc/sys/net/{key}");
        let text = self.run(|| std::fs::read_to_string(&path))?.with_context(|| format!("cannot read {path}"))?;
        Ok(text.trim().to_owned())
    }

    /// Binds the network namespace of `other` to a file, as container runtimes do. In the mounts of `self`, so that the
    /// file is of use only there and goes with them.
    pub fn bind_netns(&self, other: &Self, path: &Path) -> Result<()> {
        let source = other.net_path();
        self.run(|| -> Result<()> {
            File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
            mount(Some(&source), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .with_context(|| format!("cannot bind a network namespace to {}", path.display()))
        })?
    }

    /// Undoes [`Netns::bind_netns`].
    pub fn unbind_netns(&self, path: &Path) -> Result<()> {
        self.run(|| -> Result<()> {
            nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH)
                .with_context(|| format!("cannot unmount {}", path.display()))?;
            std::fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
        })?
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(no text)".into())
}
