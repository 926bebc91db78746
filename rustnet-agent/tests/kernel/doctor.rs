//! `rustnetctl doctor` on a real kernel: facts that are read from it, and one fault at a time.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use nix::mount::{MsFlags, mount, umount};
use rustnet_agent::model::{ObjectName, Pod};
use rustnet_agent::source::{Event, Object};
use serde_json::Value;

use crate::agent::{Agent, block_on, make_two_nodes, wait_until, web};
use crate::sandbox::{self, Sandbox, ip, run_program, uplink};

/// The flags of an agent of this sandbox, and the sandbox made ready for it.
fn settings(sandbox: &Sandbox) -> String {
    let dir = |name: &str| {
        let dir = sandbox.dir.join(name);
        fs::create_dir_all(&dir).unwrap();
        dir.display().to_string()
    };
    if !Path::new(&sandbox.bpffs).exists() {
        rustnet_agent::bpf::fs::prepare(&sandbox.bpffs).unwrap();
    }
    let cgroup = if Path::new("/sys/fs/cgroup/unified").exists() { "/sys/fs/cgroup/unified" } else { "/sys/fs/cgroup" };
    format!(
        "--bpffs {} doctor --node-name n1 --manifests {} --uplink eth0 --cgroup {cgroup} --cni-conf-dir {} --cni-bin-dir {}",
        sandbox.bpffs.display(),
        dir("manifests"),
        dir("net.d"),
        dir("bin"),
    )
}

/// Two Nodes, and this host is the first.
fn nodes(sandbox: &Sandbox) {
    let text: String = [(1, "n1"), (2, "n2")]
        .map(|(i, name)| {
            format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.1.{i}.0/24]}}\n\
                 status: {{addresses: [{{type: InternalIP, address: 192.0.2.{i}}}]}}\n---\n"
            )
        })
        .concat();
    fs::create_dir_all(sandbox.dir.join("manifests")).unwrap();
    fs::write(sandbox.dir.join("manifests/nodes.yaml"), text).unwrap();
}

/// Makes a host of two Nodes, on which an agent could start; returns the arguments that check it.
fn prepare_host(sandbox: &Sandbox) -> String {
    uplink();
    nodes(sandbox);
    settings(sandbox)
}

