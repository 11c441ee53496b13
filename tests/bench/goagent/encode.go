package main

import (
	"encoding/binary"
	"math/bits"
)

// The encoder writes Avro's binary encoding of schemas/*.avsc, field by field in the schemas' order, behind Confluent's
// frame. Fields of a flow come encoded (flows.go), and so do names.

const (
	// An upper bound of what a message takes beside its flow's run: 34 numbers of at most 10 bytes with their union's
	// branch, three names, the frame, and the word that a number's store may write too much.
	maxVaryingBytes = 512

	schemaTransmit   = 1
	schemaRetransmit = 2
)

var (
	stateNames        = encodedNames(states, false)
	caStateNames      = encodedNames(caStates, true)
	causeNames        = encodedNames(causes, false)
	frameTransmit     = [5]byte{4: schemaTransmit}
	frameRetransmit   = [5]byte{4: schemaRetransmit}
	isRetransmitNames = [2][2]byte{{2, 0}, {2, 1}}
)

// encodedNames returns the encoded name of every number that a byte can hold.
func encodedNames(names []string, nullable bool) (encoded [256][]byte) {
	for i := range encoded {
		name := unknown
		if i < len(names) {
			name = names[i]
		}
		if nullable {
			encoded[i] = append(encoded[i], notNull)
		}
		encoded[i] = appendString(encoded[i], name)
	}
	return encoded
}

// encodeTransmit writes a message to dst, which has room for maxVaryingBytes and the run, and returns its length.
func encodeTransmit(dst []byte, e *transmitEvent, run []byte, utcOffsetNs int64) int {
	n := copy(dst, frameTransmit[:])
	n = putSegment(dst, n, &e.segment, run, utcOffsetNs)
	if e.known&knownIsRetransmit == 0 {
		dst[n] = null
		return n + 1
	}
	encoded := &isRetransmitNames[0]
	if e.isRetransmit != 0 {
		encoded = &isRetransmitNames[1]
	}
	return n + copy(dst[n:], encoded[:])
}

// encodeRetransmit is encodeTransmit for the other stream.
func encodeRetransmit(dst []byte, e *retransmitEvent, run []byte, utcOffsetNs int64) int {
	n := copy(dst, frameRetransmit[:])
	n = putSegment(dst, n, &e.segment, run, utcOffsetNs)
	n += copy(dst[n:], causeNames[e.cause])
	n = putLong(dst, n, zigzag(int64(e.err)))
	return putNullable(dst, n, e.retransmitNo, e.known&knownRetransmitNo)
}

func putSegment(dst []byte, n int, s *segment, run []byte, utcOffsetNs int64) int {
	ts := int64(s.ts) + utcOffsetNs
	n = putLong(dst, n, zigzag(ts/1_000_000))
	n = putLong(dst, n, zigzag(ts))
	n = putUint32(dst, n, s.cpu)
	n = putLong(dst, n, s.cpuSeq<<1)
	n += copy(dst[n:], run)
	n = putUint32(dst, n, uint32(s.tcpFlags))
	n = putUint32(dst, n, s.seq)
	n = putUint32(dst, n, s.endSeq)
	n = putNullable(dst, n, s.ackSeq, s.known&knownAckSeq)
	n = putUint32(dst, n, s.payloadLen)
	n = putUint32(dst, n, s.segs)
	n += copy(dst[n:], stateNames[s.state])
	if s.known&knownCaState != 0 {
		n += copy(dst[n:], caStateNames[s.caState])
	} else {
		dst[n] = null
		n++
	}
	if s.known&knownTCP != 0 {
		for _, v := range &s.tcp {
			dst[n] = notNull
			n = putUint32(dst, n+1, v)
		}
	} else {
		n += copy(dst[n:], nulls[:])
	}
	n = putNullable(dst, n, s.ifindex, s.known&knownIfindex)
	n = putUint32(dst, n, s.sampleRate)
	return putUint32(dst, n, s.rules)
}

// The branches of a union ["null", T].
const null, notNull = 0, 2

var nulls [len(segment{}.tcp)]byte

func zigzag(v int64) uint64 {
	return uint64(v<<1 ^ v>>63)
}

// putUint32 writes a number of 32 bits as Avro's int or long. A store of a word without a branch: numbers like seq have
// lengths that a processor cannot predict.
func putUint32(dst []byte, n int, v uint32) int {
	if v < 0x40 {
		dst[n] = byte(v << 1)
		return n + 1
	}
	z := uint64(v) << 1
	length := (bits.Len64(z) + 6) / 7
	word := z&0x7f | z<<1&0x7f00 | z<<2&0x7f_0000 | z<<3&0x7f00_0000 | z<<4&0x7f_0000_0000
	word |= 0x8080_8080 & (1<<(8*(length-1)) - 1)
	binary.LittleEndian.PutUint64(dst[n:], word)
	return n + length
}

func putNullable(dst []byte, n int, v uint32, known uint32) int {
	if known == 0 {
		dst[n] = null
		return n + 1
	}
	dst[n] = notNull
	return putUint32(dst, n+1, v)
}

func putLong(dst []byte, n int, zigzagged uint64) int {
	return n + binary.PutUvarint(dst[n:], zigzagged)
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))<<1), s...)
}
