//! Which crates a program is linked with, by `cargo tree`: with the features of this build, for its target, without what only
//! runs while it is built (build scripts, procedural macros).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

use crate::cmd::Cmd;
use crate::paths;

/// A crate by name and version.
pub type Id = (String, String);

/// One crate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crate {
    /// The licence expression of its manifest.
    pub licence: Option<String>,
    /// The features that are on.
    pub features: String,
    /// SHA-256 of its package in the registry; none for a crate of this work tree.
    pub checksum: Option<String>,
}

/// The crates of one program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    /// All of them.
    pub crates: BTreeMap<Id, Crate>,
    /// Which depends on which.
    pub edges: BTreeSet<(Id, Id)>,
    /// The crate that the program is made from.
    pub root: Id,
}

/// Returns the graph of one package of this work tree for a target.
pub fn graph(package: &str, target: &str) -> Result<Graph> {
    let root = paths::root();
    let lock = std::fs::read_to_string(root.join("Cargo.lock")).context("reading Cargo.lock")?;
    let tree = Cmd::cargo()
        .args(["tree", "--locked", "--package", package, "--target", target, "--edges", "normal,no-proc-macro"])
        .args(["--charset", "ascii", "--prefix", "depth", "--format", "\t{p}\t{l}\t{f}\t"])
        .env("CARGO_TERM_COLOR", "never")
        .dir(&root)
        .capture()?;
    parse(&tree, &checksums(&lock)).with_context(|| format!("reading the crates of {package}"))
}

/// The graph in what `cargo tree` prints. A crate that was printed before comes without those below it.
fn parse(tree: &str, checksums: &BTreeMap<Id, String>) -> Result<Graph> {
    let mut graph = Graph::default();
    let mut above: Vec<Id> = Vec::new();
    for line in tree.lines() {
        let [depth, package, licence, features, ..] = line.split('\t').collect::<Vec<_>>()[..] else {
            bail!("an unknown line of cargo tree: {line:?}");
        };
        let depth: usize = depth.parse().with_context(|| format!("the depth of {line:?}"))?;
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next().and_then(|word| word.strip_prefix('v'))) else {
            bail!("no version in {package:?}");
        };
        let id = (name.to_owned(), version.to_owned());
        let checksum = checksums.get(&id).cloned();
        // MIT/Apache-2.0 is how manifests wrote it before there were expressions.
        let licence = Some(licence.replace('/', " OR ")).filter(|text| !text.is_empty());
        graph.crates.insert(id.clone(), Crate { licence, features: features.to_owned(), checksum });
        above.truncate(depth);
        match above.last() {
            Some(parent) => {
                graph.edges.insert((parent.clone(), id.clone()));
            }
            None => graph.root = id.clone(),
        }
        above.push(id);
    }
    Ok(graph)
}

/// The checksums in a Cargo.lock.
fn checksums(lock: &str) -> BTreeMap<Id, String> {
    let value = |block: &str, key: &str| {
        let line = block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \""))?;
        Some(line.trim_end_matches('"').to_owned())
    };
    let entry = |block: &str| Some(((value(block, "name")?, value(block, "version")?), value(block, "checksum")?));
    lock.split("[[package]]").filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"x\"\nchecksum = \"aa\"\n\n\
                        [[package]]\nname = \"own\"\nversion = \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";

    #[test]
    fn a_tree_is_read_with_edges_licences_and_checksums() {
        let tree = "0\town v0.1.0 (/x/own)\tMIT\t\t\n1\ta v1.0.0\tMIT/Apache-2.0\tdefault,std\t\n2\tb v2.0.0\t\t\t\n1\tb v2.0.0\t\t\t (*)\n";
        let graph = parse(tree, &checksums(LOCK)).unwrap();
        let id = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        let (own, a, b) = (id("own", "0.1.0"), id("a", "1.0.0"), id("b", "2.0.0"));
        assert_eq!(graph.root, own);
        assert_eq!(graph.edges, BTreeSet::from([(own.clone(), a.clone()), (own, b.clone()), (a.clone(), b.clone())]));
        let wanted = Crate {
            licence: Some("MIT OR Apache-2.0".into()),
            features: "default,std".into(),
            checksum: Some("aa".into()),
        };
        assert_eq!(graph.crates[&a], wanted);
        assert_eq!(graph.crates[&b], Crate::default());
        assert!(parse("no tree", &BTreeMap::new()).is_err());
    }

    #[test]
    fn the_programs_are_linked_with_aya_and_the_cni_binary_is_not() {
        let host = crate::arch::Arch::host().unwrap().target();
        let names = |package: &str| -> BTreeSet<String> {
            graph(package, &host).unwrap().crates.into_keys().map(|(name, _)| name).collect()
        };
        let (agent, cni) = (names("rustnet-agent"), names("rustnet-cni"));
        assert!(agent.contains("aya") && agent.contains("rustnet-common"));
        assert!(!cni.contains("aya") && cni.contains("rustnet-common"));
        assert!(!agent.contains("serde_derive"), "a procedural macro is not in the program");
        assert!(!agent.contains("proptest"), "nor is what tests need");
    }
}
