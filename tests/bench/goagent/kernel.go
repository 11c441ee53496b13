package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// The programs are loaded and attached when this process starts (__main__.py), and their descriptors are inherited.

// counters is struct counters of bpf/events.h.
type counters struct {
	Begin        uint64
	LostRingFull uint64
	Seq          uint64
	Forgotten    uint64
	WakeupMask   uint64
}

func inheritedMap(descriptor int) (*ebpf.Map, error) {
	m, err := ebpf.NewMapFromFD(descriptor)
	if err != nil {
		return nil, fmt.Errorf("map descriptor %d: %w", descriptor, err)
	}
	return m, nil
}

// passed returns how many events of a stream passed the filter.
func passed(m *ebpf.Map, stream uint32) (total uint64, err error) {
	var perCPU []counters
	if err := m.Lookup(stream, &perCPU); err != nil {
		return 0, err
	}
	for _, each := range perCPU {
		total += each.Seq - each.Begin
	}
	return total, nil
}

// detach closes the links, and returns when no program runs any more.
func detach(links string) error {
	var errs []error
	for text := range strings.SplitSeq(links, ",") {
		descriptor, err := strconv.Atoi(text)
		if err == nil {
			err = unix.Close(descriptor)
		}
		errs = append(errs, err)
	}
	// MEMBARRIER_CMD_GLOBAL: programs run in RCU sections, and this waits them out.
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, 1, 0, 0); errno != 0 {
		errs = append(errs, errno)
	}
	return errors.Join(errs...)
}

// dialer leaves out of the events what the agent's own connections send.
func dialer(ownSockets *ebpf.Map) func(ctx context.Context, network, host string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(descriptor uintptr) {
			cookie, err := unix.GetsockoptUint64(int(descriptor), unix.SOL_SOCKET, unix.SO_COOKIE)
			if err == nil {
				err = ownSockets.Put(cookie, uint8(1))
			}
			failed = err
		})
		return errors.Join(err, failed)
	}}
	return d.DialContext
}
