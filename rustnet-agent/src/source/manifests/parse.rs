//! One manifest file to events, each with the line it stands on. YAML of several documents, lists, or JSON.

use crate::source::convert::Converter;
use crate::source::policy_api::{self, ClusterNetworkPolicy};
use crate::source::{Event, ObjectRef};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDR};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_saphyr::{Options, Spanned};

/// One object of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// What identifies it.
    pub object: ObjectRef,
    /// Line of the file at which its document (or list item) begins.
    pub line: u64,
    /// What it means.
    pub event: Event,
}

/// Why a file cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken {
    /// Line, from 1.
    pub line: u64,
    /// What is wrong there.
    pub message: String,
}

/// A document, of which a list's items keep their lines.
#[derive(Deserialize)]
struct Items {
    #[serde(default)]
    items: Vec<Spanned<serde::de::IgnoredAny>>,
}

/// Limits are there against files that expand without end, not against large clusters.
fn options() -> Options {
    serde_saphyr::options! {
        with_snippet: false,
        budget: serde_saphyr::budget! { max_nodes: 20_000_000, max_events: 50_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    }
}

/// The objects of a file. Kinds that are not ours are passed over. Any error makes the whole file broken: half of what
/// somebody meant is nothing to act on.
pub fn parse(text: &str, converter: &mut Converter) -> Result<Vec<Declared>, Broken> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut all = Vec::new();
    for (first_line, document) in documents(text) {
        let line = first_line + content_line(document);
        let value: serde_json::Value = yaml(document, first_line)?;
        if value.is_null() {
            continue;
        }
        let (version, kind) = type_of(&value);
        if kind.is_empty() {
            return Err(Broken { line, message: "no kind; write apiVersion and kind".to_owned() });
        }
        // A typed list, such as EndpointSliceList, may leave out what its items are.
        if let (Some(of), Some(items)) = (kind.strip_suffix("List"), value.get("items")) {
            let lines = yaml::<Items>(document, first_line)?.items;
            for (item, line) in items.as_array().into_iter().flatten().zip(lines) {
                let line = first_line - 1 + line.referenced.line();
                let (item_version, item_kind) = type_of(item);
                let version = if item_version.is_empty() { version } else { item_version };
                let kind = if item_kind.is_empty() { of } else { item_kind };
                all.extend(object(version, kind, &Source { value: item, line, document: None }, converter)?);
            }
        } else {
            let whole = Source { value: &value, line, document: Some((document, first_line)) };
            all.extend(object(version, kind, &whole, converter)?);
        }
    }
    Ok(all)
}

/// What an object says that it is: API version and kind.
fn type_of(value: &serde_json::Value) -> (&str, &str) {
    let field = |name: &str| value.get(name).and_then(serde_json::Value::as_str).unwrap_or_default();
    (field("apiVersion"), field("kind"))
}

/// Where an object is read from.
struct Source<'a> {
    value: &'a serde_json::Value,
    line: u64,
    /// The text of the whole document and its first line, if it is nothing but this object.
    document: Option<(&'a str, u64)>,
}

impl Source<'_> {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Broken> {
        T::deserialize(self.value).or_else(|error| match self.document {
            // Once more with its type known: that gives the line, and takes a bare 80 for a string where one belongs.
            Some((document, first_line)) => yaml(document, first_line),
            None => Err(Broken { line: self.line, message: error.to_string() }),
        })
    }
}

/// True for the versions of ClusterNetworkPolicies that are read.
fn is_policy_api(version: &str) -> bool {
    let of_group = version.strip_prefix(policy_api::GROUP).and_then(|rest| rest.strip_prefix('/'));
    of_group.is_some_and(|version| policy_api::VERSIONS.contains(&version))
}

fn object(
    version: &str,
    kind: &str,
    source: &Source<'_>,
    converter: &mut Converter,
) -> Result<Option<Declared>, Broken> {
    let line = source.line;
    let event = match kind {
        "Service" if version == "v1" => converter.service(&source.read::<Service>()?),
        "Node" if version == "v1" => converter.node(&source.read::<Node>()?),
        "Pod" if version == "v1" => converter.pod(&source.read::<Pod>()?),
        "Namespace" if version == "v1" => converter.namespace(&source.read::<Namespace>()?),
        "NetworkPolicy" if version == "networking.k8s.io/v1" => {
            converter.network_policy(&source.read::<NetworkPolicy>()?)
        }
        "ServiceCIDR" if version == "networking.k8s.io/v1" => converter.service_cidr(&source.read::<ServiceCIDR>()?),
        "ClusterNetworkPolicy" if is_policy_api(version) => {
            converter.cluster_network_policy(&source.read::<ClusterNetworkPolicy>()?)
        }
        "EndpointSlice" if version == "discovery.k8s.io/v1" => converter.slice(&source.read::<EndpointSlice>()?),
        // Somebody else's kind of the same name, such as Knative's Service, is none of ours.
        "EndpointSlice" if version.starts_with("discovery.k8s.io/") || version.is_empty() => {
            return Err(wrong_version(line, version, kind, "discovery.k8s.io/v1"));
        }
        // Calico's NetworkPolicy is of crd.projectcalico.org or projectcalico.org.
        "ServiceCIDR" | "NetworkPolicy" if version.starts_with("networking.k8s.io/") || version.is_empty() => {
            return Err(wrong_version(line, version, kind, "networking.k8s.io/v1"));
        }
        // Antrea has one of its own.
        "ClusterNetworkPolicy" if version.starts_with(policy_api::GROUP) || version.is_empty() => {
            return Err(wrong_version(line, version, kind, "policy.networking.k8s.io/v1beta1"));
        }
        "Service" | "Node" | "Pod" | "Namespace" if version.is_empty() => {
            return Err(wrong_version(line, version, kind, "v1"));
        }
        _ => {
            tracing::debug!(kind, version, line, "kind is not used, passed over");
            return Ok(None);
        }
    };
    let event = event.map_err(|error| Broken { line, message: error.to_string() })?;
    Ok(reference(&event).map(|object| Declared { object, line, event }))
}

