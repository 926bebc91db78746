//! The source that watches a Kubernetes API server.
//!
//! One task a kind. Without network policies, the server is asked for this node's own Pods only, and for no
//! Namespaces and policies. Of ServiceCIDRs and ClusterNetworkPolicies, there may be none to ask for. Objects are
//! converted as they arrive and dropped: nothing is stored here, and what the agent keeps is the index's business. Lists are streamed where the server can (1.27 and later), else paged. A failed watch
//! is resumed where it broke off, with jittered back-off. When the server no longer has that place
//! (410), the kind is listed again, between [`Event::Restart`] and [`Event::Synced`]. So objects
//! that were deleted meanwhile go.

mod cluster_policy;
pub mod list;
mod readable;
mod slim;
mod store;
mod trouble;

use self::readable::Readable;
use self::slim::{SlimNode, SlimPod, SlimService, SlimServiceCidr};
use self::store::Store;
use self::trouble::Trouble;
use super::convert::{self, BadName, Converter};
use super::{Event, Kind, Origin};
use crate::api::backoff::{Backoff, spread};
use crate::api::{Connection, Failure, NodeStatus, chain};
use crate::metrics::Metrics;
use crate::model::Problem;
use futures::{StreamExt as _, pin_mut};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use tokio::time::Instant;

/// Objects of headless services and those that another proxy takes care of are not ours (kube-proxy's selector).
const OURS: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
/// Objects a page, where lists cannot be streamed.
const PAGE: u32 = 250;
/// How long a watch lasts in seconds, and by how much it may be shorter: watches that began together do not end together.
const WATCH: (u32, Duration) = (290, Duration::from_mins(1));
/// Between two attempts to list what the server does not have, or does not show to the agent; spread up to twice that.
const ABSENT: Duration = Duration::from_secs(150);
/// A source on an API server.
#[derive(Clone)]
pub struct KubeSource {
    connection: Connection,
    metrics: Metrics,
    node_status: NodeStatus,
    store: Arc<Store>,
    watch_seconds: Option<u32>,
    has_policies: bool,
}

impl KubeSource {
    /// A source on this API server. `node_status` hears of this node's object.
    pub fn new(connection: Connection, metrics: Metrics, node_status: NodeStatus) -> Self {
        Self { connection, metrics, node_status, store: Arc::default(), watch_seconds: None, has_policies: false }
    }

    /// Watches what network policies follow from, too, if they are wanted.
    #[must_use]
    pub fn with_policies(self, has_policies: bool) -> Self {
        Self { has_policies, ..self }
    }

    /// Ends each watch request after this time, to begin the next where it stopped. The default is below five minutes.
    #[must_use]
    pub fn watch_seconds(self, seconds: u32) -> Self {
        Self { watch_seconds: Some(seconds), ..self }
    }

    /// Delivers events until their receiver is gone. An unreachable server is waited for.
    pub async fn run(self, events: Sender<Event>) {
        let (has_policies, answers) = (self.has_policies, self.connection.answers.clone());
        let silence = move |kind| is_watched(kind, has_policies).then(|| answers.silence(kind));
        self.metrics.set_source_silence(Box::new(silence));
        let streaming = self.server_streams(&events).await;
        let Some(streaming) = streaming else { return };
        let kinds = async {
            tokio::join!(
                Follower::new::<SlimService>(&self, &events, streaming).follow::<SlimService>(),
                Follower::new::<EndpointSlice>(&self, &events, streaming).follow::<EndpointSlice>(),
                Follower::new::<SlimNode>(&self, &events, streaming).follow::<SlimNode>(),
                Follower::new::<SlimPod>(&self, &events, streaming).follow::<SlimPod>(),
                Follower::new::<SlimServiceCidr>(&self, &events, streaming).follow::<SlimServiceCidr>(),
                self.follow_policies(&events, streaming),
            )
        };
        tokio::select! {
            _ = kinds => {}
            () = self.store.follow(&self.connection) => {}
        }
    }

    async fn follow_policies(&self, events: &Sender<Event>, streaming: bool) {
        if self.has_policies {
            tokio::join!(
                Follower::new::<Namespace>(self, events, streaming).follow::<Namespace>(),
                Follower::new::<NetworkPolicy>(self, events, streaming).follow::<NetworkPolicy>(),
                cluster_policy::follow(self, events, streaming),
            );
        }
    }

