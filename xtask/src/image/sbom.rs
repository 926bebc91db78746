//! The software bill of materials of an image, as SPDX 2.3 in JSON: programs, the crates they are linked with, and the libraries
//! next to them. Pure: facts in, document out.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::crates::{Graph, Id};
use super::debian::Package;

/// What a statement with this document is called in in-toto.
pub const KIND: &str = "https://spdx.dev/Document";
/// What is not known, in SPDX.
const NOASSERTION: &str = "NOASSERTION";
const DOCUMENT: &str = "SPDXRef-DOCUMENT";
const IMAGE: &str = "SPDXRef-Image";
/// The one program without shared libraries.
const CNI: &str = "rustnet-cni";

/// One file of the image that was built here.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its name.
    pub name: String,
    /// SHA-256 of its content.
    pub sha256: String,
    /// The crates that it is linked with.
    pub graph: Graph,
    /// The release of the compiler, whose library is in it.
    pub rust: String,
    /// The program that holds it, if it is no file of its own.
    pub inside: Option<String>,
}

/// What an image holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Its version.
    pub version: String,
    /// Its architecture.
    pub architecture: String,
    /// `sha256:...` of its manifest.
    pub digest: String,
    /// Its time, as RFC 3339 writes it.
    pub created: String,
    /// What was built.
    pub programs: Vec<Program>,
    /// Where its libraries are from.
    pub packages: Vec<Package>,
    /// What the CNI binary is statically linked with, in addition to its crates.
    pub linked: Vec<Package>,
}

/// The document.
#[derive(Default)]
struct Document {
    packages: Vec<Value>,
    relations: BTreeSet<(String, &'static str, String)>,
}

/// Returns the document for an image.
pub fn document(it: &Contents) -> Value {
    let mut document = Document::default();
    let digest = it.digest.trim_start_matches("sha256:");
    document.relate(DOCUMENT, "DESCRIBES", IMAGE);
    document.packages.push(json!({
        "SPDXID": IMAGE,
        "name": "rustnet",
        "versionInfo": it.version,
        "downloadLocation": NOASSERTION,
        "filesAnalyzed": false,
        "primaryPackagePurpose": "CONTAINER",
        "checksums": sha256(digest),
        "licenseConcluded": NOASSERTION,
        "licenseDeclared": "Apache-2.0 OR MIT",
        "copyrightText": NOASSERTION,
        "externalRefs": purl(&format!("pkg:oci/rustnet@sha256%3A{digest}?arch={}", it.architecture)),
    }));
    for program in &it.programs {
        document.program(program, &it.version);
    }
    document.crates(&it.programs);
    for package in &it.packages {
        let id = document.library(package);
        document.relate(IMAGE, "CONTAINS", &id);
    }
    for package in &it.linked {
        let id = document.library(package);
        document.relate(&reference("Program", CNI, ""), "STATIC_LINK", &id);
    }
    let relation = |(from, kind, to): &(String, &str, String)| json!({"spdxElementId": from, "relationshipType": kind, "relatedSpdxElement": to});
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": DOCUMENT,
        "name": format!("rustnet-{}-{}", it.version, it.architecture),
        // Unlike any other document's, and the same for the same image.
        "documentNamespace": format!("https://spdx.org/spdxdocs/rustnet-{}-{}-{digest}", it.version, it.architecture),
        "creationInfo": {"created": it.created, "creators": [concat!("Tool: rustnet-xtask-", env!("CARGO_PKG_VERSION"))]},
        "packages": document.packages,
        "relationships": document.relations.iter().map(relation).collect::<Vec<_>>(),
    })
}

impl Document {
    fn relate(&mut self, from: &str, kind: &'static str, to: &str) {
        self.relations.insert((from.to_owned(), kind, to.to_owned()));
    }

