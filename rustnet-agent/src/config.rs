//! The agent's settings, validated: whoever holds a [`Config`] need not check it again.
//!
//! [`crate::args`] finds the text of each setting in flags, environment and file; here each becomes a value of its type, or
//! an error that names where the text was found and what would be right. All errors are reported, not only the first.

use crate::args::{Origin, Value, Values};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Everything the agent was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of this node's Node object.
    pub node_name: String,
    /// Where Services, EndpointSlices and Nodes come from.
    pub source: Source,
    /// Where maps, programs and links are pinned.
    pub bpffs: PathBuf,
    /// Where the agent and the CNI binary keep their files.
    pub run_dir: PathBuf,
    /// The cgroup v2 directory of the host's and the pods' processes.
    pub cgroup: PathBuf,
    /// A writable `/proc/sys/net` of the host's network namespace.
    pub sysctl_dir: PathBuf,
    /// Devices towards the other nodes; empty: the one of the default route.
    pub uplinks: Vec<String>,
    /// How pods of other nodes are reached.
    pub routing: Routing,
    /// UDP port of the overlay.
    pub overlay_port: u16,
    /// Network identifier of the overlay.
    pub vni: u32,
    /// MTU of the pods' interfaces; `None`: the uplink's, less the overlay's share.
    pub mtu: Option<u32>,
    /// This node's pod ranges, in place of its Node object's; empty: those of the Node object.
    pub pod_cidrs: Vec<IpNet>,
    /// The ranges that the pods of all nodes come from; may be empty.
    pub cluster_pod_cidrs: Vec<IpNet>,
    /// The ranges that service addresses come from; may be empty.
    pub service_cidrs: Vec<IpNet>,
    /// The ranges that node addresses come from; may be empty.
    pub node_cidrs: Vec<IpNet>,
    /// Ranges outside the cluster that see the pods' own addresses.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Pods that talk to the world get this node's address.
    pub masquerade: bool,
    /// Source ports that masquerade may use, both ends included; `None`: the agent chooses.
    pub snat_ports: Option<(u16, u16)>,
    /// Sizes of the maps.
    pub maps: MapSizes,
    /// Where the CNI binary is installed; `None`: it is not.
    pub cni_bin_dir: Option<PathBuf>,
    /// Where the CNI configuration is installed; `None`: it is not.
    pub cni_conf_dir: Option<PathBuf>,
    /// Where `/healthz` and `/readyz` are served; `None`: nowhere.
    pub health_addr: Option<SocketAddr>,
    /// Where `/metrics` is served; `None`: nowhere.
    pub metrics_addr: Option<SocketAddr>,
    /// Report new flows as events too.
    pub flow_events: bool,
    /// Filter directives of the log.
    pub log_level: String,
    /// Shape of the log's lines.
    pub log_format: LogFormat,
    /// Only prepare the host, and end.
    pub prepare: bool,
    /// What somebody chose, by flag: the text of each setting that is not at its default.
    pub chosen: BTreeMap<String, Vec<String>>,
}

/// Where Services, EndpointSlices and Nodes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of Kubernetes YAML.
    Manifests(PathBuf),
    /// A Kubernetes API server.
    Kube(KubeSource),
}

/// How to find and talk to an API server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KubeSource {
    /// The kubeconfig; `None`: the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// An address in place of the kubeconfig's or the environment's: `http://` or `https://`, host, optional port.
    pub api_server: Option<String>,
}

/// How pods of other nodes are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// In VXLAN, between any nodes that reach each other.
    Vxlan,
    /// By the kernel's routes, between nodes of one network segment.
    Native,
    /// By the kernel's routes to nodes of this node's segment, in VXLAN to all others.
    DirectAndVxlan,
}

impl Routing {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vxlan, Self::Native, Self::DirectAndVxlan];

    /// As users write it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Native => "native",
            Self::DirectAndVxlan => "direct-and-vxlan",
        }
    }

    /// Whether some nodes may be reached through the overlay.
    pub const fn has_overlay(self) -> bool {
        !matches!(self, Self::Native)
    }
}

