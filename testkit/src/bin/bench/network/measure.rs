//! Rounds of turns: every case of a group gets one in each round, so that what disturbs one disturbs all.

use super::Extent;
use super::case::Group;
use super::traffic::{self, Test, Turn};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// By place of the group, test and family: the turns of each case.
pub type Results = BTreeMap<(usize, Test, usize), Vec<Vec<Turn>>>;

/// Congestion control of all connections, whatever this machine's default is: one that paces would measure its timers. This one is
/// in every kernel, and every network namespace may choose it.
pub const CONGESTION: &str = "reno";

/// Set where a run has to end before its time.
pub static IS_OVER: AtomicBool = AtomicBool::new(false);

/// Prepares the ends of all cases, and waits until each gets through.
pub fn prepare(groups: &[Group<'_>]) -> Result<()> {
    for case in groups.iter().flat_map(|g| &g.cases) {
        for netns in [case.client, case.server] {
            netns.sysctl("ipv4/tcp_congestion_control", CONGESTION)?;
        }
        case.wait()?;
    }
    Ok(())
}

/// Runs all turns of the groups whose tables are wanted.
pub fn run(groups: &[Group<'_>], extent: &Extent) -> Result<Results> {
    let mut results = Results::new();
    for round in 0..extent.rounds {
        for (g, group) in groups.iter().enumerate() {
            for (test, family) in Test::ALL.into_iter().flat_map(|t| [(t, 0), (t, 1)]) {
                if !group.title_of(test).contains(&extent.only) {
                    continue;
                }
                let turns = results
                    .entry((g, test, family))
                    .or_insert_with(|| group.cases.iter().map(|_| Vec::new()).collect());
                let mut order: Vec<usize> = (0..group.cases.len()).collect();
                if round % 2 == 1 {
                    // There and back, so that a steady drift favours nobody.
                    order.reverse();
                }
                for i in order {
                    ensure!(!IS_OVER.load(Ordering::Relaxed), "interrupted");
                    turns[i].push(traffic::turn(test, &group.cases[i].ends(family), extent.cpu, extent.time)?);
                }
            }
        }
    }
    Ok(results)
}
