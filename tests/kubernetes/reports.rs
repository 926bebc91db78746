//! Problems of a node's network, published as events with the agent's own rights.

use super::cluster::{Agent, Cluster, NODE, with_server};
use super::kube_source::{NAMESPACE, RBAC, direct, yaml};
use super::server::{ADMIN, AGENT, Server};
use anyhow::{Context as _, Result};
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams};
use rustnet_agent::api::reports;
use rustnet_agent::health::{Health, NotReady};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const BROKEN: &str = "/opt/cni/bin/rustnet-cni: cannot write; check that the directory exists and is writable";
const TWICE: &str = "Node n1: status.addresses: 192.0.2.1 belongs to node n2; give each node addresses of its own";

#[test]
fn problems_of_this_node_are_events_on_its_object() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        let health = Arc::new(Health::default());
        let (_stop, shutdown) = watch::channel(false);
        let connection = Agent::connect(&server, AGENT, &direct()).await?;
        health.set_not_ready(NotReady::Failed(BROKEN.to_owned()));
        tokio::spawn(reports::run(connection, NODE.into(), health.clone(), shutdown));
        // Without the right to tell, it is tried until there is one.
        cluster.apply(&yaml(&[NAMESPACE, RBAC])).await?;
        wait_for_events(&server, &[("Warning", BROKEN)]).await?;
        health.set_ready();
        health.set_problems([TWICE.to_owned()].into());
        let both = [("Warning", BROKEN), ("Normal", BROKEN), ("Warning", TWICE)];
        wait_for_events(&server, &both).await?;
        // Once more: it is the same event that comes again, which takes another right.
        health.set_not_ready(NotReady::Failed(BROKEN.to_owned()));
        health.set_problems(BTreeSet::new());
        wait_for_events(&server, &[&both[..], &[("Normal", TWICE)]].concat()).await?;
        again(&server, BROKEN).await
    })
}

/// The events that the agent has published.
pub async fn events(server: &Server) -> Result<Vec<Event>> {
    let events = Api::<Event>::namespaced(server.client(ADMIN)?, "default").list(&ListParams::default()).await?;
    let ours = |event: &Event| event.reporting_controller.as_deref() == Some("rustnet-agent");
    Ok(events.items.into_iter().filter(ours).collect())
}

/// Waits until these events, and no others, are there: type and note.
pub async fn wait_for_events(server: &Server, want: &[(&str, &str)]) -> Result<()> {
    let want: BTreeSet<_> = want.iter().map(|(kind, note)| ((*kind).to_owned(), (*note).to_owned())).collect();
    eventually(&format!("the events are {want:?}"), async || {
        let events = events(server).await?;
        let about_us = |event: &Event| {
            let regarding = event.regarding.as_ref();
            regarding.is_some_and(|it| it.kind.as_deref() == Some("Node") && it.name.as_deref() == Some(NODE))
        };
        let got: BTreeSet<_> = events
            .iter()
            .map(|event| (event.type_.clone().unwrap_or_default(), event.note.clone().unwrap_or_default()))
            .collect();
        Ok(events.iter().all(about_us) && got == want)
    })
    .await
}

/// Waits until this event has happened more than once.
pub async fn again(server: &Server, note: &str) -> Result<()> {
    eventually(&format!("{note:?} again"), async || {
        let repeated = |event: &Event| {
            event.type_.as_deref() == Some("Warning")
                && event.note.as_deref() == Some(note)
                && event.series.as_ref().is_some_and(|series| series.count >= 2)
        };
        Ok(events(server).await?.iter().any(repeated))
    })
    .await
}

async fn eventually(what: &str, test: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let tries = async {
        while !test().await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_mins(1), tries).await.with_context(|| format!("not so: {what}"))?
}
