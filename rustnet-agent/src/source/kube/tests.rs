//! The source with servers of a few lines.

use super::*;
use axum::http::{Request, Response};
use kube::client::Body;
use kube::core::Status;
use serde_json::{Value, json};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

fn api(code: u16) -> kube::Error {
    let mut status = Status::failure("x", "y");
    status.code = code;
    kube::Error::Api(status.boxed())
}

fn watch_error(code: u16) -> watcher::Error {
    let mut status = Status::failure("x", "y");
    status.code = code;
    watcher::Error::WatchError(status.boxed())
}

/// An event of an object without a name.
fn unreadable_line() -> watcher::Error {
    watcher::Error::WatchFailed(kube::Error::SerdeError(serde_json::from_str::<u8>("x").expect_err("no number")))
}

#[test]
fn what_follows_a_failure() {
    use watcher::Error as E;
    for (error, streaming, next) in [
        (watch_error(410), true, Next::Relist),
        (watch_error(500), true, Next::Page),
        (watch_error(500), false, Next::Resume),
        (watch_error(429), true, Next::Resume),
        (E::WatchStartFailed(api(410)), true, Next::Relist),
        (E::WatchStartFailed(api(504)), true, Next::Page),
        (E::WatchStartFailed(api(504)), false, Next::Relist),
        (E::WatchStartFailed(api(422)), true, Next::Page),
        (E::WatchStartFailed(api(422)), false, Next::Relist),
        (E::WatchStartFailed(api(403)), true, Next::Resume),
        (E::WatchStartFailed(api(429)), true, Next::Resume),
        (E::InitialListFailed(api(503)), false, Next::Resume),
        (E::InitialListFailed(api(410)), false, Next::Relist),
        (E::NoResourceVersion, false, Next::Relist),
        (unreadable_line(), true, Next::Page),
        (unreadable_line(), false, Next::Relist),
    ] {
        assert_eq!(next_step(&error, streaming), next, "{error:?} {streaming}");
    }
}

#[test]
fn streaming_lists_came_with_1_27() {
    for (major, minor, want) in [
        ("1", "34", true),
        ("1", "27", true),
        ("1", "26", false),
        ("1", "26+", false),
        ("2", "0", true),
        ("", "", true),
    ] {
        assert_eq!(streams(major, minor), want, "{major}.{minor}");
    }
}

/// A server of 1.26 with two pages of Nodes. When the second is asked for, it no longer has that state, once.
async fn answer(request: Request<Body>, has_forgotten: Arc<AtomicBool>) -> Result<Response<Body>, kube::Error> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let node = |name: &str| json!({"metadata": {"name": name, "resourceVersion": "7"}});
    let list = |of: &[Value], next: &str| json!({"metadata": {"resourceVersion": "7", "continue": next}, "items": of});
    let status = json!({"kind": "Status", "status": "Failure", "reason": "Expired", "message": "gone", "code": 410});
    let (code, body) = match request.uri().path() {
        _ if query.contains("watch=true") => return std::future::pending().await,
        "/version" => (200, serde_json::to_value(version("1", "26")).expect("JSON")),
        "/api/v1/nodes" if !query.contains("continue") => (200, list(&[node("n1")], "second")),
        "/api/v1/nodes" if !has_forgotten.swap(true, Ordering::Relaxed) => (410, status),
        "/api/v1/nodes" => (200, list(&[node("n2")], "")),
        _ => (200, list(&[], "")),
    };
    let body = Body::from(body.to_string().into_bytes());
    Ok(Response::builder().status(code).body(body).expect("an answer"))
}

