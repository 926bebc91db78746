//! Named points at which tests make the binary die or fail; nothing at all in release builds.

use crate::types::error::Error;

/// A point between two steps.
///
/// With `RUSTNET_CNI_CRASH_AT` of this name the process is killed on the spot, with `RUSTNET_CNI_FAIL_AT` the step fails.
#[cfg(debug_assertions)]
pub fn point(name: &str) -> Result<(), Error> {
    let is = |var: &str| std::env::var(var).is_ok_and(|v| v == name);
    if is("RUSTNET_CNI_CRASH_AT") {
        // SAFETY: plain system calls without pointers; the process ends here.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
    if is("RUSTNET_CNI_FAIL_AT") {
        return Err(Error::new(crate::types::error::code::IO, format!("failure injected at {name}")));
    }
    Ok(())
}

/// A point between two steps; release builds have none.
#[cfg(not(debug_assertions))]
#[allow(clippy::unnecessary_wraps)]
#[inline(always)]
pub fn point(_: &str) -> Result<(), Error> {
    Ok(())
}
