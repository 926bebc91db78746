// Pins the conformance tests of the network policy API. `cargo xtask policy-conformance` builds their program with
//
//	go test -c -mod=mod -o FILE sigs.k8s.io/network-policy-api/conformance
//
// It takes the manifest of ClusterNetworkPolicy, which it installs, from the same module.
module rustnet.io/tests/kubernetes/policy

go 1.26.6

require sigs.k8s.io/network-policy-api v0.3.0
