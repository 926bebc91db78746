//! Services, their clients, and ports of pods at this node's addresses, written as the agent and the CNI binary write them.

use super::connections::Plain;
use super::{HZ, Lab};
use anyhow::{Context, Result, ensure};
use rustnet_common::addr::{Addr, Ip4, Ip6};
use rustnet_common::affinity::{Affinity, AffinityKey};
use rustnet_common::backend::{self, Backend, id};
use rustnet_common::host_port::{self, HostPort, HostPortKey};
use rustnet_common::maglev;
use rustnet_common::names::map;
use rustnet_common::service::{self, SvcEntry, SvcKey, scope};
use rustnet_common::source_range::{self, SourceRange, SourceRangeKey};
use std::net::IpAddr;
use std::sync::atomic::Ordering;

impl Lab {
    /// Gives a pod's interface a port of an address.
    pub fn put_host_port(&self, at: (IpAddr, u16), proto: u8, pod: (IpAddr, u16), ifindex: u32) -> Result<()> {
        let key = HostPortKey { addr: at.0.into(), port: at.1, proto, pad: 0 };
        let value = HostPort { pod: pod.0.into(), ifindex, port: pod.1, pad: 0 };
        self.datapath.table(map::HOST_PORTS)?.put(&key, &value)
    }

    /// Gives a pod's interface a port of all addresses of the pod's family that this node has.
    pub fn put_port_of_all(&self, port: u16, proto: u8, pod: (IpAddr, u16), ifindex: u32) -> Result<()> {
        self.put_host_port((host_port::any(pod.0.is_ipv4()).into(), port), proto, pod, ifindex)
    }

    /// Takes all ports of this node from its pods.
    pub fn drop_host_ports(&self) -> Result<()> {
        self.datapath.table::<HostPortKey, HostPort>(map::HOST_PORTS)?.clear()
    }

    /// Writes a service; gives the backends' ids.
    pub fn serve(&self, vip: IpAddr, port: u16, proto: u8, flags: u16, to: &[(IpAddr, u16)]) -> Result<Vec<u32>> {
        let ids = self.serve_to(scope::CLUSTER, vip, port, proto, flags, to)?;
        self.put_wildcard(scope::CLUSTER, vip, 0)?;
        Ok(ids)
    }

    /// Writes a service for clients outside, at an address of this node or another; gives the backends' ids.
    pub fn publish(&self, at: IpAddr, port: u16, proto: u8, flags: u16, to: &[(IpAddr, u16)]) -> Result<Vec<u32>> {
        self.serve_to(scope::EXTERNAL, at, port, proto, flags, to)
    }

    /// The same, with session affinity for `seconds`.
    pub fn publish_sticky(&self, at: IpAddr, port: u16, proto: u8, seconds: u32, to: &[(IpAddr, u16)]) -> Result<()> {
        let first = self.backends.load(Ordering::Relaxed);
        self.publish(at, port, proto, 0, to)?;
        let entry = SvcEntry { first, count: to.len() as u32, id: 1 + first, affinity: seconds, flags: 0, table: 0 };
        self.put_entry(scope::EXTERNAL, at, port, proto, &entry)
    }

    /// Allows clients of a range, of this length, to use an entry for clients outside.
    pub fn allow(&self, at: IpAddr, port: u16, proto: u8, client: IpAddr, len: u8) -> Result<()> {
        let data = SourceRange { vip: at.into(), port, proto, pad: 0, client: client.into() };
        let key = SourceRangeKey { prefix_len: source_range::prefix_len(client.is_ipv4(), len), data };
        self.datapath.table(map::SOURCE_RANGES)?.put(&key, &source_range::ALLOWED)
    }

    /// Takes all ranges away.
    pub fn forbid_all(&self) -> Result<()> {
        self.datapath.table::<SourceRangeKey, u32>(map::SOURCE_RANGES)?.clear()
    }

    /// Writes a service for the cluster at an address that has ports of others, too.
    pub fn serve_at_node(&self, at: IpAddr, port: u16, proto: u8, to: &[(IpAddr, u16)]) -> Result<Vec<u32>> {
        self.serve_to(scope::CLUSTER, at, port, proto, 0, to)
    }

    /// Writes the wildcard entries of a load balancer's address.
    pub fn share(&self, vip: IpAddr) -> Result<()> {
        self.put_wildcard(scope::CLUSTER, vip, service::flags::SHARED)?;
        self.put_wildcard(scope::EXTERNAL, vip, 0)
    }

    fn put_wildcard(&self, scope: u8, vip: IpAddr, flags: u16) -> Result<()> {
        let flags = service::flags::VIP | flags;
        self.put_entry(scope, vip, 0, 0, &SvcEntry { first: 0, count: 0, id: 0, affinity: 0, flags, table: 0 })
    }

    fn serve_to(
        &self,
        scope: u8,
        vip: IpAddr,
        port: u16,
        proto: u8,
        flags: u16,
        to: &[(IpAddr, u16)],
    ) -> Result<Vec<u32>> {
        let first = self.backends.fetch_add(to.len() as u32, Ordering::Relaxed);
        let service = 1 + first;
        let mut ids = Vec::new();
        for (i, (ip, port)) in to.iter().enumerate() {
            // The ids do not stand in the order of the slots.
            let (index, slot) = (first + i as u32, first + (to.len() - 1 - i) as u32);
            let id = id::make(slot, 1 + index);
            let value = Backend { addr: Addr::from(*ip), port: *port, flags: 0, id, service, max_service: 0 };
            self.datapath.table(map::BACKENDS)?.put(&slot, &value)?;
            self.datapath.table(map::BACKEND_IDS)?.put(&index, &id)?;
            ids.push(id);
        }
        let entry = SvcEntry { first, count: to.len() as u32, id: service, affinity: 0, flags, table: 0 };
        self.put_entry(scope, vip, port, proto, &entry)?;
        Ok(ids)
    }

