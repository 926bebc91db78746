//! The call's environment: the verb and its variables, validated.

use crate::types::conf::{IDENTIFIER_RULE, Mac, is_identifier, parse_ip, parse_unicast_mac};
use crate::types::error::{Error, code};
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

/// Longest container id that still fits, with the interface's name, into a file name.
const CONTAINER_ID_MAX: usize = 200;
/// IFNAMSIZ without the terminating zero.
const IFNAME_MAX: usize = 15;

/// What the runtime wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Connect a container.
    Add,
    /// Compare a container's network with ADD's result.
    Check,
    /// Disconnect a container.
    Del,
    /// Remove what no valid attachment owns.
    Gc,
    /// Say whether ADD would work.
    Status,
    /// List the supported versions.
    Version,
}

/// The validated environment. Members that the verb does not need are empty.
#[derive(Clone, Debug, Default)]
pub struct Env {
    /// The runtime's container id.
    pub container_id: String,
    /// Name of the interface in the container.
    pub ifname: String,
    /// Path of the container's network namespace.
    pub netns: Option<String>,
    /// Where plugins are.
    pub path: Vec<PathBuf>,
    /// The pod, if the runtime names it.
    pub pod: PodArgs,
}

/// What `CNI_ARGS` says of the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodArgs {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// The addresses that it must have, if any.
    pub ips: Vec<IpAddr>,
    /// The MAC address that it must have, if any.
    pub mac: Option<Mac>,
    /// A key that is not known, unless `IgnoreUnknown` says that it does not matter.
    pub unknown: Option<String>,
}

impl Verb {
    /// The verb in `CNI_COMMAND`; `None` when the variable is missing or empty.
    pub fn from_env(get: &dyn Fn(&str) -> Option<OsString>) -> Result<Option<Self>, Error> {
        Ok(Some(match variable(get, "CNI_COMMAND")?.as_deref() {
            None => return Ok(None),
            Some("ADD") => Self::Add,
            Some("CHECK") => Self::Check,
            Some("DEL") => Self::Del,
            Some("GC") => Self::Gc,
            Some("STATUS") => Self::Status,
            Some("VERSION") => Self::Version,
            Some(other) => {
                return Err(Error::new(code::ENVIRONMENT, format!("unknown CNI_COMMAND {other:?}"))
                    .details("known are ADD, CHECK, DEL, GC, STATUS and VERSION"));
            }
        }))
    }

    /// The verb's name in `CNI_COMMAND`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }

    const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Add | Self::Check => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"],
            // CNI_PATH serves to find a delegated IPAM, which may have to do with nothing that is there to remove.
            Self::Del => &["CNI_CONTAINERID", "CNI_IFNAME"],
            Self::Status => &["CNI_PATH"],
            Self::Gc | Self::Version => &[],
        }
    }
}

impl Env {
    /// Reads and validates what `verb` needs.
    pub fn read(verb: Verb, get: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let mut missing = Vec::new();
        for name in verb.needs() {
            if variable(get, name)?.is_none() {
                missing.push(*name);
            }
        }
        if !missing.is_empty() {
            let text = format!("{} needs {}, missing in the environment", verb.as_str(), missing.join(", "));
            return Err(Error::new(code::ENVIRONMENT, text));
        }
        let path = get("CNI_PATH").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
        if matches!(verb, Verb::Gc | Verb::Status | Verb::Version) {
            return Ok(Self { path, ..Self::default() });
        }
        let container_id = variable(get, "CNI_CONTAINERID")?.unwrap_or_default();
        check_container_id(&container_id)?;
        let ifname = variable(get, "CNI_IFNAME")?.unwrap_or_default();
        check_ifname(&ifname)?;
        // Only ADD makes something of them: nothing in them keeps a pod from going.
        let (netns, pod) = match verb {
            Verb::Add => {
                (variable(get, "CNI_NETNS")?, PodArgs::parse(&variable(get, "CNI_ARGS")?.unwrap_or_default())?)
            }
            Verb::Check => (variable(get, "CNI_NETNS")?, PodArgs::default()),
            _ => (variable(get, "CNI_NETNS").unwrap_or_default(), PodArgs::default()),
        };
        Ok(Self { container_id, ifname, netns, path, pod })
    }
}