/// Shape of the log's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Entries of each map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// `rn_svc4`, `rn_svc6`, each.
    pub services: u32,
    /// `rn_backends`.
    pub backends: u32,
    /// `rn_ct4`.
    pub ct4: u32,
    /// `rn_ct6`.
    pub ct6: u32,
    /// `rn_frag4`, `rn_frag6`, each.
    pub frags: u32,
    /// `rn_endpoints`.
    pub endpoints: u32,
    /// `rn_peers4`, `rn_peers6`, each.
    pub peers: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            services: 65_536,
            backends: 262_144,
            ct4: 131_072,
            ct6: 131_072,
            frags: 8192,
            endpoints: 4096,
            peers: 65_536,
        }
    }
}

/// All that is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration is refused:\n  {}", .0.join("\n  "))]
pub struct Refused(pub Vec<String>);

impl Config {
    /// The settings of this process: its command line, its environment and the file they name.
    ///
    /// # Errors
    /// An unreadable file, unknown keys, or values that are refused; see [`Refused`].
    pub fn from_process() -> anyhow::Result<Self> {
        let env = |name: &str| std::env::var_os(name);
        Self::load(std::env::args_os(), &env)
    }

    /// The same from any command line and environment.
    ///
    /// # Errors
    /// See [`Self::from_process`].
    pub fn load<I, T>(args: I, env: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let in_pod = env("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty());
        Ok(Self::validate(&Values::gather(args, env)?, in_pod)?)
    }

    /// Gives every setting its type and checks them against each other. `in_pod`: Kubernetes told this process where its
    /// API server is.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn validate(values: &Values, in_pod: bool) -> Result<Self, Refused> {
        let mut read = Reader { values, problems: Vec::new() };
        let config = Self {
            node_name: read.required("node-name", "give the name of this node's Node object", node_name),
            source: source(&mut read, in_pod),
            bpffs: read.required("bpffs", "give a directory", directory),
            run_dir: read.required("run-dir", "give a directory", directory),
            cgroup: read.required("cgroup", "give a directory", directory),
            sysctl_dir: read.required("sysctl-dir", "give a directory", directory),
            uplinks: read.list("uplink", device),
            routing: read.required("routing", "give a routing mode", |text| {
                let found = Routing::ALL.into_iter().find(|routing| routing.word() == text);
                found.ok_or_else(|| {
                    format!("is not a routing mode; give one of {}", Routing::ALL.map(Routing::word).join(", "))
                })
            }),
            overlay_port: read.required("overlay-port", "give a UDP port", |text| number(text, 1, 65_535)),
            vni: read.required("vni", "give a number", |text| number(text, 1, (1 << 24) - 1)),
            mtu: read.required("mtu", "give auto or a number", |text| match text {
                "auto" => Ok(None),
                // Below 1280 IPv6 does not work (RFC 8200, section 5).
                _ => number(text, 1280, 65_535).map(Some).map_err(|error| format!("{error}, or auto")),
            }),
            pod_cidrs: read.list("pod-cidrs", cidr),
            cluster_pod_cidrs: read.list("cluster-pod-cidrs", cidr),
            service_cidrs: read.list("service-cidrs", cidr),
            node_cidrs: read.list("node-cidrs", cidr),
            non_masquerade_cidrs: read.list("non-masquerade-cidrs", cidr),
            masquerade: read.required("masquerade", "give true or false", boolean),
            snat_ports: read.required("snat-ports", "give auto or a range", snat_ports),
            maps: MapSizes {
                services: read.entries("service-entries"),
                backends: read.entries("backend-entries"),
                ct4: read.entries("ct4-entries"),
                ct6: read.entries("ct6-entries"),
                frags: read.entries("frag-entries"),
                endpoints: read.entries("endpoint-entries"),
                peers: read.entries("peer-entries"),
            },
            cni_bin_dir: read.optional("cni-bin-dir", directory),
            cni_conf_dir: read.optional("cni-conf-dir", directory),
            health_addr: read.required("health-addr", "give an address and port, or off", listen),
            metrics_addr: read.required("metrics-addr", "give an address and port, or off", listen),
            flow_events: read.required("flow-events", "give true or false", boolean),
            log_level: read.required("log-level", "give a level", log_level),
            log_format: read.required("log-format", "give text or json", |text| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err("is not a log format; give text or json".to_owned()),
            }),
            prepare: values.prepare,
            chosen: values.chosen(),
        };
        config.check_together(&mut read);
        if read.problems.is_empty() { Ok(config) } else { Err(Refused(read.problems)) }
    }

    /// Says with which configured range a range or address learnt later collides: `what` is such as "pod range of node n1".
    /// `of` tells what the newcomer is, so that pods are not compared with pods.
    pub fn conflict(&self, of: Role, what: &str, net: IpNet) -> Option<String> {
        self.ranges()
            .into_iter()
            .filter(|range| range.role != of && overlap(range.net, net))
            .map(|range| format!("{what} {net} overlaps {} {}; give them ranges apart", range.role.name(), range.net))
            .next()
    }

    fn ranges(&self) -> Vec<Range> {
        let groups = [
            ("pod-cidrs", Role::Pods, &self.pod_cidrs),
            ("cluster-pod-cidrs", Role::Pods, &self.cluster_pod_cidrs),
            ("service-cidrs", Role::Services, &self.service_cidrs),
            ("node-cidrs", Role::Nodes, &self.node_cidrs),
        ];
        let range = |flag, role, net: &IpNet| Range { flag, role, net: *net };
        groups.into_iter().flat_map(|(flag, role, nets)| nets.iter().map(move |net| range(flag, role, net))).collect()
    }

    fn check_together(&self, read: &mut Reader<'_>) {
        let ranges = self.ranges();
        for (i, a) in ranges.iter().enumerate() {
            for b in ranges.iter().take(i).filter(|b| b.role != a.role && overlap(a.net, b.net)) {
                read.problems.push(format!(
                    "{}: {} {} overlaps {} {} of {}; give them ranges apart",
                    read.name(a.flag),
                    a.role.name(),
                    a.net,
                    b.role.name(),
                    b.net,
                    read.name(b.flag),
                ));
            }
            if let Some(reserved) = reserved(a.net) {
                read.problems.push(format!(
                    "{}: {} {} overlaps {reserved}; choose another range",
                    read.name(a.flag),
                    a.role.name(),
                    a.net
                ));
            }
        }
        for v4 in [true, false] {
            let of_family: Vec<_> = self.pod_cidrs.iter().filter(|net| net.addr().is_ipv4() == v4).collect();
            if let [first, second, ..] = of_family[..] {
                read.problems.push(format!(
                    "{}: {first} and {second} are of one family; give one IPv4 and one IPv6 range at most",
                    read.name("pod-cidrs")
                ));
            }
        }
        for net in &self.pod_cidrs {
            let same = |other: &&IpNet| other.addr().is_ipv4() == net.addr().is_ipv4();
            let mut cluster = self.cluster_pod_cidrs.iter().filter(same).peekable();
            if cluster.peek().is_some() && !cluster.any(|other| other.contains(net)) {
                read.problems.push(format!(
                    "{}: {net} lies outside the ranges of {}; widen those or choose a range inside",
                    read.name("pod-cidrs"),
                    read.name("cluster-pod-cidrs")
                ));
            }
        }
        if let (Some(health), Some(metrics)) = (self.health_addr, self.metrics_addr) {
            let same_host =
                health.ip() == metrics.ip() || health.ip().is_unspecified() || metrics.ip().is_unspecified();
            if same_host && health.port() == metrics.port() && health.port() != 0 {
                read.problems.push(format!(
                    "{}: {metrics} and {health} of {} cannot be had both; choose another port",
                    read.name("metrics-addr"),
                    read.name("health-addr")
                ));
            }
        }
    }
}

