//! Whether the kernel's table of neighbours holds all nodes: with native routing, each of them is one.

use std::path::Path;

use super::finding::{Finding, Level};
use crate::config::{Config, Routing};

/// Neighbours besides the nodes that a link has: routers, machines of other kinds.
const OTHERS: usize = 128;

/// What was found.
pub struct Facts {
    /// Nodes in the cluster.
    pub nodes: usize,
    /// The most that the kernel remembers, by family; it is the same for all network namespaces.
    pub limits: Vec<(&'static str, usize)>,
}

/// Looks; `None` where other nodes are no neighbours.
pub fn gather(config: &Config, nodes: usize) -> Option<Facts> {
    (config.routing != Routing::Vxlan).then(|| Facts { nodes, limits: limits(&config.sysctl_dir) })
}

/// Only the host's own namespace shows them.
fn limits(sysctl_dir: &Path) -> Vec<(&'static str, usize)> {
    let read = |family| {
        let text = std::fs::read_to_string(sysctl_dir.join(family).join("neigh/default/gc_thresh3")).ok()?;
        Some((family, text.trim().parse().ok()?))
    };
    ["ipv4", "ipv6"].into_iter().filter_map(read).collect()
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let needed = facts.nodes + OTHERS;
    let judge = |(family, limit): &(&str, usize)| {
        let name = format!("net.{family}.neigh.default.gc_thresh3");
        let finding = if *limit >= needed {
            Finding::ok("neighbours", format!("{limit}, for {} nodes", facts.nodes))
        } else {
            let detail = format!(
                "{limit} is few for {} nodes on one link: the kernel forgets some and drops packets",
                facts.nodes
            );
            // The usual proportion of the three.
            let want = (needed * 2).next_power_of_two();
            Finding::new(Level::Warning, "neighbours", detail).hint(format!(
                "sysctl -w {name}={want}, and gc_thresh2={}, gc_thresh1={}",
                want / 2,
                want / 8
            ))
        };
        finding.called(name)
    };
    facts.limits.iter().map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::{Facts, check, limits};
    use crate::doctor::finding::{Level, assert_only, assert_well};

    #[test]
    fn five_thousand_nodes_are_too_many_for_the_default() {
        let dir = tempfile::tempdir().unwrap();
        assert!(limits(dir.path()).is_empty(), "another namespace");
        std::fs::create_dir_all(dir.path().join("ipv4/neigh/default")).unwrap();
        std::fs::write(dir.path().join("ipv4/neigh/default/gc_thresh3"), "1024\n").unwrap();
        let facts = |nodes| Facts { nodes, limits: limits(dir.path()) };
        assert_well(&check(&facts(800)));
        let want = "net.ipv4.neigh.default.gc_thresh3=16384, and gc_thresh2=8192";
        assert_only(&check(&facts(5000)), Level::Warning, "1024 is few for 5000 nodes", want);
    }
}
