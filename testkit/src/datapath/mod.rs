//! The kernel side alone: the eBPF object loaded without pins or agent, its maps as plain Rust values, its programs run on
//! single packets through `BPF_PROG_TEST_RUN`. What the packet tests and the benchmarks stand on.

mod shape;
mod skb;
mod timer;

pub use shape::{Service, Shape, service_sizes};
pub use timer::{EMPTY, Timer, Vary};

use crate::dist;
use anyhow::{Context, Result, bail};
use aya::maps::{Map, MapData, RingBuf};
use aya::programs::Program;
use aya::{EbpfLoader, VerifierLogLevel};
use bytemuck::Pod;
use rustnet_agent::bpf::probe;
pub use rustnet_agent::bpf::store::Map as Table;
use rustnet_agent::bpf::store::counters::Counters;
use rustnet_agent::bpf::sys::{self, Layout, TestRun, instruction};
pub use rustnet_agent::bpf::upgrade::Bridge;
use rustnet_common::drop::hook;
use rustnet_common::event::Event;
use rustnet_common::names;
use skb::{CHECKSUM_COMPLETE, SkBuff, word};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// The program that tells the time.
pub const CLOCK: &str = "clock";
/// Room for the packet that comes out.
const OUT: usize = 4096;

/// The object's programs and maps.
pub struct Datapath {
    programs: BTreeMap<String, OwnedFd>,
    xdp: Option<OwnedFd>,
    maps: BTreeMap<String, OwnedFd>,
    facts: Vec<Fact>,
    shape: Shape,
    decap_l3: u32,
    events: Mutex<RingBuf<MapData>>,
    jumps: OwnedFd,
    preludes: Mutex<BTreeMap<(String, Option<IpAddr>), OwnedFd>>,
}

/// What the kernel reported when it loaded a program.
#[derive(Clone, Debug)]
pub struct Fact {
    /// Its name.
    pub program: String,
    /// Instructions that the verifier looked at.
    pub verified: u32,
    /// Bytes of machine code.
    pub jited: u32,
    /// Milliseconds that the load took.
    pub millis: f64,
}

/// A packet to run a program on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Input<'a> {
    /// The frame, from its Ethernet header.
    pub frame: &'a [u8],
    /// The device it is on; has to exist in the caller's network namespace.
    pub ifindex: u32,
    /// The device that a forwarded packet came in by; 0 for a packet of this host.
    pub came_by: u32,
    /// Its mark.
    pub mark: u32,
    /// Payload of a segment, for a frame that stands for several.
    pub gso_size: u32,
    /// The tunnel's far end, for a frame that came out of one.
    pub tunnel: Option<IpAddr>,
    /// That tunnel's network identifier (VNI).
    pub vni: u32,
    /// The VLAN tag that the device took off the frame, as a TCI: `skb->vlan_tci` of the kernel, not a byte of the frame.
    pub vlan: Option<u16>,
    /// If not 0, the frame is cut to this length inside the kernel, which runs nothing on an IP packet that is handed in
    /// with less than its header.
    pub cut: u32,
    /// The frame comes as from a device that sums up all of it, and the run fails if the program leaves that sum wrong: such
    /// packets make receivers complain of their hardware. Only where [`Datapath::sums_up`].
    pub complete: bool,
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Output {
    /// What the program returned.
    pub verdict: i32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Its mark.
    pub mark: u32,
}

/// Where the object is: `RUSTNET_BPF_OBJECT`, or where the build leaves it.
pub fn object_path() -> PathBuf {
    std::env::var_os("RUSTNET_BPF_OBJECT")
        .map_or_else(|| dist::target_dir().join("bpf").join("rustnet.bpf.o"), PathBuf::from)
}

impl Datapath {
    /// Loads the object with maps of the given sizes, the object's own for those that are not named.
    pub fn load(sizes: &[(&str, u32)]) -> Result<Self> {
        Self::load_from(&object_path(), "cargo xtask build-ebpf", sizes, Bridge::None)
    }

    /// As [`Self::load`], of programs that use the tables of an earlier agent, too.
    pub fn load_bridge(bridge: Bridge, sizes: &[(&str, u32)]) -> Result<Self> {
        Self::load_from(&object_path(), "cargo xtask build-ebpf", sizes, bridge)
    }

