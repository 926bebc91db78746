//! Waiting times between attempts: doubled each time up to a limit, and jittered, so that a thousand nodes that lost one
//! server do not come back at once.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(250);
const LIMIT: Duration = Duration::from_secs(15);
/// Without a failure for so long, all is forgotten.
const FORGET: Duration = Duration::from_mins(2);

/// The waiting times of one kind of attempt.
#[derive(Debug)]
pub(crate) struct Backoff {
    base: Duration,
    last: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: FIRST, last: None }
    }
}

impl Backoff {
    /// How long to wait now: between half and one and a half of a base that doubles with each call.
    pub(crate) fn next(&mut self) -> Duration {
        self.next_at(Instant::now())
    }

    fn next_at(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now.duration_since(last) > FORGET) {
            self.reset();
        }
        self.last = Some(now);
        let base = self.base;
        self.base = (base * 2).min(LIMIT);
        base / 2 + spread(base)
    }

    /// It worked: begin again.
    pub(crate) fn reset(&mut self) {
        self.base = FIRST;
    }
}

/// A random duration below `limit`.
pub(crate) fn spread(limit: Duration) -> Duration {
    // Every RandomState has other keys: good enough for jitter, and no crate for it.
    let random = RandomState::new().build_hasher().finish();
    let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX).max(1);
    Duration::from_nanos(random % nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_begin_again() {
        let mut backoff = Backoff::default();
        for base in [250, 500, 1000, 2000, 4000, 8000, 15_000, 15_000] {
            let base = Duration::from_millis(base);
            let wait = backoff.next();
            assert!(wait >= base / 2 && wait < base + base / 2, "{wait:?} for {base:?}");
        }
        backoff.reset();
        assert!(backoff.next() < FIRST * 2);
    }

    #[test]
    fn a_long_peace_is_a_new_beginning() {
        let mut backoff = Backoff::default();
        let start = Instant::now();
        for _ in 0..10 {
            backoff.next_at(start);
        }
        assert!(backoff.next_at(start + FORGET) >= LIMIT / 2);
        assert!(backoff.next_at(start + FORGET * 3) < FIRST * 2);
    }

    #[test]
    fn waits_differ() {
        let waits: std::collections::HashSet<_> = (0..20).map(|_| spread(LIMIT)).collect();
        assert!(waits.len() > 10, "{waits:?}");
    }
}
