use crate::model::{Labels, Pod};
use crate::source::convert::Converter;
use crate::source::{Event, Object};
use serde_json::json;
use std::sync::Arc;

fn pod(converter: &mut Converter, value: serde_json::Value) -> Arc<Pod> {
    match converter.pod(&serde_json::from_value(value).unwrap()) {
        Ok(Event::Apply(Object::Pod(pod))) => pod,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pod_has_its_labels_and_named_ports() {
    let value = json!({
        "metadata": {"name": "web-0", "labels": {"b": "2", "a": "1"}},
        "spec": {
            "containers": [
                {"name": "c", "ports": [
                    {"containerPort": 80, "name": "web"}, {"containerPort": 81}, {"containerPort": 0, "name": "zero"},
                    {"containerPort": 53, "name": "dns", "protocol": "UDP"},
                ]},
                {"name": "d", "ports": [{"containerPort": 82, "name": "web"}, {"containerPort": 53, "name": "dns"}]},
            ],
            "initContainers": [
                {"name": "i", "ports": [{"containerPort": 90, "name": "init"}]},
                {"name": "s", "restartPolicy": "Always", "ports": [{"containerPort": 91, "name": "side"}]},
            ],
        },
    });
    let mut converter = Converter::new();
    let it = pod(&mut converter, value.clone());
    assert_eq!((it.labels.get("a"), it.labels.get("b"), it.labels.get("c")), (Some("1"), Some("2"), None));
    for (name, proto, want) in [
        ("web", 6, Some(80)),
        ("dns", 17, Some(53)),
        ("dns", 6, Some(53)),
        ("side", 6, Some(91)),
        ("web", 17, None),
        ("init", 6, None),
        ("zero", 6, None),
        ("", 6, None),
    ] {
        assert_eq!(it.port(name, proto), want, "{name} of {proto}");
    }
    assert_eq!(pod(&mut converter, json!({"metadata": {"name": "a"}})).labels, Labels::default());
    assert_eq!(pod(&mut converter, value), it);
}

/// The runtime knows a static pod by the UID of its file; the object in the API has another one.
#[test]
fn a_pod_has_the_uid_by_which_the_runtime_knows_it() {
    for (metadata, want) in [
        (json!({"name": "a"}), ""),
        (json!({"name": "a", "uid": "u"}), "u"),
        (json!({"name": "a", "uid": "u", "annotations": {"kubernetes.io/config.mirror": "m"}}), "m"),
        (json!({"name": "a", "uid": "u", "annotations": {"kubernetes.io/config.hash": "h"}}), "u"),
    ] {
        let pod = pod(&mut Converter::new(), json!({"metadata": metadata}));
        assert_eq!(&*pod.uid, want, "{metadata}");
    }
}

#[test]
fn a_namespace_has_its_name_for_a_label() {
    for (labels, a) in [(json!({"a": "1", "kubernetes.io/metadata.name": "x"}), Some("1")), (json!(null), None)] {
        let value = json!({"metadata": {"name": "shop", "labels": labels}});
        let Ok(Event::Apply(Object::Namespace(it))) =
            Converter::new().namespace(&serde_json::from_value(value).unwrap())
        else {
            panic!("no namespace")
        };
        assert_eq!((it.name.as_str(), it.labels.get("a")), ("shop", a));
        assert_eq!(it.labels.get(crate::model::NAME_LABEL), Some("shop"));
    }
}

#[test]
fn a_namespace_is_audited_if_its_annotation_says_so() {
    for (text, want, problems) in
        [(None, false, 0), (Some("true"), true, 0), (Some("false"), false, 0), (Some("yes"), false, 1)]
    {
        let annotations = text.map(|text| json!({"rustnet.io/policy-audit": text}));
        let value = json!({"metadata": {"name": "shop", "annotations": annotations}});
        let Ok(Event::Apply(Object::Namespace(it))) =
            Converter::new().namespace(&serde_json::from_value(value).unwrap())
        else {
            panic!("no namespace")
        };
        assert_eq!((it.is_audited, it.problems.len()), (want, problems), "{text:?}: {:?}", it.problems);
    }
}
