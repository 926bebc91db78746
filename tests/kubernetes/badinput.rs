//! What the cluster and its people get wrong while a real agent runs: it stays up, goes on with the last good state, says
//! what to do, in its log and as an event on its node's object, and goes on by itself once that is done.

use super::kube_source::{NAMESPACE, RBAC, direct, yaml};
use super::rig::{Rig, without_names};
use super::server::{ADMIN, AGENT};
use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use testkit::client::ask;
use testkit::pod::PORT;
use testkit::{Pod, Proto, wait};

const N1: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, "fd00:244:0:1::/64"]}
status: {addresses: [{type: InternalIP, address: 172.18.0.11}, {type: InternalIP, address: "fd00:18::11"}]}
"#;

const N2: &str = r"
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24]}
status: {addresses: [{type: InternalIP, address: 172.18.0.12}]}
";

/// A service with one endpoint on the other node.
fn service(name: &str, vip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{clusterIP: {vip}, ports: [{{port: 80}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: {name}-a, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         ports: [{{port: 8080}}]\nendpoints: [{{addresses: [10.244.2.9], nodeName: n2}}]\n"
    )
}

/// How an agent proves who it is.
#[derive(Clone, Copy, Debug)]
enum Credentials {
    /// The service account of its pod: a token file and an authority next to it.
    ServiceAccount,
    /// A kubeconfig that names a file with a token, and a line end behind it, as editors leave it.
    TokenFile,
    /// A kubeconfig with the token in it.
    Kubeconfig,
    /// A kubeconfig that names files with a client's certificate and key.
    Certificate,
}

/// Where pods find their account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Starts the agent with credentials that the next [`renew`] makes.
fn start(rig: &Rig, way: Credentials, dir: &Path) -> Result<()> {
    let user = match way {
        Credentials::ServiceAccount => {
            let environment = [("KUBERNETES_SERVICE_HOST", "127.0.0.1"), ("KUBERNETES_SERVICE_PORT", "6443")];
            let program = testkit::dist::find("rustnet-agent")?;
            return rig.node().spawn_agent_of(&program, &environment, &["--api-server", &direct()]);
        }
        Credentials::TokenFile => "tokenFile: token".to_owned(),
        Credentials::Kubeconfig => return rig.start_agent(&dir.join("kubeconfig")),
        Credentials::Certificate => "client-certificate: client.crt, client-key: client.key".to_owned(),
    };
    rig.start_agent(&kubeconfig(rig, dir, &user)?)
}

fn kubeconfig(rig: &Rig, dir: &Path, user: &str) -> Result<PathBuf> {
    let (path, authority) = (dir.join("kubeconfig"), rig.server.authority());
    let text = format!(
        "apiVersion: v1\nkind: Config\n\
         clusters: [{{name: c, cluster: {{server: \"{}\", certificate-authority: {}}}}}]\n\
         users: [{{name: u, user: {{{user}}}}}]\n\
         contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
        direct(),
        authority.display()
    );
    // As whoever renews files does it: readers see the old or the new one.
    replace(&path, &text)?;
    Ok(path)
}

fn replace(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, path).with_context(|| path.display().to_string())
}

/// New credentials in the place of the old ones.
fn renew(rig: &Rig, way: Credentials, dir: &Path) -> Result<()> {
    let token = || {
        let token = rig.server.kubectl(&["create", "token", "rustnet-agent", "--namespace=rustnet-system"])?;
        anyhow::Ok(token.trim().to_owned())
    };
    match way {
        Credentials::ServiceAccount => {
            let (token, authority) = (token()?, std::fs::read_to_string(rig.server.authority())?);
            rig.node().netns().run(|| {
                std::fs::create_dir_all(ACCOUNT)?;
                replace(&Path::new(ACCOUNT).join("ca.crt"), &authority)?;
                replace(&Path::new(ACCOUNT).join("namespace"), "rustnet-system")?;
                replace(&Path::new(ACCOUNT).join("token"), &token)
            })?
        }
        Credentials::TokenFile => replace(&dir.join("token"), &format!("{}\n", token()?)),
        Credentials::Kubeconfig => kubeconfig(rig, dir, &format!("token: {}", token()?)).map(drop),
        Credentials::Certificate => certificate(dir, "2"),
    }
}

/// What was good is so no more.
fn revoke(rig: &mut Rig, way: Credentials, dir: &Path) -> Result<()> {
    rig.server.stop_api();
    if let Credentials::Certificate = way {
        // Those of an authority that is none any more are refused as those are whose time is over.
        authority(dir)?;
        return rig.server.start_api();
    }
    rig.server.start_api()?;
    for verb in ["delete", "create"] {
        rig.server.kubectl(&[verb, "serviceaccount", "rustnet-agent", "--namespace=rustnet-system"])?;
    }
    // The server caches credentials for some seconds, and open watches do not end.
    rig.server.stop_api();
    rig.server.start_api()
}

fn openssl(dir: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).current_dir(dir).output().context("openssl")?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A new authority for clients.
fn authority(dir: &Path) -> Result<()> {
    let key = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    openssl(dir, &[&key[..], &["-subj", "/CN=clients", "-keyout", "ca.key", "-out", "ca.crt"]].concat())
}

/// A certificate for the agent of that authority, valid for so many days.
fn certificate(dir: &Path, days: &str) -> Result<()> {
    let subject = format!("/CN={}", AGENT.name);
    let key = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", &subject];
    openssl(dir, &[&key[..], &["-keyout", "client.key", "-out", "client.csr"]].concat())?;
    // Without an extension, it would be of a version that few take.
    std::fs::write(dir.join("client.ext"), "extendedKeyUsage=clientAuth\n")?;
    let sign = ["x509", "-req", "-in", "client.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-out", "client.crt"];
    openssl(dir, &[&sign[..], &["-extfile", "client.ext", "-days", days]].concat())
}

const REFUSED: &[&str] = &["API server", "401", "kubeconfig", "token", "read again", "last known state stays"];

fn credentials(way: Credentials) -> Result<()> {
    let dir = tempfile::Builder::new().prefix(&format!("rn{}-credentials-", std::process::id())).tempdir()?;
    let dir = dir.path();
    authority(dir)?;
    let mut rig = Rig::start(&[&format!("--client-ca-file={}", dir.join("ca.crt").display())])?;
    rig.node().netns().run(|| mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>))??;
    rig.apply(&yaml(&[NAMESPACE, RBAC, N1, N2, &service("first", "10.96.7.1")]))?;
    renew(&rig, way, dir)?;
    start(&rig, way, dir)?;
    rig.answers(200, &[])?;
    let before = rig.maps()?;
    ensure!(before.contains("10.96.7.1"), "{before}");

    let fault = |rig: &mut Rig| revoke(rig, way, dir);
    let repair = |rig: &mut Rig| {
        rig.apply(&service("second", "10.96.7.2"))?;
        rig.answers(200, &[])?;
        ensure!(rig.maps()? == before, "the last good state stays");
        // What is over before the agent first tries to publish an event never becomes one.
        rig.logs(&["WARN", "cannot publish an event"])?;
        renew(rig, way, dir)?;
        rig.holds("the news", &["10.96.7.1", "10.96.7.2"], &[])
    };
    rig.survives(REFUSED, fault, repair)
}