/// Everything that is not well: group, check, status, detail, hint.
fn wrong(sandbox: &Sandbox, args: &str) -> Vec<[String; 5]> {
    let out = sandbox.rustnetctl(&format!("-o json {args}"));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("{e}: {}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    });
    let mut wrong = Vec::new();
    for group in report["groups"].as_array().unwrap() {
        for check in group["checks"].as_array().unwrap() {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let fields = [&group["name"], &check["name"], &check["status"], &check["detail"], &check["hint"]].map(text);
            assert_eq!(fields[2] == "ok", fields[4].is_empty(), "what is not well has a hint: {fields:?}");
            if fields[2] != "ok" {
                wrong.push(fields);
            }
        }
    }
    let crosses = wrong.iter().any(|it| it[2] == "bad");
    assert_eq!((out.status.code(), &report["ok"]), (Some(i32::from(crosses)), &Value::Bool(!crosses)), "{wrong:#?}");
    wrong
}

fn assert_well(sandbox: &Sandbox, args: &str, why: &str) {
    assert_eq!(wrong(sandbox, args), Vec::<[String; 5]>::new(), "{why}");
}

/// One fault makes one finding.
fn only(sandbox: &Sandbox, args: &str, want: [&str; 5]) {
    let wrong = wrong(sandbox, args);
    assert_eq!(wrong.len(), 1, "{want:?}: {wrong:#?}");
    for (found, want) in wrong[0].iter().zip(want) {
        assert!(found.contains(want), "{want:?} is not in {found:?} of {wrong:#?}");
    }
}

#[test]
fn a_good_host_is_well_before_the_agent_and_while_it_runs() {
    sandbox::run(|sandbox| {
        let args = prepare_host(sandbox);
        assert_well(sandbox, &format!("{args} --pre"), "no agent has started");
        let text = String::from_utf8(sandbox.rustnetctl(&format!("{args} --pre")).stdout).unwrap();
        assert!(text.starts_with("Configuration\n  ✓ settings ") && !text.contains('\x1b'), "{text}");
        assert!(text.ends_with(" checks, 0 warnings, 0 crosses\n"), "{text}");
        // While an agent runs, no settings are needed: the agent has stored its own.
        block_on(async {
            let net_d = sandbox.dir.join("net.d");
            let config = sandbox.config(&[&format!("--cni-conf-dir={}", net_d.display())]);
            let agent = Agent::start_ready(config, make_two_nodes()).await;
            // The test's agent serves no probes, and this machine's cgroup directory may be of version 1.
            let known = |it: &[String; 5]| it[3].contains("serves no probes") || it[1] == "cgroup v2";
            let found = wrong(sandbox, "doctor");
            assert!(found.iter().all(known), "{found:#?}");
            // What the agent counts and does not serve.
            agent.send([published()]).await;
            let is_named =
                || wrong(sandbox, "doctor").iter().any(|it| it[0] == "Features" && it[3].contains("default/web"));
            wait_until("the doctor names the pod", is_named).await;
            fs::remove_file(net_d.join("05-rustnet.conflist")).unwrap();
            assert!(wrong(sandbox, "doctor").iter().any(|it| it[0] == "CNI" && it[2] == "bad"));
            agent.stop().await;
        });
    });
}

#[test]
fn kube_proxys_configuration_is_read_from_a_file() {
    sandbox::run(|sandbox| {
        let args = prepare_host(sandbox);
        let file = sandbox.dir.join("kube-proxy.yaml");
        let args = format!("{args} --pre --kube-proxy-config {}", file.display());
        let write = |body: &str| {
            let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
            fs::write(&file, format!("{head}{body}")).unwrap();
        };
        let group = "kube-proxy's configuration";
        only(sandbox, &args, [group, "read", "warning", "No such file", "--kube-proxy-config"]);
        write("mode: nftables\nclusterCIDR: ''\n");
        assert_well(sandbox, &args, "a mode has no effect");
        write("nodePortAddresses: [primary]\n");
        let setting = "--node-port-addresses=primary";
        only(sandbox, &args, [group, "nodePortAddresses primary", "warning", setting, setting]);
        assert_well(sandbox, &format!("{args} {setting}"), "the agent has it");
        // Before the agent starts, only what it cannot run with is a cross.
        write("ipvs: {sheduler: rr}\n");
        only(sandbox, &args, [group, "field", "warning", "ipvs.sheduler: kube-proxy has no such field", "correct it"]);
    });
}

/// Rules of the routing policy, and routes of others to a part of a range, come before the agent's routes.
#[test]
fn packets_that_leave_elsewhere_are_named() {
    sandbox::run(|sandbox| {
        uplink();
        ip("link add docker0 type veth peer name inside");
        ip("link set docker0 up");
        ip("link set inside up");
        ip("addr add 172.17.0.1/16 dev docker0");
        nodes(sandbox);
        block_on(async {
            let agent = Agent::start_ready(sandbox.config(&[]), make_two_nodes().into_iter().chain(web(2))).await;
            wait_until("services have names", || sandbox.run_dir.join("services.json").exists()).await;
            ip("route add default via 192.0.2.254 table 100");
            let pods = ["pods of other nodes", "n2 (10.1.2.1)", "ip rule"];
            let services = ["Services", "default/web (10.96.0.10)", "--service-cidrs"];
            for (object, by, [name, what, hint]) in [
                ("rule %s pref 100 to 10.1.2.0/24 lookup 100", "eth0", pods),
                ("route %s 10.1.2.0/25 via 172.17.0.9", "docker0", pods),
                ("route %s blackhole 10.1.2.0/25", "nowhere", pods),
                ("addr %s 10.96.0.1/24 dev docker0", "docker0", services),
                ("route %s unreachable 10.96.0.0/16", "nowhere", services),
            ] {
                ip(&object.replace("%s", "add"));
                let found = wrong(sandbox, "doctor");
                let is_it = |it: &[String; 5]| it[0] == "Host network" && it[1] == name;
                let it = found.iter().find(|it| is_it(it)).unwrap_or_else(|| panic!("{object}: {found:#?}"));
                assert!(it[3].contains(what) && it[3].contains(by) && it[4].contains(hint), "{object}: {it:?}");
                ip(&object.replace("%s", "del"));
                let found = wrong(sandbox, "doctor");
                assert!(!found.iter().any(is_it), "{found:#?}");
            }
            agent.stop().await;
        });
    });
}

/// A pod that wants a port of the host.
fn published() -> Event {
    let name = ObjectName::namespaced("default", "web");
    let (host_network, host_ports) = (false, true);
    let pod = Pod {
        name,
        uid: "u".into(),
        node: "n1".into(),
        addresses: ["10.1.1.9".parse().unwrap()].into(),
        host_network,
        host_ports,
        socket_lb: None,
        labels: rustnet_agent::model::Labels::default(),
        ports: Box::default(),
        problems: Box::default(),
    };
    Event::Apply(Object::Pod(Arc::new(pod)))
}

#[test]
fn one_fault_at_a_time_of_ports_and_networks() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre", prepare_host(sandbox));
        let me = std::env::current_exe().unwrap().file_name().unwrap().to_string_lossy().into_owned();

        let taken = TcpListener::bind("127.0.0.1:9879").unwrap();
        only(sandbox, &pre, ["Ports", "agent health", "warning", &me, "--health-addr"]);
        drop(taken);
        let taken = TcpListener::bind("[::]:10250").unwrap();
        only(sandbox, &pre, ["Ports", "kubelet", "warning", &me, "kubelet"]);
        drop(taken);
        let taken = TcpListener::bind("0.0.0.0:30080").unwrap();
        only(sandbox, &pre, ["Ports", "node ports", "warning", "30080", "move"]);
        drop(taken);
        let taken = UdpSocket::bind("0.0.0.0:8472").unwrap();
        only(sandbox, &pre, ["Ports", "overlay", "warning", &me, "--overlay-port"]);
        drop(taken);
        ip("link add flannel.1 type vxlan id 1 dstport 8472 dev eth0");
        ip("link set flannel.1 addrgenmode none");
        // A child that another test starts has the socket until it executes its program.
        sandbox::wait_until("the port is free", || sandbox::command("ip", "link set flannel.1 up").status.success());
        only(sandbox, &pre, ["Ports", "overlay", "warning", "flannel.1", "--overlay-port"]);
        ip("link del flannel.1");

        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "30000 60999").unwrap();
        only(sandbox, &pre, ["Ports", "node ports", "warning", "30000-60999", "ip_local_port_range"]);
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535").unwrap();
        let names: Vec<String> = wrong(sandbox, &pre).into_iter().map(|it| it[1].clone()).collect();
        assert_eq!(names, ["node ports", "masquerade ports"]);
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "32768 60999").unwrap();

        ip("rule add fwmark 0x40000/0xff0000 table 52");
        ip("-6 rule add not fwmark 51820 table 51820");
        assert_well(sandbox, &pre, "rules for other bits");
        ip("-6 rule add fwmark 0x1052 table 52 priority 77");
        only(sandbox, &pre, ["Packet mark", "packet mark", "warning", "ip rule 77 (fwmark 0x1052", "--packet-mark"]);
        let other = format!("{pre} --packet-mark 0x2a000000/0xff000000");
        assert_well(sandbox, &other, "the rule is for other bits");
        ip("link add calia type veth peer name other");
        only(sandbox, &other, ["Packet mark", "packet mark", "warning", "Calico", "--packet-mark"]);
        ip("link del calia");
        ip("-6 rule del priority 77");

        ip("addr add 10.1.1.77/24 dev far");
        let ranges = format!("{pre} --cluster-pod-cidrs 10.1.0.0/16");
        only(sandbox, &ranges, ["Address ranges", "overlap", "warning", "the network of far 10.1.1.0/24", "apart"]);
        ip("addr del 10.1.1.77/24 dev far");

        ip("route add 192.0.2.2 dev eth0 mtu 1400");
        only(sandbox, &pre, ["MTU", "ways", "warning", "n2 (192.0.2.2) 1400", "--mtu 1350"]);
        ip("route del 192.0.2.2 dev eth0");
        only(sandbox, &format!("{pre} --mtu 1500"), ["MTU", "pods", "warning", "does not fit", "set mtu"]);
        assert_well(sandbox, &pre, "every fault was undone");
    });
}

