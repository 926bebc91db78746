//! How an image was built, as a predicate of SLSA provenance v1. It is unsigned: it states what this command read, and is as
//! trustworthy as the person who ran the command. Pure: facts in, predicate out.

use serde_json::{Value, json};

use super::source::Source;

/// What a statement with this predicate is called in in-toto.
pub const KIND: &str = "https://slsa.dev/provenance/v1";
/// What external and internal parameters mean: docs/supply-chain.md.
const BUILD_TYPE: &str = "https://rustnet.io/build/xtask-image/v1";
/// The work tree of whoever ran the command.
const BUILDER: &str = "https://rustnet.io/builder/work-tree";

/// A compiler, by what `rustc -vV` prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compiler {
    /// What it compiled.
    pub role: &'static str,
    /// Its release.
    pub release: String,
    /// Its commit.
    pub commit: String,
}

/// What goes into a build.
#[derive(Clone, Debug, Default)]
pub struct Build {
    /// The source.
    pub source: Source,
    /// SHA-256 of Cargo.lock.
    pub lock: String,
    /// Rust's target.
    pub target: String,
    /// The image's version.
    pub version: String,
    /// All compilers.
    pub compilers: Vec<Compiler>,
    /// The linker of the kernel side, with its version.
    pub bpf_linker: String,
    /// Package URLs of what was copied or linked from this machine's packages.
    pub packages: Vec<String>,
    /// SHA-256 of the kernel-side object.
    pub object: String,
}

impl Compiler {
    /// Reads the output of `rustc -vV`.
    pub fn parse(role: &'static str, version: &str) -> Self {
        let field = |name: &str| {
            let found = version.lines().find_map(|line| line.strip_prefix(name));
            found.unwrap_or("unknown").to_owned()
        };
        Self { role, release: field("release: "), commit: field("commit-hash: ") }
    }
}

/// Returns the predicate.
pub fn predicate(build: &Build) -> Value {
    let mut source = json!({"name": "source"});
    if let Some(commit) = &build.source.commit {
        source["digest"] = json!({"gitCommit": commit});
    }
    if let (Some(url), Some(commit)) = (&build.source.url, &build.source.commit) {
        source["uri"] = json!(format!("git+{url}@{commit}"));
    }
    let mut dependencies = vec![source, json!({"name": "Cargo.lock", "digest": {"sha256": build.lock}})];
    dependencies.extend(build.compilers.iter().map(|it| {
        let uri = format!("pkg:generic/rustc@{}", it.release);
        json!({"name": format!("rustc, {}", it.role), "uri": uri, "digest": {"gitCommit": it.commit}})
    }));
    dependencies.push(json!({"name": "bpf-linker", "uri": format!("pkg:cargo/bpf-linker@{}", build.bpf_linker)}));
    dependencies.extend(build.packages.iter().map(|purl| json!({"uri": purl})));
    json!({
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "source": {"repository": build.source.url, "revision": build.source.commit},
                "target": build.target,
                "version": build.version,
            },
            // Without paths of the machine: `--remap-path-prefix` replaces them by these.
            "internalParameters": {
                "profile": "release",
                "paths": ["/cargo", "/rustc", "/rustnet"],
                "sourceDateEpoch": build.source.time.map(jiff::Timestamp::as_second),
            },
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"rustnet-xtask": env!("CARGO_PKG_VERSION")}},
            // No times and no identifier of the run: equal sources give equal statements.
            "metadata": {},
            "byproducts": [{"name": "rustnet.bpf.o", "digest": {"sha256": build.object}}],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the specifications of SLSA provenance v1 and of in-toto's resource descriptors require.
    #[test]
    fn a_predicate_has_what_slsa_requires() {
        let build = Build {
            source: Source {
                commit: Some("c".repeat(40)),
                url: Some("https://example.org/rustnet".into()),
                ..Source::default()
            },
            compilers: vec![Compiler::parse("user space", "rustc 1.95.0\ncommit-hash: abc\nrelease: 1.95.0\n")],
            packages: vec!["pkg:deb/debian/libc6@2".into()],
            ..Build::default()
        };
        let predicate = predicate(&build);
        let definition = &predicate["buildDefinition"];
        for uri in [&definition["buildType"], &predicate["runDetails"]["builder"]["id"]] {
            assert!(uri.as_str().unwrap().contains("://"), "{uri}");
        }
        assert!(definition["externalParameters"].is_object());
        let dependencies = definition["resolvedDependencies"].as_array().unwrap();
        for it in dependencies {
            assert!(it["uri"].is_string() || it["digest"].is_object(), "{it}");
        }
        assert_eq!(dependencies[0]["uri"], format!("git+https://example.org/rustnet@{}", "c".repeat(40)));
        assert_eq!(dependencies[2]["digest"]["gitCommit"], "abc");
        assert!(!predicate.to_string().contains(env!("CARGO_MANIFEST_DIR")));
    }
}