#[test]
fn a_rotated_service_account_token_is_taken_up() -> Result<()> {
    credentials(Credentials::ServiceAccount)
}

#[test]
fn a_rotated_token_file_is_taken_up() -> Result<()> {
    credentials(Credentials::TokenFile)
}

#[test]
fn a_rewritten_kubeconfig_is_taken_up() -> Result<()> {
    credentials(Credentials::Kubeconfig)
}

#[test]
fn a_renewed_client_certificate_is_taken_up() -> Result<()> {
    credentials(Credentials::Certificate)
}

/// A node that comes back after weeks: nothing of what it has is valid, and nothing crashes.
#[test]
fn an_agent_that_starts_with_an_expired_certificate_waits_for_another() -> Result<()> {
    let dir = tempfile::Builder::new().prefix(&format!("rn{}-credentials-", std::process::id())).tempdir()?;
    let dir = dir.path();
    authority(dir)?;
    let mut rig = Rig::start(&[&format!("--client-ca-file={}", dir.join("ca.crt").display())])?;
    rig.apply(&yaml(&[NAMESPACE, RBAC, N1]))?;
    certificate(dir, "-1")?;
    start(&rig, Credentials::Certificate, dir)?;
    let repair = |rig: &mut Rig| {
        rig.answers(503, REFUSED)?;
        // What is over before the agent first tries to publish an event never becomes one.
        rig.logs(&["WARN", "cannot publish an event"])?;
        renew(rig, Credentials::Certificate, dir)?;
        rig.answers(200, &[])
    };
    rig.survives(REFUSED, |_| Ok(()), repair)
}

