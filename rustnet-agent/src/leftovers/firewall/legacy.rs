//! The table `filter` of the older iptables ("legacy"), as chains of the same kind as nftables'. Layouts are of
//! `linux/netfilter_ipv4/ip_tables.h` and its sister of IPv6.

use std::collections::HashMap;

use anyhow::Result;

use super::{Chain, ChainName, Comparison, Expression, Hook, Load, Verdict};
use crate::leftovers::iptables::{self, Table};
use crate::leftovers::nftables::Family;

/// How its table is called, next to nftables' own.
pub const TABLE: &str = "filter (iptables-legacy)";
/// `NF_INET_LOCAL_IN`.
const LOCAL_IN: usize = 1;
/// Length of a match and of a target before their data, and where their name is.
const HEADER: (usize, std::ops::Range<usize>) = (32, 2..31);

/// Where things are in an entry.
struct Layout {
    family: u8,
    /// Masks of source and destination.
    masks: std::ops::Range<usize>,
    in_device: usize,
    in_mask: usize,
    out_mask: usize,
    proto: usize,
    inverted: usize,
    /// Octet and bit of "goto".
    goto: (usize, u8),
    /// Offset of the target; behind it, of the next entry.
    target: usize,
    matches: usize,
}

const LAYOUTS: [(Family, Layout); 2] = [
    (
        Family::Ip,
        Layout {
            family: 2,
            masks: 8..16,
            in_device: 16,
            in_mask: 48,
            out_mask: 64,
            proto: 80,
            inverted: 83,
            goto: (82, 2),
            target: 88,
            matches: 112,
        },
    ),
    (
        Family::Ip6,
        Layout {
            family: 10,
            masks: 32..64,
            in_device: 64,
            in_mask: 96,
            out_mask: 112,
            proto: 128,
            inverted: 132,
            goto: (131, 4),
            target: 140,
            matches: 168,
        },
    ),
];

/// The chains of both families; none where the table is not in use.
///
/// # Errors
/// No rights to read it.
pub fn read() -> Result<Vec<(ChainName, Chain)>> {
    let mut all = Vec::new();
    for (family, layout) in &LAYOUTS {
        if let Some(table) = iptables::filter(*family)? {
            all.extend(chains(layout, &table));
        }
    }
    Ok(all)
}

/// Takes a table apart. A chain begins with an entry whose target is called `ERROR`; the built-in ones where a hook says so.
fn chains(layout: &Layout, table: &Table) -> Vec<(ChainName, Chain)> {
    let entries = entries(layout, &table.entries);
    let input = table.hooks[LOCAL_IN] as usize;
    let mut starts = HashMap::from([(input, "INPUT".to_owned())]);
    for (at, entry) in &entries {
        if let Target::Begin(name) = target(layout, entry) {
            starts.insert(at + entry.len(), name);
        }
    }
    // Other hooks' chains, and the end of the table.
    let others = table.hooks.iter().map(|at| *at as usize).filter(|at| *at != input);
    let ends: Vec<usize> = others.chain(starts.keys().copied()).collect();
    starts
        .iter()
        .map(|(start, name)| {
            let within = entries.iter().skip_while(|(at, _)| at < start);
            let within = within.take_while(|(at, _)| at == start || !ends.contains(at));
            let rules = within.filter_map(|(_, entry)| rule(layout, entry, &starts)).collect();
            let hook = (*start == input).then_some(Hook::Input);
            let name = ChainName { family: layout.family, table: TABLE.into(), name: name.clone() };
            (name, Chain { hook, is_policy_drop: false, rules })
        })
        .collect()
}

/// Each entry with its offset.
fn entries<'a>(layout: &Layout, mut rest: &'a [u8]) -> Vec<(usize, &'a [u8])> {
    let mut all = Vec::new();
    let mut at = 0;
    while let Some(next) = half(rest, layout.target + 2) {
        let Some(entry) = rest.get(..usize::from(next)).filter(|entry| entry.len() > layout.matches) else { break };
        all.push((at, entry));
        at += entry.len();
        rest = &rest[entry.len()..];
    }
    all
}

