//! Network policies, labels, namespaces and pods change, and agents are killed, under traffic that all states along the way allow or
//! forbid: none of the one is lost, and none of the other passes.
//!
//! `RUSTNET_POLICY_CHANGES` is how many changes there are; `cargo xtask test --long` asks for a thousand.

use crate::fixture::{Net, figure};
use crate::kills::{Dice, observed_without_captures};
use crate::policies::{NAMESPACE, is_answered, pods_of, put_policy};
use anyhow::{Context as _, Result, ensure};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::load::{Kind, Load};
use testkit::manifest::Manifests;
use testkit::pod::PORT;
use testkit::{Node, Pod, Proto, Routing, wait};

/// Changes, unless the variable names more.
const CHANGES: usize = 80;
/// Changes after which the agents have to have applied them.
const ROUND: usize = 20;
/// Time between two requests.
const PAUSE: Duration = Duration::from_millis(10);
/// What requests are about: their client and server, and whether they may pass.
type Way<'a> = (&'a Pod, &'a Pod, bool);

#[test]
fn changes_of_policies_leave_no_window_vxlan() -> Result<()> {
    observed_without_captures(Routing::Vxlan, run)
}

#[test]
#[ignore = "the same code as over VXLAN; `cargo xtask test --long` runs it"]
fn changes_of_policies_leave_no_window_native() -> Result<()> {
    observed_without_captures(Routing::Native, run)
}

fn run(net: &Net) -> Result<()> {
    let changes = figure("RUSTNET_POLICY_CHANGES", CHANGES)?;
    let mut world =
        World { net, dice: Dice(0x2545_f491_4f6c_dd1d), coming: None, ingress: "ingress", egress: "egress" };
    world.write_pods()?;
    world.write_namespace()?;
    world.write_ingress()?;
    world.write_egress()?;
    world.is_applied(false)?;

    // Of `b` the ingress is isolated, and `c` may come; of `c` the egress is isolated, and it may go to `b`.
    let ways = [(&net.c, &net.b, true), (&net.a, &net.c, true), (&net.a, &net.b, false), (&net.c, &net.a, false)];
    let traffic = Traffic::start(&ways)?;
    let mut kills = 0;
    for change in 1..=changes {
        world.change().with_context(|| format!("change {change}"))?;
        kills += world.kill_or_start()?;
        traffic.wait_more(1 + world.dice.below(5) as usize)?;
        if change % ROUND == 0 {
            world.revive()?;
            world.is_applied(change % (2 * ROUND) == 0)?;
        }
    }
    world.revive()?;
    world.is_applied(true)?;
    if let Some(coming) = world.coming.take() {
        coming.end()?;
    }
    let (allowed, forbidden) = traffic.end()?;
    println!("{changes} changes, {kills} kills; {allowed} requests answered, {forbidden} refused");
    Ok(())
}

/// Requests of all ways, in both families.
struct Traffic {
    allowed: Vec<Load>,
    forbidden: Vec<Load>,
}

impl Traffic {
    fn start(ways: &[Way<'_>]) -> Result<Self> {
        let mut traffic = Self { allowed: Vec::new(), forbidden: Vec::new() };
        for (from, to, is_allowed) in ways {
            for (proto, ip) in targets(to) {
                let target = SocketAddr::new(ip, PORT);
                let start = |kind| Load::start(from.netns(), kind, proto, target, PAUSE);
                if *is_allowed {
                    traffic.allowed.extend([start(Kind::Established)?, start(Kind::New)?]);
                } else {
                    traffic.forbidden.push(start(Kind::Attempt)?);
                }
            }
        }
        Ok(traffic)
    }

    fn wait_more(&self, n: usize) -> Result<()> {
        self.allowed.iter().chain(&self.forbidden).try_for_each(|load| load.wait_more(n))
    }

    /// Ends it; returns how many requests were answered, and how many were not. An error names all that was not as it has to be.
    fn end(self) -> Result<(usize, usize)> {
        let (mut counts, mut wrong) = ([0; 2], Vec::new());
        for (count, loads) in counts.iter_mut().zip([self.allowed, self.forbidden].into_iter().enumerate()) {
            let (is_forbidden, loads) = (loads.0 == 1, loads.1);
            for load in loads {
                let tally = load.stop()?;
                *count += tally.sent;
                let result = if is_forbidden { tally.no_answer() } else { tally.no_loss() };
                wrong.extend(result.err().map(|error| error.to_string()));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(counts.into())
    }
}

/// The protocols and addresses of a pod.
fn targets(pod: &Pod) -> impl Iterator<Item = (Proto, IpAddr)> + '_ {
    Proto::ALL.into_iter().flat_map(|proto| pod.addresses().iter().map(move |ip| (proto, *ip)))
}

/// A pod that comes and goes: its labels are those of `b`, so that `a` never reaches it.
struct Coming {
    pod: Pod,
    traffic: Traffic,
}

impl Coming {
    fn end(self) -> Result<()> {
        // The node always reaches its pods: it has a network, and a server.
        for ip in self.pod.addresses() {
            ensure!(is_answered(self.pod.node().netns(), Proto::Tcp, *ip, PORT)?, "the node does not reach {ip}");
        }
        self.traffic.end().context("to a pod that came")?;
        self.pod.delete()
    }
}

/// What changes.
struct World<'a> {
    net: &'a Net,
    dice: Dice,
    coming: Option<Coming>,
    /// Names of the two policies that isolate.
    ingress: &'static str,
    egress: &'static str,
}

impl World<'_> {
    fn manifests(&self) -> &Manifests {
        self.net.fabric.manifests()
    }