/// Whoever writes it comes later than the agent, or writes it wrong at first.
#[test]
fn a_kubeconfig_that_cannot_be_used_is_read_again() -> Result<()> {
    let rig = Rig::start(&[])?;
    rig.apply(&yaml(&[NAMESPACE, RBAC, N1]))?;
    let good = rig.server.kubeconfig(AGENT, &direct())?;
    let path = rig.node().dir().join("kubeconfig");
    rig.start_agent(&path)?;
    let pid = rig.node().agent_pid();
    for text in [None, Some("{"), Some("apiVersion: v1\nkind: Config\ncurrent-context: absent\n")] {
        text.map_or(Ok(()), |text| replace(&path, text))?;
        rig.answers(503, &["API server", "kubeconfig", "read again"])?;
        rig.logs(&["WARN", "API server", "kubeconfig", "read again"])?;
    }
    replace(&path, &std::fs::read_to_string(good)?)?;
    rig.answers(200, &[])?;
    ensure!(rig.node().agent_pid() == pid, "another agent");
    Ok(())
}

/// First it is away, then it is there with an empty store whose versions begin again, then with
/// other objects.
#[test]
fn another_store_behind_the_same_address_is_noticed() -> Result<()> {
    let mut rig = Rig::start(&[])?;
    rig.apply(&yaml(&[N1, N2, &service("first", "10.96.7.1"), &service("gone", "10.96.7.2")]))?;
    // So that the agent is far ahead of the next store.
    rig.cluster(async |cluster| {
        for i in 0..1000 {
            let churn = format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: churn}}\ndata: {{i: \"{i}\"}}\n");
            cluster.apply(&churn).await?;
        }
        cluster.apply(&service("last", "10.96.7.3")).await
    })?;
    let kubeconfig = rig.server.kubeconfig(ADMIN, &direct())?;
    rig.start_agent(&kubeconfig)?;
    rig.answers(200, &[])?;
    rig.holds("all of the first store", &["10.96.7.1", "10.96.7.2", "10.96.7.3"], &[])?;
    let (before, version) = (rig.maps()?, version(&rig)?);

    let away = ["API server", "cannot be reached", "--api-server", "last known state stays"];
    let fault = |rig: &mut Rig| {
        rig.server.stop_api();
        Ok(())
    };
    let repair = |rig: &mut Rig| {
        rig.answers(200, &away)?;
        ensure!(rig.maps()? == before, "the last good state stays");
        rig.server.renew_store()?;
        rig.server.start_api()?;
        ensure!(self::version(rig)? < version, "the store's versions begin again");
        rig.holds("nothing of the first store", &["10.96.0.1"], &["10.96.7.", "10.244.2.0/24"])?;
        rig.answers(503, &["n1", "no pod range", "--allocate-node-cidrs"])?;
        rig.logs(&["Node n1", "own object is missing", "--node-name"])?;
        rig.tells("Warning", &["Node n1", "own object is missing", "--node-name"])?;
        let other = service("first", "10.96.7.9");
        rig.apply(&yaml(&[N1, &N2.replace("10.244.2.", "10.244.3."), &other]))?;
        rig.holds("the second store", &["10.96.7.9", "10.244.3.0/24"], &["10.96.7.1", "10.96.7.2"])?;
        rig.answers(200, &[])
    };
    rig.endures(&away, fault, repair)
}

