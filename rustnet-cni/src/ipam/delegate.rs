//! Another plugin's addresses: finds the binary in `CNI_PATH`, hands it the whole call, reads its result.

use crate::types::conf::{Attachment, NetConf};
use crate::types::error::{Error, code};
use crate::types::result::AddResult;
use crate::types::version::Version;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A delegated IPAM plugin.
pub struct Delegate<'a> {
    conf: &'a NetConf,
    kind: &'a str,
    binary: PathBuf,
    /// Whether it gets CNI_ARGS.
    passes_args: bool,
}

impl<'a> Delegate<'a> {
    /// The plugin `kind` of a configuration.
    ///
    /// # Errors
    /// It is not the name of a binary, or not in CNI_PATH.
    pub fn find(conf: &'a NetConf, kind: &'a str, path: &[PathBuf]) -> Result<Self, Error> {
        if kind.contains('/') || matches!(kind, "." | "..") {
            return Err(Error::new(code::CONFIG, format!("ipam type {kind:?} is invalid"))
                .details("it is the name of a binary in CNI_PATH, not a path"));
        }
        let is_program = |p: &Path| p.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        match path.iter().map(|dir| dir.join(kind)).find(|p| is_program(p)) {
            Some(binary) => Ok(Self { conf, kind, binary, passes_args: true }),
            None => Err(Error::new(code::CONFIG, format!("IPAM plugin {kind:?} is not in CNI_PATH"))
                .details(format!("looked in {path:?}; install it there or change ipam.type"))),
        }
    }

    /// ADD: addresses, routes and name servers.
    pub fn add(&self) -> Result<AddResult, Error> {
        let out = self.call("ADD", None)?;
        let result: AddResult = serde_json::from_slice(&out).map_err(|e| {
            Error::new(code::DECODE, format!("the result of IPAM plugin {} cannot be read: {e}", self.kind))
        })?;
        if result.ips.is_empty() {
            return Err(Error::new(code::CONFIG, format!("IPAM plugin {} returned no address", self.kind)));
        }
        Ok(result)
    }

    /// CHECK.
    pub fn check(&self) -> Result<(), Error> {
        self.call("CHECK", None).map(drop)
    }

    /// DEL, for the attachment of this call or, from GC and after a failed ADD, for the given one.
    pub fn del(&self, attachment: &Attachment) -> Result<(), Error> {
        let done = self.call("DEL", Some(attachment)).map(drop);
        // host-local refuses arguments that it does not know, and needs none to take an address back. After any other failure the
        // answer to another question is not to be trusted.
        let has_args = std::env::var_os("CNI_ARGS").is_some_and(|args| !args.is_empty());
        if done.as_ref().is_err_and(refuses_args) && has_args {
            let without = Self { passes_args: false, binary: self.binary.clone(), ..*self };
            return without.call("DEL", Some(attachment)).map(drop).or(done);
        }
        done
    }

    /// GC or STATUS. A plugin older than these verbs has nothing to say.
    pub fn optional(&self, verb: &str) -> Result<(), Error> {
        let Err(failure) = self.exec(verb, None, &self.conf.stdin)? else { return Ok(()) };
        let unknown = failure.msg.contains("unknown CNI_COMMAND");
        if unknown || !self.versions().contains(&Version::V110) { Ok(()) } else { Err(self.error(verb, failure)) }
    }

    /// Runs the plugin. One that does not know the configuration's version gets the newest that it does know: Debian's
    /// host-local ends at 1.0.0, and the documented example says 1.1.0.
    fn call(&self, verb: &str, attachment: Option<&Attachment>) -> Result<Vec<u8>, Error> {
        let failure = match self.exec(verb, attachment, &self.conf.stdin)? {
            Ok(out) => return Ok(out),
            Err(f) => f,
        };
        if failure.code == code::VERSION
            && let Some(version) = self.versions().pop()
            && let Ok(Value::Object(mut conf)) = serde_json::from_slice(&self.conf.stdin)
        {
            conf.insert("cniVersion".into(), version.as_str().into());
            let stdin = Value::from(conf).to_string();
            return self.exec(verb, attachment, stdin.as_bytes())?.map_err(|f| self.error(verb, f));
        }
        Err(self.error(verb, failure))
    }

