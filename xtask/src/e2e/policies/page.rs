//! The part of `docs/conformance.md` about a suite.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::{PolicyRun, Suite};
use crate::e2e::conformance::{self, title};
use crate::e2e::report::{self, Outcome, Run};

/// Writes the part from kept runs.
pub fn write(suite: Suite, dirs: &[PathBuf]) -> Result<()> {
    let runs: Vec<PolicyRun> = dirs.iter().map(|dir| report::load(dir)).collect::<Result<_>>()?;
    ensure!(runs.iter().all(|it| it.suite == suite), "a run there is of another suite\n  remedy: --suite");
    conformance::put(&part(suite, &runs), runs.len())
}

fn part(suite: Suite, runs: &[PolicyRun]) -> String {
    let (first, rest) = suite.title().split_at(1);
    let command = match suite {
        Suite::NetworkPolicyApi => "cargo xtask policy-conformance",
        Suite::Cyclonus => "cargo xtask policy-conformance --suite cyclonus",
    };
    let mut text = format!(
        "# {}{rest}\n\n\
         Written by `{command} --record DIR...` from the reports of real runs of `{command}`; not edited by hand.\n\
         [testing.md](testing.md#others-tests-of-network-policies) says what they are.\n\n",
        first.to_uppercase()
    );
    text += "| Run | Tests | Kubernetes | SCTP | Commit or image | Kernel | Date | Passed | Failed | Skipped |\n\
             |---|---|---|---|---|---|---|---|---|---|\n";
    for PolicyRun { run, tests_version, sctp, .. } in runs {
        let [passed, failed, skipped] =
            [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(|outcome| run.count(outcome));
        let _ = writeln!(
            text,
            "| {} | {tests_version} | {} | {} | {} | {} | {} | {passed} | {failed} | {skipped} |",
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
