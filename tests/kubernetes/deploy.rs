//! The manifests under `deploy/`: well-formed, accepted by a real API server, and of few privileges.

use super::cluster::{Cluster, documents, with_server};
use super::server::kubernetes;
use anyhow::{Context as _, Result, ensure};
use rustnet_agent::args::settings;
use rustnet_agent::config::{Config, DenyResponse, Source};
use rustnet_agent::doctor::api::RIGHTS;
use rustnet_agent::reconcile::EXPORT_LIMIT;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the manifests are.
pub fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(file: &str) -> Result<String> {
    let path = dir().join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// All objects that the kustomization lists.
fn objects() -> Result<Vec<Value>> {
    let kustomization = documents(&read("kustomization.yaml")?)?.pop().context("an empty kustomization")?;
    let files = kustomization["resources"].as_array().context("resources")?;
    let mut objects = Vec::new();
    for file in files {
        objects.extend(documents(&read(file.as_str().context("a name")?)?)?);
    }
    Ok(objects)
}

fn daemon_set() -> Result<Value> {
    objects()?.into_iter().find(|it| it["kind"] == "DaemonSet").context("no DaemonSet")
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

#[test]
fn the_agent_is_not_privileged_and_each_capability_has_its_reason() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    let agent = &pod["containers"][0];
    let context = &agent["securityContext"];
    assert_eq!(context["privileged"], false);
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
    let capabilities = strings(&context["capabilities"]["add"]);
    assert_eq!(capabilities, ["NET_ADMIN", "BPF", "PERFMON"]);
    let text = read("daemonset.yaml")?;
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    for capability in capabilities {
        let at = lines.iter().position(|line| *line == format!("- {capability}")).context("a line of its own")?;
        assert!(lines[at - 1].starts_with('#'), "{capability} has no reason above it");
    }
    Ok(())
}

/// The default profile of containerd and CRI-O denies writes below /sys, so that no map can be pinned; `container_t` of SELinux
/// does the same.
#[test]
fn whoever_touches_pins_is_confined_by_no_profile() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    let uninstall = documents(&read("uninstall/daemonset.yaml")?)?.pop().context("a DaemonSet")?;
    let cleanup = &uninstall["spec"]["template"]["spec"];
    for container in [&pod["initContainers"][1], &pod["containers"][0], &cleanup["initContainers"][0]] {
        let context = &container["securityContext"];
        assert_eq!(context["appArmorProfile"], json!({"type": "Unconfined"}), "{}", container["name"]);
        assert_eq!(context["seLinuxOptions"]["type"], "spc_t", "{}", container["name"]);
    }
    // The runtime confines no privileged container; the one that only waits stays confined.
    let privileged = json!({"privileged": true, "readOnlyRootFilesystem": true});
    assert_eq!(pod["initContainers"][0]["securityContext"], privileged);
    assert_eq!(cleanup["containers"][0]["securityContext"]["appArmorProfile"], Value::Null);
    Ok(())
}

#[test]
fn the_preflight_looks_with_the_agents_settings_rights_and_mounts() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    let (mount, preflight, agent) = (&pod["initContainers"][0], &pod["initContainers"][1], &pod["containers"][0]);
    assert_eq!((&mount["name"], &preflight["name"]), (&json!("mount-bpffs"), &json!("preflight")));
    assert_eq!(preflight["command"], json!(["/opt/rustnet/rustnetctl", "doctor", "--pre", "--warn-only"]));
    for same in ["args", "env", "image", "securityContext", "volumeMounts"] {
        assert_eq!(preflight[same], agent[same], "{same}");
    }
    Ok(())
}

