//! This node's place: its addresses, the devices towards other nodes and the world, and what does not work there.

use super::finding::{Finding, Level, split_remedy};
use crate::model::Family;
use crate::ways::Ways;

/// Judges.
pub fn check(ways: &Ways) -> Vec<Finding> {
    let place = &ways.place;
    let mut found = Vec::new();
    if !place.uplinks.is_empty() {
        let addresses = [Family::V4, Family::V6].into_iter().filter_map(|family| place.addresses.of(family));
        let addresses: Vec<_> = addresses.map(|ip| ip.to_string()).collect();
        let uplinks: Vec<_> = place.uplinks.iter().map(|it| it.name.as_str()).collect();
        found.push(Finding::ok("uplinks", format!("{}; this node is {}", uplinks.join(", "), addresses.join(", "))));
    }
    let level = if place.uplinks.is_empty() { Level::Fault } else { Level::Warning };
    found.extend(place.problems.iter().map(|problem| {
        let (detail, hint) = split_remedy(problem);
        Finding::new(level, "uplinks", detail).hint(hint)
    }));
    found.extend(ways.unrouted.iter().map(|problem| {
        let text = problem.to_string();
        let (detail, hint) = split_remedy(&text);
        Finding::new(Level::Warning, "routes", detail).hint(hint)
    }));
    found
}

#[cfg(test)]
mod tests {
    use super::super::finding::{assert_only, assert_well};
    use super::{Level, Ways, check};
    use crate::config::Routing;
    use crate::host::build::{default, device, host};
    use crate::host::{DeviceKind, HostFacts};
    use crate::model::Family;
    use crate::ways::Settings;

    fn ways(host: &HostFacts) -> Ways {
        Ways::new(&Settings::new("n1", Routing::Vxlan), [].iter(), host)
    }

    #[test]
    fn an_ordinary_host_is_well() {
        assert_well(&check(&ways(&host([device(2, "eth0", &["192.0.2.1/24"])]))));
    }

    #[test]
    fn one_fault_at_a_time() {
        let mut vpn = host([device(2, "eth0", &["192.0.2.1/24"]), device(3, "tun0", &["10.8.0.2/24"])]);
        vpn.devices[1].kind = DeviceKind::LayerThree;
        vpn.defaults.insert(0, default(Family::V4, 0, 3));
        let alone = HostFacts { devices: vec![device(2, "eth0", &["192.0.2.1/24"])], defaults: Vec::new() };
        for (host, level, detail, hint) in
            [(vpn, Level::Warning, "tun0", "VPN"), (alone, Level::Fault, "no device leads to other nodes", "--uplink")]
        {
            assert_only(&check(&ways(&host)), level, detail, hint);
        }
    }
}
