//! Loading while older programs run: adoption, refusal, and an old state that survives both.

use std::os::fd::AsFd;

use aya_obj::Object;
use rustnet_agent::bpf::load::{CLOCK, Load, program_path};
use rustnet_agent::bpf::store::{BpfMaps, Map};
use rustnet_agent::bpf::sys::{self, Layout};
use rustnet_agent::bpf::{object, probe};
use rustnet_agent::config::PacketLog;
use rustnet_agent::plan::{Maps, VipKey, Write};
use rustnet_common::names::{PROGRAMS, SOCKET_PROGRAMS, UNATTACHED, map};
use rustnet_common::service::SvcEntry;

use crate::sandbox::{self, Sandbox, names};

/// Small maps, so that tests cost no memory.
pub fn load(sandbox: &Sandbox) -> Load<'_> {
    let sizes = map::ALL[..13].iter().map(|name| ((*name).to_owned(), 4096)).collect();
    Load {
        object: object::embedded().unwrap(),
        bpffs: &sandbox.bpffs,
        sizes,
        log: PacketLog::Off,
        has_sockets: true,
        has_xdp: true,
    }
}

pub fn map_id(sandbox: &Sandbox, name: &str) -> u32 {
    sys::map_info(sys::obj_get(&sandbox.bpffs.join(name)).unwrap().as_fd()).unwrap().id
}

pub fn prog_id(sandbox: &Sandbox, name: &str) -> u32 {
    sys::prog_id(sys::obj_get(&program_path(&sandbox.bpffs, name)).unwrap().as_fd()).unwrap()
}

#[test]
fn a_second_load_adopts_the_maps_and_replaces_the_programs() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let mut pinned = names(&sandbox.bpffs);
        pinned.retain(|name| name != "link" && name != "prog");
        let mut wanted = map::ALL.map(str::to_owned);
        wanted.sort();
        assert_eq!(pinned, wanted);

        let key = VipKey { ip: "10.96.0.1".parse().unwrap(), port: 80, proto: 6, scope: 0 };
        let entry = SvcEntry { first: 0, count: 0, id: 7, affinity: 0, flags: 0, table: 0 };
        BpfMaps::open(&sandbox.bpffs).unwrap().apply(&[Write::PutService { key, entry }]).unwrap();
        let ids = map::ALL.map(|name| map_id(sandbox, name));
        let programs = PROGRAMS.map(|name| prog_id(sandbox, name));

        let mut second = load(sandbox).run().unwrap();
        assert_eq!(PROGRAMS.map(|name| prog_id(sandbox, name)), programs, "loading alone replaces no pin");
        second.pin(&sandbox.bpffs).unwrap();
        assert_eq!(map::ALL.map(|name| map_id(sandbox, name)), ids);
        assert_eq!(BpfMaps::open(&sandbox.bpffs).unwrap().snapshot().unwrap().services[&key], entry);
        for (name, old) in PROGRAMS.iter().zip(programs) {
            assert_ne!(prog_id(sandbox, name), old, "{name}");
        }
        assert_eq!(
            names(&sandbox.bpffs.join("prog")).len(),
            // With those that are jumped to, the clock, and XDP.
            PROGRAMS.len() + UNATTACHED.len() + 2 + SOCKET_PROGRAMS.len(),
            "no temporary pin is left"
        );
    });
}

/// Programs before could not say whether an entry stands in the second slot of its key.
#[test]
fn connections_of_programs_without_the_map_of_second_slots_are_looked_for() {
    sandbox::run(|sandbox| {
        let contested = || {
            let pin = sys::obj_get(&sandbox.bpffs.join(map::CT_CONTESTED)).unwrap();
            Map::<u32, u32>::from_fd(pin, map::CT_CONTESTED).unwrap().get(&0).unwrap()
        };
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(contested(), Some(0), "new tables are empty");
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(contested(), Some(0), "adopted with its tables");
        std::fs::remove_file(sandbox.bpffs.join(map::CT_CONTESTED)).unwrap();
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        assert_eq!(contested(), Some(1), "tables of an agent before");
    });
}

#[test]
fn pinned_maps_of_another_layout_are_refused_intact() {
    sandbox::run(|sandbox| {
        rustnet_agent::bpf::fs::prepare(&sandbox.bpffs).unwrap();
        let layout = Layout { kind: 1, key_size: 12, value_size: 8, max_entries: 16, flags: 0 };
        let old: Map<[u8; 12], u64> = Map::from_fd(sys::map_create(map::SVC4, layout).unwrap(), map::SVC4).unwrap();
        old.put(&[1; 12], &77).unwrap();
        sys::obj_pin(&sandbox.bpffs.join(map::SVC4), old.fd()).unwrap();

        let error = format!("{:#}", load(sandbox).run().err().unwrap());
        assert!(error.contains("rn_svc4_v2 is pinned as hash, key 12 B, value 8 B, 16 entries"), "{error}");
        assert!(error.contains("wanted as hash, key 8 B, value 20 B"), "{error}");
        assert!(error.contains("cleanup"), "{error}");
        assert_eq!(names(&sandbox.bpffs), ["link", "prog", "rn_svc4_v2"], "nothing new was pinned");
        assert_eq!(old.get(&[1; 12]).unwrap(), Some(77));
    });
}

/// The object with the first instruction of the clock program spoilt.
pub fn spoilt() -> Vec<u64> {
    let good = object::embedded().unwrap();
    let object = Object::parse(good).unwrap();
    let function = &object.functions[&object.programs[CLOCK].function_key()];
    let code: Vec<u8> = function
        .instructions
        .iter()
        .flat_map(|i| {
            let registers = i.dst_reg() | i.src_reg() << 4;
            let [a, b] = i.off.to_le_bytes();
            [&[i.code, registers, a, b][..], &i.imm.to_le_bytes()].concat()
        })
        .collect();
    let at = good.windows(code.len()).position(|window| window == code).expect("the program's code is in the object");
    let mut bytes = good.to_vec();
    bytes[at] = 0xff;
    // As words, because the loader wants the object aligned.
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.chunks_exact(8).map(|chunk| u64::from_ne_bytes(chunk.try_into().unwrap())).collect()
}

#[test]
fn a_program_that_the_verifier_rejects_leaves_the_old_ones() {
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap().pin(&sandbox.bpffs).unwrap();
        let programs = PROGRAMS.map(|name| prog_id(sandbox, name));
        let bad = spoilt();
        let error = format!("{:#}", Load { object: bytemuck::cast_slice(&bad), ..load(sandbox) }.run().err().unwrap());
        assert!(error.contains("refused program clock") && error.contains("runs on"), "{error}");
        assert!(error.contains("opcode"), "the verifier's words are missing: {error}");
        assert_eq!(PROGRAMS.map(|name| prog_id(sandbox, name)), programs);
    });
}

#[test]
fn the_clock_program_tells_jiffies() {
    sandbox::run(|sandbox| {
        let programs = load(sandbox).run().unwrap();
        let clock = programs.get(CLOCK).unwrap();
        let before = probe::jiffies(clock).unwrap();
        sandbox::wait_until("a tick has passed", || probe::age(probe::jiffies(clock).unwrap(), before) > 0);
    });
}

#[test]
fn the_directory_of_pins_is_closed_to_others() {
    use std::os::unix::fs::PermissionsExt;
    sandbox::run(|sandbox| {
        load(sandbox).run().unwrap();
        let mode = std::fs::metadata(&sandbox.bpffs).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(rustnet_agent::bpf::fs::is_bpffs(&sandbox.bpffs).unwrap());
    });
}