fn version(major: &str, minor: &str) -> k8s_openapi::apimachinery::pkg::version::Info {
    let (major, minor) = (major.to_owned(), minor.to_owned());
    k8s_openapi::apimachinery::pkg::version::Info { major, minor, ..Default::default() }
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_gone_between_two_pages_is_no_problem() {
    let has_forgotten = Arc::new(AtomicBool::new(false));
    let forgotten = Arc::clone(&has_forgotten);
    let server = tower::service_fn(move |request| answer(request, Arc::clone(&forgotten)));
    let connection = Connection::new(kube::Client::new(server, "default"), crate::api::answers::Answers::default());
    let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1"));
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    tokio::spawn(source.run(sender));
    let mut about_nodes = Vec::new();
    while about_nodes.last().is_none_or(|last| *last != "Synced(Node)") {
        match events.recv().await.expect("the source runs") {
            Event::Restart(Kind::Node) => about_nodes.push("Restart(Node)".to_owned()),
            Event::Synced(Kind::Node) => about_nodes.push("Synced(Node)".to_owned()),
            Event::Apply(object) => about_nodes.push(object.reference().to_string()),
            Event::Report { problems, .. } => assert!(problems.is_empty(), "{problems:?}"),
            _ => {}
        }
    }
    assert!(has_forgotten.load(Ordering::Relaxed));
    assert_eq!(about_nodes, ["Restart(Node)", "Node n1", "Restart(Node)", "Node n1", "Node n2", "Synced(Node)"]);
}

/// A server without ServiceCIDRs; later it has them, and one.
async fn answer_without_ranges(request: Request<Body>, asked: Arc<AtomicU32>, code: u16) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let object =
        json!({"metadata": {"name": "kubernetes", "resourceVersion": "7"}, "spec": {"cidrs": ["10.96.0.0/16"]}});
    let (code, body) = match request.uri().path() {
        "/version" => (200, serde_json::to_string(&version("1", "26")).expect("JSON")),
        "/apis/networking.k8s.io/v1/servicecidrs" if asked.fetch_add(1, Ordering::Relaxed) < 3 => {
            (code, "404 page not found\n".to_owned())
        }
        _ if query.contains("watch=true") => return std::future::pending().await,
        "/apis/networking.k8s.io/v1/servicecidrs" => {
            (200, json!({"metadata": {"resourceVersion": "7"}, "items": [object]}).to_string())
        }
        _ => (200, json!({"metadata": {"resourceVersion": "7"}, "items": []}).to_string()),
    };
    Response::builder().status(code).body(Body::from(body.into_bytes())).expect("an answer")
}

/// An older server has none, and after an upgrade of the agent alone its role does not name them.
#[tokio::test(start_paused = true)]
async fn a_server_without_ranges_of_services_is_no_failure() {
    for code in [404, 403] {
        let asked = Arc::new(AtomicU32::new(0));
        let server = tower::service_fn(move |request| {
            let answer = answer_without_ranges(request, Arc::clone(&asked), code);
            async { Ok::<_, kube::Error>(answer.await) }
        });
        let answers = crate::api::answers::Answers::default();
        let connection = Connection::new(kube::Client::new(server, "default"), answers);
        let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1"));
        let (sender, mut events) = tokio::sync::mpsc::channel(256);
        tokio::spawn(source.run(sender));
        let mut about_ranges = Vec::new();
        while about_ranges.len() < 4 {
            match events.recv().await.expect("the source runs") {
                Event::Restart(Kind::ServiceCidr) => about_ranges.push("Restart".to_owned()),
                Event::Synced(Kind::ServiceCidr) => about_ranges.push("Synced".to_owned()),
                Event::Apply(object) => about_ranges.push(object.reference().to_string()),
                Event::Report { problems, .. } => assert!(problems.is_empty(), "{problems:?}"),
                _ => {}
            }
        }
        assert_eq!(about_ranges, ["Synced", "Restart", "ServiceCIDR kubernetes", "Synced"]);
    }
}

/// A server with nothing, which answers for NetworkPolicies with these codes in turn until some time. It records what is asked for.
async fn answer_refusing(
    request: Request<Body>,
    (codes, until): (&[u16], Instant),
    asked: Arc<Mutex<Vec<String>>>,
) -> Response<Body> {
    let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
    if query.contains("watch=true") {
        return std::future::pending().await;
    }
    let before = asked.lock().expect("a list").iter().filter(|it| it.starts_with(&path)).count();
    asked.lock().expect("a list").push(format!("{path}?{query}"));
    let (code, body) = match path.as_str() {
        "/version" => (200, serde_json::to_string(&version("1", "26")).expect("JSON")),
        "/apis/networking.k8s.io/v1/networkpolicies" if Instant::now() < until => {
            let code = codes[before % codes.len()];
            (code, json!({"kind": "Status", "status": "Failure", "message": "no", "code": code}).to_string())
        }
        _ => (200, json!({"metadata": {"resourceVersion": "7"}, "items": []}).to_string()),
    };
    Response::builder().status(code).body(Body::from(body.into_bytes())).expect("an answer")
}

