//! The shared fabrics, and services made for one test.

use anyhow::{Context, Result, anyhow};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use testkit::client::ask;
use testkit::manifest::{Endpoint, Outside, Service};
use testkit::pod::PORT;
use testkit::server::Server;
use testkit::sniff::recorded;
use testkit::{Fabric, Netns, Node, Pod, Proto, Routing, Setup, Topology, wait};

/// The port of the services.
pub const SERVICE_PORT: u16 = 80;

/// Tables so small that what is not given back is missed soon, and that a dump of them is quick.
pub const SMALL_TABLES: &[&str] = &["--service-entries", "512", "--backend-entries", "4096", "--frag-entries", "512"];
/// The slots for backends among them.
pub const SMALL_BACKENDS: usize = 4096;

/// Two nodes with agents and three pods: `a` and `b` on node 1, `c` on node 2; the world and each node run a server too.
pub struct Net {
    pub fabric: Fabric,
    pub a: Pod,
    pub b: Pod,
    pub c: Pod,
    _servers: Vec<Server>,
}

impl Net {
    /// Builds and starts one of one's own.
    pub fn start(setup: Setup) -> Result<Self> {
        Self::furnished(Fabric::start(setup)?)
    }

    /// Adds pods and servers to a fabric whose agents are ready.
    pub fn furnished(fabric: Fabric) -> Result<Self> {
        Self::on(fabric).map_err(|(e, fabric)| e.context(fabric.logs()))
    }

    /// The same in a fabric whose agents run.
    pub fn on(fabric: Fabric) -> Result<Self, (anyhow::Error, Box<Fabric>)> {
        match Self::furnish(&fabric) {
            Ok((a, b, c, servers)) => Ok(Self { a, b, c, _servers: servers, fabric }),
            Err(e) => Err((e, Box::new(fabric))),
        }
    }

    fn furnish(fabric: &Fabric) -> Result<(Pod, Pod, Pod, Vec<Server>)> {
        let (a, b, c) = (fabric.node(1).add_pod("a")?, fabric.node(1).add_pod("b")?, fabric.node(2).add_pod("c")?);
        let mut servers = vec![Server::start(fabric.world(), "world", PORT)?];
        for node in fabric.nodes() {
            servers.push(Server::start(node.netns(), node.name(), PORT)?);
        }
        Ok((a, b, c, servers))
    }

    /// Node 1 or 2.
    pub fn node(&self, n: usize) -> &Node {
        self.fabric.node(n)
    }

    /// Applies a service with new addresses, and waits until both nodes know it. Removed when dropped.
    pub fn service(&self, endpoints: Vec<Endpoint>) -> Result<TestService<'_>> {
        let made = self.unawaited_service(endpoints)?;
        made.wait_known()?;
        Ok(made)
    }

    /// The same, without waiting.
    pub fn unawaited_service(&self, endpoints: Vec<Endpoint>) -> Result<TestService<'_>> {
        let mut made = self.unknown_service();
        made.set(endpoints)?;
        Ok(made)
    }

    /// Addresses for a service that no agent knows until its endpoints are set.
    pub fn unknown_service(&self) -> TestService<'_> {
        // All tests of a run share a fabric, and need more than one byte's addresses: with a number twice, one would ask the other's.
        static NUMBER: AtomicU16 = AtomicU16::new(0);
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        assert!(n < 64 * 250, "more services than addresses");
        let (third, last) = (64 + (n / 250) as u8, 1 + (n % 250) as u8);
        let vips = [
            Ipv4Addr::new(10, 96, third, last).into(),
            Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, third.into(), last.into()).into(),
        ];
        TestService { net: self, service: Service::new(&format!("svc-{n}"), &vips, SERVICE_PORT, PORT) }
    }
}

/// A figure of the environment, or the one that a claim is about.
pub fn figure(variable: &str, usual: usize) -> Result<usize> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text} is no number")),
        Err(_) => Ok(usual),
    }
}

/// The world's addresses.
pub fn world() -> [IpAddr; 2] {
    let (v4, v6) = testkit::fabric::WORLD;
    [v4.into(), v6.into()]
}

/// Ready endpoints for both addresses of each pod.
pub fn endpoints(pods: &[&Pod]) -> Vec<Endpoint> {
    pods.iter().flat_map(|p| p.addresses().iter().map(|a| Endpoint::ready(*a, Some(p.node().name())))).collect()
}

/// A service of one test.
pub struct TestService<'a> {
    net: &'a Net,
    pub service: Service,
}

