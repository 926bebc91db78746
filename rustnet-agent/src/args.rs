//! Where settings come from: flags, `RUSTNET_*` variables and the file, one table for all three.
//!
//! Every setting is one row of [`SETTINGS`]; its flag, variable and file key cannot drift apart, and the help text is made
//! of the same row. This module only finds the text of each setting and remembers where it was; [`crate::config`] gives it
//! a type.

use anyhow::{Context, bail};
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

/// How many values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arity {
    /// One value.
    One,
    /// Any number: the flag repeated or separated by commas, a sequence in the file.
    Many,
    /// `true` or `false`; the flag alone means `true`.
    Switch,
}

/// One setting, by all its names.
#[derive(Debug)]
pub struct Setting {
    /// The flag, without the dashes.
    pub flag: &'static str,
    /// The key in the file.
    pub key: &'static str,
    /// How many values.
    pub arity: Arity,
    /// What stands for the value in the help text.
    pub value: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// The value when nobody says otherwise; empty when there is none.
    pub default: &'static str,
    /// Heading in the help text.
    pub heading: &'static str,
}

impl Setting {
    /// The environment variable.
    pub fn env(&self) -> String {
        format!("RUSTNET_{}", self.flag.replace('-', "_").to_uppercase())
    }
}

const SOURCE: &str = "Source";
const NODE: &str = "Node";
const NETWORK: &str = "Network";
const TABLES: &str = "Tables";
const OBSERVE: &str = "Observation";

const fn one(
    heading: &'static str,
    flag: &'static str,
    key: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { flag, key, arity: Arity::One, value, help, default, heading }
}

const fn many(
    heading: &'static str,
    flag: &'static str,
    key: &'static str,
    value: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { flag, key, arity: Arity::Many, value, help, default, heading }
}

const fn switch(
    heading: &'static str,
    flag: &'static str,
    key: &'static str,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { flag, key, arity: Arity::Switch, value: "BOOL", help, default, heading }
}

