//! The order of layers in each crate, held by what its files import: a file imports from lower layers and from its own, never
//! from upper ones, and files do not import one another in a circle. There are no exceptions.

mod imports;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use self::imports::{Module, imports};
use crate::{paths, ui};

/// The layers of one crate.
struct Crate {
    /// Directory of its sources, from the root of the tree.
    sources: &'static str,
    /// From the bottom to the top. A name stands for a module and those below it that no longer name stands for; `crate` is the
    /// root's file.
    layers: &'static [&'static [&'static str]],
    /// Whether circles through the file of the module above count, too. Else that file may dispatch to its parts and re-export
    /// them, while they use what they share from it.
    is_strict: bool,
    /// Whether its findings count.
    is_enforced: bool,
}

const CRATES: [Crate; 6] = [
    Crate {
        sources: "rustnet-common/src",
        layers: &[
            &["crate"],
            &["addr", "crc32c", "names"],
            &["tuple", "endpoint", "host_port"],
            &[
                "affinity",
                "backend",
                "config",
                "conntrack",
                "csum",
                "device",
                "drop",
                "event",
                "files",
                "frag",
                "hash",
                "log",
                "maglev",
                "peer",
                "policy",
                "service",
                "socket",
                "source_range",
            ],
            &["v1"],
        ],
        is_strict: true,
        is_enforced: true,
    },
    Crate {
        sources: "rustnet-ebpf/src",
        layers: &[
            &["ctx", "wire", "outcome"],
            &["packet", "xdp", "offload"],
            &["maps"],
            &["limit", "family"],
            &["parse"],
            &["event", "rewrite"],
            &["step"],
            &["log", "hook"],
            &["sock", "tail"],
            &["crate"],
        ],
        is_strict: true,
        is_enforced: true,
    },
    Crate {
        sources: "rustnet-agent/src",
        layers: &[
            &["args"],
            &["config"],
            &["model"],
            &["host", "failure"],
            &["ways"],
            &["source", "install"],
            &["metrics"],
            &["health"],
            &["api"],
            &["source::kube", "source::manifests"],
            &["index"],
            &["plan"],
            &["net"],
            &["bpf", "leftovers"],
            &["ct_gc", "namefile", "nodefile", "podfile", "policyfile", "servicefile", "v1file", "cni_order", "http"],
            // Pure parts that the preflight and the command share with the loop.
            &["reconcile::node", "reconcile::overlay_path", "reconcile::presence"],
            &["reconcile", "doctor"],
            &["cli"],
            &["crate"],
        ],
        is_strict: false,
        is_enforced: true,
    },
    Crate {
        sources: "rustnet-cni/src",
        layers: &[
            &["types"],
            &["fault", "env", "maps", "netlink", "netns", "state"],
            &["call", "link", "attach", "policy"],
            &["shape", "ipam"],
            &["cmd"],
            &["crate"],
        ],
        is_strict: true,
        is_enforced: true,
    },
    Crate {
        sources: "testkit/src",
        layers: &[
            &["check", "dist", "janitor", "raw", "wait"],
            &["netns"],
            &["client"],
            &["manifest", "stream", "icmp", "packet", "load", "sniff", "datapath"],
            &["server"],
            &["node"],
            &["agent", "cni"],
            &["pod", "fabric"],
            &["apiserver"],
            &["crate"],
        ],
        is_strict: false,
        is_enforced: true,
    },
    Crate {
        sources: "xtask/src",
        layers: &[
            &["arch", "cache", "elf", "host", "paths", "ui"],
            &["cmd", "libraries"],
            &["nets", "oci", "remap", "toolchain", "verify"],
            &["setup"],
            &["cross", "ebpf", "v1"],
            &["dist"],
            &["image", "kernels", "lint", "test"],
            &["cluster", "play"],
            &["bench", "e2e"],
            &["crate"],
        ],
        is_strict: false,
        is_enforced: true,
    },
];

/// All crates.
pub fn check() -> Result<()> {
    let mut findings = Vec::new();
    for it in &CRATES {
        let found = it.findings(&sources(&paths::root().join(it.sources))?);
        if it.is_enforced {
            findings.extend(found);
        } else if !found.is_empty() {
            ui::warn(&format!("{}: {} findings about layers, not enforced yet", it.sources, found.len()));
        }
    }
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{}\n  remedy: move what is shared down; the layers are in xtask/src/lint/layers.rs", findings.join("\n    "))
}

/// Text of each module below a directory. Where there is a library, programs are crates of their own on top of it.
fn sources(dir: &Path) -> Result<BTreeMap<Module, String>> {
    let mut found = BTreeMap::new();
    let has_library = dir.join("lib.rs").is_file();
    let mut open = vec![(dir.to_owned(), Module::new())];
    while let Some((dir, module)) = open.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry?.path();
            let Some(stem) = path.file_stem().and_then(|name| name.to_str()) else { continue };
            let is_root = module.is_empty();
            let mut own = module.clone();
            if path.is_dir() {
                if !(is_root && stem == "bin") {
                    own.push(stem.to_owned());
                    open.push((path, own));
                }
            } else if path.extension().is_some_and(|e| e == "rs") && !(is_root && has_library && stem == "main") {
                if !(stem == "mod" || (is_root && matches!(stem, "lib" | "main"))) {
                    own.push(stem.to_owned());
                }
                found.insert(own, fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?);
            }
        }
    }
    Ok(found)
}

