//! `rustnetctl peers`: what the programs know of addresses that are not this node's pods, from `rn_peers4/6`.

use std::net::IpAddr;

use anyhow::Result;
use ipnet::IpNet;
use rustnet_common::addr::{Addr, Address};
use rustnet_common::peer::{Peer, flags, identity};
use serde::Serialize;

use super::Places;
use super::output::Output;
use crate::bpf::store;

/// A range of Services, of which packets reach what has a Service alone.
const SERVICES: &str = "services";

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    prefix: IpNet,
    kind: &'static str,
    node: Option<IpAddr>,
    tunnel: bool,
    masquerade: bool,
    identity: u32,
}

/// Prints the peers.
pub fn run(places: &Places, out: &Output) -> Result<()> {
    let rows: Vec<Row> = store::peers(places.bpffs()?)?.iter().map(|(prefix, peer)| read(*prefix, peer)).collect();
    out.print(&rows, &["PREFIX", "KIND", "NODE", "PATH", "IDENTITY"], || rows.iter().map(line).collect())
}

fn read(prefix: IpNet, peer: &Peer) -> Row {
    let has = |flag| peer.flags & flag != 0;
    let kind = [
        (flags::HOST, "this host"),
        (flags::NODE, "node"),
        (flags::POD, "pods"),
        (flags::LOCAL_PODS, "pods here"),
        (flags::NO_MASQ, "not masqueraded"),
        (flags::SERVICES, SERVICES),
    ];
    Row {
        prefix,
        kind: kind.iter().find(|(flag, _)| has(*flag)).map_or("other", |(_, name)| name),
        node: (peer.node != Addr::UNSPECIFIED).then(|| peer.node.into()),
        tunnel: has(flags::TUNNEL),
        masquerade: !has(flags::NO_MASQ | flags::POD | flags::NODE | flags::HOST | flags::LOCAL_PODS | flags::SERVICES),
        identity: peer.identity,
    }
}

fn line(row: &Row) -> Vec<String> {
    let identity = match row.identity {
        identity::HOST => "host".to_owned(),
        identity::WORLD => "world".to_owned(),
        identity::POD => "pod".to_owned(),
        identity::NODE => "node".to_owned(),
        other => other.to_string(),
    };
    vec![
        row.prefix.to_string(),
        row.kind.to_owned(),
        row.node.map_or_else(|| "-".to_owned(), |ip| ip.to_string()),
        match row.kind {
            SERVICES => "-",
            _ if row.tunnel => "overlay",
            _ => "routes",
        }
        .to_owned(),
        identity,
    ]
}

#[cfg(test)]
mod tests {
    use super::{Peer, flags, identity, line, read};
    use crate::cli::golden::assert_golden;
    use rustnet_common::addr::{Addr, Address};
    use std::net::IpAddr;

    #[test]
    fn its_json_is_an_interface() {
        let node = Addr::from("192.0.2.2".parse::<IpAddr>().unwrap());
        let peer = Peer { node, identity: identity::POD, flags: flags::POD | flags::TUNNEL, pad: 0 };
        assert_golden("peers", &[read("10.1.2.0/24".parse().unwrap(), &peer)]);
    }

    #[test]
    fn ranges_of_services_lead_nowhere() {
        let peer = Peer { node: Addr::UNSPECIFIED, identity: identity::WORLD, flags: flags::SERVICES, pad: 0 };
        let row = read("10.96.0.0/16".parse().unwrap(), &peer);
        assert_eq!(line(&row).join(" "), "10.96.0.0/16 services - - world");
    }
}
