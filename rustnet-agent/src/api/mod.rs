//! The API server: the way to it, its failures, and what this node writes there. `source::kube` reads.

pub(crate) mod answers;
pub(crate) mod backoff;
mod client;
mod deadline;
mod failure;
pub(crate) mod herd;
mod node_status;
pub mod reports;

pub use client::{Connection, connect, connect_in_time, connection, operator_settings, settings};
pub use deadline::Deadlines;
pub use failure::Failure;
pub use node_status::{CONDITION, NodeStatus};

/// What problems with the server as a whole are about. They concern this node, whatever the others have.
pub const API_SERVER: &str = "API server";

/// An error with its causes, each once: the outermost alone often says only "error trying to connect".
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
