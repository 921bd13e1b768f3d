-- Sessions of this database that are in a transaction, or in a message that may begin another one with the message's own (earlier) now().
-- vxid: the transaction's own lock, visible to every role; the times are null for other users' sessions without pg_read_all_stats.
SELECT a.pid, l.virtualxid AS vxid, a.usename::text AS usename, a.application_name, a.state, a.xact_start, a.query_start, a.backend_type
  FROM pg_stat_activity a
  LEFT JOIN pg_locks l ON l.pid = a.pid AND l.locktype = 'virtualxid' AND l.granted
 WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()
   AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
   AND (l.virtualxid IS NOT NULL OR a.xact_start IS NOT NULL OR a.state IN ('active', 'disabled', 'fastpath function call'))
