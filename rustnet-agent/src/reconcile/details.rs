//! The file of Services and endpoints for the command. Of a large cluster it takes half a second, so that a thread writes it.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::sync::oneshot;

use super::Reconciler;
use crate::servicefile::{self, Objects};

/// The result of a thread that writes, and how long it took.
pub struct Writing(oneshot::Receiver<(Result<()>, Duration)>);

/// What has become of the writing that is under way. Never ready without one.
pub async fn written(writing: &mut Option<Writing>) -> (Result<()>, Duration) {
    let Some(Writing(result)) = writing else { return std::future::pending().await };
    let panicked = |_| (Err(anyhow!("the thread that writes Services has panicked")), Duration::ZERO);
    result.await.unwrap_or_else(panicked)
}

impl Reconciler {
    /// Begins to write what the objects say; [`Self::end_details`] follows.
    pub(super) fn begin_details(&mut self) {
        self.details.begin();
        // Before the lists are complete, an earlier agent's file is better.
        if !self.index.synced() {
            return self.end_details(Ok(()), Duration::ZERO);
        }
        let (sender, result) = oneshot::channel();
        let (run_dir, objects) = (self.config.run_dir.clone(), Objects::of(&self.index));
        let write = move || {
            let began = std::time::Instant::now();
            let done = servicefile::write(&run_dir, &objects);
            // A loop that has ended needs it no more.
            let _ = sender.send((done, began.elapsed()));
        };
        match std::thread::Builder::new().name("services".to_owned()).spawn(write) {
            Ok(_) => self.writing = Some(Writing(result)),
            Err(error) => {
                let error = Err(error).context("no thread to write Services; raise the limit of tasks");
                self.end_details(error, Duration::ZERO);
            }
        }
    }

    /// Notes how it went.
    pub(super) fn end_details(&mut self, done: Result<()>, took: Duration) {
        (self.writing, self.details_took) = (None, took);
        Self::finish_file(&mut self.details, &mut self.report, done);
    }
}
