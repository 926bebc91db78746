//! What kube-proxy left goes, in each of its modes, and what others have stays as it was.

use std::path::Path;
use std::process::Output;

use crate::sandbox::{self, Sandbox, command, ip, run_program};

/// Others' rules, in the tables and chains that kube-proxy uses too: the kubelet's, kube-router's, people's.
const OTHERS: &str = "
table inet firewall {
    set allowed { type ipv4_addr; elements = { 192.0.2.7, 192.0.2.8 }; }
    chain input {
        type filter hook input priority filter; policy accept;
        tcp dport 22 ip saddr @allowed accept comment \"KUBE-SERVICES is not meant\"
    }
}
table ip nat {
    chain KUBE-MARK-DROP { meta mark set mark or 0x8000; }
    chain KUBE-KUBELET-CANARY { }
    chain KUBE-SVC-mine { counter packets 3 bytes 180 return; }
    chain PREROUTING { type nat hook prerouting priority dstnat; policy accept; ip daddr 192.0.2.1 tcp dport 2222 counter packets 7 bytes 420 dnat to 10.0.0.9:22; jump KUBE-SVC-mine; }
    chain OUTPUT { type nat hook output priority -100; policy accept; }
    chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept; oifname \"eth7\" masquerade; }
}
table ip filter {
    chain KUBE-FIREWALL { meta mark & 0x8000 == 0x8000 counter packets 1 bytes 60 drop; }
    chain KUBE-ROUTER-INPUT { ip saddr 192.0.2.66 drop; }
    chain INPUT { type filter hook input priority filter; policy accept; jump KUBE-FIREWALL; tcp dport 22 accept; jump KUBE-ROUTER-INPUT; }
    chain FORWARD { type filter hook forward priority filter; policy accept; ip saddr 10.0.0.0/8 accept; }
}
table ip6 nat {
    chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept; oifname \"eth7\" masquerade; }
}
table bridge kube-proxy { }
";

/// Chains as kube-proxy's iptables mode has them, and its jumps before, between and behind others' rules.
const IPTABLES_MODE: &str = "
table ip mangle {
    chain KUBE-PROXY-CANARY { }
}
table ip nat {
    chain KUBE-MARK-MASQ { meta mark set mark or 0x4000; }
    chain KUBE-SEP-6E7XQMQ4RAYOWTTM { ip saddr 10.244.1.5 jump KUBE-MARK-MASQ; meta l4proto tcp dnat to 10.244.1.5:53; }
    chain KUBE-SVC-NPX46M4PTMTKRN6Y { ip saddr != 10.244.0.0/16 jump KUBE-MARK-MASQ; goto KUBE-SEP-6E7XQMQ4RAYOWTTM; }
    chain KUBE-NODEPORTS { ip daddr 127.0.0.0/8 return; }
    chain KUBE-SERVICES { ip daddr 10.96.0.1 tcp dport 443 jump KUBE-SVC-NPX46M4PTMTKRN6Y; fib daddr type local jump KUBE-NODEPORTS; }
    chain KUBE-POSTROUTING { meta mark & 0x4000 != 0x4000 return; masquerade fully-random; }
}
insert rule ip nat PREROUTING counter jump KUBE-SERVICES comment \"kubernetes service portals\"
add rule ip nat OUTPUT counter jump KUBE-SERVICES
add rule ip nat POSTROUTING jump KUBE-POSTROUTING
table ip filter {
    chain KUBE-FORWARD { ct state invalid drop; meta mark & 0x4000 == 0x4000 accept; }
    chain KUBE-PROXY-FIREWALL { }
    chain KUBE-EXTERNAL-SERVICES { }
}
insert rule ip filter INPUT ct state new jump KUBE-PROXY-FIREWALL
add rule ip filter INPUT ct state new jump KUBE-EXTERNAL-SERVICES
insert rule ip filter FORWARD jump KUBE-FORWARD
table ip6 nat {
    chain KUBE-SERVICES { }
    chain KUBE-POSTROUTING { }
}
add rule ip6 nat POSTROUTING jump KUBE-POSTROUTING
";

