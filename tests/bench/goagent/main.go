// Goagent is the producer as a Go program, to be measured beside it: the same programs in the kernel, the same events,
// the same bytes to the same topics. It is started by __main__.py, ends on SIGTERM, and prints a balance.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sync/errgroup"
)

const flushTimeout = 30 * time.Second

type settings struct {
	brokers                      string
	codec                        string
	host                         string
	cgroupRoot                   string
	links                        string
	transmitPipe, retransmitPipe int
	counters, ownSockets         int
}

type balance struct {
	Passed    uint64 `json:"passed"`
	Delivered int64  `json:"delivered"`
}

func main() {
	log.SetFlags(0)
	var s settings
	flag.StringVar(&s.brokers, "brokers", "", "addresses of Kafka brokers, joined by commas")
	flag.StringVar(&s.codec, "codec", "lz4", "compression: lz4 or zstd")
	flag.StringVar(&s.host, "host", "", "name of this host in the events")
	flag.StringVar(&s.cgroupRoot, "cgroup-root", "", "where the cgroup v2 hierarchy is mounted")
	flag.StringVar(&s.links, "links", "", "descriptors of the BPF links, joined by commas")
	flag.IntVar(&s.transmitPipe, "transmit-pipe", -1, "descriptor of that map")
	flag.IntVar(&s.retransmitPipe, "retransmit-pipe", -1, "descriptor of that map")
	flag.IntVar(&s.counters, "counters", -1, "descriptor of that map")
	flag.IntVar(&s.ownSockets, "own-sockets", -1, "descriptor of that map")
	flag.Parse()
	if err := run(s); err != nil {
		log.Fatal(err)
	}
}

func run(s settings) error {
	signals, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	maps := make(map[int]*ebpf.Map)
	for _, descriptor := range []int{s.transmitPipe, s.retransmitPipe, s.counters, s.ownSockets} {
		m, err := inheritedMap(descriptor)
		if err != nil {
			return err
		}
		maps[descriptor] = m
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	client, err := newClient(s.brokers, s.codec, maps[s.ownSockets])
	if err != nil {
		return err
	}
	defer client.Close()
	newFlows := func() *flowTable {
		return newFlowTable(s.host, strings.TrimSpace(string(bootID)), newCgroupPaths(s.cgroupRoot))
	}
	transmits, err := newPump("tcp_transmit", maps[s.transmitPipe], newFlows(), client)
	if err != nil {
		return err
	}
	transmits.encode = func(dst []byte, event unsafe.Pointer, run []byte, offset int64) int {
		return encodeTransmit(dst, (*transmitEvent)(event), run, offset)
	}
	retransmits, err := newPump("tcp_retransmit", maps[s.retransmitPipe], newFlows(), client)
	if err != nil {
		return err
	}
	retransmits.encode = func(dst []byte, event unsafe.Pointer, run []byte, offset int64) int {
		return encodeRetransmit(dst, (*retransmitEvent)(event), run, offset)
	}
	pumps := []*pump{transmits, retransmits}

	stopped := make(chan struct{})
	pumping, over := errgroup.WithContext(signals)
	for _, p := range pumps {
		pumping.Go(func() error { return p.run(stopped) })
	}
	fmt.Fprintln(os.Stderr, "ready")
	<-over.Done() // by a signal, or because a pump failed
	if err := detach(s.links); err != nil {
		return err
	}
	close(stopped)
	if err := pumping.Wait(); err != nil {
		return err
	}
	return report(client, maps[s.counters], pumps)
}

func newClient(brokers, codec string, ownSockets *ebpf.Map) (*kgo.Client, error) {
	compression := kgo.Lz4Compression()
	if codec == "zstd" {
		compression = kgo.ZstdCompression()
	}
	return kgo.NewClient(
		kgo.SeedBrokers(strings.Split(brokers, ",")...),
		kgo.ClientID("goagent"),
		kgo.RequiredAcks(kgo.AllISRAcks()), // and idempotent, which is the default
		kgo.ProducerBatchCompression(compression),
		kgo.ProducerLinger(20*time.Millisecond),
		kgo.RecordPartitioner(kgo.StickyKeyPartitioner(nil)), // Java's murmur2
		kgo.MaxBufferedRecords(1<<15),                        // the producer's most in flight
		kgo.Dialer(dialer(ownSockets)),
	)
}

// report flushes what is in flight and prints the balance.
func report(client *kgo.Client, counters *ebpf.Map, pumps []*pump) error {
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	if err := client.Flush(ctx); err != nil {
		log.Printf("flush: %v", err)
	}
	balances := make(map[string]balance)
	for stream, p := range pumps {
		total, err := passed(counters, uint32(stream))
		if err != nil {
			return err
		}
		balances[p.topic] = balance{total, p.delivered.Load()}
		if failed := p.failed.Load(); failed != 0 {
			log.Printf("%s: %d messages failed", p.topic, failed)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(balances)
}
