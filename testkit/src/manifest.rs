//! Kubernetes YAML for tests: nodes, services and their endpoint slices, written atomically into a watched directory.

use crate::client::Proto;
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// One port of a service.
#[derive(Clone, Debug)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Protocol.
    pub proto: Proto,
    /// The port of the VIP.
    pub port: u16,
    /// The port of the endpoints.
    pub target: u16,
}

impl Port {
    /// TCP and UDP on the same numbers.
    pub fn both(port: u16, target: u16) -> Vec<Self> {
        let one = |proto: Proto| Self { name: proto.to_string().to_lowercase(), proto, port, target };
        Proto::ALL.map(one).to_vec()
    }
}

/// One endpoint of a service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Address, one family.
    pub address: IpAddr,
    /// Node it runs on, when on one.
    pub node: Option<String>,
    /// The `ready` condition.
    pub ready: bool,
    /// The `serving` condition.
    pub serving: bool,
    /// The `terminating` condition.
    pub terminating: bool,
}

impl Endpoint {
    /// A ready endpoint.
    pub fn ready(address: IpAddr, node: Option<&str>) -> Self {
        Self { address, node: node.map(str::to_owned), ready: true, serving: true, terminating: false }
    }
}

/// How clients outside reach a service: by nothing, unless said otherwise.
#[derive(Clone, Debug, Default)]
pub struct Outside {
    /// Port at all nodes, of the first number of a service's ports; 0 for none.
    pub node_port: u16,
    /// Addresses of its load balancer.
    pub balancer: Vec<IpAddr>,
    /// The clients that its load balancer is for; empty for all.
    pub source_ranges: Vec<String>,
    /// Its external IPs.
    pub ips: Vec<IpAddr>,
    /// `externalTrafficPolicy: Local`.
    pub is_local: bool,
}

impl Outside {
    fn type_(&self) -> &'static str {
        match (self.balancer.is_empty(), self.node_port) {
            (false, _) => "LoadBalancer",
            (true, 0) => "ClusterIP",
            (true, _) => "NodePort",
        }
    }
}

/// A service with its endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    /// Name, in the namespace `default`.
    pub name: String,
    /// Cluster addresses, one or one of each family.
    pub vips: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<Port>,
    /// How clients outside reach it.
    pub outside: Outside,
    /// `sessionAffinity: ClientIP`.
    pub affinity: bool,
    /// Its flows are spread by a Maglev table.
    pub is_maglev: bool,
    /// Backends on other nodes answer clients outside directly.
    pub is_direct: bool,
    /// Endpoints, of both families; they are parted into one slice a family.
    pub endpoints: Vec<Endpoint>,
}

const fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

impl Service {
    /// A service with TCP and UDP on one port.
    pub fn new(name: &str, vips: &[IpAddr], port: u16, target: u16) -> Self {
        Self {
            name: name.into(),
            vips: vips.to_vec(),
            ports: Port::both(port, target),
            outside: Outside::default(),
            affinity: false,
            is_maglev: false,
            is_direct: false,
            endpoints: Vec::new(),
        }
    }