/// Tables as its nftables mode has them, with the maps that lead from one chain to another.
const NFTABLES_MODE: &str = "
table ip kube-proxy {
    comment \"rules for kube-proxy\"
    set cluster-ips { type ipv4_addr; elements = { 10.96.0.1 }; }
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
    chain mark-for-masquerade { meta mark set mark or 0x4000; }
    chain service-ULMVA6XW-default/kubernetes/tcp/https { ip saddr != 10.244.0.0/16 jump mark-for-masquerade; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
    chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
}
add element ip kube-proxy service-ips { 10.96.0.1 . tcp . 443 : goto service-ULMVA6XW-default/kubernetes/tcp/https }
table ip6 kube-proxy {
    chain services { }
}
";

fn load(sandbox: &Sandbox, rules: &str) {
    let file = sandbox.dir.join("rules.nft");
    std::fs::write(&file, rules).unwrap();
    run_program("nft", &format!("-f {}", file.display()));
}

fn ruleset() -> String {
    String::from_utf8(command("nft", "list ruleset").stdout).unwrap()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

#[test]
fn its_rules_go_and_all_others_stay_byte_for_byte() {
    sandbox::run(|sandbox| {
        load(sandbox, OTHERS);
        // The tables themselves stay when a chain of kube-proxy's was the only one in them.
        load(sandbox, "table ip mangle { }");
        let others = ruleset();
        load(sandbox, IPTABLES_MODE);
        load(sandbox, NFTABLES_MODE);
        let before = ruleset();

        let listed = sandbox.rustnetctl("cleanup --kube-proxy --dry-run");
        assert_eq!(listed.status.code(), Some(1), "{}", said(&listed));
        assert_eq!(ruleset(), before, "a dry run changes nothing");
        for part in [
            "table ip6 kube-proxy",
            "rule in ip nat PREROUTING that leads to KUBE-SERVICES",
            "chain ip filter KUBE-FORWARD",
        ] {
            assert!(said(&listed).contains(&format!("would remove {part}\n")), "{part}: {}", said(&listed));
        }
        assert_eq!(
            sandbox.rustnetctl("cleanup --kube-proxy").status.code(),
            Some(2),
            "without a terminal it wants --yes"
        );
        assert_eq!(ruleset(), before);

        let done = sandbox.rustnetctl("cleanup --kube-proxy --yes");
        assert!(done.status.success(), "{}", said(&done));
        assert_eq!(said(&listed).replace("would remove", "removed"), said(&done), "what was listed went");
        assert_eq!(ruleset(), others);

        let again = sandbox.rustnetctl("cleanup --kube-proxy --yes");
        assert!(again.status.success() && said(&again).contains("nothing of kube-proxy's is left"), "{}", said(&again));
    });
}

#[test]
fn more_chains_than_fit_into_one_transaction_go() {
    sandbox::run(|sandbox| {
        let name = |i: usize| format!("KUBE-SVC-{}", format!("{i:016o}").replace(['0', '1'], "Z"));
        let mut names: Vec<_> = (0..4096).map(name).collect();
        names.sort();
        names.dedup();
        assert!(names.len() > 2000, "{}", names.len());
        let chains: Vec<_> = names.iter().map(|name| format!(" chain {name} {{ counter; }}\n")).collect();
        let jump = |name| format!("add rule ip nat KUBE-SERVICES tcp dport 80 jump {name}\n");
        let jumps: Vec<_> = names.iter().map(jump).collect();
        let (chains, jumps) = (chains.concat(), jumps.concat());
        load(sandbox, &format!("table ip nat {{\n chain KUBE-SERVICES {{ }}\n{chains}}}\n{jumps}"));
        let done = sandbox.rustnetctl("cleanup --kube-proxy --yes");
        assert!(done.status.success(), "{}", said(&done));
        assert_eq!(ruleset().split_whitespace().collect::<Vec<_>>(), ["table", "ip", "nat", "{", "}"]);
    });
}

#[test]
fn the_device_of_ipvs_mode_goes() {
    sandbox::run(|sandbox| {
        // Not every kernel has dummy devices; the name decides.
        ip("link add kube-ipvs0 type veth peer name other");
        ip("link add kube-ipvs1 type veth peer name another");
        let done = sandbox.rustnetctl("cleanup --kube-proxy --yes");
        assert!(done.status.success() && said(&done).contains("removed device kube-ipvs0"), "{}", said(&done));
        assert!(!command("ip", "link show kube-ipvs0").status.success());
        ip("link show kube-ipvs1");
    });
}

#[test]
fn chains_of_the_older_iptables_are_found_and_left_to_its_own_tool() {
    sandbox::run(|sandbox| {
        let out = command("iptables-legacy", "-t nat -N KUBE-SERVICES");
        if !Path::new("/proc/thread-self/net/ip_tables_names").exists() {
            // A kernel without CONFIG_IP_NF_IPTABLES_LEGACY: such chains cannot be, and their absence is no fault.
            assert!(!out.status.success(), "{}", said(&out));
            let done = sandbox.rustnetctl("cleanup --kube-proxy --yes");
            assert!(done.status.success() && !said(&done).contains("iptables-legacy"), "{}", said(&done));
            return;
        }
        assert!(out.status.success(), "{}", said(&out));
        for args in ["-t nat -A OUTPUT -j KUBE-SERVICES", "-N KUBE-FIREWALL"] {
            run_program("iptables-legacy", args);
        }
        run_program("ip6tables-legacy", "-N KUBE-FORWARD");
        let done = sandbox.rustnetctl("cleanup --kube-proxy --yes");
        assert_eq!(done.status.code(), Some(1), "{}", said(&done));
        let lines = said(&done);
        for chain in ["ip nat KUBE-SERVICES", "ip6 filter KUBE-FORWARD"] {
            assert!(
                lines.contains(&format!("left: chain {chain} of iptables-legacy: run `kube-proxy --cleanup`")),
                "{lines}"
            );
        }
        assert!(!lines.contains("KUBE-FIREWALL"), "{lines}");
    });
}
