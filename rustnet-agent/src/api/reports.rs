//! Tells people what is wrong with this node's network, and that it is well again: as Kubernetes events on the node's
//! object, which `kubectl describe node` shows.
//!
//! Only what concerns this node: what is wrong with a Service every agent sees, and a thousand nodes need not say it. Failures
//! are logged and tried again; the network does not depend on it.
//!
//! An outage of the API server concerns every node at the same time. All of them could publish it only when the server is back
//! and has enough to do. So an outage becomes an event only after a minute, and the events of all nodes are spread over time.

use super::backoff::Backoff;
use super::herd::Herd;
use super::{API_SERVER, Connection, Failure, chain};
use crate::health::Health;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

const CONTROLLER: &str = "rustnet-agent";
/// Longest note that the API server takes.
const NOTE: usize = 1024;
/// So many texts are known again when they come again.
const TEXTS: usize = 64;
/// Complaints that come and go faster are not published one by one.
const PAUSE: Duration = Duration::from_secs(2);
/// A shorter outage of the API server is no news.
const OUTAGE: Duration = Duration::from_mins(1);

/// Publishes whatever [`Health::complaints`] says newly, or no longer, until shutdown.
pub async fn run(
    connection: Connection,
    node_name: Arc<str>,
    health: Arc<Health>,
    mut shutdown: watch::Receiver<bool>,
) {
    let Connection { client, herd, .. } = connection;
    let (due, published, recorders) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    let mut reports = Reports { client, node: reference(&node_name), due, published, recorders };
    let work = async {
        let (mut backoff, mut outage) = (Backoff::default(), Outage::default());
        let mut changes = health.changes();
        loop {
            let now = outage.without_short(health.complaints(), Instant::now());
            let is_late_news = reports.is_due(&now, is_outage);
            let pause = match reports.tell(now).await {
                Ok(()) => {
                    backoff = Backoff::default();
                    tokio::select! {
                        () = changes.changed() => {}
                        () = outage.becomes_news() => {}
                    }
                    PAUSE
                }
                Err(error) => {
                    tracing::warn!(node = &*node_name, error = chain(&error), "cannot publish an event, trying on");
                    retry(&mut backoff, &herd, is_late_news)
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = work => {}
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
}

/// How long to wait for the next attempt. What the outage itself has held up comes when it is over, from all nodes.
fn retry(backoff: &mut Backoff, herd: &Herd, is_late_news: bool) -> Duration {
    let pause = backoff.next();
    if is_late_news { pause.max(herd.spread()) } else { pause }
}

/// Whether a complaint is of an outage of the API server.
fn is_outage(text: &str) -> bool {
    let words = text.strip_prefix(API_SERVER).and_then(|rest| rest.strip_prefix(": "));
    let is = |failure: &Failure| failure.is_outage() && words.is_some_and(|words| words.starts_with(failure.words()));
    Failure::ALL.iter().any(is)
}

/// An outage of the API server, whatever it shows itself as.
#[derive(Debug, Default)]
struct Outage {
    since: Option<Instant>,
    is_news: bool,
}

impl Outage {
    /// The complaints, without those of an outage that has not lasted long.
    fn without_short(&mut self, mut complaints: BTreeSet<String>, now: Instant) -> BTreeSet<String> {
        if complaints.iter().any(|text| is_outage(text)) {
            let since = *self.since.get_or_insert(now);
            self.is_news = now.duration_since(since) >= OUTAGE;
        } else {
            *self = Self::default();
        }
        if !self.is_news {
            complaints.retain(|text| !is_outage(text));
        }
        complaints
    }

    /// Waits until it has lasted long.
    async fn becomes_news(&self) {
        match self.since {
            Some(since) if !self.is_news => tokio::time::sleep_until(since + OUTAGE).await,
            _ => std::future::pending().await,
        }
    }
}

struct Reports {
    client: Client,
    node: ObjectReference,
    /// Texts to publish, though they may be over by now: that the server was away is news when it
    /// is back.
    due: BTreeSet<String>,
    /// Texts that were published and still hold.
    published: BTreeSet<String>,
    /// One for each text: a recorder takes events that differ in nothing else for repetitions of the first.
    recorders: BTreeMap<String, Recorder>,
}

impl Reports {
    /// Whether something like this is to be published.
    fn is_due(&self, now: &BTreeSet<String>, is: impl Fn(&str) -> bool) -> bool {
        self.due.iter().chain(now.difference(&self.published)).any(|text| is(text))
    }

    async fn tell(&mut self, now: BTreeSet<String>) -> Result<(), kube::Error> {
        self.due.extend(now.difference(&self.published).take(TEXTS.saturating_sub(self.due.len())).cloned());
        while let Some(text) = self.due.first().cloned() {
            self.publish(EventType::Warning, "NetworkProblem", &text).await?;
            self.due.remove(&text);
            self.published.insert(text);
        }
        for text in self.published.clone().difference(&now) {
            self.publish(EventType::Normal, "NetworkProblemSolved", text).await?;
            self.published.remove(text);
        }
        Ok(())
    }

    async fn publish(&mut self, type_: EventType, reason: &str, text: &str) -> Result<(), kube::Error> {
        if self.recorders.len() > TEXTS {
            self.recorders.clear();
        }
        let recorder = self.recorders.entry(text.to_owned()).or_insert_with(|| {
            let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: self.node.name.clone() };
            Recorder::new(self.client.clone(), reporter)
        });
        recorder.publish(&event(type_, reason, text), &self.node).await
    }
}

fn event(type_: EventType, reason: &str, text: &str) -> Event {
    let end = (0..=NOTE.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(text[..end].to_owned()),
        action: "Networking".to_owned(),
        secondary: None,
    }
}

/// Node, as the kubelet refers to it in its own events: by its name also where others have a UID.
fn reference(node_name: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(node_name.to_owned()),
        uid: Some(node_name.to_owned()),
        ..ObjectReference::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::answers::Answers;
    use super::*;
    use axum::http::{Request, Response};
    use kube::client::Body;
    use tokio::sync::mpsc;
    use tower::service_fn;

    const AWAY: &str = "API server: cannot be reached; check --api-server";

    fn complaints(texts: &[&str]) -> BTreeSet<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn every_outage_is_one_and_nothing_else() {
        for failure in Failure::ALL {
            let text = format!("{API_SERVER}: {}; do this", failure.words());
            let want = !matches!(failure, Failure::Credentials | Failure::Rights | Failure::Trust);
            assert_eq!(is_outage(&text), want, "{text}");
        }
        assert!(!is_outage("Node n1: cannot be reached"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_news_after_a_minute() {
        let mut outage = Outage::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(outage.without_short(complaints(&[AWAY, "x"]), at(0)), complaints(&["x"]));
        outage.becomes_news().await;
        assert_eq!(start.elapsed(), OUTAGE);
        // It may show another side meanwhile.
        let other = "API server: answers with errors; see its log";
        assert_eq!(outage.without_short(complaints(&[other]), at(60)), complaints(&[other]));
        // A pause is its end.
        assert_eq!(outage.without_short(complaints(&[]), at(61)), complaints(&[]));
        assert_eq!(outage.without_short(complaints(&[AWAY]), at(62)), complaints(&[]));
        assert_eq!(outage.without_short(complaints(&[AWAY]), at(121)), complaints(&[]));
        assert_eq!(outage.without_short(complaints(&[AWAY]), at(122)), complaints(&[AWAY]));
    }

    /// Publishes the health's complaints to a server that takes all. Returns type and note of each event.
    fn publish(health: &Arc<Health>) -> (mpsc::UnboundedReceiver<(String, String)>, watch::Sender<bool>) {
        let (sent, events) = mpsc::unbounded_channel();
        let server = service_fn(move |request: Request<Body>| {
            let sent = sent.clone();
            async move {
                let bytes = request.into_body().collect_bytes().await?;
                let event: serde_json::Value = serde_json::from_slice(&bytes).expect("an event");
                let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
                sent.send((text("type"), text("note"))).expect("received");
                Ok::<_, kube::Error>(Response::new(Body::from(bytes)))
            }
        });
        let connection = Connection::new(Client::new(server, "default"), Answers::default());
        let (stop, shutdown) = watch::channel(false);
        tokio::spawn(run(connection, "n1".into(), Arc::clone(health), shutdown));
        (events, stop)
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_long_outage_is_published() {
        let health = Arc::new(Health::default());
        health.set_ready();
        let (mut events, _stop) = publish(&health);
        let seconds = |count| tokio::time::sleep(Duration::from_secs(count));
        let is = |kind: &str, note: &str| Ok((kind.to_owned(), note.to_owned()));

        health.set_problems(complaints(&[AWAY]));
        seconds(50).await;
        health.set_problems(complaints(&[]));
        seconds(600).await;
        assert!(events.try_recv().is_err(), "a short outage is no event");

        health.set_problems(complaints(&[AWAY, "x"]));
        seconds(50).await;
        assert_eq!(events.try_recv(), is("Warning", "x"), "what is this node's own is one at once");
        assert!(events.try_recv().is_err());
        seconds(20).await;
        assert_eq!(events.try_recv(), is("Warning", AWAY));
        health.set_problems(complaints(&["x"]));
        seconds(20).await;
        assert_eq!(events.try_recv(), is("Normal", AWAY));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let text = "ä".repeat(NOTE);
        assert_eq!(event(EventType::Warning, "r", &text).note.unwrap().len(), NOTE);
        let text = format!("x{text}");
        assert_eq!(event(EventType::Warning, "r", &text).note.unwrap().len(), NOTE - 1);
        assert_eq!(event(EventType::Warning, "r", "short").note.unwrap(), "short");
    }
}