/// The kubelet kills what has not ended by then, and an export for an agent of v1 would be cut off.
#[test]
fn the_agent_has_time_to_end() -> Result<()> {
    let grace =
        daemon_set()?["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].as_u64().context("a number")?;
    assert!(grace > EXPORT_LIMIT.as_secs(), "{grace} s");
    Ok(())
}

#[test]
fn the_pod_can_start_before_there_is_a_network() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["hostNetwork"], true);
    assert_eq!(pod["dnsPolicy"], "Default");
    assert_eq!(pod["priorityClassName"], "system-node-critical");
    assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(set["spec"]["updateStrategy"]["type"], "RollingUpdate");
    let agent = &pod["containers"][0];
    for (probe, path) in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        assert_eq!(agent[probe]["httpGet"], json!({"host": "127.0.0.1", "port": 9879, "path": path}));
    }
    let propagation = |container: &Value| {
        let mounts = container["volumeMounts"].as_array().into_iter().flatten();
        mounts.into_iter().find(|it| it["mountPath"] == "/sys/fs/bpf").map(|it| it["mountPropagation"].clone())
    };
    assert_eq!(propagation(&pod["initContainers"][0]), Some(json!("Bidirectional")));
    assert_eq!(propagation(agent), Some(json!("HostToContainer")));
    Ok(())
}

#[test]
fn every_mount_has_its_volume_and_every_path_its_mount() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    let volumes: Vec<_> = pod["volumes"].as_array().into_iter().flatten().map(|it| &it["name"]).collect();
    let agent = &pod["containers"][0];
    for container in [&pod["initContainers"][0], agent] {
        for mount in container["volumeMounts"].as_array().context("mounts")? {
            assert!(volumes.contains(&&mount["name"]), "{mount}");
        }
    }
    let mounts: Vec<_> =
        agent["volumeMounts"].as_array().context("mounts")?.iter().map(|it| &it["mountPath"]).collect();
    let mounts: Vec<_> = mounts.iter().filter_map(|it| it.as_str()).collect();
    for argument in strings(&agent["args"]) {
        let path = argument.split('=').nth(1).context("a value")?;
        assert!(
            mounts.iter().any(|mount| Path::new(path).starts_with(mount)),
            "{argument} is outside the mounts {mounts:?}"
        );
    }
    Ok(())
}

#[test]
fn the_agent_takes_its_arguments_and_its_file() -> Result<()> {
    let set = daemon_set()?;
    let pod = &set["spec"]["template"]["spec"];
    let file = dir().join("config.yaml").display().to_string();
    let env = |name: &str| -> Option<OsString> {
        match name {
            "RUSTNET_NODE_NAME" => Some("n1".into()),
            "KUBERNETES_SERVICE_HOST" => Some("10.96.0.1".into()),
            _ => None,
        }
    };
    for container in [&pod["initContainers"][0], &pod["containers"][0]] {
        assert_eq!(container["env"][0]["name"], "RUSTNET_NODE_NAME");
        let words = strings(&container["command"]).into_iter().chain(strings(&container["args"]));
        let arguments = words.map(|word| word.replace("/etc/rustnet/config.yaml", &file));
        let config = Config::load(arguments, &env)?;
        assert!(matches!(config.source, Source::Kube(_)));
    }
    // The lines that are commented out must be right, too.
    let text = read("config.yaml")?;
    let uncommented = |line| str::strip_prefix(line, "#").filter(|it| !it.starts_with(' ')).unwrap_or(line);
    let all: Vec<&str> = text.lines().map(uncommented).collect();
    let whole = tempfile::NamedTempFile::new()?;
    std::fs::write(whole.path(), all.join("\n"))?;
    let config = Config::load(["rustnet-agent".to_owned(), format!("--config={}", whole.path().display())], &env)?;
    assert!(!config.service_cidrs.is_empty() && !config.cluster_pod_cidrs.is_empty() && !config.node_cidrs.is_empty());
    assert_eq!(config.policy_deny_response, DenyResponse::Icmp);
    Ok(())
}

