//! The files in the run directory: the agent's `node.json`, one record an attachment, and the marks of delegated leases.

use crate::types::conf::{Attachment, is_identifier};
use crate::types::error::{Error, code};
use rustnet_common::files::{self, EndpointFile, NodeFile};
use serde::Deserialize;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, DirEntryExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

const REMEDY: &str = "is the rustnet agent running on this node, and is \"runDir\" in the configuration its --run-dir?";
/// Among the leases: one file for each attachment that may hold one of a delegated IPAM, in a folder for each network.
const DELEGATED_DIR: &str = "delegated";
/// Time between two tries to get a lock.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Reads the agent's file; errors have the code for "try again".
pub fn load_node(run_dir: &Path) -> Result<NodeFile, Error> {
    #[derive(Deserialize)]
    struct OnlyVersion {
        version: u32,
    }
    let path = run_dir.join(files::NODE_FILE);
    let bytes = fs::read(&path).map_err(|e| match e.kind() {
        io::ErrorKind::PermissionDenied => Error::io(path.display(), &e),
        _ => Error::new(code::TRY_AGAIN, format!("{}: {e}", path.display())).details(REMEDY),
    })?;
    let bad = |e: serde_json::Error| {
        Error::new(code::TRY_AGAIN, format!("{} cannot be read: {e}", path.display()))
            .details("the agent rewrites it at its start: restart the rustnet agent of this node")
    };
    // The version first: another version's file may differ in everything else.
    let OnlyVersion { version } = serde_json::from_slice(&bytes).map_err(bad)?;
    if version != NodeFile::VERSION {
        let text = format!("{} has version {version}, this binary knows {}", path.display(), NodeFile::VERSION);
        return Err(Error::new(code::TRY_AGAIN, text).details("install the CNI binary of the running agent"));
    }
    let node: NodeFile = serde_json::from_slice(&bytes).map_err(bad)?;
    if let Some(why) = &node.not_ready {
        return Err(Error::new(code::TRY_AGAIN, format!("node {} is not ready: {why}", node.node_name)).details(REMEDY));
    }
    Ok(node)
}

/// Writes an attachment's record; readers see the whole or nothing.
pub fn write_record(run_dir: &Path, record: &EndpointFile) -> Result<(), Error> {
    let path = files::endpoint_path(run_dir, &record.container_id, &record.ifname);
    let failed = |e: &io::Error| Error::io(format!("write {}", path.display()), e);
    let bytes = serde_json::to_vec(record).map_err(|e| failed(&io::Error::from(e)))?;
    let temporary = temporary(&path);
    create(&temporary, &bytes).and_then(|()| fs::rename(&temporary, &path)).map_err(|e| failed(&e))
}

/// Reads an attachment's record. One that is not there is `None`, and so is one that cannot be understood: a
/// disconnect then goes by names and leases.
pub fn read_record(run_dir: &Path, a: &Attachment) -> Result<Option<EndpointFile>, Error> {
    let path = files::endpoint_path(run_dir, &a.container_id, &a.ifname);
    match fs::read(&path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(Error::io(path.display(), &e)),
    }
}

/// Removes an attachment's record and what a killed writer may have left of it.
pub fn remove_record(run_dir: &Path, a: &Attachment) -> Result<(), Error> {
    let path = files::endpoint_path(run_dir, &a.container_id, &a.ifname);
    remove(&temporary(&path))?;
    remove(&path)
}

/// All records that can be read.
pub fn records(run_dir: &Path) -> Result<Vec<EndpointFile>, Error> {
    let mut all = Vec::new();
    let dir = run_dir.join(files::ENDPOINTS_DIR);
    for entry in list(&dir)?.iter().filter(|e| !e.name.starts_with('.')) {
        let path = dir.join(&entry.name);
        match fs::read(&path).and_then(|b| Ok(serde_json::from_slice(&b)?)) {
            Ok(record) => all.push(record),
            Err(e) if is_absent(&e) => {}
            Err(e) => eprintln!("rustnet-cni: {} left alone: {e}", path.display()),
        }
    }
    Ok(all)
}

/// A mark that an attachment may hold a lease of a delegated IPAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The network of the lease.
    pub network: String,
    /// Who holds it.
    pub owner: Attachment,
}