/// All settings, in the order of the help text.
pub static SETTINGS: &[Setting] = &[
    one(SOURCE, "manifests", "manifests", "DIR", "", "Watch a directory of Kubernetes YAML instead of an API server"),
    one(
        SOURCE,
        "kubeconfig",
        "kubeconfig",
        "FILE",
        "",
        "Watch the API server that this kubeconfig names (its current context)",
    ),
    one(
        SOURCE,
        "api-server",
        "apiServer",
        "URL",
        "",
        "Address of the API server, in place of the one in the kubeconfig or in the pod's environment; \
         needed without kube-proxy, where the service address leads nowhere before the agent runs",
    ),
    one(NODE, "node-name", "nodeName", "NAME", "", "Name of this node's Node object"),
    one(
        NODE,
        "bpffs",
        "bpffs",
        "DIR",
        "/sys/fs/bpf/rustnet",
        "Where maps, programs and links are pinned; on a bpf file system",
    ),
    one(NODE, "run-dir", "runDir", "DIR", "/run/rustnet", "Where the agent and the CNI binary keep their files"),
    one(
        NODE,
        "cgroup",
        "cgroup",
        "DIR",
        "/sys/fs/cgroup",
        "The cgroup v2 directory that holds the host's and the pods' processes",
    ),
    one(
        NODE,
        "sysctl-dir",
        "sysctlDir",
        "DIR",
        "/proc/sys/net",
        "A writable /proc/sys/net of the host's network namespace; containers see the usual one read-only",
    ),
    many(
        NODE,
        "uplink",
        "uplink",
        "DEV",
        "",
        "Network devices towards the other nodes and the world; when absent, those with the Node's InternalIPs and those of the \
         default routes",
    ),
    one(NODE, "cni-bin-dir", "cniBinDir", "DIR", "", "Install the CNI binary here, from the agent's own directory"),
    one(NODE, "cni-conf-dir", "cniConfDir", "DIR", "", "Install the CNI configuration here once the agent is ready"),
    one(
        NETWORK,
        "routing",
        "routing",
        "MODE",
        "vxlan",
        "Reach pods of other nodes by vxlan, native or direct-and-vxlan",
    ),
    one(
        NETWORK,
        "overlay-family",
        "overlayFamily",
        "auto|ipv4|ipv6",
        "auto",
        "Family of the overlay's outer packets; auto takes that of the Nodes' first InternalIPs; the same on all nodes",
    ),
    one(NETWORK, "overlay-port", "overlayPort", "PORT", "8472", "UDP port of the overlay; the same on all nodes"),
    one(NETWORK, "vni", "vni", "NUMBER", "1", "Network identifier of the overlay; the same on all nodes"),
    one(
        NETWORK,
        "mtu",
        "mtu",
        "auto|BYTES",
        "auto",
        "MTU of the pods' interfaces; auto takes the uplink's, less the overlay's share",
    ),
    many(
        NETWORK,
        "pod-cidrs",
        "podCIDRs",
        "CIDR",
        "",
        "This node's pod ranges, in place of those of its Node object; at most one a family",
    ),
    many(
        NETWORK,
        "cluster-pod-cidrs",
        "clusterPodCIDRs",
        "CIDR",
        "",
        "The ranges that the pods of all nodes come from",
    ),
    many(NETWORK, "service-cidrs", "serviceCIDRs", "CIDR", "", "The ranges that service addresses come from"),
    many(NETWORK, "node-cidrs", "nodeCIDRs", "CIDR", "", "The ranges that node addresses come from"),
    switch(NETWORK, "masquerade", "masquerade", "true", "Pods that talk to the world get this node's address"),
    many(
        NETWORK,
        "non-masquerade-cidrs",
        "nonMasqueradeCIDRs",
        "CIDR",
        "",
        "Ranges outside the cluster that see the pods' own addresses",
    ),
    one(NETWORK, "snat-ports", "snatPorts", "auto|FIRST-LAST", "auto", "Source ports that masquerade may use"),
    one(
        NETWORK,
        "packet-mark",
        "packetMark",
        "VALUE/MASK",
        "0x1052/0x107f",
        "Mark of packets between two of rustnet's programs on a node: the bits in MASK are its own and hold VALUE",
    ),
    one(TABLES, "service-entries", "serviceEntries", "NUMBER", "65536", "Size of each service table"),
    one(
        TABLES,
        "backend-entries",
        "backendEntries",
        "NUMBER",
        "262144",
        "Size of the tables of backends and of their ids, at most 1048576",
    ),
    one(TABLES, "ct-tcp-entries", "ctTcpEntries", "NUMBER", "65536", "Size of the TCP connection table of each family"),
    one(
        TABLES,
        "ct-any-entries",
        "ctAnyEntries",
        "NUMBER",
        "32768",
        "Size of the connection table of all other protocols, of each family",
    ),
    one(TABLES, "frag-entries", "fragEntries", "NUMBER", "8192", "Size of each table of first fragments"),
    one(TABLES, "endpoint-entries", "endpointEntries", "NUMBER", "4096", "Size of the table of this node's pods"),
    one(TABLES, "peer-entries", "peerEntries", "NUMBER", "65536", "Size of each table of other nodes and their ranges"),
    one(
        OBSERVE,
        "health-addr",
        "healthAddr",
        "ADDR:PORT|off",
        "127.0.0.1:9879",
        "Where /healthz and /readyz are served",
    ),
    one(
        OBSERVE,
        "metrics-addr",
        "metricsAddr",
        "ADDR:PORT|off",
        "[::]:9962",
        "Where /metrics is served; [::] is both families",
    ),
    many(
        OBSERVE,
        "bpf-log",
        "bpfLog",
        "off|on|ADDR",
        "off",
        "Log each packet that the programs judge, or those with one of up to four addresses, on level info; for debugging, slow",
    ),
    switch(OBSERVE, "flow-events", "flowEvents", "false", "Report new flows as events too, not only drops"),
    one(
        OBSERVE,
        "log-level",
        "logLevel",
        "LEVEL",
        "info",
        "error, warn, info, debug, trace, or filters such as info,rustnet_agent::net=debug",
    ),
    one(OBSERVE, "log-format", "logFormat", "FORMAT", "text", "text or json"),
];

