//! Notices that another store is behind the API server's address: one restored from a backup, or another cluster's.
//!
//! A watch that is resumed there may stay silent until the new store's versions have passed the old
//! one's, and reports no deletions. So the agent reads the store's version whenever a watch has
//! been answered. A store that is behind what was seen of it, or whose `kubernetes` Service is
//! another one, is another store: every kind is listed again.
//!
//! Only versions of Services are compared: other kinds may be in stores of their own (`--etcd-servers-overrides`).

use super::backoff::Backoff;
use super::chain;
use super::client::Connection;
use crate::source::Kind;
use k8s_openapi::api::core::v1::Service;
use kube::Api;
use kube::api::ListParams;
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

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
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.version = seen.version.max(version);
        }
    }

    /// Asks after each answer, for ever.
    pub(super) async fn follow(&self, connection: &Connection) {
        loop {
            connection.answers.any().notified().await;
            let mut backoff = Backoff::default();
            while let Err(error) = self.ask(connection).await {
                // The watches have the same trouble, and tell of it.
                tracing::debug!(error = chain(&error), "cannot ask for the store's version");
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }

    async fn ask(&self, connection: &Connection) -> Result<(), kube::Error> {
        // Before the question: what is delivered meanwhile may be newer than the answer.
        let before = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let services = Api::<Service>::namespaced(connection.client.clone(), "default");
        // Without a version of ours, the answer is as new as the store.
        let list = services.list_metadata(&ListParams::default().fields("metadata.name=kubernetes")).await?;
        let version = list.metadata.resource_version.and_then(|text| text.parse().ok()).unwrap_or(0);
        let cluster = list.items.into_iter().find_map(|service| service.metadata.uid);
        self.compare(&before, Sight { version, cluster });
        Ok(())
    }

    fn compare(&self, before: &Sight, mut now: Sight) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if before.is_other_than(&now) {
            tracing::warn!(?before, ?now, "another store is behind the API server's address: listing again");
            *seen = now;
            drop(seen);
            self.replaced.send_replace(());
            return;
        }
        now.version = now.version.max(seen.version);
        now.cluster = now.cluster.or_else(|| seen.cluster.take());
        *seen = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn what_is_delivered_during_the_question_is_no_proof() {
        let store = Store::default();
        let replaced = store.replacements();
        store.saw(Kind::Service, Some("5"));
        let before = sight(5, "");
        store.saw(Kind::Service, Some("9"));
        store.compare(&before, sight(7, "a"));
        assert!(!replaced.has_changed().unwrap());
        store.compare(&sight(9, "a"), sight(7, ""));
        assert!(replaced.has_changed().unwrap());
        assert_eq!(*store.seen.lock().unwrap(), sight(7, ""), "the new store's versions count");
    }

    #[test]
    fn versions_of_other_kinds_prove_nothing() {
        let store = Store::default();
        let replaced = store.replacements();
        store.saw(Kind::Service, Some("5"));
        store.saw(Kind::Pod, Some("900"));
        let before = store.seen.lock().unwrap().clone();
        store.compare(&before, sight(7, "a"));
        assert!(!replaced.has_changed().unwrap(), "pods may be in a store of their own");
    }
}
