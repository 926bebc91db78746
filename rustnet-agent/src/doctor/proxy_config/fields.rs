//! The fields of kube-proxy's configuration (`KubeProxyConfiguration`, v1alpha1): type, default, and what becomes of each with rustnet.

use Becomes::{Changes, Flag, Nothing};
use Type::{Any, Bool, Duration, Integer, Number, Text, Texts};

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Text.
    Text,
    /// True or false.
    Bool,
    /// A whole number.
    Integer,
    /// A number.
    Number,
    /// Text such as `1h30m`.
    Duration,
    /// A list of texts.
    Texts,
    /// Whatever it is.
    Any,
}

/// What becomes of a setting.
#[derive(Clone, Copy, Debug)]
pub enum Becomes {
    /// The agent has this setting, and its value is made by the function.
    Flag(&'static str, fn(&[String]) -> Vec<String>),
    /// It has no effect, for this reason; nobody will see a difference.
    Nothing(&'static str),
    /// What it asks for is not so with rustnet: what is, and what to do.
    Changes(&'static str, &'static str),
}

/// A field.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its names, from the outermost.
    pub path: &'static str,
    /// What it has to be.
    pub kind: Type,
    /// Values that mean the same as none.
    pub defaults: &'static [&'static str],
    /// What becomes of it.
    pub becomes: Becomes,
}

