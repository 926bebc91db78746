//! Container images without a builder: layers from files of this machine, written as an OCI image layout in one tar file,
//! which `ctr images import`, `podman load` and `docker load` take.
//!
//! Equal input gives equal bytes: no times, no owners, entries in the order they were added.

mod index;
mod layout;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cache;
use crate::libraries::{self, Library};

pub use index::{Index, Statement};
pub use layout::{names, write, write_index};

/// One layer while it is being filled; paths are absolute, as the container sees them.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
    seen: BTreeSet<PathBuf>,
}

/// A finished layer: an uncompressed tar file.
pub struct Blob {
    bytes: Vec<u8>,
    digest: String,
}

/// One image: its layers, how it is run, and its names.
#[derive(Default)]
pub struct Image {
    /// From the lowest on.
    pub layers: Vec<Rc<Blob>>,
    /// What is run, whatever the arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or what is run when there is no entry point.
    pub cmd: Vec<String>,
    /// `PATH` of its processes.
    pub path: String,
    /// Descriptive labels.
    pub labels: Vec<(String, String)>,
    /// With registry and tag, such as `docker.io/library/rustnet:0.1.0`.
    pub names: Vec<String>,
    /// What it runs on, such as `arm64`; this machine when absent.
    pub architecture: Option<&'static str>,
    /// Its time, as RFC 3339 writes it.
    pub created: Option<String>,
}

impl Layer {
    /// An empty one.
    pub fn new() -> Self {
        Self { tar: tar::Builder::new(Vec::new()), seen: BTreeSet::new() }
    }

    /// A directory, with its parents.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<()> {
        self.parents(Path::new(path))?;
        if self.seen.insert(path.into()) {
            self.append(path, tar::EntryType::Directory, mode, &[])?;
        }
        Ok(())
    }

    /// A copy of a file of this machine; symbolic links on the way to it are followed. The first of a name stays.
    pub fn file(&mut self, path: &str, from: &Path, mode: u32) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.content(path, &content, mode)
    }

    /// A file of this content. The first of a name stays.
    pub fn content(&mut self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        self.parents(Path::new(path))?;
        if self.seen.insert(path.into()) {
            self.append(path, tar::EntryType::Regular, mode, content)?;
        }
        Ok(())
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(Path::new(path))?;
        if self.seen.insert(path.into()) {
            let mut header = header(tar::EntryType::Symlink, 0o777, 0);
            self.tar.append_link(&mut header, path.trim_start_matches('/'), target)?;
        }
        Ok(())
    }

    /// A program with the libraries that it is linked with, at their places on this machine.
    pub fn program(&mut self, path: &str, from: &Path) -> Result<()> {
        self.program_with(path, from, &libraries::native(from)?)
    }

    /// A program with these libraries.
    pub fn program_with(&mut self, path: &str, from: &Path, libraries: &[Library]) -> Result<()> {
        self.file(path, from, 0o755)?;
        libraries.iter().try_for_each(|it| self.file(&it.place.to_string_lossy(), &it.file, 0o755))
    }

    /// No more to be added.
    pub fn finish(self) -> Result<Rc<Blob>> {
        Ok(Rc::new(Blob::new(self.tar.into_inner()?)))
    }

    fn parents(&mut self, path: &Path) -> Result<()> {
        let mut above: Vec<PathBuf> =
            path.ancestors().skip(1).filter(|p| *p != Path::new("/")).map(Into::into).collect();
        while let Some(dir) = above.pop() {
            if self.seen.insert(dir.clone()) {
                self.append(&dir.to_string_lossy(), tar::EntryType::Directory, 0o755, &[])?;
            }
        }
        Ok(())
    }

    fn append(&mut self, path: &str, kind: tar::EntryType, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = header(kind, mode, content.len() as u64);
        self.tar.append_data(&mut header, path.trim_start_matches('/'), content)?;
        Ok(())
    }
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = cache::hex(&Sha256::digest(&bytes));
        Self { bytes, digest }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// `sha256:...`.
    fn id(&self) -> String {
        format!("sha256:{}", self.digest)
    }

    fn descriptor(&self, kind: &str) -> Value {
        json!({"mediaType": kind, "digest": self.id(), "size": self.bytes.len()})
    }
}

impl Image {
    /// `sha256:...` of its manifest: what it is called by.
    pub fn digest(&self) -> String {
        self.manifest(&self.config()).id()
    }

    fn config(&self) -> Blob {
        let ids: Vec<_> = self.layers.iter().map(|layer| layer.id()).collect();
        let mut config = json!({
            "architecture": self.architecture(),
            "os": "linux",
            "config": {
                "Env": [format!("PATH={}", self.path)],
                "Entrypoint": self.entrypoint,
                "Cmd": self.cmd,
                "WorkingDir": "/",
                "Labels": self.labels(),
            },
            "rootfs": {"type": "layers", "diff_ids": ids},
        });
        if let Some(created) = &self.created {
            config["created"] = json!(created);
        }
        Blob::json(&config)
    }

    fn labels(&self) -> serde_json::Map<String, Value> {
        self.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect()
    }

    fn architecture(&self) -> &'static str {
        self.architecture.unwrap_or_else(architecture)
    }

    fn manifest(&self, config: &Blob) -> Blob {
        let layers = self.layers.iter().map(|layer| layer.descriptor("application/vnd.oci.image.layer.v1.tar"));
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
            "layers": layers.collect::<Vec<_>>(),
        });
        if !self.labels.is_empty() {
            // A registry shows annotations without a look at the configuration.
            manifest["annotations"] = self.labels().into();
        }
        Blob::json(&manifest)
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
