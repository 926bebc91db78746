//! Judges an expression of PromQL by what there is to ask for: names, label names and values, and types that functions need.

use super::exposed::{Exposed, Series, Type};
use anyhow::{Context as _, Result, bail, ensure};
use promql_parser::label::{MatchOp, Matcher};
use promql_parser::parser::value::ValueType;
use promql_parser::parser::{
    AggregateExpr, BinaryExpr, Call, Expr, LabelModifier, MatrixSelector, VectorMatchCardinality, VectorSelector, parse,
};
use std::collections::{BTreeMap, BTreeSet};

/// What the PodMonitor, and Prometheus itself, add to each series.
const OF_TARGETS: [&str; 7] = ["container", "endpoint", "instance", "job", "namespace", "node", "pod"];
/// The job by which everything of ours is asked for: kube-proxy's names are others' names, too.
pub const JOB: &str = "rustnet-agent";
/// Functions of a range that make sense for counters alone.
const OF_COUNTERS: [&str; 4] = ["increase", "irate", "rate", "resets"];

/// Label names.
pub type Labels = BTreeSet<String>;

/// Series that can be asked for.
pub struct Known {
    ours: Exposed,
    others: BTreeMap<&'static str, Series>,
}

/// Where a selector stands.
#[derive(Clone, Copy, Debug, Default)]
struct Within {
    /// In `histogram_quantile`, which takes buckets alone.
    is_quantile: bool,
    /// On a side of `unless`, where only the presence of series counts.
    is_unless: bool,
}

impl Known {
    /// What agents serve, and the few that others do.
    pub fn new(ours: Exposed) -> Self {
        let of = |kind| Series { kind, labels: BTreeMap::new() };
        // Prometheus makes `up` for each target; the kubelet serves what its cAdvisor counts.
        let others = [("up", of(Type::Gauge)), ("container_cpu_usage_seconds_total", of(Type::Counter))].into();
        Self { ours, others }
    }

    /// Returns the labels that the result of an expression can have.
    ///
    /// # Errors
    /// Whatever keeps the expression from ever having a result, or a meaningful one.
    pub fn check(&self, query: &str) -> Result<Labels> {
        let expression = parse(query).map_err(|error| anyhow::anyhow!("{error}: {query}"))?;
        self.walk(&expression, Within::default()).with_context(|| query.to_owned())
    }

    fn walk(&self, expression: &Expr, within: Within) -> Result<Labels> {
        match expression {
            Expr::NumberLiteral(_) | Expr::StringLiteral(_) => Ok(Labels::new()),
            Expr::Paren(it) => self.walk(&it.expr, within),
            Expr::Unary(it) => self.walk(&it.expr, within),
            Expr::Aggregate(it) => self.aggregate(it, within),
            Expr::Binary(it) => self.binary(it, within),
            Expr::Call(it) => self.call(it, within),
            Expr::VectorSelector(it) => {
                let (name, series) = self.series(it)?;
                match series.kind {
                    Type::Counter => ensure!(within.is_unless, "the counter {name} without rate() or increase()"),
                    Type::Bucket => bail!("buckets of {name} without rate()"),
                    Type::Gauge => {
                        ensure!(!within.is_quantile, "histogram_quantile() of {name}, which is no histogram");
                    }
                }
                Ok(labels(series))
            }
            other => bail!("nothing here needs such an expression: {other}"),
        }
    }

    /// The series that a selector finds; its matchers must be able to match.
    fn series(&self, selector: &VectorSelector) -> Result<(String, &Series)> {
        let name = selector.name.clone().with_context(|| format!("a selector without a name: {selector}"))?;
        ensure!(selector.matchers.or_matchers.is_empty(), "{name}: matchers with `or`");
        let matchers = &selector.matchers.matchers;
        let theirs = self.others.get(name.as_str());
        let series = self.ours.0.get(&name).or(theirs).with_context(|| format!("there is no metric {name}"))?;
        if theirs.is_none() || name == "up" {
            let is_ours = |it: &Matcher| it.name == "job" && it.op == MatchOp::Equal && it.value == JOB;
            ensure!(matchers.iter().any(is_ours), "{name} of other jobs, too: job=\"{JOB}\" is missing");
        }
        for matcher in matchers {
            let label = &matcher.name;
            match series.labels.get(label) {
                Some(values) => matches_something(matcher, values).with_context(|| format!("{name}: {label}"))?,
                None => ensure!(OF_TARGETS.contains(&label.as_str()), "{name} has no label {label}"),
            }
        }
        Ok((name, series))
    }

