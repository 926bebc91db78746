use super::{Entry, Flow, Held, Report, VipKey, report, text};
use crate::cli::golden::assert_golden;
use crate::model::build::{endpoint, ip, service, slice};
use crate::namefile::{ServiceName, Services, service_key};
use crate::servicefile::{self, Details, Objects, Service};
use crate::{config::Routing, index::Index, index::Settings, model::Family};
use rustnet_common::backend::{flags as backend_flags, id};
use rustnet_common::service::{SvcEntry, flags, scope};
use rustnet_common::tuple::proto;

fn key(address: &str, port: u16, scope: u8) -> VipKey {
    VipKey { ip: ip(address), port, proto: proto::TCP, scope }
}

fn names(keys: &[VipKey]) -> Services {
    let name = |key: &VipKey| {
        let name = ServiceName { service: "default/web".into(), port: "http".into() };
        (service_key(key.ip, key.port, key.proto), name)
    };
    keys.iter().map(name).collect()
}

fn held(slot: u32, set: u32, address: &str, flags: u16) -> Held {
    Held { addr: ip(address).into(), port: 8080, flags, id: id::make(slot, 1), service: set, max_service: set }
}

fn entry(id: u32, count: u32, flags: u16) -> SvcEntry {
    SvcEntry { first: 0, count, id, affinity: 600, flags, table: u16::from(count > 1) }
}

fn flow(asked: &str, led_to: &str, backend: u32) -> Flow {
    Flow { proto: proto::TCP, asked: asked.parse().unwrap(), led_to: led_to.parse().unwrap(), backend }
}

/// What an agent of node n1 writes.
fn details(run: &std::path::Path) -> Details<'static> {
    let mut index = Index::new(Settings::new("n1", Routing::Vxlan));
    let web = service("web", &["10.96.0.10"]).port("http", 80, proto::TCP).node_port(30_080);
    let mut web = web.balanced(&["203.0.113.7"]).external(&["198.51.100.9"]).source_ranges(&["192.0.2.0/24"]);
    (web.affinity, web.external_local, web.health_check_port) = (600, true, 32_000);
    index.handle(web.apply());
    let endpoints = slice("web-1", "web", Family::V4)
        .port("http", 8080, proto::TCP)
        .endpoint(endpoint("10.244.1.2").on("n1").pod("web-0"))
        .endpoint(endpoint("10.244.2.3").on("n2").pod("web-1"))
        .endpoint(endpoint("10.244.2.4").on("n2").pod("web-2").draining())
        .endpoint(endpoint("10.244.3.5").on("n3").pod("web-3").unusable());
    index.handle(endpoints.apply());
    // The best state that any slice gives an endpoint counts.
    let again = slice("web-2", "web", Family::V4).port("http", 8080, proto::TCP);
    index.handle(again.endpoint(endpoint("10.244.1.2").on("n1").unusable()).apply());
    servicefile::write(run, &Objects::of(&index)).unwrap();
    servicefile::read(run).unwrap()
}

fn example() -> Report {
    let run = tempfile::tempdir().unwrap();
    let details = details(run.path());
    let (all, here) = (
        [held(0, 7, "10.244.1.2", backend_flags::LOCAL), held(1, 7, "10.244.2.3", 0)],
        [held(2, 9, "10.244.1.2", backend_flags::LOCAL)],
    );
    let keys = [
        key("10.96.0.10", 80, scope::CLUSTER),
        key("192.0.2.1", 30_080, scope::CLUSTER),
        key("192.0.2.1", 30_080, scope::EXTERNAL),
        key("203.0.113.7", 80, scope::CLUSTER),
        key("203.0.113.7", 80, scope::EXTERNAL),
        key("198.51.100.9", 80, scope::CLUSTER),
    ];
    let names = names(&keys);
    let name = ServiceName { service: "default/web".into(), port: "http".into() };
    let entries = keys.map(|key| {
        let is_external = key.scope == scope::EXTERNAL;
        let is_judged = is_external && key.port == 80;
        let (id, backends) = if is_external { (9, &here[..]) } else { (7, &all[..]) };
        let flags = if is_judged { flags::SOURCE_RANGES } else { 0 };
        Entry {
            key,
            value: entry(id, backends.len() as u32, flags),
            name: &name,
            source_ranges: is_judged.then(|| vec!["192.0.2.0/24".parse().unwrap()]),
            backends: backends.to_vec(),
        }
    });
    let flows = [
        flow("10.96.0.10:80", "10.244.2.3:8080", id::make(1, 1)),
        flow("192.0.2.1:30080", "10.244.1.2:8080", id::make(2, 1)),
        flow("10.96.0.10:80", "10.244.1.2:8080", id::make(0, 1)),
        // Its backend's number is gone from the maps; an endpoint that drains; one that is no endpoint any more.
        flow("10.96.0.10:80", "10.244.2.4:8080", id::make(5, 1)),
        flow("10.96.0.10:80", "10.244.9.9:8080", id::make(6, 1)),
        // Of another Service.
        flow("10.96.0.11:80", "10.244.2.4:8080", id::make(8, 1)),
    ];
    report("default/web", &entries, &names, details.get("default/web"), flows.into_iter())
}

