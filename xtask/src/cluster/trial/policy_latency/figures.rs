//! Distributions of times, and the table of them.

use std::fmt::Write as _;

/// Greatest median and 99th percentile, in milliseconds, of a row that has a goal.
pub const GOAL: (f64, f64) = (20.0, 100.0);

/// Times in milliseconds, in order. Negative ones are of what came before the moment that they
/// count from.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<f64>);

impl FromIterator<f64> for Times {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }
}

impl Times {
    /// Returns the least value that so many of a hundred do not exceed (the nearest rank); not a
    /// number if there are none.
    pub fn percentile(&self, of_hundred: usize) -> f64 {
        let rank = (self.0.len() * of_hundred).div_ceil(100);
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }
}

/// A line of a table.
pub struct Row {
    /// What was measured.
    pub name: String,
    /// How long it took.
    pub times: Times,
    /// Whether [`GOAL`] counts.
    pub has_goal: bool,
}

impl Row {
    /// Returns a row without a goal.
    pub fn new(name: impl Into<String>, times: impl IntoIterator<Item = f64>) -> Self {
        Self { name: name.into(), times: times.into_iter().collect(), has_goal: false }
    }

    /// Returns the same row with the goal.
    pub fn with_goal(self) -> Self {
        Self { has_goal: true, ..self }
    }

    fn verdict(&self) -> &'static str {
        let is_reached = self.times.percentile(50) <= GOAL.0 && self.times.percentile(99) <= GOAL.1;
        match (self.has_goal, is_reached) {
            (false, _) => "",
            (true, true) => "reached",
            (true, false) => "missed",
        }
    }
}

/// Returns the title, and below it the rows with their columns under one another.
pub fn table(title: &str, unit: &str, rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.name.chars().count()).chain([title.len()]).max().unwrap_or_default();
    let mut text = format!("   {title:<width$}  {:>5}  {:>9}  {:>9}  {:>9}  {unit}\n", "TIMES", "P50", "P99", "MAX");
    for row in rows {
        let [median, p99, most] = [50, 99, 100].map(|of_hundred| row.times.percentile(of_hundred));
        let (name, count, verdict) = (&row.name, row.times.0.len(), row.verdict());
        let line = format!("   {name:<width$}  {count:>5}  {median:>9.1}  {p99:>9.1}  {most:>9.1}  {verdict}");
        // Writing to a string does not fail.
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let times: Times = (1..=50).rev().map(f64::from).collect();
        let found = [0, 1, 50, 98, 99, 100].map(|of_hundred| times.percentile(of_hundred));
        assert_eq!(found.map(|it| it as i64), [1, 1, 25, 49, 50, 50]);
        let one: Times = [-3.0].into_iter().collect();
        assert!((one.percentile(50) + 3.0).abs() < f64::EPSILON);
        assert!(Times::default().percentile(50).is_nan());
    }

    #[test]
    fn a_goal_wants_both_percentiles_and_a_row_without_times_misses_it() {
        let verdict = |times: &[f64]| Row::new("x", times.iter().copied()).with_goal().verdict();
        assert_eq!(
            [verdict(&[20.0, 100.0]), verdict(&[20.0, 100.1]), verdict(&[20.1])],
            ["reached", "missed", "missed"]
        );
        assert_eq!((verdict(&[]), Row::new("x", [900.0]).verdict()), ("missed", ""));
    }

    #[test]
    fn columns_stand_under_one_another() {
        let rows = [Row::new("short", [1.0]).with_goal(), Row::new("a longer name", [12.25, 2.0])];
        let text = table("CHANGE", "ms", &rows);
        assert_eq!(
            text,
            "   CHANGE         TIMES        P50        P99        MAX  ms\n   \
                short              1        1.0        1.0        1.0  reached\n   \
                a longer name      2        2.0       12.2       12.2\n"
        );
    }
}
