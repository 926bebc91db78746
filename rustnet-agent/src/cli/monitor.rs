//! `rustnetctl monitor`: drops, and new flows where the agent asks for them, as `rn_events` delivers them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, RingBuf};
use bytemuck::Pod;
use k8s_openapi::jiff::Timestamp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use rustnet_common::addr::Address;
use rustnet_common::conntrack::{CtEntry, flags};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::event::Event;
use rustnet_common::names::map;
use rustnet_common::tuple::{Tuple, proto};
use serde::Serialize;

use super::Places;
use super::ct::{Ends, change, ends};
use super::endpoints::{self, by_address};
use super::output::{Output, line};
use super::policy::explain::{Dropped, Explainer, Explanation};
use super::reader::Reader;
use crate::bpf::store::conntrack::{Conntrack, Tables};

/// Pods come and go: their names are read again this often.
const NAMES_PERIOD: Duration = Duration::from_secs(1);

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only drops, no new flows
    #[arg(long)]
    drops: bool,
    /// What was recorded before now, too
    #[arg(long)]
    past: bool,
    /// Stop after so many
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Stop after so many seconds
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    time: String,
    hook: &'static str,
    verdict: &'static str,
    reason: Option<&'static str>,
    protocol: &'static str,
    src: SocketAddr,
    src_pod: Option<String>,
    dst: SocketAddr,
    dst_pod: Option<String>,
    ifindex: u32,
    length: u32,
    /// What a new flow's packets become, where that is something else: its backend, the masquerade.
    translated: Option<Ends>,
    hint: &'static str,
    /// Of a drop by network policies: who denies it by the maps as they are now.
    policy: Option<Explanation>,
}

/// Names of this node's pods by address.
struct Names {
    names: BTreeMap<IpAddr, String>,
    read: Instant,
}

impl Names {
    fn read(places: &Places) -> Self {
        // Names are an ornament: without records, addresses must do.
        let names = by_address(places).and_then(|records| endpoints::names(places, &records));
        Self { names: names.unwrap_or_default(), read: Instant::now() }
    }
}

/// Prints events until the time or the count is reached, or a signal stops it.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<()> {
    let _reader = Reader::begin(places.bpffs()?)?;
    let path = places.bpffs()?.join(map::EVENTS);
    let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    let mut ring = RingBuf::try_from(Map::RingBuf(data)).with_context(|| format!("reading {}", path.display()))?;
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let began = monotonic()?;
    let mut names = Names::read(places);
    let connections = Conntrack::open(places.bpffs()?)?;
    let mut explainer = Explainer::default();
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let timeout = match end.map(|end| end.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Ok(()),
            Some(left) => left.min(NAMES_PERIOD),
            None => NAMES_PERIOD,
        };
        // SAFETY: the ring owns its descriptor and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout).context("waiting for events")?;
        if names.read.elapsed() > NAMES_PERIOD {
            names = Names::read(places);
        }
        while let Some(item) = ring.next() {
            let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&item) else { continue };
            let old = u128::from(event.time) < began.as_nanos();
            if (old && !args.past) || (args.drops && !is_drop(event.reason)) {
                continue;
            }
            let row = row(&event, &names, &connections)?;
            print(&Row { policy: explain(&event, &row, places, &mut explainer), ..row }, out)?;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    Ok(())
}

fn monotonic() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC).context("reading the clock")?.into())
}

/// True of a reason that this release does not know, too.
fn is_drop(reason: u8) -> bool {
    DropReason::from_code(reason).is_none_or(DropReason::is_drop)
}

