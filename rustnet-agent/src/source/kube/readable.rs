//! An object that cannot be read is an object, too, with a name and a reason.
//!
//! The client drops the event of an object that its type cannot hold, and goes on with the watch. The deletion of that object would be
//! dropped as well, and a list that has it would fail as a whole. The text of an object is kept until it is read, which in a watch
//! takes the type of an event before its object, as API servers write it.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// An object of the API server.
#[derive(Clone, Debug)]
pub(super) enum Readable<K> {
    /// It has the fields of its kind.
    Whole(K),
    /// It has not.
    Broken {
        /// Its name, namespace and version.
        meta: Box<ObjectMeta>,
        /// What is wrong.
        why: Box<str>,
    },
}

/// What each object has.
#[derive(Deserialize)]
struct Named {
    metadata: Meta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    resource_version: Option<String>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Readable<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&RawValue>::deserialize(deserializer)?;
        let why = match serde_json::from_str(text.get()) {
            Ok(object) => return Ok(Self::Whole(object)),
            Err(why) => why,
        };
        let Named { metadata } = serde_json::from_str(text.get()).map_err(D::Error::custom)?;
        let Meta { name, namespace, resource_version } = metadata;
        let meta = ObjectMeta { name, namespace, resource_version, ..ObjectMeta::default() };
        Ok(Self::Broken { meta: meta.into(), why: shorten(&why.to_string()).into() })
    }
}

/// The reason without its place, which moves with whatever the object has before it, and without the rest of a long value.
fn shorten(why: &str) -> String {
    const CHARS: usize = 200;
    let reason = why.rfind(" at line ").map_or(why, |end| &why[..end]);
    reason.chars().take(CHARS).collect()
}

impl<K: Resource<DynamicType = ()>> Resource for Readable<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }
    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }
    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }
    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }
    fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Whole(object) => object.meta(),
            Self::Broken { meta, .. } => meta,
        }
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Whole(object) => object.meta_mut(),
            Self::Broken { meta, .. } => meta,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Readable;
    use k8s_openapi::api::core::v1::Node;

    fn why(text: &str) -> String {
        match serde_json::from_str::<Readable<Node>>(text).expect("an object") {
            Readable::Broken { why, .. } => why.into(),
            Readable::Whole(node) => panic!("{node:?}"),
        }
    }

    /// Another text would be another event each time.
    #[test]
    fn the_reason_is_short_and_says_no_place() {
        let reason = why(r#"{"metadata":{"name":"a"},"spec":{"podCIDRs":7}}"#);
        assert_eq!(reason, why(r#"{"metadata":{"name":"a","uid":"abc"},  "spec":{"podCIDRs":7}}"#));
        assert!(reason.contains("invalid type: integer `7`") && !reason.contains("line"), "{reason}");
        let long = format!(r#"{{"metadata":{{"name":"a"}},"spec":{{"podCIDRs":"{}"}}}}"#, "x".repeat(9000));
        assert_eq!(why(&long).len(), 200);
    }
}