/// What the addresses of a range belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pods, of this node or of all.
    Pods,
    /// Services.
    Services,
    /// Nodes.
    Nodes,
}

impl Role {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pods => "pod range",
            Self::Services => "service range",
            Self::Nodes => "node range",
        }
    }
}

struct Range {
    flag: &'static str,
    role: Role,
    net: IpNet,
}

fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Ranges that neither pods nor services nor nodes can have.
fn reserved(net: IpNet) -> Option<String> {
    let table = [
        ("127.0.0.0/8", "the loopback range"),
        ("169.254.0.0/16", "the link-local range, which holds the pods' gateway"),
        ("224.0.0.0/4", "the multicast range"),
        ("::1/128", "the loopback address"),
        ("fe80::/10", "the link-local range, which holds the pods' gateway"),
        ("ff00::/8", "the multicast range"),
        ("::ffff:0:0/96", "the range of IPv4-mapped addresses"),
    ];
    table
        .into_iter()
        .filter_map(|(range, name)| Some((IpNet::from_str(range).ok()?, name)))
        .find(|(range, _)| overlap(*range, net))
        .map(|(range, name)| format!("{range}, {name}"))
}

/// Reads values and collects what is wrong with them. A refused value is replaced by its type's default, which never
/// leaves [`Config::validate`].
struct Reader<'a> {
    values: &'a Values,
    problems: Vec<String>,
}

