//! Keys, certificates and kubeconfigs of a cluster. They live as long as it does.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::layout::Cluster;
use super::settings::{CONTROL_PLANE, KUBERNETES, address};
use crate::cmd::Cmd;

/// Makes what is missing.
pub fn make(cluster: &Cluster) -> Result<()> {
    let dir = cluster.dir.join("pki");
    let done = dir.join("done");
    if !done.exists() {
        fs::create_dir_all(&dir)?;
        components(cluster, &dir)?;
        fs::write(done, "")?;
    }
    for node in cluster.nodes().iter().filter(|node| !dir.join(format!("{}.crt", node.name)).exists()) {
        let addresses = node.address().of(cluster.settings.ip_family);
        let mut names = vec![format!("DNS:{}", node.name)];
        names.extend(addresses.iter().map(|it| format!("IP:{it}")));
        certificate(&dir, &node.name, &format!("/O=system:nodes/CN=system:node:{}", node.name), &names)?;
    }
    Ok(())
}

/// The authority, and those of the control plane.
fn components(cluster: &Cluster, dir: &Path) -> Result<()> {
    // Without a configuration of ours, the system's would have its say.
    fs::write(dir.join("openssl.cnf"), "[req]\ndistinguished_name = dn\n[dn]\n")?;
    authority(dir)?;
    let control_plane = address(CONTROL_PLANE).of(cluster.settings.ip_family);
    let services = KUBERNETES.of(cluster.settings.ip_family);
    let mut names = vec!["IP:127.0.0.1".to_owned(), "DNS:localhost".to_owned()];
    names.extend(control_plane.iter().map(|it| format!("IP:{it}")));
    names.extend(services.iter().map(|it| format!("IP:{it}")));
    names
        .extend(["", ".default", ".default.svc", ".default.svc.cluster.local"].map(|it| format!("DNS:kubernetes{it}")));
    certificate(dir, "apiserver", "/CN=kube-apiserver", &names)?;
    for (name, subject) in [
        ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet"),
        ("front-proxy", "/CN=front-proxy"),
        ("admin", "/O=system:masters/CN=admin"),
        ("controller-manager", "/CN=system:kube-controller-manager"),
        ("scheduler", "/CN=system:kube-scheduler"),
        ("proxy", "/CN=system:kube-proxy"),
    ] {
        certificate(dir, name, subject, &[])?;
    }
    openssl(dir, &["genrsa", "-out", "accounts.key", "2048"])?;
    openssl(dir, &["rsa", "-in", "accounts.key", "-pubout", "-out", "accounts.pub"])
}

/// Writes the kubeconfigs. `outside` is where the API server is reached from this machine itself.
pub fn kubeconfigs(cluster: &Cluster, outside: &str) -> Result<()> {
    let server = cluster.settings.api_server();
    write(cluster, "admin", "admin", outside)?;
    write(cluster, "inside", "admin", &server)?;
    for of in ["controller-manager", "scheduler", "proxy"] {
        write(cluster, of, of, &server)?;
    }
    cluster.nodes().iter().try_for_each(|node| write(cluster, &node.name, &node.name, &server))
}

fn write(cluster: &Cluster, of: &str, user: &str, server: &str) -> Result<()> {
    let file = |name: &str| cluster.pki(name);
    let (ca, certificate, key) = (file("ca.crt"), file(&format!("{user}.crt")), file(&format!("{user}.key")));
    let name = &cluster.name;
    let text = format!(
        "apiVersion: v1\nkind: Config\n\
         clusters: [{{name: {name}, cluster: {{server: {server:?}, certificate-authority: {ca}}}}}]\n\
         users: [{{name: {user}, user: {{client-certificate: {certificate}, client-key: {key}}}}}]\n\
         contexts: [{{name: {name}, context: {{cluster: {name}, user: {user}}}}}]\n\
         current-context: {name}\n"
    );
    let path = cluster.kubeconfig(of);
    fs::write(&path, text).with_context(|| format!("writing {path}"))
}

fn authority(dir: &Path) -> Result<()> {
    let usage = "keyUsage=critical,keyCertSign,cRLSign,digitalSignature";
    let new =
        ["req", "-x509", "-config", "openssl.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let what =
        ["-days", "30", "-subj", "/CN=cluster", "-addext", "basicConstraints=critical,CA:TRUE", "-addext", usage];
    openssl(dir, &[&new[..], &what, &["-keyout", "ca.key", "-out", "ca.crt"]].concat())
}

fn certificate(dir: &Path, name: &str, subject: &str, names: &[String]) -> Result<()> {
    let (key, request, extensions, out) =
        (format!("{name}.key"), format!("{name}.csr"), format!("{name}.ext"), format!("{name}.crt"));
    let new = ["req", "-config", "openssl.cnf", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    openssl(dir, &[&new[..], &["-keyout", &key, "-out", &request, "-subj", subject]].concat())?;
    let mut text =
        "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=clientAuth,serverAuth\nkeyUsage=digitalSignature\n"
            .to_owned();
    if !names.is_empty() {
        text.extend(["subjectAltName=", &names.join(","), "\n"]);
    }
    fs::write(dir.join(&extensions), text)?;
    let sign = ["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30"];
    openssl(dir, &[&sign[..], &["-extfile", &extensions, "-out", &out]].concat())?;
    fs::remove_file(dir.join(request))?;
    fs::remove_file(dir.join(extensions))?;
    Ok(())
}

fn openssl(dir: &Path, args: &[&str]) -> Result<()> {
    Cmd::new("openssl").args(args).dir(dir).capture().map(drop)
}