#[test]
fn one_fault_at_a_time_of_file_systems_and_settings() {
    sandbox::run(|sandbox| {
        let args = prepare_host(sandbox);
        let pre = format!("{args} --pre");

        let other = pre.replace(&sandbox.bpffs.display().to_string(), &sandbox.dir.join("net.d").display().to_string());
        only(sandbox, &other, ["Kernel", "BPF file system", "bad", "is not on one", "mount -t bpf"]);
        let cgroup = format!("{} --cgroup /proc", pre.split(" --cgroup").next().unwrap());
        only(sandbox, &format!("{cgroup} --pre"), ["Kernel", "cgroup v2", "warning", "/proc", "--cgroup"]);

        let net_d = sandbox.dir.join("net.d");
        fs::write(net_d.join("00-other.conf"), r#"{"name":"other","type":"bridge"}"#).unwrap();
        only(sandbox, &pre, ["CNI", "00-other.conf", "warning", "network other", "Multus"]);
        fs::write(net_d.join("00-other.conf"), "{").unwrap();
        only(sandbox, &pre, ["CNI", "00-other.conf", "warning", "the runtime stops", "fix"]);
        fs::remove_file(net_d.join("00-other.conf")).unwrap();

        let read_only = |dir: &Path| {
            mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, dir, None::<&str>, flags, None::<&str>).unwrap();
        };
        // What a mount refuses here, AppArmor and SELinux refuse in a container.
        read_only(&sandbox.bpffs);
        only(sandbox, &pre, ["File system", "pins", "bad", "pinning a map", "remount,rw"]);
        umount(&sandbox.bpffs).unwrap();
        let left: Vec<_> = sandbox::names(&sandbox.bpffs).into_iter().filter(|it| it.starts_with("rn_")).collect();
        assert!(left.is_empty(), "the trial leaves nothing: {left:?}");

        let bin = sandbox.dir.join("bin");
        read_only(&bin);
        only(sandbox, &pre, ["CNI", "binary directory", "warning", "Read-only", "--cni-bin-dir"]);
        umount(&bin).unwrap();

        // What the agent wants to set and cannot; what it can set is well.
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
        assert_well(sandbox, &pre, "the agent can set it");
        let sysctls = Path::new("/proc/sys/net");
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/eth0/accept_ra", "2").unwrap();
        read_only(sysctls);
        only(sandbox, &pre, ["Host settings", "ipv4.ip_forward", "warning", "read-only", "net.ipv4.ip_forward=1"]);
        umount(sysctls).unwrap();
        let absent = format!("{pre} --sysctl-dir /nonexistent");
        only(sandbox, &absent, ["Host settings", "sysctl directory", "bad", "does not exist", "--sysctl-dir"]);
        assert_well(sandbox, &pre, "every fault was undone");
    });
}

