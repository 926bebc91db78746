//! A table of what ran: reads the output of `cargo test` as it passes by, and counts tests and seconds per tier.

use std::fmt;
use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::ui;

/// The tiers of docs/testing.md, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tier {
    Unit,
    Agent,
    Packet,
    Fabric,
    Monitoring,
    Cni,
    Kubernetes,
    Cluster,
    Testkit,
    Other,
}

/// What a tier, or a campaign, came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    pub name: String,
    pub passed: u32,
    pub failed: u32,
    pub ignored: u32,
    pub time: Duration,
}

/// Rows with their sum.
#[derive(Debug, Default)]
pub struct Table {
    pub rows: Vec<Row>,
}

/// Counts what passes by.
#[derive(Debug, Default)]
pub struct Counter {
    line: Vec<u8>,
    /// The test program whose result has not passed by yet.
    running: Option<Tier>,
    tiers: Vec<(Tier, Row)>,
}

impl Tier {
    /// The tier of a program that cargo announces, such as `Running tests/it/main.rs (target/debug/deps/it-0a1b)`.
    fn of(line: &str) -> Option<Self> {
        if line.starts_with("Doc-tests ") {
            return Some(Self::Unit);
        }
        let source = line.strip_prefix("Running ")?;
        if !source.ends_with(')') {
            return None;
        }
        let tiers = [
            ("unittests ", Self::Unit),
            ("packet/", Self::Packet),
            ("fabric/", Self::Fabric),
            ("monitoring/", Self::Monitoring),
            ("kubernetes/", Self::Kubernetes),
            ("cluster/", Self::Cluster),
            ("tests/it/", Self::Cni),
            // The agent's program of the same name is a directory.
            ("tests/kernel.rs", Self::Testkit),
            ("tests/kernel/", Self::Agent),
            ("tests/convergence/", Self::Agent),
            ("tests/golden.rs", Self::Agent),
            ("tests/scale.rs", Self::Agent),
        ];
        Some(tiers.into_iter().find(|(prefix, _)| source.starts_with(prefix)).map_or(Self::Other, |(_, tier)| tier))
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "Unit",
            Self::Agent => "Agent",
            Self::Packet => "Packet",
            Self::Fabric => "Fabric",
            Self::Monitoring => "Monitoring",
            Self::Cni => "CNI",
            Self::Kubernetes => "Kubernetes",
            Self::Cluster => "Cluster",
            Self::Testkit => "Testkit",
            Self::Other => "Other",
        }
    }
}

impl Counter {
    /// Copies everything to `to`, as it comes, and counts.
    pub fn copy(&mut self, mut from: impl Read, mut to: impl Write) -> Result<()> {
        let mut chunk = [0; 16 * 1024];
        loop {
            let read = from.read(&mut chunk).context("reading the output of cargo test")?;
            if read == 0 {
                return Ok(());
            }
            to.write_all(&chunk[..read]).and_then(|()| to.flush()).context("writing the output of cargo test")?;
            for byte in &chunk[..read] {
                if *byte == b'\n' {
                    let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                    self.line(&without_colours(&line));
                } else {
                    self.line.push(*byte);
                }
            }
        }
    }

    fn line(&mut self, line: &str) {
        let line = line.trim();
        if let Some(tier) = Tier::of(line) {
            self.give_up();
            self.running = Some(tier);
        } else if let Some(result) = line.strip_prefix("test result: ")
            && let Some(tier) = self.running
            && let Some(row) = Row::parse(result)
        {
            self.running = None;
            self.row(tier).add(&row);
        }
    }

    /// A program that ended without a result has failed.
    fn give_up(&mut self) {
        if let Some(tier) = self.running.take() {
            self.row(tier).failed += 1;
        }
    }

    fn row(&mut self, tier: Tier) -> &mut Row {
        let index = self.tiers.iter().position(|(found, _)| *found == tier).unwrap_or_else(|| {
            self.tiers.push((tier, Row { name: tier.name().to_owned(), ..Row::default() }));
            self.tiers.len() - 1
        });
        &mut self.tiers[index].1
    }

