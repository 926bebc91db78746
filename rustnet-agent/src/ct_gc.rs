//! Collects connections that have been silent for longer than their kind may be, and clients whose session affinity is over.
//!
//! The programs only refresh entries; without this, an LRU that is full of dead flows would evict live ones.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustnet_common::affinity::MAX_SECONDS;
use rustnet_common::conntrack::lifetime;
use tokio::sync::watch;

use crate::bpf::probe::{age, jiffies};
use crate::bpf::store::affinity::Affinities;
use crate::bpf::store::conntrack::{Conntrack, Swept};
use crate::metrics::Metrics;

/// Time between two sweeps.
pub const PERIOD: Duration = Duration::from_secs(30);

/// The collector.
pub struct Collector {
    conntrack: Conntrack,
    affinities: Affinities,
    clock: OwnedFd,
    hz: u32,
}

impl Collector {
    /// Collects from the tables pinned in `bpffs`, with the time from the `clock` program.
    pub fn open(bpffs: &Path, clock: OwnedFd, hz: u32) -> Result<Self> {
        Ok(Self { conntrack: Conntrack::open(bpffs)?, affinities: Affinities::open(bpffs)?, clock, hz })
    }

    /// Goes through the tables once.
    pub fn sweep(&self) -> Result<Swept> {
        // Before the tables are read: what is seen later counts as just seen.
        let now = jiffies(self.clock.as_fd())?;
        self.affinities.sweep(|seen| is_older(now, self.hz, seen, MAX_SECONDS))?;
        self.conntrack.sweep(|proto, state, seen| expired(now, self.hz, proto, state, seen))
    }

    /// Sweeps every [`PERIOD`] until shutdown, and counts what the maps hold for the metrics. On a thread of its own: those of the
    /// runtime's pool are few, and scrapes and look-ups of names share them.
    pub async fn run(self, metrics: Metrics, mut shutdown: watch::Receiver<bool>) {
        // Its end is the signal.
        let (alive, ended) = mpsc::channel::<()>();
        let sweeper = move || {
            loop {
                self.sweep_and_log();
                metrics.count_entries();
                if ended.recv_timeout(PERIOD) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("ct-gc".to_owned()).spawn(sweeper) {
            tracing::error!(%error, "no thread to sweep the connection tables; raise the limit of tasks and restart the agent");
        }
        let _ = shutdown.wait_for(|stop| *stop).await;
        drop(alive);
    }

    fn sweep_and_log(&self) {
        let start = Instant::now();
        match self.sweep() {
            Ok(Swept { seen, deleted }) => {
                tracing::debug!(seen, deleted, took = ?start.elapsed(), "swept the connection tables");
            }
            Err(error) => tracing::warn!("sweeping the connection tables: {error:#}"),
        }
    }
}

/// True if one entry of a connection has been silent for too long. `now`: the low 31 bits of jiffies.
pub fn expired(now: u32, hz: u32, proto: u8, state: u64, seen: u32) -> bool {
    is_older(now, hz, seen, lifetime(proto, state))
}

/// True if something was seen more than `seconds` ago.
fn is_older(now: u32, hz: u32, seen: u32, seconds: u32) -> bool {
    u64::from(age(now, seen)) > u64::from(seconds) * u64::from(hz)
}

#[cfg(test)]
mod tests {
    use super::expired;
    use rustnet_common::conntrack::state::{ANSWERED, ESTABLISHED, RST_ORIG};
    use rustnet_common::tuple::proto::{TCP, UDP};

    #[test]
    fn each_kind_has_its_time() {
        let hz = 250;
        let now = 100_000 * hz;
        let seen = |seconds_ago: u32| now - seconds_ago * hz;
        assert!(!expired(now, hz, UDP, ANSWERED, seen(120)));
        assert!(expired(now, hz, UDP, ANSWERED, seen(121)));
        assert!(expired(now, hz, TCP, 0, seen(121)), "never answered");
        assert!(!expired(now, hz, TCP, ANSWERED | ESTABLISHED, seen(86_400)));
        assert!(expired(now, hz, TCP, ANSWERED | ESTABLISHED, seen(86_401)));
        assert!(expired(now, hz, TCP, ANSWERED | ESTABLISHED | RST_ORIG, seen(11)));
    }

    #[test]
    fn what_was_seen_after_the_clock_was_read_is_young() {
        assert!(!expired(1000, 250, UDP, 0, 1003));
        assert!(!expired(3, 250, UDP, 0, 0xffff_fffe), "across the wrap");
    }
}
