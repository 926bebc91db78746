//! Rules of the routing policy (`ip rule`), as far as they select packets by their mark.

use anyhow::{Context, Result};

use super::netlink::{Message, Socket, attributes, number};

/// `FRA_PRIORITY`, `FRA_FWMARK`, `FRA_FWMASK` (uapi/linux/fib_rules.h).
const PRIORITY: u16 = 6;
const FWMARK: u16 = 10;
const FWMASK: u16 = 16;
/// `FIB_RULE_INVERT`: the rule selects all that does not match.
const INVERT: u32 = 2;

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
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        // `struct fib_rule_hdr`.
        let header = [family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let replies = socket.dump(Message::new(libc::RTM_GETRULE, 0, &header)).context("listing routing rules")?;
        rules.extend(replies.iter().filter_map(|reply| parse(&reply.body)));
    }
    Ok(rules)
}

fn parse(body: &[u8]) -> Option<MarkRule> {
    let (header, rest) = body.split_at_checked(12)?;
    if number(&header[8..])? & INVERT != 0 {
        return None;
    }
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).and_then(|(_, value)| number(value));
    let mask = find(FWMASK).unwrap_or(u32::MAX);
    let mark = find(FWMARK)?;
    (mask != 0).then_some(MarkRule { priority: find(PRIORITY).unwrap_or(0), mark, mask })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(flags: u32, attributes: &[(u16, u32)]) -> Vec<u8> {
        let mut header = [0; 12];
        header[8..].copy_from_slice(&flags.to_ne_bytes());
        let message = Message::new(libc::RTM_NEWRULE, 0, &header);
        attributes.iter().fold(message, |message, (kind, value)| message.u32(*kind, *value)).into_body()
    }

    #[test]
    fn only_rules_with_a_mark_count() {
        let of = |flags, attributes: &[(u16, u32)]| parse(&body(flags, attributes));
        assert_eq!(of(0, &[(PRIORITY, 32_766)]), None);
        let whole = MarkRule { priority: 5, mark: 0x1052, mask: u32::MAX };
        assert_eq!(of(0, &[(PRIORITY, 5), (FWMARK, 0x1052)]), Some(whole));
        let some = MarkRule { priority: 0, mark: 0x4_0000, mask: 0xff_0000 };
        assert_eq!(of(0, &[(FWMARK, 0x4_0000), (FWMASK, 0xff_0000)]), Some(some));
        assert_eq!(of(INVERT, &[(FWMARK, 51_820)]), None);
    }
}
