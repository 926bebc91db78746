//! What the guest runs: written into its file system by the host, read there by its first process.

use serde::{Deserialize, Serialize};

/// The kernel-side object in the guest.
pub const OBJECT: &str = "/rustnet.bpf.o";

/// What network policies are compared with, in the guest.
pub const POLICY_ORACLE: &str = "/policy-oracle";

/// A program that the guest runs.
#[derive(Debug, Serialize, Deserialize)]
pub struct Step {
    /// One word.
    pub name: String,
    /// Its path in the guest.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, in addition to `PATH`.
    pub env: Vec<(String, String)>,
}
