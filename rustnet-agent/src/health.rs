//! The agent's health: the reconcile loop sets it, and the probes and all tasks that wait for the
//! first sync read it.
//!
//! Alive means that the loop turns and that no change has waited too long; ready means that the full state has been applied.
//! Killing an agent that is not alive does no harm: forwarding goes on from the pins.

use crate::metrics::Metrics;
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

/// A loop that has not turned for this long hangs.
pub const TICK_LIMIT: Duration = Duration::from_mins(1);
/// A change that has waited for this long is stuck; kube-proxy's default, too.
pub const QUEUE_LIMIT: Duration = Duration::from_mins(2);

/// How reasons begin that every start has for a moment.
pub const STARTING: &str = "starting: ";

/// The agent's state of health. One for the process, shared by all tasks.
#[derive(Debug)]
pub struct Health {
    /// What is counted.
    pub metrics: Metrics,
    state: Mutex<State>,
    readiness: watch::Sender<Result<(), String>>,
    problems: watch::Sender<BTreeSet<String>>,
}

/// Hears of every change of [`Health::complaints`].
pub struct Changes {
    readiness: watch::Receiver<Result<(), String>>,
    problems: watch::Receiver<BTreeSet<String>>,
}

impl Changes {
    /// Waits for one that was not waited for yet.
    pub async fn changed(&mut self) {
        // The senders live as long as the process.
        let _ = tokio::select! {
            changed = self.readiness.changed() => changed,
            changed = self.problems.changed() => changed,
        };
    }
}

#[derive(Debug)]
struct State {
    last_tick: Instant,
    queued_since: Option<Instant>,
    last_sync: SystemTime,
}

impl Default for Health {
    fn default() -> Self {
        let state = State { last_tick: Instant::now(), queued_since: None, last_sync: SystemTime::now() };
        let readiness = watch::Sender::new(Err(format!("{STARTING}nothing has been applied yet")));
        Self { metrics: Metrics::default(), state: Mutex::new(state), readiness, problems: watch::Sender::default() }
    }
}

impl Health {
    /// The reconcile loop turns. To be called far more often than every [`TICK_LIMIT`], idle or not.
    pub fn tick(&self) {
        self.state().last_tick = Instant::now();
    }

    /// A change has been received and waits to be applied.
    pub fn queued(&self) {
        self.state().queued_since.get_or_insert_with(Instant::now);
    }

    /// All changes received so far have been applied, in this time.
    pub fn applied(&self, took: Duration) {
        let mut state = self.state();
        state.queued_since = None;
        state.last_sync = SystemTime::now();
        drop(state);
        self.metrics.synced(took);
    }

    /// All changes received so far wait for the source, which has not delivered everything: nothing can be applied yet, and nothing
    /// is stuck here.
    pub fn waits_for_source(&self) {
        self.state().queued_since = None;
    }

    /// Pods can be connected and services are served.
    pub fn set_ready(&self) {
        self.change(Ok(()));
    }

    /// They cannot, for this reason.
    pub fn set_not_ready(&self, why: impl Into<String>) {
        self.change(Err(why.into()));
    }

    /// What is wrong with this node's network although the agent is ready.
    pub fn set_problems(&self, problems: BTreeSet<String>) {
        self.problems.send_if_modified(|now| {
            let changed = *now != problems;
            *now = problems;
            changed
        });
    }

    /// What people must know of this node's network: problems, and why the agent is not ready, unless it merely starts.
    pub fn complaints(&self) -> BTreeSet<String> {
        let why = self.readiness().err().filter(|why| !why.starts_with(STARTING));
        self.problems.borrow().iter().cloned().chain(why).collect()
    }

    /// Hears of what changes from now on.
    pub fn changes(&self) -> Changes {
        Changes { readiness: self.readiness.subscribe(), problems: self.problems.subscribe() }
    }