fn row(event: &Event, names: &Names, connections: &Conntrack) -> Result<Row> {
    let reason = DropReason::from_code(event.reason).filter(|reason| *reason != DropReason::Forwarded);
    let end = |addr, port| SocketAddr::new(IpAddr::from(addr), port);
    let (src, dst) = (end(event.src, event.sport), end(event.dst, event.dport));
    Ok(Row {
        time: wall_clock(Duration::from_nanos(event.time))?,
        hook: hook::NAMES.get(usize::from(event.hook)).copied().unwrap_or("unknown"),
        translated: if is_drop(event.reason) { None } else { translated(event, connections)? },
        verdict: match reason {
            None => "flow",
            Some(DropReason::PolicyAudited) => "audit",
            Some(_) => "drop",
        },
        reason: reason.map(DropReason::name),
        protocol: proto::name(event.proto),
        src_pod: names.names.get(&src.ip()).cloned(),
        dst_pod: names.names.get(&dst.ip()).cloned(),
        src,
        dst,
        ifindex: event.ifindex,
        length: event.len,
        hint: reason.map_or("", DropReason::hint),
        policy: None,
    })
}

/// Who denies a flow that policies dropped; `None` for any other event.
fn explain(event: &Event, row: &Row, places: &Places, explainer: &mut Explainer) -> Option<Explanation> {
    let is_by_policy = [DropReason::PolicyDenied, DropReason::PolicyUndecided, DropReason::PolicyAudited];
    let is_by_policy = is_by_policy.map(|reason| reason as u8);
    let dropped = Dropped { src: row.src, dst: row.dst, proto: event.proto };
    is_by_policy.contains(&event.reason).then(|| explainer.explain(places, &dropped)).flatten()
}

/// What a new flow becomes, as the connection table says; nothing once it is over.
fn translated(event: &Event, connections: &Conntrack) -> Result<Option<Ends>> {
    fn find<A: Address + Ord>(tables: &Tables<A>, event: &Event) -> Result<Option<Ends>>
    where
        Tuple<A>: Pod,
        CtEntry<A>: Pod,
    {
        let Event { sport, dport, proto, .. } = *event;
        let (src, dst) = (A::from_addr(event.src), A::from_addr(event.dst));
        let key = Tuple { src, dst, sport, dport, proto, pad: 0, pad2: 0 };
        let translated = tables.find(&key)?.filter(|(_, entry)| entry.flags & flags::NAT != 0);
        Ok(translated.map(|(_, entry)| ends(&entry.to)))
    }
    if IpAddr::from(event.src).is_ipv4() { find(&connections.v4, event) } else { find(&connections.v6, event) }
}

/// A moment of the kernel's clock as a date.
fn wall_clock(at: Duration) -> Result<String> {
    let (now, wall) = (monotonic()?, SystemTime::now());
    let then = wall.checked_sub(now.saturating_sub(at)).context("an event from before the epoch")?;
    let stamp = Timestamp::try_from(then).context("an event at an impossible time")?;
    Ok(format!("{stamp:.3}"))
}

fn print(row: &Row, out: &Output) -> Result<()> {
    line(&if out.is_json() { serde_json::to_string(row)? } else { text(row) })
}

