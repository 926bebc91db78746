//! The maps of network policies, as the agent writes them.

use std::net::IpAddr;

use ipnet::IpNet;
use rustnet_agent::bpf::store::policy::{PolicyContent, PolicyStore, read};
use rustnet_common::names::map;
use rustnet_common::policy::{
    ALLOW, ANY_PORT, ANY_PROTO, FULL, Policies, PolicyMatch, PolicyPod, PolicyRule, PolicyRuleKey, flags,
};
use rustnet_common::tuple::proto::TCP;

use crate::load::load;
use crate::sandbox::{self, Sandbox};

const MAPS: [&str; 3] = [map::POLICY_PODS, map::POLICY_CIDRS, map::POLICY_RULES];

fn rule(prefix_len: u32, set: u32, class: u32, port: u16) -> (PolicyRuleKey, PolicyRule) {
    let proto = if prefix_len == ANY_PROTO { 0 } else { TCP };
    let data = PolicyMatch { set, class, proto, pad: 0, port: port.to_be_bytes() };
    (PolicyRuleKey { prefix_len, data }, PolicyRule { order: ALLOW, rule: set })
}

/// Something in each map.
fn content() -> PolicyContent {
    let pod = |n: u32| PolicyPod { class: n, ingress: 7, egress: 0, ifindex: n };
    let range = |text: &str| text.parse::<IpNet>().unwrap();
    PolicyContent {
        state: Policies { generation: 3, flags: flags::ENFORCED },
        pods: (1..5_u32)
            .map(|n| (IpAddr::from([10, 1, 0, n as u8]), pod(n)))
            .chain([("fd00::1".parse().unwrap(), pod(9))])
            .collect(),
        cidrs: [("0.0.0.0/0", 1), ("10.0.0.0/8", 2), ("fd00::/16", 3)].map(|(text, class)| (range(text), class)).into(),
        rules: vec![
            rule(ANY_PROTO, 1, 0, 0),
            rule(ANY_PORT, 1, 2, 0),
            rule(ANY_PORT + 4, 1, 2, 0x5000),
            rule(FULL, 1, 2, 80),
        ],
    }
}

fn write(sandbox: &Sandbox, content: &PolicyContent) {
    let store = PolicyStore::open(&sandbox.bpffs).unwrap();
    store.put_rules(&content.rules).unwrap();
    store.put_cidrs(&content.cidrs.iter().map(|(range, class)| (*range, *class)).collect::<Vec<_>>()).unwrap();
    store.put_pods(&content.pods.iter().map(|(ip, pod)| (*ip, *pod)).collect::<Vec<_>>()).unwrap();
    store.set_state(&content.state).unwrap();
}

/// The content, its rules in an order.
fn there(sandbox: &Sandbox) -> PolicyContent {
    let mut content = read(&sandbox.bpffs).unwrap();
    content.rules.sort_by_key(|(key, _)| key.prefix_len);
    content
}

#[test]
fn what_is_written_is_read_back_and_deleted() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), PolicyContent::default());
        let content = content();
        write(sandbox, &content);
        assert_eq!(there(sandbox), content);
        let store = PolicyStore::open(&sandbox.bpffs).unwrap();
        store.set_state(&Policies { generation: 4, flags: 0 }).unwrap();
        assert_eq!(store.state().unwrap().generation, 4);
        // One of each is not there: the others go all the same.
        let pods: Vec<IpAddr> = [IpAddr::from([10, 9, 9, 9])].into_iter().chain(content.pods.keys().copied()).collect();
        let cidrs: Vec<IpNet> =
            ["192.0.2.0/24".parse().unwrap()].into_iter().chain(content.cidrs.keys().copied()).collect();
        let rules: Vec<_> = [rule(FULL, 9, 9, 9)].iter().chain(&content.rules).map(|(key, _)| *key).collect();
        store.delete_pods(&pods).unwrap();
        store.delete_cidrs(&cidrs).unwrap();
        store.delete_rules(&rules).unwrap();
        let state = Policies { generation: 4, flags: 0 };
        assert_eq!(there(sandbox), PolicyContent { state, ..PolicyContent::default() });
    });
}

#[test]
fn a_full_map_names_itself() {
    sandbox::run(|sandbox| {
        let mut load = load(sandbox);
        load.sizes.extend(MAPS.map(|name| (name.to_owned(), 2)));
        load.run().unwrap().pin(&sandbox.bpffs).unwrap();
        let store = PolicyStore::open(&sandbox.bpffs).unwrap();
        let content = content();
        let pods: Vec<_> = content.pods.iter().map(|(ip, pod)| (*ip, *pod)).collect();
        let cidrs: Vec<_> = content.cidrs.iter().map(|(range, class)| (*range, *class)).collect();
        for (full, name) in
            [store.put_pods(&pods), store.put_cidrs(&cidrs), store.put_rules(&content.rules)].into_iter().zip(MAPS)
        {
            let error = format!("{:#}", full.unwrap_err());
            assert!(error.contains(name) && error.contains("full (2 entries)"), "{error}");
        }
    });
}

#[test]
fn maps_of_another_size_are_copied() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        write(sandbox, &content());
        let mut resized = load(sandbox);
        resized.sizes.extend(MAPS.map(|name| (name.to_owned(), 1024)));
        resized.run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), content());
    });
}

#[test]
fn maps_that_an_earlier_release_has_not_pinned_are_made() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        for name in MAPS.into_iter().chain([map::POLICY]) {
            std::fs::remove_file(sandbox.bpffs.join(name)).unwrap();
        }
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(there(sandbox), PolicyContent::default());
    });
}
