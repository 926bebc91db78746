//! Tables for people, JSON for programs; colours only on a terminal.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::doctor::finding::Mark;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns
    Table,
    /// JSON
    Json,
}

/// The command line asked for something that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// The command's work could not be done, so that nothing is known of what it is about.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CannotRun(pub String);

/// Where results go.
pub struct Output {
    format: Format,
    colour: bool,
}

impl Output {
    /// To standard output.
    pub fn stdout(format: Format) -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { format, colour }
    }

    /// True if a program reads.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Prints `value` as JSON, or as the table that `rows` makes.
    pub fn print<T: Serialize>(
        &self,
        value: &T,
        header: &[&str],
        rows: impl FnOnce() -> Vec<Vec<String>>,
    ) -> Result<()> {
        match self.format {
            Format::Json => json(value),
            Format::Table => line(&table(header, rows())),
        }
    }

    /// A word for a mark, coloured on a terminal.
    pub fn mark(&self, mark: Mark) -> String {
        self.coloured(mark, ["Ok", "Warning", "Failed"])
    }

    /// A sign for a mark, coloured on a terminal.
    pub fn sign(&self, mark: Mark) -> String {
        self.coloured(mark, ["✓", "!", "✗"])
    }

    fn coloured(&self, mark: Mark, [ok, warning, bad]: [&str; 3]) -> String {
        let (text, colour) = match mark {
            Mark::Ok => (ok, 32),
            Mark::Warning => (warning, 33),
            Mark::Bad => (bad, 31),
        };
        if self.colour { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Prints a value as JSON.
pub fn json<T: Serialize>(value: &T) -> Result<()> {
    line(&serde_json::to_string_pretty(value)?)
}

/// Prints a line.
pub fn line(text: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{text}")?)
}

/// Columns without lines, two spaces apart, as kubectl prints.
pub fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// A number with a space between thousands.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A time span as people say it: `8s`, `3m12s`, `2h05m`.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::{span, table, thousands};

    #[test]
    fn columns_line_up() {
        let text = table(&["NAME", "N"], vec![vec!["a".into(), "1".into()], vec!["longer".into(), "22".into()]]);
        assert_eq!(text.lines().collect::<Vec<_>>(), ["NAME    N", "a       1", "longer  22"]);
    }

    #[test]
    fn numbers_and_spans() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(1_234_567), "1 234 567");
        assert_eq!((span(59), span(61), span(7260)), ("59s".into(), "1m01s".into(), "2h01m".into()));
    }
}
