//! A namespace: labels that policies select.

use super::{Labels, ObjectName, Problem};

/// The label that each namespace has, with its name.
pub const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A Namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: ObjectName,
    /// Its labels, [`NAME_LABEL`] among them.
    pub labels: Labels,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}