/// The kernel accepts connections for it. With the deadlines as shipped, and until its events are published.
#[test]
#[ignore = "takes three minutes; `cargo xtask test --long silence` runs it"]
fn a_stopped_api_server_is_noticed_and_its_return_is_too() -> Result<()> {
    let mut rig = running(&[N1, N2, &service("first", "10.96.7.1")], true)?;
    let before = rig.maps()?;
    let words = ["API server", "gives no answer in time", "load balancer", "last known state stays"];
    let fault = |rig: &mut Rig| rig.server.signal_api(Signal::SIGSTOP);
    let repair = |rig: &mut Rig| {
        rig.answers(200, &words)?;
        let status = rig.node().rustnetctl(&["status"])?;
        ensure!(status.contains("gives no answer in time"), "{status}");
        ensure!(rig.maps()? == before, "the last good state stays");
        // It is news by now.
        rig.logs(&["WARN", "cannot publish an event"])?;
        rig.server.signal_api(Signal::SIGCONT)?;
        rig.apply(&service("second", "10.96.7.2"))?;
        rig.holds("the news", &["10.96.7.1", "10.96.7.2"], &[])
    };
    rig.survives(&words, fault, repair)
}

/// The version of the store.
fn version(rig: &Rig) -> Result<u64> {
    let list = rig.server.kubectl(&["get", "--raw=/api/v1/namespaces?limit=1"])?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    Ok(list["metadata"]["resourceVersion"].as_str().context("a version")?.parse()?)
}

/// A rig with an agent that knows these objects, and is ready unless `ready` is false.
fn running(objects: &[&str], ready: bool) -> Result<Rig> {
    let rig = Rig::start(&[])?;
    rig.apply(&yaml(&[&[NAMESPACE, RBAC], objects].concat()))?;
    let kubeconfig = rig.server.kubeconfig(AGENT, &direct())?;
    rig.start_agent(&kubeconfig)?;
    if ready {
        rig.answers(200, &[])?;
    }
    Ok(rig)
}

