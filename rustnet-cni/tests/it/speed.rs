//! How long ADD and DEL take, beside the standard plugins. Prints figures and judges nothing; run by hand or by a benchmark:
//! `cargo test --release -p rustnet-cni --test it speed -- --ignored --nocapture`.

use crate::common::{Call, Node, netns};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PODS: usize = 100;

#[test]
#[ignore = "a measurement"]
fn add_and_del() {
    let node = Node::new();
    let ours = node.conf("1.0.0");
    let delegated = json!({ "type": "host-local", "subnet": "10.3.0.0/16" });
    let mut with_host_local = ours.clone();
    with_host_local["ipam"] = delegated.clone();
    let bridge = json!({ "cniVersion": "1.0.0", "name": "b", "type": "bridge", "bridge": "cni0", "ipam": delegated });
    let ptp = json!({ "cniVersion": "1.0.0", "name": "p", "type": "ptp", "ipam": delegated });
    println!("{:24} {:>27} {:>27}", "", "ADD ms min / p50 / p99", "DEL ms min / p50 / p99");
    let version = Call::new("VERSION", &json!({}));
    let starts: Vec<_> = (0..PODS).map(|_| timed(&version)).collect();
    println!("{:24} {:>27}", "process start (VERSION)", figures(starts));
    for (name, conf, binary) in [
        ("rustnet-cni", &ours, None),
        ("rustnet-cni, host-local", &with_host_local, None),
        ("bridge, host-local", &bridge, Some("/usr/lib/cni/bridge")),
        ("ptp, host-local", &ptp, Some("/usr/lib/cni/ptp")),
    ] {
        let (add, del) = measure(name, conf, binary);
        println!("{name:24} {:>27} {:>27}", figures(add), figures(del));
    }
}

/// All pods are added before the first goes, as on a node that fills.
fn measure(name: &str, conf: &Value, binary: Option<&str>) -> (Vec<Duration>, Vec<Duration>) {
    let call = |verb: &str, n: usize, ns: &str| {
        let call = Call::of(verb, conf, &format!("c{n}"), ns);
        binary.map_or(call.clone(), |b| call.binary(b))
    };
    let tag: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
    let pods: Vec<_> = (0..PODS).map(|n| netns(&format!("{tag}{n}"))).collect();
    let add = pods.iter().enumerate().map(|(n, ns)| timed(&call("ADD", n, ns))).collect();
    let del = pods.iter().enumerate().map(|(n, ns)| timed(&call("DEL", n, ns))).collect();
    (add, del)
}

fn timed(call: &Call) -> Duration {
    let start = Instant::now();
    let out = call.run();
    let took = start.elapsed();
    out.success();
    took
}

fn figures(mut all: Vec<Duration>) -> String {
    all.sort_unstable();
    let ms = |at: usize| all[at].as_secs_f64() * 1e3;
    format!("{:.2} / {:.2} / {:.2}", ms(0), ms(all.len() / 2), ms(all.len() * 99 / 100 - 1))
}
