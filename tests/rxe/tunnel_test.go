package rxe

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/backdoor-rhs/backdoor/boot/wireguard"
)

// TestTunnel: two of our engines, in two machines, read and write each other's memory inside a WireGuard tunnel that the
// machines make as our images do. On the wire there are datagrams of WireGuard and nothing of it in the clear, which a
// second run without the tunnel shows to be seen if it were there.
func TestTunnel(t *testing.T) {
	if testing.Short() {
		t.Skip("boots kernels in QEMU: not with -short")
	}
	ctx, stop := context.WithTimeout(context.Background(), 3*time.Minute)
	defer stop()
	n, err := NewNetwork(netip.MustParsePrefix("10.81.0.1/24"))
	if errors.Is(err, unix.EPERM) {
		t.Skip("a network between guests takes root")
	} else if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	dir := t.TempDir()
	programs := map[string]string{"rxepeer": buildPeer(t)}
	if programs["tunnel"], err = build(dir, "boot/wireguard/testdata/tunnel"); err != nil {
		t.Fatal(err)
	}
	const port = 51820
	ends := [2]struct{ wire, inside string }{{"10.81.0.2", "10.80.0.1"}, {"10.81.0.3", "10.80.0.2"}}
	var keys [2]wireguard.Key
	for i := range keys {
		if keys[i], err = wireguard.LoadKey(filepath.Join(dir, ends[i].wire)); err != nil {
			t.Fatal(err)
		}
	}
	guest := func(i int, script string) Guest {
		me, peer := ends[i], ends[1-i]
		cfg, err := json.Marshal(wireguard.Config{
			Name: "wg0", PrivateKeyFile: "/key", ListenPort: port, Addresses: []netip.Prefix{netip.MustParsePrefix(me.inside + "/24")},
			Peers: []wireguard.Peer{{
				PublicKey: keys[1-i].Public(), AllowedIPs: []netip.Prefix{netip.MustParsePrefix(peer.inside + "/32")},
				Endpoint: netip.AddrPortFrom(netip.MustParseAddr(peer.wire), port),
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return Guest{
			Kernel: "6.1-generic", Addr: netip.MustParsePrefix(me.wire + "/24"), Net: n, Programs: programs, Plain: true, Modules: []string{"wireguard"},
			Files: map[string]string{"/wg0.json": string(cfg), "/key": keys[i].String()}, Script: "tunnel /wg0.json\n" + script,
		}
	}
	seen, err := n.sniff(ctx, port)
	if err != nil {
		t.Fatal(err)
	}
	serving, halt := context.WithCancel(ctx)
	var server bytes.Buffer
	var wait sync.WaitGroup
	a := guest(0, "rxepeer -addr 10.80.0.1 -size 1048576 &\nrxepeer -addr 10.81.0.2 -size 1048576")
	wait.Go(func() { a.Run(serving, &server) })
	var client bytes.Buffer
	b := guest(1, `try() { n=0; while ! rxepeer -addr $1 -rping $2:7174 2>/log && [ $n -lt 20 ]; do sleep 1; n=$((n+1)); done; [ $n -lt 20 ] && echo "result $3 ok" || cat /log; }
try 10.80.0.2 10.80.0.1 tunnel
rxepeer -addr 10.80.0.2 -check 10.80.0.1:7175 && echo "result memory ok"
tunnel -state wg0
try 10.81.0.3 10.81.0.2 clear
`)
	err = b.Run(ctx, &client)
	halt()
	wait.Wait()
	got := seen()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, &client, &server)
	}
	for _, want := range []string{"result tunnel ok", "result memory ok", "result clear ok", "peer " + keys[0].Public().String() + " handshake true", "public key " + keys[1].Public().String()} {
		if !strings.Contains(client.String(), want) {
			t.Errorf("the client does not say %q:\n%s\n%s", want, &client, &server)
		}
	}
	if got.tunnel < 1000 || got.inside != 0 || got.insideText != 0 {
		t.Errorf("on the wire: %+v; want datagrams of the tunnel, and none from inside", got)
	}
	if got.clear == 0 || got.clearText == 0 {
		t.Errorf("on the wire: %+v; want what went without the tunnel to be seen", got)
	}
}

// traffic is what was seen on the wire.
type traffic struct {
	tunnel             int // datagrams to the tunnel's port
	clear, clearText   int // RoCEv2 packets between outer addresses, and those with rping's text
	inside, insideText int // packets with an inner address, and text in other frames
}

// sniff watches all frames of the network until the returned function is called.
func (n *Network) sniff(ctx context.Context, tunnelPort uint16) (func() traffic, error) {
	fd := -1
	err := n.Do(func() (err error) {
		const all = unix.ETH_P_ALL
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all>>8|all&0xff<<8))
		return err
	})
	if err != nil {
		return nil, err
	}
	unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	ctx, stop := context.WithCancel(ctx)
	var got traffic
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer unix.Close(fd)
		b := make([]byte, 1<<16)
		for ctx.Err() == nil {
			k, err := unix.Read(fd, b)
			if err != nil || k < 42 {
				continue
			}
			f := b[:k]
			text := bytes.Contains(f, []byte("backdoor-ping"))
			ip := f[12] == 8 && f[13] == 0 && f[14] == 0x45
			dst := binary.BigEndian.Uint16(f[36:])
			switch {
			case ip && f[30] == 10 && f[31] == 80: // destination 10.80.0.0/16
				got.inside++
			case ip && f[23] == unix.IPPROTO_UDP && dst == tunnelPort:
				got.tunnel++
			case ip && f[23] == unix.IPPROTO_UDP && dst == 4791:
				got.clear++
				if text {
					got.clearText++
				}
				continue
			}
			if text {
				got.insideText++
			}
		}
	}()
	return func() traffic { stop(); <-done; return got }, nil
}