    /// Waits for the server and asks whether it knows streaming lists: an older one would ignore the wish and never say
    /// where the list ends. `None`: the receiver is gone.
    async fn server_streams(&self, events: &Sender<Event>) -> Option<bool> {
        let mut trouble = Trouble::new("API server's version".into(), events);
        let mut backoff = Backoff::default();
        loop {
            match self.connection.client.apiserver_version().await {
                Ok(version) => {
                    trouble.over().await;
                    let streaming = streams(&version.major, &version.minor);
                    tracing::info!(version = version.git_version, streaming_lists = streaming, "API server reached");
                    return Some(streaming);
                }
                Err(error) => trouble.note(&chain(&error), Failure::of(&error)).await,
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next()) => {}
                () = events.closed() => return None,
            }
        }
    }
}

/// True if this kind is asked for.
fn is_watched(kind: Kind, has_policies: bool) -> bool {
    has_policies || !matches!(kind, Kind::Namespace | Kind::NetworkPolicy | Kind::ClusterNetworkPolicy)
}

/// Whether a server of this version knows streaming lists. One that hides its version is taken for a new one: if it does
/// not know them, it may say so.
fn streams(major: &str, minor: &str) -> bool {
    let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().ok();
    number(major).zip(number(minor)).is_none_or(|version| version >= (1, 27))
}

/// What the agent is for.
#[derive(Clone, Copy, Default)]
struct Wish<'a> {
    node_name: &'a str,
    has_policies: bool,
}

/// What differs between the kinds.
trait Watched: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static {
    const KIND: Kind;
    /// Asks for what is of use on this node, and nothing else.
    fn select(config: watcher::Config, wish: Wish<'_>) -> watcher::Config;
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName>;
    /// Looks at an object before it is dropped.
    fn seen(&self, _: &KubeSource) {}
}

impl<K: Watched> Readable<K> {
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        match self {
            Self::Whole(object) => object.convert(converter),
            Self::Broken { meta, why } => convert::unreadable(K::KIND, meta, why),
        }
    }
}

impl Watched for SlimService {
    const KIND: Kind = Kind::Service;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config.labels(OURS)
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.service(&self.0)
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::Slice;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config.labels(OURS)
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.slice(self)
    }
}

impl Watched for SlimNode {
    const KIND: Kind = Kind::Node;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.node(&self.0)
    }
    fn seen(&self, source: &KubeSource) {
        source.node_status.saw(&self.0);
        if let Some(name) = &self.0.metadata.name {
            source.connection.herd.saw(name);
        }
    }
}

impl Watched for SlimPod {
    const KIND: Kind = Kind::Pod;
    fn select(config: watcher::Config, wish: Wish<'_>) -> watcher::Config {
        // A node has a hundred of a cluster's hundred thousand. Policies select any of them.
        if wish.has_policies { config } else { config.fields(&format!("spec.nodeName={}", wish.node_name)) }
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.pod(&self.0)
    }
}

impl Watched for Namespace {
    const KIND: Kind = Kind::Namespace;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.namespace(self)
    }
}

impl Watched for NetworkPolicy {
    const KIND: Kind = Kind::NetworkPolicy;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.network_policy(self)
    }
}

impl Watched for SlimServiceCidr {
    const KIND: Kind = Kind::ServiceCidr;
    fn select(config: watcher::Config, _: Wish<'_>) -> watcher::Config {
        config
    }
    fn convert(&self, converter: &mut Converter) -> Result<Event, BadName> {
        converter.service_cidr(&self.0)
    }
}

/// After refusals for so long a server is taken to mean it.
const REFUSED: Duration = Duration::from_secs(15);

/// Follows one kind.
struct Follower<'a> {
    source: &'a KubeSource,
    events: &'a Sender<Event>,
    kind: Kind,
    /// The server's version knows streaming lists.
    streaming: bool,
    /// It has refused to stream the list that is due.
    paging: bool,
    /// The list is complete.
    listed: bool,
    /// A list has been complete before, or the server has none.
    has_listed: bool,
    converter: Converter,
    trouble: Trouble<'a>,
    /// Since when the server has refused, and nothing else. From [`REFUSED`] on this is reported, see [`Origin::Refusal`].
    refused_since: Option<Instant>,
    is_refused: bool,
    /// The answer that the server does not have the kind, or does not show it, for [`cluster_policy`].
    absence: Option<watcher::Error>,
    backoff: Backoff,
    /// Tells that the store is another one.
    replaced: watch::Receiver<()>,
    /// The list has begun, but nothing of it has arrived: a server that cannot be reached must not look like a relist.
    restarting: bool,
    closed: bool,
}

