//! Network policies between real pods: what they forbid and allow, how they change under open connections, and pods that come.

mod denied;

use crate::fixture::{Net, endpoints};
use anyhow::{Context, Result, anyhow, ensure};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use testkit::client::{Connection, ask};
use testkit::manifest::Manifests;
use testkit::pod::PORT;
use testkit::{Netns, Pod, Proto, Routing, Setup, wait};

#[test]
fn policies_by_vxlan() -> Result<()> {
    with_policies(Routing::Vxlan)
}

#[test]
fn policies_by_native_routes() -> Result<()> {
    with_policies(Routing::Native)
}

/// The namespace of all pods here.
pub const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: default\n  labels: {kind: test}\n";

/// Pod objects, each with the label `app` of its own name.
fn pods_yaml(pods: &[&Pod]) -> String {
    let mut yaml = String::new();
    for pod in pods {
        let ips: Vec<_> = pod.addresses().iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
        let (name, node) = (pod.name(), pod.node().name());
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: default\n  labels: {{app: {name}}}\nspec:\n  \
             nodeName: {node}\n  containers: []\nstatus:\n  phase: Running\n  podIPs: [{}]\n",
            ips.join(", ")
        );
    }
    yaml
}

/// A policy of this name for the pods whose `app` is `app`.
pub fn put_policy(manifests: &Manifests, name: &str, app: &str, spec: &str) -> Result<()> {
    let yaml = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: {app}}}}}\n  {spec}\n"
    );
    manifests.write(&format!("{name}.yaml"), &yaml)
}

/// Peers that are pods with this `app`.
pub fn pods_of(app: &str) -> String {
    format!("[{{podSelector: {{matchLabels: {{app: {app}}}}}}}]")
}

/// Whether a request is answered.
pub fn is_answered(from: &Netns, proto: Proto, to: IpAddr, port: u16) -> Result<bool> {
    Ok(ask(from, proto, SocketAddr::new(to, port), 1)?.answered() == 1)
}

/// What of TCP and UDP from one pod to another has to pass, in each family.
struct Row<'a> {
    from: &'a Pod,
    to: &'a Pod,
    tcp: bool,
    udp: bool,
}

fn row<'a>(from: &'a Pod, to: &'a Pod, tcp: bool, udp: bool) -> Row<'a> {
    Row { from, to, tcp, udp }
}

impl Row<'_> {
    fn wait(&self, when: &str, proto: Proto, ip: IpAddr) -> Result<()> {
        let passes = if proto == Proto::Tcp { self.tcp } else { self.udp };
        let what = format!("{when}: {proto} from {} to {} at {ip}: {passes}", self.from.name(), self.to.name());
        wait::until(&what, || {
            ensure!(is_answered(self.from.netns(), proto, ip, PORT)? == passes);
            Ok(())
        })
    }
}

