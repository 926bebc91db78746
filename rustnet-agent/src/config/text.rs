//! The text of each setting becomes a value of its type, or a sentence that says what would be right.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use rustnet_common::log::FILTERS;
use rustnet_common::maglev;

use super::{
    Algorithm, DenyResponse, Forwarding, KubeSource, LogFormat, NODE_PORTS, NodePortAddresses, OverlayFamily,
    OverlayPath, PacketLog, PacketMark, Routing, SocketLb, Source, Xdp,
};
use crate::args::{Value, Values};

/// Reads values and collects what is wrong with them. A refused value is replaced by its type's default, which never
/// leaves [`Config::validate`].
pub(super) struct Reader<'a> {
    pub(super) values: &'a Values,
    pub(super) problems: Vec<String>,
}

impl Reader<'_> {
    pub(super) fn name(&self, flag: &str) -> String {
        self.values.get(flag).map_or_else(|| format!("flag --{flag}"), Value::to_string)
    }

    pub(super) fn optional<T>(&mut self, flag: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
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

    pub(super) fn required<T: Fallback>(
        &mut self,
        flag: &'static str,
        remedy: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> T {
        if self.values.get(flag).is_none_or(|value| value.texts.is_empty()) {
            let setting = crate::args::settings::all().find(|setting| setting.flag == flag);
            let (env, key) = setting.map_or_else(Default::default, |setting| (setting.env(), setting.key));
            self.problems.push(format!("flag --{flag} (variable {env}, file key {key}): missing; {remedy}"));
            return T::fallback();
        }
        self.optional(flag, parse).unwrap_or_else(T::fallback)
    }

    pub(super) fn entries(&mut self, flag: &'static str) -> u32 {
        // The kernel refuses maps beyond its memory; beyond 2^26 entries it is a slip of the finger.
        self.entries_up_to(flag, 1 << 26)
    }

    /// For a map whose entries are named by numbers of a limited size.
    pub(super) fn entries_up_to(&mut self, flag: &'static str, most: u32) -> u32 {
        self.required(flag, "give a number", |text| number(text, 16, most))
    }

    pub(super) fn list<T>(&mut self, flag: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
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

    pub(super) fn packet_log(&mut self, flag: &'static str) -> PacketLog {
        let Some(value) = self.values.get(flag) else { return PacketLog::Off };
        let texts: Vec<_> = value.texts.iter().map(String::as_str).collect();
        match packet_log(&texts) {
            Ok(log) => log,
            Err(problem) => {
                self.problems.push(format!("{value}: {problem}"));
                PacketLog::Off
            }
        }
    }
}

/// A value to go on with while the remaining problems are collected.
pub(super) trait Fallback {
    fn fallback() -> Self;
}

macro_rules! fallback {
    ($($type:ty => $value:expr),+ $(,)?) => { $(impl Fallback for $type { fn fallback() -> Self { $value } })+ };
}

fallback!(
    String => Self::new(), PathBuf => Self::new(), Routing => Self::Vxlan, LogFormat => Self::Text, bool => false, u16 => 0, u32 => 0,
    PacketMark => Self::default(), OverlayFamily => Self::Auto, OverlayPath => Self::Programs,
    SocketLb => Self::Off, Algorithm => Self::Random, Forwarding => Self::Snat, Xdp => Self::Off,
    DenyResponse => Self::None,
);

impl<T> Fallback for Option<T> {
    fn fallback() -> Self {
        None
    }
}

pub(super) fn source(read: &mut Reader<'_>, in_pod: bool) -> Source {
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

fn packet_log(texts: &[&str]) -> Result<PacketLog, String> {
    match texts {
        // YAML 1.1, which Helm reads, takes `on` and `off` for booleans.
        [] | ["off" | "false"] => return Ok(PacketLog::Off),
        ["on" | "true"] => return Ok(PacketLog::All),
        _ => {}
    }
    let remedy = format!("give off, on, or up to {FILTERS} addresses");
    let mut addresses = Vec::new();
    for text in texts {
        match text.parse::<IpAddr>() {
            // The filter's free places look so.
            Ok(address) if !address.is_unspecified() => addresses.push(address.to_canonical()),
            _ => return Err(format!("{text:?} is no address to look for; {remedy}")),
        }
    }
    if addresses.len() > FILTERS {
        return Err(format!("{} addresses are too many; {remedy}", addresses.len()));
    }
    Ok(PacketLog::Having(addresses))
}

/// Node names are DNS subdomains (RFC 1123), as the API server demands.
pub(super) fn node_name(text: &str) -> Result<String, String> {
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

pub(super) fn directory(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("is not an absolute path; begin it with /".to_owned()) }
}

fn file(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("is empty; give the path of a file".to_owned()) } else { Ok(PathBuf::from(text)) }
}

pub(super) fn device(text: &str) -> Result<String, String> {
    // The kernel's own rule: dev_valid_name().
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if text.is_empty() || text.len() > 15 || text == "." || text == ".." || text.contains(bad) {
        return Err("is not a device name; give one that `ip link` shows".to_owned());
    }
    Ok(text.to_owned())
}

pub(super) fn number<T: TryFrom<u32>>(text: &str, min: u32, max: u32) -> Result<T, String> {
    text.parse::<u32>()
        .ok()
        .filter(|value| (min..=max).contains(value))
        .and_then(|value| T::try_from(value).ok())
        .ok_or_else(|| format!("is out of place; give a number from {min} to {max}"))
}

pub(super) fn maglev_table_size(text: &str) -> Result<u32, String> {
    let size: u32 = number(text, 251, maglev::MAX_SIZE)?;
    // Only then does each step of a backend lead through all places.
    let is_prime = (2..=size.isqrt()).all(|divisor| !size.is_multiple_of(divisor));
    if is_prime { Ok(size) } else { Err("is no prime; give one, such as 251, 4093, 16381, 65521 or 131071".to_owned()) }
}

pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "is neither; give true or false".to_owned())
}