/// What to do after a failure.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Go on with the same stream: it resumes where it broke off.
    Resume,
    /// List again.
    Relist,
    /// The server does not stream this list: ask for pages.
    Page,
}

impl<'a> Follower<'a> {
    fn new<K: Watched>(source: &'a KubeSource, events: &'a Sender<Event>, streaming: bool) -> Self {
        Self {
            source,
            events,
            kind: K::KIND,
            streaming,
            paging: false,
            listed: false,
            has_listed: false,
            converter: Converter::new(),
            trouble: Trouble::new(Origin::Watch(K::KIND), events),
            refused_since: None,
            is_refused: false,
            absence: None,
            backoff: Backoff::default(),
            replaced: source.store.replacements(),
            restarting: false,
            closed: false,
        }
    }

    async fn follow<K: Watched>(mut self) {
        while !self.closed {
            self.one_stream::<K>().await;
        }
    }

    /// Follows one stream until it must be built again or the receiver is gone.
    async fn one_stream<K: Watched>(&mut self) {
        let wish = Wish { node_name: self.source.node_status.node_name(), has_policies: self.source.has_policies };
        let mut config = K::select(watcher::Config::default(), wish);
        let seconds = || WATCH.0.saturating_sub(u32::try_from(spread(WATCH.1).as_secs()).unwrap_or_default());
        config.timeout = Some(self.source.watch_seconds.unwrap_or_else(seconds));
        let streaming = self.streaming && !self.paging;
        // Not by the first event of the list alone: a server that refuses to stream it sends none.
        self.listed = false;
        config = if streaming { config.streaming_lists() } else { config.page_size(PAGE) };
        let stream = watcher(Api::<Readable<K>>::all(self.source.connection.client.clone()), config);
        pin_mut!(stream);
        while !self.closed {
            let source = self.source;
            let item = tokio::select! {
                item = stream.next() => item,
                () = source.connection.answers.of(self.kind).notified() => {
                    self.works().await;
                    continue;
                }
                // A sender that is gone tells nothing more.
                Ok(()) = self.replaced.changed() => return self.pause(source.connection.herd.spread()).await,
                () = self.events.closed() => { self.closed = true; return }
            };
            let error = match item {
                Some(Ok(event)) => {
                    self.forward(event).await;
                    continue;
                }
                Some(Err(error)) => error,
                None => return,
            };
            if self.kind == Kind::ServiceCidr && is_absent(&error) {
                return self.absent(&error).await;
            }
            if self.kind == Kind::ClusterNetworkPolicy && is_absent(&error) {
                self.absence = Some(error);
                return;
            }
            if self.source.has_policies && Kind::OF_POLICIES.contains(&self.kind) && is_absent(&error) {
                self.refused(&error).await;
            } else {
                self.refused_since = None;
            }
            self.source.metrics.source_failed(self.kind);
            let next = next_step(&error, streaming && !self.listed);
            let delay = match next {
                Next::Resume | Next::Page => self.backoff.next(),
                Next::Relist => self.backoff.next().max(source.connection.herd.spread()),
            };
            match next {
                // An ordinary part of a watch's life.
                Next::Relist => tracing::info!(kind = %self.kind, error = chain(&error), "listing again"),
                Next::Page => tracing::info!(kind = %self.kind, error = chain(&error), "no streaming lists: paging"),
                Next::Resume => self.trouble.note(&chain(&error), Failure::of_watch(&error)).await,
            }
            self.paging |= next == Next::Page;
            self.pause(delay).await;
            if next != Next::Resume {
                return;
            }
        }
    }

    /// The server does not have the kind, or does not show it: that is no failure. What was known of it stays.
    async fn absent(&mut self, error: &watcher::Error) {
        self.trouble.over().await;
        // It has answered.
        self.source.connection.answers.heard(self.kind);
        if !std::mem::replace(&mut self.has_listed, true) {
            tracing::info!(kind = %self.kind, error = chain(error), "not there: doing without");
            self.send(Event::Synced(self.kind)).await;
        }
        self.pause(ABSENT + spread(ABSENT)).await;
    }

