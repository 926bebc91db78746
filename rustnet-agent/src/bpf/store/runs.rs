//! The writes of a plan in runs, and the point between two of them at which tests make the agent die. In release builds there is no such
//! point.

use anyhow::Result;

/// Applies the writes in order, each run of those that go together in one call.
///
/// # Errors
/// Of the first call that fails: the runs before it are in effect.
pub fn apply<W>(
    writes: &[W],
    go_together: impl Fn(&W, &W) -> bool,
    mut apply_run: impl FnMut(&[W]) -> Result<()>,
) -> Result<()> {
    let Some(last) = crash_after() else { return writes.chunk_by(go_together).try_for_each(apply_run) };
    writes.chunks(1).try_for_each(|write| {
        apply_run(write)?;
        written(last);
        Ok(())
    })
}

/// Writes after which `RUSTNET_CRASH_AFTER_WRITES` wants the process killed on the spot.
#[cfg(debug_assertions)]
fn crash_after() -> Option<u64> {
    std::env::var("RUSTNET_CRASH_AFTER_WRITES").ok()?.parse().ok()
}

/// Release builds know no such point.
#[cfg(not(debug_assertions))]
fn crash_after() -> Option<u64> {
    None
}

/// Counts one write of those that were asked for; dies at the last.
fn written(of: u64) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static DONE: AtomicU64 = AtomicU64::new(0);
    if DONE.fetch_add(1, Ordering::Relaxed) + 1 >= of {
        // As if by SIGKILL from outside: nothing is unwound or flushed.
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
