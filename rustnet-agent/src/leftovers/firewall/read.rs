//! Rules of nftables by netlink. Numbers are of `linux/netfilter/nf_tables.h`.

use anyhow::{Context, Result};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{Chain, ChainName, Comparison, Element, Expression, Hook, Load, Ruleset, Verdict, legacy};
use crate::leftovers::nftables::{Request, text};
use crate::net::netlink::{self, Socket, value};

/// `NFT_MSG_GETCHAIN`, `NFT_MSG_GETRULE`, `NFT_MSG_GETSETELEM`.
const GET: [u16; 3] = [4, 7, 13];
/// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const FAMILIES: [u8; 3] = [1, 2, 10];

/// Reads all rules of this network namespace; those of iptables-legacy included.
///
/// # Errors
/// No rights, or a socket that fails.
pub fn read() -> Result<Ruleset> {
    let mut rules = read_nftables()?;
    rules.chains.extend(legacy::read()?);
    Ok(rules)
}

fn read_nftables() -> Result<Ruleset> {
    let socket = match Socket::of(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        Err(netlink::Error::Io(e)) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Ruleset::default()),
        Err(e) => return Err(e).context("opening a netfilter socket"),
    };
    let mut reader = Reader { socket };
    let mut rules = Ruleset::default();
    for family in FAMILIES {
        let chains = match reader.dump(GET[0], family, &[]) {
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => continue,
            chains => chains.context("asking for nftables' chains")?,
        };
        rules.chains.extend(chains.iter().filter_map(|reply| chain(family, &Found::of(reply)?)));
        let all = reader.dump(GET[1], family, &[]).context("asking for nftables' rules")?;
        for (name, rule) in all.iter().filter_map(|reply| rule(family, &Found::of(reply)?)) {
            if let Some(chain) = rules.chains.get_mut(&name) {
                chain.rules.push(rule);
            }
        }
    }
    for set in lookups(&rules) {
        let elements = reader.dump(GET[2], set.family, &[(1, &set.table), (2, &set.name)]);
        // A set that goes meanwhile is one that is not known.
        if let Ok(replies) = elements {
            let elements =
                replies.iter().filter_map(|body| Found::of(body)).flat_map(|found| elements_of(&found)).collect();
            rules.sets.insert(set, elements);
        }
    }
    Ok(rules)
}

struct Reader {
    socket: Socket,
}

impl Reader {
    /// The bodies of the answers.
    fn dump(&mut self, kind: u16, family: u8, names: &[(u16, &String)]) -> Result<Vec<Vec<u8>>, netlink::Error> {
        let request = Request::of(kind, family);
        let request = names.iter().fold(request, |request, (attribute, name)| request.with_name(*attribute, name));
        self.socket.dump(&request, |body| Some(body.to_vec()))
    }
}

