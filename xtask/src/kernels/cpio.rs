//! Archives of the kind that a kernel unpacks as its first file system: cpio, "newc" (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::path::Path;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const LAST: &str = "TRAILER!!!";

/// An archive while it is being filled; paths are absolute, as the guest sees them. The first of a name stays.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    seen: BTreeSet<String>,
}

impl Archive {
    /// A file, with the directories above it.
    pub fn file(&mut self, path: &str, content: &[u8], mode: u32) {
        self.entry(path, REGULAR | mode, content);
    }

    /// A directory, with those above it.
    pub fn dir(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, &[]);
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK | 0o777, target.as_bytes());
    }

    /// Whether something of that name is in it.
    pub fn has(&self, path: &str) -> bool {
        self.seen.contains(path)
    }

    /// The whole; more archives may be appended to it.
    pub fn finish(mut self) -> Vec<u8> {
        self.record(LAST, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        if !self.seen.insert(path.to_owned()) {
            return;
        }
        if let Some(above) = Path::new(path).parent().and_then(Path::to_str).filter(|above| *above != "/") {
            self.dir(above);
        }
        self.record(path.trim_start_matches('/'), mode, content);
    }

    fn record(&mut self, name: &str, mode: u32, content: &[u8]) {
        // Number of the file, mode, owner, group, links, time, size, four device numbers, length of the name, no checksum.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let fields = [self.seen.len() as u32, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and contents, read back by the fields' places in the format.
    fn entries(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * n..at + 14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap() as usize
            };
            let (mode, size, length) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[at + 110..at + 109 + length].to_vec()).unwrap();
            let content = (at + 110 + length).next_multiple_of(4);
            if name == LAST {
                assert_eq!(content, bytes.len());
                return found;
            }
            found.push((name, mode as u32, bytes[content..content + size].to_vec()));
            at = (content + size).next_multiple_of(4);
        }
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", b"12345", 0o755);
        archive.file("/a/d", b"", 0o644);
        archive.file("/a/d", b"a second of the name", 0o644);
        archive.link("/l", "a/d");
        assert!(archive.has("/a/b") && !archive.has("/x"));
        assert_eq!(
            entries(&archive.finish()),
            [
                ("a".into(), 0o040_755, vec![]),
                ("a/b".into(), 0o040_755, vec![]),
                ("a/b/c".into(), 0o100_755, b"12345".to_vec()),
                ("a/d".into(), 0o100_644, vec![]),
                ("l".into(), 0o120_777, b"a/d".to_vec()),
            ]
        );
    }
}
