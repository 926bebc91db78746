//! Prometheus' own tool judges the rules, and plays a few of them through.

use super::alerts::spec;
use super::{read, text};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Series and the alerts that they lead to; it names the rules `rules.yaml`, next to it.
const TESTS: &str = "tests/monitoring/rules_test.yaml";

fn promtool(dir: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("promtool").args(arguments).current_dir(dir).output();
    let output = output.context("promtool: run `cargo xtask setup --with kubernetes`, which builds it")?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&said));
    Ok(())
}

#[test]
fn promtool_takes_the_rules() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // JSON is YAML.
    fs::write(dir.path().join("rules.yaml"), spec()?.to_string())?;
    promtool(dir.path(), &["check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"])
}

#[test]
fn alerts_fire_when_they_should_and_not_before() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut rules = spec()?;
    let groups = rules["groups"].as_array_mut().context("groups")?;
    let mut names = BTreeSet::new();
    for rule in groups.iter_mut().filter_map(|group| group["rules"].as_array_mut()).flatten() {
        names.insert(text(&rule["alert"], "alert")?.to_owned());
        // The tool compares texts, too: they would stand there twice.
        rule.as_object_mut().context("a rule")?.remove("annotations");
    }
    fs::write(dir.path().join("rules.yaml"), rules.to_string())?;
    let tests = read(TESTS)?;
    // The tool expects nothing of an alert that there is not, and says that all is well.
    let parsed: Value = serde_saphyr::from_str(&tests)?;
    let cases = parsed["tests"].as_array().context("tests")?;
    let mut fired = BTreeSet::new();
    for case in cases.iter().flat_map(|case| case["alert_rule_test"].as_array().into_iter().flatten()) {
        let name = text(&case["alertname"], "alertname")?;
        ensure!(names.contains(name), "{TESTS}: there is no alert {name}");
        if case["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty()) {
            fired.insert(name.to_owned());
        }
    }
    assert_eq!(fired, names, "no case of {TESTS} sees one of them fire");
    fs::write(dir.path().join("rules_test.yaml"), &tests)?;
    promtool(dir.path(), &["test", "rules", "rules_test.yaml"])
}