    /// Loads an object of this or an earlier release; sizes of maps that it does not have are ignored.
    pub fn load_object(path: &Path, sizes: &[(&str, u32)]) -> Result<Self> {
        Self::load_from(path, "cargo xtask build-ebpf", sizes, Bridge::None)
    }

    fn load_from(path: &Path, made_by: &str, sizes: &[(&str, u32)], bridge: Bridge) -> Result<Self> {
        let object = std::fs::read(path).with_context(|| format!("cannot read {}: run `{made_by}`", path.display()))?;
        // The helper's flag of that name came with 6.16; the tests' machine is newer, and a wrong checksum would tell.
        let csum_ipv6 = u32::from(probe::l4_csum_ipv6()?);
        let decap_l3 = u32::from(probe::decap_l3()?);
        let migrate = bridge as u32;
        let mut loader = EbpfLoader::new();
        loader.verifier_log_level(VerifierLogLevel::STATS).override_global("L4_CSUM_IPV6", &csum_ipv6, true);
        // Objects to compare with may be older than this one.
        loader.override_global("DECAP_L3", &decap_l3, false).override_global("MIGRATE", &migrate, false);
        for (map, size) in sizes {
            loader.map_max_entries(map, *size);
        }
        let mut ebpf = loader.load(&object).with_context(|| format!("cannot load {}", path.display()))?;
        let mut programs = BTreeMap::new();
        let mut facts = Vec::new();
        for name in names::PROGRAMS.into_iter().chain(names::UNATTACHED).chain([CLOCK]) {
            let program = match ebpf.program_mut(name) {
                Some(program) => program,
                // Objects to compare with may be older than this program.
                None if name == names::SIDE_IN || names::UNATTACHED.contains(&name) => continue,
                None => bail!("the object has no program {name}"),
            };
            let Program::SchedClassifier(program) = program else { bail!("program {name} is no classifier") };
            let start = std::time::Instant::now();
            program.load().with_context(|| format!("the kernel refused program {name}"))?;
            let millis = start.elapsed().as_secs_f64() * 1000.0;
            let info = program.info()?;
            let verified = info.verified_instruction_count().unwrap_or(0);
            facts.push(Fact { program: name.to_owned(), verified, jited: info.size_jitted(), millis });
            programs.insert(name.to_owned(), program.fd()?.as_fd().try_clone_to_owned()?);
        }
        let mut xdp = None;
        // Objects to compare with may be older than this program.
        if let Some(Program::Xdp(program)) = ebpf.program_mut(names::UPLINK_XDP) {
            program.load().with_context(|| format!("the kernel refused program {}", names::UPLINK_XDP))?;
            let info = program.info()?;
            let verified = info.verified_instruction_count().unwrap_or(0);
            let program_name = names::UPLINK_XDP.to_owned();
            facts.push(Fact { program: program_name, verified, jited: info.size_jitted(), millis: 0.0 });
            xdp = Some(program.fd()?.as_fd().try_clone_to_owned()?);
        }
        let mut maps = BTreeMap::new();
        for (name, map) in ebpf.maps() {
            let (Map::Array(data)
            | Map::HashMap(data)
            | Map::LruHashMap(data)
            | Map::LpmTrie(data)
            | Map::PerCpuArray(data)
            | Map::ProgramArray(data)
            | Map::RingBuf(data)
            | Map::SkStorage(data)) = map
            else {
                bail!("map {name} is of a type that is not known here")
            };
            maps.insert(name.to_owned(), data.fd().as_fd().try_clone_to_owned()?);
        }
        if let Some(tails) = maps.get(names::TAILS_MAP) {
            let room = sys::map_info(tails.as_fd())?.layout().max_entries;
            for (index, name) in (0..room).zip(names::TAILS) {
                sys::map_update(tails.as_fd(), &index.to_ne_bytes(), &programs[name].as_raw_fd().to_ne_bytes())?;
            }
        }
        let shape = Shape::detect(maps.keys().map(String::as_str));
        let events = ebpf.take_map(names::map::EVENTS).context("the object has no ring buffer")?;
        programs.insert(EMPTY.to_owned(), empty()?);
        let max_entries = programs.len() as u32;
        let layout = Layout { kind: PROG_ARRAY, key_size: 4, value_size: 4, max_entries, flags: 0 };
        let jumps = sys::map_create("rn_jumps", layout)?;
        for (i, program) in (0_u32..).zip(programs.values()) {
            sys::map_update(jumps.as_fd(), &i.to_ne_bytes(), &program.as_raw_fd().to_ne_bytes())?;
        }
        Ok(Self {
            programs,
            xdp,
            maps,
            facts,
            shape,
            decap_l3,
            events: Mutex::new(RingBuf::try_from(events)?),
            jumps,
            preludes: Mutex::default(),
        })
    }

