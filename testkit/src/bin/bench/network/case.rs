//! Ways from a client to a server, and groups of them that are compared.

use super::kernel::Place;
use super::ours::{SERVICE_PORT, vips};
use super::traffic::{self, Ends, PORT, SERVICE_TARGET, Test};
use anyhow::{Context, Result};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use testkit::{Netns, wait};

/// A ratio that a case is to reach.
#[derive(Clone, Copy)]
pub struct Goal {
    /// Of which test.
    pub test: Test,
    /// The place in the group of the case that the ratio is to.
    pub peer: usize,
    /// The least ratio that reaches it.
    pub least: f64,
}

/// A ratio to the group's first case.
pub const fn goal(test: Test, least: f64) -> Goal {
    Goal { test, peer: 0, least }
}

/// A way from a client to a server.
pub struct Case<'a> {
    /// For tables.
    pub name: &'static str,
    /// Where the client is.
    pub client: &'a Netns,
    /// Where the server is.
    pub server: &'a Netns,
    /// By family, IPv4 first.
    targets: [SocketAddr; 2],
    /// What it is to reach.
    pub goals: &'static [Goal],
}

/// Cases that are compared.
pub struct Group<'a> {
    /// For tables.
    pub title: &'static str,
    /// In the order of the tables.
    pub cases: Vec<Case<'a>>,
    /// The places of the cases that all are compared with, in a table each.
    pub peers: &'static [usize],
}

impl<'a> Group<'a> {
    /// Cases that are compared with the first of them.
    pub fn new(title: &'static str, cases: Vec<Case<'a>>) -> Self {
        Self { title, cases, peers: &[0] }
    }

    /// The title of the group's tables of a test.
    pub fn title_of(&self, test: Test) -> String {
        format!("{}: {}", self.title, test.name())
    }
}

impl<'a> Case<'a> {
    /// Between two places.
    pub fn places(name: &'static str, client: &'a Place, server: &'a Place) -> Self {
        let targets = [true, false].map(|v4| SocketAddr::new(server.address_like(v4), PORT));
        Self { name, client: &client.netns, server: &server.netns, targets, goals: &[] }
    }

    /// To the addresses of a server.
    pub fn to_address(name: &'static str, client: &'a Netns, server: &'a Netns, addresses: &[IpAddr]) -> Result<Self> {
        let target = |v4: bool| -> Result<SocketAddr> {
            let address = addresses.iter().find(|a| a.is_ipv4() == v4);
            Ok(SocketAddr::new(*address.with_context(|| format!("{name}: not both families"))?, PORT))
        };
        Ok(Self { name, client, server, targets: [target(true)?, target(false)?], goals: &[] })
    }

    /// To service `n`, whose backend the server is.
    pub fn to_service(name: &'static str, client: &'a Netns, server: &'a Netns, n: u32) -> Self {
        Self { name, client, server, targets: vips(n).map(|v| SocketAddr::new(v, SERVICE_PORT)), goals: &[] }
    }

    /// With goals.
    pub fn goals(self, goals: &'static [Goal]) -> Self {
        Self { goals, ..self }
    }

    /// The ends of a turn; family 0 is IPv4.
    pub fn ends(&self, family: usize) -> Ends<'a> {
        let target = self.targets[family];
        let port = if target.port() == SERVICE_PORT { SERVICE_TARGET } else { PORT };
        Ends { client: self.client, server: self.server, target, port }
    }

    /// Waits until both families get through: services may not be known yet.
    pub fn wait(&self) -> Result<()> {
        for family in [0, 1] {
            wait::until(self.name, || {
                traffic::turn(Test::Rr, &self.ends(family), 0, Duration::from_millis(1)).map(drop)
            })?;
        }
        Ok(())
    }
}
