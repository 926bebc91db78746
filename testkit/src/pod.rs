//! A pod: a network namespace that the CNI binary connected.

use crate::cni::Attachment;
use crate::netns::{Holder, Netns, Own};
use crate::node::Node;
use crate::server::Server;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// The port that a pod's server listens on, TCP and UDP.
pub const PORT: u16 = 8080;

/// A connected pod; taken down by the CNI binary when dropped.
#[derive(Debug)]
pub struct Pod {
    name: String,
    servers: Vec<Server>,
    attachment: Attachment,
    result: Value,
    addresses: Vec<IpAddr>,
    list: Value,
    gone: bool,
    sandbox: Sandbox,
    node: Node,
}

impl Node {
    /// Adds a pod by the CNI binary, with a server on [`PORT`].
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        let mut pod = self.add_silent_pod(name)?;
        pod.serve(PORT)?;
        Ok(pod)
    }

    /// Adds a pod by the CNI binary, in which nothing listens.
    pub fn add_silent_pod(&self, name: &str) -> Result<Pod> {
        self.add_pod_with(name, &Value::Null)
    }

    /// The same with a configuration of one's own: `more` (an object) is put over the installed one.
    pub fn add_pod_with(&self, name: &str, more: &Value) -> Result<Pod> {
        let sandbox = Sandbox::new(self, name)?;
        let attachment = sandbox.attachment(name);
        let list = self.conflist_with(more)?;
        let added = self.cni_add(&list, &attachment);
        let result = added.with_context(|| format!("cannot add pod {name} to {}", self.name()))?;
        let addresses = addresses(&result)?;
        let node = self.clone();
        let (servers, gone) = (Vec::new(), false);
        Ok(Pod { name: name.into(), servers, attachment, list, result, addresses, gone, sandbox, node })
    }
}

/// What a runtime makes before it calls the CNI binary: a network namespace, bound to a file of its node.
#[derive(Debug)]
pub struct Sandbox {
    node: Node,
    holder: Holder,
    file: PathBuf,
    container_id: String,
}

impl Sandbox {
    /// Makes one; gone when dropped.
    pub fn new(node: &Node, name: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = node.cgroup().map(PathBuf::from);
        let holder = Holder::new(&format!("{}-{name}", node.netns().name()), Own { mounts: false, cgroup })?;
        let file = node.dir().join("netns").join(format!("{name}-{number}"));
        node.netns().bind_netns(&holder, &file)?;
        Ok(Self { node: node.clone(), holder, file, container_id: format!("{}{number:08x}", node.netns().name()) })
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.holder
    }

    /// What a runtime tells of the interface `eth0` of a pod in here.
    pub fn attachment(&self, name: &str) -> Attachment {
        let id = &self.container_id;
        Attachment {
            args: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};\
                 K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={id}"
            ),
            container_id: id.clone(),
            netns: self.file.display().to_string(),
            ifname: "eth0".into(),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The node may be gone before; its mounts went with it.
        let _ = self.node.netns().unbind_netns(&self.file);
    }
}

/// The addresses in a CNI result.
pub fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().with_context(|| format!("the CNI result has no ips: {result}"))?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().unwrap_or_default();
            text.parse::<ipnet::IpNet>().map(|net| net.addr()).with_context(|| format!("bad address in {result}"))
        })
        .collect()
}

impl Pod {
    /// Its name; its server answers with it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node it is on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        self.sandbox.netns()
    }

    /// Its addresses, in the order of the CNI result.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Result<Ipv4Addr> {
        let found = self.addresses.iter().find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None });
        found.with_context(|| format!("{} has no IPv4 address: {:?}", self.name, self.addresses))
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Result<Ipv6Addr> {
        let found = self.addresses.iter().find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None });
        found.with_context(|| format!("{} has no IPv6 address: {:?}", self.name, self.addresses))
    }

    /// Its address of the same family as another.
    pub fn address_like(&self, other: IpAddr) -> Result<IpAddr> {
        Ok(if other.is_ipv4() { self.v4()?.into() } else { self.v6()?.into() })
    }

    /// The CNI result.
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// The host's end of its veth.
    pub fn host_interface(&self) -> Result<&str> {
        let interfaces = self.result["interfaces"].as_array().into_iter().flatten();
        let host = interfaces.into_iter().find(|i| i["sandbox"].as_str().is_none_or(str::is_empty));
        host.and_then(|i| i["name"].as_str())
            .with_context(|| format!("no host interface in the CNI result: {}", self.result))
    }

    /// Starts a server on another port.
    pub fn serve(&mut self, port: u16) -> Result<()> {
        self.servers.push(Server::start(self.sandbox.netns(), &self.name, port)?);
        Ok(())
    }

    /// Ends its servers, and all their connections.
    pub fn silence(&mut self) {
        self.servers.clear();
    }

    /// Runs a program inside and gives its standard output.
    pub fn exec(&self, program: &str, args: &[&str]) -> Result<String> {
        self.netns().exec(program, args)
    }

    /// Runs a closure inside.
    pub fn run_in<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        self.netns().run(f)
    }

    /// Switches checksum offload of its interface. Without it, packets leave the pod with finished checksums.
    pub fn set_tx_checksum(&self, on: bool) -> Result<()> {
        self.netns().run(|| crate::raw::set_tx_checksum("eth0", on))?
    }

    /// Runs CHECK.
    pub fn check(&self) -> Result<()> {
        self.node.cni_check(&self.list, &self.attachment, &self.result)
    }

    /// The CNI call that made it.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// Takes it down, as a runtime does.
    pub fn delete(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.gone, true) {
            bail!("{} is gone already", self.name);
        }
        self.servers.clear();
        self.node.cni_del(&self.list, &self.attachment, Some(&self.result))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if !self.gone {
            // The fabric may be gone before its pods; then there is nothing to take down.
            let _ = self.take_down();
        }
    }
}
