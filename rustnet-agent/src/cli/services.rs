//! `rustnetctl services`: what the programs do with Services: the list of entries, one Service with its backends, and the
//! comparison of this node's maps with the source.

mod detail;
mod list;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rustnet_common::service::{SvcEntry, flags, scope};

use super::output::{Output, Usage};
use super::{Places, settings};
use crate::args::Given;
use crate::bpf::store;
use crate::bpf::store::backends::Backends;
use crate::bpf::store::memory::Access;
use crate::namefile::{self, SERVICES, Services};
use crate::plan::{SourceRange, VipKey};

/// Options.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// One Service in full: namespace/name, or its name with --namespace. Or only the entries of this virtual address
    what: Option<String>,
    /// Only Services of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Compare this node's maps with what the agent's source says; exit code 1 if they differ. Takes the agent's settings
    #[arg(long, conflicts_with_all = ["what", "namespace"])]
    verify: bool,
    #[command(flatten)]
    settings: Given,
}

/// Prints the services; true unless a comparison finds a difference.
pub fn run(places: &Places, args: Args, out: &Output) -> Result<bool> {
    if args.verify {
        let config = settings::config(places, args.settings, settings::Whose::RunningAgent)?;
        let config = config.map_err(|refused| Usage(format!("settings: {}", refused.0.join("; "))))?;
        return verify::run(places, &config, out);
    }
    if !args.settings.is_empty() {
        return Err(Usage("settings are for --verify alone: leave them out, or add it".into()).into());
    }
    match Wanted::of(&args)? {
        Wanted::Entries { vip, namespace } => list::run(places, vip, namespace, out)?,
        Wanted::Service(name) => detail::run(places, &name, out)?,
    }
    Ok(true)
}

/// What a command line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted<'a> {
    Entries {
        vip: Option<IpAddr>,
        namespace: Option<&'a str>,
    },
    /// `namespace/name`.
    Service(String),
}

impl<'a> Wanted<'a> {
    fn of(args: &'a Args) -> Result<Self, Usage> {
        let namespace = args.namespace.as_deref();
        let Some(what) = args.what.as_deref() else { return Ok(Self::Entries { vip: None, namespace }) };
        match (what.parse::<IpAddr>(), what.split_once('/'), namespace) {
            (Ok(vip), _, namespace) => Ok(Self::Entries { vip: Some(vip), namespace }),
            (Err(_), Some((in_name, _)), given) if given.is_none_or(|given| given == in_name) => {
                Ok(Self::Service(what.to_owned()))
            }
            (Err(_), Some(_), _) => {
                Err(Usage(format!("{what} is of another namespace: leave out --namespace, or write only the name")))
            }
            (Err(_), None, Some(namespace)) => Ok(Self::Service(format!("{namespace}/{what}"))),
            (Err(_), None, None) => {
                Err(Usage(format!("{what}: of which namespace? Write namespace/{what}, or give --namespace")))
            }
        }
    }
}

/// What the maps and the agent's file of names hold.
struct Maps {
    services: BTreeMap<VipKey, SvcEntry>,
    backends: Backends,
    ranges: BTreeSet<SourceRange>,
    names: Services,
}

impl Maps {
    fn read(places: &Places) -> Result<Self> {
        let backends = Backends::open(places.bpffs()?, Access::Read)?;
        let services = store::services(places.bpffs()?)?;
        let is_any_judged = services.values().any(is_judged);
        let ranges = if is_any_judged { store::source_ranges(places.bpffs()?)? } else { BTreeSet::new() };
        Ok(Self { services, backends, ranges, names: namefile::read(&places.run_dir, SERVICES)? })
    }
}

/// True for an entry that asks for the client.
fn is_judged(entry: &SvcEntry) -> bool {
    entry.flags & flags::SOURCE_RANGES != 0
}

/// The clients that may come by an entry; `None` for all.
fn ranges_of(key: &VipKey, entry: &SvcEntry, ranges: &BTreeSet<SourceRange>) -> Option<Vec<IpNet>> {
    // Both entries of an address ask for the same clients.
    let key = VipKey { scope: scope::EXTERNAL, ..*key };
    let of_key = || ranges.iter().filter(|range| range.key == key).map(|range| range.clients).collect();
    is_judged(entry).then(of_key)
}

/// `cluster`: pods and the host of this node; `external`: whoever comes in by a device.
fn clients(key: &VipKey) -> &'static str {
    if key.scope == scope::EXTERNAL { "external" } else { "cluster" }
}

fn show_ranges(ranges: Option<&[IpNet]>) -> String {
    match ranges {
        None => "-".to_owned(),
        Some([]) => "none (dropped)".to_owned(),
        Some(ranges) => ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// What becomes of clients of an entry without backends.
const fn no_backends(is_dropped: bool) -> &'static str {
    if is_dropped { "none (dropped)" } else { "none (refused)" }
}

#[cfg(test)]
mod tests {
    use super::{Args, SvcEntry, VipKey, Wanted, flags, ranges_of, scope};
    use crate::model::build::ip;
    use crate::plan::SourceRange;

    #[test]
    fn both_entries_of_an_address_have_its_ranges() {
        let key = |scope| VipKey { ip: ip("203.0.113.7"), port: 80, proto: 6, scope };
        let clients = "192.0.2.0/24".parse().unwrap();
        let ranges = [SourceRange { key: key(scope::EXTERNAL), clients }].into();
        let entry = |flags| SvcEntry { first: 0, count: 0, id: 1, affinity: 0, flags, table: 0 };
        for scope in [scope::EXTERNAL, scope::CLUSTER] {
            assert_eq!(ranges_of(&key(scope), &entry(flags::SOURCE_RANGES), &ranges), Some(vec![clients]));
            assert_eq!(ranges_of(&key(scope), &entry(0), &ranges), None);
        }
    }

    #[test]
    fn names_and_addresses() {
        let parse = |what: Option<&str>, namespace: Option<&str>| {
            let args = Args { what: what.map(Into::into), namespace: namespace.map(Into::into), ..Args::default() };
            match Wanted::of(&args) {
                Ok(Wanted::Service(name)) => name,
                Ok(Wanted::Entries { vip, namespace }) => format!("{vip:?} {namespace:?}"),
                Err(wrong) => wrong.to_string(),
            }
        };
        assert_eq!(parse(None, None), "None None");
        assert_eq!(parse(None, Some("shop")), "None Some(\"shop\")");
        assert_eq!(parse(Some("fd00::1"), None), "Some(fd00::1) None");
        assert_eq!(parse(Some("shop/web"), None), "shop/web");
        assert_eq!(parse(Some("shop/web"), Some("shop")), "shop/web");
        assert_eq!(parse(Some("web"), Some("shop")), "shop/web");
        assert!(parse(Some("shop/web"), Some("x")).contains("another namespace"));
        assert!(parse(Some("web"), None).contains("namespace/web"));
    }
}
