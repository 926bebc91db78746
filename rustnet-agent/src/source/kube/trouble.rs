//! Logs and reports that an origin of events fails, and that it works again.

use crate::api::{API_SERVER, Failure};
use crate::model::Problem;
use crate::source::{Event, Origin};
use std::fmt::{self, Debug};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// While the same failure goes on, it is logged this often.
const REMIND: Duration = Duration::from_mins(1);

/// Tells of a failure once, now and then while it lasts, and of its end; and reports it with the events.
pub(super) struct Trouble<'a> {
    origin: Origin,
    events: &'a Sender<Event>,
    now: Option<(String, Instant, Instant)>,
}

impl<'a> Trouble<'a> {
    pub(super) fn new(origin: Origin, events: &'a Sender<Event>) -> Self {
        Self { origin, events, now: None }
    }

    pub(super) async fn note(&mut self, what: &str, failure: Failure) {
        let now = Instant::now();
        let since = match &mut self.now {
            Some((old, _, logged)) if old == what && now.duration_since(*logged) < REMIND => return,
            Some((_, since, _)) => *since,
            None => now,
        };
        let lasting = now.duration_since(since).as_secs();
        tracing::warn!(origin = %self.origin, error = what, lasting_s = lasting, "failed, trying on; the last known state stays");
        self.now = Some((what.to_owned(), since, now));
        let stays = "the last known state stays";
        let detail = Problem::new(&self.origin.to_string().into(), "", format!("{what}; {stays}, trying on"));
        let (words, remedy) = (failure.words(), failure.remedy());
        // The same for all kinds and for every time, so that it is reported once.
        let whole = Problem::new(&API_SERVER.into(), "", format!("{words}; {remedy}; {stays}"));
        self.report([detail, whole].into()).await;
    }

    pub(super) async fn over(&mut self) {
        if let Some((_, since, _)) = self.now.take() {
            tracing::info!(origin = %self.origin, lasted_s = since.elapsed().as_secs(), "works again");
            self.report(Box::default()).await;
        }
    }

    async fn report(&self, problems: Box<[Problem]>) {
        // Without a receiver there is nobody to tell; the next event ends the source.
        let _ = self.events.send(Event::Report { origin: self.origin.clone(), problems }).await;
    }
}

impl Debug for Trouble<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trouble").field(&self.now).finish()
    }
}