/// What is asked for until all kinds are synced, and the refusals that are reported meanwhile: how many problems each has.
async fn asked_and_refused(
    has_policies: bool,
    codes: &'static [u16],
    refused: Duration,
) -> (Vec<String>, Vec<(Kind, usize)>) {
    let (until, asked) = (Instant::now() + refused, Arc::new(Mutex::new(Vec::new())));
    let log = Arc::clone(&asked);
    let server = tower::service_fn(move |request| {
        let answer = answer_refusing(request, (codes, until), Arc::clone(&log));
        async { Ok::<_, kube::Error>(answer.await) }
    });
    let connection = Connection::new(kube::Client::new(server, "default"), crate::api::answers::Answers::default());
    let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1")).with_policies(has_policies);
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    tokio::spawn(source.run(sender));
    let mut missing: Vec<_> = Kind::ALL.into_iter().filter(|kind| is_watched(*kind, has_policies)).collect();
    let mut refusals = Vec::new();
    while !missing.is_empty() {
        match events.recv().await.expect("the source runs") {
            Event::Synced(kind) => missing.retain(|it| *it != kind),
            Event::Report { origin: Origin::Refusal(kind), problems } => refusals.push((kind, problems.len())),
            _ => {}
        }
    }
    let asked = asked.lock().expect("a list").clone();
    (asked, refusals)
}

/// A role of before does not name them: the node works without, and somebody hears of it.
#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_policies_is_asked_again() {
    let (asked, refusals) = asked_and_refused(true, &[403], REFUSED * 4).await;
    assert_eq!(refusals, [(Kind::NetworkPolicy, 1), (Kind::NetworkPolicy, 0)], "once, and until it is over");
    for resource in ["/api/v1/pods?", "/api/v1/namespaces?", "/networkpolicies?"] {
        assert!(asked.iter().any(|it| it.contains(resource)), "{resource}: {asked:?}");
    }
    assert!(!asked.iter().any(|it| it.contains("fieldSelector")), "{asked:?}");
}

/// A server that starts refuses what it shows a moment later: a node must not become ready without policies for that.
#[tokio::test(start_paused = true)]
async fn refusals_of_a_server_that_starts_are_not_reported() {
    assert_eq!(asked_and_refused(true, &[403], REFUSED).await.1, []);
    // Nor those of one that fails in between for another reason.
    assert_eq!(asked_and_refused(true, &[403, 500], REFUSED * 8).await.1, []);
}

#[tokio::test(start_paused = true)]
async fn without_policies_only_this_nodes_pods_are_asked_for() {
    let (asked, refusals) = asked_and_refused(false, &[403], REFUSED * 4).await;
    assert_eq!(refusals, []);
    for resource in ["/api/v1/namespaces?", "/networkpolicies?"] {
        assert!(!asked.iter().any(|it| it.contains(resource)), "{resource}: {asked:?}");
    }
    let of_node = "fieldSelector=spec.nodeName%3Dn1";
    assert!(asked.iter().filter(|it| it.contains("/api/v1/pods?")).all(|it| it.contains(of_node)), "{asked:?}");
}

/// A line of a watch, as a server writes it: the type first.
fn watch_line(kind: &str, object: &Value) -> String {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

/// A server with Nodes that the agent cannot read: one in the list, and one that is deleted later.
async fn answer_unreadable(request: Request<Body>) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let node = |name: &str, addresses: Value| json!({"metadata": {"name": name, "resourceVersion": "8"}, "status": {"addresses": addresses}});
    let (good, odd) = (json!([{"type": "InternalIP", "address": "192.0.2.1"}]), json!("none"));
    let body = match request.uri().path() {
        "/version" => serde_json::to_string(&version("1", "26")).expect("JSON"),
        "/api/v1/nodes" if query.contains("watch=true") && query.contains("resourceVersion=7") => {
            let events =
                [("MODIFIED", node("n1", odd.clone())), ("DELETED", node("n2", odd)), ("MODIFIED", node("n3", good))];
            events.map(|(kind, object)| watch_line(kind, &object)).concat()
        }
        _ if query.contains("watch=true") => return std::future::pending().await,
        "/api/v1/nodes" => {
            let items = [node("n1", good.clone()), node("n2", good.clone()), node("n3", odd)];
            json!({"metadata": {"resourceVersion": "7"}, "items": items}).to_string()
        }
        _ => json!({"metadata": {"resourceVersion": "7"}, "items": []}).to_string(),
    };
    Response::new(Body::from(body.into_bytes()))
}

