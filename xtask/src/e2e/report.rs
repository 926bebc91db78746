//! What came of each test: read from ginkgo's report, kept with the circumstances, shown as a table.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{exclusions, suite};
use crate::cluster::{Cluster, Settings};
use crate::cmd::Cmd;

/// Where the circumstances of a run are kept, next to its report.
const KEPT: &str = "run.json";

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It failed.
    Failed,
    /// It passed.
    Passed,
    /// It looked at the cluster and found itself without meaning there.
    Skipped,
    /// It was not run: an exclusion, or the caller's `--skip`.
    Excluded,
}

impl Outcome {
    /// As people name it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Passed => "passed",
            Self::Skipped => "skipped",
            Self::Excluded => "not run",
        }
    }
}

/// One test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Test {
    /// Full name.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
    /// Why, unless it passed.
    pub reason: String,
    /// In seconds.
    pub time: f64,
}

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What it ran on.
    pub settings: Settings,
    /// `v1.34.4`.
    pub kubernetes: String,
    /// The work tree, or the image that was given instead.
    pub commit: String,
    /// The kernel.
    pub kernel: String,
    /// The day, in UTC.
    pub date: String,
    /// All tests that the focus selects, by name.
    pub tests: Vec<Test>,
}

impl Run {
    /// From the report that ginkgo left.
    pub fn read(dir: &Path, cluster: &Cluster, focus: &str, skip: Option<&str>) -> Result<Self> {
        let file = dir.join(suite::REPORT);
        let text = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        let report: Value = serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?;
        let focus = Regex::new(focus).context("--focus")?;
        let skip = skip.map(Regex::new).transpose().context("--skip")?;
        let exclusion = |name: &str| {
            let known = exclusions::of(&cluster.settings).find(|it| name.contains(it.part));
            known.map(|it| it.reason).or_else(|| skip.as_ref().is_some_and(|re| re.is_match(name)).then_some("--skip"))
        };
        let specs =
            report.as_array().into_iter().flatten().filter_map(|suite| suite["SpecReports"].as_array()).flatten();
        let mut tests = Vec::new();
        for spec in specs.filter(|spec| spec["LeafNodeType"] == "It") {
            tests.extend(test(spec, &focus, &exclusion)?);
        }
        Self::of(cluster, tests)
    }

    /// The circumstances are those of now.
    pub fn of(cluster: &Cluster, mut tests: Vec<Test>) -> Result<Self> {
        tests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            settings: cluster.settings.clone(),
            kubernetes: cluster.settings.version.version()?,
            commit: version(cluster),
            kernel: said(&Cmd::new("uname").arg("-r")),
            date: said(&Cmd::new("date").args(["-u", "+%F"])),
            tests,
        })
    }

    /// Keeps the table for readers.
    pub fn keep_table(&self, dir: &Path) -> Result<()> {
        fs::write(dir.join("table.txt"), self.table()).map_err(Into::into)
    }

    /// Whether both are parts of one run: the same programs on clusters of one kind.
    pub fn is_part_of(&self, other: &Self) -> bool {
        let what = |it: &Self| (it.settings.clone(), it.kubernetes.clone(), it.commit.clone(), it.kernel.clone());
        what(self) == what(other)
    }

    /// Adds a later part. Of a test in both, the last result counts; one that was left out there has no result.
    pub fn add(&mut self, later: Self) {
        self.date = later.date;
        for test in later.tests {
            match self.tests.iter_mut().find(|it| it.name == test.name) {
                Some(known) if test.outcome == Outcome::Excluded && known.outcome != Outcome::Excluded => {}
                Some(known) => *known = test,
                None => self.tests.push(test),
            }
        }
        self.tests.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// How many ended so.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.tests.iter().filter(|test| test.outcome == outcome).count()
    }

    /// The counts in words.
    pub fn counts(&self) -> String {
        let [failed, passed, skipped, excluded] =
            [Outcome::Failed, Outcome::Passed, Outcome::Skipped, Outcome::Excluded].map(|outcome| self.count(outcome));
        format!("{passed} passed, {failed} failed, {skipped} skipped by themselves, {excluded} not run")
    }

    /// Failures first, then passes, and what was not run grouped by its reason.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for outcome in [Outcome::Failed, Outcome::Passed, Outcome::Skipped] {
            for test in self.tests.iter().filter(|test| test.outcome == outcome) {
                let _ = writeln!(text, "{:<8} {:>6.1} s  {}", outcome.word(), test.time, test.name);
                if !test.reason.is_empty() {
                    let _ = writeln!(text, "                    {}", test.reason);
                }
            }
        }
        let excluded = || self.tests.iter().filter(|test| test.outcome == Outcome::Excluded);
        let mut reasons: Vec<&str> = excluded().map(|test| test.reason.as_str()).collect();
        reasons.sort_unstable();
        reasons.dedup();
        for reason in reasons {
            let _ = writeln!(text, "not run: {reason}");
            for test in excluded().filter(|test| test.reason == reason) {
                let _ = writeln!(text, "    {}", test.name);
            }
        }
        text
    }
}

