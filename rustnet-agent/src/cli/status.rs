//! `rustnetctl status`: is everything in its place? Read from pins, maps and files; the agent is asked how it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustnet_common::drop::{DropReason, hook};
use rustnet_common::names::{
    LINKS_DIR, OVERLAY_DEV, PROGRAMS, SOCKET_PROGRAMS, TAILS_MAP, UNATTACHED, VETH_PREFIX, map,
};
use rustnet_common::socket::netns;
use serde::Serialize;

use super::maps::percent;
use super::output::{Output, json, line as print, thousands};
use super::{Places, endpoints};
use crate::args::settings;
use crate::bpf::attach::{Direction, program_of};
use crate::bpf::load::{CLOCK, program_path};
use crate::bpf::store::counters::Counters;
use crate::bpf::store::endpoints::Endpoints;
use crate::bpf::store::fill;
use crate::bpf::store::node_config::NodeConfigStore;
use crate::bpf::store::sockets::Sockets;
use crate::bpf::{cgroup, sys, xdp};
use crate::config::{OverlayPath, SocketLb, Xdp};
use crate::doctor::finding::Mark;
use crate::doctor::overlay;
use crate::net::endpoints as records;
use crate::net::ipsec::Ipsec;
use crate::net::link::Link;
use crate::net::netlink::Socket;
use crate::net::{link, tc};
use crate::nodefile;
use crate::reconcile::overlay_path::Choice;

/// A map fuller than this many per cent deserves a word.
const NEARLY_FULL: f64 = 85.0;
/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Options.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only what is not well
    #[arg(long)]
    brief: bool,
    /// Wait at most so many seconds until all is well
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
}

/// One thing that can be well or not.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// What it is.
    pub name: String,
    /// How it stands.
    pub status: Mark,
    /// In words.
    pub detail: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    ok: bool,
    checks: Vec<Line>,
}

/// Prints the status; true if nothing is bad.
pub fn run(find: impl Fn() -> Result<Places>, args: &Args, out: &Output) -> Result<bool> {
    let end = Instant::now() + Duration::from_secs(args.wait.unwrap_or(0));
    let mut report = Report::of(check(&find()?));
    while !report.ok && Instant::now() < end {
        sleep(Duration::from_millis(200));
        // An agent that starts for the first time tells only now where it pins.
        report = Report::of(check(&find()?));
    }
    if args.brief {
        report.checks.retain(|line| line.status != Mark::Ok);
    }
    if out.is_json() {
        json(&report)?;
        return Ok(report.ok);
    }
    let width = report.checks.iter().map(|line| line.name.len()).max().unwrap_or(0);
    for line in &report.checks {
        print(&format!(
            "{:width$}  {} {}",
            format!("{}:", line.name),
            out.mark(line.status),
            line.detail,
            width = width + 1
        ))?;
    }
    Ok(report.ok)
}

impl Report {
    fn of(checks: Vec<Line>) -> Self {
        Self { ok: checks.iter().all(|line| line.status != Mark::Bad), checks }
    }
}

/// All lines.
pub fn check(places: &Places) -> Vec<Line> {
    let mut checks = vec![agent(places), node(places), pins(places)];
    // Without pins, all that follows would say the same.
    if checks[2].status == Mark::Ok {
        checks.push(line("Hooks", hooks(places)));
        checks.extend(overlay_line(places).transpose().map(|result| line("Overlay path", result)));
        checks.extend(xdp_line(places).transpose().map(|result| line("XDP", result)));
        checks.push(line("Sockets", sockets(places)));
        checks.push(line("Endpoints", pods(places)));
        checks.push(line("Classifiers", classifiers(places)));
        match places.bpffs().and_then(fill::read) {
            Ok(fills) => checks.extend(fills.iter().map(map_line)),
            Err(error) => checks.push(bad("Maps", &error)),
        }
        checks.push(line("Packets", packets(places)));
    }
    checks
}

fn line(name: &str, result: Result<(Mark, String)>) -> Line {
    match result {
        Ok((status, detail)) => Line { name: name.to_owned(), status, detail },
        Err(error) => bad(name, &error),
    }
}