enum Target {
    /// A chain of this name begins behind it.
    Begin(String),
    /// A number as the kernel has it: a verdict, or where to go.
    Standard(i32),
    Named(String),
}

fn target(layout: &Layout, entry: &[u8]) -> Target {
    let target = half(entry, layout.target).and_then(|at| entry.get(usize::from(at)..)).unwrap_or_default();
    let data = target.get(HEADER.0..).unwrap_or_default();
    match name(target.get(HEADER.1).unwrap_or_default()).as_str() {
        "" => Target::Standard(data.get(..4).map_or(0, |it| i32::from_ne_bytes([it[0], it[1], it[2], it[3]]))),
        "ERROR" => Target::Begin(name(data)),
        other => Target::Named(other.to_owned()),
    }
}

/// A rule's expressions; `None` for what only marks the begin of a chain.
fn rule(layout: &Layout, entry: &[u8], starts: &HashMap<usize, String>) -> Option<Vec<Expression>> {
    let mut all = Vec::new();
    let inverted = entry[layout.inverted];
    let is_set = |range: std::ops::Range<usize>| entry[range].iter().any(|it| *it != 0);
    let how = |bit: u8| if inverted & bit == 0 { Comparison::Equal } else { Comparison::Unequal };
    if entry[layout.proto] != 0 {
        all.push(Expression::Load(1, Load::Meta(16)));
        all.push(Expression::Compare(1, how(0x40), vec![entry[layout.proto]]));
    }
    let mask = &entry[layout.in_mask..layout.in_mask + libc::IFNAMSIZ];
    let length = mask.iter().take_while(|it| **it != 0).count();
    if length > 0 {
        all.push(Expression::Load(1, Load::Meta(6)));
        all.push(Expression::Compare(1, how(0x01), entry[layout.in_device..layout.in_device + length].to_vec()));
    }
    let leaves_by = layout.out_mask..layout.out_mask + libc::IFNAMSIZ;
    if is_set(layout.masks.clone()) || is_set(leaves_by) {
        all.push(Expression::Unknown);
    }
    let matches_end = usize::from(half(entry, layout.target)?);
    let mut rest = entry.get(layout.matches..matches_end)?;
    while let Some(size) = half(rest, 0).map(usize::from).filter(|size| *size >= HEADER.0) {
        let one = rest.get(..size)?;
        all.push(Expression::Match(name(&one[HEADER.1]), one[HEADER.0..].to_vec()));
        rest = &rest[size..];
    }
    let (octet, bit) = layout.goto;
    all.push(match target(layout, entry) {
        Target::Begin(_) => return None,
        Target::Named(name) if name == "REJECT" => Expression::Verdict(Verdict::Drop),
        Target::Named(name) if name == "NFQUEUE" => Expression::Unknown,
        Target::Named(_) => Expression::Pass,
        Target::Standard(-1) => Expression::Verdict(Verdict::Drop),
        Target::Standard(-2) => Expression::Verdict(Verdict::Accept),
        Target::Standard(-5) => Expression::Verdict(Verdict::Return),
        Target::Standard(at) => match usize::try_from(at).ok().and_then(|at| starts.get(&at)) {
            Some(name) if entry[octet] & bit != 0 => Expression::Verdict(Verdict::Goto(name.clone())),
            Some(name) => Expression::Verdict(Verdict::Jump(name.clone())),
            // To the next entry: a rule without a target.
            None => Expression::Pass,
        },
    });
    Some(all)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|it| *it == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::{LAYOUTS, Table, chains};

    #[test]
    fn nonsense_ends() {
        for (_, layout) in &LAYOUTS {
            for entries in [vec![0; 400], vec![255; 400], vec![200; 500]] {
                chains(layout, &Table { entries, hooks: [0; 5] });
            }
        }
    }
}
