//! What objects of the cluster ask for and rustnet does not serve, as the running agent wrote it down.

use anyhow::Result;

use super::finding::{Finding, Level};
use crate::config::Config;
use crate::model::Feature;
use crate::namefile::{self, UNSERVED, Unserved};

/// Name of the check.
const WHAT: &str = "features";

/// Looks.
pub fn gather(config: &Config) -> Result<Unserved> {
    namefile::read(&config.run_dir, UNSERVED)
}

/// Judges.
pub fn check(unserved: &Result<Unserved>) -> Vec<Finding> {
    let unserved = match unserved {
        Ok(unserved) => unserved,
        Err(error) => return vec![Finding::unknown(WHAT, error)],
    };
    // A name that is not known is of another release's agent.
    let known = unserved.iter().filter_map(|(name, askers)| Some((Feature::of_name(name)?, askers)));
    let mut found: Vec<_> = known
        .map(|(feature, askers)| {
            let detail = format!("not served, asked for by {}: {}", askers.count, askers.examples.join(", "));
            Finding::new(Level::Warning, WHAT, detail).called(feature.field()).hint(feature.remedy())
        })
        .collect();
    if found.is_empty() {
        found.push(Finding::ok(WHAT, "no Service and no pod of this node asks for what is not served"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{Unserved, check};
    use crate::doctor::finding::{Level, assert_only, assert_well};
    use crate::namefile::Askers;

    #[test]
    fn what_is_asked_for_is_named() {
        assert_well(&check(&Ok(Unserved::new())));
        let askers = Askers { count: 4, examples: vec!["shop/web".into()] };
        let unserved = Unserved::from([("host_port".into(), askers.clone()), ("of_a_later_release".into(), askers)]);
        assert_only(&check(&Ok(unserved)), Level::Warning, "asked for by 4: shop/web", "hostNetwork");
        assert_only(&check(&Err(anyhow::anyhow!("unreadable"))), Level::Warning, "not checked", "root");
    }
}
