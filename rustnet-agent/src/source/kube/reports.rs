//! Tells people what is wrong with this node's network, and that it is well again: as Kubernetes events on the node's
//! object, which `kubectl describe node` shows.
//!
//! Only what concerns this node: what is wrong with a Service every agent sees, and a thousand nodes need not say it. Failures
//! are logged and tried again; the network does not depend on it.

use super::backoff::Backoff;
use super::chain;
use crate::health::Health;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const CONTROLLER: &str = "rustnet-agent";
/// Longest note that the API server takes.
const NOTE: usize = 1024;
/// So many texts are known again when they come again.
const TEXTS: usize = 64;
/// Complaints that come and go faster are not published one by one.
const PAUSE: Duration = Duration::from_secs(2);

/// Publishes whatever [`Health::complaints`] says newly, or no longer, until shutdown.
pub async fn run(client: Client, node_name: Arc<str>, health: Arc<Health>, mut shutdown: watch::Receiver<bool>) {
    let (due, published, recorders) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
    let mut reports = Reports { client, node: reference(&node_name), due, published, recorders };
    let work = async {
        let mut backoff = Backoff::default();
        let mut changes = health.changes();
        loop {
            let pause = match reports.tell(health.complaints()).await {
                Ok(()) => {
                    backoff = Backoff::default();
                    changes.changed().await;
                    PAUSE
                }
                Err(error) => {
                    tracing::warn!(node = &*node_name, error = chain(&error), "cannot publish an event, trying on");
                    backoff.next()
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
    use super::*;

    #[test]
    fn a_long_note_is_cut_between_characters() {
        let text = "ä".repeat(NOTE);
        assert_eq!(event(EventType::Warning, "r", &text).note.unwrap().len(), NOTE);
        let text = format!("x{text}");
        assert_eq!(event(EventType::Warning, "r", &text).note.unwrap().len(), NOTE - 1);
        assert_eq!(event(EventType::Warning, "r", "short").note.unwrap(), "short");
    }
}
