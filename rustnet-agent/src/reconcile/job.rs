//! A job of the loop: when it is due, and what failed the last time.

use std::time::Duration;

use tokio::time::Instant;

use crate::failure::{self, Failure};

/// First and longest wait after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// A job that is done again and again.
#[derive(Debug)]
pub struct Job {
    name: &'static str,
    due: Option<Instant>,
    wait: Duration,
    failures: Vec<Failure>,
    /// It is being done; `due` is what was wanted since it began.
    is_running: bool,
}

impl Job {
    /// A job that is due at once.
    pub fn due(name: &'static str) -> Self {
        Self { due: Some(Instant::now()), ..Self::idle(name) }
    }

    /// A job that waits to be wanted.
    pub const fn idle(name: &'static str) -> Self {
        Self { name, due: None, wait: BACK_OFF.0, failures: Vec::new(), is_running: false }
    }

    /// When it is due; `None`: when it is wanted, or not before [`Self::finish`].
    pub fn deadline(&self) -> Option<Instant> {
        self.due.filter(|_| !self.is_running)
    }

    /// True if its time has come.
    pub fn is_due(&self) -> bool {
        self.deadline().is_some_and(|due| due <= Instant::now())
    }

    /// Begins a job that goes on while the loop does others. Wanted meanwhile, it is done once more.
    pub fn begin(&mut self) {
        (self.due, self.is_running) = (None, true);
    }

    /// Wants it done after `gap` at the latest.
    pub fn want(&mut self, gap: Duration) {
        let at = Instant::now() + gap;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// Wants it done after `gap` at the latest, but after a failure not before its time.
    pub fn want_unless_failed(&mut self, gap: Duration) {
        if self.failures.is_empty() {
            self.want(gap);
        }
    }

    /// Adds a failure while it is being done, and logs it. False if it is known.
    pub fn add_failure(&mut self, failure: Failure) -> bool {
        let is_new = !self.failures.contains(&failure);
        if is_new {
            tracing::error!("{}: {failure}", self.name);
            self.failures.push(failure);
        }
        is_new
    }

    /// Notes how it went: without a failure it is due again at `next`, else after a while that grows. Logs what is new.
    pub fn finish(&mut self, failures: Vec<Failure>, next: Option<Instant>) {
        for failure in failures.iter().filter(|it| !self.failures.contains(it)) {
            tracing::error!("{}: {failure}", self.name);
        }
        for failure in self.failures.iter().filter(|it| !failures.contains(it)) {
            tracing::info!("{}: resolved: {failure}", self.name);
        }
        self.failures = failures;
        let wanted = self.due.filter(|_| self.is_running);
        self.is_running = false;
        let retry = if self.failures.is_empty() {
            self.wait = BACK_OFF.0;
            None
        } else {
            let retry = Instant::now() + self.wait;
            self.wait = (self.wait * 2).min(BACK_OFF.1);
            Some(retry)
        };
        self.due = [wanted, next, retry].into_iter().flatten().min();
    }

    /// What failed the last time.
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// True if something failed.
    pub fn has_failed(&self) -> bool {
        !self.failures.is_empty()
    }

    /// What of it concerns the whole node.
    pub fn node_failure(&self) -> Option<String> {
        failure::of_node(&self.failures)
    }
}

#[cfg(test)]
mod tests {
    use super::{BACK_OFF, Duration, Failure, Instant, Job};
    use crate::failure::Scope;

    fn failure(scope: Scope, text: &str) -> Failure {
        Failure { scope, message: text.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_waits_longer_each_time_and_a_success_starts_over() {
        let mut job = Job::due("test");
        let mut waits = Vec::new();
        for _ in 0..9 {
            job.finish(vec![failure(Scope::Node, "no")], None);
            waits.push(job.deadline().unwrap() - Instant::now());
        }
        assert_eq!(waits[..3], [500, 1000, 2000].map(Duration::from_millis));
        assert_eq!(waits[8], BACK_OFF.1);
        job.finish(Vec::new(), None);
        assert_eq!((job.deadline(), job.is_due()), (None, false));
        // A failure is not left until the next ordinary turn, nor does it put that off.
        for (ordinary, wait) in [(Duration::from_secs(30), BACK_OFF.0), (Duration::ZERO, Duration::ZERO)] {
            job.finish(Vec::new(), None);
            job.finish(vec![failure(Scope::Node, "no")], Some(Instant::now() + ordinary));
            assert_eq!(job.deadline().unwrap() - Instant::now(), wait);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wanting_it_never_delays_it() {
        let mut job = Job::idle("test");
        job.want(Duration::from_secs(5));
        job.want(Duration::from_secs(9));
        assert_eq!(job.deadline().unwrap() - Instant::now(), Duration::from_secs(5));
        job.finish(vec![failure(Scope::Node, "no")], None);
        job.want_unless_failed(Duration::ZERO);
        assert!(!job.is_due());
        job.finish(Vec::new(), None);
        job.want_unless_failed(Duration::ZERO);
        assert!(job.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_while_it_runs_is_done_once_more() {
        let mut job = Job::due("test");
        job.begin();
        assert_eq!((job.deadline(), job.is_due()), (None, false));
        job.want(Duration::ZERO);
        assert_eq!((job.deadline(), job.is_due()), (None, false), "not twice at a time");
        job.finish(Vec::new(), Some(Instant::now() + BACK_OFF.1));
        assert!(job.is_due());
        job.begin();
        job.finish(Vec::new(), None);
        assert_eq!(job.deadline(), None);
    }

    #[test]
    fn only_failures_of_the_node_are_the_nodes() {
        let mut job = Job::idle("test");
        job.failures = vec![failure(Scope::Peer, "one route"), failure(Scope::Pod, "one pod")];
        assert_eq!((job.node_failure(), job.has_failed()), (None, true));
        job.failures.push(failure(Scope::Node, "all"));
        assert_eq!(job.node_failure().as_deref(), Some("all"));
    }
}
