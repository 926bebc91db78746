//! The watch of ClusterNetworkPolicies, a custom resource. A server may have it in one version, in another, or not at all; it may come
//! and go at run time.

use super::{Follower, KubeSource, Watched, Wish};
use crate::api::chain;
use crate::source::convert::{BadName, Converter};
use crate::source::policy_api::{ClusterNetworkPolicy, GROUP, VERSIONS};
use crate::source::{Event, Kind};
use kube::Resource;
use kube::core::{ClusterResourceScope, ObjectMeta};
use kube::runtime::watcher;
use serde::{Deserialize, Deserializer};
use std::borrow::Cow;
use std::time::Duration;
use tokio::sync::mpsc::Sender;

/// Between two attempts to list what the server does not have, besides a while that grows with the number of nodes.
const AGAIN: Duration = Duration::from_secs(10);
/// How many times as long that while is as for lists that all agents want at once: most clusters never have the kind.
const SPREAD: u32 = 4;

/// A ClusterNetworkPolicy of one of [`VERSIONS`], by its place there.
#[derive(Clone, Debug)]
pub(super) struct OfVersion<const PLACE: usize>(ClusterNetworkPolicy);

impl<'de, const PLACE: usize> Deserialize<'de> for OfVersion<PLACE> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ClusterNetworkPolicy::deserialize(deserializer).map(Self)
    }
}

impl<const PLACE: usize> Resource for OfVersion<PLACE> {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "ClusterNetworkPolicy".into()
    }
    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }
    fn version((): &()) -> Cow<'_, str> {
        VERSIONS[PLACE].into()
    }
    fn plural((): &()) -> Cow<'_, str> {
        "clusternetworkpolicies".into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

impl<const PLACE: usize> Watched for OfVersion<PLACE> {
    const KIND: Kind = Kind::ClusterNetworkPolicy;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.cluster_network_policy(&self.0)
    }
}

/// Follows the version that the server has, until the receiver of the events is gone.
pub(super) async fn follow(source: &KubeSource, events: &Sender<Event>, streaming: bool) {
    let mut follower = Follower::new::<OfVersion<0>>(source, events, streaming);
    let (mut has_synced, mut absences) = (false, 0);
    while !follower.closed {
        follower.one_stream::<OfVersion<0>>().await;
        let first = follower.absence.take();
        if first.is_some() {
            follower.one_stream::<OfVersion<1>>().await;
        }
        has_synced |= follower.has_listed;
        let Some(error) = follower.absence.take() else {
            absences = 0;
            continue;
        };
        if first.iter().chain([&error]).all(is_not_found) {
            absences += 1;
            follower.works().await;
            // Objects go with their kind. A server that starts says 503 until it knows its kinds (CRDInformerHasNotSynced), so that the
            // first look may count. What was known goes only if a second look agrees.
            if absences > 1 && std::mem::take(&mut follower.has_listed) {
                tracing::info!(kind = %follower.kind, "not there any more");
                follower.send(Event::Restart(follower.kind)).await;
                follower.send(Event::Synced(follower.kind)).await;
            }
        } else {
            absences = 0;
            follower.refused(first.as_ref().filter(|it| !is_not_found(it)).unwrap_or(&error)).await;
        }
        // Without them, or without the right to see them, NetworkPolicies are enforced at least.
        if !has_synced && (absences > 0 || follower.is_refused) {
            tracing::info!(kind = %follower.kind, error = chain(&error), "not there: doing without");
            has_synced = true;
            follower.send(Event::Synced(follower.kind)).await;
        }
        follower.source.connection.answers.heard(follower.kind);
        follower.pause(AGAIN + follower.source.connection.herd.spread() * SPREAD).await;
    }
}

/// True if the server does not have what was asked for; else it does not show it.
fn is_not_found(error: &watcher::Error) -> bool {
    use watcher::Error as E;
    match error {
        E::InitialListFailed(kube::Error::Api(status))
        | E::WatchStartFailed(kube::Error::Api(status))
        | E::WatchError(status) => status.code == 404,
        _ => false,
    }
}
