//! Kubernetes objects to the model: the one place where the API's types are read. Both sources use it, so that an object
//! means the same wherever it comes from.
//!
//! One bad port or address costs that port or address, never the object; what was left out is reported with the object.

mod cluster_network_policy;
mod network_policy;
mod node;
mod pod;
mod service;
mod service_cidr;
mod slice;
#[cfg(test)]
mod tests;

pub use pod::{MIRROR, POLICY_AUDIT, SOCKET_LB};

use super::{Event, Kind, ObjectRef};
use crate::model::{Family, Interner, LabelPool, Labels, ObjectName, Problem};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use rustnet_common::tuple::proto;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Label of objects that another proxy takes care of.
const FOREIGN_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Label of objects of headless services.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// An object that cannot even be named.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{kind} {name:?}: not a name; set metadata.name (and namespace) to lower-case letters, digits, '-' and '.'")]
pub struct BadName {
    kind: Kind,
    name: String,
}

/// Turns Kubernetes objects into events. One per stream of objects; it remembers strings that repeat.
#[derive(Debug, Default)]
pub struct Converter {
    strings: Interner,
    labels: LabelPool,
}

impl Converter {
    /// A converter that has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn labels(&mut self, given: &BTreeMap<String, String>) -> Labels {
        let given = given.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        Labels::intern(given, &mut self.strings, &mut self.labels)
    }
}

/// What identifies an object of the given kind. A namespaced object without a namespace is in `default`.
pub fn reference(kind: Kind, meta: &ObjectMeta) -> Result<ObjectRef, BadName> {
    let name = meta.name.as_deref().unwrap_or("");
    let namespace = match meta.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    };
    let valid = |s: &str| {
        !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    if !valid(name) || !valid(namespace) {
        return Err(BadName { kind, name: name.to_owned() });
    }
    let name = match kind {
        Kind::Node | Kind::Namespace | Kind::ServiceCidr | Kind::ClusterNetworkPolicy => ObjectName::cluster(name),
        Kind::Service | Kind::Slice | Kind::Pod | Kind::NetworkPolicy => ObjectName::namespaced(namespace, name),
    };
    Ok(ObjectRef { kind, name })
}

/// The event of an object of which only the name can be read.
///
/// # Errors
/// It has no name.
pub fn unreadable(kind: Kind, meta: &ObjectMeta, why: &str) -> Result<Event, BadName> {
    let object = reference(kind, meta)?;
    let mut findings = Findings::new(&object);
    findings.add(
        "",
        format!("cannot be read: {why}; what this node knew of it stays, and a NetworkPolicy that it did not know closes its namespace (a ClusterNetworkPolicy is for no pod); this release does not know the object's form"),
    );
    Ok(Event::Unreadable(object, findings.done()))
}

/// True if the labels say that the object is not for us.
fn is_foreign(meta: &ObjectMeta) -> bool {
    meta.labels.as_ref().is_some_and(|labels| labels.contains_key(FOREIGN_PROXY) || labels.contains_key(HEADLESS))
}

/// Seconds since 1970 at which an object was created, 0 when it does not say.
fn created(meta: &ObjectMeta) -> i64 {
    meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second())
}

/// The problems found in one object so far. Beyond [`Findings::MAX`] they are only counted: an object with 10,000 bad
/// addresses is one problem, not 10,000.
struct Findings {
    subject: Arc<str>,
    list: Vec<Problem>,
    more: usize,
}

impl Findings {
    const MAX: usize = 8;

    fn new(object: &ObjectRef) -> Self {
        Self { subject: object.to_string().into(), list: Vec::new(), more: 0 }
    }

    /// Notes a problem of a field.
    fn add(&mut self, field: impl Into<Box<str>>, message: impl Into<Box<str>>) {
        if self.list.len() < Self::MAX {
            self.list.push(Problem::new(&self.subject, field, message));
        } else {
            self.more += 1;
        }
    }

    fn done(mut self) -> Box<[Problem]> {
        if self.more > 0 {
            self.list.push(Problem::new(&self.subject, "", format!("and {} more problems like these", self.more)));
        }
        self.list.into()
    }

    /// The object cannot be used at all.
    fn reject(mut self, object: ObjectRef, field: &str, message: impl Into<Box<str>>) -> Event {
        self.add(field, message);
        Event::Reject(object, self.done())
    }
}

/// A port number; the error says what is wrong and how to fix it.
fn port(number: i32) -> Result<u16, String> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{number} is not a port, it is left out; use 1-65535")),
    }
}

/// An IP protocol number from Kubernetes' name of it; TCP when absent.
fn protocol(name: Option<&str>) -> Result<u8, String> {
    match name {
        None | Some("" | "TCP") => Ok(proto::TCP),
        Some("UDP") => Ok(proto::UDP),
        Some("SCTP") => Ok(proto::SCTP),
        Some(other) => Err(format!("{other:?} is not a protocol, its port is left out; use TCP, UDP or SCTP")),
    }
}

/// An address.
fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| decimal(text)?.parse().ok())
}

/// A range of addresses.
fn range(text: &str) -> Option<IpNet> {
    let (ip, length) = text.split_once('/')?;
    text.parse().ok().or_else(|| format!("{}/{length}", decimal(ip)?).parse().ok())
}

/// An IPv4 address without the leading zeros of its octets. Whatever stored an address with them meant decimal numbers, and all of
/// Kubernetes' components read them so (`ParseIPSloppy`); Rust's parser refuses them, as others take them for octal.
fn decimal(text: &str) -> Option<String> {
    let octet = |octet: &str| {
        let is_number = !octet.is_empty() && octet.bytes().all(|byte| byte.is_ascii_digit());
        let digits = octet.trim_start_matches('0');
        is_number.then(|| if digits.is_empty() { "0" } else { digits }.to_owned())
    };
    Some(text.split('.').map(octet).collect::<Option<Vec<_>>>()?.join("."))
}

/// A unicast address that packets can be sent to; the error says what is wrong and how to fix it.
fn unicast(text: &str) -> Result<IpAddr, String> {
    let ip = address(text)
        .ok_or_else(|| format!("{text:?} is not an IP address, it is left out; write it like 10.0.0.1 or fd00::1"))?;
    let special = match ip {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("unspecified"),
        IpAddr::V4(v4) if v4.is_loopback() => Some("loopback"),
        IpAddr::V4(v4) if v4.is_link_local() => Some("link-local"),
        IpAddr::V4(v4) if v4.is_multicast() => Some("multicast"),
        // The rest of 240.0.0.0/4 is reserved for a future that came: clusters use it, and Linux forwards it.
        IpAddr::V4(v4) if v4.is_broadcast() => Some("broadcast"),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Some("unspecified"),
        IpAddr::V6(v6) if v6.is_loopback() => Some("loopback"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("link-local"),
        IpAddr::V6(v6) if v6.is_multicast() => Some("multicast"),
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Some("IPv4-mapped"),
        IpAddr::V4(_) | IpAddr::V6(_) => None,
    };
    match special {
        Some(special) => Err(format!("{ip} is {special}, it is left out; use a unicast address of the cluster")),
        None => Ok(ip),
    }
}

/// A family from Kubernetes' name of it.
fn family(name: &str) -> Option<Family> {
    match name {
        "IPv4" => Some(Family::V4),
        "IPv6" => Some(Family::V6),
        _ => None,
    }
}
