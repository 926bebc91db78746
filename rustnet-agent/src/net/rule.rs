//! Rules of the routing policy (`ip rule`), as far as they select packets by their mark.

use anyhow::{Context, Result};
use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleHeader, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{Socket, attributes};

/// A rule that selects packets by their mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkRule {
    /// Its priority.
    pub priority: u32,
    /// What the bits hold.
    pub mark: u32,
    /// The bits.
    pub mask: u32,
}

/// Rules of both families that select packets with a certain mark. Those that select all packets without one are left out.
pub fn list_marked(socket: &mut Socket) -> Result<Vec<MarkRule>> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RuleMessage::default();
        all.header.family = family;
        rules.extend(socket.dump(&RouteNetlinkMessage::GetRule(all), parse).context("listing routing rules")?);
    }
    Ok(rules)
}

fn parse(body: &[u8]) -> Option<MarkRule> {
    let header = RuleHeader::parse(body).ok().filter(|header| !header.flags.contains(RuleFlags::Invert))?;
    let (mut priority, mut mark, mut mask) = (0, None, u32::MAX);
    for attribute in attributes(&body[header.buffer_len()..]) {
        match RuleAttribute::parse(&attribute) {
            Ok(RuleAttribute::Priority(value)) => priority = value,
            Ok(RuleAttribute::FwMark(value)) => mark = Some(value),
            Ok(RuleAttribute::FwMask(value)) => mask = value,
            _ => {}
        }
    }
    Some(MarkRule { priority, mark: mark?, mask }).filter(|rule| rule.mask != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(flags: RuleFlags, attributes: &[RuleAttribute]) -> Vec<u8> {
        let mut message = RuleMessage::default();
        message.header.flags = flags;
        message.attributes = attributes.to_vec();
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    #[test]
    fn only_rules_with_a_mark_count() {
        use RuleAttribute::{FwMark, FwMask, Priority};
        let of = |attributes: &[RuleAttribute]| parse(&body(RuleFlags::empty(), attributes));
        assert_eq!(of(&[Priority(32_766)]), None);
        let whole = MarkRule { priority: 5, mark: 0x1052, mask: u32::MAX };
        assert_eq!(of(&[Priority(5), FwMark(0x1052)]), Some(whole));
        let some = MarkRule { priority: 0, mark: 0x4_0000, mask: 0xff_0000 };
        assert_eq!(of(&[FwMark(0x4_0000), FwMask(0xff_0000)]), Some(some));
        assert_eq!(parse(&body(RuleFlags::Invert, &[FwMark(51_820)])), None);
    }
}
