//! What the `rustnetctl` command reads besides the maps: where this agent's things are, and the names of what the maps are about. Services
//! and their endpoints are written by [`super::details`].

use std::time::Duration;

use anyhow::Result;
use tokio::time::Instant;

use super::job::Job;
use super::presence::AgentFile;
use super::{FILE_SHARE, PROBLEMS_PERIOD, Reconciler};
use crate::failure::{Failure, Scope};
use crate::source::Kind;
use crate::{namefile, podfile, policyfile};

impl Reconciler {
    /// The jobs that write what the `rustnetctl` command reads. Without it the command shows less, so that a failure makes no
    /// node unready; it is tried again.
    pub(super) fn files_of_command(&self) -> [&Job; 5] {
        [&self.presence, &self.names, &self.objects, &self.details, &self.policy_names]
    }

    /// Writes where this agent's things are.
    pub(super) fn write_presence(&mut self) {
        let done = AgentFile::of(&self.config).write(&self.config.run_dir);
        Self::finish_file(&mut self.presence, &mut self.report, done);
    }

    /// Writes the names of this node's pods.
    pub(super) fn write_names(&mut self) {
        // Before the list is complete, an earlier agent's file is better.
        let is_known = self.index.has_synced(Kind::Pod);
        let write = || podfile::write(&self.config.run_dir, &podfile::names(self.index.pods())).map(drop);
        let done = if is_known { write() } else { Ok(()) };
        Self::finish_file(&mut self.names, &mut self.report, done);
    }

    /// Writes the names of Services and Nodes.
    pub(super) fn write_objects(&mut self) {
        // Before the lists are complete, an earlier agent's files are better.
        let is_known = self.index.synced();
        let done = if is_known { namefile::write_all(&self.config.run_dir, &self.index) } else { Ok(()) };
        Self::finish_file(&mut self.objects, &mut self.report, done);
    }

    /// Has the names of network policies written. In a large cluster pods always come and go.
    pub(super) fn policy_names_changed(&mut self) {
        self.policy_names.want_unless_failed(PROBLEMS_PERIOD.max(self.policy_names_took * FILE_SHARE));
    }

    /// Writes the names of network policies as they were last applied.
    pub(super) fn write_policy_names(&mut self) {
        let began = Instant::now();
        let names = self.policies.names(&self.index);
        let done = names.map_or(Ok(()), |names| policyfile::write(&self.config.run_dir, &names).map(drop));
        self.policy_names_took = began.elapsed();
        Self::finish_file(&mut self.policy_names, &mut self.report, done);
    }

    /// Notes whether a file for the command was written, and has a failure reported.
    pub(super) fn finish_file(job: &mut Job, report: &mut Job, done: Result<()>) {
        let failure = |error: anyhow::Error| Failure {
            scope: Scope::Command,
            message: format!("{error:#}; see that there is room for it and that it may be written; it is tried again"),
        };
        let had_failed = job.has_failed();
        job.finish(done.err().map(failure).into_iter().collect(), None);
        if had_failed || job.has_failed() {
            report.want(Duration::ZERO);
        }
    }
}
