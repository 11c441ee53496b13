-- Retransmissions per minute of event time, host and peer, to the topic tcp_retransmit_minute. Needs tables.sql.
--
-- From flow records: each adds what its connection did since the previous record. A connection's first record counts in
-- full if the connection began within the minute before; if it is older, only later records count. A socket that connects
-- again starts at 0, and so do the causes of retransmissions when the producer restarts: the part of total_retrans that no
-- cause accounts for has the cause 'other'. If another counter decreases, as in an interval record that was written while
-- the connection closed, it adds nothing. segs_out lacks a server's SYN-ACKs, which are sent before it has a socket: they
-- are added. A producer delivers the records of a connection in order, also after an outage, so the order is that of
-- arrival, and a record that is not later than the one before is a copy.
--
-- No window: after an outage a producer delivers its spool, hours late, and a window would silently drop these records.
-- Here they correct the row of their minute. State expires after state.ttl without updates; later records would start
-- their minute's row from zero. So state.ttl must be longer than outages, but need not exceed spool.max_age_s.
SET 'pipeline.name' = 'rebpf retransmits';
SET 'table.exec.state.ttl' = '1 d';
-- At most one result row per key every 10 s, instead of one per record.
SET 'table.exec.mini-batch.enabled' = 'true';
SET 'table.exec.mini-batch.allow-latency' = '10 s';
SET 'table.exec.mini-batch.size' = '50000';

INSERT INTO tcp_retransmit_minute
WITH flows AS (
  SELECT * FROM (
    SELECT *, LAG(last_ns) OVER w AS last_ns_before
    FROM (
      SELECT *, MAX(ts_ns) OVER w AS last_ns
      FROM (SELECT *, COALESCE(CAST(sk_cookie AS STRING), flow) AS socket FROM tcp_flow)
      WINDOW w AS (PARTITION BY host, boot_id, netns, socket ORDER BY arrived)
    )
    WINDOW w AS (PARTITION BY host, boot_id, netns, socket ORDER BY arrived)
  )
  WHERE last_ns_before IS NULL OR ts_ns > last_ns_before
),
earlier AS (
  SELECT *, LAG(ts_ns) OVER w AS ts_ns_before, LAG(reason) OVER w AS reason_before,
    LAG(segs_out) OVER w AS segs_out_before, LAG(total_retrans) OVER w AS total_retrans_before,
    LAG(retrans_rto) OVER w AS retrans_rto_before, LAG(retrans_fast) OVER w AS retrans_fast_before,
    LAG(retrans_slow_start) OVER w AS retrans_slow_start_before, LAG(retrans_tlp) OVER w AS retrans_tlp_before,
    LAG(retrans_syn) OVER w AS retrans_syn_before, LAG(retrans_syn_ack) OVER w AS retrans_syn_ack_before
  FROM flows
  WINDOW w AS (PARTITION BY host, boot_id, netns, socket ORDER BY arrived)
),
sockets AS (
  SELECT *, start_ns >= ts_ns - 60000000000 AS is_new,
    start_ns > ts_ns_before AND (reason_before = 'close' OR segs_out < segs_out_before) AS again
  FROM earlier
),
differences AS (
  SELECT CAST(ts AS TIMESTAMP(3)) AS ts, host, daddr, NULLIF(srtt_us, 0) AS srtt_us,
    CASE WHEN again THEN segs_out WHEN segs_out_before IS NULL THEN IF(is_new, segs_out, 0)
      ELSE GREATEST(0, segs_out - segs_out_before + IF(segs_out_before - segs_out > 2147483648, 4294967296, 0)) END AS segs_out,
    CASE WHEN role = 'server' AND (again OR segs_out_before IS NULL AND is_new) THEN 1 ELSE 0 END AS first_syn_ack,
    CASE WHEN again THEN total_retrans WHEN total_retrans_before IS NULL THEN IF(is_new, total_retrans, 0) ELSE GREATEST(0, total_retrans - total_retrans_before) END AS total_retrans,
    CASE WHEN again OR retrans_rto < retrans_rto_before THEN retrans_rto WHEN retrans_rto_before IS NULL THEN IF(is_new, retrans_rto, 0) ELSE retrans_rto - retrans_rto_before END AS retrans_rto,
    CASE WHEN again OR retrans_fast < retrans_fast_before THEN retrans_fast WHEN retrans_fast_before IS NULL THEN IF(is_new, retrans_fast, 0) ELSE retrans_fast - retrans_fast_before END AS retrans_fast,
    CASE WHEN again OR retrans_slow_start < retrans_slow_start_before THEN retrans_slow_start WHEN retrans_slow_start_before IS NULL THEN IF(is_new, retrans_slow_start, 0) ELSE retrans_slow_start - retrans_slow_start_before END AS retrans_slow_start,
    CASE WHEN again OR retrans_tlp < retrans_tlp_before THEN retrans_tlp WHEN retrans_tlp_before IS NULL THEN IF(is_new, retrans_tlp, 0) ELSE retrans_tlp - retrans_tlp_before END AS retrans_tlp,
    CASE WHEN again OR retrans_syn < retrans_syn_before THEN retrans_syn WHEN retrans_syn_before IS NULL THEN IF(is_new, retrans_syn, 0) ELSE retrans_syn - retrans_syn_before END AS retrans_syn,
    CASE WHEN again OR retrans_syn_ack < retrans_syn_ack_before THEN retrans_syn_ack WHEN retrans_syn_ack_before IS NULL THEN IF(is_new, retrans_syn_ack, 0) ELSE retrans_syn_ack - retrans_syn_ack_before END AS retrans_syn_ack
  FROM sockets
),
minutes AS (
  SELECT FLOOR(ts TO MINUTE) AS window_start, host, daddr, SUM(segs_out + retrans_syn_ack + first_syn_ack) AS segs, SUM(total_retrans) AS retransmitted_segs,
    MAP['other', SUM(GREATEST(0, total_retrans - retrans_rto - retrans_fast - retrans_slow_start - retrans_tlp - retrans_syn - retrans_syn_ack)), 'rto', SUM(retrans_rto), 'fast', SUM(retrans_fast), 'slow_start', SUM(retrans_slow_start), 'tlp', SUM(retrans_tlp), 'syn', SUM(retrans_syn), 'syn_ack', SUM(retrans_syn_ack)] AS causes,
    PERCENTILE(srtt_us, ARRAY[0.5, 0.95, 0.99]) AS srtt_us
  FROM differences
  GROUP BY FLOOR(ts TO MINUTE), host, daddr
)
SELECT window_start, host, daddr, segs, retransmitted_segs,
  CAST(retransmitted_segs AS DOUBLE) / NULLIF(segs, 0) AS ratio,
  causes, srtt_us[1], srtt_us[2], srtt_us[3]
FROM minutes;
