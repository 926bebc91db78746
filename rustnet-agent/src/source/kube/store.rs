//! Notices that another store is behind the API server's address: one restored from a backup, or another cluster's.
//!
//! A watch that is resumed there may stay silent until the new store's versions have passed the old
//! one's, and reports no deletions. So the agent reads the store's version whenever a watch has
//! been answered. A store that is behind what was seen of it, or whose `kubernetes` Service is
//! another one, may be another store: if a second look, some time later, agrees, every kind is listed again. One look proves
//! nothing, as the answers of some servers (etcd's replacements, caches) lag behind what they have delivered already. And
//! to be wrong about it costs all lists of all nodes: it is believed once in five minutes.
//!
//! Only versions of Services are compared: other kinds may be in stores of their own (`--etcd-servers-overrides`).

use crate::api::backoff::{Backoff, spread};
use crate::api::herd::Herd;
use crate::api::{Connection, chain};
use crate::source::Kind;
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::ListParams;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

/// How far the store is, and whose it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sight {
    /// The newest version; 0 if versions are no numbers there.
    version: u64,
    /// UID of the `kubernetes` Service, which every API server makes when it begins.
    cluster: Option<String>,
}

impl Sight {
    /// Whether this cannot have been before `later` in one store.
    fn is_other_than(&self, later: &Self) -> bool {
        let both = self.cluster.as_ref().zip(later.cluster.as_ref());
        (later.version != 0 && later.version < self.version) || both.is_some_and(|(one, other)| one != other)
    }
}

/// Between the look that suspects another store and the one that must agree; spread up to twice that, and by the number of nodes.
const SECOND_LOOK: Duration = Duration::from_secs(5);
/// Between two replacements that are believed.
const BRAKE: Duration = Duration::from_mins(5);

/// What is known of the store.
#[derive(Debug)]
pub(super) struct Store {
    seen: Mutex<Sight>,
    replaced: watch::Sender<()>,
}

impl Default for Store {
    fn default() -> Self {
        Self { seen: Mutex::default(), replaced: watch::Sender::new(()) }
    }
}

impl Store {
    /// Hears of every replacement from now on.
    pub(super) fn replacements(&self) -> watch::Receiver<()> {
        self.replaced.subscribe()
    }

    /// An object of this kind and version was delivered.
    pub(super) fn saw(&self, kind: Kind, version: Option<&str>) {
        let counts = kind == Kind::Service;
        if let Some(version) = version.filter(|_| counts).and_then(|text| text.parse().ok()) {
            let mut seen = self.seen();
            seen.version = seen.version.max(version);
        }
    }

    /// Asks after each answer, for ever.
    pub(super) async fn follow(&self, connection: &Connection) {
        let answered = || connection.answers.any().notified();
        self.watch_over(&connection.herd, answered, || look(connection)).await;
    }

    async fn watch_over<A, L>(&self, herd: &Herd, answered: impl Fn() -> A, look: impl Fn() -> L)
    where
        A: Future<Output = ()>,
        L: Future<Output = Result<Sight, kube::Error>>,
    {
        let mut replaced_at: Option<Instant> = None;
        loop {
            answered().await;
            // The watches of all nodes may have been answered at the same moment. One look serves all of this node's.
            sleep(herd.spread()).await;
            let Some(before) = self.suspects(&look).await else { continue };
            sleep(SECOND_LOOK + spread(SECOND_LOOK) + herd.spread()).await;
            if let Some(at) = replaced_at {
                sleep_until(at + BRAKE).await;
            }
            if self.agrees(&before, &look).await {
                replaced_at = Some(Instant::now());
            }
        }
    }

    /// Looks; if it seems to be another store, returns what was known before.
    async fn suspects<L>(&self, look: impl Fn() -> L) -> Option<Sight>
    where
        L: Future<Output = Result<Sight, kube::Error>>,
    {
        let (before, now) = self.compare(look).await;
        if before.is_other_than(&now) {
            tracing::debug!(?before, ?now, "another store may be behind the API server's address");
            return Some(before);
        }
        let mut seen = self.seen();
        seen.version = seen.version.max(now.version);
        seen.cluster = now.cluster.or_else(|| seen.cluster.take());
        None
    }

    /// Looks again; if it is still another store than `before`, everything is listed again.
    async fn agrees<L>(&self, before: &Sight, look: impl Fn() -> L) -> bool
    where
        L: Future<Output = Result<Sight, kube::Error>>,
    {
        let (_, now) = self.compare(look).await;
        // Not with what was delivered meanwhile: whoever lags behind that may have reached what was delivered before.
        if !before.is_other_than(&now) {
            return false;
        }
        tracing::warn!(?before, ?now, "another store is behind the API server's address: listing again");
        *self.seen() = now;
        self.replaced.send_replace(());
        true
    }