impl Crate {
    /// What contradicts the order in these files.
    fn findings(&self, sources: &BTreeMap<Module, String>) -> Vec<String> {
        let mut findings = Vec::new();
        let files: BTreeSet<Module> = sources.keys().cloned().collect();
        let mut graph: BTreeMap<&Module, BTreeSet<Module>> = BTreeMap::new();
        let mut for_tests = BTreeSet::new();
        for (module, source) in sources {
            let found = imports(module, source, &files);
            for_tests.extend(found.for_tests);
            graph.insert(module, found.modules);
        }
        graph.retain(|module, _| !for_tests.iter().any(|test| module.starts_with(test)));
        let mut used = BTreeSet::new();
        for (module, imports) in &graph {
            let Some((name, layer)) = self.layer(module) else {
                findings.push(format!("{}: {} is in no layer", self.sources, name(module)));
                continue;
            };
            used.insert(name);
            for import in imports {
                if let Some((_, upper)) = self.layer(import).filter(|(_, other)| *other > layer) {
                    let (lower, it, other) = (self.title(layer), self.name(module), self.name(import));
                    findings.push(format!("{it} imports {other}: from {lower} up to {}", self.title(upper)));
                }
            }
        }
        if !self.is_strict {
            for (module, imports) in &mut graph {
                imports.retain(|import| !module.starts_with(import));
            }
        }
        let named = self.layers.iter().flat_map(|layer| layer.iter()).filter(|name| !used.contains(**name));
        findings.extend(named.map(|name| format!("{}: the layers name {name}, which no file is", self.sources)));
        findings.extend(circle(&graph).map(|path| {
            let path: Vec<String> = path.iter().map(name).collect();
            format!("{}: files import one another in a circle: {}", self.sources, path.join(" -> "))
        }));
        findings
    }

    /// The longest name that stands for a module, and the number of its layer.
    fn layer(&self, module: &Module) -> Option<(&'static str, usize)> {
        let layers = self.layers.iter().enumerate();
        let names = layers.flat_map(|(number, layer)| layer.iter().map(move |name| (*name, number)));
        let stands = |name: &str| match name {
            "crate" => module.is_empty(),
            name => name.split("::").zip(0..).all(|(part, i)| module.get(i).is_some_and(|it| it == part)),
        };
        names.filter(|(name, _)| stands(name)).max_by_key(|(name, _)| name.len())
    }

    fn title(&self, layer: usize) -> String {
        format!("layer {} ({})", layer + 1, self.layers[layer].join(", "))
    }

    fn name(&self, module: &Module) -> String {
        format!("{}: {}", self.sources, name(module))
    }
}

