//! Health check node ports.

use super::{VIP4, gone, index};
use crate::index::{HealthCheck, Index};
use crate::model::build::{endpoint, service, slice};
use crate::model::{EndpointSlice, Family, ObjectName, Service};
use crate::source::Kind;

fn checked(name: &str, port: u16) -> Service {
    let service = service(name, &[VIP4]).tcp(80).node_port(30_080);
    Service { external_local: true, health_check_port: port, ..service }
}

/// Each port with the name of its Service and the count.
fn checks(index: &mut Index) -> Option<Vec<(u16, String, usize)>> {
    let all = index.take_health_checks()?;
    let row =
        |(port, HealthCheck { service, local_endpoints })| (port, ObjectName::to_string(&service), local_endpoints);
    Some(all.into_iter().map(row).collect())
}

fn row(port: u16, name: &str, count: usize) -> (u16, String, usize) {
    (port, format!("default/{name}"), count)
}

fn web(family: Family) -> EndpointSlice {
    let name = if family == Family::V4 { "web-4" } else { "web-6" };
    slice(name, "web", family).tcp(8080)
}

#[test]
fn ports_come_and_go_with_their_services() {
    let mut it = index([service("plain", &[]).tcp(80).apply()]);
    assert_eq!(checks(&mut it), None, "nobody asks");
    it.handle(checked("web", 32_001).apply());
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "web", 0)]));
    assert_eq!(checks(&mut it), None, "nothing has changed");
    it.handle(slice("plain-1", "plain", Family::V4).tcp(8080).ready(&["10.244.1.9"]).apply());
    assert_eq!(checks(&mut it), None, "another Service's endpoints");
    it.handle(web(Family::V4).endpoint(endpoint("10.244.1.5").on("n1")).apply());
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "web", 1)]));
    it.handle(checked("web", 32_002).apply());
    assert_eq!(checks(&mut it), Some(vec![row(32_002, "web", 1)]), "moved");
    it.handle(gone(Kind::Service, "web"));
    assert_eq!(checks(&mut it), Some(vec![]));
}

#[test]
fn only_ready_endpoints_of_this_node_count_each_once() {
    let mut it = index([checked("web", 32_001).apply()]);
    let both_ports = web(Family::V4).port("admin", 9090, 6);
    let counted = [endpoint("10.244.1.5").on("n1"), endpoint("10.244.1.6").on("n1"), endpoint("10.244.1.6").on("n1")];
    let others = [
        endpoint("10.244.2.5").on("n2"),
        endpoint("10.244.9.5"),
        endpoint("10.244.1.7").on("n1").draining(),
        endpoint("10.244.1.8").on("n1").unusable(),
    ];
    it.handle(counted.into_iter().chain(others).fold(both_ports, EndpointSlice::endpoint).apply());
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "web", 2)]));
    // The same pods by their other address.
    it.handle(web(Family::V6).endpoint(endpoint("fd00::5").on("n1")).apply());
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "web", 2)]));
    it.handle(web(Family::V4).endpoint(endpoint("10.244.1.5").on("n1").draining()).apply());
    it.handle(gone(Kind::Slice, "web-6"));
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "web", 0)]));
}

#[test]
fn the_older_service_has_the_port_and_the_other_one_is_named() {
    let older = Service { vips: [].into(), ..checked("older", 32_001).created(1) };
    let mut it = index([checked("a", 32_001).created(2).apply(), older.apply(), checked("b", 32_002).apply()]);
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "older", 0), row(32_002, "b", 0)]));
    let named = |it: &Index| -> Vec<_> {
        let problems = it.problems().into_iter().filter(|it| &*it.field == "spec.healthCheckNodePort");
        problems.map(|it| it.to_string()).collect()
    };
    let problems = named(&it);
    assert!(problems.len() == 1 && problems[0].starts_with("Service default/a: spec.healthCheckNodePort: 32001"));
    assert!(problems[0].contains("default/older; give"), "{problems:?}");
    it.handle(gone(Kind::Service, "older"));
    assert_eq!(checks(&mut it), Some(vec![row(32_001, "a", 0), row(32_002, "b", 0)]));
    assert!(named(&it).is_empty());
}
