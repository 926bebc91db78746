//! A record of the API server's answers while they last, by the kind that was asked for: a watch that works again may stay
//! silent, and a server that has stopped sends nothing.

use crate::source::Kind;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Signals successful answers, and records when the server last sent anything. Clones share one record.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kinds: [Notify; Kind::ALL.len()],
    any: Notify,
    heard: Mutex<[Instant; Kind::ALL.len()]>,
}

impl Default for Inner {
    fn default() -> Self {
        let heard = Mutex::new([Instant::now(); Kind::ALL.len()]);
        Self { kinds: Default::default(), any: Notify::default(), heard }
    }
}

impl Answers {
    /// For waiting until the server has begun to answer a request for this kind.
    pub(crate) fn of(&self, kind: Kind) -> &Notify {
        &self.0.kinds[kind as usize]
    }

    /// The same for any kind.
    pub(crate) fn any(&self) -> &Notify {
        &self.0.any
    }

    /// For how long the server has sent nothing of this kind. Until the first answer, it counts from the start of the agent:
    /// a server that never answers raises the same alert as one that stops.
    pub(crate) fn silence(&self, kind: Kind) -> Duration {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize].elapsed()
    }

    /// A successful answer has begun.
    pub(crate) fn begun(&self, kind: Kind) {
        self.heard(kind);
        self.of(kind).notify_one();
        self.any().notify_one();
    }

    /// A part of an answer has come.
    pub(crate) fn heard(&self, kind: Kind) {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize] = Instant::now();
    }
}

/// The kind that a request for this path lists or watches: kinds are asked for in all namespaces.
pub(crate) fn kind_of(path: &str) -> Option<Kind> {
    let resources = [
        ("/api/v1/services", Kind::Service),
        ("/apis/discovery.k8s.io/v1/endpointslices", Kind::Slice),
        ("/api/v1/nodes", Kind::Node),
        ("/api/v1/pods", Kind::Pod),
        ("/api/v1/namespaces", Kind::Namespace),
        ("/apis/networking.k8s.io/v1/networkpolicies", Kind::NetworkPolicy),
        ("/apis/networking.k8s.io/v1/servicecidrs", Kind::ServiceCidr),
        ("/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies", Kind::ClusterNetworkPolicy),
        ("/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies", Kind::ClusterNetworkPolicy),
    ];
    // The server may be at a path of its own.
    resources.into_iter().find(|(resource, _)| path.ends_with(resource)).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_in_all_namespaces_counts() {
        for (path, want) in [
            ("/api/v1/services", Some(Kind::Service)),
            ("/apis/discovery.k8s.io/v1/endpointslices", Some(Kind::Slice)),
            ("/k8s/clusters/c-1/api/v1/nodes", Some(Kind::Node)),
            ("/api/v1/pods", Some(Kind::Pod)),
            ("/apis/networking.k8s.io/v1/servicecidrs", Some(Kind::ServiceCidr)),
            ("/api/v1/nodes/n1", None),
            ("/api/v1/nodes/nodes", None),
            ("/api/v1/namespaces/default/services", None),
            ("/apis/events.k8s.io/v1/namespaces/default/events", None),
            ("/version", None),
        ] {
            assert_eq!(kind_of(path), want, "{path}");
        }
    }

    #[test]
    fn silence_is_counted_by_kind_and_from_the_start() {
        let answers = Answers::default();
        let heard = |kind: Kind| answers.0.heard.lock().expect("no panic")[kind as usize];
        let start = heard(Kind::Node);
        while start.elapsed().is_zero() {}
        answers.begun(Kind::Node);
        assert!(heard(Kind::Node) > start);
        assert_eq!(heard(Kind::Pod), start);
        let since_start = start.elapsed();
        assert!(answers.silence(Kind::Pod) >= since_start);
    }
}
