//! `rustnet monitor`: drops, and new flows where the agent asks for them, as `rn_events` delivers them.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use aya::maps::{Map, MapData, RingBuf};
use k8s_openapi::jiff::Timestamp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::event::Event;
use rustnet_common::names::map;
use rustnet_common::tuple::proto;
use serde::Serialize;

use super::Places;
use super::endpoints::{self, by_address};
use super::output::{Output, line};

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
    hint: &'static str,
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

/// Prints events until told to stop.
pub fn run(places: &Places, args: &Args, out: &Output) -> Result<()> {
    let path = places.bpffs()?.join(map::EVENTS);
    let data = MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))?;
    let mut ring = RingBuf::try_from(Map::RingBuf(data)).with_context(|| format!("reading {}", path.display()))?;
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let began = monotonic()?;
    let mut names = Names::read(places);
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
            if (old && !args.past) || (args.drops && event.reason == 0) {
                continue;
            }
            print(&row(&event, &names)?, out)?;
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

fn row(event: &Event, names: &Names) -> Result<Row> {
    let reason = DropReason::from_code(event.reason).filter(|reason| *reason != DropReason::Forwarded);
    let end = |addr, port| SocketAddr::new(IpAddr::from(addr), port);
    let (src, dst) = (end(event.src, event.sport), end(event.dst, event.dport));
    Ok(Row {
        time: wall_clock(Duration::from_nanos(event.time))?,
        hook: hook::NAMES.get(usize::from(event.hook)).copied().unwrap_or("unknown"),
        verdict: if event.reason == 0 { "flow" } else { "drop" },
        reason: reason.map(DropReason::name),
        protocol: proto::name(event.proto),
        src_pod: names.names.get(&src.ip()).cloned(),
        dst_pod: names.names.get(&dst.ip()).cloned(),
        src,
        dst,
        ifindex: event.ifindex,
        length: event.len,
        hint: reason.map_or("", DropReason::hint),
    })
}

/// A moment of the kernel's clock as a date.
fn wall_clock(at: Duration) -> Result<String> {
    let (now, wall) = (monotonic()?, SystemTime::now());
    let then = wall.checked_sub(now.saturating_sub(at)).context("an event from before the epoch")?;
    let stamp = Timestamp::try_from(then).context("an event at an impossible time")?;
    Ok(format!("{stamp:.3}"))
}

fn print(row: &Row, out: &Output) -> Result<()> {
    if out.is_json() {
        return line(&serde_json::to_string(row)?);
    }
    let end = |socket: &SocketAddr, pod: &Option<String>| match pod {
        Some(pod) => format!("{pod} ({socket})"),
        None => socket.to_string(),
    };
    let Row { time, hook, verdict, protocol, length, hint, .. } = row;
    let reason = row.reason.map(|reason| format!(" {reason}")).unwrap_or_default();
    let hint = if hint.is_empty() { String::new() } else { format!("  # {hint}") };
    let (src, dst) = (end(&row.src, &row.src_pod), end(&row.dst, &row.dst_pod));
    line(&format!("{time} {hook} {verdict}{reason} {protocol} {src} -> {dst} {length} B{hint}"))
}
