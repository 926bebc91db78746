//! The result: a line per row while it runs, then a table, what failed with its evidence, and counts; or JSON. Pure but for the
//! lines of progress.

use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use serde::Serialize;

use super::evidence::Evidence;
use super::row::{Check, End, Row, Scenario, Skipped};
use super::verdict::{self, Failure};
use super::wire::Cause;
use crate::cli::output::{Output, json, line, table};
use crate::doctor::finding::Mark;
use crate::model::Family;

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All of its requests were answered as they should be.
    Passed,
    /// One was not.
    Failed,
    /// It was not tried.
    Skipped,
}

impl Status {
    fn mark(self) -> Mark {
        match self {
            Self::Passed => Mark::Ok,
            Self::Failed => Mark::Bad,
            Self::Skipped => Mark::Warning,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// A row of the result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// What was tried.
    pub scenario: Scenario,
    /// In which family; null: in both, or whichever a name has.
    pub family: Option<Family>,
    /// Who asked; null of a row that was skipped.
    pub from: Option<End>,
    /// Who was asked.
    pub to: Option<End>,
    /// What became of it.
    pub status: Status,
    /// What was asked, what is remarkable, or why it was skipped.
    pub detail: String,
    /// What failed.
    pub failures: Vec<Wrong>,
    /// What the agents of both nodes dropped meanwhile; empty unless it failed.
    pub evidence: Vec<Evidence>,
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Wrong {
    /// How.
    pub cause: Cause,
    /// What was tried and what came of it.
    pub detail: String,
    /// What to do.
    pub hint: String,
}

impl Outcome {
    /// Returns the outcome of a row that was tried.
    pub fn tried(row: &Row, results: Vec<Result<Option<String>, Failure>>, evidence: Vec<Evidence>) -> Self {
        let mut remarks: Vec<String> = vec![row.checks.iter().map(verdict::title).collect::<Vec<_>>().join(", ")];
        let mut failures = Vec::new();
        for result in results {
            match result {
                Ok(remark) => remarks.extend(remark),
                Err(Failure { cause, detail }) => {
                    failures.push(Wrong { cause, detail, hint: verdict::remedy(row, cause) });
                }
            }
        }
        Self {
            scenario: row.scenario,
            family: row.family,
            from: Some(row.from.clone()),
            to: Some(row.to.clone()),
            status: if failures.is_empty() { Status::Passed } else { Status::Failed },
            detail: remarks.join("; "),
            failures,
            evidence,
        }
    }

    /// Returns the outcome of one that was not.
    pub fn skipped(it: &Skipped) -> Self {
        Self {
            scenario: it.scenario,
            family: it.family,
            from: None,
            to: None,
            status: Status::Skipped,
            detail: it.reason.clone(),
            failures: Vec::new(),
            evidence: Vec::new(),
        }
    }

    /// Returns one line: who asks, and who is asked.
    fn way(&self) -> String {
        match (&self.from, &self.to) {
            (Some(from), Some(to)) => format!("{} -> {}", shown(from), shown(to)),
            _ => self.detail.clone(),
        }
    }

    fn family_word(&self) -> String {
        self.family.map_or_else(|| "-".to_owned(), |family| family.to_string())
    }
}

fn shown(end: &End) -> String {
    if end.address.is_empty() { end.name.clone() } else { format!("{} ({})", end.name, end.address) }
}

/// The whole result.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// No row failed.
    pub ok: bool,
    /// How many rows passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
    /// How many were not tried.
    pub skipped: usize,
    /// All rows.
    pub rows: Vec<Outcome>,
}

impl Report {
    /// Counts.
    pub fn new(rows: Vec<Outcome>) -> Self {
        let count = |status| rows.iter().filter(|row| row.status == status).count();
        let (passed, failed, skipped) = (count(Status::Passed), count(Status::Failed), count(Status::Skipped));
        // A run in which nothing was tried proves nothing.
        Self { ok: failed == 0 && passed > 0, passed, failed, skipped, rows }
    }

    /// Prints it.
    ///
    /// # Errors
    /// Those of standard output.
    pub fn print(&self, out: &Output) -> Result<()> {
        if out.is_json() {
            return json(self);
        }
        line(&self.text())
    }

    /// Returns it as people read it.
    fn text(&self) -> String {
        let cell = |end: Option<&End>| end.map_or_else(|| "-".to_owned(), shown);
        let row = |it: &Outcome| {
            let (from, to) = (cell(it.from.as_ref()), cell(it.to.as_ref()));
            vec![it.status.word().into(), it.scenario.name(), it.family_word(), from, to, it.detail.clone()]
        };
        let header = ["RESULT", "SCENARIO", "FAMILY", "FROM", "TO", "DETAILS"];
        let mut text = table(&header, self.rows.iter().map(row).collect());
        for it in self.rows.iter().filter(|it| it.status == Status::Failed) {
            let mut lines = vec![String::new(), format!("{} {}: {}", it.scenario.name(), it.family_word(), it.way())];
            let mut hints: Vec<String> = it.failures.iter().map(|wrong| format!("    -> {}", wrong.hint)).collect();
            hints.dedup();
            lines.extend(it.failures.iter().map(|wrong| format!("  {}", wrong.detail)));
            lines.extend(hints);
            lines.extend(it.evidence.iter().map(|evidence| format!("  {}", evidence.line())));
            text = text + "\n" + &lines.join("\n");
        }
        text + &format!("\n\n{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Columns that every terminal has.
const WIDTH: usize = 79;

/// Lines of progress, on standard error: standard output has the result alone.
pub struct Progress<'a> {
    out: &'a Output,
    is_terminal: bool,
}

impl<'a> Progress<'a> {
    /// For a run whose result goes to `out`.
    pub fn new(out: &'a Output) -> Self {
        Self { out, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Says what is done next; the next line takes its place on a terminal.
    pub fn begin(&self, what: &str) {
        if self.is_terminal {
            // A line that wraps would not be cleared as a whole.
            let line: String = what.chars().take(WIDTH).collect();
            write(&format!("\r\x1b[K{line}"));
        }
    }

    /// Says what is done, for good.
    pub fn say(&self, what: &str) {
        let clear = if self.is_terminal { "\r\x1b[K" } else { "" };
        write(&format!("{clear}{what}\n"));
    }

    /// Begins a row.
    pub fn begin_row(&self, at: (usize, usize), row: &Row) {
        let (number, of) = at;
        self.begin(&format!("[{number}/{of}]   {} {} -> {}", row.scenario.name(), shown(&row.from), shown(&row.to)));
    }

    /// Ends a row.
    pub fn end_row(&self, at: (usize, usize), outcome: &Outcome) {
        let (number, of) = at;
        let sign =
            if self.is_terminal { self.out.sign(outcome.status.mark()) } else { outcome.status.word().to_owned() };
        let family = outcome.family.map(|family| format!(" {family}")).unwrap_or_default();
        let way = [outcome.way()].into_iter().chain(outcome.failures.iter().map(|wrong| wrong.detail.clone()));
        let way = way.collect::<Vec<_>>().join("; ");
        self.say(&format!("[{number}/{of}] {sign} {}{family}: {way}", outcome.scenario.name()));
    }
}

fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    // Nobody is there to read it if this fails.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Returns the row of a probe that does not work.
pub fn not_started(client: &str, node: &str, cause: Cause, why: &str) -> Outcome {
    let end = End { name: format!("{client} on {node}"), address: String::new(), node: node.to_owned() };
    let row = Row {
        scenario: Scenario::ProbeStart,
        family: None,
        client: client.to_owned(),
        from: End { name: "API server".into(), ..End::default() },
        to: end,
        checks: Vec::<Check>::new(),
    };
    let failure = Failure { cause, detail: format!("probe {client} on {node}: {why}") };
    Outcome::tried(&row, vec![Err(failure)], Vec::new())
}

#[cfg(test)]
mod tests {
    use super::super::evidence::Drop;
    use super::super::row::{Expected, Source};
    use super::super::wire::{Protocol, Question};
    use super::*;
    use crate::cli::golden::assert_golden;

    fn report() -> Report {
        let end = |name: &str, address: &str, node: &str| End {
            name: name.into(),
            address: address.into(),
            node: node.into(),
        };
        let check = |protocol| Check {
            question: Question { protocol, host: "10.244.2.2".into(), port: 19_961, bytes: 64, family: None },
            expected: Expected { server: None, source: Source::Any },
            addresses: Vec::new(),
        };
        let row = |scenario| Row {
            scenario,
            family: Some(Family::V4),
            client: "pod-0".into(),
            from: end("pod on n1", "10.244.1.2", "n1"),
            to: end("pod on n2", "10.244.2.2", "n2"),
            checks: vec![check(Protocol::Tcp), check(Protocol::Udp)],
        };
        let failed = row(Scenario::PodToRemotePod);
        let failure = Failure::new(Cause::TimedOut, &failed.checks[0], "connecting");
        let drop = Drop {
            reason: "unknown_sender".into(),
            hook: "tunnel_in".into(),
            packets: 3,
            hint: "compare Node addresses".into(),
        };
        let evidence = vec![
            Evidence { node: "n1".into(), drops: Vec::new(), unknown: Some("no agent".into()) },
            Evidence { node: "n2".into(), drops: vec![drop], unknown: None },
        ];
        let skipped = Skipped { scenario: Scenario::PodToWorld, family: None, reason: "no server was named".into() };
        Report::new(vec![
            Outcome::tried(
                &row(Scenario::PodToLocalHost),
                vec![Ok(None), Ok(Some("UDP: answered after 1 lost".into()))],
                Vec::new(),
            ),
            Outcome::tried(&failed, vec![Err(failure), Ok(None)], evidence),
            Outcome::skipped(&skipped),
        ])
    }

    #[test]
    fn its_json_is_an_interface() {
        assert_golden("connectivity", &report());
    }

    #[test]
    fn the_table_lines_up_and_failures_have_remedy_and_evidence() {
        let text = report().text();
        let lines: Vec<_> = text.lines().collect();
        let column = lines[0].find("FROM").expect("a header");
        assert!(lines[1][column..].starts_with("pod on n1 (10.244.1.2)"), "{text}");
        assert!(lines[2][column..].starts_with("pod on n1 (10.244.1.2)"), "{text}");
        assert!(lines[3].starts_with("skipped  pod-to-world") && lines[3].ends_with("no server was named"), "{text}");
        let rest = lines[4..].join("\n");
        for part in [
            "pod-to-remote-pod IPv4: pod on n1 (10.244.1.2) -> pod on n2 (10.244.2.2)",
            "  TCP: connecting",
            "    -> leave `rustnetctl monitor --drops` running on n1 and n2",
            "  n1: drop counters are not known: no agent",
            "  n2: dropped 3 unknown_sender (tunnel_in): compare Node addresses",
            "1 passed, 1 failed, 1 skipped",
        ] {
            assert!(rest.contains(part), "{part}\n{rest}");
        }
    }

    #[test]
    fn a_run_without_a_tried_row_is_not_well() {
        assert!(!Report::new(Vec::new()).ok);
        assert!(!report().ok);
    }
}