#[test]
fn leftovers_of_kube_proxy_are_named_until_they_are_gone() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre", prepare_host(sandbox));
        for args in ["add table ip6 kube-proxy", "add table ip nat", "add chain ip nat KUBE-SERVICES"] {
            run_program("nft", args);
        }
        let want =
            ["kube-proxy", "leftovers", "warning", "table ip6 kube-proxy, chain ip nat KUBE-SERVICES", "--dry-run"];
        only(sandbox, &pre, want);
        let running = TcpListener::bind("127.0.0.1:10249").unwrap();
        only(sandbox, &pre, want);
        drop(running);
        assert!(sandbox.rustnetctl("cleanup --kube-proxy --yes").status.success());
        assert_well(sandbox, &pre, "nothing is left");
    });
}

/// Rules as `nft`, ufw (iptables-nft) and firewalld make them. Before, the doctor was silent on all of them.
#[test]
fn a_firewall_that_drops_the_overlay_is_named() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre", prepare_host(sandbox));
        let nft = |args: &str| run_program("nft", args);
        let well = |why: &str| assert_well(sandbox, &pre, why);
        let drops = ["Firewall", "overlay", "warning", "chain inet t in drops UDP 8472", "udp dport 8472 accept"];

        nft("add table inet t");
        nft("add chain inet t in { type filter hook input priority 0 ; policy drop ; }");
        for rule in [
            "ct state established,related accept",
            "ct state invalid drop",
            "iifname lo accept",
            "ip protocol icmp accept",
            "meta l4proto { icmp, ipv6-icmp } accept",
            "tcp dport { 22, 6443, 10250 } accept",
            "udp dport { 53, 60000-61000 } counter accept",
        ] {
            nft(&format!("add rule inet t in {rule}"));
        }
        only(sandbox, &pre, drops);
        only(sandbox, &format!("{pre} --overlay-port 4789"), ["Firewall", "overlay", "warning", "UDP 4789", "4789"]);
        assert!(wrong(sandbox, &format!("{pre} --overlay-port 60500")).is_empty(), "an interval holds it");
        assert!(wrong(sandbox, &format!("{pre} --routing native")).is_empty(), "no overlay, no packets of one");
        nft("add rule inet t in ip saddr 192.0.2.0/24 udp dport 8472 accept");
        well("the nodes are let in");
        nft("flush chain inet t in");
        nft("add rule inet t in ct state vmap { established : accept, related : accept, invalid : drop }");
        only(sandbox, &pre, drops);
        nft("add rule inet t in iifname eth0 accept");
        well("the device is trusted");
        nft("flush chain inet t in");

        // As firewalld: the policy accepts, the last rule refuses.
        nft("add chain inet t in { policy accept ; }");
        nft("add chain inet t public");
        nft("add rule inet t public tcp dport 22 ct state new,untracked accept");
        nft("add rule inet t in ct state { established, related } accept");
        nft("add rule inet t in ct status dnat accept");
        nft("add rule inet t in goto public");
        well("nothing refuses yet");
        nft("flush chain inet t in");
        nft("add rule inet t in jump public");
        nft("add rule inet t in reject with icmpx admin-prohibited");
        only(sandbox, &pre, drops);
        nft("add rule inet t public udp dport 8472 accept");
        well("a zone lets it in");
        nft("delete table inet t");

        let iptables = |args: &str| run_program("iptables-nft", args);
        iptables("-P INPUT DROP");
        iptables("-N ufw-before-input");
        iptables("-A INPUT -j ufw-before-input");
        iptables("-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        iptables("-A ufw-before-input -p tcp -m multiport --dports 22,80 -j ACCEPT");
        iptables("-A ufw-before-input -p udp -m udp --dport 5353 -j ACCEPT");
        only(
            sandbox,
            &pre,
            ["Firewall", "overlay", "warning", "chain ip filter INPUT drops UDP 8472", "ufw allow 8472"],
        );
        iptables("-A ufw-before-input -p udp -m udp --dport 8472 -j ACCEPT");
        well("it is let in");
        nft("flush ruleset");
    });
}

