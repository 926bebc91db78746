//! What runs inside: xtask itself as the first process of the guest. It mounts, loads modules, works through the steps, and
//! powers off. What it finds out goes to the second serial port in lines that [`super::protocol`] describes.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

use super::guest_files::{MODULES, PATH, POLICY, STEPS};
use super::protocol::Message;
use super::step::{OBJECT, Step};
use crate::verify;

/// The port after the console.
const RESULTS: &str = "/dev/ttyS1";
/// What is written there is AppArmor's policy from then on.
const APPARMOR: &str = "/sys/kernel/security/apparmor/.load";
/// A step that lasts longer is ended; the steps after it run.
const STEP_LIMIT: Duration = Duration::from_mins(20);

/// Options of the guest's role.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Work through the steps, as the child of the first process
    #[arg(long)]
    work: bool,
}

/// The role.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.work {
        work()?;
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(nix::unistd::getpid() == Pid::from_raw(1), "guest: for the first process of a virtual machine alone");
    if let Err(error) = first() {
        eprintln!("guest: {error:#}");
    }
    // SAFETY: takes no pointer, and does not return here.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    bail!("powering off: {}", std::io::Error::last_os_error())
}

/// The first process: it has to reap whatever is orphaned, so that the work is another's.
fn first() -> Result<()> {
    mounts()?;
    let child = Command::new("/proc/self/exe").args(["guest", "--work"]).env("PATH", PATH).spawn();
    let child = Pid::from_raw(child.context("starting the work")?.id().cast_signed());
    loop {
        match wait().context("waiting for the work")? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == child => return Ok(()),
            _ => {}
        }
    }
}

fn mounts() -> Result<()> {
    let all = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("securityfs", "/sys/kernel/security"),
    ];
    for (kind, at) in all {
        fs::create_dir_all(at).with_context(|| format!("making {at}"))?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting {kind} on {at}"))?;
    }
    Ok(())
}

/// The second serial port, shared by the threads that follow a step's outputs.
#[derive(Clone)]
struct Results(Arc<Mutex<File>>);

impl Results {
    fn open() -> Result<Self> {
        let port = File::options().write(true).open(RESULTS).with_context(|| format!("opening {RESULTS}"))?;
        Ok(Self(Arc::new(Mutex::new(port))))
    }

    fn say(&self, message: &Message) {
        let line = format!("{message}\n");
        // There is nobody else to tell that this port fails.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
    }
}

fn work() -> Result<()> {
    let results = Results::open()?;
    if let Err(error) = everything(&results) {
        results.say(&Message::Trouble(format!("{error:#}")));
        return Err(error);
    }
    // The port is closed before the machine ends, and is empty then.
    results.say(&Message::Done);
    Ok(())
}

fn everything(results: &Results) -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("asking for the kernel's release")?;
    results.say(&Message::Kernel(release.trim().to_owned()));
    modules()?;
    // The whole policy in one write: the kernel takes no pieces.
    let policy = fs::read(POLICY).with_context(|| format!("reading {POLICY}"))?;
    fs::write(APPARMOR, policy).with_context(|| format!("loading the policy by {APPARMOR}"))?;
    match verify::programs(Path::new(OBJECT), Path::new("/sys/fs/bpf/verify")) {
        Ok(programs) => {
            for (name, info) in programs {
                results.say(&Message::Program { name, verified: info.verified, machine_code: info.machine_code });
            }
        }
        Err(error) => {
            for line in verify::last_words(&format!("{error:#}")) {
                results.say(&Message::Refused(line.to_owned()));
            }
        }
    }
    let steps = fs::read(STEPS).with_context(|| format!("reading {STEPS}"))?;
    let steps: Vec<Step> = serde_json::from_slice(&steps).with_context(|| format!("understanding {STEPS}"))?;
    for step in &steps {
        results.say(&Message::Begin(step.name.clone()));
        let start = Instant::now();
        let success = step_of(step, results)?;
        let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        results.say(&Message::End { name: step.name.clone(), success, millis });
    }
    Ok(())
}

fn modules() -> Result<()> {
    let entries = fs::read_dir(MODULES).with_context(|| format!("reading {MODULES}"))?;
    let mut files: Vec<_> = entries.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    for path in files {
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: the descriptor is open and the parameters are an empty string.
        let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if done != 0 {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("loading {}", path.display()));
        }
    }
    Ok(())
}

/// Runs one step, its words passed on line by line; tells whether it succeeded.
fn step_of(step: &Step, results: &Results) -> Result<bool> {
    let mut command = Command::new(&step.program);
    command.args(&step.args).envs(step.env.iter().map(|(k, v)| (k, v)));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {}", step.program))?;
    let end = Instant::now() + STEP_LIMIT;
    let readers = [child.stdout.take().map(|s| follow(s, results)), child.stderr.take().map(|s| follow(s, results))];
    let status = loop {
        if let Some(status) = child.try_wait().context("waiting for a step")? {
            break Some(status);
        }
        if Instant::now() > end {
            results.say(&Message::Text(format!("ended after {} s", STEP_LIMIT.as_secs())));
            child.kill().context("ending a step")?;
            break child.wait().ok();
        }
        thread::sleep(Duration::from_millis(20));
    };
    for reader in readers.into_iter().flatten() {
        // A reader that panicked has only lost lines.
        let _ = reader.join();
    }
    Ok(status.is_some_and(|s: ExitStatus| s.success()))
}

fn follow(stream: impl std::io::Read + Send + 'static, results: &Results) -> thread::JoinHandle<()> {
    let results = results.clone();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            results.say(&Message::Text(String::from_utf8_lossy(&line).trim_end().to_owned()));
        }
    })
}
