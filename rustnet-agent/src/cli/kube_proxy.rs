//! `rustnetctl cleanup --kube-proxy`: removes what kube-proxy left in this network namespace, and nothing else.

use anyhow::Result;
use serde::Serialize;

use super::output::{Output, json, line};
use crate::leftovers::kube_proxy::{Leftovers, METRICS_PORT};
use crate::leftovers::sockets::{self, Proto};

/// How to remove the rest.
const LEGACY: &str = "run `kube-proxy --cleanup` from kube-proxy's own image, which brings iptables-legacy";
const IPVS: &str = "it is not certainly kube-proxy's; if nobody else uses it, `ipvsadm --delete-service` removes it";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    dry_run: bool,
    removed: Vec<String>,
    /// What is there and has to go by other means.
    left: Vec<Left>,
}

#[derive(Serialize)]
struct Left {
    what: String,
    hint: &'static str,
}

/// Removes, or only lists; `confirm` may refuse. True if nothing is left.
pub fn run(dry_run: bool, confirm: impl FnOnce(&str) -> Result<()>, out: &Output) -> Result<bool> {
    let found = Leftovers::find()?;
    // By default, only kube-proxy serves there.
    if sockets::listeners()?.iter().any(|it| it.proto == Proto::Tcp && it.port == METRICS_PORT) {
        eprintln!(
            "warning: somebody serves port {METRICS_PORT}, as kube-proxy does: delete its DaemonSet first, it puts everything back"
        );
    }
    if !dry_run && !found.is_empty() {
        confirm(
            "This removes kube-proxy's tables, chains, the rules that lead to them, its sets and virtual servers, and its device \
             (--dry-run lists them).",
        )?;
        found.remove()?;
    }
    let report = Report { dry_run, removed: found.names(), left: left(&found) };
    if out.is_json() {
        json(&report)?;
    } else {
        let verb = if dry_run { "would remove" } else { "removed" };
        report.removed.iter().try_for_each(|what| line(&format!("{verb} {what}")))?;
        if report.removed.is_empty() && report.left.is_empty() {
            line("nothing of kube-proxy's is left here")?;
        }
        report.left.iter().for_each(|left| eprintln!("left: {}: {}", left.what, left.hint));
    }
    Ok(report.left.is_empty() && (!dry_run || report.removed.is_empty()))
}

fn left(found: &Leftovers) -> Vec<Left> {
    let mut left: Vec<_> = found
        .legacy
        .iter()
        .map(|chain| Left { what: format!("chain {chain} of iptables-legacy"), hint: LEGACY })
        .collect();
    left.extend(found.other_servers.iter().map(|server| Left { what: server.to_string(), hint: IPVS }));
    left
}

#[cfg(test)]
mod tests {
    use super::{IPVS, Left, Report};
    use crate::cli::golden::assert_golden;

    #[test]
    fn its_json_is_an_interface() {
        let left = vec![Left { what: "virtual server TCP 192.0.2.1:80 of IPVS".into(), hint: IPVS }];
        assert_golden("cleanup-kube-proxy", &Report { dry_run: true, removed: vec!["device kube-ipvs0".into()], left });
    }
}