fn bad(name: &str, error: &anyhow::Error) -> Line {
    Line { name: name.to_owned(), status: Mark::Bad, detail: format!("{error:#}") }
}

/// Asks the agent itself. Its absence is no failure of forwarding, but nothing changes until it is back.
fn agent(places: &Places) -> Line {
    let recorded = places.agent.as_ref();
    let Some(addr) = recorded.and_then(|agent| agent.health_addr) else {
        let detail = match recorded {
            Some(_) => "serves no probes (health-addr off)".to_owned(),
            None => format!("no agent has run with {}", places.run_dir.display()),
        };
        let status = if recorded.is_some() { Mark::Warning } else { Mark::Bad };
        return Line { name: "Agent".into(), status, detail };
    };
    line(
        "Agent",
        match ask(addr, "/readyz") {
            Ok((200, body)) => {
                let ready = format!("ready, version {}", recorded.map_or("?", |a| a.version.as_str()));
                Ok(match body.trim().split_once('\n') {
                    Some((_, problems)) => (Mark::Warning, format!("{ready}; {}", problems.replace('\n', "; "))),
                    None => (Mark::Ok, ready),
                })
            }
            Ok((code, body)) => Ok((Mark::Bad, format!("not ready ({code}): {}", body.trim()))),
            Err(error) => {
                Ok((Mark::Bad, format!("does not answer at {addr} ({error:#}); forwarding goes on without it")))
            }
        },
    )
}

/// The status code and body of a GET.
fn ask(addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("not HTTP")?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("not HTTP")?;
    Ok((code, body.to_owned()))
}

fn node(places: &Places) -> Line {
    let read = nodefile::read(&places.run_dir).map(|file| {
        let Some(file) = file else {
            let why = "node.json is missing: no agent has been ready here, so that no pod can be added";
            return (Mark::Bad, why.to_owned());
        };
        if let Some(why) = file.not_ready {
            return (Mark::Bad, why);
        }
        let cidrs: Vec<_> = file.pod_cidrs.iter().map(ToString::to_string).collect();
        (Mark::Ok, format!("{}, pods {}, MTU {}", file.node_name, cidrs.join(" "), file.mtu))
    });
    line("Node", read)
}

fn pins(places: &Places) -> Line {
    line("Pins", places.bpffs().map(check_pins))
}

fn check_pins(bpffs: &Path) -> (Mark, String) {
    let programs = PROGRAMS.iter().chain(&UNATTACHED).chain(&[TAILS_MAP, CLOCK]).map(|name| program_path(bpffs, name));
    let maps = map::ALL.iter().map(|name| bpffs.join(name));
    let paths: Vec<_> = programs.chain(maps).collect();
    let error = |path: &PathBuf| sys::obj_get(path).err().map(|e| format!("{} ({e})", path.display()));
    let missing: Vec<_> = paths.iter().filter_map(error).collect();
    if missing.is_empty() {
        (Mark::Ok, format!("{} programs and maps in {}", paths.len(), bpffs.display()))
    } else {
        (Mark::Bad, format!("cannot open {}", missing.join(", ")))
    }
}