    fn call(&self, call: &Call, within: Within) -> Result<Labels> {
        let name = call.func.name;
        let arguments = &call.args.args;
        if let Some(Expr::MatrixSelector(MatrixSelector { vs, .. })) = arguments.first().map(AsRef::as_ref) {
            let (series_name, series) = self.series(vs)?;
            let is_of_counters = OF_COUNTERS.contains(&name);
            match series.kind {
                Type::Gauge => ensure!(!is_of_counters, "{name}() over the gauge {series_name}"),
                Type::Counter | Type::Bucket => ensure!(is_of_counters, "{name}() over the counter {series_name}"),
            }
            let is_bucket = series.kind == Type::Bucket;
            ensure!(
                is_bucket == within.is_quantile,
                "{series_name}: histogram_quantile() is for buckets, and needs them"
            );
            return Ok(labels(series));
        }
        let is_quantile = name == "histogram_quantile";
        let within = Within { is_quantile: within.is_quantile || is_quantile, ..within };
        let mut result = Labels::new();
        for argument in arguments {
            result = self.walk(argument, within)?;
        }
        if is_quantile {
            ensure!(result.remove("le"), "histogram_quantile() of a sum that has lost the label le");
        }
        // These make a series of their own.
        Ok(if ["absent", "scalar", "time", "vector"].contains(&name) { Labels::new() } else { result })
    }

    fn aggregate(&self, it: &AggregateExpr, within: Within) -> Result<Labels> {
        let mut inner = self.walk(&it.expr, within)?;
        match &it.modifier {
            None => Ok(Labels::new()),
            Some(LabelModifier::Include(by)) => {
                let by: Labels = by.labels.iter().cloned().collect();
                ensure!(by.is_subset(&inner), "{} by {by:?} of series that have {inner:?}", it.op);
                Ok(by)
            }
            Some(LabelModifier::Exclude(without)) => {
                inner.retain(|label| !without.labels.contains(label));
                Ok(inner)
            }
        }
    }

    fn binary(&self, it: &BinaryExpr, within: Within) -> Result<Labels> {
        let operator = it.op.to_string();
        let is_unless = within.is_unless || operator == "unless";
        let within = Within { is_unless, ..within };
        let (left, right) = (self.walk(&it.lhs, within)?, self.walk(&it.rhs, within)?);
        match (it.lhs.value_type(), it.rhs.value_type()) {
            (ValueType::Scalar, _) => return Ok(right),
            (_, ValueType::Scalar) => return Ok(left),
            _ => {}
        }
        if operator == "or" {
            return Ok(left.union(&right).cloned().collect());
        }
        let modifier = it.modifier.as_ref();
        match modifier.and_then(|modifier| modifier.matching.as_ref()) {
            None => ensure!(left == right, "`{operator}` of series with {left:?} and {right:?}, which never match"),
            Some(LabelModifier::Include(on)) => {
                for label in &on.labels {
                    ensure!(left.contains(label) && right.contains(label), "on ({label}), which a side has not");
                }
            }
            Some(LabelModifier::Exclude(_)) => bail!("`ignoring` is not known to this test"),
        }
        let Some(VectorMatchCardinality::ManyToOne(more)) = modifier.map(|modifier| &modifier.card) else {
            return Ok(left);
        };
        for label in &more.labels {
            ensure!(right.contains(label), "group_left ({label}), which the right side has not");
        }
        Ok(left.into_iter().chain(more.labels.iter().cloned()).collect())
    }
}

fn labels(series: &Series) -> Labels {
    series.labels.keys().map(String::as_str).chain(OF_TARGETS).map(str::to_owned).collect()
}

/// Each alternative that a matcher spells out is a value of the label.
fn matches_something(matcher: &Matcher, values: &BTreeSet<String>) -> Result<()> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '|';
    let is_spelt_out = !matcher.value.is_empty() && matcher.value.chars().all(is_word);
    if !is_spelt_out {
        ensure!(values.iter().any(|value| matcher.is_match(value)), "{matcher} matches none of {values:?}");
        return Ok(());
    }
    let is_regex = matches!(matcher.op, MatchOp::Re(_) | MatchOp::NotRe(_));
    let alternatives: Vec<_> = if is_regex { matcher.value.split('|').collect() } else { vec![matcher.value.as_str()] };
    for one in alternatives {
        ensure!(values.contains(one), "{one} is none of {values:?}");
    }
    Ok(())
}

