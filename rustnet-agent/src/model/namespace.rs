//! A namespace: labels that policies select, and whether its policies are only tried.

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
    /// Of network policies the Admin tier alone denies anything to its pods: what the others would deny is reported.
    pub is_audited: bool,
    /// What was wrong with it.
    pub problems: Box<[Problem]>,
}
