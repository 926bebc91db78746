//! An API server for benchmarks: lists and watches of the objects that a measurement makes up, over plain HTTP.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use testkit::Node;

/// Path of Nodes.
pub const NODES: &str = "/api/v1/nodes";
/// Path of Services.
pub const SERVICES: &str = "/api/v1/services";
/// Path of EndpointSlices.
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
/// Path of Pods.
pub const PODS: &str = "/api/v1/pods";
/// Path of Namespaces.
pub const NAMESPACES: &str = "/api/v1/namespaces";
/// Path of NetworkPolicies.
pub const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
/// Path of ClusterNetworkPolicies.
pub const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies";
/// Kinds that the server has; it has no other one.
const PATHS: [&str; 7] = [NODES, SERVICES, SLICES, PODS, NAMESPACES, POLICIES, CLUSTER_POLICIES];

/// The objects that a server has, by the path of their kind.
pub trait Objects: Send + Sync + 'static {
    /// Returns the number of objects of a kind.
    fn count(&self, path: &str) -> u32;
    /// Returns object number `n` of a kind.
    fn object(&self, path: &str, n: u32) -> Value;
    /// Sends the changes of a kind until nothing `is_wanted` any more.
    ///
    /// # Errors
    /// Those of the stream.
    fn watch(&self, path: &str, changes: &mut Changes, is_wanted: &dyn Fn() -> bool) -> Result<()>;
}

/// The stream of a watch.
pub struct Changes(TcpStream);

impl Changes {
    /// Sends an object that has changed.
    pub fn send(&mut self, object: &Value) -> Result<()> {
        self.send_as("MODIFIED", object)
    }

    /// Sends an object with what became of it: `ADDED`, `MODIFIED` or `DELETED`.
    pub fn send_as(&mut self, what: &str, object: &Value) -> Result<()> {
        // The type first, as API servers write it: without it the agent cannot read the object.
        let event = format!(r#"{{"type":"{what}","object":{object}}}"#);
        Ok(self.0.write_all(format!("{:x}\r\n{event}\n\r\n", event.len() + 1).as_bytes())?)
    }

    /// Ends the stream, as servers do after a while: the agent asks again.
    pub fn end(&mut self) -> Result<()> {
        Ok(self.0.write_all(b"0\r\n\r\n")?)
    }
}

/// A server on the loopback interface of a node. Its watches end when it is dropped.
pub struct Server {
    kubeconfig: PathBuf,
    is_over: Arc<AtomicBool>,
}

impl Server {
    /// Starts one with these objects.
    pub fn start(node: &Node, objects: Arc<impl Objects>) -> Result<Self> {
        let listener = node.netns().run(|| TcpListener::bind("127.0.0.1:0"))??;
        let (port, is_over) = (listener.local_addr()?.port(), Arc::new(AtomicBool::new(false)));
        let kubeconfig = node.dir().join(format!("bench-{port}.kubeconfig"));
        std::fs::write(&kubeconfig, config(port)).context("writing a kubeconfig")?;
        let over = Arc::clone(&is_over);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (objects, over) = (Arc::clone(&objects), Arc::clone(&over));
                // The agent repeats the requests of a connection that ends early.
                std::thread::spawn(move || drop(serve(stream, &*objects, &over)));
            }
        });
        Ok(Self { kubeconfig, is_over })
    }

    /// The path of a kubeconfig that names this server.
    pub fn kubeconfig(&self) -> String {
        self.kubeconfig.to_string_lossy().into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

fn config(port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]\n\
         users: [{{name: u, user: {{}}}}]\ncontexts: [{{name: x, context: {{cluster: c, user: u}}}}]\ncurrent-context: x\n"
    )
}

/// Answers the requests of one connection.
fn serve(mut stream: TcpStream, objects: &impl Objects, is_over: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream.try_clone()?);
    while let Some(uri) = next_request(&mut requests)? {
        let path = uri.split('?').next().unwrap_or_default();
        if uri.contains("watch=true") {
            stream.write_all(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
            )?;
            return objects.watch(path, &mut Changes(stream), &|| !is_over.load(Ordering::Relaxed));
        }
        let body = match path {
            // It streams no lists.
            "/version" => Some(version()),
            _ if PATHS.contains(&path) => Some(page(objects, path, &uri)),
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
    Ok(())
}

/// Reads a request and its body, and returns its URI; `None` at the end of the connection.
fn next_request(requests: &mut BufReader<TcpStream>) -> Result<Option<String>> {
    let mut line = String::new();
    if requests.read_line(&mut line)? == 0 {
        return Ok(None);
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
    std::io::copy(&mut std::io::Read::take(requests, length), &mut std::io::sink())?;
    Ok(Some(line.split_whitespace().nth(1).unwrap_or_default().to_owned()))
}

/// The page of a list that a URI asks for.
fn page(objects: &impl Objects, path: &str, uri: &str) -> Value {
    let parameter = |name: &str| uri.split(['?', '&']).find_map(|it| it.strip_prefix(name)?.parse::<u32>().ok());
    let count = objects.count(path);
    let first = parameter("continue=").unwrap_or(0);
    let end = count.min(first.saturating_add(parameter("limit=").unwrap_or(count)));
    let items: Vec<Value> = (first..end).map(|n| objects.object(path, n)).collect();
    let mut page = json!({"metadata": {"resourceVersion": "1"}, "items": items});
    if end < count {
        page["metadata"]["continue"] = end.to_string().into();
    }
    page
}

fn version() -> Value {
    json!({
        "major": "1", "minor": "26", "gitVersion": "v1.26.0", "gitCommit": "", "gitTreeState": "", "buildDate": "",
        "goVersion": "", "compiler": "", "platform": "",
    })
}
