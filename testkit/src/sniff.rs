//! Captures: every frame of an interface into memory, looked at by predicates, checked, and written as pcap when a test
//! fails.

use crate::check;
use crate::netns::Netns;
use crate::raw::PacketSocket;
use anyhow::{Context, Result, anyhow, bail};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest frame kept whole; generous, because segmentation offload makes 64 KiB of them.
const LONGEST: usize = 68 * 1024;
/// Bytes of each frame that [`recorded`] keeps: all headers, those inside a tunnel too.
const HEADERS: usize = 256;
/// Bytes a capture keeps; what comes later is not kept.
const MOST: usize = 256 << 20;

/// One captured frame.
#[derive(Clone)]
pub struct Frame {
    /// When.
    pub time: SystemTime,
    /// True when the interface sent it, false when it received it.
    pub outgoing: bool,
    /// True when the transport checksum was left to the hardware.
    pub partial: bool,
    /// The tag control information of an outer VLAN tag, which is not among the bytes.
    pub vlan: Option<u16>,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// Length on the wire, where the capture keeps only headers.
    pub wire_len: usize,
}

/// What the headers of a frame say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// IP protocol.
    pub proto: u8,
    /// Source port, or ICMP type.
    pub sport: u16,
    /// Destination port, or ICMP code.
    pub dport: u16,
    /// Hop limit.
    pub ttl: u8,
    /// True for any fragment.
    pub fragment: bool,
    /// Length from the IP header on.
    pub ip_len: usize,
}

impl Frame {
    /// The outermost IP packet's headers, if this is one.
    pub fn headers(&self) -> Option<Headers> {
        headers(&self.bytes)
    }

    /// The frame inside a VXLAN packet.
    pub fn inner(&self) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(&self.bytes).ok()?;
        match packet.transport? {
            TransportSlice::Udp(udp) if udp.destination_port() == check::VXLAN_PORT => {
                let bytes = udp.payload().get(8..)?.to_vec();
                Some(Self { wire_len: bytes.len(), bytes, ..self.clone() })
            }
            _ => None,
        }
    }

    /// What follows the transport header.
    pub fn payload(&self) -> Vec<u8> {
        let packet = SlicedPacket::from_ethernet(&self.bytes).ok();
        match packet.and_then(|p| p.transport) {
            Some(TransportSlice::Udp(udp)) => udp.payload().to_vec(),
            Some(TransportSlice::Tcp(tcp)) => tcp.payload().to_vec(),
            Some(TransportSlice::Icmpv4(icmp)) => icmp.payload().to_vec(),
            Some(TransportSlice::Icmpv6(icmp)) => icmp.payload().to_vec(),
            _ => Vec::new(),
        }
    }
}

fn headers(bytes: &[u8]) -> Option<Headers> {
    let packet = SlicedPacket::from_ethernet(bytes).ok()?;
    let (src, dst, ttl, payload, ip_len): (IpAddr, IpAddr, _, _, _) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let h = ip.header();
            (h.source_addr().into(), h.destination_addr().into(), h.ttl(), ip.payload(), usize::from(h.total_len()))
        }
        Some(NetSlice::Ipv6(ip)) => {
            let h = ip.header();
            let len = usize::from(h.payload_length()) + 40;
            (h.source_addr().into(), h.destination_addr().into(), h.hop_limit(), ip.payload(), len)
        }
        _ => return None,
    };
    let (sport, dport) = match &packet.transport {
        Some(TransportSlice::Tcp(t)) => (t.source_port(), t.destination_port()),
        Some(TransportSlice::Udp(u)) => (u.source_port(), u.destination_port()),
        Some(TransportSlice::Icmpv4(i)) => (i.type_u8().into(), i.code_u8().into()),
        Some(TransportSlice::Icmpv6(i)) => (i.type_u8().into(), i.code_u8().into()),
        _ => (0, 0),
    };
    let (proto, fragment) = (payload.ip_number.0, payload.fragmented);
    Some(Headers { src, dst, proto, sport, dport, ttl, fragment, ip_len })
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = if self.outgoing { "out" } else { "in" };
        match self.headers() {
            Some(h) => {
                let proto = rustnet_common::tuple::proto::name(h.proto);
                write!(f, "{direction} {}:{} > {}:{} {proto}", h.src, h.sport, h.dst, h.dport)?;
                write!(f, " ttl {} {} bytes{}", h.ttl, h.ip_len, if h.fragment { " fragment" } else { "" })
            }
            None => write!(f, "{direction} {} bytes, not IP", self.bytes.len()),
        }
    }
}

/// A capture under way.
pub struct Sniffer {
    name: String,
    stop: Arc<AtomicBool>,
    frames: Arc<Mutex<Vec<Frame>>>,
    /// How often the thread has emptied the socket.
    rounds: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Sniffer {
    /// Starts to capture; what is sent after this returns is seen.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        Self::keeping(netns, interface, LONGEST)
    }

    /// The same, but keeps only the headers of each frame and the first bytes behind them.
    pub fn start_short(netns: &Netns, interface: &str) -> Result<Self> {
        Self::keeping(netns, interface, HEADERS)
    }

    /// The same, but keeps only the first bytes of each frame.
    fn keeping(netns: &Netns, interface: &str, bytes: usize) -> Result<Self> {
        let socket = netns.run(|| PacketSocket::open(interface))??;
        let stop = Arc::new(AtomicBool::new(false));
        let frames = Arc::new(Mutex::new(Vec::new()));
        let rounds = Arc::new(AtomicU64::new(0));
        let (stopped, sink, emptied) = (stop.clone(), frames.clone(), rounds.clone());
        let thread = netns.thread(move || collect(&socket, bytes, &stopped, &sink, &emptied))?;
        Ok(Self { name: format!("{}-{interface}", netns.name()), stop, frames, rounds, thread: Some(thread) })
    }

