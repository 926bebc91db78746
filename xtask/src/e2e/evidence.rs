//! After a failure: what each failed test said, and what nodes and agents know, in files next to
//! the report.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::report::{Outcome, Run, name};
use super::suite;
use crate::cluster::{Cluster, Network};
use crate::cmd::Cmd;
use crate::ui;

/// What is asked of each agent.
const QUESTIONS: [&[&str]; 8] =
    [&["status"], &["drops"], &["policy"], &["services"], &["endpoints"], &["nodes"], &["peers"], &["ct", "list"]];

/// Collects the evidence. Where something cannot be read, its file holds the error.
pub fn collect(cluster: &Cluster, run: &Run, dir: &Path) -> Result<()> {
    let to = nodes(cluster, dir)?;
    logs(run, dir, &to)
}

/// Collects what nodes and agents know, and returns the directory.
pub fn nodes(cluster: &Cluster, dir: &Path) -> Result<PathBuf> {
    let to = dir.join("failures");
    let _ = fs::remove_dir_all(&to); // of an earlier run
    fs::create_dir_all(&to)?;
    for (what, args) in [
        ("pods", ["get", "pods", "--all-namespaces", "-o", "wide"]),
        ("events", ["get", "events", "--all-namespaces", "-o", "wide"]),
    ] {
        save(&to.join(format!("{what}.txt")), &cluster.kubectl()?.args(args))?;
    }
    if cluster.settings.network == Network::Rustnet {
        for node in cluster.nodes() {
            let field = format!("--field-selector=spec.nodeName={}", node.name);
            let pod =
                cluster.ask(&["get", "pods", "--namespace=rustnet-system", &field, "-o", "name"]).unwrap_or_default();
            for question in QUESTIONS {
                let file = to.join(format!("{}-{}.txt", node.name, question.join("-")));
                let ask =
                    cluster.kubectl()?.args(["exec", "--namespace=rustnet-system", pod.trim(), "-c", "agent", "--"]);
                save(&file, &ask.arg("/opt/rustnet/rustnetctl").args(question))?;
            }
            let log = cluster.kubectl()?.args(["logs", "--namespace=rustnet-system", pod.trim(), "-c", "agent"]);
            save(&to.join(format!("{}-agent.log", node.name)), &log)?;
        }
    }
    ui::detail(&format!("the nodes' state, and what failed tests said: {}", to.display()));
    Ok(to)
}

fn save(file: &Path, command: &Cmd) -> Result<()> {
    let text = command.capture().unwrap_or_else(|error| format!("{error:#}\n"));
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))
}

/// One file for each failed test: where it failed, and all that it said.
fn logs(run: &Run, dir: &Path, to: &Path) -> Result<()> {
    let report: Value = serde_json::from_slice(&fs::read(dir.join(suite::REPORT))?)?;
    let specs = report.as_array().into_iter().flatten().filter_map(|suite| suite["SpecReports"].as_array()).flatten();
    let failed: Vec<&str> =
        run.tests.iter().filter(|test| test.outcome == Outcome::Failed).map(|test| test.name.as_str()).collect();
    for spec in specs {
        let name = name(spec);
        let Some(number) = failed.iter().position(|it| *it == name) else { continue };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let content = [
            name,
            text(&spec["Failure"]["Message"]),
            format!("{}:{}", text(&spec["Failure"]["Location"]["FileName"]), spec["Failure"]["Location"]["LineNumber"]),
            text(&spec["CapturedGinkgoWriterOutput"]),
            text(&spec["CapturedStdOutErr"]),
        ];
        fs::write(to.join(format!("test-{}.log", number + 1)), content.join("\n\n"))?;
    }
    Ok(())
}
