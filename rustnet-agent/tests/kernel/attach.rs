//! Hooks: adopted, swapped in place, and attached again when their device was replaced.

use std::os::fd::AsFd;
use std::path::Path;

use rustnet_agent::bpf::attach::{Device, Direction, Outcome, device_hook, link_path, pod_hooks};
use rustnet_agent::bpf::{sys, xdp};
use rustnet_agent::net::netlink::Socket;
use rustnet_agent::net::{link, tc};

use crate::load::load;
use crate::sandbox::{self, has_tcx, ip, on_hook, uplink};

fn index(socket: &mut Socket, name: &str) -> u32 {
    link::by_name(socket, name).unwrap().unwrap().index
}

fn link_info(path: &Path) -> sys::LinkInfo {
    sys::link_info(sys::obj_get(path).unwrap().as_fd()).unwrap()
}

#[test]
fn a_device_hook_is_attached_once_and_swapped_in_place() {
    sandbox::run(|sandbox| {
        uplink();
        let mut socket = Socket::open().unwrap();
        let (old, new) = (load(sandbox).run().unwrap(), load(sandbox).run().unwrap());
        let path = link_path(&sandbox.bpffs, "uplink_in", None);
        let mut hook = |programs: &rustnet_agent::bpf::load::Programs| {
            let ifindex = index(&mut socket, "eth0");
            let device = Device { name: "eth0", ifindex };
            device_hook(&mut socket, &path, &device, Direction::Ingress, programs.get("uplink_in").unwrap()).unwrap()
        };
        let id =
            |programs: &rustnet_agent::bpf::load::Programs| sys::prog_id(programs.get("uplink_in").unwrap()).unwrap();
        let there = || on_hook(&sandbox.bpffs, "uplink_in", "eth0", Direction::Ingress);
        assert_eq!(hook(&old), Outcome::Attached);
        let (place, prog) = there().unwrap();
        assert_eq!(prog, id(&old));
        assert_eq!(hook(&old), Outcome::Unchanged);
        assert_eq!(there(), Some((place, id(&old))));
        assert_eq!(hook(&new), Outcome::Swapped);
        assert_eq!(there(), Some((place, id(&new))), "the link stays");

        // The device goes and comes back: a pin is dead.
        ip("link del eth0");
        assert_eq!(there(), None);
        uplink();
        assert_eq!(hook(&new), Outcome::Attached);
        let (again, prog) = there().unwrap();
        assert_ne!(again, place);
        assert_eq!(prog, id(&new));
    });
}

#[test]
fn a_link_of_another_device_is_replaced() {
    sandbox::run(|sandbox| {
        uplink();
        let mut socket = Socket::open().unwrap();
        let programs = load(sandbox).run().unwrap();
        let path = link_path(&sandbox.bpffs, "uplink_in", None);
        for (name, outcome) in [("eth0", Outcome::Attached), ("far", Outcome::Attached), ("far", Outcome::Unchanged)] {
            let device = Device { name, ifindex: index(&mut socket, name) };
            let prog = programs.get("uplink_in").unwrap();
            let done = device_hook(&mut socket, &path, &device, Direction::Ingress, prog).unwrap();
            assert_eq!(done, outcome);
            assert!(on_hook(&sandbox.bpffs, "uplink_in", name, Direction::Ingress).is_some());
            if has_tcx() {
                assert_eq!(link_info(&path).ifindex, device.ifindex);
            }
        }
    });
}

#[test]
fn pod_hooks_are_filters_that_are_replaced_by_handle() {
    sandbox::run(|sandbox| {
        ip("link add rnv1 type veth peer name pod");
        let mut socket = Socket::open().unwrap();
        let veth = index(&mut socket, "rnv1");
        let (old, new) = (load(sandbox).run().unwrap(), load(sandbox).run().unwrap());
        let mut hooks = |programs: &rustnet_agent::bpf::load::Programs| {
            let (from, to) = (programs.get("from_pod").unwrap(), programs.get("to_pod").unwrap());
            pod_hooks(&mut socket, veth, from, to).unwrap()
        };
        assert_eq!(hooks(&old), Outcome::Attached);
        assert_eq!(hooks(&old), Outcome::Unchanged);
        assert_eq!(hooks(&new), Outcome::Swapped);

        let ids = [("from_pod", Direction::Ingress), ("to_pod", Direction::Egress)];
        for (name, direction) in ids {
            let there = tc::filter(&mut socket, veth, direction).unwrap().unwrap();
            assert_eq!((&*there.name, there.prog_id), (name, sys::prog_id(new.get(name).unwrap()).unwrap()));
        }
        let shown = sandbox::command("tc", "filter show dev rnv1 ingress");
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert_eq!(shown.matches("direct-action").count(), 1, "{shown}");
        // Half of it gone, as after a clumsy `tc filter del`.
        assert!(tc::remove_filter(&mut socket, veth, Direction::Egress).unwrap());
        assert!(!tc::remove_filter(&mut socket, veth, Direction::Egress).unwrap());
        let (from, to) = (new.get("from_pod").unwrap(), new.get("to_pod").unwrap());
        assert_eq!(pod_hooks(&mut socket, veth, from, to).unwrap(), Outcome::Attached);
    });
}