#[test]
fn the_agents_rights_are_the_documented_ones() -> Result<()> {
    let role = objects()?.into_iter().find(|it| it["kind"] == "ClusterRole").context("no ClusterRole")?;
    let mut rights = Vec::new();
    for rule in role["rules"].as_array().context("rules")? {
        for group in strings(&rule["apiGroups"]) {
            for resource in strings(&rule["resources"]) {
                rights.push(format!("{group}/{resource}: {}", strings(&rule["verbs"]).join(" ")));
            }
        }
    }
    rights.sort();
    let want = [
        "/namespaces: list watch",
        "/nodes/status: patch",
        "/nodes: get patch",
        "/nodes: list watch",
        "/pods: list watch",
        "/services: list watch",
        "discovery.k8s.io/endpointslices: list watch",
        "events.k8s.io/events: create patch",
        "networking.k8s.io/networkpolicies: list watch",
        "networking.k8s.io/servicecidrs: list watch",
        "policy.networking.k8s.io/clusternetworkpolicies: list watch",
    ];
    assert_eq!(rights, want);
    let documented = std::fs::read_to_string(dir().join("../docs/security.md"))?;
    for right in &rights {
        let (resource, verbs) = right.trim_start_matches('/').split_once(": ").context("verbs")?;
        let row = format!("| `{resource}`: {} |", verbs.replace(' ', ", "));
        assert!(documented.contains(&row), "docs/security.md has no row that begins with {row}");
    }
    for (group, resource, subresource, verbs) in RIGHTS {
        let slash = if subresource.is_empty() { "" } else { "/" };
        for verb in verbs {
            let granted = |right: &&String| {
                let of = right.strip_prefix(&format!("{group}/{resource}{slash}{subresource}: "));
                of.is_some_and(|verbs| verbs.split(' ').any(|it| it == *verb))
            };
            assert!(
                rights.iter().any(|right| granted(&right)),
                "the doctor asks for {verb} {resource}{slash}{subresource}"
            );
        }
    }
    Ok(())
}