/// The links, and whether their devices live; without TCX, the filters in place of them.
fn hooks(places: &Places) -> Result<(Mark, String)> {
    let dir = places.bpffs()?.join(LINKS_DIR);
    let mut socket = Socket::open()?;
    let links = link::list(&mut socket)?;
    let (mut alive, mut dead) = (Vec::new(), Vec::new());
    let mut attached = BTreeSet::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if cgroup::is_link(&path) || xdp::is_link(&path) {
            continue;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fd = sys::obj_get(&path).with_context(|| format!("opening {}", path.display()))?;
        let info = sys::link_info(fd.as_fd()).with_context(|| format!("asking about {}", path.display()))?;
        let Some(link) = links.iter().find(|link| link.index == info.ifindex) else {
            dead.push(format!("{file} (its device is gone)"));
            continue;
        };
        let program = program_of(&path).unwrap_or(&file);
        let name = if program == file { file.clone() } else { format!("{program} ({})", link.name) };
        attached.insert((program.to_owned(), link.index));
        if link.is_up() {
            alive.push(name);
        } else {
            dead.push(format!("{name} ({} is down)", link.name));
        }
    }
    for device in links.iter().filter(|link| !link.name.starts_with(VETH_PREFIX)) {
        for direction in Direction::BOTH {
            if let Some(filter) = tc::filter(&mut socket, device.index, direction)? {
                let place = format!("filter on {}", device.name);
                let program = program_of(Path::new(&filter.name)).unwrap_or(&filter.name);
                attached.insert((program.to_owned(), device.index));
                if device.is_up() {
                    alive.push(format!("{} ({place})", filter.name));
                } else {
                    dead.push(format!("{} ({place}, which is down)", filter.name));
                }
            }
        }
    }
    alive.sort();
    let missing = missing(&links, &attached);
    Ok(if !dead.is_empty() {
        (Mark::Bad, dead.join(", "))
    } else if !alive.is_empty() && !missing.is_empty() {
        let remedy = "a running agent puts them back within 30 s; if not, its log says why";
        (Mark::Bad, format!("missing {}; {remedy}", missing.join(", ")))
    } else if alive.is_empty() {
        (Mark::Bad, "neither links nor filters: nothing is attached to the uplink; the agent's log says why".to_owned())
    } else {
        (Mark::Ok, alive.join(" "))
    })
}

/// What belongs to what is there: each of the two programs of an uplink to the other one, and both to the overlay device.
fn missing(links: &[Link], attached: &BTreeSet<(String, u32)>) -> Vec<String> {
    let name = |code: u8| hook::NAMES[usize::from(code)];
    let uplink = [hook::UPLINK_IN, hook::UPLINK_OUT].map(name);
    let overlay = [hook::OVERLAY_IN, hook::OVERLAY_OUT].map(name);
    let has = |program: &str, device: u32| attached.contains(&(program.to_owned(), device));
    let mut missing = Vec::new();
    for link in links {
        let is_uplink = uplink.iter().any(|program| has(program, link.index));
        let wanted: &[&str] = if link.name == OVERLAY_DEV { &overlay } else { &uplink };
        if link.name == OVERLAY_DEV || is_uplink {
            let absent = wanted.iter().filter(|program| !has(program, link.index));
            missing.extend(absent.map(|program| format!("{program} on {}", link.name)));
        }
    }
    if !attached.iter().any(|(program, _)| uplink.contains(&program.as_str())) {
        missing.push(format!("{} of every uplink", uplink.join(" and ")));
    }
    missing
}

/// A setting of the agent, or its default.
fn setting<'a>(places: &'a Places, flag: &str) -> Option<&'a str> {
    let chosen = places.agent.as_ref().and_then(|agent| agent.settings.get(flag)?.last());
    chosen.map(String::as_str).or_else(|| settings::all().find(|it| it.flag == flag)?.default)
}

/// Which uplinks have the XDP program; `None` where none is to have it, and none has it.
fn xdp_line(places: &Places) -> Result<Option<(Mark, String)>> {
    let mode = setting(places, "xdp").and_then(Xdp::parse).context("the agent's settings name no mode of XDP")?;
    let attached = xdp::attached(places.bpffs()?)?;
    if mode == Xdp::Off && attached.is_empty() {
        return Ok(None);
    }
    let mut socket = Socket::open()?;
    let links = link::list(&mut socket)?;
    let names = |indexes: &mut dyn Iterator<Item = u32>| {
        let name = |index| links.iter().find(|link| link.index == index).map(|link| link.name.as_str());
        indexes.filter_map(name).collect::<Vec<_>>().join(" ")
    };
    let on = names(&mut attached.iter().copied());
    let uplinks = places.bpffs().and_then(xdp::uplinks)?;
    let without = names(&mut uplinks.into_iter().filter(|index| !attached.contains(index)));
    Ok(Some(match (mode, without.is_empty()) {
        (Xdp::Off, _) => (Mark::Warning, format!("off, but on {on}; a running agent takes it off")),
        (Xdp::Native | Xdp::NativeVeth, true) => (Mark::Ok, format!("on {on}")),
        (Xdp::Native | Xdp::NativeVeth, false) => {
            let why = "TC forwards the same packets; `rustnetctl doctor` and the agent's log say why";
            (Mark::Warning, format!("not on {without}; {why}"))
        }
    }))
}

