//! Another plugin's addresses: finds the binary in `CNI_PATH`, hands it the whole call, reads its result.

use crate::types::conf::{Attachment, NetConf};
use crate::types::error::{Error, code};
use crate::types::result::AddResult;
use crate::types::version::Version;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A delegated IPAM plugin.
pub struct Delegate<'a> {
    conf: &'a NetConf,
    kind: &'a str,
    binary: PathBuf,
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
            Some(binary) => Ok(Self { conf, kind, binary }),
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
        self.call("DEL", Some(attachment)).map(drop)
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
        let mut command = Command::new(&self.binary);
        command.env("CNI_COMMAND", verb).stdin(stdin_file(stdin).map_err(failed)?).stderr(Stdio::inherit());
        if let Some(a) = attachment {
            command.env("CNI_CONTAINERID", &a.container_id).env("CNI_IFNAME", &a.ifname);
        }
        let out = command.output().map_err(failed)?;
        if out.status.success() {
            return Ok(Ok(out.stdout));
        }
        Ok(Err(serde_json::from_slice(&out.stdout).unwrap_or_else(|_| Failure {
            code: code::IO,
            msg: format!("{} ({})", String::from_utf8_lossy(&out.stdout).trim(), out.status),
            details: String::new(),
        })))
    }
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

/// Standard input as a file in memory: the plugin may read it or not, nobody blocks.
fn stdin_file(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a zero-terminated literal.
    let fd = unsafe { libc::memfd_create(c"cni-stdin".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}