impl Mark {
    /// The configuration of the ADD; empty if it cannot be read, and in marks of earlier releases.
    pub fn configuration(&self, run_dir: &Path) -> Vec<u8> {
        fs::read(self.path(run_dir)).unwrap_or_default()
    }

    /// Writes the mark with the configuration of the ADD, by which the lease can be given back later.
    pub fn write(&self, run_dir: &Path, configuration: &[u8]) -> Result<(), Error> {
        let path = self.path(run_dir);
        create(&path, configuration).map_err(|e| Error::io(format!("write {}", path.display()), &e))
    }

    /// Removes the mark.
    pub fn remove(&self, run_dir: &Path) -> Result<(), Error> {
        remove(&self.path(run_dir))
    }

    fn path(&self, run_dir: &Path) -> PathBuf {
        let Attachment { container_id, ifname } = &self.owner;
        delegated_dir(run_dir).join(&self.network).join(format!("{container_id}@{ifname}"))
    }
}

/// The marks of all networks.
pub fn marks(run_dir: &Path) -> Result<Vec<Mark>, Error> {
    let dir = delegated_dir(run_dir);
    let mut all = Vec::new();
    for network in list(&dir)? {
        for entry in list(&dir.join(&network.name))? {
            let Some((container_id, ifname)) = entry.name.split_once('@') else { continue };
            if is_identifier(container_id) {
                let owner = Attachment { container_id: container_id.into(), ifname: ifname.into() };
                all.push(Mark { network: network.name.clone(), owner });
            }
        }
    }
    Ok(all)
}

fn delegated_dir(run_dir: &Path) -> PathBuf {
    run_dir.join(files::IPAM_DIR).join(DELEGATED_DIR)
}

/// The file that becomes `path` by a rename; dot and extension keep readers away from it.
fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

/// Writes a file and makes its directory if need be.
fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    open(path, OpenOptions::new().write(true).create(true).truncate(true))?.write_all(bytes)
}

/// Opens a file, and makes its directory if need be. What is made is for root alone: who can open a file can lock it.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let options = options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    match options.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path.parent().unwrap_or(path))?;
            options.open(path)
        }
        other => other,
    }
}

/// Opens a file for reading and writing, and locks it. Another process that has it locked is waited for as long as `patience`.
/// Then a file that is open to all users, as earlier releases made it, is replaced; of others the runtime should try again.
pub fn lock(path: &Path, patience: Duration) -> Result<File, Error> {
    let failed = |e: &io::Error| Error::io(format!("lock {}", path.display()), e);
    let began = Instant::now();
    loop {
        let file = open(path, OpenOptions::new().read(true).write(true).create(true)).map_err(|e| failed(&e))?;
        let meta = file.metadata().map_err(|e| failed(&e))?;
        let is_open_to_all = meta.mode() & 0o077 != 0;
        match file.try_lock() {
            // Not if it was replaced meanwhile.
            Ok(()) if fs::symlink_metadata(path).is_ok_and(|now| now.ino() == meta.ino()) => {
                if is_open_to_all {
                    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(|e| failed(&e))?;
                }
                return Ok(file);
            }
            Ok(()) => continue,
            Err(TryLockError::Error(e)) => return Err(failed(&e)),
            Err(TryLockError::WouldBlock) => {}
        }
        if began.elapsed() < patience {
            sleep(LOCK_RETRY);
        } else if is_open_to_all {
            remove(path)?;
        } else {
            let text = format!("{} has been locked by another process for {patience:?}", path.display());
            return Err(Error::new(code::TRY_AGAIN, text).details("`lslocks` shows which; end it if it hangs"));
        }
    }
}

/// Removes a file; one that has gone is no error.
pub fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if !is_absent(&e) => Err(Error::io(format!("remove {}", path.display()), &e)),
        _ => Ok(()),
    }
}

/// A file of a directory.
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its inode: names of one file share it.
    pub inode: u64,
}

/// The files of a directory that may be missing.
pub fn list(dir: &Path) -> Result<Vec<Entry>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if is_absent(&e) => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(dir.display(), &e)),
    };
    let entry = |e: fs::DirEntry| Some(Entry { inode: e.ino(), name: e.file_name().into_string().ok()? });
    Ok(entries.flatten().filter_map(entry).collect())
}

/// The file is not there, or its name cannot exist.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
