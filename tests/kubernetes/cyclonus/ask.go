package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mattfenwick/cyclonus/pkg/kube"
	"github.com/mattfenwick/cyclonus/pkg/worker"
	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
)

// asker runs agnhost in pods. It keeps a shell open in each: an exec for each of a hundred thousand questions would take a container
// runtime longer than the questions.
type asker struct {
	*kube.Kubernetes
	parallel, timeout int
	lock              sync.Mutex
	shells            map[string]*shell
}

// shell is an exec in a pod that runs a command for each line it receives, as many as there are at once.
type shell struct {
	input   io.Writer
	lock    sync.Mutex
	last    int
	waiting map[string]chan string
	// ended is closed with the exec, and problem is why.
	ended   chan struct{}
	problem error
}

// script answers each line "NUMBER COMMAND" by "NUMBER ok" or by the number and what the command said.
const script = `while read -r number command; do
  { if said=$($command 2>&1); then echo "$number ok"; else echo "$number" $said; fi; } &
done`

// ExecuteRemoteCommand answers what cyclonus asks its worker: a batch of questions from one pod.
func (a *asker) ExecuteRemoteCommand(namespace, pod, container string, command []string) (string, string, error, error) {
	var batch worker.Batch
	if err := json.Unmarshal([]byte(command[len(command)-1]), &batch); err != nil {
		return "", "", nil, err
	}
	shell, err := a.shell(namespace, pod, container)
	if err != nil {
		return "", "", nil, err
	}
	results := make([]*worker.Result, len(batch.Requests))
	problems := make(chan error, len(batch.Requests))
	slots := make(chan struct{}, a.parallel)
	for i, request := range batch.Requests {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			said, err := shell.run(fmt.Sprintf("/agnhost connect %s --timeout=%ds --protocol=%s",
				request.Address(), a.timeout, strings.ToLower(string(request.Protocol))))
			results[i] = &worker.Result{Request: request, Error: said}
			problems <- err
		}()
	}
	for range batch.Requests {
		// Not answered is neither allowed nor denied: an error makes it a wrong answer.
		if problem := <-problems; problem != nil {
			err = problem
		}
	}
	if err != nil {
		return "", "", nil, err
	}
	out, err := json.Marshal(results)
	return string(out), "", nil, err
}

// shell returns the shell of a pod, and opens one if there is none: the pod may be another one by the same name.
func (a *asker) shell(namespace, pod, container string) (*shell, error) {
	a.lock.Lock()
	defer a.lock.Unlock()
	key := namespace + "/" + pod
	if known := a.shells[key]; known != nil && known.isOpen() {
		return known, nil
	}
	request := a.ClientSet.CoreV1().RESTClient().Post().Namespace(namespace).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&v1.PodExecOptions{
			Container: container, Command: []string{"bash", "-c", script}, Stdin: true, Stdout: true, Stderr: true,
		}, scheme.ParameterCodec)
	executor, err := remotecommand.NewSPDYExecutor(a.RestConfig, "POST", request.URL())
	if err != nil {
		return nil, err
	}
	input, inputEnd := io.Pipe()
	output, outputEnd := io.Pipe()
	opened := &shell{input: inputEnd, waiting: map[string]chan string{}, ended: make(chan struct{})}
	go opened.read(output)
	go func() {
		options := remotecommand.StreamOptions{Stdin: input, Stdout: outputEnd, Stderr: outputEnd}
		opened.problem = fmt.Errorf("the shell in %s ended: %v", key, executor.StreamWithContext(context.Background(), options))
		outputEnd.Close()
		input.Close()
		close(opened.ended)
	}()
	a.shells[key] = opened
	return opened, nil
}

func (s *shell) isOpen() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

func (s *shell) read(output io.Reader) {
	for lines := bufio.NewScanner(output); lines.Scan(); {
		number, said, _ := strings.Cut(lines.Text(), " ")
		s.lock.Lock()
		// A line without a number is the shell's own, such as about a program that is missing.
		if answer := s.waiting[number]; answer != nil {
			answer <- said
			delete(s.waiting, number)
		}
		s.lock.Unlock()
	}
}

// run returns what a command said if it failed, and nothing if it did not.
func (s *shell) run(command string) (string, error) {
	answer := make(chan string, 1)
	s.lock.Lock()
	s.last++
	number := strconv.Itoa(s.last)
	s.waiting[number] = answer
	s.lock.Unlock()
	// Writes of one line do not mix. A closed pipe shows in what follows.
	_, _ = fmt.Fprintln(s.input, number, command)
	select {
	case said := <-answer:
		if said == "ok" {
			return "", nil
		}
		return "failed: " + said, nil
	case <-s.ended:
		return "", s.problem
	case <-time.After(patience):
		return "", fmt.Errorf("no answer from the shell to %s", command)
	}
}
