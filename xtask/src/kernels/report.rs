//! What became of it: a table with a column a kernel, and the reasons of what failed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::archive::Kernel;
use super::protocol::Message;
use crate::cmd::Cmd;
use crate::{paths, ui};

/// Lines of a failed step that are shown.
const LAST_LINES: usize = 60;

/// All kernels.
#[derive(Default)]
pub struct Report {
    /// In the order of the runs.
    pub columns: Vec<Column>,
}

/// One kernel.
pub struct Column {
    release: String,
    version: String,
    programs: BTreeMap<String, u32>,
    refused: Vec<String>,
    steps: Vec<Outcome>,
    text: Vec<String>,
    trouble: Option<String>,
    time: Duration,
    /// Where logs go.
    dir: PathBuf,
}

/// What became of one test program.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    name: String,
    success: bool,
    counts: Option<Counts>,
    millis: u64,
    text: Vec<String>,
    log: PathBuf,
}

/// As the last line of a test program says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counts {
    passed: usize,
    failed: usize,
}

impl Column {
    /// An empty one.
    pub fn new(kernel: &Kernel, dir: &Path) -> Self {
        Self {
            release: kernel.release.clone(),
            version: kernel.version.clone(),
            programs: BTreeMap::new(),
            refused: Vec::new(),
            steps: Vec::new(),
            text: Vec::new(),
            trouble: None,
            time: Duration::ZERO,
            dir: dir.to_owned(),
        }
    }

    /// Takes in what the guest says.
    pub fn take(&mut self, message: Message) {
        match message {
            // The package's name says which kernel was meant, the guest which one runs.
            Message::Kernel(release) if release != self.release => {
                self.trouble = Some(format!("{release} runs, not {}", self.release));
            }
            Message::Program { name, verified, .. } => drop(self.programs.insert(name, verified)),
            Message::Refused(line) => self.refused.push(line),
            Message::Begin(_) => self.text.clear(),
            Message::Text(line) => self.text.push(line),
            Message::End { name, success, millis } => {
                let text = std::mem::take(&mut self.text);
                let counts = text.iter().rev().find_map(|line| counts(line));
                let log = self.dir.join(format!("{name}.log"));
                if let Err(error) = fs::write(&log, text.join("\n") + "\n") {
                    ui::warn(&format!("writing {}: {error}", log.display()));
                }
                self.steps.push(Outcome { name, success, counts, millis, text, log });
            }
            Message::Kernel(_) | Message::Trouble(_) | Message::Done => {}
        }
    }

    /// Notes how the guest ended.
    pub fn ended(&mut self, result: Result<()>, time: Duration) {
        self.time = time;
        if let Err(error) = result {
            let text = last(&self.text);
            self.trouble = Some(format!("{error:#}\n{text}"));
        }
    }

    fn failures(&self) -> Vec<String> {
        let mut all: Vec<String> = self.trouble.iter().map(|why| format!("{}: {why}", self.release)).collect();
        if !self.refused.is_empty() {
            all.push(format!("{}: programs refused:\n    {}", self.release, self.refused.join("\n    ")));
        } else if self.programs.is_empty() {
            all.push(format!("{}: no program was loaded", self.release));
        }
        for step in self.steps.iter().filter(|step| !step.held()) {
            all.push(format!(
                "{}: {} failed\n    all it said is in {}\n    {}",
                self.release,
                step.name,
                step.log.display(),
                step.why()
            ));
        }
        all
    }

    fn program(&self, name: &str) -> String {
        self.programs.get(name).map_or("refused".to_owned(), |n| thousands(*n))
    }

    fn step(&self, name: &str) -> String {
        self.steps.iter().find(|s| s.name == name).map_or("not run".to_owned(), Outcome::text)
    }
}

impl Outcome {
    /// A test program that ran nothing has shown nothing.
    fn held(&self) -> bool {
        self.success && self.counts.is_some_and(|counts| counts.passed > 0 && counts.failed == 0)
    }

    /// The beginning of what a test program tells of its failures, or the end of what it said.
    fn why(&self) -> String {
        match self.text.iter().position(|line| line == "failures:") {
            Some(at) => self.text[at..].iter().take(LAST_LINES).cloned().collect::<Vec<_>>().join("\n    "),
            None => last(&self.text),
        }
    }

    fn text(&self) -> String {
        match self.counts {
            Some(Counts { passed, failed: 0 }) => format!("{passed} passed, {} s", self.millis / 1000),
            Some(Counts { passed, failed }) => format!("{failed} FAILED, {passed} passed"),
            None => "FAILED".to_owned(),
        }
    }
}

impl Report {
    /// Rows are programs and tests, columns kernels.
    pub fn table(&self) -> String {
        let mut rows: Vec<Vec<String>> = Vec::new();
        let each = |f: &dyn Fn(&Column) -> String| self.columns.iter().map(f).collect::<Vec<_>>();
        rows.push([vec![String::new()], each(&|c| c.release.clone())].concat());
        let names: std::collections::BTreeSet<&String> = self.columns.iter().flat_map(|c| c.programs.keys()).collect();
        for name in names {
            rows.push([vec![format!("`{name}`")], each(&|c| c.program(name))].concat());
        }
        let steps: std::collections::BTreeSet<&String> =
            self.columns.iter().flat_map(|c| c.steps.iter().map(|s| &s.name)).collect();
        for name in steps {
            rows.push([vec![format!("tests: {name}")], each(&|c| c.step(name))].concat());
        }
        rows.push([vec!["whole run".into()], each(&|c| ui::seconds(c.time))].concat());
        markdown(&rows)
    }

