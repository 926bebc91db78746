//! The network configuration as it comes on standard input: validated once, unknown members ignored.

use super::error::{Error, code};
use super::result::Dns;
use super::version::Version;
use ipnet::IpNet;
use rustnet_common::names;
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A validated configuration.
#[derive(Clone, Debug)]
pub struct NetConf {
    /// The version asked for.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// True if the runtime calls us as the `loopback` plugin.
    pub loopback: bool,
    /// Where the agent has pinned its programs and maps.
    pub bpffs: PathBuf,
    /// The run directory shared with the agent.
    pub run_dir: PathBuf,
    /// The IPAM plugin to ask; `None` means our own. Not yet known to be the name of a binary.
    pub ipam: Option<String>,
    /// Overrides the node's MTU.
    pub mtu: Option<u32>,
    /// Name servers to return: the runtime's, else the configuration's. May be empty.
    pub dns: Dns,
    /// MAC address that the runtime wants for the pod.
    pub mac: Option<Mac>,
    /// Addresses that the runtime wants for the pod.
    pub ips: Vec<IpAddr>,
    /// How long an IPAM plugin may take.
    pub ipam_timeout: Duration,
    /// The bandwidth that the runtime wants for the pod, as it came: only ADD reads it, by [`super::bandwidth`].
    pub bandwidth: Option<Value>,
    /// The ports of the node that the runtime wants for the pod, as they came: only ADD reads them, by [`super::port_mappings`].
    pub port_mappings: Option<Value>,
    /// ADD's result as it came: only CHECK reads it, so that nothing in it can keep a pod from going.
    pub prev_result: Option<Value>,
    /// The attachments that GC is to keep; `None` when the runtime did not say.
    pub valid_attachments: Option<Vec<Attachment>>,
    /// Standard input as it came, for a delegated IPAM.
    pub stdin: Vec<u8>,
}

/// One interface of one container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
pub struct Attachment {
    /// The runtime's container id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The interface's name in the container.
    pub ifname: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct Raw {
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    bpffs: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    ipam: Value,
    #[serde(flatten)]
    pod: Pod,
    prev_result: Option<Value>,
}

/// What only matters to a pod that is being made: as it came, so that nothing in it can keep one from going.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Pod {
    mtu: Value,
    dns: Value,
    runtime_config: Value,
    args: Value,
    ipam_timeout_seconds: Value,
}

#[derive(Deserialize)]
struct Ipam {
    #[serde(default, rename = "type")]
    kind: Option<String>,
}

/// The version that `stdin` names, as far as it can be read: errors are reported in it.
pub fn version_of(stdin: &[u8]) -> Result<Version, Error> {
    let v = object(stdin)?;
    match v.get("cniVersion") {
        None | Some(Value::Null) => Version::parse(None),
        Some(Value::String(s)) => Version::parse(Some(s)),
        Some(other) => Err(Error::new(code::DECODE, format!("cniVersion must be a string, not {other}"))),
    }
}

impl NetConf {
    /// Reads and validates a configuration. With `removal`, for a verb that takes pods away, what describes a pod is ignored.
    pub fn parse(stdin: Vec<u8>, removal: bool) -> Result<Self, Error> {
        let version = version_of(&stdin)?;
        let object = object(&stdin)?;
        let valid_attachments = valid_attachments(&object)?;
        let raw: Raw = serde_json::from_value(object).map_err(unreadable)?;
        let name = raw.name.filter(|n| !n.is_empty()).ok_or_else(|| {
            Error::new(code::CONFIG, "the network configuration has no name").details("set \"name\" in it")
        })?;
        if name.len() > NAME_MAX {
            let text = format!("the network's name has {} characters", name.len());
            return Err(Error::new(code::CONFIG, text).details(format!("at most {NAME_MAX} are supported")));
        }
        if !is_identifier(&name) {
            return Err(Error::new(code::CONFIG, format!("network name {name:?} is invalid")).details(IDENTIFIER_RULE));
        }
        let ipam: Option<Ipam> = match serde_json::from_value(raw.ipam) {
            Ok(ipam) => ipam,
            // Whoever gave a pod its address is remembered.
            Err(_) if removal => None,
            Err(e) => return Err(unreadable(e)),
        };
        let ipam = ipam.and_then(|i| i.kind).filter(|k| !matches!(k.as_str(), "" | "rustnet" | "rustnet-cni"));
        let ipam_timeout = match ipam_timeout(&raw.pod.ipam_timeout_seconds) {
            Err(_) if removal => IPAM_TIMEOUT,
            read => read?,
        };
        let wishes = if removal { Wishes::default() } else { raw.pod.wishes()? };
        Ok(Self {
            version,
            name,
            loopback: raw.kind.as_deref() == Some(LOOPBACK),
            bpffs: absolute("bpffs", raw.bpffs, names::DEFAULT_BPFFS)?,
            run_dir: absolute("runDir", raw.run_dir, names::DEFAULT_RUN_DIR)?,
            ipam,
            mtu: wishes.mtu,
            dns: wishes.dns,
            mac: wishes.mac,
            ips: wishes.ips,
            ipam_timeout,
            bandwidth: wishes.bandwidth,
            port_mappings: wishes.port_mappings,
            prev_result: raw.prev_result,
            valid_attachments,
            stdin,
        })
    }
}

