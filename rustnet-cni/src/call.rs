//! What one call is about.

use crate::env::Env;
use crate::types::conf::NetConf;

/// Everything that a runtime hands over.
pub struct Call {
    /// The environment.
    pub env: Env,
    /// The configuration.
    pub conf: NetConf,
}