    /// Everything that did not hold, with reasons; nothing when all did.
    pub fn failures(&self) -> Vec<String> {
        self.columns.iter().flat_map(Column::failures).collect()
    }
}

/// Writes docs/kernels.md.
pub fn record(report: &Report) -> Result<()> {
    let file = paths::root().join("docs/kernels.md");
    let old = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let date = Cmd::new("date").args(["--utc", "+%Y-%m-%d"]).capture()?;
    let qemu = Cmd::new("qemu-system-x86_64").arg("--version").capture()?;
    let commit = Cmd::new("git").args(["rev-parse", "--short", "HEAD"]).dir(paths::root()).capture()?;
    let mut text = format!(
        "Recorded by `cargo xtask kernels --record` on {}, commit {}, {}.\n\n{}\n",
        date.trim(),
        commit.trim(),
        qemu.lines().next().unwrap_or_default().trim(),
        report.table()
    );
    for column in &report.columns {
        let _ = writeln!(text, "- {}: package version {}", column.release, column.version); // a String takes all
    }
    for failure in report.failures() {
        let _ = writeln!(text, "- failed: {}", failure.lines().next().unwrap_or_default());
    }
    fs::write(&file, replace(&old, &text)?).with_context(|| format!("writing {}", file.display()))?;
    ui::step(&format!("recorded in {}", file.display()));
    Ok(())
}

const BEGIN: &str = "<!-- recorded -->\n";
const END: &str = "<!-- end of what is recorded -->";

/// The page with another text between its marks.
fn replace(page: &str, text: &str) -> Result<String> {
    let (before, rest) = page.split_once(BEGIN).with_context(|| format!("docs/kernels.md has no {BEGIN:?}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("docs/kernels.md has no {END:?}"))?;
    Ok(format!("{before}{BEGIN}{text}{END}{after}"))
}

/// The figures in `test result: ok. 103 passed; 0 failed; ...`.
fn counts(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let number =
        |word: &str| rest.split([';', '.']).find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok());
    Some(Counts { passed: number("passed")?, failed: number("failed")? })
}

fn last(lines: &[String]) -> String {
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n    ")
}

fn thousands(n: u32) -> String {
    if n < 1000 { n.to_string() } else { format!("{},{:03}", n / 1000, n % 1000) }
}

/// A table whose columns line up, the first to the left.
fn markdown(rows: &[Vec<String>]) -> String {
    let width = |at: usize| rows.iter().map(|row| row[at].len()).max().unwrap_or(0);
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells = row.iter().enumerate().map(|(at, cell)| {
            let width = width(at);
            if at == 0 { format!("{cell:width$}") } else { format!("{cell:>width$}") }
        });
        let _ = writeln!(text, "| {} |", cells.collect::<Vec<_>>().join(" | ")); // a String takes all
        if number == 0 {
            let rules = (0..row.len()).map(|at| if at == 0 { "---" } else { "---:" });
            let _ = writeln!(text, "| {} |", rules.collect::<Vec<_>>().join(" | "));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column() -> Column {
        Column {
            release: "6.1.0".into(),
            version: "6.1.1-1".into(),
            programs: BTreeMap::new(),
            refused: Vec::new(),
            steps: Vec::new(),
            text: Vec::new(),
            trouble: None,
            time: Duration::from_mins(1),
            dir: "/nonexistent".into(), // logs are lost, with a warning
        }
    }

    fn take(column: &mut Column, lines: &[&str]) {
        for line in lines {
            column.take(Message::parse(line).unwrap());
        }
    }

    #[test]
    fn what_passed_is_a_row_and_no_failure() {
        let mut column = column();
        let lines = ["kernel 6.1.0", "program from_pod 35113 1", "begin packet", "text test a ... ok"];
        take(&mut column, &lines);
        take(&mut column, &["text test result: ok. 103 passed; 0 failed; 1 ignored;", "end packet true 7000", "done"]);
        column.ended(Ok(()), Duration::from_mins(1));
        let report = Report { columns: vec![column] };
        assert_eq!(report.failures(), Vec::<String>::new());
        let table = report.table();
        assert!(table.contains("| `from_pod`") && table.contains(" 35,113 |"), "{table}");
        assert!(table.contains("103 passed, 7 s"), "{table}");
    }

    #[test]
    fn refusals_failed_and_empty_tests_and_another_kernel_are_failures() {
        for lines in [
            &["kernel 6.1.0", "refused R5 !read_ok"][..],
            &["kernel 6.1.0"],
            &["kernel 6.2.0", "program a 1 1"],
            &["program a 1 1", "begin p", "text test result: FAILED. 1 passed; 2 failed;", "end p false 1"],
            &["program a 1 1", "begin p", "text test result: ok. 0 passed; 0 failed;", "end p true 1"],
            &["program a 1 1", "begin p", "end p true 1"],
        ] {
            let mut column = column();
            take(&mut column, lines);
            column.ended(Ok(()), Duration::ZERO);
            assert_eq!(column.failures().len(), 1, "{lines:?}: {:?}", column.failures());
        }
        let mut column = column();
        take(&mut column, &["program a 1 1"]);
        column.ended(Err(anyhow::anyhow!("the guest ended early")), Duration::ZERO);
        assert!(column.failures()[0].contains("ended early"));
    }

    #[test]
    fn the_page_keeps_what_stands_around_the_record() {
        let page = format!("# K\n{BEGIN}old\n{END}\nafter\n");
        assert_eq!(replace(&page, "new\n").unwrap(), format!("# K\n{BEGIN}new\n{END}\nafter\n"));
        assert!(replace("# K\n", "new").is_err());
    }
}
