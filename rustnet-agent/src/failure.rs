//! A failure and its scope, which decides what follows from it.

use std::fmt;

/// What a failure concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The whole node: it must not get pods.
    Node,
    /// The way to another node; all others work.
    Peer,
    /// One pod; all others work.
    Pod,
    /// What a load balancer hears of one Service; packets go on.
    Service,
    /// Processes of this host; pods work.
    Host,
    /// How fast some packets are; all of them go on.
    Speed,
    /// What the `rustnetctl` command shows; no packet depends on it.
    Command,
}

/// A failure. Its text names the object, and ends with a remedy where there is one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Failure {
    /// What it concerns.
    pub scope: Scope,
    /// For people.
    pub message: String,
}

impl Failure {
    /// From an error with its causes.
    pub fn new(scope: Scope, error: &anyhow::Error) -> Self {
        Self { scope, message: format!("{error:#}") }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The failures that concern the whole node, as one text; `None` if there are none.
pub fn of_node(failures: &[Failure]) -> Option<String> {
    let mut of_node: Vec<_> =
        failures.iter().filter(|it| it.scope == Scope::Node).map(|it| it.message.as_str()).collect();
    of_node.dedup();
    (!of_node.is_empty()).then(|| of_node.join("; "))
}

/// All failures, as one text.
pub fn texts(failures: &[Failure]) -> String {
    failures.iter().map(|it| it.message.as_str()).collect::<Vec<_>>().join("; ")
}
