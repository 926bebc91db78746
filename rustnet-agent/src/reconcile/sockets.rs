//! Socket load-balancing: the programs on their hooks, and the end of sockets whose backend is gone.
//!
//! A connected socket has one backend for as long as it lives. When that stops serving, a UDP socket would send to nobody for ever: it
//! is ended, and its owner connects again. A TCP connection goes on while its endpoint is known to the API, as it does with kube-proxy:
//! an endpoint that is not ready may finish what it began.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use rustnet_common::service::scope;
use rustnet_common::socket::{Asked, SocketKey};
use rustnet_common::tuple::proto::{TCP, UDP};

use super::{Datapath, Reconciler};
use crate::failure::{Failure, Scope};
use crate::index::Gate;
use crate::net::sock_diag;
use crate::plan::{Maps, VipKey, Write};

/// While a connection outlives its place in a Service, changes are waited out this long before its endpoint is looked for again.
const SETTLE: Duration = Duration::from_millis(300);

impl Reconciler {
    /// Notes that these writes may have taken the backends of sockets, and other changes the endpoints of those that wait for that.
    pub(super) fn note_backends(&mut self, writes: &[Write]) {
        if writes.iter().any(|write| matches!(write, Write::ClearBackends { .. })) {
            self.sockets.want_unless_failed();
        } else if self.has_outlived {
            self.sockets.want(SETTLE);
        }
    }

    /// Has the programs of socket calls on their hooks, and ends the sockets whose backend is gone.
    pub(super) fn look_after_sockets(&mut self) {
        let had_failed = self.sockets.has_failed();
        let failed = self.attach_sockets().and_then(|()| self.end_sockets()).err();
        self.sockets.finish(failed.map(|error| Failure::new(Scope::Host, &error)).into_iter().collect(), None);
        if had_failed || self.sockets.has_failed() {
            self.report.want(Duration::ZERO);
        }
    }

    fn attach_sockets(&self) -> Result<()> {
        // Unpinned programs may be about to be replaced.
        let Some(Datapath { kernel, .. }) = self.datapath.as_ref().filter(|it| it.kernel.is_pinned()) else {
            return Ok(());
        };
        for what in kernel.attach_sockets()? {
            tracing::info!("{what}");
        }
        Ok(())
    }

    fn end_sockets(&mut self) -> Result<()> {
        let Some(Datapath { kernel, .. }) = &self.datapath else { return Ok(()) };
        // Before the lists are complete, an endpoint may seem to be gone.
        let Some(sockets) = kernel.sockets().filter(|_| self.index.is_open(Gate::Services)) else { return Ok(()) };
        let mut over = Vec::new();
        let mut has_outlived = false;
        let found = sockets.of_backends(|id| id != 0 && !kernel.maps.serves(id))?;
        let gone = self.index.without_endpoint(found.iter().map(|(key, _)| IpAddr::from(key.addr)).collect());
        for (key, asked) in found {
            // A Service that is gone says nothing of its endpoints.
            let is_known = || Ok::<_, anyhow::Error>(kernel.maps.service(&vip(&asked))?.is_some());
            if asked.proto == UDP || (gone.contains(&IpAddr::from(key.addr)) && is_known()?) {
                over.push((key, asked));
            } else {
                has_outlived |= is_known()?;
            }
        }
        let mut ended = 0;
        for proto in [TCP, UDP] {
            let of_proto = |(_, asked): &&(SocketKey, Asked)| asked.proto == proto;
            let peer = |key: &SocketKey| (key.cookie, SocketAddr::new(key.addr.into(), key.port));
            let sockets: BTreeSet<_> = over.iter().filter(of_proto).map(|(key, _)| peer(key)).collect();
            if !sockets.is_empty() {
                ended += sock_diag::end(proto, &sockets).context(
                    "sockets of this host may be connected to backends that are gone: the kernel needs CONFIG_INET_DIAG_DESTROY and \
                     CONFIG_INET_UDP_DIAG; or give --socket-lb off",
                )?;
            }
        }
        let keys: Vec<SocketKey> = over.into_iter().map(|(key, _)| key).collect();
        sockets.forget(&keys)?;
        if ended > 0 {
            tracing::info!(ended, "sockets of this host ended: their backends are gone");
        }
        self.has_outlived = has_outlived;
        Ok(())
    }
}

/// The entry that a socket asked for.
fn vip(asked: &Asked) -> VipKey {
    VipKey { ip: asked.addr.into(), port: asked.port, proto: asked.proto, scope: scope::CLUSTER }
}
