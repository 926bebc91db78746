//! Tables of turns: a case's figures, and their ratio to a peer's of the same rounds.

use super::case::Group;
use super::measure::Results;
use super::traffic::{Test, Turn};
use crate::stats::{Sorted, verdict};

/// Prints the tables of all groups.
pub fn print_all(groups: &[Group<'_>], results: &Results) {
    for (g, group) in groups.iter().enumerate() {
        for test in Test::ALL {
            if let (Some(v4), Some(v6)) = (results.get(&(g, test, 0)), results.get(&(g, test, 1))) {
                group.peers.iter().for_each(|peer| print(group, test, *peer, [v4, v6]));
            }
        }
    }
}

/// One table: a group and a test, both families, with ratios to the case of this place.
fn print(group: &Group<'_>, test: Test, peer: usize, families: [&Vec<Vec<Turn>>; 2]) {
    let name = group.cases.get(peer).map_or("", |c| c.name);
    let (pace, figures) = match test {
        Test::Stream => ("Gbit/s", "Gbit/s of turns: least / median / greatest"),
        Test::Rr | Test::Crr => ("1/s", "us: least / median / p99"),
    };
    println!("\n### {}{}\n", group.title_of(test), if peer == 0 { String::new() } else { format!(", of {name}") });
    println!("| | Case | {pace} | {figures} | Of {name} (least-greatest) | By the best | Goal | |");
    println!("|---|---|---|---|---|---|---|---|");
    for (family, cases) in ["IPv4", "IPv6"].into_iter().zip(families) {
        let best_of_peer = best(&cases[peer]);
        for (i, (case, turns)) in group.cases.iter().zip(cases).enumerate() {
            let (median, figures) = figures_of(test, turns);
            let ratios =
                Sorted::new(turns.iter().zip(&cases[peer]).map(|(own, peer)| own.pace() / peer.pace()).collect());
            let (ratio, by_best) = if i == peer {
                ("1".to_owned(), "1".to_owned())
            } else {
                (
                    format!("{:.3} ({:.3}-{:.3})", ratios.median(), ratios.least(), ratios.greatest()),
                    format!("{:.3}", best(turns) / best_of_peer),
                )
            };
            let (goal, word) = match case.goals.iter().find(|g| g.test == test && g.peer == peer) {
                Some(goal) => (format!("{:.2}", goal.least), verdict(ratios.median() >= goal.least)),
                None => (String::new(), ""),
            };
            println!("| {family} | {} | {median} | {figures} | {ratio} | {by_best} | {goal} | {word} |", case.name);
        }
    }
}

/// The pace of the median turn, and the distribution.
fn figures_of(test: Test, turns: &[Turn]) -> (String, String) {
    let paces = |scale: f64| Sorted::new(turns.iter().map(|t| t.pace() * scale).collect());
    if test == Test::Stream {
        let r = paces(8e-9);
        let figures = format!("{:.2} / {:.2} / {:.2}", r.least(), r.median(), r.greatest());
        return (format!("{:.2}", r.median()), figures);
    }
    let each = turns.iter().flat_map(Turn::each).map(|ns| f64::from(*ns) / 1e3);
    (format!("{:.0}", paces(1.0).median()), Sorted::new(each.collect()).three(2))
}

/// The pace that one of a hundred transactions exceeds, or the best stream: what is left when hardly anybody disturbs.
fn best(turns: &[Turn]) -> f64 {
    let mut each: Vec<u32> = turns.iter().flat_map(Turn::each).copied().collect();
    each.sort_unstable();
    let quick = each.get(each.len() / 100);
    quick.map_or_else(|| turns.iter().map(Turn::pace).fold(f64::NAN, f64::max), |ns| 1e9 / f64::from(*ns))
}