/// The sets that rules look into.
fn lookups(rules: &Ruleset) -> Vec<ChainName> {
    let mut all: Vec<_> = rules
        .chains
        .iter()
        .flat_map(|(name, chain)| chain.rules.iter().flatten().map(move |expression| (name, expression)))
        .filter_map(|(name, expression)| match expression {
            Expression::Lookup(_, _, set) => Some(ChainName { name: set.clone(), ..name.clone() }),
            _ => None,
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

/// Kinds and values of attributes.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    netlink::attributes(bytes).map(|attribute| (attribute.kind(), value(attribute)))
}

/// Attributes.
struct Found<'a>(&'a [u8]);

impl<'a> Found<'a> {
    /// Behind `struct nfgenmsg`.
    fn of(body: &'a [u8]) -> Option<Self> {
        body.get(4..).map(Self)
    }

    fn get(&self, kind: u16) -> Option<&'a [u8]> {
        attributes(self.0).find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    fn nested(&self, kind: u16) -> Option<Self> {
        self.get(kind).map(Self)
    }

    fn text(&self, kind: u16) -> Option<String> {
        self.get(kind).and_then(text)
    }

    fn number(&self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// `NFTA_DATA_VALUE`.
    fn data(&self, kind: u16) -> Option<Vec<u8>> {
        self.nested(kind)?.get(1).map(<[u8]>::to_vec)
    }
}

fn chain(family: u8, found: &Found<'_>) -> Option<(ChainName, Chain)> {
    let name = ChainName { family, table: found.text(1)?, name: found.text(3)? };
    let hook = found.nested(4).and_then(|hook| hook.number(1)).map(|number| match number {
        0 => Hook::Prerouting,
        1 => Hook::Input,
        _ => Hook::Other,
    });
    Some((name, Chain { hook, is_policy_drop: found.number(5) == Some(0), rules: Vec::new() }))
}

fn rule(family: u8, found: &Found<'_>) -> Option<(ChainName, Vec<Expression>)> {
    let name = ChainName { family, table: found.text(1)?, name: found.text(2)? };
    let expressions = attributes(found.get(4).unwrap_or_default());
    Some((name, expressions.map(|(_, it)| expression(&Found(it)).unwrap_or(Expression::Unknown)).collect()))
}

fn expression(found: &Found<'_>) -> Option<Expression> {
    let data = found.nested(2).unwrap_or(Found(&[]));
    Some(match found.text(1)?.as_str() {
        // Those that write instead of reading have no register to write to.
        "meta" => Expression::Load(data.number(1)?, Load::Meta(data.number(2)?)),
        "ct" => Expression::Load(data.number(1)?, Load::Ct(data.number(2)?)),
        "payload" => {
            Expression::Load(data.number(1)?, Load::Payload(data.number(2)?, data.number(3)?, data.number(4)?))
        }
        "fib" => Expression::Load(data.number(1)?, Load::Fib(data.number(2)?, data.number(3)?)),
        "bitwise" if data.number(6).unwrap_or(0) == 0 => {
            Expression::Mask(data.number(1)?, data.number(2)?, data.data(4)?, data.data(5)?)
        }
        "cmp" => {
            let comparison = match data.number(2)? {
                0 => Comparison::Equal,
                1 => Comparison::Unequal,
                other => Comparison::Ordered(other),
            };
            Expression::Compare(data.number(1)?, comparison, data.data(3)?)
        }
        "range" => Expression::Range(data.number(1)?, data.number(2)? == 1, data.data(3)?, data.data(4)?),
        "lookup" => Expression::Lookup(data.number(2)?, data.number(5).unwrap_or(0) & 1 == 1, data.text(1)?),
        "immediate" => match data.nested(2).and_then(|it| it.nested(2)) {
            Some(found) => Expression::Verdict(verdict(&found)?),
            None => return None,
        },
        "reject" => Expression::Verdict(Verdict::Drop),
        "match" => Expression::Match(data.text(1)?, data.get(3)?.to_vec()),
        "target" => match data.text(1)?.as_str() {
            "REJECT" => Expression::Verdict(Verdict::Drop),
            // It takes packets for a program to judge.
            "NFQUEUE" => Expression::Unknown,
            _ => Expression::Pass,
        },
        "counter" | "log" | "notrack" | "last" => Expression::Pass,
        _ => Expression::Unknown,
    })
}

fn verdict(found: &Found<'_>) -> Option<Verdict> {
    Some(match found.number(1)?.cast_signed() {
        0 => Verdict::Drop,
        -1 => Verdict::Continue,
        -3 => Verdict::Jump(found.text(2)?),
        -4 => Verdict::Goto(found.text(2)?),
        -5 => Verdict::Return,
        // A queue's program may accept.
        _ => Verdict::Accept,
    })
}

fn elements_of(found: &Found<'_>) -> Vec<Element> {
    let parse = |element: &[u8]| {
        let element = Found(element);
        let verdict = element.nested(2).and_then(|it| it.nested(2)).and_then(|it| verdict(&it));
        Some(Element { key: element.data(1)?, is_end: element.number(3).unwrap_or(0) & 1 == 1, verdict })
    };
    attributes(found.get(3).unwrap_or_default()).filter_map(|(_, element)| parse(element)).collect()
}
