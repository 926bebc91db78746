//! Things built once and kept: a directory in the user's cache per key, each file next to its
//! SHA-256. A torn or edited copy is built again instead of used.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Collects what a result depends on.
#[derive(Default)]
pub struct Key(Sha256);

impl Key {
    /// Adds one named value.
    pub fn text(&mut self, name: &str, value: &str) {
        self.part(name.as_bytes());
        self.part(value.as_bytes());
    }

    /// Adds a file, or all files below a directory, by path and content, in a fixed order.
    pub fn tree(&mut self, root: &Path, path: &Path) -> Result<()> {
        if path.is_dir() {
            let mut entries: Vec<PathBuf> = fs::read_dir(path)
                .and_then(|dir| dir.map(|e| e.map(|e| e.path())).collect())
                .with_context(|| format!("reading the directory {}", path.display()))?;
            entries.sort();
            return entries.iter().try_for_each(|entry| self.tree(root, entry));
        }
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.part(path.strip_prefix(root).unwrap_or(path).to_string_lossy().as_bytes());
        self.part(&content);
        Ok(())
    }

    /// The key: 24 hexadecimal digits.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())[..24].to_owned()
    }

    fn part(&mut self, bytes: &[u8]) {
        // The length keeps ("ab", "c") apart from ("a", "bc").
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}

/// Puts a copy of `from` at `to`, with its checksum next to it; a reader never sees half of it.
pub fn store(from: &Path, to: &Path) -> Result<()> {
    let sum = checksum(from)?;
    copy(from, to)?;
    replace(&sum_path(to), |tmp| fs::write(tmp, &sum))
}

/// Whether `file` is there and still what [`store`] put there.
pub fn holds(file: &Path) -> bool {
    let Ok(wanted) = fs::read_to_string(sum_path(file)) else { return false };
    checksum(file).is_ok_and(|found| found == wanted)
}

/// Copies a file, mode included, by way of a temporary name in the same directory. An equal file stays untouched, or
/// cargo would take its new time for a change.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if equal(from, to) {
        return Ok(());
    }
    replace(to, |tmp| fs::copy(from, tmp).map(drop))
}

fn equal(a: &Path, b: &Path) -> bool {
    let (Ok(meta_a), Ok(meta_b)) = (a.metadata(), b.metadata()) else { return false };
    meta_a.len() == meta_b.len()
        && meta_a.permissions() == meta_b.permissions()
        && matches!((fs::read(a), fs::read(b)), (Ok(a), Ok(b)) if a == b)
}

fn replace(to: &Path, write: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let dir = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).with_context(|| format!("making the directory {}", dir.display()))?;
    let name = to.file_name().unwrap_or_default().to_string_lossy();
    let tmp = dir.join(format!(".{name}.{}", std::process::id()));
    let result = write(&tmp).and_then(|()| fs::rename(&tmp, to));
    if result.is_err() {
        let _ = fs::remove_file(&tmp); // the first error is the one to report
    }
    result.with_context(|| format!("writing {}", to.display()))
}

fn checksum(file: &Path) -> Result<String> {
    let content = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(hex(&Sha256::digest(content)))
}

fn sum_path(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sha256");
    name.into()
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(parts: &[(&str, &str)]) -> String {
        let mut key = Key::default();
        for (name, value) in parts {
            key.text(name, value);
        }
        key.finish()
    }

    #[test]
    fn keys_differ_where_the_inputs_do() {
        assert_eq!(key(&[("a", "b")]), key(&[("a", "b")]));
        assert_ne!(key(&[("a", "bc")]), key(&[("ab", "c")]));
        assert_ne!(key(&[("a", "b")]), key(&[("a", "c")]));
    }

    #[test]
    fn a_tree_counts_names_and_contents_but_not_its_place() {
        let of = |file: &str, content: &str| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("src")).unwrap();
            fs::write(dir.path().join("src").join(file), content).unwrap();
            let mut key = Key::default();
            key.tree(dir.path(), dir.path()).unwrap();
            key.finish()
        };
        assert_eq!(of("a.rs", "x"), of("a.rs", "x"));
        assert_ne!(of("a.rs", "x"), of("b.rs", "x"));
        assert_ne!(of("a.rs", "x"), of("a.rs", "y"));
    }

    #[test]
    fn an_equal_copy_keeps_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "one").unwrap();
        copy(&from, &to).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        fs::File::options().write(true).open(&to).unwrap().set_modified(old).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().modified().unwrap(), old);
        fs::write(&from, "two").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "two");
    }

    #[test]
    fn a_damaged_file_is_not_held() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("deep/er/to"));
        fs::write(&from, "content").unwrap();
        assert!(!holds(&to));
        store(&from, &to).unwrap();
        assert!(holds(&to));
        fs::write(&to, "conten").unwrap();
        assert!(!holds(&to));
    }
}
