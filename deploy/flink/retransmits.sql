-- Retransmissions per minute of event time, host and peer, to the topic tcp_retransmit_minute. Needs tables.sql.
--
-- From flow records: a minute has what connections did since their previous records. A connection's first record counts in
-- full if it began within the minute before; of an older one, only later records do. A socket that connects again starts
-- at 0, and so do the causes of its retransmissions when the producer restarts: what no cause has of the growth of
-- total_retrans is of the cause 'other'. A producer delivers the records of a connection in order, after an outage too,
-- so the order is that of arrival, and one that is not later than one before is a copy.
--
-- No window: after an outage a producer delivers its spool, hours late, and a window would silently drop these records.
-- Here they correct the row of their minute. State expires after state.ttl without updates; later records would start
-- their minute's row from zero. So state.ttl must be longer than outages; at most spool.max_age_s is needed.
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
differences AS (
  SELECT CAST(ts AS TIMESTAMP(3)) AS ts, host, daddr, NULLIF(srtt_us, 0) AS srtt_us,
    segs_out - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w THEN 0 ELSE LAG(segs_out) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, segs_out)) AS segs_out,
    total_retrans - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w THEN 0 ELSE LAG(total_retrans) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, total_retrans)) AS total_retrans,
    retrans_rto - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_rto < LAG(retrans_rto) OVER w THEN 0 ELSE LAG(retrans_rto) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_rto)) AS retrans_rto,
    retrans_fast - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_fast < LAG(retrans_fast) OVER w THEN 0 ELSE LAG(retrans_fast) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_fast)) AS retrans_fast,
    retrans_slow_start - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_slow_start < LAG(retrans_slow_start) OVER w THEN 0 ELSE LAG(retrans_slow_start) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_slow_start)) AS retrans_slow_start,
    retrans_tlp - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_tlp < LAG(retrans_tlp) OVER w THEN 0 ELSE LAG(retrans_tlp) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_tlp)) AS retrans_tlp,
    retrans_syn - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_syn < LAG(retrans_syn) OVER w THEN 0 ELSE LAG(retrans_syn) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_syn)) AS retrans_syn,
    retrans_syn_ack - COALESCE(CASE WHEN LAG(reason) OVER w = 'close' AND start_ns > LAG(ts_ns) OVER w OR retrans_syn_ack < LAG(retrans_syn_ack) OVER w THEN 0 ELSE LAG(retrans_syn_ack) OVER w END, IF(start_ns >= ts_ns - 60000000000, 0, retrans_syn_ack)) AS retrans_syn_ack
  FROM flows
  WINDOW w AS (PARTITION BY host, boot_id, netns, socket ORDER BY arrived)
),
minutes AS (
  SELECT FLOOR(ts TO MINUTE) AS window_start, host, daddr, SUM(segs_out) AS segs, SUM(total_retrans) AS retransmitted_segs,
    MAP['other', SUM(GREATEST(0, total_retrans - retrans_rto - retrans_fast - retrans_slow_start - retrans_tlp - retrans_syn - retrans_syn_ack)), 'rto', SUM(retrans_rto), 'fast', SUM(retrans_fast), 'slow_start', SUM(retrans_slow_start), 'tlp', SUM(retrans_tlp), 'syn', SUM(retrans_syn), 'syn_ack', SUM(retrans_syn_ack)] AS causes,
    PERCENTILE(srtt_us, ARRAY[0.5, 0.95, 0.99]) AS srtt_us
  FROM differences
  GROUP BY FLOOR(ts TO MINUTE), host, daddr
)
SELECT window_start, host, daddr, segs, retransmitted_segs,
  CAST(retransmitted_segs AS DOUBLE) / NULLIF(segs, 0) AS ratio,
  causes, srtt_us[1], srtt_us[2], srtt_us[3]
FROM minutes;
