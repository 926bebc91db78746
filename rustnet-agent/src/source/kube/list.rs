//! One list of all that Services follow from, without a watch: for commands that look once.

use super::readable::Readable;
use super::slim::{SlimNode, SlimService};
use super::{PAGE, Watched, Wish};
use crate::api::{Connection, chain};
use crate::source::convert::Converter;
use crate::source::{Event, Kind};
use anyhow::{Context, anyhow};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::ListParams;
use kube::runtime::watcher;
use std::time::Duration;

/// How long a page may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Services, EndpointSlices and Nodes, as a [`super::KubeSource`] delivers them.
///
/// # Errors
/// The server refuses one of the lists, or does not answer.
pub async fn list(connection: &Connection) -> anyhow::Result<Vec<Event>> {
    let mut events = list_kind::<SlimService>(connection).await?;
    events.extend(list_kind::<EndpointSlice>(connection).await?);
    events.extend(list_kind::<SlimNode>(connection).await?);
    events.extend(Kind::REQUIRED.map(Event::Synced));
    Ok(events)
}

async fn list_kind<K: Watched>(connection: &Connection) -> anyhow::Result<Vec<Event>> {
    let api = Api::<Readable<K>>::all(connection.client.clone());
    let selector = K::select(watcher::Config::default(), Wish::default()).label_selector;
    let mut params = ListParams { label_selector: selector, limit: Some(PAGE), ..ListParams::default() };
    let (mut converter, mut events) = (Converter::new(), Vec::new());
    loop {
        let page = tokio::time::timeout(PATIENCE, api.list(&params)).await;
        let page = page.with_context(|| format!("listing {}s: no answer within {} s", K::KIND, PATIENCE.as_secs()))?;
        let page = page.map_err(|error| anyhow!("listing {}s: {}", K::KIND, chain(&error)))?;
        for object in &page.items {
            match object.convert(&mut converter) {
                Ok(Event::Unreadable(_, problems)) => {
                    return Err(anyhow!("{}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")));
                }
                Ok(event) => events.push(event),
                // What cannot be named the agent leaves out, too.
                Err(_) => {}
            }
        }
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            return Ok(events);
        }
    }
}
