//! `v1/Service`: which have virtual addresses, which addresses and ports.

use super::{BadName, Converter, Findings, created, family, is_foreign, port, protocol, range, reference, unicast};
use crate::config::{Algorithm, Forwarding};
use crate::model::{Family, Service, ServicePort};
use crate::source::{Event, Kind, Object};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service as KubeService, ServiceSpec};
use rustnet_common::tuple::proto;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

/// Affinity time-out when the Service does not say: three hours, as the API's default is.
const DEFAULT_AFFINITY: u32 = 10_800;

impl Converter {
    /// What an added or changed Service means.
    pub fn service(&mut self, service: &KubeService) -> Result<Event, BadName> {
        let object = reference(Kind::Service, &service.metadata)?;
        let Some(spec) = &service.spec else {
            return Ok(Findings::new(&object).reject(object, "spec", "missing; add clusterIPs and ports"));
        };
        let headless = spec.cluster_ip.as_deref() == Some("None")
            || spec.cluster_ips.as_ref().and_then(|ips| ips.first()).is_some_and(|ip| ip == "None");
        if is_foreign(&service.metadata) || spec.type_.as_deref() == Some("ExternalName") || headless {
            return Ok(Event::Delete(object));
        }
        let mut findings = Findings::new(&object);
        let vips = vips(spec, &mut findings);
        if vips.is_empty() && findings.list.is_empty() {
            return Ok(findings.reject(
                object,
                "spec.clusterIPs",
                "missing, so that it has no address; nobody assigns one without an API server: write clusterIPs and \
                 ipFamilies (or clusterIP: None for a headless service)",
            ));
        }
        let mut ports = self.service_ports(spec, &mut findings);
        if !matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer")) {
            // The API server keeps numbers of another type before.
            ports.iter_mut().for_each(|port| port.node_port = 0);
        }
        if ports.is_empty() && findings.list.is_empty() {
            findings.add("spec.ports", "no ports, so that every connection to it is refused; add one");
        }
        let balanced = balanced(service, spec, &vips, &mut findings);
        let external = external(spec, &vips, &balanced, &mut findings);
        let service = Service {
            name: object.name,
            created: created(&service.metadata),
            vips,
            ports,
            affinity: affinity(spec, &mut findings),
            algorithm: override_of(service, "lb-algorithm", "random or maglev", Algorithm::parse, &mut findings),
            forwarding: override_of(service, "forwarding-mode", "snat or dsr", Forwarding::parse, &mut findings),
            internal_local: is_local(
                spec.internal_traffic_policy.as_deref(),
                "spec.internalTrafficPolicy",
                &mut findings,
            ),
            external,
            balanced,
            source_ranges: source_ranges(spec, &mut findings),
            external_local: is_local(
                spec.external_traffic_policy.as_deref(),
                "spec.externalTrafficPolicy",
                &mut findings,
            ),
            health_check_port: health_check_port(spec, &mut findings),
            problems: findings.done(),
        };
        Ok(Event::Apply(Object::Service(Arc::new(service))))
    }

    fn service_ports(&mut self, spec: &ServiceSpec, findings: &mut Findings) -> Box<[ServicePort]> {
        let mut ports: Vec<ServicePort> = Vec::new();
        for (i, given) in spec.ports.iter().flatten().enumerate() {
            let number = match port(given.port) {
                Ok(number) => number,
                Err(wrong) => {
                    findings.add(format!("spec.ports[{i}].port"), wrong);
                    continue;
                }
            };
            let proto = match protocol(given.protocol.as_deref()) {
                Ok(proto) => proto,
                Err(wrong) => {
                    findings.add(format!("spec.ports[{i}].protocol"), wrong);
                    continue;
                }
            };
            let node_port = match given.node_port.filter(|number| *number != 0).map(port).transpose() {
                Ok(number) => number.unwrap_or(0),
                Err(wrong) => {
                    findings.add(format!("spec.ports[{i}].nodePort"), wrong);
                    0
                }
            };
            let name = given.name.as_deref().unwrap_or("");
            if ports.iter().any(|p| p.port == number && p.proto == proto) {
                findings.add(
                    format!("spec.ports[{i}].port"),
                    format!(
                        "{number}/{} is there twice, the first is used; remove one or change its number",
                        proto::name(proto)
                    ),
                );
                continue;
            }
            if ports.iter().any(|p| &*p.name == name && p.proto == proto) {
                findings.add(
                    format!("spec.ports[{i}].name"),
                    format!("{name:?} is there twice, the first is used; give each port a name of its own"),
                );
                continue;
            }
            ports.push(ServicePort { name: self.strings.intern(name), port: number, proto, node_port });
        }
        ports.into()
    }
}

/// The address of each family: `clusterIPs[i]` is of `ipFamilies[i]`.
fn vips(spec: &ServiceSpec, findings: &mut Findings) -> Box<[IpAddr]> {
    let first = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty());
    let all = spec.cluster_ips.as_deref().unwrap_or_default();
    let (field, given): (_, Vec<&str>) = if all.is_empty() {
        ("spec.clusterIP", first.into_iter().collect())
    } else {
        ("spec.clusterIPs", all.iter().map(String::as_str).collect())
    };
    if let (Some(first), Some(other)) = (first, all.first())
        && first != other
    {
        findings
            .add("spec.clusterIP", format!("{first} is ignored, as clusterIPs begins with {other}; make them equal"));
    }
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let mut vips: Vec<IpAddr> = Vec::new();
    for (i, text) in given.into_iter().enumerate() {
        let at = || if all.is_empty() { field.to_owned() } else { format!("{field}[{i}]") };
        let ip = match unicast(text) {
            Ok(ip) => ip,
            Err(wrong) => {
                findings.add(at(), wrong);
                continue;
            }
        };
        let is = Family::of(ip);
        if let Some(said) = families.get(i)
            && family(said) != Some(is)
        {
            findings
                .add(at(), format!("{ip} is {is} where ipFamilies[{i}] says {said}, it is left out; make them agree"));
        } else if vips.iter().any(|vip| Family::of(*vip) == is) {
            findings.add(at(), format!("{ip} is a second {is} address, it is left out; a service has one a family"));
        } else {
            vips.push(ip);
        }
    }
    vips.into()
}

