//! Container images without a builder: layers from files of this machine, written as an OCI image layout in one tar file,
//! which `ctr images import`, `podman load` and `docker load` take.
//!
//! Equal input gives equal bytes: no times, no owners, entries in the order they were added.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::cache;

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
        self.file(path, from, 0o755)?;
        for library in libraries(from)? {
            self.file(&library.to_string_lossy(), &library, 0o755)?;
        }
        Ok(())
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

    fn descriptor(&self, kind: &str) -> Value {
        json!({"mediaType": kind, "digest": format!("sha256:{}", self.digest), "size": self.bytes.len()})
    }
}

impl Image {
    fn config(&self) -> Blob {
        let ids: Vec<_> = self.layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect();
        let labels: serde_json::Map<_, _> = self.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        Blob::json(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Env": [format!("PATH={}", self.path)],
                "Entrypoint": self.entrypoint,
                "Cmd": self.cmd,
                "WorkingDir": "/",
                "Labels": labels,
            },
            "rootfs": {"type": "layers", "diff_ids": ids},
        }))
    }

    fn manifest(&self, config: &Blob) -> Blob {
        let layers = self.layers.iter().map(|layer| layer.descriptor("application/vnd.oci.image.layer.v1.tar"));
        Blob::json(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
            "layers": layers.collect::<Vec<_>>(),
        }))
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Writes images into one file; layers that they share are in it once.
pub fn write(file: &Path, images: &[Image]) -> Result<()> {
    let shown = || format!("writing {}", file.display());
    fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).with_context(shown)?;
    // Under another name first: whoever finds the file, finds all of it.
    let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
    let mut archive =
        Archive { tar: tar::Builder::new(fs::File::create(&unfinished).with_context(shown)?), seen: BTreeSet::new() };
    archive.entry("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut manifests = Vec::new();
    for image in images {
        for layer in &image.layers {
            archive.blob(layer)?;
        }
        let config = image.config();
        archive.blob(&config)?;
        let manifest = image.manifest(&config);
        archive.blob(&manifest)?;
        for name in &image.names {
            let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
            let mut entry = manifest.descriptor(MANIFEST);
            entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
            manifests.push(entry);
        }
    }
    archive.entry("index.json", json!({"schemaVersion": 2, "manifests": manifests}).to_string().as_bytes())?;
    archive.tar.into_inner()?.flush()?;
    fs::rename(&unfinished, file).with_context(shown)
}

/// The names of the images in a file that [`write`] wrote.
pub fn names(file: &Path) -> Result<Vec<String>> {
    let shown = || format!("reading the image {}", file.display());
    let mut archive = tar::Archive::new(fs::File::open(file).with_context(shown)?);
    for entry in archive.entries().with_context(shown)? {
        let entry = entry.with_context(shown)?;
        if entry.path()? == Path::new("index.json") {
            let index: Value = serde_json::from_reader(entry).with_context(shown)?;
            let names = index["manifests"].as_array().into_iter().flatten();
            let name = |it: &Value| it["annotations"]["io.containerd.image.name"].as_str().map(str::to_owned);
            return Ok(names.filter_map(name).collect());
        }
    }
    bail!("{}: not an image file, for it has no index.json", file.display())
}

struct Archive {
    tar: tar::Builder<fs::File>,
    seen: BTreeSet<String>,
}

impl Archive {
    fn blob(&mut self, blob: &Blob) -> Result<()> {
        if self.seen.insert(blob.digest.clone()) {
            self.entry(&format!("blobs/sha256/{}", blob.digest), &blob.bytes)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let mut header = header(tar::EntryType::Regular, 0o644, content.len() as u64);
        self.tar.append_data(&mut header, path, content).with_context(|| format!("adding {path} to an image"))
    }
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

/// The shared libraries that a program needs, its loader among them; none for a static one.
pub fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = std::process::Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("running ldd")?;
    // A static program is no success to ldd, and prints no path.
    Ok(paths_of(&String::from_utf8_lossy(&output.stdout)))
}

/// The absolute paths in what ldd prints: `libc.so.6 => /lib/.../libc.so.6 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`.
fn paths_of(ldd: &str) -> Vec<PathBuf> {
    let words = ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::Read;

    fn image(content: &[u8]) -> Image {
        let mut layer = Layer::new();
        layer.content("/opt/x/program", content, 0o755).unwrap();
        layer.content("/opt/x/program", b"a second of the name", 0o755).unwrap();
        layer.link("/bin/program", "/opt/x/program").unwrap();
        let layers = vec![layer.finish().unwrap()];
        Image { layers, names: vec!["docker.io/library/x:1".into()], ..Image::default() }
    }

    fn entries(tar: impl Read) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(tar);
        let read = |mut entry: tar::Entry<'_, _>| {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        };
        archive.entries().unwrap().map(|entry| read(entry.unwrap())).collect()
    }

    #[test]
    fn an_image_can_be_followed_from_its_index_to_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("images.tar");
        write(&file, &[image(b"content")]).unwrap();
        assert_eq!(names(&file).unwrap(), ["docker.io/library/x:1"]);
        let files = entries(fs::File::open(&file).unwrap());
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = &files[&format!("blobs/sha256/{digest}")];
            assert_eq!(descriptor["size"], bytes.len());
            assert_eq!(Blob::new(bytes.clone()).digest, digest);
            bytes.clone()
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "docker.io/library/x:1");
        let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], manifest["layers"][0]["digest"], "the layer is not compressed");
        let layer = entries(&blob(&manifest["layers"][0])[..]);
        assert_eq!(layer.keys().collect::<Vec<_>>(), ["bin", "bin/program", "opt", "opt/x", "opt/x/program"]);
        assert_eq!(layer["opt/x/program"], b"content");
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = |name: &str, content: &[u8]| {
            let file = dir.path().join(name);
            write(&file, &[image(content)]).unwrap();
            fs::read(file).unwrap()
        };
        assert_eq!(bytes("a", b"1"), bytes("b", b"1"));
        assert_ne!(bytes("a", b"1"), bytes("b", b"2"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing temporary is left");
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x2)\n\t/lib64/ld.so.2 (0x3)\n";
        assert_eq!(paths_of(text), [PathBuf::from("/lib/x/libc.so.6"), PathBuf::from("/lib64/ld.so.2")]);
        assert_eq!(paths_of("\tstatically linked\n"), Vec::<PathBuf>::new());
    }
}
