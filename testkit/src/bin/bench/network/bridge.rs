//! The reference `bridge` plugin with `host-local`, two nodes that route to each other's pods; on demand with kube-proxy in
//! nftables mode and the API server that it needs.

use super::kernel::{MTU, join};
use super::ours::{FAR, NEAR, filler, service};
use crate::plugins;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use testkit::apiserver::ApiServer;
use testkit::cni::Attachment;
use testkit::janitor::Process;
use testkit::manifest::{Service, node_yaml};
use testkit::netns::{Holder, Own};
use testkit::{Fabric, Netns, Node, Setup};

/// Services that one call of kubectl makes.
const AT_ONCE: usize = 500;

/// A pod that the plugin connected.
pub struct BridgePod {
    /// Its namespace.
    pub netns: Holder,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// Two nodes with the plugin.
pub struct Bridge {
    /// Two on the first node, one on the second.
    pub pods: Vec<BridgePod>,
    _proxies: Vec<Process>,
    _api: Option<ApiServer>,
    _fabric: Fabric,
}

impl Bridge {
    /// Builds them; with kube-proxy and so many services if asked for.
    pub fn start(services: Option<u32>) -> Result<Self> {
        let plugin = plugins::find("bridge")?;
        let proxy = services.map(|_| kube_proxy()).transpose()?;
        let fabric = Fabric::build(Setup { nodes: 2, mtu: MTU, ..Setup::default() })?;
        wire(&fabric)?;
        let mut pods = Vec::new();
        for (node, name) in [(1, "pod-1"), (1, "pod-2"), (2, "pod-3")] {
            pods.push(add_pod(fabric.node(node), name, &plugin)?);
        }
        let (mut api, mut proxies) = (None, Vec::new());
        if let (Some(services), Some(proxy)) = (services, proxy) {
            let server = ApiServer::start(&fabric)?;
            for node in fabric.nodes() {
                server.apply(&node_yaml(node.name(), &node.addresses(), node.pod_cidrs()), "create")?;
            }
            let mut all: Vec<Service> = (2..services).map(filler).collect();
            all.push(service("near", NEAR, &pods[1].addresses, "n1"));
            all.push(service("far", FAR, &pods[2].addresses, "n2"));
            for some in all.chunks(AT_ONCE) {
                let yaml: Vec<String> = some.iter().map(Service::yaml).collect();
                server.apply(&yaml.join("---\n"), "create")?;
            }
            for node in fabric.nodes() {
                proxies.push(start_proxy(node, &proxy, &server)?);
            }
            api = Some(server);
        }
        Ok(Self { pods, _proxies: proxies, _api: api, _fabric: fabric })
    }
}

/// A wire between the nodes in addition to the switch, which remains for the API server.
fn wire(fabric: &Fabric) -> Result<()> {
    let end = |n: u8| (Ipv4Addr::new(172, 22, 0, n), Ipv6Addr::new(0xfd00, 0x22, 0, 0, 0, 0, 0, n.into()));
    join(fabric.node(1).netns(), fabric.node(2).netns(), "wire", [end(1), end(2)])?;
    for (node, other) in [(1, 2_u8), (2, 1)] {
        let (v4, v6) = end(other);
        let mut routes = String::new();
        for cidr in fabric.node(other.into()).pod_cidrs() {
            let via: IpAddr = if cidr.addr().is_ipv4() { v4.into() } else { v6.into() };
            let _ = writeln!(routes, "route add {cidr} via {via}");
        }
        let netns = fabric.node(node).netns();
        netns.sysctl("ipv4/ip_forward", "1")?;
        netns.sysctl("ipv6/conf/all/forwarding", "1")?;
        netns.ip(&routes)?;
    }
    Ok(())
}

/// The plugin's configuration on a node.
fn configuration(node: &Node) -> Value {
    let ranges: Vec<Value> = node.pod_cidrs().iter().map(|cidr| json!([{ "subnet": cidr.to_string() }])).collect();
    json!({
        "cniVersion": "0.4.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "isDefaultGateway": true, "ipMasq": false, "hairpinMode": true, "mtu": MTU,
        "ipam": { "type": "host-local", "dataDir": node.dir().join("host-local"), "ranges": ranges }
    })
}

fn add_pod(node: &Node, name: &str, plugin: &Path) -> Result<BridgePod> {
    plugins::offer(node, "host-local")?;
    let netns = Holder::new(&format!("{}-{name}", node.netns().name()), Own::default())?;
    netns.sysctl("ipv6/conf/default/accept_dad", "0")?;
    netns.sysctl("ipv6/conf/all/accept_dad", "0")?;
    let file = node.dir().join("netns").join(name);
    node.netns().bind_netns(&netns, &file)?;
    let attachment = Attachment {
        container_id: netns.name().to_owned(),
        netns: file.display().to_string(),
        ifname: "eth0".into(),
        args: String::new(),
    };
    let result = node.cni_exec(plugin, "ADD", &attachment, configuration(node).to_string().as_bytes())?;
    let ips = result["ips"].as_array().with_context(|| format!("no addresses in {result}"))?;
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    let addresses = ips.iter().map(address).collect::<Option<_>>().with_context(|| format!("strange: {result}"))?;
    Ok(BridgePod { netns, addresses })
}

/// Where kube-proxy is.
fn kube_proxy() -> Result<PathBuf> {
    let Some(dir) = std::env::var_os("RUSTNET_KUBERNETES") else {
        bail!("RUSTNET_KUBERNETES does not say where kube-proxy is: start this by `cargo xtask bench`, which builds it")
    };
    let path = Path::new(&dir).join("kube-proxy");
    if path.is_file() {
        Ok(path)
    } else {
        bail!("{} is missing: `cargo xtask setup --with kube-proxy --with kubernetes` builds it", path.display())
    }
}

fn start_proxy(node: &Node, program: &Path, api: &ApiServer) -> Result<Process> {
    let file = |name: &str| node.dir().join(name);
    std::fs::write(
        file("kube-proxy.yaml"),
        format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n\
             clusterCIDR: 10.244.0.0/16,fd00:244::/48\nhostnameOverride: {}\n\
             clientConnection: {{kubeconfig: {}}}\nconntrack: {{maxPerCore: 0, min: 0}}\n",
            node.name(),
            api.kubeconfig().display()
        ),
    )?;
    let log = File::create(file("kube-proxy.log"))?;
    let netns: &Netns = node.netns();
    let config = file("kube-proxy.yaml").display().to_string();
    netns.command(program)?.args(["--config", &config]).stdout(log.try_clone()?).stderr(log).spawn()
}