const fn field(path: &'static str, kind: Type, defaults: &'static [&'static str], becomes: Becomes) -> Field {
    Field { path, kind, defaults, becomes }
}

fn same(texts: &[String]) -> Vec<String> {
    texts.to_vec()
}

fn comma_separated(texts: &[String]) -> Vec<String> {
    texts.iter().flat_map(|text| text.split(',')).map(|text| text.trim().to_owned()).collect()
}

fn with_port(texts: &[String], port: u16) -> Vec<String> {
    let has_port = |text: &str| text.parse::<std::net::SocketAddr>().is_ok();
    let address = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    let complete = |text: &String| match address(text) {
        Ok(ip) if !has_port(text) => std::net::SocketAddr::new(ip, port).to_string(),
        _ => text.clone(),
    };
    texts.iter().map(complete).collect()
}

fn health(texts: &[String]) -> Vec<String> {
    with_port(texts, crate::leftovers::kube_proxy::HEALTH_PORT)
}

fn metrics(texts: &[String]) -> Vec<String> {
    with_port(texts, crate::leftovers::kube_proxy::METRICS_PORT)
}

fn verbosity(texts: &[String]) -> Vec<String> {
    let level = |text: &String| match text.parse::<u32>() {
        Ok(0..=3) => "info",
        Ok(4..=5) => "debug",
        _ => "trace",
    };
    texts.iter().map(|text| level(text).to_owned()).collect()
}

const AT_ONCE: Becomes =
    Nothing("changes are applied as they come, one by one, and the maps are compared every five minutes");
const NO_MARK: Becomes =
    Nothing("no rule of netfilter is made that would need a mark; the programs' own is --packet-mark");
const KEEPS_CLIENTS: Becomes = Changes(
    "what asks a Service from within the cluster keeps its address; from outside, if the endpoint is on the node that was asked",
    "see that the way back from endpoints to clients leads through their node: routers between pods and clients must not drop what \
     they see in one direction alone",
);
const CLIENT: Becomes =
    Nothing("the agent's connection to the API server has settings of its own (apiServer, or kubeconfig)");
const LIFETIMES: &str = "time limits are fixed: TCP 24 h established, 1 h half-closed, UDP 120 s";
const FIXED: Becomes = Changes(LIFETIMES, "see that applications send keep-alives in that time");
const NO_IPVS: Becomes =
    Nothing("there is no IPVS: no address is bound to a device, and nobody's virtual servers are touched");
const NO_LOCAL: Becomes = Nothing("what a pod of this node sends is known by its own interface");
const WINDOWS: Becomes = Nothing("it is for Windows alone, where rustnet does not run");
const LOGGING: Becomes = Nothing("logs go to standard error at once (--log-level, --log-format)");
const CONNTRACK_SIZE: Becomes = Nothing(
    "the tables of the programs have sizes of their own (--ct-tcp-entries, --ct-any-entries); the node's own connections stay in \
     netfilter's, whose size nobody sets any more: write net.netfilter.nf_conntrack_max to /etc/sysctl.d",
);

/// All of them.
pub const FIELDS: &[Field] = &[
    field("featureGates", Any, &["{}"], Nothing("they are kube-proxy's own; rustnet has none")),
    field("clientConnection.kubeconfig", Text, &[], CLIENT),
    field("clientConnection.acceptContentTypes", Text, &[], CLIENT),
    field("clientConnection.contentType", Text, &["application/vnd.kubernetes.protobuf"], CLIENT),
    field("clientConnection.qps", Number, &["0", "0.0", "5", "5.0"], CLIENT),
    field("clientConnection.burst", Integer, &["0", "10"], CLIENT),
    field("logging.format", Text, &["text"], Flag("log-format", same)),
    field("logging.flushFrequency", Any, &["0", "5s", "5000000000"], LOGGING),
    field("logging.verbosity", Integer, &["0"], Flag("log-level", verbosity)),
    field("logging.vmodule", Any, &["[]"], LOGGING),
    field("logging.options", Any, &["{}"], LOGGING),
    field("hostnameOverride", Text, &[], Flag("node-name", same)),
    field(
        "bindAddress",
        Text,
        &["0.0.0.0"],
        Nothing("the agent's addresses are set one by one (--healthz-bind-address, --metrics-addr)"),
    ),
    field(
        "healthzBindAddress",
        Text,
        &["0.0.0.0:10256", "0.0.0.0", "[::]:10256", "::"],
        Flag("healthz-bind-address", health),
    ),
    field(
        "metricsBindAddress",
        Text,
        &["127.0.0.1:10249", "127.0.0.1", "[::1]:10249", "::1"],
        Flag("metrics-addr", metrics),
    ),
    field(
        "bindAddressHardFail",
        Bool,
        &["false"],
        Nothing("an address that somebody else has is a problem of the node, and is tried again"),
    ),
    field("enableProfiling", Bool, &["false"], Nothing("there is no profile of a Go program to serve")),
    field("showHiddenMetricsForVersion", Text, &[], Nothing("no metric is hidden")),
    field(
        "mode",
        Text,
        &["iptables"],
        Nothing("there is one mode; `rustnetctl cleanup --kube-proxy` removes what this one leaves"),
    ),
    field("iptables.masqueradeBit", Integer, &["14"], NO_MARK),
    field("iptables.masqueradeAll", Bool, &["false"], KEEPS_CLIENTS),
    field(
        "iptables.localhostNodePorts",
        Bool,
        &["true"],
        Nothing("node ports at localhost are not served either, and route_localnet is not set"),
    ),
    field("iptables.syncPeriod", Duration, &["0s", "30s"], AT_ONCE),
    field("iptables.minSyncPeriod", Duration, &["0s", "1s"], AT_ONCE),
    field("ipvs.syncPeriod", Duration, &["0s", "30s"], AT_ONCE),
    field("ipvs.minSyncPeriod", Duration, &["0s"], AT_ONCE),
    field(
        "ipvs.scheduler",
        Text,
        &["rr"],
        Changes(
            "backends are chosen at random, by the hash of the flow, with equal shares",
            "use sessionAffinity: ClientIP where a client has to stay with its backend",
        ),
    ),
    field("ipvs.excludeCIDRs", Texts, &[], NO_IPVS),
    field("ipvs.strictARP", Bool, &["false"], NO_IPVS),
    field("ipvs.tcpTimeout", Duration, &["0s"], FIXED),
    field("ipvs.tcpFinTimeout", Duration, &["0s"], FIXED),
    field("ipvs.udpTimeout", Duration, &["0s"], FIXED),
    field("nftables.masqueradeBit", Integer, &["14"], NO_MARK),
    field("nftables.masqueradeAll", Bool, &["false"], KEEPS_CLIENTS),
    field("nftables.syncPeriod", Duration, &["0s", "30s"], AT_ONCE),
    field("nftables.minSyncPeriod", Duration, &["0s", "1s"], AT_ONCE),
    field("winkernel.networkName", Text, &[], WINDOWS),
    field("winkernel.sourceVip", Text, &[], WINDOWS),
    field("winkernel.enableDSR", Bool, &["false"], WINDOWS),
    field("winkernel.rootHnsEndpointName", Text, &[], WINDOWS),
    field("winkernel.forwardHealthCheckVip", Bool, &["false"], WINDOWS),
    field("windowsRunAsService", Bool, &["false"], WINDOWS),
    field("detectLocalMode", Text, &["ClusterCIDR"], NO_LOCAL),
    field("detectLocal.bridgeInterface", Text, &[], NO_LOCAL),
    field("detectLocal.interfaceNamePrefix", Text, &[], NO_LOCAL),
    field("clusterCIDR", Text, &[], Flag("cluster-pod-cidrs", comma_separated)),
    field("nodePortAddresses", Texts, &[], Flag("node-port-addresses", same)),
    field("oomScoreAdj", Integer, &["-999"], Nothing("the priority class of the DaemonSet's pods sets it")),
    field("conntrack.maxPerCore", Integer, &["32768"], CONNTRACK_SIZE),
    field("conntrack.min", Integer, &["131072"], CONNTRACK_SIZE),
    field("conntrack.tcpEstablishedTimeout", Duration, &["24h"], FIXED),
    field("conntrack.tcpCloseWaitTimeout", Duration, &["1h"], FIXED),
    field(
        "conntrack.tcpBeLiberal",
        Bool,
        &["false"],
        Nothing("no segment is dropped for its sequence number: its receiver judges it"),
    ),
    field("conntrack.udpTimeout", Duration, &["0s"], FIXED),
    field("conntrack.udpStreamTimeout", Duration, &["0s"], FIXED),
    field("configSyncPeriod", Duration, &["0s", "15m"], AT_ONCE),
    field("portRange", Text, &[], Nothing("kube-proxy has not used it since its userspace mode went")),
];