/// Where a value was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag,
    /// In the environment.
    Env,
    /// In this file.
    File(PathBuf),
    /// In the settings of the running agent.
    Agent,
    /// Nowhere: the default.
    Default,
}

impl Origin {
    /// Which layer wins: the lower number.
    pub fn rank(&self) -> u8 {
        match self {
            Self::Flag => 0,
            Self::Env => 1,
            Self::File(_) => 2,
            Self::Agent => 3,
            Self::Default => 4,
        }
    }

    /// Whether somebody chose the value.
    fn is_chosen(&self) -> bool {
        *self != Self::Default
    }
}

/// The text of one setting, with its origin.
#[derive(Clone, Debug)]
pub struct Value {
    /// The setting.
    pub setting: &'static Setting,
    /// Its values; one, except for [`Arity::Many`].
    pub texts: Vec<String>,
    /// Where they were found.
    pub origin: Origin,
}

impl fmt::Display for Value {
    /// Names the origin first and then the other ways to give the setting.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting { flag, key, .. } = self.setting;
        let env = self.setting.env();
        match &self.origin {
            Origin::Flag => write!(f, "flag --{flag} (variable {env}, file key {key})"),
            Origin::Env => write!(f, "variable {env} (flag --{flag}, file key {key})"),
            Origin::File(path) => write!(f, "key {key} in {} (flag --{flag}, variable {env})", path.display()),
            Origin::Agent => write!(f, "the running agent's {key} (flag --{flag}, variable {env})"),
            Origin::Default => write!(f, "default of flag --{flag} (variable {env}, file key {key})"),
        }
    }
}

/// The text of every setting, by flag. Settings without a value and without a default are absent.
#[derive(Clone, Debug, Default)]
pub struct Values {
    values: BTreeMap<&'static str, Value>,
    /// `--prepare`: only prepare the host, and end.
    pub prepare: bool,
}

impl Values {
    /// The value of the setting with this flag.
    pub fn get(&self, flag: &str) -> Option<&Value> {
        self.values.get(flag)
    }

    /// Gathers the settings of a command line, an environment and the file that either of them names with `--config`.
    ///
    /// # Errors
    /// An unreadable or malformed file, or unknown keys in it. A malformed command line ends the process with clap's
    /// message, like `--help` does.
    pub fn gather<I, T>(args: I, env: &dyn Fn(&str) -> Option<OsString>) -> anyhow::Result<Self>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let matches = command().try_get_matches_from(args).unwrap_or_else(|error| error.exit());
        let values = Given::of(&matches).gather(env, &BTreeMap::new())?;
        Ok(Self { prepare: matches.get_flag("prepare"), ..values })
    }

    /// What somebody chose, by flag.
    pub fn chosen(&self) -> BTreeMap<String, Vec<String>> {
        let chosen = self.values.iter().filter(|(_, value)| value.origin.is_chosen());
        chosen.map(|(flag, value)| ((*flag).to_owned(), value.texts.clone())).collect()
    }

    fn layer(
        flags: &BTreeMap<&'static str, Vec<String>>,
        env: &dyn Fn(&str) -> Option<OsString>,
        config: Option<&Path>,
        agent: &BTreeMap<String, Vec<String>>,
    ) -> anyhow::Result<BTreeMap<&'static str, Value>> {
        let mut file = match config {
            Some(path) => read_file(path)?,
            None => BTreeMap::new(),
        };
        let mut values = BTreeMap::new();
        for setting in SETTINGS {
            let name = setting.env();
            let from_env = match env(&name) {
                Some(text) if text.is_empty() => None,
                Some(text) => Some(text.into_string().map_err(|_| anyhow::anyhow!("variable {name}: not UTF-8"))?),
                None => None,
            };
            let from_file = file.remove(setting.key);
            let found = if let Some(texts) = flags.get(setting.flag) {
                Some((texts.clone(), Origin::Flag))
            } else if let Some(text) = from_env {
                Some((vec![text], Origin::Env))
            } else if let (Some(texts), Some(path)) = (from_file, config) {
                Some((texts, Origin::File(path.to_path_buf())))
            } else if let Some(texts) = agent.get(setting.flag) {
                Some((texts.clone(), Origin::Agent))
            } else if setting.default.is_empty() {
                None
            } else {
                Some((vec![setting.default.to_owned()], Origin::Default))
            };
            if let Some((mut texts, origin)) = found {
                if setting.arity == Arity::Many {
                    texts = texts.iter().flat_map(|text| text.split(',')).map(|text| text.trim().to_owned()).collect();
                    texts.retain(|text| !text.is_empty());
                }
                values.insert(setting.flag, Value { setting, texts, origin });
            }
        }
        Ok(values)
    }
}