/// What the programs send and take, no chain and no policy judges.
#[test]
fn what_the_overlay_past_its_device_does_not_pass_is_named() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre --overlay-path", prepare_host(sandbox));
        let [programs, device] = ["programs", "device"].map(|path| format!("{pre} {path}"));
        for path in [&programs, &device] {
            assert_well(sandbox, path, "nothing is in the way");
        }
        run_program("nft", "add table inet t");
        run_program("nft", "add chain inet t in { type filter hook input priority 0 ; policy drop ; }");
        only(sandbox, &programs, ["Firewall", "overlay", "warning", "the rest passes", "--overlay-path device"]);
        only(sandbox, &device, ["Firewall", "overlay", "warning", "pods are not reached", "udp dport 8472 accept"]);
        run_program("nft", "delete table inet t");

        ip("xfrm policy add src 192.0.2.0/24 dst 192.0.2.0/24 dir in action allow");
        only(sandbox, &programs, ["Overlay", "path", "warning", "1 in, 0 out", "ip xfrm policy"]);
        assert_well(sandbox, &device, "that is meant");
    });
}

#[test]
fn a_firewall_of_the_older_iptables_is_read_too() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre", prepare_host(sandbox));
        let iptables = |args: &str| run_program("iptables-legacy", args);
        let well = |why: &str| assert_well(sandbox, &pre, why);
        let drops =
            ["Firewall", "overlay", "warning", "(iptables-legacy) INPUT drops UDP 8472", "iptables-legacy -I INPUT"];
        let first = sandbox::command("iptables-legacy", "-N mine");
        if !Path::new("/proc/thread-self/net/ip_tables_names").exists() {
            // A kernel without CONFIG_IP_NF_IPTABLES_LEGACY: there can be no such rules.
            assert!(!first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
            return well("nothing drops");
        }
        assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
        iptables("-A INPUT -i lo -j ACCEPT");
        iptables("-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT");
        iptables("-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT");
        iptables("-A INPUT -j mine");
        well("the policy accepts");
        iptables("-P INPUT DROP");
        only(sandbox, &pre, drops);
        iptables("-A mine -p udp -m udp --dport 8000:9000 -j ACCEPT");
        well("a chain lets it in");
        iptables("-R mine 1 -p udp -m udp --dport 53 -j ACCEPT");
        only(sandbox, &pre, drops);
        iptables("-A mine -s 192.0.2.0/24 -j ACCEPT");
        well("the nodes may be there");
        iptables("-F mine");
        iptables("-A INPUT -i eth+ -j ACCEPT");
        well("the device is trusted");
        iptables("-I INPUT 1 -p udp -j REJECT");
        only(sandbox, &pre, drops);
    });
}

