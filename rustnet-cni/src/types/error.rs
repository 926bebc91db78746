//! The error object that a runtime reads from standard output.

use serde_json::{Value, json};
use std::fmt;

/// Error codes: those of the CNI specification, and our own from 100 on.
pub mod code {
    /// The configuration's version is not supported, or has no such verb.
    pub const VERSION: u32 = 1;
    /// What is asked for can be read, makes sense, and is not supported.
    pub const UNSUPPORTED: u32 = 2;
    /// The container or its network namespace does not exist; the runtime need not clean up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A variable of the environment is missing or invalid.
    pub const ENVIRONMENT: u32 = 4;
    /// A file or the kernel refused.
    pub const IO: u32 = 5;
    /// Something is not the JSON that it should be.
    pub const DECODE: u32 = 6;
    /// The configuration can be read and makes no sense.
    pub const CONFIG: u32 = 7;
    /// The network namespace is none for a pod.
    pub const NETNS: u32 = 8;
    /// Not now; the runtime should try again.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: ADD would fail.
    pub const UNAVAILABLE: u32 = 50;
    /// STATUS: ADD would fail, and pods that exist have limited connectivity.
    pub const LIMITED: u32 = 51;
    /// Ours: the interface exists already.
    pub const EXISTS: u32 = 100;
    /// Ours: no address is free.
    pub const EXHAUSTED: u32 = 101;
    /// Ours: CHECK found the pod's network changed.
    pub const CHANGED: u32 = 102;
}

/// What went wrong, by CNI code, with the remedy in `details`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// See [`code`].
    pub code: u32,
    /// One line that names the thing.
    pub msg: String,
    /// The remedy, or what else failed; may be empty.
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// An operation on a file or in the kernel failed.
    pub fn io(what: impl fmt::Display, cause: &std::io::Error) -> Self {
        let e = Self::new(code::IO, format!("{what}: {cause}"));
        if cause.kind() == std::io::ErrorKind::PermissionDenied {
            return e.details("the CNI binary must run as root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_BPF");
        }
        e
    }

    /// Adds details; several are joined.
    #[must_use]
    pub fn details(mut self, text: impl AsRef<str>) -> Self {
        if !self.details.is_empty() {
            self.details.push_str("; ");
        }
        self.details.push_str(text.as_ref());
        self
    }

    /// The same error under another code.
    #[must_use]
    pub fn with_code(mut self, code: u32) -> Self {
        self.code = code;
        self
    }

    /// The object to print.
    pub fn to_json(&self, version: &str) -> Value {
        let mut v = json!({ "cniVersion": version, "code": self.code, "msg": self.msg });
        if !self.details.is_empty() {
            v["details"] = Value::from(self.details.clone());
        }
        v
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, " ({})", self.details) }
    }
}

impl std::error::Error for Error {}

/// The failures of steps that do not keep the next steps from being tried.
#[derive(Default)]
pub struct Failures(Option<Error>);

impl Failures {
    /// Remembers the error of a step, and returns its value otherwise.
    pub fn note<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        self.0 = Some(match self.0.take() {
            Some(first) => first.details(error.to_string()),
            None => error,
        });
        None
    }

    /// True if nothing has failed.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The first failure, with the others as details.
    ///
    /// # Errors
    /// That failure, if there is one.
    pub fn into_result(self) -> Result<(), Error> {
        self.0.map_or(Ok(()), Err)
    }
}