/// Elsewhere the account may write, and nothing ties it to its node.
#[test]
fn the_policy_is_about_the_account_that_the_agent_has() -> Result<()> {
    let objects = objects()?;
    let of = |kind: &str| objects.iter().find(|it| it["kind"] == kind).context("missing");
    let (policy, binding) = (of("ValidatingAdmissionPolicy")?, of("ValidatingAdmissionPolicyBinding")?);
    let set = daemon_set()?;
    let account = set["spec"]["template"]["spec"]["serviceAccountName"].as_str().context("an account")?;
    assert_eq!(of("ServiceAccount")?["metadata"]["name"], account);
    let condition = policy["spec"]["matchConditions"][0]["expression"].as_str().context("a condition")?;
    assert!(condition.contains(&format!("request.userInfo.username.endsWith(':{account}')")), "{condition}");
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");
    assert_eq!(binding["spec"], json!({"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}));
    Ok(())
}

/// For clusters whose tokens name no Node: the chart's value, and the patch that docs/security.md shows.
#[test]
fn the_policy_can_be_left_out() -> Result<()> {
    let kinds = |text: &str| -> Result<Vec<String>> { Ok(comparable(text)?.into_keys().collect()) };
    let chart = |options: &[&str]| -> Result<String> {
        let output = helm(options)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let docs = std::fs::read_to_string(dir().join("../docs/security.md"))?;
    let lines = docs.lines().map(|line| line.strip_prefix("    ").unwrap_or_default());
    let patch: Vec<_> = lines.skip_while(|line| *line != "patches:").take_while(|line| !line.is_empty()).collect();
    let mut want = kinds(&overlay("")?)?;
    want.retain(|kind| !kind.starts_with("ValidatingAdmissionPolicy"));
    assert_eq!(kinds(&chart(&["--set", "admissionPolicy=false"])?)?, want);
    assert_eq!(kinds(&overlay(&patch.join("\n"))?)?, want);
    Ok(())
}

#[test]
fn a_real_api_server_accepts_every_object() -> Result<()> {
    with_server(&[], async |server| {
        let cluster = Cluster::new(&server)?;
        cluster.apply(&read("namespace.yaml")?).await?;
        for object in objects()?.into_iter().chain(documents(&read("uninstall/daemonset.yaml")?)?) {
            cluster.check(&object).await?;
        }
        Ok(())
    })
}

/// The real renderer where there is one; the other tests read the same files without it.
#[test]
fn kustomize_renders_everything() -> Result<()> {
    let kubectl = kubernetes("kubectl").unwrap_or_else(|_| "kubectl".into());
    let output = match Command::new(&kubectl).arg("kustomize").arg(dir()).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("no kubectl here: not rendered");
            return Ok(());
        }
        Err(error) => return Err(error).with_context(|| kubectl.display().to_string()),
    };
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rendered = documents(&String::from_utf8(output.stdout)?)?;
    let kinds: Vec<_> = rendered.iter().filter_map(|it| it["kind"].as_str()).collect();
    let mut sorted = kinds.clone();
    sorted.sort_unstable();
    let want = [
        "ClusterRole",
        "ClusterRoleBinding",
        "ConfigMap",
        "DaemonSet",
        "Namespace",
        "ServiceAccount",
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    ];
    assert_eq!(sorted, want);
    let of = |kind: &str| rendered.iter().find(|it| it["kind"] == kind).context("missing");
    let map = of("ConfigMap")?;
    let name = map["metadata"]["name"].as_str().context("a name")?;
    assert!(name.starts_with("rustnet-config-"), "a changed configuration gets another name: {name}");
    assert_eq!(map["data"]["config.yaml"], read("config.yaml")?);
    let pod = &of("DaemonSet")?["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().context("volumes")?;
    assert!(volumes.iter().any(|it| it["configMap"]["name"] == name), "{volumes:?}");
    for container in [&pod["initContainers"][0], &pod["containers"][0]] {
        assert_eq!(container["image"], "rustnet:0.1.0");
    }
    assert_eq!(of("ClusterRoleBinding")?["subjects"][0]["namespace"], "rustnet-system");
    Ok(())
}

#[test]
fn the_cleanup_is_not_privileged_either_and_reaches_what_the_agent_installed() -> Result<()> {
    let cleanup = documents(&read("uninstall/daemonset.yaml")?)?.pop().context("a DaemonSet")?;
    let pod = &cleanup["spec"]["template"]["spec"];
    let container = &pod["initContainers"][0];
    assert_eq!(container["securityContext"]["privileged"], Value::Null);
    assert_eq!(container["securityContext"]["capabilities"], json!({"drop": ["ALL"], "add": ["NET_ADMIN", "BPF"]}));
    assert_eq!(pod["hostNetwork"], true);
    // It has nothing of the host's but rustnet's places, and the container that only waits has less.
    let paths: Vec<_> =
        pod["volumes"].as_array().context("volumes")?.iter().map(|it| &it["hostPath"]["path"]).collect();
    assert_eq!(paths, ["/sys/fs/bpf", "/run/rustnet", "/opt/cni/bin", "/etc/cni/net.d"]);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(container["securityContext"]["seccompProfile"]["type"], "Unconfined");
    let agent = daemon_set()?;
    for argument in strings(&agent["spec"]["template"]["spec"]["containers"][0]["args"]) {
        if ["--run-dir=", "--cni-bin-dir=", "--cni-conf-dir="].iter().any(|flag| argument.starts_with(flag)) {
            let words: Vec<_> = strings(&container["command"]).into_iter().chain(strings(&container["args"])).collect();
            assert!(words.contains(&argument), "{argument} is unknown to the cleanup: {words:?}");
        }
    }
    Ok(())
}

/// What Helm makes of the chart.
fn helm(options: &[&str]) -> Result<std::process::Output> {
    let chart = dir().join("helm/rustnet");
    let mut helm = Command::new("helm");
    helm.args(["template", "rustnet"]).arg(chart).args(["--namespace", "rustnet-system"]).args(options);
    // Built from its module, it knows of no Kubernetes version.
    helm.args(["--kube-version", "1.34.0"]);
    helm.output().context("helm: run `cargo xtask setup --with kubernetes`, which builds it")
}

/// Objects by kind, without what must differ: the configuration's name, and how a change of it is noticed.
fn comparable(text: &str) -> Result<BTreeMap<String, Value>> {
    let mut objects = BTreeMap::new();
    for mut object in documents(text)? {
        let kind = object["kind"].as_str().context("a kind")?.to_owned();
        match kind.as_str() {
            // Helm makes it itself, or its user does.
            "Namespace" => continue,
            // Kustomize gives it to kinds that it does not know; the API server takes it off again.
            "ValidatingAdmissionPolicy" | "ValidatingAdmissionPolicyBinding" => {
                object["metadata"].as_object_mut().context("metadata")?.remove("namespace");
            }
            "ConfigMap" => {
                object["metadata"]["name"] = json!("config");
                let text = object["data"]["config.yaml"].as_str().context("the file")?.to_owned();
                object["data"]["config.yaml"] = json!(documents(&text)?);
            }
            "DaemonSet" => {
                let template = &mut object["spec"]["template"];
                template["metadata"].as_object_mut().context("metadata")?.remove("annotations");
                let volumes = template["spec"]["volumes"].as_array_mut().context("volumes")?;
                let config = volumes.iter_mut().find(|it| it["name"] == "config").context("the configuration")?;
                config["configMap"]["name"] = json!("config");
            }
            _ => {}
        }
        ensure!(objects.insert(kind.clone(), object).is_none(), "{kind} twice");
    }
    Ok(objects)
}

#[test]
fn the_chart_gives_what_kustomize_gives() -> Result<()> {
    let rendered = helm(&[])?;
    ensure!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
    let kustomized = Command::new(kubernetes("kubectl")?).arg("kustomize").arg(dir()).output()?;
    let (chart, base) =
        (comparable(&String::from_utf8(rendered.stdout)?)?, comparable(&String::from_utf8(kustomized.stdout)?)?);
    assert_eq!(chart.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    for (kind, object) in &chart {
        assert_eq!(object, &base[kind], "{kind}");
    }
    Ok(())
}

/// The chart's value and the overlay's file are the agent's setting, and neither says anything of it by default.
#[test]
fn what_policies_deny_is_a_setting_of_both() -> Result<()> {
    let configuration = |text: &str| -> Result<Value> {
        Ok(comparable(text)?["ConfigMap"]["data"]["config.yaml"][0]["policyDenyResponse"].clone())
    };
    let chart = |options: &[&str]| -> Result<Value> {
        let output = helm(options)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        configuration(&String::from_utf8(output.stdout)?)
    };
    assert_eq!((chart(&[])?, configuration(&overlay("")?)?), (Value::Null, Value::Null));
    for response in DenyResponse::ALL.map(DenyResponse::word) {
        assert_eq!(chart(&["--set", &format!("config.policyDenyResponse={response}")])?, response);
        let file = format!(
            "configMapGenerator:\n  - name: rustnet-config\n    behavior: replace\n    literals:\n      - \"config.yaml=policyDenyResponse: {response}\"\n"
        );
        assert_eq!(configuration(&overlay(&file)?)?, response);
    }
    let output = helm(&["--set", "config.policyDenyResponse=reset"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("policyDenyResponse"), "{said}");
    Ok(())
}

/// For a canary: no agent is replaced before its pod is deleted.
#[test]
fn the_chart_leaves_the_pace_of_an_upgrade_to_its_user() -> Result<()> {
    let rendered = helm(&["--set", "updateStrategy.type=OnDelete"])?;
    ensure!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
    let chart = comparable(&String::from_utf8(rendered.stdout)?)?;
    assert_eq!(chart["DaemonSet"]["spec"]["updateStrategy"], json!({"type": "OnDelete"}));
    let output = helm(&["--set", "updateStrategy.type=Recreate"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("updateStrategy"), "{said}");
    Ok(())
}

/// The base with the component that lets the agent enter pods' network namespaces.
fn with_pod_sockets() -> Result<String> {
    overlay("components: [../../deploy/pod-sockets]\n")
}

/// What Kustomize makes of an overlay over the base.
fn overlay(more: &str) -> Result<String> {
    let target = dir().join("../target");
    std::fs::create_dir_all(&target)?;
    let overlay = tempfile::tempdir_in(target)?;
    std::fs::write(overlay.path().join("kustomization.yaml"), format!("resources: [../../deploy]\n{more}"))?;
    let output = Command::new(kubernetes("kubectl")?).arg("kustomize").arg(overlay.path()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The preflight has what the agent has, and nothing else changes.
#[test]
fn pod_sockets_take_one_right_and_one_directory() -> Result<()> {
    let objects = documents(&with_pod_sockets()?)?;
    let set = objects.into_iter().find(|it| it["kind"] == "DaemonSet").context("no DaemonSet")?;
    let mut pod = set["spec"]["template"]["spec"].clone();
    let base = daemon_set()?;
    for container in ["/initContainers/1", "/containers/0"] {
        let container = pod.pointer_mut(container).context("a container")?;
        let added = &mut container["securityContext"]["capabilities"]["add"];
        assert_eq!(added.as_array_mut().and_then(Vec::pop), Some(json!("SYS_ADMIN")));
        for path in ["/var/run/netns", "/run/netns"] {
            let mount = json!({"name": "netns", "mountPath": path, "mountPropagation": "HostToContainer"});
            assert_eq!(container["volumeMounts"].as_array_mut().and_then(Vec::pop), Some(mount));
        }
        let name = container["name"].clone();
        let pod = &base["spec"]["template"]["spec"];
        let before = [&pod["initContainers"][1], &pod["containers"][0]];
        let before = before.into_iter().find(|it| it["name"] == name).context("the same container")?;
        for same in ["args", "env", "securityContext", "volumeMounts"] {
            assert_eq!(container[same], before[same], "{name} {same}");
        }
    }
    let volume = json!({"name": "netns", "hostPath": {"path": "/run/netns", "type": "DirectoryOrCreate"}});
    assert_eq!(pod["volumes"].as_array_mut().and_then(Vec::pop), Some(volume));
    Ok(())
}

#[test]
fn the_chart_gives_the_same_rights_for_pod_sockets() -> Result<()> {
    let component = comparable(&with_pod_sockets()?)?;
    for set in ["config.socketLb=all", "podSockets=true"] {
        let rendered = helm(&["--set", set])?;
        ensure!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
        let chart = comparable(&String::from_utf8(rendered.stdout)?)?;
        assert_eq!(chart["DaemonSet"], component["DaemonSet"], "{set}");
    }
    Ok(())
}

#[test]
fn the_chart_takes_the_agents_settings_and_no_others() -> Result<()> {
    let schema: Value = serde_json::from_str(&read("helm/rustnet/values.schema.json")?)?;
    let known = schema["properties"]["config"]["properties"].as_object().context("properties")?;
    // The DaemonSet sets these, or they make no sense in it.
    let fixed = [
        "manifests",
        "kubeconfig",
        "nodeName",
        "bpffs",
        "runDir",
        "cgroup",
        "sysctlDir",
        "cniBinDir",
        "cniConfDir",
        "podCIDRs",
        "healthAddr",
    ];
    let mut keys: Vec<&str> = settings::all().map(|it| it.key).filter(|key| !fixed.contains(key)).collect();
    keys.sort_unstable();
    let mut in_schema: Vec<&str> = known.keys().map(String::as_str).collect();
    in_schema.sort_unstable();
    assert_eq!(in_schema, keys);
    for (set, named) in [
        ("config.routing=geneve", "routing"),
        ("config.rooting=vxlan", "rooting"),
        ("config.serviceCIDRs={nonsense}", "serviceCIDRs"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=sha256:1234", "digest"),
        ("admissionPolicy=maybe", "admissionPolicy"),
        ("nonsense=1", "nonsense"),
    ] {
        let output = helm(&["--set", set])?;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(named), "--set {set}: {said}");
    }
    let good = ["--set", "config.apiServer=https://192.0.2.1:6443,config.routing=native,config.mtu=1400,image.tag=x"];
    let output = helm(&good)?;
    let text = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && text.contains("image: rustnet:x") && text.contains("mtu: 1400"), "{text}");
    Ok(())
}

/// All containers run one content, whatever becomes of the tag.
#[test]
fn the_chart_takes_an_image_by_digest() -> Result<()> {
    let digest = format!("sha256:{}", "0a".repeat(32));
    let set = format!("image.repository=registry.example.org/rustnet,image.tag=0.1.0,image.digest={digest}");
    let output = helm(&["--set", &set])?;
    let text = String::from_utf8(output.stdout)?;
    let images: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
    let wanted = format!("registry.example.org/rustnet@{digest}");
    assert_eq!(images, [wanted.as_str(); 3], "{text}");
    Ok(())
}
