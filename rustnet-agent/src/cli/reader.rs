//! One reader of `rn_events` at a time: the ring has one reader position, and two readers would each get a part of the events.
//!
//! The lock is on the directory of the pins, because it belongs to the ring as nothing else does, and because it leaves no
//! file behind. See ADR 9.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Held while the ring is read.
#[derive(Debug)]
pub struct Reader {
    _lock: Flock<File>,
}

impl Reader {
    /// Becomes the one reader of the ring that is pinned in `bpffs`.
    ///
    /// # Errors
    /// Another process is it; the message names its pid.
    pub fn begin(bpffs: &Path) -> Result<Self> {
        let shown = bpffs.display();
        let dir = File::open(bpffs).with_context(|| format!("opening {shown}"))?;
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { _lock: lock }),
            Err((dir, Errno::EWOULDBLOCK)) => {
                let meta = dir.metadata().with_context(|| format!("looking at {shown}"))?;
                let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
                let who = match holder(&locks, meta.dev(), meta.ino()) {
                    Some(pid) => format!("process {pid}"),
                    None => "a process of another container".to_owned(),
                };
                bail!(
                    "{who} reads the events of {shown}, and each event goes to one reader only: end that monitor first \
                     (`rustnetctl drops` shows the sums)"
                )
            }
            Err((_, errno)) => Err(errno).with_context(|| format!("locking {shown}")),
        }
    }
}

/// Who holds a lock of flock(2) on an inode, as `/proc/locks` says: `1: FLOCK  ADVISORY  WRITE 4711 00:1f:1 0 EOF`. Processes
/// of other pid namespaces are not in it, or have the number 0.
fn holder(locks: &str, dev: u64, ino: u64) -> Option<u32> {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    let inode = format!("{major:02x}:{minor:02x}:{ino}");
    let of_line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "FLOCK")?;
        // A line with an arrow is of somebody who waits.
        let is_it = at == 1 && words.get(at + 4) == Some(&inode.as_str());
        is_it.then(|| words.get(at + 3)?.parse().ok()).flatten().filter(|pid| *pid > 0)
    };
    locks.lines().find_map(of_line)
}

#[cfg(test)]
mod tests {
    use super::{Reader, holder};

    #[test]
    fn the_second_reader_names_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = Reader::begin(dir.path()).unwrap();
        let error = Reader::begin(dir.path()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("process {} reads", std::process::id())), "{error}");
        drop(first);
        Reader::begin(dir.path()).unwrap();
    }

    #[test]
    fn the_holder_is_found_by_device_and_inode() {
        let locks = "1: FLOCK  ADVISORY  WRITE 7 00:1f:12 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 8 00:1f:13 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 9 00:1f:13 0 EOF\n3: FLOCK  ADVISORY  WRITE 0 00:1f:14 0 EOF\n";
        let dev = libc::makedev(0, 0x1f);
        assert_eq!([12, 13, 14].map(|ino| holder(locks, dev, ino)), [Some(7), None, None]);
    }
}
