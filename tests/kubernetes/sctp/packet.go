package sctp

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"syscall"
)

// Types of chunks.
const (
	chunkData             = 0
	chunkInit             = 1
	chunkInitAck          = 2
	chunkSack             = 3
	chunkHeartbeat        = 4
	chunkHeartbeatAck     = 5
	chunkAbort            = 6
	chunkShutdown         = 7
	chunkShutdownAck      = 8
	chunkCookieEcho       = 10
	chunkCookieAck        = 11
	chunkShutdownComplete = 14
)

const (
	// Sizes of the packet's header, and of a DATA chunk before its message.
	headerSize, dataSize = 12, 12
	// unorderedWhole are the flags of a message in one chunk, without a place in its stream.
	unorderedWhole = 4 | 2 | 1
	// stateCookie is the parameter of INIT ACK that COOKIE ECHO returns.
	stateCookie = 7
	// fixedSize is the part of INIT and INIT ACK before the parameters.
	fixedSize = 16
	window    = 1 << 16
)

// castagnoli is the polynomial of the checksum (RFC 9260, appendix A).
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type packet struct {
	from, to uint16
	tag      uint32
	chunks   []chunk
}

type chunk struct {
	kind, flags byte
	body        []byte
}

// offeredTag returns the tag of an INIT; 0 if the packet has none.
func (p packet) offeredTag() uint32 {
	for _, chunk := range p.chunks {
		if chunk.kind == chunkInit {
			return chunk.number()
		}
	}
	return 0
}

// number returns what begins most chunks: a tag, or the number of a message.
func (c chunk) number() uint32 { return c.word(0) }

// firstMessage returns the number of the first message that the sender of an INIT or INIT ACK will send.
func (c chunk) firstMessage() uint32 { return c.word(fixedSize - 4) }

func (c chunk) word(at int) uint32 {
	if len(c.body) < at+4 {
		return 0
	}
	return binary.BigEndian.Uint32(c.body[at:])
}

// message returns what a DATA chunk carries; nil if it is too short.
func (c chunk) message() []byte {
	if len(c.body) <= dataSize {
		return nil
	}
	return c.body[dataSize:]
}

// cookie returns the state cookie of an INIT ACK.
func (c chunk) cookie() []byte {
	for rest := c.body[min(fixedSize, len(c.body)):]; len(rest) >= 4; {
		size := int(binary.BigEndian.Uint16(rest[2:]))
		if size < 4 || size > len(rest) {
			break
		}
		if binary.BigEndian.Uint16(rest) == stateCookie {
			return rest[4:size]
		}
		rest = rest[min(padded(size), len(rest)):]
	}
	return nil
}

func padded(size int) int { return (size + 3) &^ 3 }

// initChunk offers one stream in each direction. An INIT has no cookie.
func initChunk(kind byte, tag, firstMessage uint32, cookie []byte) chunk {
	body := binary.BigEndian.AppendUint32(nil, tag)
	body = binary.BigEndian.AppendUint32(body, window)
	body = append(body, 0, 1, 0, 1)
	body = binary.BigEndian.AppendUint32(body, firstMessage)
	if cookie != nil {
		body = append(body, 0, stateCookie, 0, byte(4+len(cookie)))
		body = append(body, cookie...)
	}
	return chunk{kind: kind, body: body}
}

func dataChunk(number uint32, message []byte) chunk {
	body := binary.BigEndian.AppendUint32(nil, number)
	// Stream, place in it, protocol: 0.
	body = append(body, make([]byte, dataSize-4)...)
	return chunk{kind: chunkData, flags: unorderedWhole, body: append(body, message...)}
}

func sackChunk(received uint32) chunk {
	body := binary.BigEndian.AppendUint32(nil, received)
	body = binary.BigEndian.AppendUint32(body, window)
	// No gaps, no duplicates.
	return chunk{kind: chunkSack, body: append(body, 0, 0, 0, 0)}
}

// format returns the bytes of a packet, with their checksum.
func format(p packet) []byte {
	bytes := binary.BigEndian.AppendUint16(nil, p.from)
	bytes = binary.BigEndian.AppendUint16(bytes, p.to)
	bytes = binary.BigEndian.AppendUint32(bytes, p.tag)
	bytes = append(bytes, 0, 0, 0, 0)
	for _, chunk := range p.chunks {
		bytes = append(bytes, chunk.kind, chunk.flags)
		bytes = binary.BigEndian.AppendUint16(bytes, uint16(4+len(chunk.body)))
		bytes = append(bytes, chunk.body...)
		bytes = append(bytes, make([]byte, padded(len(bytes))-len(bytes))...)
	}
	binary.LittleEndian.PutUint32(bytes[8:], crc32.Checksum(bytes, castagnoli))
	return bytes
}

// parse returns false for a packet that is damaged. It takes the checksum out of the bytes.
func parse(bytes []byte) (packet, bool) {
	if len(bytes) < headerSize {
		return packet{}, false
	}
	sum := binary.LittleEndian.Uint32(bytes[8:])
	clear(bytes[8:headerSize])
	if crc32.Checksum(bytes, castagnoli) != sum {
		return packet{}, false
	}
	result := packet{
		from: binary.BigEndian.Uint16(bytes), to: binary.BigEndian.Uint16(bytes[2:]), tag: binary.BigEndian.Uint32(bytes[4:]),
	}
	for rest := bytes[headerSize:]; len(rest) >= 4; {
		size := int(binary.BigEndian.Uint16(rest[2:]))
		if size < 4 || size > len(rest) {
			return packet{}, false
		}
		result.chunks = append(result.chunks, chunk{kind: rest[0], flags: rest[1], body: rest[4:size]})
		rest = rest[min(padded(size), len(rest)):]
	}
	return result, true
}

// receive hands each packet on, until the socket is closed.
func receive(socket *net.IPConn, handle func(from, to net.IP, packet packet)) {
	buffer, control := make([]byte, 1<<16), make([]byte, 256)
	for {
		size, controlSize, _, from, err := socket.ReadMsgIP(buffer, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// An ICMP error about what was sent; SCTP does not take it for the peer's.
			continue
		}
		bytes, to := append([]byte(nil), buffer[:size]...), destination(control[:controlSize])
		if from.IP.To4() != nil {
			// These sockets have the header, those of IPv6 do not.
			header := int(bytes[0]&15) * 4
			to, bytes = net.IP(bytes[16:20]), bytes[header:]
		}
		if packet, ok := parse(bytes); ok {
			handle(from.IP, to, packet)
		}
	}
}

// showDestinations asks the kernel for the address to which an IPv6 packet was sent.
func showDestinations(socket *net.IPConn) error {
	if socket.LocalAddr().(*net.IPAddr).IP.To4() != nil {
		return nil
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var problem error
	err = raw.Control(func(fd uintptr) {
		problem = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_RECVPKTINFO, 1)
	})
	return errors.Join(err, problem)
}

// destination returns the address that the kernel adds to an IPv6 packet.
func destination(control []byte) net.IP {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, message := range messages {
		isInfo := message.Header.Level == syscall.IPPROTO_IPV6 && message.Header.Type == syscall.IPV6_PKTINFO
		if isInfo && len(message.Data) >= net.IPv6len {
			return net.IP(append([]byte(nil), message.Data[:net.IPv6len]...))
		}
	}
	return nil
}

func networkOf(ip net.IP) string {
	if ip.To4() != nil {
		return "ip4:132"
	}
	return "ip6:132"
}

func random() uint32 {
	var bytes [4]byte
	_, _ = rand.Read(bytes[:]) // it never fails
	return binary.BigEndian.Uint32(bytes[:])
}
