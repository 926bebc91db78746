//! Go's events about tests (`go doc test2json`) -> one outcome for each test that has no parts.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use regex::Regex;
use serde::Deserialize;

use crate::e2e::report::{Outcome, Test};

/// The one test of the program that also writes a report; all others are its parts.
pub const ROOT: &str = "TestConformanceProfiles";
/// How much of what a test said is its reason.
const REASON: usize = 300;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct Event {
    action: String,
    test: String,
    /// In seconds.
    elapsed: f64,
    output: String,
}

/// What is known of one test.
#[derive(Default)]
struct Known {
    /// None until it has ended.
    outcome: Option<Outcome>,
    time: f64,
    output: String,
}

/// What a line says to others.
#[derive(Default)]
pub struct Said {
    /// For the log.
    pub output: String,
    /// For a person: a test has ended.
    pub result: Option<String>,
}

/// The events of a run.
#[derive(Default)]
pub struct Events {
    known: BTreeMap<String, Known>,
    done: usize,
}

impl Events {
    /// Takes one line.
    pub fn line(&mut self, line: &str) -> Result<Said> {
        let event: Event = serde_json::from_str(line).with_context(|| format!("no event of a test: {line}"))?;
        if event.test.is_empty() {
            return Ok(Said { output: event.output, result: None });
        }
        let outcome = match event.action.as_str() {
            "pass" => Some(Outcome::Passed),
            "fail" => Some(Outcome::Failed),
            "skip" => Some(Outcome::Skipped),
            _ => None,
        };
        let known = self.known.entry(event.test.clone()).or_default();
        known.output.push_str(&event.output);
        let mut result = None;
        if let Some(outcome) = outcome {
            known.outcome = Some(outcome);
            known.time = event.elapsed;
            if !self.has_parts(&event.test) {
                self.done += 1;
                let word = if outcome == Outcome::Failed { "FAILED" } else { outcome.word() };
                result = Some(format!("{:>3} {word:<7} {} ({:.1} s)", self.done, readable(&event.test), event.elapsed));
            }
        }
        Ok(Said { output: event.output, result })
    }

    /// What came of each test: of those with parts only where the failure is no part's.
    pub fn tests(&self) -> Vec<Test> {
        let failed = |name: &str| self.known[name].outcome.is_none_or(|it| it == Outcome::Failed);
        let is_own = |name: &str| !self.has_parts(name) || (failed(name) && !self.parts(name).any(failed));
        self.known.iter().filter(|(name, _)| is_own(name)).map(|(name, known)| known.test(name)).collect()
    }

    fn parts<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        let prefix = format!("{name}/");
        self.known.keys().map(String::as_str).filter(move |other| other.starts_with(&prefix))
    }

    fn has_parts(&self, name: &str) -> bool {
        self.parts(name).next().is_some()
    }
}

impl Known {
    fn test(&self, name: &str) -> Test {
        let outcome = self.outcome.unwrap_or(Outcome::Failed);
        let reason = match outcome {
            Outcome::Passed => String::new(),
            _ if self.outcome.is_none() => "it did not end".to_owned(),
            _ => reason(&self.output),
        };
        Test { name: readable(name), outcome, reason, time: self.time }
    }
}

/// Go puts underscores in the place of spaces.
fn readable(name: &str) -> String {
    let short = name.strip_prefix(ROOT).map_or(name, |rest| rest.trim_start_matches('/'));
    if short.is_empty() { "preparation".to_owned() } else { short.replacen('/', ": ", 1).replace('_', " ") }
}

