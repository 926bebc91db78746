// Command oracle writes how cyclonus reads NetworkPolicies. Each line of its input is a world, and each line of its output
// holds the verdicts of that world's traffic, in order.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	v1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// world is one line of input. Each policy has its types, as the API server writes them into every object.
type world struct {
	Policies []*networkingv1.NetworkPolicy
	Traffic  []traffic
}

// traffic is one new flow. A peer without internal is no pod. A port of the destination may have several names, or none.
type traffic struct {
	Source, Destination *matcher.TrafficPeer
	Port                int
	Names               []string
	Protocol            v1.Protocol
}

// verdict says for each end whether the policies that select it allow the flow.
type verdict struct {
	Egress  bool `json:"egress"`
	Ingress bool `json:"ingress"`
}

func main() {
	in, out := json.NewDecoder(bufio.NewReader(os.Stdin)), json.NewEncoder(os.Stdout)
	for {
		var it world
		if err := in.Decode(&it); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			log.Fatalf("reading a world: %v", err)
		}
		if err := out.Encode(it.verdicts()); err != nil {
			log.Fatalf("writing verdicts: %v", err)
		}
	}
}

func (it *world) verdicts() []verdict {
	// Not simplified: each rule counts as it is written.
	policy := matcher.BuildNetworkPolicies(false, it.Policies)
	verdicts := make([]verdict, 0, len(it.Traffic))
	for _, flow := range it.Traffic {
		var found verdict
		// cyclonus knows one name per port: of several, each is asked for, and any may allow the flow.
		for _, name := range append([]string{""}, flow.Names...) {
			result := policy.IsTrafficAllowed(&matcher.Traffic{
				Source: flow.Source, Destination: flow.Destination,
				ResolvedPort: flow.Port, ResolvedPortName: name, Protocol: flow.Protocol,
			})
			found.Egress = found.Egress || result.Egress.IsAllowed()
			found.Ingress = found.Ingress || result.Ingress.IsAllowed()
		}
		verdicts = append(verdicts, found)
	}
	return verdicts
}