/// Neither is the list refused for one of its objects, nor is the event of one lost.
#[tokio::test(start_paused = true)]
async fn objects_that_cannot_be_read_are_named() {
    let server = tower::service_fn(|request| async { Ok::<_, kube::Error>(answer_unreadable(request).await) });
    let connection = Connection::new(kube::Client::new(server, "default"), crate::api::answers::Answers::default());
    let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1"));
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    tokio::spawn(source.run(sender));
    let mut about_nodes = Vec::new();
    while about_nodes.len() < 8 {
        match events.recv().await.expect("the source runs") {
            Event::Restart(Kind::Node) => about_nodes.push("restart".to_owned()),
            Event::Synced(Kind::Node) => about_nodes.push("synced".to_owned()),
            Event::Apply(object) => about_nodes.push(format!("apply {}", object.reference())),
            Event::Delete(object) => about_nodes.push(format!("delete {object}")),
            Event::Unreadable(object, problems) => {
                assert!(matches!(&*problems, [it] if it.message.contains("cannot be read")), "{problems:?}");
                about_nodes.push(format!("unreadable {object}"));
            }
            _ => {}
        }
    }
    let list = ["restart", "apply Node n1", "apply Node n2", "unreadable Node n3", "synced"];
    let watch = ["unreadable Node n1", "delete Node n2", "apply Node n3"];
    assert_eq!(about_nodes, [&list[..], &watch].concat());
}

/// Each watch of Nodes ends at once. The second time that their list is asked for as a stream, that is refused.
async fn answer_with_gaps(request: Request<Body>, asked: Arc<AtomicU32>) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let node = |name: &str| json!({"metadata": {"name": name, "resourceVersion": "7"}});
    let failure = |code| json!({"kind": "Status", "status": "Failure", "reason": "x", "message": "x", "code": code});
    let end = || watch_line("ERROR", &failure(410));
    let (code, body) = match request.uri().path() {
        "/version" => (200, serde_json::to_string(&version("1", "34")).expect("JSON")),
        "/api/v1/nodes" if query.contains("sendInitialEvents=true") => {
            let last = json!({"resourceVersion": "7", "annotations": {"k8s.io/initial-events-end": "true"}});
            let bookmark = json!({"kind": "Node", "apiVersion": "v1", "metadata": last});
            let events = [watch_line("ADDED", &node("n1")), watch_line("BOOKMARK", &bookmark), end()];
            match asked.fetch_add(1, Ordering::Relaxed) {
                1 => (422, failure(422).to_string()),
                _ => (200, events.concat()),
            }
        }
        "/api/v1/nodes" if query.contains("watch=true") => (200, end()),
        "/api/v1/nodes" => (200, json!({"metadata": {"resourceVersion": "8"}, "items": [node("n2")]}).to_string()),
        _ => return std::future::pending().await,
    };
    Response::builder().status(code).body(Body::from(body.into_bytes())).expect("an answer")
}

/// One of several servers, or one that was set back: it knows streaming lists by its version, and refuses them. The next list may
/// be a stream again.
#[tokio::test(start_paused = true)]
async fn a_server_that_streams_no_more_is_asked_for_pages() {
    let asked = Arc::new(AtomicU32::new(0));
    let server = tower::service_fn(move |request| {
        let answer = answer_with_gaps(request, Arc::clone(&asked));
        async { Ok::<_, kube::Error>(answer.await) }
    });
    let connection = Connection::new(kube::Client::new(server, "default"), crate::api::answers::Answers::default());
    let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1"));
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    tokio::spawn(source.run(sender));
    let mut about_nodes = Vec::new();
    let hear = async {
        while about_nodes.iter().filter(|it| *it == "Synced(Node)").count() < 3 {
            match events.recv().await.expect("the source runs") {
                Event::Restart(Kind::Node) => about_nodes.push("Restart(Node)".to_owned()),
                Event::Synced(Kind::Node) => about_nodes.push("Synced(Node)".to_owned()),
                Event::Apply(object) => about_nodes.push(object.reference().to_string()),
                _ => {}
            }
        }
    };
    let is_listed = tokio::time::timeout(Duration::from_hours(1), hear).await.is_ok();
    let all = ["n1", "n2", "n1"].map(|name| format!("Restart(Node) Node {name} Synced(Node)")).join(" ");
    assert!(is_listed && about_nodes.join(" ") == all, "{about_nodes:?}");
}

