//! A smaller Service that still shows a difference: one thing less at a time.

use super::model::{Case, Type};

/// Copies of a Service that lack one thing each, the largest first.
pub fn simpler(case: &Case) -> Vec<Case> {
    let mut found = Vec::new();
    let mut with = |change: &dyn Fn(&mut Case)| {
        let mut copy = case.clone();
        change(&mut copy);
        found.push(copy);
    };
    for i in 0..case.slices.len() {
        with(&|it| drop(it.slices.remove(i)));
    }
    if case.ports.len() > 1 {
        for i in 0..case.ports.len() {
            with(&|it| {
                it.ports.remove(i);
                it.slices.iter_mut().for_each(|slice| _ = slice.targets.remove(i));
            });
        }
    }
    for (i, slice) in case.slices.iter().enumerate() {
        for j in 0..slice.endpoints.len() {
            with(&|it| drop(it.slices[i].endpoints.remove(j)));
        }
    }
    for i in 0..case.external_ips.len() {
        with(&|it| _ = it.external_ips.remove(i));
    }
    for i in 0..case.ingress.len() {
        with(&|it| _ = it.ingress.remove(i));
    }
    if case.affinity {
        with(&|it| it.affinity = false);
    }
    if case.internal_local {
        with(&|it| it.internal_local = false);
    }
    if case.external_local {
        with(&|it| it.external_local = false);
    }
    if !case.source_ranges.is_empty() {
        with(&|it| it.source_ranges.clear());
    }
    if case.type_ == Type::LoadBalancer && case.ingress.is_empty() && case.source_ranges.is_empty() {
        with(&|it| it.type_ = Type::NodePort);
    }
    if case.type_ == Type::NodePort {
        with(&|it| it.type_ = Type::ClusterIp);
    }
    let is_hinted =
        |it: &Case| it.slices.iter().flat_map(|s| &s.endpoints).any(|e| !(e.zones.is_empty() && e.nodes.is_empty()));
    if is_hinted(case) {
        with(&|it| {
            it.slices.iter_mut().flat_map(|slice| &mut slice.endpoints).for_each(|endpoint| {
                endpoint.zones.clear();
                endpoint.nodes.clear();
            });
        });
    }
    // What is for clients outside has to go together.
    found.iter_mut().filter(|it| !it.is_external()).for_each(|it| it.external_local = false);
    found
}
