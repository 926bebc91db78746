//! ADD's result and `prevResult`: one form inside, the asked version's shape outside.

use super::error::{Error, code};
use super::version::Version;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use std::net::IpAddr;

/// Reads null as the type's default: Go runtimes send `null` for empty lists.
pub fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

/// The outcome of ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AddResult {
    /// Interfaces, host side first.
    #[serde(deserialize_with = "null_is_default")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(deserialize_with = "null_is_default")]
    pub ips: Vec<Ip>,
    /// Routes inside the pod.
    #[serde(deserialize_with = "null_is_default")]
    pub routes: Vec<Route>,
    /// Name servers.
    #[serde(deserialize_with = "null_is_default")]
    pub dns: Dns,
}

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU; only in 1.1.0.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "is_zero")]
    pub mtu: u32,
    /// Path of its network namespace; absent for the host's.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// One address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// Address with prefix length.
    pub address: IpNet,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// One route. Members beyond these (1.1.0: mtu, table, ...) come from a delegated IPAM and are passed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNet,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// The rest.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// Name servers and the like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of name servers.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// True if nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl AddResult {
    /// Reads a `prevResult`.
    ///
    /// # Errors
    /// It is not a result.
    pub fn from_prev(prev: Value) -> Result<Self, Error> {
        if !prev.is_object() {
            // serde would also take an array for a struct.
            return Err(Error::new(code::DECODE, "prevResult is not a JSON object"));
        }
        serde_json::from_value(prev).map_err(|e| Error::new(code::DECODE, format!("prevResult cannot be read: {e}")))
    }

    /// The result in the shape of `version`; empty members are left out.
    pub fn to_json(&self, version: Version) -> Result<Value, serde_json::Error> {
        let mut out = Map::new();
        out.insert("cniVersion".into(), version.as_str().into());
        let mut list = |key: &str, items: Vec<Value>| {
            if !items.is_empty() {
                out.insert(key.into(), items.into());
            }
        };
        let interfaces = self.interfaces.iter().map(|i| {
            let mtu = if version >= Version::V110 { i.mtu } else { 0 };
            serde_json::to_value(Interface { mtu, ..i.clone() })
        });
        list("interfaces", interfaces.collect::<Result<_, _>>()?);
        let ips = self.ips.iter().map(|ip| {
            let mut v = serde_json::to_value(ip)?;
            if version < Version::V100 {
                v["version"] = if ip.address.addr().is_ipv4() { "4" } else { "6" }.into();
            }
            Ok(v)
        });
        list("ips", ips.collect::<Result<_, serde_json::Error>>()?);
        let routes = self.routes.iter().map(|r| {
            let more = if version >= Version::V110 { r.more.clone() } else { Map::new() };
            serde_json::to_value(Route { more, ..r.clone() })
        });
        list("routes", routes.collect::<Result<_, _>>()?);
        if !self.dns.is_empty() {
            out.insert("dns".into(), serde_json::to_value(&self.dns)?);
        }
        Ok(out.into())
    }
}

#[cfg(test)]
mod tests {
    use super::{AddResult, Dns, Interface, Ip, Route};
    use crate::types::version::Version;
    use serde_json::{Map, json};

    fn sample() -> AddResult {
        let mut more = Map::new();
        more.insert("mtu".into(), 1400.into());
        AddResult {
            interfaces: vec![
                Interface { name: "rnv1".into(), mac: "02:00:00:00:00:01".into(), mtu: 1450, sandbox: String::new() },
                Interface {
                    name: "eth0".into(),
                    mac: "02:00:00:00:00:02".into(),
                    mtu: 1450,
                    sandbox: "/run/netns/a".into(),
                },
            ],
            ips: vec![
                Ip {
                    address: "10.1.0.5/16".parse().expect("address"),
                    gateway: "10.1.0.1".parse().ok(),
                    interface: Some(1),
                },
                Ip { address: "fd00::5/64".parse().expect("address"), gateway: None, interface: Some(1) },
            ],
            routes: vec![Route { dst: "0.0.0.0/0".parse().expect("route"), gw: None, more }],
            dns: Dns { nameservers: vec!["10.1.0.1".into()], ..Dns::default() },
        }
    }

    #[test]
    fn shape_by_version() {
        for v in Version::ALL {
            let family = |f: &str| if v < Version::V100 { json!({ "version": f }) } else { json!({}) };
            let mtu = |n: u32| if v == Version::V110 { json!({ "mtu": n }) } else { json!({}) };
            let merge = |mut a: serde_json::Value, b: serde_json::Value| {
                for (k, x) in b.as_object().expect("object") {
                    a[k] = x.clone();
                }
                a
            };
            let want = json!({
                "cniVersion": v.as_str(),
                "interfaces": [
                    merge(json!({ "name": "rnv1", "mac": "02:00:00:00:00:01" }), mtu(1450)),
                    merge(json!({ "name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/a" }), mtu(1450)),
                ],
                "ips": [
                    merge(json!({ "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1 }), family("4")),
                    merge(json!({ "address": "fd00::5/64", "interface": 1 }), family("6")),
                ],
                "routes": [merge(json!({ "dst": "0.0.0.0/0" }), mtu(1400))],
                "dns": { "nameservers": ["10.1.0.1"] },
            });
            assert_eq!(sample().to_json(v).expect("serialises"), want, "{v}");
        }
    }

    #[test]
    fn empty_members_are_left_out() {
        let v = AddResult::default().to_json(Version::V110).expect("serialises");
        assert_eq!(v, json!({ "cniVersion": "1.1.0" }));
    }

    #[test]
    fn reads_what_it_writes_and_nulls() {
        for v in Version::ALL {
            let mut want = sample();
            if v < Version::V110 {
                want.interfaces.iter_mut().for_each(|i| i.mtu = 0);
                want.routes[0].more.clear();
            }
            let mut got: AddResult = serde_json::from_value(sample().to_json(v).expect("serialises")).expect("parses");
            got.routes.iter_mut().for_each(|r| drop(r.more.remove("version")));
            assert_eq!(got, want, "{v}");
        }
        let nulls =
            json!({ "interfaces": null, "ips": null, "routes": null, "dns": { "search": null, "domain": null } });
        assert_eq!(serde_json::from_value::<AddResult>(nulls).expect("parses"), AddResult::default());
        let nulls =
            json!({ "interfaces": [{ "name": "", "mac": null, "mtu": null, "sandbox": null }], "routes": null });
        let want = AddResult { interfaces: vec![Interface::default()], ..AddResult::default() };
        assert_eq!(serde_json::from_value::<AddResult>(nulls).expect("parses"), want);
    }
}