impl PodArgs {
    /// Reads `KEY=value;KEY=value`, in any order. The keys are those of Kubernetes and of the reference plugins.
    fn parse(text: &str) -> Result<Self, Error> {
        let bad = |what: String| Error::new(code::ENVIRONMENT, format!("CNI_ARGS: {what}"));
        let mut pod = Self::default();
        let mut is_lenient = false;
        for pair in text.split(';').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| bad(format!("{pair:?} is not a KEY=value pair")))?;
            match key {
                "K8S_POD_NAMESPACE" => pod.namespace = value.into(),
                "K8S_POD_NAME" => pod.name = value.into(),
                "K8S_POD_UID" => pod.uid = value.into(),
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                "IgnoreUnknown" => is_lenient = matches!(value.to_ascii_lowercase().as_str(), "1" | "true"),
                "IP" => {
                    for text in value.split(',').filter(|ip| !ip.is_empty()) {
                        pod.ips.push(parse_ip(text).ok_or_else(|| bad(format!("IP {text:?} is no address")))?);
                    }
                }
                "MAC" if value.is_empty() => {}
                "MAC" => {
                    let mac = parse_unicast_mac(value);
                    pod.mac = Some(mac.ok_or_else(|| bad(format!("MAC {value:?} is not a unicast MAC address")))?);
                }
                _ => pod.unknown = Some(key.into()),
            }
        }
        pod.unknown.take_if(|_| is_lenient);
        Ok(pod)
    }
}

/// A variable's text; an empty one counts as missing.
fn variable(get: &dyn Fn(&str) -> Option<OsString>, name: &str) -> Result<Option<String>, Error> {
    match get(name).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(text)) => Ok(Some(text).filter(|t| !t.is_empty())),
        Some(Err(_)) => Err(Error::new(code::ENVIRONMENT, format!("{name} is not valid UTF-8"))),
    }
}

fn check_container_id(id: &str) -> Result<(), Error> {
    if id.len() > CONTAINER_ID_MAX {
        return Err(Error::new(code::ENVIRONMENT, format!("CNI_CONTAINERID is {} characters long", id.len()))
            .details(format!("at most {CONTAINER_ID_MAX} are supported")));
    }
    if is_identifier(id) {
        return Ok(());
    }
    Err(Error::new(code::ENVIRONMENT, format!("CNI_CONTAINERID {id:?} is invalid")).details(IDENTIFIER_RULE))
}

fn check_ifname(name: &str) -> Result<(), Error> {
    let why = if name.len() > IFNAME_MAX {
        "an interface's name has at most 15 characters"
    } else if name == "." || name == ".." {
        "'.' and '..' are not interface names"
    } else if name.chars().any(|c| matches!(c, '/' | ':') || c.is_whitespace() || c.is_control()) {
        "an interface's name has no '/', ':', white space or control characters"
    } else if name.contains('%') {
        // The kernel takes it for a pattern and would create another name.
        "an interface's name has no '%'"
    } else {
        return Ok(());
    };
    Err(Error::new(code::ENVIRONMENT, format!("CNI_IFNAME {name:?} is invalid")).details(why))
}