fn affinity(spec: &ServiceSpec, findings: &mut Findings) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => 0,
        Some("ClientIP") => {
            let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            match client_ip.and_then(|client_ip| client_ip.timeout_seconds) {
                None => DEFAULT_AFFINITY,
                // The API allows a second to a day.
                Some(seconds @ 1..=86_400) => seconds.unsigned_abs(),
                Some(seconds) => {
                    findings.add(
                        "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                        format!("{seconds} is out of range, {DEFAULT_AFFINITY} is used; use 1-86400"),
                    );
                    DEFAULT_AFFINITY
                }
            }
        }
        Some(other) => {
            findings.add("spec.sessionAffinity", format!("{other:?} is unknown, none is used; use None or ClientIP"));
            0
        }
    }
}

/// Addresses of load balancers that deliver packets as they are (`ipMode: VIP`, KEP-1860).
fn balanced(service: &KubeService, spec: &ServiceSpec, vips: &[IpAddr], findings: &mut Findings) -> Box<[IpAddr]> {
    let status = service.status.as_ref().filter(|_| is_balanced(spec)).and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_ref()).into_iter().flatten().enumerate();
    let given = ingress.filter(|(_, it)| it.ip_mode.as_deref() != Some("Proxy")).filter_map(|(i, it)| {
        let ip = it.ip.as_deref().filter(|ip| !ip.is_empty())?;
        Some((format!("status.loadBalancer.ingress[{i}].ip"), ip))
    });
    addresses(given, vips, &[], findings)
}

/// `externalIPs`. One that is a load balancer's, too, is left out: it is only for the clients of that.
fn external(spec: &ServiceSpec, vips: &[IpAddr], balanced: &[IpAddr], findings: &mut Findings) -> Box<[IpAddr]> {
    let given = spec.external_ips.iter().flatten().enumerate();
    addresses(given.map(|(i, ip)| (format!("spec.externalIPs[{i}]"), ip.as_str())), vips, balanced, findings)
}

/// Addresses with the fields that they stand in, each once, of the families of `vips` and none of `others`.
fn addresses<'a>(
    given: impl Iterator<Item = (String, &'a str)>,
    vips: &[IpAddr],
    others: &[IpAddr],
    findings: &mut Findings,
) -> Box<[IpAddr]> {
    let mut found: Vec<IpAddr> = Vec::new();
    for (field, text) in given {
        match unicast(text) {
            Ok(ip) if found.contains(&ip) || others.contains(&ip) => {}
            Ok(ip) if vips.iter().all(|vip| Family::of(*vip) != Family::of(ip)) => {
                findings.add(
                    field,
                    format!(
                        "the Service has no {} address, {ip} is left out; add the family to ipFamilies",
                        Family::of(ip)
                    ),
                );
            }
            Ok(ip) => found.push(ip),
            Err(wrong) => findings.add(field, wrong),
        }
    }
    found.into()
}

/// The clients that a load balancer is for; `None` if the Service does not say. What is no range allows nobody.
fn source_ranges(spec: &ServiceSpec, findings: &mut Findings) -> Option<Box<[IpNet]>> {
    let given = spec.load_balancer_source_ranges.as_ref().filter(|given| is_balanced(spec) && !given.is_empty())?;
    let mut ranges = BTreeSet::new();
    for (i, text) in given.iter().enumerate() {
        match range(text.trim()) {
            Some(range) => {
                ranges.insert(range.trunc());
            }
            None => findings.add(
                format!("spec.loadBalancerSourceRanges[{i}]"),
                format!("{text:?} is not a range, it allows nobody; write an address and a length, as in 192.0.2.0/24"),
            ),
        }
    }
    Some(ranges.into_iter().collect())
}

/// The word of an annotation that overrides a `setting` of the agent, which has the same name; `words`: those that there are.
fn override_of<T>(
    service: &KubeService,
    setting: &str,
    words: &str,
    parse: impl Fn(&str) -> Option<T>,
    findings: &mut Findings,
) -> Option<T> {
    let annotation = format!("rustnet.io/{setting}");
    let text = service.metadata.annotations.as_ref()?.get(&annotation)?;
    let word = parse(text);
    if word.is_none() {
        findings.add(
            format!("metadata.annotations[{annotation}]"),
            format!("{text:?} is unknown, the agent's {setting} is used; use {words}"),
        );
    }
    word
}

/// True for a Service with a load balancer.
fn is_balanced(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("LoadBalancer")
}

/// The health check node port of a Service that has one: with a load balancer that must know which nodes have endpoints.
fn health_check_port(spec: &ServiceSpec, findings: &mut Findings) -> u16 {
    let has_check = is_balanced(spec) && spec.external_traffic_policy.as_deref() == Some("Local");
    let given = spec.health_check_node_port.filter(|number| has_check && *number != 0);
    given.map(port).transpose().map_or_else(
        |wrong| {
            findings.add("spec.healthCheckNodePort", wrong);
            0
        },
        Option::unwrap_or_default,
    )
}

/// What a traffic policy says: only endpoints of this node.
fn is_local(policy: Option<&str>, field: &str, findings: &mut Findings) -> bool {
    match policy {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            findings.add(field, format!("{other:?} is unknown, Cluster is used; use Cluster or Local"));
            false
        }
    }
}