fn wrong_version(line: u64, version: &str, kind: &str, want: &str) -> Broken {
    Broken { line, message: format!("apiVersion {version:?} of {kind} is not understood; write {want}") }
}

/// The object that a converter's event is about.
fn reference(event: &Event) -> Option<ObjectRef> {
    match event {
        Event::Apply(object) => Some(object.reference()),
        Event::Delete(object) | Event::Reject(object, _) | Event::Unreadable(object, _) => Some(object.clone()),
        Event::Restart(_) | Event::Synced(_) | Event::Report { .. } => None,
    }
}

fn yaml<T: DeserializeOwned>(document: &str, first_line: u64) -> Result<T, Broken> {
    serde_saphyr::from_str_with_options(document, options()).map_err(|error| {
        let mut message = error.to_string();
        let mut line = first_line;
        if let Some(location) = error.location() {
            // The line number stands in front, counted from the file's beginning.
            let suffix = format!(" at line {}, column {}", location.line(), location.column());
            message.truncate(message.strip_suffix(&suffix).map_or(message.len(), str::len));
            line = first_line - 1 + location.line();
        }
        let message = message.replace(", set DuplicateKeyPolicy in Options if acceptable", "");
        Broken { line, message }
    })
}

/// Lines of a document before its content: blank ones, comments, and the marker.
fn content_line(document: &str) -> u64 {
    let begins = |line: &str| {
        let line = line.strip_prefix("---").unwrap_or(line).trim_start();
        !line.is_empty() && !line.starts_with('#') && !line.starts_with('%')
    };
    document.lines().position(begins).unwrap_or(0) as u64
}

/// The documents of a file, each with the line it begins on. A line that begins with `---` can be nothing but a marker
/// (YAML 1.2, section 9.1.2).
fn documents(text: &str) -> Vec<(u64, &str)> {
    let is_marker = |line: &str, marker: &str| {
        line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
    };
    let mut documents = Vec::new();
    // Byte and line at which the current document begins, and whether it has more than directives and comments yet.
    let (mut begin, mut begin_line, mut has_content) = (0, 1, false);
    let mut at = 0;
    for (number, line) in (1u64..).zip(text.split_inclusive('\n')) {
        if is_marker(line, "---") && has_content {
            documents.push((begin_line, &text[begin..at]));
            (begin, begin_line) = (at, number);
        }
        at += line.len();
        if is_marker(line, "...") {
            documents.push((begin_line, &text[begin..at]));
            (begin, begin_line, has_content) = (at, number + 1, false);
            continue;
        }
        let trimmed = line.trim();
        has_content |= !trimmed.is_empty() && !trimmed.starts_with(['#', '%']);
    }
    documents.push((begin_line, &text[begin..]));
    documents
}

#[cfg(test)]
mod tests {
    use super::{Broken, Declared, documents, parse};
    use crate::source::convert::Converter;
    use crate::source::{Event, Kind};
    use std::fmt::Write;

    fn names(text: &str) -> Vec<(String, u64)> {
        let declared = parse(text, &mut Converter::new()).unwrap();
        declared.iter().map(|d: &Declared| (d.object.to_string(), d.line)).collect()
    }

