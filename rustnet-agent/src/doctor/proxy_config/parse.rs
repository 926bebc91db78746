//! Reads kube-proxy's configuration: which settings differ from its defaults, and which fields it cannot have.

use super::fields::{FIELDS, Field, Type};
use serde_json::Value;
use std::time::Duration;

/// Its group; the version is in the path's last part.
const GROUP: &str = "kubeproxy.config.k8s.io/";
/// The version whose fields are known. Kubernetes 1.34 has types for no other.
const VERSION: &str = "v1alpha1";
/// Its kind.
const KIND: &str = "KubeProxyConfiguration";

/// A setting that differs from kube-proxy's default.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// Which.
    pub field: &'static Field,
    /// Its values, as text.
    pub texts: Vec<String>,
}

/// What a configuration holds.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// Settings that differ from the defaults, in the order of [`FIELDS`].
    pub chosen: Vec<Chosen>,
    /// What kube-proxy would refuse, field by field.
    pub errors: Vec<String>,
}

/// Reads a configuration, or the ConfigMap that has one.
///
/// # Errors
/// It is none, or of a version whose fields are not known.
pub fn parse(text: &str) -> Result<Parsed, String> {
    let value: Value = serde_saphyr::from_str(text).map_err(|error| format!("no YAML or JSON: {error}"))?;
    if value["kind"] == "ConfigMap" {
        let data = value["data"].as_object().into_iter().flatten();
        let config = data.filter_map(|(_, text)| text.as_str()).find(|text| text.contains(KIND));
        return parse(config.ok_or_else(|| format!("the ConfigMap has no {KIND}"))?);
    }
    let version = value["apiVersion"].as_str().and_then(|text| text.strip_prefix(GROUP));
    match (version, value["kind"] == KIND) {
        (Some(VERSION), true) => {}
        (Some(other), true) => return Err(format!("apiVersion {GROUP}{other}: only {VERSION} is known here")),
        _ => return Err(format!("no {KIND}: apiVersion {} and kind {}", value["apiVersion"], value["kind"])),
    }
    let mut parsed = Parsed::default();
    let fields = value.as_object().into_iter().flatten();
    for (name, value) in fields.filter(|(name, _)| !["apiVersion", "kind"].contains(&name.as_str())) {
        walk(name, value, &mut parsed);
    }
    parsed.chosen.sort_by_key(|chosen| FIELDS.iter().position(|field| field.path == chosen.field.path));
    Ok(parsed)
}

fn walk(path: &str, value: &Value, parsed: &mut Parsed) {
    if let Some(field) = FIELDS.iter().find(|field| field.path == path) {
        return take(field, value, parsed);
    }
    let inner = format!("{path}.");
    match value {
        _ if !FIELDS.iter().any(|field| field.path.starts_with(&inner)) => {
            parsed.errors.push(format!("{path}: kube-proxy has no such field"));
        }
        Value::Object(fields) => fields.iter().for_each(|(name, value)| walk(&format!("{inner}{name}"), value, parsed)),
        Value::Null => {}
        _ => parsed.errors.push(format!("{path}: is {}, should be an object", shown(value))),
    }
}

fn take(field: &'static Field, value: &Value, parsed: &mut Parsed) {
    let Some(texts) = texts(field.kind, value) else {
        let wanted = match field.kind {
            Type::Text => "text",
            Type::Bool => "true or false",
            Type::Integer => "a whole number",
            Type::Number => "a number",
            Type::Duration => "a duration such as 1h30m",
            Type::Texts => "a list of texts",
            Type::Any => "anything",
        };
        parsed.errors.push(format!("{}: is {}, should be {wanted}", field.path, shown(value)));
        return;
    };
    if !is_default(field, &texts) {
        parsed.chosen.push(Chosen { field, texts });
    }
}

/// The value as texts; none for null. `None`: it has another type.
fn texts(kind: Type, value: &Value) -> Option<Vec<String>> {
    match (kind, value) {
        (_, Value::Null) => Some(Vec::new()),
        (Type::Text | Type::Any, Value::String(text)) => Some(vec![text.clone()]),
        (Type::Duration, Value::String(text)) => duration(text).map(|_| vec![text.clone()]),
        (Type::Bool, Value::Bool(value)) => Some(vec![value.to_string()]),
        (Type::Integer, Value::Number(number)) if number.is_i64() => Some(vec![number.to_string()]),
        (Type::Number, Value::Number(number)) => Some(vec![number.to_string()]),
        (Type::Texts, Value::Array(values)) => values.iter().map(|it| it.as_str().map(str::to_owned)).collect(),
        (Type::Any, other) => Some(vec![other.to_string()]),
        _ => None,
    }
}

/// Empty values count as absent, as for kube-proxy.
fn is_default(field: &Field, texts: &[String]) -> bool {
    let is_same = |text: &String, default: &&str| match field.kind {
        Type::Duration => duration(text) == duration(default),
        _ => text == default,
    };
    match texts {
        [] => true,
        [text] => text.is_empty() || field.defaults.iter().any(|default| is_same(text, default)),
        _ => false,
    }
}

/// A duration as Go writes it: `1h0m0s`, `500ms`, `0`.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest.find(|c: char| c != '.' && !c.is_ascii_digit())?;
        let number: f64 = rest[..end].parse().ok()?;
        let units = [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
        let of_unit = |unit: &str| rest[end..].strip_prefix(unit);
        let (left, seconds) = units.iter().find_map(|(unit, seconds)| Some((of_unit(unit)?, seconds)))?;
        sum += Duration::try_from_secs_f64(number * seconds).ok()?;
        rest = left;
    }
    (!text.is_empty()).then_some(sum)
}

fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Duration, duration};

    #[test]
    fn durations_as_go_writes_them() {
        for (text, want) in [
            ("0", Some(Duration::ZERO)),
            ("0s", Some(Duration::ZERO)),
            ("1h0m0s", Some(Duration::from_hours(1))),
            ("1.5h", Some(Duration::from_mins(90))),
            ("500ms", Some(Duration::from_millis(500))),
            ("15m", Some(Duration::from_mins(15))),
            ("2µs", Some(Duration::from_micros(2))),
            ("", None),
            ("5", None),
            ("h", None),
            ("1d", None),
            ("1.2.3s", None),
        ] {
            assert_eq!(duration(text), want, "{text}");
        }
    }
}
