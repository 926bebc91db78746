//! Waiting for a condition: polled until it holds, with a deadline that only a broken system reaches.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// How long anything may take before it counts as broken; generous, because test machines are small and busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Seconds instead, for machines that are a hundred times slower: emulated ones.
const VARIABLE: &str = "RUSTNET_DEADLINE";

/// Pause between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(5);

/// How long [`until`] waits.
pub fn deadline() -> Duration {
    let given = std::env::var(VARIABLE).ok().and_then(|seconds| seconds.parse().ok());
    given.map_or(DEADLINE, Duration::from_secs)
}

/// Polls until `look` gives a value. `Err` of the last look becomes part of the error after the deadline.
pub fn until<T>(what: &str, look: impl FnMut() -> Result<T>) -> Result<T> {
    until_deadline(what, deadline(), look)
}

/// The same with another deadline.
pub fn until_deadline<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match look() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() > deadline {
            bail!("{what}: not so after {} s: {last:#}", deadline.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}