    /// A service's backend is gone for good, and its place may soon be another's.
    pub fn withdraw(&self, id: u32) -> Result<()> {
        self.datapath.table(map::BACKENDS)?.put(&id::slot_of(id), &Backend::cleared(id))
    }

    /// A backend serves no more, and nothing leads to it.
    pub fn end(&self, id: u32) -> Result<()> {
        let (table, slot) = (self.datapath.table::<_, Backend>(map::BACKENDS)?, id::slot_of(id));
        let backend = table.get(&slot)?.filter(|backend| backend.id == id).context("no such backend")?;
        table.put(&slot, &Backend { flags: backend.flags | backend::flags::ENDED, ..backend })
    }

    /// What the table says of a service.
    pub fn service(&self, vip: IpAddr, port: u16, proto: u8) -> Result<SvcEntry> {
        self.entry(scope::CLUSTER, vip, port, proto)
    }

    pub fn entry(&self, scope: u8, vip: IpAddr, port: u16, proto: u8) -> Result<SvcEntry> {
        let found = match vip {
            IpAddr::V4(_) => {
                self.datapath.table(map::SVC4)?.get(&SvcKey { vip: Ip4::from_ip(vip), port, proto, scope })?
            }
            IpAddr::V6(_) => {
                self.datapath.table(map::SVC6)?.get(&SvcKey { vip: Ip6::from_ip(vip), port, proto, scope })?
            }
        };
        found.with_context(|| format!("no service at {vip}, port {port}"))
    }

    pub fn put_service(&self, vip: IpAddr, port: u16, proto: u8, entry: &SvcEntry) -> Result<()> {
        self.put_entry(scope::CLUSTER, vip, port, proto, entry)
    }

    pub fn put_entry(&self, scope: u8, vip: IpAddr, port: u16, proto: u8, entry: &SvcEntry) -> Result<()> {
        match vip {
            IpAddr::V4(_) => {
                self.datapath.table(map::SVC4)?.put(&SvcKey { vip: Ip4::from_ip(vip), port, proto, scope }, entry)
            }
            IpAddr::V6(_) => {
                self.datapath.table(map::SVC6)?.put(&SvcKey { vip: Ip6::from_ip(vip), port, proto, scope }, entry)
            }
        }
    }

    /// Gives a service session affinity for `seconds`.
    pub fn stick(&self, vip: IpAddr, port: u16, proto: u8, seconds: u32) -> Result<()> {
        let entry = self.service(vip, port, proto)?;
        self.put_service(vip, port, proto, &SvcEntry { affinity: seconds, ..entry })
    }

    /// Makes all clients with session affinity look as if they had come some seconds (as the programs count) before.
    pub fn age_affinities(&self, seconds: u32) -> Result<()> {
        self.change_affinities(|known| known.seen = known.seen.wrapping_sub(seconds * HZ))
    }

    /// Changes what is known of all clients with session affinity.
    pub fn change_affinities(&self, change: impl Fn(&mut Affinity)) -> Result<()> {
        let table = self.datapath.table::<AffinityKey, Affinity>(map::AFFINITY)?;
        for (key, mut known) in table.entries()? {
            change(&mut known);
            table.put(&key, &known)?;
        }
        Ok(())
    }

    /// Has the flows of a service spread by a Maglev table that begins with this unit and has these places.
    pub fn spread(&self, scope: u8, at: IpAddr, port: u16, proto: u8, table: u16, places: &[u16]) -> Result<()> {
        let words = places.chunks(4).map(|four| four.iter().rev().fold(0, |word, it| word << 16 | u64::from(*it)));
        let words = [places.len() as u64].into_iter().chain(words);
        for (index, word) in (u32::from(table) * maglev::UNIT..).zip(words) {
            self.datapath.table(map::MAGLEV)?.put(&index, &word)?;
        }
        let entry = self.entry(scope, at, port, proto)?;
        self.put_entry(scope, at, port, proto, &SvcEntry { table, ..entry })
    }

    /// Takes a service away.
    pub fn drop_service(&self, vip: IpAddr, port: u16, proto: u8) -> Result<()> {
        [(port, proto), (0, 0)]
            .into_iter()
            .try_for_each(|(port, proto)| self.drop_entry(scope::CLUSTER, vip, port, proto))
    }

    /// Takes one port of a service away.
    pub fn drop_entry(&self, scope: u8, vip: IpAddr, port: u16, proto: u8) -> Result<()> {
        let was = match vip {
            IpAddr::V4(_) => {
                let key = SvcKey { vip: Ip4::from_ip(vip), port, proto, scope };
                self.datapath.table::<_, SvcEntry>(map::SVC4)?.delete(&key)?
            }
            IpAddr::V6(_) => {
                let key = SvcKey { vip: Ip6::from_ip(vip), port, proto, scope };
                self.datapath.table::<_, SvcEntry>(map::SVC6)?.delete(&key)?
            }
        };
        ensure!(was, "no service at {vip}, port {port}");
        Ok(())
    }
}
