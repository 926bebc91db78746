//! The packet mark: who else uses its bits on this host. Rules of netfilter are not read; the devices of those who make them are
//! looked for instead.

use anyhow::Result;

use super::finding::{Finding, Level};
use crate::config::{Config, PacketMark};
use crate::net::link;
use crate::net::netlink::Socket;
use crate::net::rule::{self, MarkRule};

/// Bits whose use others have documented, and how the name of a device of theirs begins (empty: they may be anywhere).
const KNOWN: [(&str, &str, u32); 8] = [
    ("kube-proxy and kubelet", "", 0xc000),
    ("the CNI plugin portmap", "", 0x2000),
    ("Calico", "cali", 0xffff_0000),
    // Its identities and what they are; it sets marks as a whole, and never one with the default mark's bits.
    ("Cilium", "cilium_", 0xffff_0f00),
    ("Tailscale", "tailscale", 0x00ff_0000),
    ("kube-router", "kube-bridge", 0x0003_0000),
    ("Weave Net", "weave", 0x0006_0000),
    ("the AWS VPC CNI", "eni", 0x0000_0080),
];
/// Marks of packets as a whole.
const WHOLE: [(&str, &str, u32); 2] = [("Mullvad", "wg0-mullvad", 0x6d6f_6c65), ("wg-quick", "wg", 51_820)];
/// A mark of fewer bits is likely to be set by others for their own ends.
const FEW_BITS: u32 = 4;

/// What was found.
pub struct Facts {
    /// The mark as configured.
    pub mark: PacketMark,
    /// Rules that select packets by their mark.
    pub rules: Result<Vec<MarkRule>>,
    /// Names of the host's devices.
    pub links: Vec<String>,
}

