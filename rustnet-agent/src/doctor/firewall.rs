//! What the host's firewall does to rustnet's packets: whether it drops the overlay's, and whether it checks reverse paths.

use anyhow::Result;

use super::finding::{Finding, Level};
use crate::config::{Config, OverlayPath};
use crate::leftovers::firewall::{self, Packet, Ruleset};
use crate::model::Family;
use crate::net::ipsec::Ipsec;
use crate::reconcile::overlay_path::Choice;
use crate::ways::Ways;

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const FAMILIES: [u8; 2] = [2, 10];

/// What was found.
pub struct Facts {
    /// All rules.
    pub rules: Result<Ruleset>,
    /// The overlay's packets, as they come from other nodes; none without an overlay.
    pub overlay: Option<Packet>,
    /// Who writes and takes off the overlay's headers. No chain judges what the programs take.
    pub path: OverlayPath,
}

/// Looks.
pub fn gather(config: &Config, ways: &Ways) -> Facts {
    // The first one has the node's address.
    let device = ways.place.uplinks.first().map(|it| it.name.clone());
    let overlay = device.filter(|_| config.routing.has_overlay()).map(|device| Packet {
        family: FAMILIES[usize::from(ways.overlay_family() == Family::V6)],
        device,
        port: config.overlay_port,
    });
    Facts { rules: firewall::read(), overlay, path: Choice::new(config.overlay_path, Ipsec::read()).path() }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let rules = match &facts.rules {
        Ok(rules) => rules,
        Err(error) => return vec![Finding::unknown("rules", error)],
    };
    let mut found = Vec::new();
    if let Some(packet) = &facts.overlay {
        let (what, port) = ("overlay", packet.port);
        found.push(match rules.dropped_by(packet) {
            None => Finding::ok(what, format!("no chain is known to drop UDP {port}")),
            Some(chain) => {
                let lost = match facts.path {
                    OverlayPath::Device => "their pods are not reached from here",
                    OverlayPath::Programs => {
                        "what the programs leave to the device is lost (fragments, segmented UDP, errors), and the rest passes"
                    }
                };
                let detail = format!("the chain {chain} drops UDP {port} from other nodes: {lost}");
                let own_tool = if chain.is_legacy() {
                    format!("iptables-legacy -I {} -p udp --dport {port} -j ACCEPT", chain.name)
                } else {
                    format!("nft insert rule {chain} udp dport {port} accept")
                };
                let meant = match facts.path {
                    OverlayPath::Device => "",
                    OverlayPath::Programs => "; if the rule is meant, give --overlay-path device",
                };
                let hint = format!(
                    "let it accept UDP {port} from the nodes: `{own_tool}`, `ufw allow {port}/udp` or `firewall-cmd --permanent \
                     --add-port={port}/udp`{meant}"
                );
                Finding::new(Level::Warning, what, detail).hint(hint)
            }
        });
    }
    let mut checks: Vec<_> = FAMILIES.into_iter().flat_map(|family| rules.reverse_path_checks(family)).collect();
    checks.sort();
    checks.dedup();
    for chain in checks {
        let detail = format!(
            "the chain {chain} drops packets whose source is reached by another device (`fib saddr . iif oif missing drop`): the \
             host gets no answers from Services with endpoints here"
        );
        let hint =
            "switch that check off (firewalld: IPv6_rpfilter=no; NixOS: networking.firewall.checkReversePath = false)";
        found.push(Finding::new(Level::Warning, "reverse path", detail).hint(hint));
    }
    found
}
