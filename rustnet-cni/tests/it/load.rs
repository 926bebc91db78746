//! Many pods: at the same time, and one after another.

use crate::common::{Call, Node, finish, ips, netns, ping};
use std::collections::HashSet;

#[test]
fn a_hundred_at_once_get_a_hundred_addresses() {
    let node = Node::new();
    let before = node.traces();
    let pods: Vec<_> = (0..100).map(|n| (format!("c{n}"), netns(&format!("p{n}")))).collect();
    let started: Vec<_> = pods.iter().map(|(id, ns)| Call::of("ADD", &node.conf("1.1.0"), id, ns).start()).collect();
    let results: Vec<_> = started.into_iter().map(|c| finish(c).success()).collect();
    let all: Vec<_> = results.iter().flat_map(ips).collect();
    assert_eq!(all.len(), 200);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 200, "an address was given out twice");
    for r in results.iter().step_by(10) {
        ping("", &ips(r)[0].to_string());
    }
    // Half of them go while others come.
    let going: Vec<_> = pods[..50].iter().map(|(id, _)| Call::of("DEL", &node.conf("1.1.0"), id, "").start()).collect();
    let more: Vec<_> = (0..20).map(|n| (format!("d{n}"), netns(&format!("q{n}")))).collect();
    let coming: Vec<_> = more.iter().map(|(id, ns)| Call::of("ADD", &node.conf("1.1.0"), id, ns).start()).collect();
    let results: Vec<_> = coming.into_iter().map(|c| finish(c).success()).collect();
    for call in going {
        finish(call).success();
    }
    for ip in results.iter().flat_map(ips) {
        ping("", &ip.to_string());
    }
    let going: Vec<_> =
        pods[50..].iter().chain(&more).map(|(id, _)| Call::of("DEL", &node.conf("1.1.0"), id, "").start()).collect();
    for call in going {
        finish(call).success();
    }
    assert_eq!(node.traces(), before);
}

#[test]
fn two_hundred_cycles_leave_nothing() {
    let node = Node::new();
    let ns = netns("a");
    let before = node.traces();
    let mut seen = HashSet::new();
    for n in 0..200 {
        let r = node.add(&format!("c{n}"), &ns);
        assert!(seen.insert(ips(&r)[0]), "an address came back too early");
        node.del(&format!("c{n}"));
    }
    assert_eq!(node.traces(), before);
}
