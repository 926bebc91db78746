//! Names of objects, and a pool that keeps one copy of each value that many objects repeat.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::sync::Arc;

/// `namespace/name` of an object, or the bare name of a cluster-wide one. Cloning shares the text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// The name of an object in a namespace.
    pub fn namespaced(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The name of an object that belongs to the whole cluster.
    pub fn cluster(name: &str) -> Self {
        Self(name.into())
    }

    /// The text as people write it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ObjectName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A pool of strings that repeat in many objects: node names, zones, port names.
pub type Interner = Pool<str>;

/// A pool that keeps one copy of each value.
#[derive(Debug)]
pub struct Pool<T: ?Sized> {
    known: HashSet<Arc<T>>,
    purge_at: usize,
}

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), purge_at: 0 }
    }
}

impl<T: ?Sized + Eq + Hash> Pool<T>
where
    for<'a> Arc<T>: From<&'a T>,
{
    /// The pool's copy of a value.
    pub fn intern(&mut self, value: &T) -> Arc<T> {
        if let Some(known) = self.known.get(value) {
            return Arc::clone(known);
        }
        // Clusters that scale nodes up and down all day must not grow the pool without bound.
        if self.known.len() >= self.purge_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.purge_at = (2 * self.known.len()).max(1024);
        }
        let value: Arc<T> = value.into();
        self.known.insert(Arc::clone(&value));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::{Interner, ObjectName};
    use std::sync::Arc;

    #[test]
    fn equal_strings_share_one_copy() {
        let mut pool = Interner::default();
        let (a, b) = (pool.intern("n1"), pool.intern("n1"));
        assert!(Arc::ptr_eq(&a, &b));
    }

    #[test]
    fn strings_that_nobody_holds_are_forgotten() {
        let mut pool = Interner::default();
        let kept = pool.intern("kept");
        for i in 0..10_000 {
            pool.intern(&format!("gone-{i}"));
        }
        assert!(pool.known.len() <= 2048, "{} strings kept", pool.known.len());
        assert!(Arc::ptr_eq(&kept, &pool.intern("kept")));
    }

    #[test]
    fn names_read_as_people_write_them() {
        assert_eq!(ObjectName::namespaced("default", "web").to_string(), "default/web");
        assert_eq!(ObjectName::cluster("n1").as_str(), "n1");
    }
}
