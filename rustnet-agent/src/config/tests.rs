//! Tables of good and bad settings, from all three layers.

use super::*;
use std::collections::HashMap;
use std::io::Write as _;

const GOOD: [&str; 3] = ["rustnet-agent", "--node-name=n1", "--manifests=/m"];

fn load(args: &[&str], env: &[(&str, &str)], file: Option<&str>) -> anyhow::Result<Config> {
    let mut args: Vec<String> = GOOD.iter().chain(args).map(ToString::to_string).collect();
    let env: HashMap<String, OsString> = env.iter().map(|(k, v)| ((*k).to_owned(), OsString::from(v))).collect();
    let mut written = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    if let Some(text) = file {
        written.write_all(text.as_bytes())?;
        args.push(format!("--config={}", written.path().display()));
    }
    Config::load(args, &|name: &str| env.get(name).cloned())
}

fn refusal(args: &[&str], env: &[(&str, &str)], file: Option<&str>) -> String {
    match load(args, env, file) {
        Ok(config) => panic!("accepted {args:?} {env:?} {file:?}: {config:?}"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = load(&[], &[], None).expect("good");
    assert_eq!(config.node_name, "n1");
    assert_eq!(config.source, Source::Manifests("/m".into()));
    assert_eq!(config.bpffs, PathBuf::from(rustnet_common::names::DEFAULT_BPFFS));
    assert_eq!(config.run_dir, PathBuf::from(rustnet_common::names::DEFAULT_RUN_DIR));
    assert_eq!((config.routing, config.overlay_port, config.vni), (Routing::Vxlan, 8472, 1));
    assert_eq!((config.mtu, config.snat_ports, config.masquerade), (None, None, true));
    assert_eq!(config.packet_mark, PacketMark::default());
    assert_eq!(config.maps, MapSizes::default());
    assert_eq!(config.health_addr, "127.0.0.1:9879".parse().ok());
    assert_eq!(config.healthz_bind_address, "[::]:10256".parse().ok(), "0.0.0.0 is both families");
    assert_eq!(config.metrics_addr, "[::]:9962".parse().ok());
    assert_eq!((config.cni_bin_dir, config.cni_conf_dir), (None, None));
    assert!(config.uplinks.is_empty());
}

#[test]
fn a_mark_is_hexadecimal_or_decimal() {
    for text in ["0x52000000/0xff000000", "1375731712/0xff000000"] {
        let config = load(&[&format!("--packet-mark={text}")], &[], None).expect("good");
        assert_eq!(config.packet_mark, PacketMark { value: 0x5200_0000, mask: 0xff00_0000 });
        assert_eq!(config.packet_mark.to_string(), "0x52000000/0xff000000");
    }
}

#[test]
fn flags_win_over_environment_over_file() {
    let file = "vni: 3\nmtu: 1300\nrouting: native\noverlayPort: 5000\n";
    let env = [("RUSTNET_VNI", "2"), ("RUSTNET_MTU", "1400")];
    let config = load(&["--vni=9"], &env, Some(file)).expect("good");
    assert_eq!((config.vni, config.mtu, config.routing, config.overlay_port), (9, Some(1400), Routing::Native, 5000));
}

#[test]
fn the_file_may_be_named_by_the_environment_and_be_json() {
    let mut file = tempfile::NamedTempFile::new().expect("file");
    file.write_all(br#"{"vni": 7, "uplink": ["eth0", "eth1"], "masquerade": false}"#).expect("write");
    let path = file.path().as_os_str().to_owned();
    let config = Config::load(GOOD, &|name| (name == "RUSTNET_CONFIG").then(|| path.clone())).expect("good");
    assert_eq!((config.vni, config.masquerade), (7, false));
    assert_eq!(config.uplinks, ["eth0", "eth1"]);
}

#[test]
fn lists_come_repeated_separated_or_as_sequences() {
    let want = ["10.1.0.0/16".parse().expect("net"), "fd00:1::/64".parse().expect("net")];
    for config in [
        load(&["--service-cidrs=10.1.0.0/16", "--service-cidrs", "fd00:1::/64"], &[], None),
        load(&["--service-cidrs=10.1.0.0/16, fd00:1::/64"], &[], None),
        load(&[], &[("RUSTNET_SERVICE_CIDRS", "10.1.0.0/16,fd00:1::/64")], None),
        load(&[], &[], Some("serviceCIDRs: [10.1.0.0/16, 'fd00:1::/64']")),
        load(&[], &[], Some("serviceCIDRs: 10.1.0.0/16,fd00:1::/64")),
    ] {
        assert_eq!(config.expect("good").service_cidrs, want);
    }
    let cleared = load(&["--uplink="], &[], Some("uplink: eth0")).expect("good");
    assert!(cleared.uplinks.is_empty(), "an empty flag wins over the file");
}

#[test]
fn a_switch_needs_no_value() {
    for (args, want) in
        [(&["--flow-events"][..], true), (&["--flow-events=false"][..], false), (&["--flow-events", "true"][..], true)]
    {
        assert_eq!(load(args, &[], None).expect("good").flow_events, want, "{args:?}");
    }
}

#[test]
fn the_packet_log_is_off_on_or_for_some_addresses() {
    let log = |text: &str| load(&[&format!("--bpf-log={text}")], &[], None).expect("good").bpf_log;
    assert_eq!(load(&[], &[], None).expect("good").bpf_log, PacketLog::Off);
    assert_eq!(log("off"), PacketLog::Off);
    assert_eq!(log("on"), PacketLog::All);
    for (text, want) in
        [("off", PacketLog::Off), ("false", PacketLog::Off), ("on", PacketLog::All), ("true", PacketLog::All)]
    {
        assert_eq!(load(&[], &[], Some(&format!("bpfLog: {text}"))).expect("good").bpf_log, want, "{text}");
    }
    let having = PacketLog::Having(vec!["10.0.0.1".parse().expect("ip"), "fd00::1".parse().expect("ip")]);
    assert_eq!(log("10.0.0.1,fd00::1"), having);
    assert_eq!(load(&[], &[], Some("bpfLog: [10.0.0.1, 'fd00::1']")).expect("good").bpf_log, having);
    for (bad, problem) in [
        ("on,10.0.0.1", "\"on\" is no address"),
        ("10.0.0.0/8", "is no address"),
        ("0.0.0.0", "is no address"),
        ("::", "is no address"),
        ("10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4,10.0.0.5", "5 addresses are too many"),
    ] {
        let message = refusal(&[&format!("--bpf-log={bad}")], &[], None);
        assert!(message.contains("--bpf-log") && message.contains(problem), "{message}");
        assert!(message.contains("give off, on, or up to 4 addresses"), "{message}");
    }
}

#[test]
fn empty_variables_and_files_are_as_absent() {
    let config = load(&[], &[("RUSTNET_VNI", "")], Some("")).expect("good");
    assert_eq!(config.vni, 1);
    let config = load(&[], &[], Some("# nothing\nvni:\n")).expect("good");
    assert_eq!(config.vni, 1);
}

#[test]
fn policies_are_enforced_unless_switched_off() {
    assert!(load(&[], &[], None).expect("good").network_policy);
    for (text, want) in [("on", true), ("true", true), ("off", false), ("false", false)] {
        assert_eq!(
            load(&[], &[], Some(&format!("networkPolicy: {text}"))).expect("good").network_policy,
            want,
            "{text}"
        );
    }
    let maps = load(&["--policy-pod-entries=17", "--policy-cidr-entries=18"], &[], Some("policyRuleEntries: 19"));
    let maps = maps.expect("good").maps;
    assert_eq!((maps.policy_pods, maps.policy_cidrs, maps.policy_rules), (17, 18, 19));
}

#[test]
fn what_policies_deny_is_answered_only_if_asked_for() {
    let response = |args: &[&str], env: &[(&str, &str)], file: Option<&str>| {
        load(args, env, file).expect("good").policy_deny_response
    };
    assert_eq!(response(&[], &[], None), DenyResponse::None);
    assert_eq!(response(&["--policy-deny-response=icmp"], &[], None), DenyResponse::Icmp);
    assert_eq!(response(&[], &[("RUSTNET_POLICY_DENY_RESPONSE", "icmp")], None), DenyResponse::Icmp);
    assert_eq!(response(&[], &[], Some("policyDenyResponse: icmp")), DenyResponse::Icmp);
    assert_eq!(response(&["--policy-deny-response=none"], &[], Some("policyDenyResponse: icmp")), DenyResponse::None);
}

#[test]
fn bad_values_are_refused_with_origin_and_remedy() {
    for (flag, key, bad, remedy) in [
        ("lb-algorithm", "lbAlgorithm", "ring", "give random or maglev"),
        ("forwarding-mode", "forwardingMode", "hybrid", "give snat or dsr"),
        ("xdp", "xdp", "generic", "give off, native or native-veth"),
        ("maglev-table-size", "maglevTableSize", "16384", "251, 4093, 16381, 65521 or 131071"),
        ("maglev-table-size", "maglevTableSize", "241", "give a number from 251 to 131071"),
        ("maglev-entries", "maglevEntries", "16777217", "give a number from 16 to 16777216"),
        ("node-name", "nodeName", "N_1", "kubectl get nodes"),
        ("node-name", "nodeName", "-n", "kubectl get nodes"),
        ("node-name", "nodeName", "a..b", "kubectl get nodes"),
        ("manifests", "manifests", "relative", "begin it with /"),
        ("bpffs", "bpffs", "relative", "begin it with /"),
        ("run-dir", "runDir", "x", "begin it with /"),
        ("uplink", "uplink", "a/b", "ip link"),
        ("uplink", "uplink", "abcdefghijklmnop", "ip link"),
        ("routing", "routing", "geneve", "vxlan, native, direct-and-vxlan"),
        ("overlay-family", "overlayFamily", "4", "auto, ipv4, ipv6"),
        ("overlay-port", "overlayPort", "0", "1 to 65535"),
        ("overlay-port", "overlayPort", "65536", "1 to 65535"),
        ("overlay-port", "overlayPort", "-1", "1 to 65535"),
        ("vni", "vni", "16777216", "1 to 16777215"),
        ("mtu", "mtu", "1279", "1280 to 65535, or auto"),
        ("pod-cidrs", "podCIDRs", "10.0.0.0", "10.0.0.0/32"),
        ("pod-cidrs", "podCIDRs", "10.0.0.1/24", "give 10.0.0.0/24"),
        ("service-cidrs", "serviceCIDRs", "10.0.0.0/33", "prefix length"),
        ("masquerade", "masquerade", "yes", "true or false"),
        ("network-policy", "networkPolicy", "yes", "on or off"),
        ("policy-rule-entries", "policyRuleEntries", "0", "16 to"),
        ("policy-deny-response", "policyDenyResponse", "reset", "none or icmp"),
        ("snat-ports", "snatPorts", "65535-1024", "61000-65535"),
        ("snat-ports", "snatPorts", "80-2000", "61000-65535"),
        ("snat-ports", "snatPorts", "5000-5010", "61000-65535"),
        ("snat-ports", "snatPorts", "20000-40000", "node ports (30000-32767)"),
        ("packet-mark", "packetMark", "0x10", "0x1052/0x107f"),
        ("packet-mark", "packetMark", "x/0xff", "0x1052/0x107f"),
        ("packet-mark", "packetMark", "0x1/0x1ffffffff", "0x1052/0x107f"),
        ("packet-mark", "packetMark", "0/0xff", "other than 0"),
        ("packet-mark", "packetMark", "0x101/0xff", "0x101/0x1ff"),
        ("ct-tcp-entries", "ctTcpEntries", "0", "16 to"),
        ("backend-entries", "backendEntries", "1048577", "16 to 1048576"),
        ("cni-bin-dir", "cniBinDir", "bin", "begin it with /"),
        ("health-addr", "healthAddr", "localhost", "127.0.0.1:9879"),
        ("healthz-bind-address", "healthzBindAddress", "0.0.0.0", "or off"),
        ("metrics-addr", "metricsAddr", "9962", "or off"),
        ("log-level", "logLevel", "a=b=c", "error, warn, info"),
        ("log-format", "logFormat", "xml", "text or json"),
        ("overlay-path", "overlayPath", "kernel", "programs or device"),
    ] {
        let variable = format!("RUSTNET_{}", flag.replace('-', "_").to_uppercase());
        // node-name and manifests are on the good command line already: only the flag of a bare one can show them bad.
        if !["node-name", "manifests"].contains(&flag) {
            let message = refusal(&[&format!("--{flag}={bad}")], &[], None);
            assert!(message.contains(&format!("flag --{flag} (variable {variable}, file key {key})")), "{message}");
            assert!(message.contains(remedy) && message.contains(bad), "{message}");
        }
        let bare = |env: &dyn Fn(&str) -> Option<OsString>| {
            let base = |name: &str| match name {
                "RUSTNET_NODE_NAME" => Some("n1".into()),
                "RUSTNET_MANIFESTS" => Some("/m".into()),
                _ => None,
            };
            let error = Config::load(["rustnet-agent"], &|name| env(name).or_else(|| base(name))).expect_err(bad);
            format!("{error:#}")
        };
        let message = bare(&|name| (name == variable).then(|| bad.into()));
        assert!(message.contains(&format!("variable {variable} (flag --{flag}, file key {key})")), "{message}");
        assert!(message.contains(remedy), "{message}");
    }
    let message = refusal(&[], &[], Some("vni: 0"));
    assert!(
        message.contains("key vni in /") && message.contains(".yaml (flag --vni, variable RUSTNET_VNI)"),
        "{message}"
    );
}

#[test]
fn all_problems_are_reported_at_once() {
    let message = refusal(&["--vni=0", "--mtu=1"], &[("RUSTNET_ROUTING", "x")], Some("logFormat: y"));
    for part in ["--vni", "--mtu", "RUSTNET_ROUTING", "logFormat"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn overlapping_ranges_are_refused_and_both_named() {
    for (args, first, second) in [
        (
            ["--cluster-pod-cidrs=10.0.0.0/8", "--service-cidrs=10.96.0.0/16"],
            "pod range 10.0.0.0/8",
            "service range 10.96.0.0/16",
        ),
        (
            ["--pod-cidrs=10.96.1.0/24", "--service-cidrs=10.96.0.0/16"],
            "pod range 10.96.1.0/24",
            "service range 10.96.0.0/16",
        ),
        (
            ["--node-cidrs=172.18.0.0/24", "--service-cidrs=172.18.0.0/16"],
            "node range 172.18.0.0/24",
            "service range 172.18.0.0/16",
        ),
        (
            ["--node-cidrs=fd00::/16", "--cluster-pod-cidrs=fd00:244::/56"],
            "node range fd00::/16",
            "pod range fd00:244::/56",
        ),
    ] {
        let message = refusal(&args, &[], None);
        for part in [
            first,
            second,
            "ranges apart",
            args[0].split('=').next().unwrap_or(""),
            args[1].split('=').next().unwrap_or(""),
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    let apart = [
        "--cluster-pod-cidrs=10.244.0.0/16,fd00:244::/56",
        "--pod-cidrs=10.244.1.0/24,fd00:244:0:1::/64",
        "--service-cidrs=10.96.0.0/16,fd00:96::/112",
        "--node-cidrs=172.18.0.0/24",
        "--non-masquerade-cidrs=10.0.0.0/8",
    ];
    load(&apart, &[], None).expect("apart");
}

#[test]
fn ranges_that_cannot_work_are_refused() {
    for (arg, part) in [
        ("--service-cidrs=127.1.0.0/16", "loopback"),
        ("--cluster-pod-cidrs=169.254.0.0/16", "link-local"),
        ("--pod-cidrs=fe80::/64", "link-local"),
        ("--service-cidrs=224.0.0.0/8", "multicast"),
        ("--pod-cidrs=10.1.0.0/24,10.2.0.0/24", "one family"),
    ] {
        let message = refusal(&[arg], &[], None);
        assert!(message.contains(part), "{part}: {message}");
    }
    let message = refusal(&["--pod-cidrs=10.1.0.0/24", "--cluster-pod-cidrs=10.2.0.0/16"], &[], None);
    assert!(message.contains("lies outside"), "{message}");
}

#[test]
fn ranges_learnt_later_are_compared_too() {
    let config = load(&["--service-cidrs=10.96.0.0/16", "--cluster-pod-cidrs=10.244.0.0/16"], &[], None).expect("good");
    let net = |text: &str| text.parse::<IpNet>().expect("net");
    let message = config.conflict(Role::Pods, "pod range of node n2", net("10.96.4.0/24")).expect("conflict");
    assert_eq!(
        message,
        "pod range of node n2 10.96.4.0/24 overlaps service range 10.96.0.0/16; give them ranges apart"
    );
    assert_eq!(config.conflict(Role::Pods, "pod range of node n2", net("10.244.4.0/24")), None);
    assert!(config.conflict(Role::Nodes, "address of node n2", net("10.244.0.7/32")).is_some());
}

#[test]
fn the_file_is_strict() {
    for (text, part) in [
        ("podCidrs: [10.0.0.0/24]", "did you mean podCIDRs?"),
        ("wibble: 1", "--help"),
        ("vni: {a: 1}", "neither a value nor"),
        ("vni: [1, 2]", "takes one value"),
        ("- a\n- b", "top level must be a mapping"),
        ("vni: 1\nvni: 2", "not valid YAML"),
        ("vni: [", "not valid YAML"),
        ("uplink: [[eth0]]", "neither a value nor"),
    ] {
        let message = refusal(&[], &[], Some(text));
        assert!(message.contains(part) && message.contains(".yaml"), "{text}: {message}");
    }
    let message = refusal(&["--config=/nonexistent/x.yaml"], &[], None);
    assert!(message.contains("/nonexistent/x.yaml") && message.contains("--config"), "{message}");
}

#[test]
fn one_source_and_the_winning_layer_chooses_it() {
    let message = refusal(&["--kubeconfig=/k"], &[], None);
    assert!(message.contains("exclude each other"), "{message}");

    let config = load(&[], &[("RUSTNET_KUBECONFIG", "/k")], None).expect("the flag --manifests wins");
    assert_eq!(config.source, Source::Manifests("/m".into()));

    let none = |_: &str| None;
    let args = |extra: &[&str]| -> Vec<String> {
        ["rustnet-agent", "--node-name=n1"].iter().chain(extra).map(ToString::to_string).collect()
    };
    let error = Config::load(args(&[]), &none).expect_err("nothing to watch").to_string();
    assert!(error.contains("no source") && error.contains("RUSTNET_KUBECONFIG"), "{error}");

    let in_pod = |name: &str| (name == "KUBERNETES_SERVICE_HOST").then(|| "10.96.0.1".into());
    let config = Config::load(args(&[]), &in_pod).expect("in a pod");
    assert_eq!(config.source, Source::Kube(KubeSource::default()));

    let config =
        Config::load(args(&["--api-server=https://192.0.2.1:6443/"]), &none).expect("a pod without the variable");
    let api_server = Some("https://192.0.2.1:6443".to_owned());
    assert_eq!(config.source, Source::Kube(KubeSource { kubeconfig: None, api_server }));

    for bad in ["192.0.2.1:6443", "ftp://x", "https://", "https://u:p@h", "https://h/path", "https://h?x=1"] {
        let error = Config::load(args(&[&format!("--api-server={bad}")]), &none).expect_err(bad).to_string();
        assert!(error.contains("https://192.0.2.1:6443"), "{error}");
    }
}

#[test]
fn both_listeners_on_one_port_are_refused() {
    let message = refusal(&["--metrics-addr=0.0.0.0:9879"], &[], None);
    assert!(message.contains("--metrics-addr") && message.contains("--health-addr"), "{message}");
    let message = refusal(&["--healthz-bind-address=127.0.0.1:9879"], &[], None);
    assert!(message.contains("--healthz-bind-address") && message.contains("--health-addr"), "{message}");
    for (args, file) in [(&["--healthz-bind-address="][..], None), (&[], Some("healthzBindAddress: \"\""))] {
        assert_eq!(load(args, &[], file).expect("good").healthz_bind_address, None);
    }
    let config = load(&["--healthz-bind-address=192.0.2.1:10256"], &[], None).expect("good");
    assert_eq!(config.healthz_bind_address, "192.0.2.1:10256".parse().ok());
    let config = load(&["--metrics-addr=off", "--health-addr=off"], &[], None).expect("good");
    assert_eq!((config.health_addr, config.metrics_addr), (None, None));
}
