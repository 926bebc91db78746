//! Who listens on which port of this network namespace, read from `/proc`: no packet is sent to find out.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

/// `TCP_LISTEN`, and `TCP_CLOSE`, which is the state of UDP sockets that are not connected.
const TCP_LISTEN: &str = "0A";
const UDP_UNCONNECTED: &str = "07";

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Who has a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The kernel itself, such as for a tunnel device.
    Kernel,
    /// A process, by the name of its program.
    Process(String),
    /// A process that cannot be seen from here: of another PID namespace, or another user's.
    Hidden,
}

/// A socket that takes what comes to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The protocol.
    pub proto: Proto,
    /// The address that it is bound to; unspecified for all.
    pub addr: IpAddr,
    /// The port.
    pub port: u16,
    /// Who has it.
    pub owner: Owner,
}

/// All listeners, by protocol and port.
pub fn listeners() -> Result<Vec<Listener>> {
    let mut found = Vec::new();
    for (file, proto) in [("tcp", Proto::Tcp), ("tcp6", Proto::Tcp), ("udp", Proto::Udp), ("udp6", Proto::Udp)] {
        let path = format!("/proc/thread-self/net/{file}");
        match fs::read_to_string(&path) {
            Ok(text) => found.extend(text.lines().skip(1).filter_map(|line| parse(proto, line))),
            // A kernel without IPv6.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.ends_with('6') => {}
            Err(e) => return Err(e).with_context(|| format!("reading {path}")),
        }
    }
    let owners = if found.is_empty() { BTreeMap::new() } else { owners() };
    let mut listeners: Vec<_> = found
        .into_iter()
        .map(|(proto, addr, port, inode)| {
            let process = owners.get(&inode).map_or(Owner::Hidden, |name| Owner::Process(name.clone()));
            Listener { proto, addr, port, owner: if inode == 0 { Owner::Kernel } else { process } }
        })
        .collect();
    listeners.sort_by_key(|it| (it.proto, it.port, it.addr));
    Ok(listeners)
}

/// A line of `/proc/net/tcp` and the like, if it is a listener: protocol, address, port, inode.
fn parse(proto: Proto, line: &str) -> Option<(Proto, IpAddr, u16, u64)> {
    let mut words = line.split_whitespace();
    let local = words.nth(1)?;
    let state = words.nth(1)?;
    let inode = words.nth(5)?.parse().ok()?;
    let listens = match proto {
        Proto::Tcp => state == TCP_LISTEN,
        Proto::Udp => state == UDP_UNCONNECTED,
    };
    let (addr, port) = local.split_once(':')?;
    listens.then_some((proto, address(addr)?, u16::from_str_radix(port, 16).ok()?, inode))
}

/// Words of 32 bits in hexadecimal, each as this machine stores it.
fn address(hex: &str) -> Option<IpAddr> {
    let word = |i: usize| u32::from_str_radix(hex.get(i * 8..i * 8 + 8)?, 16).ok().map(u32::to_ne_bytes);
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).into())
        }
        _ => None,
    }
}

/// Names of programs by the inodes of their sockets, of all processes that can be seen.
fn owners() -> BTreeMap<u64, String> {
    let mut owners = BTreeMap::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        // Processes end while we look.
        let Ok(descriptors) = fs::read_dir(dir.join("fd")) else { continue };
        let inode = |link: std::path::PathBuf| -> Option<u64> {
            link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        };
        let inodes: Vec<_> = descriptors.flatten().filter_map(|fd| inode(fs::read_link(fd.path()).ok()?)).collect();
        if !inodes.is_empty() {
            let name = program(&dir);
            owners.extend(inodes.into_iter().map(|inode| (inode, name.clone())));
        }
    }
    owners
}

/// The name of a process's program. `comm` is cut to 15 octets, which `kube-controller-manager` has more of.
fn program(dir: &std::path::Path) -> String {
    let command = fs::read(dir.join("cmdline")).unwrap_or_default();
    let first = command.split(|b| *b == 0).next().unwrap_or_default();
    let name = String::from_utf8_lossy(first.rsplit(|b| *b == b'/').next().unwrap_or_default()).into_owned();
    if name.is_empty() { fs::read_to_string(dir.join("comm")).unwrap_or_default().trim().to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::{Owner, Proto, listeners, parse};
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    #[test]
    fn lines_of_both_families() {
        let line =
            "   0: 0100007F:2697 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0";
        if cfg!(target_endian = "little") {
            assert_eq!(parse(Proto::Tcp, line), Some((Proto::Tcp, Ipv4Addr::LOCALHOST.into(), 9879, 4711)));
        }
        assert_eq!(parse(Proto::Udp, line), None, "not a state of UDP");
        let six =
            "1: 00000000000000000000000000000000:2118 00000000000000000000000000000000:0000 07 0:0 00:0 0 0 0 0 2 0";
        assert_eq!(parse(Proto::Udp, six), Some((Proto::Udp, "::".parse().unwrap(), 8472, 0)));
        assert_eq!(parse(Proto::Tcp, "nonsense"), None);
    }

    #[test]
    fn our_own_sockets_are_ours() {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let all = listeners().unwrap();
        for (proto, port) in
            [(Proto::Tcp, tcp.local_addr().unwrap().port()), (Proto::Udp, udp.local_addr().unwrap().port())]
        {
            let found = all.iter().find(|it| it.proto == proto && it.port == port).expect("listed");
            assert_eq!(found.addr, Ipv4Addr::LOCALHOST);
            assert!(matches!(&found.owner, Owner::Process(name) if name.starts_with("rustnet_agent")), "{found:?}");
        }
    }
}
