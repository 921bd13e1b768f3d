-- Who the sessions are that are waited for. No statement text: it may hold values.
SELECT pid, usename::text AS usename, application_name, state, xact_start, query_start FROM pg_stat_activity WHERE pid = ANY(%(pids)s) ORDER BY pid
