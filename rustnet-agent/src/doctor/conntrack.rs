//! Whether netfilter has room for more connections. Without it the kernel drops the first packet of each new one: those of the host,
//! and tunnel packets, whose ports differ from flow to flow.

use std::path::Path;

use super::finding::{Finding, Level};

/// Per cent of the table from which on it is nearly full.
const NEARLY: u64 = 90;

/// What was found.
pub struct Facts {
    /// Connections in the table.
    pub count: u64,
    /// The most that it holds.
    pub max: u64,
}

/// Looks; `None` where netfilter tracks no connections. `sysctl_dir`: `/proc/sys/net` of the host's namespace.
pub fn gather(sysctl_dir: &Path) -> Option<Facts> {
    let read = |name| std::fs::read_to_string(sysctl_dir.join("netfilter").join(name)).ok()?.trim().parse().ok();
    Some(Facts { count: read("nf_conntrack_count")?, max: read("nf_conntrack_max")? })
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    const NAME: &str = "net.netfilter.nf_conntrack_max";
    let Facts { count, max } = *facts;
    // Without a limit it is 0.
    if max == 0 || count * 100 < max * NEARLY {
        return vec![Finding::ok("connections", format!("{count} of {max}")).called(NAME)];
    }
    let detail = format!(
        "{count} of {max}: at the limit the kernel drops new connections of this host, and tunnel packets with them"
    );
    let hint = format!("sysctl -w {NAME}={}, and see what opens so many (`conntrack -L`)", max * 2);
    vec![Finding::new(Level::Warning, "connections", detail).hint(hint).called(NAME)]
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::*;

    #[test]
    fn a_table_that_is_nearly_full_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(gather(dir.path()).is_none(), "nothing is tracked");
        std::fs::create_dir(dir.path().join("netfilter")).unwrap();
        let facts = |count: &str, max: &str| {
            std::fs::write(dir.path().join("netfilter/nf_conntrack_count"), count).unwrap();
            std::fs::write(dir.path().join("netfilter/nf_conntrack_max"), max).unwrap();
            gather(dir.path()).unwrap()
        };
        assert_well(&check(&facts("1000\n", "262144\n")));
        assert_well(&check(&facts("1000\n", "0\n")));
        let hint = "net.netfilter.nf_conntrack_max=524288";
        assert_only(&check(&facts("262140\n", "262144\n")), Level::Warning, "262140 of 262144", hint);
    }
}
