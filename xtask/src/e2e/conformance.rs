//! `docs/conformance.md`: the last real runs, side by side. Each kind of tests has its part of the page.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::report::{self, Outcome, Run, Test};
use crate::cluster::{Family, Network, Settings};
use crate::{paths, ui};

/// Writes the part of Kubernetes' own tests from kept runs.
pub fn write(dirs: &[PathBuf]) -> Result<()> {
    let mut runs: Vec<Run> = Vec::new();
    for dir in dirs {
        let part = report::load::<Run>(dir)?;
        match runs.iter_mut().find(|run| part.is_part_of(run)) {
            Some(run) => run.add(part),
            None => runs.push(part),
        }
    }
    put(&part(&runs), runs.len())
}

/// Puts a part, which begins with its heading, in the place of the one with the same heading, or at the end of the page.
pub fn put(part: &str, runs: usize) -> Result<()> {
    let file = paths::root().join("docs/conformance.md");
    let page = read(&file)?;
    fs::write(&file, replaced(&page, part)).with_context(|| format!("writing {}", file.display()))?;
    ui::step(&format!("{} holds {runs} runs", file.display()));
    Ok(())
}

fn read(file: &Path) -> Result<String> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("reading {}", file.display())),
    }
}

fn replaced(page: &str, part: &str) -> String {
    // All begin with a heading of the first order, and have no other one.
    let starts: Vec<usize> =
        page.match_indices("# ").map(|(at, _)| at).filter(|at| *at == 0 || page[..*at].ends_with('\n')).collect();
    let ends = starts.iter().skip(1).copied().chain([page.len()]);
    let mut parts: Vec<&str> = starts.iter().zip(ends).map(|(start, end)| page[*start..end].trim_end()).collect();
    match parts.iter_mut().find(|it| it.lines().next() == part.lines().next()) {
        Some(old) => *old = part.trim_end(),
        None => parts.push(part.trim_end()),
    }
    parts.join("\n\n") + "\n"
}

fn part(runs: &[Run]) -> String {
    let mut text = String::from(
        "# Kubernetes' own end-to-end tests\n\n\
         Written by `cargo xtask e2e --record DIR...` from the reports of real runs of `cargo xtask e2e`; not edited by hand.\n\
         The reference network is bridge, host-local and portmap with kube-proxy (nftables) in the same cluster.\n\n",
    );
    text += "| Run | Kubernetes | Commit or image | Kernel | Date | Passed | Failed | Skipped | Not run |\n|---|---|---|---|---|---|---|---|---|\n";
    for run in runs {
        let counts = [Outcome::Passed, Outcome::Failed, Outcome::Skipped, Outcome::Excluded].map(|it| run.count(it));
        let [passed, failed, skipped, excluded] = counts;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {passed} | {failed} | {skipped} | {excluded} |",
            title(run),
            run.kubernetes,
            run.commit,
            run.kernel,
            run.date
        );
    }
    text += "\nSkipped: the test itself found no meaning in this cluster. Not run: left out, for the reasons below.\n";
    results(&mut text, &runs.iter().collect::<Vec<_>>());
    text
}

