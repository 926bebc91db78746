//! `rustnetctl maps` and `rustnetctl drops`: how full the maps are, and what became of packets.

use anyhow::Result;
use serde::Serialize;

use super::Places;
use super::output::{Output, thousands};
use crate::bpf::store::counters::Counters;
use crate::bpf::store::fill;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MapRow {
    name: &'static str,
    used: u64,
    max: u64,
    percent: f64,
}

/// Prints how full the maps are.
pub fn run(places: &Places, out: &Output) -> Result<()> {
    let rows: Vec<MapRow> = fill::read(places.bpffs()?)?
        .into_iter()
        .map(|f| MapRow { name: f.name, used: f.used, max: f.max, percent: percent(f.used, f.max) })
        .collect();
    out.print(&rows, &["MAP", "USED", "MAX", "FULL"], || {
        let line =
            |r: &MapRow| vec![r.name.to_owned(), thousands(r.used), thousands(r.max), format!("{} %", r.percent)];
        rows.iter().map(line).collect()
    })
}

/// A share in per cent, with one digit.
pub fn percent(used: u64, max: u64) -> f64 {
    let mille = used.saturating_mul(1000).checked_div(max).unwrap_or(0);
    // At most 1000: exact.
    f64::from(u32::try_from(mille).unwrap_or(u32::MAX)) / 10.0
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DropRow {
    reason: &'static str,
    hook: &'static str,
    packets: u64,
    bytes: u64,
    hint: &'static str,
}

/// Prints the counters of drops.
pub fn drops(places: &Places, out: &Output) -> Result<()> {
    let rows = Counters::open(places.bpffs()?)?.read()?.into_iter().filter(|row| row.reason.is_drop());
    let rows: Vec<DropRow> = rows
        .map(|row| DropRow {
            reason: row.reason.name(),
            hook: row.hook_name(),
            packets: row.count.packets,
            bytes: row.count.bytes,
            hint: row.reason.hint(),
        })
        .collect();
    out.print(&rows, &["REASON", "HOOK", "PACKETS", "BYTES", "HINT"], || {
        let line = |r: &DropRow| {
            let (packets, bytes) = (thousands(r.packets), thousands(r.bytes));
            vec![r.reason.to_owned(), r.hook.to_owned(), packets, bytes, r.hint.to_owned()]
        };
        rows.iter().map(line).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::{DropRow, MapRow, percent};
    use crate::cli::golden::assert_golden;

    #[test]
    fn their_json_is_an_interface() {
        assert_golden("maps", &[MapRow { name: "rn_ct4_tcp", used: 1, max: 4, percent: 25.0 }]);
        let row = DropRow { reason: "spoofed", hook: "from_pod", packets: 2, bytes: 120, hint: "what to do" };
        assert_golden("drops", &[row]);
    }

    #[test]
    fn shares() {
        assert!((percent(1, 3) - 33.3).abs() < 1e-9);
        assert!((percent(0, 0)).abs() < 1e-9);
        assert!((percent(7, 7) - 100.0).abs() < 1e-9);
    }
}
