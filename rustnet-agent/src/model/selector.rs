//! Labels, and selectors of them.

use std::fmt;
use std::sync::Arc;

use super::Pool;

/// Labels of an object, by key. Objects with the same labels share one copy if they come from one [`Labels::intern`] pool.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(Arc<[Label]>);

/// A key and its value.
type Label = (Arc<str>, Arc<str>);

/// A pool of sets of labels: replicas of one workload have the same.
pub type LabelPool = Pool<[Label]>;

impl Labels {
    /// Labels from their keys and values, with the copies of two pools.
    pub fn intern<'a>(
        given: impl Iterator<Item = (&'a str, &'a str)>,
        strings: &mut Pool<str>,
        sets: &mut LabelPool,
    ) -> Self {
        let mut labels: Vec<Label> = given.map(|(key, value)| (strings.intern(key), strings.intern(value))).collect();
        labels.sort_unstable();
        labels.dedup_by(|a, b| a.0 == b.0);
        Self(sets.intern(&labels))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let place = self.0.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        self.0.get(place).map(|(_, value)| &**value)
    }
}

impl FromIterator<(Arc<str>, Arc<str>)> for Labels {
    fn from_iter<T: IntoIterator<Item = (Arc<str>, Arc<str>)>>(labels: T) -> Self {
        let mut labels: Vec<Label> = labels.into_iter().collect();
        labels.sort_unstable();
        labels.dedup_by(|a, b| a.0 == b.0);
        Self(labels.into())
    }
}

/// A selector of labels: all of its requirements hold. The empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Selector(Box<[Requirement]>);

/// One requirement of a selector.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Requirement {
    key: Arc<str>,
    wanted: Wanted,
}

/// What a requirement wants of the value of its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wanted {
    /// The key is there, with one of these values.
    In(Box<[Arc<str>]>),
    /// The key is not there, or has none of these values.
    NotIn(Box<[Arc<str>]>),
    /// The key is there.
    Exists,
    /// The key is not there.
    DoesNotExist,
}

impl Requirement {
    /// A requirement of one key. The order of values does not matter.
    pub fn new(key: Arc<str>, wanted: Wanted) -> Self {
        let sort = |values: Box<[Arc<str>]>| {
            let mut values = values.into_vec();
            values.sort_unstable();
            values.dedup();
            values.into()
        };
        let wanted = match wanted {
            Wanted::In(values) => Wanted::In(sort(values)),
            Wanted::NotIn(values) => Wanted::NotIn(sort(values)),
            Wanted::Exists | Wanted::DoesNotExist => wanted,
        };
        Self { key, wanted }
    }

    /// The key that it is about.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// True if these labels have what it wants.
    pub fn is_met(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let is_one_of = |values: &[Arc<str>]| value.is_some_and(|value| values.iter().any(|it| **it == *value));
        match &self.wanted {
            Wanted::In(values) => is_one_of(values),
            Wanted::NotIn(values) => !is_one_of(values),
            Wanted::Exists => value.is_some(),
            Wanted::DoesNotExist => value.is_none(),
        }
    }
}

impl Selector {
    /// A selector with these requirements. Their order does not matter: equal selectors have equal texts.
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort_unstable();
        requirements.dedup();
        Self(requirements.into())
    }

    /// All that it requires.
    pub fn requirements(&self) -> &[Requirement] {
        &self.0
    }

    /// True if these labels meet all of its requirements.
    pub fn is_met(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.is_met(labels))
    }
}

/// As people write it for `kubectl -l`. Different selectors have different texts: keys and values have no blanks and no punctuation
/// of these.
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Requirement { key, wanted }) in self.0.iter().enumerate() {
            f.write_str(if i == 0 { "" } else { "," })?;
            match wanted {
                Wanted::In(values) => write!(f, "{key} in ({})", values.join(","))?,
                Wanted::NotIn(values) => write!(f, "{key} notin ({})", values.join(","))?,
                Wanted::Exists => f.write_str(key)?,
                Wanted::DoesNotExist => write!(f, "!{key}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Labels, Requirement, Selector, Wanted};

    fn labels(text: &str) -> Labels {
        let pairs = text.split(',').filter(|it| !it.is_empty()).map(|pair| pair.split_once('=').unwrap());
        pairs.map(|(key, value)| (key.into(), value.into())).collect()
    }

    fn selector(requirements: &[(&str, Wanted)]) -> Selector {
        Selector::new(requirements.iter().map(|(key, it)| Requirement::new((*key).into(), it.clone())).collect())
    }

    fn values(all: &[&str]) -> Box<[std::sync::Arc<str>]> {
        all.iter().map(|it| (*it).into()).collect()
    }

    #[test]
    fn selectors_and_labels() {
        let is_in = |all: &[&str]| Wanted::In(values(all));
        let not_in = |all: &[&str]| Wanted::NotIn(values(all));
        for (requirements, given, want) in [
            (vec![], "", true),
            (vec![], "a=1", true),
            (vec![("a", is_in(&["1"]))], "a=1", true),
            (vec![("a", is_in(&["1"]))], "a=2", false),
            (vec![("a", is_in(&["1"]))], "b=1", false),
            (vec![("a", is_in(&["1", "2"])), ("b", Wanted::Exists)], "a=2,b=", true),
            (vec![("a", is_in(&["1", "2"])), ("b", Wanted::Exists)], "a=2", false),
            (vec![("a", not_in(&["1"]))], "", true),
            (vec![("a", not_in(&["1"]))], "a=2", true),
            (vec![("a", not_in(&["1"]))], "a=1", false),
            (vec![("a", Wanted::DoesNotExist)], "a=1", false),
            (vec![("a", Wanted::DoesNotExist)], "b=1", true),
        ] {
            let it = selector(&requirements);
            assert_eq!(it.is_met(&labels(given)), want, "{it} for {given}");
        }
    }

    #[test]
    fn equal_selectors_have_equal_texts() {
        let a = selector(&[("b", Wanted::Exists), ("a", Wanted::In(values(&["2", "1", "2"])))]);
        let b = selector(&[("a", Wanted::In(values(&["1", "2"]))), ("b", Wanted::Exists), ("b", Wanted::Exists)]);
        assert_eq!(a, b);
        assert_eq!(a.to_string(), "a in (1,2),b");
        assert_eq!(
            selector(&[("c", Wanted::DoesNotExist), ("d", Wanted::NotIn(values(&["x"])))]).to_string(),
            "!c,d notin (x)"
        );
    }
}
