//! An image of several architectures, and in-toto statements about the image of each: an image index as BuildKit writes it, so
//! that one copy between registries takes all of it. The manifest of statements names its subject, too, by which registries
//! list it as a referrer.

use std::rc::Rc;

use serde_json::{Value, json};

use super::{Blob, Image, MANIFEST};

/// Media type of an image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// What a manifest without a configuration has in its place.
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// Media type of a statement.
const STATEMENT: &str = "application/vnd.in-toto+json";
/// Kind of a manifest of statements.
const ATTESTATION: &str = "application/vnd.docker.attestation.manifest.v1+json";

/// Images of one release, by architecture.
#[derive(Default)]
pub struct Index {
    /// One image for each architecture.
    pub images: Vec<Image>,
    /// What is said of each image, in the same order; of those that are not reached, nothing.
    pub statements: Vec<Vec<Statement>>,
    /// Name of the subject in statements.
    pub name: String,
    /// With registry and tag.
    pub names: Vec<String>,
    /// Descriptive annotations of the whole.
    pub annotations: Vec<(String, String)>,
}

/// One in-toto statement, without its subject.
#[derive(Clone, Debug)]
pub struct Statement {
    /// A URI that says what the predicate is.
    pub kind: String,
    /// What is said.
    pub predicate: Value,
}

/// What an index is made of, in addition to its images.
pub(super) struct Parts {
    pub(super) blobs: Vec<Rc<Blob>>,
    pub(super) index: Blob,
}

impl Index {
    pub(super) fn parts(&self) -> Parts {
        let (mut entries, mut attestations, mut blobs) = (Vec::new(), Vec::new(), Vec::new());
        for (at, image) in self.images.iter().enumerate() {
            let descriptor = image.manifest(&image.config()).descriptor(MANIFEST);
            if let Some(statements) = self.statements.get(at).filter(|it| !it.is_empty()) {
                attestations.push(self.attestation(&descriptor, statements, &mut blobs));
            }
            let mut entry = descriptor;
            entry["platform"] = json!({"architecture": image.architecture(), "os": "linux"});
            entries.push(entry);
        }
        entries.extend(attestations);
        let mut index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
        if !self.annotations.is_empty() {
            let annotations = self.annotations.iter().map(|(key, value)| (key.clone(), json!(value)));
            index["annotations"] = Value::Object(annotations.collect());
        }
        Parts { blobs, index: Blob::json(&index) }
    }

    /// The manifest of the statements about one image; returns its entry.
    fn attestation(&self, image: &Value, statements: &[Statement], blobs: &mut Vec<Rc<Blob>>) -> Value {
        let mut layers = Vec::new();
        for statement in statements {
            let blob = Blob::json(&statement.about(&[(&self.name, image["digest"].as_str().unwrap_or_default())]));
            let mut layer = blob.descriptor(STATEMENT);
            layer["annotations"] = json!({"in-toto.io/predicate-type": statement.kind});
            layers.push(layer);
            blobs.push(Rc::new(blob));
        }
        let empty = Blob::json(&json!({}));
        let manifest = Blob::json(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ATTESTATION,
            "config": empty.descriptor(EMPTY),
            "layers": layers,
            "subject": image,
        }));
        let mut entry = manifest.descriptor(MANIFEST);
        // A platform that no machine has: runtimes pass over it.
        entry["platform"] = json!({"architecture": "unknown", "os": "unknown"});
        entry["annotations"] = json!({
            "vnd.docker.reference.type": "attestation-manifest",
            "vnd.docker.reference.digest": image["digest"],
        });
        blobs.extend([empty, manifest].map(Rc::new));
        entry
    }
}

impl Statement {
    /// The whole statement about subjects, each with its name and its digest `sha256:...`.
    pub fn about(&self, subjects: &[(&str, &str)]) -> Value {
        let subject = |(name, digest): &(&str, &str)| json!({"name": name, "digest": {"sha256": digest.strip_prefix("sha256:").unwrap_or(digest)}});
        json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": subjects.iter().map(subject).collect::<Vec<_>>(),
            "predicateType": self.kind,
            "predicate": self.predicate,
        })
    }
}
