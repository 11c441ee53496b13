package main

// The records of the two rings, laid out as in bpf/events.h: fixed-width members, no holes, so that Go's layout is C's.

type flow struct {
	saddr, daddr [16]byte
	skCookie     uint64
	cgroupID     uint64
	netns        uint32
	uid          uint32
	sport, dport uint16
	hook         uint8
	flowKnown    uint8
	_            [2]uint8
}

type segment struct {
	flow       flow
	ts         uint64
	cpuSeq     uint64
	cpu        uint32
	known      uint32
	seq        uint32
	endSeq     uint32
	ackSeq     uint32
	payloadLen uint32
	segs       uint32
	ifindex    uint32
	sampleRate uint32
	tcpFlags   uint8
	state      uint8
	caState    uint8
	_          uint8
	tcp        [13]uint32 // srtt_us to mss, in the schema's order
	rules      uint32     // rules_version
}

type transmitEvent struct {
	segment
	isRetransmit uint32
	_            uint32
}

type retransmitEvent struct {
	segment
	err          int32
	retransmitNo uint32
	cause        uint8
	_            [7]uint8
}

// Bits of known and flowKnown.
const (
	knownSkCookie = 1 << iota
	knownCgroupID
	knownUID
	knownAckSeq
	knownCaState
	knownTCP
	knownIfindex
	knownIsRetransmit
	knownRetransmitNo
)

const unknown = "UNKNOWN"

var (
	hooks    = []string{"fentry", "kprobe", "raw_tp", "cgroup_skb"}
	causes   = []string{"other", "rto", "fast", "slow_start", "tlp", "syn", "syn_ack"}
	caStates = []string{"Open", "Disorder", "CWR", "Recovery", "Loss"}
	states   = []string{
		unknown, "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
		"LAST_ACK", "LISTEN", "CLOSING", "NEW_SYN_RECV", "BOUND_INACTIVE",
	}
)
