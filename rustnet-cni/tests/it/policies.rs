//! Network policies: ADD returns once the agent has decided about the pod.

use crate::common::{Call, Node, bpf, finish, ips, netns, until};
use rustnet_common::policy::{Policies, PolicyPod, flags};
use std::fs;
use std::net::IpAddr;

const ENFORCED: Policies = Policies { generation: 1, flags: flags::ENFORCED };
/// What the binary says where it has not waited long enough.
const UNDECIDED: &str = "has not applied network policies";

/// The pod's entry, as the agent writes it.
fn entry(ifindex: u32) -> PolicyPod {
    PolicyPod { class: 7, ingress: 1, egress: 0, ifindex }
}

#[test]
fn add_returns_once_each_address_has_the_pods_interface() {
    let node = Node::new();
    bpf::put_policies(&node.policies, &ENFORCED);
    let ns = netns("a");
    let mut call = Call::of("ADD", &node.conf("1.1.0"), "c1", &ns).start();
    until("the endpoints", &|| bpf::entries(&node.map).len() == 2);
    let endpoints: Vec<(IpAddr, u32)> =
        bpf::entries(&node.map).into_iter().map(|(ip, endpoint)| (ip, endpoint.ifindex)).collect();
    for (i, (ip, ifindex)) in endpoints.iter().enumerate() {
        // What an earlier pod with the address was allowed says nothing of this one.
        bpf::put_policy_pod(&node.policy_pods, *ip, &entry(ifindex + 1));
        assert!(call.try_wait().expect("a call").is_none(), "address {i} is undecided");
        bpf::put_policy_pod(&node.policy_pods, *ip, &entry(*ifindex));
    }
    let added = finish(call);
    assert!(!added.stderr.contains(UNDECIDED), "{}", added.stderr);
    let mut given = ips(&added.success());
    given.sort_unstable();
    let mut known: Vec<IpAddr> = endpoints.iter().map(|(ip, _)| *ip).collect();
    known.sort_unstable();
    assert_eq!(given, known);
}

#[test]
fn an_agent_that_does_not_decide_keeps_no_pod_from_being_added() {
    let node = Node::new();
    bpf::put_policies(&node.policies, &ENFORCED);
    let added = Call::of("ADD", &node.conf("1.1.0"), "c1", &netns("a")).run();
    assert!(added.stderr.contains(UNDECIDED), "{}", added.stderr);
    added.success();
    // The last policy goes while a call waits.
    let mut call = Call::of("ADD", &node.conf("1.1.0"), "c2", &netns("b")).start();
    until("the endpoints", &|| bpf::entries(&node.map).len() == 4);
    assert!(call.try_wait().expect("a call").is_none());
    bpf::put_policies(&node.policies, &Policies { generation: 2, flags: 0 });
    let added = finish(call);
    assert!(!added.stderr.contains(UNDECIDED), "{}", added.stderr);
    added.success();
}

#[test]
fn without_policies_nothing_is_waited_for() {
    let node = Node::new();
    let added = Call::of("ADD", &node.conf("1.1.0"), "c1", &netns("a")).run();
    assert_eq!(added.stderr, "");
    added.success();
    // An earlier release has no such maps.
    bpf::put_policies(&node.policies, &ENFORCED);
    fs::remove_file(node.bpffs.join("rn_policy_pods")).expect("unpin");
    let added = Call::of("ADD", &node.conf("1.1.0"), "c2", &netns("b")).run();
    assert_eq!(added.stderr, "");
    added.success();
}
