//! `networking.k8s.io/v1/ServiceCIDR`: ranges of Services.

use super::{BadName, Converter, Findings, range, reference};
use crate::config::reserved_range;
use crate::model::ServiceCidr;
use crate::source::{Event, Kind, Object};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR as KubeServiceCidr;
use std::sync::Arc;

impl Converter {
    /// What an added or changed ServiceCIDR means.
    pub fn service_cidr(&mut self, object: &KubeServiceCidr) -> Result<Event, BadName> {
        let reference = reference(Kind::ServiceCidr, &object.metadata)?;
        let mut findings = Findings::new(&reference);
        let given = object.spec.as_ref().and_then(|spec| spec.cidrs.as_deref()).unwrap_or_default();
        let mut cidrs: Vec<IpNet> = Vec::new();
        for (i, text) in given.iter().enumerate() {
            match service_range(text) {
                Ok(cidr) if cidrs.contains(&cidr) => {}
                Ok(cidr) => cidrs.push(cidr),
                Err(wrong) => findings.add(format!("spec.cidrs[{i}]"), wrong),
            }
        }
        let cidrs = cidrs.into();
        let object = ServiceCidr { name: reference.name, cidrs, problems: findings.done() };
        Ok(Event::Apply(Object::ServiceCidr(Arc::new(object))))
    }
}

/// A range that Services may have; the error says what is wrong and how to fix it.
fn service_range(text: &str) -> Result<IpNet, String> {
    let cidr = range(text).ok_or_else(|| {
        format!("{text:?} is not a range, it is left out; write it like 10.96.0.0/16 or fd00:96::/112")
    })?;
    let cidr = cidr.trunc();
    if cidr.prefix_len() == 0 {
        return Err(format!("{cidr} is everything, it is left out; give Services a range of their own"));
    }
    match reserved_range(cidr) {
        Some(reserved) => Err(format!("{cidr} overlaps {reserved}, it is left out; choose another range")),
        None => Ok(cidr),
    }
}
