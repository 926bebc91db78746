//! A point at which tests make the agent die: between two writes of a plan. Nothing at all in release builds.

/// Writes after which `RUSTNET_CRASH_AFTER_WRITES` wants the process killed on the spot.
#[cfg(debug_assertions)]
pub fn crash_after() -> Option<u64> {
    std::env::var("RUSTNET_CRASH_AFTER_WRITES").ok()?.parse().ok()
}

/// Release builds know no such point.
#[cfg(not(debug_assertions))]
pub fn crash_after() -> Option<u64> {
    None
}

/// Counts one write of those that were asked for; dies at the last.
pub fn written(of: u64) {
    use std::sync::atomic::{AtomicU64, Ordering};
    static DONE: AtomicU64 = AtomicU64::new(0);
    if DONE.fetch_add(1, Ordering::Relaxed) + 1 >= of {
        // As if by SIGKILL from outside: nothing is unwound or flushed.
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
