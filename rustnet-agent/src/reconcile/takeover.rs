//! The begin of an agent's work: it waits until no other agent writes. Two writers would give the same slots to different
//! services.

use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::presence::Presence;
use super::stop;
use crate::health::{Health, NotReady};

/// Time between two tries.
const RETRY: Duration = Duration::from_millis(200);
/// A lock file that any user can open is waited for this long. `rustnetctl cleanup` of a release that made it so is done by then.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits for the right to write, and for a run directory where that can be asked for; `None` if the agent is to end before.
pub async fn wait(run_dir: &Path, health: &Health, shutdown: &mut watch::Receiver<bool>) -> Option<Presence> {
    let began = Instant::now();
    let mut known = String::new();
    loop {
        health.tick();
        let entered = Presence::enter(run_dir, began.elapsed() >= PATIENCE);
        let remedy = "see that there is room in the run directory and that it may be written";
        match entered.unwrap_or_else(|error| Err(format!("{error:#}; {remedy}"))) {
            Ok(presence) => return Some(presence),
            Err(why) if why != known => {
                tracing::warn!("{why}");
                health.set_not_ready(NotReady::Failed(why.clone()));
                known = why;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = stop(shutdown) => return None,
            () = sleep(RETRY) => {}
        }
    }
}
