//! Kustomize and Helm make the same objects of the same files, and neither makes any unless asked.

use super::alerts::RULES;
use super::dashboard::DASHBOARD;
use super::query::JOB;
use super::{documents, read, root, text};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::{Command, Output};
use testkit::apiserver::kubernetes;

const ALL: &str = "monitoring.podMonitor.enabled=true,monitoring.rules.enabled=true,monitoring.dashboard.enabled=true";
const KINDS: [&str; 3] = ["ConfigMap rustnet-dashboard", "PodMonitor rustnet-agent", "PrometheusRule rustnet-agent"];

fn of(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn kustomize(directory: &str) -> Result<BTreeMap<String, Value>> {
    let kubectl = kubernetes("kubectl").unwrap_or_else(|_| "kubectl".into());
    let output = Command::new(&kubectl).arg("kustomize").arg(root().join(directory)).output();
    by_name(&of(output.with_context(|| kubectl.display().to_string())?)?)
}

fn helm(options: &[&str]) -> Result<Output> {
    let mut helm = Command::new("helm");
    helm.args(["template", "rustnet"]).arg(root().join("deploy/helm/rustnet"));
    // Built from its module, it knows of no Kubernetes version.
    helm.args(["--namespace", "rustnet-system", "--kube-version", "1.34.0"]).args(options);
    helm.output().context("helm: run `cargo xtask setup --with kubernetes`, which builds it")
}

fn by_name(yaml: &str) -> Result<BTreeMap<String, Value>> {
    let mut objects = BTreeMap::new();
    for object in documents(yaml)? {
        let key = format!("{} {}", text(&object["kind"], "kind")?, text(&object["metadata"]["name"], "name")?);
        ensure!(objects.insert(key.clone(), object).is_none(), "{key} twice");
    }
    Ok(objects)
}

/// What watches the agents, of all that the chart makes.
fn of_chart(options: &[&str]) -> Result<BTreeMap<String, Value>> {
    let mut objects = by_name(&of(helm(options)?)?)?;
    objects.retain(|key, _| KINDS.contains(&key.as_str()));
    Ok(objects)
}

#[test]
fn kustomize_makes_the_objects_of_the_files() -> Result<()> {
    let objects = kustomize("deploy/monitoring")?;
    assert_eq!(objects.keys().collect::<Vec<_>>(), KINDS);
    for (key, object) in &objects {
        assert_eq!(object["metadata"]["namespace"], "rustnet-system", "{key}");
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/part-of"], "rustnet", "{key}");
    }
    let [map, _, rule] = KINDS.map(|key| &objects[key]);
    assert_eq!(map["data"], json!({"rustnet.json": read(DASHBOARD)?}));
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    assert_eq!(rule["spec"], documents(&read(RULES)?)?[0]["spec"]);
    let base = kustomize("deploy")?;
    ensure!(!base.keys().any(|key| KINDS.contains(&key.as_str())), "a part of the base: {:?}", base.keys());
    Ok(())
}

/// The metrics port is the agents', and the job's name the one that alerts ask for.
#[test]
fn the_pod_monitor_selects_the_agents() -> Result<()> {
    let set = documents(&read("deploy/daemonset.yaml")?)?.pop().context("no DaemonSet")?;
    let template = &set["spec"]["template"];
    let objects = kustomize("deploy/monitoring")?;
    let monitor = &objects[KINDS[1]];
    assert_eq!(monitor["metadata"]["namespace"], set["metadata"]["namespace"]);
    for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().context("a selector")? {
        assert_eq!(&template["metadata"]["labels"][label], value, "{label}");
    }
    let job = text(&monitor["spec"]["jobLabel"], "jobLabel")?;
    assert_eq!(template["metadata"]["labels"][job], JOB);
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let ports = template["spec"]["containers"][0]["ports"].as_array().context("ports")?;
    ensure!(ports.iter().any(|port| port["name"] == endpoint["port"]), "{ports:?}");
    assert_eq!(endpoint["relabelings"][0]["targetLabel"], "node");
    Ok(())
}

#[test]
fn the_chart_makes_nothing_of_it_by_default_and_all_of_it_when_asked() -> Result<()> {
    assert_eq!(of_chart(&[])?, BTreeMap::new());
    assert_eq!(of_chart(&["--set", ALL])?, kustomize("deploy/monitoring")?);
    for (part, key) in [("dashboard", KINDS[0]), ("podMonitor", KINDS[1]), ("rules", KINDS[2])] {
        let objects = of_chart(&["--set", &format!("monitoring.{part}.enabled=true")])?;
        assert_eq!(objects.keys().collect::<Vec<_>>(), [key]);
    }
    Ok(())
}

#[test]
fn the_chart_takes_labels_annotations_intervals_and_a_runbook() -> Result<()> {
    let parts = ["podMonitor", "rules", "dashboard"].map(|part| {
        let of = format!("monitoring.{part}");
        format!("{of}.labels.release=prom,{of}.annotations.folder=net")
    });
    let more = "monitoring.podMonitor.interval=1m30s,monitoring.rules.interval=45s,\
                monitoring.rules.runbookUrl=https://wiki.example.org/rustnet";
    let objects = of_chart(&["--set", ALL, "--set", &parts.join(","), "--set", more])?;
    for (key, object) in &objects {
        assert_eq!(object["metadata"]["labels"]["release"], "prom", "{key}");
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/part-of"], "rustnet", "{key}");
        assert_eq!(object["metadata"]["annotations"], json!({"folder": "net"}), "{key}");
    }
    let [map, monitor, rule] = KINDS.map(|key| &objects[key]);
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["interval"], "1m30s");
    for group in rule["spec"]["groups"].as_array().context("groups")? {
        assert_eq!(group["interval"], "45s");
        for alert in group["rules"].as_array().context("rules")? {
            let url = text(&alert["annotations"]["runbook_url"], "runbook_url")?;
            let name = text(&alert["alert"], "alert")?.to_lowercase();
            assert_eq!(url, format!("https://wiki.example.org/rustnet#{name}"));
        }
    }
    Ok(())
}

#[test]
fn the_chart_refuses_what_cannot_work() -> Result<()> {
    for (set, named) in [
        ("monitoring.podMonitor.interval=soon", "interval"),
        ("monitoring.rules.runbookUrl=wiki", "runbookUrl"),
        ("monitoring.podMonitor.labels.a=1", "labels"),
        ("monitoring.alerts.enabled=true", "alerts"),
        ("monitoring.podMonitor.enabled=true,config.metricsAddr=off", "config.metricsAddr is off"),
        ("monitoring.podMonitor.enabled=true,config.metricsAddr=0.0.0.0:9090", "config.metricsAddr is 0.0.0.0:9090"),
    ] {
        let output = helm(&["--set", set])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains(named), "--set {set}: {said}");
    }
    of(helm(&["--set", "monitoring.podMonitor.enabled=true,config.metricsAddr=0.0.0.0:9962"])?)?;
    Ok(())
}