/// The custom resource of policies at a server: what each look at it meets, in turn; the last one repeats.
async fn answer_with_policies(
    request: Request<Body>,
    (first, second): (&[u16], &[u16]),
    asked: Arc<Mutex<[usize; 2]>>,
) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let place = request
        .uri()
        .path()
        .strip_prefix("/apis/policy.networking.k8s.io/")
        .map(|rest| usize::from(rest.starts_with("v1alpha2/")));
    let object = json!({"metadata": {"name": "p", "resourceVersion": "7"}, "spec": {"tier": "Admin", "subject": {"namespaces": {}}}});
    let (code, body) = match (request.uri().path(), place) {
        ("/version", _) => (200, serde_json::to_string(&version("1", "26")).expect("JSON")),
        (_, Some(place)) => {
            let codes = [first, second][place];
            let number = {
                let mut asked = asked.lock().expect("counts");
                asked[place] += 1;
                asked[place] - 1
            };
            match codes.get(number).or(codes.last()) {
                // A watch ends when its kind does.
                Some(200) if query.contains("watch=true") => (404, "404 page not found\n".to_owned()),
                Some(200) => (200, json!({"metadata": {"resourceVersion": "7"}, "items": [object]}).to_string()),
                Some(403) => {
                    (403, json!({"kind": "Status", "status": "Failure", "message": "no", "code": 403}).to_string())
                }
                _ => (404, "404 page not found\n".to_owned()),
            }
        }
        _ if query.contains("watch=true") => return std::future::pending().await,
        _ => (200, json!({"metadata": {"resourceVersion": "7"}, "items": []}).to_string()),
    };
    Response::builder().status(code).body(Body::from(body.into_bytes())).expect("an answer")
}

/// The first events about ClusterNetworkPolicies.
async fn about_cluster_policies(first: &'static [u16], second: &'static [u16], count: usize) -> Vec<String> {
    let asked = Arc::new(Mutex::new([0; 2]));
    let server = tower::service_fn(move |request| {
        let answer = answer_with_policies(request, (first, second), Arc::clone(&asked));
        async { Ok::<_, kube::Error>(answer.await) }
    });
    let connection = Connection::new(kube::Client::new(server, "default"), crate::api::answers::Answers::default());
    let source = KubeSource::new(connection, Metrics::default(), NodeStatus::new("n1")).with_policies(true);
    let (sender, mut events) = tokio::sync::mpsc::channel(256);
    tokio::spawn(source.run(sender));
    let mut about = Vec::new();
    while about.len() < count {
        match events.recv().await.expect("the source runs") {
            Event::Restart(Kind::ClusterNetworkPolicy) => about.push("Restart".to_owned()),
            Event::Synced(Kind::ClusterNetworkPolicy) => about.push("Synced".to_owned()),
            Event::Apply(object) if object.kind() == Kind::ClusterNetworkPolicy => {
                about.push(object.reference().to_string());
            }
            Event::Report { origin: Origin::Refusal(Kind::ClusterNetworkPolicy), problems } => {
                about.push(format!("{} refused", problems.len()));
            }
            Event::Report { origin, problems } => assert!(problems.is_empty(), "{origin}: {problems:?}"),
            _ => {}
        }
    }
    about
}

/// Other kinds do not wait for it; it is taken up when it comes, and its objects go when it goes.
#[tokio::test(start_paused = true)]
async fn the_custom_resource_of_policies_comes_and_goes() {
    let policy = "ClusterNetworkPolicy p";
    assert_eq!(about_cluster_policies(&[404], &[404], 1).await, ["Synced"]);
    // It comes with the third look, and its first watch meets its end. One look that does not find it counts for nothing.
    let found = about_cluster_policies(&[404, 404, 200, 200, 404], &[404], 6).await;
    assert_eq!(found, ["Synced", "Restart", policy, "Synced", "Restart", "Synced"]);
    // A server that has the earlier version alone.
    assert_eq!(about_cluster_policies(&[404], &[200], 3).await, ["Restart", policy, "Synced"]);
    // One version that is refused may be there.
    assert_eq!(about_cluster_policies(&[403], &[404], 2).await, ["1 refused", "Synced"]);
    // A role of before does not name it: the other policies hold at least, and somebody hears of it.
    assert_eq!(about_cluster_policies(&[403], &[403], 2).await, ["1 refused", "Synced"]);
    let found = about_cluster_policies(&[403, 403, 403, 403, 200], &[403], 6).await;
    assert_eq!(found, ["1 refused", "Synced", "0 refused", "Restart", policy, "Synced"]);
}