fn text(row: &Row) -> String {
    let explained = |of: fn(&Explanation) -> &Option<String>| row.policy.as_ref().and_then(|it| of(it).as_ref());
    let (src_pod, dst_pod) = (explained(|it| &it.src_pod), explained(|it| &it.dst_pod));
    let end = |socket: &SocketAddr, pod: Option<&String>| match pod {
        Some(pod) => format!("{pod} ({socket})"),
        None => socket.to_string(),
    };
    let Row { time, hook, verdict, protocol, length, hint, .. } = row;
    let reason = row.reason.map(|reason| format!(" {reason}")).unwrap_or_default();
    let becomes = row.translated.map(|becomes| format!(" => {}", change((row.src, row.dst), becomes)));
    let hint = row.policy.as_ref().map_or(*hint, |it| &it.text);
    let hint = if hint.is_empty() { String::new() } else { format!("  # {hint}") };
    let src = end(&row.src, row.src_pod.as_ref().or(src_pod));
    let dst = end(&row.dst, row.dst_pod.as_ref().or(dst_pod));
    format!("{time} {hook} {verdict}{reason} {protocol} {src} -> {dst}{} {length} B{hint}", becomes.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::{Conntrack, CtEntry, Event, Instant, Names, Tuple, flags, proto, row, text};
    use crate::bpf::store::conntrack::build::tables;
    use crate::cli::golden::assert_golden;
    use crate::cli::policy::explain::tests::explanation;
    use bytemuck::Zeroable;
    use rustnet_common::addr::{Addr, Ip4};
    use rustnet_common::drop::{DropReason, hook};
    use std::net::{IpAddr, Ipv4Addr};

    const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

    fn names() -> Names {
        Names { names: [(CLIENT.into(), "shop/web-0".to_owned())].into(), read: Instant::now() }
    }

    fn event(reason: u8) -> Event {
        let addr = |ip: Ipv4Addr| Addr::from(IpAddr::from(ip));
        Event {
            src: addr(CLIENT),
            dst: addr(VIP),
            sport: 4000,
            dport: 80,
            proto: proto::TCP,
            reason,
            hook: hook::FROM_POD,
            len: 74,
            ..Event::zeroed()
        }
    }

    #[test]
    fn its_json_is_an_interface() {
        let row = row(&event(DropReason::Spoofed as u8), &names(), &tables()).unwrap();
        let row = super::Row { time: "2026-11-28T12:00:00.000Z".into(), ..row };
        assert_golden("monitor", &row);
        assert_golden("monitor_policy", &super::Row { policy: Some(explanation()), ..row });
    }

    #[test]
    fn a_drop_by_policies_names_who_denies_it() {
        let row = row(&event(DropReason::PolicyDenied as u8), &names(), &tables()).unwrap();
        let shown = text(&super::Row { policy: Some(explanation()), ..row });
        let want = "policy_denied TCP shop/web-0 (10.0.0.2:4000) -> shop/db-0 (10.96.0.1:80) 74 B  # as a new flow, ingress: shop/db-0 \
                    (10.1.1.1) is isolated for ingress by shop/db, shop/base;";
        assert!(shown.contains(want), "{shown}");
    }

    /// The text behind the time.
    fn shown(event: &Event, connections: &Conntrack) -> (String, serde_json::Value) {
        let row = row(event, &names(), connections).unwrap();
        (text(&row).split_once(' ').unwrap().1.to_owned(), serde_json::to_value(&row).unwrap())
    }

    #[test]
    fn a_new_flow_tells_its_backend() {
        let tables = tables();
        let (plain, json) = shown(&event(0), &tables);
        assert_eq!(plain, "from_pod flow TCP shop/web-0 (10.0.0.2:4000) -> 10.96.0.1:80 74 B");
        assert_eq!((&json["verdict"], &json["reason"], &json["translated"]), (&"flow".into(), &().into(), &().into()));
        let key: Tuple<Ip4> =
            Tuple { src: CLIENT.into(), dst: VIP.into(), sport: 4000, dport: 80, proto: proto::TCP, ..Tuple::zeroed() };
        let to = Tuple { dst: Ipv4Addr::new(10, 0, 1, 9).into(), dport: 8080, ..key };
        let flags = flags::NAT | if key.is_swapped() { flags::SWAPPED } else { 0 };
        tables.v4.tcp.put(&key.canonical(), &CtEntry { to, flags, ..CtEntry::zeroed() }).unwrap();
        let (plain, json) = shown(&event(0), &tables);
        assert_eq!(plain, "from_pod flow TCP shop/web-0 (10.0.0.2:4000) -> 10.96.0.1:80 => 10.0.1.9:8080 74 B");
        assert_eq!(json["translated"], serde_json::json!(["10.0.0.2:4000", "10.0.1.9:8080"]));
        // A drop is of the packet as it came.
        let (plain, json) = shown(&event(DropReason::NoBackend as u8), &tables);
        assert!(plain.starts_with("from_pod drop no_backend TCP shop/web-0 (10.0.0.2:4000) -> 10.96.0.1:80 74 B  # "));
        assert_eq!((&json["verdict"], &json["translated"]), (&"drop".into(), &().into()));
    }
}
