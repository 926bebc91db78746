//! `rustnetctl connectivity` as a pod with its least role: all rows pass; and with a node that has no route to the other one, those
//! between nodes fail, and no others.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::layout::{Cluster, Node};
use crate::cluster::{node, wait};
use crate::paths;

/// What crosses from one node to the other, of what is tried with the fault.
const BETWEEN_NODES: [&str; 4] = [
    "pod-to-remote-pod",
    "host-to-remote-service",
    "pod-to-remote-node-port",
    // The endpoint is on the other node.
    "pod-to-service-name",
];
/// What does not cross.
const WITHIN_NODES: [&str; 2] = ["pod-to-local-pod", "pod-to-itself"];
/// What the run without a fault has in addition.
const OTHERS: [&str; 7] = [
    "large-packets-local",
    "large-packets-remote",
    "pod-to-remote-host",
    "host-to-remote-pod",
    "pod-to-remote-service",
    "pod-to-local-node-port",
    "headless-service-name",
];
/// A row that fails waits for what does not come.
const PATIENCE: Duration = Duration::from_mins(10);
const NAMESPACE: &str = "--namespace=trial";
const POD: &str = "connectivity";

/// Returns a line about the result.
pub fn run(cluster: &Cluster) -> Result<String> {
    let nodes = cluster.nodes();
    let (near, far) = (nodes.first().context("no node")?, nodes.last().context("no node")?);
    ensure!(near.name != far.name, "it takes two nodes\n  remedy: cargo xtask cluster scale 2");
    let role = paths::root().join("deploy/connectivity/role.yaml").display().to_string();
    cluster.ask(&["apply", "-f", &role])?;
    let (code, well) = ask(cluster, near, &[])?;
    ensure!(
        code == 0 && well["ok"] == true && count(&well, "failed") == 0,
        "exit code {code}; failed: {}",
        rows(&well)
    );
    let named = |scenario: &&str| rows_of(&well, "passed").any(|row| row["scenario"] == **scenario);
    // With the fault not all of them: each row that fails waits for seconds.
    let some = [&BETWEEN_NODES[..], &WITHIN_NODES].concat();
    let absent: Vec<_> = some.iter().chain(&OTHERS).filter(|it| !named(it)).collect();
    ensure!(absent.is_empty(), "not tried: {absent:?}");
    let result = cut(cluster, near, far, "add").and_then(|()| ask(cluster, near, &some));
    cut(cluster, near, far, "del")?;
    let (code, broken) = result?;
    ensure!(code == 1 && broken["ok"] == false, "exit code {code} with a node that has no route to the other one");
    for row in broken["rows"].as_array().into_iter().flatten() {
        let scenario = row["scenario"].as_str().unwrap_or_default();
        let (is_failed, is_between) = (row["status"] == "failed", BETWEEN_NODES.contains(&scenario));
        ensure!(is_failed == is_between, "{scenario} is {}: {row}", row["status"]);
        let evidence = row["evidence"].as_array().map_or(0, Vec::len);
        ensure!(!is_between || evidence == 2, "{scenario} has no evidence of both nodes: {row}");
    }
    let failed = count(&broken, "failed");
    ensure!(failed > 0, "no row was tried with a node that has no route to the other one");
    Ok(format!(
        "{} rows passed; without a route from {} to {}, the {failed} rows between nodes failed of {}, and no others",
        count(&well, "passed"),
        near.name,
        far.name,
        some.join(", "),
    ))
}

/// Takes a node the routes to another one, or gives them back.
fn cut(cluster: &Cluster, near: &Node, far: &Node, verb: &str) -> Result<()> {
    for address in far.address().of(cluster.settings.ip_family) {
        node::command(cluster, near)?.args(["ip", "route", verb, "blackhole", &address]).capture()?;
    }
    Ok(())
}

/// Runs the command for these scenarios, for all if none is named, as a pod of a node; returns its exit code and its JSON.
fn ask(cluster: &Cluster, on: &Node, scenarios: &[&str]) -> Result<(i64, Value)> {
    let image = "jsonpath={.spec.template.spec.containers[0].image}";
    let image = cluster.ask(&["--namespace=rustnet-system", "get", "daemonset/rustnet-agent", "-o", image])?;
    let file = cluster.dir.join("connectivity.yaml");
    fs::write(&file, manifest(&image, on, scenarios))?;
    let file = file.display().to_string();
    cluster.ask(&["apply", "-f", &file])?;
    let state = || cluster.ask(&[NAMESPACE, "get", "pod", POD, "-o", "jsonpath={.status.phase}"]);
    let is_over = || state().is_ok_and(|phase| ["Succeeded", "Failed"].contains(&phase.as_str()));
    let in_time = wait::until(PATIENCE, is_over);
    let code = "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}";
    let code = cluster.ask(&[NAMESPACE, "get", "pod", POD, "-o", code])?;
    // Both streams are in it: progress is in lines of its own, before the result.
    let log = cluster.ask(&[NAMESPACE, "logs", POD])?;
    cluster.ask(&["delete", "-f", &file, "--wait"])?;
    ensure!(in_time, "rustnetctl connectivity does not end; it said:\n{log}");
    let result = log.find("\n{\n").with_context(|| format!("no result; it said:\n{log}"))?;
    Ok((code.parse().context("no exit code")?, serde_json::from_str(&log[result..])?))
}

fn rows_of<'a>(report: &'a Value, status: &'a str) -> impl Iterator<Item = &'a Value> {
    report["rows"].as_array().into_iter().flatten().filter(move |row| row["status"] == status)
}

fn count(report: &Value, status: &str) -> usize {
    rows_of(report, status).count()
}

fn rows(report: &Value) -> String {
    rows_of(report, "failed").map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn manifest(image: &str, on: &Node, scenarios: &[&str]) -> String {
    let mut command = vec!["/opt/rustnet/rustnetctl".to_owned(), "connectivity".to_owned(), "--output=json".to_owned()];
    command.extend(scenarios.iter().map(|name| format!("--scenario={name}")));
    format!(
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {POD}, namespace: trial}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {{name: {POD}}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: rustnet-connectivity}}\n\
         subjects: [{{kind: ServiceAccount, name: {POD}, namespace: trial}}]\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: {POD}, namespace: trial}}\nspec:\n  \
           nodeName: {}\n  restartPolicy: Never\n  serviceAccountName: {POD}\n  \
           containers: [{{name: command, image: {image:?}, command: {command:?}}}]\n",
        on.name
    )
}
