//! Somebody else's reading of the objects: cyclonus', which the program in `tests/oracle` writes for each world. Where cyclonus differs
//! from the API's text, the question has other words.

use super::make::KEYS;
use super::{Flow, World};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Where cyclonus differs from the API's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It takes `NotIn` for false where the key is missing. Documentation of labels: "`tier notin (frontend, backend)` [...] selects all
    /// resources with key equal to `tier` and values other than `frontend` and `backend`, and all resources with no labels with the
    /// `tier` key". So the question asks for a label that every object has, with a value that no requirement names where the key is
    /// missing.
    NotInWithoutKey,
    /// It takes a missing key for one with an empty value in `matchLabels`. API of `LabelSelector`: "A single {key,value} in the
    /// matchLabels map is equivalent to an element of matchExpressions, whose key field is "key", the operator is "In", and the values
    /// array contains only "value"". So the question has that element.
    EmptyValue,
    /// A port has one name. API of `NetworkPolicyPort`: "If present, only traffic on the specified protocol AND port will be matched", and
    /// the port may be a "named port on a pod"; two names may stand for one number. So the question has all names, and each is asked for.
    SeveralNames,
}

/// All of them.
pub const DIFFERENCES: [Difference; 3] =
    [Difference::NotInWithoutKey, Difference::EmptyValue, Difference::SeveralNames];

/// The running program.
pub struct Oracle {
    process: RefCell<Process>,
}

struct Process {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Oracle {
    /// Starts it from where `RUSTNET_POLICY_ORACLE` says, or from rustnet's cache.
    pub fn start() -> Self {
        let program = std::env::var_os("RUSTNET_POLICY_ORACLE").map_or_else(in_cache, PathBuf::from);
        let is_built = program.is_file();
        assert!(is_built, "{} is missing: run `cargo xtask setup`, which builds it", program.display());
        let started = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = started.unwrap_or_else(|e| panic!("starting {}: {e}", program.display()));
        let (questions, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { process: RefCell::new(Process { child, questions, answers }) }
    }

    /// Which flows may be opened. As in the maps, only pods of the node have a say.
    pub fn allows(&self, world: &World, flows: &[Flow]) -> Vec<bool> {
        self.allows_reworded(world, flows, &DIFFERENCES)
    }

    /// The same with other words for these differences alone.
    pub fn allows_reworded(&self, world: &World, flows: &[Flow], differences: &[Difference]) -> Vec<bool> {
        let question = Question { world, differences }.text(flows);
        let process = &mut *self.process.borrow_mut();
        let mut line = String::new();
        let asked = writeln!(process.questions, "{question}").and_then(|()| process.answers.read_line(&mut line));
        assert!(asked.is_ok_and(|length| length > 0), "the oracle gave no answer to {question}");
        let verdicts: Vec<BTreeMap<String, bool>> = serde_json::from_str(&line).unwrap();
        assert_eq!(verdicts.len(), flows.len(), "{line}");
        let of_flow = |(flow, verdict): (&Flow, &BTreeMap<String, bool>)| {
            let is_fine = |ip: IpAddr, end: &str| verdict[end] || !world.interfaces.contains_key(&ip);
            is_fine(flow.client, "egress") && is_fine(flow.server, "ingress")
        };
        flows.iter().zip(&verdicts).map(of_flow).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}

/// Where `cargo xtask setup` leaves it.
fn in_cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    base.unwrap_or_else(home).join("rustnet/bin/policy-oracle")
}

/// One line for the program.
struct Question<'a> {
    world: &'a World,
    differences: &'a [Difference],
}

impl Question<'_> {
    fn text(&self, flows: &[Flow]) -> Value {
        let policies = self.world.policies.iter().map(|policy| {
            let mut policy = serde_json::to_value(policy).unwrap();
            let spec = &mut policy["spec"];
            // The API server writes the types into every object by this rule, and cyclonus expects them: "policies that contain an egress
            // section are assumed to affect egress, and all policies [...] are assumed to affect ingress".
            if spec["policyTypes"].as_array().is_none_or(Vec::is_empty) {
                let has_egress = spec["egress"].as_array().is_some_and(|rules| !rules.is_empty());
                spec["policyTypes"] = if has_egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
            }
            self.reword(spec);
            policy
        });
        let policies: Vec<Value> = policies.collect();
        let traffic: Vec<Value> = flows.iter().map(|flow| self.traffic(flow)).collect();
        json!({"policies": policies, "traffic": traffic})
    }

