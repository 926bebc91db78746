//! The programs' packet log: off, on, and filtered by address.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use aya::EbpfLoader;
use aya::programs::SchedClassifier;
use bytemuck::Zeroable;
use rustnet_agent::bpf::load::{Load, Programs};
use rustnet_agent::bpf::object;
use rustnet_agent::bpf::store::BpfMaps;
use rustnet_agent::bpf::store::endpoints::Endpoints;
use rustnet_agent::bpf::store::node_config::NodeConfigStore;
use rustnet_agent::bpf::sys::{self, TestRun};
use rustnet_agent::config::PacketLog;
use rustnet_agent::plan::{Maps, VipKey, Write};
use rustnet_common::addr::Addr;
use rustnet_common::backend::{Backend, id};
use rustnet_common::config::NodeConfig;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::service::SvcEntry;
use rustnet_common::tuple::proto::UDP;

use crate::load::load;
use crate::sandbox::{self, Sandbox};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Of lo, which is where packets of a test run come from.
const LO: u32 = 1;

/// An address of the test's network.
fn ip(is_v6: bool, last: u8) -> IpAddr {
    if is_v6 { Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)).into() } else { [10, 244, 1, last].into() }
}

/// Programs that serve two pods and, at address 100 port 53, a service with the second of them.
fn programs(sandbox: &Sandbox, log: PacketLog) -> Programs {
    let mut programs = Load { log, ..load(sandbox) }.run().unwrap();
    programs.pin(&sandbox.bpffs).unwrap();
    let config = NodeConfig { hz: 100, overlay_mtu: 1450, ..NodeConfig::zeroed() };
    NodeConfigStore::open(&sandbox.bpffs).unwrap().write(&config).unwrap();
    let endpoints = Endpoints::open(&sandbox.bpffs).unwrap();
    let mut maps = BpfMaps::open(&sandbox.bpffs).unwrap();
    for (slot, is_v6) in [(0, false), (1, true)] {
        for (last, ifindex) in [(2, LO), (3, 99)] {
            let pod = Endpoint { ifindex, identity: 0, mac: MAC, host_mac: HOST_MAC, flags: 0, pad: 0 };
            endpoints.put(ip(is_v6, last), &pod).unwrap();
        }
        let addr = Addr::from(ip(is_v6, 3));
        let backend = Backend { addr, port: 5353, flags: 0, id: id::make(slot, 1), service: 7, max_service: 0 };
        let key = VipKey { ip: ip(is_v6, 100), port: 53, proto: UDP, scope: 0 };
        let entry = SvcEntry { first: slot, count: 1, id: 7, affinity: 0, flags: 0, table: 0 };
        maps.apply(&[
            Write::Backends { backends: vec![backend] },
            Write::BackendIds { first: slot, ids: vec![backend.id] },
            Write::PutService { key, entry },
        ])
        .unwrap();
    }
    programs
}

/// A UDP datagram from port 1000 to port 53.
fn frame(is_v6: bool, src: u8, dst: u8) -> Vec<u8> {
    let udp = [1000_u16, 53, 8, 0].map(u16::to_be_bytes).concat();
    let mut frame = [&HOST_MAC[..], &MAC].concat();
    match (ip(is_v6, src), ip(is_v6, dst)) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, UDP, 0, 0]);
            frame.extend([src.octets(), dst.octets()].concat());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, UDP, 64]);
            frame.extend([src.octets(), dst.octets()].concat());
        }
        _ => unreachable!("one family"),
    }
    frame.extend(udp);
    frame
}

/// Sends a datagram through `from_pod`.
fn send(programs: &Programs, is_v6: bool, src: u8, dst: u8) {
    let run = TestRun { packet: &frame(is_v6, src, dst), repeat: 1, ..TestRun::default() };
    sys::test_run(programs.get("from_pod").unwrap().as_fd(), run).unwrap();
}

/// Sends a datagram through `from_pod`; returns what is logged.
fn lines(programs: &mut Programs, is_v6: bool, src: u8, dst: u8) -> Vec<String> {
    send(programs, is_v6, src, dst);
    programs.log.as_mut().expect("the log is on").take()
}

#[test]
fn packets_are_logged_with_what_they_become_and_why_they_are_dropped() {
    sandbox::run(|sandbox| {
        let mut programs = programs(sandbox, PacketLog::All);
        assert_eq!(
            lines(&mut programs, false, 2, 100),
            [
                "from_pod 1 protocol 17 10.244.1.2:1000 -> 10.244.1.100:53 becomes 10.244.1.2:1000 -> 10.244.1.3:5353 pod"
            ]
        );
        assert_eq!(
            lines(&mut programs, true, 2, 100),
            ["from_pod 1 protocol 17 fd00::2:1000 -> fd00::64:53 becomes fd00::2:1000 -> fd00::3:5353 pod"]
        );
        assert_eq!(
            lines(&mut programs, false, 9, 3),
            [
                "from_pod 1 protocol 17 10.244.1.9:1000 -> 10.244.1.3:53 becomes 10.244.1.9:1000 -> 10.244.1.3:53 drop spoofed"
            ]
        );
    });
}

#[test]
fn a_filter_passes_packets_with_one_of_its_addresses() {
    sandbox::run(|sandbox| {
        let mut programs = programs(sandbox, PacketLog::Having(vec![ip(false, 3), ip(true, 100)]));
        assert_eq!(lines(&mut programs, false, 2, 100).len(), 1, "the backend's address");
        assert_eq!(lines(&mut programs, true, 2, 100).len(), 1, "the service's address");
        assert!(lines(&mut programs, true, 2, 3).is_empty(), "neither address");
        assert!(lines(&mut programs, false, 9, 8).is_empty(), "neither address");
    });
}

/// Where the agent's log goes.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl io::Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_agent_prints_lines_as_they_come() {
    sandbox::run(|sandbox| {
        let mut programs = programs(sandbox, PacketLog::All);
        let packets = programs.log.take().expect("the log is on");
        let printed = Printed::default();
        let writer = printed.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let _default = tracing::subscriber::set_default(subscriber);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.spawn(packets.print());
        let has = |text: &str| String::from_utf8_lossy(&printed.0.lock().unwrap()).contains(text);
        // The second is sent once the first is printed: the reader waits again.
        for (is_v6, text) in [(false, "10.244.1.3:5353 pod"), (true, "fd00::3:5353 pod")] {
            send(&programs, is_v6, 2, 100);
            sandbox::wait_until("the line is printed", || {
                runtime.block_on(tokio::task::yield_now());
                has(text)
            });
        }
    });
}

/// What a program logs that was loaded for `log`, read from a ring buffer that is opened in any case.
fn logged(log: &PacketLog) -> Vec<String> {
    let globals = log.globals();
    let mut loader = EbpfLoader::new();
    globals.set(&mut loader);
    let mut ebpf = loader.load(object::embedded().unwrap()).unwrap();
    let mut packets = PacketLog::All.open(&mut ebpf).unwrap().unwrap();
    let program: &mut SchedClassifier = ebpf.program_mut("from_pod").unwrap().try_into().unwrap();
    program.load().unwrap();
    let run = TestRun { packet: &frame(false, 2, 3), repeat: 1, ..TestRun::default() };
    sys::test_run(program.fd().unwrap().as_fd(), run).unwrap();
    packets.take()
}

#[test]
fn nothing_is_logged_while_it_is_off() {
    sandbox::run(|_| {
        assert_eq!(logged(&PacketLog::Off), [""; 0]);
        assert_eq!(logged(&PacketLog::All).len(), 1);
    });
}