/// Whose sockets ask for Services by themselves.
fn sockets(places: &Places) -> Result<(Mark, String)> {
    let wanted = setting(places, "socket-lb").and_then(SocketLb::parse).context("the agent's settings name nobody")?;
    let missing = cgroup::missing(places.bpffs()?)?;
    let total = SOCKET_PROGRAMS.len();
    let attached = total - missing.len();
    let off = "off (--socket-lb off); processes of this host reach no node ports of it";
    if wanted == SocketLb::Off {
        return Ok(match attached {
            0 => (Mark::Ok, off.to_owned()),
            _ => (Mark::Warning, format!("off, but {attached} programs are attached; a running agent takes them off")),
        });
    }
    let remedy = "a running agent attaches them within 30 s; if not, its log says why";
    let losses: Option<BTreeSet<_>> = missing.iter().map(|name| cgroup::loss_without(name)).collect();
    let Some(losses) = losses else {
        return Ok((Mark::Warning, format!("{attached} of {total} programs are attached; {remedy}")));
    };
    let who = who_asks(places, wanted)?;
    if losses.is_empty() {
        return Ok((Mark::Ok, who));
    }
    let losses: Vec<_> = losses.into_iter().collect();
    Ok((Mark::Warning, format!("{who}; missing {}: {}; {remedy}", missing.join(", "), losses.join("; "))))
}

/// Whose sockets are listed, in words.
fn who_asks(places: &Places, wanted: SocketLb) -> Result<String> {
    let namespaces = Sockets::open(places.bpffs()?)?.namespaces()?;
    let pods = namespaces.values().filter(|flags| **flags == netns::POD).count();
    let text = format!("those of this host's processes ask for Services, and those of {pods} pods");
    let records = if wanted == SocketLb::All { records::read(&places.run_dir)?.endpoints } else { Vec::new() };
    let earlier = records.iter().filter(|it| it.netns_cookie.is_none()).count();
    if earlier == 0 {
        return Ok(text);
    }
    let remedy = "to have them ask, too, create them again (kernel 5.14 or newer)";
    Ok(format!("{text}; {earlier} pods were connected by an earlier release and ask by packets: {remedy}"))
}

/// Who writes and takes off the overlay's headers; `None` without an overlay.
fn overlay_line(places: &Places) -> Result<Option<(Mark, String)>> {
    let config = NodeConfigStore::open(places.bpffs()?)?.read()?;
    if config.overlay == 0 {
        return Ok(None);
    }
    let setting = setting(places, "overlay-path").and_then(OverlayPath::parse);
    let setting = setting.context("the agent's settings name no overlay path")?;
    Ok(Some(overlay_path(overlay::path_in(config.flags), &Choice::new(setting, Ipsec::read()))))
}

fn overlay_path(used: OverlayPath, choice: &Choice) -> (Mark, String) {
    match choice.mismatch(used) {
        Some(wrong) => (Mark::Warning, wrong),
        None if choice.problem().is_some() => (Mark::Warning, choice.to_string()),
        None => (Mark::Ok, choice.to_string()),
    }
}

fn pods(places: &Places) -> Result<(Mark, String)> {
    let map = Endpoints::open(places.bpffs()?)?.read()?;
    let records = endpoints::by_address(places)?;
    let lost: Vec<_> =
        records.keys().filter(|ip| !map.iter().any(|(known, _)| known == *ip)).map(ToString::to_string).collect();
    Ok(if lost.is_empty() {
        (Mark::Ok, format!("{} addresses of pods", map.len()))
    } else {
        (Mark::Bad, format!("not in the map: {}; the agent puts them back", lost.join(" ")))
    })
}