    fn has(&self, difference: Difference) -> bool {
        self.differences.contains(&difference)
    }

    /// Puts all selectors in other words.
    fn reword(&self, value: &mut Value) {
        match value {
            Value::Array(all) => all.iter_mut().for_each(|it| self.reword(it)),
            Value::Object(fields) => {
                if self.has(Difference::EmptyValue) && fields.contains_key("matchLabels") {
                    without_empty_values(fields);
                }
                if self.has(Difference::NotInWithoutKey) && fields.get("operator").is_some_and(|it| it == "NotIn") {
                    fields["key"] = present(fields["key"].as_str().unwrap()).into();
                }
                fields.values_mut().for_each(|it| self.reword(it));
            }
            _ => {}
        }
    }

    fn traffic(&self, flow: &Flow) -> Value {
        let protocol = match flow.proto {
            6 => "TCP",
            17 => "UDP",
            132 => "SCTP",
            _ => "ICMP",
        };
        json!({
            "source": self.peer(flow.client), "destination": self.peer(flow.server),
            "port": flow.port, "names": self.names(flow, protocol), "protocol": protocol,
        })
    }

    /// A pod of the host's network is as any address outside. Documentation of network policies: "traffic to/from hostNetwork pods is
    /// treated the same as traffic to/from the node IP".
    fn peer(&self, ip: IpAddr) -> Value {
        let internal = self.world.pod(ip).map(|pod| {
            let namespace = pod.metadata.namespace.as_ref().unwrap();
            let object = self.world.namespaces.iter().find(|it| it.metadata.name.as_ref() == Some(namespace)).unwrap();
            let (of_namespace, of_pod) = (object.metadata.labels.as_ref(), pod.metadata.labels.as_ref());
            json!({
                "namespace": namespace,
                "namespaceLabels": self.labels(of_namespace), "podLabels": self.labels(of_pod),
            })
        });
        json!({"ip": ip, "internal": internal})
    }

    fn labels(&self, labels: Option<&BTreeMap<String, String>>) -> BTreeMap<String, String> {
        let mut all = labels.cloned().unwrap_or_default();
        if self.has(Difference::NotInWithoutKey) {
            for key in KEYS {
                let value = all.get(key).map_or("(no such label)", |value| value);
                all.insert(present(key), value.to_owned());
            }
        }
        all
    }

    /// The names of the server's port. Of several ports with one name and protocol the first has it, as in the targets of Services.
    fn names(&self, flow: &Flow, protocol: &str) -> Vec<&str> {
        let containers = self.world.pod(flow.server).and_then(|pod| pod.spec.as_ref()).map(|spec| &spec.containers);
        let ports = containers.into_iter().flatten().filter_map(|it| it.ports.as_ref()).flatten();
        let mut seen = BTreeSet::new();
        let named = ports.filter(|port| port.protocol.as_deref().unwrap_or("TCP") == protocol);
        let named = named.filter_map(|port| Some((port.name.as_deref()?, port.container_port)));
        let first = named.filter(|(name, _)| seen.insert(*name)).filter(|(_, port)| *port == i32::from(flow.port));
        let most = if self.has(Difference::SeveralNames) { usize::MAX } else { 1 };
        first.map(|(name, _)| name).take(most).collect()
    }
}

/// The label that every object has in place of one that it may have.
fn present(key: &str) -> String {
    format!("present/{key}")
}

/// Makes requirements of the pairs of `matchLabels` with an empty value.
fn without_empty_values(selector: &mut Map<String, Value>) {
    let Some(pairs) = selector["matchLabels"].as_object_mut() else { return };
    let empty: Vec<String> = pairs.iter().filter(|(_, value)| *value == "").map(|(key, _)| key.clone()).collect();
    pairs.retain(|_, value| value != "");
    let expressions = selector.entry("matchExpressions").or_insert_with(|| json!([])).as_array_mut().unwrap();
    expressions.extend(empty.iter().map(|key| json!({"key": key, "operator": "In", "values": [""]})));
}
