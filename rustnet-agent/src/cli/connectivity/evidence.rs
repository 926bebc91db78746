//! What the agents of both nodes dropped while a row was tried, by their counters. Pure; `cluster` fetches the text.

use std::collections::BTreeMap;

use rustnet_common::drop::DropReason;
use serde::Serialize;

/// The counters of drops in one answer of an agent's metrics, by reason and hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drops(BTreeMap<(String, String), u64>);

/// What a node dropped, or why that is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Evidence {
    /// The node.
    pub node: String,
    /// By reason and hook; of other traffic, too.
    pub drops: Vec<Drop>,
    /// Why the counters are not known.
    pub unknown: Option<String>,
}

/// Packets with one fate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Drop {
    /// The reason.
    pub reason: String,
    /// The hook.
    pub hook: String,
    /// How many.
    pub packets: u64,
    /// What to do.
    pub hint: String,
}

const PREFIX: &str = "rustnet_drop_packets_total{";

impl Drops {
    /// Reads an answer in the format of OpenMetrics.
    pub fn parse(text: &str) -> Self {
        let row = |line: &str| {
            let (labels, value) = line.strip_prefix(PREFIX)?.split_once("} ")?;
            let label = |name: &str| {
                labels.split(',').find_map(|pair| {
                    Some(pair.strip_prefix(name)?.strip_prefix("=\"")?.trim_end_matches('"').to_owned())
                })
            };
            Some(((label("reason")?, label("hook")?), value.trim().parse().ok()?))
        };
        Self(text.lines().filter_map(row).collect())
    }

    /// Returns what was dropped since these counters were read.
    pub fn since(&self, before: &Self) -> Vec<Drop> {
        let more = |(key, now): (&(String, String), &u64)| {
            // An agent that was restarted counts on: the counters are in a pinned map.
            let packets = now.saturating_sub(before.0.get(key).copied().unwrap_or(0));
            let hint = DropReason::ALL.iter().find(|reason| reason.name() == key.0).map_or("", |reason| reason.hint());
            let (reason, hook) = key.clone();
            (packets > 0).then(|| Drop { reason, hook, packets, hint: hint.to_owned() })
        };
        self.0.iter().filter_map(more).collect()
    }
}

impl Evidence {
    /// Compares the counters of a node before and after a row.
    pub fn new(node: &str, before: &Result<Drops, String>, after: &Result<Drops, String>) -> Self {
        let (drops, unknown) = match (before, after) {
            (Ok(before), Ok(after)) => (after.since(before), None),
            (Err(why), _) | (_, Err(why)) => (Vec::new(), Some(why.clone())),
        };
        Self { node: node.to_owned(), drops, unknown }
    }

    /// Returns it as a line for people.
    pub fn line(&self) -> String {
        let node = &self.node;
        if let Some(why) = &self.unknown {
            return format!("{node}: drop counters are not known: {why}");
        }
        if self.drops.is_empty() {
            return format!(
                "{node}: no drop was counted: the packet was lost outside of rustnet's programs, or never came here"
            );
        }
        let one = |it: &Drop| format!("{} {} ({}): {}", it.packets, it.reason, it.hook, it.hint);
        format!("{node}: dropped {}", self.drops.iter().map(one).collect::<Vec<_>>().join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "# TYPE rustnet_drop_packets counter\n\
        rustnet_drop_packets_total{reason=\"no_backend\",hook=\"from_pod\"} 2\n\
        rustnet_drop_bytes_total{reason=\"no_backend\",hook=\"from_pod\"} 120\n# EOF\n";
    const AFTER: &str = "rustnet_drop_packets_total{reason=\"no_backend\",hook=\"from_pod\"} 5\n\
        rustnet_drop_packets_total{reason=\"spoofed\",hook=\"overlay_in\"} 1\n\
        rustnet_forward_packets_total{hook=\"from_pod\"} 10\n";

    #[test]
    fn only_what_grew_is_evidence() {
        let (before, after) = (Ok(Drops::parse(BEFORE)), Ok(Drops::parse(AFTER)));
        let line = Evidence::new("n1", &before, &after).line();
        assert!(line.starts_with("n1: dropped 3 no_backend (from_pod): the service has no ready endpoint"), "{line}");
        assert!(line.contains("1 spoofed (overlay_in): "), "{line}");
        assert!(Evidence::new("n1", &before, &before).line().contains("no drop was counted"));
    }

    #[test]
    fn counters_that_cannot_be_read_are_no_silence() {
        let line = Evidence::new("n2", &Ok(Drops::default()), &Err("no agent runs there".into())).line();
        assert_eq!(line, "n2: drop counters are not known: no agent runs there");
    }
}