#[test]
fn a_strict_check_of_reverse_paths_is_named() {
    sandbox::run(|sandbox| {
        let pre = format!("{} --pre", prepare_host(sandbox));
        let nft = |args: &str| run_program("nft", args);
        nft("add table inet t");
        nft("add chain inet t p { type filter hook prerouting priority -310 ; }");
        nft("add chain inet t sub");
        nft("add rule inet t p jump sub");
        assert_well(sandbox, &pre, "the chain is empty");
        for rule in ["fib saddr . mark . iif oif missing drop", "fib saddr . iif oif missing log counter drop"] {
            nft(&format!("add rule inet t sub {rule}"));
            only(sandbox, &pre, ["Firewall", "reverse path", "warning", "chain inet t p", "checkReversePath"]);
            nft("flush chain inet t sub");
        }
        nft("add rule inet t sub fib daddr . iif type != local counter");
        assert_well(sandbox, &pre, "the rule drops nothing");
    });
}

#[test]
fn without_rights_the_capabilities_are_named() {
    sandbox::run(|sandbox| {
        let pre = prepare_host(sandbox);
        let command = env!("CARGO_BIN_EXE_rustnetctl");
        let run_dir = sandbox.run_dir.display();
        let out = sandbox::command(
            "setpriv",
            &format!("--bounding-set -all --inh-caps -all -- {command} --run-dir {run_dir} {pre} --pre"),
        );
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status.code(), Some(1), "{text}{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("this process lacks CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON"), "{text}");
        assert!(
            text.contains("not checked: opening a netfilter socket")
                || text.contains("not checked: asking for nftables"),
            "{text}"
        );
        assert!(text.trim_end().ends_with(", 1 cross"), "what needs rights is unchecked, not wrong: {text}");
    });
}

#[test]
fn refused_settings_are_crosses_and_the_kernel_is_checked_all_the_same() {
    sandbox::run(|sandbox| {
        let overlap = "--cluster-pod-cidrs 10.96.0.0/12 --service-cidrs 10.96.0.0/16";
        let found = wrong(sandbox, &format!("doctor --pre --node-name n1 --manifests /m {overlap}"));
        let [range, rest] = &found[..] else { panic!("{found:#?}") };
        assert_eq!(
            (range[0].as_str(), range[2].as_str(), range[4].as_str()),
            ("Configuration", "bad", "give them ranges apart")
        );
        assert_eq!(rest[2], "warning");
        let refused = format!("doctor --pre --warn-only --node-name n1 --manifests /m {overlap}");
        let out = sandbox.rustnetctl(&refused);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains("give them ranges apart") && text.contains("1 cross"), "{text}");
    });
}
