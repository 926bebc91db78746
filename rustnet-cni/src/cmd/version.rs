//! VERSION: what this binary speaks.

use crate::types::conf;
use crate::types::version::Version;
use serde_json::{Value, json};

/// The versions, answered in the one that `stdin` asks for if it asks for one of them.
pub fn run(stdin: &[u8]) -> Value {
    let version = conf::version_of(stdin).unwrap_or(Version::LATEST);
    json!({ "cniVersion": version.as_str(), "supportedVersions": Version::ALL.map(Version::as_str) })
}
