//! Follows a packet through the rules.

use std::collections::HashMap;

use super::{Chain, ChainName, Comparison, Element, Expression, Hook, Load, Ruleset, Verdict, xtables};

/// Chains within chains; the kernel allows as many.
const DEPTH: u32 = 16;

/// A new UDP packet from outside to this host.
#[derive(Clone, Debug)]
pub struct Packet {
    /// `NFPROTO_IPV4` or `NFPROTO_IPV6`.
    pub family: u8,
    /// The device that it comes by.
    pub device: String,
    /// Its destination port.
    pub port: u16,
}

/// What can become of a packet in a chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// It may pass.
    pub accept: bool,
    /// It may be dropped.
    pub drop: bool,
    /// It may come to the end of the chain.
    pub end: bool,
}

/// What a rule does with a packet.
enum Hit<'a> {
    No,
    Maybe(&'a Verdict),
    Yes(&'a Verdict),
    /// It depends on too much.
    Anything,
}

impl Ruleset {
    /// The base chain for packets to this host that drops this one whatever else it has, if there is one.
    pub fn dropped_by(&self, packet: &Packet) -> Option<&ChainName> {
        self.base(Hook::Input, packet.family).into_iter().find(|name| {
            let outcome = self.through(name, packet, 0);
            let policy_drop = self.chains.get(*name).is_some_and(|chain| chain.is_policy_drop);
            let may_pass = outcome.accept || (outcome.end && !policy_drop);
            !may_pass
        })
    }

    /// Base chains for arriving packets with a rule that drops those whose source is reached by another device: a strict check of
    /// the reverse path.
    pub fn reverse_path_checks(&self, family: u8) -> Vec<&ChainName> {
        let checks = |name: &&ChainName| self.any_rule(name, 0, &is_reverse_path_check);
        self.base(Hook::Prerouting, family).into_iter().filter(checks).collect()
    }

    fn any_rule(&self, name: &ChainName, depth: u32, is_it: &impl Fn(&[Expression]) -> bool) -> bool {
        let Some(chain) = self.chains.get(name).filter(|_| depth <= DEPTH) else { return false };
        chain.rules.iter().any(|rule| {
            is_it(rule)
                || rule.iter().any(|expression| match expression {
                    Expression::Verdict(Verdict::Jump(to) | Verdict::Goto(to)) => {
                        self.any_rule(&ChainName { name: to.clone(), ..name.clone() }, depth + 1, is_it)
                    }
                    _ => false,
                })
        })
    }

    fn through(&self, name: &ChainName, packet: &Packet, depth: u32) -> Outcome {
        let mut all = Outcome::default();
        let Some(chain) = self.chains.get(name).filter(|_| depth <= DEPTH) else {
            return Outcome { accept: true, drop: true, end: true };
        };
        let Chain { rules, .. } = chain;
        for rule in rules {
            let (verdict, is_certain) = match self.hit(name, rule, packet) {
                Hit::No => continue,
                Hit::Anything => {
                    (all.accept, all.drop) = (true, true);
                    continue;
                }
                Hit::Maybe(verdict) => (verdict, false),
                Hit::Yes(verdict) => (verdict, true),
            };
            let into = |to: &String| self.through(&ChainName { name: to.clone(), ..name.clone() }, packet, depth + 1);
            let goes_on = match verdict {
                Verdict::Continue => true,
                Verdict::Accept => {
                    all.accept = true;
                    false
                }
                Verdict::Drop => {
                    all.drop = true;
                    false
                }
                Verdict::Return => {
                    all.end = true;
                    false
                }
                Verdict::Jump(to) => {
                    let there = into(to);
                    (all.accept, all.drop) = (all.accept | there.accept, all.drop | there.drop);
                    there.end
                }
                Verdict::Goto(to) => {
                    let there = into(to);
                    (all.accept, all.drop, all.end) =
                        (all.accept | there.accept, all.drop | there.drop, all.end | there.end);
                    false
                }
            };
            if is_certain && !goes_on {
                return all;
            }
        }
        Outcome { end: true, ..all }
    }

    fn hit<'a>(&'a self, place: &ChainName, rule: &'a [Expression], packet: &Packet) -> Hit<'a> {
        let mut registers: HashMap<u32, Vec<u8>> = HashMap::new();
        let mut is_certain = true;
        for expression in rule {
            let holds = match expression {
                Expression::Load(into, what) => {
                    match packet.value(*what) {
                        Some(value) => drop(registers.insert(*into, value)),
                        None => drop(registers.remove(into)),
                    }
                    Some(true)
                }
                Expression::Mask(from, into, mask, xor) => {
                    let bits = |value: &Vec<u8>| {
                        value.iter().zip(mask).zip(xor).map(|((v, m), x)| (v & m) ^ x).collect::<Vec<_>>()
                    };
                    match registers.get(from).map(bits) {
                        Some(value) => drop(registers.insert(*into, value)),
                        None => drop(registers.remove(into)),
                    }
                    Some(true)
                }
                Expression::Compare(register, how, with) => {
                    registers.get(register).and_then(|it| compare(it, *how, with))
                }
                Expression::Range(register, is_inverted, from, to) => {
                    registers.get(register).map(|it| (from <= it && it <= to) != *is_inverted)
                }
                Expression::Lookup(register, is_inverted, set) => {
                    let set = self.sets.get(&ChainName { name: set.clone(), ..place.clone() });
                    let is_map = set.is_some_and(|set| set.iter().any(|it| it.verdict.is_some()));
                    match (registers.get(register).zip(set).and_then(|(it, set)| find(set, it).ok()), is_map) {
                        (Some(Some(Element { verdict: Some(verdict), .. })), true) => {
                            return if is_certain { Hit::Yes(verdict) } else { Hit::Maybe(verdict) };
                        }
                        (None, true) => return Hit::Anything,
                        (found, _) => found.map(|found| found.is_some() != *is_inverted),
                    }
                }
                Expression::Verdict(verdict) => {
                    return if is_certain { Hit::Yes(verdict) } else { Hit::Maybe(verdict) };
                }
                Expression::Match(name, data) => xtables::takes(name, data, packet.port),
                Expression::Pass => Some(true),
                Expression::Unknown => {
                    registers.clear();
                    None
                }
            };
            match holds {
                Some(true) => {}
                Some(false) => return Hit::No,
                None => is_certain = false,
            }
        }
        Hit::No
    }
}

impl Packet {
    /// What a load gives, if that is known beforehand.
    fn value(&self, load: Load) -> Option<Vec<u8>> {
        const UDP: u8 = 17;
        match load {
            // NFT_META_NFPROTO, NFT_META_L4PROTO, NFT_META_IIFNAME, NFT_META_IIFTYPE
            Load::Meta(15) => Some(vec![self.family]),
            Load::Meta(16) => Some(vec![UDP]),
            Load::Meta(6) => {
                let mut name = self.device.clone().into_bytes();
                name.resize(libc::IFNAMSIZ, 0);
                Some(name)
            }
            // NFT_CT_STATE, NFT_CT_STATUS
            Load::Ct(0) => Some(xtables::STATE_NEW.to_ne_bytes().to_vec()),
            Load::Ct(2) => Some(vec![0; 4]),
            Load::Payload(1, 9, 1) if self.family == 2 => Some(vec![UDP]),
            Load::Payload(1, 6, 1) if self.family == 10 => Some(vec![UDP]),
            Load::Payload(2, 2, 2) => Some(self.port.to_be_bytes().to_vec()),
            Load::Meta(_) | Load::Ct(_) | Load::Payload(..) | Load::Fib(..) => None,
        }
    }
}

fn compare(value: &[u8], how: Comparison, with: &[u8]) -> Option<bool> {
    // A name with an asterisk is compared as far as it goes.
    let value = value.get(..with.len())?;
    Some(match how {
        Comparison::Equal => value == with,
        Comparison::Unequal => value != with,
        Comparison::Ordered(2) => value < with,
        Comparison::Ordered(3) => value <= with,
        Comparison::Ordered(4) => value > with,
        Comparison::Ordered(5) => value >= with,
        Comparison::Ordered(_) => return None,
    })
}

/// Nothing known decides it.
#[derive(Debug)]
struct Unclear;

/// The element that holds a value.
fn find<'a>(set: &'a [Element], value: &[u8]) -> Result<Option<&'a Element>, Unclear> {
    if set.iter().any(|element| element.key.len() < value.len()) {
        return Err(Unclear);
    }
    if !set.iter().any(|element| element.is_end) {
        return Ok(set.iter().find(|element| element.key.starts_with(value)));
    }
    let before = set.iter().filter(|element| element.key[..value.len()] <= *value);
    let last = before.max_by(|a, b| a.key.cmp(&b.key).then(b.is_end.cmp(&a.is_end)));
    Ok(last.filter(|element| !element.is_end))
}