    /// What the kernel reported when it loaded each program.
    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// The shape of the object's service maps.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What the programs have reported since the last call.
    pub fn events(&self) -> Vec<Event> {
        let mut ring = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| ring.next().map(|item| bytemuck::pod_read_unaligned(&item))).collect()
    }

    /// A map as a table of plain values.
    pub fn table<K: Pod, V: Pod>(&self, name: &str) -> Result<Table<K, V>> {
        Table::from_fd(self.map(name)?.try_clone()?, name)
    }

    /// Writes zeros to all elements of a per-CPU array.
    pub fn clear_percpu(&self, name: &str) -> Result<()> {
        let Layout { value_size, max_entries, .. } = sys::map_info(self.map(name)?.as_fd())?.layout();
        let words = vec![0; value_size as usize / 4];
        (0..max_entries).try_for_each(|element| self.fill_percpu(name, element, &words))
    }

    /// Writes the words of 32 bits of all elements of a per-CPU array, for all CPUs.
    pub fn fill_all_percpu(&self, name: &str, words: &[u32]) -> Result<()> {
        let Layout { max_entries, .. } = sys::map_info(self.map(name)?.as_fd())?.layout();
        (0..max_entries).try_for_each(|element| self.fill_percpu(name, element, words))
    }

    /// Writes the words of 32 bits of an element of a per-CPU array, for all CPUs.
    pub fn fill_percpu(&self, name: &str, element: u32, words: &[u32]) -> Result<()> {
        let cpus = aya::util::nr_cpus().map_err(|(what, e)| anyhow::anyhow!("{what}: {e}"))?;
        // The kernel has a multiple of eight bytes for each CPU.
        let mut value: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        value.resize(value.len().next_multiple_of(8), 0);
        sys::map_update(self.map(name)?.as_fd(), &element.to_ne_bytes(), &value.repeat(cpus))?;
        Ok(())
    }

    fn map(&self, name: &str) -> Result<&OwnedFd> {
        self.maps.get(name).with_context(|| format!("the object has no map {name}"))
    }

    /// Runs a program once. Nothing comes out if the program spoiled the sum of a frame with [`Input::complete`].
    pub fn run(&self, program: &str, input: &Input<'_>) -> Result<Option<Output>> {
        let mut context = context(input);
        let mut frame = vec![0; OUT];
        let flags = if input.complete { CHECKSUM_COMPLETE } else { 0 };
        let run = TestRun { packet: input.frame, out: &mut frame, context: &mut context, repeat: 1, flags };
        let ran = if input.tunnel.is_none() && input.vlan.is_none() && input.cut == 0 {
            sys::test_run(self.program(program)?.as_fd(), run)
        } else {
            let mut preludes = self.preludes.lock().unwrap_or_else(PoisonError::into_inner);
            let prelude = match preludes.entry((program.to_owned(), input.tunnel)) {
                Entry::Occupied(e) => e.into_mut(),
                Entry::Vacant(e) => e.insert(self.prelude(program, input.tunnel)?),
            };
            sys::test_run(prelude.as_fd(), run)
        };
        let ran = match ran {
            // EBADMSG: the sum is wrong.
            Err(e) if input.complete && e.raw_os_error() == Some(libc::EBADMSG) => return Ok(None),
            ran => ran.with_context(|| format!("running {program} on a frame of {} bytes", input.frame.len()))?,
        };
        frame.truncate(ran.len);
        Ok(Some(Output { verdict: ran.verdict.cast_signed(), frame, mark: context[word::MARK] }))
    }

    /// True if this kernel can take tunnel headers off a packet of the other family (since 6.3).
    pub fn takes_off_other_family(&self) -> bool {
        self.decap_l3 != 0
    }

    /// Runs the XDP program on a frame that comes in by a device; returns its verdict and the frame.
    pub fn run_xdp(&self, frame: &[u8], ifindex: u32) -> Result<(u32, Vec<u8>)> {
        let program = self.xdp.as_ref().context("the object has no XDP program")?;
        let mut out = vec![0; OUT];
        let mut context = xdp_md(frame.len(), ifindex);
        let run = TestRun { packet: frame, out: &mut out, context: &mut context, repeat: 1, flags: 0 };
        let ran = sys::test_run(program.as_fd(), run).with_context(|| format!("running {}", names::UPLINK_XDP))?;
        out.truncate(ran.len);
        Ok((ran.verdict, out))
    }

    /// Puts the programs of an uplink on a device of the caller's network namespace, until the result is dropped.
    pub fn attach_uplink(&self, ifindex: u32) -> Result<Vec<OwnedFd>> {
        let hooks = [(hook::UPLINK_IN, sys::TCX_INGRESS), (hook::UPLINK_OUT, sys::TCX_EGRESS)];
        let attach = |(code, hook): (u8, u32)| {
            let program = self.program(hook::NAMES[usize::from(code)])?;
            Ok(sys::link_create_tcx(program.as_fd(), ifindex, hook)?)
        };
        hooks.into_iter().map(attach).collect()
    }

    /// The same of the XDP program.
    pub fn attach_xdp(&self, ifindex: u32) -> Result<OwnedFd> {
        let program = self.xdp.as_ref().context("the object has no XDP program")?;
        Ok(sys::link_create_xdp(program.as_fd(), ifindex)?)
    }

    /// True if the kernel can run programs on packets with [`Input::complete`] (6.17 and later).
    pub fn sums_up(&self) -> Result<bool> {
        let program = self.program(CLOCK)?.as_fd();
        match sys::test_run(program, TestRun { packet: &[0; 64], flags: CHECKSUM_COMPLETE, ..TestRun::default() }) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Timer ticks, the low 31 bits.
    pub fn jiffies(&self) -> Result<u32> {
        probe::jiffies(self.program(CLOCK)?.as_fd())
    }

    /// Packets counted so far by reason and hook, the zeros left out.
    pub fn counts(&self) -> Result<BTreeMap<(u8, u8), u64>> {
        let rows = Counters::of(self.table(names::map::COUNTERS)?)?.read()?;
        Ok(rows.iter().map(|row| ((row.reason as u8, row.hook), row.count.packets)).collect())
    }

    /// A program that does what a run cannot: cuts the frame to the length in `cb[0]`, gives it the VLAN tag in `cb[1]` and
    /// a tunnel with the VNI in `cb[2]`; then `program`, which finds these words empty.
    fn prelude(&self, program: &str, tunnel: Option<IpAddr>) -> Result<OwnedFd> {
        let mut code = vec![
            instruction(MOV_REG, 6, 1, 0, 0),
            instruction(LOAD_WORD, 2, 1, CB, 0),
            instruction(JUMP_IF_ZERO, 2, 0, 2, 0),
            instruction(MOV, 3, 0, 0, 0),
            instruction(CALL, 0, 0, 0, CHANGE_TAIL),
            instruction(LOAD_WORD, 3, 6, CB + 4, 0),
            instruction(JUMP_IF_ZERO, 3, 0, 4, 0),
            instruction(MOV_REG, 1, 6, 0, 0),
            instruction(MOV, 2, 0, 0, ETH_P_8021Q),
            instruction(AND, 3, 0, 0, 0xffff),
            instruction(CALL, 0, 0, 0, VLAN_PUSH),
        ];
        code.extend(tunnel.map(out_of_tunnel).unwrap_or_default());
        code.push(instruction(MOV, 2, 0, 0, 0));
        code.extend([CB, CB + 4, CB + 8].map(|word| instruction(STORE_REG, 6, 2, word, 0)));
        code.extend(self.jump(program)?);
        sys::prog_load_sched_cls("rn_prelude", &code).with_context(|| format!("cannot load the prelude to {program}"))
    }

    /// Instructions that go on with a program. Register 6 has the packet.
    fn jump(&self, program: &str) -> Result<[u64; 7]> {
        let index = self.programs.keys().position(|name| name == program).context("no such program")?;
        Ok([
            instruction(MOV_REG, 1, 6, 0, 0),
            instruction(LOAD_IMM64, 2, PSEUDO_MAP_FD, 0, self.jumps.as_raw_fd().cast_unsigned()),
            0,
            instruction(MOV, 3, 0, 0, index as u32),
            instruction(CALL, 0, 0, 0, TAIL_CALL),
            // Not reached: a verdict that no test expects.
            instruction(MOV, 0, 0, 0, 99),
            instruction(EXIT, 0, 0, 0, 0),
        ])
    }

    fn program(&self, name: &str) -> Result<&OwnedFd> {
        self.programs.get(name).with_context(|| format!("the object has no program {name}"))
    }
}

