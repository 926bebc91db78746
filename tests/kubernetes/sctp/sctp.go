// Package sctp speaks SCTP (RFC 9260) over raw sockets, for kernels without it. It has the functions that agnhost calls, and of
// the protocol what a test of connectivity needs: whole messages, one at a time, without a place in a stream.
//
// Policies judge packets, so that it does not matter to them who made these. Without SCTP agnhost's porter ends, and the pods of
// the conformance tests are never ready.
package sctp

import (
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// SCTPAddr is a port of an address. Only the first address counts.
type SCTPAddr struct {
	IPAddrs []net.IPAddr
	Port    int
}

// Network makes it a [net.Addr].
func (a *SCTPAddr) Network() string { return "sctp" }

func (a *SCTPAddr) String() string {
	host := ""
	if len(a.IPAddrs) > 0 {
		host = a.IPAddrs[0].String()
	}
	return net.JoinHostPort(host, strconv.Itoa(a.Port))
}

// ResolveSCTPAddr reads a host, which may be missing, and a port.
func ResolveSCTPAddr(_, text string) (*SCTPAddr, error) {
	host, service, err := net.SplitHostPort(text)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil, err
	}
	if host == "" {
		return &SCTPAddr{Port: int(port)}, nil
	}
	ip, err := net.ResolveIPAddr("ip", host)
	if err != nil {
		return nil, err
	}
	return &SCTPAddr{IPAddrs: []net.IPAddr{*ip}, Port: int(port)}, nil
}

// SCTPListener returns the associations that peers open to a port.
type SCTPListener struct {
	port     uint16
	sockets  []*net.IPConn
	accepted chan *SCTPConn
	lock     sync.Mutex
	peers    map[string]*SCTPConn
}

// ListenSCTP listens on a port of all addresses: agnhost asks for no others.
func ListenSCTP(_ string, address *SCTPAddr) (*SCTPListener, error) {
	listener := &SCTPListener{
		port: uint16(address.Port), accepted: make(chan *SCTPConn, 128), peers: map[string]*SCTPConn{},
	}
	// A host may have one family alone.
	var problem error
	for _, network := range []string{"ip4:132", "ip6:132"} {
		socket, err := net.ListenIP(network, nil)
		if err == nil {
			err = showDestinations(socket)
		}
		if err != nil {
			problem = err
			continue
		}
		listener.sockets = append(listener.sockets, socket)
		go receive(socket, listener.handle)
	}
	if len(listener.sockets) == 0 {
		return nil, problem
	}
	return listener, nil
}

// AcceptSCTP waits for the next association.
func (l *SCTPListener) AcceptSCTP() (*SCTPConn, error) { return <-l.accepted, nil }

// Close stops listening.
func (l *SCTPListener) Close() error {
	for _, socket := range l.sockets {
		socket.Close()
	}
	return nil
}

func (l *SCTPListener) handle(from, to net.IP, packet packet) {
	if packet.to != l.port {
		return
	}
	key := fmt.Sprint(from, " ", packet.from)
	l.lock.Lock()
	conn := l.peers[key]
	if tag := packet.offeredTag(); tag != 0 && (conn == nil || !conn.isWith(tag)) {
		// The peer's port may be in use again before the end of its last association was noticed here.
		conn = l.admit(key, from, to, packet.from)
	}
	l.lock.Unlock()
	if conn != nil {
		conn.handle(packet)
	}
}

// admit makes the association with a new peer; nil if that cannot be reached.
func (l *SCTPListener) admit(key string, from, to net.IP, port uint16) *SCTPConn {
	// Bound: answers have to leave from the address that was asked, and a node has several.
	socket, err := net.DialIP(networkOf(from), &net.IPAddr{IP: to}, &net.IPAddr{IP: from})
	if err != nil {
		return nil
	}
	conn := newConn(socket, l.port, port)
	conn.isServer = true
	conn.opened = func() { l.accepted <- conn }
	conn.ended = func() {
		l.lock.Lock()
		defer l.lock.Unlock()
		if l.peers[key] == conn {
			delete(l.peers, key)
		}
	}
	l.peers[key] = conn
	return conn
}

// DialSCTP opens an association, from a random port.
func DialSCTP(_ string, _, to *SCTPAddr) (*SCTPConn, error) {
	if len(to.IPAddrs) == 0 {
		return nil, syscall.EDESTADDRREQ
	}
	socket, err := net.DialIP(networkOf(to.IPAddrs[0].IP), nil, &to.IPAddrs[0])
	if err != nil {
		return nil, err
	}
	conn := newConn(socket, uint16(32768+random()%28000), uint16(to.Port))
	go receive(socket, func(_, _ net.IP, packet packet) {
		if packet.to == conn.port && packet.from == conn.peerPort {
			conn.handle(packet)
		}
	})
	if err := conn.open(); err != nil {
		socket.Close()
		return nil, err
	}
	return conn, nil
}

// SCTPRemoteAddr returns the peer's address.
func (c *SCTPConn) SCTPRemoteAddr(int) (*SCTPAddr, error) {
	ip := c.socket.RemoteAddr().(*net.IPAddr)
	return &SCTPAddr{IPAddrs: []net.IPAddr{*ip}, Port: int(c.peerPort)}, nil
}

// SetReadDeadline limits the next reads.
func (c *SCTPConn) SetReadDeadline(deadline time.Time) error {
	c.deadline = deadline
	return nil
}

// Read returns the next message. As with the library, no bytes mean the end.
func (c *SCTPConn) Read(buffer []byte) (int, error) {
	var late <-chan time.Time
	if !c.deadline.IsZero() {
		late = time.After(time.Until(c.deadline))
	}
	select {
	case message := <-c.messages:
		return copy(buffer, message), nil
	case <-late:
		return 0, syscall.EAGAIN
	}
}
