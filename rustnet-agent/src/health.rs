//! The agent's health: the reconcile loop sets it, and the probes and all tasks that wait for the
//! first sync read it.
//!
//! Alive means that the loop turns; ready means that the full state has been applied. A failure that a restart does not cure
//! makes the agent unready, never dead.
//! Killing an agent that is not alive does no harm: forwarding goes on from the pins.

use crate::metrics::Metrics;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

/// A loop that has not turned for this long hangs.
pub const TICK_LIMIT: Duration = Duration::from_mins(1);
/// Changes that wait longer than this for being applied make the proxy unhealthy: kube-proxy's limit, twice the default of its
/// `--sync-period`.
pub const QUEUE_LIMIT: Duration = Duration::from_mins(1);

/// Why the agent is not ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// A step of every start is not done yet.
    Starting(String),
    /// Something failed; the text ends with a remedy where there is one.
    Failed(String),
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting(stage) => write!(f, "starting: {stage}"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// The agent's state of health. One for the process, shared by all tasks.
#[derive(Debug)]
pub struct Health {
    /// What is counted.
    pub metrics: Metrics,
    state: Mutex<State>,
    readiness: watch::Sender<Result<(), NotReady>>,
    problems: watch::Sender<BTreeSet<String>>,
}

/// Hears of every change of [`Health::complaints`].
pub struct Changes {
    readiness: watch::Receiver<Result<(), NotReady>>,
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

/// The state of health by kube-proxy's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyHealth {
    /// Changes are applied in time.
    pub is_healthy: bool,
    /// For how long the oldest change waits for being applied; `None` if none does.
    pub waiting: Option<Duration>,
    /// Load balancers may send new connections to this node.
    pub is_node_eligible: bool,
    /// When all changes had been applied last, or when the agent started.
    pub last_sync: SystemTime,
}

#[derive(Debug)]
struct State {
    last_tick: Instant,
    last_sync: SystemTime,
    /// Since when a change waits for being applied.
    queued: Option<Instant>,
    is_node_eligible: bool,
}

impl Default for Health {
    fn default() -> Self {
        let (last_tick, last_sync) = (Instant::now(), SystemTime::now());
        // A node that nobody has said anything about is eligible.
        let state = State { last_tick, last_sync, queued: None, is_node_eligible: true };
        let readiness = watch::Sender::new(Err(NotReady::Starting("nothing has been applied yet".to_owned())));
        Self { metrics: Metrics::default(), state: Mutex::new(state), readiness, problems: watch::Sender::default() }
    }
}

impl Health {
    /// The reconcile loop turns. To be called far more often than every [`TICK_LIMIT`], idle or not.
    pub fn tick(&self) {
        self.state().last_tick = Instant::now();
    }

    /// A change waits for being applied.
    pub fn queued(&self) {
        self.queued_at(Instant::now());
    }

    /// All changes received so far have been applied, in this time.
    pub fn applied(&self, took: Duration) {
        let mut state = self.state();
        (state.last_sync, state.queued) = (SystemTime::now(), None);
        drop(state);
        self.metrics.synced(took);
    }

    /// Says whether load balancers may send new connections to this node.
    pub fn set_node_eligible(&self, is_eligible: bool) {
        self.state().is_node_eligible = is_eligible;
    }

    /// Pods can be connected and services are served.
    pub fn set_ready(&self) {
        self.change(Ok(()));
    }

    /// They cannot, for this reason.
    pub fn set_not_ready(&self, why: NotReady) {
        self.change(Err(why));
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
        let why = match &*self.readiness.borrow() {
            Err(NotReady::Failed(why)) => Some(why.clone()),
            Err(NotReady::Starting(_)) | Ok(()) => None,
        };
        self.problems.borrow().iter().cloned().chain(why).collect()
    }

    /// Hears of what changes from now on.
    pub fn changes(&self) -> Changes {
        Changes { readiness: self.readiness.subscribe(), problems: self.problems.subscribe() }
    }

    /// `Ok` when ready; else the reason why not.
    pub fn readiness(&self) -> Result<(), String> {
        self.readiness.borrow().as_ref().copied().map_err(ToString::to_string)
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

    /// The state of health by kube-proxy's rules.
    pub fn proxy(&self) -> ProxyHealth {
        self.proxy_at(Instant::now())
    }

    fn proxy_at(&self, now: Instant) -> ProxyHealth {
        // A loop that hangs takes in no change, and would be healthy for ever.
        let is_alive = self.liveness_at(now).is_ok();
        let state = self.state();
        let waiting = state.queued.map(|since| now.saturating_duration_since(since));
        let is_healthy = is_alive && waiting.is_none_or(|waiting| waiting < QUEUE_LIMIT);
        ProxyHealth { is_healthy, waiting, is_node_eligible: state.is_node_eligible, last_sync: state.last_sync }
    }

    fn queued_at(&self, now: Instant) {
        self.state().queued.get_or_insert(now);
    }

    fn liveness_at(&self, now: Instant) -> Result<(), String> {
        let idle = now.saturating_duration_since(self.state().last_tick);
        if idle > TICK_LIMIT {
            return Err(format!("the reconcile loop has not turned for {} s", idle.as_secs()));
        }
        Ok(())
    }

    fn change(&self, to: Result<(), NotReady>) {
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
        // The state is a few plain values: a panic elsewhere cannot leave them half written.
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
    fn a_change_that_waits_too_long_makes_the_proxy_unhealthy() {
        let health = Health::default();
        let is_healthy = |at| health.proxy_at(at).is_healthy;
        let start = Instant::now();
        health.queued_at(start);
        health.queued_at(start + QUEUE_LIMIT / 2);
        health.state().last_tick = start + QUEUE_LIMIT;
        assert!(is_healthy((start + QUEUE_LIMIT).checked_sub(Duration::from_millis(1)).unwrap()));
        assert!(!is_healthy(start + QUEUE_LIMIT), "the oldest change counts");
        health.applied(Duration::ZERO);
        assert!(is_healthy(start + QUEUE_LIMIT));
        assert!(!is_healthy(start + QUEUE_LIMIT + TICK_LIMIT * 2), "the loop hangs");
    }

    #[tokio::test]
    async fn complaints_are_problems_and_lasting_reasons() {
        let health = Health::default();
        let mut changes = health.changes();
        assert!(health.complaints().is_empty(), "it merely starts");
        health.set_not_ready(NotReady::Failed("no pod range".to_owned()));
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
        health.set_not_ready(NotReady::Failed("no pod range".to_owned()));
        assert_eq!(health.readiness(), Err("no pod range".to_owned()));
    }
}
