//! Who writes and takes off the overlay's headers, and what on this host keeps the programs from it.

use anyhow::Result;
use rustnet_common::config::flags;

use super::Stage;
use super::finding::{Finding, Level, split_remedy};
use crate::bpf::probe;
use crate::bpf::store::node_config::NodeConfigStore;
use crate::config::{Config, OverlayPath};
use crate::model::Family;
use crate::net::ipsec::Ipsec;
use crate::reconcile::overlay_path::Choice;
use crate::ways::Ways;

/// What was found.
pub struct Facts {
    /// What it should be.
    pub choice: Choice,
    /// What the programs do; `None` before an agent runs.
    pub used: Option<Result<OverlayPath>>,
    /// There are pods of another family than that of the outer packets.
    pub is_mixed: bool,
    /// The kernel can take off headers of the other family.
    pub takes_off_other_family: Result<bool>,
}

/// Looks; `None` without an overlay.
pub fn gather(config: &Config, ways: &Ways, stage: Stage) -> Option<Facts> {
    let outer = ways.overlay_family();
    let is_mixed = [Family::V4, Family::V6].into_iter().any(|family| family != outer && ways.has_pods(family));
    let used = || NodeConfigStore::open(&config.bpffs).and_then(|store| store.read()).map(|it| path_in(it.flags));
    config.routing.has_overlay().then(|| Facts {
        choice: Choice::new(config.overlay_path, Ipsec::read()),
        used: (stage == Stage::Running).then(used),
        is_mixed,
        takes_off_other_family: probe::decap_l3(),
    })
}

/// What the flags of `rn_config` say.
pub fn path_in(flags: u16) -> OverlayPath {
    if flags & flags::ENCAPSULATE == 0 { OverlayPath::Device } else { OverlayPath::Programs }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![path(facts)];
    if facts.is_mixed && facts.choice.is_programs() {
        let what = "other family";
        found.push(match &facts.takes_off_other_family {
            Err(error) => Finding::unknown(what, error),
            Ok(true) => Finding::ok(what, "pods of both families go past the device"),
            // The device does it; nothing need be done.
            Ok(false) => {
                Finding::ok(what, "pods of the other family than the Nodes' addresses have the device (before 6.3)")
            }
        });
    }
    found
}

fn path(facts: &Facts) -> Finding {
    const WHAT: &str = "path";
    match &facts.used {
        Some(Err(error)) => return Finding::unknown(WHAT, error),
        Some(Ok(used)) => {
            if let Some(text) = facts.choice.mismatch(*used) {
                let (detail, hint) = text.split_once("; ").unwrap_or((&text, ""));
                return Finding::new(Level::Warning, WHAT, detail).hint(hint);
            }
        }
        None => {}
    }
    let choice = facts.choice.to_string();
    match &facts.choice {
        Choice::Programs => Finding::ok(WHAT, "programs; rules of input and output chains do not judge their packets"),
        Choice::Device => Finding::ok(WHAT, choice),
        Choice::DeviceForIpsec(Ipsec::Unknown(_)) => {
            let text = facts.choice.problem().unwrap_or(choice);
            let (detail, hint) = split_remedy(&text);
            Finding::new(Level::Warning, WHAT, detail).hint(hint)
        }
        Choice::DeviceForIpsec(_) => {
            let detail = format!("{choice}: packets of the programs would not pass them");
            Finding::new(Level::Warning, WHAT, detail).hint(
                "if they are not for packets between nodes, remove them (`ip xfrm policy`, `ip xfrm policy getdefault`); if the device \
                 is meant, give --overlay-path device",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;
    use crate::net::ipsec::Policies;

    fn facts() -> Facts {
        Facts { choice: Choice::Programs, used: None, is_mixed: true, takes_off_other_family: Ok(true) }
    }

    fn ipsec() -> Choice {
        Choice::DeviceForIpsec(Ipsec::Policies(Policies { incoming: 1, outgoing: 2, refuses_others: false }))
    }

    #[test]
    fn what_is_as_it_should_be_is_well() {
        let used = |path| Some(Ok(path));
        assert_well(&check(&facts()));
        assert_well(&check(&Facts { used: used(OverlayPath::Programs), ..facts() }));
        assert_well(&check(&Facts { choice: Choice::Device, used: used(OverlayPath::Device), ..facts() }));
        let before_6_3 = check(&Facts { takes_off_other_family: Ok(false), ..facts() });
        assert_well(&before_6_3);
        assert!(before_6_3[1].detail.contains("before 6.3"), "{before_6_3:#?}");
        let failed = || Err(anyhow::anyhow!("EPERM"));
        assert_well(&check(&Facts { is_mixed: false, takes_off_other_family: failed(), ..facts() }));
        assert_well(&check(&Facts { choice: Choice::Device, takes_off_other_family: failed(), ..facts() }));
    }

    #[test]
    fn one_fault_at_a_time() {
        let failed = || anyhow::anyhow!("EPERM");
        let unknown = || Choice::DeviceForIpsec(Ipsec::Unknown("EPERM".into()));
        let used = |path| Some(Ok(path));
        for (facts, detail, hint) in [
            (
                Facts { choice: ipsec(), ..facts() },
                "device (IPsec policies on this host: 1 in, 2 out)",
                "ip xfrm policy",
            ),
            (Facts { choice: unknown(), ..facts() }, "EPERM", "CAP_NET_ADMIN"),
            (
                Facts { choice: ipsec(), used: used(OverlayPath::Device), ..facts() },
                "1 in, 2 out",
                "--overlay-path device",
            ),
            (Facts { choice: ipsec(), used: used(OverlayPath::Programs), ..facts() }, "programs, but", "agent"),
            (Facts { used: used(OverlayPath::Device), ..facts() }, "device, but it should be programs", "agent"),
            (Facts { used: Some(Err(failed())), ..facts() }, "EPERM", "root"),
            (Facts { takes_off_other_family: Err(failed()), ..facts() }, "EPERM", "root"),
        ] {
            assert_only(&check(&facts), Level::Warning, detail, hint);
        }
    }

    #[test]
    fn only_one_bit_tells() {
        assert_eq!(path_in(flags::ENCAPSULATE), OverlayPath::Programs);
        assert_eq!(path_in(!flags::ENCAPSULATE), OverlayPath::Device);
    }
}
