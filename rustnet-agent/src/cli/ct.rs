//! `rustnetctl ct list`: connections as the programs track them, from the connection tables.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use bytemuck::Pod;
use ipnet::IpNet;
use rustnet_common::addr::{Address, Ip4, Ip6};
use rustnet_common::conntrack::{CtEntry, flags, lifetime, state};
use rustnet_common::tuple::{Tuple, proto};
use serde::Serialize;

use super::Places;
use super::output::{Output, span, thousands};
use crate::bpf::load::{CLOCK, program_path};
use crate::bpf::probe::{age, jiffies};
use crate::bpf::store::conntrack::Conntrack;
use crate::bpf::store::node_config::NodeConfigStore;
use crate::bpf::{store::Map, sys};

/// Filters.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only from this address or range
    #[arg(long, value_parser = net)]
    src: Option<IpNet>,
    /// Only to this address or range, before or after translation
    #[arg(long, value_parser = net)]
    dst: Option<IpNet>,
    /// Only to this port, before or after translation
    #[arg(long)]
    port: Option<u16>,
    /// Only this protocol: tcp, udp, icmp, sctp, or a number
    #[arg(long, value_parser = protocol)]
    proto: Option<u8>,
    /// Only connections whose backend has this number (see `rustnetctl services`)
    #[arg(long)]
    backend: Option<u32>,
    /// The reply direction of translated flows as well
    #[arg(long)]
    all: bool,
    /// At most so many
    #[arg(long, default_value_t = 1000)]
    limit: usize,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    protocol: &'static str,
    src: SocketAddr,
    dst: SocketAddr,
    /// What the packets become, if that is something else.
    translated: Option<Ends>,
    state: Vec<&'static str>,
    flags: Vec<&'static str>,
    idle_seconds: u64,
    expires_in_seconds: u64,
    backend: u32,
    packets: u64,
    bytes: u64,
    #[serde(skip)]
    proto: u8,
}

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    connections: Vec<Row>,
    /// How many there are; those beyond `--limit` are not in the list.
    found: usize,
    truncated: bool,
}

/// The time as the programs tell it.
struct Clock {
    now: u32,
    hz: u32,
}

/// Prints connections.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<()> {
    let clock = clock(places)?;
    let tables = Conntrack::open(places.bpffs()?)?;
    let mut rows = Vec::new();
    for table in tables.v4.both() {
        read::<Ip4>(table, args, &clock, &mut rows)?;
    }
    for table in tables.v6.both() {
        read::<Ip6>(table, args, &clock, &mut rows)?;
    }
    rows.sort_by_key(|row| (row.idle_seconds, row.src, row.dst));
    let found = rows.len();
    rows.truncate(args.limit);
    let report = Report { truncated: found > rows.len(), found, connections: rows };
    let rows = &report.connections;
    let header = ["PROTOCOL", "SOURCE", "DESTINATION", "TRANSLATED", "STATE", "IDLE", "BACKEND", "PACKETS", "FLAGS"];
    out.print(&report, &header, || rows.iter().map(line).collect())?;
    if report.truncated && !out.is_json() {
        eprintln!("{} of {found} connections shown: raise --limit, or filter", rows.len());
    }
    Ok(())
}

fn clock(places: &Places) -> Result<Clock> {
    let path = program_path(places.bpffs()?, CLOCK);
    let program = sys::obj_get(&path).with_context(|| format!("opening {}", path.display()))?;
    let hz = NodeConfigStore::open(places.bpffs()?)?.read()?.hz.max(1);
    Ok(Clock { now: jiffies(program.as_fd())?, hz })
}

fn read<A>(table: &Map<Tuple<A>, CtEntry<A>>, args: &Args, clock: &Clock, rows: &mut Vec<Row>) -> Result<()>
where
    A: Address,
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    table.for_each(|key, entry| {
        if args.all || entry.flags & flags::REPLY == 0 {
            rows.extend(Some(row(key, entry, clock)).filter(|row| args.matches(row)));
        }
    })
}

/// Source and destination.
pub type Ends = (SocketAddr, SocketAddr);

/// The ends of a tuple.
pub fn ends<A: Address>(tuple: &Tuple<A>) -> Ends {
    let ip = |a: A| IpAddr::from(a.to_addr());
    (SocketAddr::new(ip(tuple.src), tuple.sport), SocketAddr::new(ip(tuple.dst), tuple.dport))
}

fn row<A: Address>(key: &Tuple<A>, entry: &CtEntry<A>, clock: &Clock) -> Row {
    let (src, dst) = ends(&entry.tuple(key));
    let translated = (entry.flags & flags::NAT != 0).then(|| ends(&entry.to));
    let sender = &entry.sides[0];
    let idle = u64::from(age(clock.now, entry.seen) / clock.hz);
    Row {
        protocol: proto::name(key.proto),
        src,
        dst,
        translated,
        state: states(key.proto, entry.state),
        flags: flag_names(entry.flags),
        idle_seconds: idle,
        expires_in_seconds: u64::from(lifetime(key.proto, entry.state)).saturating_sub(idle),
        backend: entry.backend,
        packets: u64::from(sender.packets),
        bytes: sender.bytes,
        proto: key.proto,
    }
}

