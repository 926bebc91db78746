//! Matches of iptables that say something of a new UDP packet. Layouts are of `linux/netfilter/xt_*.h`.

/// Bit of a new connection in a mask of states: those of `enum ip_conntrack_info`, one up.
pub const STATE_NEW: u32 = 8;

/// Whether a match takes a new UDP packet to this port; `None` if that depends.
pub fn takes(name: &str, data: &[u8], port: u16) -> Option<bool> {
    let half = |at: usize| Some(u16::from_ne_bytes(data.get(at..at + 2)?.try_into().ok()?));
    match name {
        "comment" => Some(true),
        // What they are of is another protocol.
        "tcp" | "icmp" | "icmp6" | "sctp" | "dccp" | "esp" | "ah" => Some(false),
        "udp" => {
            let [from, to] = [half(4)?, half(6)?];
            let is_inverted = *data.get(8)? & 2 != 0;
            let any_source = half(0)? == 0 && half(2)? == u16::MAX;
            let is_inside = (from..=to).contains(&port) != is_inverted;
            if is_inside && !any_source { None } else { Some(is_inside) }
        }
        "state" => Some(u32::from_ne_bytes(data.get(..4)?.try_into().ok()?) & STATE_NEW != 0),
        "conntrack" => {
            // `xt_conntrack_mtinfo2` and `3`: flags of what is compared, of what is inverted, then the states.
            let [flags, inverted, states] = [half(146)?, half(148)?, half(150)?];
            let is_of_state = (u32::from(states) & STATE_NEW != 0) != (inverted & 1 != 0);
            match (flags, is_of_state) {
                (1, takes) => Some(takes),
                (_, false) if flags & 1 != 0 => Some(false),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::takes;

    #[test]
    fn states_and_ports() {
        let conntrack = |states: u16| {
            let mut data = vec![0; 168];
            data[146..148].copy_from_slice(&1_u16.to_ne_bytes());
            data[150..152].copy_from_slice(&states.to_ne_bytes());
            takes("conntrack", &data, 8472)
        };
        assert_eq!([conntrack(2 | 4), conntrack(8)], [Some(false), Some(true)]);
        let udp = |from: u16, to: u16| {
            let data: Vec<u8> = [0, u16::MAX, from, to, 0].into_iter().flat_map(u16::to_ne_bytes).collect();
            takes("udp", &data, 8472)
        };
        assert_eq!([udp(53, 53), udp(8000, 9000)], [Some(false), Some(true)]);
        assert_eq!(
            [takes("tcp", &[], 8472), takes("addrtype", &[], 8472), takes("udp", &[], 1)],
            [Some(false), None, None]
        );
    }
}