    fn program(&mut self, program: &Program, version: &str) {
        let id = reference("Program", &program.name, "");
        let root = &program.graph.crates[&program.graph.root];
        self.packages.push(json!({
            "SPDXID": id,
            "name": program.name,
            "versionInfo": version,
            "downloadLocation": NOASSERTION,
            "filesAnalyzed": false,
            "primaryPackagePurpose": "APPLICATION",
            "checksums": sha256(&program.sha256),
            "licenseConcluded": NOASSERTION,
            "licenseDeclared": root.licence.as_deref().unwrap_or(NOASSERTION),
            "copyrightText": NOASSERTION,
        }));
        let container = program.inside.as_ref().map_or(IMAGE.to_owned(), |outer| reference("Program", outer, ""));
        self.relate(&container, "CONTAINS", &id);
        self.relate(&id, "GENERATED_FROM", &crate_id(&program.graph.root));
        let library = reference("Rust", "library", &program.rust);
        self.relate(&id, "STATIC_LINK", &library);
        if !self.packages.iter().any(|package| package["SPDXID"] == library) {
            self.packages.push(json!({
                "SPDXID": library,
                "name": "rust-library",
                "versionInfo": program.rust,
                "downloadLocation": NOASSERTION,
                "filesAnalyzed": false,
                "primaryPackagePurpose": "LIBRARY",
                "licenseConcluded": NOASSERTION,
                "licenseDeclared": "MIT OR Apache-2.0",
                "copyrightText": NOASSERTION,
                "comment": "The standard library of the compiler; a kernel-side program has its core alone",
                "externalRefs": purl(&format!("pkg:generic/rust-library@{}", program.rust)),
            }));
        }
    }

    /// The crates of all programs, each once, with the features that it has in each.
    fn crates(&mut self, programs: &[Program]) {
        let mut features: BTreeMap<&Id, Vec<String>> = BTreeMap::new();
        let mut all = BTreeMap::new();
        for program in programs {
            for (id, it) in &program.graph.crates {
                all.insert(id, it);
                features.entry(id).or_default().push(format!("in {}: {}", program.name, it.features));
            }
            for (from, to) in &program.graph.edges {
                self.relate(&crate_id(from), "DEPENDS_ON", &crate_id(to));
            }
        }
        for (id, it) in all {
            let mut package = json!({
                "SPDXID": crate_id(id),
                "name": id.0,
                "versionInfo": id.1,
                "downloadLocation": NOASSERTION,
                "filesAnalyzed": false,
                "primaryPackagePurpose": "LIBRARY",
                "licenseConcluded": NOASSERTION,
                "licenseDeclared": it.licence.as_deref().unwrap_or(NOASSERTION),
                "copyrightText": NOASSERTION,
                "comment": format!("Features {}", features[id].join("; ")),
            });
            if let Some(checksum) = &it.checksum {
                package["checksums"] = sha256(checksum);
                package["externalRefs"] = purl(&crate_purl(id));
            }
            self.packages.push(package);
        }
    }

    fn library(&mut self, package: &Package) -> String {
        let id = reference("Debian", &package.name, "");
        self.packages.push(json!({
            "SPDXID": id,
            "name": package.name,
            "versionInfo": package.version,
            "downloadLocation": NOASSERTION,
            "filesAnalyzed": false,
            "primaryPackagePurpose": "LIBRARY",
            "licenseConcluded": NOASSERTION,
            "licenseDeclared": NOASSERTION,
            "copyrightText": NOASSERTION,
            "externalRefs": purl(&package.purl()),
        }));
        id
    }
}

