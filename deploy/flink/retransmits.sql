-- Retransmits per minute of event time, host and peer, to the topic tcp_retransmit_minute. Needs tables.sql.
--
-- No window: after an outage a producer delivers its spool, hours late, and a window would silently drop these events.
-- Here they correct the row of their minute. State expires after state.ttl without updates; later events would start
-- their minute's row from zero. So state.ttl must be longer than outages; at most spool.max_age_s is needed.
SET 'pipeline.name' = 'rebpf retransmits';
SET 'table.exec.state.ttl' = '1 d';
-- At most one result row per key every 10 s, instead of one per event.
SET 'table.exec.mini-batch.enabled' = 'true';
SET 'table.exec.mini-batch.allow-latency' = '10 s';
SET 'table.exec.mini-batch.size' = '50000';

INSERT INTO tcp_retransmit_minute
WITH transmits AS (
  SELECT * FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY boot_id, cpu, cpu_seq ORDER BY arrived ASC) AS copy_number
    FROM tcp_transmit
  )
  WHERE copy_number = 1
),
retransmits AS (
  SELECT * FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY boot_id, cpu, cpu_seq ORDER BY arrived ASC) AS copy_number
    FROM tcp_retransmit
  )
  WHERE copy_number = 1
),
-- Weighted with sample_rate. A retransmitted segment is in both topics, so segs includes it.
events AS (
  SELECT CAST(ts AS TIMESTAMP(3)) AS ts, host, daddr, segs * sample_rate AS segs, CAST(0 AS BIGINT) AS retransmitted_segs,
    CAST(NULL AS STRING) AS cause, NULLIF(srtt_us, 0) AS srtt_us
  FROM transmits
  UNION ALL
  SELECT CAST(ts AS TIMESTAMP(3)), host, daddr, CAST(0 AS BIGINT), segs * sample_rate, cause, CAST(NULL AS BIGINT)
  FROM retransmits
),
minutes AS (
  SELECT FLOOR(ts TO MINUTE) AS window_start, host, daddr, SUM(segs) AS segs, SUM(retransmitted_segs) AS retransmitted_segs,
    COLLECT(cause) AS causes, PERCENTILE(srtt_us, ARRAY[0.5, 0.95, 0.99]) AS srtt_us
  FROM events
  GROUP BY FLOOR(ts TO MINUTE), host, daddr
)
SELECT window_start, host, daddr, segs, retransmitted_segs,
  CAST(retransmitted_segs AS DOUBLE) / NULLIF(segs, 0) AS ratio,
  causes, srtt_us[1], srtt_us[2], srtt_us[3]
FROM minutes;