/// `fib saddr . iif oif missing drop`, with or without the mark.
fn is_reverse_path_check(rule: &[Expression]) -> bool {
    // NFT_FIB_RESULT_OIF or OIFNAME; NFTA_FIB_F_SADDR, NFTA_FIB_F_IIF
    let looks = rule.iter().find_map(|expression| match expression {
        Expression::Load(into, Load::Fib(1 | 2, flags)) if flags & 1 != 0 && flags & 8 != 0 => Some(*into),
        _ => None,
    });
    let is_missing = |expression: &Expression| match expression {
        Expression::Compare(register, Comparison::Equal, value) => {
            looks == Some(*register) && value.iter().all(|it| *it == 0)
        }
        _ => false,
    };
    rule.iter().any(is_missing) && rule.contains(&Expression::Verdict(Verdict::Drop))
}

#[cfg(test)]
mod tests {
    use super::{Chain, ChainName, Element, Expression, Hook, Load, Packet, Ruleset, Verdict, find};
    use crate::leftovers::firewall::Comparison;

    fn name(name: &str) -> ChainName {
        ChainName { family: 1, table: "filter".into(), name: name.into() }
    }

    fn packet() -> Packet {
        Packet { family: 2, device: "eth0".into(), port: 8472 }
    }

    fn rules(policy_drop: bool, rules: Vec<Vec<Expression>>) -> Ruleset {
        let chain = Chain { hook: Some(Hook::Input), is_policy_drop: policy_drop, rules };
        Ruleset { chains: [(name("input"), chain)].into(), ..Ruleset::default() }
    }

