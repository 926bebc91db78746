//! The reference plugins behind rustnet-cni in a chain, as a runtime runs them: which work, and how the others fail.

use crate::common::{Call, Called, Node, command, ips, netns, ping, pings};
use serde_json::{Value, json};

/// A list of plugins.
struct Chain<'a> {
    node: &'a Node,
    plugins: Vec<Value>,
}

impl<'a> Chain<'a> {
    fn new(node: &'a Node, ours: &Value, behind: &[Value]) -> Self {
        let mut first = node.conf("1.0.0");
        first.as_object_mut().expect("object").extend(ours.as_object().expect("object").clone());
        let mut plugins = vec![first];
        for plugin in behind {
            let mut plugin = plugin.clone();
            (plugin["cniVersion"], plugin["name"]) = (json!("1.0.0"), json!("rustnet"));
            plugins.push(plugin);
        }
        Self { node, plugins }
    }

    fn call(&self, verb: &str, plugin: usize, ns: &str, prev: &Value) -> Called {
        let mut conf = self.plugins[plugin].clone();
        if !prev.is_null() {
            conf["prevResult"] = prev.clone();
        }
        let call = Call::of(verb, &conf, "c1", ns).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if plugin == 0 {
            return call.run();
        }
        call.binary(&format!("/usr/lib/cni/{}", conf["type"].as_str().expect("type"))).run()
    }

    fn add(&self, ns: &str) -> Result<Value, String> {
        (0..self.plugins.len()).try_fold(Value::Null, |prev, plugin| {
            let out = self.call("ADD", plugin, ns, &prev);
            if out.ok { Ok(out.json) } else { Err(out.json.to_string()) }
        })
    }

    fn check(&self, ns: &str, result: &Value) {
        for plugin in 0..self.plugins.len() {
            if self.plugins[plugin]["type"] == "portmap" {
                // Of a pod of both families, `portmap` 1.1 looks for its rules of IPv4 among those of IPv6.
                continue;
            }
            let out = self.call("CHECK", plugin, ns, result);
            assert!(out.ok, "{}: {out:?}", self.plugins[plugin]);
        }
    }

    fn del(&self, ns: &str, result: &Value) {
        for plugin in (0..self.plugins.len()).rev() {
            self.call("DEL", plugin, ns, result).success();
        }
    }

    /// ADD, packets, CHECK and DEL.
    fn works(&self, name: &str) {
        let before = self.node.traces();
        let ns = netns(name);
        let result = self.add(&ns).expect(name);
        for (ip, target) in ips(&result).iter().zip(["192.0.2.1", "2001:db8::1"]) {
            ping("", &ip.to_string());
            // From its address: `sbr` chooses routes by it.
            let from = ip.to_string();
            command("nsenter", &[&format!("--net={ns}"), "ping", "-n", "-c", "1", "-W", "5", "-I", &from, target]);
        }
        self.check(&ns, &result);
        self.del(&ns, &result);
        assert_eq!(self.node.traces(), before, "{name}");
    }
}

#[test]
fn tuning_of_sysctls() {
    let node = Node::new();
    let tuning = json!({ "type": "tuning", "sysctl": { "net.ipv4.conf.eth0.arp_filter": "1" } });
    Chain::new(&node, &json!({}), &[tuning]).works("a");
}

/// `tuning` sets the interface down to change its MAC address, and so takes its routes and neighbours away; nor do programs and host
/// know of the new address. CHECK names what is wrong. rustnet gives the address itself.
#[test]
fn tuning_of_the_mac_address() {
    let node = Node::new();
    let mac = "02:00:00:00:00:07";
    let runtime = json!({ "capabilities": { "mac": true }, "runtimeConfig": { "mac": mac } });
    let mut same = runtime.clone();
    same["type"] = json!("tuning");
    let other = json!({ "type": "tuning", "mac": mac });
    for (i, (ours, tuning)) in [(&json!({}), other), (&runtime, same)].into_iter().enumerate() {
        let chain = Chain::new(&node, ours, &[tuning]);
        let ns = netns(&format!("a{i}"));
        let result = chain.add(&ns).expect("neither plugin can know");
        assert!(!pings("", &ips(&result)[0].to_string()));
        let msg = chain.call("CHECK", 0, &ns, &result).failure(102);
        assert!(msg.contains("eth0") || msg.contains("MAC") || msg.contains("route"), "{msg}");
        chain.del(&ns, &result);
    }
    Chain::new(&node, &runtime, &[]).works("b");
}

#[test]
fn bandwidth() {
    let node = Node::new();
    let before = node.traces();
    let limits =
        json!({ "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000 });
    let behind =
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true }, "runtimeConfig": { "bandwidth": limits } });
    let ns = netns("a");
    let chain = Chain::new(&node, &json!({}), std::slice::from_ref(&behind));
    let refused = chain.add(&ns).expect_err("its qdisc has the place of ours");
    assert!(refused.contains("exist") || refused.contains("qdisc"), "{refused}");
    for plugin in [1, 0] {
        let _ = chain.call("DEL", plugin, &ns, &Value::Null);
    }
    assert_eq!(node.traces(), before);
    // Without the plugin, ours does what it does.
    let mut ours = behind;
    ours.as_object_mut().expect("object").remove("type");
    Chain::new(&node, &ours, &[]).works("b");
}

#[test]
fn sbr() {
    let node = Node::new();
    Chain::new(&node, &json!({}), &[json!({ "type": "sbr" })]).works("a");
}

#[test]
fn portmap() {
    let node = Node::new();
    let mappings = json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let behind = json!({ "type": "portmap", "capabilities": { "portMappings": true }, "runtimeConfig": mappings });
    Chain::new(&node, &json!({}), std::slice::from_ref(&behind)).works("a");
    // Both with the capability: the programs serve, and `portmap` has its rules.
    let ours = json!({ "capabilities": { "portMappings": true }, "runtimeConfig": mappings });
    Chain::new(&node, &ours, &[behind]).works("b");
}
