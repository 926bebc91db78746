//! Tells the cluster that this node has a network: the condition NetworkUnavailable becomes false, and the taint that kept
//! pods away goes.
//!
//! The watch of Nodes shows this node's object as it passes; when that still says otherwise and the agent is ready, the
//! object is patched. Failures are logged and tried again; the network does not depend on it.

use super::backoff::Backoff;
use super::chain;
use crate::health::Health;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// The taint that an administrator may give new nodes, so that pods wait for the agent.
pub const TAINT: &str = "rustnet.io/agent-not-ready";
/// The condition that cloud providers set until there is a network.
pub const CONDITION: &str = "NetworkUnavailable";
const MANAGER: &str = "rustnet-agent";

/// Watches over what the cluster thinks of this node's network.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    node_name: Arc<str>,
    stale: Arc<Notify>,
}

impl NodeStatus {
    /// For the node of this name.
    pub fn new(node_name: &str) -> Self {
        Self { node_name: node_name.into(), stale: Arc::default() }
    }

    /// The node's name.
    pub(crate) fn node_name(&self) -> &str {
        &self.node_name
    }

    /// A node's object has passed.
    pub(crate) fn saw(&self, node: &Node) {
        if node.metadata.name.as_deref() == Some(&*self.node_name) && (bad_condition(node) || tainted(node)) {
            self.stale.notify_one();
        }
    }

    /// Patches the object whenever it needs it and the agent is ready, until shutdown.
    pub async fn run(self, client: Client, health: Arc<Health>, mut shutdown: watch::Receiver<bool>) {
        let work = async {
            loop {
                self.stale.notified().await;
                health.wait_ready().await;
                let mut backoff = Backoff::default();
                while let Err(error) = self.repair(&client).await {
                    tracing::warn!(
                        node = &*self.node_name,
                        error = chain(&error),
                        "cannot patch this node's object, trying on"
                    );
                    tokio::time::sleep(backoff.next()).await;
                }
            }
        };
        tokio::select! {
            () = work => {}
            _ = shutdown.wait_for(|stop| *stop) => {}
        }
    }

    async fn repair(&self, client: &Client) -> Result<(), kube::Error> {
        let nodes: Api<Node> = Api::all(client.clone());
        let node = nodes.get(&self.node_name).await?;
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        if tainted(&node) {
            let patch = Patch::Merge(without_taint(&node));
            nodes.patch(&self.node_name, &params, &patch).await?;
            tracing::info!(node = &*self.node_name, "taint {TAINT} removed");
        }
        if bad_condition(&node) {
            // Conditions are merged by their type: the others stay.
            let patch = Patch::Strategic(json!({ "status": { "conditions": [good_condition()] } }));
            nodes.patch_status(&self.node_name, &params, &patch).await?;
            tracing::info!(node = &*self.node_name, "condition {CONDITION} is false now");
        }
        Ok(())
    }
}

fn bad_condition(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == CONDITION && condition.status != "False")
}

fn good_condition() -> NodeCondition {
    let now = Some(Time(Timestamp::now()));
    NodeCondition {
        type_: CONDITION.to_owned(),
        status: "False".to_owned(),
        reason: Some("RustnetIsUp".to_owned()),
        message: Some("rustnet connects this node's pods".to_owned()),
        last_heartbeat_time: now.clone(),
        last_transition_time: now,
    }
}

fn taints(node: &Node) -> impl Iterator<Item = &Taint> {
    node.spec.iter().flat_map(|spec| spec.taints.iter().flatten())
}

fn tainted(node: &Node) -> bool {
    taints(node).any(|taint| taint.key == TAINT)
}

/// Taints are one list without a merge key: with the version, the patch fails when somebody else has changed it.
fn without_taint(node: &Node) -> Value {
    let others: Vec<&Taint> = taints(node).filter(|taint| taint.key != TAINT).collect();
    json!({ "metadata": { "resourceVersion": node.metadata.resource_version }, "spec": { "taints": others } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).expect("a node")
    }

    #[test]
    fn only_a_condition_that_says_unavailable_is_repaired() {
        for (conditions, want) in [
            (json!([]), false),
            (json!([{"type": "Ready", "status": "False"}]), false),
            (json!([{"type": CONDITION, "status": "False"}]), false),
            (json!([{"type": CONDITION, "status": "True"}]), true),
            (json!([{"type": CONDITION, "status": "Unknown"}]), true),
        ] {
            assert_eq!(bad_condition(&node(json!({"status": {"conditions": conditions}}))), want, "{conditions}");
        }
        assert!(!bad_condition(&Node::default()));
    }

    #[test]
    fn other_taints_stay() {
        let other = json!({"key": "dedicated", "value": "db", "effect": "NoSchedule"});
        let node = node(json!({
            "metadata": {"name": "n1", "resourceVersion": "7"},
            "spec": {"taints": [{"key": TAINT, "effect": "NoExecute"}, other, {"key": TAINT, "effect": "NoSchedule"}]},
        }));
        assert!(tainted(&node));
        assert_eq!(without_taint(&node), json!({"metadata": {"resourceVersion": "7"}, "spec": {"taints": [other]}}));
    }

    #[tokio::test]
    async fn only_this_nodes_object_counts() {
        let status = NodeStatus::new("n1");
        let spec = json!({"taints": [{"key": TAINT, "effect": "NoSchedule"}]});
        status.saw(&node(json!({"metadata": {"name": "n2"}, "spec": spec})));
        status.saw(&node(json!({"metadata": {"name": "n1"}})));
        let mut stale = std::pin::pin!(status.stale.notified());
        assert!(futures::poll!(stale.as_mut()).is_pending());
        status.saw(&node(json!({"metadata": {"name": "n1"}, "spec": spec})));
        assert!(futures::poll!(stale).is_ready());
    }
}