/// The settings on a command line: the agent's, or that of a command that looks at things as an agent would.
#[derive(Clone, Debug, Default)]
pub struct Given {
    flags: BTreeMap<&'static str, Vec<String>>,
    config: Option<PathBuf>,
}

impl Given {
    /// Settings that every command has by other means; they are given by [`Self::set`].
    const NOT_LOCAL: [&str; 2] = ["bpffs", "run-dir"];

    fn of(matches: &ArgMatches) -> Self {
        let flags = SETTINGS.iter().filter_map(|setting| {
            let texts: Vec<String> = matches.try_get_many::<String>(setting.flag).ok()??.cloned().collect();
            Some((setting.flag, texts))
        });
        Self { flags: flags.collect(), config: matches.get_one::<String>("config").map(PathBuf::from) }
    }

    /// Gives a setting that the command line has no flag for.
    pub fn set(&mut self, flag: &'static str, text: String) {
        self.flags.insert(flag, vec![text]);
    }

    /// With these, the settings of the environment and of the file that either names with `--config`; where all are silent,
    /// those of an agent (see [`Values::chosen`]).
    ///
    /// # Errors
    /// See [`Values::gather`].
    pub fn gather(
        self,
        env: &dyn Fn(&str) -> Option<OsString>,
        agent: &BTreeMap<String, Vec<String>>,
    ) -> anyhow::Result<Values> {
        let from_env = || env("RUSTNET_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let config = self.config.clone().or_else(from_env);
        let values = Values::layer(&self.flags, env, config.as_deref(), agent)?;
        Ok(Values { values, prepare: false })
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self::of(matches))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::of(matches);
        Ok(())
    }
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        let own = |setting: &&Setting| !Self::NOT_LOCAL.contains(&setting.flag);
        command.arg(config()).args(SETTINGS.iter().filter(own).map(argument))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn config() -> Arg {
    Arg::new("config").long("config").value_name("FILE").help(
        "YAML or JSON file with the same settings, in camelCase; flags and variables win over it [env: RUSTNET_CONFIG]",
    )
}

fn argument(setting: &Setting) -> Arg {
    let mut help = format!("{} [env: {}] [file: {}]", setting.help, setting.env(), setting.key);
    if !setting.default.is_empty() {
        help = format!("{help} [default: {}]", setting.default);
    }
    let arg =
        Arg::new(setting.flag).long(setting.flag).value_name(setting.value).help(help).help_heading(setting.heading);
    match setting.arity {
        Arity::One => arg,
        Arity::Many => arg.action(ArgAction::Append),
        Arity::Switch => arg.num_args(0..=1).default_missing_value("true"),
    }
}

/// The agent's command line.
pub fn command() -> Command {
    let prepare = Arg::new("prepare")
        .long("prepare")
        .action(ArgAction::SetTrue)
        .help("Only mount the BPF file system where it is missing, and end: for a privileged init container");
    Command::new("rustnet-agent")
        .about("The node agent of rustnet: keeps this node's eBPF tables, links and routes as Kubernetes asks")
        .version(env!("CARGO_PKG_VERSION"))
        .arg(config())
        .arg(prepare)
        .args(SETTINGS.iter().map(argument))
}

/// Reads the file: scalars and sequences of scalars as text, by key.
fn read_file(path: &Path) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{shown}: cannot read the configuration file; check --config and its permissions"))?;
    if text.trim().is_empty() {
        return Ok(BTreeMap::new());
    }
    let value: serde_json::Value =
        serde_saphyr::from_str(&text).with_context(|| format!("{shown}: not valid YAML or JSON"))?;
    let map = match value {
        serde_json::Value::Null => return Ok(BTreeMap::new()),
        serde_json::Value::Object(map) => map,
        _ => bail!("{shown}: the top level must be a mapping, such as `routing: vxlan`"),
    };
    let mut out = BTreeMap::new();
    let mut problems = Vec::new();
    for (key, value) in map {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
            problems.push(unknown_key(&key));
            continue;
        };
        match scalars(&value) {
            Some(texts) if texts.len() > 1 && setting.arity != Arity::Many => {
                problems.push(format!("key {key}: takes one value, not a sequence of {}", texts.len()));
            }
            Some(texts) => {
                if !texts.is_empty() || setting.arity == Arity::Many && !value.is_null() {
                    out.insert(key, texts);
                }
            }
            None => problems
                .push(format!("key {key}: neither a value nor a sequence of values; write `{key}: {}`", setting.value)),
        }
    }
    if !problems.is_empty() {
        bail!("{shown}: {}", problems.join("\n  "));
    }
    Ok(out)
}