#[test]
fn a_node_without_a_pod_range_waits_for_one() -> Result<()> {
    let without = N1.replace(r#"podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24, "fd00:244:0:1::/64"]"#, "");
    let mut rig = running(&[&without, &service("first", "10.96.7.1")], false)?;
    let conflist = rig.node().cni_conf_dir().join("05-rustnet.conflist");
    let words = ["n1", "no pod range", "--allocate-node-cidrs"];
    let repair = |rig: &mut Rig| {
        rig.answers(503, &words)?;
        rig.tells("Warning", &words)?;
        rig.holds("services are served nevertheless", &["10.96.7.1"], &[])?;
        ensure!(!conflist.exists(), "a network without addresses");
        rig.apply(N1)?;
        rig.answers(200, &[])?;
        ensure!(conflist.exists(), "the CNI configuration is installed");
        rig.node().add_pod("a")?.check()
    };
    rig.survives(&words, |_| Ok(()), repair)
}

/// Kubernetes lets nobody change a range: the object goes, and another of its name comes.
#[test]
fn a_node_with_another_pod_range_keeps_its_pods_and_names_them() -> Result<()> {
    let mut rig = running(&[N1, &service("first", "10.96.7.1")], true)?;
    let old = rig.node().add_pod("old")?;
    let services = || rig.node().rustnetctl(&["services", "-o", "json"]).map(|json| without_names(&json));
    let before = services()?;
    rig.cluster(async |cluster| cluster.delete("v1", "Node", "n1").await)?;
    rig.answers(503, &["n1", "no pod range"])?;
    rig.tells("Warning", &["Node n1", "own object is missing"])?;
    ensure!(services()? == before, "the last good state stays");
    answers(&rig, &old)?;

    let words = ["Node n1", "outside of its pod ranges", "10.244.77.0/24", "delete"];
    let mut left = Some(old);
    let old = left.as_ref().context("a pod")?.addresses().to_vec();
    let fault = |rig: &mut Rig| {
        rig.apply(&N1.replace("10.244.1.0/24", "10.244.77.0/24").replace("fd00:244:0:1::", "fd00:244:0:77::"))?;
        rig.answers(200, &[])
    };
    let repair = |rig: &mut Rig| {
        let new = rig.node().add_pod("new")?;
        ensure!(new.v4()?.octets()[2] == 77, "{:?}", new.addresses());
        for address in old {
            let target = std::net::SocketAddr::new(address, PORT);
            ask(new.netns(), Proto::Tcp, target, 2)?.only_by(&["old"])?;
        }
        rig.tells("Warning", &words)?;
        left.take().context("a pod")?.delete()
    };
    rig.survives(&words, fault, repair)
}

fn answers(rig: &Rig, pod: &Pod) -> Result<()> {
    for address in pod.addresses() {
        let target = std::net::SocketAddr::new(*address, PORT);
        wait::until("it answers", || ask(rig.node().netns(), Proto::Tcp, target, 1)?.only_by(&[pod.name()]))?;
    }
    Ok(())
}

/// Whoever of two the other agent blames: each tells it of itself.
#[test]
fn another_node_with_this_ones_address_or_range_takes_nothing_away() -> Result<()> {
    let mut rig = running(&[N1, N2, &service("first", "10.96.7.1")], true)?;
    let before = rig.maps()?;
    ensure!(before.contains("10.244.2.0/24"), "{before}");
    let delete = |rig: &mut Rig| rig.cluster(async |cluster| cluster.delete("v1", "Node", "n2").await);
    for (object, words) in [
        (N2.replace("172.18.0.12", "172.18.0.11"), ["n2", "172.18.0.11", "node n1", "addresses of its own"]),
        (N2.replace("10.244.2.0/24", "10.244.1.128/25"), ["n2", "10.244.1.128/25", "node n1", "range of its own"]),
    ] {
        let pod = rig.node().add_pod("a")?;
        let fault = |rig: &mut Rig| {
            delete(rig)?;
            rig.apply(&object)
        };
        let repair = |rig: &mut Rig| {
            rig.tells("Warning", &words)?;
            rig.answers(200, &[])?;
            rig.holds("this node's own", &["172.18.0.11/32", "10.244.1.0/24", "10.96.7.1"], &["10.244.1.128/25"])?;
            answers(rig, &pod)?;
            delete(rig)?;
            rig.apply(N2)?;
            rig.until_maps(&before)
        };
        rig.survives(&words, fault, repair)?;
    }
    Ok(())
}

/// The image is started where it cannot work. Here the kernel only says that it is old, and something is in the way of the pins.
#[test]
fn a_kernel_that_is_too_old_is_named() -> Result<()> {
    let mut rig = Rig::start(&[])?;
    rig.apply(&yaml(&[NAMESPACE, RBAC, N1]))?;
    let kubeconfig = rig.server.kubeconfig(AGENT, &direct())?;
    let (release, said) = (Path::new("/proc/sys/kernel/osrelease"), rig.node().dir().join("osrelease"));
    std::fs::write(&said, "5.10.0-32-amd64\n")?;
    let bpf = rig.node().dir().join("bpf");
    rig.node().netns().run(|| -> Result<()> {
        mount(Some(&said), release, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        umount(&bpf)?;
        Ok(std::fs::write(bpf.join("rustnet"), "in the way")?)
    })??;
    rig.start_agent(&kubeconfig)?;
    let words = ["kernel 5.10.0-32-amd64", "older than 6.0", "boot a newer one"];
    let repair = |rig: &mut Rig| {
        rig.answers(503, &words)?;
        rig.tells("Warning", &words)?;
        ensure!(!rig.node().cni_conf_dir().join("05-rustnet.conflist").exists(), "a network without programs");
        rig.node().netns().run(|| -> Result<()> {
            umount(release)?;
            std::fs::remove_file(bpf.join("rustnet"))?;
            Ok(mount(Some("bpf"), &bpf, Some("bpf"), MsFlags::empty(), None::<&str>)?)
        })??;
        rig.answers(200, &[])
    };
    rig.survives(&words, |_| Ok(()), repair)
}

#[test]
fn a_configuration_before_ours_is_reported() -> Result<()> {
    let mut rig = running(&[N1], true)?;
    let file = rig.node().cni_conf_dir().join("00-other.conflist");
    let words = ["00-other.conflist", "network other", "05-rustnet.conflist", "remove it"];
    // Any change of the network makes the agent look; else it is 30 s.
    let look = |rig: &mut Rig| rig.node().netns().ip("addr add 192.0.2.99/32 dev lo\naddr del 192.0.2.99/32 dev lo\n");
    let fault = |rig: &mut Rig| {
        std::fs::write(&file, r#"{"name": "other", "cniVersion": "1.0.0", "plugins": [{"type": "bridge"}]}"#)?;
        look(rig)
    };
    let repair = |rig: &mut Rig| {
        rig.answers(200, &[])?;
        rig.tells("Warning", &words)?;
        std::fs::remove_file(&file)?;
        look(rig)
    };
    rig.survives(&words, fault, repair)
}