    fn broken(text: &str) -> Broken {
        parse(text, &mut Converter::new()).unwrap_err()
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  clusterIP: 10.96.0.1\n  ports:\n  \
                           - port: 80\n";

    #[test]
    fn several_documents_with_their_lines() {
        let text = format!(
            "# a comment\n---\n{SERVICE}--- # another\napiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\n---\n---\n\
             apiVersion: apps/v1\nkind: Deployment\nspec: {{anything: [goes, here]}}\n...\n\n{SERVICE}"
        );
        assert_eq!(
            names(&text),
            [("Service default/web".to_owned(), 3), ("Node n1".to_owned(), 11), ("Service default/web".to_owned(), 21)]
        );
    }

    #[test]
    fn nothing_is_fine() {
        for text in ["", "\n\n", "---\n---\n", "# only a comment\n", "---\n# and another\n...\n"] {
            assert_eq!(names(text), [], "{text:?}");
        }
    }

    #[test]
    fn directives_stay_with_their_document() {
        let text = format!("%YAML 1.2\n---\n{SERVICE}");
        assert_eq!(names(&text), [("Service default/web".to_owned(), 3)]);
        assert_eq!(documents("a: |\n  ---\n  b\n").len(), 1);
    }

    #[test]
    fn lists_of_either_sort() {
        let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Node\n  metadata: {name: n1}\n\
                    - apiVersion: apps/v1\n  kind: Deployment\n- apiVersion: v1\n  kind: Node\n  metadata: {name: n2}\n";
        assert_eq!(names(list), [("Node n1".to_owned(), 4), ("Node n2".to_owned(), 9)]);
        let typed = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSliceList\nitems:\n- metadata: {name: a, labels: \
                     {kubernetes.io/service-name: web}}\n  addressType: IPv4\n  endpoints: []\n  ports: []\n";
        assert_eq!(names(typed), [("EndpointSlice default/a".to_owned(), 4)]);
    }

    #[test]
    fn json_is_yaml() {
        let text = r#"{"apiVersion": "v1", "kind": "NodeList",
            "items": [{"metadata": {"name": "n1"}},
                      {"metadata": {"name": "n2"}}]}"#;
        assert_eq!(names(text), [("Node n1".to_owned(), 2), ("Node n2".to_owned(), 3)]);
    }

    #[test]
    fn errors_name_the_line_of_the_file() {
        for (second, line, needle) in [
            ("kind: Service\napiVersion: v1\nspec: {ports: 3}\n", 11, "sequence"),
            ("kind: Service\napiVersion: v1\nspec:\n  ports:\n  - port: eighty\n", 13, "i32"),
            ("kind: Service\nkind: Service\n", 10, "duplicate mapping key: kind"),
            ("kind: [Service\n", 9, ""),
            ("a: b\n c: d\n", 10, ""),
            ("metadata: {name: web}\n", 9, "write apiVersion and kind"),
            ("apiVersion: v1\nkind: Service\nmetadata: {}\n", 9, "set metadata.name"),
            ("kind: Service\nmetadata: {name: web}\n", 9, "write v1"),
            ("apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n", 9, "write discovery.k8s.io/v1"),
            ("apiVersion: networking.k8s.io/v1beta1\nkind: ServiceCIDR\n", 9, "write networking.k8s.io/v1"),
            ("apiVersion: networking.k8s.io/v1beta1\nkind: NetworkPolicy\n", 9, "write networking.k8s.io/v1"),
            ("kind: Namespace\nmetadata: {name: shop}\n", 9, "write v1"),
            ("apiVersion: v1\nkind: List\nitems:\n- {kind: Node, apiVersion: v1, metadata: 3}\n", 12, "ObjectMeta"),
        ] {
            let error = broken(&format!("{SERVICE}---\n{second}"));
            // A parser that finds the end of the file instead of a bracket may say so one line further.
            assert!((line..=line + 1).contains(&error.line), "{second:?}: {error:?}");
            assert!(error.message.contains(needle), "{second:?}: {error:?}");
            assert!(!error.message.contains("at line") && !error.message.contains("Options"), "{error:?}");
        }
    }

    #[test]
    fn policies_and_what_they_select_are_read() {
        let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\napiVersion: networking.k8s.io/v1\n\
                    kind: NetworkPolicy\nmetadata: {name: deny, namespace: shop}\nspec: {podSelector: {}}\n";
        assert_eq!(names(text), [("Namespace shop".to_owned(), 1), ("NetworkPolicy shop/deny".to_owned(), 5)]);
        assert_eq!(names("apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nspec: {order: 1}\n"), []);
    }

    #[test]
    fn foreign_kinds_of_our_names_are_passed_over() {
        assert_eq!(names("apiVersion: serving.knative.dev/v1\nkind: Service\nspec: {template: {}}\n"), []);
    }

    #[test]
    fn expansion_without_end_is_refused() {
        let mut bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for (this, last) in ('b'..='i').zip('a'..) {
            writeln!(bomb, "{this}: &{this} [{}]", vec![format!("*{last}"); 10].join(", ")).unwrap();
        }
        broken(&format!("apiVersion: v1\nkind: List\nitems: []\n{bomb}"));
    }

    #[test]
    fn ten_thousand_endpoints_in_one_document() {
        let mut text =
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata:\n  name: a\n  labels: \
                        {kubernetes.io/service-name: web}\nports: [{port: 80}]\nendpoints:\n"
                .to_owned();
        for i in 0..10_000u32 {
            let addr = std::net::Ipv4Addr::from(0x0a00_0001 + i);
            writeln!(text, "- {{addresses: [{addr}], conditions: {{ready: true}}, nodeName: n1}}").unwrap();
        }
        let declared = parse(&text, &mut Converter::new()).unwrap();
        match &declared[0].event {
            Event::Apply(crate::source::Object::Slice(slice)) => assert_eq!(slice.endpoints.len(), 10_000),
            other => panic!("{other:?}"),
        }
        assert_eq!(declared[0].object.kind, Kind::Slice);
    }
}
