-- Each retransmit with its flow's last transmit before it, to the topic tcp_retransmit_last. Needs tables.sql.
--
-- A join by event time: a retransmit waits until the watermarks of both topics have passed it. Flink compares event times
-- in milliseconds: within the same millisecond, the transmit may be the later one, and since_last_us is negative.
-- Duplicates have no effect: the result's key is the retransmit's id, and a copy of a transmit is the same version again.
-- The last_ columns are null if no earlier transmit of the flow is known: its state has expired, the topic begins later,
-- or the event came late, from a spool.
SET 'pipeline.name' = 'rebpf last transmits';
SET 'table.exec.state.ttl' = '1 h';
-- An idle partition would hold back the others' watermarks.
SET 'table.exec.source.idle-timeout' = '30 s';

-- tcp_transmit has retransmissions too, which are excluded here. Null: the hook cannot know.
CREATE TEMPORARY VIEW last_transmit AS
SELECT boot_id, netns, flow, ts, ts_ns, seq, end_seq, snd_cwnd, srtt_us FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY boot_id, netns, flow ORDER BY ts DESC) AS age
  FROM tcp_transmit
  WHERE is_retransmit IS NOT TRUE
)
WHERE age = 1;

INSERT INTO tcp_retransmit_last
SELECT r.boot_id, r.cpu, r.cpu_seq, r.ts_ns, r.host, r.flow, r.cause, r.seq, r.segs,
  t.ts_ns, t.seq, t.end_seq, t.snd_cwnd, t.srtt_us, (r.ts_ns - t.ts_ns) / 1000
FROM tcp_retransmit AS r
LEFT JOIN last_transmit FOR SYSTEM_TIME AS OF r.ts AS t
ON r.boot_id = t.boot_id AND r.netns = t.netns AND r.flow = t.flow;
