//! The source while the API server is away, cut off, or there and silent: what is reported, what stays, and how it goes on.

use super::cluster::{Agent, Cluster, Start, expected, with_absent_server, with_server};
use super::kube_source::{DNS, NODES, WEB, WEB_LATER, delete_service, direct, yaml};
use super::relay::Relay;
use anyhow::{Context as _, Result, ensure};
use rustnet_agent::api::Deadlines;
use rustnet_agent::source::Kind;
use std::time::Duration;

#[test]
fn changes_during_a_cut_are_caught_up_with() -> Result<()> {
    with_server(&[], async |mut server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NODES, WEB, DNS])).await?;
        let relay = Relay::start().await?;
        let mut agent = Agent::start(&server, Start::new(&relay.url())).await?;
        agent.wait_for_first_lists(&yaml(&[NODES, WEB, DNS])).await?;

        relay.cut();
        agent.wait("the cut is reported", |seen| seen.trouble.len() == Kind::ALL.len()).await?;
        delete_service(&cluster, "dns", &["dns-a"]).await?;
        cluster.apply(WEB_LATER).await?;
        cluster.delete("discovery.k8s.io/v1", "EndpointSlice", "web-b").await?;
        relay.repair();
        let seen = agent.wait_for_maps("what happened during the cut", &yaml(&[NODES, WEB_LATER])).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 1), "resumed, not listed again: {:?}", seen.lists);
        agent.wait("all is well again", |seen| seen.trouble.is_empty()).await?;

        // Now the server forgets where the watches stopped.
        relay.cut();
        agent.wait("the cut is reported", |seen| seen.trouble.len() == Kind::ALL.len()).await?;
        delete_service(&cluster, "web", &["web-a", "web-6"]).await?;
        cluster.apply(DNS).await?;
        cluster.delete("v1", "Node", "n2").await?;
        server.compact()?;
        server.stop_api();
        server.start_api()?;
        relay.repair();
        let one_node = NODES.split("---").next().unwrap_or_default();
        agent.wait_for_maps("what happened before the server forgot", &yaml(&[one_node, DNS])).await?;
        // The maps tell nothing of pods, which may come last.
        let seen =
            agent.wait("every kind is listed again", |seen| seen.lists.values().all(|lists| *lists >= 2)).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 2), "listed more than once: {:?}", seen.lists);
        agent.wait("all is well again", |seen| seen.trouble.is_empty()).await?;
        Ok(())
    })
}

#[test]
fn a_server_that_comes_late_or_goes_away_is_waited_for() -> Result<()> {
    with_absent_server(async |mut server| {
        let url = direct();
        let mut agent = Agent::start(&server, Start::new(&url)).await?;
        let seen = agent.wait("the absence is reported", |seen| !seen.trouble.is_empty()).await?;
        let report = seen.trouble.get("API server's version").context("the server's own report")?;
        ensure!(report.contains("refused"), "the cause is named: {report}");
        ensure!(!seen.synced && seen.lists.is_empty(), "nothing was listed: {seen:?}");

        server.start_api()?;
        let cluster = Cluster::new(&server)?;
        let all = yaml(&[NODES, WEB, DNS]);
        cluster.apply(&all).await?;
        let seen = agent.wait_for_maps("the first list", &all).await?;
        ensure!(seen.trouble.is_empty(), "{:?}", seen.trouble);

        server.stop_api();
        let seen = agent.wait("the absence is reported", |seen| seen.trouble.len() == Kind::ALL.len()).await?;
        ensure!(seen.dump == expected(&all)?, "the last known state stays");
        server.start_api()?;
        delete_service(&cluster, "dns", &["dns-a"]).await?;
        agent.wait_for_maps("a change after the return", &yaml(&[NODES, WEB])).await?;
        Ok(())
    })
}

/// A stopped API server, or a load balancer without one: the kernel answers for it, so that connections live, and nothing comes.
#[test]
fn a_server_that_accepts_and_stays_silent_is_noticed_and_left() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&yaml(&[NODES, WEB, DNS])).await?;
        let relay = Relay::start().await?;
        let url = relay.url();
        let second = Duration::from_secs(1);
        let deadlines = Deadlines { connection: second, head: second * 2, body: second * 5, silence: second * 3 };
        let mut agent = Agent::start(&server, Start { deadlines, ..Start::new(&url) }).await?;
        agent.wait_for_first_lists(&yaml(&[NODES, WEB, DNS])).await?;

        relay.hold();
        let seen = agent.wait("the silence is reported", |seen| seen.trouble.len() == Kind::ALL.len()).await?;
        ensure!(seen.dump == expected(&yaml(&[NODES, WEB, DNS]))?, "the last known state stays");
        let report = seen.trouble.get("watch of Service").context("its origin")?;
        ensure!(report.contains("within"), "the deadline is named: {report}");
        let metrics = agent.metrics.encode()?;
        for kind in Kind::ALL {
            let silence = format!("rustnet_source_silence_seconds{{kind=\"{kind}\"}} ");
            ensure!(metrics.contains(&silence), "{silence} is missing in {metrics}");
        }
        delete_service(&cluster, "dns", &["dns-a"]).await?;
        // For new connections only: those that there are stay silent for good.
        relay.repair();
        let seen = agent.wait_for_maps("what happened during the silence", &yaml(&[NODES, WEB])).await?;
        ensure!(seen.lists.values().all(|lists| *lists == 1), "resumed, not listed again: {:?}", seen.lists);
        agent.wait("all is well again", |seen| seen.trouble.is_empty()).await?;
        Ok(())
    })
}
