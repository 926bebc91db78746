//! The part of `docs/conformance.md` about these tests.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;

use super::PolicyRun;
use crate::e2e::conformance::{self, title};
use crate::e2e::report::{self, Outcome, Run};

/// Writes the part from kept runs.
pub fn write(dirs: &[PathBuf]) -> Result<()> {
    let runs: Vec<PolicyRun> = dirs.iter().map(|dir| report::load(dir)).collect::<Result<_>>()?;
    conformance::put(&part(&runs), runs.len())
}

fn part(runs: &[PolicyRun]) -> String {
    let mut text = String::from(
        "# Conformance tests of the network policy API\n\n\
         Written by `cargo xtask policy-conformance --record DIR...` from the reports of real runs of `cargo xtask policy-conformance`; not\n\
         edited by hand. [testing.md](testing.md#conformance-tests-of-the-network-policy-api) says what they are.\n\n",
    );
    text += "| Run | Tests | Kubernetes | SCTP | Commit or image | Kernel | Date | Passed | Failed | Skipped |\n\
             |---|---|---|---|---|---|---|---|---|---|\n";
    for PolicyRun { run, api, sctp } in runs {
        let [passed, failed, skipped] =
            [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(|outcome| run.count(outcome));
        let _ = writeln!(
            text,
            "| {} | {api} | {} | {} | {} | {} | {} | {passed} | {failed} | {skipped} |",
            title(run),
            run.kubernetes,
            sctp.word(),
            run.commit,
            run.kernel,
            run.date
        );
    }
    let runs: Vec<&Run> = runs.iter().map(|it| &it.run).collect();
    conformance::results(&mut text, &runs);
    text
}
