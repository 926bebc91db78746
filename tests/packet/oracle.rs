//! Random worlds of network policies in the real programs: compiled, planned and written by the agent's own code, each world in the place
//! of the one before. cyclonus, or a plain reading, judges what becomes of the first packet of each flow. 100 worlds, or as many as `RUSTNET_WORLDS` says; the
//! seed of the first is printed, and `RUSTNET_WORLDS_SEED` sets it.

#[expect(dead_code, unused_imports, reason = "the agent's tests, which it is shared with, need more of it")]
#[path = "../../rustnet-agent/src/index/policy/world/mod.rs"]
mod world;

use crate::flows::{PORT, Proto, frame, from_outside};
use crate::fuzz::number;
use crate::harness::{Lab, MAC_A, MAC_HOST, Net, SHOT, Shot, lab_apart};
use anyhow::{Context, Result, bail, ensure};
use rustnet_agent::bpf::store::policy::PolicyStore;
use rustnet_agent::plan::policies::judge::{self, Surroundings, Verdict, judge};
use rustnet_agent::plan::policies::{PolicyMaps, PolicyPlanner};
use rustnet_common::addr::Addr;
use rustnet_common::drop::DropReason::{PolicyAudited, PolicyDenied};
use rustnet_common::drop::hook;
use rustnet_common::endpoint::Endpoint;
use rustnet_common::names::map;
use rustnet_common::peer::flags;
use serde_json::json;
use std::cell::RefCell;
use std::collections::BTreeSet;
use testkit::datapath::Input;
use world::{Flow, Oracle, Random, World};

/// Worlds, if nothing else is asked for.
const WORLDS: u64 = 100;
/// Most flows per world.
const FLOWS: usize = 64;

/// The interfaces of a world's pods, by the numbers that the worlds give them.
const LINKS: &str = "\
    link add rnw0 index 30 up type veth peer name peerw0
    link add rnw1 index 31 up type veth peer name peerw1
    link add rnw2 index 32 up type veth peer name peerw2
    link add rnw3 index 33 up type veth peer name peerw3
    link add rnw4 index 34 up type veth peer name peerw4
    link add rnw5 index 35 up type veth peer name peerw5
    link add rnw6 index 36 up type veth peer name peerw6";

#[test]
fn the_programs_do_what_cyclonus_reads() -> Result<()> {
    compare(Random::world, || {
        let oracle = Oracle::start();
        Box::new(move |world, flows| oracle.allows(world, flows))
    })
}

/// The same with policies of the cluster, which cyclonus does not have: a plain reading of their API says what becomes of a flow.
#[test]
fn the_programs_do_what_policies_of_the_cluster_mean() -> Result<()> {
    compare(Random::whole_world, || Box::new(|world, flows| flows.iter().map(|flow| world.allows(flow)).collect()))
}

/// What has to become of some flows.
type Judge = dyn Fn(&World, &[Flow]) -> Vec<bool>;

/// Compares what the programs do in random worlds with a judge.
fn compare(make: fn(&mut Random) -> World, start: fn() -> Box<Judge>) -> Result<()> {
    lab_apart(|lab| {
        lab.ip(LINKS)?;
        for (net, pods) in [(Net::V4, [10, 0, 0, 0]), (Net::V6, [0; 4])] {
            lab.put_peer(net.ip(pods, "fd00::"), Some((23, 64)), flags::POD, None)?;
        }
        let (worlds, first) = (number("RUSTNET_WORLDS").unwrap_or(WORLDS), number("RUSTNET_WORLDS_SEED").unwrap_or(1));
        eprintln!("{worlds} worlds, seeds from {first}");
        let (node, judge) = (Node::new(lab)?, start());
        let (mut all, mut allowed) = (0, 0);
        for seed in first..first + worlds {
            let mut random = Random::new(seed);
            let world = make(&mut random);
            let flows = random.flows(&world, FLOWS);
            node.apply(&world)?;
            all += flows.len();
            for (flow, want) in flows.iter().zip(judge(&world, &flows)) {
                let passes = node.passes(&world, flow).with_context(|| format!("seed {seed}, {flow:?}"))?;
                if passes != want {
                    return node.report(&judge, world, flow).with_context(|| format!("seed {seed}"));
                }
                allowed += usize::from(want);
            }
        }
        // A few worlds may be open ones by chance.
        let is_mixed = worlds < WORLDS || (all / 10..all * 9 / 10).contains(&allowed);
        ensure!(is_mixed, "of {all} flows {allowed} may be opened");
        Ok(())
    })
}

