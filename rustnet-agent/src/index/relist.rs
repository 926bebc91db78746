//! Which kinds have been delivered in full, and which objects a fresh list has named so far.

use crate::model::ObjectName;
use crate::source::{Kind, ObjectRef};
use std::collections::{HashMap, HashSet};

/// Follows `Restart` and `Synced` events.
#[derive(Debug, Default)]
pub struct Relist {
    synced: HashSet<Kind>,
    running: HashMap<Kind, HashSet<ObjectName>>,
}

impl Relist {
    /// A fresh list of this kind begins; one that was running is void.
    pub fn restart(&mut self, kind: Kind) {
        self.running.insert(kind, HashSet::new());
    }

    /// An object was named.
    pub fn saw(&mut self, object: &ObjectRef) {
        if let Some(seen) = self.running.get_mut(&object.kind) {
            seen.insert(object.name.clone());
        }
    }

    /// The list of this kind is complete. Gives the objects that it named, if it was announced: all others are gone.
    pub fn synced(&mut self, kind: Kind) -> Option<HashSet<ObjectName>> {
        self.synced.insert(kind);
        self.running.remove(&kind)
    }

    /// True once a full list of this kind has been seen.
    pub fn has_synced(&self, kind: Kind) -> bool {
        self.synced.contains(&kind)
    }
}
