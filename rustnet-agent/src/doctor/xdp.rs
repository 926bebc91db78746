//! Which uplinks forward known flows from outside to Services in their driver, and why others do not.

use anyhow::Result;

use super::Stage;
use super::finding::{Finding, Level, split_remedy};
use crate::bpf::xdp;
use crate::config::{Config, Xdp};
use crate::net::host::Host;
use crate::ways::Ways;

/// What was found.
pub struct Facts {
    /// The uplinks: index and name, and why one must not have the program.
    pub uplinks: Vec<(u32, String, Option<String>)>,
    /// Devices that have the program; `None` before an agent runs.
    pub attached: Option<Result<Vec<u32>>>,
}

/// Looks; `None` where no device is to have the program.
pub fn gather(config: &Config, host: &Host, ways: &Ways, stage: Stage) -> Option<Facts> {
    let uplinks = || {
        let unfit = |index| xdp::unfit(config.xdp, &host.links, index);
        ways.place.uplinks.iter().map(|it| (it.ifindex, it.name.clone(), unfit(it.ifindex))).collect()
    };
    (config.xdp != Xdp::Off).then(|| Facts {
        uplinks: uplinks(),
        attached: (stage == Stage::Running).then(|| xdp::attached(&config.bpffs)),
    })
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    facts.uplinks.iter().map(|(index, name, unfit)| uplink(facts, *index, name, unfit.as_deref())).collect()
}

fn uplink(facts: &Facts, index: u32, name: &str, unfit: Option<&str>) -> Finding {
    let what = "XDP";
    if let Some(unfit) = unfit {
        let (why, hint) = split_remedy(unfit);
        return Finding::new(Level::Warning, what, format!("not on {name}: {why}")).hint(hint);
    }
    match &facts.attached {
        None => Finding::ok(what, format!("for {name}, if its driver has it")),
        Some(Err(error)) => Finding::unknown(what, error),
        Some(Ok(attached)) if attached.contains(&index) => Finding::ok(what, format!("on {name}")),
        Some(Ok(_)) => Finding::new(Level::Warning, what, format!("not on {name}; TC forwards the same packets"))
            .hint("the agent's log says why; if its driver has no XDP, give --xdp off"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts(attached: Option<Result<Vec<u32>>>) -> Facts {
        Facts { uplinks: vec![(2, "eth0".to_owned(), None)], attached }
    }

    #[test]
    fn each_uplink_is_judged() {
        assert_well(&check(&facts(None)));
        assert_well(&check(&facts(Some(Ok(vec![2])))));
        assert_only(&check(&facts(Some(Ok(vec![3])))), Level::Warning, "not on eth0", "--xdp off");
        let unfit = Some("it is a veth; give --xdp off".to_owned());
        let unfit = Facts { uplinks: vec![(2, "eth0".to_owned(), unfit)], attached: None };
        assert_only(&check(&unfit), Level::Warning, "not on eth0: it is a veth", "--xdp off");
    }
}