    /// The versions that the plugin speaks and we do, oldest first; none if it does not tell.
    fn versions(&self) -> Vec<Version> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Versions {
            supported_versions: Vec<String>,
        }
        let out = self.exec("VERSION", None, &self.conf.stdin).ok().and_then(Result::ok).unwrap_or_default();
        let theirs = serde_json::from_slice(&out).map_or(Vec::new(), |v: Versions| v.supported_versions);
        Version::ALL.into_iter().filter(|v| theirs.iter().any(|t| t == v.as_str())).collect()
    }

    fn error(&self, verb: &str, f: Failure) -> Error {
        let e = Error::new(f.code, format!("IPAM plugin {} {verb}: {}", self.kind, f.msg));
        if f.details.is_empty() { e } else { e.details(f.details) }
    }

    /// One run: its output, or the error it printed.
    fn exec(
        &self,
        verb: &str,
        attachment: Option<&Attachment>,
        stdin: &[u8],
    ) -> Result<Result<Vec<u8>, Failure>, Error> {
        let failed = |e: io::Error| Error::io(format!("run IPAM plugin {}", self.binary.display()), &e);
        let mut out = file_in_memory(&[]).map_err(failed)?;
        let mut command = Command::new(&self.binary);
        command.env("CNI_COMMAND", verb).stdin(file_in_memory(stdin).map_err(failed)?);
        command.stdout(out.try_clone().map_err(failed)?).stderr(Stdio::inherit()).process_group(0);
        if !self.passes_args {
            command.env_remove("CNI_ARGS");
        }
        if let Some(a) = attachment {
            command.env("CNI_CONTAINERID", &a.container_id).env("CNI_IFNAME", &a.ifname);
        }
        // A runtime that loses its patience kills us alone. The plugin must not go on without us, with its locks.
        // SAFETY: between fork and exec, this is one system call without pointers.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        if !ends_within(&child, self.conf.ipam_timeout).map_err(failed)? {
            kill_group(&child);
            child.wait().map_err(failed)?;
            let text = format!("IPAM plugin {} {verb} has not ended after {:?}", self.kind, self.conf.ipam_timeout);
            return Err(Error::new(code::TRY_AGAIN, text)
                .details("it was killed; look for what it waits for, or set ipamTimeoutSeconds in the configuration"));
        }
        let status = child.wait().map_err(failed)?;
        let mut text = Vec::new();
        out.rewind().and_then(|()| out.read_to_end(&mut text)).map_err(failed)?;
        if status.success() {
            return Ok(Ok(text));
        }
        Ok(Err(serde_json::from_slice(&text).unwrap_or_else(|_| Failure {
            code: code::IO,
            msg: format!("{} ({status})", String::from_utf8_lossy(&text).trim()),
            details: String::new(),
        })))
    }
}

/// True if a plugin complains about `CNI_ARGS`. libcni gives such an error no code of its own, and begins it with these letters.
fn refuses_args(e: &Error) -> bool {
    e.code == code::ENVIRONMENT || e.msg.contains("ARGS: ")
}

/// Waits for the end of a process, at most so long; false if it still runs.
fn ends_within(child: &Child, patience: Duration) -> io::Result<bool> {
    // SAFETY: plain system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let began = Instant::now();
    loop {
        let left = patience.saturating_sub(began.elapsed());
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // Rounded up: an early end of the poll would only be another turn.
        let wait = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        // SAFETY: the pointer is to one live `pollfd`, as the count says.
        match unsafe { libc::poll(&raw mut poll, 1, wait) } {
            n if n > 0 => return Ok(true),
            0 if left.is_zero() => return Ok(false),
            0 => {}
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// Kills a process and what it has started.
fn kill_group(child: &Child) {
    // SAFETY: plain system call without pointers. The child leads a group of its own, and is not waited for yet.
    unsafe { libc::kill(-child.id().cast_signed(), libc::SIGKILL) };
}

/// The error object of a plugin.
#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// A file in memory with this content. A plugin may read its input or not, and leave its output open to others: nobody blocks.
fn file_in_memory(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a zero-terminated literal.
    let fd = unsafe { libc::memfd_create(c"cni-plugin".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}