    /// `Ok` when ready; else the reason why not.
    pub fn readiness(&self) -> Result<(), String> {
        self.readiness.borrow().clone()
    }

    /// Waits until the agent is ready.
    pub async fn wait_ready(&self) {
        // The sender lives in `self`, so the channel cannot close while anybody waits.
        let _ = self.readiness.subscribe().wait_for(Result::is_ok).await;
    }

    /// `Ok` when alive; else the reason why not.
    pub fn liveness(&self) -> Result<(), String> {
        self.liveness_at(Instant::now())
    }

    /// When all changes had been applied last, or when the agent started.
    pub fn last_sync(&self) -> SystemTime {
        self.state().last_sync
    }

    fn liveness_at(&self, now: Instant) -> Result<(), String> {
        let state = self.state();
        let idle = now.saturating_duration_since(state.last_tick);
        if idle > TICK_LIMIT {
            return Err(format!("the reconcile loop has not turned for {} s", idle.as_secs()));
        }
        match state.queued_since.map(|since| now.saturating_duration_since(since)) {
            Some(waited) if waited > QUEUE_LIMIT => {
                Err(format!("a change has waited for {} s: the log says why", waited.as_secs()))
            }
            _ => Ok(()),
        }
    }

    fn change(&self, to: Result<(), String>) {
        self.metrics.set_ready(to.is_ok());
        self.readiness.send_if_modified(|now| {
            let changed = *now != to;
            if changed {
                match &to {
                    Ok(()) => tracing::info!("ready"),
                    Err(why) => tracing::warn!(%why, "not ready"),
                }
                *now = to;
            }
            changed
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is three plain values: a panic elsewhere cannot leave them half written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stands_still_is_dead() {
        let health = Health::default();
        let now = Instant::now();
        assert_eq!(health.liveness_at(now), Ok(()));
        let later = now + TICK_LIMIT + Duration::from_secs(5);
        assert!(health.liveness_at(later).expect_err("dead").contains("has not turned for 6"));
        health.state().last_tick = later;
        assert_eq!(health.liveness_at(later), Ok(()));
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy_until_it_is_applied() {
        let health = Health::default();
        let start = Instant::now();
        health.queued();
        let later = start + QUEUE_LIMIT + Duration::from_secs(5);
        health.state().last_tick = later;
        assert!(health.liveness_at(later).expect_err("stuck").contains("has waited for"));
        health.applied(Duration::from_millis(1));
        assert_eq!(health.liveness_at(later), Ok(()));
    }

    #[test]
    fn what_waits_for_the_source_is_neither_stuck_nor_applied() {
        let health = Health::default();
        let before = health.last_sync();
        health.queued();
        health.waits_for_source();
        assert_eq!(health.state().queued_since, None);
        assert_eq!(health.last_sync(), before);
    }

    #[test]
    fn the_oldest_change_counts() {
        let health = Health::default();
        health.queued();
        let first = health.state().queued_since;
        health.queued();
        assert_eq!(health.state().queued_since, first);
    }

    #[tokio::test]
    async fn complaints_are_problems_and_lasting_reasons() {
        let health = Health::default();
        let mut changes = health.changes();
        assert!(health.complaints().is_empty(), "it merely starts");
        health.set_not_ready("no pod range");
        health.set_problems(["two nodes have one address".to_owned()].into());
        changes.changed().await;
        assert_eq!(Vec::from_iter(health.complaints()), ["no pod range", "two nodes have one address"]);
        health.set_ready();
        assert_eq!(Vec::from_iter(health.complaints()), ["two nodes have one address"]);
    }

    #[tokio::test]
    async fn readiness_is_reported_with_its_reason() {
        let health = Health::default();
        assert!(health.readiness().expect_err("new").contains("starting"));
        health.set_ready();
        health.wait_ready().await;
        assert_eq!(health.readiness(), Ok(()));
        health.set_not_ready("no pod range");
        assert_eq!(health.readiness(), Err("no pod range".to_owned()));
    }
}
