//! Fragments: large datagrams, and such as somebody made by hand.

use crate::fixture::{Net, endpoints, in_each_routing};
use anyhow::{Context, Result, ensure};
use rustnet_common::drop::DropReason;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};
use testkit::client::{ask_sized, udp_from_port};
use testkit::packet::{Macs, mac_of, neighbour_mac, send, udp_fragments};
use testkit::pod::PORT;
use testkit::{Pod, Proto, wait};

in_each_routing!(
    datagrams_of_all_sizes_arrive,
    fragments_arrive_whose_first_came_first,
    fragments_between_pods_arrive_in_any_order,
    fragments_before_their_first_are_counted_and_the_rest_goes_on,
    overlapping_fragments_bring_nothing_and_break_nothing,
);

/// Every way from pod `a`: to a pod here and one elsewhere, by its own address and by a service.
fn each_way(net: &Net, mut test: impl FnMut(&Pod, SocketAddr) -> Result<()>) -> Result<()> {
    for pod in [&net.b, &net.c] {
        let service = net.service(endpoints(&[pod]))?;
        for address in pod.addresses() {
            for target in [SocketAddr::new(*address, PORT), service.target_like(*address)] {
                test(pod, target).with_context(|| format!("to {} by {target}", pod.name()))?;
            }
        }
    }
    Ok(())
}

fn datagrams_of_all_sizes_arrive(net: &Net) -> Result<()> {
    each_way(net, |pod, target| {
        for size in [1472, 1473, 8000, 20_000, 60_000] {
            let answers = ask_sized(net.a.netns(), Proto::Udp, target, 3, size)?;
            answers.only_by(&[pod.name()]).with_context(|| format!("{size} bytes"))?;
            answers.only_as(net.a.address_like(target.ip())?)?;
        }
        Ok(())
    })
}

/// A client of hand-made fragments, and what it hears.
struct Client<'a> {
    pod: &'a Pod,
    socket: std::net::UdpSocket,
    macs: Macs,
    target: SocketAddr,
}

/// Length of the datagrams, with their header.
const LEN: usize = 88;

impl<'a> Client<'a> {
    fn new(pod: &'a Pod, target: SocketAddr) -> Result<Self> {
        static NEXT: AtomicU16 = AtomicU16::new(23_000);
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        let gateway = IpAddr::from(rustnet_common::names::GATEWAY4);
        let macs = Macs { from: mac_of(pod.netns(), "eth0")?, to: neighbour_mac(pod.netns(), "eth0", gateway)? };
        Ok(Self { pod, socket: pod.run_in(|| udp_from_port(port, target))??, macs, target })
    }

    /// Sends pieces of a datagram, in their order. Some of them may bear other bytes than the first ones did.
    fn send(&self, letter: char, pieces: &[Range<usize>], other: &[Range<usize>]) -> Result<()> {
        static ID: AtomicU16 = AtomicU16::new(1);
        let id = ID.fetch_add(1, Ordering::Relaxed);
        let from = SocketAddr::new(self.pod.address_like(self.target.ip())?, self.socket.local_addr()?.port());
        let frames = |letter: char, pieces| {
            let text = letter.to_string().repeat(LEN - 8);
            udp_fragments(self.macs, from, self.target, text.as_bytes(), id, pieces)
        };
        let frames = [frames(letter, pieces)?, frames('!', other)?].concat();
        send(self.pod.netns(), "eth0", frames.iter().map(Vec::as_slice))
    }

    /// What the next answer echoes.
    fn heard(&self) -> Result<String> {
        let mut buffer = [0; 2048];
        let len = self.socket.recv(&mut buffer).context("no answer")?;
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        Ok(text.rsplit(' ').next().unwrap_or_default().to_owned())
    }

    /// Sends a good datagram and hears its answer, before which nothing else was answered.
    fn works(&self, letter: char) -> Result<()> {
        self.send(letter, &[0..40, 40..LEN], &[])?;
        let heard = self.heard()?;
        ensure!(heard == letter.to_string().repeat(LEN - 8), "heard {heard} instead of {letter}s");
        Ok(())
    }
}

fn fragments_arrive_whose_first_came_first(net: &Net) -> Result<()> {
    each_way(net, |_, target| {
        let client = Client::new(&net.a, target)?;
        client.works('a')?;
        // The later ones in any order.
        client.send('b', &[0..16, 64..LEN, 16..64], &[])?;
        ensure!(client.heard()?.starts_with("bbb"), "the fragments in another order");
        client.works('c')
    })
}

/// Between pods addresses suffice: the receiver puts the pieces together, in whichever order they come.
fn fragments_between_pods_arrive_in_any_order(net: &Net) -> Result<()> {
    each_way(net, |pod, target| {
        if !pod.addresses().contains(&target.ip()) {
            return Ok(());
        }
        let client = Client::new(&net.a, target)?;
        for (letter, pieces) in [('a', vec![40..LEN, 0..40]), ('b', vec![64..LEN, 24..64, 0..24])] {
            client.send(letter, &pieces, &[])?;
            let heard = client.heard()?;
            ensure!(heard == letter.to_string().repeat(LEN - 8), "heard {heard} instead of {letter}s");
        }
        Ok(())
    })
}

/// Of a Service nobody but the first has the port.
fn fragments_before_their_first_are_counted_and_the_rest_goes_on(net: &Net) -> Result<()> {
    each_way(net, |pod, target| {
        if pod.addresses().contains(&target.ip()) {
            return Ok(());
        }
        let client = Client::new(&net.a, target)?;
        let before = net.node(1).counter(DropReason::FragNotFound)?;
        client.send('a', &[40..LEN, 0..40], &[])?;
        client.send('b', &[16..64, 64..LEN], &[])?;
        client.works('c')?;
        wait::until("the drops are counted", || {
            let now = net.node(1).counter(DropReason::FragNotFound)?;
            ensure!(now >= before + 3, "{now} fragments without a first, {before} before");
            Ok(())
        })
    })
}

/// RFC 5722 and what kernels do: the datagram is lost, nothing of it is believed.
fn overlapping_fragments_bring_nothing_and_break_nothing(net: &Net) -> Result<()> {
    each_way(net, |_, target| {
        let client = Client::new(&net.a, target)?;
        client.send('a', std::slice::from_ref(&(0..40)), &[32..64, 40..LEN])?;
        client.send('b', std::slice::from_ref(&(0..64)), &[8..72, 64..LEN])?;
        client.works('c')
    })
}