    /// What was captured until now.
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first frames that fit, `most` at the utmost, without a copy of all others.
    pub fn matching(&self, most: usize, fits: impl Fn(&Frame) -> bool) -> Vec<Frame> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames.iter().filter(|frame| fits(frame)).take(most).cloned().collect()
    }

    /// Waits until whatever the interfaces have received before this call is among the frames.
    pub fn catch_up<'a>(all: impl IntoIterator<Item = &'a Self>) -> Result<()> {
        // The round that is under way may have begun before; the one after it has not.
        let wanted = |sniffer: &'a Self| (sniffer, sniffer.rounds.load(Ordering::Acquire) + 2);
        for (sniffer, wanted) in all.into_iter().map(wanted).collect::<Vec<_>>() {
            crate::wait::until(&format!("the capture {} catches up", sniffer.name), || {
                let now = sniffer.rounds.load(Ordering::Acquire);
                if now >= wanted { Ok(()) } else { bail!("in round {now}, not yet {wanted}") }
            })?;
        }
        Ok(())
    }

    /// Waits until a frame fits, and gives it.
    pub fn wait_for(&self, what: &str, fits: impl Fn(&Headers) -> bool) -> Result<Frame> {
        crate::wait::until(what, || {
            let frames = self.frames();
            let found = frames.iter().find(|f| f.headers().is_some_and(|h| fits(&h))).cloned();
            found.ok_or_else(|| anyhow!("{} captured {} other frames: {:?}", self.name, frames.len(), tail(&frames)))
        })
    }

    /// An error when any frame fits.
    pub fn none(&self, what: &str, fits: impl Fn(&Headers) -> bool) -> Result<()> {
        match self.frames().iter().find(|f| f.headers().is_some_and(|h| fits(&h))) {
            None => Ok(()),
            Some(frame) => bail!("{what}: {} captured {frame:?}", self.name),
        }
    }

    /// Ends the capture.
    pub fn stop(mut self) -> Capture {
        self.end();
        Capture { name: self.name.clone(), frames: self.frames() }
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.end();
    }
}

fn tail(frames: &[Frame]) -> &[Frame] {
    &frames[frames.len().saturating_sub(20)..]
}

fn collect(socket: &PacketSocket, keep: usize, stop: &AtomicBool, sink: &Mutex<Vec<Frame>>, rounds: &AtomicU64) {
    let mut buffer = vec![0; keep];
    let mut kept = 0;
    loop {
        // The flag is read before the socket is drained, so that nothing sent before `stop` is missed.
        let last_round = stop.load(Ordering::Relaxed);
        while let Some(received) = socket.receive(&mut buffer) {
            let frame = Frame {
                time: SystemTime::now(),
                outgoing: received.outgoing,
                partial: received.partial,
                vlan: received.vlan,
                bytes: buffer[..received.len].to_vec(),
                wire_len: received.wire_len,
            };
            if kept < MOST {
                kept += received.len;
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
            }
        }
        rounds.fetch_add(1, Ordering::Release);
        if last_round {
            return;
        }
        let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10u16));
    }
}

/// A finished capture.
#[derive(Clone, Debug)]
pub struct Capture {
    name: String,
    frames: Vec<Frame>,
}

impl Capture {
    /// All frames, in order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Verifies every checksum of every frame; an error names the first bad one and where the capture was saved.
    pub fn verify_checksums(&self) -> Result<()> {
        for (i, frame) in self.frames.iter().enumerate() {
            if let Err(e) = check::checksums(&frame.bytes, frame.partial) {
                let path = self.save()?;
                bail!("frame {} of {}: {frame:?}: {e} (whole capture: {})", i + 1, self.name, path.display());
            }
        }
        Ok(())
    }

    /// Writes a pcap file among the artifacts.
    pub fn save(&self) -> Result<PathBuf> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = crate::dist::artifacts()?.join(format!("{}-{number}.pcap", self.name));
        write_pcap(&path, &self.frames)?;
        Ok(path)
    }
}

/// Captures on several interfaces while `f` runs; when it fails, the captures are saved and named in the error.
pub fn recorded<T>(interfaces: &[(&Netns, &str)], f: impl FnOnce() -> Result<T>) -> Result<T> {
    let sniffers: Vec<Sniffer> = interfaces
        .iter()
        .map(|(netns, interface)| Sniffer::keeping(netns, interface, HEADERS))
        .collect::<Result<_>>()?;
    let result = f();
    let captures: Vec<Capture> = sniffers.into_iter().map(Sniffer::stop).collect();
    result.with_context(|| {
        let saved: Vec<String> = captures
            .iter()
            .map(|c| c.save().map_or_else(|e| format!("{e:#}"), |path| path.display().to_string()))
            .collect();
        format!("failed; captures: {}", saved.join(" "))
    })
}

/// The classic format, with microseconds (draft-ietf-opsawg-pcap).
fn write_pcap(path: &Path, frames: &[Frame]) -> Result<()> {
    let mut out = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, LONGEST as u32, 1] {
        out.extend_from_slice(&word.to_ne_bytes());
    }
    for frame in frames {
        let since = frame.time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let (kept, len) = (frame.bytes.len() as u32, frame.wire_len as u32);
        for word in [since.as_secs() as u32, since.subsec_micros(), kept, len] {
            out.extend_from_slice(&word.to_ne_bytes());
        }
        out.extend_from_slice(&frame.bytes);
    }
    std::fs::write(path, out).with_context(|| format!("cannot write {}", path.display()))
}