#[test]
fn foreign_filters_are_not_ours_and_stay() {
    sandbox::run(|sandbox| {
        ip("link add rnv1 type veth peer name pod");
        sandbox::command("tc", "qdisc add dev rnv1 clsact");
        let filter = "filter add dev rnv1 ingress prio 1 handle 1 protocol all bpf bytecode 1,6\u{a0}0\u{a0}0\u{a0}0";
        let args = filter.split(' ').map(|arg| arg.replace('\u{a0}', " "));
        assert!(std::process::Command::new("tc").args(args).status().unwrap().success());
        let mut socket = Socket::open().unwrap();
        let veth = index(&mut socket, "rnv1");
        assert_eq!(tc::filter(&mut socket, veth, Direction::Ingress).unwrap(), None);
        assert!(!tc::remove_filter(&mut socket, veth, Direction::Ingress).unwrap());
        let shown = || String::from_utf8(sandbox::command("tc", "filter show dev rnv1 ingress").stdout).unwrap();
        let before = shown();
        assert!(before.contains("bytecode"), "{before}");
        let programs = load(sandbox).run().unwrap();
        let (from, to) = (programs.get("from_pod").unwrap(), programs.get("to_pod").unwrap());
        let error = format!("{:#}", pod_hooks(&mut socket, veth, from, to).unwrap_err());
        assert!(error.contains("another program's has priority 1 and handle 1"), "{error}");
        assert_eq!(shown(), before);
    });
}

/// A BPF file system mounted over another hides the pin of a link: nobody would swap its program.
#[test]
fn an_xdp_program_without_a_pin_is_taken_off_if_it_is_ours() {
    sandbox::run(|sandbox| {
        uplink();
        let mut socket = Socket::open().unwrap();
        let (old, new) = (load(sandbox).run().unwrap(), load(sandbox).run().unwrap());
        let device = Device { name: "eth0", ifindex: index(&mut socket, "eth0") };
        let path = link_path(&sandbox.bpffs, "uplink_xdp", Some(device.ifindex));
        let mut attach = |programs: &rustnet_agent::bpf::load::Programs| {
            xdp::attach(&mut socket, &sandbox.bpffs, &device, programs.optional("uplink_xdp").unwrap())
        };
        assert_eq!(attach(&old).unwrap(), Outcome::Attached);
        let hidden = sandbox.bpffs.join("hidden");
        std::fs::create_dir(&hidden).unwrap();
        std::fs::rename(&path, hidden.join("uplink_xdp")).unwrap();
        assert_eq!(attach(&new).unwrap(), Outcome::Attached);
        let id = sys::prog_id(new.optional("uplink_xdp").unwrap()).unwrap();
        assert_eq!((link_info(&path).ifindex, link_info(&path).prog_id), (device.ifindex, id));
        assert_eq!(link_info(&hidden.join("uplink_xdp")).ifindex, 0, "the old link has no device");
        assert_eq!(attach(&new).unwrap(), Outcome::Unchanged);

        // That of somebody else stays.
        sys::link_detach(sys::obj_get(&path).unwrap().as_fd()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let pass = [sys::instruction(0xb7, 0, 0, 0, 2), sys::instruction(0x95, 0, 0, 0, 0)];
        let pass = sys::prog_load_xdp("pass", &pass).unwrap();
        let theirs = sys::link_create_xdp(pass.as_fd(), device.ifindex).unwrap();
        let refused = xdp::attach(&mut socket, &sandbox.bpffs, &device, new.optional("uplink_xdp").unwrap());
        let refused = format!("{:#}", refused.unwrap_err());
        assert!(refused.contains("another program has its XDP hook"), "{refused}");
        assert_eq!(sys::link_info(theirs.as_fd()).unwrap().ifindex, device.ifindex);
    });
}