/// Adds what came of each test, and why some failed or were not run.
pub fn results(text: &mut String, runs: &[&Run]) {
    let names: BTreeSet<&str> = runs.iter().flat_map(|run| &run.tests).map(|test| test.name.as_str()).collect();
    let outcome = |run: &Run, name: &str| find(run, name).map(|test| test.outcome);
    let ran = |name: &&&str| {
        runs.iter().any(|run| outcome(run, name).is_some_and(|it| matches!(it, Outcome::Passed | Outcome::Failed)))
    };
    let titles: Vec<String> = runs.iter().copied().map(title).collect();
    let _ = writeln!(text, "\n## Run\n\n| Test | {} |\n|---|{}", titles.join(" | "), "---|".repeat(runs.len()));
    for name in names.iter().filter(ran) {
        let cells: Vec<&str> = runs.iter().map(|run| cell(outcome(run, name))).collect();
        let _ = writeln!(text, "| {} | {} |", escape(name), cells.join(" | "));
    }
    failures(text, runs);
    let left_out: Vec<_> = names.iter().filter(|name| !ran(name)).collect();
    if !left_out.is_empty() {
        *text += "\n## Skipped and not run, with the reason\n\n| Test | Reason |\n|---|---|\n";
    }
    for name in left_out {
        let _ = writeln!(text, "| {} | {} |", escape(name), escape(&reasons(runs, name)));
    }
    let partly =
        names.iter().filter(|name| ran(name) && runs.iter().any(|run| outcome(run, name) == Some(Outcome::Excluded)));
    let partly: Vec<_> = partly.collect();
    if !partly.is_empty() {
        *text += "\n## Not run everywhere, with the reason\n\n| Test | Reason |\n|---|---|\n";
        for name in partly {
            let _ = writeln!(text, "| {} | {} |", escape(name), escape(&reasons(runs, name)));
        }
    }
}

/// Why a test was skipped or not run. `--skip` is the reason only where no run gives a better one.
fn reasons(runs: &[&Run], name: &str) -> String {
    let left_out = |test: &&Test| matches!(test.outcome, Outcome::Skipped | Outcome::Excluded);
    let mut all: BTreeSet<&str> =
        runs.iter().filter_map(|run| find(run, name)).filter(left_out).map(|test| test.reason.as_str()).collect();
    if all.len() > 1 {
        all.remove("--skip");
    }
    all.into_iter().collect::<Vec<_>>().join("; ")
}

fn failures(text: &mut String, runs: &[&Run]) {
    if runs.iter().all(|run| run.count(Outcome::Failed) == 0) {
        return;
    }
    *text += "\n## Failures\n\n| Run | Test | What it said |\n|---|---|---|\n";
    for run in runs {
        for test in run.tests.iter().filter(|test| test.outcome == Outcome::Failed) {
            let _ = writeln!(text, "| {} | {} | {} |", title(run), escape(&test.name), escape(&test.reason));
        }
    }
}

/// Names a run by its cluster: network, families, nodes.
pub fn title(run: &Run) -> String {
    let Settings { nodes, zones, ip_family, routing, network, .. } = run.settings;
    let network = match network {
        Network::Rustnet => format!("rustnet, {}", routing.word()),
        Network::Reference => "reference".into(),
        Network::None => "no network".into(),
    };
    let family = match ip_family {
        Family::Dual => "",
        Family::Ipv4 => ", IPv4 alone",
        Family::Ipv6 => ", IPv6 alone",
    };
    let zones = zones.map(|zones| format!(" in {zones} zones")).unwrap_or_default();
    format!("{network}{family}, {nodes} nodes{zones}")
}

fn find<'a>(run: &'a Run, name: &str) -> Option<&'a Test> {
    run.tests.iter().find(|test| test.name == name)
}

fn cell(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Passed) => "passed",
        Some(Outcome::Failed) => "**failed**",
        Some(Outcome::Skipped) => "skipped",
        Some(Outcome::Excluded) => "not run",
        None => "",
    }
}

fn escape(text: &str) -> String {
    // The page is for everybody, and the place of the cache is this machine's.
    let cache = paths::cache().display().to_string();
    text.replace('|', "\\|").replace("[sig-network] ", "").replace(&cache, "~/.cache/rustnet")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_takes_the_place_of_the_one_with_its_heading() {
        let page = "# One\n\nold\n\n## Run # 1\n\n# Two\n\nstays\n";
        assert_eq!(replaced(page, "# One\n\nnew\n"), "# One\n\nnew\n\n# Two\n\nstays\n");
        assert_eq!(replaced(page, "# Three\n"), format!("{page}\n# Three\n"));
        assert_eq!(replaced("", "# One\n"), "# One\n");
    }
}
