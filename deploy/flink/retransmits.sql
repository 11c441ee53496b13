-- Retransmits per minute of event time, host and peer, to the topic tcp_retransmit_minute. Needs tables.sql.
--
-- No window: after an outage a producer delivers what it had on disk, hours late, and a window would drop it without a
-- word. Here it corrects the row of its minute. State goes when nothing has touched it for as long as state.ttl; what is
-- later still would begin its minute's row anew. So it has to be longer than outages are, at most spool.max_age_s.
SET 'pipeline.name' = 'rebpf retransmits';
SET 'table.exec.state.ttl' = '1 d';
-- A row of the result at most every 10 s for each key, and not for each event.
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
-- Weighted with sample_rate. A segment that was sent again is in both topics, so it is among segs too.
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
