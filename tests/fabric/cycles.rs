//! Pods come and go, some of them badly: nothing of them stays. `cargo xtask test --long` does that with 2,000 pods.

use crate::fixture::{Net, SMALL_TABLES, figure, observed};
use crate::state::State;
use anyhow::{Context, Result, ensure};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use testkit::icmp::reachable;
use testkit::pod::Sandbox;
use testkit::{Node, Setup};

/// ADDs, each with what undoes it, unless `RUSTNET_CYCLES` names another number: each fate often enough to be caught half-way.
const CYCLES: usize = 200;
/// At a time.
const WORKERS: usize = 4;

/// What happens to a pod.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// Added and deleted.
    Plain,
    /// It says something meanwhile.
    Talks,
    /// Its network namespace is gone before it is deleted.
    NetnsGone,
    /// Deleted three times.
    Repeated,
    /// Its ADD is killed half-way, then it is deleted.
    Killed,
    /// Its ADD is killed half-way, and nobody but the garbage collection cares.
    Abandoned,
    /// Its DEL is killed half-way and then repeated.
    Half,
}

impl Fate {
    fn of(number: usize) -> Self {
        match number % 20 {
            0 | 10 => Self::Talks,
            1 | 11 => Self::NetnsGone,
            2 => Self::Repeated,
            3 | 13 => Self::Killed,
            4 | 14 => Self::Abandoned,
            5 => Self::Half,
            _ => Self::Plain,
        }
    }
}

/// Somewhere in the run of the binary, another place each time.
fn moment(number: usize) -> Duration {
    Duration::from_micros(number as u64 * 7919 % 12_000)
}

/// One pod. Gives the sandbox back where a killed ADD may have left something in it.
fn cycle(node: &Node, number: usize) -> Result<(bool, Option<Sandbox>)> {
    let list = node.conflist()?;
    let configuration = node.cni_configuration(&list)?;
    let sandbox = Sandbox::new(node, &format!("c{number}"))?;
    let mut attachment = sandbox.attachment("cycled");
    let fate = Fate::of(number);
    let mut killed = false;
    match fate {
        Fate::Killed | Fate::Abandoned => {
            killed = node.cni_call_killed("ADD", &attachment, &configuration, moment(number))?;
        }
        _ => {
            let result = node.cni_add(&list, &attachment).with_context(|| format!("{fate:?}"))?;
            if matches!(fate, Fate::Talks) {
                node.addresses().into_iter().try_for_each(|a| reachable(sandbox.netns(), a).map(drop))?;
            }
            if number % 50 == 6 {
                node.cni_check(&list, &attachment, &result)?;
            }
        }
    }
    match fate {
        Fate::Abandoned => return Ok((killed, Some(sandbox))),
        Fate::NetnsGone => {
            drop(sandbox);
            node.cni_del(&list, &attachment, None)?;
            attachment.netns = String::new();
            node.cni_del(&list, &attachment, None)?;
        }
        Fate::Repeated => (0..3).try_for_each(|_| node.cni_del(&list, &attachment, None))?,
        Fate::Half => {
            killed = node.cni_call_killed("DEL", &attachment, &configuration, moment(number))?;
            node.cni_del(&list, &attachment, None)?;
        }
        Fate::Plain | Fate::Talks | Fate::Killed => node.cni_del(&list, &attachment, None)?,
    }
    Ok((killed, None))
}

#[test]
fn pods_come_and_go_and_leave_nothing() -> Result<()> {
    observed(&Net::start(Setup { agent: SMALL_TABLES, ..Setup::default() })?, |net| {
        let cycles = figure("RUSTNET_CYCLES", CYCLES)?;
        let node = net.node(1);
        let before = State::of(node)?.at_rest();
        ensure!(before.count("endpoint") == 4 && before.count("program") == 4, "nothing to compare with: {before:?}");
        let (next, kills, abandoned) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            let work = || -> Result<()> {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= cycles {
                        return Ok(());
                    }
                    let (killed, left) = cycle(node, number).with_context(|| format!("pod {number}"))?;
                    kills.fetch_add(killed.into(), Ordering::Relaxed);
                    abandoned.lock().map_err(|_| anyhow::anyhow!("another worker failed"))?.extend(left);
                }
            };
            let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|w| w.join().map_err(|_| anyhow::anyhow!("a worker panicked"))?)
        })?;
        let kills = kills.into_inner();
        ensure!(kills > 0, "no call was caught alive");
        node.cni_gc(&node.conflist()?, [net.a.attachment(), net.b.attachment()])?;
        before.wait_for(node)?;
        println!("{cycles} cycles, {kills} calls killed half-way");
        Ok(())
    })
}