/// Keeps a run for [`load`].
pub fn keep(run: &impl Serialize, dir: &Path) -> Result<()> {
    fs::write(dir.join(KEPT), serde_json::to_string_pretty(run)?).map_err(Into::into)
}

/// A run that was kept.
pub fn load<T: DeserializeOwned>(dir: &Path) -> Result<T> {
    let file = dir.join(KEPT);
    let text = fs::read_to_string(&file).with_context(|| format!("{}: no run was kept there", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))
}

/// What the cluster's network was made of: the work tree's commit, or the image that was given instead.
pub fn version(cluster: &Cluster) -> String {
    match &cluster.settings.image {
        // What it was made of, its maker knows.
        Some(file) => file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        None => said(&Cmd::new("git").args(["describe", "--always", "--dirty"]).dir(crate::paths::root())),
    }
}

fn said(cmd: &Cmd) -> String {
    cmd.capture().map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// One spec of the report; none when the focus leaves it out.
fn test(spec: &Value, focus: &Regex, exclusion: &impl Fn(&str) -> Option<&'static str>) -> Result<Option<Test>> {
    let name = name(spec);
    if !focus.is_match(&name) {
        return Ok(None);
    }
    let message = spec["Failure"]["Message"].as_str().unwrap_or_default();
    let short: String = message.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect();
    let state = spec["State"].as_str().unwrap_or_default();
    let (outcome, reason) = match state {
        "passed" => (Outcome::Passed, String::new()),
        "skipped" if !short.is_empty() => (Outcome::Skipped, short),
        "skipped" | "pending" => {
            let reason = exclusion(&name).or((state == "pending").then_some("its authors have set it aside"));
            (Outcome::Excluded, reason.unwrap_or("excluded by a pattern of the command").to_owned())
        }
        "failed" | "panicked" | "timedout" | "interrupted" | "aborted" => (Outcome::Failed, short),
        other => bail!("ginkgo's report has the unknown state {other:?} for {name}"),
    };
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds, shown as tenths of seconds")]
    let time = spec["RunTime"].as_u64().unwrap_or_default() as f64 / 1e9;
    Ok(Some(Test { name, outcome, reason, time }))
}

/// As ginkgo matches it.
pub fn name(spec: &Value) -> String {
    let above = spec["ContainerHierarchyTexts"].as_array().into_iter().flatten();
    let words = above.chain([&spec["LeafNodeText"]]).filter_map(Value::as_str).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(leaf: &str, state: &str, message: &str) -> Value {
        json!({"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig-network] X"], "LeafNodeText": leaf,
               "State": state, "RunTime": 1_500_000_000_u64, "Failure": {"Message": message}})
    }

    #[test]
    fn every_state_has_its_outcome_and_reason() {
        let focus = Regex::new("sig-network").unwrap();
        let exclusion = |name: &str| name.contains("NodePort").then_some("not served");
        let of = |spec: &Value| test(spec, &focus, &exclusion).unwrap().map(|it| (it.outcome, it.reason));
        assert_eq!(of(&spec("a", "passed", "")), Some((Outcome::Passed, String::new())));
        assert_eq!(of(&spec("a", "failed", "one\n two")), Some((Outcome::Failed, "one two".into())));
        assert_eq!(
            of(&spec("a", "skipped", "wants three nodes")),
            Some((Outcome::Skipped, "wants three nodes".into()))
        );
        assert_eq!(of(&spec("NodePort", "skipped", "")), Some((Outcome::Excluded, "not served".into())));
        assert!(test(&spec("a", "new", ""), &focus, &exclusion).is_err());
        assert_eq!(name(&spec("a", "passed", "")), "[sig-network] X a");
    }

    #[test]
    fn parts_of_one_run_are_put_together() {
        let part = |commit: &str, tests: &[(&str, Outcome)]| Run {
            settings: crate::cluster::settings(&[]).unwrap(),
            kubernetes: "v1".into(),
            commit: commit.into(),
            kernel: "6.1".into(),
            date: "2026-01-01".into(),
            tests: tests
                .iter()
                .map(|(name, outcome)| Test {
                    name: (*name).into(),
                    outcome: *outcome,
                    reason: String::new(),
                    time: 0.0,
                })
                .collect(),
        };
        let mut all = part("a", &[("b", Outcome::Passed), ("c", Outcome::Failed)]);
        let later = part("a", &[("a", Outcome::Passed), ("b", Outcome::Excluded), ("c", Outcome::Passed)]);
        assert!(later.is_part_of(&all) && !part("b", &[]).is_part_of(&all));
        all.add(later);
        let outcomes: Vec<_> = all.tests.iter().map(|it| (it.name.as_str(), it.outcome)).collect();
        assert_eq!(outcomes, [("a", Outcome::Passed), ("b", Outcome::Passed), ("c", Outcome::Passed)]);
    }
}
