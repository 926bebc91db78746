package sctp

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
	"syscall"
	"time"
)

const (
	// retransmission is how long an answer may take: RTO.Initial of the RFC.
	retransmission = time.Second
	// attempts is how often something is sent: Max.Init.Retransmits of the RFC.
	attempts = 8
)

// SCTPConn is an association.
type SCTPConn struct {
	socket         *net.IPConn
	port, peerPort uint16
	isServer       bool
	opened, ended  func()
	ownTag         uint32
	cookie         []byte
	deadline       time.Time
	// messages are those that the peer has sent. It is closed with the peer's last one.
	messages chan []byte
	// news says that something below has changed. One at a time waits for it.
	news chan struct{}

	lock                                 sync.Mutex
	peerTag                              uint32
	isOpen, isPeerDone, isClosing, isEnd bool
	isAborted                            bool
	// The numbers of the last messages: sent, known to be received by the peer, and received here.
	sent, acknowledged, received uint32
}

func newConn(socket *net.IPConn, port, peerPort uint16) *SCTPConn {
	first := random()
	return &SCTPConn{
		socket: socket, port: port, peerPort: peerPort, ownTag: random() | 1, sent: first, acknowledged: first,
		cookie: binary.BigEndian.AppendUint32(nil, random()), messages: make(chan []byte, 64), news: make(chan struct{}, 1),
		opened: func() {}, ended: func() {},
	}
}

func (c *SCTPConn) isWith(tag uint32) bool {
	c.lock.Lock()
	defer c.lock.Unlock()
	return c.peerTag == tag
}

// open is the client's side of the four packets that open an association.
func (c *SCTPConn) open() error {
	err := c.until(attempts, func() bool { return c.peerTag != 0 }, func() { c.send(initChunk(chunkInit, c.ownTag, c.sent+1, nil)) })
	if err != nil {
		return err
	}
	return c.until(attempts, func() bool { return c.isOpen }, func() { c.send(chunk{kind: chunkCookieEcho, body: c.cookie}) })
}

// Write sends a message and waits until the peer has it.
func (c *SCTPConn) Write(message []byte) (int, error) {
	c.lock.Lock()
	c.sent++
	c.lock.Unlock()
	// One at a time: the peer has it if it has the last number.
	hasIt := func() bool { return c.acknowledged == c.sent }
	if err := c.until(attempts, hasIt, func() { c.send(dataChunk(c.sent, message)) }); err != nil {
		return 0, err
	}
	return len(message), nil
}

// Close ends the association. A server's peer may still be sending: it is answered for some seconds.
func (c *SCTPConn) Close() error {
	c.lock.Lock()
	c.isClosing = true
	c.lock.Unlock()
	end := func(attempts int) {
		// A peer that does not answer is no problem of this end.
		_ = c.until(attempts, func() bool { return c.isEnd }, c.shutdown)
		c.ended()
		c.socket.Close()
	}
	if c.isServer {
		go end(attempts)
	} else {
		end(1)
	}
	return nil
}

func (c *SCTPConn) shutdown() {
	if c.isPeerDone {
		c.send(chunk{kind: chunkShutdownAck})
	} else {
		c.send(chunk{kind: chunkShutdown, body: binary.BigEndian.AppendUint32(nil, c.received)})
	}
}

// until repeats an act until the goal is reached. It holds the lock for both.
func (c *SCTPConn) until(attempts int, goal func() bool, act func()) error {
	for range attempts {
		c.lock.Lock()
		act()
		c.lock.Unlock()
		for late := time.After(retransmission); late != nil; {
			select {
			case <-c.news:
			case <-late:
				late = nil
			}
			c.lock.Lock()
			isReached, isAborted := goal(), c.isAborted
			c.lock.Unlock()
			if isReached {
				return nil
			}
			if isAborted {
				return syscall.ECONNREFUSED
			}
		}
	}
	return syscall.ETIMEDOUT
}

// send sends a packet of one chunk. The caller holds the lock, or is alone.
func (c *SCTPConn) send(it chunk) {
	tag := c.peerTag
	if it.kind == chunkInit {
		tag = 0
	}
	// What is lost is sent again.
	_, _ = c.socket.Write(format(packet{from: c.port, to: c.peerPort, tag: tag, chunks: []chunk{it}}))
}

// handle does what a packet of the peer asks for.
func (c *SCTPConn) handle(packet packet) {
	c.lock.Lock()
	wasOpen := c.isOpen
	for _, chunk := range packet.chunks {
		// All but an INIT carry this end's tag, or are not the peer's.
		if chunk.kind == chunkInit || packet.tag == c.ownTag {
			c.obey(chunk)
		}
	}
	isNew := c.isOpen && !wasOpen
	c.lock.Unlock()
	select {
	case c.news <- struct{}{}:
	default:
	}
	if isNew {
		c.opened()
	}
}

// obey changes the state by one chunk, and answers it.
func (c *SCTPConn) obey(it chunk) {
	number := it.number()
	switch it.kind {
	case chunkInit:
		if !c.isOpen {
			c.peerTag, c.received = number, it.firstMessage()-1
		}
		c.send(initChunk(chunkInitAck, c.ownTag, c.sent+1, c.cookie))
	case chunkInitAck:
		if c.peerTag == 0 {
			c.peerTag, c.received, c.cookie = number, it.firstMessage()-1, it.cookie()
		}
	case chunkCookieEcho:
		if bytes.Equal(it.body, c.cookie) {
			c.isOpen = true
			c.send(chunk{kind: chunkCookieAck})
		}
	case chunkCookieAck:
		c.isOpen = true
	case chunkData:
		if message := it.message(); number == c.received+1 && message != nil && !c.isPeerDone && len(c.messages) < cap(c.messages) {
			c.received = number
			c.messages <- message
		}
		c.send(sackChunk(c.received))
	case chunkSack:
		c.acknowledged = number
	case chunkHeartbeat:
		c.send(chunk{kind: chunkHeartbeatAck, body: it.body})
	case chunkShutdown:
		c.acknowledged = number
		c.finish()
		if c.isClosing {
			c.send(chunk{kind: chunkShutdownAck})
		}
	case chunkShutdownAck:
		c.send(chunk{kind: chunkShutdownComplete})
		c.isEnd = true
		c.finish()
	case chunkShutdownComplete:
		c.isEnd = true
	case chunkAbort:
		c.isEnd, c.isAborted = true, true
		c.finish()
	}
}

// finish notes that the peer sends no more.
func (c *SCTPConn) finish() {
	if !c.isPeerDone {
		c.isPeerDone = true
		close(c.messages)
	}
}
