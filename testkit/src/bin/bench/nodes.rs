//! An agent in a cluster of thousands of Nodes whose kubelets report, fed by an API server that has nothing else.

use crate::control::{Memory, cpu_seconds};
use crate::stats::verdict;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testkit::{Fabric, Node, wait};

/// Nodes that the goals speak of.
pub const FULL: u32 = 5000;
/// A kubelet reports so often if nothing has changed (`nodeStatusReportFrequency`).
const REPORT: Duration = Duration::from_mins(5);
/// Images that a kubelet lists in each report (`nodeStatusMaxImages`).
const IMAGES: u32 = 50;
/// Share of a core, in per cent, and MiB.
const GOALS: (f64, f64) = (2.0, 60.0);

/// Measures for some time and prints.
pub fn run(fabric: &Fabric, nodes: u32, time: Duration) -> Result<()> {
    let node = fabric.node(1);
    let server = Server::start(node, nodes)?;
    let kubeconfig = node.dir().join("nodes.kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig()).context("writing a kubeconfig")?;
    let start = Instant::now();
    node.spawn_agent(&["--kubeconfig", &kubeconfig.to_string_lossy()])?;
    let maps = || node.rustnetctl(&["peers", "-o", "json"]);
    wait::until_deadline("all Nodes in the maps", Duration::from_mins(5), || {
        let peers: Value = serde_json::from_str(&maps()?)?;
        let known = peers.as_array().map_or(0, Vec::len);
        ensure!(known >= nodes as usize, "{known} of {nodes}");
        Ok(())
    })
    .with_context(|| format!("the agent's log ends:\n{}", node.agent_log(30)))?;
    let ready = start.elapsed().as_secs_f64();
    let pid = node.agent_pid().context("no agent")?;
    let (began, used) = (Instant::now(), cpu_seconds(pid)?);
    std::thread::sleep(time);
    let share = (cpu_seconds(pid)? - used) / began.elapsed().as_secs_f64() * 100.0;
    let memory = Memory::of(node)?;
    node.stop_agent()?;
    // Fewer Nodes prove nothing.
    let word = |reached| if nodes >= FULL { verdict(reached) } else { "" };
    println!(
        "\nAgent with {nodes} Nodes, each of which reports every {} s, over {} s; in the maps after {ready:.1} s:\n\n\
         | | | Goal | |\n|---|---|---|---|\n\
         | CPU, per cent of a core | {share:.2} | {} | {} |\n\
         | resident memory, MiB (most so far {:.1}) | {:.1} | {} | {} |",
        REPORT.as_secs(),
        time.as_secs(),
        GOALS.0,
        word(share <= GOALS.0),
        memory.peak,
        memory.resident,
        GOALS.1,
        word(memory.resident <= GOALS.1),
    );
    Ok(())
}

/// An API server with Nodes alone.
struct Server {
    port: u16,
    is_over: Arc<AtomicBool>,
}

impl Server {
    fn start(node: &Node, nodes: u32) -> Result<Self> {
        let listener = node.netns().run(|| TcpListener::bind("127.0.0.1:0"))??;
        let (port, is_over) = (listener.local_addr()?.port(), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&is_over);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let over = Arc::clone(&over);
                // One that ends early is asked again.
                std::thread::spawn(move || drop(serve(stream, nodes, &over)));
            }
        });
        Ok(Self { port, is_over })
    }

    fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{}\"}}}}]\n\
             users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n",
            self.port
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// Answers the requests of one connection.
fn serve(mut stream: TcpStream, nodes: u32, is_over: &AtomicBool) -> Result<()> {
    let mut requests = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if requests.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut length = 0;
        loop {
            let mut header = String::new();
            requests.read_line(&mut header)?;
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        std::io::copy(&mut std::io::Read::take(&mut requests, length), &mut std::io::sink())?;
        let uri = line.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let path = uri.split('?').next().unwrap_or_default();
        let has_nodes = path == "/api/v1/nodes";
        if uri.contains("watch=true") {
            return watch(&mut stream, if has_nodes { nodes } else { 0 }, is_over);
        }
        let list = |items: Vec<Value>| json!({"metadata": {"resourceVersion": "1"}, "items": items});
        let parameter = |name: &str| uri.split(['?', '&']).find_map(|it| it.strip_prefix(name)?.parse::<u32>().ok());
        let body = match path {
            // It streams no lists.
            "/version" => Some(version()),
            "/api/v1/nodes" => {
                let first = parameter("continue=").unwrap_or(0);
                let end = nodes.min(first + parameter("limit=").unwrap_or(nodes));
                let mut page = list((first..end).map(|n| object(n, 0)).collect());
                if end < nodes {
                    page["metadata"]["continue"] = end.to_string().into();
                }
                Some(page)
            }
            "/api/v1/services" | "/api/v1/pods" | "/apis/discovery.k8s.io/v1/endpointslices" => Some(list(Vec::new())),
            _ => None,
        };
        let (status, body) = match body {
            Some(body) => ("200 OK", body.to_string()),
            None => ("404 Not Found", json!({"kind": "Status", "status": "Failure", "code": 404}).to_string()),
        };
        let head =
            format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
    }
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "26", "gitVersion": "v1.26.0", "gitCommit": "", "gitTreeState": "", "buildDate": "",
        "goVersion": "", "compiler": "", "platform": "",
    })
}

/// A watch: each Node reports in turn, all of them once a period.
fn watch(stream: &mut TcpStream, nodes: u32, is_over: &AtomicBool) -> Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")?;
    let pause = REPORT / nodes.max(1);
    for report in 1.. {
        std::thread::sleep(pause.min(Duration::from_secs(1)));
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        if nodes > 0 {
            let event = json!({"type": "MODIFIED", "object": object(report % nodes, report)}).to_string();
            stream.write_all(format!("{:x}\r\n{event}\n\r\n", event.len() + 1).as_bytes())?;
        }
    }
    Ok(())
}

/// Node number `n` as a kubelet reports it: all of its conditions and images come each time.
fn object(n: u32, report: u32) -> Value {
    let (high, low) = (n / 250, n % 250 + 1);
    let time = format!("2026-01-01T{:02}:{:02}:{:02}Z", report / 3600 % 24, report / 60 % 60, report % 60);
    let condition = |kind: &str, status: &str| {
        json!({
            "type": kind, "status": status, "lastHeartbeatTime": time, "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": "KubeletReports", "message": "the kubelet has what it needs of this",
        })
    };
    let image = |i: u32| {
        let name = format!("registry.example.com/team-{}/application-{i}", i % 7);
        json!({"names": [format!("{name}@sha256:{:064x}", u64::from(i) << 32 | 0xabcd), format!("{name}:v1.{i}")], "sizeBytes": 123_456_789})
    };
    json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": {
            "name": if n == 0 { "n1".to_owned() } else { format!("node-{n}") },
            "resourceVersion": (report + 1).to_string(),
            "labels": {"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": format!("z{}", n % 3)},
        },
        "spec": {"podCIDRs": [format!("10.{}.{low}.0/24", 128 + high)]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": if n == 0 { "172.18.0.11".to_owned() } else { format!("172.19.{high}.{low}") }},
                {"type": "Hostname", "address": format!("node-{n}")},
            ],
            "conditions": [
                condition("Ready", "True"), condition("MemoryPressure", "False"), condition("DiskPressure", "False"),
                condition("PIDPressure", "False"), condition("NetworkUnavailable", "False"),
            ],
            "images": (0..IMAGES).map(image).collect::<Vec<_>>(),
        },
    })
}