    /// Makes one change, after which all ways are as before.
    fn change(&mut self) -> Result<()> {
        match self.dice.below(12) {
            0 | 1 => self.write_pods(),
            2 => self.write_namespace(),
            3 | 4 => self.write_ingress(),
            5 | 6 => self.write_egress(),
            7 => self.rename_ingress(),
            8 => self.rename_egress(),
            9 => self.come_or_go(),
            _ => self.write_more(),
        }
    }

    /// Pods, with a label that says nothing of the ways.
    fn write_pods(&mut self) -> Result<()> {
        let mut yaml = String::new();
        for pod in [&self.net.a, &self.net.b, &self.net.c] {
            let ips: Vec<_> = pod.addresses().iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
            let (name, node, color) = (pod.name(), pod.node().name(), self.color());
            let _ = writeln!(
                yaml,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {name}, color: {color}}}}}\n\
                 spec: {{nodeName: {node}, containers: []}}\nstatus: {{phase: Running, podIPs: [{}]}}",
                ips.join(", ")
            );
        }
        self.manifests().write("pods.yaml", &yaml)
    }

    fn write_namespace(&mut self) -> Result<()> {
        let text = NAMESPACE.replace("kind: test", &format!("kind: test, color: {}", self.color()));
        self.manifests().write("namespace.yaml", &text)
    }

    fn color(&mut self) -> &'static str {
        ["red", "green", "blue"][self.dice.below(3) as usize]
    }

    /// The other side, said in one of several ways.
    fn peers(&mut self, pod: &Pod) -> String {
        let name = pod.name();
        let blocks = |prefix: [u8; 2]| {
            let of = |ip: &IpAddr| format!("{{ipBlock: {{cidr: \"{ip}/{}\"}}}}", prefix[usize::from(ip.is_ipv6())]);
            format!("[{}]", pod.addresses().iter().map(of).collect::<Vec<_>>().join(", "))
        };
        match self.dice.below(5) {
            0 => pods_of(name),
            1 => format!("[{{podSelector: {{matchExpressions: [{{key: app, operator: In, values: [{name}, zz]}}]}}}}]"),
            2 => format!(
                "[{{namespaceSelector: {{matchLabels: {{kind: test}}}}, podSelector: {{matchLabels: {{app: {name}}}}}}}]"
            ),
            3 => blocks([32, 128]),
            _ => format!("[{{podSelector: {{matchLabels: {{app: {name}}}}}}}, {{ipBlock: {{cidr: 198.51.100.0/24}}}}]"),
        }
    }

    /// The ports of a rule: all, or ranges that have the one in use.
    fn ports(&mut self) -> String {
        let range =
            |proto: &str, first: u16, last: u16| format!("{{protocol: {proto}, port: {first}, endPort: {last}}}");
        match self.dice.below(3) {
            0 => String::new(),
            1 => format!(", ports: [{}, {}]", range("TCP", PORT, PORT), range("UDP", PORT, PORT)),
            _ => {
                let (first, last) = (PORT - self.dice.below(1000) as u16, PORT + self.dice.below(1000) as u16);
                format!(", ports: [{}, {}]", range("TCP", first, last), range("UDP", first, last))
            }
        }
    }

    fn write_ingress(&mut self) -> Result<()> {
        let (peers, ports) = (self.peers(&self.net.c), self.ports());
        put_policy(
            self.manifests(),
            self.ingress,
            "b",
            &format!("policyTypes: [Ingress]\n  ingress: [{{from: {peers}{ports}}}]"),
        )
    }

    fn write_egress(&mut self) -> Result<()> {
        let (peers, ports) = (self.peers(&self.net.b), self.ports());
        put_policy(
            self.manifests(),
            self.egress,
            "c",
            &format!("policyTypes: [Egress]\n  egress: [{{to: {peers}{ports}}}]"),
        )
    }

    /// Another policy comes, and then the one of before goes.
    fn rename_ingress(&mut self) -> Result<()> {
        let before = format!("{}.yaml", self.ingress);
        self.ingress = if self.ingress == "ingress" { "into-b" } else { "ingress" };
        self.write_ingress()?;
        self.manifests().remove(&before)
    }

    fn rename_egress(&mut self) -> Result<()> {
        let before = format!("{}.yaml", self.egress);
        self.egress = if self.egress == "egress" { "out-of-c" } else { "egress" };
        self.write_egress()?;
        self.manifests().remove(&before)
    }

    /// A policy that says nothing of the ways.
    fn write_more(&mut self) -> Result<()> {
        let number = self.dice.below(4);
        let file = format!("more-{number}");
        if self.dice.below(3) == 0 {
            // It may be absent.
            let path = self.manifests().dir().join(format!("{file}.yaml"));
            return if path.exists() { self.manifests().remove(&format!("{file}.yaml")) } else { Ok(()) };
        }
        let color = self.color();
        let (app, spec) = match number {
            0 => ("b", "policyTypes: [Ingress]\n  ingress: [{from: [{podSelector: {matchLabels: {color: purple}}}]}]".into()),
            1 => {
                let peer = format!("[{{podSelector: {{matchLabels: {{color: {color}}}}}}}, {{podSelector: {{matchLabels: {{app: b}}}}}}]");
                ("a", format!("policyTypes: [Ingress]\n  ingress: [{{from: {peer}}}]"))
            }
            2 => ("c", "policyTypes: [Ingress]\n  ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [b]}]}}]}]".into()),
            _ => ("b", "policyTypes: [Ingress]\n  ingress: [{ports: [{port: 9}]}]".to_owned()),
        };
        put_policy(self.manifests(), &file, app, &spec)
    }

    fn come_or_go(&mut self) -> Result<()> {
        if let Some(coming) = self.coming.take() {
            coming.end()?;
            return self.manifests().remove("e.yaml");
        }
        let node = self.net.node(1);
        let object = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: e, namespace: default, labels: {{app: b}}}}\nspec: {{nodeName: {}, containers: []}}\n",
            node.name()
        );
        self.manifests().write("e.yaml", &object)?;
        let pod = node.add_pod("e")?;
        let traffic = Traffic::start(&[(&self.net.a, &pod, false)])?;
        self.coming = Some(Coming { pod, traffic });
        Ok(())
    }

    /// Now and then an agent dies, and one that is dead starts. Returns how many died.
    fn kill_or_start(&mut self) -> Result<usize> {
        let node = self.net.node(1 + self.dice.below(2) as usize);
        if !node.agent_runs() {
            node.spawn_agent(&[])?;
            return Ok(0);
        }
        if self.dice.below(6) > 0 {
            return Ok(0);
        }
        node.kill_agent()?;
        Ok(1)
    }

    fn revive(&self) -> Result<()> {
        for node in self.net.fabric.nodes().iter().filter(|node| !node.agent_runs()) {
            node.spawn_agent(&[])?;
        }
        self.net.fabric.nodes().iter().try_for_each(Node::wait_ready)
    }

    /// Waits until the agents have applied what was written last: whether `b` may open flows.
    fn is_applied(&self, may_open: bool) -> Result<()> {
        let rules = if may_open { "[{}]" } else { "[]" };
        put_policy(self.manifests(), "marker", "b", &format!("policyTypes: [Egress]\n  egress: {rules}"))?;
        for (proto, ip) in targets(&self.net.a) {
            wait::until(&format!("b may open flows to {ip}: {may_open}"), || {
                ensure!(is_answered(self.net.b.netns(), proto, ip, PORT)? == may_open);
                Ok(())
            })?;
        }
        Ok(())
    }
}
