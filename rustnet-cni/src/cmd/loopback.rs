//! The `loopback` plugin: sets `lo` of a pod up and down.
//!
//! containerd runs a plugin of that name before the network's own and starts no pod without it; where no other package
//! brings one, this binary is installed under that name as well. It needs nothing of the agent's.

use crate::call::Call;
use crate::env::Verb;
use crate::link::{self, Link};
use crate::netlink::Socket;
use crate::netns::Netns;
use crate::types::error::{Error, code};
use crate::types::result::{AddResult, Interface, Ip};
use ipnet::IpNet;
use serde_json::Value;

/// The interface, whatever `CNI_IFNAME` says: every namespace has exactly one loopback device, of this name.
const LO: &str = "lo";

/// Does what `verb` asks for; returns the result to print, if there is one.
pub fn run(verb: Verb, call: &Call) -> Result<Option<Value>, Error> {
    match verb {
        Verb::Add => add(call).map(Some),
        Verb::Del => del(call).map(|()| None),
        Verb::Check => check(call).map(|()| None),
        // Nothing is kept outside the pod's namespace, and nothing is needed to work.
        Verb::Gc | Verb::Status | Verb::Version => Ok(None),
    }
}

fn add(call: &Call) -> Result<Value, Error> {
    let version = call.conf.version;
    let path = call.env.netns.as_deref().unwrap_or_default();
    let (mut pod, lo) = enter(path)?;
    pod.run(vec![link::up(lo.index)])?;
    // In a chain, the result so far is the result.
    if let Some(prev) = &call.conf.prev_result {
        let Value::Object(mut prev) = prev.clone() else {
            return Err(Error::new(code::DECODE, "prevResult is not a JSON object"));
        };
        prev.insert("cniVersion".into(), version.as_str().into());
        return Ok(prev.into());
    }
    // The kernel adds them as the link comes up; without IPv6 there is only one.
    let addresses = link::addresses(&mut pod, lo.index)?.into_iter().filter(|(ip, _)| ip.is_loopback());
    let ips = addresses.filter_map(|(ip, prefix)| {
        Some(Ip { address: IpNet::new(ip, prefix).ok()?, gateway: None, interface: Some(0) })
    });
    let interface = Interface { name: LO.into(), mac: link::format_mac(lo.mac), mtu: 0, sandbox: path.into() };
    let result = AddResult { interfaces: vec![interface], ips: ips.collect(), ..AddResult::default() };
    result.to_json(version).map_err(|e| Error::new(code::DECODE, format!("the result cannot be written: {e}")))
}

fn del(call: &Call) -> Result<(), Error> {
    let Some(path) = call.env.netns.as_deref() else { return Ok(()) };
    match enter(path) {
        Ok((mut pod, lo)) => Ok(pod.run(vec![link::down(lo.index)]).map(drop)?),
        // With its namespace, `lo` has gone. The host's own namespace (NETNS) is no pod's: its `lo` stays as it is.
        Err(e) if matches!(e.code, code::UNKNOWN_CONTAINER | code::NETNS) => Ok(()),
        Err(e) => Err(e),
    }
}

fn check(call: &Call) -> Result<(), Error> {
    let path = call.env.netns.as_deref().unwrap_or_default();
    let (_, lo) = enter(path)?;
    if lo.up {
        return Ok(());
    }
    Err(Error::new(code::CHANGED, format!("interface {LO} in {path} is down")).details("ADD sets it up again"))
}

/// A socket in the pod's namespace, and the loopback device there.
fn enter(path: &str) -> Result<(Socket, Link), Error> {
    let netns = Netns::open(path)?;
    let mut pod = netns.inside(Socket::open).map_err(|e| Error::io(format!("enter {path}"), &e))?;
    let lo = link::get(&mut pod, LO)?;
    let lo = lo.ok_or_else(|| Error::new(code::IO, format!("network namespace {path} has no interface {LO}")))?;
    Ok((pod, lo))
}
