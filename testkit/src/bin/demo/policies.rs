//! Network policies that take effect on an open connection, and what `rustnetctl policy why` says of them.

use crate::cluster::Cluster;
use crate::table::{self, Table};
use anyhow::{Result, anyhow, ensure};
use std::fmt::Write as _;
use std::net::SocketAddr;
use testkit::client::{Connection, ask};
use testkit::pod::PORT;
use testkit::{Pod, Proto, wait};

/// File of the objects.
const OBJECTS: &str = "demo-policies-objects.yaml";
/// File of the policy that comes and goes.
const POLICY: &str = "demo-policies.yaml";

/// A NetworkPolicy and a ClusterNetworkPolicy, between the first pod and the last.
pub fn rows(cluster: &Cluster<'_>, table: &mut Table) -> Result<()> {
    table::step("network policies, under open connections");
    if cluster.api.is_some() {
        table::note("the API server of the demo has no Pods, which policies select: left out");
        return Ok(());
    }
    let (Some(server), Some(client)) = (cluster.pods.first(), cluster.pods.last()) else {
        return Err(anyhow!("no pods"));
    };
    let manifests = cluster.fabric.manifests();
    let held = manifests.write(OBJECTS, &objects(cluster.pods.iter())).and_then(|()| {
        let isolating = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: default}\nspec:\n  \
                         podSelector: {matchLabels: {app: SERVER}}\n  policyTypes: [Ingress]\n";
        one(cluster, (client, server), isolating, "default/closed", table)?;
        let denying = "apiVersion: policy.networking.k8s.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {name: no-client}\nspec:\n  \
                       tier: Admin\n  priority: 10\n  subject: {namespaces: {}}\n  ingress:\n  - name: demo\n    action: Deny\n    \
                       from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: CLIENT}}}}]\n";
        one(cluster, (client, server), denying, "ClusterNetworkPolicy/no-client", table)
    });
    for file in [POLICY, OBJECTS] {
        let _ = manifests.remove(file);
    }
    held
}

/// The namespace and the pods, each with a label of its own name.
fn objects<'a>(pods: impl Iterator<Item = &'a Pod>) -> String {
    let mut yaml = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n".to_owned();
    for pod in pods {
        let ips: Vec<String> = pod.addresses().iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
        let (name, node, ips) = (pod.name(), pod.node().name(), ips.join(", "));
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {name}}}}}\nspec: \
             {{nodeName: {node}, containers: []}}\nstatus: {{phase: Running, podIPs: [{ips}]}}\n"
        );
    }
    yaml
}

/// A policy that denies what the client asks the server, while connections of both families are open; and its end.
fn one(cluster: &Cluster<'_>, (client, server): (&Pod, &Pod), yaml: &str, name: &str, table: &mut Table) -> Result<()> {
    let manifests = cluster.fabric.manifests();
    let yaml = yaml.replace("SERVER", server.name()).replace("CLIENT", client.name());
    let (from, to) = (client.name(), server.name());
    for (client_ip, ip) in client.addresses().iter().zip(server.addresses()) {
        let target = SocketAddr::new(*ip, PORT);
        let is_answered = || Ok::<_, anyhow::Error>(ask(client.netns(), Proto::Tcp, target, 1)?.answered() == 1);
        let mut open = Connection::open_in(client.netns(), target)?;
        let before = open.ask("before").map(drop);
        manifests.write(POLICY, &yaml)?;
        let denied = wait::until(&format!("{name} denies"), || {
            ensure!(!is_answered()?, "{target} answers");
            Ok(())
        });
        let cut = match (before, denied, open.ask("denied")) {
            (Ok(()), Ok(()), Err(_)) => Ok(()),
            (before, denied, after) => Err(anyhow!("before: {before:?}, new: {denied:?}, open: {after:?}")),
        };
        table.fact(&format!("{from} > {to}: {name} cuts an open connection, and no new one opens ({ip})"), cut);
        let question = ["policy", "why", &client_ip.to_string(), &ip.to_string(), &PORT.to_string()];
        let (code, said) = server.node().try_rustnetctl(&question)?;
        said.lines().for_each(table::note);
        let is_explained = code == Some(1) && said.contains(name);
        let verdict = if is_explained { Ok(()) } else { Err(anyhow!("exit code {code:?}")) };
        table.fact(&format!("rustnetctl policy why names {name}"), verdict);
        manifests.remove(POLICY)?;
        let opened = wait::until(&format!("{name} has gone"), || {
            ensure!(is_answered()?, "{target} does not answer");
            Ok(())
        });
        table.fact(&format!("{from} > {to}: open again without it ({ip})"), opened);
    }
    Ok(())
}