impl TestService<'_> {
    /// Address and port of each family.
    pub fn targets(&self) -> [SocketAddr; 2] {
        [0, 1].map(|i| SocketAddr::new(self.service.vips[i], SERVICE_PORT))
    }

    /// The target of the same family as an address.
    pub fn target_like(&self, address: IpAddr) -> SocketAddr {
        self.targets()[usize::from(address.is_ipv6())]
    }

    /// Replaces the endpoints in the file.
    pub fn set(&mut self, endpoints: Vec<Endpoint>) -> Result<()> {
        self.service.endpoints = endpoints;
        self.net.fabric.manifests().apply(&self.service)
    }

    /// Waits until both nodes refuse the service: it has no endpoints, or nobody listens there.
    pub fn wait_refused(&self) -> Result<()> {
        for pod in [&self.net.a, &self.net.c] {
            for target in self.targets() {
                wait::until(&format!("{} refused on {}", self.service.name, pod.node().name()), || {
                    ask(pod.netns(), Proto::Udp, target, 1)?.all_failed(std::io::ErrorKind::ConnectionRefused)
                })?;
            }
        }
        Ok(())
    }

    /// Waits until the maps of both nodes lead to the endpoints there are. Asked as pods, because a pod on each node
    /// exists whatever the endpoints are.
    pub fn wait_known(&self) -> Result<()> {
        for pod in [&self.net.a, &self.net.c] {
            for target in self.targets() {
                let any = self.service.endpoints.iter().any(|e| e.address.is_ipv4() == target.is_ipv4());
                wait::until(&format!("{} known on {}", self.service.name, pod.node().name()), || {
                    let answers = ask(pod.netns(), Proto::Udp, target, 1)?;
                    if any { answers.all_answered() } else { answers.all_failed(std::io::ErrorKind::ConnectionRefused) }
                })?;
            }
        }
        Ok(())
    }
}

impl Drop for TestService<'_> {
    fn drop(&mut self) {
        // The fabric may be on its way out as well.
        let _ = self.net.fabric.manifests().delete(&self.service);
    }
}

/// A node port that no other test has.
pub fn node_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(30_100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A service with a node port, which both nodes know.
pub fn published(net: &Net, outside: Outside, endpoints: Vec<Endpoint>) -> Result<TestService<'_>> {
    let mut service = net.unknown_service();
    service.service.outside = outside;
    service.set(endpoints)?;
    service.wait_known()?;
    Ok(service)
}

/// The node port at a node, of each family.
pub fn node_ports(node: &Node, service: &TestService<'_>) -> [SocketAddr; 2] {
    world().map(|like| SocketAddr::new(node.address_like(like), service.service.outside.node_port))
}

/// Waits until somebody answers there.
pub fn wait_served(from: &Netns, target: SocketAddr) -> Result<()> {
    wait::until(&format!("{target} served"), || ask(from, Proto::Udp, target, 1)?.all_answered())
}

/// The fabric of a routing mode that all tests share.
pub fn shared(routing: Routing) -> Result<&'static Net> {
    static VXLAN: OnceLock<Result<Net, String>> = OnceLock::new();
    static NATIVE: OnceLock<Result<Net, String>> = OnceLock::new();
    let slot = match routing {
        Routing::Vxlan => &VXLAN,
        Routing::Native => &NATIVE,
        Routing::DirectAndVxlan => return Err(anyhow!("no fabric of this routing is shared")),
    };
    let net = slot.get_or_init(|| Net::start(Setup { routing, ..Setup::default() }).map_err(|e| format!("{e:#}")));
    net.as_ref().map_err(|e| anyhow!("the shared fabric did not start: {e}"))
}

/// A fabric whose nodes are parted by routers with a narrow core.
pub fn narrow() -> Setup {
    Setup { topology: Topology::Routed { core_mtu: 1400 }, ..Setup::default() }
}

/// Runs one test with captures on the nodes' uplinks and the world's device; a failure names them and shows the agents' logs.
pub fn observed(net: &Net, test: impl FnOnce(&Net) -> Result<()>) -> Result<()> {
    let mut uplinks: Vec<(&Netns, &str)> = net.fabric.nodes().iter().map(|n| (n.netns(), "eth0")).collect();
    // What XDP takes and sends is in no capture of its node.
    uplinks.push((net.fabric.world(), "eth0"));
    let result = recorded(&uplinks, || {
        catch_unwind(AssertUnwindSafe(|| test(net))).unwrap_or_else(|_| Err(anyhow!("panicked")))
    });
    result.map_err(|e| e.context(net.fabric.logs()))
}

/// Makes one test of each function in each routing mode, on the shared fabric.
macro_rules! in_each_routing {
    ($($name:ident),+ $(,)?) => {
        mod vxlan {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                let net = crate::fixture::shared(testkit::Routing::Vxlan)?;
                crate::fixture::observed(net, super::$name)
            })+
        }
        mod native {
            $(#[test]
            fn $name() -> anyhow::Result<()> {
                let net = crate::fixture::shared(testkit::Routing::Native)?;
                crate::fixture::observed(net, super::$name)
            })+
        }
    };
}
pub(crate) use in_each_routing;