/// The two classifiers of each pod's veth: without them its packets take the kernel's way, past Services and the checks of
/// who sent them.
fn classifiers(places: &Places) -> Result<(Mark, String)> {
    let bpffs = places.bpffs()?;
    let mut socket = Socket::open()?;
    let links = link::list(&mut socket)?;
    let hooks = [(PROGRAMS[0], Direction::Ingress), (PROGRAMS[1], Direction::Egress)];
    let mut pinned = [0; 2];
    for (id, (program, _)) in pinned.iter_mut().zip(hooks) {
        let path = program_path(bpffs, program);
        let fd = sys::obj_get(&path).with_context(|| format!("opening {}", path.display()))?;
        *id = sys::prog_id(fd.as_fd()).with_context(|| format!("asking about {}", path.display()))?;
    }
    let (mut pods, mut missing, mut other) = (0, Vec::new(), Vec::new());
    let records = endpoints::by_address(places)?;
    let names = endpoints::names(places, &records)?;
    let records: BTreeMap<u32, _> = records.iter().map(|(ip, record)| (record.ifindex, (ip, record))).collect();
    for (ip, record) in records.into_values() {
        // By name as well: an index may have been given to another device since.
        if !links.iter().any(|link| link.index == record.ifindex && link.name == record.host_ifname) {
            continue;
        }
        pods += 1;
        for ((program, direction), pinned) in hooks.into_iter().zip(pinned) {
            let what = || format!("{program} on {} (pod {})", record.host_ifname, names[ip]);
            match tc::filter(&mut socket, record.ifindex, direction)? {
                None => missing.push(what()),
                Some(filter) if filter.prog_id != pinned => other.push(what()),
                Some(_) => {}
            }
        }
    }
    Ok(if !missing.is_empty() {
        let remedy = "a running agent puts them back within 30 s; if not, its log says why";
        (Mark::Bad, format!("degraded: missing {}; {remedy}", missing.join(", ")))
    } else if !other.is_empty() {
        let remedy = "a running agent swaps them within 30 s; if none runs, start it";
        (Mark::Warning, format!("not the pinned program: {}; {remedy}", other.join(", ")))
    } else {
        (Mark::Ok, format!("both on each of {pods} pods' interfaces"))
    })
}

fn map_line(fill: &fill::Fill) -> Line {
    let full = percent(fill.used, fill.max);
    // Connections and fragments live in maps that drop the oldest entry; the others refuse new ones.
    let status = if full >= NEARLY_FULL { Mark::Warning } else { Mark::Ok };
    let detail = format!("{} of {} ({full} %)", thousands(fill.used), thousands(fill.max));
    Line { name: format!("Map {}", fill.name), status, detail }
}

fn packets(places: &Places) -> Result<(Mark, String)> {
    let rows = Counters::open(places.bpffs()?)?.read()?;
    let of = |is_wanted: fn(DropReason) -> bool| {
        let rows = rows.iter().filter(move |row| is_wanted(row.reason));
        rows.map(|row| row.count.packets).sum::<u64>()
    };
    Ok((
        Mark::Ok,
        format!(
            "{} forwarded, {} dropped (`rustnetctl drops` says why)",
            thousands(of(|it| it == DropReason::Forwarded)),
            thousands(of(DropReason::is_drop))
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::{Choice, Ipsec, Line, Mark, OverlayPath, Report, overlay_path};
    use crate::cli::golden::assert_golden;

    #[test]
    fn its_json_is_an_interface() {
        let line = |name: &str, status| Line { name: name.into(), status, detail: "in words".into() };
        let marks = [("Agent", Mark::Warning), ("Node", Mark::Ok), ("Map rn_svc4_v2", Mark::Bad)];
        assert_golden("status", &Report::of(marks.map(|(name, mark)| line(name, mark)).into()));
    }
    #[test]
    fn the_overlays_path_has_a_reason() {
        let unknown = || Ipsec::Unknown("EPERM".to_owned());
        for (used, setting, ipsec, mark, words) in [
            (OverlayPath::Programs, OverlayPath::Programs, Ipsec::None, Mark::Ok, "programs"),
            (OverlayPath::Device, OverlayPath::Device, unknown(), Mark::Ok, "device (--overlay-path device)"),
            (OverlayPath::Device, OverlayPath::Programs, unknown(), Mark::Warning, "device (the kernel does not tell"),
            (
                OverlayPath::Programs,
                OverlayPath::Device,
                Ipsec::None,
                Mark::Warning,
                "programs, but it should be device",
            ),
        ] {
            let (found, text) = overlay_path(used, &Choice::new(setting, ipsec));
            assert!(found == mark && text.starts_with(words), "{found:?} {text}");
        }
    }
}