/// Names of labels that a template of an annotation or a legend uses, by a pattern with one group.
pub fn used(template: &str, pattern: &str) -> Result<Labels> {
    let pattern = regex::Regex::new(pattern)?;
    Ok(pattern.captures_iter(template).map(|found| found[1].to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Result<Known> {
        let text = "# TYPE c counter\nc_total{reason=\"a\"} 1\nc_total{reason=\"b\"} 1\n# TYPE g gauge\ng 1\n# TYPE m gauge\nm{map=\"x\"} 1\n\
                    # TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_sum 1\n";
        Ok(Known::new(Exposed::parse(text)?))
    }

    #[test]
    fn sound_expressions_have_their_labels() -> Result<()> {
        let known = known()?;
        for (query, labels) in [
            ("g{JOB} == 0", vec!["container", "endpoint", "instance", "job", "namespace", "node", "pod"]),
            ("sum by (node, reason) (rate(c_total{JOB,reason=~\"a|b\"}[5m])) > 1", vec!["node", "reason"]),
            ("histogram_quantile(0.99, sum by (node, le) (rate(h_bucket{JOB}[5m]))) > 1", vec!["node"]),
            ("absent(up{JOB} == 1)", vec![]),
            ("time() - max by (node) (g{JOB}) > 1 and max by (node) (g{JOB}) > 0", vec!["node"]),
            ("sum by (node) (c_total{JOB} unless c_total{JOB} offset 15m) > 0", vec!["node"]),
            ("max by (map) (m{JOB} / m{JOB,map!=\"x\"})", vec!["map"]),
            (
                "sum by (node) (rate(container_cpu_usage_seconds_total[5m]) * on (pod) group_left (node) max by (pod, node) (g{JOB}))",
                vec!["node"],
            ),
        ] {
            let query = query.replace("JOB", "job=\"rustnet-agent\"");
            assert_eq!(known.check(&query)?.into_iter().collect::<Vec<_>>(), labels, "{query}");
        }
        Ok(())
    }

    #[test]
    fn each_kind_of_mistake_is_named() -> Result<()> {
        let known = known()?;
        for (query, named) in [
            ("g_{JOB} == 0", "there is no metric g_"),
            ("g{JOB} = 0", "PromQL"),
            ("g == 0", "job="),
            ("up{job=\"other\"} == 0", "job="),
            ("rate(g{JOB}[5m]) > 0", "rate() over the gauge g"),
            ("max_over_time(c_total{JOB}[5m]) > 0", "over the counter c_total"),
            ("c_total{JOB} > 0", "without rate()"),
            ("rate(c_total{JOB,raeson=\"a\"}[5m]) > 0", "has no label raeson"),
            ("rate(c_total{JOB,reason=\"d\"}[5m]) > 0", "d is none of"),
            ("rate(c_total{JOB,reason!~\"a|d\"}[5m]) > 0", "d is none of"),
            ("rate(c_total{JOB,reason=~\"d.+\"}[5m]) > 0", "matches none of"),
            ("sum by (raeson) (rate(c_total{JOB}[5m])) > 0", "raeson"),
            ("histogram_quantile(0.9, sum by (node) (rate(h_bucket{JOB}[5m]))) > 0", "lost the label le"),
            ("histogram_quantile(0.9, rate(h_sum{JOB}[5m])) > 0", "needs them"),
            ("histogram_quantile(0.9, rate(c_total{JOB}[5m])) > 0", "needs them"),
            ("histogram_quantile(0.9, h_bucket{JOB}) > 0", "without rate()"),
            ("rate(h_bucket{JOB}[5m]) > 0", "is for buckets"),
            ("max by (node) (g{JOB}) > 0 and max by (pod) (g{JOB}) > 0", "never match"),
            ("g{JOB} * on (map) m{JOB}", "on (map)"),
            ("g{JOB} * on (node) group_left (map) g{JOB}", "group_left (map)"),
        ] {
            let query = query.replace("JOB", "job=\"rustnet-agent\"");
            let error = format!("{:#}", known.check(&query).expect_err(&query));
            assert!(error.contains(named) || named == "PromQL", "{query}: {error}");
        }
        Ok(())
    }
}
