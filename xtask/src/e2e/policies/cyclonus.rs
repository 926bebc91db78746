//! The probes of cyclonus: how they are called.

use std::process::Command;

use crate::paths;

/// From a change of a policy, a label or a namespace to the first question: that is how long a change may take.
const WAIT: &str = "-wait=1";

/// Completes the command that runs the cases that the pattern selects, all without one.
pub fn call(command: &mut Command, pattern: Option<&str>) {
    command.arg(paths::cyclonus()).arg(WAIT).args(pattern.map(|it| format!("-run={it}")));
}