/// The text of a scalar or of a sequence of scalars; `None` for mappings and deeper nesting.
fn scalars(value: &serde_json::Value) -> Option<Vec<String>> {
    use serde_json::Value::{Array, Bool, Null, Number, Object, String};
    match value {
        Null => Some(Vec::new()),
        Bool(value) => Some(vec![value.to_string()]),
        Number(value) => Some(vec![value.to_string()]),
        String(value) => Some(vec![value.clone()]),
        Array(values) => values
            .iter()
            .map(|value| if value.is_array() { None } else { scalars(value) })
            .collect::<Option<Vec<_>>>()
            .map(|values| values.concat()),
        Object(_) => None,
    }
}

fn unknown_key(key: &str) -> String {
    let lower = key.to_lowercase().replace(['-', '_'], "");
    let nearest = SETTINGS
        .iter()
        .map(|setting| (distance(&lower, &setting.key.to_lowercase()), setting.key))
        .min()
        .filter(|(distance, near)| *distance <= near.len().max(3) / 3);
    match nearest {
        Some((_, near)) => format!("unknown key {key}: did you mean {near}?"),
        None => format!("unknown key {key}: `rustnet-agent --help` lists the keys"),
    }
}

/// Levenshtein distance, by characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn names_are_unique_and_follow_their_conventions() {
        for (i, setting) in SETTINGS.iter().enumerate() {
            assert!(
                setting.flag.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
                "{setting:?}"
            );
            assert_eq!(setting.key.to_lowercase(), setting.flag.replace('-', ""), "flag and key are the same words");
            assert!(SETTINGS[..i].iter().all(|other| other.flag != setting.flag && other.key != setting.key));
        }
    }

    #[test]
    fn the_nearest_key_is_offered() {
        for (wrong, right) in [
            ("podCidrs", "podCIDRs"),
            ("pod-cidrs", "podCIDRs"),
            ("upLink", "uplink"),
            ("uplinks", "uplink"),
            ("routingMode", "`rustnet-agent --help`"),
            ("overlay_port", "overlayPort"),
            ("masqurade", "masquerade"),
            ("xyz", "`rustnet-agent --help`"),
        ] {
            assert!(unknown_key(wrong).contains(right), "{wrong}: {}", unknown_key(wrong));
        }
    }
}
