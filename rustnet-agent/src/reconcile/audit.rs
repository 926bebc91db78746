//! Looks after the maps as the host's network is looked after: what somebody else changed is put back, counted and logged.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::metrics::Metrics;
use crate::plan::{Maps, Planner};

/// Differences of one table that are logged one by one.
const LOGGED: usize = 10;

/// Audits one table if its time has come.
///
/// # Errors
/// A map cannot be read or written; plan again then, which reads everything back.
pub fn step(planner: &mut Planner, maps: &mut impl Maps, now: Duration, metrics: &Metrics) -> Result<()> {
    if planner.audit_at().is_none_or(|due| due > now) {
        return Ok(());
    }
    let differences = planner.audit(maps, now).context("comparing the maps with what they should hold")?;
    for difference in differences.iter().take(LOGGED) {
        tracing::warn!("{}: {}; written again. Does another program write this map?", difference.map, difference.what);
    }
    if let Some(more) = differences.len().checked_sub(LOGGED).filter(|more| *more > 0) {
        tracing::warn!("{more} more entries of that table were not as they should be; written again");
    }
    for difference in &differences {
        metrics.map_repaired(difference.map);
    }
    Ok(())
}
