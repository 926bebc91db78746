//! A directory of ordinary Kubernetes manifests as the source: no API server needed.
//!
//! `*.yaml`, `*.yml` and `*.json` directly in the directory count, hidden files do not. A file is read when whoever writes it
//! closes it or renames it into place, never half-written; one that vanishes is given a moment to come back, as editors
//! rename the old file away before they write the new one. When the whole directory vanishes, the last state stays.

mod catalog;
mod parse;
mod watch;

use super::{Event, Kind};
use crate::model::Problem;
use catalog::Catalog;
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
/// After a file vanished: an editor may be about to write it anew.
const VANISH: Duration = Duration::from_millis(300);
/// Between looks for a directory that is not there.
const RETRY: Duration = Duration::from_secs(1);
/// No manifest is that large; a mistake may be.
const MAX_SIZE: u64 = 256 << 20;

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
            for kind in Kind::REQUIRED {
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
        let names = match names(&self.dir) {
            Ok(names) => names,
            Err(error) => return Some(Err(error)),
        };
        for name in self.catalog.files() {
            if !names.contains(&*name) {
                let events = self.catalog.remove(&name);
                self.send_all(events).await?;
            }
        }
        for name in names {
            self.load(&name, true).await?;
        }
        Some(Ok(()))
    }

    /// Reads one file. False if it is not there, which is not believed yet.
    async fn load(&mut self, name: &str, believe_gone: bool) -> Listening<bool> {
        let path = self.dir.join(name);
        let mut catalog = std::mem::take(&mut self.catalog);
        let owned = name.to_owned();
        // Large files take a while to parse; the agent goes on meanwhile.
        let parsed = tokio::task::spawn_blocking(move || {
            let events = match read(&path) {
                Ok(text) => Some(catalog.update(&owned, &text)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    // With its directory gone too, nobody deleted this file.
                    let deleted = believe_gone && path.parent().is_some_and(Path::is_dir);
                    deleted.then(|| catalog.remove(&owned))
                }
                Err(error) => Some(catalog.broken(&owned, None, &error.to_string())),
            };
            (catalog, events)
        });
        // It fails only if the runtime is being shut down, or on a panic, after which the catalog is empty.
        let (catalog, events) = parsed.await.ok()?;
        self.catalog = catalog;
        let known = events.is_some();
        self.send_all(events.unwrap_or_default()).await?;
        Some(known || believe_gone)
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
        self.send(Event::Report { origin: subject, problems }).await
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

/// True if a file of this name is a manifest.
fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// The manifests in a directory, in order of their names.
fn names(dir: &Path) -> io::Result<std::collections::BTreeSet<String>> {
    let mut names = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(dir)? {
        match entry?.file_name().into_string() {
            Ok(name) if is_manifest(&name) => {
                names.insert(name);
            }
            Ok(_) => {}
            Err(name) => tracing::warn!(?name, "file name is not UTF-8, passed over"),
        }
    }
    Ok(names)
}

fn read(path: &Path) -> io::Result<String> {
    // Follows links: a ConfigMap is mounted as links.
    let meta = std::fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::other("not a file"));
    }
    if meta.len() > MAX_SIZE {
        return Err(io::Error::other(format!("{} bytes, {MAX_SIZE} at most", meta.len())));
    }
    String::from_utf8(std::fs::read(path)?).map_err(|_| io::Error::other("not UTF-8"))
}

#[cfg(test)]
mod tests;
