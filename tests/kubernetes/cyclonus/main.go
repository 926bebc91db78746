// Command cyclonus runs the test cases of cyclonus against a cluster. Each creates policies, waits, and asks from all pods to all
// pods. It prints what Go prints of tests (go doc test2json), one line an event; cyclonus' own words go to standard error.
//
// cyclonus' own command prints tables for people and a summary at the end.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/mattfenwick/cyclonus/pkg/connectivity"
	"github.com/mattfenwick/cyclonus/pkg/connectivity/probe"
	"github.com/mattfenwick/cyclonus/pkg/generator"
	"github.com/mattfenwick/cyclonus/pkg/kube"
	v1 "k8s.io/api/core/v1"
)

// ignoreLoopback leaves out what a pod asks itself. Kubernetes' documentation says that a pod cannot block access to itself;
// cyclonus expects it to be blocked.
const ignoreLoopback = true

// patience is how long the end of a namespace may take, and an answer of a shell on a busy machine.
const patience = 2 * time.Minute

// shown is how many wrong answers of a case its reason names.
const shown = 3

type event struct {
	Action  string
	Test    string
	Elapsed float64 `json:",omitempty"`
	Output  string  `json:",omitempty"`
}

func main() {
	namespaces, pods, ports := []string{"x", "y", "z"}, []string{"a", "b", "c"}, []int{80, 81}
	protocols := []v1.Protocol{v1.ProtocolTCP, v1.ProtocolUDP, v1.ProtocolSCTP}
	wait := flag.Int("wait", 1, "seconds from a change to the first question")
	retries := flag.Int("retries", 0, "how often a probe with wrong answers is repeated")
	timeout := flag.Int("timeout", 3, "seconds until a question has no answer")
	parallel := flag.Int("parallel", 10, "how many questions a pod asks at a time")
	start := flag.Int("start", 300, "seconds until all pods run")
	run := flag.String("run", "", "a regular expression: only cases whose name it matches")
	list := flag.Bool("list", false, "only list the cases")
	flag.Parse()
	pattern, err := regexp.Compile(*run)
	try(err)
	events := json.NewEncoder(os.Stdout)
	os.Stdout = os.Stderr

	var kubernetes kube.IKubernetes = kube.NewMockKubernetes(1)
	if !*list {
		client, err := kube.NewKubernetesForContext("")
		try(err)
		kubernetes = &asker{Kubernetes: client, parallel: *parallel, timeout: *timeout, shells: map[string]*shell{}}
	}
	resources, err := probe.NewDefaultResources(
		kubernetes, namespaces, pods, ports, protocols, nil, *start, false, "registry.k8s.io")
	try(err)
	target, err := resources.GetPod("z", "c")
	try(err)
	interpreter := connectivity.NewInterpreter(kubernetes, resources, &connectivity.InterpreterConfig{
		ResetClusterBeforeTestCase:       true,
		VerifyClusterStateBeforeTestCase: true,
		KubeProbeRetries:                 *retries,
		IgnoreLoopback:                   ignoreLoopback,
		PerturbationWaitSeconds:          *wait,
		// By pods, as with cyclonus' worker. Its image is not used: see asker.
		BatchJobs: true,
	})
	printer := &connectivity.Printer{IgnoreLoopback: ignoreLoopback}
	// No tag is left out: cyclonus' own command leaves out some by default, such as ranges of ports.
	cases := generator.NewTestCaseGenerator(true, target.IP, namespaces, nil, nil).GenerateTestCases()
	for i, testCase := range cases {
		// Descriptions are not unique.
		name := fmt.Sprintf("%03d %s", i+1, strings.ReplaceAll(testCase.Description, "/", " or "))
		if !pattern.MatchString(name) {
			continue
		}
		if *list {
			try(events.Encode(event{Action: "skip", Test: name}))
			continue
		}
		try(events.Encode(event{Action: "run", Test: name}))
		begin := time.Now()
		result := interpreter.ExecuteTestCase(testCase)
		printer.PrintTestCaseResult(result)
		end := event{Action: "pass", Test: name, Elapsed: time.Since(begin).Seconds()}
		if reason := problem(result); reason != "" {
			try(events.Encode(event{Action: "output", Test: name, Output: reason + "\n"}))
			end.Action = "fail"
		}
		try(events.Encode(end))
	}
	if *list {
		return
	}
	remove(kubernetes, namespaces)
}

// remove waits until the namespaces are gone: the next run makes its pods in them.
func remove(kubernetes kube.IKubernetes, namespaces []string) {
	for _, namespace := range namespaces {
		if err := kubernetes.DeleteNamespace(namespace); err != nil {
			log.Print(err)
		}
	}
	for _, namespace := range namespaces {
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Second) {
			if _, err := kubernetes.GetNamespace(namespace); err != nil {
				break
			}
		}
	}
}

// problem says what is wrong with a result; nothing if it is as cyclonus expects.
func problem(result *connectivity.Result) string {
	if result.Err != nil {
		return result.Err.Error()
	}
	var problems []string
	for i, step := range result.Steps {
		table := step.LastComparison()
		asked, wrong := 0, []string{}
		for _, key := range table.Wrapped.Keys() {
			if ignoreLoopback && key.From == key.To {
				continue
			}
			item := table.Get(key.From, key.To)
			for port, expected := range item.Simulated.JobResults {
				asked++
				if found := item.Kube.JobResults[port]; found == nil || found.Combined != expected.Combined {
					wrong = append(wrong, fmt.Sprintf("%s -> %s %s is not %s", key.From, key.To, port, expected.Combined))
				}
			}
		}
		if len(wrong) > 0 {
			some := strings.Join(wrong[:min(shown, len(wrong))], ", ")
			problems = append(problems, fmt.Sprintf("step %d: %d of %d answers are wrong: %s", i+1, len(wrong), asked, some))
		}
	}
	return strings.Join(problems, "; ")
}

func try(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
