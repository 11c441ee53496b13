package main

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"
)

const (
	// The programs submit without a wakeup, so the rings are read on a timer.
	drainInterval = 50 * time.Millisecond
	batchRecords  = 1024
	batchBytes    = 1 << 19
)

// batch is messages that share memory; it goes back to its pool when Kafka has answered for the last of them.
type batch struct {
	records []kgo.Record
	values  []byte
	open    atomic.Int32
	promise func(*kgo.Record, error)
}

// pump moves one stream from its ring to its topic.
type pump struct {
	topic     string
	encode    func(dst []byte, event unsafe.Pointer, run []byte, utcOffsetNs int64) int
	flows     *flowTable
	reader    *ringbuf.Reader
	client    *kgo.Client
	pool      sync.Pool
	delivered atomic.Int64
	failed    atomic.Int64
}

func newPump(topic string, ring *ebpf.Map, flows *flowTable, client *kgo.Client) (*pump, error) {
	reader, err := ringbuf.NewReader(ring)
	if err != nil {
		return nil, err
	}
	// In the past: a read never waits, and says so when the ring is empty.
	reader.SetDeadline(time.Unix(1, 0))
	p := &pump{topic: topic, flows: flows, reader: reader, client: client}
	p.pool.New = func() any {
		b := &batch{records: make([]kgo.Record, 0, batchRecords), values: make([]byte, 0, batchBytes)}
		b.promise = func(_ *kgo.Record, err error) { p.settle(b, err) }
		return b
	}
	return p, nil
}

// run drains the ring until stopped is closed, and then once more.
func (p *pump) run(stopped <-chan struct{}) error {
	ticker := time.NewTicker(drainInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if err := p.drain(); err != nil {
				return err
			}
		case <-stopped:
			return p.drain()
		}
	}
}

func (p *pump) drain() error {
	var record ringbuf.Record
	b := p.pool.Get().(*batch)
	now, offset := time.Now(), utcOffsetNs()
	for {
		err := p.reader.ReadInto(&record)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			p.send(b)
			return nil
		}
		if err != nil {
			return err
		}
		// Both events begin with a segment, and a segment with a flow.
		event := unsafe.Pointer(unsafe.SliceData(record.RawSample))
		flow := p.flows.find((*flow)(event))
		start := len(b.values)
		if len(b.records) == batchRecords || batchBytes-start < maxVaryingBytes+len(flow.run) {
			p.send(b)
			b, start = p.pool.Get().(*batch), 0
			now, offset = time.Now(), utcOffsetNs()
		}
		end := start + p.encode(b.values[start:batchBytes], event, flow.run, offset)
		b.values = b.values[:end]
		b.records = append(b.records, kgo.Record{Topic: p.topic, Key: flow.key, Value: b.values[start:end:end], Timestamp: now})
	}
}

// send hands a batch to the client. It waits while the client has no room; the ring holds what comes meanwhile.
func (p *pump) send(b *batch) {
	if len(b.records) == 0 {
		p.pool.Put(b)
		return
	}
	b.open.Store(int32(len(b.records)))
	for i := range b.records {
		p.client.Produce(context.Background(), &b.records[i], b.promise)
	}
}

func (p *pump) settle(b *batch, err error) {
	if err == nil {
		p.delivered.Add(1)
	} else {
		p.failed.Add(1)
	}
	if b.open.Add(-1) == 0 {
		b.records, b.values = b.records[:0], b.values[:0]
		p.pool.Put(b)
	}
}

// utcOffsetNs returns what the kernel's monotonic clock lacks to nanoseconds since 1970.
func utcOffsetNs() int64 {
	var monotonic unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic); err != nil {
		panic(err) // the clock is always there
	}
	return time.Now().UnixNano() - monotonic.Nano()
}
