//! What tracked files must not hold: paths of the machine they were written on, old-fashioned
//! words, and links to files that are not there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::words;
use crate::cmd::Cmd;
use crate::paths;

/// Directories that every machine has: a work tree below them gives no word to look for.
const ORDINARY: [&str; 10] = ["/", "/tmp", "/home", "/root", "/usr", "/opt", "/srv", "/mnt", "/var", "/var/tmp"];

/// All tracked text files.
pub fn check() -> Result<()> {
    let root = paths::root();
    let listed = Cmd::new("git").args(["ls-files", "-z"]).dir(&root).capture()?;
    let machine = machine_paths(&root, std::env::var_os("HOME").map(PathBuf::from).as_deref());
    let mut findings = Vec::new();
    for name in listed.split('\0').filter(|n| !n.is_empty()) {
        let file = root.join(name);
        if !file.is_file() {
            continue; // deleted but not committed yet, or a submodule
        }
        let bytes = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let Ok(text) = String::from_utf8(bytes) else { continue };
        findings.extend(forbidden(name, &text, &machine));
        if Path::new(name).extension().is_some_and(|e| e == "md") {
            let dir = file.parent().unwrap_or(&root).to_owned();
            let broken = links(&text).into_iter().filter(|(_, link)| !dir.join(link).exists());
            findings.extend(broken.map(|(line, link)| format!("{name}:{line}: {link} does not exist")));
        }
    }
    if findings.is_empty() { Ok(()) } else { bail!("{}", findings.join("\n    ")) }
}

/// Returns findings in the text of the file `name`, with file and line: paths in `machine`, and
/// old-fashioned words.
fn forbidden(name: &str, text: &str, machine: &[String]) -> Vec<String> {
    let paths = mentions(text, machine).into_iter().map(|(line, path)| format!("{name}:{line}: holds {path}"));
    let words = words::find(name, text).into_iter().map(|(line, word)| {
        format!("{name}:{line}: holds the old-fashioned word \"{word}\" (CONTRIBUTING.md, Language)")
    });
    paths.chain(words).collect()
}

/// What would give this machine away: the work tree, the directory it is in, and the user's home.
fn machine_paths(root: &Path, home: Option<&Path>) -> Vec<String> {
    let mut words: Vec<String> = [Some(root), root.parent(), home]
        .into_iter()
        .flatten()
        .filter(|p| !ORDINARY.iter().any(|o| p == &Path::new(o)))
        .map(|p| format!("{}/", p.display()))
        .collect();
    // The shorter one finds the longer one's mentions too.
    words.sort_by_key(String::len);
    let mut kept: Vec<String> = Vec::new();
    for word in words {
        if !kept.iter().any(|k| word.starts_with(k.as_str())) {
            kept.push(word);
        }
    }
    kept
}

/// Line numbers and words. A word counts only where a path begins, so that `/desk/` is not found in `/var/desk/`.
fn mentions<'a>(text: &str, words: &'a [String]) -> Vec<(usize, &'a str)> {
    let begins = |line: &str, at: usize| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|c| !(c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '}' | '*' | '~')))
    };
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let hit = words.iter().find(|word| line.match_indices(word.as_str()).any(|(at, _)| begins(line, at)));
        found.extend(hit.map(|word| (number + 1, word.as_str())));
    }
    found
}

/// The relative targets of Markdown links, without their anchors.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut code = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            code = !code;
        }
        if code {
            continue;
        }
        for rest in line.split("](").skip(1) {
            let Some((target, _)) = rest.split_once(')') else { continue };
            let target = target.split(['#', ' ']).next().unwrap_or_default();
            if !target.is_empty() && !target.contains(':') && !target.starts_with('/') {
                found.push((number + 1, target.to_owned()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_its_parent_and_the_home_are_looked_for() {
        assert_eq!(machine_paths(Path::new("/home/ada/src/net"), Some(Path::new("/home/ada"))), ["/home/ada/"]);
        assert_eq!(machine_paths(Path::new("/tmp/clone"), Some(Path::new("/root"))), ["/tmp/clone/"]);
    }

    #[test]
    fn a_path_is_found_where_it_begins() {
        let words = ["/desk/".to_owned()];
        assert_eq!(mentions("see\n`/desk/main`", &words), [(2, "/desk/")]);
        assert_eq!(mentions("/var/desk/a /x/desk/", &words), []);
    }

    #[test]
    fn paths_and_words_are_findings_with_file_and_line() {
        let text = format!("fine\n/desk/a\nis {}\n", words::WORDS[0]);
        let found = forbidden("docs/a.md", &text, &["/desk/".to_owned()]);
        let word = format!("docs/a.md:3: holds the old-fashioned word \"{}\" ", words::WORDS[0]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0] == "docs/a.md:2: holds /desk/" && found[1].starts_with(&word), "{found:?}");
    }

    #[test]
    fn relative_links_are_found() {
        let text = "[a](docs/a.md#x) [b](https://e.org) [c](#here)\n```\n[d](no.md)\n```\n![e](e.png \"title\")";
        assert_eq!(links(text), [(1, "docs/a.md".to_owned()), (5, "e.png".to_owned())]);
    }
}