/// The connection that was not as it should be, else the last thing that was said.
fn reason(output: &str) -> String {
    static PLACE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\w+\.go:\d+: ").ok());
    let lines = output.lines().map(str::trim).filter(|line| !line.is_empty());
    let words = lines.filter(|line| !line.starts_with("--- ") && !line.starts_with("=== "));
    let words: Vec<_> = words.map(|line| PLACE.as_ref().map_or(line.into(), |place| place.replace(line, ""))).collect();
    let named = |part: &str| words.iter().rev().find(|line| line.contains(part));
    let found = ["Expected connection", "FAILED to execute", "Messages:", "Error:"].into_iter().find_map(named);
    let mut text = found.or(words.last()).cloned().unwrap_or_default().into_owned();
    // The cause is a line of its own.
    let mut after = words.iter().skip_while(|line| !line.ends_with("Received unexpected error:")).skip(1);
    if let Some(cause) = after.next() {
        text = format!("{}: {cause}", text.trim_start_matches("Messages:"));
    }
    // Without a word about a connection, only the line of the test says what was asked.
    let line = words.iter().rev().find_map(|line| line.rsplit_once("/conformance/tests/"));
    if let Some((_, line)) = line.filter(|_| !text.contains("Expected connection")) {
        text = format!("{text}, asked at {line}");
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(REASON).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> (Vec<Test>, Vec<String>) {
        let mut events = Events::default();
        let said: Vec<Said> = lines.iter().map(|line| events.line(line).unwrap()).collect();
        (events.tests(), said.into_iter().filter_map(|it| it.result).collect())
    }

    #[test]
    fn parts_count_and_not_what_they_are_parts_of() {
        let (tests, said) = read(&[
            r#"{"Action":"start"}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles"}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles/A"}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles/A/Should_allow"}"#,
            r#"{"Action":"pass","Test":"TestConformanceProfiles/A/Should_allow","Elapsed":1.25}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles/A/Should_deny"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles/A/Should_deny","Output":"    helper.go:93: Expected connection to fail from a/b to 10.0.0.1, but instead it\n"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles/A/Should_deny","Output":"    x.go:1: \n"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles/A/Should_deny","Output":"        \tError:      \tCondition never satisfied\n"}"#,
            r#"{"Action":"fail","Test":"TestConformanceProfiles/A/Should_deny","Elapsed":10.5}"#,
            r#"{"Action":"fail","Test":"TestConformanceProfiles/A","Elapsed":11.75}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles/B"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles/B","Output":"    suite.go:7: Skipping B: no such feature\n"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles/B","Output":"--- SKIP: TestConformanceProfiles/B (0.00s)\n"}"#,
            r#"{"Action":"skip","Test":"TestConformanceProfiles/B","Elapsed":0}"#,
            r#"{"Action":"fail","Test":"TestConformanceProfiles","Elapsed":11.75}"#,
            r#"{"Action":"fail","Elapsed":11.8}"#,
        ]);
        let found: Vec<_> = tests.iter().map(|it| (it.name.as_str(), it.outcome, it.reason.as_str())).collect();
        let expected = [
            ("A: Should allow", Outcome::Passed, ""),
            ("A: Should deny", Outcome::Failed, "Expected connection to fail from a/b to 10.0.0.1, but instead it"),
            ("B", Outcome::Skipped, "Skipping B: no such feature"),
        ];
        assert_eq!(found, expected);
        let results =
            ["  1 passed  A: Should allow (1.2 s)", "  2 FAILED  A: Should deny (10.5 s)", "  3 skipped B (0.0 s)"];
        assert_eq!(said, results);
    }

    #[test]
    fn a_failure_of_the_preparation_is_a_row() {
        let (tests, _) = read(&[
            r#"{"Action":"run","Test":"TestConformanceProfiles"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles","Output":"        \tError:      \tReceived unexpected error:\n"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles","Output":"        \t            \tit is being deleted\n"}"#,
            r#"{"Action":"output","Test":"TestConformanceProfiles","Output":"        \tMessages:   \terror creating resource\n"}"#,
            r#"{"Action":"fail","Test":"TestConformanceProfiles","Elapsed":0.1}"#,
        ]);
        assert_eq!(tests.len(), 1);
        assert_eq!(
            (tests[0].name.as_str(), tests[0].reason.as_str()),
            ("preparation", "error creating resource: it is being deleted")
        );
    }

    #[test]
    fn a_question_without_an_answer_is_found_in_the_source() {
        let output = "    helper.go:70: \n        \tError Trace:\t/x/api@v1/conformance/utils/kubernetes/helper.go:70\n\
                      \t\t/x/api@v1/conformance/tests/ports.go:71\n        \tError:      \tCondition never satisfied\n";
        assert_eq!(reason(output), "Error: Condition never satisfied, asked at ports.go:71");
    }

    #[test]
    fn a_test_without_an_end_has_failed() {
        let (tests, _) = read(&[
            r#"{"Action":"run","Test":"TestConformanceProfiles"}"#,
            r#"{"Action":"run","Test":"TestConformanceProfiles/A"}"#,
            r#"{"Action":"fail","Test":"TestConformanceProfiles","Elapsed":0.1}"#,
        ]);
        assert_eq!(tests.iter().map(|it| it.outcome).collect::<Vec<_>>(), [Outcome::Failed]);
        assert_eq!(tests[0].reason, "it did not end");
    }
}
