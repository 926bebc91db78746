use super::fields::{FIELDS, Type};
use super::{Facts, Found, check};
use crate::doctor::finding::{Finding, Level};
use std::collections::BTreeMap;

const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

fn facts(body: &str) -> Facts {
    Facts { found: Found::File(format!("{HEAD}{body}")), agent: BTreeMap::new() }
}

fn one(facts: &Facts) -> Finding {
    let mut found = check(facts);
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

#[test]
fn each_setting_says_what_becomes_of_it() {
    for (body, what, level, detail) in [
        (
            "clusterCIDR: 10.244.0.0/16,fd00:244::/56",
            "clusterCIDR",
            Level::Warning,
            "--cluster-pod-cidrs=10.244.0.0/16,fd00:244::/56",
        ),
        (
            "nodePortAddresses: [primary, 192.0.2.0/24]",
            "nodePortAddresses",
            Level::Warning,
            "--node-port-addresses=primary,192.0.2.0/24",
        ),
        (
            "healthzBindAddress: 127.0.0.1",
            "healthzBindAddress",
            Level::Warning,
            "--healthz-bind-address=127.0.0.1:10256",
        ),
        ("healthzBindAddress: 127.0.0.1:7", "healthzBindAddress", Level::Warning, "--healthz-bind-address=127.0.0.1:7"),
        ("metricsBindAddress: '[::]'", "metricsBindAddress", Level::Warning, "--metrics-addr=[::]:10249"),
        ("hostnameOverride: n1", "hostnameOverride", Level::Warning, "--node-name=n1"),
        ("logging: {format: json}", "logging.format", Level::Warning, "--log-format=json"),
        ("logging: {verbosity: 4}", "logging.verbosity", Level::Warning, "--log-level=debug"),
        ("conntrack: {maxPerCore: 0}", "conntrack.maxPerCore", Level::Ok, "--ct-tcp-entries"),
        (
            "conntrack: {tcpEstablishedTimeout: 2h}",
            "conntrack.tcpEstablishedTimeout",
            Level::Warning,
            "24 h established",
        ),
        (
            "conntrack: {tcpEstablishedTimeout: 0s}",
            "conntrack.tcpEstablishedTimeout",
            Level::Warning,
            "24 h established",
        ),
        ("conntrack: {udpTimeout: 10s}", "conntrack.udpTimeout", Level::Warning, "UDP 120 s"),
        ("conntrack: {tcpBeLiberal: true}", "conntrack.tcpBeLiberal", Level::Ok, "its receiver judges it"),
        ("iptables: {masqueradeAll: true}", "iptables.masqueradeAll", Level::Warning, "keeps its address"),
        ("nftables: {masqueradeAll: true}", "nftables.masqueradeAll", Level::Warning, "keeps its address"),
        ("iptables: {localhostNodePorts: false}", "iptables.localhostNodePorts", Level::Ok, "not served either"),
        ("ipvs: {scheduler: lc}", "ipvs.scheduler", Level::Warning, "by the hash of the flow"),
        ("ipvs: {strictARP: true}", "ipvs.strictARP", Level::Ok, "no address is bound"),
        ("mode: ipvs", "mode", Level::Ok, "cleanup --kube-proxy"),
        ("detectLocalMode: NodeCIDR", "detectLocalMode", Level::Ok, "its own interface"),
        ("detectLocal: {bridgeInterface: cni0}", "detectLocal.bridgeInterface", Level::Ok, "its own interface"),
        ("winkernel: {enableDSR: true}", "winkernel.enableDSR", Level::Ok, "Windows alone"),
        ("featureGates: {Something: true}", "featureGates", Level::Ok, "kube-proxy's own"),
        ("clientConnection: {qps: 50}", "clientConnection.qps", Level::Ok, "settings of its own"),
        ("configSyncPeriod: 1m", "configSyncPeriod", Level::Ok, "as they come"),
    ] {
        let found = one(&facts(body));
        assert!(found.what.starts_with(what), "{body}: {found:?}");
        assert_eq!(found.level, level, "{body}: {found:?}");
        assert!(found.detail.contains(detail), "{body}: {found:?}");
        assert_eq!(found.hint.is_empty(), level == Level::Ok, "{body}: {found:?}");
    }
}

#[test]
fn what_the_agent_has_is_well() {
    let agent = |flag: &str, texts: &[&str]| {
        BTreeMap::from([(flag.to_owned(), texts.iter().map(|text| (*text).to_owned()).collect())])
    };
    let given = facts("nodePortAddresses: [primary]");
    let has = Facts { agent: agent("node-port-addresses", &["primary"]), ..given };
    assert_eq!(one(&has).level, Level::Ok);
    let other = Facts { agent: agent("node-port-addresses", &["10.0.0.0/8"]), ..has };
    assert_eq!(one(&other).level, Level::Warning);
}

#[test]
fn what_kubeadm_writes_is_at_the_defaults() {
    let kubeadm = "bindAddress: 0.0.0.0\nbindAddressHardFail: false\nclientConnection:\n  acceptContentTypes: \"\"\n  burst: 0\n  \
                   contentType: \"\"\n  qps: 0\nclusterCIDR: \"\"\nconfigSyncPeriod: 0s\nconntrack:\n  maxPerCore: null\n  min: null\n  \
                   tcpBeLiberal: false\n  tcpCloseWaitTimeout: null\n  tcpEstablishedTimeout: null\n  udpStreamTimeout: 0s\n  udpTimeout: 0s\n\
                   detectLocal:\n  bridgeInterface: \"\"\n  interfaceNamePrefix: \"\"\ndetectLocalMode: \"\"\nenableProfiling: false\n\
                   healthzBindAddress: \"\"\nhostnameOverride: \"\"\niptables:\n  localhostNodePorts: null\n  masqueradeAll: false\n  \
                   masqueradeBit: null\n  minSyncPeriod: 0s\n  syncPeriod: 0s\nipvs:\n  excludeCIDRs: null\n  minSyncPeriod: 0s\n  \
                   scheduler: \"\"\n  strictARP: false\n  syncPeriod: 0s\n  tcpFinTimeout: 0s\n  tcpTimeout: 0s\n  udpTimeout: 0s\nlogging:\n  \
                   flushFrequency: 0\n  options:\n    json:\n      infoBufferSize: \"0\"\n    text:\n      infoBufferSize: \"0\"\n  verbosity: 0\n\
                   metricsBindAddress: \"\"\nmode: \"\"\nnftables:\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 0s\n  \
                   syncPeriod: 0s\nnodePortAddresses: null\noomScoreAdj: null\nportRange: \"\"\nshowHiddenMetricsForVersion: \"\"\nwinkernel:\n  \
                   enableDSR: false\n  forwardHealthCheckVip: false\n  networkName: \"\"\n  rootHnsEndpointName: \"\"\n  sourceVip: \"\"\n";
    let found = check(&facts(kubeadm));
    let options = |it: &&Finding| it.what.starts_with("logging.options");
    assert!(found.iter().all(|it| it.level == Level::Ok), "{found:#?}");
    assert!(found.iter().filter(|it| !options(it)).all(|it| it.check == "settings"), "{found:#?}");
    assert_eq!(
        one(&facts("conntrack: {tcpCloseWaitTimeout: 1h0m0s, tcpEstablishedTimeout: 24h0m0s}")).check,
        "settings"
    );
    // The whole ConfigMap, as kubectl prints it.
    let body = format!("{HEAD}mode: nftables\n").replace('\n', "\n    ");
    let map = format!("kind: ConfigMap\napiVersion: v1\ndata:\n  kubeconfig.conf: x\n  config.conf: |\n    {body}\n");
    assert!(one(&Facts { found: Found::File(map), ..facts("") }).what.starts_with("mode nftables"));
}

#[test]
fn what_kube_proxy_would_refuse_is_named() {
    for (body, want) in [
        ("clusterCidr: x", "clusterCidr: kube-proxy has no such field"),
        ("iptables: {masqueradAll: true}", "iptables.masqueradAll: kube-proxy has no such field"),
        ("iptables: true", "iptables: is true, should be an object"),
        ("conntrack: {min: many}", "conntrack.min: is \"many\", should be a whole number"),
        ("conntrack: {min: 1.5}", "conntrack.min: is 1.5, should be a whole number"),
        ("mode: {a: b}", "mode: is an object, should be text"),
        ("nodePortAddresses: primary", "nodePortAddresses: is \"primary\", should be a list of texts"),
        ("nodePortAddresses: [1]", "nodePortAddresses: is a list, should be a list of texts"),
        ("enableProfiling: 'no'", "enableProfiling: is \"no\", should be true or false"),
        ("configSyncPeriod: 15", "configSyncPeriod: is 15, should be a duration"),
        ("configSyncPeriod: 15d", "configSyncPeriod: is \"15d\", should be a duration"),
    ] {
        let found = one(&facts(body));
        assert_eq!((found.level, found.check), (Level::Fault, "field"), "{body}");
        assert!(found.detail.starts_with(want), "{body}: {found:?}");
        let Found::File(text) = facts(body).found else { panic!("a file") };
        let of_cluster = Facts { found: Found::ConfigMap(text), ..facts("") };
        assert_eq!(one(&of_cluster).level, Level::Warning, "a newer kube-proxy's is no cross");
    }
    for (text, want) in [
        ("[", "no YAML or JSON"),
        ("kind: Pod\napiVersion: v1\n", "no KubeProxyConfiguration"),
        ("kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha2\n", "only v1alpha1 is known"),
        ("kind: ConfigMap\ndata: {a: b}\n", "has no KubeProxyConfiguration"),
    ] {
        let found = one(&Facts { found: Found::File(text.into()), ..facts("") });
        assert!(found.level == Level::Fault && found.detail.contains(want), "{text}: {found:?}");
    }
    let unreadable = Facts { found: Found::Unreadable("x: no such file".into()), ..facts("") };
    assert_eq!(one(&unreadable).level, Level::Warning);
    assert!(check(&Facts { found: Found::Nothing, ..facts("") }).is_empty());
    assert_eq!(one(&Facts { found: Found::Forbidden("no".into()), ..facts("") }).level, Level::Ok);
}

#[test]
fn fields_are_there_once_and_lead_to_settings_that_there_are() {
    let mut paths: Vec<_> = FIELDS.iter().map(|field| field.path).collect();
    paths.sort_unstable();
    paths.windows(2).for_each(|two| {
        assert_ne!(two[0], two[1]);
        assert!(!two[1].starts_with(&format!("{}.", two[0])), "{two:?}");
    });
    for field in FIELDS {
        if let super::Becomes::Flag(flag, _) = field.becomes {
            assert!(crate::args::settings::all().any(|setting| setting.flag == flag), "{flag}");
        }
        assert!(field.kind != Type::Bool || field.defaults.len() == 1, "{}", field.path);
    }
}