    fn when(load: Load, equal: &[u8], verdict: Verdict) -> Vec<Expression> {
        vec![
            Expression::Load(1, load),
            Expression::Compare(1, Comparison::Equal, equal.to_vec()),
            Expression::Verdict(verdict),
        ]
    }

    #[test]
    fn only_what_is_certainly_dropped_is_dropped() {
        let tcp = || when(Load::Meta(16), &[6], Verdict::Accept);
        let from = || when(Load::Payload(1, 12, 4), &[10, 0, 0, 1], Verdict::Accept);
        let overlay = || when(Load::Payload(2, 2, 2), &8472_u16.to_be_bytes(), Verdict::Accept);
        let dropped = |rules: Ruleset| rules.dropped_by(&packet()).is_some();
        assert!(!dropped(rules(false, vec![tcp()])));
        assert!(dropped(rules(true, vec![tcp()])));
        assert!(dropped(rules(false, vec![tcp(), vec![Expression::Verdict(Verdict::Drop)]])));
        assert!(!dropped(rules(true, vec![tcp(), overlay()])));
        assert!(!dropped(rules(true, vec![from()])), "the other node may have that address");
        assert!(dropped(rules(true, vec![vec![Expression::Verdict(Verdict::Drop)], overlay()])), "too late");
        assert!(!dropped(rules(true, vec![vec![Expression::Unknown, Expression::Verdict(Verdict::Accept)]])));
    }

    #[test]
    fn chains_lead_back_or_not() {
        let through = |verdict: fn(String) -> Verdict, last: Verdict| {
            let mut all = rules(
                true,
                vec![vec![Expression::Verdict(verdict("sub".into()))], vec![Expression::Verdict(Verdict::Accept)]],
            );
            let sub = Chain { rules: vec![vec![Expression::Verdict(last)]], ..Chain::default() };
            all.chains.insert(name("sub"), sub);
            all.dropped_by(&packet()).is_some()
        };
        assert!(!through(Verdict::Jump, Verdict::Return));
        assert!(through(Verdict::Goto, Verdict::Return), "to the policy");
        assert!(through(Verdict::Jump, Verdict::Drop));
    }

    #[test]
    fn intervals_hold_what_is_between() {
        let element = |key: u16, is_end| Element { key: key.to_be_bytes().into(), is_end, verdict: None };
        let set =
            [element(8001, true), element(8000, false), element(0, true), element(9000, false), element(9001, true)];
        let holds = |port: u16| find(&set, &port.to_be_bytes()).unwrap().is_some();
        assert_eq!([7999, 8000, 8001, 9000, 9001].map(holds), [false, true, false, true, false]);
    }
}
