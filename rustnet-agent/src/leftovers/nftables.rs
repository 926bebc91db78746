//! nftables by netlink: which tables, chains and jumps there are, and their removal in one transaction.
//!
//! No `nft` is needed, which images of one program do not have. What iptables-nft makes is seen as well: it is nftables.

use std::fmt;

use anyhow::{Context, Result};
use netlink_packet_core::{DefaultNla, Emitable, NetlinkSerializable, parse_string};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::net::netlink::{self, Socket, attributes, value};

/// `NFNL_SUBSYS_NFTABLES`, in the upper octet of a message's type.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`.
const BATCH: (u16, u16) = (0x10, 0x11);
/// `struct nfgenmsg`.
const HEADER: usize = 4;
/// Requests in one transaction: all their answers fit into the socket's buffer.
const CHUNK: usize = 512;

/// `NFT_MSG_*`.
mod msg {
    pub(super) const GET_TABLE: u16 = 1;
    pub(super) const DEL_TABLE: u16 = 2;
    pub(super) const GET_CHAIN: u16 = 4;
    pub(super) const DEL_CHAIN: u16 = 5;
    pub(super) const GET_RULE: u16 = 7;
    pub(super) const DEL_RULE: u16 = 8;
}

/// `NFTA_*`.
mod attr {
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const CHAIN_TABLE: u16 = 1;
    pub(super) const CHAIN_NAME: u16 = 3;
    pub(super) const RULE_TABLE: u16 = 1;
    pub(super) const RULE_CHAIN: u16 = 2;
    pub(super) const RULE_HANDLE: u16 = 3;
    pub(super) const RULE_EXPRESSIONS: u16 = 4;
    pub(super) const EXPR_NAME: u16 = 1;
    pub(super) const EXPR_DATA: u16 = 2;
    pub(super) const IMMEDIATE_DATA: u16 = 2;
    pub(super) const DATA_VERDICT: u16 = 2;
    pub(super) const VERDICT_CHAIN: u16 = 2;
}

/// Families that Kubernetes' components use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// `NFPROTO_IPV4`.
    Ip,
    /// `NFPROTO_IPV6`.
    Ip6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ip, Self::Ip6];

    fn number(self) -> u8 {
        match self {
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }
}

impl fmt::Display for Family {
    /// As `nft` writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// A chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.table, self.name)
    }
}

/// A rule that leads to another chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Jump {
    /// Where it is.
    pub chain: Chain,
    /// The kernel's number of the rule in its table.
    pub handle: u64,
    /// The name of the chain that it leads to.
    pub to: String,
}