/// A live flow to a backend, in the direction that opened it.
pub struct Flow {
    /// IP protocol number.
    pub proto: u8,
    /// Where the client asks.
    pub asked: SocketAddr,
    /// Where its packets go.
    pub led_to: SocketAddr,
    /// Id of the backend.
    pub backend: u32,
}

/// Calls `visit` for each live flow to a backend: one that has not expired and does not end.
pub fn for_each_backend_flow(places: &Places, mut visit: impl FnMut(Flow)) -> Result<()> {
    let clock = clock(places)?;
    let tables = Conntrack::open(places.bpffs()?)?;
    for table in tables.v4.both() {
        backend_flows::<Ip4>(table, &clock, &mut visit)?;
    }
    for table in tables.v6.both() {
        backend_flows::<Ip6>(table, &clock, &mut visit)?;
    }
    Ok(())
}

fn backend_flows<A>(table: &Map<Tuple<A>, CtEntry<A>>, clock: &Clock, visit: &mut impl FnMut(Flow)) -> Result<()>
where
    A: Address,
    Tuple<A>: Pod,
    CtEntry<A>: Pod,
{
    table.for_each(|key, entry| visit_flow(key, entry, clock, visit))
}

fn visit_flow<A: Address>(key: &Tuple<A>, entry: &CtEntry<A>, clock: &Clock, visit: &mut impl FnMut(Flow)) {
    let idle = age(clock.now, entry.seen) / clock.hz;
    let is_live = idle < lifetime(key.proto, entry.state) && !state::is_closing(entry.state);
    if is_live && entry.backend != 0 && entry.flags & flags::REPLY == 0 {
        let (asked, led_to) = (ends(&entry.tuple(key)).1, ends(&entry.to).1);
        visit(Flow { proto: key.proto, asked, led_to, backend: entry.backend });
    }
}

fn states(protocol: u8, bits: u64) -> Vec<&'static str> {
    let names =
        [(state::FIN_ORIG, "fin"), (state::FIN_REPLY, "fin-reply"), (state::RST_ORIG | state::RST_REPLY, "reset")];
    let mut out: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    out.insert(
        0,
        match (protocol, bits) {
            (proto::TCP, bits) if bits & state::ESTABLISHED != 0 => "established",
            (proto::TCP, bits) if bits & state::ANSWERED != 0 => "syn-received",
            (_, bits) if bits & state::ANSWERED != 0 => "answered",
            _ => "unanswered",
        },
    );
    out
}

fn flag_names(bits: u16) -> Vec<&'static str> {
    let names = [
        (flags::REPLY, "reply"),
        (flags::NAT, "nat"),
        (flags::HAIRPIN, "hairpin"),
        (flags::MASQ, "masquerade"),
        (flags::FROM_HOST, "host"),
        (flags::DIRECT, "dsr"),
    ];
    names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

impl Args {
    fn matches(&self, row: &Row) -> bool {
        let to = |test: &dyn Fn(SocketAddr) -> bool| test(row.dst) || row.translated.is_some_and(|(_, dst)| test(dst));
        self.src.is_none_or(|net| net.contains(&row.src.ip()))
            && self.dst.is_none_or(|net| to(&|dst| net.contains(&dst.ip())))
            && self.port.is_none_or(|port| to(&|dst| dst.port() == port))
            && self.proto.is_none_or(|proto| proto == row.proto)
            && self.backend.is_none_or(|backend| backend == row.backend)
    }
}

fn line(row: &Row) -> Vec<String> {
    let translated = row.translated.map_or_else(|| "-".to_owned(), |ends| change((row.src, row.dst), ends));
    let or_dash = |words: &[&str]| if words.is_empty() { "-".to_owned() } else { words.join(",") };
    vec![
        row.protocol.to_owned(),
        row.src.to_string(),
        row.dst.to_string(),
        translated,
        or_dash(&row.state),
        span(row.idle_seconds),
        if row.backend == 0 { "-".to_owned() } else { row.backend.to_string() },
        thousands(row.packets),
        or_dash(&row.flags),
    ]
}

/// Of a translated pair, the end that changed is of interest.
pub fn change(was: Ends, becomes: Ends) -> String {
    let (src, dst) = becomes;
    if src == was.0 {
        dst.to_string()
    } else if dst == was.1 {
        format!("from {src}")
    } else {
        format!("{dst} from {src}")
    }
}

fn net(text: &str) -> Result<IpNet, String> {
    let ip = text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or(ip).map_err(|_| "give an address or a range such as 10.244.0.0/16".to_owned())
}

