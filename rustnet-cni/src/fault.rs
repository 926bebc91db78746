//! Named points at which tests make the binary die or fail, in every build: what is released is what was tested.
//!
//! Who sets the environment of this binary runs it as root, and could end it anyhow.

use crate::types::error::{Error, code};
use std::ffi::OsString;
use std::sync::OnceLock;

/// What the environment asks for.
struct Wishes {
    crash_at: Option<OsString>,
    fail_at: Option<OsString>,
}

/// A point between two steps.
///
/// With `RUSTNET_CNI_CRASH_AT` of this name the process is killed on the spot, with `RUSTNET_CNI_FAIL_AT` the step fails.
///
/// # Errors
/// The failure that was asked for.
pub fn point(name: &str) -> Result<(), Error> {
    static WISHES: OnceLock<Wishes> = OnceLock::new();
    let wishes = WISHES.get_or_init(|| Wishes {
        crash_at: std::env::var_os("RUSTNET_CNI_CRASH_AT"),
        fail_at: std::env::var_os("RUSTNET_CNI_FAIL_AT"),
    });
    if wishes.crash_at.as_ref().is_some_and(|at| at == name) {
        // SAFETY: plain system calls without pointers; the process ends here.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    if wishes.fail_at.as_ref().is_some_and(|at| at == name) {
        return Err(Error::new(code::IO, format!("failure injected at {name}")));
    }
    Ok(())
}
