//! `rustnetctl doctor`: prints the preflight's groups, each check with a tick, an exclamation mark or a cross, and the
//! remedies.

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::output::{Output, json, line};
use super::settings::{self, Whose};
use super::{Places, status};
use crate::args::Given;
use crate::doctor::finding::{Finding, Group, Level, Mark};
use crate::doctor::{self, Stage};

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only what must hold before the agent runs: for init containers. A cross is then what it cannot run with, and nothing else
    #[arg(long)]
    pre: bool,
    /// End with 0 whatever is found: for init containers before an agent, which waits for the remedies by itself and tells its Node
    #[arg(long)]
    warn_only: bool,
    /// A file with kube-proxy's configuration, or its ConfigMap: says what becomes of each setting [default: the ConfigMap
    /// kube-system/kube-proxy, while an agent runs]
    #[arg(long, value_name = "FILE")]
    kube_proxy_config: Option<PathBuf>,
    #[command(flatten)]
    settings: Given,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    ok: bool,
    groups: Vec<Shown<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    name: &'a str,
    checks: Vec<Check<'a>>,
}

impl<'a> Shown<'a> {
    fn of(group: &'a Group, stage: Stage) -> Self {
        let check = |it: &'a Finding| Check {
            id: it.id(group.name),
            name: &it.what,
            status: it.level.mark(stage),
            detail: &it.detail,
            hint: &it.hint,
        };
        Self { name: group.name, checks: group.findings.iter().map(check).collect() }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Check<'a> {
    /// The same in all releases; more than one finding may have it.
    id: String,
    name: &'a str,
    status: Mark,
    detail: &'a str,
    /// Empty where all is well.
    hint: &'a str,
}

/// Checks; true if there is no cross, or crosses are not to count.
pub fn run(find: impl Fn() -> Result<Places>, args: Args, out: &Output) -> Result<bool> {
    let places = find()?;
    let stage = if args.pre { Stage::Before } else { Stage::Running };
    let whose = if stage == Stage::Running { Whose::RunningAgent } else { Whose::OwnAlone };
    let groups = match settings::config(&places, args.settings, whose)? {
        Ok(config) => {
            let mut groups = doctor::examine(&config, stage, args.kube_proxy_config.as_deref());
            if stage == Stage::Running {
                groups.push(agent(&places));
            }
            groups
        }
        Err(refused) => doctor::without_config(&refused),
    };
    Ok(print(&groups, stage, out)? || args.warn_only)
}

/// What `rustnetctl status` finds.
fn agent(places: &Places) -> Group {
    let lines = status::check(places);
    let wrong = lines.iter().filter(|line| line.status != Mark::Ok).map(|line| {
        let level = if line.status == Mark::Bad { Level::Fault } else { Level::Warning };
        Finding::new(level, "status", &line.detail)
            .called(&line.name)
            .hint("the agent's log says why; `rustnetctl status` shows the whole")
    });
    let mut findings: Vec<_> = wrong.collect();
    if findings.is_empty() {
        findings
            .push(Finding::ok("status", format!("ready; all {} lines of `rustnetctl status` are well", lines.len())));
    }
    Group::new("Agent", findings)
}

fn print(groups: &[Group], stage: Stage, out: &Output) -> Result<bool> {
    let groups: Vec<_> = groups.iter().map(|group| Shown::of(group, stage)).collect();
    let all = || groups.iter().flat_map(|group| &group.checks);
    let count = |mark| all().filter(|check| check.status == mark).count();
    let (warnings, crosses) = (count(Mark::Warning), count(Mark::Bad));
    if out.is_json() {
        json(&Report { ok: crosses == 0, groups })?;
        return Ok(crosses == 0);
    }
    let width = all().map(|check| check.name.chars().count()).max().unwrap_or(0);
    for group in &groups {
        line(group.name)?;
        for check in &group.checks {
            line(&format!("  {} {:width$}  {}", out.sign(check.status), check.name, check.detail))?;
            if !check.hint.is_empty() {
                line(&format!("    {:width$}  -> {}", "", check.hint))?;
            }
        }
    }
    let some = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let warnings = some(warnings, "warning", "warnings");
    line(&format!("{} checks, {warnings}, {}", all().count(), some(crosses, "cross", "crosses")))?;
    Ok(crosses == 0)
}

#[cfg(test)]
mod tests {
    use super::{Finding, Group, Level, Report, Shown, Stage};
    use crate::cli::golden::assert_golden;

    #[test]
    fn its_json_is_an_interface() {
        let wrong = Finding::new(Level::Fault, "overlay port", "taken by the VXLAN device flannel.1");
        let wrong = wrong.called("overlay, UDP 8472").hint("give the agent another one with --overlay-port");
        let groups = [Group::new("Ports", vec![wrong, Finding::ok("node ports", "apart")])];
        let groups = groups.iter().map(|group| Shown::of(group, Stage::Running)).collect();
        assert_golden("doctor", &Report { ok: false, groups });
    }
}
