//! Counts the nodes, and spreads over time what the agents of all nodes would do at the same moment: the more nodes, the wider.
//! A restart of the API server reaches all agents at once, and it has to answer all of them.

use super::backoff::spread;
use std::collections::HashSet;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Together, the agents send a request of each kind this often.
const GAP: Duration = Duration::from_millis(10);
/// Bounds of the time over which they are spread.
const LEAST: Duration = Duration::from_secs(2);
const MOST: Duration = Duration::from_mins(1);

/// The nodes of the cluster, as far as they are known. Clones share one count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Herd(Arc<Mutex<Names>>);

/// Hashes of names: they are counted only.
#[derive(Debug, Default)]
struct Names {
    known: HashSet<u64>,
    /// Those of the list that is being read.
    listed: HashSet<u64>,
}

impl Herd {
    /// A list of all nodes begins.
    pub(crate) fn restart(&self) {
        self.with(|names| names.listed.clear());
    }

    /// There is such a node.
    pub(crate) fn saw(&self, name: &str) {
        self.with(|names| {
            names.known.insert(hash(name));
            names.listed.insert(hash(name));
        });
    }

    /// There is no such node any more.
    pub(crate) fn lost(&self, name: &str) {
        self.with(|names| {
            names.known.remove(&hash(name));
            names.listed.remove(&hash(name));
        });
    }

    /// The list is complete: others are gone.
    pub(crate) fn synced(&self) {
        self.with(|names| names.known.clone_from(&names.listed));
    }

    /// How long to wait before something that all agents do at the same moment.
    pub(crate) fn spread(&self) -> Duration {
        spread(self.width())
    }

    fn width(&self) -> Duration {
        let nodes = self.with(|names| u32::try_from(names.known.len()).unwrap_or(u32::MAX));
        GAP.saturating_mul(nodes).clamp(LEAST, MOST)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Names) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn hash(name: &str) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_nodes_keep_farther_apart() {
        let herd = Herd::default();
        assert_eq!(herd.width(), LEAST, "nothing is known yet");
        for i in 0..1000 {
            herd.saw(&format!("n{i}"));
            // As their heartbeats do.
            herd.saw("n0");
        }
        assert_eq!(herd.width(), Duration::from_secs(10));
        for i in 1000..10_000 {
            herd.saw(&format!("n{i}"));
        }
        assert_eq!(herd.width(), MOST);
        for i in 500..10_000 {
            herd.lost(&format!("n{i}"));
        }
        assert_eq!(herd.width(), Duration::from_secs(5));
    }

    #[test]
    fn a_list_replaces_what_was_known_once_it_is_complete() {
        let herd = Herd::default();
        for i in 0..1000 {
            herd.saw(&format!("n{i}"));
        }
        herd.restart();
        for i in 700..1000 {
            herd.saw(&format!("n{i}"));
        }
        assert_eq!(herd.width(), Duration::from_secs(10), "the list may be long");
        herd.synced();
        assert_eq!(herd.width(), Duration::from_secs(3));
    }
}