/// Waits until all is as it has to be: agents take in files after a moment. All at once, for each request that is denied takes a time-out.
fn wait_rows(when: &str, rows: &[Row<'_>]) -> Result<()> {
    let of_row = |row| Proto::ALL.into_iter().map(move |proto| (row, proto));
    let tries = rows
        .iter()
        .flat_map(of_row)
        .flat_map(|(row, proto)| row.to.addresses().iter().map(move |ip| (row, proto, *ip)));
    thread::scope(|scope| {
        let waits: Vec<_> = tries.map(|(row, proto, ip)| scope.spawn(move || row.wait(when, proto, ip))).collect();
        waits.into_iter().try_for_each(|wait| wait.join().unwrap_or_else(|_| Err(anyhow!("panicked"))))
    })
}

fn with_policies(routing: Routing) -> Result<()> {
    let net = Net::start(Setup { routing, ..Setup::default() })?;
    run(&net).with_context(|| net.fabric.logs())
}

fn run(net: &Net) -> Result<()> {
    let (a, b, c) = (&net.a, &net.b, &net.c);
    let manifests = net.fabric.manifests();
    manifests.write("namespace.yaml", NAMESPACE)?;
    manifests.write("pods.yaml", &pods_yaml(&[a, b, c]))?;
    wait_rows("without policies", &[(a, b), (c, b), (b, c)].map(|(from, to)| row(from, to, true, true)))?;

    put_policy(manifests, "closed", "b", "policyTypes: [Ingress]")?;
    let closed = [(a, b, false), (c, b, false), (b, a, true), (b, c, true), (a, c, true), (c, a, true)];
    wait_rows("b is closed", &closed.map(|(from, to, passes)| row(from, to, passes, passes)))?;
    for ip in b.addresses() {
        ensure!(is_answered(net.node(1).netns(), Proto::Tcp, *ip, PORT)?, "the node reaches its pod");
    }

    let from_c = format!("ingress: [{{from: {}, ports: [{{port: {PORT}}}]}}]", pods_of("c"));
    put_policy(manifests, "from-c", "b", &from_c)?;
    wait_rows("c may, not a", &[row(c, b, true, false), row(a, b, false, false)])?;
    explained(b, &[(c, b, true), (a, b, false)], "default/from-c")?;
    monitored(a, b)?;
    under_an_open_connection(net, manifests, &from_c)?;
    through_a_service(net)?;

    put_policy(manifests, "out-of-c", "c", &format!("policyTypes: [Egress]\n  egress: [{{to: {}}}]", pods_of("a")))?;
    // What c answers is not what it opens.
    let rows = [row(c, a, true, true), row(c, b, false, false), row(a, c, true, true)];
    wait_rows("c may open flows to a alone", &rows)?;
    explained(c, &[(c, a, true), (c, b, false)], "default/out-of-c")?;
    manifests.remove("out-of-c.yaml")?;
    wait_rows("c may open all again", &[row(c, b, true, false)])?;

    of_the_cluster(net, manifests)?;
    audited(net, manifests)?;
    a_pod_that_comes(net, manifests)?;
    without_an_agent(net)?;

    for name in ["closed", "from-c"] {
        manifests.remove(&format!("{name}.yaml"))?;
    }
    wait_rows("policies have gone", &[row(a, b, true, true), row(c, b, true, true)])?;
    Ok(())
}

/// On the node of a pod that `policy` selects, `rustnetctl policy why` says of each flow over TCP what packets just did.
fn explained(pod: &Pod, flows: &[(&Pod, &Pod, bool)], policy: &str) -> Result<()> {
    let port = PORT.to_string();
    for (from, to, passes) in flows {
        for (client, server) in from.addresses().iter().zip(to.addresses()) {
            let (client, server) = (client.to_string(), server.to_string());
            let (code, text) = pod.node().try_rustnetctl(&["policy", "why", &client, &server, &port])?;
            let is_right = code == Some(i32::from(!passes)) && text.contains(policy);
            ensure!(is_right, "{client} to {server}, which passes: {passes}: {code:?} {text}");
        }
    }
    let address = pod.addresses()[0].to_string();
    let shown = pod.node().rustnetctl(&["policy", &address])?;
    ensure!(shown.contains("isolated by ") && shown.contains(policy), "{shown}");
    Ok(())
}

/// A packet that policies drop is printed with the policies that isolate the server.
fn monitored(from: &Pod, to: &Pod) -> Result<()> {
    let ip = to.addresses()[0];
    let reason = "is isolated for ingress by default/closed, default/from-c; no rule of them allows";
    wait::until("monitor explains a drop", || {
        ensure!(!is_answered(from.netns(), Proto::Tcp, ip, PORT)?, "{ip} answers");
        let shown = to.node().rustnetctl(&["monitor", "--drops", "--past", "--for", "1"])?;
        let is_it =
            |line: &str| line.contains("policy_denied") && line.contains(&ip.to_string()) && line.contains(reason);
        ensure!(shown.lines().any(is_it), "no such drop: {shown}");
        Ok(())
    })
}

/// Policies of the cluster before and behind those of the namespace: b is isolated and open to c over TCP.
fn of_the_cluster(net: &Net, manifests: &Manifests) -> Result<()> {
    let (a, b, c) = (&net.a, &net.b, &net.c);
    let put = |name: &str, tier: &str, action: &str, from: &str, to: &str| {
        let yaml = format!(
            "apiVersion: policy.networking.k8s.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  tier: {tier}\n  \
             priority: 5\n  subject: {{pods: {{namespaceSelector: {{matchLabels: {{kind: test}}}}, podSelector: {{matchLabels: {{app: {to}}}}}}}}}\n  \
             ingress:\n  - action: {action}\n    from: [{{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: {from}}}}}}}}}]\n"
        );
        manifests.write(&format!("{name}.yaml"), &yaml)
    };
    put("no-c", "Admin", "Deny", "c", "b")?;
    wait_rows("no-c denies what from-c allows", &[row(c, b, false, false), row(a, b, false, false)])?;
    explained(b, &[(c, b, false)], "ClusterNetworkPolicy/no-c")?;
    put("let-c", "Admin", "Pass", "c", "b")?;
    wait_rows("let-c comes before no-c by its name", &[row(c, b, true, false), row(a, b, false, false)])?;
    put("let-c", "Admin", "Accept", "c", "b")?;
    wait_rows("let-c accepts all of c", &[row(c, b, true, true), row(a, b, false, false)])?;
    put("no-c", "Baseline", "Deny", "c", "a")?;
    wait_rows("nothing else selects a", &[row(c, a, false, false), row(b, a, true, true), row(c, b, true, true)])?;
    let out_of_c = format!("ingress: [{{from: {}}}]", pods_of("c"));
    put_policy(manifests, "to-a", "a", &out_of_c)?;
    wait_rows("a policy of the namespace overrides the baseline", &[row(c, a, true, true), row(b, a, false, false)])?;
    ["no-c", "let-c", "to-a"].into_iter().try_for_each(|name| manifests.remove(&format!("{name}.yaml")))?;
    wait_rows("policies of the cluster have gone", &[row(c, b, true, false), row(b, a, true, true)])
}

/// In an audited namespace all pass, what policies deny is printed, and the end of the audit ends its flows.
fn audited(net: &Net, manifests: &Manifests) -> Result<()> {
    let (a, b, c) = (&net.a, &net.b, &net.c);
    let annotated = NAMESPACE.replace("  name:", "  annotations: {rustnet.io/policy-audit: \"true\"}\n  name:");
    manifests.write("namespace.yaml", &annotated)?;
    wait_rows("audited", &[row(a, b, true, true), row(c, b, true, true)])?;
    // The names of sets are written behind the maps.
    wait::until("the audit is explained", || explained(b, &[(c, b, true), (a, b, true)], "default/from-c"))?;
    let ip = b.addresses()[0];
    let shown = b.node().rustnetctl(&["monitor", "--past", "--for", "1"])?;
    let is_it = |line: &str| {
        line.contains(" audit policy_audited ") && line.contains(&ip.to_string()) && line.contains("the flow passes")
    };
    ensure!(shown.lines().any(is_it), "no flow is reported: {shown}");
    let mut open = Connection::open_in(a.netns(), SocketAddr::new(ip, PORT))?;
    open.ask("while it is audited")?;
    manifests.write("namespace.yaml", NAMESPACE)?;
    wait_rows("no longer audited", &[row(a, b, false, false), row(c, b, true, false)])?;
    ensure!(open.ask("while it is forbidden").is_err(), "a connection outlives the audit");
    Ok(())
}

/// The next segment is dropped once the policy has gone, and passes once it is back.
fn under_an_open_connection(net: &Net, manifests: &Manifests, from_c: &str) -> Result<()> {
    for ip in net.b.addresses() {
        let mut open = Connection::open_in(net.c.netns(), SocketAddr::new(*ip, PORT))?;
        open.ask("before").context("an allowed connection")?;
        manifests.remove("from-c.yaml")?;
        wait_rows("c may no more", &[row(&net.c, &net.b, false, false)])?;
        ensure!(open.ask("while it is forbidden").is_err(), "{ip}: a connection outlives its policy");
        put_policy(manifests, "from-c", "b", from_c)?;
        wait_rows("c may again", &[row(&net.c, &net.b, true, false)])?;
    }
    Ok(())
}

/// The Service's port is another one than the pod's.
fn through_a_service(net: &Net) -> Result<()> {
    let mut service = net.unknown_service();
    service.set(endpoints(&[&net.b]))?;
    for target in service.targets() {
        let asks = |from: &Pod| Ok::<_, anyhow::Error>(ask(from.netns(), Proto::Tcp, target, 1)?.answered() == 1);
        wait::until(&format!("c reaches {target}"), || {
            ensure!(asks(&net.c)?);
            Ok(())
        })?;
        ensure!(!asks(&net.a)?, "a reaches b by {target}");
    }
    Ok(())
}

/// The first packet of a pod that policies do not select passes, and the first to one that they select does not.
fn a_pod_that_comes(net: &Net, manifests: &Manifests) -> Result<()> {
    // Known by its name before its object has addresses: kubelet writes them after the pod is connected.
    let announce = |name: &str, app: &str| {
        let node = net.node(1).name();
        let object = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {app}}}}}\nspec: {{nodeName: {node}, \
             containers: []}}\n"
        );
        manifests.write(&format!("{name}.yaml"), &object)
    };
    announce("d", "d")?;
    let d = net.node(1).add_pod("d")?;
    for ip in net.a.addresses() {
        ensure!(is_answered(d.netns(), Proto::Tcp, *ip, PORT)?, "the first packet to {ip}");
    }
    for ip in d.addresses() {
        ensure!(is_answered(net.a.netns(), Proto::Tcp, *ip, PORT)?, "the first packet from a to {ip}");
    }
    for ip in net.b.addresses() {
        ensure!(!is_answered(d.netns(), Proto::Tcp, *ip, PORT)?, "d reaches b");
    }
    announce("e", "b")?;
    let e = net.node(1).add_pod("e")?;
    for ip in e.addresses() {
        ensure!(!is_answered(net.a.netns(), Proto::Tcp, *ip, PORT)?, "a reaches the new pod e");
    }
    e.delete()?;
    d.delete()?;
    ["d.yaml", "e.yaml"].into_iter().try_for_each(|file| manifests.remove(file))
}

/// What is applied stays applied.
fn without_an_agent(net: &Net) -> Result<()> {
    net.node(1).kill_agent()?;
    for _ in 0..2 {
        for ip in net.b.addresses() {
            ensure!(is_answered(net.c.netns(), Proto::Tcp, *ip, PORT)?, "c may, whether an agent runs or not");
            ensure!(!is_answered(net.a.netns(), Proto::Tcp, *ip, PORT)?, "a may not, whether an agent runs or not");
        }
        if !net.node(1).agent_runs() {
            net.node(1).start_agent(&[])?;
        }
    }
    Ok(())
}
