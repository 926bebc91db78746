//! Hears of the records that the CNI binary writes and removes, so that a new pod need not wait for a look at the host's network.

use std::fs::DirBuilder;
use std::future::pending;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use futures::StreamExt as _;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use rustnet_common::files::ENDPOINTS_DIR;

/// The folder of records, watched.
pub struct Arrivals {
    dir: PathBuf,
    /// `None` while the folder cannot be watched.
    stream: Option<EventStream<Vec<u8>>>,
}

impl Arrivals {
    /// Watches the folder of records in a run directory. Makes the folder if it is not there.
    ///
    /// # Errors
    /// The folder cannot be made or watched.
    pub fn watch(run_dir: &Path) -> Result<Self> {
        let mut arrivals = Self { dir: run_dir.join(ENDPOINTS_DIR), stream: None };
        arrivals.open()?;
        Ok(arrivals)
    }

    fn open(&mut self) -> Result<()> {
        let shown = self.dir.display();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| format!("{shown}: cannot make the folder"))?;
        // Records are renamed into their place.
        let mask = WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        let watch = || {
            let inotify = Inotify::init()?;
            inotify.watches().add(&self.dir, mask | WatchMask::ONLYDIR)?;
            inotify.into_event_stream(vec![0; 16 << 10])
        };
        self.stream = Some(watch().with_context(|| format!("{shown}: cannot be watched"))?);
        Ok(())
    }

    /// Waits until records came or went. Never ready after an error: the looks at the host's network find records, too.
    ///
    /// # Errors
    /// The folder went, and cannot be watched again.
    pub async fn changed(&mut self) -> Result<()> {
        let Some(stream) = &mut self.stream else { return pending().await };
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED;
        match stream.next().await {
            Some(Ok(event)) if !event.mask.intersects(gone) => Ok(()),
            _ => {
                self.stream = None;
                self.open()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Arrivals;
    use std::fs;

    #[tokio::test]
    async fn records_are_heard_of_when_they_come_and_go_even_in_another_folder() {
        let run = tempfile::tempdir().unwrap();
        let mut arrivals = Arrivals::watch(run.path()).unwrap();
        let dir = run.path().join("endpoints");
        let write = || {
            fs::write(dir.join(".a.tmp"), "{}").unwrap();
            fs::rename(dir.join(".a.tmp"), dir.join("a@eth0.json")).unwrap();
        };
        write();
        arrivals.changed().await.unwrap();
        fs::remove_file(dir.join("a@eth0.json")).unwrap();
        arrivals.changed().await.unwrap();
        fs::remove_dir(&dir).unwrap();
        arrivals.changed().await.unwrap();
        write();
        arrivals.changed().await.unwrap();
    }
}