/// The attachments that GC is to keep: those of the key of the specification, and those of the key that an earlier text of it had.
/// libcni sends both. Its empty list is null, so that a key that is there says "none". Without either key, nobody said anything.
fn valid_attachments(conf: &Value) -> Result<Option<Vec<Attachment>>, Error> {
    let mut all = None;
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let Some(value) = conf.get(key) else { continue };
        let list: Option<Vec<Attachment>> = Deserialize::deserialize(value)
            .map_err(|e| Error::new(code::DECODE, format!("{key} cannot be read: {e}")))?;
        all.get_or_insert_with(Vec::new).extend(list.unwrap_or_default());
    }
    Ok(all)
}

/// The `type` of the plugin that sets a pod's `lo` up.
const LOOPBACK: &str = "loopback";

/// Longest network name that is surely a file name.
const NAME_MAX: usize = 200;

/// What a network name or a container id may be, for messages.
pub const IDENTIFIER_RULE: &str =
    "it must start with a letter or digit and hold only letters, digits, '_', '.' and '-'";

/// The specification's rule for network names and container ids.
pub fn is_identifier(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// A MAC address.
pub type Mac = [u8; 6];

/// How long an IPAM plugin may take by default: an ADD and the DEL after its failure fit into the two minutes of a kubelet.
const IPAM_TIMEOUT: Duration = Duration::from_secs(45);

/// An address, with or without the length of its prefix.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse::<IpNet>().ok().map(|net| net.addr()))
}

/// A MAC address that one interface can have.
pub fn parse_unicast_mac(text: &str) -> Option<Mac> {
    parse_mac(text).filter(|mac| mac[0] & 1 == 0 && *mac != [0; 6])
}