#[cfg(test)]
mod tests {
    use super::{Env, PodArgs, Verb};
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    const ALL: [(&str, &str); 4] =
        [("CNI_CONTAINERID", "c1"), ("CNI_NETNS", "/run/netns/a"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/a:/b")];

    fn read(verb: Verb, vars: &[(&str, &str)]) -> Result<Env, String> {
        let get = |name: &str| vars.iter().rev().find(|v| v.0 == name).map(|v| OsString::from(v.1));
        Env::read(verb, &get).map_err(|e| {
            assert_eq!(e.code, 4, "{e}");
            e.to_string()
        })
    }

    #[test]
    fn every_missing_variable_is_named() {
        let needs: [(Verb, &[&str]); 5] = [
            (Verb::Add, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
            (Verb::Check, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
            (Verb::Del, &["CNI_CONTAINERID", "CNI_IFNAME"]),
            (Verb::Gc, &[]),
            (Verb::Status, &["CNI_PATH"]),
        ];
        for (verb, needed) in needs {
            assert!(read(verb, &ALL).is_ok());
            for name in ALL.map(|v| v.0) {
                let without: Vec<_> = ALL.into_iter().filter(|v| v.0 != name).collect();
                let mut empty = ALL.to_vec();
                empty.push((name, ""));
                for vars in [without, empty] {
                    match read(verb, &vars) {
                        Ok(_) => assert!(!needed.contains(&name), "{verb:?} without {name}"),
                        Err(e) => assert!(needed.contains(&name) && e.contains(name), "{verb:?} without {name}: {e}"),
                    }
                }
            }
            let all_missing = read(verb, &[]).err().unwrap_or_default();
            assert!(needed.iter().all(|n| all_missing.contains(n)), "{all_missing}");
        }
        assert!(read(Verb::Version, &[]).is_ok());
    }

    #[test]
    fn bad_values() {
        let long = "a".repeat(201);
        let cases = [
            ("CNI_CONTAINERID", "-a"),
            ("CNI_CONTAINERID", "../../etc"),
            ("CNI_CONTAINERID", "a b"),
            ("CNI_CONTAINERID", "a\nb"),
            ("CNI_CONTAINERID", "é"),
            ("CNI_CONTAINERID", "a@b"),
            ("CNI_CONTAINERID", long.as_str()),
            ("CNI_IFNAME", "a234567890123456"),
            ("CNI_IFNAME", "."),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "a:b"),
            ("CNI_IFNAME", "a b"),
            ("CNI_IFNAME", "a\tb"),
            ("CNI_IFNAME", "a\u{a0}b"),
            ("CNI_IFNAME", "eth%d"),
            ("CNI_ARGS", "IgnoreUnknown"),
        ];
        for (name, value) in cases {
            let mut vars = ALL.to_vec();
            vars.push((name, value));
            for verb in [Verb::Add, Verb::Check, Verb::Del] {
                if (name, verb) == ("CNI_ARGS", Verb::Check) || (name, verb) == ("CNI_ARGS", Verb::Del) {
                    assert!(read(verb, &vars).is_ok(), "{verb:?} needs no {name}");
                    continue;
                }
                let e = read(verb, &vars).expect_err(value);
                assert!(e.contains(name), "{name}={value:?}: {e}");
            }
        }
        for good in ["a23456789012345", "eth0.100", "net1@x", "-"] {
            let mut vars = ALL.to_vec();
            vars.push(("CNI_IFNAME", good));
            assert!(read(Verb::Add, &vars).is_ok(), "{good}");
        }
        let get = |_: &str| Some(OsString::from_vec(vec![0xff, 0xfe]));
        assert_eq!(Env::read(Verb::Add, &get).expect_err("not UTF-8").code, 4);
        // DEL reads neither, and GC not even who is meant.
        let get = |name: &str| {
            let is_read = matches!(name, "CNI_CONTAINERID" | "CNI_IFNAME");
            Some(if is_read { OsString::from("a") } else { OsString::from_vec(vec![0xff, 0xfe]) })
        };
        assert!(Env::read(Verb::Del, &get).is_ok_and(|env| env.netns.is_none()));
        assert!(Env::read(Verb::Gc, &get).is_ok());
    }

    #[test]
    fn verbs() {
        let verb = |v: Option<&str>| Verb::from_env(&|_: &str| v.map(OsString::from));
        assert_eq!(verb(None).expect("no verb"), None);
        assert_eq!(verb(Some("")).expect("no verb"), None);
        for v in [Verb::Add, Verb::Check, Verb::Del, Verb::Gc, Verb::Status, Verb::Version] {
            assert_eq!(verb(Some(v.as_str())).expect("known"), Some(v));
        }
        for bad in ["add", "UPDATE", " ADD", "ADD\n"] {
            assert_eq!(verb(Some(bad)).expect_err(bad).code, 4);
        }
    }

    #[test]
    fn pod_args_in_any_order() {
        let want = PodArgs { namespace: "ns".into(), name: "p".into(), uid: "u".into(), ..PodArgs::default() };
        for text in [
            "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=x;K8S_POD_UID=u;IgnoreUnknown=1",
            "IgnoreUnknown=1;;K8S_POD_UID=u;K8S_POD_NAME=p;K8S_POD_NAMESPACE=ns;OTHER=a=b",
        ] {
            assert_eq!(PodArgs::parse(text).expect("parses"), want);
        }
        assert_eq!(PodArgs::parse("").expect("parses"), PodArgs::default());
        // What the reference plugins take from it.
        let asked = PodArgs::parse("IP=10.1.2.9,fd00::9/64;MAC=02:00:00:00:00:07").expect("parses");
        assert_eq!(asked.ips, ["10.1.2.9", "fd00::9"].map(|ip| ip.parse::<std::net::IpAddr>().expect("address")));
        assert_eq!(asked.mac, Some([2, 0, 0, 0, 0, 7]));
        for (text, unknown) in [
            ("OTHER=1", Some("OTHER")),
            ("OTHER=1;IgnoreUnknown=0", Some("OTHER")),
            ("OTHER=1;IgnoreUnknown=true", None),
            ("IgnoreUnknown=1;OTHER=1", None),
            ("K8S_POD_INFRA_CONTAINER_ID=x", None),
        ] {
            assert_eq!(PodArgs::parse(text).expect("parses").unknown.as_deref(), unknown, "{text}");
        }
        for bad in ["IP=x", "IP=10.1.2.9,x", "MAC=x", "MAC=01:00:5e:00:00:01"] {
            assert_eq!(PodArgs::parse(bad).expect_err(bad).code, 4);
        }
    }
}
