//! Programs that others have on the control group of all processes, and that keep those of socket calls out.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::finding::{Finding, Level};
use super::kernel::is_cgroup2;
use crate::bpf::cgroup::{self, Exclusive};
use crate::config::{Config, SocketLb};

/// The control group, and the programs there that let no other in.
pub struct Facts {
    dir: PathBuf,
    found: Result<Vec<Exclusive>>,
}

/// Looks; `None` without socket load-balancing, and where there is no such control group, which another check reports.
pub fn gather(config: &Config) -> Option<Facts> {
    let is_wanted = config.socket_lb != SocketLb::Off && is_cgroup2(&config.cgroup).unwrap_or(false);
    is_wanted.then(|| Facts { dir: config.cgroup.clone(), found: cgroup::exclusive(&config.cgroup) })
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let what = "programs of socket calls";
    let shown = facts.dir.display();
    match &facts.found {
        Err(error) => vec![Finding::unknown(what, error)],
        Ok(found) if found.is_empty() => vec![Finding::ok(what, format!("nothing on {shown} keeps them out"))],
        Ok(found) => found.iter().map(|it| kept_out(it, &facts.dir)).collect(),
    }
}

fn kept_out(it: &Exclusive, dir: &Path) -> Finding {
    let Exclusive { keeps_out, name, id } = it;
    let lost = cgroup::loss_without(keeps_out).unwrap_or("processes of this host do not reach its own node ports");
    let shown = dir.display();
    let text = format!(
        "program {id} ({name}) on {shown} keeps {keeps_out} out, for it was attached without the flag multi: {lost}"
    );
    Finding::new(Level::Warning, "programs of socket calls", text).hint(format!(
        "have its owner attach it with BPF_F_ALLOW_MULTI (`bpftool cgroup show {shown}`), or give --socket-lb off"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts(found: &[&'static str]) -> Facts {
        let exclusive = |keeps_out: &&'static str| Exclusive { keeps_out, name: "theirs".into(), id: 7 };
        Facts { dir: "/sys/fs/cgroup".into(), found: Ok(found.iter().map(exclusive).collect()) }
    }

    #[test]
    fn programs_that_let_no_other_in() {
        assert_well(&check(&facts(&[])));
        for (name, lost) in [("sock_bind4", "take node ports"), ("sock_connect6", "do not reach its own node ports")] {
            let found = check(&facts(&[name]));
            assert_only(&found, Level::Warning, "keeps sock", "BPF_F_ALLOW_MULTI");
            assert!(found[0].detail.contains(lost) && found[0].detail.contains("7 (theirs)"), "{:?}", found[0]);
        }
    }
}