/// A node whose maps of policies the agent's code writes.
struct Node<'a> {
    lab: &'a Lab,
    maps: RefCell<(PolicyStore, PolicyPlanner)>,
}

impl<'a> Node<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let d = lab.datapath();
        let (pods, cidrs) = (d.table(map::POLICY_PODS)?, d.table(map::POLICY_CIDRS)?);
        let store = PolicyStore::new(d.table(map::POLICY)?, pods, cidrs, d.table(map::POLICY_RULES)?);
        let planner = PolicyPlanner::adopt(store.snapshot()?, store.capacities());
        Ok(Self { lab, maps: RefCell::new((store, planner)) })
    }

    /// Brings the maps to a world, without any known flow.
    fn apply(&self, world: &World) -> Result<()> {
        self.lab.forget()?;
        self.lab.datapath().table::<Addr, Endpoint>(map::ENDPOINTS)?.clear()?;
        for (ip, ifindex) in &world.interfaces {
            self.lab.put_endpoint(*ip, *ifindex, MAC_A)?;
        }
        let (store, planner) = &mut *self.maps.borrow_mut();
        store.apply(&planner.plan(world.desired()))?;
        ensure!(planner.problems().is_empty(), "not all fits: {:?}", planner.problems());
        Ok(())
    }

    /// True if the first packet of a flow passes. It comes from its pod, or by the uplink.
    fn passes(&self, world: &World, flow: &Flow) -> Result<bool> {
        let proto = match flow.proto {
            6 => Proto::Tcp,
            17 => Proto::Udp,
            132 => Proto::Sctp,
            _ => Proto::Echo,
        };
        // The same flow may have been tried before, and is judged when it opens.
        self.lab.forget()?;
        let (client, server) = ((flow.client, PORT), (flow.server, flow.port));
        let shot: Shot = match world.interfaces.get(&flow.client) {
            Some(ifindex) => {
                let frame = &frame(proto, (MAC_A, MAC_HOST), client, server).bytes();
                self.lab.raw(hook::FROM_POD, &Input { frame, ifindex: *ifindex, ..Input::default() })?
            }
            None => self.lab.uplink_in(&from_outside(proto, client, server))?,
        };
        let passes = match shot.verdict {
            SHOT if !shot.counted.is_empty()
                && shot.counted.keys().all(|(reason, _)| *reason == PolicyDenied as u8) =>
            {
                false
            }
            SHOT => bail!("dropped for another reason: {:?}", shot.counted),
            _ => true,
        };
        // `rustnetctl policy why` says what the programs do.
        let around = Surroundings { endpoints: world.interfaces.clone(), host: BTreeSet::new() };
        let Flow { client, server, proto, port } = *flow;
        let said = judge(self.maps.borrow().1.held(), &around, &judge::Flow { client, server, proto, port });
        let is_audited = shot.counted.keys().any(|(reason, _)| *reason == PolicyAudited as u8);
        let is_right = match said.verdict() {
            Verdict::Allowed => passes && !is_audited,
            Verdict::Audited => passes && is_audited,
            Verdict::Denied | Verdict::Undecided => !passes,
        };
        ensure!(is_right, "it passes: {passes}, is audited: {is_audited}, and policy why says {said:?}");
        ensure!(is_audited == world.is_audited(flow), "is audited: {is_audited}");
        Ok(passes)
    }

    /// The smallest world found in which the programs do with a flow something else than the judge says.
    fn report(&self, judge: &Judge, world: World, flow: &Flow) -> Result<()> {
        let is_wrong = |it: &World| {
            let passes = self.apply(it).and_then(|()| self.passes(it, flow));
            passes.is_ok_and(|passes| judge(it, &[*flow]) != [passes])
        };
        let world = world.shrink(is_wrong);
        let want = judge(&world, &[*flow])[0];
        let objects = json!([&world.namespaces, &world.pods, &world.policies, &world.cluster, &world.nodes]);
        bail!("{flow:?} should pass: {want}\n{objects:#}\n{:#?}", world.desired())
    }
}