impl Reader<'_> {
    fn name(&self, flag: &str) -> String {
        self.values.get(flag).map_or_else(|| format!("flag --{flag}"), Value::to_string)
    }

    fn optional<T>(&mut self, flag: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let value = self.values.get(flag)?;
        let text = value.texts.first()?;
        match parse(text) {
            Ok(parsed) => Some(parsed),
            Err(problem) => {
                self.problems.push(format!("{value}: {text:?} {problem}"));
                None
            }
        }
    }

    fn required<T: Fallback>(
        &mut self,
        flag: &'static str,
        remedy: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        if self.values.get(flag).is_none_or(|value| value.texts.is_empty()) {
            let setting = crate::args::SETTINGS.iter().find(|setting| setting.flag == flag);
            let (env, key) = setting.map_or_else(Default::default, |setting| (setting.env(), setting.key));
            self.problems.push(format!("flag --{flag} (variable {env}, file key {key}): missing; {remedy}"));
            return T::fallback();
        }
        self.optional(flag, parse).unwrap_or_else(T::fallback)
    }

    fn entries(&mut self, flag: &'static str) -> u32 {
        // The kernel refuses maps beyond its memory; beyond 2^26 entries it is a slip of the finger.
        self.required(flag, "give a number", |text| number(text, 16, 1 << 26))
    }

    fn list<T>(&mut self, flag: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let Some(value) = self.values.get(flag) else { return Vec::new() };
        let mut out = Vec::new();
        for text in &value.texts {
            match parse(text) {
                Ok(parsed) => out.push(parsed),
                Err(problem) => self.problems.push(format!("{value}: {text:?} {problem}")),
            }
        }
        out
    }
}

/// A value to go on with while the remaining problems are collected.
trait Fallback {
    fn fallback() -> Self;
}

macro_rules! fallback {
    ($($type:ty => $value:expr),+ $(,)?) => { $(impl Fallback for $type { fn fallback() -> Self { $value } })+ };
}

fallback!(
    String => Self::new(), PathBuf => Self::new(), Routing => Self::Vxlan, LogFormat => Self::Text, bool => false, u16 => 0, u32 => 0,
);

impl<T> Fallback for Option<T> {
    fn fallback() -> Self {
        None
    }
}

fn source(read: &mut Reader<'_>, in_pod: bool) -> Source {
    let rank = |flag| read.values.get(flag).filter(|value| !value.texts.is_empty()).map(|value| value.origin.rank());
    let (manifests, kubeconfig) = (rank("manifests"), rank("kubeconfig"));
    let use_manifests = match (manifests, kubeconfig) {
        (Some(a), Some(b)) if a == b => {
            let (manifests, kubeconfig) = (read.name("manifests"), read.name("kubeconfig"));
            read.problems.push(format!("{manifests} and {kubeconfig} exclude each other; give one"));
            true
        }
        // The layer that wins decides; what a lower layer says about the other source is overridden with it.
        (Some(a), Some(b)) => a < b,
        (Some(_), None) => true,
        (None, _) => false,
    };
    if use_manifests {
        return Source::Manifests(read.optional("manifests", directory).unwrap_or_default());
    }
    let kube =
        KubeSource { kubeconfig: read.optional("kubeconfig", file), api_server: read.optional("api-server", url) };
    if kubeconfig.is_none() && !in_pod && kube.api_server.is_none() {
        read.problems.push(
            "no source: give --manifests DIR or --kubeconfig FILE (variables RUSTNET_MANIFESTS, RUSTNET_KUBECONFIG, file keys \
             manifests, kubeconfig); without either the agent must run in a pod with a service account"
                .to_owned(),
        );
    }
    Source::Kube(kube)
}

