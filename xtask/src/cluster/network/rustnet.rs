//! rustnet as users install it: the image in every node, and `kubectl apply -k` of an overlay over `deploy/`, or `helm
//! install` of its chart.

use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::cluster::init::CGROUP;
use crate::cluster::layout::Cluster;
use crate::cluster::settings::{Both, Install, NODES, PODS, SERVICES};
use crate::cmd::Cmd;
use crate::dist::{self, Profile};
use crate::{ebpf, image, oci, paths};

/// The tag of the image that is made for clusters.
const TAG: &str = "cluster";

/// Builds the programs and the image, unless there is one.
pub fn prepare(cluster: &Cluster) -> Result<()> {
    if cluster.settings.image.is_some() {
        return Ok(());
    }
    ebpf::build(&ebpf::Args::default())?;
    dist::build(Profile::Release, &[])?;
    image::write(&image::file(TAG), &Profile::Release.dist(), image::NAME, TAG).map(drop)
}

/// The image's file.
pub fn image(cluster: &Cluster) -> PathBuf {
    cluster.settings.image.clone().unwrap_or_else(|| image::file(TAG))
}

/// Puts rustnet's objects into the cluster; a second time, it brings them up to date.
pub fn install(cluster: &Cluster) -> Result<()> {
    match cluster.settings.install {
        Install::Kustomize => apply(cluster, &image(cluster), &paths::root().join("deploy")),
        Install::Helm => helm(cluster, &tag(&image(cluster))?),
    }
}

/// Installs an image by an overlay over a `deploy/`, which may be another version's.
pub fn apply(cluster: &Cluster, image: &Path, deploy: &Path) -> Result<()> {
    let dir = cluster.dir.join("overlay");
    write_overlay(cluster, &dir, &tag(image)?, deploy)?;
    cluster.kubectl()?.arg("apply").arg("-k").arg(&dir).capture().map(drop)
}

/// As the chart's documentation tells: the namespace with its label, and the release in it.
fn helm(cluster: &Cluster, tag: &str) -> Result<()> {
    let values = cluster.dir.join("values.yaml");
    let config = config(cluster).replace('\n', "\n  ");
    fs::write(&values, format!("image: {{tag: {tag:?}}}\npaths: {{cgroup: {CGROUP}}}\nconfig:\n  {config}\n"))?;
    let namespace = paths::root().join("deploy/namespace.yaml");
    cluster.kubectl()?.args(["apply", "-f"]).arg(namespace).capture()?;
    Cmd::new(paths::tools().join("helm"))
        .args(["upgrade", "--install", "rustnet"])
        .arg(paths::root().join("deploy/helm/rustnet"))
        .args(["--namespace=rustnet-system", "--values"])
        .arg(values)
        .arg(format!("--kubeconfig={}", cluster.kubeconfig("admin")))
        .capture()
        .map(drop)
}

/// The overlay over `deploy/uninstall`.
pub fn uninstall(cluster: &Cluster) -> Result<PathBuf> {
    let dir = cluster.dir.join("overlay-uninstall");
    fs::create_dir_all(&dir)?;
    let kustomization = format!(
        "{HEADER}resources: [{}]\nimages: [{{name: rustnet, newTag: {:?}}}]\n",
        relative(&dir.canonicalize()?, &paths::root().join("deploy/uninstall").canonicalize()?).display(),
        tag(&image(cluster))?
    );
    fs::write(dir.join("kustomization.yaml"), kustomization)?;
    Ok(dir)
}

/// The tag of an image in a file.
fn tag(file: &Path) -> Result<String> {
    let names = oci::names(file)?;
    let tag = names.iter().find_map(|name| name.strip_prefix(image::NAME)?.strip_prefix(':'));
    tag.map(str::to_owned).context("the image is not called rustnet:TAG")
}

const HEADER: &str = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nnamespace: rustnet-system\n";

/// What a user of `deploy/` writes, too: the image's tag, and this cluster's addresses in the configuration.
fn write_overlay(cluster: &Cluster, dir: &Path, tag: &str, deploy: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let deploy = deploy.canonicalize().with_context(|| format!("{} is not there", deploy.display()))?;
    let base = relative(&dir.canonicalize()?, &deploy);
    let kustomization = format!(
        "{HEADER}resources: [{base}]\n\
         images: [{{name: rustnet, newTag: {tag:?}}}]\n\
         configMapGenerator: [{{name: rustnet-config, behavior: replace, files: [config.yaml]}}]\n\
         patches:\n\
         - target: {{kind: DaemonSet, name: rustnet-agent}}\n  \
           patch: |-\n    \
             # Nodes share this machine's control groups: each agent sees its own node's.\n    \
             - {{op: test, path: /spec/template/spec/volumes/2/name, value: cgroup}}\n    \
             - {{op: replace, path: /spec/template/spec/volumes/2/hostPath/path, value: {CGROUP}}}\n",
        base = base.display()
    );
    fs::write(dir.join("kustomization.yaml"), kustomization)?;
    fs::write(dir.join("config.yaml"), config(cluster)).context("writing the configuration of the agent")
}

/// The agent's configuration.
fn config(cluster: &Cluster) -> String {
    let settings = &cluster.settings;
    let list = |both: Both<&'static str>| both.of(settings.ip_family);
    format!(
        "apiServer: {}\nrouting: {}\nclusterPodCIDRs: {:?}\nserviceCIDRs: {:?}\nnodeCIDRs: {:?}\n",
        settings.api_server(),
        settings.routing.word(),
        list(PODS),
        list(SERVICES),
        list(NODES)
    )
}

/// The way from one directory to another; kustomize takes no absolute one.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let up = from.components().filter(|part| matches!(part, Component::Normal(_))).map(|_| "..");
    up.collect::<PathBuf>().join(to.strip_prefix("/").unwrap_or(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_way_leads_to_the_same_place() {
        assert_eq!(relative(Path::new("/a/b"), Path::new("/c/d")), Path::new("../../c/d"));
    }
}
