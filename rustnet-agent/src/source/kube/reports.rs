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
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const CONTROLLER: &str = "rustnet-agent";
/// Longest note that the API server takes.
const NOTE: usize = 1024;
/// What comes and goes faster is not told one by one.
const PAUSE: Duration = Duration::from_secs(2);

/// Publishes whatever [`Health::complaints`] says newly, or no longer, until shutdown.
pub async fn run(client: Client, node_name: Arc<str>, health: Arc<Health>, mut shutdown: watch::Receiver<bool>) {
    let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(node_name.to_string()) };
    let recorder = Recorder::new(client, reporter);
    let node = reference(&node_name);
    let work = async {
        let mut told = BTreeSet::new();
        let mut backoff = Backoff::default();
        let mut changes = health.changes();
        loop {
            let pause = match tell(&recorder, &node, &mut told, health.complaints()).await {
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

async fn tell(
    recorder: &Recorder,
    node: &ObjectReference,
    told: &mut BTreeSet<String>,
    now: BTreeSet<String>,
) -> Result<(), kube::Error> {
    for text in now.difference(&told.clone()) {
        recorder.publish(&event(EventType::Warning, "NetworkProblem", text), node).await?;
        told.insert(text.clone());
    }
    for text in told.clone().difference(&now) {
        recorder.publish(&event(EventType::Normal, "NetworkProblemSolved", text), node).await?;
        told.remove(text);
    }
    Ok(())
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
