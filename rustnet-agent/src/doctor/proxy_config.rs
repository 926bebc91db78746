//! kube-proxy's own configuration: what becomes of each setting that differs from its default, from a file or from the ConfigMap
//! that kubeadm makes.

mod fields;
mod parse;

use super::Stage;
use super::api;
use super::finding::{Finding, Level};
use crate::config::Config;
use fields::Becomes;
use parse::{Chosen, Parsed, parse};
use std::collections::BTreeMap;
use std::path::Path;

/// Where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// In a file that the command line names.
    File(String),
    /// In the ConfigMap.
    ConfigMap(String),
    /// There is none to be looked for: no API server, no such ConfigMap, or the preflight.
    Nothing,
    /// Who asks may not read the ConfigMap.
    Forbidden(String),
    /// It cannot be read.
    Unreadable(String),
}

/// What was found.
pub struct Facts {
    /// The text of the configuration.
    pub found: Found,
    /// The agent's settings that somebody chose, by flag.
    pub agent: BTreeMap<String, Vec<String>>,
}

/// Looks. Before the agent starts, only into a file: each agent would ask the API server, and in a rollout hundreds begin together.
pub fn gather(config: &Config, stage: Stage, file: Option<&Path>) -> Facts {
    let found = match file {
        Some(path) => match std::fs::read_to_string(path) {
            Ok(text) => Found::File(text),
            Err(error) => Found::Unreadable(format!("{}: {error}", path.display())),
        },
        None if stage == Stage::Before => Found::Nothing,
        None => match api::kube_proxy_config(config) {
            Ok(Some(text)) => Found::ConfigMap(text),
            Ok(None) => Found::Nothing,
            Err(api::Reached::Forbidden(why)) => Found::Forbidden(why),
            Err(why) => Found::Unreadable(format!("ConfigMap kube-system/kube-proxy: {}", api::words(&why))),
        },
    };
    Facts { found, agent: config.chosen.clone() }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    // Whoever names a file wants it to be right; a ConfigMap may be of a newer kube-proxy.
    let (text, severity) = match &facts.found {
        Found::File(text) => (text, Level::Fault),
        Found::ConfigMap(text) => (text, Level::Warning),
        Found::Nothing => return Vec::new(),
        Found::Forbidden(why) => {
            return vec![Finding::ok("read", format!("not read: {why}; --kube-proxy-config reads it from a file"))];
        }
        Found::Unreadable(why) => {
            let hint = "save it (kubectl -n kube-system get configmap kube-proxy -o yaml) and give it with --kube-proxy-config FILE";
            return vec![Finding::new(Level::Warning, "read", why).hint(hint)];
        }
    };
    let Parsed { chosen, errors } = match parse(text) {
        Ok(parsed) => parsed,
        Err(why) => {
            let hint = "give the file that kube-proxy reads with --config, or its ConfigMap";
            return vec![Finding::new(severity, "read", why).hint(hint)];
        }
    };
    let errors = errors.into_iter().map(|error| {
        Finding::new(severity, "field", error)
            .hint("correct it: kube-proxy refuses or ignores it, and so nothing carries over")
    });
    let mut findings: Vec<_> = errors.chain(chosen.iter().map(|chosen| judge(chosen, &facts.agent))).collect();
    if findings.is_empty() {
        findings.push(Finding::ok("settings", "all at kube-proxy's defaults"));
    }
    findings
}

fn judge(chosen: &Chosen, agent: &BTreeMap<String, Vec<String>>) -> Finding {
    let Chosen { field, texts } = chosen;
    let finding = |level, detail: String| {
        Finding::new(level, "setting", detail).called(format!("{} {}", field.path, texts.join(",")))
    };
    match field.becomes {
        Becomes::Nothing(why) => finding(Level::Ok, format!("has no effect: {why}")),
        Becomes::Changes(is, hint) => finding(Level::Warning, format!("is not so: {is}")).hint(hint),
        Becomes::Flag(flag, translate) => {
            let wanted = translate(texts);
            let setting = format!("--{flag}={}", wanted.join(","));
            if agent.get(flag).is_some_and(|has| has.iter().all(|it| wanted.contains(it)) && has.len() == wanted.len())
            {
                return finding(Level::Ok, format!("carries over: the agent has {setting}"));
            }
            finding(Level::Warning, format!("carries over as {setting}"))
                .hint(format!("give the agent {setting}, if it is wanted"))
        }
    }
}

#[cfg(test)]
mod tests;
