//! `discovery.k8s.io/v1/EndpointSlice`: endpoints, their ports and conditions.

use super::{BadName, Converter, Findings, family, is_foreign, port, protocol, reference, unicast};
use crate::model::{Condition, Endpoint, EndpointSlice, Family, Hints, ObjectName, TargetPort};
use crate::source::{Event, Kind, Object};
use k8s_openapi::api::discovery::v1::{
    Endpoint as KubeEndpoint, EndpointConditions, EndpointHints, EndpointSlice as KubeSlice,
};
use k8s_openapi::jiff::Timestamp;
use std::sync::Arc;
use std::time::SystemTime;

/// Label that names the Service of a slice.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Annotation with the time of what the last change followed from, such as a pod that became ready.
const TRIGGER: &str = "endpoints.kubernetes.io/last-change-trigger-time";

fn triggered(slice: &KubeSlice) -> Option<SystemTime> {
    let text = slice.metadata.annotations.as_ref()?.get(TRIGGER)?;
    text.parse::<Timestamp>().ok().map(SystemTime::from)
}

impl Converter {
    /// What an added or changed EndpointSlice means.
    pub fn slice(&mut self, slice: &KubeSlice) -> Result<Event, BadName> {
        let object = reference(Kind::Slice, &slice.metadata)?;
        if is_foreign(&slice.metadata) || slice.address_type == "FQDN" {
            return Ok(Event::Delete(object));
        }
        let mut findings = Findings::new(&object);
        let Some(family) = family(&slice.address_type) else {
            let message = format!("{:?} is unknown, the slice is left out; use IPv4 or IPv6", slice.address_type);
            return Ok(findings.reject(object, "addressType", message));
        };
        let labels = slice.metadata.labels.as_ref();
        let Some(service) = labels.and_then(|labels| labels.get(SERVICE_NAME)).filter(|name| !name.is_empty()) else {
            let message = format!("the slice is left out, as it names no service; set {SERVICE_NAME}");
            return Ok(findings.reject(object, "metadata.labels", message));
        };
        let namespace = object.name.as_str().split_once('/').map_or("default", |(namespace, _)| namespace);
        let service = ObjectName::namespaced(namespace, service);
        let ports = self.target_ports(slice, &mut findings);
        let endpoints: Box<[Endpoint]> = slice
            .endpoints
            .iter()
            .enumerate()
            .filter_map(|(i, endpoint)| self.endpoint(i, endpoint, family, &mut findings))
            .collect();
        let problems = findings.done();
        let slice = EndpointSlice {
            name: object.name,
            service,
            family,
            ports,
            endpoints,
            triggered: triggered(slice),
            problems,
        };
        Ok(Event::Apply(Object::Slice(Arc::new(slice))))
    }

    fn target_ports(&mut self, slice: &KubeSlice, findings: &mut Findings) -> Box<[TargetPort]> {
        let mut ports: Vec<TargetPort> = Vec::new();
        for (i, given) in slice.ports.iter().flatten().enumerate() {
            let Some(number) = given.port else {
                findings.add(format!("ports[{i}].port"), "missing, the port is left out; write its number");
                continue;
            };
            let number = match port(number) {
                Ok(number) => number,
                Err(wrong) => {
                    findings.add(format!("ports[{i}].port"), wrong);
                    continue;
                }
            };
            let proto = match protocol(given.protocol.as_deref()) {
                Ok(proto) => proto,
                Err(wrong) => {
                    findings.add(format!("ports[{i}].protocol"), wrong);
                    continue;
                }
            };
            let name = given.name.as_deref().unwrap_or("");
            if ports.iter().any(|p| &*p.name == name && p.proto == proto) {
                findings.add(
                    format!("ports[{i}].name"),
                    format!("{name:?} is there twice, the first is used; give each port a name of its own"),
                );
                continue;
            }
            ports.push(TargetPort { name: self.strings.intern(name), port: number, proto });
        }
        ports.into()
    }

    fn endpoint(
        &mut self,
        i: usize,
        given: &KubeEndpoint,
        family: Family,
        findings: &mut Findings,
    ) -> Option<Endpoint> {
        // All addresses of an endpoint are fungible: the API documents that clients use the first.
        let Some(text) = given.addresses.first() else {
            findings.add(format!("endpoints[{i}].addresses"), "empty, the endpoint is left out; write its address");
            return None;
        };
        let addr = match unicast(text) {
            Ok(addr) if Family::of(addr) == family => addr,
            Ok(addr) => {
                let is = Family::of(addr);
                findings.add(
                    format!("endpoints[{i}].addresses[0]"),
                    format!(
                        "{addr} is {is} in an {family} slice, it is left out; put it into a slice of addressType {is}"
                    ),
                );
                return None;
            }
            Err(wrong) => {
                findings.add(format!("endpoints[{i}].addresses[0]"), wrong);
                return None;
            }
        };
        Some(Endpoint {
            addr,
            condition: condition(given.conditions.as_ref()),
            node: self.strings.intern(given.node_name.as_deref().unwrap_or("")),
            pod: pod(given).into(),
            hints: given.hints.as_ref().and_then(|hints| self.hints(hints)),
        })
    }

    fn hints(&mut self, given: &EndpointHints) -> Option<Box<Hints>> {
        let nodes: Box<[_]> = given.for_nodes.iter().flatten().map(|hint| self.strings.intern(&hint.name)).collect();
        let zones: Box<[_]> = given.for_zones.iter().flatten().map(|hint| self.strings.intern(&hint.name)).collect();
        (!nodes.is_empty() || !zones.is_empty()).then(|| Box::new(Hints { nodes, zones }))
    }
}

/// The name of an endpoint's pod; empty when it is none.
fn pod(given: &KubeEndpoint) -> &str {
    let target = given.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    target.and_then(|target| target.name.as_deref()).unwrap_or_default()
}

/// Absent `ready` and `serving` mean true, absent `terminating` means false. What `publishNotReadyAddresses` publishes
/// arrives as ready from the controller.
fn condition(given: Option<&EndpointConditions>) -> Condition {
    let (ready, serving, terminating) = given.map_or((None, None, None), |c| (c.ready, c.serving, c.terminating));
    match (ready.unwrap_or(true), serving.unwrap_or(true), terminating.unwrap_or(false)) {
        (true, _, _) => Condition::Ready,
        (false, true, true) => Condition::Draining,
        (false, true, false) => Condition::Holding,
        (false, false, _) => Condition::Unusable,
    }
}