    /// One row per tier that ran.
    pub fn table(mut self) -> Table {
        self.give_up();
        self.tiers.sort_by_key(|(tier, _)| *tier);
        Table { rows: self.tiers.into_iter().map(|(_, row)| row).collect() }
    }
}

impl Row {
    /// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 1.54s`
    fn parse(result: &str) -> Option<Self> {
        let mut row = Self::default();
        let (_, counts) = result.split_once(". ")?;
        for part in counts.split("; ") {
            let words: Vec<&str> = part.split(' ').collect();
            match words[..] {
                [count, "passed"] => row.passed = count.parse().ok()?,
                [count, "failed"] => row.failed = count.parse().ok()?,
                [count, "ignored"] => row.ignored = count.parse().ok()?,
                ["finished", "in", time] => {
                    row.time = Duration::from_secs_f64(time.strip_suffix('s')?.parse().ok()?);
                }
                _ => {}
            }
        }
        Some(row)
    }

    fn add(&mut self, other: &Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.time += other.time;
    }
}

impl Table {
    /// The sum of all rows.
    pub fn sum(&self, name: &str) -> Row {
        let mut sum = Row { name: name.to_owned(), ..Row::default() };
        self.rows.iter().for_each(|row| sum.add(row));
        sum
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = self.sum("sum");
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or_default().max("Tier".len());
        writeln!(f, "{:width$}  {:>6}  {:>6}  {:>7}  {:>12}", "Tier", "Passed", "Failed", "Ignored", "Time")?;
        for row in self.rows.iter().chain([&sum]) {
            let Row { name, passed, failed, ignored, time } = row;
            let time = ui::seconds(*time);
            writeln!(f, "{name:width$}  {passed:>6}  {failed:>6}  {ignored:>7}  {time:>12}")?;
        }
        Ok(())
    }
}

/// Removes the escape sequences that colour a terminal.
fn without_colours(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        out.push_str(before);
        rest = after.find(|c: char| c.is_ascii_alphabetic()).map_or("", |end| &after[end + 1..]);
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
\u{1b}[1m\u{1b}[92m     Running\u{1b}[0m unittests src/lib.rs (target/debug/deps/rustnet_agent-0a1b)
running 2 tests
test result: \u{1b}[32mok\u{1b}[0m. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.50s
     Running tests/kernel/main.rs (target/debug/deps/kernel-0a1b)
test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 61.20s
     Running fabric/main.rs (target/debug/deps/fabric-0a1b)
test a ... error: test failed, to rerun pass `-p rustnet-tests --test fabric`
     Running tests/kernel.rs (target/debug/deps/kernel-1a1b)
test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
   Doc-tests rustnet_common
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.25s
";

    fn row(name: &str, [passed, failed, ignored]: [u32; 3], millis: u64) -> Row {
        Row { name: name.into(), passed, failed, ignored, time: Duration::from_millis(millis) }
    }

    #[test]
    fn output_passes_by_unchanged_and_is_counted_by_tier() {
        let (mut counter, mut copied) = (Counter::default(), Vec::new());
        counter.copy(OUTPUT.as_bytes(), &mut copied).unwrap();
        assert_eq!(copied, OUTPUT.as_bytes());
        let table = counter.table();
        let wanted = [
            row("Unit", [3, 0, 0], 750),
            row("Agent", [3, 1, 1], 61_200),
            row("Fabric", [0, 1, 0], 0),
            row("Testkit", [4, 0, 0], 1000),
        ];
        assert_eq!(table.rows, wanted);
        assert_eq!(table.sum("all"), row("all", [10, 2, 1], 62_950));
    }

    #[test]
    fn every_row_of_the_table_has_its_columns() {
        let table = Table { rows: vec![row("Fabric", [154, 0, 3], 780_000)] };
        let lines: Vec<String> = table.to_string().lines().map(str::to_owned).collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["Fabric", "154", "0", "3", "13", "min", "0", "s"]);
        assert!(lines[2].starts_with("sum"), "{lines:?}");
    }
}
