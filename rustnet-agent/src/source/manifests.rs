//! A directory of ordinary Kubernetes manifests as the source: no API server needed.
//!
//! `*.yaml`, `*.yml` and `*.json` directly in the directory count, hidden files do not. A file is read when whoever writes it
//! closes it or renames it into place, never half-written; one that vanishes is given a moment to come back, as editors
//! rename the old file away before they write the new one. When the whole directory vanishes, the last state stays.

mod catalog;
mod disk;
mod parse;
mod watch;

pub use catalog::Catalog;
pub use disk::scan;

use super::{Event, Kind, Origin};
use crate::model::Problem;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::time::Instant;
use watch::{Change, Watch};

/// After a file was closed: a burst of writes is one.
const SETTLE: Duration = Duration::from_millis(20);
/// After a file vanished: an editor may be about to write it again.
const VANISH: Duration = Duration::from_millis(300);
/// Between looks for a directory that is not there.
const RETRY: Duration = Duration::from_secs(1);

/// Delivers the directory's objects, and their changes, until nobody listens any more.
pub async fn run(dir: PathBuf, events: Sender<Event>) {
    let mut source = Manifests { dir, catalog: Catalog::default(), events, synced: false, complained: false };
    while source.follow().await.is_some() {}
}

/// Nobody listens any more: `None` ends everything.
type Listening<T> = Option<T>;

struct Manifests {
    dir: PathBuf,
    catalog: Catalog,
    events: Sender<Event>,
    synced: bool,
    /// The last thing said of the directory was that it cannot be read.
    complained: bool,
}

/// A file that something happened to.
#[derive(Clone, Copy)]
struct Pending {
    /// When to look at it.
    due: Instant,
    /// When to believe that it is gone.
    gone: Instant,
}

impl Manifests {
    /// Watches the directory for as long as it is there.
    async fn follow(&mut self) -> Listening<()> {
        // First watch, then read: what changes in between is seen twice rather than never.
        let mut watch = match Watch::new(&self.dir) {
            Ok(watch) => watch,
            Err(error) => return self.unavailable(&error).await,
        };
        // A directory that has just been made is still being filled.
        if self.synced {
            tokio::time::sleep(VANISH).await;
        }
        if let Err(error) = self.scan().await? {
            return self.unavailable(&error).await;
        }
        self.complain(None).await?;
        if !self.synced {
            for kind in Kind::ALL {
                self.send(Event::Synced(kind)).await?;
            }
            self.synced = true;
        }
        let mut pending: BTreeMap<Arc<str>, Pending> = BTreeMap::new();
        loop {
            let next = pending.values().map(|file| file.due).min();
            let due = async {
                match next {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.events.closed() => return None,
                () = due => {}
                change = watch.next() => match change {
                    Change::Written(name) => {
                        let now = Instant::now();
                        pending.insert(name.into(), Pending { due: now + SETTLE, gone: now + VANISH });
                    }
                    Change::Vanished(name) => {
                        let gone = Instant::now() + VANISH;
                        pending.insert(name.into(), Pending { due: gone, gone });
                    }
                    Change::Anything => {
                        if let Err(error) = self.scan().await? {
                            return self.unavailable(&error).await;
                        }
                    }
                    Change::Lost(why) => return self.unavailable(&why).await,
                },
            }
            let now = Instant::now();
            let names: Vec<Arc<str>> =
                pending.iter().filter(|(_, file)| file.due <= now).map(|(name, _)| Arc::clone(name)).collect();
            for name in names {
                let Some(file) = pending.remove(&name) else {
                    continue;
                };
                if !self.load(&name, now >= file.gone).await? {
                    pending.insert(name, Pending { due: file.gone, ..file });
                }
            }
        }
    }

    /// Reads every file, and lets go of those that are gone.
    async fn scan(&mut self) -> Listening<io::Result<()>> {
        match self.off_the_runtime(scan).await? {
            Ok(events) => self.send_all(events).await.map(Ok),
            Err(error) => Some(Err(error)),
        }
    }

    /// Reads one file. False if it is not there, which is not believed yet.
    async fn load(&mut self, name: &str, believe_gone: bool) -> Listening<bool> {
        let name = name.to_owned();
        let load = move |catalog: &mut Catalog, dir: &Path| disk::load(catalog, dir, &name, believe_gone);
        let events = self.off_the_runtime(load).await?;
        let known = events.is_some() || believe_gone;
        self.send_all(events.unwrap_or_default()).await?;
        Some(known)
    }

    /// Large files take a while to read and parse; the agent goes on meanwhile.
    async fn off_the_runtime<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Catalog, &Path) -> T + Send + 'static,
    ) -> Listening<T> {
        let (mut catalog, dir) = (std::mem::take(&mut self.catalog), self.dir.clone());
        let task = tokio::task::spawn_blocking(move || {
            let done = work(&mut catalog, &dir);
            (catalog, done)
        });
        // It fails only when the runtime shuts down.
        let (catalog, done) = task.await.ok()?;
        self.catalog = catalog;
        Some(done)
    }

    /// Reports that the directory cannot be read, and waits before the next attempt.
    async fn unavailable(&mut self, error: &io::Error) -> Listening<()> {
        let kept = if self.synced { "the last state stays" } else { "nothing is programmed before it can be read" };
        self.complain(Some(format!("{error}: {kept}; make the directory, or correct --manifests"))).await?;
        tokio::select! {
            () = self.events.closed() => None,
            () = tokio::time::sleep(RETRY) => Some(()),
        }
    }

    async fn complain(&mut self, message: Option<String>) -> Listening<()> {
        if message.is_none() && !self.complained {
            return Some(());
        }
        self.complained = message.is_some();
        let subject: Arc<str> = format!("directory {}", self.dir.display()).into();
        let problems = message.map(|message| Problem::new(&subject, "", message)).into_iter().collect();
        self.send(Event::Report { origin: Origin::Named(subject), problems }).await
    }

    async fn send_all(&self, events: Vec<Event>) -> Listening<()> {
        for event in events {
            self.send(event).await?;
        }
        Some(())
    }

    async fn send(&self, event: Event) -> Listening<()> {
        self.events.send(event).await.ok()
    }
}

#[cfg(test)]
mod tests;
