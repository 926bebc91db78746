//! The table, printed as it goes.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;
use testkit::Answers;

/// Counts rows and prints them.
pub struct Table {
    rows: usize,
    failed: Vec<String>,
}

/// One row: what was asked, and what is to be said of the answers.
pub struct Row<'a> {
    /// The client and its target.
    pub what: &'a str,
    /// Address family.
    pub family: &'a str,
    /// Protocol.
    pub proto: &'a str,
    /// Requests sent.
    pub sent: usize,
    /// Answers by backend, in words.
    pub answers: &'a str,
    /// Median latency.
    pub median: Option<Duration>,
}

fn line(text: &dyn Display) {
    // A closed pipe (`demo | head`) is no reason to panic.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A latency as people read it.
pub fn shown(latency: Option<Duration>) -> String {
    match latency {
        None => "-".into(),
        Some(t) if t < Duration::from_millis(10) => format!("{} us", t.as_micros()),
        Some(t) => format!("{} ms", t.as_millis()),
    }
}

/// Announces a part.
pub fn step(text: &str) {
    line(&format!("\n== {text}"));
}

/// Prints the columns' names.
pub fn columns() {
    let (what, answers) = ("from > to", "answers by backend");
    line(&format!("   {what:<34} {:<5} {:<5} {:>8}  {answers:<38} {:>9}", "", "proto", "requests", "median"));
}

/// Says something that is no row.
pub fn note(text: &str) {
    line(&format!("   {text}"));
}

impl Table {
    /// Without rows.
    pub const fn new() -> Self {
        Self { rows: 0, failed: Vec::new() }
    }

    /// Prints a row and remembers whether it held.
    pub fn row(&mut self, row: &Row<'_>, verdict: anyhow::Result<()>) {
        let Row { what, family, proto, sent, answers, median } = row;
        let mark = if verdict.is_ok() { "ok" } else { "FAILED" };
        let median = shown(*median);
        line(&format!("   {what:<34} {family:<5} {proto:<5} {sent:>8}  {answers:<38} {median:>9}  {mark}"));
        self.judge(what, verdict);
    }

    /// A row of requests.
    pub fn answers(&mut self, what: &str, family: &str, proto: &str, answers: &Answers, verdict: anyhow::Result<()>) {
        let by: Vec<String> = answers.by_server.iter().map(|(server, n)| format!("{server} {n}")).collect();
        let by = if by.is_empty() { "none".to_owned() } else { by.join(", ") };
        self.row(&Row { what, family, proto, sent: answers.sent, answers: &by, median: answers.median() }, verdict);
    }

    /// A row that is a sentence.
    pub fn fact(&mut self, what: &str, verdict: anyhow::Result<()>) {
        line(&format!("   {what:<104}  {}", if verdict.is_ok() { "ok" } else { "FAILED" }));
        self.judge(what, verdict);
    }

    fn judge(&mut self, what: &str, verdict: anyhow::Result<()>) {
        self.rows += 1;
        if let Err(e) = verdict {
            line(&format!("      {e:#}"));
            self.failed.push(format!("{what}: {e:#}"));
        }
    }

    /// Something ended the demo early.
    pub fn broken(&mut self, e: &anyhow::Error) {
        line(&format!("\n!! {e:#}"));
        self.failed.push(format!("{e:#}"));
    }

    /// The last word.
    pub fn summary(&mut self, took: Duration) {
        if self.failed.is_empty() {
            step(&format!("all {} rows held, in {:.1} s", self.rows, took.as_secs_f32()));
        } else {
            step(&format!("{} of {} rows FAILED, in {:.1} s", self.failed.len(), self.rows, took.as_secs_f32()));
            for failure in self.failed.clone() {
                note(&failure);
            }
        }
    }

    /// True when there were rows and all held.
    pub fn held(&self) -> bool {
        self.rows > 0 && self.failed.is_empty()
    }
}
