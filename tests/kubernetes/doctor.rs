//! The preflight against a real API server: how far it gets, and what the agent may do there.

use super::cluster::{Cluster, with_server};
use super::server::{ADMIN, AGENT, Server, User};
use anyhow::{Context as _, Result};
use rustnet_agent::config::KubeSource;
use rustnet_agent::doctor::api::{Facts, Reached, Scope, ask, ask_for_kube_proxy_config, check, list_policies};
use rustnet_agent::doctor::finding::Level;
use std::net::{Ipv4Addr, TcpListener};

const RBAC: &str = include_str!("../../deploy/rbac.yaml");
const NAMESPACE: &str = include_str!("../../deploy/namespace.yaml");
const NODE: &str = r"
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {kubernetes.io/hostname: n1}}
spec: {podCIDRs: [10.244.1.0/24]}
status: {nodeInfo: {systemUUID: 1-2-3}, addresses: [{type: InternalIP, address: 172.18.0.11}]}
";

/// A user that the server does not know.
const NOBODY: User = User { name: "nobody", groups: "", token: "token-of-nobody" };

async fn facts(server: &Server, user: User, url: &str) -> Result<Facts> {
    let source = KubeSource { kubeconfig: Some(server.kubeconfig(user, url)?), api_server: None };
    Ok(ask(&source, "n1", Scope::All).await.api)
}

/// What is not well, by level and words.
fn wrong(facts: &Facts) -> Vec<(Level, String)> {
    let findings = check(facts).into_iter().filter(|it| it.level != Level::Ok);
    findings.map(|it| (it.level, format!("{}: {} -> {}", it.what, it.detail, it.hint))).collect()
}

#[test]
fn rights_are_complete_with_the_shipped_role_and_named_without() -> Result<()> {
    with_server(&[], async |server| {
        let (cluster, url) = (Cluster::new(&server)?, format!("https://{}", Server::address()));
        cluster.apply(NODE).await?;

        let without = facts(&server, AGENT, &url).await?;
        let said = wrong(&without);
        let [(level, text)] = &said[..] else { panic!("{said:?}") };
        assert_eq!(*level, Level::Fault);
        for right in ["list services", "watch endpointslices", "patch nodes,", "patch nodes/status"] {
            assert!(text.contains(right), "{right}: {text}");
        }

        cluster.apply(NAMESPACE).await?;
        cluster.apply(RBAC).await?;
        let source = KubeSource { kubeconfig: Some(server.kubeconfig(AGENT, &url)?), api_server: None };
        // The server hears of new roles by a watch of its own.
        let mut facts = ask(&source, "n1", Scope::All).await;
        while facts.api.missing.as_ref().is_ok_and(|missing| !missing.is_empty()) {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            facts = ask(&source, "n1", Scope::All).await;
        }
        assert_eq!(wrong(&facts.api), Vec::new(), "{:?}", facts.api);
        let nodes = facts.nodes.ok().context("nodes")?;
        let [node] = &nodes[..] else { panic!("{nodes:?}") };
        assert_eq!((node.host_name.as_deref(), node.node.name.as_str()), (Some("n1"), "n1"));

        // Before an agent starts, it asks for its own Node alone: all of them do, and in a rollout many at once.
        cluster.apply(&NODE.replace("n1", "n2")).await?;
        let lists = || Ok::<_, anyhow::Error>(server.audit(AGENT)?.iter().filter(|it| it.verb == "list").count());
        let before = lists()?;
        for (name, want) in [("n2", &["n2"][..]), ("n3", &[])] {
            let known = ask(&source, name, Scope::Own).await.nodes.ok().context("its node")?;
            assert_eq!(known.iter().map(|it| it.node.name.as_str()).collect::<Vec<_>>(), want);
        }
        assert_eq!(lists()?, before, "nothing is listed");
        Ok(())
    })
}

#[test]
fn names_connections_certificates_and_identities_are_distinguished() -> Result<()> {
    with_server(&[], async |server| {
        let url = format!("https://{}", Server::address());
        let reached = async |user, url: &str| facts(&server, user, url).await.map(|facts| facts.reached);
        assert!(matches!(reached(ADMIN, &url).await?, Reached::Answer(version) if version.starts_with('v')));
        assert!(matches!(reached(ADMIN, "https://server.invalid:6443").await?, Reached::Dns(_)));
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        assert!(matches!(reached(ADMIN, &format!("https://{closed}")).await?, Reached::Connect(_)));
        let unauthorised = reached(NOBODY, &url).await?;
        assert!(matches!(unauthorised, Reached::Unauthorised(_)), "{unauthorised:?}");

        // Somebody else answers there, without a certificate.
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let at = other.local_addr()?;
        let closes = std::thread::spawn(move || other.incoming().take(2).for_each(drop));
        let tls = reached(ADMIN, &format!("https://{at}")).await?;
        assert!(matches!(tls, Reached::Tls(_)), "{tls:?}");
        closes.join().ok().context("the other server")?;
        Ok(())
    })
}

#[test]
fn network_policies_are_counted_with_the_right_to_list_them() -> Result<()> {
    with_server(&[], async |server| {
        let (cluster, url) = (Cluster::new(&server)?, format!("https://{}", Server::address()));
        let source = |user| -> Result<KubeSource> {
            Ok(KubeSource { kubeconfig: Some(server.kubeconfig(user, &url)?), api_server: None })
        };
        assert_eq!(list_policies(&source(ADMIN)?).await, Ok((0, Vec::new())));
        for name in ["a", "b", "c", "d", "e"] {
            cluster
                .apply(&format!(
                    "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                     metadata: {{name: {name}, namespace: default}}\nspec: {{podSelector: {{}}}}\n"
                ))
                .await?;
        }
        let names = ["default/a", "default/b", "default/c"].map(str::to_owned).to_vec();
        assert_eq!(list_policies(&source(ADMIN)?).await, Ok((5, names)));
        let refused = list_policies(&source(AGENT)?).await;
        assert!(refused.as_ref().is_err_and(|why| why.contains("forbidden")), "{refused:?}");
        Ok(())
    })
}

#[test]
fn kube_proxys_configuration_is_read_with_the_right_to() -> Result<()> {
    with_server(&[], async |server| {
        let (cluster, url) = (Cluster::new(&server)?, format!("https://{}", Server::address()));
        let read = async |user| -> Result<_> {
            let source = KubeSource { kubeconfig: Some(server.kubeconfig(user, &url)?), api_server: None };
            Ok(ask_for_kube_proxy_config(&source).await)
        };
        assert_eq!(read(ADMIN).await?, Ok(None));
        let config = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n";
        let map = format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: kube-proxy, namespace: kube-system}}\n\
             data:\n  kubeconfig.conf: x\n  config.conf: {config:?}\n"
        );
        cluster.apply(&map).await?;
        assert_eq!(read(ADMIN).await?, Ok(Some(config.to_owned())));
        assert!(matches!(read(AGENT).await?, Err(Reached::Forbidden(_))));
        Ok(())
    })
}