    /// What was known before a look, and what it shows: what is delivered meanwhile may be newer than the answer.
    async fn compare<L>(&self, look: impl Fn() -> L) -> (Sight, Sight)
    where
        L: Future<Output = Result<Sight, kube::Error>>,
    {
        let mut backoff = Backoff::default();
        loop {
            let before = self.seen().clone();
            match look().await {
                Ok(now) => return (before, now),
                Err(error) => {
                    // The watches have the same trouble, and tell of it.
                    tracing::debug!(error = chain(&error), "cannot ask for the store's version");
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    fn seen(&self) -> MutexGuard<'_, Sight> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks for the store's version, and whose it is.
async fn look(connection: &Connection) -> Result<Sight, kube::Error> {
    let services = Api::<Service>::namespaced(connection.client.clone(), "default");
    // Without a version of ours, the answer is as new as the store.
    let list = services.list_metadata(&ListParams::default().fields("metadata.name=kubernetes")).await?;
    let version = list.metadata.resource_version.and_then(|text| text.parse().ok()).unwrap_or(0);
    let cluster = list.items.into_iter().find_map(|service| service.metadata.uid);
    Ok(Sight { version, cluster })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn sight(version: u64, cluster: &str) -> Sight {
        Sight { version, cluster: (!cluster.is_empty()).then(|| cluster.to_owned()) }
    }

    #[test]
    fn a_store_that_is_behind_or_anothers_is_another() {
        for (before, now, want) in [
            (sight(0, ""), sight(7, "a"), false),
            (sight(7, "a"), sight(7, "a"), false),
            (sight(7, "a"), sight(9, "a"), false),
            (sight(7, "a"), sight(6, "a"), true),
            (sight(7, "a"), sight(9, "b"), true),
            // An API server that has just begun has no such Service yet; versions need not be numbers.
            (sight(7, "a"), sight(9, ""), false),
            (sight(7, "a"), sight(0, "a"), false),
        ] {
            assert_eq!(before.is_other_than(&now), want, "{before:?} {now:?}");
        }
    }

    /// A store whose looks give these sights, the last again and again, for as long as there are answers: one every ten seconds.
    /// Returns how often it was taken for another one.
    async fn replacements(store: &Store, sights: Vec<Sight>, lasting: Duration) -> usize {
        let (mut replaced, next) = (store.replacements(), AtomicUsize::new(0));
        let look = || async {
            let at = next.fetch_add(1, Ordering::Relaxed).min(sights.len() - 1);
            Ok(sights[at].clone())
        };
        let count = async {
            let mut count = 0;
            let end = sleep(lasting);
            tokio::pin!(end);
            loop {
                tokio::select! {
                    () = &mut end => return count,
                    changed = replaced.changed() => {
                        changed.expect("the store is there");
                        count += 1;
                        // Where versions lag, what is delivered is ahead of them again.
                        store.saw(Kind::Service, Some("100"));
                    }
                }
            }
        };
        let herd = Herd::default();
        tokio::select! {
            count = count => count,
            () = store.watch_over(&herd, || sleep(Duration::from_secs(10)), look) => unreachable!("it goes on for ever"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn another_store_is_believed_when_a_second_look_agrees() {
        let store = Store::default();
        store.saw(Kind::Service, Some("9"));
        let looks = vec![sight(9, "a"), sight(3, "a"), sight(4, "a")];
        assert_eq!(replacements(&store, looks, Duration::from_mins(1)).await, 1);
        let store = Store::default();
        store.saw(Kind::Service, Some("5"));
        let looks = vec![sight(5, "a"), sight(9, "b")];
        assert_eq!(replacements(&store, looks, Duration::from_mins(1)).await, 1);
        assert_eq!(store.seen().cluster.as_deref(), Some("b"), "the new store is the known one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_lags_is_no_other_store() {
        let store = Store::default();
        store.saw(Kind::Service, Some("100"));
        // Behind what was delivered, and level with it a moment later, again and again.
        let looks = (0..1000).map(|i| sight(if i % 2 == 0 { 99 } else { 100 }, "a")).collect();
        assert_eq!(replacements(&store, looks, Duration::from_hours(1)).await, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_always_lags_costs_a_list_in_five_minutes() {
        let store = Store::default();
        store.saw(Kind::Service, Some("100"));
        let count = replacements(&store, vec![sight(50, "a")], Duration::from_hours(1)).await;
        assert!((1..=12).contains(&count), "{count}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_delivered_during_the_question_is_no_proof() {
        let store = Store::default();
        store.saw(Kind::Service, Some("5"));
        let delivered_meanwhile = || async {
            store.saw(Kind::Service, Some("9"));
            Ok(sight(7, "a"))
        };
        assert_eq!(store.suspects(delivered_meanwhile).await, None);
        assert_eq!(store.suspects(async || Ok(sight(7, "a"))).await, Some(sight(9, "a")));
    }

    /// A list names objects in the order of their names.
    #[tokio::test(start_paused = true)]
    async fn the_newest_version_counts_whenever_it_came() {
        let store = Store::default();
        for version in ["5", "9", "6"] {
            store.saw(Kind::Service, Some(version));
        }
        assert_eq!(store.suspects(async || Ok(sight(7, "a"))).await, Some(sight(9, "")));
    }

    /// An API server that has just begun has no such Service yet: whose the store was is known all the same.
    #[tokio::test(start_paused = true)]
    async fn a_look_without_the_service_forgets_nothing() {
        let store = Store::default();
        for seen in [sight(5, "a"), sight(6, "")] {
            assert_eq!(store.suspects(async || Ok(seen.clone())).await, None);
        }
        assert_eq!(store.suspects(async || Ok(sight(7, "b"))).await, Some(sight(6, "a")));
    }

    #[tokio::test(start_paused = true)]
    async fn versions_of_other_kinds_prove_nothing() {
        let store = Store::default();
        store.saw(Kind::Service, Some("5"));
        store.saw(Kind::Pod, Some("900"));
        assert_eq!(store.suspects(async || Ok(sight(7, "a"))).await, None, "pods may be in a store of their own");
    }
}