pub(super) fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        // YAML 1.1, which Helm reads, takes both for booleans.
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err("is neither; give on or off".to_owned()),
    }
}

pub(super) fn cidr(text: &str) -> Result<IpNet, String> {
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

pub(super) fn node_port_addresses(text: &str) -> Result<NodePortAddresses, String> {
    if text == "primary" {
        return Ok(NodePortAddresses::Primary);
    }
    cidr(text).map(NodePortAddresses::In).map_err(|wrong| format!("{wrong}, or primary"))
}

pub(super) fn snat_ports(text: &str) -> Result<Option<(u16, u16)>, String> {
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
    if first < 1024 || last < first || last - first < 63 {
        return Err(wrong());
    }
    let (from, to) = NODE_PORTS;
    if first <= to && from <= last {
        return Err(format!(
            "has node ports ({from}-{to}) in it; give a range below or above them, such as 61000-65535"
        ));
    }
    Ok(Some((first, last)))
}

/// `VALUE/MASK`, as iptables and `ip rule` take marks.
pub(super) fn packet_mark(text: &str) -> Result<PacketMark, String> {
    let number = |text: &str| match text.trim().strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.trim().parse().ok(),
    };
    let parts = text.split_once('/').and_then(|(value, mask)| Some((number(value)?, number(mask)?)));
    let Some((value, mask)) = parts else {
        return Err(format!("is not a mark; give a value and a mask, for example {}", PacketMark::default()));
    };
    if value == 0 {
        return Err("marks packets with 0, as unmarked ones are; give a value other than 0".to_owned());
    }
    if value & !mask != 0 {
        return Err(format!("has a value outside its mask; give {value:#x}/{:#x}, or another value", mask | value));
    }
    Ok(PacketMark { value, mask })
}

pub(super) fn listen(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let wrong = |_| "is not an address and port; give such as 127.0.0.1:9879 or [::1]:9879, or off".to_owned();
    text.parse().map(Some).map_err(wrong)
}

/// kube-proxy serves all addresses of both families at `0.0.0.0`, and nothing when the value is empty.
pub(super) fn healthz_bind_address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let both_families = |addr: SocketAddr| {
        let is_any = addr.ip() == IpAddr::from(Ipv4Addr::UNSPECIFIED);
        if is_any { (Ipv6Addr::UNSPECIFIED, addr.port()).into() } else { addr }
    };
    Ok(listen(text)?.map(both_families))
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

pub(super) fn log_level(text: &str) -> Result<String, String> {
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