/// Something to remove.
#[derive(Clone, Copy, Debug)]
pub enum Removal<'a> {
    /// A table with all that is in it.
    Table(&'a Table),
    /// A rule.
    Rule(&'a Jump),
    /// All rules of a chain.
    Rules(&'a Chain),
    /// A chain, which nothing may lead to any more.
    Chain(&'a Chain),
}

/// nftables of the network namespace of the thread that opened it.
pub struct Nftables {
    socket: Socket,
}

impl Nftables {
    /// Opens. `None`: this kernel has no nftables, so that there can be no rules.
    pub fn open() -> Result<Option<Self>> {
        let socket = match Socket::of(NETLINK_NETFILTER) {
            Ok(socket) => socket,
            Err(netlink::Error::Io(e)) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
            Err(e) => return Err(e).context("opening a netfilter socket"),
        };
        let mut this = Self { socket };
        match this.dump(msg::GET_TABLE, Family::Ip, |_| Some(())) {
            // Netfilter is there, but this part of it is not.
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(None),
            result => result.map(|_| Some(this)).context("asking for nftables"),
        }
    }

    /// All tables of IPv4 and IPv6.
    pub fn tables(&mut self) -> Result<Vec<Table>> {
        self.list(msg::GET_TABLE, |family, found| {
            let name = found.get(attr::TABLE_NAME).and_then(text)?;
            Some(Table { family, name })
        })
        .context("listing nftables' tables")
    }

    /// All chains of IPv4 and IPv6.
    pub fn chains(&mut self) -> Result<Vec<Chain>> {
        self.list(msg::GET_CHAIN, |family, found| {
            let table = Table { family, name: found.get(attr::CHAIN_TABLE).and_then(text)? };
            Some(Chain { table, name: found.get(attr::CHAIN_NAME).and_then(text)? })
        })
        .context("listing nftables' chains")
    }

    /// All rules of IPv4 and IPv6 that jump or go to a chain; one entry a chain.
    pub fn jumps(&mut self) -> Result<Vec<Jump>> {
        let rules = self.list(msg::GET_RULE, |family, found| {
            let table = Table { family, name: found.get(attr::RULE_TABLE).and_then(text)? };
            let chain = Chain { table, name: found.get(attr::RULE_CHAIN).and_then(text)? };
            let handle = u64::from_be_bytes(found.get(attr::RULE_HANDLE)?.try_into().ok()?);
            let expressions = found.get(attr::RULE_EXPRESSIONS).unwrap_or_default();
            let to = targets(expressions);
            Some(to.into_iter().map(|to| Jump { chain: chain.clone(), handle, to }).collect::<Vec<_>>())
        });
        Ok(rules.context("listing nftables' rules")?.into_iter().flatten().collect())
    }

    /// Removes in this order. What fits into one transaction goes as a whole or not at all.
    pub fn remove(&mut self, removals: &[Removal<'_>]) -> Result<()> {
        for chunk in removals.chunks(CHUNK) {
            let frame = |kind| Request { kind, family: 0, resource: SUBSYSTEM, attributes: Vec::new() };
            let requests: Vec<_> = chunk.iter().map(request).collect();
            self.socket.transaction(&frame(BATCH.0), &requests, &frame(BATCH.1)).context("removing from nftables")?;
        }
        Ok(())
    }

    fn dump<T>(
        &mut self,
        kind: u16,
        family: Family,
        parse: impl Fn(&Found<'_>) -> Option<T>,
    ) -> Result<Vec<T>, netlink::Error> {
        self.socket.dump(&Request::new(kind, family), |body| parse(&Found(body.get(HEADER..)?)))
    }

    fn list<T>(&mut self, kind: u16, parse: impl Fn(Family, &Found<'_>) -> Option<T>) -> Result<Vec<T>> {
        let mut all = Vec::new();
        for family in Family::ALL {
            all.extend(self.dump(kind, family, |found| parse(family, found))?);
        }
        Ok(all)
    }
}

/// The attributes of an answer.
struct Found<'a>(&'a [u8]);

impl<'a> Found<'a> {
    fn get(&self, kind: u16) -> Option<&'a [u8]> {
        attributes(self.0).find(|found| found.kind() == kind).map(value)
    }
}

/// A request to nftables, or the frame of a transaction.
pub struct Request {
    kind: u16,
    family: u8,
    resource: u16,
    attributes: Vec<DefaultNla>,
}

impl Request {
    fn new(kind: u16, family: Family) -> Self {
        Self::of(kind, family.number())
    }

    /// One of this `NFT_MSG_*`, for this `NFPROTO_*`.
    pub fn of(kind: u16, family: u8) -> Self {
        Self { kind: SUBSYSTEM << 8 | kind, family, resource: 0, attributes: Vec::new() }
    }

    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attributes.push(DefaultNla::new(kind, value.to_vec()));
        self
    }

    /// The same with a name in an attribute.
    #[must_use]
    pub fn with_name(self, kind: u16, name: &str) -> Self {
        self.with(kind, &[name.as_bytes(), &[0]].concat())
    }
}

impl NetlinkSerializable for Request {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        // The resource is in network order.
        let [high, low] = self.resource.to_be_bytes();
        buffer[..HEADER].copy_from_slice(&[self.family, 0, high, low]);
        self.attributes.as_slice().emit(&mut buffer[HEADER..]);
    }
}

fn request(removal: &Removal<'_>) -> Request {
    let rule = |chain: &Chain| {
        Request::new(msg::DEL_RULE, chain.table.family)
            .with_name(attr::RULE_TABLE, &chain.table.name)
            .with_name(attr::RULE_CHAIN, &chain.name)
    };
    match removal {
        Removal::Table(table) => Request::new(msg::DEL_TABLE, table.family).with_name(attr::TABLE_NAME, &table.name),
        Removal::Rule(jump) => rule(&jump.chain).with(attr::RULE_HANDLE, &jump.handle.to_be_bytes()),
        Removal::Rules(chain) => rule(chain),
        Removal::Chain(chain) => Request::new(msg::DEL_CHAIN, chain.table.family)
            .with_name(attr::CHAIN_TABLE, &chain.table.name)
            .with_name(attr::CHAIN_NAME, &chain.name),
    }
}

/// The text in an attribute's value.
pub fn text(value: &[u8]) -> Option<String> {
    parse_string(value).ok()
}

/// The chains that a rule's expressions lead to.
fn targets(expressions: &[u8]) -> Vec<String> {
    let target = |expression| {
        let expression = Found(expression);
        if text(expression.get(attr::EXPR_NAME)?)? != "immediate" {
            return None;
        }
        let data = Found(Found(expression.get(attr::EXPR_DATA)?).get(attr::IMMEDIATE_DATA)?);
        Found(data.get(attr::DATA_VERDICT)?).get(attr::VERDICT_CHAIN).and_then(text)
    };
    attributes(expressions).filter_map(|expression| target(value(expression))).collect()
}
