package main

import (
	"encoding/binary"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
)

// What stays the same for a connection is encoded once: the run of neighboring fields from host to uid, and the key.

const (
	mostFlows = 1 << 15
	places    = 1 << 12
)

type flowEntry struct {
	flow flow
	run  []byte
	key  []byte
}

// flowTable finds a flow's entry: in an array by the socket's cookie and the port, and behind it in a map.
type flowTable struct {
	host, bootID string
	cgroups      *cgroupPaths
	recent       [places]*flowEntry
	all          map[flow]*flowEntry
}

func newFlowTable(host, bootID string, cgroups *cgroupPaths) *flowTable {
	return &flowTable{host: host, bootID: bootID, cgroups: cgroups, all: make(map[flow]*flowEntry)}
}

func (t *flowTable) find(f *flow) *flowEntry {
	place := &t.recent[(f.skCookie^uint64(f.dport)<<4)%places]
	if entry := *place; entry != nil && entry.flow == *f {
		return entry
	}
	entry := t.all[*f]
	if entry == nil {
		if len(t.all) >= mostFlows {
			clear(t.all)
		}
		entry = t.encode(*f)
		t.all[*f] = entry
	}
	*place = entry
	return entry
}

func (t *flowTable) encode(f flow) *flowEntry {
	source, destination := netip.AddrFrom16(f.saddr).Unmap().String(), netip.AddrFrom16(f.daddr).Unmap().String()
	run := appendString(appendString(nil, t.host), t.bootID)
	run = appendString(run, hooks[f.hook])
	run = appendUint(run, uint64(f.netns))
	run = appendNullableUint(run, f.skCookie, f.flowKnown&knownSkCookie)
	run = appendString(appendString(run, source), destination)
	run = appendUint(appendUint(run, uint64(f.sport)), uint64(f.dport))
	run = appendNullableUint(run, f.cgroupID, f.flowKnown&knownCgroupID)
	if path, found := t.cgroups.path(f.cgroupID); found && f.flowKnown&knownCgroupID != 0 {
		run = appendString(append(run, notNull), path)
		run = appendFirst(run, unitName, path)
		run = appendFirst(run, containerName, path)
	} else {
		run = append(run, null, null, null)
	}
	run = appendNullableUint(run, uint64(f.uid), f.flowKnown&knownUID)
	key := net.JoinHostPort(source, strconv.Itoa(int(f.sport))) + ">" + net.JoinHostPort(destination, strconv.Itoa(int(f.dport)))
	return &flowEntry{flow: f, run: run, key: []byte(key)}
}

// What a cgroup's path says of its systemd unit and its container.
var (
	unitName      = regexp.MustCompile(`^(.+\.(?:service|scope|socket|mount|swap))$`)
	containerName = regexp.MustCompile(`^(?:[\w.-]+-)?([0-9a-f]{64})(?:\.scope)?$`)
)

// appendFirst appends what name captures of the innermost folder that it matches.
func appendFirst(b []byte, name *regexp.Regexp, path string) []byte {
	folders := strings.Split(path, "/")
	for i := len(folders) - 1; i >= 0; i-- {
		if found := name.FindStringSubmatch(folders[i]); found != nil {
			return appendString(append(b, notNull), found[1])
		}
	}
	return append(b, null)
}

func appendUint(b []byte, v uint64) []byte {
	return binary.AppendUvarint(b, v<<1)
}

func appendNullableUint(b []byte, v uint64, known uint8) []byte {
	if known == 0 {
		return append(b, null)
	}
	return appendUint(append(b, notNull), v)
}

// cgroupPaths resolves cgroup ids, which are inode numbers, to paths below the cgroup v2 root. One goroutine uses it.
type cgroupPaths struct {
	root  string
	paths map[uint64]string
	tried map[uint64]bool
}

func newCgroupPaths(root string) *cgroupPaths {
	return &cgroupPaths{root: root, paths: make(map[uint64]string), tried: make(map[uint64]bool)}
}

func (c *cgroupPaths) path(id uint64) (string, bool) {
	if _, found := c.paths[id]; !found && !c.tried[id] && c.root != "" {
		c.tried[id] = true
		c.walk()
	}
	path, found := c.paths[id]
	return path, found
}

func (c *cgroupPaths) walk() {
	_ = filepath.WalkDir(c.root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil // gone since it was listed
		}
		var stat syscall.Stat_t
		if syscall.Stat(path, &stat) == nil {
			c.paths[stat.Ino] = "/" + strings.TrimPrefix(strings.TrimPrefix(path, c.root), "/")
		}
		return nil
	})
}