/// A MAC address in the usual notation.
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut mac {
        let digits = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// How a pod is to be.
#[derive(Default)]
struct Wishes {
    mtu: Option<u32>,
    dns: Dns,
    mac: Option<Mac>,
    ips: Vec<IpAddr>,
    bandwidth: Option<Value>,
    port_mappings: Option<Value>,
}

impl Pod {
    /// `runtimeConfig` as far as it concerns us. Its keys come in the specification's spelling and
    /// in Go's, so the look-up ignores case. Capabilities that are not ours are ignored.
    fn wishes(self) -> Result<Wishes, Error> {
        let mtu: Option<u32> = serde_json::from_value(self.mtu).map_err(unreadable)?;
        if let Some(mtu) = mtu.filter(|m| !(68..=65535).contains(m)) {
            return Err(Error::new(code::CONFIG, format!("mtu {mtu} is invalid")).details("allowed are 68 to 65535"));
        }
        let own: Option<Dns> = serde_json::from_value(self.dns).map_err(unreadable)?;
        let runtime: Option<serde_json::Map<String, Value>> =
            serde_json::from_value(self.runtime_config).map_err(unreadable)?;
        let map = runtime.unwrap_or_default();
        let wrong = |what: &str| Error::new(code::DECODE, format!("runtimeConfig.{what} has the wrong type"));
        let dns = match take(&map, "dns") {
            None => Dns::default(),
            Some(Value::Object(dns)) => {
                let list = |key: &str| -> Result<Vec<String>, Error> {
                    let value = take(dns, key).cloned().unwrap_or(Value::Array(Vec::new()));
                    serde_json::from_value(value).map_err(|_| wrong(&format!("dns.{key}")))
                };
                Dns {
                    nameservers: list("servers")?,
                    search: list("searches")?,
                    options: list("options")?,
                    domain: String::new(),
                }
            }
            Some(_) => return Err(wrong("dns")),
        };
        let args: Option<serde_json::Map<String, Value>> = serde_json::from_value(self.args).map_err(unreadable)?;
        let args = args.unwrap_or_default();
        let args = take(&args, "cni").and_then(Value::as_object);
        // As with the reference plugins: all addresses that anybody asks for, and the runtime's MAC address first.
        let places = [("runtimeConfig", Some(&map)), ("args.cni", args)];
        let places = places.into_iter().filter_map(|(at, map)| Some((at, map?)));
        let (mut mac, mut ips) = (None, Vec::new());
        for (at, map) in places {
            ips.extend(read_ips(at, map)?);
            mac = mac.or(read_mac(at, map)?);
        }
        let dns = if dns.is_empty() { own.unwrap_or_default() } else { dns };
        let as_it_came = |key: &str| take(&map, key).cloned();
        let (bandwidth, port_mappings) = (as_it_came("bandwidth"), as_it_came("portMappings"));
        Ok(Wishes { mtu, dns, mac, ips, bandwidth, port_mappings })
    }
}

fn ipam_timeout(value: &Value) -> Result<Duration, Error> {
    if value.is_null() {
        return Ok(IPAM_TIMEOUT);
    }
    let seconds = value.as_u64().filter(|seconds| (1..=3600).contains(seconds));
    seconds.map(Duration::from_secs).ok_or_else(|| {
        Error::new(code::CONFIG, format!("ipamTimeoutSeconds {value} is invalid")).details("allowed are 1 to 3600")
    })
}

fn read_mac(at: &str, map: &serde_json::Map<String, Value>) -> Result<Option<Mac>, Error> {
    match take(map, "mac") {
        None => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => parse_unicast_mac(text)
            .map(Some)
            .ok_or_else(|| Error::new(code::CONFIG, format!("{at}.mac {text:?} is not a unicast MAC address"))),
        Some(_) => Err(Error::new(code::DECODE, format!("{at}.mac has the wrong type"))),
    }
}

fn read_ips(at: &str, map: &serde_json::Map<String, Value>) -> Result<Vec<IpAddr>, Error> {
    let Some(value) = take(map, "ips") else { return Ok(Vec::new()) };
    let list: Vec<String> = serde_json::from_value(value.clone())
        .map_err(|_| Error::new(code::DECODE, format!("{at}.ips has the wrong type")))?;
    let bad = |text: &str| Error::new(code::CONFIG, format!("{at}.ips: {text:?} is no address"));
    list.iter().map(|text| parse_ip(text).ok_or_else(|| bad(text))).collect()
}

/// A member by name without regard to case, null being the same as absent.
pub(super) fn take<'a>(map: &'a serde_json::Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.iter().find(|(k, v)| k.eq_ignore_ascii_case(key) && !v.is_null()).map(|(_, v)| v)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn unreadable(error: serde_json::Error) -> Error {
    Error::new(code::DECODE, format!("the network configuration cannot be read: {error}"))
}

fn object(stdin: &[u8]) -> Result<Value, Error> {
    if stdin.iter().all(u8::is_ascii_whitespace) {
        return Err(Error::new(code::DECODE, "standard input is empty; it must hold the network configuration"));
    }
    let v: Value = serde_json::from_slice(stdin)
        .map_err(|e| Error::new(code::DECODE, format!("the network configuration is not JSON: {e}")))?;
    // serde would also take an array for a struct.
    if v.is_object() { Ok(v) } else { Err(Error::new(code::DECODE, "the network configuration is not a JSON object")) }
}

fn absolute(key: &str, path: Option<PathBuf>, default: &str) -> Result<PathBuf, Error> {
    let path = path.filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| default.into());
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::new(code::CONFIG, format!("{key} {} is not an absolute path", path.display())))
}

#[cfg(test)]
mod tests {
    use super::{NetConf, is_identifier, parse_mac};
    use crate::types::version::Version;
    use serde_json::{Value, json};
    use std::path::Path;

    fn parse(v: &Value) -> Result<NetConf, (u32, String)> {
        parse_text(&v.to_string())
    }

    fn parse_text(text: &str) -> Result<NetConf, (u32, String)> {
        NetConf::parse(text.as_bytes().to_vec(), false).map_err(|e| (e.code, e.to_string()))
    }