/// A program that does nothing.
fn empty() -> Result<OwnedFd> {
    let code = [instruction(MOV, 0, 0, 0, u32::MAX), instruction(EXIT, 0, 0, 0, 0)];
    sys::prog_load_sched_cls("rn_empty", &code).context("cannot load a program that does nothing: this needs root")
}

/// `struct xdp_md` of a frame that comes in by a device: its beginning and end, metadata, the device, its queue, the device to leave by.
fn xdp_md(len: usize, ifindex: u32) -> [u32; 6] {
    [0, len as u32, 0, ifindex, 0, 0]
}

fn context(input: &Input<'_>) -> SkBuff {
    let mut context = [0; 48];
    context[word::MARK] = input.mark;
    context[word::INGRESS] = input.came_by;
    context[word::IFINDEX] = input.ifindex;
    context[word::CB] = input.cut;
    // A tag of 0 is a tag as well, so that its presence needs a bit of its own.
    context[word::CB + 1] = input.vlan.map_or(0, |tci| TAGGED | u32::from(tci));
    context[word::CB + 2] = input.vni;
    if input.gso_size != 0 {
        context[word::GSO_SIZE] = input.gso_size;
        context[word::GSO_SEGS] = (input.frame.len() as u32).div_ceil(input.gso_size);
    }
    context
}