/// Looks.
pub fn gather(config: &Config) -> Facts {
    let mut socket = Socket::open().map_err(anyhow::Error::from);
    let mut with = |look: fn(&mut Socket) -> Result<Vec<MarkRule>>| match &mut socket {
        Ok(socket) => look(socket),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    let rules = with(rule::list_marked);
    let links = socket.and_then(|mut socket| link::list(&mut socket)).unwrap_or_default();
    Facts { mark: config.packet_mark, rules, links: links.into_iter().map(|link| link.name).collect() }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    const WHAT: &str = "packet mark";
    let mark = facts.mark;
    let hint = "give all agents another --packet-mark, whose bits are free on all nodes";
    let warning = |detail: String| Finding::new(Level::Warning, WHAT, detail).hint(hint);
    let mut found = Vec::new();
    if mark.mask.count_ones() < FEW_BITS {
        let bits = mark.mask.count_ones();
        found.push(warning(format!("{mark} has {bits} of 32 bits: a mark of other software can pass for it")));
    }
    let device = |prefix: &str| facts.links.iter().find(|name| prefix.is_empty() || name.starts_with(prefix));
    for (who, prefix, bits) in KNOWN.into_iter().filter(|(.., bits)| bits & mark.mask != 0) {
        if prefix.is_empty() {
            found.push(warning(format!("{mark} has bits that {who} use ({bits:#x})")));
        } else if let Some(name) = device(prefix) {
            found.push(warning(format!("{mark} has bits that {who} uses ({bits:#x}), whose device {name} is here")));
        }
    }
    for (who, prefix, whole) in WHOLE.into_iter().filter(|(.., whole)| whole & mark.mask == mark.value) {
        if let Some(name) = device(prefix) {
            found.push(warning(format!("{whole:#x}, the mark of {who} (device {name}), passes for {mark}")));
        }
    }
    match &facts.rules {
        Ok(rules) => found.extend(rules.iter().filter_map(|rule| clash(mark, *rule)).map(warning)),
        Err(error) => found.push(Finding::unknown(WHAT, error)),
    }
    if found.is_empty() {
        found.push(Finding::ok(WHAT, format!("{mark}, no other user found")));
    }
    found
}

/// What a rule and the mark have to do with one another.
fn clash(mark: PacketMark, rule: MarkRule) -> Option<String> {
    let MarkRule { priority, mark: value, mask } = rule;
    let name = format!("ip rule {priority} (fwmark {value:#x}/{mask:#x})");
    // The kernel keeps a value as it was given, and compares the bits of the mask alone (`fib_rule_match`).
    let value = value & mask;
    if value & mark.mask == mark.value && mark.mask & !mask == 0 {
        return Some(format!("packets that {name} selects pass for {mark}"));
    }
    // The mark matters to a rule that selects a packet only with it, or only without it.
    let (selects_unmarked, selects_marked) = (value == 0, value == mark.value & mask);
    (selects_unmarked != selects_marked).then(|| format!("{name} selects packets by bits of the mark {mark}"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    fn facts(rules: &[(u32, u32)], links: &[&str]) -> Facts {
        let rule = |(mark, mask): &(u32, u32)| MarkRule { priority: 100, mark: *mark, mask: *mask };
        Facts {
            mark: PacketMark::default(),
            rules: Ok(rules.iter().map(rule).collect()),
            links: links.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn the_default_mark_is_free_next_to_all_known_users() {
        let links =
            ["lo", "cali1234", "cilium_host", "tailscale0", "wg0", "wg0-mullvad", "weave", "eni5", "kube-bridge"];
        let rules = [
            (0x4_0000, 0xff_0000),
            (51_820, u32::MAX),
            (0x1, u32::MAX),
            (0x200, 0xf00),
            (0x200, u32::MAX),
            (0x80, 0x80),
            (0, 0x4001),
        ];
        assert_well(&check(&facts(&rules, &links)));
    }

    #[test]
    fn one_clash_at_a_time() {
        let calico = PacketMark { value: 0x5200_0000, mask: 0xff00_0000 };
        for (facts, detail) in [
            (Facts { mark: calico, ..facts(&[], &["lo", "cali1"]) }, "Calico uses (0xffff0000), whose device cali1"),
            (Facts { mark: calico, ..facts(&[], &["cilium_net"]) }, "Cilium"),
            (Facts { mark: PacketMark { value: 0x50, mask: 0xff }, ..facts(&[], &["eni0"]) }, "AWS"),
            (
                Facts { mark: PacketMark { value: 0x4010, mask: 0x40ff }, ..facts(&[], &[]) },
                "kube-proxy and kubelet use",
            ),
            (Facts { mark: PacketMark { value: 0x10, mask: 0x10 }, ..facts(&[], &[]) }, "has 1 of 32 bits"),
            (Facts { mark: PacketMark { value: 0x0c65, mask: 0x1fff }, ..facts(&[], &["wg0-mullvad"]) }, "Mullvad"),
            (facts(&[(0x1052, u32::MAX)], &[]), "pass for 0x1052/0x107f"),
            (facts(&[(0x50, 0x70)], &[]), "ip rule 100 (fwmark 0x50/0x70) selects packets by bits of the mark"),
            (facts(&[(0, 0x4002)], &[]), "ip rule 100 (fwmark 0x0/0x4002)"),
            // Bits that it does not compare select nothing, whatever is written there.
            (facts(&[(0x1052, 0x7f)], &[]), "ip rule 100 (fwmark 0x1052/0x7f) selects packets by bits of the mark"),
            // Of the mark's bits it compares those that are set, and lets others through.
            (facts(&[(0x1052, 0x1052)], &[]), "ip rule 100 (fwmark 0x1052/0x1052) selects packets by bits of the mark"),
        ] {
            assert_only(&check(&facts), Level::Warning, detail, "--packet-mark");
        }
        let unreadable = Facts { rules: Err(anyhow::anyhow!("EPERM")), ..facts(&[], &[]) };
        assert_only(&check(&unreadable), Level::Warning, "not checked", "root");
    }
}
