// Writes the AppArmor profile that containerd gives to containers to the file of the first argument.
package main

import (
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/contrib/apparmor"
)

func main() {
	text, err := apparmor.DumpDefaultProfile("cri-containerd.apparmor.d")
	if err == nil {
		err = os.WriteFile(os.Args[1], []byte(text), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
