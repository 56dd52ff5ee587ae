// tunnel sets up the tunnel that a file describes, as the image does at boot, or with -state shows its peers.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/backdoor-rhs/backdoor/boot/wireguard"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "tunnel:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "-state" {
		peers, err := wireguard.State(args[1])
		for _, p := range peers {
			fmt.Printf("peer %v handshake %v received %d sent %d\n", p.PublicKey, !p.LastHandshake.IsZero(), p.Received, p.Sent)
		}
		return err
	}
	b, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var c wireguard.Config
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	key, err := wireguard.Up(c)
	if err != nil {
		return err
	}
	covered, err := wireguard.Covers(c.Addresses[0].Addr())
	if err != nil || !covered {
		return fmt.Errorf("the tunnel does not cover its own address: %w", err)
	}
	fmt.Println("public key", key)
	return nil
}
