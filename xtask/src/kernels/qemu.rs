//! One boot: QEMU with the kernel and the files, the guest's messages as they come, and a deadline.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::archive::Kernel;
use super::protocol::Message;

/// Everything in a guest has to be over by then.
const DEADLINE: Duration = Duration::from_mins(45);
/// How many lines of the console tell of a failure.
const LAST_LINES: usize = 30;

/// Boots the kernel on the files, and hands on each message. An error when the guest did not come to its end.
pub fn boot(kernel: &Kernel, files: &Path, dir: &Path, mut on: impl FnMut(Message)) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let initrd = dir.join("initrd");
    let console = dir.join("console.log");
    join(&[files, &kernel.modules], &initrd)?;
    let result = watch(start(kernel, &initrd, &console)?, &mut on);
    result.map_err(|error| error.context(last_lines(&console)))
}

fn start(kernel: &Kernel, initrd: &Path, console: &Path) -> Result<Guest> {
    let mut qemu = Command::new("qemu-system-x86_64");
    // SAFETY: one async-signal-safe system call without pointers; a killed xtask leaves no guest behind.
    unsafe {
        qemu.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let child = qemu
        // Emulated: /dev/kvm inside of a virtual machine may be there and not work. Without cmpxchg16b, whose flags QEMU 7.2
        // gets wrong at times: 6.12 then ends in its memory allocator.
        .args(["-machine", "pc", "-accel", "tcg", "-cpu", "max,cx16=off", "-smp", "2", "-m", "3072"])
        .args(["-nodefaults", "-display", "none", "-nic", "none", "-no-reboot", "-serial"])
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio", "-kernel"])
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 panic=-1 mitigations=off rdinit=/init -- guest"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting qemu-system-x86_64\n  remedy: cargo xtask setup --with kernels")?;
    Ok(Guest(child))
}

/// A running QEMU, ended when dropped.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It has mostly ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn watch(mut guest: Guest, on: &mut impl FnMut(Message)) -> Result<()> {
    let (sender, lines) = mpsc::channel();
    let output = guest.0.stdout.take().context("QEMU has no output")?;
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let end = Instant::now() + DEADLINE;
    let mut done = false;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => match Message::parse(&line) {
                Some(Message::Trouble(why)) => bail!("the guest cannot go on: {why}"),
                Some(message) => {
                    done |= message == Message::Done;
                    on(message);
                }
                None => {}
            },
            Err(RecvTimeoutError::Timeout) => bail!("not over after {} minutes", DEADLINE.as_secs() / 60),
            Err(RecvTimeoutError::Disconnected) if done => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest ended early{}", words(&mut guest)),
        }
    }
}

/// What QEMU itself complained of.
fn words(guest: &mut Guest) -> String {
    let Some(stream) = guest.0.stderr.take() else { return String::new() };
    let lines: Vec<String> = BufReader::new(stream).lines().map_while(Result::ok).collect();
    if lines.is_empty() { String::new() } else { format!("; QEMU: {}", lines.join("; ")) }
}

fn last_lines(console: &PathBuf) -> String {
    let text = fs::read(console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n    ");
    format!("the guest failed\n    the end of {}:\n    {last}\n", console.display())
}

/// Archives one behind the other, which the kernel unpacks in that order.
fn join(parts: &[&Path], to: &Path) -> Result<()> {
    let mut file = File::create(to).with_context(|| format!("writing {}", to.display()))?;
    for part in parts {
        let mut from = File::open(part).with_context(|| format!("opening {}", part.display()))?;
        std::io::copy(&mut from, &mut file).with_context(|| format!("writing {}", to.display()))?;
    }
    Ok(())
}
