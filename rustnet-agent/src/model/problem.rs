//! Something wrong with the input that rustnet worked around: what, where, and how to fix it.

use std::fmt;
use std::sync::Arc;

/// One finding about an object or a file. It never stops the rest of the state from being applied.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// The object or file, as people name it: `Service default/web`, `web.yaml:12`.
    pub subject: Arc<str>,
    /// Path of the field; empty when it concerns the whole.
    pub field: Box<str>,
    /// What is wrong, what was done about it, and the remedy.
    pub message: Box<str>,
}

impl Problem {
    /// A finding about one field.
    pub fn new(subject: &Arc<str>, field: impl Into<Box<str>>, message: impl Into<Box<str>>) -> Self {
        Self { subject: Arc::clone(subject), field: field.into(), message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}: {}", self.subject, self.message)
        } else {
            write!(f, "{}: {}: {}", self.subject, self.field, self.message)
        }
    }
}
