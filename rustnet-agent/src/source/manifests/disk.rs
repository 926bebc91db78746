//! Files of the directory, read whole into the catalog.

use super::catalog::Catalog;
use crate::source::Event;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;

/// No manifest is that large; a mistake may be.
const MAX_SIZE: u64 = 256 << 20;

/// Reads every manifest of a directory, and lets go of those that are gone. Gives what changes by that; nothing changes if
/// the directory cannot be read.
pub fn scan(catalog: &mut Catalog, dir: &Path) -> io::Result<Vec<Event>> {
    let names = names(dir)?;
    let mut events = Vec::new();
    for name in &names {
        events.extend(load(catalog, dir, name, true).into_iter().flatten());
    }
    // Last, so that an object that moved to another file is never gone.
    for name in catalog.files().into_iter().filter(|name| !names.contains(&**name)) {
        events.extend(catalog.remove(&name));
    }
    Ok(events)
}

/// Reads one file. `None` if it is not there and that is not to be believed yet.
pub fn load(catalog: &mut Catalog, dir: &Path, name: &str, believe_gone: bool) -> Option<Vec<Event>> {
    match read(&dir.join(name)) {
        Ok(text) => Some(catalog.update(name, &text)),
        // With its directory gone too, nobody deleted this file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (believe_gone && dir.is_dir()).then(|| catalog.remove(name))
        }
        Err(error) => Some(catalog.broken(name, None, &error.to_string())),
    }
}

/// True if a file of this name is a manifest.
pub fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

/// The manifests in a directory, in order of their names.
fn names(dir: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
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
