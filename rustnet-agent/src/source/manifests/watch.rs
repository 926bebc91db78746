//! inotify on one directory, reduced to what matters for files that are read whole.

use futures::StreamExt;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchMask};
use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What happened.
#[derive(Debug)]
pub enum Change {
    /// A manifest was written and closed, or renamed or linked into place.
    Written(String),
    /// A manifest was deleted or renamed away, or its rights changed.
    Vanished(String),
    /// Too much, or something of which one cannot tell what it touches: read everything again.
    Anything,
    /// The directory is not there any more, or cannot be watched.
    Lost(io::Error),
}

/// A watched directory.
pub struct Watch {
    dir: PathBuf,
    stream: EventStream<Vec<u8>>,
    queue: VecDeque<Change>,
}

impl Watch {
    /// Begins to watch.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::CREATE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(dir, mask)?;
        Ok(Self { dir: dir.into(), stream: inotify.into_event_stream(vec![0; 16 << 10])?, queue: VecDeque::new() })
    }

    /// Waits for the next change. It may be dropped while it waits; nothing is lost by that.
    pub async fn next(&mut self) -> Change {
        loop {
            if let Some(change) = self.queue.pop_front() {
                return change;
            }
            match self.stream.next().await {
                Some(Ok(event)) => self.queue.extend(self.change(&event)),
                Some(Err(error)) => return Change::Lost(error),
                None => return Change::Lost(io::Error::other("the watch ended")),
            }
        }
    }

    fn change(&self, event: &EventOwned) -> Option<Change> {
        let is = |mask: EventMask| event.mask.intersects(mask);
        if is(EventMask::Q_OVERFLOW) {
            return Some(Change::Anything);
        }
        if is(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED) {
            return Some(Change::Lost(io::Error::from(io::ErrorKind::NotFound)));
        }
        let name = event.name.as_ref()?.to_str()?;
        if !super::disk::is_manifest(name) {
            // Links may lead through it, as those of a mounted ConfigMap lead through `..data`.
            return is(EventMask::MOVED_TO).then_some(Change::Anything);
        }
        if is(EventMask::CLOSE_WRITE | EventMask::MOVED_TO) {
            return Some(Change::Written(name.to_owned()));
        }
        if is(EventMask::CREATE) {
            // Who creates a file will close it; a link is complete at once.
            let meta = std::fs::symlink_metadata(self.dir.join(name)).ok()?;
            return (meta.is_symlink() || meta.nlink() > 1).then(|| Change::Written(name.to_owned()));
        }
        Some(Change::Vanished(name.to_owned()))
    }
}
