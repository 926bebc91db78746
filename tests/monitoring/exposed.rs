//! What an agent serves: its series by name, with type, label names and the values that were seen.

use anyhow::{Context as _, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};

/// What a series is, as far as functions of PromQL care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Only grows: of type counter, or the sum or count of a histogram.
    Counter,
    /// Goes up and down; information, too.
    Gauge,
    /// Buckets of a histogram, which are counters with the label `le`.
    Bucket,
}

/// All series of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Series {
    pub kind: Type,
    /// Values that were seen, by label name.
    pub labels: BTreeMap<String, BTreeSet<String>>,
}

/// Series by name.
#[derive(Clone, Debug, Default)]
pub struct Exposed(pub BTreeMap<String, Series>);

impl Exposed {
    /// Reads the text format of OpenMetrics.
    ///
    /// # Errors
    /// A sample without a type, or two samples of one name with other label names.
    pub fn parse(text: &str) -> Result<Self> {
        let mut types = BTreeMap::new();
        let mut all = Self::default();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').with_context(|| format!("no type: {line}"))?;
                types.insert(name, kind);
            } else if !line.starts_with('#') {
                let (name, labels) = sample(line)?;
                let kind = kind(name, &types).with_context(|| format!("of no type: {line}"))?;
                all.add(name, kind, labels)?;
            }
        }
        Ok(all)
    }

    /// Adds what another one has.
    ///
    /// # Errors
    /// Both have a name with another type or other labels.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        for (name, series) in &other.0 {
            for (label, values) in &series.labels {
                for value in values {
                    let mut one =
                        series.labels.keys().map(|key| (key.clone(), String::new())).collect::<BTreeMap<_, _>>();
                    one.insert(label.clone(), value.clone());
                    self.add(name, series.kind, one)?;
                }
            }
            if series.labels.is_empty() {
                self.add(name, series.kind, BTreeMap::new())?;
            }
        }
        Ok(())
    }

    fn add(&mut self, name: &str, kind: Type, labels: BTreeMap<String, String>) -> Result<()> {
        let empty = || Series { kind, labels: labels.keys().map(|key| (key.clone(), BTreeSet::new())).collect() };
        let series = self.0.entry(name.to_owned()).or_insert_with(empty);
        ensure!(series.kind == kind, "{name} is {:?} and {kind:?}", series.kind);
        ensure!(series.labels.keys().eq(labels.keys()), "{name} has labels {:?} and {labels:?}", series.labels);
        for (label, value) in labels.into_iter().filter(|(_, value)| !value.is_empty()) {
            series.labels.entry(label).or_default().insert(value);
        }
        Ok(())
    }
}

/// Name and labels of a line such as `name{a="x",b="y"} 1`.
fn sample(line: &str) -> Result<(&str, BTreeMap<String, String>)> {
    let end = line.find(['{', ' ']).with_context(|| format!("no sample: {line}"))?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    while let Some(pair) = rest.strip_prefix(['{', ',']) {
        let (label, value) = pair.split_once("=\"").with_context(|| format!("no label: {line}"))?;
        // No value of the agent's has a quotation mark in it.
        let (value, after) = value.split_once('"').with_context(|| format!("no end of {label}: {line}"))?;
        labels.insert(label.to_owned(), value.to_owned());
        rest = after;
    }
    Ok((name, labels))
}

/// The type of a sample, by the types of the families.
fn kind(name: &str, types: &BTreeMap<&str, &str>) -> Result<Type> {
    let suffixes = [
        ("", "gauge", Type::Gauge),
        ("_total", "counter", Type::Counter),
        ("_info", "info", Type::Gauge),
        ("_bucket", "histogram", Type::Bucket),
        ("_sum", "histogram", Type::Counter),
        ("_count", "histogram", Type::Counter),
    ];
    for (suffix, of, kind) in suffixes {
        let family = name.strip_suffix(suffix);
        if family.and_then(|family| types.get(family)) == Some(&of) {
            return Ok(kind);
        }
    }
    bail!("{name} is of no family")
}

#[test]
fn a_scrape_is_read_with_types_and_labels() -> Result<()> {
    let text = "# HELP a A.\n# TYPE a counter\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"4\",y=\"2\"} 3\n# TYPE b histogram\nb_sum 1.0\n\
                b_bucket{le=\"+Inf\"} 1\n# TYPE c_total gauge\nc_total 1\n# TYPE d info\nd_info{v=\"1\"} 1\n# EOF\n";
    let all = Exposed::parse(text)?;
    let kinds: Vec<_> = all.0.iter().map(|(name, series)| (name.as_str(), series.kind)).collect();
    let want = [
        ("a_total", Type::Counter),
        ("b_bucket", Type::Bucket),
        ("b_sum", Type::Counter),
        ("c_total", Type::Gauge),
        ("d_info", Type::Gauge),
    ];
    assert_eq!(kinds, want);
    let x: Vec<_> = all.0["a_total"].labels["x"].iter().collect();
    assert_eq!(x, ["1", "4"]);
    for wrong in ["a_total 1", "# TYPE a counter\na 1", "# TYPE a gauge\na{x=\"1\"} 1\na 1"] {
        assert!(Exposed::parse(wrong).is_err(), "{wrong}");
    }
    let mut both = Exposed::parse("# TYPE a counter\na_total{x=\"9\",y=\"2\"} 3")?;
    both.merge(&all)?;
    assert_eq!(both.0["a_total"].labels["x"].len(), 3);
    Ok(())
}