fn protocol(text: &str) -> Result<u8, String> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(proto::TCP),
        "udp" => Ok(proto::UDP),
        "sctp" => Ok(proto::SCTP),
        // The table has one number for both families.
        "icmp" | "icmpv6" => Ok(proto::ICMP),
        number => number.parse().map_err(|_| "give tcp, udp, icmp, sctp or a number".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Args, Clock, Report, net, protocol, row, states};
    use crate::cli::golden::assert_golden;
    use bytemuck::Zeroable;
    use rustnet_common::addr::Ip4;
    use rustnet_common::conntrack::{CtEntry, flags, state};
    use rustnet_common::tuple::{Tuple, proto};
    use std::net::Ipv4Addr;

    #[test]
    fn protocols_by_name_and_number() {
        assert_eq!(protocol("TCP"), Ok(proto::TCP));
        assert_eq!(protocol("icmpv6"), Ok(proto::ICMP));
        assert_eq!(protocol("132"), Ok(proto::SCTP));
        assert!(protocol("http").is_err());
    }

    #[test]
    fn a_service_connection_reads_well() {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2).into(), Ipv4Addr::new(10, 96, 0, 1).into());
        let key: Tuple<Ip4> = Tuple { src, dst, sport: 4000, dport: 80, proto: proto::TCP, ..Tuple::zeroed() };
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..key };
        let state = state::ANSWERED | state::ESTABLISHED;
        let flags = flags::NAT | if key.is_swapped() { flags::SWAPPED } else { 0 };
        let entry = CtEntry { to, state, flags, seen: 500, backend: 7, ..CtEntry::zeroed() };
        let row = row(&key.canonical(), &entry, &Clock { now: 1500, hz: 100 });
        let line = super::line(&row);
        let want = ["TCP", "10.0.0.2:4000", "10.96.0.1:80", "10.0.1.9:8080", "established", "10s", "7", "0", "nat"];
        assert_eq!(line, want);
        assert_golden("ct-list", &Report { connections: vec![row], found: 2, truncated: true });
    }

    #[test]
    fn flows_to_backends_are_those_that_live_in_the_direction_of_the_opener() {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2).into(), Ipv4Addr::new(10, 96, 0, 1).into());
        let key: Tuple<Ip4> = Tuple { src, dst, sport: 4000, dport: 80, proto: proto::TCP, ..Tuple::zeroed() };
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..key };
        let swapped = if key.is_swapped() { flags::SWAPPED } else { 0 };
        let live = CtEntry { to, state: 0, flags: flags::NAT | swapped, seen: 900, backend: 7, ..CtEntry::zeroed() };
        let clock = Clock { now: 1000, hz: 100 };
        for (entry, want) in [
            (live, 1),
            (CtEntry { backend: 0, ..live }, 0),
            (CtEntry { flags: live.flags | flags::REPLY, ..live }, 0),
            (CtEntry { state: state::RST_ORIG, ..live }, 0),
            (CtEntry { seen: 1000_u32.wrapping_sub(120 * 100), ..live }, 0),
        ] {
            let mut found = Vec::new();
            super::visit_flow(&key.canonical(), &entry, &clock, &mut |flow| {
                found.push((flow.proto, flow.asked.to_string(), flow.led_to.to_string(), flow.backend));
            });
            let flow = (proto::TCP, "10.96.0.1:80".to_owned(), "10.0.1.9:8080".to_owned(), 7);
            assert_eq!(found, vec![flow; want], "{entry:?}");
        }
    }

    #[test]
    fn closing_states_are_listed() {
        assert_eq!(states(proto::TCP, state::ANSWERED | state::ESTABLISHED | state::FIN_ORIG), ["established", "fin"]);
        assert_eq!(states(proto::TCP, state::ANSWERED), ["syn-received"]);
        assert_eq!(states(proto::UDP, 0), ["unanswered"]);
        for reset in [state::RST_ORIG, state::RST_REPLY] {
            assert_eq!(states(proto::TCP, state::ANSWERED | reset), ["syn-received", "reset"]);
        }
    }

    #[test]
    fn filters_look_at_both_sides_of_a_translation() {
        let (src, dst) = (Ipv4Addr::new(10, 0, 0, 2).into(), Ipv4Addr::new(10, 96, 0, 1).into());
        let key: Tuple<Ip4> = Tuple { src, dst, sport: 4000, dport: 80, proto: proto::TCP, ..Tuple::zeroed() };
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..key };
        let flags = flags::NAT | if key.is_swapped() { flags::SWAPPED } else { 0 };
        let entry = CtEntry { to, flags, ..CtEntry::zeroed() };
        let row = row(&key.canonical(), &entry, &Clock { now: 0, hz: 100 });
        let all = || Args { src: None, dst: None, port: None, proto: None, backend: None, all: false, limit: 1 };
        for (dst, port, want) in [
            ("10.96.0.1", 80, true),
            ("10.0.1.9", 8080, true),
            ("10.0.0.0/8", 8080, true),
            ("10.0.0.2", 80, false),
            ("10.96.0.1", 4000, false),
        ] {
            let dst = Some(net(dst).expect("a range"));
            assert_eq!(Args { dst, port: Some(port), ..all() }.matches(&row), want, "{dst:?} {port}");
        }
    }
}