    #[test]
    fn shapes_that_are_refused() {
        let cases: [(&str, u32, &str); 32] = [
            ("", 6, "empty"),
            (" \n", 6, "empty"),
            ("{", 6, "not JSON"),
            ("nonsense", 6, "not JSON"),
            ("[]", 6, "not a JSON object"),
            ("null", 6, "not a JSON object"),
            ("\"x\"", 6, "not a JSON object"),
            ("7", 6, "not a JSON object"),
            (r#"{"name":"a"}"#, 1, "0.1.0"),
            (r#"{"cniVersion":null,"name":"a"}"#, 1, "0.1.0"),
            (r#"{"cniVersion":"0.2.0","name":"a"}"#, 1, "0.2.0"),
            (r#"{"cniVersion":"1.2.0","name":"a"}"#, 1, "1.2.0"),
            (r#"{"cniVersion":"v1.0.0","name":"a"}"#, 1, "v1.0.0"),
            (r#"{"cniVersion":1,"name":"a"}"#, 6, "must be a string"),
            (r#"{"cniVersion":"1.0.0"}"#, 7, "no name"),
            (r#"{"cniVersion":"1.0.0","name":""}"#, 7, "no name"),
            (r#"{"cniVersion":"1.0.0","name":"a b"}"#, 7, "\"a b\""),
            (r#"{"cniVersion":"1.0.0","name":"../x"}"#, 7, "\"../x\""),
            (r#"{"cniVersion":"1.0.0","name":7}"#, 6, "invalid type"),
            (r#"{"cniVersion":"1.0.0","name":"a","type":7}"#, 6, "invalid type"),
            (r#"{"cniVersion":"1.0.0","name":"a","runDir":"run"}"#, 7, "runDir"),
            (r#"{"cniVersion":"1.0.0","name":"a","bpffs":"x/y"}"#, 7, "bpffs"),
            (r#"{"cniVersion":"1.0.0","name":"a","mtu":"big"}"#, 6, "invalid type"),
            (r#"{"cniVersion":"1.0.0","name":"a","mtu":60}"#, 7, "mtu 60"),
            (r#"{"cniVersion":"1.0.0","name":"a","ipam":"host-local"}"#, 6, "invalid type"),
            (r#"{"cniVersion":"1.0.0","name":"a","runtimeConfig":{"mac":"01:00:5e:00:00:01"}}"#, 7, "unicast"),
            (r#"{"cniVersion":"1.0.0","name":"a","args":{"cni":{"mac":"01:00:5e:00:00:01"}}}"#, 7, "args.cni.mac"),
            (r#"{"cniVersion":"1.0.0","name":"a","args":{"cni":{"ips":["x"]}}}"#, 7, "args.cni.ips"),
            (r#"{"cniVersion":"1.0.0","name":"a","runtimeConfig":{"ips":"10.0.0.1"}}"#, 6, "runtimeConfig.ips"),
            (r#"{"cniVersion":"1.0.0","name":"a","ipamTimeoutSeconds":0}"#, 7, "1 to 3600"),
            (r#"{"cniVersion":"1.1.0","name":"a","cni.dev/valid-attachments":[{"containerID":"x"}]}"#, 6, "ifname"),
            (r#"{"cniVersion":"1.1.0","name":"a","cni.dev/attachments":{}}"#, 6, "cni.dev/attachments"),
        ];
        for (text, code, part) in cases {
            let (got, msg) = parse_text(text).expect_err(text);
            assert_eq!(got, code, "{text}: {msg}");
            assert!(msg.contains(part), "{text}: {msg}");
        }
        let deep = format!(r#"{{"cniVersion":"1.0.0","name":"a","x":{}1{}}}"#, "[".repeat(4000), "]".repeat(4000));
        assert_eq!(parse_text(&deep).expect_err("too deep").0, 6);
        let long = json!({ "cniVersion": "1.0.0", "name": "a".repeat(201) });
        assert_eq!(parse(&long).expect_err("too long").0, 7);
    }

    #[test]
    fn the_documented_example_and_unknown_members() {
        let c = parse(&json!({
            "cniVersion": "1.1.0", "name": "dbnet", "type": "rustnet-cni", "bridge": "cni0",
            "keyA": ["some more", "plugin specific", "configuration"], "capabilities": { "portMappings": true },
            "ipam": { "type": "host-local", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1" },
            "dns": { "nameservers": ["10.1.0.1"] }, "args": { "cni": {} },
        }))
        .expect("parses");
        assert_eq!(c.version, Version::V110);
        assert_eq!(c.ipam.as_deref(), Some("host-local"));
        assert_eq!(c.dns.nameservers, ["10.1.0.1"]);
        assert_eq!(
            (c.bpffs.as_path(), c.run_dir.as_path()),
            (Path::new("/sys/fs/bpf/rustnet"), Path::new("/run/rustnet"))
        );
        assert!(c.valid_attachments.is_none());
    }

    #[test]
    fn only_the_type_says_that_we_are_loopback() {
        for (kind, want) in [
            (json!("loopback"), true),
            (json!("rustnet-cni"), false),
            (json!("Loopback"), false),
            (json!(""), false),
            (json!(null), false),
        ] {
            let c = parse(&json!({ "cniVersion": "0.3.1", "name": "loopback", "type": kind })).expect("parses");
            assert_eq!(c.loopback, want, "{kind}");
        }
    }

    #[test]
    fn own_ipam_by_any_spelling() {
        for ipam in
            [json!(null), json!({}), json!({ "type": "" }), json!({ "type": "rustnet" }), json!({ "type": null })]
        {
            let c = parse(&json!({ "cniVersion": "1.0.0", "name": "a", "ipam": ipam })).expect("parses");
            assert!(c.ipam.is_none(), "{ipam}");
        }
        assert!(parse(&json!({ "cniVersion": "1.0.0", "name": "a" })).expect("parses").ipam.is_none());
    }

    #[test]
    fn runtime_config_in_every_form() {
        let conf = |rc: Value| json!({ "cniVersion": "1.0.0", "name": "a", "dns": { "nameservers": ["1.1.1.1"], "search": null }, "runtimeConfig": rc });
        // What containerd sends, what the specification and CRI-O write, and the empty forms.
        for (rc, server) in [
            (json!(null), "1.1.1.1"),
            (json!({}), "1.1.1.1"),
            (json!({ "dns": null, "mac": null, "portMappings": null, "bandwidth": null }), "1.1.1.1"),
            (json!({ "dns": { "Servers": null, "Searches": null, "Options": null }, "mac": "" }), "1.1.1.1"),
            (json!({ "dns": { "Servers": ["9.9.9.9"], "Searches": null, "Options": ["ndots:5"] } }), "9.9.9.9"),
            (json!({ "dns": { "servers": ["9.9.9.9"], "searches": [], "options": [] } }), "9.9.9.9"),
            (
                json!({
                    "portMappings": [{ "HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" }],
                    "bandwidth": { "EgressRate": 1, "EgressBurst": 1 }, "io.kubernetes.cri.pod-annotations": { "a": "b" },
                }),
                "1.1.1.1",
            ),
            (json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] }), "1.1.1.1"),
        ] {
            let c = parse(&conf(rc.clone())).expect("parses");
            assert_eq!(c.dns.nameservers, [server], "{rc}");
            assert!(c.mac.is_none());
        }
        let c = parse(&conf(json!({ "mac": "c2:11:22:33:44:55" }))).expect("parses");
        assert_eq!(c.mac, Some([0xc2, 0x11, 0x22, 0x33, 0x44, 0x55]));
        for rc in
            [json!([]), json!("x"), json!({ "dns": 7 }), json!({ "dns": { "Servers": "x" } }), json!({ "mac": 7 })]
        {
            assert_eq!(parse(&conf(rc.clone())).expect_err("wrong type").0, 6, "{rc}");
        }
    }

    #[test]
    fn what_describes_a_pod_keeps_none_from_going() {
        for (key, value) in [
            ("mtu", json!(60)),
            ("mtu", json!("big")),
            ("dns", json!(7)),
            ("runtimeConfig", json!([])),
            ("runtimeConfig", json!({ "mac": "01:00:5e:00:00:01" })),
            ("runtimeConfig", json!({ "mac": 7, "dns": 7 })),
        ] {
            let text = json!({ "cniVersion": "1.0.0", "name": "a", "ipam": { "type": "host-local" }, key: value });
            parse(&text).expect_err("a pod cannot be made so");
            let c = NetConf::parse(text.to_string().into_bytes(), true).expect("but removed");
            assert_eq!((c.name.as_str(), c.ipam.as_deref(), c.mac), ("a", Some("host-local"), None), "{text}");
        }
    }

    #[test]
    fn identifiers() {
        for good in ["a", "0", "A-b_c.d", "cnitool-77383ca0a0715733ca6f"] {
            assert!(is_identifier(good), "{good}");
        }
        for bad in ["", "-a", ".a", "_a", "a/b", "a b", "a\n", "ä", "a:b", "..", "a\0", "a@b"] {
            assert!(!is_identifier(bad), "{bad:?}");
        }
    }

    #[test]
    fn macs() {
        assert_eq!(parse_mac("02:ab:CD:00:01:ff"), Some([2, 0xab, 0xcd, 0, 1, 0xff]));
        for bad in [
            "",
            "02",
            "02:ab:cd:00:01",
            "02:ab:cd:00:01:ff:00",
            "0x:ab:cd:00:01:ff",
            "2:a:c:0:1:f",
            "+2:ab:cd:00:01:ff",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