    /// The server does not show a kind that network policies follow from. The node goes without rather than not at all, but not at
    /// once: a server that starts refuses everything until it has read its roles.
    async fn refused(&mut self, error: &watcher::Error) {
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= REFUSED && !std::mem::replace(&mut self.is_refused, true) {
            let (what, stays) = if self.kind == Kind::ClusterNetworkPolicy {
                ("ClusterNetworkPolicies", "those known since the agent started stay")
            } else {
                ("network policies", "what was enforced before stays")
            };
            let what = format!(
                "{}: {what} are not followed on this node, {stays}; apply deploy/rbac.yaml, or set \
                 --network-policy off",
                chain(error)
            );
            let problem = Problem::new(&self.kind.to_string().into(), "", what);
            self.send(Event::Report { origin: Origin::Refusal(self.kind), problems: [problem].into() }).await;
        }
    }

    /// The server answers.
    async fn works(&mut self) {
        self.trouble.over().await;
        self.refused_since = None;
        if std::mem::take(&mut self.is_refused) {
            self.send(Event::Report { origin: Origin::Refusal(self.kind), problems: Box::default() }).await;
        }
    }

    async fn pause(&mut self, delay: Duration) {
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = self.events.closed() => self.closed = true,
        }
    }

    async fn forward<K: Watched>(&mut self, event: watcher::Event<Readable<K>>) {
        use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
        let herd = (self.kind == Kind::Node).then_some(&self.source.connection.herd);
        if let Init = event {
            (self.restarting, self.listed) = (true, false);
            if let Some(herd) = herd {
                herd.restart();
            }
            return;
        }
        self.backoff.reset();
        self.works().await;
        if std::mem::take(&mut self.restarting) {
            self.source.metrics.source_restarted(self.kind);
            self.send(Event::Restart(self.kind)).await;
        }
        let converted = match event {
            Init => return,
            InitDone => {
                (self.listed, self.has_listed, self.paging) = (true, true, false);
                self.source.metrics.source_synced(self.kind);
                if let Some(herd) = herd {
                    herd.synced();
                }
                tracing::debug!(kind = %self.kind, "synced");
                return self.send(Event::Synced(self.kind)).await;
            }
            Apply(object) | InitApply(object) => {
                self.source.store.saw(self.kind, object.meta().resource_version.as_deref());
                if let Readable::Whole(object) = &object {
                    object.seen(self.source);
                }
                object.convert(&mut self.converter)
            }
            Delete(object) => {
                if let Some((herd, name)) = herd.zip(object.meta().name.as_ref()) {
                    herd.lost(name);
                }
                convert::reference(self.kind, object.meta()).map(Event::Delete)
            }
        };
        match converted {
            Ok(event) => {
                self.source.metrics.source_event(self.kind);
                self.send(event).await;
            }
            Err(error) => tracing::warn!(%error, "ignored"),
        }
    }

    async fn send(&mut self, event: Event) {
        self.closed |= self.events.send(event).await.is_err();
    }
}

/// True if the server says that it has no such kind (404), or that the agent may not see it (403).
fn is_absent(error: &watcher::Error) -> bool {
    use watcher::Error as E;
    match error {
        E::InitialListFailed(kube::Error::Api(status))
        | E::WatchStartFailed(kube::Error::Api(status))
        | E::WatchError(status) => matches!(status.code, 403 | 404),
        _ => false,
    }
}

fn next_step(error: &watcher::Error, streaming_list: bool) -> Next {
    use watcher::Error as E;
    let start_code = match error {
        E::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    };
    match (error, start_code) {
        // The server no longer has the state of which the next page would be.
        (E::InitialListFailed(kube::Error::Api(status)), _) if status.code == 410 => Next::Relist,
        // 400 and 422: the feature gate of streaming lists is off. 504: the server's cache does not catch up with its store, of
        // which pages are read.
        (_, Some(400 | 422 | 504)) if streaming_list => Next::Page,
        // The watch cannot begin where it should: at a place that is gone, or that the server has not reached yet, as after
        // a restored backup (504, "Too large resource version").
        (_, Some(400 | 410 | 422 | 504)) | (E::NoResourceVersion, _) => Next::Relist,
        (E::WatchError(status), _) if status.code == 410 => Next::Relist,
        // An event is lost of which not even the name can be read. A list in pages has what it was about.
        (E::WatchFailed(kube::Error::SerdeError(_)), _) if streaming_list => Next::Page,
        (E::WatchFailed(kube::Error::SerdeError(_)), _) => Next::Relist,
        // 500 in the stream: the server's store cannot do it (etcd before 3.4.31 and 3.5.13).
        (E::WatchError(status), _) if streaming_list && status.code != 429 => Next::Page,
        _ => Next::Resume,
    }
}

#[cfg(test)]
mod tests;
