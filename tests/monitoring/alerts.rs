//! The alerts: complete, about things that exist, and documented one by one.

use super::live;
use super::query::{Known, used};
use super::{documents, read, text};
use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use serde_json::Value;
use std::collections::BTreeSet;

/// The file that Helm and Kustomize take the rules from.
pub const RULES: &str = "deploy/helm/rustnet/monitoring/rules.yaml";
const RUNBOOK: &str = "docs/monitoring.md";
/// What is between an alert's section heading and its name.
const HEADING: &str = "### ";

/// The groups of rules, as Prometheus reads them.
pub fn spec() -> Result<Value> {
    let object = documents(&read(RULES)?)?.pop().context("no object")?;
    Ok(object["spec"].clone())
}

fn alerts() -> Result<Vec<Value>> {
    let spec = spec()?;
    let groups = spec["groups"].as_array().context("groups")?;
    Ok(groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()).cloned().collect())
}

#[test]
fn every_alert_asks_for_what_agents_serve() -> Result<()> {
    let known = Known::new(live::all()?);
    for alert in alerts()? {
        let name = text(&alert["alert"], "alert")?;
        let labels = known.check(text(&alert["expr"], name)?).with_context(|| name.to_owned())?;
        for annotation in ["summary", "description"] {
            let used = used(text(&alert["annotations"][annotation], name)?, r"\$labels\.([a-z_]+)")?;
            ensure!(used.is_subset(&labels), "{name}: {annotation} uses {used:?} of {labels:?}");
        }
    }
    Ok(())
}

#[test]
fn every_alert_says_what_is_broken_and_how_bad_it_is() -> Result<()> {
    let mut names = BTreeSet::new();
    let placeholder = Regex::new(r"\{\{[^}]*\}\}")?;
    for alert in alerts()? {
        let name = text(&alert["alert"], "alert")?;
        ensure!(name.starts_with("Rustnet") && names.insert(name.to_owned()), "{name}: another name");
        let severity = text(&alert["labels"]["severity"], name)?;
        ensure!(["critical", "warning", "info"].contains(&severity), "{name}: severity {severity}");
        let (summary, description) =
            (text(&alert["annotations"]["summary"], name)?, text(&alert["annotations"]["description"], name)?);
        ensure!(summary.ends_with(['.', ')']) && summary.len() < 120, "{name}: summary {summary}");
        ensure!(description.ends_with('.') && description.len() > summary.len(), "{name}: description {description}");
        let plain = placeholder.replace_all(description, "x");
        for sentence in plain.split(['.', ':']) {
            let words = sentence.split_whitespace().count();
            ensure!(words <= 25, "{name}: {words} words: {sentence}");
        }
    }
    Ok(())
}

#[test]
fn every_alert_has_its_section_and_every_section_its_alert() -> Result<()> {
    let document = read(RUNBOOK)?;
    let sections: BTreeSet<_> =
        document.lines().filter_map(|line| line.strip_prefix(HEADING)).filter(|it| it.starts_with("Rustnet")).collect();
    let alerts = alerts()?;
    let mut names = BTreeSet::new();
    for alert in &alerts {
        let name = text(&alert["alert"], "alert")?;
        names.insert(name);
        // What a heading's anchor is where Markdown is shown.
        let anchor = format!("{RUNBOOK}#{}", name.to_lowercase());
        assert_eq!(text(&alert["annotations"]["runbook_url"], name)?, anchor, "{name}");
    }
    assert_eq!(names, sections);
    for section in document.split(HEADING).skip(1).filter(|it| it.starts_with("Rustnet")) {
        let name = section.lines().next().unwrap_or_default();
        let commands = section.lines().filter(|line| line.starts_with("    ")).count();
        ensure!(commands > 0, "{name}: no command to begin with");
        ensure!(section.contains("Remedy: "), "{name}: no remedy");
    }
    Ok(())
}