fn name(module: &Module) -> String {
    if module.is_empty() { "crate".to_owned() } else { module.join("::") }
}

/// Some circle in a graph, from its first module by name and back to it.
fn circle(graph: &BTreeMap<&Module, BTreeSet<Module>>) -> Option<Vec<Module>> {
    let mut done = BTreeSet::new();
    graph.keys().find_map(|start| visit(start, graph, &mut Vec::new(), &mut done))
}

fn visit(
    module: &Module,
    graph: &BTreeMap<&Module, BTreeSet<Module>>,
    path: &mut Vec<Module>,
    done: &mut BTreeSet<Module>,
) -> Option<Vec<Module>> {
    if let Some(start) = path.iter().position(|it| it == module) {
        let mut circle = path[start..].to_vec();
        let first = (0..circle.len()).min_by_key(|i| &circle[*i]).unwrap_or_default();
        circle.rotate_left(first);
        circle.push(circle[0].clone());
        return Some(circle);
    }
    if done.contains(module) {
        return None;
    }
    path.push(module.clone());
    let found = graph.get(module).into_iter().flatten().find_map(|next| visit(next, graph, path, done));
    path.pop();
    done.insert(module.clone());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: Crate = Crate {
        sources: "x/src",
        layers: &[&["low"], &["mid", "mid::own"], &["crate"]],
        is_strict: true,
        is_enforced: true,
    };

    fn findings(files: &[(&str, &str)]) -> Vec<String> {
        findings_of(&THREE, files)
    }

    fn findings_of(it: &Crate, files: &[(&str, &str)]) -> Vec<String> {
        let module = |path: &str| path.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let sources = files.iter().map(|(path, text)| (module(path), (*text).to_owned())).collect();
        it.findings(&sources)
    }

    const SOUND: [(&str, &str); 5] = [
        ("", "mod low; mod mid; use mid::own::X;"),
        ("low", "#[cfg(test)] mod tests { use crate::mid; }"),
        ("low::part", "use super::X;"),
        ("mid", "use crate::low::part;"),
        ("mid::own", "use super::X;"),
    ];

    #[test]
    fn an_order_that_holds_has_no_findings() {
        assert_eq!(findings(&SOUND), [""; 0]);
    }

    #[test]
    fn an_upward_import_is_found() {
        let mut files = SOUND;
        files[2].1 = "fn f() { crate::mid::own::g() }";
        files[3].1 = "";
        let wanted = "x/src: low::part imports x/src: mid::own: from layer 1 (low) up to layer 2 (mid, mid::own)";
        assert_eq!(findings(&files), [wanted]);
    }

    #[test]
    fn a_circle_within_a_layer_is_found() {
        let mut files = SOUND;
        files[1].1 = "pub use part::X;";
        assert_eq!(findings(&files), ["x/src: files import one another in a circle: low -> low::part -> low"]);
        let lenient = Crate { is_strict: false, ..THREE };
        assert_eq!(findings_of(&lenient, &files), [""; 0], "a part may use the file of the module above");
        files[2].1 = "use super::other;";
        let other = [&files[..], &[("low::other", "use super::part;")]].concat();
        let found = findings_of(&lenient, &other);
        assert_eq!(found, ["x/src: files import one another in a circle: low::other -> low::part -> low::other"]);
    }

    #[test]
    fn files_without_a_layer_and_layers_without_a_file_are_found() {
        let files = [SOUND[0], ("low", ""), ("mid", ""), ("new", "")];
        let wanted = ["x/src: new is in no layer", "x/src: the layers name mid::own, which no file is"];
        assert_eq!(findings(&files), wanted);
    }

    #[test]
    fn this_tree_keeps_its_order() {
        check().unwrap();
    }

    #[test]
    fn the_layers_of_every_crate_name_each_module_once() {
        for it in &CRATES {
            let mut names: Vec<&str> = it.layers.iter().flat_map(|layer| layer.iter().copied()).collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all, "{}", it.sources);
        }
    }
}
