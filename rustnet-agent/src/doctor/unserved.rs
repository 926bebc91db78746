//! What objects of the cluster ask for and rustnet does not serve: as the running agent wrote it down, and NetworkPolicies, where they
//! are not enforced, as the API server has them.

use anyhow::Result;

use super::api;
use super::finding::{Finding, Level};
use crate::config::Config;
use crate::model::Feature;
use crate::namefile::{self, UNSERVED, Unserved};

/// Name of the check.
const WHAT: &str = "features";

/// What was found.
pub struct Facts {
    /// As the agent wrote it.
    pub unserved: Result<Unserved>,
    /// The setting `--network-policy`.
    pub is_enforcing: bool,
    /// NetworkPolicies, and the names of a few; nothing without an API server.
    pub policies: Option<Result<(usize, Vec<String>), String>>,
}

/// Looks.
pub fn gather(config: &Config) -> Facts {
    Facts {
        unserved: namefile::read(&config.run_dir, UNSERVED),
        is_enforcing: config.network_policy,
        policies: api::policies(config),
    }
}

/// Judges.
pub fn check(facts: &Facts) -> Vec<Finding> {
    let mut found = features(&facts.unserved);
    let what = "network policies";
    found.extend(facts.policies.as_ref().map(|policies| {
        match policies {
            Err(why) => Finding::ok(what, format!("not looked for: {why}")),
            Ok((0, _)) => Finding::ok(what, "none"),
            Ok((count, _)) if facts.is_enforcing => Finding::ok(what, format!("enforced, {count} are there")),
            Ok((count, names)) => {
                Finding::new(Level::Warning, what, format!("not enforced, {count} are there: {}", names.join(", ")))
                    .hint("start the agent with --network-policy on, which is the default")
            }
        }
    }));
    found
}

fn features(unserved: &Result<Unserved>) -> Vec<Finding> {
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
    use super::{Facts, Unserved, check};
    use crate::doctor::finding::{Level, assert_only, assert_well};
    use crate::namefile::Askers;

    #[test]
    fn what_is_asked_for_is_named() {
        let facts = |unserved| Facts { unserved, is_enforcing: true, policies: None };
        assert_well(&check(&facts(Ok(Unserved::new()))));
        let askers = Askers { count: 4, examples: vec!["shop/web".into()] };
        let unserved = Unserved::from([("host_port".into(), askers.clone()), ("of_a_later_release".into(), askers)]);
        assert_only(&check(&facts(Ok(unserved))), Level::Warning, "asked for by 4: shop/web", "portMappings");
        assert_only(&check(&facts(Err(anyhow::anyhow!("unreadable")))), Level::Warning, "not checked", "root");
    }
    #[test]
    fn policies_are_counted_where_the_agent_may_list_them() {
        let facts = |policies| Facts { unserved: Ok(Unserved::new()), is_enforcing: false, policies: Some(policies) };
        assert_well(&check(&facts(Ok((0, Vec::new())))));
        assert_well(&check(&facts(Err("networkpolicies is forbidden".into()))));
        let some = facts(Ok((7, vec!["shop/deny".into(), "shop/web".into()])));
        assert_only(&check(&some), Level::Warning, "7 are there: shop/deny, shop/web", "--network-policy on");
        assert_well(&check(&Facts { is_enforcing: true, ..some }));
    }
}
