//! Which of the source's events are changes, and since when those wait to be in the maps.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use crate::model::ObjectName;
use crate::source::{Event, Kind, Object};

/// Follows the events of a source.
#[derive(Debug)]
pub struct Changes {
    /// Triggers from before say nothing of this agent.
    start: SystemTime,
    /// Kinds whose full list is being delivered: it repeats what is known.
    lists: HashSet<Kind>,
    /// What set off the last change of each slice, as the slice says.
    triggers: HashMap<ObjectName, SystemTime>,
    /// Triggers whose changes are not applied yet.
    waiting: Vec<SystemTime>,
}

impl Changes {
    /// Nothing has happened yet.
    pub fn new(start: SystemTime) -> Self {
        Self { start, lists: HashSet::new(), triggers: HashMap::new(), waiting: Vec::new() }
    }

    /// Takes in an event; returns whether it counts as a change of its object.
    pub fn received(&mut self, event: &Event) -> bool {
        match event {
            Event::Restart(kind) => drop(self.lists.insert(*kind)),
            Event::Synced(kind) => drop(self.lists.remove(kind)),
            Event::Apply(Object::Slice(slice)) => {
                if let Some(at) = slice.triggered {
                    let is_news = self.triggers.insert(slice.name.clone(), at) != Some(at);
                    self.waiting.extend((is_news && at > self.start).then_some(at));
                }
            }
            Event::Delete(object) if object.kind == Kind::Slice => drop(self.triggers.remove(&object.name)),
            Event::Apply(_) | Event::Delete(_) | Event::Reject(..) | Event::Unreadable(..) | Event::Report { .. } => {}
        }
        event.object_kind().is_some_and(|kind| !self.lists.contains(&kind))
    }

    /// All events so far have been applied. Returns how long each trigger has taken.
    pub fn applied(&mut self, now: SystemTime) -> impl Iterator<Item = Duration> + '_ {
        self.waiting.drain(..).map(move |at| now.duration_since(at).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::{Changes, Duration, Event, Kind, SystemTime};
    use crate::model::{EndpointSlice, Family, build};
    use crate::source::ObjectRef;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn slice(name: &str, triggered: u64) -> Event {
        EndpointSlice { triggered: Some(at(triggered)), ..build::slice(name, "web", Family::V4) }.apply()
    }

    #[test]
    fn a_list_repeats_and_is_no_change() {
        let mut changes = Changes::new(at(0));
        assert!(changes.received(&slice("a", 1)));
        assert!(!changes.received(&Event::Restart(Kind::Slice)));
        assert!(!changes.received(&slice("a", 1)));
        assert!(changes.received(&build::service("web", &[]).apply()), "another kind goes on");
        assert!(!changes.received(&Event::Synced(Kind::Slice)));
        assert!(changes.received(&slice("a", 2)));
    }

    #[test]
    fn each_trigger_counts_once_and_only_since_the_start() {
        let mut changes = Changes::new(at(100));
        for event in [slice("a", 90), slice("b", 101), slice("b", 101), slice("c", 103)] {
            changes.received(&event);
        }
        let took: Vec<_> = changes.applied(at(105)).map(|took| took.as_secs()).collect();
        assert_eq!(took, [4, 2]);
        assert_eq!(changes.applied(at(106)).count(), 0);
        let gone = ObjectRef { kind: Kind::Slice, name: crate::model::ObjectName::namespaced("default", "b") };
        changes.received(&Event::Delete(gone));
        changes.received(&slice("b", 101));
        assert_eq!(changes.applied(at(107)).count(), 1, "a new slice of the old name");
    }
}