    /// The Service object.
    pub fn service_yaml(&self) -> String {
        let list = |items: Vec<String>| items.join(", ");
        let vips = list(self.vips.iter().map(|v| format!("\"{v}\"")).collect());
        let families = list(self.vips.iter().map(|v| family(*v).to_owned()).collect());
        let policy = if self.vips.len() > 1 { "PreferDualStack" } else { "SingleStack" };
        let first = self.vips.first().map(ToString::to_string).unwrap_or_default();
        let annotations = [
            self.is_maglev.then_some("rustnet.io/lb-algorithm: maglev"),
            self.is_direct.then_some("rustnet.io/forwarding-mode: dsr"),
        ];
        let annotations = list(annotations.into_iter().flatten().map(str::to_owned).collect());
        let annotations = format!("  annotations: {{{annotations}}}\n");
        let mut out = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {}\n  namespace: default\n{annotations}spec:\n  type: {}\n  \
             clusterIP: \"{first}\"\n  clusterIPs: [{vips}]\n  ipFamilies: [{families}]\n  ipFamilyPolicy: {policy}\n  \
             ports:\n",
            self.name,
            self.outside.type_(),
        );
        for p in &self.ports {
            let _ = writeln!(
                out,
                "    - {{name: {}, protocol: {}, port: {}, targetPort: {}, nodePort: {}}}",
                p.name, p.proto, p.port, p.target, self.outside.node_port
            );
        }
        if self.affinity {
            out += "  sessionAffinity: ClientIP\n";
        }
        let Outside { balancer, source_ranges, ips, is_local, .. } = &self.outside;
        if *is_local {
            out += "  externalTrafficPolicy: Local\n";
        }
        if !ips.is_empty() {
            let _ = writeln!(out, "  externalIPs: [{}]", list(ips.iter().map(|ip| format!("\"{ip}\"")).collect()));
        }
        if !source_ranges.is_empty() {
            let ranges = source_ranges.iter().map(|range| format!("\"{range}\"")).collect();
            let _ = writeln!(out, "  loadBalancerSourceRanges: [{}]", list(ranges));
        }
        if !balancer.is_empty() {
            let ingress = balancer.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
            let _ = writeln!(out, "status:\n  loadBalancer:\n    ingress: [{}]", list(ingress));
        }
        out
    }

    /// The EndpointSlices, one for each family of the service.
    pub fn slices_yaml(&self) -> String {
        self.vips.iter().map(|vip| self.slice_yaml(family(*vip))).collect::<Vec<_>>().join("---\n")
    }

    fn slice_yaml(&self, of: &str) -> String {
        let mut out = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {0}-{1}\n  namespace: default\n  \
             labels:\n    kubernetes.io/service-name: {0}\naddressType: {of}\nports:\n",
            self.name,
            of.to_lowercase()
        );
        for p in &self.ports {
            let _ = writeln!(out, "  - {{name: {}, protocol: {}, port: {}}}", p.name, p.proto, p.target);
        }
        let mut endpoints = String::new();
        for e in self.endpoints.iter().filter(|e| family(e.address) == of) {
            let (ready, serving, terminating) = (e.ready, e.serving, e.terminating);
            let _ = writeln!(endpoints, "  - addresses: [\"{}\"]", e.address);
            let _ = writeln!(
                endpoints,
                "    conditions: {{ready: {ready}, serving: {serving}, terminating: {terminating}}}"
            );
            if let Some(node) = &e.node {
                let _ = writeln!(endpoints, "    nodeName: {node}");
            }
        }
        out += if endpoints.is_empty() { "endpoints: []\n" } else { "endpoints:\n" };
        out += &endpoints;
        out
    }

    /// Both objects.
    pub fn yaml(&self) -> String {
        format!("{}---\n{}", self.service_yaml(), self.slices_yaml())
    }
}

/// A Node object.
pub fn node_yaml(name: &str, addresses: &[IpAddr], pod_cidrs: &[ipnet::IpNet]) -> String {
    let first = pod_cidrs.first().map(ToString::to_string).unwrap_or_default();
    let cidrs = pod_cidrs.iter().map(|c| format!("\"{c}\"")).collect::<Vec<_>>().join(", ");
    let mut out = format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nspec:\n  podCIDR: \"{first}\"\n  podCIDRs: [{cidrs}]\n\
         status:\n  addresses:\n"
    );
    for address in addresses {
        let _ = writeln!(out, "    - {{type: InternalIP, address: \"{address}\"}}");
    }
    let _ = writeln!(out, "    - {{type: Hostname, address: {name}}}");
    out
}

/// A Pod object of the namespace `default` that runs on a node, with annotations.
pub fn pod_yaml(name: &str, node: &str, addresses: &[IpAddr], annotations: &[(&str, &str)]) -> String {
    let annotations = annotations.iter().map(|(key, value)| format!("\"{key}\": \"{value}\"")).collect::<Vec<_>>();
    let addresses = addresses.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect::<Vec<_>>();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: default\n  annotations: {{{}}}\nspec:\n  \
         nodeName: {node}\n  containers: []\nstatus:\n  phase: Running\n  podIPs: [{}]\n",
        annotations.join(", "),
        addresses.join(", ")
    )
}

/// A watched directory.
#[derive(Clone, Debug)]
pub struct Manifests {
    dir: PathBuf,
}

impl Manifests {
    /// Of an existing directory.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file at once, as editors do: a hidden file, then a rename.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let (hidden, path) = (self.dir.join(format!(".{file}.tmp")), self.dir.join(file));
        std::fs::write(&hidden, text)
            .and_then(|()| std::fs::rename(&hidden, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes a service and its slices into `NAME.yaml`.
    pub fn apply(&self, service: &Service) -> Result<()> {
        self.write(&format!("{}.yaml", service.name), &service.yaml())
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.dir.join(file);
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }

    /// Removes what [`Manifests::apply`] wrote.
    pub fn delete(&self, service: &Service) -> Result<()> {
        self.remove(&format!("{}.yaml", service.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_endpoints_by_family() -> Result<()> {
        let mut service = Service::new("web", &["10.96.0.10".parse()?, "fd00:96::10".parse()?], 80, 8080);
        service.endpoints.push(Endpoint::ready("10.244.1.2".parse()?, Some("n1")));
        let yaml = service.yaml();
        let documents: Vec<&str> = yaml.split("---\n").collect();
        assert_eq!(documents.len(), 3);
        assert!(documents[1].contains("addressType: IPv4") && documents[1].contains("\"10.244.1.2\""));
        assert!(documents[2].contains("addressType: IPv6") && documents[2].contains("endpoints: []"));
        Ok(())
    }
}
