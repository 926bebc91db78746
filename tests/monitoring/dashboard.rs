//! The Grafana dashboard: each panel has a title, a unit and a legend, and asks for what agents serve.

use super::live;
use super::query::{Known, used};
use super::{read, text};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The file that Helm and Kustomize put into a ConfigMap.
pub const DASHBOARD: &str = "deploy/helm/rustnet/monitoring/dashboard.json";
/// Ids of Grafana's units that the panels may have.
const UNITS: [&str; 9] = ["Bps", "bytes", "none", "ops", "percentunit", "pps", "reqps", "s", "wps"];

fn dashboard() -> Result<Value> {
    Ok(serde_json::from_str(&read(DASHBOARD)?)?)
}

/// All panels but the headings of rows.
fn panels() -> Result<Vec<Value>> {
    let dashboard = dashboard()?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    Ok(panels.iter().filter(|panel| panel["type"] != "row").cloned().collect())
}

/// Grafana replaces these before it asks Prometheus.
fn without_variables(query: &str) -> String {
    query.replace("$__rate_interval", "2m").replace("$node", ".*")
}

#[test]
fn every_panel_asks_for_what_agents_serve() -> Result<()> {
    let known = Known::new(live::all()?);
    for panel in panels()? {
        let title = text(&panel["title"], "title")?;
        for target in panel["targets"].as_array().context("targets")? {
            let query = text(&target["expr"], title)?;
            ensure!(query.contains("node=~\"$node\""), "{title}: the variable node changes nothing");
            let labels = known.check(&without_variables(query)).with_context(|| title.to_owned())?;
            let legend = text(&target["legendFormat"], title)?;
            let used = used(legend, r"\{\{\s*([a-z_]+)\s*\}\}")?;
            ensure!(!legend.is_empty(), "{title}: no legend");
            // A legend that says less than the result has labels shows lines of one name.
            ensure!(used == labels, "{title}: the legend {legend} is not of {labels:?}");
        }
    }
    Ok(())
}

#[test]
fn every_panel_has_title_unit_and_place() -> Result<()> {
    let dashboard = dashboard()?;
    let (mut ids, mut titles, mut places) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().context("panels")? {
        let title = text(&panel["title"], "title")?;
        ensure!(!title.is_empty() && titles.insert(title), "{title}: the title of two panels");
        ensure!(ids.insert(panel["id"].as_u64().context("id")?), "{title}: the id of another panel");
        let at = |key: &str| panel["gridPos"][key].as_u64().with_context(|| format!("{title}: {key}"));
        for x in at("x")?..at("x")? + at("w")? {
            for y in at("y")?..at("y")? + at("h")? {
                ensure!(x < 24 && places.insert((x, y)), "{title}: over another panel, at {x}, {y}");
            }
        }
    }
    for panel in panels()? {
        let title = text(&panel["title"], "title")?;
        let unit = text(&panel["fieldConfig"]["defaults"]["unit"], title)?;
        ensure!(UNITS.contains(&unit), "{title}: unit {unit}");
        ensure!(!text(&panel["description"], title)?.is_empty(), "{title}: no description");
        let source = json!({"type": "prometheus", "uid": "${datasource}"});
        let targets = panel["targets"].as_array().context("targets")?;
        ensure!(!targets.is_empty(), "{title}: no query");
        for it in targets.iter().chain([&panel]) {
            assert_eq!(it["datasource"], source, "{title}");
        }
    }
    Ok(())
}

#[test]
fn data_source_and_node_can_be_chosen() -> Result<()> {
    let dashboard = dashboard()?;
    let variables = dashboard["templating"]["list"].as_array().context("variables")?;
    let names: Vec<_> = variables.iter().map(|it| (&it["name"], &it["type"])).collect();
    assert_eq!(names, [(&json!("datasource"), &json!("datasource")), (&json!("node"), &json!("query"))]);
    let node = text(&variables[1]["query"]["query"], "node")?;
    let selector = node.strip_prefix("label_values(").and_then(|it| it.strip_suffix(", node)")).context("no label")?;
    ensure!(Known::new(live::all()?).check(selector)?.contains("node"), "{selector}");
    Ok(())
}