/// `BPF_MAP_TYPE_PROG_ARRAY`.
const PROG_ARRAY: u32 = 3;
/// Offset of the control block in `__sk_buff`.
const CB: i16 = 48;
const MOV: u8 = 0xb7;
const MOV_REG: u8 = 0xbf;
const ADD: u8 = 0x07;
const AND: u8 = 0x57;
const STORE_WORD: u8 = 0x62;
const STORE_REG: u8 = 0x63;
const LOAD_WORD: u8 = 0x61;
const LOAD_IMM64: u8 = 0x18;
const JUMP_IF_ZERO: u8 = 0x15;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const TAIL_CALL: u32 = 12;
const VLAN_PUSH: u32 = 18;
const SET_TUNNEL_KEY: u32 = 21;
const CHANGE_TAIL: u32 = 38;
const PSEUDO_MAP_FD: u8 = 1;
/// The protocol of an 802.1Q tag, as the helper takes it: network order.
const ETH_P_8021Q: u32 = 0x8100_u16.to_be() as u32;
/// Set in `cb[1]` if the frame gets a tag.
const TAGGED: u32 = 1 << 16;

/// Instructions that give the packet a tunnel whose far end is `remote`. The kernel reads the far end from where a sender
/// states the near end.
fn out_of_tunnel(remote: IpAddr) -> Vec<u64> {
    /// Bytes of `struct bpf_tunnel_key`.
    const KEY: u32 = 44;
    const NEAR_END: i16 = 28;
    const BASE: i16 = -48;
    let (words, flags) = match remote {
        IpAddr::V4(a) => ([u32::from(a), 0, 0, 0], 0),
        IpAddr::V6(a) => {
            let o = a.octets();
            ([0, 4, 8, 12].map(|i| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]])), 1)
        }
    };
    let mut code = vec![instruction(MOV_REG, 1, 6, 0, 0)];
    for word in 0..(KEY / 4) as i16 {
        code.push(instruction(STORE_WORD, 10, 0, BASE + word * 4, 0));
    }
    code.push(instruction(LOAD_WORD, 2, 6, CB + 8, 0));
    code.push(instruction(STORE_REG, 10, 2, BASE, 0));
    // The near end stands behind the identifier, the far end, three small fields and the label.
    for (i, word) in (0_i16..).zip(words) {
        code.push(instruction(STORE_WORD, 10, 0, BASE + NEAR_END + i * 4, word));
    }
    code.extend([
        instruction(MOV_REG, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, i32::from(BASE).cast_unsigned()),
        instruction(MOV, 3, 0, 0, KEY),
        instruction(MOV, 4, 0, 0, flags),
        instruction(CALL, 0, 0, 0, SET_TUNNEL_KEY),
    ]);
    code
}
