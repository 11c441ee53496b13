package main

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"testing"
	"unsafe"
)

const utcOffset = 1_700_000_000_123_456_789 // rows.py

func encodeTransmitRecord(dst []byte, record unsafe.Pointer, run []byte) int {
	return encodeTransmit(dst, (*transmitEvent)(record), run, utcOffset)
}

func encodeRetransmitRecord(dst []byte, record unsafe.Pointer, run []byte) int {
	return encodeRetransmit(dst, (*retransmitEvent)(record), run, utcOffset)
}

type message struct{ record, key, value []byte }

// producersMessages returns random records of a stream, and what the producer makes of them.
func producersMessages(t testing.TB, stream string) (messages []message) {
	command := exec.Command(".venv/bin/python", "-m", "tests.bench.goagent.rows", stream, "5000")
	command.Dir = "../../.."
	output, err := command.Output()
	if err != nil {
		t.Fatal(err)
	}
	next := func() []byte {
		end := 4 + binary.LittleEndian.Uint32(output)
		part := bytes.Clone(output[4:end])
		output = output[end:]
		return part
	}
	for len(output) > 0 {
		messages = append(messages, message{next(), next(), next()})
	}
	return messages
}

func testFlows() *flowTable {
	return newFlowTable("test-host", "5e4a1cde-0000-4000-8000-123456789abc", newCgroupPaths(""))
}

func TestMessagesAreTheProducersByteForByte(t *testing.T) {
	encoders := map[string]func([]byte, unsafe.Pointer, []byte) int{
		"transmit": encodeTransmitRecord, "retransmit": encodeRetransmitRecord,
	}
	for stream, encode := range encoders {
		t.Run(stream, func(t *testing.T) {
			messages, flows, value := producersMessages(t, stream), testFlows(), make([]byte, 8192)
			if len(messages) != 5000 {
				t.Fatalf("%d messages", len(messages))
			}
			for _, m := range messages {
				record := unsafe.Pointer(unsafe.SliceData(m.record))
				entry := flows.find((*flow)(record))
				if !bytes.Equal(entry.key, m.key) {
					t.Fatalf("key %q, not %q", entry.key, m.key)
				}
				if got := value[:encode(value, record, entry.run)]; !bytes.Equal(got, m.value) {
					t.Fatalf("%x gave\n%x, not\n%x", m.record, got, m.value)
				}
			}
		})
	}
}

func BenchmarkEncode(b *testing.B) {
	messages, flows, value := producersMessages(b, "transmit"), testFlows(), make([]byte, 8192)
	for i := 0; b.Loop(); i++ {
		record := unsafe.Pointer(unsafe.SliceData(messages[i%len(messages)].record))
		encodeTransmitRecord(value, record, flows.find((*flow)(record)).run)
	}
}