#[test]
fn its_json_is_an_interface() {
    assert_golden("service", &example());
}

#[test]
fn a_service_reads_well() {
    let want = "\
Service:           default/web
Internal policy:   Cluster
External policy:   Local
Session affinity:  ClientIP, 10m00s
Source ranges:     192.0.2.0/24
Health check port: 32000, 1 ready endpoint here

FRONT END     PORT  ADDRESS          PROTOCOL  CLIENTS   SOURCE RANGES  AFFINITY  ALGORITHM  MODE  SET  BACKENDS
clusterIP     http  10.96.0.10:80    TCP       cluster   -              600s      maglev     -     7    2
externalIP    http  198.51.100.9:80  TCP       cluster   -              600s      maglev     -     7    2
externalIP    http  198.51.100.9:80  TCP       external  -              -         -          -     -    not in the maps: see `services --verify`
loadBalancer  http  203.0.113.7:80   TCP       cluster   -              600s      maglev     -     7    2
loadBalancer  http  203.0.113.7:80   TCP       external  192.0.2.0/24   600s      -          -     9    1
nodePort      http  192.0.2.1:30080  TCP       cluster   -              600s      maglev     -     7    2
nodePort      http  192.0.2.1:30080  TCP       external  -              600s      -          -     9    1

BACKEND          PORT  PROTOCOL  POD            NODE       STATE      SETS  FLOWS
10.244.1.2:8080  http  TCP       default/web-0  n1 (here)  ready      7, 9  2
10.244.2.3:8080  http  TCP       default/web-1  n2         ready      7     1
10.244.2.4:8080  http  TCP       default/web-2  n2         draining   -     1
10.244.3.5:8080  http  TCP       default/web-3  n3         not ready  -     0
10.244.9.9:8080  http  TCP       -              -          gone       -     1";
    assert_eq!(text(&example()), want, "{}", text(&example()));
}

#[test]
fn without_the_agents_file_the_maps_tell_what_they_hold() {
    let keys = [key("10.96.0.10", 80, scope::CLUSTER)];
    let names = names(&keys);
    let name = ServiceName { service: "default/web".into(), port: "http".into() };
    let backends = vec![held(0, 7, "10.244.1.2", backend_flags::LOCAL | backend_flags::TERMINATING)];
    // Two ids lead nowhere.
    let of = Entry { key: keys[0], value: entry(7, 3, 0), name: &name, source_ranges: None, backends };
    let report = report("default/web", &[of], &names, None, std::iter::empty());
    assert_eq!((report.front_ends[0].kind, report.front_ends[0].missing), (None, 2));
    let text = text(&report);
    assert!(text.contains("not known: the agent has written no service-details.json"), "{text}");
    assert!(text.contains("1 (2 missing: restart"), "{text}");
    assert!(text.contains("this node  draining  7     0"), "{text}");
}

#[test]
fn the_mode_of_clients_outside() {
    let name = ServiceName { service: "default/web".into(), port: "http".into() };
    let mode = |scope, value| {
        let entry =
            Entry { key: key("203.0.113.7", 80, scope), value, name: &name, source_ranges: None, backends: Vec::new() };
        let local = Service { external_local: true, ..Service::default() };
        [None, Some(&Service::default()), Some(&local)].map(|details| super::forwarding(&entry, details))
    };
    assert_eq!(mode(scope::EXTERNAL, entry(7, 2, flags::DIRECT)), [Some("dsr"); 3]);
    assert_eq!(mode(scope::EXTERNAL, entry(7, 2, 0)), [None, Some("snat"), None]);
    assert_eq!(mode(scope::CLUSTER, entry(7, 2, 0)), [None; 3]);
}