/// The package URL of a crate of the registry.
fn crate_purl((name, version): &Id) -> String {
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

fn crate_id((name, version): &Id) -> String {
    reference("Crate", name, version)
}

/// An identifier of SPDX: letters, digits, dots and hyphens.
fn reference(kind: &str, name: &str, version: &str) -> String {
    let text = format!("{kind}-{name}-{version}");
    let allowed =
        text.trim_end_matches('-').chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' });
    format!("SPDXRef-{}", allowed.collect::<String>())
}

fn sha256(value: &str) -> Value {
    json!([{"algorithm": "SHA256", "checksumValue": value}])
}

fn purl(value: &str) -> Value {
    json!([{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": value}])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::image::crates;

    fn contents() -> Contents {
        let host = Arch::host().unwrap().target();
        let program = |name: &str, package: &str, target: &str, inside: Option<&str>| Program {
            name: name.into(),
            sha256: "0".repeat(64),
            graph: crates::graph(package, target).unwrap(),
            rust: "1.95.0".into(),
            inside: inside.map(Into::into),
        };
        Contents {
            version: "0.1.0".into(),
            architecture: "amd64".into(),
            digest: format!("sha256:{}", "1".repeat(64)),
            created: "2026-11-30T17:00:00Z".into(),
            programs: vec![
                program("rustnet-agent", "rustnet-agent", &host, None),
                program("rustnetctl", "rustnet-agent", &host, None),
                program("rustnet-cni", "rustnet-cni", &host, None),
                program("rustnet.bpf.o", "rustnet-ebpf", "bpfel-unknown-none", Some("rustnet-agent")),
            ],
            packages: vec![Package { name: "libc6".into(), version: "2.36-9".into(), ..Package::default() }],
            linked: vec![Package { name: "libc6-dev".into(), version: "2.36-9".into(), ..Package::default() }],
        }
    }

    fn text<'a>(value: &'a Value, key: &str) -> &'a str {
        value[key].as_str().unwrap_or_else(|| panic!("{key} of {value}"))
    }

    /// Clauses 6, 7 and 11 of SPDX 2.3: what a document, each package and each relationship must have.
    #[test]
    fn a_document_has_what_spdx_requires() {
        let document = document(&contents());
        assert_eq!(document["spdxVersion"], "SPDX-2.3");
        assert_eq!(document["dataLicense"], "CC0-1.0");
        assert_eq!(document["SPDXID"], "SPDXRef-DOCUMENT");
        assert!(!text(&document, "name").is_empty());
        let namespace = text(&document, "documentNamespace");
        assert!(namespace.starts_with("https://") && !namespace.contains('#'), "{namespace}");
        assert_eq!(text(&document["creationInfo"], "created").len(), "2026-11-30T17:00:00Z".len());
        assert!(document["creationInfo"]["creators"][0].as_str().unwrap().starts_with("Tool: "));
        let mut ids = BTreeSet::from(["SPDXRef-DOCUMENT".to_owned()]);
        for package in document["packages"].as_array().unwrap() {
            let id = text(package, "SPDXID");
            let rest = id.strip_prefix("SPDXRef-").unwrap();
            assert!(rest.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-')), "{id}");
            assert!(ids.insert(id.to_owned()), "{id} twice");
            for key in ["name", "versionInfo", "downloadLocation", "licenseConcluded", "licenseDeclared"] {
                assert!(!text(package, key).is_empty(), "{key} of {id}");
            }
            assert_eq!(package["filesAnalyzed"], false, "{id}");
            for checksum in package["checksums"].as_array().into_iter().flatten() {
                let value = text(checksum, "checksumValue");
                assert!(value.len() == 64 && value.chars().all(|c| c.is_ascii_hexdigit()), "{id}: {value}");
            }
        }
        for relation in document["relationships"].as_array().unwrap() {
            for end in ["spdxElementId", "relatedSpdxElement"] {
                assert!(ids.contains(text(relation, end)), "{relation}");
            }
        }
    }

    #[test]
    fn every_crate_has_a_licence_and_each_from_the_registry_its_checksum() {
        let document = document(&contents());
        let packages = document["packages"].as_array().unwrap();
        let crates: Vec<_> = packages.iter().filter(|it| text(it, "SPDXID").starts_with("SPDXRef-Crate-")).collect();
        assert!(crates.len() > 100, "{}", crates.len());
        for it in crates {
            let (name, licence) = (text(it, "name"), text(it, "licenseDeclared"));
            // Identifiers joined by operators: no slash, no free text.
            let words: Vec<&str> = licence.split([' ', '(', ')']).filter(|word| !word.is_empty()).collect();
            let ids: Vec<_> = words.iter().filter(|word| !["AND", "OR", "WITH"].contains(*word)).collect();
            assert!(!ids.is_empty() && licence != NOASSERTION, "{name}: {licence}");
            let is_id = |id: &str| id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'));
            assert!(ids.iter().all(|id| is_id(id)) && words.len() % 2 == 1, "{name}: {licence}");
            let is_ours = name.starts_with("rustnet-");
            assert_eq!(it["checksums"].is_array(), !is_ours, "{name}");
            if !is_ours {
                let locator = text(&it["externalRefs"][0], "referenceLocator");
                assert!(locator.starts_with(&format!("pkg:cargo/{name}@")), "{locator}");
            }
        }
    }

    #[test]
    fn equal_contents_give_equal_documents() {
        assert_eq!(document(&contents()).to_string(), document(&contents()).to_string());
    }
}