/// Node names are DNS subdomains (RFC 1123), as the API server demands.
fn node_name(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let inner = label.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
        !label.is_empty() && inner && !label.starts_with('-') && !label.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(label) {
        Ok(text.to_owned())
    } else {
        Err("is not a node name; give lower-case letters, digits, '-' and '.', as `kubectl get nodes` shows it"
            .to_owned())
    }
}

fn directory(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("is not an absolute path; begin it with /".to_owned()) }
}

fn file(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("is empty; give the path of a file".to_owned()) } else { Ok(PathBuf::from(text)) }
}

fn device(text: &str) -> Result<String, String> {
    // The kernel's own rule: dev_valid_name().
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        return Err("is not a device name; give one that `ip link` shows".to_owned());
    }
    Ok(text.to_owned())
}

fn number<T: TryFrom<u32>>(text: &str, min: u32, max: u32) -> Result<T, String> {
    text.parse::<u32>()
        .ok()
        .filter(|value| (min..=max).contains(value))
        .and_then(|value| T::try_from(value).ok())
        .ok_or_else(|| format!("is out of place; give a number from {min} to {max}"))
}

fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "is neither; give true or false".to_owned())
}

fn cidr(text: &str) -> Result<IpNet, String> {
    let net = IpNet::from_str(text).map_err(|_| {
        let hint = match IpAddr::from_str(text) {
            Ok(IpAddr::V4(_)) => format!("{text}/32"),
            Ok(IpAddr::V6(_)) => format!("{text}/128"),
            Err(_) => "10.244.0.0/16 or fd00:244::/56".to_owned(),
        };
        format!("is not a range; give an address and a prefix length, such as {hint}")
    })?;
    if net.addr() != net.network() {
        return Err(format!("has bits set behind its prefix; give {}", net.trunc()));
    }
    Ok(net)
}

fn snat_ports(text: &str) -> Result<Option<(u16, u16)>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let wrong = || {
        "is not a port range; give auto, or first and last port of at least 64 above 1023, such as 61000-65535"
            .to_owned()
    };
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let first: u16 = first.trim().parse().map_err(|_| wrong())?;
    let last: u16 = last.trim().parse().map_err(|_| wrong())?;
    if first < 1024 || last < first || last - first < 63 { Err(wrong()) } else { Ok(Some((first, last))) }
}

fn listen(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let wrong = |_| "is not an address and port; give such as 127.0.0.1:9879 or [::1]:9879, or off".to_owned();
    text.parse().map(Some).map_err(wrong)
}

fn url(text: &str) -> Result<String, String> {
    let wrong = || "is not the address of an API server; give such as https://192.0.2.1:6443".to_owned();
    let uri: axum::http::Uri = text.parse().map_err(|_| wrong())?;
    let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    let host = uri.host().is_some_and(|host| !host.is_empty());
    // Credentials belong into the kubeconfig; a path would be sent with every request.
    let plain = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    let bare = uri.query().is_none() && matches!(uri.path(), "" | "/");
    if scheme && host && plain && bare { Ok(text.trim_end_matches('/').to_owned()) } else { Err(wrong()) }
}

fn log_level(text: &str) -> Result<String, String> {
    let wrong = |error: &dyn std::fmt::Display| {
        format!(
            "is not a log filter ({error}); give error, warn, info, debug or trace, or such as info,rustnet_agent::net=debug"
        )
    };
    if text.is_empty() {
        return Err(wrong(&"it is empty"));
    }
    tracing_subscriber::EnvFilter::try_new(text).map_err(|error| wrong(&error))?;
    Ok(text.to_owned())
}

impl Origin {
    /// Whether somebody chose the value.
    pub fn is_chosen(&self) -> bool {
        *self != Self::Default
    }
}

#[cfg(test)]
mod tests;
