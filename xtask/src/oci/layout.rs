//! An OCI image layout in one tar file.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Blob, Image, Index, MANIFEST, header, index};

/// Writes images into one file; layers that they share are in it once.
pub fn write(file: &Path, images: &[Image]) -> Result<()> {
    write_with(file, |archive| {
        let mut entries = Vec::new();
        for image in images {
            let manifest = archive.image(image)?;
            entries.extend(named(&manifest.descriptor(MANIFEST), &image.names));
        }
        Ok(entries)
    })
}

/// Writes an image of several architectures into one file, with the statements about it. Returns its digest, `sha256:...`.
pub fn write_index(file: &Path, index: &Index) -> Result<String> {
    let parts = index.parts();
    write_with(file, |archive| {
        index.images.iter().try_for_each(|image| archive.image(image).map(drop))?;
        parts.blobs.iter().try_for_each(|blob| archive.blob(blob))?;
        archive.blob(&parts.index)?;
        Ok(named(&parts.index.descriptor(index::INDEX), &index.names))
    })?;
    Ok(parts.index.id())
}

fn write_with(file: &Path, fill: impl FnOnce(&mut Archive) -> Result<Vec<Value>>) -> Result<()> {
    let shown = || format!("writing {}", file.display());
    fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).with_context(shown)?;
    // Under another name first: whoever finds the file, finds all of it.
    let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
    let mut archive =
        Archive { tar: tar::Builder::new(fs::File::create(&unfinished).with_context(shown)?), seen: BTreeSet::new() };
    archive.entry("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let manifests = fill(&mut archive)?;
    archive.entry("index.json", json!({"schemaVersion": 2, "manifests": manifests}).to_string().as_bytes())?;
    archive.tar.into_inner()?.flush()?;
    fs::rename(&unfinished, file).with_context(shown)
}

/// One entry of the layout's index for each name.
fn named(descriptor: &Value, names: &[String]) -> Vec<Value> {
    let entry = |name: &String| {
        let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        let mut entry = descriptor.clone();
        entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
        entry
    };
    names.iter().map(entry).collect()
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
    /// All of an image; returns its manifest.
    fn image(&mut self, image: &Image) -> Result<Blob> {
        image.layers.iter().try_for_each(|layer| self.blob(layer))?;
        let config = image.config();
        self.blob(&config)?;
        let manifest = image.manifest(&config);
        self.blob(&manifest)?;
        Ok(manifest)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Layer, Statement};
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

    fn index() -> Index {
        let of = |architecture| Image { architecture: Some(architecture), names: Vec::new(), ..image(b"content") };
        Index {
            images: vec![of("amd64"), of("arm64")],
            statements: vec![vec![Statement { kind: "https://example.org/kind".into(), predicate: json!({"is": 1}) }]],
            name: "x".into(),
            names: vec!["docker.io/library/x:1".into()],
            annotations: vec![("org.opencontainers.image.version".into(), "1".into())],
        }
    }

    #[test]
    fn an_index_leads_to_each_architecture_and_to_what_is_said_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("index.tar");
        let digest = write_index(&file, &index()).unwrap();
        assert_eq!(names(&file).unwrap(), ["docker.io/library/x:1"]);
        let files = entries(fs::File::open(&file).unwrap());
        let read = |descriptor: &Value| -> Value {
            let digest = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = &files[&format!("blobs/sha256/{digest}")];
            assert_eq!(descriptor["size"], bytes.len());
            serde_json::from_slice(bytes).unwrap()
        };
        let top: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        assert_eq!(top["manifests"].as_array().unwrap().len(), 1, "importers take a layout with one image");
        assert_eq!(top["manifests"][0]["digest"], digest);
        let index = read(&top["manifests"][0]);
        let manifests = index["manifests"].as_array().unwrap();
        let platform = |at: usize| manifests[at]["platform"]["architecture"].as_str().unwrap();
        assert_eq!((manifests.len(), platform(0), platform(1), platform(2)), (3, "amd64", "arm64", "unknown"));
        for at in [0, 1] {
            let config = read(&read(&manifests[at])["config"]);
            assert_eq!(config["architecture"], platform(at));
        }
        let attestation = read(&manifests[2]);
        assert_eq!(attestation["subject"]["digest"], manifests[0]["digest"]);
        assert_eq!(manifests[2]["annotations"]["vnd.docker.reference.digest"], manifests[0]["digest"]);
        assert_eq!(read(&attestation["config"]), json!({}));
        let statement = read(&attestation["layers"][0]);
        assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
        assert_eq!(statement["predicateType"], attestation["layers"][0]["annotations"]["in-toto.io/predicate-type"]);
        let subject = format!("sha256:{}", statement["subject"][0]["digest"]["sha256"].as_str().unwrap());
        assert_eq!(manifests[0]["digest"], subject);
    }
}
